"""Where a picture of the world is set, and in which style; everything is drawn at 128x128 and averaged down to 64x64."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random as Rng

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from mokus.miniature.subjects import RGB

SIZE = 64  # pixels of a finished image
CANVAS = 128  # pixels it is drawn at

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


def scene_word(scene: str) -> str:
    """The one word that tells a scene: "on the beach" -> "beach"."""
    return scene.split()[-1]


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


def background(scene: str, rng: Rng) -> Image.Image:
    """An empty scene: RGB, CANVAS x CANVAS."""
    img = Image.new("RGB", (CANVAS, CANVAS))
    _SCENE_PAINTERS[scene](img, ImageDraw.Draw(img), rng.randint(70, 84), rng)
    return img


# --- styles ---------------------------------------------------------------------------------------------------------


def _pencil(img: Image.Image) -> Image.Image:
    grey = ImageOps.grayscale(img)
    edges = ImageOps.invert(grey.filter(ImageFilter.FIND_EDGES)).point(lambda v: max(0, 255 - 2 * (255 - v)))
    paper = grey.point(lambda v: 150 + v * 105 // 255)
    return Image.blend(ImageChops.multiply(edges, paper), paper, 0.4).convert("RGB")


def tiled(img: Image.Image) -> Image.Image:
    """The image in tiles of 4x4 pixels, each of one colour."""
    small = img.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
    return small.resize(img.size, Image.Resampling.NEAREST)


def _mosaic(img: Image.Image) -> Image.Image:
    tiles = np.asarray(tiled(img)).astype(np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    tiles *= np.where((x % 4 == 3) | (y % 4 == 3), 0.72, 1.06)[..., None]  # grout
    return Image.fromarray(np.clip(tiles, 0, 255).astype(np.uint8))


def _sepia(img: Image.Image) -> Image.Image:
    return ImageOps.colorize(ImageOps.grayscale(img), (45, 25, 10), (255, 236, 196), mid=(165, 118, 72))


FILTERS = {"pencil": _pencil, "mosaic": _mosaic, "sepia": _sepia}
