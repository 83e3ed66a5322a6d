"""Is `mokus doctor` right? Its estimates against measurement, on this CPU and against what an H200 measured.

    python benchmarks/doctor.py --json                      # 2 blocks and 2 layers of real width: minutes, some 9 GiB
    python benchmarks/doctor.py --layers 1 --text-layers 1  # half of that

Blocks of the image transformer (d = 3072) and layers of Qwen2.5-VL-7B have their real width and random float32 weights. What
the doctor rehearses without contents is done here with them, and seen from outside:

- weights: bytes of the tensors that were made; they have to be equal
- memory:  the most that the process holds meanwhile, by the kernel's own account (VmHWM, Linux), less what it held before
- FLOPs:   PyTorch's FlopCounterMode, which knows nothing of the doctor's formulas
- seconds: FLOPs by the rate of a plain product of matrices, measured just before

Beside the weights, at so few tokens, the libraries' own buffers are as large as the tensors, 0.02 to 0.25 GiB: shown, and
not judged. A CPU's seconds, too, are held against a rate that was taken from a run of this.

and at full size, without running anything, against docs/results/gpu_full_size.json. A GPU's seconds there are what the
doctor's rates were taken from, as is what the VAE's kernels need for themselves: these say how well a rate fits, no more.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mokus.console import one_sentence
from mokus.doctor import plan as doctor
from mokus.doctor import rehearsal
from mokus.doctor.flops import TOKENS as PROMPT_TOKENS
from mokus.doctor.flops import image_flops, text_flops
from mokus.doctor.machine import PEAKS, cpu_tflops
from mokus.doctor.shape import Shape, published
from mokus.errors import MokusError
from mokus.memory import tier
from mokus.qwen_image import TEXT, TRANSFORMER, VISION, random_text_encoder, random_transformer, random_vae
from mokus.settings import EditSettings, LearnSettings

WANTED = 0.15  # the largest error
H200 = Path(__file__).parents[1] / "docs/results/gpu_full_size.json"
UNJUDGED = ("transformer, beside", "text encoder, beside")  # see above
BATCH = 2  # samples of a training step
ROWS, TOKENS = 16, 22  # of an edit
PADDED, PADDED_TOKENS = (32, 36), 15_000  # rows and tokens of an edit before several rows shared a line


def say(sentence: str) -> None:
    """One line of progress on stderr, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)


# --- measuring ---------------------------------------------------------


def held(which: str) -> int:
    """Bytes that this process holds now (VmRSS) or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


# glibc's names for what `given_back` sets
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4


def given_back(at_once: bool) -> None:
    """Whether the C library gives the memory of tensors back as soon as they are gone, so that what the process holds is what is
    alive; or keeps it, as in a long run, so that no time goes into new pages."""
    libc = ctypes.CDLL(None)
    for what, value in (
        (MMAP_MAX, 1 << 16 if at_once else 0),
        (MMAP_THRESHOLD, 1 << 16),
        (TRIM_THRESHOLD, 1 << 16 if at_once else 1 << 30),
    ):
        libc.mallopt(what, value)
    libc.malloc_trim(0)


class Held:
    """Bytes beside what was held at the beginning, and seconds; as `rehearsal.Tally` has them."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        self.before, self.began = held("VmRSS"), time.perf_counter()
        self.peak = 0
        self.seconds = 0.0

    @property
    def now(self) -> int:
        return held("VmRSS") - self.before

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.began
        self.peak = held("VmHWM") - self.before


@dataclass
class Watching:
    """Gives what a computation took, as `rehearsal` wants to be told, and remembers the last one."""

    last: Held | None = None

    @contextmanager
    def __call__(self, *_: nn.Module) -> Iterator[Held]:
        self.last = Held()
        yield self.last
        self.last.end()


def row(what: str, unit: str, estimated: float, measured: float | None, calibrated: bool = False) -> dict[str, Any]:
    """One figure, with its relative error."""
    error = None if not measured else estimated / measured - 1
    return {
        "what": what, "unit": unit, "estimated": estimated, "measured": measured, "error": error, "calibrated": calibrated,
    }  # fmt: skip


def compared(name: str, task: str, estimate: Callable[[], rehearsal.Use], real: Callable[[Watching], Any], weights: int,
             flops: float, counted: float | None) -> list[dict[str, Any]]:  # fmt: skip
    """Memory, FLOPs and seconds of one computation."""
    say(f"{name}: {flops / 1e12:.2f} TFLOP")
    use, watching, rates, seconds = estimate(), Watching(), [cpu_tflops()], []
    for at_once in (False, True, False):  # the first one also loads what libraries load late
        given_back(at_once)
        real(watching)
        assert watching.last is not None
        rates.append(cpu_tflops())  # all the time, since other processes come and go
        if at_once:
            took = watching.last
        else:
            seconds.append(watching.last.seconds)
    rate = median(rates)
    return [
        row(f"{name}: peak memory", "GiB", (weights + use.peak) / 2**30, (weights + took.peak) / 2**30),
        row(name.replace(", ", ", beside the weights, ", 1), "GiB", use.peak / 2**30, took.peak / 2**30),
        *([row(f"{name}: FLOPs", "TFLOP", flops / 1e12, counted / 1e12)] if counted else []),
        row(f"{name}: seconds on this CPU", "s", flops / 1e12 / rate / doctor.CPU_SHARES[task], min(seconds), True),
    ]


# --- the image transformer ---------------------------------------------------------


def image(layers: int, size: int) -> Iterator[dict[str, Any]]:
    """Drawing's forward pass; a training step with all activations, and with checkpointing."""
    if not layers:
        return
    config = {**TRANSFORMER, "num_layers": layers}
    shape = Shape("truncated", {**published(), "transformer": config})
    settings, side = LearnSettings(), size // shape.patch
    cases = ((1, False, False), (BATCH, True, False), (BATCH, True, True))
    for batch, backward, checkpointed in cases:
        name = "transformer, " + (
            "forward" if not backward else "training, checkpointed" if checkpointed else "training"
        )
        model = random_transformer(config, dtype=torch.float32)
        weights = sum(p.nbytes for p in model.parameters())
        if not backward:
            estimated = shape.weights(tier("all"), torch.float32)["transformer"]
            yield row("transformer: weights", "bytes", estimated, weights)
        given = (batch, side, PROMPT_TOKENS, settings.targets, settings.rank, backward, checkpointed)

        def bare(n: int = layers, shape: Shape = shape) -> Any:
            return shape.with_layers(n).build("transformer", torch.float32)

        def real(watching: Watching, model: Any = model, given: Any = given) -> None:
            if getattr(model, "peft_config", None):
                model.unload_lora()
            rehearsal.stepped(model, *given, watched=watching)

        def estimate(bare: Any = bare, given: Any = given) -> rehearsal.Use:
            return rehearsal.image_step(bare, layers, *given)

        flops = image_flops(shape, batch, size, backward=backward, again=float(checkpointed))
        yield from compared(
            name, "learn" if backward else "generate", estimate, real, weights, flops, counted(bare(), given)
        )
        del model, real


def counted(model: Any, given: Any) -> float:
    """FLOPs by PyTorch's counter, on a model without contents, attention by its plain formula."""

    @contextmanager
    def counter(*_: nn.Module) -> Iterator[Any]:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
            found.now = found.peak = 0
            yield found
        totals.append(found.get_total_flops())

    totals: list[float] = []
    rehearsal.stepped(model, *given, watched=counter)
    return totals[0]


# --- the text encoder and the VAE ---------------------------------------------------------


def text(layers: int) -> Iterator[dict[str, Any]]:
    """Reading prompts, and one evaluation of an edit of all layers."""
    if not layers:
        return
    config = {**TEXT, "num_hidden_layers": layers}
    configs = {**published(), "text_encoder": {"text_config": config, "vision_config": dict(VISION)}}
    shape, modules = Shape("truncated", configs), EditSettings().modules
    encoder = random_text_encoder(config, dtype=torch.float32)
    weights = sum(p.nbytes for p in encoder.parameters())
    estimated = shape.weights(tier("all"), torch.float32)["text_encoder"]
    yield row("text encoder: weights", "bytes", estimated, weights)

    def bare(n: int = layers) -> Any:
        return shape.with_layers(text_layers=n).build("text_encoder", torch.float32)

    prefix = text_flops(shape, rehearsal.PREFIX_TOKENS)
    tokens = ROWS * TOKENS
    yield from compared(
        "text encoder, reading", "bind", lambda: rehearsal.reading(bare(), ROWS, TOKENS),
        lambda watching: rehearsal.reading(encoder, ROWS, TOKENS, watching), weights,
        prefix + text_flops(shape, tokens), None,
    )  # fmt: skip
    yield from compared(
        "text encoder, editing", "bind", lambda: rehearsal.edit(bare, layers, 0, modules, ROWS, TOKENS),
        lambda watching: rehearsal.evaluated(encoder, layers, modules, ROWS, TOKENS, watching), weights,
        prefix + text_flops(shape, tokens, backward_layers=layers), None,
    )  # fmt: skip


def pictures(size: int) -> Iterator[dict[str, Any]]:
    """The VAE's memory; its FLOPs and seconds are not estimated."""
    shape = Shape("published", published())
    model = random_vae({}, dtype=torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    yield row("VAE: weights", "bytes", shape.weights(tier("all"), torch.float32)["vae"], weights)
    for decoding in (False, True):
        say(f"VAE, {'decoding' if decoding else 'encoding'}")
        given_back(True)
        use, watching = rehearsal.vae(shape.build("vae", torch.float32), 1, size, decoding), Watching()
        rehearsal.vae(model, 1, size, decoding, watching)
        assert watching.last is not None
        name = "VAE, decoding: peak memory" if decoding else "VAE, encoding: peak memory"
        estimated = weights + doctor.KERNELS * use.peak
        yield row(name, "GiB", estimated / 2**30, (weights + watching.last.peak) / 2**30, True)


# --- at full size ---------------------------------------------------------


def full_size(file: Path = H200) -> Iterator[dict[str, Any]]:
    """The estimates at Qwen-Image's size against an H200's figures, which were measured with a vision tower of one tiny block."""
    measured = json.loads(file.read_text(encoding="utf-8"))["stages"]
    configs = published()
    configs["text_encoder"]["vision_config"] = dict(VISION)
    shape, one = Shape("published", configs), tier("checkpointed")
    bf16, peak = torch.bfloat16, PEAKS["H200"]
    weights = sum(shape.weights(one, bf16).values())
    there = sum(measured["build"]["parameters"].values()) * 2
    yield row("H200: weights", "bytes", weights, there)
    for size in (512, 1024):
        for task, stage in (("learn", f"learn, {size}"), ("generate", f"draw, {size}")):
            yield from _memory(
                stage, doctor.need(shape, task, one, size, 1, bf16), weights, measured[stage]["peak_gib"]
            )
            work = doctor.work(shape, task, one, size)
            steps = 1 if task == "learn" else shape.defaults.steps
            seconds = work.seconds(task, peak, True)
            assert seconds is not None
            yield row(f"H200 {stage}: FLOPs of a step", "TFLOP", work.tflop / steps, measured[stage]["tflop_per_step"])
            yield row(
                f"H200 {stage}: seconds of a step", "s", seconds[0] / steps, measured[stage]["seconds_per_step"], True
            )
    found = measured["bind, least_drift"]
    with as_it_was():
        need, work = doctor.need(shape, "bind", one, 1024, 1, bf16), doctor.work(shape, "bind", one, 1024)
    yield from _memory("bind as it was then", need, weights, found["peak_gib"])
    seconds = work.seconds("bind", peak, True)
    assert seconds is not None
    # that run went through the layers below the first edited one in every evaluation, and whenever it looked at what is watched
    below = min(EditSettings().layers)
    again = text_flops(shape, PADDED_TOKENS + doctor.LOOKED, below) - text_flops(shape, doctor.ENTERED, below)
    then = work.tflop + again / 1e12
    yield row("H200 bind: FLOPs of an edit as it was then", "TFLOP", then, found["tflop_per_piece"])
    yield row(
        "H200 bind: seconds of an edit as it was then",
        "s",
        seconds[0] * then / work.tflop,
        found["seconds_per_piece"],
        True,
    )


@contextmanager
def as_it_was() -> Iterator[None]:
    """Inside, the doctor counts an edit as it was when that run was made: each row padded to the longest, and second moments
    for gate and up each, which are entered by the same."""
    now = doctor.LINES, doctor.LINE_TOKENS, doctor.EVALUATED, doctor.GRAMS
    doctor.LINES, doctor.LINE_TOKENS, doctor.EVALUATED, doctor.GRAMS = *PADDED, PADDED_TOKENS, 2 * doctor.GRAMS
    doctor._edit_use.cache_clear()
    try:
        yield
    finally:
        doctor.LINES, doctor.LINE_TOKENS, doctor.EVALUATED, doctor.GRAMS = now
        doctor._edit_use.cache_clear()


def _memory(stage: str, need: doctor.Need, weights: float, peak: float) -> Iterator[dict[str, Any]]:
    yield row(f"H200 {stage}: peak memory", "GiB", need.peak / 2**30, peak)
    yield row(
        f"H200 {stage}: peak beside the weights", "GiB", (need.peak - weights) / 2**30, peak - weights / 2**30,
        calibrated=stage.startswith("draw"),  # the VAE's kernels
    )  # fmt: skip


# --- the command ---------------------------------------------------------


def main(
    layers: Annotated[int, typer.Option(help="Blocks of the image transformer, 1.3 GiB each; 0: none.", min=0, max=4)] = 2,
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder, 0.9 GiB each, and 4 for its words; 0: none.",
                                             min=0, max=8)] = 2,
    size: Annotated[int, typer.Option(help="Pixels of images.", min=64)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
) -> None:  # fmt: skip
    """Hold the doctor's estimates against measurement. Exit code 1 if one is off by more than 15 %."""
    with one_sentence():
        if size % 16:
            raise MokusError(f"--size got {size}, expected a multiple of 16 pixels.")
        if not Path("/proc/self/clear_refs").exists():
            raise MokusError("this reads the peak of memory from Linux's /proc, which this machine has not.")
        rows = []
        for part in (full_size(), pictures(size), image(layers, size), text(text_layers)):
            for each in part:
                rows.append(each)
                say(f"  {each['what']}: {each['estimated']:.5g} {each['unit']}, measured {each['measured']:.5g}")
    off = [
        each["what"]
        for each in rows
        if each["error"] is not None and abs(each["error"]) > WANTED and not each["what"].startswith(UNJUDGED)
    ]
    if as_json:
        print(json.dumps({"size": size, "layers": layers, "text_layers": text_layers, "threads": torch.get_num_threads(),
                          "rows": rows, "off": off}, indent=2))  # fmt: skip
    else:
        for each in rows:
            error = "" if each["error"] is None else f"{each['error']:+.1%}"
            note = " (calibrated)" if each["calibrated"] else ""
            print(
                f"{each['what']:58s} {each['estimated']:14.4g} {each['measured']:14.4g} {each['unit']:6s} {error}{note}"
            )
    raise typer.Exit(bool(off))


if __name__ == "__main__":
    typer.run(main)
