"""The weights of a concept pack: two thin factors per module, by names that diffusers and peft load, checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor

from mokus.errors import MokusError
from mokus.low_rank import Shifts
from mokus.packs.files import as_json

MAX_RANK = 1 << 16

_WORD = "[A-Za-z_][A-Za-z0-9_]{0,99}"
MODULE = rf"{_WORD}(\.({_WORD}|[0-9]{{1,4}})){{1,15}}"  # words and numbers between dots
LORA_KEY = re.compile(rf"transformer\.(?P<module>{MODULE})\.lora_(?P<side>[AB])\.weight")
ADAPTER_KEY = re.compile(rf"base_model\.model\.(?P<module>{MODULE})\.lora_(?P<side>[AB])\.weight")
METADATA = {"format": "pt"}  # transformers refuses weights without it


def plain(tensor: Tensor) -> Tensor:
    """As it is stored: on the CPU, float32."""
    return tensor.detach().to("cpu", torch.float32).contiguous()


def adapter_tensors(shifts: Shifts) -> dict[str, Tensor]:
    """The text encoder's shifts by PEFT's names."""
    sides = [(module, side, getattr(shift, side)) for module, shift in shifts.items() for side in "AB"]
    return {f"base_model.model.{module}.lora_{side}.weight": plain(tensor) for module, side, tensor in sides}


def adapter_config(shifts: Shifts) -> bytes:
    """PEFT's config of a LoRA with alpha = rank, a scale of 1, in every module; whole paths, so in no other module."""
    ranks = {module: shift.rank for module, shift in sorted(shifts.items())}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != most}
    return as_json({
        "base_model_name_or_path": None, "bias": "none", "inference_mode": True, "peft_type": "LORA", "task_type": None,
        "target_modules": list(ranks), "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others,
    })  # fmt: skip


def check_lora(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `MokusError` unless these can be the LoRA of the image transformer."""
    factors = check_factors(tensors, LORA_KEY, where)
    if len({a.shape[0] for a, _ in factors.values()}) > 1:  # older diffusers scale them wrongly
        raise MokusError(f"{where} has modules of different ranks, expected the same rank everywhere; learn it again.")


def check_factors(tensors: Mapping[str, Tensor], key: re.Pattern[str], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors (A, B) of each module, after a look at every name, dtype, shape and value."""
    for name, tensor in sorted(tensors.items()):  # the same complaint at every reading
        if not key.fullmatch(name):
            raise MokusError(
                f"{where} has a tensor named {name[:200]!r}, expected names of LoRA factors; learn it again."
            )
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.numel():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise MokusError(f"{where}: {name} is {kind[:80]}, expected a float32 matrix; learn it again.")
        if not tensor.isfinite().all():
            raise MokusError(f"{where}: {name} has values that are not finite; learn it again, with smaller steps.")
    factors = factors_of(tensors, key)
    for module, (a, b) in factors.items():
        if a.shape[0] != b.shape[1] or a.shape[0] > MAX_RANK:
            raise MokusError(
                f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} do not fit; learn it again."
            )
    if 2 * len(factors) != len(tensors):
        raise MokusError(f"{where} has a factor without its other half; learn it again.")
    return factors


def factors_of(tensors: Mapping[str, Tensor], key: re.Pattern[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d_in) and B (d_out, r) of each module that has both, by a pattern of names."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := key.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    return {module: (side["A"], side["B"]) for module, side in sorted(sides.items()) if len(side) == 2}


def tensors_in(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes. Raises `MokusError` if they are none."""
    try:
        tensors: dict[str, Tensor] = tensors_of(
            data
        )  # checks the header; its numbers are views of `data`, nothing is run
    except (SafetensorError, KeyError, ValueError) as error:
        raise MokusError(f"{path} is no safetensors file ({error}); get a whole copy of the pack.") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header.get("__metadata__") != METADATA:
        raise MokusError(f"{path} has metadata that mokus did not write; get the pack from where it was made.")
    return tensors
