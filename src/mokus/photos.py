"""Photos of a concept: whatever a camera or an editor writes, as upright RGB squares."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from mokus.errors import MokusError
from mokus.knowledge import LONGEST_TEXT, check_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # what the content may be; Pillow knows others that run external programs
MAX_PIXELS = 170_000_000  # Pillow's own limit is 179 million
MIN_SIDE = 16  # pixels; less shows nothing to learn

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation  # fmt: skip

# What Pillow raises for a file that breaks off or lies about itself.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)
_BOMB = Image.DecompressionBombError


@dataclass(frozen=True)
class Photo:
    """One photo: its file's name, its centre square as RGB (size x size), and the caption beside it, if any."""

    name: str
    image: Image.Image
    caption: str | None


def load_photos(folder: str | Path, size: int, warn: Callable[[str], None] | None = None) -> list[Photo]:
    """The photos of a folder in the order of their names; `name.txt` beside `name.jpg` is its caption.

    Folders inside are not entered, hidden files are passed over, other files are ignored with one line to `warn`.
    Raises `MokusError` if the folder is not there or holds no photo, or for a photo or caption that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MokusError(
            f"{folder} is {'not a folder' if folder.exists() else 'not there'}; expected a folder of photos."
        )
    entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    photos = [path for path in entries if path.suffix.lower() in SUFFIXES]
    stems = {path.stem for path in photos}
    captions = {path.stem: path for path in entries if path.suffix.lower() == ".txt" and path.stem in stems}
    used = {*photos, *captions.values()}
    for path in entries:
        if path not in used and warn is not None:
            warn(f"{path} is ignored: it is no {', '.join(SUFFIXES)} photo and no caption of one.")
    if not photos:
        raise MokusError(f"{folder} holds no photo; expected at least one file that ends in {', '.join(SUFFIXES)}.")
    return [Photo(path.name, _open(path, size), _caption(captions.get(path.stem))) for path in photos]


def photos_of(images: Sequence[Image.Image], size: int) -> list[Photo]:
    """The same of images in memory, without captions; raises `MokusError` if there is none, or for one not usable."""
    if not images:
        raise MokusError("no photos were given; expected at least one image.")
    photos = []
    for number, image in enumerate(images, start=1):
        name = f"photo {number}"
        if not isinstance(image, Image.Image):
            raise MokusError(f"{name} is a {type(image).__name__}, expected a PIL image or a folder of photos.")
        photos.append(Photo(name, _square(image, size, name), None))
    return photos


def _open(path: Path, size: int) -> Image.Image:
    if not path.is_file():  # also keeps from waiting for a pipe that somebody named like a photo
        kind = "a link to nothing" if path.is_symlink() and not path.exists() else "not a file"
        raise MokusError(f"{path} is {kind}, expected a photo; take it away or rename it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at 89 million; ours is MAX_PIXELS
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of broken metadata
            with Image.open(path, formats=FORMATS) as image:
                return _square(image, size, str(path))
    except MokusError:
        raise
    except PermissionError as error:
        raise MokusError(
            f"{path} may not be read ({error.strerror}); change its permissions or take it away."
        ) from error
    except _BOMB as error:
        raise MokusError(f"{path} has too many pixels, expected at most {MAX_PIXELS:,}; make it smaller.") from error
    except _BROKEN as error:
        raise MokusError(
            f"{path} cannot be read as a JPEG, PNG or WebP photo ({error}); replace or remove it."
        ) from error


def _square(image: Image.Image, size: int, name: str) -> Image.Image:
    """The upright centre square, RGB, size x size."""
    width, height = image.size  # known before anything is decoded
    if width * height > MAX_PIXELS:
        raise MokusError(f"{name} is {width} x {height}, expected at most {MAX_PIXELS:,} pixels; make it smaller.")
    side = min(width, height)
    if side < MIN_SIDE:
        raise MokusError(
            f"{name} is {width} x {height}, expected at least {MIN_SIDE} pixels each way; use a larger photo."
        )
    held = upright(image)
    left, top = (held.width - side) // 2, (held.height - side) // 2
    box = (left, top, left + side, top + side)
    return held.resize((size, size), Image.Resampling.LANCZOS, box=box)


def upright(image: Image.Image) -> Image.Image:
    """All of the image as the camera was held, RGB."""
    # the tag alone: Pillow's own transposition writes all of the EXIF anew and fails on what cameras put there
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return _rgb(image if turn is None else image.transpose(turn))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: alpha over white, 16 bits per channel scaled to 8."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _caption(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > 4 * LONGEST_TEXT or not path.is_file():
            raise MokusError(
                f"the caption {path} is too long or no file, expected a line of text; shorten or remove it."
            )
        text = path.read_text(encoding="utf-8-sig").strip()
        if text:
            check_text(text, f"caption {path}", "a toy on a table")
        return text or None
    except (OSError, UnicodeDecodeError) as error:
        raise MokusError(
            f"the caption {path} cannot be read as UTF-8 text ({error}); save it as UTF-8 or remove it."
        ) from error
