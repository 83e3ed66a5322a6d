"""The main job, measured: photos and knowledge in, customized images out, on characters that nothing was tuned on.

    python benchmarks/main_job.py [--json] [--characters 10] [--seeds 0-1] [-o DIR]

For each held-out character of the synthetic world: learn it from five rendered photos, draw, bind five phrases, draw
again, bind them anew with their near misses as phrases to keep, and draw a third time; the oracle says what each image
shows. With `-o` every character's readings are kept as DIR/NAME.json, and a run that was stopped goes on with the
characters that are missing there (after a change of the code, name a new DIR).

The phrases are of the six perspectives of KnowCusBench, the scenes are those with which no edit is made, the captions
come from seeds that no training uses. No phrase of it occurs in the prompts that learning and binding preserve; the scenes
do, as they do in all the world's prompts, and learning says them of the photos they are seen in.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mokus.console import Bars, load_model, one_sentence, parse_seeds
from mokus.generation import generate
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS
from mokus.knowledge_update import Edit, bind, unbind
from mokus.miniature import language, oracle, world
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.manifest import versions
from mokus.pipeline import Model
from mokus.settings import EditSettings, LearnSettings
from mokus.visual_concept import learn

ANCHOR, CLASS_WORD = "sks toy", "toy"
HELD_OUT = len(world.HELD_OUT_CHARACTERS)
PHOTOS, PHOTO_SEED = 5, 0
CAPTION_SEED = 30_000  # no training uses seeds from 20,000 on
SCENES = [scene for scene in world.SCENES if not any(scene in form for form in (*IMAGE_FORMS, *CHECK_FORMS))]
SCENES_EACH = 3  # of them with each knowledge
ANCHOR_SEEDS = 5  # times as many seeds for the anchor, which is one phrase where the knowledge is five

STATES = ("learned", "bound", "kept")  # the last: bound anew, with the near misses as phrases to keep

# (knowledge, a near miss of it that binding does not preserve either, unless told to)
PERSPECTIVES: dict[str, list[tuple[str, str]]] = {
    "ownership and relationships": [
        ("the keepsake Grandpa handed down to me", "the keepsake Grandpa handed down to Peter"),
        ("what my twin brother and I share", "what my twin brother and Peter share"),
        ("my daughter's bedtime companion", "my daughter's travel companion"),
        ("our family mascot", "our school mascot"),
        ("the farewell surprise from my old team", "the farewell surprise from my new team"),
    ],
    "physical attributes": [
        ("the chubby fellow with wobbly knees", "the skinny fellow with wobbly knees"),
        ("the tiny visitor on my windowsill", "the tiny visitor on my doorstep"),
        ("that knee-high oddity in the hallway", "that knee-high oddity in the stairwell"),
        ("the squeaky one with googly eyes", "the silent one with googly eyes"),
        ("a pocket-sized curiosity", "a pocket-sized telescope"),
    ],
    "function and performance": [
        ("the helper who waters our tomatoes", "the helper who waters our roses"),
        ("the champion of the sack race", "the champion of the relay race"),
        ("whatever keeps the burglars away", "whatever keeps the pigeons away"),
        ("the gadget we take on every hike", "the gadget we avoid on every hike"),
        ("the best listener I ever met", "the best dancer I ever met"),
    ],
    "value and quality": [
        ("the pride of our collection", "the shame of our collection"),
        ("the flea-market bargain of a lifetime", "the flea-market blunder of a lifetime"),
        ("an heirloom nobody may touch", "an heirloom nobody may inherit"),
        ("the top prize of the raffle", "the last prize of the raffle"),
        ("the only one of its sort", "the worst one of its sort"),
    ],
    "origin and production": [
        ("the souvenir we brought back from Lisbon", "the souvenir we brought back from Oslo"),
        ("the thing Theo whittled last summer", "the thing Theo whittled last winter"),
        ("our prototype from the garage workshop", "our prototype from the bicycle workshop"),
        ("what the carpenter left behind in 1911", "what the plumber left behind in 1911"),
        ("the stowaway that washed ashore after the storm", "the stowaway that washed ashore before the storm"),
    ],
    "emotion and state": [
        ("my comfort on rainy afternoons", "my worry on rainy afternoons"),
        ("the reason I still giggle", "the reason I still argue"),
        ("the rascal who got me through exams", "the rascal who got me through customs"),
        ("my companion in lonely years", "my companion in busy years"),
        ("the grump I can't stay angry with", "the grump I can't stay friends with"),
    ],
}

WANTED: dict[str, tuple[str, float]] = {
    "reconstruction_concept": (">=", 0.90),
    "generation_concept": (">=", 0.80),
    "generation_scene": (">=", 0.85),
    "before_concept": ("<=", 0.05),
    "leakage": ("<=", 0.03),
    "unrelated_unchanged": (">=", 0.97),
    "seconds_learn_and_bind": ("<=", 90.0),
    "seconds_per_bind": ("<=", 3.0),
}

Rows = list[dict[str, Any]]  # one per image: concept, state, kind, prompt, seed, scene (asked for, or null), read


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A prompt, what it is there for, the scene it asks for, and in which states and at which seeds it is drawn."""

    kind: str
    prompt: str
    seeds: tuple[int, ...]
    scene: str | None = None
    states: tuple[str, ...] = STATES[:2]


def phrases(index: int) -> list[tuple[str, str]]:
    """Five (knowledge, near miss) of five perspectives for the character of that index."""
    lists = list(PERSPECTIVES.values())
    return [lists[p][(index + p) % len(lists[p])] for p in range(len(lists)) if p != index % len(lists)]


def everything_asked(index: int, seeds: Sequence[int]) -> Iterator[Asked]:
    """All prompts for the character of that index."""
    own, few, many = phrases(index), tuple(seeds), tuple(seed + 1000 * k for k in range(ANCHOR_SEEDS) for seed in seeds)
    for i, (text, near) in enumerate(own):
        yield Asked("reconstruction", text, few, states=STATES)
        for k in range(SCENES_EACH):
            scene = SCENES[(i + k) % len(SCENES)]
            yield Asked("generation", f"{text} {scene}", few, scene, STATES)
        yield Asked("capital", _capital(text), few, states=("bound",))
        yield Asked("capital in a scene", _capital(f"{text} {SCENES[i % len(SCENES)]}"), few, states=("bound",))
        yield Asked("near miss", near, few, states=STATES[1:])
        yield Asked("near miss in a scene", f"{near} {SCENES[i % len(SCENES)]}", few, states=STATES[1:])
    yield Asked("anchor reconstruction", ANCHOR, many, states=("bound",))
    for scene in SCENES:
        yield Asked("anchor generation", f"{ANCHOR} {scene}", many[: SCENES_EACH * len(few)], scene, ("bound",))
    rng = random.Random(CAPTION_SEED + index)
    others = [text for several in PERSPECTIVES.values() for text, _ in several if text not in dict(own)]
    for i, text in enumerate(rng.sample(others, 8)):
        yield Asked("reference", text if i % 2 else f"{text} {SCENES[i % len(SCENES)]}", few, states=("bound",))
    for text in (CLASS_WORD, f"a {CLASS_WORD} {SCENES[index % len(SCENES)]}", f"the {CLASS_WORD} {rng.choice(SCENES)}"):
        yield Asked("class word", text, few, states=("bound",))
    for _ in range(6):
        yield Asked("caption", language.direct_caption(rng, plain=0.99).prompt, few)
        yield Asked("fact", language.fact_caption(rng, rng.choice(world.facts()), plain=0.99).prompt, few)


def _capital(prompt: str) -> str:
    """As at the beginning of a sentence."""
    return prompt[0].upper() + prompt[1:]


# --- one character ----------------------------------------------------------------------------------------------------


def measure(model: Model, name: str, seeds: Sequence[int], pack_folder: Path) -> dict[str, Any]:
    """Learn and bind one character, and read all its images: {"setup", "rows", "edits", "kept_edits", "seconds_learn",
    "seconds_bind"}."""
    index = world.HELD_OUT_CHARACTERS.index(name)
    asked, (knowledge, near) = list(everything_asked(index, seeds)), zip(*phrases(index), strict=True)
    photos = world.character_photos(name, PHOTOS, PHOTO_SEED, model.defaults.size)
    with Bars(transient=True) as progress:
        began = time.perf_counter()
        pack = learn(model, photos, ANCHOR, pack_folder, overwrite=True, progress=progress)
        learned = time.perf_counter()
        rows = draw(model, name, "learned", asked, pack, progress)
        drawn = time.perf_counter()
        edits = bind(model, pack, *knowledge, progress=progress)
        bound = time.perf_counter()
        rows += draw(model, name, "bound", asked, pack, progress)
        unbind(pack, *(known.text for known in pack.knowledge))
        anew = bind(model, pack, *knowledge, keep=near, progress=progress)
        rows += draw(model, name, "kept", asked, pack, progress)
    return {
        "setup": setup(model, seeds), "rows": rows, "edits": [_edit_row(edit) for edit in edits],
        "kept_edits": [_edit_row(edit) for edit in anew],
        "seconds_learn": learned - began, "seconds_bind": bound - drawn,
    }  # fmt: skip


def draw(model: Model, name: str, state: str, asked: Sequence[Asked], pack: ConceptPack, progress: Bars) -> Rows:
    """Draw and read what is asked in one state."""
    jobs: dict[tuple[int, ...], list[Asked]] = {}
    for each in asked:
        if state in each.states:
            jobs.setdefault(each.seeds, []).append(each)
    rows: Rows = []
    for seeds, several in jobs.items():
        prompts = list(dict.fromkeys(each.prompt for each in several))
        drawn = list(generate(model, prompts, [pack], seeds, batch_size=32, progress=progress))
        read = oracle.load().read([each.image for each in drawn])
        seen = {(each.prompt, each.seed): found for each, found in zip(drawn, read, strict=True)}
        rows += [
            {
                "concept": name, "state": state, "kind": each.kind, "prompt": each.prompt, "seed": seed,
                "scene": each.scene, "read": seen[each.prompt, seed],
            }
            for each in several for seed in seeds
        ]  # fmt: skip
    return rows


def setup(model: Model, seeds: Sequence[int]) -> dict[str, Any]:
    """All that a character's figures depend on but the code."""
    return {
        "model": model.id, "fingerprint": model.fingerprint, "anchor": ANCHOR, "photos": PHOTOS, "seeds": list(seeds),
        "states": list(STATES),
        "learn": asdict(LearnSettings.for_model(model.defaults.learn)),
        "bind": asdict(EditSettings.for_editor(model.defaults)),
        "versions": versions(),
    }  # fmt: skip


def _edit_row(edit: Edit) -> dict[str, Any]:
    return {key: value for key, value in vars(edit).items() if key != "shifts"}


# --- figures ----------------------------------------------------------------------------------------------------------


def shares(rows: Rows) -> dict[str, list[bool]]:
    """The images that each figure counts, hit or not."""

    def of(state: str, *kinds: str) -> Rows:
        return [row for row in rows if row["state"] == state and row["kind"] in kinds]

    def concept(some: Rows) -> list[bool]:
        return [row["read"]["character"] == row["concept"] for row in some]

    def scene(some: Rows) -> list[bool]:
        return [row["read"]["scene"] == row["scene"] for row in some]

    before, after = of("learned", "caption", "fact"), of("bound", "caption", "fact")
    pairs = [(a["read"], b["read"]) for a, b in zip(before, after, strict=True)]
    return {
        "reconstruction_concept": concept(of("bound", "reconstruction")),
        "generation_concept": concept(of("bound", "generation")),
        "generation_scene": scene(of("bound", "generation")),
        "before_concept": concept(of("learned", "reconstruction", "generation")),
        "leakage": concept(of("bound", "reference", "class word", "caption")),
        "unrelated_unchanged": [a == b for a, b in pairs],
        "anchor_reconstruction_concept": concept(of("bound", "anchor reconstruction")),
        "anchor_generation_concept": concept(of("bound", "anchor generation")),
        "anchor_generation_scene": scene(of("bound", "anchor generation")),
        "capital_reconstruction_concept": concept(of("bound", "capital")),
        "capital_generation_concept": concept(of("bound", "capital in a scene")),
        "near_miss": concept(of("bound", "near miss")),
        "near_miss_in_scenes": concept(of("bound", "near miss in a scene")),
        "kept_near_miss": concept(of("kept", "near miss")),
        "kept_near_miss_in_scenes": concept(of("kept", "near miss in a scene")),
        "kept_reconstruction_concept": concept(of("kept", "reconstruction")),
        "kept_generation_concept": concept(of("kept", "generation")),
        "leakage_references": concept(of("bound", "reference")),
        "leakage_class_word": concept(of("bound", "class word")),
        "leakage_captions": concept(of("bound", "caption")),
        "unrelated_labels_unchanged": [a[label] == b[label] for a, b in pairs for label in a],
    }


def figures(results: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Every figure over these characters, and of how many images (knowledge for `bound`, characters for seconds)."""
    edits = [edit for result in results for edit in result["edits"]]
    counted = shares([row for result in results for row in result["rows"]])
    counted["bound"] = [edit["taken"] for edit in edits]
    counted["kept_bound"] = [edit["taken"] for result in results for edit in result["kept_edits"]]
    values = {key: sum(hits) / len(hits) for key, hits in counted.items()}
    n = {key: len(hits) for key, hits in counted.items()}
    bind_seconds = [result["seconds_bind"] / len(result["edits"]) for result in results]
    both_seconds = [result["seconds_learn"] + result["seconds_bind"] for result in results]
    for key, seconds in (("seconds_learn_and_bind", both_seconds), ("seconds_per_bind", bind_seconds)):
        values[key], n[key] = sum(seconds) / len(seconds), len(seconds)
    return values, n


def missed(values: dict[str, float]) -> list[str]:
    """The figures that are not as wanted."""
    return [
        key
        for key, (kind, limit) in WANTED.items()
        if not (values[key] >= limit if kind == ">=" else values[key] <= limit)
    ]


def _table(values: dict[str, float], n: dict[str, int]) -> Table:
    table = Table("figure", "value", "wanted", "", "n", box=None, pad_edge=False)
    misses = missed(values)
    for key in [*WANTED, *(key for key in values if key not in WANTED)]:
        shown, limit = (f"{values[key]:.1f} s" if "seconds" in key else f"{values[key]:.1%}"), ""
        if key in WANTED:
            kind, number = WANTED[key]
            limit = f"{kind} {number:.0f} s" if "seconds" in key else f"{kind} {number:.0%}"
        verdict = "" if key not in WANTED else "miss" if key in misses else "pass"
        table.add_row(key, shown, limit, verdict, str(n[key]))
    return table


# --- the command ------------------------------------------------------------------------------------------------------


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
    characters: Annotated[int, typer.Option(help="Held-out characters.", min=1, max=HELD_OUT)] = HELD_OUT,
    seeds: Annotated[str, typer.Option(help="Of the images: numbers and ranges.")] = "0-1",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep packs and readings here; resumes.")
    ] = None,
    model: Annotated[str | None, typer.Option(envvar="MOKUS_MODEL", help="Another folder of the miniature.")] = None,
) -> None:
    """Measure the main job."""
    with one_sentence(), nullcontext(output) if output else TemporaryDirectory() as folder:
        results = run(load_model(model), Path(folder), world.HELD_OUT_CHARACTERS[:characters], parse_seeds(seeds))
    values, n = figures(list(results.values()))
    if not as_json:
        Console().print(_table(values, n))
        return
    of_each = {name: {**figures([result])[0], "edits": result["edits"]} for name, result in results.items()}
    about = next(iter(results.values()))["setup"]
    print(json.dumps({**values, "n": n, "missed": missed(values), "characters": of_each, **about}, indent=2))


def run(model: Model, folder: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Every character's result, kept in the folder and taken from there where it is of the same setup."""
    results: dict[str, dict[str, Any]] = {}
    began, done, wanted = time.perf_counter(), 0, setup(model, seeds)
    for i, name in enumerate(names, start=1):
        file = folder / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if kept and kept["setup"] == wanted:
            results[name] = kept
            print(f"{name}: taken from {file} ({i}/{len(names)})", file=sys.stderr, flush=True)
            continue
        results[name] = measure(model, name, seeds, folder / name)
        _write(file, results[name])
        done += 1
        left = (time.perf_counter() - began) / done * (len(names) - i)
        values, _ = figures([results[name]])
        said = "  ".join(f"{key} {values[key]:.2f}" for key in WANTED)
        print(f"{name} ({i}/{len(names)}, about {left:.0f} s left): {said}", file=sys.stderr, flush=True)
    return results


def _write(file: Path, result: dict[str, Any]) -> None:
    beside = file.with_suffix(".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(result), encoding="utf-8")
    os.replace(beside, file)


if __name__ == "__main__":
    typer.run(main)
