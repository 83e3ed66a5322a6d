"""From an entry of WISE to knowledge: the prompt names a thing (and asks for it as questions), the explanation says which.

By templates, which cut the explanation's first sentence down to what it names, or by the pipeline's own language model, which
is asked in the template that prompts are encoded in. Whatever prompt and explanation have in common at their ends ("in the
snow") is the setting and no knowledge. The result is a file, `knowledge.json`, that a user may correct by hand before images
are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mokus.bench.knowcusbench.recipe import digest
from mokus.bench.wise.entries import Entry
from mokus.checks import ask
from mokus.errors import MokusError
from mokus.files import read_json, write_json
from mokus.knowledge import check_text, questions, reference, tidy
from mokus.knowledge_update import check_meaning

if TYPE_CHECKING:
    from mokus.pipeline import Model

How = Literal["templates", "llm"]
HOWS: tuple[How, ...] = ("templates", "llm")
FILE = "knowledge.json"

_FRAME = re.compile(r"^(an?|the) (photo|picture|image|drawing|illustration|painting) of ", re.I)
_REFERS = (
    r"(?:it|this|that|which|the (?:prompt|phrase|image|picture|answer|model|description))"
    r"(?:'s| (?:here|most likely|usually|typically))*"
)
_SAYS = (
    r"(?: (?:refers?|points?|alludes?|corresponds?) to| (?:is|means|names|describes|depicts|shows|represents|denotes|indicates)"
    r"| (?:should|must|would|will) (?:be|show|depict|display|feature|contain|generate|draw)|(?<='s))"
)
_OPENING = re.compile(rf"^{_REFERS}{_SAYS} (?:(?:an?|the) (?:photo|picture|image|scene|depiction) of )?", re.I)
_ENDS = re.compile(
    r"\s*(?:[,;:(\u2013\u2014]| - | (?:is|are|was|were|which|who|that|because|since|known as|also called|where) ).*$",
    re.S,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_PREPOSITIONS = {"in", "on", "at", "under", "by", "near", "inside", "behind", "beside", "during", "above", "below"}


class Knowledge(BaseModel):
    """What one entry teaches; an empty answer says that none was found, and `reason` why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: int
    of: str  # hash of the prompt and explanation that it was made from, and how
    knowledge: str  # the phrase
    questions: tuple[str, ...]
    answer: str  # as an image prompt says it: "a blue ring"
    reason: str = ""


def made(
    model: Model,
    entries: Iterable[Entry],
    how: How,
    folder: Path,
    progress: Callable[[str, int, int, dict[str, Any]], None] | None = None,
) -> dict[int, Knowledge]:
    """The knowledge of the entries that are to be edited, by prompt_id; what FOLDER/knowledge.json has, is taken from there.

    Raises `MokusError` if that file was made unreadable.
    """
    known = _read(folder / FILE)
    wanted = [entry for entry in entries if not entry.control]
    found: dict[int, Knowledge] = {}
    with model.resident("text_encoder") if how == "llm" else nullcontext():
        for i, entry in enumerate(wanted):
            old = known.get(entry.prompt_id)
            of = digest(entry.prompt, entry.explanation, how, model.fingerprint if how == "llm" else "")[:16]
            found[entry.prompt_id] = old if old and old.of == of else _made(model, entry, how, of)
            if progress:
                progress("knowledge", i + 1, len(wanted), {})
    rows = {**known, **found}
    write_json(folder / FILE, [rows[i].model_dump() for i in sorted(rows)])
    return found


def _read(file: Path) -> dict[int, Knowledge]:
    rows = read_json(file) or []
    try:
        return {row.prompt_id: row for row in map(Knowledge.model_validate, rows)}
    except (ValidationError, TypeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise MokusError(
            f"{file} cannot be used ({what}); correct it, or take it away to have it made again."
        ) from error


def _made(model: Model, entry: Entry, how: How, of: str) -> Knowledge:
    phrase, answer = by_templates(entry.prompt, entry.explanation)
    asked: list[str] = []
    reason = ""
    try:
        if how == "llm":
            question, answer = by_llm(model, entry.prompt, entry.explanation)
            asked = [question] if question else []
        phrase = reference(phrase)
        asked += questions(phrase)[len(asked) :]
        check_answer(model, phrase, answer)
    except MokusError as error:
        reason, answer = str(error), ""
    return Knowledge(
        prompt_id=entry.prompt_id, of=of, knowledge=phrase, questions=tuple(asked), answer=answer, reason=reason
    )


def by_templates(prompt: str, explanation: str) -> tuple[str, str]:
    """(phrase, answer) of a prompt and its explanation; the answer is empty where nothing is left of it.

    "a photo of the toy of Ada in the snow", "This refers to a red star in the snow, ..." -> "the toy of Ada", "a red star".
    """
    first = tidy(_SENTENCE.split(explanation.strip(), maxsplit=1)[0])
    phrase, first = without_setting(_FRAME.sub("", tidy(prompt)), first)
    named = _ENDS.sub("", _OPENING.sub("", first, count=1))
    return phrase, _lower(tidy(named).strip("\"'"))


def without_setting(prompt: str, explanation: str) -> tuple[str, str]:
    """Both without the end that they share, if it begins with a preposition of place or time."""
    a, b = prompt.split(), explanation.split()
    same = 0
    while same < min(len(a), len(b)) - 1 and a[-1 - same].casefold() == b[-1 - same].casefold():
        same += 1
    starts = [n for n in range(same, 0, -1) if a[-n].casefold() in _PREPOSITIONS]
    if not starts:
        return prompt, explanation
    return " ".join(a[: -starts[0]]).rstrip(" ,"), " ".join(b[: -starts[0]]).rstrip(" ,")


def by_llm(model: Model, prompt: str, explanation: str) -> tuple[str, str]:
    """(question, answer) as the pipeline's language model words them; the question is empty if it is none."""
    for text in (prompt, explanation):
        check_text(text, "entry", "Einstein's favourite instrument")
    question = ask(
        model, f"Turn this into one short question that asks which thing is meant, and write nothing else: {prompt}"
    )
    answer = ask(
        model,
        f"A prompt for an image says: {prompt} It means: {explanation} Name what the image shows, in at most six words, "
        "and write nothing else.",
    )
    plain = tidy(question.splitlines()[0]) if question else ""
    return plain if plain.endswith("?") else "", _lower(tidy(answer.splitlines()[0]) if answer else "")


def _lower(text: str) -> str:
    """An article that began a sentence is inside one now."""
    return re.sub(r"^(An?|The)(?= )", lambda found: found[0].lower(), text)


def check_answer(model: Model, phrase: str, answer: str) -> None:
    """Raise `MokusError` for an answer that is none, or that the phrase cannot be made to mean."""
    if not answer.strip():
        raise MokusError("the explanation names no answer; write one into knowledge.json, or try --answers llm.")
    check_text(answer, "answer", "a violin")
    check_meaning(model, phrase, answer, "answer")
