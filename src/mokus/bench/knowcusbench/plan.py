"""What is drawn: every image of a run, planned before the first is made, under a name that says all that decides its pixels.

The key of an image is a hash of model, recipe, prompt, seed and settings. So what exists need not be drawn again, whatever
method or run it was drawn for, and nothing is drawn twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mokus.bench.knowcusbench.manifest import RENDERED, Concept, Suite
from mokus.bench.knowcusbench.methods import Method
from mokus.bench.knowcusbench.recipe import Case, Recipe, digest
from mokus.editors import EDITORS
from mokus.errors import MokusError
from mokus.files import read_json
from mokus.generation import check_settings
from mokus.photos import load_photos
from mokus.pipeline import Model
from mokus.settings import EditSettings, LearnSettings

PHOTOS, PHOTO_SEED = 5, 0  # of each of its characters


@dataclass(frozen=True)
class Item:
    """One image of one method."""

    method: str
    key: str  # of the image file
    pack: str  # key of the recipe; empty for the base model
    concept: str
    kind: str  # "reconstruction" or "generation"
    perspective: str  # of the prompt; empty for a reconstruction
    knowledge: int  # its place in the concept's list
    template: str  # the prompt with {} for the knowledge
    prompt: str  # ... with the knowledge
    drawn: str  # ... as the method puts it
    class_prompt: str  # ... with the class word
    seed: int
    expected: dict[str, str]  # what the oracle shall read


@dataclass(frozen=True)
class Plan:
    """All items, in the order they are drawn: concept by concept, recipe by recipe."""

    suite: Suite
    fingerprint: str  # of the model
    items: list[Item]
    recipes: dict[str, Recipe]  # by key
    photos: dict[str, list[Image.Image]]  # by concept; none where they cannot be read
    sha256: dict[str, str]  # of the photos, by concept; the name where they cannot be read
    faults: dict[str, str]  # concepts whose photos cannot be read, and why
    settings: dict[str, Any]  # steps, true_cfg_scale, size, negative_prompt
    learn: LearnSettings

    def key_of(self, concept: str, recipe: Recipe) -> str:
        """What a pack of this recipe is kept under; empty for the base model."""
        if not recipe.looks:
            return ""
        looks = digest(self.fingerprint, self.sha256[concept], recipe.looks, recipe.class_word, self.learn)
        if recipe.edit is None:
            return looks[:32]
        return digest(looks, recipe.edit, recipe.knowledge, recipe.keep_all)[:32]

    def shorter(self, concept: str, recipe: Recipe) -> dict[int, str]:
        """What packs of the same recipe with less of its knowledge are kept under, by how many pieces they have."""
        return {n: self.key_of(concept, recipe.first(n)) for n in range(1, len(recipe.knowledge))}

    def images(self) -> dict[str, Item]:
        """One item for every distinct image, by key."""
        found: dict[str, Item] = {}
        for item in self.items:
            found.setdefault(item.key, item)
        return found


def make_plan(
    model: Model,
    suite: Suite,
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    roots: Mapping[str, Path],
    concepts: Sequence[str] | None = None,
    learn: LearnSettings | None = None,
    **settings: Any,
) -> Plan:
    """Plan every image: each method, concept, knowledge, prompt and seed.

    `roots`: the folder of each source's photos. `concepts`: names of some; None is all. `settings`: `steps` and `size`,
    where they are not the model's. Raises `MokusError` for an unknown concept or a source without a folder.
    """
    chosen = _chosen(suite, concepts)
    default = model.defaults
    drawing = {
        "steps": settings.get("steps") or default.steps, "size": settings.get("size") or default.size,
        "true_cfg_scale": float(default.true_cfg_scale), "negative_prompt": default.negative_prompt,
    }  # fmt: skip
    check_settings(model, drawing)
    learn = learn or LearnSettings.for_model(default.learn)
    photos, faults = _photos(suite, chosen, roots, default.size)
    shown = {
        concept.name: _sha256(photos[concept.name]) if concept.name in photos else concept.name for concept in chosen
    }
    plan = Plan(suite, model.fingerprint, [], {}, photos, shown, faults, drawing, learn)
    edits = {name: EditSettings.for_editor(default, editor=name) for name in EDITORS}
    for concept in chosen:
        texts = tuple(each.text for each in concept.knowledge)
        case = Case(suite.anchor(concept), concept.class_word, texts, edits)
        for name, method in methods.items():
            for i, template, perspective, expected in asked(concept):
                recipe, drawn = method(case, template, texts[i])
                pack = plan.key_of(concept.name, recipe)
                plan.recipes.setdefault(pack, recipe)
                kind = "generation" if perspective else "reconstruction"
                plan.items.extend(
                    Item(
                        name, digest(model.fingerprint, pack, drawn, seed, drawing)[:32], pack, concept.name, kind,
                        perspective, i, template, template.format(texts[i]), drawn,
                        class_prompt(template, concept.class_word), seed, expected,
                    )
                    for seed in seeds
                )  # fmt: skip
    return plan


def asked(concept: Concept) -> list[tuple[int, str, str, dict[str, str]]]:
    """(knowledge, prompt with {}, perspective, expected): each knowledge by itself, and in every prompt of the concept."""
    own = [("{}", "", {}), *((prompt.text, prompt.perspective, prompt.expected) for prompt in concept.prompts)]
    return [(i, *each) for i in range(len(concept.knowledge)) for each in own]


def class_prompt(template: str, word: str) -> str:
    """The prompt with the class word for the knowledge: "a toy on the beach"."""
    plural = re.search("[^su]s$", word)
    article = "" if plural else "an " if word[0].lower() in "aeiou" else "a "
    return template.format(f"{article}{word}")


def image_file(folder: Path, key: str) -> Path:
    """Where the image of that key lies in a run's folder."""
    return folder / "images" / key[:2] / f"{key}.png"


# --- concepts and photos ----------------------------------------------------------------------------------------------


def _chosen(suite: Suite, names: Sequence[str] | None) -> list[Concept]:
    known = {concept.name: concept for concept in suite.concepts}
    for name in names or ():
        if name not in known:
            raise MokusError(f"the suite {suite.name} has no concept {name!r}, expected some of {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names or known)]


def photos_of(concept: Concept, roots: Mapping[str, Path], size: int) -> list[Image.Image]:
    """The photos that a concept is learned from, size x size. Raises `MokusError` if they are not there."""
    if concept.source == RENDERED:
        from mokus.miniature import world

        return world.character_photos(concept.name, PHOTOS, PHOTO_SEED, size)
    return [photo.image for photo in load_photos(roots[concept.source] / concept.name, size)]


def _photos(
    suite: Suite, concepts: Sequence[Concept], roots: Mapping[str, Path], size: int
) -> tuple[dict[str, list[Image.Image]], dict[str, str]]:
    """Photos by concept, and why some have none."""
    for name in dict.fromkeys(concept.source for concept in concepts):
        if name != RENDERED and name not in roots:
            raise MokusError(
                f"the suite {suite.name} needs the photos of {name} ({suite.sources[name].url}); "
                f"name their folder by --photos {name}=DIR, and see 'mokus bench knowcus check'."
            )
    photos: dict[str, list[Image.Image]] = {}
    faults: dict[str, str] = {}
    for concept in concepts:
        try:
            photos[concept.name] = photos_of(concept, roots, size)
        except MokusError as error:
            faults[concept.name] = str(error)
    return photos, faults


def _sha256(images: Sequence[Image.Image]) -> str:
    found = hashlib.sha256()
    for image in images:
        found.update(image.tobytes())
    return found.hexdigest()


def read_plan(folder: Path) -> dict[str, Any]:
    """DIR/plan.json of a run. Raises `MokusError` if there is none, or if it is not what a run writes."""
    plan = read_json(folder / "plan.json")
    if plan is None:
        raise MokusError(f"{folder} holds no run; make one by 'mokus bench knowcus run -o {folder}'.")
    names = ("suite_sha256", "suite_file", "photos", "settings", "seeds", "commands", "methods", "items")
    if not isinstance(plan, dict) or any(name not in plan for name in names) or not isinstance(plan["items"], list):
        raise MokusError(
            f"{folder / 'plan.json'} is not as a run writes it; take it away, and run the benchmark there again."
        )
    return plan
