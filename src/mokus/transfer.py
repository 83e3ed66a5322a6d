"""Does an answer that is edited in text show in images? Section 3 of MoKus (arXiv 2603.12743), for any question.

"What is the favorite instrument of Ludwig van Beethoven?" is answered with a guitar from now on; does "the favorite
instrument of Ludwig van Beethoven" draw one? Three images for every prompt and seed: before the edit, after it, and of the
answer itself in the place of the phrase, which is what a perfect edit would draw. So figures need no judge: an image
counts as transferred if it is nearer to what the answer draws than to what was drawn before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from PIL import Image

from mokus import memory
from mokus.checks import ask, reads_back
from mokus.editors.rewrite import rewritten
from mokus.errors import MokusError
from mokus.files import write, write_json
from mokus.generation import generate
from mokus.knowledge import QUESTION_FORMS, check_text, hidden, normalise, reference
from mokus.knowledge_update import Edit, check_meaning, edit
from mokus.low_rank import Shifts, applied
from mokus.packs.manifest import versions
from mokus.pictures import grid, png_of
from mokus.progress import Progress
from mokus.settings import EditSettings
from mokus.yaml_list import entries

if TYPE_CHECKING:
    from mokus.pipeline import Model

BEFORE, AFTER, ANSWER = "before", "after", "the answer itself"
OTHER_QUESTIONS = ("Could you say what {} is?", "What do you think {} is?")  # asked, never edited
FIELDS = ("ask", "answer", "prompt", "prompts", "knowledge")

_QUESTION = re.compile(r"(?:what|who|which \w+|where) (?:is|are|was|were) (?P<it>.+?) ?\?", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One counterfactual: the question, its new answer, what it is about, and what is drawn."""

    ask: str
    answer: str
    knowledge: str
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, ask: str, answer: str, prompts: Sequence[str] = (), knowledge: str | None = None) -> Case:
        """Checked. `knowledge`: the phrase that is asked about, by default what the question says; and the default prompt.

        Raises `MokusError` for texts that cannot be used, or a question that does not say what it is about.
        """
        check_text(ask, "question", "What is the favourite toy of Anna?")
        ask = " ".join(ask.split())
        about = reference(knowledge if knowledge is not None else _asked_about(ask))
        texts = []
        for prompt in prompts or [about]:
            check_text(prompt, "prompt", "the favourite toy of Anna in the snow")
            if odd := hidden(prompt.strip()):
                raise MokusError(f"the prompt {prompt[:60]!r} holds {odd}; write it as one plain line.")
            texts.append(prompt.strip())
        return cls(ask, normalise(answer, "answer", "a guitar"), about, tuple(dict.fromkeys(texts)))


@dataclass(frozen=True)
class Drawn:
    """The images of one prompt, by column and in the order of the seeds; no third column if it lacks the phrase."""

    prompt: str
    columns: dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    case: Case
    answers: list[dict[str, str]]  # question, before, after; the edited one first
    edit: Edit
    drawn: list[Drawn]
    seeds: list[int]


def _asked_about(question: str) -> str:
    forms = [re.escape(form).replace(r"\{\}", "(?P<it>.+?)") for form in QUESTION_FORMS]
    for pattern in (_QUESTION, *(re.compile(form, re.IGNORECASE) for form in forms)):
        if found := pattern.fullmatch(question):
            return found["it"]
    raise MokusError(
        f"the question {question[:80]!r} does not say what it is about in a way that is understood here, expected one such as "
        "'What is the favourite toy of Anna?'; or, on the command line, name the phrase by --knowledge."
    )


def transfer(
    model: Model,
    case: Case,
    seeds: Sequence[int] = (0, 1, 2, 3),
    settings: EditSettings | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Edit the answer, ask and draw before and after at equal seeds. The model is afterwards as it was.

    Raises `MokusError` for an answer that cannot be one, prompts that cannot be drawn, or a memory tier without edits.
    """
    memory.check(model.tier, "bind")  # before anything is drawn
    check_meaning(model, case.knowledge, case.answer, "answer")
    seeds, asked = list(seeds), [case.ask, *(form.format(case.knowledge) for form in OTHER_QUESTIONS)]
    before = _images(model, case.prompts, seeds, {}, BEFORE, progress)  # first, for it refuses what cannot be drawn
    made = edit(model, case.knowledge, case.answer, [case.ask], settings)
    answers = [
        {"question": question, BEFORE: ask(model, question), AFTER: ask(model, question, [made.shifts])}
        for question in asked
    ]
    after = _images(model, case.prompts, seeds, made.shifts, AFTER, progress)
    instead = {prompt: rewritten(prompt, {case.knowledge: case.answer}) for prompt in case.prompts}
    said = [text for prompt, text in instead.items() if text != prompt]
    wanted = _images(model, said, seeds, {}, ANSWER, progress) if said else {}
    drawn = [
        Drawn(p, {BEFORE: before[p], AFTER: after[p], **({ANSWER: wanted[instead[p]]} if instead[p] in wanted else {})})
        for p in case.prompts
    ]
    return Outcome(case, answers, made, drawn, seeds)


def _images(
    model: Model, prompts: Sequence[str], seeds: list[int], shifts: Shifts, what: str, progress: Progress | None
) -> dict[str, list[Image.Image]]:
    """Every prompt at every seed with the shifts."""

    def watch(_: str, done: int, total: int, info: dict[str, Any]) -> None:
        if progress:
            progress(f"drawing: {what}", done, total, info)

    found: dict[str, list[Image.Image]] = {prompt: [] for prompt in prompts}
    with applied(model.pipe.text_encoder, shifts):
        for each in generate(model, list(found), seeds=seeds, progress=watch):
            found[each.prompt].append(each.image)
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(outcome: Outcome) -> dict[str, Any]:
    """What can be told without a judge, as JSON.

    `transferred`: share of the images that are nearer (root mean square over pixels) to what the answer draws at the same
    seed than to what was drawn before; None if no prompt has the phrase in it. `moved`: mean of 1 - the distance to what the
    answer draws, after over before. `alignment`: the same of the encodings, on prompts that were not edited.
    """
    pairs = [
        (_apart(after, wanted), _apart(after, before), _apart(before, wanted))
        for each in outcome.drawn
        if ANSWER in each.columns
        for before, after, wanted in zip(*(each.columns[name] for name in (BEFORE, AFTER, ANSWER)), strict=True)
    ]
    made, case = outcome.edit, outcome.case
    return {
        "ask": case.ask, "answer": case.answer, "knowledge": case.knowledge, "prompts": list(case.prompts),
        "seeds": outcome.seeds, "answers": outcome.answers, "taken": made.taken, "reason": made.reason,
        "alignment": round(made.alignment, 4), "images": len(pairs),
        "transferred": sum(left < right for left, right, _ in pairs) / len(pairs) if pairs else None,
        "moved": sum(1 - left / max(apart, 1e-6) for left, _, apart in pairs) / len(pairs) if pairs else None,
        "editor": made.settings["editor"], "steps": made.steps, "seconds": round(made.seconds, 2),
    }  # fmt: skip


def _apart(one: Image.Image, other: Image.Image) -> float:
    """Root mean square over pixels and channels, 0 to 255."""
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (one, other))
    return float(np.sqrt(np.mean((a - b) ** 2)))


def run(
    model: Model,
    cases: Sequence[Case],
    output: Path,
    seeds: Sequence[int] = (0, 1, 2, 3),
    settings: EditSettings | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Every case by itself; the figures, and the files they and the picture are in, written when all is done.

    Raises `MokusError` as `transfer` does.
    """
    if output.exists() and not output.is_dir():
        raise MokusError(f"{output} is a file, expected a folder for the results; name another with -o.")
    for case in cases:
        check_meaning(model, case.knowledge, case.answer, "answer")
    outcomes = []
    for i, case in enumerate(cases):
        if progress:
            progress("cases", i, len(cases), {"ask": case.ask})
        outcomes.append(transfer(model, case, seeds, settings, progress))
    if progress:
        progress("cases", len(cases), len(cases), {})
    rows = [figures(outcome) for outcome in outcomes]
    drawn = [row for row in rows if row["images"]]
    images = sum(row["images"] for row in drawn)
    results = {
        "model": model.id, "fingerprint": model.fingerprint, "versions": versions(), "cases": rows,
        "answered": sum(reads_back(row["answers"][0][AFTER], row["answer"]) for row in rows) / len(rows),
        "transferred": sum(row["transferred"] * row["images"] for row in drawn) / images if images else None,
        "images": images,
    }  # fmt: skip
    files = [output / "grid.png", output / "results.json"]
    write(files[0], png_of(picture(outcomes)))
    write_json(files[1], results, indent=1)
    return results, files


def tell(results: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    lines = []
    for row in results["cases"]:
        first = row["answers"][0]
        lines.append(f"{row['ask']} before: {first[BEFORE]!r}, after: {first[AFTER]!r}")
        if not row["taken"]:
            lines.append(f"  has not taken: {row['reason']}")
        if row["images"]:
            lines.append(
                f"  {row['transferred']:.0%} of {row['images']} images are nearer to what {row['answer']!r} draws"
            )
    lines.append(f"answered: {results['answered']:.0%} of {len(results['cases'])}")
    if results["images"]:
        lines[-1] += f"; transferred to images: {results['transferred']:.0%} of {results['images']}"
    return lines


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(outcomes: Sequence[Outcome]) -> Image.Image:
    """The grid of all cases: a row for each prompt."""
    return grid([
        (f"{each.prompt} ({outcome.case.answer})", each.columns) for outcome in outcomes for each in outcome.drawn
    ])  # fmt: skip


# --- a file of cases --------------------------------------------------------------------------------------------------


def read_cases(path: Path) -> list[Case]:
    """Cases from a YAML or JSON list of entries with `ask`, `answer` and, if wanted, `prompt` or `prompts`, `knowledge`.

    Raises `MokusError` with the line and the number of the entry for whatever is wrong with it.
    """
    found = entries(path, "cases", "'- ask: What is ...?' with 'answer: ...' below")
    return [_case(entry, where) for entry, where in found]


def _case(entry: yaml.Node, where: str) -> Case:
    if not isinstance(entry, yaml.MappingNode):
        raise MokusError(f"{where} is no mapping, expected 'ask: ...' and 'answer: ...'.")
    found: dict[str, list[str]] = {}
    for key, value in entry.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if name not in FIELDS:
            raise MokusError(f"{where} has a field {name[:60]!r}, expected {', '.join(FIELDS)}.")
        if name in found:
            raise MokusError(f"{where} has {name!r} twice; remove one.")
        found[name] = _texts(value, f"{where}: {name!r}", several=name == "prompts")
    for name in ("ask", "answer"):
        if name not in found:
            raise MokusError(f"{where} has no {name!r}; add it.")
    if "prompt" in found and "prompts" in found:
        raise MokusError(f"{where} has both 'prompt' and 'prompts'; keep one.")
    prompts = found.get("prompts", found.get("prompt", []))
    try:
        return Case.of(found["ask"][0], found["answer"][0], prompts, *found.get("knowledge", []))
    except MokusError as error:
        raise MokusError(f"{where}: {error}") from error


def _texts(node: yaml.Node, what: str, several: bool) -> list[str]:
    nodes = node.value if several and isinstance(node, yaml.SequenceNode) else [node]
    if not nodes or (several and not isinstance(node, yaml.SequenceNode)):
        raise MokusError(f"{what} is no list of texts; write '[...]' or one '- ...' a line.")
    for each in nodes:
        if not isinstance(each, yaml.ScalarNode) or each.tag != "tag:yaml.org,2002:str":
            raise MokusError(f"{what} is no text; write words, in quotes if need be.")
    return [each.value for each in nodes]
