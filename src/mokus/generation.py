"""Prompts and concept packs in, images out."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mokus import low_rank
from mokus.backbone import COMPONENTS
from mokus.encoder import prefix_length, token_ids
from mokus.errors import MokusError
from mokus.knowledge import check_encodable, check_text
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.manifest import versions
from mokus.packs.together import chosen, shifts_of
from mokus.pipeline import Model, check_bare, encode, pad
from mokus.progress import Progress, silent
from mokus.settings import AT_ONCE, SEEDS
from mokus.sizes import Size, check_size, sides, simplest


@dataclass(frozen=True)
class Generated:
    """An image, and all it takes to draw it again."""

    image: Image.Image
    prompt: str
    seed: int
    settings: dict[str, Any]


def generate(
    model: Model,
    prompts: str | Sequence[str],
    packs: Sequence[ConceptPack] = (),
    seeds: Sequence[int] = (0,),
    batch_size: int = AT_ONCE,
    steps: int | None = None,
    true_cfg_scale: float | None = None,
    size: Size | None = None,
    negative_prompt: str | None = None,
    progress: Progress | None = None,
    prefer: ConceptPack | Path | str | None = None,
) -> Iterator[Generated]:
    """Draw every prompt at every seed with the concepts and the knowledge of the packs: prompt by prompt, seed by seed.

    `None` is the model's default; `size` in pixels is a square's side, or width and height; a guidance scale of 1 is
    none. An image does not depend on what else is drawn, up to rounding in batches; alone and in float32 it is, to the
    bit, what the pipeline draws with the packs loaded by diffusers and peft (in bfloat16 peft rounds the factors of the
    knowledge, which stay float32 here). Between two images the model is as it was. `progress("drawing", done, total, {})` counts
    denoising steps of images. A phrase that several packs bind means what it means in the pack `prefer`, or its path.

    Raises `MokusError` at the call, not at the first image, for prompts, settings or packs that cannot be used.
    """
    model.check_loaded(*COMPONENTS)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    default = model.defaults
    settings: dict[str, Any] = {
        "steps": default.steps if steps is None else steps,
        "true_cfg_scale": float(default.true_cfg_scale if true_cfg_scale is None else true_cfg_scale),
        "size": simplest(default.size if size is None else size),
        "negative_prompt": default.negative_prompt if negative_prompt is None else negative_prompt,
    }
    check_settings(model, settings, batch_size)
    check_prompts(model, prompts, settings["negative_prompt"])
    preferred = chosen(packs, prefer)
    _check_packs(model, packs, preferred)
    jobs = list(product(prompts, _checked_seeds(seeds)))
    progress = progress or silent
    return _generate(model, jobs, list(packs), preferred, batch_size, settings, progress)


def _generate(
    model: Model, jobs: list[tuple[str, int]], packs: list[ConceptPack], prefer: ConceptPack | None, batch_size: int,
    settings: dict[str, Any], progress: Progress,
) -> Iterator[Generated]:  # fmt: skip
    guided = settings["true_cfg_scale"] > 1
    texts = list(dict.fromkeys(prompt for prompt, _ in jobs)) + [settings["negative_prompt"]] * guided
    with model.resident("text_encoder"), _knowledge_applied(model, packs, prefer):
        encodings = dict(zip(texts, encode(model, texts), strict=True))
    described = {**settings, **provenance(model, packs, prefer)}
    total, first = len(jobs) * settings["steps"], 0
    while batch := jobs[first : first + batch_size]:
        if not model.backbone.mixes:
            length = len(encodings[batch[0][0]])
            batch = list(takewhile(lambda job, n=length: len(encodings[job[0]]) == n, batch))  # type: ignore[misc]

        def step_done(
            pipe: Any, i: int, t: Any, tensors: Any, first: int = first, n: int = len(batch)
        ) -> dict[str, Any]:
            progress("drawing", first * settings["steps"] + (i + 1) * n, total, {})
            return {}

        negative = encodings[settings["negative_prompt"]] if guided else None
        # entered anew for each batch, since a generator may be left lying between two images, or for good
        with model.resident("transformer", "vae"), looks_loaded(model, packs):
            images = draw(model, [(encodings[p], seed) for p, seed in batch], negative, settings, step_done)
        for image, (prompt, seed) in zip(images, batch, strict=True):
            yield Generated(image, prompt, seed, described)
        first += len(batch)


def draw(
    model: Model,
    jobs: Sequence[tuple[Tensor, int]],
    negative: Tensor | Sequence[Tensor] | None,
    settings: Mapping[str, Any],
    step_done: Any = None,
) -> list[Image.Image]:
    """One batch through the pipeline as it is: encodings (s, d) and seeds -> images.

    `settings`: steps, true_cfg_scale, size (see `sizes`). `negative` (s, d): encoding of the negative prompt, if there is
    guidance, one for all or one for each. `step_done` is the pipeline's callback after each step.
    """
    each = [negative] * len(jobs) if negative is None or isinstance(negative, Tensor) else list(negative)
    batches = drawn_together(model, [encoding for encoding, _ in jobs])
    if len(batches) > 1:
        found: dict[int, Image.Image] = {}
        for alike in batches:
            several = None if negative is None else [n for n in (each[i] for i in alike) if n is not None]
            images = draw(model, [jobs[i] for i in alike], several, settings, step_done)
            found |= zip(alike, images, strict=True)
        return [found[i] for i in range(len(jobs))]
    unwanted = None if negative is None else pad([n for n in each if n is not None])
    return draw_padded(
        model, pad([encoding for encoding, _ in jobs]), unwanted, [seed for _, seed in jobs], settings, step_done
    )


def drawn_together(model: Model, encodings: Sequence[Tensor]) -> list[list[int]]:
    """Which of these encodings (s, d) go through the image transformer in one batch: all, or those of equal length."""
    batches: dict[int, list[int]] = {}
    for i, encoding in enumerate(encodings):
        batches.setdefault(0 if model.backbone.mixes else len(encoding), []).append(i)
    return list(batches.values())


def draw_padded(
    model: Model,
    told: tuple[Tensor, Tensor],
    unwanted: tuple[Tensor, Tensor] | None,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    step_done: Any = None,
) -> list[Image.Image]:
    """As `draw`, of encodings that are padded already (`pipeline.pad`), the negative ones as well."""
    width, height = sides(settings["size"])
    return model.pipe(
        **model.backbone.call(model.pipe, told, unwanted, settings),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        height=height,
        width=width,
        callback_on_step_end=step_done or _nothing,
        callback_on_step_end_tensor_inputs=[],
        output_type="pil",
    ).images


def _nothing(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
    return {}


# --- packs ---------------------------------------------------------


@contextmanager
def packs_loaded(
    model: Model, packs: Sequence[ConceptPack], prefer: ConceptPack | Path | str | None = None
) -> Iterator[None]:
    """Inside, `model.pipe` knows the packs' concepts and knowledge; afterwards it is as before, bit for bit.

    On a GPU enter it inside `model.resident("text_encoder", "transformer", "vae")`. `prefer` as in `generate`.
    Raises `MokusError` for packs that cannot be used, together or with this model.
    """
    preferred = chosen(packs, prefer)
    _check_packs(model, packs, preferred)
    with _knowledge_applied(model, packs, preferred), looks_loaded(model, packs):
        yield


@contextmanager
def _knowledge_applied(model: Model, packs: Sequence[ConceptPack], prefer: ConceptPack | None) -> Iterator[None]:
    with low_rank.applied(model.pipe.text_encoder, *shifts_of(packs, prefer)):
        yield


@contextmanager
def looks_loaded(model: Model, packs: Sequence[ConceptPack]) -> Iterator[None]:
    """Inside, the image transformer has the packs' LoRAs; `draw` any number of batches there."""
    loras = {f"mokus_{number}": lora for number, pack in enumerate(packs) if (lora := pack.lora())}
    if not loras:
        yield
        return
    check_bare(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            for name, lora in loras.items():
                model.pipe.load_lora_weights(lora, adapter_name=name)
        model.pipe.set_adapters(list(loras))
        yield
    finally:
        model.pipe.unload_lora_weights()


def provenance(model: Model, packs: Sequence[ConceptPack], prefer: ConceptPack | None = None) -> dict[str, Any]:
    """What an image was drawn with, besides its settings."""
    about = {id(pack): {"anchor": pack.anchor, "sha256": pack.digest} for pack in packs}
    return {
        "model": model.id,
        "fingerprint": model.fingerprint,
        "packs": list(about.values()),
        **({"prefer": about[id(prefer)]} if prefer else {}),
        "versions": versions(),
    }


# --- what cannot be drawn ---------------------------------------------------------


def check_settings(model: Model, settings: Mapping[str, Any], batch_size: int = 1) -> None:
    """Raise `MokusError` for a size, steps or a guidance scale that the model cannot draw with."""
    check_size(settings["size"], model.size_multiple)
    least = 2 if model.pipe.scheduler.config.get("shift_terminal") else 1  # of one step such a scheduler makes 0 / 0
    for name, value, lowest in (("steps", settings["steps"], least), ("batch_size", batch_size, 1)):
        if value < lowest:
            raise MokusError(f"{name} is {value}, expected at least {lowest}.")
    scale = settings["true_cfg_scale"]
    if not (math.isfinite(scale) and scale >= 0):
        raise MokusError(f"true_cfg_scale is {scale}, expected a number from 0; 1 is no guidance, 4 is usual.")


def check_prompts(model: Model, prompts: Sequence[str], negative_prompt: str) -> None:
    """Raise `MokusError` for prompts that the model cannot draw, or that say nothing."""
    if not prompts:
        raise MokusError("no prompt was given; expected at least one.")
    longest = model.backbone.longest  # the pipeline cuts off what is beyond
    for prompt in [*prompts, negative_prompt]:
        if not isinstance(prompt, str):
            raise MokusError(f"a prompt is a {type(prompt).__name__}, expected text.")
    for prompt in prompts:
        check_text(prompt, "prompt", "my favourite toy in the snow")
    check_encodable(negative_prompt, "negative prompt")
    if negative_prompt.strip():
        check_text(negative_prompt, "negative prompt", "blurry")
    for prompt in dict.fromkeys([*prompts, negative_prompt]):
        tokens = len(token_ids(model, prompt)) - prefix_length(model)
        if tokens > longest:
            raise MokusError(
                f"the prompt {prompt[:40]!r}... is {tokens} tokens long, expected at most {longest}; shorten it."
            )


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    numbers = [operator.index(seed) for seed in seeds]
    if not numbers:
        raise MokusError("no seed was given; expected at least one.")
    for seed in numbers:
        if not 0 <= seed < SEEDS:
            raise MokusError(f"the seed {seed} is out of range, expected 0 to 2^64 - 1.")
    return numbers


def _check_packs(model: Model, packs: Sequence[ConceptPack], prefer: ConceptPack | None) -> None:
    for pack in packs:
        pack.check_base(model)
    shifts_of(packs, prefer)
    if any(pack.lora() for pack in packs):
        check_bare(model)


# --- files ---------------------------------------------------------


def place_of(result: Generated, path: Path) -> Path:
    """Where an image goes: to `path`, or beside it if an image of other settings is there; equal ones take each other's place."""
    about = _about(result)
    if not path.is_file() or _read_about(path) == about:
        return path
    return path.with_name(f"{path.stem}-{hashlib.sha256(about.encode()).hexdigest()[:8]}{path.suffix}")


def _read_about(path: Path) -> str | None:
    """What `save_png` wrote of an image; None if it is of another program."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("mokus")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for what is no PNG
        return None


def _about(result: Generated) -> str:
    return json.dumps({"prompt": result.prompt, "seed": result.seed, "settings": result.settings}, sort_keys=True)


def save_png(result: Generated, path: str | Path) -> None:
    """Write the image, its prompt, seed and settings as JSON in a text chunk `mokus`; atomic and reproducible."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(png_bytes(result))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def png_bytes(result: Generated) -> bytes:
    """What `save_png` writes."""
    info = PngInfo()
    info.add_text("mokus", _about(result))
    buffer = BytesIO()
    result.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
