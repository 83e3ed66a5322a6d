"""Creatures and things with faces, patterns and parts, which stand for users' concepts, and how they are drawn.

The pipeline is never trained on any of `CHARACTERS`: `DEVELOPMENT_CHARACTERS` are for tuning, `HELD_OUT_CHARACTERS` only for
reported figures and `BENCHMARK_CHARACTERS` only for KnowCusBench.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from mokus.miniature.subjects import COLOURS, INK, RGB, SPRITE, filled


@dataclass(frozen=True)
class Character:
    """How a character looks. Bodies, parts and patterns are drawn by the functions below."""

    body: str
    colour: RGB
    accent: RGB
    pattern: str = "plain"
    eyes: int = 2
    top: str = "none"  # ears, horns, antenna, ...
    limbs: str = "none"
    mouth: str = "smile"


_TEAL, _LIME, _CREAM, _GREY = (40, 170, 165), (165, 210, 50), (245, 235, 205), (140, 145, 155)
_RED, _ORANGE, _YELLOW, _GREEN = COLOURS["red"], COLOURS["orange"], COLOURS["yellow"], COLOURS["green"]
_BLUE, _PURPLE, _PINK, _BROWN = COLOURS["blue"], COLOURS["purple"], COLOURS["pink"], COLOURS["brown"]
_WHITE, _BLACK, _NAVY = (248, 248, 248), (40, 40, 48), (30, 40, 100)
# what unnamed creatures are coloured with
PALETTE: dict[str, RGB] = {
    **COLOURS, "teal": _TEAL, "lime": _LIME, "cream": _CREAM, "grey": _GREY, "white": _WHITE, "navy": _NAVY
}  # fmt: skip

CHARACTERS: dict[str, Character] = {
    # development: for tuning
    "bobo": Character("egg", _TEAL, _YELLOW, "belly", 2, "horns", "arms"),
    "tintin": Character("box", _GREY, _RED, "bands", 2, "antenna", "wheels", "grille"),
    "mimi": Character("pear", _PINK, _WHITE, "belly", 2, "long ears", "legs"),
    "gorp": Character("blob", _LIME, _PURPLE, "spots", 3, "antenna", "tentacles", "teeth"),
    "pip": Character("fish", _ORANGE, _WHITE, "bands", 1, "none", "fin"),
    "umbra": Character("ghost", _PURPLE, _YELLOW, "zigzag", 2, "crown", "none", "o"),
    "rolo": Character("mushroom", _RED, _CREAM, "spots", 2, "none", "legs"),
    "kiwi": Character("egg", _BROWN, _LIME, "half", 1, "round ears", "wings", "beak"),
    "dax": Character("triangle", _NAVY, _ORANGE, "bands", 2, "hat", "arms", "teeth"),
    "nono": Character("blob", _WHITE, _BLACK, "half", 2, "round ears", "arms"),
    # held out: only for reported figures
    "zuzu": Character("pear", _YELLOW, _BLACK, "bands", 2, "antenna", "wings"),
    "brick": Character("box", _ORANGE, _NAVY, "checks", 1, "horns", "legs", "teeth"),
    "ollie": Character("blob", _BLUE, _PINK, "belly", 2, "none", "tentacles", "o"),
    "fern": Character("bottle", _GREEN, _YELLOW, "spots", 2, "hat", "arms"),
    "snap": Character("fish", _PINK, _TEAL, "zigzag", 2, "crown", "fin", "teeth"),
    "mort": Character("ghost", _WHITE, _RED, "stripes", 2, "horns", "none", "o"),
    "coco": Character("mushroom", _BROWN, _PINK, "bands", 1, "antenna", "legs"),
    "vito": Character("bottle", _RED, _WHITE, "half", 3, "round ears", "wheels"),
    "luma": Character("triangle", _TEAL, _PINK, "zigzag", 2, "long ears", "legs", "beak"),
    "grum": Character("egg", _GREY, _LIME, "checks", 3, "crown", "arms", "grille"),
    # of KnowCusBench: never tuned on
    "taro": Character("egg", _PURPLE, _CREAM, "bands", 2, "long ears", "arms"),
    "bingo": Character("box", _RED, _YELLOW, "checks", 2, "round ears", "wheels"),
    "plum": Character("pear", _PURPLE, _LIME, "spots", 1, "hat", "legs", "o"),
    "sprig": Character("bottle", _LIME, _BROWN, "stripes", 2, "antenna", "wings", "beak"),
    "wisp": Character("ghost", _TEAL, _WHITE, "belly", 1, "long ears", "tentacles"),
    "rusty": Character("box", _BROWN, _ORANGE, "zigzag", 3, "hat", "legs", "grille"),
    "momo": Character("mushroom", _PINK, _NAVY, "checks", 2, "horns", "arms"),
    "quill": Character("triangle", _YELLOW, _PURPLE, "stripes", 1, "crown", "wings", "beak"),
    "tofu": Character("bottle", _CREAM, _BLUE, "belly", 2, "round ears", "fin", "o"),
    "jinx": Character("blob", _BLACK, _RED, "zigzag", 3, "horns", "legs", "teeth"),
    "nell": Character("fish", _BLUE, _YELLOW, "spots", 2, "hat", "none"),
    "ozzy": Character("pear", _GREEN, _ORANGE, "half", 3, "crown", "wheels", "teeth"),
}
DEVELOPMENT_CHARACTERS = list(CHARACTERS)[:10]
HELD_OUT_CHARACTERS = list(CHARACTERS)[10:20]
BENCHMARK_CHARACTERS = list(CHARACTERS)[20:]

_BODIES = ["egg", "box", "pear", "blob", "fish", "ghost", "mushroom", "triangle", "bottle"]
_PATTERNS = ["plain", "belly", "bands", "spots", "zigzag", "half", "stripes", "checks"]
_TOPS = ["none", "horns", "antenna", "long ears", "round ears", "crown", "hat"]
_LIMBS = ["none", "arms", "legs", "wheels", "tentacles", "wings", "fin"]
_MOUTHS = ["smile", "teeth", "o", "grille", "beak"]


def random_character(rng: random.Random) -> Character:
    """A creature that is none of CHARACTERS (at least three traits differ): the oracle's hard negatives."""
    while True:
        colour, accent = rng.sample(list(PALETTE.values()), 2)
        new = Character(
            rng.choice(_BODIES), colour, accent, rng.choice(_PATTERNS), rng.choice([1, 2, 2, 3]),
            rng.choice(_TOPS), rng.choice(_LIMBS), rng.choice(_MOUTHS),
        )  # fmt: skip
        if all(_differences(new, known) >= 3 for known in CHARACTERS.values()):
            return new


def _differences(a: Character, b: Character) -> int:
    return sum(getattr(a, f) != getattr(b, f) for f in Character.__dataclass_fields__)


def _body_mask(body: str) -> Image.Image:
    mask = Image.new("L", (SPRITE, SPRITE), 0)
    d = ImageDraw.Draw(mask)
    if body == "egg":
        d.ellipse((22, 20, 74, 86), fill=255)
    elif body == "box":
        d.rounded_rectangle((20, 24, 76, 80), 8, fill=255)
    elif body == "pear":
        d.ellipse((30, 20, 66, 60), fill=255)
        d.ellipse((20, 42, 76, 88), fill=255)
    elif body == "blob":
        d.ellipse((14, 30, 82, 82), fill=255)
    elif body == "fish":
        d.ellipse((10, 26, 72, 76), fill=255)
        d.polygon([(64, 51), (92, 28), (92, 74)], fill=255)
    elif body == "ghost":
        d.ellipse((22, 18, 74, 70), fill=255)
        d.polygon([(22, 44), (74, 44), (74, 88), (65, 78), (57, 88), (48, 78), (39, 88), (31, 78), (22, 88)], fill=255)
    elif body == "mushroom":
        d.pieslice((10, 16, 86, 92), 180, 360, fill=255)
        d.rounded_rectangle((32, 50, 64, 86), 8, fill=255)
    elif body == "triangle":
        d.polygon([(48, 16), (86, 84), (10, 84)], fill=255)
    else:  # bottle
        d.rounded_rectangle((26, 42, 70, 88), 10, fill=255)
        d.rounded_rectangle((36, 16, 60, 54), 6, fill=255)
    return mask


def _draw_limbs(d: ImageDraw.ImageDraw, limbs: str, colour: RGB) -> None:
    dark: Any = {"fill": (*INK, 255)}
    fill: Any = {"fill": (*colour, 255), "outline": (*INK, 255), "width": 3}
    if limbs == "arms":
        for x0, x1 in ((26, 4), (70, 92)):
            d.line([(x0, 56), (x1, 40)], width=7, **dark)
            d.ellipse((x1 - 7, 32, x1 + 7, 46), **fill)
    elif limbs == "legs":
        for x in (36, 60):
            d.line([(x, 78), (x, 92)], width=8, **dark)
            d.ellipse((x - 9, 86, x + 9, 95), **fill)
    elif limbs == "wheels":
        for x in (34, 62):
            d.ellipse((x - 12, 72, x + 12, 95), fill=(*INK, 255))
            d.ellipse((x - 5, 79, x + 5, 89), fill=(*colour, 255))
    elif limbs == "tentacles":
        for x in (22, 36, 50, 64, 76):
            d.line([(x, 72), (x - 4, 82), (x + 3, 94)], width=7, fill=(*colour, 255))
    elif limbs == "wings":
        d.polygon([(28, 50), (0, 26), (4, 66)], **fill)
        d.polygon([(68, 50), (95, 26), (92, 66)], **fill)
    elif limbs == "fin":
        d.polygon([(34, 34), (44, 8), (58, 34)], **fill)


def _draw_top(d: ImageDraw.ImageDraw, top: str, colour: RGB) -> None:
    fill: Any = {"fill": (*colour, 255), "outline": (*INK, 255), "width": 3}
    if top == "horns":
        d.polygon([(28, 34), (18, 4), (44, 24)], **fill)
        d.polygon([(68, 34), (78, 4), (52, 24)], **fill)
    elif top == "antenna":
        for x, tip in ((42, 32), (54, 64)):
            d.line([(x, 26), (tip, 8)], width=4, fill=(*INK, 255))
            d.ellipse((tip - 6, 2, tip + 6, 14), **fill)
    elif top == "long ears":
        d.ellipse((26, -2, 42, 40), **fill)
        d.ellipse((54, -2, 70, 40), **fill)
    elif top == "round ears":
        d.ellipse((16, 10, 40, 34), **fill)
        d.ellipse((56, 10, 80, 34), **fill)


def _draw_headgear(d: ImageDraw.ImageDraw, top: str, colour: RGB) -> None:
    fill: Any = {"fill": (*colour, 255), "outline": (*INK, 255), "width": 3}
    if top == "crown":
        d.polygon([(28, 30), (26, 6), (38, 18), (48, 2), (58, 18), (70, 6), (68, 30)], **fill)
    elif top == "hat":
        d.rectangle((34, 2, 62, 22), **fill)
        d.rectangle((22, 20, 74, 28), **fill)


def _draw_face(d: ImageDraw.ImageDraw, eyes: int, mouth: str, x: int, y: int) -> None:
    places = {1: [x], 2: [x - 11, x + 11], 3: [x - 16, x, x + 16]}[eyes]
    r = {1: 11, 2: 8, 3: 7}[eyes]
    for cx in places:
        d.ellipse((cx - r, y - r, cx + r, y + r), fill=(255, 255, 255, 255), outline=(*INK, 255), width=2)
        d.ellipse((cx - r // 2, y - r // 2, cx + r // 2 + 1, y + r // 2 + 1), fill=(*INK, 255))
    m = y + r + 9
    if mouth == "smile":
        d.arc((x - 12, m - 12, x + 12, m + 6), 20, 160, fill=(*INK, 255), width=4)
    elif mouth == "teeth":
        d.rectangle((x - 13, m - 5, x + 13, m + 5), fill=(255, 255, 255, 255), outline=(*INK, 255), width=2)
        for i in range(-8, 13, 7):
            d.line([(x + i, m - 5), (x + i, m + 5)], fill=(*INK, 255), width=2)
    elif mouth == "o":
        d.ellipse((x - 6, m - 6, x + 6, m + 7), fill=(*INK, 255))
    elif mouth == "grille":
        for i in (-5, 0, 5):
            d.line([(x - 12, m + i), (x + 12, m + i)], fill=(*INK, 255), width=2)
    elif mouth == "beak":
        d.polygon([(x - 9, m - 6), (x + 9, m - 6), (x, m + 8)], fill=(245, 150, 30, 255), outline=(*INK, 255))


@lru_cache(maxsize=64)
def sprite_of(character: Character) -> Image.Image:
    """The character on its own transparent canvas, RGBA, SPRITE x SPRITE."""
    layer = Image.new("RGBA", (SPRITE, SPRITE), (*INK, 0))
    d = ImageDraw.Draw(layer)
    _draw_top(d, character.top, character.accent)
    _draw_limbs(d, character.limbs, character.accent)
    layer.alpha_composite(filled(_body_mask(character.body), character.colour, character.pattern, character.accent))
    d = ImageDraw.Draw(layer)
    _draw_headgear(d, character.top, character.accent)
    x, y = {"fish": (34, 44), "triangle": (48, 54), "mushroom": (48, 58), "bottle": (48, 56)}.get(
        character.body, (48, 44)
    )
    _draw_face(d, character.eyes, character.mouth, x, y)
    return layer
