"""The packs of a run: learned once per looks, edited once per recipe, kept under the recipe's key, resumed after a stop.

A pack grows in a folder beside its place and is moved there when it is finished, so one that is there is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mokus.bench.knowcusbench.recipe import Recipe
from mokus.editors import editor
from mokus.errors import MokusError
from mokus.files import copy
from mokus.knowledge_update import bind
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.settings import EditSettings, LearnSettings
from mokus.training.checkpoint import checkpoint_of
from mokus.visual_concept import learn


@dataclass(frozen=True)
class Made:
    """How a pack was made."""

    seconds: float | None  # of this stage alone; null where a stop came in between
    knowledge: int  # pieces that were to be bound
    taken: int  # ... that have taken
    editing: float | None = None  # of the seconds those of the edits themselves; null of looks, and in older folders


@dataclass(frozen=True)
class Shelf:
    """Where the packs of a run are kept, and what they are learned with."""

    model: Model
    folder: Path
    settings: LearnSettings
    progress: Progress | None = None

    def find(self, key: str) -> tuple[ConceptPack, Made] | None:
        """The pack of that key, if it is there. Raises `MokusError` if it is damaged."""
        place = self.folder / key
        if not (place / "made.json").is_file():
            return None
        made = json.loads((place / "made.json").read_text(encoding="utf-8"))
        return ConceptPack.open(place / "pack"), Made(**made)

    def learned(self, key: str, recipe: Recipe, photos: Sequence[Image.Image]) -> ConceptPack:
        """The pack of the recipe's looks, without knowledge."""
        if there := self.find(key):
            return there[0]
        making = self._making(key)
        resume = checkpoint_of(making / "pack").is_file()
        whole = not resume and not (making / "pack").exists()
        began = time.perf_counter()
        learn(
            self.model, list(photos), recipe.looks, making / "pack", class_word=recipe.class_word or None,
            settings=self.settings, resume=resume, overwrite=True, progress=self.progress,
        )  # fmt: skip
        return self._finish(key, Made(time.perf_counter() - began if whole else None, 0, 0))

    def bound(self, key: str, recipe: Recipe, looks: str, shorter: Mapping[int, str]) -> ConceptPack:
        """The pack with the recipe's knowledge, on top of the looks under that key.

        `shorter`: keys of the same recipe with less of its knowledge, by how many pieces; the longest that is there is gone
        on from, which comes to the same, if all of it has taken: what was left out there may stay in here.
        """
        if there := self.find(key):
            return there[0]
        whole = (each for each in sorted(shorter.items(), reverse=True) if self._whole(each[1], recipe))
        n, start = next(whole, (0, looks))
        making = self._making(key)
        if (making / "pack").exists():
            shutil.rmtree(making / "pack")
        copy(self.folder / start / "pack", making / "pack")
        pack = ConceptPack.open(making / "pack")
        self._gather(settings := recipe.edit or EditSettings.for_editor(self.model.defaults))
        began = time.perf_counter()
        edits = bind(
            self.model,
            pack,
            *recipe.knowledge[n:],
            settings=settings,
            keep_all=recipe.keep_all,
            progress=self.progress,
        )
        seconds = time.perf_counter() - began
        taken, editing = sum(edit.taken for edit in edits), sum(edit.seconds for edit in edits)
        if n and (before := self.find(start)):
            earlier = before[1].seconds if before[1].editing is None else before[1].editing
            seconds, taken, editing = seconds + (earlier or 0.0), taken + before[1].taken, editing + (earlier or 0.0)
        return self._finish(key, Made(seconds, len(recipe.knowledge), taken, editing))

    def _gather(self, settings: EditSettings) -> None:
        """The statistics that an editor goes by, once per model, which takes no part in the seconds of one concept."""
        with self.model.resident("text_encoder"):
            editor(settings.editor)(self.model, settings, self.progress)

    def _whole(self, key: str, recipe: Recipe) -> bool:
        found = self.find(key)
        return found is not None and (recipe.keep_all or found[1].taken == found[1].knowledge)

    def _making(self, key: str) -> Path:
        making = self.folder / f"{key}.making"
        making.mkdir(parents=True, exist_ok=True)
        return making

    def _finish(self, key: str, made: Made) -> ConceptPack:
        making = self._making(key)
        (making / "made.json").write_text(json.dumps(vars(made)), encoding="utf-8")
        os.replace(making, self.folder / key)
        found = self.find(key)
        if found is None:
            raise MokusError(f"{self.folder / key} was taken away while it was made; run it again.")
        return found[0]
