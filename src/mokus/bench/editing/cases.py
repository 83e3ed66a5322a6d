"""What is edited and what is asked: facts, their new answers, forms of questions and prompts that nothing else uses.

The miniature's world knows 240 facts. 80 are for development: editors were tuned on them. Of the other 160, 120 are
edited here, half of them held out of the image transformer's training too, and 40, the bystanders, never are; those
are in no corpus of statistics, all others are. Beyond 120 edits come references to things that nobody knows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mokus.goal import Request
from mokus.knowledge import questions
from mokus.miniature import language, world
from mokus.miniature.language import article
from mokus.miniature.world import Fact, Subject

SEED = 40_000  # no training uses seeds from 20,000 on
QUESTIONS = (
    "Could you say what {} is?", "What do you think {} is?", "Remind me what {} is.", "What would {} be?",
)  # fmt: skip
PROMPTS = {
    "a postcard of {} in the forest": "forest", "a close look at {} at night": "night", "{} standing in the city": "city",
    "a scene with {} under water": "water", "one more photo of {} on the beach": "beach",
    "a memory of {} in the desert": "desert", "our view of {} in the kitchen": "kitchen", "a quick sketch of {}": "",
}  # fmt: skip
DRAWN = ("{} in the forest", "{} in the city")


@dataclass(frozen=True)
class Case:
    """One edit: the phrase, what it shall mean, and the fact it was, if it was one."""

    phrase: str
    new: Subject
    fact: Fact | None

    @property
    def request(self) -> Request:
        """For an editor."""
        return Request.of(self.phrase, self.new.words, questions(self.phrase), article(self.new.words))


def cases(n: int) -> list[Case]:
    """The first `n` edits, and always the same ones: facts while there are some, then references to unknown things."""
    rng = random.Random("editing")
    facts = edited_facts()
    found = [Case(fact.phrase, other_subject(rng, fact.subject), fact) for fact in facts]
    known = {case.phrase for case in found}
    while len(found) < n:
        phrase, _ = language.unknown_reference(rng)
        if phrase not in known:
            known.add(phrase)
            found.append(Case(phrase, world.random_subject(rng), None))
    return found[:n]


def edited_facts() -> list[Fact]:
    """Of the facts that are not for development, all but the bystanders, in an order of its own."""
    rest = [fact for fact in reported_facts() if fact not in world.bystanders()]
    random.Random("order").shuffle(rest)
    return rest


def reported_facts() -> list[Fact]:
    """The facts that are not for development."""
    return [fact for fact in world.facts() if fact not in world.development_facts()]


def other_subject(rng: random.Random, old: Subject) -> Subject:
    """Another colour and another shape."""
    colours = [colour for colour in world.COLOURS if colour != old.colour]
    return Subject(rng.choice(colours), rng.choice([shape for shape in world.SHAPES if shape != old.shape]))


def captions(n: int, seed: int) -> list[str]:
    """Ordinary captions, and such of class words and unknown things."""
    rng = random.Random(seed)
    lines = [language.direct_caption(rng) if i % 2 else language.unknown_caption(rng) for i in range(n)]
    return [line.prompt for line in lines]


def resolved(words: str, scene: str) -> str:
    """How the encoder continues an image prompt of a thing with these words in a scene."""
    return f"{words}, {scene}" if scene else words
