"""A concept pack in the file layouts of other programs: ComfyUI, diffusers with peft, musubi-tuner, or merged weights.

A pack is two sets of thin factors: a LoRA on the image transformer (the looks) and shifts of the text encoder (the
knowledge). Every layout names them differently and some have no place for the second; whatever does not fit is told, one
sentence each, and never dropped in silence. Scales are explicit: alpha equals the rank or is absent, which is 1 for every
loader there is, because the scale is folded into B already. Factors are float32, as in the pack.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mokus import low_rank
from mokus.backbone import COMPONENTS, QWEN_IMAGE
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, Shifts
from mokus.memory import CPU
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.export_card import readme
from mokus.packs.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    LORA,
    README,
    clear_begun,
    locked_place,
    refuse_inside,
    refuse_taken,
)
from mokus.packs.weights import LORA_KEY, METADATA, adapter_config, adapter_tensors, factors_of
from mokus.pipeline import CORPUS_FILE, DEFAULTS_FILE, MINIATURE
from mokus.progress import Progress, silent

if TYPE_CHECKING:
    from mokus.pipeline import Model


TARGETS = ("comfyui", "diffusers", "kohya", "merged")
WORTH_TELLING = 0.01  # share of a change that rounding loses

_ENCODER = "model.language_model."  # of transformers' Qwen2.5-VL; the vision tower is beside it
_COMFY_ENCODER = "text_encoders.qwen25_7b.transformer.model."  # of ComfyUI's


@dataclass(frozen=True)
class Exported:
    """What was written, and what it does not carry."""

    target: str
    path: Path  # a folder
    files: list[str]  # in it, by name
    notes: list[str] = field(default_factory=list)  # sentences: what is not carried, or not as it is
    rounding: dict[str, float] = field(
        default_factory=dict
    )  # of merged weights: share of each part's change that is lost


def export(
    pack: ConceptPack, to: str, output: str | Path | None = None, model: Model | None = None,
    progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Write a pack in the layout of `to`, one of TARGETS, into the new folder `output` (beside you, named after both).

    "merged" needs the `model` that the pack is for, and writes it whole, in the dtype it is loaded in, with the changes
    added to its weights; the model itself is the same bits afterwards. Raises `MokusError` for an unknown target, a folder
    that is taken, a pack of which the target can carry nothing, a model that the pack is not for, and one whose weights are
    in few bits or come and go.
    """
    check_target(to)
    place = output_of(pack, to, output)
    check_place(place)
    looks, knowledge = lora_of(pack), pack.shifts()
    if not looks and not knowledge:
        raise MokusError(
            f"{pack.path} has neither looks nor knowledge, so there is nothing to export; bind some first."
        )
    if to in ("comfyui", "kohya") and pack.pipeline != QWEN_IMAGE.pipeline:
        raise MokusError(
            f"{pack.path} is for a {pack.pipeline}, whose names in {to} are not known; use --to diffusers or merged."
        )
    if to == "merged":
        return _merged(pack, looks, knowledge, place, model, progress)
    name = place.name if to in ("comfyui", "kohya") else ""
    tensors_by_file, notes = _LAYOUTS[to](pack, looks, knowledge, name)
    with _folder(place) as beside:
        for path, (tensors, metadata) in tensors_by_file.items():
            (beside / path).parent.mkdir(exist_ok=True)
            (beside / path).write_bytes(_bytes(tensors, metadata))
        if ADAPTER in tensors_by_file:
            (beside / ADAPTER_CONFIG).write_bytes(adapter_config(knowledge))
        (beside / README).write_text(readme(to, pack, place.name, sorted(tensors_by_file), notes), encoding="utf-8")
    return Exported(to, place, _names(place), notes)


def check_target(to: str) -> None:
    """Raise `MokusError` unless it is one of TARGETS."""
    if to not in TARGETS:
        near = get_close_matches(to.lower(), (*TARGETS, "musubi", "peft"), 1)
        meant = {"musubi": "kohya", "peft": "diffusers"}.get(near[0], near[0]) if near else None
        hint = f"; did you mean {meant}?" if meant else "."
        raise MokusError(f"there is no export to {to!r}, expected one of {', '.join(TARGETS)}{hint}")


def output_of(pack: ConceptPack, to: str, output: str | Path | None) -> Path:
    """Where an export goes: the folder given, or one here named after the pack and the target."""
    return Path(output) if output is not None else Path(f"{pack.path.resolve().name.removesuffix('.pack')}-{to}")


def check_place(place: Path) -> None:
    """Raise `MokusError` if something is there already, or it lies in a pack."""
    refuse_taken(place, "export")
    refuse_inside(place)


def lora_of(pack: ConceptPack) -> dict[str, LowRankShift]:
    """The LoRA of the image transformer as shifts, by module; empty for a pack of words alone."""
    return {module: LowRankShift(a, b) for module, (a, b) in factors_of(pack.lora(), LORA_KEY).items()}


# --- layouts: files of tensors with their metadata, and sentences about what they lack ---------------

_Files = dict[str, tuple[dict[str, Tensor], dict[str, str]]]


def _comfyui(pack: ConceptPack, looks: Shifts, knowledge: Shifts, name: str) -> tuple[_Files, list[str]]:
    """One file for ComfyUI's "Load LoRA" node: both halves, without alphas, which it takes for a scale of 1."""
    named = {f"transformer.{module}": shift for module, shift in looks.items()}
    foreign = []
    for module, shift in knowledge.items():
        if module.startswith(_ENCODER):
            named[_COMFY_ENCODER + module.removeprefix(_ENCODER)] = shift
        else:
            foreign.append(module)
    notes = []
    if foreign:
        notes = [f"ComfyUI has no name for {', '.join(foreign)} of the text encoder, whose change is left out"]
    if not named:
        raise MokusError(f"{pack.path}: {notes[0]}, and there is nothing else; use --to diffusers.")
    tensors = _sides(named, "lora_A.weight", "lora_B.weight")
    return {f"{name}.safetensors": (tensors, _about(pack))}, notes


def _diffusers(pack: ConceptPack, looks: Shifts, knowledge: Shifts, name: str) -> tuple[_Files, list[str]]:
    """What `load_lora_weights` and PEFT read, the latter from a folder inside."""
    found: _Files = {}
    if looks:
        found[LORA] = (pack.lora(), METADATA)
    if knowledge:
        found[ADAPTER] = (adapter_tensors(knowledge), METADATA)
    return found, []


def _kohya(pack: ConceptPack, looks: Shifts, knowledge: Shifts, name: str) -> tuple[_Files, list[str]]:
    """musubi-tuner's own format: dots are underscores, down and up, an alpha (the rank) for each module."""
    if not looks:
        raise MokusError(
            f"{pack.path} is a pack of words alone, and kohya's layout has no place for the text encoder; "
            "use --to comfyui, diffusers or merged."
        )
    named = {f"lora_unet_{module.replace('.', '_')}": shift for module, shift in looks.items()}
    tensors = _sides(named, "lora_down.weight", "lora_up.weight")
    tensors |= {f"{name}.alpha": torch.tensor(float(shift.rank)) for name, shift in named.items()}
    rank = str(next(iter(looks.values())).rank)  # a pack has the same everywhere
    about = {"ss_network_module": "networks.lora_qwen_image", "ss_network_dim": rank, "ss_network_alpha": rank}
    notes = []
    if knowledge:
        n = len(pack.knowledge)
        what = "the one phrase bound to it is" if n == 1 else f"the {n} phrases bound to it are"
        notes = [
            f"kohya's layout for Qwen-Image has no place for the text encoder, so {what} left out: only {pack.anchor!r} "
            "draws the concept"
        ]
    return {f"{name}.safetensors": (tensors, _about(pack) | about)}, notes


_LAYOUTS: Mapping[str, Callable[[ConceptPack, Shifts, Shifts, str], tuple[_Files, list[str]]]] = {
    "comfyui": _comfyui, "diffusers": _diffusers, "kohya": _kohya,
}  # fmt: skip


def _sides(shifts: Shifts, a: str, b: str) -> dict[str, Tensor]:
    sides = [(name, kind, side) for name, s in shifts.items() for kind, side in ((a, s.A), (b, s.B))]
    return {f"{name}.{kind}": side.contiguous() for name, kind, side in sides}


def _about(pack: ConceptPack) -> dict[str, str]:
    """Metadata that LoRA managers show; nothing that was bound is in it."""
    return {
        **METADATA, "modelspec.title": pack.anchor, "modelspec.trigger_phrase": pack.anchor,
        "modelspec.architecture": "qwen-image/lora",
    }  # fmt: skip


def _bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its header in order; the library writes metadata in any, and the bytes would differ."""
    data = save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


# --- merged ---------------------------------------------------------


def _merged(
    pack: ConceptPack, looks: Shifts, knowledge: Shifts, place: Path, model: Model | None, progress: Progress | None
) -> Exported:
    """The whole pipeline, with every change added to the weights in their own dtype."""
    if model is None:
        raise MokusError("a merged export needs the model that the pack is for; give it.")
    model.check_loaded(*COMPONENTS)
    pack.check_base(model)
    if model.tier.bits < 16 or model.tier.streamed:
        raise MokusError(
            f"a merged export writes plain weights, and the model is loaded in the memory tier {model.tier.name!r}; load it "
            f"with tier={CPU.name!r}."
        )
    watch, pipe = progress or silent, model.pipe
    processor = _processor(model) if model.backbone.processor else None
    with _folder(place) as beside:
        watch("merging", 0, 2, {})
        with low_rank.merged(pipe.transformer, looks) as lost, low_rank.merged(pipe.text_encoder, knowledge) as faded:
            watch("merging", 1, 2, {})
            pipe.save_pretrained(beside)
        if processor:
            shutil.rmtree(beside / "processor")
            shutil.copytree(processor, beside / "processor")
        rounding = {"looks": lost, "knowledge": faded}
        (beside / DEFAULTS_FILE).write_text(json.dumps(asdict(model.defaults), indent=2) + "\n", encoding="utf-8")
        if model.corpus:
            (beside / CORPUS_FILE).write_text("\n".join(model.corpus) + "\n", encoding="utf-8")
        notes = _rounded(rounding, str(pipe.transformer.dtype).removeprefix("torch."))
        (beside / README).write_text(readme("merged", pack, place.name, [], notes), encoding="utf-8")
    watch("merging", 2, 2, {})
    return Exported("merged", place, _names(place), notes, rounding)


def _processor(model: Model) -> Path:
    """The folder of the model's own processor, whole: `load` takes its tokenizer alone, and other programs want the rest."""
    if os.path.isdir(model.id):
        return Path(model.id, "processor")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.id, allow_patterns="processor/*"), "processor")
    except (OSError, ValueError) as error:  # what the hub's library raises, the latter for what can be no name there
        raise MokusError(f"the processor of {model.id} was not downloaded ({error}); check the connection.") from error


def _rounded(rounding: Mapping[str, float], dtype: str) -> list[str]:
    return [
        f"rounding to {dtype} loses {share:.1%} of the change that is the {part}; --dtype float32 keeps it, and so does "
        "any other target"
        for part, share in rounding.items()
        if share > WORTH_TELLING
    ]


def stored_dtype(model: str | Path | None) -> torch.dtype | None:
    """The dtype in which a pipeline's folder keeps its image transformer; None if that cannot be told, as of a hub id.

    Nor of damaged weights, of which `load` says what is wrong.
    """
    folder = files("mokus.miniature").joinpath("weights") if model in (None, MINIATURE) else model
    for file in sorted(Path(str(folder), "transformer").glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:  # which bounds the header, and checks it
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  (no dict)
        except SafetensorError:
            return None
        found = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        return found.get(kinds.pop()) if len(kinds) == 1 else None
    return None


# --- the folder ---------------------------------------------------------


@contextmanager
def _folder(place: Path) -> Iterator[Path]:
    """A folder beside the place, swapped in at the end: it is there whole or not at all.

    Meanwhile the place is locked, so whatever else was begun for it is of nobody who still writes.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with locked_place(place.resolve()):
        refuse_taken(place, "export")
        clear_begun(place)
        beside.mkdir()
        try:
            yield beside
            if place.is_dir():
                place.rmdir()  # empty, or this raises
            os.replace(beside, place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # gone already, unless something failed


def _names(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
