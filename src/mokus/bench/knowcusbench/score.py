"""Every image of a run, measured: DIR/scores.json.

One row for each image, prompt and concept, whatever methods share it, with `seen`: a hash of all that metrics see. A column
that is there is not computed again unless the metric's `about`, that is a model or a library, is another one now, or the
image itself, the suite's texts or the photos are. What is None was measured, and missed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mokus.bench.knowcusbench.manifest import RENDERED, Concept, Suite
from mokus.bench.knowcusbench.metrics import Metric, Shown
from mokus.bench.knowcusbench.plan import image_file, read_plan
from mokus.bench.knowcusbench.recipe import digest
from mokus.errors import MokusError
from mokus.files import read_json, write_json
from mokus.photos import load_photos
from mokus.progress import Progress

Row = dict[str, Any]

FILE = "scores.json"
REFERENCE_SIZE = 512  # pixels; more than any of the embeddings sees
SAVE_EVERY = 10.0  # seconds of work that a kill may cost, or one batch if that takes longer


def score(
    folder: Path,
    suite: Suite,
    metrics: Sequence[Metric],
    roots: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    batch_size: int = 32,
    save_every: float = SAVE_EVERY,
) -> dict[str, Any]:
    """Measure what the run in the folder has drawn, unless it is measured already. Returns what is in DIR/scores.json:

    {"metrics": {name: about}, "rows": [{"key", "prompt", "class_prompt", "concept", "seen", column: value or None}],
    "missing": [{"method", "concept", "key", "reason"}]}; the missing ones have no rows.

    Metrics that are not given keep what they have measured. `roots`: the folder of each source's photos.
    `progress(metric, done, total, {"concept"})` counts rows. It may be killed at any time and goes on where it was. The
    images of a concept whose photos cannot be read are missing. Raises `MokusError` if the folder holds no run of the
    suite, or the folder of a source of photos was not named.
    """
    scores = _Scores(folder, _plan(folder, suite), suite, roots or {})
    try:
        for metric in metrics:
            scores.forget_another(metric)
            todo = [row for row in scores.rows if not row.scored_by(metric)]
            for first in range(0, len(todo), batch_size):
                batch = todo[first : first + batch_size]
                shown = list(scores.shown(batch))
                for (row, _), values in zip(shown, metric([each for _, each in shown]) if shown else (), strict=True):
                    row.values |= {column: values[column] for column in metric.columns}
                scores.save_after(save_every)
                if progress:
                    progress(metric.name, first + len(batch), len(todo), {"concept": batch[-1].concept.name})
    finally:
        scores.save()
    return scores.data()


@dataclass(frozen=True)
class References:
    """The photos that a concept was learned from, and exact masks of what they show: of renders, else none."""

    images: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of the photos."""
        return hashlib.sha256(b"".join(image.tobytes() for image in self.images)).hexdigest()


def references(
    concept: Concept, roots: Mapping[str, Path], photos: Mapping[str, int], size: int = REFERENCE_SIZE
) -> References:
    """The photos that a concept was learned from, size x size; renders are in their own size.

    `photos`: {"n", "seed"} of renders. Raises `MokusError` if they are not there.
    """
    if concept.source == RENDERED:
        from mokus.miniature import world

        both = world.character_photos_with_masks(concept.name, photos["n"], photos["seed"], world.SIZE)
        return References(tuple(photo for photo, _ in both), tuple(mask for _, mask in both))
    _check_named(concept, roots)
    return References(tuple(photo.image for photo in load_photos(roots[concept.source] / concept.name, size)))


@dataclass
class _Row:
    """One image with what was asked for."""

    item: dict[str, Any]  # one of the plan's
    concept: Concept
    references: References
    seen: str
    values: dict[str, float | None]

    def scored_by(self, metric: Metric) -> bool:
        return all(column in self.values for column in metric.columns)

    def data(self) -> Row:
        item = self.item
        names = ("key", "prompt", "class_prompt", "concept")
        return {**{name: item[name] for name in names}, "seen": self.seen, **self.values}


class _Scores:
    """The rows of a run, those of the file and new ones."""

    def __init__(self, folder: Path, plan: dict[str, Any], suite: Suite, roots: Mapping[str, Path]) -> None:
        self.folder = folder
        before = _before(folder / FILE)
        self.about: dict[str, dict[str, str | None]] = before["metrics"]
        self.missing: list[dict[str, str]] = []
        self.rows: list[_Row] = []
        self._items: dict[str, list[dict[str, Any]]] = {}  # by key: those that share an image
        self._saved = time.monotonic()
        known = {row["seen"]: row for row in before["rows"]}
        photos = _References({concept.name: concept for concept in suite.concepts}, roots, plan["photos"])
        rows: dict[str, _Row] = {}
        for item in plan["items"]:
            file = image_file(folder, item["key"])
            if not file.is_file():
                self._miss(item, "not drawn")
                continue
            if fault := photos.fault(item["concept"]):
                self._miss(item, fault)
                continue
            self._items.setdefault(item["key"], []).append(item)
            concept, shown = photos[item["concept"]]
            asked = [item[name] for name in ("key", "prompt", "class_prompt", "concept", "expected")]
            seen = digest(asked, concept.class_word, shown.sha256, _contents(file))[:16]
            rows[seen] = _Row(item, concept, shown, seen, _values(known.get(seen, {})))
        # rows of one image beside each other, so that it is embedded once
        order = {key: place for place, key in enumerate(self._items)}
        self.rows = sorted(rows.values(), key=lambda row: order[row.item["key"]])

    def forget_another(self, metric: Metric) -> None:
        """Drop the columns if the figures there are were computed by another than this metric; note which it is."""
        if self.about.get(metric.name) != metric.about:
            for row in self.rows:
                for column in metric.columns:
                    row.values.pop(column, None)
        self.about[metric.name] = metric.about

    def shown(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Shown]]:
        """Rows as metrics see them; what cannot be read is taken out and noted. Each file is opened once."""
        images: dict[str, Image.Image | None] = {}
        for row in rows:
            item = row.item
            if item["key"] not in images:
                images[item["key"]] = self._open(item["key"])
            if image := images[item["key"]]:
                yield row, Shown(
                    image, item["prompt"], item["class_prompt"], row.concept.class_word, row.concept.name,
                    row.references.images, item["expected"], row.references.masks,
                )  # fmt: skip

    def save_after(self, seconds: float) -> None:
        """Save if the last time is so long ago."""
        if time.monotonic() - self._saved >= seconds:
            self.save()

    def save(self) -> None:
        write_json(self.folder / FILE, self.data())
        self._saved = time.monotonic()

    def data(self) -> dict[str, Any]:
        return {"metrics": self.about, "rows": [row.data() for row in self.rows], "missing": self.missing}

    def _open(self, key: str) -> Image.Image | None:
        file = image_file(self.folder, key)
        try:
            with Image.open(file, formats=["PNG"]) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a broken PNG
            for item in self._items.pop(key, ()):
                self._miss(item, f"{file} cannot be read ({error}); take it away, and the run draws it again")
            self.rows = [row for row in self.rows if row.item["key"] != key]
            return None

    def _miss(self, item: dict[str, Any], reason: str) -> None:
        self.missing.append({**{name: item[name] for name in ("method", "concept", "key")}, "reason": reason})


def _contents(file: Path) -> str:
    """sha256 of an image; empty if it cannot be read, which is said when it is opened."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


class _References:
    """Concepts with their photos, read once; `fault` comes before the concept itself."""

    def __init__(self, concepts: dict[str, Concept], roots: Mapping[str, Path], photos: Mapping[str, int]) -> None:
        self._concepts, self._roots, self._photos = concepts, roots, photos
        self._known: dict[str, tuple[Concept, References]] = {}
        self._faults: dict[str, str] = {}

    def fault(self, name: str) -> str:
        """What is wrong with the photos of a concept; empty if they are there."""
        concept = self._concepts[name]
        _check_named(concept, self._roots)
        if name not in self._known and name not in self._faults:
            try:
                self._known[name] = concept, references(concept, self._roots, self._photos)
            except MokusError as error:
                self._faults[name] = str(error)
        return self._faults.get(name, "")

    def __getitem__(self, name: str) -> tuple[Concept, References]:
        return self._known[name]


def _check_named(concept: Concept, roots: Mapping[str, Path]) -> None:
    if concept.source != RENDERED and concept.source not in roots:
        raise MokusError(
            f"images of {concept.name} are compared with its photos, and no folder of {concept.source} was named; "
            f"name it by --{concept.source} DIR or --photos {concept.source}=DIR."
        )


def _before(file: Path) -> dict[str, Any]:
    """What was scored already. Raises `MokusError` if the file is not what this module writes."""
    found = read_json(file)
    if found is None:
        return {"metrics": {}, "rows": []}
    rows, metrics = (found.get("rows"), found.get("metrics")) if isinstance(found, dict) else (None, None)
    whole = isinstance(metrics, dict) and isinstance(rows, list)
    if not whole or not all(isinstance(row, dict) and "seen" in row for row in rows or ()):
        raise MokusError(f"{file} is not as a run writes it; take it away, and all is scored again.")
    return dict(found)


def _plan(folder: Path, suite: Suite) -> dict[str, Any]:
    plan = read_plan(folder)
    if plan["suite_sha256"] != digest(suite.model_dump()):
        raise MokusError(
            f"{folder} holds a run of another suite than {suite.name} as it is now; name the one it was drawn from."
        )
    return plan


def _values(row: Row) -> dict[str, float | None]:
    """The columns of a row of the file."""
    return {name: value for name, value in row.items() if value is None or isinstance(value, (int, float))}
