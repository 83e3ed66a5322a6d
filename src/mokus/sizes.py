"""Sizes of images in pixels: the side of a square, or width and height."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mokus.errors import MokusError

Size = int | tuple[int, int]
MAX_SIZE = 8192  # of either side


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Width and height. Raises `MokusError` for what is neither a number nor two."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise MokusError(f"the size is {size!r}, expected a number of pixels, or two: width and height.")
    return size[0], size[1]


def simplest(size: int | Sequence[int]) -> Size:
    """The same, a square as its side, so that equal sizes are equal. Raises as `sides` does."""
    width, height = sides(size)
    return width if width == height else (width, height)


def said(size: int | Sequence[int]) -> str:
    """ "1024", "1664x928"."""
    width, height = sides(size)
    return str(width) if width == height else f"{width}x{height}"


def parsed(text: str) -> Size | None:
    """ "1024" -> 1024, "1664x928" -> (1664, 928); None for anything else."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,8}))?", text)
    return simplest((int(found[1]), int(found[2] or found[1]))) if found else None


def check_size(size: int | Sequence[int], multiple: int) -> None:
    """Raise `MokusError` unless both sides are multiples of so many pixels, and at most `MAX_SIZE`."""
    width, height = sides(size)
    if max(width, height) > MAX_SIZE:
        raise MokusError(f"the size is {said(size)}, expected at most {MAX_SIZE} pixels.")
    if min(width, height) < 1 or width % multiple or height % multiple:
        near = said([max(multiple, round(side / multiple) * multiple) for side in (width, height)])
        raise MokusError(f"the size is {said(size)}, expected a multiple of {multiple} pixels; {near} would do.")
