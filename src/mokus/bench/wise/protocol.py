"""What the judge is asked, in words of our own, and how its answer is read.

Two protocols. *legacy*: consistency, realism and aesthetic quality, 0 to 2 each, of which `score` makes WiScores. *verified*:
one score, 0 or 1. The judge is to answer with a JSON object; prompt and explanation stand in the question as JSON strings,
each on a line of its own, so that nothing in them can be taken for part of the question's form.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mokus.bench.wise.entries import VERSIONS, Version
from mokus.errors import MokusError

EDITION = 1  # of the words below; a judgement in other words is another judgement
RANGES: dict[Version, dict[str, int]] = {
    "legacy": {"consistency": 2, "realism": 2, "aesthetic": 2}, "verified": {"score": 1},
}  # fmt: skip

_RUBRICS: dict[Version, str] = {
    "legacy": """Give three whole numbers.

consistency: does the picture show what the prompt means?
  0 - the thing that is meant is not there, or another one is in its place
  1 - part of what is meant is right, and part is missing or wrong
  2 - all that the prompt and the explanation call for is there and right
realism: could this be?
  0 - broken or impossible shapes, things that make no sense
  1 - believable, with faults that a careful look finds
  2 - believable in every detail
aesthetic: is it a good picture?
  0 - unpleasant or careless
  1 - ordinary
  2 - composed and coloured with skill

Judge each by itself: a beautiful picture of the wrong thing has consistency 0. When in doubt between two, give the lower.
Answer with one JSON object and nothing else: {"consistency": 0, "realism": 0, "aesthetic": 0}, with your numbers.""",
    "verified": """Give one number, 1 or 0.

1 - the picture shows what the prompt means, as the explanation has it, with its parts in the right relation, and it is clear and
    believable enough to be sure of that
0 - anything else: the thing meant is missing, wrong or beyond recognition, or the picture is too broken to tell

Answer with one JSON object and nothing else: {"score": 0}, with your number.""",
}
_INTRODUCTION = (
    "You check pictures that a program drew from a prompt. The prompt may call a thing by what is known about it instead of by "
    "its name; the explanation says what is meant. Look at the picture first, and believe your eyes rather than the texts."
)
REMINDER = "That was no answer in the form asked for. Answer with the JSON object alone."


def question(prompt: str, explanation: str, protocol: Version) -> str:
    """What the judge reads beside the picture."""
    texts = (
        f"Prompt: {json.dumps(prompt, ensure_ascii=False)}\nExplanation: {json.dumps(explanation, ensure_ascii=False)}"
    )
    return f"{_INTRODUCTION}\n\n{texts}\n\n{_RUBRICS[protocol]}"


def read_question(text: str) -> tuple[str, str, Version]:
    """(prompt, explanation, protocol) of a question: what a judge of our own needs. Raises `ValueError` for another text."""
    found = {name: re.search(rf"^{name}: (\".*\")$", text, re.M) for name in ("Prompt", "Explanation")}
    if not (found["Prompt"] and found["Explanation"]):
        raise ValueError("there are no lines 'Prompt: \"...\"' and 'Explanation: \"...\"' in the message")
    prompt, explanation = (json.loads(each[1]) for each in found.values() if each)
    protocol: Version = (
        "legacy" if '"consistency"' in text[text.rindex("Answer with one JSON object") :] else "verified"
    )
    return prompt, explanation, protocol


def read_answer(text: str, protocol: Version) -> dict[str, int] | None:
    """The scores in an answer, or None if it has none: the last JSON object in it that has them all, whole and in range."""
    found = None
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text[-20_000:])):
        try:
            value, _ = decoder.raw_decode(text[-20_000:], start)
        except (ValueError, RecursionError):
            continue
        if scores := _scores(value, RANGES[protocol]):
            found = scores
    return found


def _scores(value: Any, ranges: dict[str, int]) -> dict[str, int] | None:
    if not isinstance(value, dict):
        return None
    scores = {}
    for name, most in ranges.items():
        number = value.get(name)
        if isinstance(number, str) and re.fullmatch(r"\s*\d\s*", number):
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number not in range(most + 1):
            return None
        scores[name] = int(number)
    return scores


def chosen(names: str, version: Version) -> list[Version]:
    """ "both" -> both protocols, "auto" -> that of the data. Raises `MokusError` for another name."""
    choices: dict[str, list[Version]] = {
        "auto": [version],
        "both": list(VERSIONS),
        **{name: [name] for name in VERSIONS},
    }
    if names not in choices:
        raise MokusError(f"--protocol got {names!r}, expected one of {', '.join(choices)}.")
    return choices[names]
