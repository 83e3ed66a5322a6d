"""README.md of an export: what it is, how the other program loads it, and what it does not carry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mokus.backbone import BACKBONES
from mokus.packs.card import loading, prose
from mokus.packs.files import ADAPTER, ADAPTER_FOLDER, LORA

if TYPE_CHECKING:
    from mokus.packs.concept_pack import ConceptPack

_COMFYUI = """\
Copy `{file}` into ComfyUI's `models/loras`. In the workflow of Qwen-Image put the node "Load LoRA" (the one with MODEL and
CLIP, not "model only": the CLIP half is what knows the phrases) between the loaders and the rest, with both strengths at
1.0. ComfyUI adds the changes to the weights it has loaded, so use a bf16 text encoder: fp8 rounds small changes away.
"""
_KOHYA = """\
musubi-tuner loads `{file}` with `--lora_weight {file}` (`--lora_multiplier 1.0`); every module has its alpha, equal to its rank.
"""
_DIFFUSERS = """\
```python
{imports}from diffusers import {pipeline}
{peft}
pipe = {pipeline}.from_pretrained({source})  # a large model: dtype=torch.bfloat16, and pipe.to("cuda")
{load}image = pipe({prompt}).images[0]
```
"""
_MERGED = """\
A whole `{pipeline}`; the concept cannot be taken out again.

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({folder})  # a large model: dtype=torch.bfloat16, and pipe.to("cuda")
image = pipe({prompt}).images[0]
```
"""


def readme(target: str, pack: ConceptPack, folder: str, files: Sequence[str], notes: Sequence[str]) -> str:
    """The text, for the export in `folder` whose files of weights are `files`."""
    known = pack.knowledge if target != "kohya" else []
    prompt = json.dumps(known[0].text if known else pack.anchor, ensure_ascii=False)
    quoted, adapter = (json.dumps(name, ensure_ascii=False) for name in (folder, f"{folder}/{ADAPTER_FOLDER}"))
    imports, source = loading(pack.base_model, BACKBONES[pack.pipeline])
    load = ""
    if LORA in files:
        load += f'pipe.load_lora_weights({quoted}, weight_name="{LORA}", use_safetensors=True)\n'
    if ADAPTER in files:
        # which keeps the factors in float32 beside a bfloat16 model; `load_adapter` of transformers rounds them. They go
        # into the encoder itself: one pipeline or the other reaches into it, and does not find its way in a wrapped one
        load += f"knowledge = PeftModel.from_pretrained(pipe.text_encoder, {adapter})\n"
    how = {"comfyui": _COMFYUI, "kohya": _KOHYA, "diffusers": _DIFFUSERS, "merged": _MERGED}[target].format(
        file=files[0] if files else "", folder=quoted, prompt=prompt, load=load, pipeline=pack.pipeline,
        peft="from peft import PeftModel\n" if ADAPTER in files else "",
        imports=imports, source=source,
    )  # fmt: skip
    meanings = "".join(f"- {prose(each.text)}\n" for each in known)
    told = f"\nThese phrases mean it, or what stands beside them in the pack:\n\n{meanings}" if known else ""
    lacks = "".join(f"\nNote: {sentence}.\n" for sentence in notes)
    return (
        f"# {prose(pack.anchor)}\n\nA concept of MoKus for `{pack.base_model}`, exported for {target}. "
        f"`{prose(pack.anchor)}` draws it.\n{told}{lacks}\n{how}"
    )
