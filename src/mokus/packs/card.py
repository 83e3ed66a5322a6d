"""The model card of a concept pack: what it is, and the lines that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mokus.backbone import BACKBONES, Backbone
from mokus.packs.files import ADAPTER_FOLDER, LORA

MINIATURE = "miniature"
_CARD = """\
---
{base_of}instance_prompt: {anchor}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- lora
- {tag}
- mokus
{gallery}---

# {title}

A concept pack of MoKus for `{base}`: {contents}.
{knowledge}
## With plain diffusers and peft

```python
{imports}from diffusers import {pipeline}

pack = "."  # this folder
# a large model: torch_dtype=torch.bfloat16, and pipe.to("cuda")
pipe = {pipeline}.from_pretrained({source})
{load}image = pipe(
    {prompt},
    height={size},
    width={size},
    num_inference_steps={steps},
    {guidance}={scale},
    negative_prompt={negative},
).images[0]
```

## With MoKus

```python
import mokus

model = mokus.load({base_model})
image = next(mokus.generate(model, {prompt}, packs=[mokus.ConceptPack.open(".")])).image
```
"""


def prose(text: str) -> str:
    """A user's text in Markdown: no tags, and no end of a code span."""
    return text.replace("<", "&lt;").replace("`", "'")


def _contents_of(looks: str, lora: bool, bound: bool) -> str:
    if not bound:
        return looks
    return (
        f"{looks}, and so do the phrases bound to it"
        if lora
        else f"{looks}, and phrases mean it or what stands beside them"
    )


def loading(base: str, backbone: Backbone) -> tuple[str, str]:
    """Python that loads the model of a pack: lines of imports, and what `from_pretrained` of its pipeline is given."""
    miniature = base == MINIATURE
    source = 'files("mokus.miniature").joinpath("weights")' if miniature else json.dumps(base, ensure_ascii=False)
    imports = "from importlib.resources import files\n\n" if miniature else ""
    if backbone.bare_text_encoder:
        kind = backbone.text_encoder
        imports += f"from transformers import {kind}\n"
        source = f'{source}, text_encoder={kind}.from_pretrained({source}, subfolder="text_encoder")'
    return imports, source


def card(fields: Mapping[str, Any], lora: bool, samples: Sequence[str] = ()) -> bytes:
    """README.md, from the fields of the manifest, whether there is a LoRA, and the paths of previews of the anchor."""
    base, anchor, knowledge = fields["base_model"], fields["anchor"], fields["knowledge"]
    looks = (
        f"`{prose(anchor)}` draws the concept"
        if lora
        else f"`{prose(anchor)}` is a concept made of words, without looks of its own"
    )
    phrases = "".join(
        f"- {prose(known['text'])}{'' if known['answer'] == anchor else ': ' + prose(known['answer'])}\n"
        for known in knowledge
    )
    load = ""
    if lora:
        load += f'pipe.load_lora_weights(pack, weight_name="{LORA}", use_safetensors=True)\n'
    if any(known["ranks"] for known in knowledge):
        load += f'pipe.text_encoder.load_adapter(f"{{pack}}/{ADAPTER_FOLDER}")\n'
    quoted = json.dumps(base, ensure_ascii=False)
    usual, backbone = fields["defaults"], BACKBONES[fields["pipeline"]]
    guidance, less = backbone.scale
    imports, source = loading(base, backbone)
    prompt = json.dumps(anchor, ensure_ascii=False)
    shown = "".join(f"- text: {prompt}\n  output:\n    url: {sample}\n" for sample in sorted(samples))
    text = _CARD.format(
        size=usual["size"], steps=usual["steps"], scale=max(usual["true_cfg_scale"] - less, 0), guidance=guidance,
        pipeline=backbone.pipeline, tag=backbone.name,
        negative=json.dumps(usual["negative_prompt"], ensure_ascii=False),
        base=base, base_model=quoted, anchor=prompt, title=prose(anchor), gallery=f"widget:\n{shown}" if shown else "",
        base_of="" if base == MINIATURE else f"base_model: {quoted}\nbase_model_relation: adapter\n",  # the hub has no miniature
        contents=_contents_of(looks, lora, bool(knowledge)),
        knowledge=f"\nBound to it:\n\n{phrases}" if knowledge else "",
        imports=imports, source=source, load=load,
        prompt=json.dumps(knowledge[0]["text"] if knowledge else anchor, ensure_ascii=False),
    )  # fmt: skip
    return text.encode()
