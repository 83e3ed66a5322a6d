"""What a pack does to phrases that nobody bound: those one word off a piece of knowledge, and others about its class word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mokus.checks import ask
from mokus.encoder import distance, tails
from mokus.errors import MokusError
from mokus.knowledge import CHECK_FORMS, QUESTION_FORMS, near_misses, normalise, prompts, same
from mokus.knowledge_update import request
from mokus.low_rank import applied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mokus.packs.concept_pack import ConceptPack
    from mokus.packs.manifest import BoundKnowledge
    from mokus.pipeline import Model

BOUND, NEAR, OTHER = "bound", "one word off", "another"
OTHERS = ("a {}", "the {} by the door", "the {} of my neighbour")  # no edit is made with these


@dataclass(frozen=True)
class Effect:
    """Of one phrase: what its question is answered with, without the pack and with it, and how far its encoding has moved."""

    phrase: str
    kind: str  # BOUND, NEAR or OTHER
    before: str
    after: str
    moved: (
        float  # 0: image prompts are encoded as before, 1: as those with the bound answer; on the mean of CHECK_FORMS
    )


def side_effects(
    model: Model, pack: ConceptPack, knowledge: str, most: int = 6, progress: Callable[[int, int], None] | None = None
) -> list[Effect]:
    """Of a piece of knowledge that is bound, first itself, then at most so many phrases like it, then others.

    `progress(done, total)` counts phrases. Raises `MokusError` for a pack of another model, or knowledge not bound in it.
    """
    pack.check_base(model)
    known = next(iter(pack.bound(normalise(knowledge))), None)
    if known is None:
        raise MokusError(f"{knowledge!r} is not bound in {pack.path}; choose one of those that are.")
    bound = {same(each.text) for each in pack.knowledge}
    near = [phrase for phrase in near_misses(known.text) if same(phrase) not in bound][:most]
    others = [form.format(pack.class_word) for form in OTHERS if same(form.format(pack.class_word)) not in bound]
    wanted = [(known.text, BOUND), *((phrase, NEAR) for phrase in near), *((phrase, OTHER) for phrase in others)]
    found = []
    with model.resident("text_encoder"):
        for effect in _effects(model, pack, known, wanted):
            found.append(effect)
            if progress:
                progress(len(found), len(wanted))
    return found


def _effects(model: Model, pack: ConceptPack, known: BoundKnowledge, wanted: list[tuple[str, str]]) -> Iterator[Effect]:
    shifts = pack.shifts()
    meant = request(known.text, known.answer, known.questions).says
    target = tails(model, prompts(meant, CHECK_FORMS))
    for phrase, kind in wanted:
        images = prompts(phrase, CHECK_FORMS)
        start = tails(model, images)
        with applied(model.pipe.text_encoder, shifts):
            now = tails(model, images)
        moved = 1 - distance(now, target) / distance(start, target).clamp(min=1e-8)
        question = known.questions[0] if kind == BOUND else QUESTION_FORMS[0].format(phrase)
        yield Effect(phrase, kind, ask(model, question), ask(model, question, [shifts]), float(moved.mean()))
