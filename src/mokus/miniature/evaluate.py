"""Measure the miniature on fresh seeds: `python -m mokus.miniature.evaluate --json`.

Facts: all 240 as questions and as captions; the probe and the held-out figures on facts that the image transformer never
saw. Images: judged by the oracle, whose own accuracy is measured on fresh renders. Photos: with `--photos DIR`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.progress import track

from mokus.encoder import answers
from mokus.generation import generate
from mokus.miniature import language, oracle, vae, world
from mokus.photos import load_photos
from mokus.pipeline import MINIATURE, Model, encode, load

SEED = 20_000  # no training uses seeds from here on
ANSWER_TOKENS = 14
PHOTOS = Path("../shared/data/dreambench")  # measured if they are there


def evaluate(model: Model, images: int = 200, photos: Path | None = None) -> Iterator[tuple[str, float]]:
    """All figures, one after the other: (key, value), fractions in 0..1. `images` prompts are drawn of each kind."""
    judge = oracle.load()
    yield "oracle_accuracy", oracle.accuracy(judge, 2000, SEED)["mean"]
    yield from text_figures(model)
    yield "tail_probe", probe(model)
    rng = random.Random(SEED)
    yield from image_figures(model, [language.direct_caption(rng, "{} {}", plain=1.0) for _ in range(images)], "direct")
    unseen = [fact for fact in world.facts() if fact.held_out]
    facts = [unseen[i % len(unseen)] for i in range(images)]
    yield from image_figures(model, [language.fact_caption(rng, fact, "{} {}", plain=1.0) for fact in facts], "heldout")
    yield (
        "psnr_world",
        psnr(model, [world.render(language.random_picture(rng, world.random_subject(rng)), rng) for _ in range(200)]),
    )
    if photos is not None:
        folders = (
            [photos] if any(p.is_file() and p.suffix == ".jpg" for p in photos.iterdir()) else sorted(photos.iterdir())
        )
        yield (
            "psnr_photos",
            psnr(model, [p.image for f in folders if f.is_dir() for p in load_photos(f, model.defaults.size)]),
        )
    weights = Path(str(files("mokus.miniature").joinpath("weights"))) if model.id == MINIATURE else Path(model.id)
    yield "megabytes", sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) / 1e6


# --- text ---------------------------------------------------------


def text_figures(model: Model) -> Iterator[tuple[str, float]]:
    """Share of right greedy answers: every fact as question (two forms), fresh captions of facts and of described things."""
    rng = random.Random(SEED)
    lines = [
        language.fact_question(rng, fact, form)
        for fact in world.facts()
        for form in ("What is {}?", "Tell me what {} is.")
    ]
    yield "qa_accuracy", _right(model, lines)
    unseen = [
        language.fact_question(rng, fact, form) for fact in world.facts() for form in language.HELD_OUT_QUESTION_FORMS
    ]
    yield "qa_accuracy_heldout_forms", _right(model, unseen)
    captions = [language.fact_caption(rng, fact) for fact in world.facts()] + [
        language.direct_caption(rng) for _ in range(240)
    ]
    yield "caption_accuracy", _right(model, captions)


def _right(model: Model, lines: Sequence[language.Line]) -> float:
    found = answers(model, [line.prompt for line in lines], longest=ANSWER_TOKENS)
    return sum(a == line.answer for a, line in zip(found, lines, strict=True)) / len(lines)


def probe(model: Model) -> float:
    """A linear probe (ridge) on the last tail state: colour and shape of facts that it never saw, the worse of the two."""
    rng = random.Random(SEED)
    facts = world.facts()
    lines = [language.fact_caption(rng, fact, "{} {}", plain=1.0) for fact in facts for _ in range(4)]
    x = torch.stack([e[-1] for e in encode(model, [line.prompt for line in lines])]).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    unseen = torch.tensor([fact.held_out for fact in facts for _ in range(4)])
    worst = 1.0
    for attribute, values in (("colour", list(world.COLOURS)), ("shape", world.SHAPES)):
        labels = torch.tensor([values.index(getattr(fact.subject, attribute)) for fact in facts for _ in range(4)])
        wanted = torch.nn.functional.one_hot(labels, len(values)).double()
        seen = x[~unseen]
        w = torch.linalg.solve(seen.T @ seen + torch.eye(x.shape[1], dtype=x.dtype), seen.T @ wanted[~unseen])
        worst = min(worst, float(((x[unseen] @ w).argmax(dim=1) == labels[unseen]).double().mean()))
    return worst


# --- images ---------------------------------------------------------


def image_figures(model: Model, lines: Sequence[language.Line], name: str) -> Iterator[tuple[str, float]]:
    """Share of images in which the oracle reads the colour, shape and scene that the prompt asks for, and their seconds."""
    began = time.perf_counter()
    prompts = list(dict.fromkeys(line.prompt for line in lines))
    wanted = {line.prompt: line.picture for line in lines}
    drawn = list(generate(model, prompts, seeds=[SEED], batch_size=32))
    seconds = (time.perf_counter() - began) / len(drawn)
    read = oracle.load().read([each.image for each in drawn])
    hits: dict[str, list[bool]] = {"colour": [], "shape": [], "scene": []}
    for each, found in zip(drawn, read, strict=True):
        picture = wanted[each.prompt]
        assert picture is not None and isinstance(picture.subject, world.Subject)
        hits["colour"].append(found["colour"] == picture.subject.colour)
        hits["shape"].append(found["shape"] == picture.subject.shape)
        if picture.scene:
            hits["scene"].append(found["scene"] == picture.scene)
    for attribute, right in hits.items():
        yield f"{name}_{attribute}", sum(right) / len(right)
    if name == "direct":
        yield "seconds_per_image", seconds


@torch.no_grad()
def psnr(model: Model, images: Sequence[Image.Image]) -> float:
    """Mean peak signal-to-noise ratio, dB, of images after a trip through the VAE."""
    values = []
    autoencoder = model.pipe.vae
    for i in range(0, len(images), 25):
        x = vae.to_tensor(list(images[i : i + 25]))
        z = autoencoder.encode(x[:, :, None].to(autoencoder.dtype)).latent_dist.mode()
        y = autoencoder.decode(z).sample[:, :, 0].float().clamp(-1, 1)
        values.append(-10 * ((x - y) / 2).square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(values).mean())


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
    images: Annotated[int, typer.Option(help="Prompts drawn of each kind.")] = 200,
    photos: Annotated[
        Path | None, typer.Option(help="A folder of photos, or of folders of photos.", show_default=str(PHOTOS))
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another folder of the miniature.")] = None,
) -> None:
    """Measure the miniature."""
    figures: dict[str, Any] = {}
    for key, value in track(
        evaluate(load(model, "cpu"), images, photos or (PHOTOS if PHOTOS.is_dir() else None)),
        "measuring",
        total=15,
        disable=as_json,
    ):
        figures[key] = round(value, 4)
        if not as_json:
            print(f"{key:28s} {value:.4f}")
    if as_json:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
