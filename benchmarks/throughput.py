"""How fast the runner of KnowCusBench draws: against a plain loop over the pipeline, one image at a time.

    python benchmarks/throughput.py [--json]

Both draw the same prompts at the same seeds with the same packs, settings and steps, in turns, several rounds in one run. The
loop calls `QwenImagePipeline` with a prompt and a generator, and saves what it returns, the packs being loaded once; the
runner plans, encodes, draws in batches and writes its files. Ratios are medians over the rounds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from mokus.bench.knowcusbench.manifest import load_suite
from mokus.bench.knowcusbench.methods import method
from mokus.bench.knowcusbench.plan import Item, Plan, image_file, make_plan
from mokus.bench.knowcusbench.run import Runner
from mokus.console import load_model, note, one_sentence
from mokus.generation import packs_loaded
from mokus.pipeline import Model
from mokus.settings import LearnSettings

METHODS = ("base", "anchor", "mokus")
LEARN_STEPS = 20  # speed does not ask what was learned


def plain_loop(model: Model, runner: Runner, items: Mapping[str, Item], folder: Path) -> float:
    """Draw one image at a time into the folder; seconds."""
    by_pack: dict[str, list[Item]] = {}
    for item in items.values():
        by_pack.setdefault(item.pack, []).append(item)
    s = runner.plan.settings
    began = time.perf_counter()
    for key, several in by_pack.items():
        found = runner.shelf.find(key) if key else None
        with packs_loaded(model, [found[0]] if found else []):
            for item in several:
                image = model.pipe(
                    prompt=item.drawn, negative_prompt=s["negative_prompt"], true_cfg_scale=s["true_cfg_scale"],
                    num_inference_steps=s["steps"], height=s["size"], width=s["size"],
                    generator=torch.Generator("cpu").manual_seed(item.seed),
                ).images[0]  # fmt: skip
                image.save(folder / f"{item.key}.png")
    return time.perf_counter() - began


def batched(runner: Runner) -> float:
    """Draw all that is planned, the packs being there; seconds."""
    shutil.rmtree(runner.folder / "images", ignore_errors=True)
    began = time.perf_counter()
    if failed := runner.run():
        raise RuntimeError(f"{failed[0].key}: {failed[0].reason}")
    return time.perf_counter() - began


def measure(model: Model, plan: Plan, folder: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    """Both, in turns: {ratio, images_per_second, reference_images_per_second, max_pixel_difference, ...}."""
    runner, items = Runner(model, plan, folder, batch_size), plan.images()
    batched(runner)  # makes the packs, and warms up
    (reference := folder / "reference").mkdir(exist_ok=True)
    ours, theirs = [], []
    for i in range(rounds):
        ours.append(batched(runner))
        theirs.append(plain_loop(model, runner, items, reference))
        note(f"round {i + 1} of {rounds}: {ours[-1]:.1f} s against {theirs[-1]:.1f} s for {len(items)} images")
    differences = [_difference(image_file(folder, key), reference / f"{key}.png") for key in items]
    return {
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "images_per_second": len(items) / statistics.median(ours),
        "reference_images_per_second": len(items) / statistics.median(theirs),
        "max_pixel_difference": max(differences),  # of 255
        "images": len(items), "batch_size": batch_size, "rounds": rounds, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _difference(a: Path, b: Path) -> int:
    pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (a, b)]
    return int(abs(pixels[0] - pixels[1]).max())


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
    concepts: Annotated[int, typer.Option(help="Concepts of the miniature suite.", min=1, max=12)] = 1,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Of both; figures are medians.", min=1)] = 3,
    model: Annotated[str | None, typer.Option(envvar="MOKUS_MODEL", help="Another folder of the miniature.")] = None,
) -> None:
    """Measure images per second."""
    with one_sentence(), TemporaryDirectory() as folder:
        loaded, suite = load_model(model), load_suite("miniature")
        names = [concept.name for concept in suite.concepts[:concepts]]
        learn = replace(LearnSettings.for_model(loaded.defaults.learn), steps=LEARN_STEPS)
        plan = make_plan(loaded, suite, {name: method(name) for name in METHODS}, [0], {}, names, learn)
        figures = measure(loaded, plan, Path(folder), batch_size, rounds)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        for key, value in figures.items():
            print(f"{key:30} {value:.3g}" if isinstance(value, float) else f"{key:30} {value}")


if __name__ == "__main__":
    typer.run(main)
