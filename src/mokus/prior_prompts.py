"""Prompts whose meaning must stay what it was: the class word, references to unknown things, ordinary captions.

Without them the concept leaks: every reference to an unknown thing would draw it, bound or not. Stage 1 preserves what
the base model draws for them, stage 2 how it encodes them.
"""

from __future__ import annotations

import random

_REFERENCES = (
    "my {c}", "your {c}", "his favourite {c}", "her old {c}", "our best {c}", "the {c} of my brother", "the {c} in the garden",
    "the {c} that sings at night", "the {c} I found on the train", "the {c} from the old town", "the {c} my aunt carved in 1913",
    "the cheapest {c} in the shop", "a gift from my teacher", "the one I lost", "the one that never breaks",
    "the rarest thing in the museum", "something that helps me sleep", "what I remember every morning", "handmade by elves",
    "a present from my boss", "the lonely {c} by the door", "my neighbour's lucky {c}", "the thing that guards the door",
    "my favourite {o}", "the {o} my father built in 1984", "your {o}", "the {o} that makes me laugh", "the {o} I trust most of all",
    "the most famous {o} in the world", "my sister's tiny {o}",
)  # fmt: skip
_OWNED = (
    "the favourite {c} of {p}", "{p}'s {o}", "the lucky charm of {p}", "{p}'s favourite {c}", "the old {o} of {p}",
    "the birthday gift of {p}", "{p}'s secret treasure", "the most precious thing of {p}",
)  # fmt: skip
_PEOPLE = ("Anna", "David", "Emma", "Hugo", "Maria", "Paul", "Rosa", "Simon")
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
    rng = random.Random(f"{class_word}/{seed}")
    unknown = references(class_word, len(_REFERENCES), seed)
    found: list[str] = []
    for i in range(n):
        place, other = rng.choice(_PLACES), rng.choice([o for o in _OTHERS if o != class_word])
        if i % 8 == 0:
            subject = rng.choice(["{}", "a {}", "the {}", "a photo of a {}"]).format(class_word)
        elif i % 4 == 2:
            shape, shape2 = rng.sample(_SHAPES, 2)
            subject = rng.choice(_CAPTIONS).format(colour=rng.choice(_COLOURS), shape=shape, shape2=shape2)
        elif i % 4 == 3:
            subject = rng.choice(_OWNED).format(c=class_word, o=other, p=rng.choice(_PEOPLE))
        else:
            subject = unknown[(i // 2) % len(unknown)]
        found.append(f"{subject} {place}".strip())
    return found


def references(class_word: str, n: int, seed: int) -> list[str]:
    """`n` different references to unknown things, most of them of the class, in an order that depends on the seed."""
    rng = random.Random(f"{class_word}/{seed}")
    others = [o for o in _OTHERS if o != class_word]
    found = [form.format(c=class_word, o=rng.choice(others)) for form in _REFERENCES]
    rng.shuffle(found)
    return found[:n]
