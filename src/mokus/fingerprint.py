"""What tells one base model from another: packs are used with the model that they were made for, and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from mokus.backbone import COMPONENTS, backbone_of

# What configs say that shows in no weight's shape, by the names that the libraries have kept; the place of a key, and all
# that a newer version adds with its default, is none of a model's identity.
_SHAPELESS = {
    "attention_head_dim", "axes_dims_rope", "hidden_act", "latents_mean", "latents_std", "mrope_section",
    "num_attention_heads", "num_key_value_heads", "patch_size", "rms_norm_eps", "rope_theta",
}  # fmt: skip


def fingerprint(pipe: Any, folder: str = "") -> str:
    """sha256 over the components' classes and what of their configs weights do not show, the vocabulary, and each weight's name,
    shape and 64 of its values as bfloat16.

    Reads a few bytes of each weight only, so it is quick for any model. It does not depend on the dtype loaded, since
    values that bfloat16 holds survive any of them, nor on the libraries' versions, whose configs differ in what they list.
    A component of diffusers that the pipeline lacks is read off the model's `folder`, with the same result. Raises `OSError`,
    `ValueError` or `SafetensorError` if that has no whole one.
    """
    digest = hashlib.sha256()
    for name in COMPONENTS:
        component = getattr(pipe, name)
        there = component is not None
        component = component if there else _empty(Path(folder), name)
        config = component.config
        told = sorted(set(_shapeless(config.to_dict() if hasattr(config, "to_dict") else dict(config))))
        digest.update(f"{type(component).__name__}{told}".encode())
        state = component.state_dict()
        for path, weight in sorted(state.items()) if there else _on_disk(Path(folder, name), sorted(state)):
            digest.update(f"{name}.{path}{tuple(weight.shape)}".encode())
            flat = weight.flatten()
            values = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.bfloat16)
            digest.update(values.view(torch.int16).numpy().tobytes())
    digest.update(json.dumps(sorted(backbone_of(pipe).tokenizer(pipe).get_vocab().items())).encode())
    return digest.hexdigest()


def _shapeless(config: Mapping[str, Any]) -> Iterator[str]:
    """ "key: value", wherever in the config it stands."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _shapeless(value)
        elif key in _SHAPELESS and value is not None:
            yield f"{key}: {json.dumps(value, default=str)}"


def _empty(folder: Path, name: str) -> Any:
    """A component of diffusers as its config in the model's folder describes it, without contents."""
    named = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get(name)
    kind = getattr(diffusers, str(named[1]) if named else "", None)
    if kind is None:
        raise ValueError(f"its {name} is {named}, expected a class of diffusers")
    with init_empty_weights():
        return kind.from_config(kind.load_config(folder / name))


def _on_disk(folder: Path, paths: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These weights of a component of diffusers, mapped: of each only what is looked at is read from the disk."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for path in paths:
            file = where.get(path, SAFETENSORS_WEIGHTS_NAME)
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(folder / file, "pt"))
            yield path, opened[file].get_tensor(path)
