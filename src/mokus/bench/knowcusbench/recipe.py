"""What of a model an image is drawn with: the looks that stage 1 learned, and the edits of stage 2. Plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mokus.settings import EditSettings


@dataclass(frozen=True)
class Recipe:
    """The base model, changed in at most two ways."""

    looks: str = ""  # what stage 1 teaches to be drawn as the photos: an anchor or another phrase; empty: nothing
    class_word: str = ""
    edit: EditSettings | None = None  # how stage 2 makes the knowledge mean the looks' anchor; None: not at all
    knowledge: tuple[str, ...] = ()  # ... in this order
    keep_all: bool = False  # also what has not taken: the baselines' authors check nothing

    @property
    def bare(self) -> Recipe:
        """The same looks without edits."""
        return replace(self, edit=None, knowledge=(), keep_all=False)

    def first(self, n: int) -> Recipe:
        """The same with the first `n` pieces of knowledge."""
        return replace(self, knowledge=self.knowledge[:n])


@dataclass(frozen=True)
class Case:
    """One concept as a method sees it."""

    anchor: str
    class_word: str
    knowledge: tuple[str, ...]
    settings: dict[str, EditSettings] = field(default_factory=dict)  # of the editors, by name, for the model at hand


def digest(*parts: Any) -> str:
    """sha256 of plain data, in hexadecimal; dataclasses are taken as their fields."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()
