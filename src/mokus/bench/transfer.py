"""`mokus bench transfer`: does what is edited in text show in images, for every editor? (MoKus, section 3)

On the 60 facts that the image transformer never saw, two counterfactuals each: another colour and another shape. Every
edit is made by itself, of the same questions. Text: the edited question, and questions of other forms. Image: the
oracle must read both colour and shape, in scenes that were never edited; the ceiling is the description in the prompt.

Not all editors are told the same: `ultraedit`, `finetune` and `finetune_lora` see the questions alone, as the paper's edit and
the fine-tuning of GapEval and UniSandbox do; `rome`, `memit` and `alphaedit` also how image prompts are continued (text), and
`least_drift` where their encoding shall be. "EDITOR:prompts" asks those of the first kind image prompts as well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mokus.bench import state, uses
from mokus.bench.editing.cases import DRAWN, QUESTIONS
from mokus.bench.uses import Row
from mokus.editors import EDITORS, Editor
from mokus.goal import Request
from mokus.knowledge import questions
from mokus.knowledge_update import request
from mokus.low_rank import Shifts
from mokus.miniature import world
from mokus.miniature.language import article
from mokus.miniature.world import Fact, Subject
from mokus.pipeline import Model
from mokus.progress import Progress

CASES = 100
DEFAULT = ("least_drift", "least_drift:text", *EDITORS[1:], "finetune:prompts", "finetune_lora:prompts")
TUNERS = ("finetune", "finetune_lora", "finetune:prompts", "finetune_lora:prompts")  # direct fine-tuning
ASKED_PROMPTS = ("{}", "a photo of {}")  # whose answer is the thing itself, without a scene
BASELINE = "rewrite"
WANTED = 0.9  # image transfer, as a share of text efficacy


@dataclass(frozen=True)
class Case:
    """A fact, and what it shall be instead."""

    fact: Fact
    new: Subject

    @property
    def request(self) -> Request:
        """For an editor."""
        return request(self.fact.phrase, article(self.new.words))

    def asked_of(self, name: str) -> Request:
        """For "EDITOR" or "EDITOR:VARIANT"."""
        if not name.endswith(":prompts"):
            return self.request
        asked = [*self.request.questions, *(form.format(self.fact.phrase) for form in ASKED_PROMPTS)]
        return request(self.fact.phrase, article(self.new.words), asked)


def cases(n: int = CASES) -> list[Case]:
    """The first `n` of 120 counterfactuals, and always the same ones: every held-out fact once, then all of them again."""
    rng, found = random.Random("transfer"), list[Case]()
    held_out = [fact for fact in world.facts() if fact.held_out]
    for taken in range(2):
        rng.shuffle(held_out)
        for fact in held_out:
            colours = [each for each in world.COLOURS if each != fact.subject.colour]
            shapes = [each for each in world.SHAPES if each != fact.subject.shape]
            new = Subject(rng.choice(colours), rng.choice(shapes))
            if taken and any(each == Case(fact, new) for each in found):
                new = Subject(new.colour, rng.choice([each for each in shapes if each != new.shape]))
            found.append(Case(fact, new))
    return found[:n]


def run(
    model: Model, folder: Path, editors: Sequence[str] = DEFAULT, n: int = CASES, progress: Progress | None = None
) -> Row:
    """Measure; DIR/results.json, DIR/summary.md. A stopped run goes on. Raises `MokusError` for an unknown editor."""
    for name in editors:
        uses.settings_of(model, name)
    with state.alone(folder):
        some = cases(n)
        rows = [_row(name, _measured_all(model, folder, name, some, progress)) for name in editors]
        results = {"cases": len(some), "rows": rows}
        uses.save(folder, results, summary(results))
    return results


def _measured_all(model: Model, folder: Path, name: str, some: Sequence[Case], progress: Progress | None) -> list[Row]:
    """All counterfactuals by one editor."""
    made: Editor | None = None
    setup, measured = uses.about(model, "transfer", name), []
    for i, case in enumerate(some):
        if progress:
            progress(f"transfer, {name}", i, len(some), {})
        file = f"{name}-{i}"
        if not (folder / "cases" / f"{file.replace(':', '-')}.json").is_file():
            made = made or uses.editor_of(model, name)  # it is told of no edit, so every one is alone
        measured.append(uses.kept(folder, file, setup, lambda c=case, e=made: _measured(model, name, c, e)))  # type: ignore[misc]
    if progress:
        progress(f"transfer, {name}", len(some), len(some), {})
    return measured


def _measured(model: Model, name: str, case: Case, made: Editor) -> Row:
    """One counterfactual by one editor."""
    began = time.perf_counter()
    shifts: Shifts = made.edit(case.asked_of(name), {})[0]
    seconds = time.perf_counter() - began
    phrase, new = case.fact.phrase, case.new
    meant = {phrase: case.request.says} if name == BASELINE else {}
    asked = [questions(phrase)[0], *(form.format(phrase) for form in QUESTIONS)]
    said = [answer == new.words for answer in uses.say(model, asked, shifts, meant)]
    prompts = [form.format(phrase) for form in DRAWN]
    read = uses.read(model, prompts, [uses.SEED], shifts, meant)
    direct = uses.read(model, [form.format(article(new.words)) for form in DRAWN], [uses.SEED], {})
    old = case.fact.subject
    near = [
        fact for fact in world.bystanders() if fact.person == case.fact.person or fact.relation == case.fact.relation
    ]
    near = random.Random(phrase).sample(near, min(4, len(near)))
    kept = uses.say(model, [questions(fact.phrase)[0] for fact in near], shifts)
    return {
        "phrase": phrase, "old": old.words, "new": new.words, "seconds": seconds,
        "asked": float(said[0]), "text": uses.share(said[1:]),
        "colour": uses.share(labels["colour"] == new.colour for labels in read.values()),
        "shape": uses.share(labels["shape"] == new.shape for labels in read.values()),
        "image": uses.share(_shows(labels, new) for labels in read.values()),
        "still": uses.share(_shows(labels, old) for labels in read.values()),
        "scene": uses.share(prompt.endswith(labels["scene"]) for (prompt, _), labels in read.items()),
        "ceiling": uses.share(_shows(labels, new) for labels in direct.values()),
        "near": uses.share(said == fact.subject.words for said, fact in zip(kept, near, strict=True)),
    }  # fmt: skip


def _shows(labels: dict[str, str], subject: Subject) -> bool:
    return (labels["colour"], labels["shape"]) == (subject.colour, subject.shape)


def _row(name: str, measured: Sequence[Row]) -> Row:
    """An editor's means. `transfer`: images over text efficacy. `taken`: images of those edits that the question took."""
    keys = ("asked", "text", "colour", "shape", "image", "still", "scene", "ceiling", "near", "seconds")
    row: Row = {"editor": name, "n": len(measured), **{key: uses.mean(measured, key) for key in keys}}
    row["transfer"] = row["image"] / row["asked"] if row["asked"] else None
    row["taken"] = uses.mean([each for each in measured if each["asked"] == 1], "image")
    return row


def summary(results: Row) -> str:
    """The figures in Markdown."""
    head = (
        "editor", "cases", "asked", "other questions", "image: both", "colour", "shape", "image / asked", "image, of those taken",
        "still the old", "scene", "ceiling", "near facts kept",
    )  # fmt: skip
    keys = ("asked", "text", "image", "colour", "shape", "transfer", "taken", "still", "scene", "ceiling", "near")
    text = f"# Transfer: {results['cases']} counterfactual facts that the image transformer never saw\n\nPercent.\n\n"
    text += uses.table([*head, "s"], [
        [f"`{row['editor']}`", row["n"], *(row[key] for key in keys), f"{row['seconds']:.1f}"] for row in results["rows"]
    ])  # fmt: skip
    rows = {row["editor"]: row for row in results["rows"]}
    text += "\n"
    if best := rows.get(DEFAULT[0]):
        text += uses.verdict("image transfer over text efficacy, the default editor", best["transfer"], WANTED)
    tuned = [rows[name] for name in TUNERS if name in rows]
    edited = [row for name, row in rows.items() if name not in (*TUNERS, BASELINE)]
    if tuned and edited:
        text += "- image transfer of edits that took, editing against fine-tuning: "
        text += ", ".join(f"{row['editor']} {_number(row['taken'])}" for row in [*edited, *tuned]) + "\n"
    return text


def _number(value: float | None) -> str:
    return "none took" if value is None else f"{value:.2f}"
