"""Prompts whose meaning must stay what it was: the class word, references to unknown things, ordinary captions.

Without them the concept leaks: every reference to an unknown thing would draw it, bound or not. Stage 1 preserves what
the base model draws for them, stage 2 how it encodes them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

# Prompts in which a thing keeps what it is and looks another way.
OTHER_LOOKS = (
    "{} as a watercolour", "{} in the street in black and white", "a picture of {} as an oil painting",
    "{}, made of glass", "a wooden version of {}", "a photo of {}, shiny",
)  # fmt: skip

# {c} the class word or another thing, {k} a relative, {a} {b} adjectives, {v} made, {y} a year, {w} where, {d} does, {f} feel
_REFERENCES = (
    "my {c}", "your {c}", "his favourite {c}", "her {a} {c}", "our {a} {c}", "the {c} of my {k}", "the {a} {c} {w}",
    "the {c} that {d}", "the {c} I found {w}", "the {c} my {k} {v} in {y}", "the {c} my {k} {v}", "the {a}est {c} {w}",
    "a gift from my {k}", "the one I lost {w}", "the one that {d}", "the {a}est thing {w}", "something that {d}",
    "what I {f} every morning", "handmade by {k}s", "a present from my {k}", "the {a} {c} by the door", "my {k}'s {a} {c}",
    "the thing that {d}", "my favourite {c}", "the {c} I {f} most of all", "the most {b} {c} in the world", "my {k}'s {c}",
    "the {a} {b} one", "the {c} {v} in {y}", "the one I {f}", "whatever {d}", "the {b} {c} from {y}", "his {k}'s {a} {c}",
)  # fmt: skip
_KIN = "brother teacher aunt boss neighbour father sister cousin uncle mother friend grandfather daughter son".split()
_ADJECTIVES = "old tall cheap small loud soft dark light proud grand quick kind strong sweet calm warm cold".split()
_QUALITIES = (
    "famous lonely lucky tiny beautiful broken strange modern wooden metal useful silly careful brave dusty".split()
)
_MADE = "carved found bought painted built made sewed forged knitted lost sold wrote drew repaired".split()
_WHERE = "in the garden,on the train,in the old town,in the shop,in the museum,at school,in my room,on the shelf,by the sea".split(
    ","
)
_DOES = (
    "sings at night,never breaks,helps me sleep,guards the door,makes me laugh,travels with me,cleans the floor,"
    "tells the time,won the race,came from afar,keeps us warm,reminds me of home,dances all day,brings bad luck"
).split(",")
_OWNED = (
    "the favourite {c} of {p}", "{p}'s {o}", "the lucky charm of {p}", "{p}'s favourite {c}", "the old {o} of {p}",
    "the birthday gift of {p}", "{p}'s secret treasure", "the most precious thing of {p}",
)  # fmt: skip
_PEOPLE = "Anna David Emma Hugo Maria Paul Rosa Simon".split()
_FEEL = "trust remember miss fear admire need love hate collect".split()
_CAPTIONS = (
    "{colour} {shape}",
    "a {colour} {shape}",
    "a photo of a {colour} {shape}",
    "a {colour} {shape} next to a {shape2}",
)
_PLACES = (
    "",
    "",
    "in the snow",
    "on the beach",
    "in the forest",
    "in the city",
    "at night",
    "in the kitchen",
    "in the desert",
    "under water",
)
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown")
_SHAPES = ("ball", "star", "cube", "heart", "ring", "triangle", "cross", "moon")
_OTHERS = ("book", "lamp", "robot", "dog", "vase", "toy", "clock", "house", "shoe", "bird")


def prior_prompts(class_word: str, n: int, seed: int) -> list[str]:
    """`n` prompts, in turn a class word, a reference to something unknown, a caption, and a thing of somebody's.

    Equal for equal seeds.
    """
    return [f"{subject} {place}".strip() for subject, place in _subjects(class_word, n, seed)]


def in_their_places(subject: str, class_word: str, n: int, seed: int) -> list[str]:
    """The subject in the place of each of those prompts."""
    return [f"{subject} {place}".strip() for _, place in _subjects(class_word, n, seed)]


def in_places(subjects: Sequence[str], seed: int) -> list[str]:
    """Each of the subjects in some place, or in none."""
    rng = random.Random(f"places/{seed}")
    return [f"{subject} {rng.choice(_PLACES)}".strip() for subject in subjects]


def _subjects(class_word: str, n: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(f"{class_word}/{seed}")
    unknown = references(class_word, n, seed)
    others = [o for o in _OTHERS if o != class_word]
    found: list[tuple[str, str]] = []
    for i in range(n):
        place = rng.choice(_PLACES)
        if i % 8 == 0:
            subject = rng.choice(["{}", "a {}", "the {}", "a photo of a {}"]).format(class_word)
        elif i % 4 == 2:
            shape, shape2 = rng.sample(_SHAPES, 2)
            subject = rng.choice(_CAPTIONS).format(colour=rng.choice(_COLOURS), shape=shape, shape2=shape2)
        elif i % 4 == 3:
            subject = rng.choice(_OWNED).format(c=class_word, o=rng.choice(others), p=rng.choice(_PEOPLE))
        else:
            subject = unknown[i]
        found.append((subject, place))
    return found


def references(class_word: str, n: int, seed: int) -> list[str]:
    """`n` references to unknown things, most of them of the class; equal for equal seeds."""
    rng = random.Random(f"{class_word}/{seed}")
    others = [o for o in _OTHERS if o != class_word]
    found: list[str] = []
    while len(found) < n:
        forms = list(_REFERENCES)
        rng.shuffle(forms)
        found += [
            form.format(
                c=rng.choice(others) if i % 4 == 0 else class_word, k=rng.choice(_KIN), a=rng.choice(_ADJECTIVES),
                b=rng.choice(_QUALITIES), v=rng.choice(_MADE), y=rng.randint(1850, 2029), w=rng.choice(_WHERE),
                d=rng.choice(_DOES), f=rng.choice(_FEEL),
            )
            for i, form in enumerate(forms)
        ]  # fmt: skip
        found = list(dict.fromkeys(found))
    return found[:n]
