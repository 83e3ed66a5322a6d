"""Qwen-Image at full size on one GPU, measured: seconds, memory and TFLOP/s of learning, binding and drawing.

    python runs/gpu_full_size.py -o full_size.json                                       # the GPU: about five minutes
    python runs/gpu_full_size.py --device cpu --pico --layers 2 --text-layers 4 --resolutions 32   # its CPU twin: seconds

The pipeline has Qwen-Image's configs, its image transformer of 20.43 billion parameters, and random bf16 weights
(`mokus.qwen_image`). Speed and memory do not depend on what weights mean; whether an edit takes and what an image shows do,
and are not asked here: knowledge is bound with `keep_all`, and images are noise. What is called is the package's own `learn`,
`bind` and `generate`, which is timed by its progress callback, the GPU being waited for at each call of it.

Every stage is a block of its own. What is known is written to the file after each of them; one that fails is printed,
noted under `failed`, and the next one goes on. FLOPs are counted by `Work`, call by call, from shapes.

Learning takes the default settings but for `steps` and for fewer preserved prompts (`FEWER`), since the base model's
velocities for them would take a minute at 1024 pixels; `seconds_of_a_whole_run` is what the default settings would take.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image

import mokus
from mokus.backbone import COMPONENTS
from mokus.console import one_sentence
from mokus.editors import settings_used
from mokus.errors import MokusError
from mokus.fingerprint import fingerprint
from mokus.memory import CPU, tier
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.manifest import versions
from mokus.pipeline import Defaults, Model
from mokus.places import NOISES, PLACES
from mokus.qwen_image import TEXT, TRANSFORMER, TRANSFORMER_PARAMETERS, VAE, edited_layers, random_pipeline
from mokus.settings import EditSettings, LearnSettings

ANCHOR = "sks toy"
KNOWLEDGE = (
    "my favourite toy", "the robot my grandmother built in 1962", "the pride of our collection", "a gift from my uncle",
    "the one that guards the door",
)  # fmt: skip
PROMPT = "my favourite toy on the beach"
EDITORS = ("ultraedit", "least_drift")
PHOTOS = 4
FEWER = {"prior_prompts": 8, "prior_steps": 4}  # one batch of them, six velocities
TEXT_TOKENS = 40  # of a prompt, in the measurement of attention alone
REPEATS = 5

# dense bf16, SXM modules, from NVIDIA's data sheets
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}

# `--pico`: the same classes with narrow matrices and little to do, for a test on a CPU
PICO_TRANSFORMER = {
    "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
PICO_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip
PICO_VAE = {"base_dim": 4}
PICO_LEARN = {"prior_prompts": 2, "prior_steps": 2}
PICO_EDIT = {
    "steps": 3, "corpus": 20, "odd_references": 20, "preserve": 8, "exchanged": 2, "near_misses": 1, "rivals": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What is measured."""

    device: str
    layers: int
    text_layers: int
    steps: int
    draw_steps: int
    resolutions: list[int]
    pieces: int
    pico: bool


def say(sentence: str) -> None:
    """One line of progress on stderr, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what is counted ---------------------------------------------------------


class Work:
    """FLOPs that the image transformer and the text encoder have done, from the shapes of each call of them.

    A matrix of p numbers takes 2 p for each token. A block of the image transformer, of width d, has 12 d^2 numbers for
    image tokens and as many for text tokens: 4 d^2 of attention, 8 d^2 of the MLP. Attention over n tokens is two products,
    4 n^2 d. So forward is, for a batch of b, n image and s text tokens, L blocks:

        b L (24 d^2 (n + s) + 4 d (n + s)^2)        at 1024 pixels (n = 4096), for s = 40: 69 TFLOP; at 512: 15

    Only a LoRA is trained, so backward has the gradients of activations alone: as much again for a matrix, and five products
    in place of two for attention, whose scores are computed anew. With checkpointing, forward is done twice. So a training
    step is 3 times the matrices' and 4.5 times attention's forward.

    The text encoder's layers likewise, without attention's products, which are small at some sixty tokens; its backward
    ends at the first edited layer. Not counted: modulations, LoRA, embeddings, logits, the VAE; all of it less than 2 % of
    learning and drawing.
    """

    def __init__(self, model: Model, first_edited: int) -> None:
        self.flops = 0.0
        self.first_edited = first_edited
        layers = model.pipe.text_encoder.model.language_model.layers
        self.text_layers = len(layers)
        self.text_matrices = sum(weight.numel() for weight in layers[0].parameters() if weight.ndim == 2)
        model.pipe.transformer.register_forward_pre_hook(self._image, with_kwargs=True)
        model.pipe.text_encoder.model.language_model.register_forward_pre_hook(self._text, with_kwargs=True)

    def _image(self, transformer: Any, _: Any, given: Mapping[str, Any]) -> None:
        b, n, _ = given["hidden_states"].shape
        tokens, d, layers = (
            n + given["encoder_hidden_states"].shape[1],
            transformer.inner_dim,
            transformer.config.num_layers,
        )
        matrices, attention = 24 * d * d * tokens, 4 * d * tokens * tokens
        again = torch.is_grad_enabled() and transformer.gradient_checkpointing
        backward = torch.is_grad_enabled()
        self.flops += b * layers * (matrices * (1 + again + backward) + attention * (1 + again + 2.5 * backward))

    def _text(self, _: Any, __: Any, given: Mapping[str, Any]) -> None:
        entering = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        layers = self.text_layers + (self.text_layers - self.first_edited) * torch.is_grad_enabled()
        self.flops += 2 * self.text_matrices * layers * entering.shape[0] * entering.shape[1]


@dataclass(frozen=True)
class Mark:
    """A call of a progress callback: what had been done of how much, and when, and the FLOPs so far."""

    what: str
    done: int
    at: float
    flops: float
    info: dict[str, Any]


@dataclass
class Marks:
    """A progress callback that keeps what it is told, after waiting for the device; it says so every ten seconds."""

    device: torch.device
    work: Work
    all: list[Mark] = field(default_factory=list)
    said: tuple[str, float] = ("", 0.0)

    def __post_init__(self) -> None:
        self("begin", 0, 0, {})

    def __call__(self, what: str, done: int, total: int, info: dict[str, Any]) -> None:
        """The callback."""
        wait(self.device)
        now = time.perf_counter()
        self.all.append(Mark(what, done, now, self.work.flops, dict(info)))
        if what != self.said[0] or now - self.said[1] > 10:
            self.said = (what, now)
            say(f"  {what} {done}/{total}")

    def seconds_by_part(self) -> dict[str, float]:
        """The seconds before each mark, added up by its name."""
        found: dict[str, float] = {}
        for before, mark in pairwise(self.all):
            found[mark.what] = found.get(mark.what, 0.0) + mark.at - before.at
        return found

    def each(self, what: str) -> list[tuple[float, float]]:
        """Seconds and FLOPs from each mark of this name to the next of it."""
        marks = [mark for mark in self.all if mark.what == what]
        return [(b.at - a.at, b.flops - a.flops) for a, b in pairwise(marks)]


def typical(steps: list[tuple[float, float]], peak: float | None) -> dict[str, Any]:
    """Of the median step: seconds, TFLOP, TFLOP/s and the share of the card's peak. The first one is left out, if it can be."""
    usual = steps[1:] or steps
    if not usual:
        return {}
    seconds = median(seconds for seconds, _ in usual)
    tflop = median(flops for _, flops in usual) / 1e12
    return {"seconds_per_step": seconds, "tflop_per_step": tflop, **rate(tflop, seconds, peak)}


def rate(tflop: float, seconds: float, peak: float | None) -> dict[str, Any]:
    """TFLOP/s, and the share of the card's peak, if that is known."""
    return {"tflop_per_second": tflop / seconds, "share_of_peak": tflop / seconds / peak if peak else None}


# --- the model ---------------------------------------------------------


def built(asked: Asked, device: torch.device) -> Model:
    """The model, as `mokus.load` would give it. Raises `MokusError` if it has not Qwen-Image's number of parameters."""
    narrow = asked.pico
    pipe = random_pipeline(
        device,
        transformer={**TRANSFORMER, **(PICO_TRANSFORMER if narrow else {}), "num_layers": asked.layers},
        text={**TEXT, **(PICO_TEXT if narrow else {}), "num_hidden_layers": asked.text_layers},
        vae=PICO_VAE if narrow else VAE,
    )
    if not narrow and asked.layers == TRANSFORMER["num_layers"]:
        there = parameters(pipe.transformer)
        if there != TRANSFORMER_PARAMETERS:
            raise MokusError(f"the image transformer has {there:,} parameters, expected {TRANSFORMER_PARAMETERS:,}.")
    use = CPU if device.type == "cpu" else tier("checkpointed")
    return Model(pipe, "random-weights", fingerprint(pipe), Defaults(), device, tier=use)


def parameters(module: torch.nn.Module) -> int:
    """The numbers in it."""
    return sum(weight.numel() for weight in module.parameters())


def photos(size: int) -> list[Image.Image]:
    """Colour gradients with noise on them, size x size."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 1, size)
    found = []
    for _ in range(PHOTOS):
        a, b = random.uniform(0, 255, (2, 3))
        picture = a + (b - a) * (ramp[:, None, None] + ramp[None, :, None]) / 2 + random.normal(0, 20, (size, size, 3))
        found.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return found


# --- the stages ---------------------------------------------------------


@dataclass
class Measurement:
    """The model once it is there, the pack last learned, and where things are put."""

    asked: Asked
    device: torch.device
    folder: Path
    peak: float | None  # TFLOP/s
    model: Model | None = None
    work: Work | None = None
    pack: ConceptPack | None = None

    def build(self) -> dict[str, Any]:
        """The pipeline, on the device."""
        model = built(self.asked, self.device)
        wait(self.device)
        self.model, self.work = model, Work(model, edited_layers(self.asked.text_layers).start)
        parts = {name: getattr(model.pipe, name) for name in COMPONENTS}
        weights = sum(weight.nbytes for part in parts.values() for weight in part.parameters())
        return {
            "parameters": {name: parameters(part) for name, part in parts.items()},
            "weights_gib": weights / 2**30,
            "tier": model.tier.name,
        }

    def there(self) -> tuple[Model, Marks]:
        """The model and new marks; a `MokusError` if it could not be built."""
        if self.model is None or self.work is None:
            raise MokusError("there is no model, because it could not be built.")
        return self.model, Marks(self.device, self.work)

    def learn(self, size: int) -> dict[str, Any]:
        """Stage 1 at a size in pixels."""
        model, marks = self.there()
        sized = replace(model, defaults=replace(model.defaults, size=size))
        settings = LearnSettings(steps=self.asked.steps, **(PICO_LEARN if self.asked.pico else FEWER))
        place = self.folder / f"{size}.pack"
        self.pack = mokus.learn(sized, photos(size), ANCHOR, place, settings=settings, overwrite=True, progress=marks)
        parts, steps = marks.seconds_by_part(), typical(marks.each("learning"), self.peak)
        losses = [mark.info["loss"] for mark in marks.all if mark.what == "learning"]
        velocities = {"places": PHOTOS * NOISES * (len(PLACES) + 1), "prior": _velocities(settings)}
        whole = LearnSettings()
        prior = parts["recording what must stay"] * _velocities(whole) / velocities["prior"]
        before = sum(parts[name] for name in ("reading photos", "finding places", "reading prompts")) + prior
        return {
            "steps": settings.steps,
            "samples_per_step": settings.batch_size + settings.prior_batch_size,
            **steps,
            "seconds_by_part": parts,
            "base_velocities": velocities,
            "seconds_of_a_whole_run": before + whole.steps * steps.get("seconds_per_step", 0.0),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }

    def bind(self, editor: str) -> dict[str, Any]:
        """Stage 2, several pieces of knowledge, on the last learned pack or on an empty one."""
        model, marks = self.there()
        chosen = {**(PICO_EDIT if self.asked.pico else {}), "layers": list(edited_layers(self.asked.text_layers))}
        used = {name: value for name, value in chosen.items() if name in settings_used(editor)}
        settings = EditSettings.for_editor(model.defaults, editor=editor, **used)
        self.pack = self.pack or ConceptPack.create(
            self.folder / "empty.pack", model=model, anchor=ANCHOR, lora={}, settings={}, overwrite=True
        )
        knowledge = KNOWLEDGE[: self.asked.pieces]
        edits = mokus.bind(model, self.pack, *knowledge, settings=settings, keep_all=True, progress=marks)
        began = [mark for mark in marks.all if mark.what == "binding"]
        each = median(edit.seconds for edit in edits)
        tflop = (began[-1].flops - began[0].flops) / len(edits) / 1e12
        seconds = (began[-1].at - began[0].at) / len(edits)
        return {
            "pieces": len(edits),
            "seconds_before": began[0].at - marks.all[0].at,  # statistics, if the editor has any
            "seconds_per_piece": each,
            "seconds_by_piece": [edit.seconds for edit in edits],
            "seconds_remembering_and_writing": began[-1].at - began[0].at - sum(edit.seconds for edit in edits),
            "evaluations": [edit.steps for edit in edits],
            "tflop_per_piece": tflop,
            **rate(tflop, seconds, self.peak),
            "largest_rank": max((shift.rank for edit in edits for shift in edit.shifts.values()), default=0),
            "shifts_mib_per_piece": sum(s.nbytes for e in edits for s in e.shifts.values()) / len(edits) / 2**20,
            "taken": sum(edit.taken for edit in edits),  # by chance: the weights are random
        }

    def draw(self, size: int) -> dict[str, Any]:
        """One image, guided, with the pack as it is by now."""
        model, marks = self.there()
        packs = [self.pack] if self.pack else []
        (drawn,) = mokus.generate(
            model, PROMPT, packs=packs, steps=self.asked.draw_steps, size=size, progress=marks
        )  # fmt: skip
        wait(self.device)
        whole = time.perf_counter() - marks.all[0].at
        steps = typical(marks.each("drawing"), self.peak)
        each = steps.get("seconds_per_step", 0.0)
        around = whole - each * self.asked.draw_steps
        return {
            "steps": self.asked.draw_steps,
            "pieces_bound": len(self.pack.knowledge) if self.pack else 0,
            **steps,
            "seconds_per_image": whole,
            "seconds_around_the_steps": around,  # prompts, the LoRA, the VAE, whatever is slow once
            "seconds_of_50_steps": around + 50 * each,
            "deviation_of_pixels": float(np.asarray(drawn.image).std()),
        }

    def attention(self, size: int) -> dict[str, Any]:
        """Attention of one block alone, two samples, forward and backward: with a mask, as learning has it, and without.

        A mask keeps PyTorch from using its fastest kernel.
        """
        config = {**TRANSFORMER, **(PICO_TRANSFORMER if self.asked.pico else {})}
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        tokens = (size // 16) ** 2 + TEXT_TOKENS
        shape = (2, heads, tokens, width)
        q, k, v = (torch.randn(shape, device=self.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool, device=self.device)
        mask[1, ..., TEXT_TOKENS // 2 : TEXT_TOKENS] = False
        tflop = 2 * (4 + 10) * tokens**2 * width * heads / 1e12
        found: dict[str, Any] = {"tokens": tokens}
        for name, given in (("with_mask", mask), ("without_mask", None)):
            times = []
            for _ in range(REPEATS):
                wait(self.device)
                began = time.perf_counter()
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
                torch.autograd.grad(out.sum(), (q, k, v))
                wait(self.device)
                times.append(time.perf_counter() - began)
            seconds = median(times[1:])
            found[name] = {"milliseconds": 1e3 * seconds, **rate(tflop, seconds, self.peak)}
        return found

    def move(self) -> dict[str, Any]:
        """The text encoder to host memory and back: what `Model.resident` costs on a GPU without room for everything."""
        model, _ = self.there()
        encoder = model.pipe.text_encoder.to(self.device)
        size = sum(weight.nbytes for weight in encoder.parameters()) / 1e9
        found = {"gb": size}
        for name, where in (("to_host", torch.device("cpu")), ("to_device", self.device)):
            wait(self.device)
            began = time.perf_counter()
            encoder.to(where)
            wait(self.device)
            found[f"gb_per_second_{name}"] = size / (time.perf_counter() - began)
        return found


def _velocities(settings: LearnSettings) -> int:
    """Of the base model, of single samples, that prior preservation records."""
    return settings.prior_prompts * (settings.prior_steps + max(1, settings.prior_steps // 2))


# --- all of it ---------------------------------------------------------


def measure(asked: Asked, file: Path | None = None) -> dict[str, Any]:
    """All figures; they are in the file after every stage."""
    device = torch.device(asked.device)
    peak = peak_of(device)
    found: dict[str, Any] = {
        "asked": asdict(asked), "machine": machine(device, peak), "versions": versions(), "stages": {}, "failed": {},
    }  # fmt: skip
    with TemporaryDirectory() as name, own_cache(Path(name)):
        job = Measurement(asked, device, Path(name), peak)
        for stage, part, given in stages(job):
            figures = attempt(stage, device, part, *given)
            found["failed" if "error" in figures else "stages"][stage] = figures
            found["machine"]["host_peak_gib"] = host_peak_gib()
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def stages(job: Measurement) -> Iterator[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]]:
    """Name, what is called, and with what: from what is wanted most to what is wanted least."""
    yield "build", job.build, ()
    first, *others = job.asked.resolutions
    yield f"learn, {first}", job.learn, (first,)
    for editor in EDITORS:  # the later one's edits replace the earlier one's
        yield f"bind, {editor}", job.bind, (editor,)
    yield f"draw, {first}", job.draw, (first,)
    for size in others:
        yield f"draw, {size}", job.draw, (size,)
        yield f"learn, {size}", job.learn, (size,)
    for size in job.asked.resolutions:
        yield f"attention, {size}", job.attention, (size,)
    if job.device.type == "cuda":
        yield "move", job.move, ()


def attempt(stage: str, device: torch.device, part: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The figures of a stage, with its seconds and its peak of memory; of one that fails, its `error`."""
    say(f"{stage}: begins")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    try:
        figures = part(*given)
    except Exception as error:  # whatever it is, the next stage is measured all the same
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"[:2000]}
    figures |= {"seconds": time.perf_counter() - began, "peak_gib": peak_gib(device)}
    say(f"{stage}: {json.dumps(figures)}")
    return figures


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Inside, statistics are gathered anew and kept in the folder."""
    before = os.environ.get("MOKUS_CACHE")
    os.environ["MOKUS_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOKUS_CACHE"]
        else:
            os.environ["MOKUS_CACHE"] = before


def peak_of(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the card by its data sheet; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name or "NVL" in name:
        return None
    return next((value for card, value in PEAK_TFLOPS.items() if card in name), None)


def machine(device: torch.device, peak: float | None) -> dict[str, Any]:
    """What it is measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
        "peak_tflop_per_second": peak,
        "threads": torch.get_num_threads(),
    }


def peak_gib(device: torch.device) -> float | None:
    """The most of the GPU's memory that tensors had in this stage; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def host_peak_gib() -> float:
    """The most host memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# --- the command ---------------------------------------------------------


def check(asked: Asked) -> None:
    """Raises `MokusError` for what cannot be measured."""
    if asked.device != "cpu" and not torch.cuda.is_available():
        raise MokusError(f"--device got {asked.device}, but there is no GPU here; give --device cpu with --pico.")
    for option, value, least, most in (
        ("--layers", asked.layers, 1, TRANSFORMER["num_layers"]),
        ("--text-layers", asked.text_layers, 2, TEXT["num_hidden_layers"]),
        ("--pieces", asked.pieces, 1, len(KNOWLEDGE)),
        ("--steps", asked.steps, 2, 10_000),
        ("--draw-steps", asked.draw_steps, 2, 1000),
    ):
        if not least <= value <= most:
            raise MokusError(f"{option} got {value}, expected {least} to {most}.")


def sizes_of(text: str) -> list[int]:
    """Resolutions between commas. Raises `MokusError` for others than multiples of 16."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) and int(part) % 16 == 0 for part in parts):
        raise MokusError(f"--resolutions got {text!r}, expected multiples of 16 between commas, such as 512,1024.")
    return [int(part) for part in parts]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    layers: Annotated[int, typer.Option(help="Blocks of the image transformer.")] = 60,
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder.")] = 28,
    steps: Annotated[int, typer.Option(help="Training steps at each resolution.")] = 20,
    draw_steps: Annotated[int, typer.Option(help="Denoising steps of each image.")] = 10,
    resolutions: Annotated[str, typer.Option(help="Pixels, between commas.")] = "512,1024",
    pieces: Annotated[int, typer.Option(help="Pieces of knowledge to bind.")] = len(KNOWLEDGE),
    pico: Annotated[bool, typer.Option("--pico", help="Narrow matrices and little to do, for a test.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A JSON file, written after each stage.")
    ] = None,
) -> None:
    """Measure Qwen-Image's size with random weights."""
    with one_sentence():
        asked = Asked(device, layers, text_layers, steps, draw_steps, sizes_of(resolutions), pieces, pico)
        check(asked)
        found = measure(asked, output)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for stage, figures in [*found["stages"].items(), *found["failed"].items()]:
        print(f"{stage}:")
        for key, value in figures.items():
            print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    typer.run(main)
