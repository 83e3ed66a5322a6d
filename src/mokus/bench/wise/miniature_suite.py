"""A suite of the miniature's world in WISE's own form, so that the whole run can be tried and tested without WISE or a network.

It asks for what the unedited model cannot draw: facts about people with another answer than the model knows (*People*: most
of them facts that the image transformer never saw in training), references to things that nobody knows (*Objects*), and
references whose answer is itself known by a fact only (*One hop*: "the boat my aunt lent me" is "the lucky charm of Leo",
which the model has to know is a blue ring). *Unrelated* entries are controls: other people's facts, and plain descriptions;
nothing of theirs is edited.

Nothing was tuned on it. `development=True` gives a smaller suite of the same kind for tuning, without a fact or reference in
common. Scenes are those that no edit and no check of an edit is made with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from mokus.bench.wise.entries import Entry, wise_json
from mokus.files import write_json
from mokus.miniature import language, world
from mokus.miniature.language import article
from mokus.miniature.world import Fact, Subject

FILE = "wise_miniature.json"
PEOPLE, OBJECTS, ONE_HOP, UNRELATED = "People", "Objects", "One hop", "Unrelated"
NEVER_DRAWN, DRAWN = "facts never drawn in training", "facts drawn in training"
SCENES = ("on the beach", "in the forest", "in the city", "under water", "in the kitchen")
OPENINGS = ("This refers to {}.", "It is {}.", "The image should show {}.")
FRAMES = ("{}", "{}", "a photo of {}")


def entries(development: bool = False) -> list[Entry]:
    """The suite, always the same."""
    rng = random.Random("wise development" if development else "wise")
    direct, hops, bystanders = _development_facts() if development else _reported_facts()
    found = [
        *_people(rng, direct), *_objects(rng, 16 if development else 50, development),
        *_one_hop(rng, hops, development), *_unrelated(rng, bystanders, 8 if development else 20),
    ]  # fmt: skip
    return [entry.model_copy(update={"prompt_id": i}) for i, entry in enumerate(found, start=1)]


def write(folder: Path, development: bool = False) -> Path:
    """The suite as a JSON file in a folder; returns its path."""
    file = folder / FILE
    write_json(file, list(wise_json(entries(development))))
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")
    return file


def _reported_facts() -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Facts that get another answer, facts that answers hop over, and facts that nothing touches."""
    held_out = [fact for fact in world.facts() if fact.held_out]
    taboo = {*world.development_facts(), *world.bystanders(), *held_out}
    seen = [fact for fact in world.facts() if fact not in taboo]
    rng = random.Random("wise facts")
    rng.shuffle(held_out)
    rng.shuffle(seen)
    return [*held_out[:45], *seen[:25]], held_out[45:], list(world.bystanders())


def _development_facts() -> tuple[list[Fact], list[Fact], list[Fact]]:
    facts = list(world.development_facts())
    return facts[:16], facts[16:24], facts[24:40]


def _people(rng: random.Random, facts: list[Fact]) -> Iterator[Entry]:
    """Another colour and another shape for each."""
    for fact in facts:
        new = Subject(
            rng.choice([colour for colour in world.COLOURS if colour != fact.subject.colour]),
            rng.choice([shape for shape in world.SHAPES if shape != fact.subject.shape]),
        )
        yield _entry(rng, fact.phrase, article(new.words), PEOPLE, NEVER_DRAWN if fact.held_out else DRAWN)


def _objects(rng: random.Random, n: int, development: bool) -> Iterator[Entry]:
    for phrase in _references(n, "objects", development):
        yield _entry(rng, phrase, article(world.random_subject(rng).words), OBJECTS, "references that nobody knows")


def _one_hop(rng: random.Random, facts: list[Fact], development: bool) -> Iterator[Entry]:
    """Two references to each fact; what it says is in the explanation for the judge, behind the answer."""
    phrases = _references(2 * len(facts), "hops", development)
    for i, phrase in enumerate(phrases):
        fact = facts[i % len(facts)]
        kind = NEVER_DRAWN if fact.held_out else DRAWN
        yield _entry(rng, phrase, fact.phrase, ONE_HOP, kind, f", which is {article(fact.subject.words)}")


def _references(n: int, what: str, development: bool) -> list[str]:
    """Different phrases of four words and more, other ones for development."""
    rng = random.Random(f"wise {what} {development}")
    found: dict[str, None] = {}
    others = set(_references(200, what, True)) if not development else set()
    while len(found) < n:
        phrase, _ = language.unknown_reference(rng)
        if len(phrase.split()) >= 4 and phrase not in others:
            found[phrase] = None
    return list(found)


def _unrelated(rng: random.Random, facts: list[Fact], captions: int) -> Iterator[Entry]:
    for fact in facts:
        yield _entry(rng, fact.phrase, article(fact.subject.words), UNRELATED, "other people's facts", control=True)
    for _ in range(captions):
        words = article(world.random_subject(rng).words)
        yield _entry(rng, words, words, UNRELATED, "plain descriptions", control=True)


def _entry(
    rng: random.Random, phrase: str, answer: str, category: str, subcategory: str, more: str = "", control: bool = False
) -> Entry:
    scene = rng.choice(SCENES)
    prompt = f"{rng.choice(FRAMES).format(phrase)} {scene}"
    explanation = rng.choice(OPENINGS).format(f"{answer}{more} {scene}")
    row = {"Prompt": prompt, "Explanation": explanation, "Category": category, "Subcategory": subcategory}
    return Entry.model_validate({"prompt_id": 0, "Control": control, **row})
