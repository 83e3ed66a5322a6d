"""The figures of a row: what each is called, what it means, how it is written, and what is wanted of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from mokus import editors
from mokus.bench.editing.measure import Row
from mokus.bench.editing.run import UNEDITED

BASELINE, RECIPE = UNEDITED, editors.EDITORS[0]
EDITORS = [BASELINE, *editors.EDITORS]
COLOURS = 9  # .s0 to .s8 in the style sheet, with a marker each; .s0 is the baseline's


def share(value: float) -> str:
    """As a percentage."""
    return f"{value:.1%}"


def _drift(value: float) -> str:
    return f"{value:.3f}"


def _yes(value: float) -> str:
    return "yes" if value else "no"


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


@dataclass(frozen=True)
class Figure:
    """A column of the tables: its key in the rows, two lines of heading, and what it means in plain words."""

    key: str
    group: str
    name: str
    meaning: str
    text: Callable[[float], str] = share
    lower: bool = False  # is lower better?


FIGURES = [
    Figure("efficacy", "the edit", "efficacy", "the edited question itself, greedy answer"),
    Figure("generality_questions", "the edit", "other questions", "generality: questions of forms never edited"),
    Figure("generality_prompts", "the edit", "image prompts", "generality: image prompts of forms never edited"),
    Figure("retention", "the edit", "retention", "all earlier edits, asked again after the last one"),
    Figure("locality_facts", "locality", "other facts", "other facts are answered as before"),
    Figure("locality_captions", "locality", "captions", "captions are answered as before"),
    Figure("locality_near_miss", "locality", "near misses", "near-misses of the edited phrase are answered as before"),
    Figure("one_hop", "reach", "one hop", "asked for its colour or shape, the edited phrase has the new answer's"),
    Figure(
        "probe_first",
        "reach",
        "probe, first",
        "a linear probe reads the new answer's colour (first word) off the encoding",
    ),
    Figure(
        "probe_later",
        "reach",
        "probe, later",
        "a linear probe reads the new answer's shape (later word) off the encoding",
    ),
    Figure("image_efficacy", "images", "new answer", "the oracle sees the new answer in the image"),
    Figure("image_near_miss", "images", "near misses", "images of near-misses that the edit did not hijack"),
    Figure("image_unrelated", "images", "unrelated", "images of unrelated prompts that keep what they show"),
    Figure("conditioning_drift", "cost", "drift", "movement of other prompts' encodings", _drift, True),
    Figure("undo", "cost", "undo", "undone, the encoder is restored bit for bit", _yes),
    Figure("seconds_per_edit", "cost", "time per edit", "time that one edit takes", _seconds, True),
    Figure("bytes_per_edit", "cost", "size per edit", "what one edit adds to what is stored", _bytes, True),
]


BY_KEY = {figure.key: figure for figure in FIGURES}


CAPACITY = {
    "efficacy": "Efficacy of the last edits",
    "retention": "Retention of all edits",
    "generality_prompts": "Generality: image prompts",
    "locality_facts": "Locality: other facts",
    "locality_near_miss": "Locality: near misses",
    "image_efficacy": "Images: the new answer is seen",
    "conditioning_drift": "Drift of other encodings (lower is better)",
}


STEP_SIZE = {
    "efficacy": "Efficacy",
    "generality_prompts": "Generality: image prompts",
    "locality_near_miss": "Locality: near misses",
}


WANTED_AFTER = (1, 100)


WANTED = [
    ("efficacy", "efficacy", (0.99, 0.97)),
    ("retention", "retention: all earlier edits", (0.99, 0.97)),
    ("generality_questions", "generality: questions", (0.97, 0.95)),
    ("generality_prompts", "generality: image prompts", (0.97, 0.95)),
    ("locality_facts", "locality: other facts", (0.99, 0.97)),
    ("locality_captions", "locality: captions", (0.99, 0.97)),
    ("locality_near_miss", "locality: near misses", (0.95, 0.90)),
    ("image_relative", "images, relative to direct captions", (0.95, 0.90)),
]


def value_of(row: Row, key: str) -> float | None:
    """A figure of a row; None if it was not measured. "image_relative": efficacy over that of direct captions."""
    if key == "image_relative":
        edited, direct = value_of(row, "image_efficacy"), value_of(row, "image_direct")
        return edited / direct if edited is not None and direct else None
    value = row.get(key)
    return None if value is None or math.isnan(value) else float(value)


def measured_of(rows: Iterable[Row], key: str) -> list[float]:
    """A figure of all rows that have it."""
    return [value for row in rows if (value := value_of(row, key)) is not None]


def name_of(editor: str) -> str:
    """An editor's name (HTML); the default is marked."""
    return escape(editor) + " <small>default</small>" * (editor == RECIPE)


def counts_of(rows: Iterable[Row]) -> list[int]:
    """The numbers of edits after which something was measured."""
    return sorted({int(row["edits"]) for row in rows} - {0}) or [0]
