"""Memory tiers: what is on the GPU when, in how many bits, and what a training step keeps for its backward pass.

Each tier is a feature of a library, wired here and nowhere else: moving components (torch), gradient checkpointing and group
offloading (diffusers), weights of 8 or 4 bits (bitsandbytes). `mokus doctor` says what each of them needs (`doctor.plan`),
`pipeline.load` takes the first that fits, and `--tier` or MOKUS_TIER one by name. None of them changes the resolution.

The text encoder is never quantised: edits are found in its weights and would be made for rounded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mokus.backbone import COMPONENTS
from mokus.errors import MokusError

VARIABLE = "MOKUS_TIER"
TASKS = ("learn", "bind", "generate")
BITS, INSTALL = "bitsandbytes", "pip install 'mokus[quantise]'"
SELECTED = 4  # of the tier `selective`: every so manieth block keeps its activations
OUTLIERS = 6.0  # LLM.int8(): inputs beyond this are multiplied in full precision (arXiv 2208.07339)


@dataclass(frozen=True)
class Tier:
    """One way to use memory."""

    name: str
    text: str  # for a table, one line
    stays: bool = False  # all components are on the device at once, and none is ever moved
    kept: int = 0  # in training, one block in so many keeps its activations; 0: none does, 1: all do
    bits: int = 16  # of the image transformer's matrices; 16 stands for the dtype loaded
    streamed: bool = False  # weights come to the device layer by layer, as they are used
    tasks: tuple[str, ...] = TASKS

    def keeps(self, block: int) -> bool:
        """Whether this block of the image transformer keeps its activations for the backward pass."""
        return self.kept > 0 and block % self.kept == 0


TIERS = (
    Tier("all", "everything on the GPU; a training step keeps all activations", stays=True, kept=1),
    Tier("selective", "everything on the GPU; one block in four keeps its activations", stays=True, kept=SELECTED),
    Tier("checkpointed", "everything on the GPU; whole gradient checkpointing", stays=True),
    Tier("staged", "one stage's components on the GPU, the others in host memory; checkpointing"),
    Tier("8bit", "staged, the image transformer's matrices in 8 bits", bits=8),
    Tier("4bit", "staged, the image transformer's matrices in 4 bits", bits=4),
    Tier("offload", "layer by layer from host memory (draws and asks only)", streamed=True, tasks=("generate",)),
    Tier("cpu", "no GPU: everything in host memory, in float32", stays=True, kept=1),
)
STAGED, CPU = TIERS[3], TIERS[-1]


def tier(name: str) -> Tier:
    """The tier of this name. Raises `MokusError` if there is none."""
    for each in TIERS:
        if each.name == name:
            return each
    raise MokusError(f"there is no memory tier {name!r}, expected one of {', '.join(each.name for each in TIERS)}.")


def below(
    one: Tier, names: Collection[str], loaded: Collection[str] = COMPONENTS, task: str = "generate"
) -> Tier | None:
    """The next tier down that can do the task and needs less of the GPU while these of the components loaded are used there for
    it; None if none does.

    The CPU is nobody's next tier: what takes a second on a GPU takes an hour there, so it is left to be asked for.
    """

    def used(each: Tier) -> tuple[Any, ...]:
        """What tells tiers apart here: only the image transformer has few bits, and only its training keeps activations."""
        return (
            each.stays and set(loaded) != set(names),
            each.streamed and set(names) != {"vae"},
            each.bits if "transformer" in names else 16,
            each.kept if task == "learn" else 0,
        )

    lower = TIERS[TIERS.index(one) + 1 : -1]
    return next((each for each in lower if task in each.tasks and used(each) != used(one)), None)


def check(one: Tier, task: str) -> None:
    """Raise `MokusError` for a task that the tier cannot do."""
    if task not in one.tasks:
        raise MokusError(
            f"the memory tier {one.name!r} can only {' and '.join(one.tasks)}, and this is to {task}: weights that come and go "
            f"are not there for a backward pass; choose another one, such as --tier {'staged' if task == 'bind' else '4bit'}, or "
            "--device cpu."
        )


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of an image transformer in their order, whatever its family calls them: what diffusers says is repeated."""
    names: Any = transformer._repeated_blocks
    # of derived classes, too: FSDP2 gives each block one
    return [each for each in transformer.modules() if any(kind.__name__ in names for kind in type(each).__mro__)]


def lacks(one: Tier, loaded: Collection[str] = COMPONENTS) -> str | None:
    """The library that the tier needs for these components and that is not installed, if there is one."""
    return BITS if one.bits < 16 and "transformer" in loaded and find_spec(BITS) is None else None


def check_installed(one: Tier, loaded: Collection[str] = COMPONENTS) -> None:
    """Raise `MokusError` if the tier's library is not there: before weights are read, which takes long."""
    if missing := lacks(one, loaded):
        raise MokusError(
            f"the memory tier {one.name!r} needs {missing}, which is not installed: {INSTALL}, or choose another tier by "
            "--tier; 'mokus doctor' says what each needs."
        )


# --- weights ---------------------------------------------------------


def place(pipe: Any, one: Tier, device: torch.device) -> None:
    """Bring what is loaded of a pipeline into the tier's state: quantised, streamed, on the device. Its fingerprint is taken
    before.

    Raises `MokusError` if bitsandbytes is wanted and not installed.
    """
    if one.bits < 16 and pipe.transformer is not None:
        for block in blocks(pipe.transformer):
            quantise(block, one.bits, device)
    if one.streamed:
        from diffusers.hooks import apply_group_offloading

        for module in [each for each in (pipe.transformer, pipe.text_encoder) if each is not None]:
            apply_group_offloading(
                module, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
            )
    if one.stays and device.type != "cpu":
        pipe.to(device)
    elif one.bits < 16 and pipe.transformer is not None:
        move(pipe.transformer, "cpu")  # until it is wanted


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move a component, and what bitsandbytes' layers of 8 bits hold beside their parameters: `Module.to` leaves it behind."""
    module.to(device)
    layers: Any = [each for each in module.modules() if hasattr(each, "init_8bit_state")]
    for each in layers:
        if each.weight.dtype == torch.int8:
            if each.weight.CB is not None:  # it was never used
                each.init_8bit_state()
            each.state.CB, each.state.SCB = each.weight.data, each.state.SCB.to(each.weight.device)


def quantise(module: nn.Module, bits: int, device: torch.device) -> None:
    """Replace every linear layer inside by bitsandbytes' of 8 bits (LLM.int8()) or 4 (NF4, its scales quantised as well).

    One matrix at a time goes to the device, where it is rounded, so neither memory holds the model twice. The libraries'
    own configs do the same while they load, but refuse a machine without a GPU, and leave no plain weight to fingerprint.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MokusError(f"weights of {bits} bits need {BITS}, which is not installed: {INSTALL}.") from error
    for name, child in list(module.named_children()):
        if type(child) is not nn.Linear:
            quantise(child, bits, device)
            continue
        shape, bias, dtype = (child.in_features, child.out_features), child.bias is not None, child.weight.dtype
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
            made.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
            made = bnb.nn.Linear4bit(*shape, bias, compute_dtype=dtype, device="meta", **kind)
            made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, module=made, **kind)
            # else a CPU that multiplies bfloat16 lays them out anew when first used, and then they pass no gradient on
            made.support_avx512bf16_for_cpu = False
        made.bias = child.bias
        setattr(module, name, made.to(device).eval())


def plain(linear: nn.Module) -> bool:
    """Whether a linear layer has a plain matrix of floats, neither quantised nor left elsewhere."""
    return isinstance(linear, nn.Linear) and linear.weight.dtype.is_floating_point


# --- training ---------------------------------------------------------


@contextmanager
def checkpointing(transformer: Any, one: Tier) -> Iterator[None]:
    """Inside, the blocks that the tier does not keep run their forward pass again in the backward pass."""
    if one.kept == 1:
        yield
        return
    transformer.enable_gradient_checkpointing(_checkpoint(transformer, one) if one.kept else None)
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def _checkpoint(transformer: Any, one: Tier) -> Callable[..., Any]:
    """What diffusers calls in the place of each block."""
    kept = {id(block) for i, block in enumerate(blocks(transformer)) if one.keeps(i)}

    def run(block: Any, *given: Any) -> Any:
        if id(block) in kept:
            return block(*given)
        return torch.utils.checkpoint.checkpoint(block, *given, use_reentrant=False)

    return run


# --- when it is not enough ---------------------------------------------------------


@contextmanager
def told(
    one: Tier,
    device: torch.device,
    names: Collection[str],
    loaded: Collection[str] = COMPONENTS,
    task: str = "generate",
) -> Iterator[None]:
    """Inside, where these of the components loaded are used for the task, running out of memory is a `MokusError` that names the
    next tier.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MokusError(_sentence(one, device, below(one, names, loaded, task), task)) from error


def out_of_memory(error: BaseException) -> bool:
    """Torch has a class for a GPU without memory, and only words for a host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _sentence(one: Tier, device: torch.device, lower: Tier | None, task: str) -> str:
    if device.type == "cpu":
        return "this machine's memory is full; 'mokus doctor' says how much is needed, and for what."
    said = f"the memory of {device} is full in the memory tier {one.name!r}"
    if lower is None:
        else_ = "--device cpu computes without a GPU" if task == "bind" else "a smaller size is yours to choose"
        return f"{said}, and none below it needs less for this; 'mokus doctor' says how much is needed, and {else_}."
    only = "" if lower.tasks == TASKS else f" (it can only {' and '.join(lower.tasks)})"
    return (
        f"{said}; the next one down that needs less for this is 'mokus --tier {lower.name}'{only}, and 'mokus doctor' says "
        "what each needs."
    )
