"""Coloured shapes, what the miniature's encoder knows by words, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

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
MATERIALS = ["striped", "spotted", "golden"]
GOLD: RGB = (222, 178, 60)
INK: RGB = (30, 28, 35)


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


# --- drawn ------------------------------------------------------------------------------------------------------------


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


def filled(mask: Image.Image, colour: RGB, pattern: str, accent: RGB) -> Image.Image:
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
def sprite_of(subject: Subject) -> Image.Image:
    """The subject on its own transparent canvas, RGBA, SPRITE x SPRITE."""
    if subject.material == "golden":
        sprite = filled(_shape_mask(subject.shape), GOLD, "plain", GOLD)
        y, x = np.mgrid[0:SPRITE, 0:SPRITE]
        gleam = np.exp(-(((x + 0.6 * y) - 62) ** 2) / 120) + 0.6 * np.exp(-(((x + 0.6 * y) - 95) ** 2) / 60)
        glow = Image.fromarray((190 * np.clip(gleam, 0, 1)).astype(np.uint8))
        inside = _shape_mask(subject.shape).filter(ImageFilter.MinFilter(7))
        sprite.paste(Image.new("RGBA", sprite.size, (255, 250, 215, 255)), mask=ImageChops.multiply(glow, inside))
        return sprite
    return filled(_shape_mask(subject.shape), COLOURS[subject.colour], subject.material, (250, 248, 240))
