"""`mokus bench create`: names that nobody knows, bound to descriptions of what the world can draw.

Fifty new names, each bound by itself to a colour, a shape and a material (plain, striped, spotted, golden). The oracle reads
colour, shape and scene; the material, which it does not read, is read by the miniature's CLIP as the likeliest of four
descriptions. The ceiling is the description written into the same prompts at the same seeds.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mokus.bench import state, uses
from mokus.bench.editing.cases import QUESTIONS
from mokus.bench.uses import Row
from mokus.editors import EDITORS, Editor
from mokus.goal import Request
from mokus.knowledge_update import request
from mokus.miniature import clip, oracle, world
from mokus.miniature.language import article
from mokus.miniature.world import Subject
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.virtual_concept import about

NAMES = 50
PROMPTS = {
    "{} in the forest": "in the forest", "{} in the city": "in the city", "a postcard of {} under water": "under water",
    "one more photo of {} on the beach": "on the beach",
}  # fmt: skip
SEEDS = (uses.SEED, uses.SEED + 1)
MATERIALS = ("plain", *world.MATERIALS)
ATTRIBUTES = ("colour", "shape", "material")
WANTED = 0.9  # of the ceiling, for each attribute
_SYLLABLES = (
    "bo", "cra", "dri", "fe", "glo", "gra", "hu", "ji", "ka", "lu", "mi", "no", "pra", "qui", "ra", "sno", "ta", "ve",
    "wu", "zi", "zor",
)  # fmt: skip
_ENDS = ("bax", "dle", "fin", "gor", "lim", "mok", "nix", "pim", "rup", "sel", "tro", "vik", "wyn", "zel")


@dataclass(frozen=True)
class Case:
    """A name, and what it shall be."""

    name: str
    subject: Subject

    @property
    def request(self) -> Request:
        """For an editor: as `virtual_concept.create` asks for it."""
        return request(self.name, article(self.subject.words), about(self.name))


def cases(n: int = NAMES) -> list[Case]:
    """The first `n` names, and always the same ones: every second name with an article, like a kind of thing."""
    rng, found = random.Random("create"), dict[str, Case]()
    while len(found) < n:
        word = (rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES) + rng.choice(_ENDS)).capitalize()
        material = MATERIALS[len(found) % len(MATERIALS)]
        subject = world.random_subject(rng, None if material == "plain" else material)
        name = word if len(found) % 2 else f"the {word}"
        found.setdefault(word, Case(name, subject))
    return list(found.values())


def run(model: Model, folder: Path, editor: str = EDITORS[0], n: int = NAMES, progress: Progress | None = None) -> Row:
    """Measure; DIR/results.json, DIR/summary.md. A stopped run goes on. Raises `MokusError` for an unknown editor."""
    with state.alone(folder):
        results = {"editor": editor, "n": n, **_figures(_rows(model, folder, editor, n, progress))}
        uses.save(folder, results, summary(results))
    return results


def _rows(model: Model, folder: Path, editor: str, n: int, progress: Progress | None) -> list[Row]:
    setup, made = uses.about(model, "create", editor), None
    rows = []
    for i, case in enumerate(cases(n)):
        if progress:
            progress(f"create, {editor}", i, n, {})
        file = f"{editor}-{i}"
        if not (folder / "cases" / f"{file.replace(':', '-')}.json").is_file():
            made = made or uses.editor_of(model, editor)
        rows.append(uses.kept(folder, file, setup, lambda c=case, e=made: _measured(model, c, e)))  # type: ignore[misc]
    if progress:
        progress(f"create, {editor}", n, n, {})
    return rows


def _measured(model: Model, case: Case, made: Editor) -> Row:
    """One name."""
    began = time.perf_counter()
    shifts = made.edit(case.request, {})[0]
    seconds = time.perf_counter() - began
    name, subject = case.name, case.subject
    asked = [about(name), [form.format(name) for form in QUESTIONS]]
    said = [[answer == subject.words for answer in uses.say(model, some, shifts)] for some in asked]
    other = next(each.name for each in cases(NAMES + 1)[::-1] if each.name != name and each.subject != subject)
    before, after = (uses.say(model, [f"What is {other}?", f"{other} in the forest"], each) for each in ({}, shifts))
    row: Row = {
        "name": name, "wanted": subject.words, "seconds": seconds, "edited_questions": uses.share(said[0]),
        "other_questions": uses.share(said[1]), "other_name": uses.share(a == b for a, b in zip(before, after, strict=True)),
    }  # fmt: skip
    for what, phrase, each in (("name", name, shifts), ("ceiling", article(subject.words), {}), ("unbound", name, {})):
        scenes = {form.format(phrase): scene for form, scene in PROMPTS.items()}
        images = uses.draw(model, list(scenes), SEEDS if what != "unbound" else SEEDS[:1], each)
        read = oracle.load().read(list(images.values()))
        materials = _materials(list(images.values()), subject)
        shown = [(labels["colour"], labels["shape"], m) for labels, m in zip(read, materials, strict=True)]
        row[what] = {
            **{a: uses.share(s[i] == getattr(subject, a) for s in shown) for i, a in enumerate(ATTRIBUTES)},
            "all": uses.share(s == (subject.colour, subject.shape, subject.material) for s in shown),
            "scene": uses.share(scenes[p] == labels["scene"] for (p, _), labels in zip(images, read, strict=True)),
            # how many of all images show the same thing, whatever that is
            "identity": Counter(shown).most_common(1)[0][1] / len(shown),
        }  # fmt: skip
    return row


def _materials(images: Sequence[Image.Image], subject: Subject) -> list[str]:
    """The material that CLIP sees, told apart by descriptions in the colour and the shape that are wanted."""
    colour = "yellow" if subject.material == "golden" else subject.colour
    texts = [f"a {m} {colour} {subject.shape}" for m in MATERIALS[1:3]]
    texts = [f"a {colour} {subject.shape}", *texts, f"a golden {subject.shape}"]
    seen, said = clip.embeddings(clip.folder(), images, texts)
    return [MATERIALS[i] for i in (seen @ said.T).argmax(dim=1).tolist()]


def _figures(rows: Sequence[Row]) -> Row:
    found: Row = {key: uses.mean(rows, key) for key in ("edited_questions", "other_questions", "other_name", "seconds")}
    for what in ("name", "ceiling", "unbound"):
        found[what] = {key: uses.mean([row[what] for row in rows], key) for key in rows[0][what]}
    found["of_ceiling"] = {a: found["name"][a] / found["ceiling"][a] for a in ATTRIBUTES if found["ceiling"][a]}
    return found


def summary(results: Row) -> str:
    """The figures in Markdown."""
    text = f"# Create: {results['n']} new names, each bound to a description (`{results['editor']}`)\n\nPercent.\n\n"
    keys = (*ATTRIBUTES, "all", "scene", "identity")
    text += uses.table(["drawn", *keys], [
        [what, *(results[key][k] for k in keys)]
        for key, what in (("name", "the name"), ("ceiling", "the description in the prompt"), ("unbound", "the name, not bound"))
    ])  # fmt: skip
    text += f"\nQuestions that were edited: {100 * results['edited_questions']:.1f}, of other forms: "
    text += (
        f"{100 * results['other_questions']:.1f}; another new name is as before: {100 * results['other_name']:.1f}; "
    )
    text += f"{results['seconds']:.1f} s an edit.\n\n"
    for attribute, value in results["of_ceiling"].items():
        text += uses.verdict(f"{attribute}, as a share of the ceiling", value, WANTED)
    return text
