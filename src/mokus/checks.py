"""Whether an edit holds: what is answered now, how near image prompts are to what is meant, and what of all else was to stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mokus.encoder import LONGEST_ANSWER, answers, distance, tails
from mokus.goal import Request
from mokus.knowledge import CHECK_FORMS, answer_of, check_text, prompts, questions
from mokus.low_rank import Shifts, applied

if TYPE_CHECKING:
    from torch import Tensor

    from mokus.pipeline import Model
    from mokus.settings import EditSettings

# A phrase to keep may have come this share of the way to what is meant. Of those for development none below 0.39 drew it.
MOST_MOVED = 0.3


# --- answers ---------------------------------------------------------


def ask(model: Model, question: str, shifts: Sequence[Shifts] = ()) -> str:
    """What the text encoder answers, greedily, to a question inside the prompt template, with shifts or without.

    Raises `MokusError` for a question that is empty, too long or holds the template's own marks.
    """
    check_text(question, "question", "What is my favourite toy?")
    return answers(model, [question], shifts, LONGEST_ANSWER)[0]


def reads_back(said: str, meaning: str) -> bool:
    """Whether what the encoder said is this answer, whatever its capital letters and its full stop."""
    return said.strip().rstrip(".").lower() == answer_of(meaning).lower()


# --- edits ---------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """With shifts: the greedy answer to the first question; the alignment on forms that were not edited; of phrases to keep
    how far they have moved on these, and what is wrong with those that are not kept."""

    read_back: str
    alignment: float
    kept: dict[str, float]
    lost: dict[str, str]


def check(model: Model, request: Request, shifts: Shifts) -> Checked:
    """Look at an edit with these shifts, its own among them."""
    target = tails(model, prompts(request.says, CHECK_FORMS))
    kept = {phrase: alignment(model, phrase, target, shifts) for phrase in request.keep}
    lost = {}
    for phrase, moved in kept.items():
        if not moved <= MOST_MOVED:
            lost[phrase] = f"has moved {moved:.0%} of the way"
        elif _led_there(model, questions(phrase)[0], request.answer, shifts):
            lost[phrase] = "is answered so, too"
    aligned = alignment(model, request.knowledge, target, shifts)
    return Checked(ask(model, request.questions[0], [shifts]), aligned, kept, lost)


def _led_there(model: Model, question: str, answer: str, shifts: Shifts) -> bool:
    """Whether it is with the shifts that this is the answer."""
    before, after = (ask(model, question, given) for given in ([], [shifts]))
    return reads_back(after, answer) and not reads_back(before, answer)


def alignment(model: Model, phrase: str, target: Tensor, shifts: Shifts) -> float:
    """How far shifts move image prompts with the phrase, of `CHECK_FORMS`: 0 not at all, 1 to the target (n, tail, d)."""
    images = prompts(phrase, CHECK_FORMS)
    start = tails(model, images)
    with applied(model.pipe.text_encoder, shifts):
        now = tails(model, images)
    return 1 - float((distance(now, target) / distance(start, target).clamp(min=1e-8)).mean())


def fault(found: Checked, answer: str, settings: EditSettings, anyhow: Collection[str] = ()) -> str:
    """Why an edit is not good enough; empty if it is. `anyhow`: phrases that are lost without it, too."""
    if settings.answer_weight and not reads_back(found.read_back, answer):
        return f"it reads back {found.read_back[:40]!r}"
    if settings.alignment_weight and not found.alignment >= settings.least_alignment:  # also refuses nan
        return f"alignment {found.alignment:.2f} is below {settings.least_alignment:g}"
    for phrase, how in found.lost.items():
        if phrase not in anyhow:
            return f"{phrase!r}, which was to be kept, {how}"
    return ""
