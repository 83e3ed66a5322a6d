"""The synthetic world of the miniature: pictures of coloured shapes in scenes, facts about people, and characters.

A `Picture` says what is on an image, `render` draws it; sizes, places, poses and lighting come from a seeded generator, so
equal seeds give equal pixels. Of a render, the exact mask of its subject can be had too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageOps

from mokus.miniature import characters, scenes, subjects
from mokus.miniature.characters import (
    BENCHMARK_CHARACTERS,
    CHARACTERS,
    DEVELOPMENT_CHARACTERS,
    HELD_OUT_CHARACTERS,
    PALETTE,
    Character,
    random_character,
)  # fmt: skip
from mokus.miniature.scenes import CANVAS, SCENES, SIZE, STYLES, scene_word
from mokus.miniature.subjects import COLOURS, GOLD, MATERIALS, SHAPES, Subject

# of it and of what it is made of: all that others go by
__all__ = [
    "BENCHMARK_CHARACTERS", "CANVAS", "CHARACTERS", "COLOURS", "DEVELOPMENT_CHARACTERS", "GOLD", "HELD_OUT_CHARACTERS",
    "MATERIALS", "PALETTE", "PEOPLE", "RELATIONS", "SCENES", "SHAPES", "SIZE", "STYLES", "Character", "Fact", "Picture",
    "Subject", "bystanders", "character_photos", "character_photos_with_masks", "development_facts", "empty_scene",
    "facts", "random_character", "random_subject", "render", "render_with_mask", "scene_word", "sprite_of",
]  # fmt: skip  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """What is on an image: a subject or a character, where, in which style, beside what."""

    subject: Subject | str  # a str names a character
    scene: str | None
    style: str = "plain"
    other: Subject | None = None


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
        return subjects.sprite_of(subject)
    return characters.sprite_of(CHARACTERS[subject] if isinstance(subject, str) else subject)


def render(picture: Picture, rng: random.Random, character: Character | None = None) -> Image.Image:
    """Draw a picture: RGB, 64x64. `character` overrides the subject with an unnamed creature."""
    return render_with_mask(picture, rng, character)[0]


def render_with_mask(
    picture: Picture, rng: random.Random, character: Character | None = None
) -> tuple[Image.Image, Image.Image]:
    """The same picture as `render` draws, and how much of each pixel its subject covers: mode L, 64x64.

    The shadow does not belong to the subject. The tiles of a mosaic are covered as wholes.
    """
    img = scenes.background(picture.scene or rng.choice(SCENES), rng)
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
        mask = scenes.tiled(mask)
    return (scenes.FILTERS[picture.style](img) if picture.style != "plain" else img), mask


def empty_scene(scene: str, rng: random.Random) -> Image.Image:
    """A scene with nothing in it: RGB, 64x64."""
    return scenes.background(scene, rng).reduce(2)


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
