"""Stage 2, textual knowledge updating: make the anchor the answer to a piece of knowledge (MoKus section 4.2).

`goal` says what is wanted of the text encoder, and an editor (`editors`) finds the shifts of its weights. Here is what
users call: edits are made one on top of the other, checked (`checks`) one by one and all together, and written into the pack.

All uses of it are one call, `update`: the answer to these questions shall be that. With the anchor of photos it is the paper's
main method (`bind`), with a description a concept made of words (`virtual_concept`), with something neutral an erasure
(`erasure`), and with any counterfactual the experiment of its section 3 (`transfer`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mokus import memory
from mokus.checks import check, fault
from mokus.editors import Editor, editor, rewrite
from mokus.encoder import LONGEST_ANSWER
from mokus.errors import MokusError
from mokus.goal import Request
from mokus.knowledge import (
    answer_of,
    check_text,
    normalise,
    phrases_to_keep,
    questions,
    reference,
    same,
    standing_alone,
)
from mokus.low_rank import Shifts, added
from mokus.progress import Progress
from mokus.settings import EditSettings

if TYPE_CHECKING:
    from pathlib import Path

    from mokus.packs.concept_pack import ConceptPack
    from mokus.packs.manifest import BoundKnowledge
    from mokus.pipeline import Model


@dataclass(frozen=True)
class Edit:
    """How the edit of one piece of knowledge went."""

    knowledge: str
    questions: list[str]
    answer: str  # what it means now, as an image prompt says it: "a blue ring"
    read_back: str  # what the edited encoder answers to the first question
    alignment: float  # 0: image prompts are encoded as before, 1: as the anchor's; on forms that were not edited
    taken: bool
    reason: str  # why it has not taken; empty if it has
    settings: dict[str, Any]  # of EditSettings
    steps: int  # that the editor took: of `least_drift` evaluations of its loss
    seconds: float
    shifts: Shifts  # on the CPU
    # phrases to keep, and how far each has moved: 1 is all the way
    kept: dict[str, float] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """What was asked of the editor."""
        return request(self.knowledge, self.answer, self.questions, list(self.kept))

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the shifts."""
        return {key: value for key, value in vars(self).items() if key != "shifts"}


# --- what is asked for ---------------------------------------------------------


def request(
    knowledge: str, meaning: str, asked: Sequence[str] | None = None, keep: Sequence[str] = ()
) -> Request:  # fmt: skip
    """One update of an answer: `knowledge` shall mean `meaning`, an anchor or any words: "a blue ring".

    `asked`: the questions that shall be answered so; by default those of `knowledge.questions`. `keep`: phrases that shall
    mean what they do, see `knowledge.phrases_to_keep`.
    """
    return Request.of(knowledge, answer_of(meaning), asked or questions(knowledge), meaning, keep)


def check_meaning(model: Model, knowledge: str, meaning: str, what: str) -> None:
    """Raise `MokusError` unless these words can be made the answer about this knowledge; `what` they are is for the error."""
    answer, tokenizer = answer_of(meaning), model.tokenizer
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    if len(ids) >= LONGEST_ANSWER:
        raise MokusError(
            f"the {what} {meaning[:60]!r} is {len(ids)} tokens long, expected fewer than {LONGEST_ANSWER}, which is as much "
            "as is read back of an answer; shorten it."
        )
    if str(tokenizer.decode(ids, skip_special_tokens=True)).strip() != answer:
        raise MokusError(
            f"the {what} {meaning[:60]!r} does not come back from the tokenizer; write it in other characters."
        )
    if re.search(standing_alone(re.escape(same(knowledge))), same(meaning)):
        raise MokusError(f"the {what} {meaning[:60]!r} says {knowledge[:60]!r} itself; say it in other words.")


# --- the public functions ---------------------------------------------------------


def bind(
    model: Model,
    pack: ConceptPack,
    *knowledge: str,
    questions: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    settings: EditSettings | None = None,
    keep_all: bool = False,
    progress: Progress | None = None,
) -> list[Edit]:
    """Bind pieces of knowledge to the pack's concept, and write the pack once at the end.

    `questions` replaces the questions made from the (then single) knowledge. `keep`: phrases like it that shall mean what
    they do, now and when more is bound to the pack ("your favourite toy"); knowledge that moves one of them by more than
    `checks.MOST_MOVED` of the way, or is its answer, has not taken. Returns one `Edit` per piece; what has not
    taken, by itself or together with all that is bound, is left out of the pack, unless `keep_all`, which benchmarks need
    for editors that know no such checks. Binding known knowledge anew replaces it.
    Raises `MokusError` for knowledge that cannot be used or a pack of another model.
    """
    wanted = list(dict.fromkeys(reference(text) for text in knowledge))
    if not wanted:
        raise MokusError("no knowledge was given, expected at least one phrase such as 'my favourite toy'.")
    if questions and len(wanted) > 1:
        raise MokusError(
            f"questions go with one piece of knowledge, and {len(wanted)} were given; bind them one at a time."
        )
    if anchors := [text for text in wanted if same(text) == same(pack.anchor)]:
        raise MokusError(
            f"{anchors[0]!r} is the anchor itself, which means the concept already; bind other phrases to it."
        )
    for question in questions or ():
        check_text(question, "question", "Which toy do I love?")
    kept = phrases_to_keep(keep, [*wanted, pack.anchor])
    asked = [request(text, pack.anchor, questions, kept) for text in wanted]
    return update(model, pack, asked, settings, keep_all, progress)


def update(
    model: Model,
    pack: ConceptPack,
    requests: Sequence[Request],
    settings: EditSettings | None = None,
    keep_all: bool = False,
    progress: Progress | None = None,
) -> list[Edit]:
    """Update answers in a pack, and write it once at the end; requests (see `request`) of different knowledge.

    Returns one `Edit` per request, and raises, as `bind` does.
    """
    pack.check_base(model)
    settings = _editing(model, settings)
    pack.reload()
    wanted = {each.knowledge for each in requests}
    for each in requests:
        phrases_to_keep(each.keep, [known.text for known in pack.knowledge], f"it is bound in {pack.path}")
    with model.resident("text_encoder", task="bind"):
        others = [known for known in pack.edits() if known[0].text not in wanted]
        edits = _found(model, requests, others, settings, keep_all, progress)
        with pack.locked():
            pack.reload()  # another process may have bound something since
            edits = edits if keep_all else _hold_together(model, edits, pack.edits(), settings)
            if kept := [each for each in edits if each.taken or keep_all]:
                there = _released(_without(pack.edits(), kept), kept)
                pack.replace_edits([*there, *((_bound(each), each.shifts) for each in kept)])
    return edits


def create_pack(
    model: Model,
    path: Path | str,
    anchor: str,
    requests: Sequence[Request],
    settings: EditSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[ConceptPack | None, list[Edit]]:
    """A pack of words alone, without looks, in which these answers are updated.

    An older pack at `path` is replaced only if `overwrite` says so.

    `anchor`: what knowledge that is bound to it later shall mean. Nothing is written, and the pack is None, if no request
    has taken. Raises `MokusError` if there is something else at `path`, or the editor makes no packs (`rewrite`).
    """
    from mokus.packs.concept_pack import ConceptPack
    from mokus.packs.files import check_free

    check_free(path, overwrite)
    settings = _editing(model, settings)
    with model.resident("text_encoder", task="bind"):
        edits = _hold_together(model, _found(model, requests, [], settings, False, progress), [], settings)
    kept = [(_bound(each), each.shifts) for each in edits if each.taken]
    if not kept:
        return None, edits
    pack = ConceptPack.create(path, model=model, anchor=anchor, lora={}, settings={}, edits=kept, overwrite=overwrite)
    return pack, edits


def _editing(model: Model, settings: EditSettings | None) -> EditSettings:
    settings = settings or EditSettings.for_editor(model.defaults)
    memory.check(model.tier, "bind")
    if settings.editor == "rewrite":
        rewrite.refuse()
    return settings


def _found(
    model: Model, requests: Sequence[Request], others: Sequence[tuple[BoundKnowledge, Shifts]], settings: EditSettings,
    keep_all: bool, progress: Progress | None,
) -> list[Edit]:  # fmt: skip
    """Edits one on top of the other and of what is there already; each checked by itself."""
    edits: list[Edit] = []
    made = editor(settings.editor)(model, settings, progress)
    before = _recalled(made, others)
    for i, each in enumerate(requests):
        if progress:
            progress("binding", i, len(requests), {"knowledge": each.knowledge})
        edits.append(edit(model, each.knowledge, each.says, each.questions, settings, made, before, each.keep))
        if (edits[-1].taken or keep_all) and i + 1 < len(requests):
            made.remember(edits[-1].request, before, edits[-1].shifts)
            before = added(before, edits[-1].shifts)
    if progress:
        progress("binding", len(requests), len(requests), {})
    return edits


def unbind(pack: ConceptPack, *knowledge: str) -> None:
    """Take pieces of knowledge out of a pack: exactly their part, so that the last one bound leaves no trace at all.

    What was bound later was made with them in place, and stays bit for bit as it is; `bind` checks it again.

    Capital letters tell them apart only where both spellings are bound. Raises `MokusError` for one that is not bound; the
    pack is then unchanged.
    """
    wanted = {normalise(text) for text in knowledge}
    with pack.locked():
        pack.reload()
        gone: set[str] = set()
        for text in wanted:
            meant = pack.bound(text)
            if not meant:
                known = ", ".join(repr(bound.text) for bound in pack.knowledge)
                raise MokusError(f"{text!r} is not bound in {pack.path}; bound are: {known or 'none'}.")
            gone |= {bound.text for bound in meant}
        pack.replace_edits([(bound, shifts) for bound, shifts in pack.edits() if bound.text not in gone])


def edit(
    model: Model,
    knowledge: str,
    answer: str,
    asked: Sequence[str] | None = None,
    settings: EditSettings | None = None,
    made: Editor | None = None,
    before: Shifts | None = None,
    keep: Sequence[str] = (),
) -> Edit:
    """The shifts that make `answer` the answer to `knowledge`, on top of those of earlier edits; nothing is changed by it.

    `answer`: an anchor or any words, as in `request`; `asked`: the questions, if not those made of the knowledge; `keep`:
    phrases that shall mean what they do.
    `made`: an editor that knows of the earlier ones, for several edits in a row; it is not told of this one. `before`: the
    sum of their shifts. Raises `MokusError` for an unknown editor, layers or modules that the encoder lacks, or an encoder
    whose states are not finite.
    """
    began = time.perf_counter()
    settings = settings or EditSettings.for_editor(model.defaults)
    wanted = request(knowledge, answer, asked, keep)
    before = {path: shift.to(model.device) for path, shift in (before or {}).items()}  # where the editor's own are
    with model.resident("text_encoder", task="bind"):
        made = made or editor(settings.editor)(model, settings)
        shifts, steps = made.edit(wanted, before)
        found = check(model, wanted, added(before, shifts))
        anyhow = check(model, wanted, before).lost if found.lost and before else {}
    reason = fault(found, answer, settings, anyhow)
    shifts = {path: shift.to("cpu") for path, shift in shifts.items()}
    seconds = time.perf_counter() - began
    return Edit(
        knowledge, list(wanted.questions), answer, found.read_back, found.alignment, not reason, reason,
        asdict(settings), steps, seconds, shifts, found.kept,
    )  # fmt: skip


# --- together ---------------------------------------------------------


def _recalled(made: Editor, known: Sequence[tuple[BoundKnowledge, Shifts]]) -> Shifts:
    """Tell an editor of what a pack holds; returns what that amounts to."""
    before: Shifts = {}
    for bound, shifts in known:
        made.remember(_request_of(bound), before, shifts)
        before = added(before, shifts)
    return before


def _without(
    there: Sequence[tuple[BoundKnowledge, Shifts]], new: Sequence[Edit]
) -> list[tuple[BoundKnowledge, Shifts]]:
    """What a pack holds besides what these edits replace."""
    replaced = {each.knowledge for each in new}
    return [(known, shifts) for known, shifts in there if known.text not in replaced]


def _released(
    there: Sequence[tuple[BoundKnowledge, Shifts]], new: Sequence[Edit]
) -> list[tuple[BoundKnowledge, Shifts]]:
    """What a pack holds, but a phrase that it was to keep and that means something now is kept no longer."""
    bound = {same(each.knowledge) for each in new}
    return [
        (known.model_copy(update={"kept": {p: far for p, far in known.kept.items() if same(p) not in bound}}), shifts)
        for known, shifts in there
    ]


def _hold_together(
    model: Model, edits: list[Edit], there: Sequence[tuple[BoundKnowledge, Shifts]], settings: EditSettings
) -> list[Edit]:
    """Check all knowledge, new and old, once more with all of it applied; while some does not hold, a new one is left out.

    The weakest of those that fail or, if it is only old knowledge that would be lost, of all.
    """
    edits = list(edits)
    while True:
        taken = [i for i, each in enumerate(edits) if each.taken]
        others = _without(there, [edits[i] for i in taken])
        old = added(*(shifts for _, shifts in others))
        everything = added(old, *(edits[i].shifts for i in taken))
        now = {i: check(model, edits[i].request, everything) for i in taken}
        anyhow = {i: check(model, edits[i].request, old).lost if now[i].lost else {} for i in taken}
        faults = {i: fault(now[i], edits[i].answer, settings, anyhow[i]) for i in taken}
        lost = [
            known.text for known, _ in _released(others, [edits[i] for i in taken])
            if _fails(model, known, everything, settings) and not _fails(model, known, old, settings)
        ]  # fmt: skip
        failed = [i for i in taken if faults[i]]
        if not taken or not (failed or lost):
            return edits
        weakest = min(failed or taken, key=lambda i: now[i].alignment)
        reason = f"together with the rest {faults[weakest]}" if failed else f"with it {lost[0]!r} would not hold"
        found = now[weakest]
        edits[weakest] = replace(
            edits[weakest],
            read_back=found.read_back,
            alignment=found.alignment,
            kept=found.kept,
            taken=False,
            reason=reason,
        )


def _fails(model: Model, known: BoundKnowledge, shifts: Shifts, settings: EditSettings) -> bool:
    return bool(fault(check(model, _request_of(known), shifts), known.answer, settings))


def _request_of(known: BoundKnowledge) -> Request:
    return request(known.text, known.answer, known.questions, list(known.kept))


def _bound(edit: Edit) -> BoundKnowledge:
    from mokus.packs.manifest import BoundKnowledge

    return BoundKnowledge(
        text=edit.knowledge, questions=edit.questions, answer=edit.answer, editor=edit.settings["editor"],
        eta=edit.settings["eta"], steps=edit.steps, settings=edit.settings, read_back=edit.read_back,
        alignment=round(min(max(edit.alignment, 0.0), 1.0), 4), kept={p: round(far, 4) for p, far in edit.kept.items()},
    )  # fmt: skip
