"""What tells one base model from another: packs are used with the model that they were made for, and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mokus.backbone import COMPONENTS, backbone_of

# What configs say that shows in no weight's shape, by the names that the libraries have kept; the place of a key, and all
# that a newer version adds with its default, is none of a model's identity.
_SHAPELESS = {
    "attention_head_dim", "axes_dims_rope", "hidden_act", "latents_mean", "latents_std", "mrope_section",
    "num_attention_heads", "num_key_value_heads", "patch_size", "rms_norm_eps", "rope_theta",
}  # fmt: skip


def fingerprint(pipe: Any) -> str:
    """sha256 over the components' classes and what of their configs weights do not show, the vocabulary, and each weight's name,
    shape and 64 of its values as bfloat16.

    Reads a few bytes of each weight only, so it is quick for any model. It does not depend on the dtype loaded, since
    values that bfloat16 holds survive any of them, nor on the libraries' versions, whose configs differ in what they list.
    """
    digest = hashlib.sha256()
    for name in COMPONENTS:
        component = getattr(pipe, name)
        config = component.config
        told = sorted(set(_shapeless(config.to_dict() if hasattr(config, "to_dict") else dict(config))))
        digest.update(f"{type(component).__name__}{told}".encode())
        for path, weight in sorted(component.state_dict().items()):
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
