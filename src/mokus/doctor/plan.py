"""What a task needs of a machine, before anything is loaded: bytes, FLOPs, seconds, and the memory tier that fits.

Only the model's configs are read. Bytes of weights are counted on the classes themselves, built without contents, and so exact;
memory beside them is rehearsed (`rehearsal`); FLOPs follow from the shapes. `benchmarks/doctor.py` holds these against
measurement, and docs/memory.md says with what result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mokus.backbone import COMPONENTS, QWEN_IMAGE, TEXT_ALONE
from mokus.doctor import rehearsal
from mokus.doctor.flops import TOKENS, image_flops, text_flops
from mokus.doctor.machine import GIB, Machine
from mokus.doctor.rehearsal import Use
from mokus.doctor.shape import SHAPES, Shape, key_of
from mokus.encoder import check_edited, entrance
from mokus.errors import MokusError
from mokus.memory import CPU, TASKS, TIERS, Tier, lacks
from mokus.places import NOISES, PLACES
from mokus.prior_prompts import OTHER_LOOKS
from mokus.settings import AT_ONCE, EditSettings, LearnSettings
from mokus.sizes import MAX_SIZE
from mokus.training.material import LENDERS

PHOTOS = 5
LINES, LINE_TOKENS = 12, 64  # of an edit's last evaluations, its own forms and the rivals that are watched, as counted
GRAMS = 3  # second moments that `least_drift` holds of every input of edited matrices, in float64
HISTORY = (
    15  # copies of all factors B, in float32, that L-BFGS holds: two of each of six steps, weights, gradient, direction
)
COPIES = 7  # of a LoRA in float32: itself, gradient, two moments, and the last good state of all but the gradient
# Tokens that pass the text encoder, counted over three edits by `least_drift` in a small model, which does not change how many:
# for an edit without a backward pass, into the edited layers (`encoder.Entering`, three times the rows), from there on without
# one (what is watched, the second time) and with one; for the statistics, once
PASSED, ENTERED, LOOKED, EVALUATED, CORPUS = 10_000, 2_000, 3_000, 10_500, 45_500
KERNELS = (
    1.25  # convolutions of the VAE need a quarter more for themselves than their tensors: on an H200 (docs/memory.md)
)
CONTEXT = 0.5 * GIB  # CUDA itself
MARGIN = 1.05  # fragments
PYTHON = 1.0 * GIB  # the interpreter, torch and its libraries in host memory

# Of that peak what was reached on an H200, and how long one block of a forward pass takes however small it is
SHARES = {"learn": 0.22, "generate": 0.37, "bind": 0.065}
LEAST = {"learn": 1.31 / 180, "generate": 0.272 / 120, "bind": 0.0}
# ... and, of how fast a CPU multiplies matrices, on two shared cores with one thread: the rest goes into all that is no product
CPU_SHARES = {"learn": 0.65, "generate": 0.6, "bind": 0.85}


# --- rehearsed, once for each shape ---------------------------------------------------------


@lru_cache(maxsize=32)
def _image_use(
    key: str, batch: int, size: int, rank: int, backward: bool, checkpointed: bool, dtype: torch.dtype
) -> Use:
    shape = SHAPES[key]
    side = size // shape.patch
    return rehearsal.image_step(
        lambda n: shape.with_layers(n).build("transformer", dtype), shape.blocks, batch, side, TOKENS,
        LearnSettings().targets, rank, backward, checkpointed,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _vae_use(key: str, batch: int, size: int, decoding: bool, dtype: torch.dtype) -> Use:
    return rehearsal.vae(SHAPES[key].build("vae", dtype), batch, size, decoding)


@lru_cache(maxsize=32)
def _text_use(key: str, rows: int, tokens: int, dtype: torch.dtype) -> Use:
    return rehearsal.reading(SHAPES[key].with_layers(text_layers=1).build("text_encoder", dtype), rows, tokens)


@lru_cache(maxsize=32)
def _edit_use(key: str, edited: int, above: int, modules: tuple[str, ...], dtype: torch.dtype) -> Use:
    shape = SHAPES[key]
    return rehearsal.edit(
        lambda n: shape.with_layers(text_layers=n).build("text_encoder", dtype),
        edited,
        above,
        modules,
        LINES,
        LINE_TOKENS,
    )


# --- the plan ---------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A part of a task: which components are on the device, and the most bytes there meanwhile."""

    name: str
    resident: tuple[str, ...]
    weights: float
    beside: float  # activations and all else

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.weights + self.beside


@dataclass(frozen=True)
class Need:
    """What a task needs in one tier."""

    tier: Tier
    stages: tuple[Stage, ...]
    host: float  # bytes

    @property
    def peak(self) -> float:
        """Of the device, bytes; on a CPU of the host."""
        return max(stage.peak for stage in self.stages)

    def fits(self, machine: Machine) -> bool:
        """The GPU and the host, as far as it is known."""
        return self.fits_gpu(machine) and self.fits_host(machine)

    def fits_gpu(self, machine: Machine) -> bool:
        """With room for CUDA itself and for fragments."""
        return self.tier is CPU or (machine.gpu is not None and self.peak * MARGIN + CONTEXT <= machine.gpu)

    def fits_host(self, machine: Machine) -> bool:
        """As far as its memory is known."""
        return machine.host is None or self.host <= machine.host


@dataclass(frozen=True)
class Work:
    """What is done: FLOPs of one unit (a training step, an edit, an image), how many of them, FLOPs once before them."""

    unit: str
    tflop: float
    units: int
    once: float
    passes: float  # times that a block of the image transformer runs in a unit

    def seconds(self, task: str, tflops: float | None, on_gpu: bool) -> tuple[float, float] | None:
        """Of a unit, and of all; None for a machine of unknown speed.

        Of how fast a CPU multiplies matrices CPU_SHARES are reached, of a GPU's peak SHARES, unless launching kernels takes
        longer (LEAST).
        """
        if tflops is None:
            return None
        rate = tflops * (SHARES if on_gpu else CPU_SHARES)[task]
        unit = max(self.tflop / rate, self.passes * LEAST[task] if on_gpu else 0.0)
        return unit, self.once / rate + unit * self.units


@dataclass(frozen=True)
class Plan:
    """For one task on one machine. `chosen` is None if nothing fits; `below` is the next tier that needs less, if one does."""

    shape: Shape
    task: str
    size: int
    machine: Machine
    needs: tuple[Need, ...]
    chosen: Need | None
    below: Need | None
    works: Mapping[str, Work]  # by tier

    def as_json(self) -> dict[str, Any]:
        """Plain data; memory in GiB."""
        shown = self.chosen or ([need for need in self.needs if need.tier is not CPU] or list(self.needs))[-1]
        work = self.works[shown.tier.name]
        seconds = work.seconds(self.task, self.machine.tflops, shown.tier is not CPU)
        return {
            "model": self.shape.source,
            "task": self.task,
            "resolution": self.size,
            "machine": {"name": self.machine.name, **_in_gib(self.machine), "tflop_per_second": self.machine.tflops},
            "parameters": self.shape.parameters,
            "disk_gib": sum(self.shape.parameters.values()) * 2 / GIB,
            "tier": self.chosen.tier.name if self.chosen else None,
            "next_tier": self.below.tier.name if self.below else None,
            "stages": [
                {"stage": s.name, "resident": list(s.resident), "weights_gib": s.weights / GIB, "peak_gib": s.peak / GIB}
                for s in shown.stages
            ],
            "tflop_once": work.once,
            f"tflop_per_{work.unit}": work.tflop,
            f"{work.unit}s": work.units,
            f"seconds_per_{work.unit}": seconds[0] if seconds else None,
            "seconds": seconds[1] if seconds else None,
            "tiers": [
                {
                    "tier": need.tier.name, "what": need.tier.text, "fits": need.fits(self.machine),
                    "fits_host": need.fits_host(self.machine),
                    "gpu_gib": None if need.tier is CPU else need.peak / GIB, "host_gib": need.host / GIB,
                    "lacks": lacks(need.tier, loaded_for(self.task)),
                }
                for need in self.needs
            ],
        }  # fmt: skip


def _in_gib(machine: Machine) -> dict[str, float | None]:
    return {key: None if value is None else value / GIB for key, value in
            (("gpu", machine.gpu), ("host", machine.host), ("disk", machine.disk))}  # fmt: skip


def plan(
    shape: Shape,
    task: str,
    machine: Machine,
    size: int | None = None,
    batch: int = AT_ONCE,
    dtype: torch.dtype | None = None,
) -> Plan:
    """What the task needs in every tier, and the first that fits the machine.

    `size` in pixels, `batch` images drawn at a time (learning has its own, in the settings). Raises `MokusError` for a
    task or a size that cannot be, and if the model has not what binding edits by default.
    """
    size = shape.defaults.size if size is None else size
    if task not in TASKS:
        raise MokusError(f"the task is {task!r}, expected one of {', '.join(TASKS)}.")
    if size > MAX_SIZE:
        raise MokusError(f"the resolution is {size}, expected at most {MAX_SIZE} pixels.")
    if size < shape.patch or size % shape.patch:
        raise MokusError(f"the resolution is {size}, expected a multiple of {shape.patch} pixels.")
    if task == "bind":
        check_bind(shape)
    on_gpu = machine.gpu is not None
    tiers = [each for each in TIERS if task in each.tasks and (on_gpu or each is CPU)]
    kinds = {each.name: torch.float32 if each is CPU else dtype or torch.bfloat16 for each in tiers}
    needs = tuple(need(shape, task, each, size, batch, kinds[each.name], loaded_for(task)) for each in tiers)
    usable = [each for each in needs if each.fits(machine) and (each.tier is not CPU or not on_gpu)]
    chosen = usable[0] if usable else None
    below = next((each for each in needs if chosen and each.tier is not CPU and each.peak < chosen.peak), None)
    works = {each.name: work(shape, task, each, size) for each in tiers}
    return Plan(shape, task, size, machine, needs, chosen, below, works)


def loaded_for(task: str) -> tuple[str, ...]:
    """The components that a command for this task loads: to bind, and to ask, the text encoder alone."""
    return TEXT_ALONE if task == "bind" else COMPONENTS


def fitting(shape: Shape, free: float, dtype: torch.dtype, loaded: tuple[str, ...] = COMPONENTS) -> Tier:
    """The tier that is taken on a GPU with so many bytes free, as in `usual`. Raises `MokusError` if there is none."""
    if found := usual(shape, Machine("", free, None, None, None), dtype, loaded):
        return found
    raise MokusError(
        f"{shape.source} does not fit into the {free / GIB:.1f} GiB that are free on the GPU in any memory tier; free some, "
        "or compute on the CPU with --tier cpu."
    )


def usual(
    shape: Shape, machine: Machine, dtype: torch.dtype = torch.bfloat16, loaded: tuple[str, ...] = COMPONENTS
) -> Tier | None:
    """The tier that a command takes by itself: the first in which all tasks of what it loads fit; None if drawing does not.

    Images are of the model's own size. If learning or binding fits in no tier, it is the first in which drawing does, or of
    the text encoder alone reading a question: they then say that their memory is full. Only the GPU's memory counts: that of
    the host is an estimate, and whether it is too little is said by the doctor and refused by nobody.
    """
    if machine.gpu is None:
        return CPU
    if sum(shape.parameters[name] for name in loaded) * dtype.itemsize * 20 < machine.gpu:
        return TIERS[0]  # a small model needs no plan
    possible = [each for each in TASKS if set(loaded_for(each)) <= set(loaded) and (each != "bind" or _binds(shape))]
    for tasks in filter(None, (possible, ["generate"])):
        for each in TIERS[:-1]:
            if set(tasks) <= set(each.tasks) and all(
                need(shape, task, each, shape.defaults.size, AT_ONCE, dtype, loaded).fits_gpu(machine) for task in tasks
            ):
                return each
    return None


def check_bind(shape: Shape) -> None:
    """Raise `MokusError`, as `bind` does, if the text encoder lacks a layer or a module that is edited by default."""
    count = shape.text.num_hidden_layers
    settings = EditSettings.for_editor(shape.defaults)
    check_edited(settings, _text_layer(shape, torch.bfloat16), count, QWEN_IMAGE.highest(count))


def _binds(shape: Shape) -> bool:
    try:
        check_bind(shape)
    except MokusError:
        return False
    return True


def _text_layer(shape: Shape, dtype: torch.dtype) -> Any:
    return shape.with_layers(text_layers=1).build("text_encoder", dtype).model.language_model.layers[0]


def need(
    shape: Shape, task: str, tier: Tier, size: int, batch: int, dtype: torch.dtype,
    loaded: tuple[str, ...] = COMPONENTS,
) -> Need:  # fmt: skip
    """Stage by stage, in one tier, as far as the components that are loaded go."""
    learning = LearnSettings.for_model(shape.defaults.learn)
    stages = tuple(
        _stage(shape, tier, dtype, name, loaded if tier.stays else components, beside)
        for name, components, beside in _beside(shape, task, tier, size, batch, dtype, learning)
        if set(components) <= set(loaded)
    )
    # all of it passes through the host
    whole = sum(shape.parameters[each] * dtype.itemsize for each in loaded) + PYTHON
    whole += _preserved(shape, size, learning) if task == "learn" else 0.0
    if tier is CPU:
        whole += max(stage.beside for stage in stages)
    return Need(tier, stages, whole)


def _stage(
    shape: Shape, tier: Tier, dtype: torch.dtype, name: str, resident: tuple[str, ...], beside: float
) -> Stage:  # fmt: skip
    weights = shape.weights(tier, dtype)
    size = float(sum(weights[each] for each in resident))
    if tier.streamed:
        size = float(max(shape.largest.values()) * dtype.itemsize + (weights["vae"] if "vae" in resident else 0))
    elif tier.bits < 16 and "transformer" in resident:
        beside += 2 * shape.largest["transformer"] * dtype.itemsize  # a matrix as it is multiplied with
    return Stage(name, resident, size, beside)


def _beside(
    shape: Shape, task: str, tier: Tier, size: int, batch: int, dtype: torch.dtype, learning: LearnSettings
) -> list[tuple[str, tuple[str, ...], float]]:
    """Name, components and bytes beside the weights of each stage of the task."""
    key, rank = key_of(shape), learning.rank
    reading = ("reading prompts", ("text_encoder",), _text_use(key, 1, TOKENS, dtype).peak)
    if task == "generate":
        decoded = _vae_use(key, batch, size, True, dtype).peak * KERNELS
        drawn = _image_use(key, batch, size, rank, False, False, dtype).peak
        both = ("transformer", "vae")
        return [
            reading,
            ("drawing", both, drawn + _lora(shape, rank)),
            ("decoding", both, decoded + _lora(shape, rank)),
        ]
    if task == "bind":
        return [("finding edits", ("text_encoder",), _edit_beside(shape, dtype))]
    texts = (1 + PHOTOS + len(OTHER_LOOKS)) * (1 + LENDERS) + 2 * learning.prior_prompts
    held = texts * TOKENS * int(shape.configs["transformer"]["joint_attention_dim"]) * dtype.itemsize
    recorded = max(8 * learning.prior_batch_size if learning.prior_weight else 1, NOISES)
    samples = learning.batch_size + (learning.prior_batch_size if learning.prior_weight else 0)
    adapter = COPIES * _lora(shape, rank)
    stages: list[tuple[str, tuple[str, ...], float]] = [
        ("reading photos", ("vae",), _vae_use(key, 1, size, False, dtype).peak * KERNELS),
        (*reading[:2], reading[2] + held),
        ("places, what must stay", ("transformer",),
         _image_use(key, recorded, size, rank, False, False, dtype).peak + held),
        ("learning", ("transformer",), _training(key, tier, samples, size, rank, dtype) + held + adapter),
    ]  # fmt: skip
    if learning.preview_every:  # one image of the model's own size
        own = shape.defaults.size
        drawn = _image_use(key, 1, own, rank, False, False, dtype).peak
        decoded = _vae_use(key, 1, own, True, dtype).peak * KERNELS
        stages.append(("drawing previews", ("transformer", "vae"), max(drawn, decoded) + held + adapter))
    return stages


def _training(key: str, tier: Tier, samples: int, size: int, rank: int, dtype: torch.dtype) -> float:
    """Of a training step: with all activations, with none, or with those of one block in so many."""
    if tier.kept == 1:
        return _image_use(key, samples, size, rank, True, False, dtype).peak
    none = _image_use(key, samples, size, rank, True, True, dtype)
    if not tier.kept:
        return none.peak
    every, blocks = _image_use(key, samples, size, rank, True, False, dtype), SHAPES[key].blocks
    share = sum(tier.keeps(block) for block in range(blocks)) / blocks
    return none.peak + share * (every.kept - none.kept)


def _edit_beside(shape: Shape, dtype: torch.dtype) -> float:
    settings, text = EditSettings.for_editor(shape.defaults), shape.text
    edited, above = len(settings.layers), text.num_hidden_layers - 1 - max(settings.layers)
    layer = _text_layer(shape, dtype)
    matrices = [layer.get_submodule(name) for name in settings.modules]
    entered = {entrance(f".{name}"): each.in_features for name, each in zip(settings.modules, matrices, strict=True)}
    grams = GRAMS * sum(width**2 for width in entered.values()) * edited * 8
    factors = HISTORY * sum(each.out_features for each in matrices) * edited * rehearsal.RANK * 4
    return float(
        grams + factors + _edit_use(key_of(shape), edited, above, tuple(settings.modules), dtype).peak
    )  # fmt: skip


def _lora(shape: Shape, rank: int) -> float:
    """Bytes in float32, on the four projections of images that stage 1 trains by default, all d x d."""
    return 4.0 * shape.blocks * len(LearnSettings().targets) * 2 * rank * shape.width


def _preserved(shape: Shape, size: int, settings: LearnSettings) -> float:
    """Bytes on the host, in float32, of the base model's velocities with where they are taken: twice, as they are joined."""
    points = settings.prior_prompts * (settings.prior_steps + max(1, settings.prior_steps // 2))
    channels = int(shape.configs["transformer"].get("in_channels", 64))
    return 2 * 2.0 * 4 * points * (size // shape.patch) ** 2 * channels * bool(settings.prior_weight)


def work(shape: Shape, task: str, tier: Tier, size: int) -> Work:
    """FLOPs of a training step, an edit, or an image with guidance."""
    if task == "generate":
        guided = 1 + (shape.defaults.true_cfg_scale > 1)
        steps = shape.defaults.steps
        reading = guided * text_flops(shape, TOKENS, logits=True)
        return Work("image", (steps * guided * image_flops(shape, 1, size) + reading) / 1e12, 1, 0.0,
                    steps * guided * shape.blocks)  # fmt: skip
    if task == "bind":
        editing = EditSettings.for_editor(shape.defaults)
        above = shape.text.num_hidden_layers - min(editing.layers)  # no gradient goes below the first that is edited
        below = shape.text.num_hidden_layers - above
        each = (
            text_flops(shape, PASSED)
            + text_flops(shape, ENTERED, below)
            + text_flops(shape, LOOKED, above)
            + text_flops(shape, EVALUATED, above, above)
        )
        return Work("edit", each / 1e12, 1, text_flops(shape, CORPUS) / 1e12, 0.0)
    settings = LearnSettings.for_model(shape.defaults.learn)
    blocks = shape.blocks
    again = 0.0 if tier.kept == 1 else 1 - sum(tier.keeps(block) for block in range(blocks)) / blocks
    samples = settings.batch_size + (settings.prior_batch_size if settings.prior_weight else 0)
    step = image_flops(shape, samples, size, backward=True, again=again)
    points = settings.prior_prompts * (settings.prior_steps + max(1, settings.prior_steps // 2))
    points = points * bool(settings.prior_weight) + PHOTOS * NOISES * (len(PLACES) + 1) * (settings.place_share > 0)
    once = image_flops(shape, points, size)
    return Work("step", step / 1e12, settings.steps, once / 1e12, blocks * (2 + again))
