"""The ready example: a pack of a character that the miniature was neither trained nor tuned on, learned and bound as any.

It lies in the package, so that the studio has something to show on a first visit. Other weights need another pack:
`python -m mokus.miniature.example` makes it.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mokus import knowledge_update, pipeline, visual_concept
from mokus.demo import CHARACTER, KNOWLEDGE, PHOTOS
from mokus.errors import MokusError
from mokus.files import copy, write
from mokus.generation import generate
from mokus.miniature import world
from mokus.packs.concept_pack import ConceptPack
from mokus.pictures import png_of
from mokus.pipeline import Model
from mokus.settings import LearnSettings

FOLDER = Path(__file__).parent / "example.pack"
ANCHOR = "sks toy"
PHRASES = [KNOWLEDGE[0].format(c="toy"), KNOWLEDGE[2]]
SHOWN, SEED = f"{PHRASES[0]} in the snow", 1
BEFORE, AFTER = FOLDER.with_name("example_before.png"), FOLDER.with_name("example_after.png")  # what it then draws


def photos(size: int = world.SIZE) -> list[Image.Image]:
    """What it is learned from."""
    return world.character_photos(CHARACTER, PHOTOS, seed=0, size=size)


def make(model: Model, folder: Path = FOLDER) -> ConceptPack:
    """Learn and bind it, and put it in the place of the one that is there. Raises `MokusError` if a phrase does not take."""
    settings = LearnSettings.for_model(model.defaults.learn)
    with tempfile.TemporaryDirectory() as place:
        settings = replace(settings, preview_every=settings.steps)
        pack = visual_concept.learn(model, photos(), ANCHOR, Path(place) / "pack", settings=settings)
        edits = knowledge_update.bind(model, pack, *PHRASES)
        if left := [edit.knowledge for edit in edits if not edit.taken]:
            raise MokusError(f"{left} did not take, so the example stays as it was.")
        shutil.rmtree(folder, ignore_errors=True)
        copy(pack.path, folder)
    return ConceptPack.open(folder)


def draw(model: Model, pack: ConceptPack) -> None:
    """Draw the two pictures of it."""
    for file, packs in ((BEFORE, []), (AFTER, [pack])):
        write(file, png_of(next(generate(model, SHOWN, packs=packs, seeds=[SEED])).image))


if __name__ == "__main__":
    miniature = pipeline.load()
    draw(miniature, make(miniature))
