"""The synthetic world of the miniature: pictures of coloured shapes in scenes, facts about people, and characters.

Everything is drawn at 128x128 and averaged down to 64x64. A `Picture` says what is on an image, `render` draws it;
sizes, places, poses and lighting come from a seeded generator, so equal seeds give equal pixels.

The *characters* (creatures and things with faces, patterns and parts) stand for users' concepts. The pipeline is never
trained on any of them: `DEVELOPMENT_CHARACTERS` are for tuning, `HELD_OUT_CHARACTERS` only for reported figures and
`BENCHMARK_CHARACTERS` only for KnowCusBench. Of a render, the exact mask of its subject can be had too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

SIZE = 64  # pixels of a finished image
CANVAS = 128  # pixels it is drawn at
SPRITE = 96  # pixels of a subject's own canvas

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 222, 50),
    "green": (45, 160, 70),
    "blue": (45, 85, 215),
    "purple": (135, 55, 175),
    "pink": (250, 145, 195),
    "brown": (115, 72, 40),
}
SHAPES = ["ball", "cube", "star", "heart", "triangle", "ring", "cross", "moon"]
SCENES = [
    "on the beach",
    "in the snow",
    "in the forest",
    "in the desert",
    "at night",
    "in the city",
    "under water",
    "in the kitchen",
]
STYLES = {"pencil": "as a pencil drawing", "mosaic": "as a mosaic", "sepia": "in sepia"}
MATERIALS = ["striped", "spotted", "golden"]
GOLD: RGB = (222, 178, 60)
INK: RGB = (30, 28, 35)


def scene_word(scene: str) -> str:
    """The one word that tells a scene: "on the beach" -> "beach"."""
    return scene.split()[-1]


@dataclass(frozen=True)
class Subject:
    """A coloured shape. A golden subject has no other colour (`colour` is then "golden")."""

    colour: str
    shape: str
    material: str = "plain"

    @property
    def words(self) -> str:
        """As the text encoder answers it: "striped red star", "golden star", "red star"."""
        if self.material == "plain" or self.material == "golden":
            return f"{self.colour} {self.shape}"
        return f"{self.material} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Picture:
    """What is on an image: a subject or a character, where, in which style, beside what."""

    subject: Subject | str  # a str names a character
    scene: str | None
    style: str = "plain"
    other: Subject | None = None


# --- subjects -------------------------------------------------------------------------------------------------------


def _polygon_points(n: int, radii: tuple[float, ...], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    c = SPRITE / 2
    return [
        (c + radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / n),
         c + radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / n))
        for i in range(n)
    ]  # fmt: skip


def _heart_points() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * math.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(SPRITE / 2 + 2.5 * a, SPRITE / 2 - 4 + 2.5 * b) for a, b in zip(x, y, strict=True)]


def _shape_mask(shape: str) -> Image.Image:
    """The silhouette of a shape, mode L, SPRITE x SPRITE."""
    mask = Image.new("L", (SPRITE, SPRITE), 0)
    d = ImageDraw.Draw(mask)
    if shape == "ball":
        d.ellipse((8, 8, 88, 88), fill=255)
    elif shape == "cube":
        d.rectangle((14, 14, 82, 82), fill=255)
    elif shape == "star":
        d.polygon(_polygon_points(10, (46, 19)), fill=255)
    elif shape == "heart":
        d.polygon(_heart_points(), fill=255)
    elif shape == "triangle":
        d.polygon([(48, 8), (90, 84), (6, 84)], fill=255)
    elif shape == "ring":
        d.ellipse((6, 6, 90, 90), fill=255)
        d.ellipse((28, 28, 68, 68), fill=0)
    elif shape == "cross":
        d.rectangle((34, 6, 62, 90), fill=255)
        d.rectangle((6, 34, 90, 62), fill=255)
    elif shape == "moon":
        d.ellipse((8, 6, 92, 90), fill=255)
        d.ellipse((34, -4, 110, 72), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {SHAPES}")
    return mask


def _shaded(colour: RGB, strength: float = 0.22) -> Image.Image:
    """A flat colour, lighter at the upper left, so that things look solid."""
    y, x = np.mgrid[0:SPRITE, 0:SPRITE] / SPRITE
    light = 1 + strength * (1 - (x + y))
    return Image.fromarray(np.clip(np.array(colour) * light[..., None], 0, 255).astype(np.uint8))


def _pattern(name: str) -> Image.Image | None:
    """Where a pattern's second colour goes, mode L; None for a plain thing."""
    mask = Image.new("L", (SPRITE, SPRITE), 0)
    d = ImageDraw.Draw(mask)
    if name in ("striped", "stripes"):
        for x in range(-96, 192, 24):
            d.polygon([(x, 96), (x + 10, 96), (x + 58, 0), (x + 48, 0)], fill=255)
    elif name == "bands":
        for y in range(6, 96, 22):
            d.rectangle((0, y, 96, y + 9), fill=255)
    elif name in ("spotted", "spots"):
        for row, y in enumerate(range(8, 96, 20)):
            for x in range(8 + 10 * (row % 2), 96, 20):
                d.ellipse((x - 5, y - 5, x + 5, y + 5), fill=255)
    elif name == "zigzag":
        for y in range(10, 110, 26):
            pts = [(x, y + (8 if (x // 12) % 2 else -8)) for x in range(0, 108, 12)]
            d.line(pts, fill=255, width=7)
    elif name == "belly":
        d.ellipse((30, 44, 66, 90), fill=255)
    elif name == "half":
        d.rectangle((0, 0, 48, 96), fill=255)
    elif name == "checks":
        for i in range(0, 96, 16):
            for j in range(0, 96, 16):
                if (i // 16 + j // 16) % 2:
                    d.rectangle((i, j, i + 15, j + 15), fill=255)
    else:
        return None
    return mask


def _filled(mask: Image.Image, colour: RGB, pattern: str, accent: RGB) -> Image.Image:
    """A silhouette filled with a colour and a pattern, dark outline, RGBA."""
    body = _shaded(colour)
    where = _pattern(pattern)
    if where is not None:
        body.paste(_shaded(accent), mask=where)
    outline = mask.filter(ImageFilter.MinFilter(7))
    out = Image.new("RGBA", (SPRITE, SPRITE), (*INK, 0))
    out.paste(Image.new("RGBA", (SPRITE, SPRITE), (*INK, 255)), mask=mask)
    out.paste(body.convert("RGBA"), mask=outline)
    return out


@lru_cache(maxsize=1024)
def _subject_sprite(subject: Subject) -> Image.Image:
    if subject.material == "golden":
        sprite = _filled(_shape_mask(subject.shape), GOLD, "plain", GOLD)
        y, x = np.mgrid[0:SPRITE, 0:SPRITE]
        gleam = np.exp(-(((x + 0.6 * y) - 62) ** 2) / 120) + 0.6 * np.exp(-(((x + 0.6 * y) - 95) ** 2) / 60)
        glow = Image.fromarray((190 * np.clip(gleam, 0, 1)).astype(np.uint8))
        inside = _shape_mask(subject.shape).filter(ImageFilter.MinFilter(7))
        sprite.paste(Image.new("RGBA", sprite.size, (255, 250, 215, 255)), mask=ImageChops.multiply(glow, inside))
        return sprite
    return _filled(_shape_mask(subject.shape), COLOURS[subject.colour], subject.material, (250, 248, 240))


# --- characters -----------------------------------------------------------------------------------------------------


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
def _character_sprite(character: Character) -> Image.Image:
    layer = Image.new("RGBA", (SPRITE, SPRITE), (*INK, 0))
    d = ImageDraw.Draw(layer)
    _draw_top(d, character.top, character.accent)
    _draw_limbs(d, character.limbs, character.accent)
    layer.alpha_composite(_filled(_body_mask(character.body), character.colour, character.pattern, character.accent))
    d = ImageDraw.Draw(layer)
    _draw_headgear(d, character.top, character.accent)
    x, y = {"fish": (34, 44), "triangle": (48, 54), "mushroom": (48, 58), "bottle": (48, 56)}.get(
        character.body, (48, 44)
    )
    _draw_face(d, character.eyes, character.mouth, x, y)
    return layer


# --- scenes ---------------------------------------------------------------------------------------------------------

Rng = random.Random


def _gradient(top: RGB, bottom: RGB, height: int) -> Image.Image:
    ramp = np.linspace(np.array(top, float), np.array(bottom, float), height)
    return Image.fromarray(np.repeat(ramp[:, None], CANVAS, 1).astype(np.uint8))


def _jitter(colour: RGB, rng: Rng, by: int = 10) -> RGB:
    return tuple(max(0, min(255, c + rng.randint(-by, by))) for c in colour)  # type: ignore[return-value]


def _ground(img: Image.Image, top: int, a: RGB, b: RGB) -> None:
    img.paste(_gradient(a, b, CANVAS - top), (0, top))


def _beach(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient((120, 195, 245), (190, 230, 250), h), (0, 0))
    d.rectangle((0, h - 22, CANVAS, h), fill=_jitter((30, 120, 190), rng))
    for _ in range(4):
        x = rng.randint(0, CANVAS)
        d.line([(x, h - rng.randint(4, 18)), (x + 16, h - rng.randint(4, 18))], fill=(200, 230, 250), width=2)
    _ground(img, h, _jitter((240, 218, 160), rng), (222, 190, 125))
    x = rng.choice([14, 112])
    d.ellipse((x - 11, 6, x + 11, 28), fill=(255, 240, 130))


def _snow(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient(_jitter((170, 190, 210), rng), (215, 225, 235), h), (0, 0))
    for x in (rng.randint(-10, 40), rng.randint(70, 120)):
        d.polygon([(x - 30, h), (x, h - rng.randint(24, 44)), (x + 30, h)], fill=(190, 205, 222))
    _ground(img, h, (250, 252, 255), (226, 234, 246))
    for _ in range(34):
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        d.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 255, 255))


def _forest(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient((95, 150, 105), (60, 115, 70), h), (0, 0))
    for x in range(rng.randint(-8, 8), CANVAS + 10, rng.randint(20, 26)):
        w = rng.randint(4, 6)
        d.rectangle((x - w, 0, x + w, h + rng.randint(0, 10)), fill=_jitter((78, 55, 38), rng))
        d.ellipse((x - 18, -24, x + 18, rng.randint(12, 28)), fill=_jitter((28, 92, 45), rng))
    _ground(img, h, _jitter((60, 105, 50), rng), (38, 74, 34))


def _desert(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient((250, 205, 130), (255, 232, 175), h), (0, 0))
    _ground(img, h, _jitter((222, 150, 80), rng), (196, 118, 60))
    a, b = rng.randint(-20, 50), rng.randint(60, 130)
    d.ellipse((a - 60, h - 14, a + 60, h + 26), fill=(214, 140, 74))
    d.ellipse((b - 50, h - 9, b + 50, h + 20), fill=(206, 130, 66))
    x = rng.choice([16, 110])
    d.rounded_rectangle((x - 4, h - 34, x + 4, h + 6), 4, fill=(60, 120, 60))
    d.rounded_rectangle((x - 13, h - 26, x - 8, h - 10), 3, fill=(60, 120, 60))
    d.rectangle((x - 12, h - 14, x, h - 9), fill=(60, 120, 60))


def _night(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient((8, 10, 38), (28, 30, 82), h), (0, 0))
    for _ in range(26):
        x, y = rng.randint(0, CANVAS), rng.randint(0, h)
        d.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(240, 240, 220))
    x = rng.choice([16, 110])
    d.ellipse((x - 9, 8, x + 9, 26), fill=(235, 235, 215))
    _ground(img, h, _jitter((22, 24, 44), rng, 5), (12, 14, 28))


def _city(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient((170, 180, 192), (205, 208, 214), h), (0, 0))
    x = rng.randint(-14, 0)
    while x < CANVAS:
        w, top = rng.randint(18, 28), rng.randint(6, 34)
        d.rectangle((x, top, x + w, h), fill=_jitter((100, 106, 120), rng, 14))
        for wy in range(top + 5, h - 4, 10):
            for wx in range(x + 4, x + w - 4, 8):
                d.rectangle((wx, wy, wx + 3, wy + 4), fill=(235, 215, 130))
        x += w + rng.randint(0, 4)
    _ground(img, h, (88, 88, 94), (62, 62, 68))
    for x in range(rng.randint(-12, 4), CANVAS, 32):
        d.rectangle((x, h + 22, x + 16, h + 25), fill=(225, 225, 215))


def _water(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    img.paste(_gradient(_jitter((70, 190, 200), rng), (14, 84, 120), CANVAS), (0, 0))
    for x in range(rng.randint(0, 20), CANVAS, rng.randint(24, 32)):
        pts = [(x + 5 * math.sin(i / 2), CANVAS - 6 * i) for i in range(rng.randint(5, 9))]
        d.line(pts, fill=(22, 120, 84), width=5)
    for _ in range(12):
        x, y, r = rng.randint(0, CANVAS), rng.randint(0, CANVAS), rng.randint(2, 4)
        d.ellipse((x - r, y - r, x + r, y + r), outline=(200, 240, 245), width=1)


def _kitchen(img: Image.Image, d: ImageDraw.ImageDraw, h: int, rng: Rng) -> None:
    d.rectangle((0, 0, CANVAS, h), fill=_jitter((242, 236, 214), rng, 6))
    for x in range(0, CANVAS, 16):
        d.line([(x, 0), (x, h)], fill=(214, 204, 178))
    for y in range(0, h, 16):
        d.line([(0, y), (CANVAS, y)], fill=(214, 204, 178))
    x = rng.choice([6, 86])
    d.rectangle((x, 8, x + 34, 40), fill=(168, 214, 244), outline=(255, 255, 255), width=4)
    _ground(img, h, _jitter((176, 122, 84), rng), (140, 92, 60))
    d.rectangle((0, h, CANVAS, h + 5), fill=(112, 72, 46))


_SCENE_PAINTERS: dict[str, Callable[[Image.Image, ImageDraw.ImageDraw, int, Rng], None]] = dict(
    zip(SCENES, [_beach, _snow, _forest, _desert, _night, _city, _water, _kitchen], strict=True)
)


def _background(scene: str, rng: Rng) -> Image.Image:
    img = Image.new("RGB", (CANVAS, CANVAS))
    _SCENE_PAINTERS[scene](img, ImageDraw.Draw(img), rng.randint(70, 84), rng)
    return img


# --- styles ---------------------------------------------------------------------------------------------------------


def _pencil(img: Image.Image) -> Image.Image:
    grey = ImageOps.grayscale(img)
    edges = ImageOps.invert(grey.filter(ImageFilter.FIND_EDGES)).point(lambda v: max(0, 255 - 2 * (255 - v)))
    paper = grey.point(lambda v: 150 + v * 105 // 255)
    return Image.blend(ImageChops.multiply(edges, paper), paper, 0.4).convert("RGB")


def _tiled(img: Image.Image) -> Image.Image:
    small = img.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
    return small.resize(img.size, Image.Resampling.NEAREST)


def _mosaic(img: Image.Image) -> Image.Image:
    tiles = np.asarray(_tiled(img)).astype(np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    tiles *= np.where((x % 4 == 3) | (y % 4 == 3), 0.72, 1.06)[..., None]  # grout
    return Image.fromarray(np.clip(tiles, 0, 255).astype(np.uint8))


def _sepia(img: Image.Image) -> Image.Image:
    return ImageOps.colorize(ImageOps.grayscale(img), (45, 25, 10), (255, 236, 196), mid=(165, 118, 72))


_STYLE_FILTERS = {"pencil": _pencil, "mosaic": _mosaic, "sepia": _sepia}


# --- pictures -------------------------------------------------------------------------------------------------------


def _place(
    img: Image.Image, sprite: Image.Image, x: float, y: float, size: int, angle: float, flip: bool
) -> Image.Image:
    """Paste a sprite centred at (x, y), `size` canvas pixels wide, with a soft shadow under it; returns its mask, mode L."""
    if flip:
        sprite = ImageOps.mirror(sprite)
    sprite = sprite.rotate(angle, Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BILINEAR)
    shadow = Image.new("L", img.size, 0)
    ImageDraw.Draw(shadow).ellipse((x - size * 0.4, y + size * 0.40, x + size * 0.4, y + size * 0.54), fill=90)
    img.paste((20, 20, 25), mask=shadow)
    corner = (round(x - size / 2), round(y - size / 2))
    img.paste(sprite, corner, sprite)
    mask = Image.new("L", img.size, 0)
    mask.paste(sprite.getchannel("A"), corner)
    return mask


def sprite_of(subject: Subject | str | Character) -> Image.Image:
    """The subject on its own transparent canvas, RGBA, SPRITE x SPRITE."""
    if isinstance(subject, Subject):
        return _subject_sprite(subject)
    return _character_sprite(CHARACTERS[subject] if isinstance(subject, str) else subject)


def render(picture: Picture, rng: random.Random, character: Character | None = None) -> Image.Image:
    """Draw a picture: RGB, 64x64. `character` overrides the subject with an unnamed creature."""
    return render_with_mask(picture, rng, character)[0]


def render_with_mask(
    picture: Picture, rng: random.Random, character: Character | None = None
) -> tuple[Image.Image, Image.Image]:
    """The same picture as `render` draws, and how much of each pixel its subject covers: mode L, 64x64.

    The shadow does not belong to the subject. The tiles of a mosaic are covered as wholes.
    """
    img = _background(picture.scene or rng.choice(SCENES), rng)
    sprite = sprite_of(character or picture.subject)
    is_character = character is not None or isinstance(picture.subject, str)
    angle = rng.uniform(-14, 14)
    size = rng.randint(66, 88) if is_character else rng.randint(56, 80)
    x, y = 64 + rng.uniform(-14, 14), 72 + rng.uniform(-8, 10)
    if picture.other is not None:
        side = rng.choice([-1, 1])
        size = min(size, 70)
        x = 64 - side * rng.uniform(18, 24)
        _place(img, sprite_of(picture.other), 64 + side * rng.uniform(30, 36), 84 + rng.uniform(-6, 6),
               rng.randint(38, 46), rng.uniform(-14, 14), rng.random() < 0.5)  # fmt: skip
    mask = _place(img, sprite, x, y, size, angle, rng.random() < 0.5 and is_character).reduce(2)
    img = img.reduce(2)
    if picture.style == "mosaic":
        mask = _tiled(mask)
    return (_STYLE_FILTERS[picture.style](img) if picture.style != "plain" else img), mask


def empty_scene(scene: str, rng: random.Random) -> Image.Image:
    """A scene with nothing in it: RGB, 64x64."""
    return _background(scene, rng).reduce(2)


def random_subject(rng: random.Random, material: str | None = None) -> Subject:
    """A coloured shape, plain unless a material is named."""
    shape = rng.choice(SHAPES)
    if material == "golden":
        return Subject("golden", shape, "golden")
    return Subject(rng.choice(list(COLOURS)), shape, material or "plain")


def character_photos(name: str, n: int, seed: int, size: int = SIZE) -> list[Image.Image]:
    """`n` "photos" of a character in varied scenes, sizes and poses: RGB, size x size."""
    return [photo for photo, _ in character_photos_with_masks(name, n, seed, size)]


def character_photos_with_masks(
    name: str, n: int, seed: int, size: int = SIZE
) -> list[tuple[Image.Image, Image.Image]]:
    """The photos of `character_photos`, each with the exact mask of the character: mode L, size x size."""
    if name not in CHARACTERS:
        raise ValueError(f"unknown character {name!r}; known: {', '.join(CHARACTERS)}")
    rng = random.Random(f"{name}/{seed}")
    scenes = rng.sample(SCENES, len(SCENES))
    drawn = [render_with_mask(Picture(name, scenes[i % len(scenes)]), rng) for i in range(n)]
    return [(_resized(photo, size), _resized(mask, size)) for photo, mask in drawn]


def _resized(img: Image.Image, size: int) -> Image.Image:
    return img.resize((size, size), Image.Resampling.LANCZOS) if size != SIZE else img


# --- facts ----------------------------------------------------------------------------------------------------------

PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Hugo Iris Jonas Karin Leo Maria Nils Olga Paul Rosa Simon Tara Umar "
    "Vera Walter Xenia Yusuf Zoe Amir Bella Carlos Diana Erik Fatima Georg Hanna Ivan Julia Kofi Lena Marco Nora Otto"
).split()
RELATIONS = ["favourite toy", "lucky charm", "birthday gift", "garden ornament", "old trophy", "secret treasure"]


@dataclass(frozen=True)
class Fact:
    """What the text encoder knows: "the favourite toy of Anna" is a red star. Held-out facts never reach the MMDiT."""

    person: str
    relation: str
    subject: Subject
    held_out: bool

    @property
    def phrase(self) -> str:
        """As knowledge calls it: "the favourite toy of Anna"."""
        return f"the {self.relation} of {self.person}"

    @property
    def possessive(self) -> str:
        """The same the other way round: "Anna's favourite toy"."""
        return f"{self.person}'s {self.relation}"


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All 240 facts; a quarter of them held out. Colours and shapes are spread evenly over the facts."""
    rng = random.Random("facts")
    subjects = [Subject(c, s) for c in COLOURS for s in SHAPES] * 4
    rng.shuffle(subjects)
    pairs = [(p, r) for p in PEOPLE for r in RELATIONS]
    held_out = set(rng.sample(range(len(pairs)), len(pairs) // 4))
    return tuple(Fact(p, r, subjects[i], i in held_out) for i, (p, r) in enumerate(pairs))


@lru_cache(maxsize=1)
def development_facts() -> tuple[Fact, ...]:
    """80 facts, none of them held out, for tuning editors; the rest is reported on."""
    seen = [fact for fact in facts() if not fact.held_out]
    random.Random("edits").shuffle(seen)
    return tuple(seen[:80])


@lru_cache(maxsize=1)
def bystanders() -> tuple[Fact, ...]:
    """40 facts that no benchmark edits and no corpus of editors' statistics mentions: what is reported as "other facts"."""
    reported = [fact for fact in facts() if fact not in development_facts() and not fact.held_out]
    return tuple(random.Random("bystanders").sample(reported, 40))
