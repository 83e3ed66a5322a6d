"""What the miniature's oracle reads off an image: figures that are exact where the world is known.

oracle_concept  1 if the character is the concept, else 0
oracle_asked    share of what was expected that is read; None where nothing is expected
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from mokus.bench.knowcusbench.metrics import About, Shown, Values
from mokus.bench.knowcusbench.metrics.pretrained import sha256, versions
from mokus.errors import MokusError
from mokus.miniature import oracle


class Oracle:
    """The oracle in the package. Raises `MokusError` if something is expected that it cannot read."""

    name = "oracle"
    columns: tuple[str, ...] = ("oracle_concept", "oracle_asked")

    def __init__(self) -> None:
        weights = Path(str(files("mokus.miniature").joinpath("weights", oracle.FILE)))
        self.about: About = {"id": "miniature", "sha256": sha256([weights]), **versions()}

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        if unknown := {name for each in shown for name in each.expected} - oracle.LABELS.keys():
            raise MokusError(
                f"the oracle reads no {min(unknown)!r} off an image, expected some of {', '.join(oracle.LABELS)}."
            )
        read = oracle.load().read([each.image for each in shown])
        return [
            {"oracle_concept": float(found["character"] == each.concept), "oracle_asked": _share(found, each)}
            for each, found in zip(shown, read, strict=True)
        ]


def _share(found: dict[str, str], each: Shown) -> float | None:
    right = [found[name] == value for name, value in each.expected.items()]
    return sum(right) / len(right) if right else None
