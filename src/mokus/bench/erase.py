"""`mokus bench erase`: facts whose answers become their class word, alone and on top of each other.

On facts that nothing was tuned on. *Erased*: images of prompts with the phrase do not show the old thing any more (nor does an
answer name it). *Kept*: answers and images of what was not erased are as before: facts of the same person, of the same
relation, of neither, and captions, none of which an editor's corpus tells of. *Leakage*: other words for what was erased still
lead to it: paraphrases ("Anna's lucky charm", never edited) and implicit descriptions ("the lucky charm that belongs to
Anna"), as a share of those that did so before. H is the harmonic mean of erased, kept and 1 - paraphrase leakage, all of
images (after MACE, arXiv 2403.06135).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from mokus.bench import state, uses
from mokus.bench.editing.cases import DRAWN, QUESTIONS, captions, edited_facts
from mokus.bench.state import load_edits, save_edits
from mokus.bench.uses import Labels, Row
from mokus.editors import EDITORS
from mokus.erasure import asked, plain
from mokus.goal import Request
from mokus.knowledge import questions
from mokus.knowledge_update import request
from mokus.low_rank import LowRankShift, Shifts, added, collected
from mokus.miniature import world
from mokus.miniature.world import Fact, Subject
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.virtual_concept import about

COUNTS = (1, 10, 50)
SINGLES = 8  # single erasures that the figures of one are the mean of
JUDGED = 12  # facts of each kind that are drawn, at most
CAPTIONS = 12
IMPLICIT = (
    "the {relation} that belongs to {person}", "what {person} calls the {relation}", "the {relation} owned by {person}",
)  # fmt: skip
WANTED = {"erased": 0.95, "kept": 0.97, "paraphrase": 0.10, "H": 0.93}


def facts(n: int) -> list[Fact]:
    """The first `n` that are erased, and always the same ones."""
    return edited_facts()[:n]


def request_of(fact: Fact) -> Request:
    """As `erasure.erase` asks for it."""
    return request(fact.phrase, plain(fact.phrase), asked(fact.phrase))


def run(
    model: Model, folder: Path, editor: str = EDITORS[0], counts: Sequence[int] = COUNTS, singles: int = SINGLES,
    progress: Progress | None = None,
) -> Row:  # fmt: skip
    """Measure; DIR/results.json, DIR/summary.md. A stopped run goes on. Raises `MokusError` for an unknown editor."""
    with state.alone(folder):
        rows = _rows(model, folder, editor, counts, singles, progress)
        results = {"editor": editor, "rows": rows}
        uses.save(folder, results, summary(results))
    return results


def _rows(
    model: Model, folder: Path, editor: str, counts: Sequence[int], singles: int, progress: Progress | None
) -> list[Row]:
    setup = uses.about(model, "erase", editor)
    rows = []
    if 1 in counts:
        alone = []
        for i, fact in enumerate(facts(singles)):
            if progress:
                progress("erase, one alone", i, singles, {})
            alone.append(uses.kept(folder, f"{editor}-one-{i}", setup, lambda f=fact: _one(model, editor, f)))  # type: ignore[misc]
        rows.append({"erasures": 1, **_mean(alone)})
    several = sorted(count for count in counts if count > 1)
    sequence = _Sequence(model, folder, editor, setup, max(several, default=0), progress)
    for count in several:
        rows.append({
            "erasures": count,
            **uses.kept(folder, f"{editor}-{count}", setup, lambda c=count: _measured(model, facts(c), sequence.after(c))),  # type: ignore[misc]
        })  # fmt: skip
    for row in rows:
        for h, prefix in (("H", ""), ("H_text", "text_")):
            leaked = row[f"{prefix}paraphrase"]
            sealed = None if leaked is None else 1 - leaked
            row[h] = uses.harmonic(row[f"{prefix}erased"], row[f"{prefix}kept"], sealed)
    return rows


def _one(model: Model, editor: str, fact: Fact) -> Row:
    return _measured(model, [fact], uses.editor_of(model, editor).edit(request_of(fact), {})[0])


class _Sequence:
    """Erasures one on top of the other, each kept in DIR/state as soon as it is made."""

    def __init__(self, model: Model, folder: Path, name: str, setup: Row, most: int, progress: Progress | None) -> None:
        self.model, self.name, self.setup, self.most, self.progress = model, name, setup, most, progress
        self.place = folder / "state"

    def after(self, count: int) -> Shifts:
        """All shifts of the first so many."""
        made, before = uses.editor_of(self.model, self.name), dict[str, LowRankShift]()
        for i, fact in enumerate(facts(count)):
            if self.progress:
                self.progress("erase, one on top of the other", i, self.most, {})
            file = self.place / f"{self.name.replace(':', '-')}-{i}.safetensors"
            kept, _ = load_edits(file, self.setup)
            shifts = kept[0] if kept else made.edit(request_of(fact), before)[0]
            if not kept:
                save_edits(file, [shifts], self.setup)
            made.remember(request_of(fact), before, shifts)
            before = dict(collected(added(before, shifts)))
        return before


# --- what is measured -------------------------------------------------------------------------------------------------


def _measured(model: Model, erased: Sequence[Fact], shifts: Shifts) -> Row:
    """All figures after these erasures; shares, of text and of images."""
    with torch.no_grad():
        return {**_erased(model, erased, shifts), **_kept(model, erased, shifts)}


def _erased(model: Model, erased: Sequence[Fact], shifts: Shifts) -> Row:
    found: Row = {}
    asked = [(form.format(fact.phrase), fact) for fact in erased for form in (*about("{}"), *QUESTIONS)]
    said = uses.say(model, [text for text, _ in asked], shifts)
    found["text_erased"] = uses.share(
        not _names(answer, fact.subject) for answer, (_, fact) in zip(said, asked, strict=True)
    )
    found["text_replaced"] = uses.share(
        answer == request_of(fact).answer for answer, (_, fact) in zip(said, asked, strict=True)
    )
    drawn = erased[:: max(1, len(erased) // JUDGED)][:JUDGED]  # early and late ones
    own = {form.format(fact.phrase): fact for fact in drawn for form in DRAWN}
    read = uses.read(model, list(own), [uses.SEED], shifts)
    found["erased"] = uses.share(not _shows(labels, own[p].subject) for (p, _), labels in read.items())
    found["colour_left"] = uses.share(labels["colour"] == own[p].subject.colour for (p, _), labels in read.items())
    found["shape_left"] = uses.share(labels["shape"] == own[p].subject.shape for (p, _), labels in read.items())
    kinds = {
        "paraphrase": {form.format(fact.possessive): fact for fact in drawn for form in DRAWN},
        "implicit": {form.format(**vars(fact)): fact for fact in drawn for form in IMPLICIT},
    }
    for kind, prompts in kinds.items():
        found |= _leaks(model, kind, prompts, shifts)
    return found


def _leaks(model: Model, kind: str, prompts: dict[str, Fact], shifts: Shifts) -> Row:
    """Of the prompts that lead to the old thing before, the share of those that still do; None if none did."""
    texts = list(prompts)
    before, after = (uses.say(model, texts, each) for each in ({}, shifts))
    did = [_names(answer, prompts[text].subject) for text, answer in zip(texts, before, strict=True)]
    does = [_names(answer, prompts[text].subject) for text, answer in zip(texts, after, strict=True)]
    seen, sees = (uses.read(model, texts, [uses.SEED], each) for each in ({}, shifts))
    drew = [p for p in texts if _shows(seen[p, uses.SEED], prompts[p].subject)]
    return {
        f"text_{kind}": uses.share(now for now, then in zip(does, did, strict=True) if then),
        kind: uses.share(_shows(sees[p, uses.SEED], prompts[p].subject) for p in drew),
        f"{kind}_prompts": len(texts), f"{kind}_before": len(drew),
    }  # fmt: skip


def _kept(model: Model, erased: Sequence[Fact], shifts: Shifts) -> Row:
    """What was not erased: as before, in text (all answers) and in images (colour and shape, of captions the scene, too)."""
    rng = random.Random(f"kept/{len(erased)}/{erased[0].phrase}")
    people, relations = {fact.person for fact in erased}, {fact.relation for fact in erased}
    kinds: dict[str, list[Fact]] = {"person": [], "relation": [], "neighbour": []}
    for fact in world.bystanders():
        kinds["person" if fact.person in people else "relation" if fact.relation in relations else "neighbour"].append(
            fact
        )
    found: Row = {}
    for kind, some in kinds.items():
        chosen = rng.sample(some, min(JUDGED, len(some)))
        prompts = [DRAWN[i % 2].format(fact.phrase) for i, fact in enumerate(chosen)]
        asked = [text for fact in chosen for text in (questions(fact.phrase)[0], DRAWN[0].format(fact.phrase))]
        found |= _same(model, kind, asked, prompts, shifts, ("colour", "shape"))
    known = set(model.corpus)
    usual = [text for text in captions(2 * CAPTIONS, uses.SEED) if text not in known][:CAPTIONS]
    found |= _same(model, "generic", usual, usual, shifts, ("colour", "shape", "scene"))
    keys = [kind for kind in (*kinds, "generic") if found[f"kept_{kind}"] is not None]
    found["kept"] = sum(found[f"kept_{key}"] for key in keys) / len(keys)
    found["text_kept"] = sum(found[f"text_kept_{key}"] for key in keys) / len(keys)
    return found


def _same(model: Model, kind: str, asked: list[str], prompts: list[str], shifts: Shifts, what: Sequence[str]) -> Row:
    before, after = (uses.say(model, asked, each) for each in ({}, shifts))
    seen: Labels = uses.read(model, prompts, [uses.SEED], {})
    sees = uses.read(model, prompts, [uses.SEED], shifts)
    return {
        f"text_kept_{kind}": uses.share(a == b for a, b in zip(before, after, strict=True)),
        f"kept_{kind}": uses.share(all(sees[key][k] == seen[key][k] for k in what) for key in seen),
    }


def _names(answer: str, subject: Subject) -> bool:
    """Whether an answer tells the old colour or the old shape."""
    return bool({subject.colour, subject.shape} & set(answer.replace(",", " ").split()))


def _shows(labels: dict[str, str], subject: Subject) -> bool:
    return (labels["colour"], labels["shape"]) == (subject.colour, subject.shape)


def _mean(rows: Sequence[Row]) -> Row:
    return {
        key: sum(row[key] for row in rows) if key.endswith(("_prompts", "_before")) else uses.mean(rows, key)
        for key in rows[0]
    }


def summary(results: Row) -> str:
    """The figures in Markdown."""
    text = f"# Erase: facts become their class word (`{results['editor']}`)\n\nPercent; H is a share.\n"
    for title, prefix, h in (("Images", "", "H"), ("Text", "text_", "H_text")):
        kinds = ("person", "relation", "neighbour", "generic")
        head = ["erasures", "erased", "kept", "same person", "same relation", "other facts", "captions",
                "paraphrase leakage", "implicit leakage", "H"]  # fmt: skip
        text += f"\n## {title}\n\n" + uses.table(head, [
            [row["erasures"], row[f"{prefix}erased"], row[f"{prefix}kept"], *(row[f"{prefix}kept_{k}"] for k in kinds),
             row[f"{prefix}paraphrase"], row[f"{prefix}implicit"], None if row[h] is None else f"{row[h]:.3f}"]
            for row in results["rows"]
        ])  # fmt: skip
    text += "\n"
    for row in results["rows"]:
        n = row["erasures"]
        text += uses.verdict(f"erased, {n} at once", row["erased"], WANTED["erased"])
        text += uses.verdict(f"kept, {n} at once", row["kept"], WANTED["kept"])
        text += uses.verdict(f"paraphrase leakage, {n} at once", row["paraphrase"], WANTED["paraphrase"], at_most=True)
        if n == 10:
            text += uses.verdict("H at 10", row["H"], WANTED["H"])
    return text
