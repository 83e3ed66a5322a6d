"""The runner: packs are made and images drawn as planned, what is there is skipped, and a stop loses nothing that is finished.

Work is shared out by concepts, so several processes never wait for each other, and one that draws a concept learns it, too.
Images that are drawn together are always the same ones, whatever is there already: a batch of which one is missing is drawn
as a whole, so that its bytes are those of an uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mokus import low_rank
from mokus.bench.knowcusbench.packs import Shelf
from mokus.bench.knowcusbench.plan import PHOTO_SEED, PHOTOS, Item, Plan, image_file, read_plan
from mokus.bench.knowcusbench.recipe import digest
from mokus.bench.state import check_same
from mokus.errors import MokusError
from mokus.files import read_json, write_json
from mokus.generation import Generated, draw, looks_loaded, save_png
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.manifest import versions
from mokus.pipeline import Model, encode
from mokus.progress import Progress, silent

# What may go wrong with one item while the others are fine: input that cannot be used, a pack that is damaged, memory.
FAULTS = (MokusError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Failed:
    """An item that could not be drawn."""

    method: str
    concept: str
    key: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """Which of several processes this is."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class _Batch:
    """Items that are drawn together, their prompts' encodings (s, d), and that of the negative prompt, if it is used."""

    items: list[Item]
    encodings: list[Tensor]
    negative: Tensor | None


class Runner:
    """Draws what is planned into a folder."""

    def __init__(
        self, model: Model, plan: Plan, folder: Path, batch_size: int = 32, progress: Progress | None = None
    ) -> None:
        self.model, self.plan, self.folder, self.batch_size = model, plan, folder, batch_size
        self.progress: Progress = progress or silent
        self.shelf = Shelf(model, folder / "packs", plan.learn, self.progress)
        self.failed: list[Failed] = []
        self.done = self.total = 0

    def run(self, shard: Shard = Shard(), told: Callable[[str], None] = lambda line: None) -> list[Failed]:
        """Draw the shard's concepts; returns what failed. `told` gets a line for every concept."""
        by_concept: dict[str, list[Item]] = {}
        for item in self.plan.images().values():
            by_concept.setdefault(item.concept, []).append(item)
        mine = list(by_concept.items())[shard.index :: shard.count]
        self.total = sum(len(items) for _, items in mine)
        began, here = time.perf_counter(), 0
        for i, (name, items) in enumerate(mine, start=1):
            missing = sum(not image_file(self.folder, item.key).is_file() for item in items)
            self._concept(items)
            here += missing > 0
            left = (time.perf_counter() - began) / max(1, here) * (len(mine) - i)
            told(
                f"{name} ({i}/{len(mine)}): {missing} images drawn, {len(items) - missing} were there; about {left:.0f} s left"
            )
        return self.failed

    def _concept(self, items: Sequence[Item]) -> None:
        """All images of one concept, looks by looks, so that no LoRA is loaded twice."""
        by_looks: dict[str, dict[str, list[Item]]] = {}
        for item in items:
            recipe = self.plan.recipes[item.pack]
            by_looks.setdefault(recipe.looks, {}).setdefault(item.pack, []).append(item)
        for of_pack in by_looks.values():
            batches, pack = self._encoded(of_pack)
            self._draw(batches, pack)

    def _encoded(self, of_pack: dict[str, list[Item]]) -> tuple[list[_Batch], ConceptPack | None]:
        """The batches that are not all there yet, with their prompts' encodings, and the pack with their looks."""
        found: list[_Batch] = []
        looks: ConceptPack | None = None
        for key, items in of_pack.items():
            several = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
            wanted = [batch for batch in several if not all(image_file(self.folder, i.key).is_file() for i in batch)]
            self._count(len(items) - sum(map(len, wanted)), items[0].concept)
            if not wanted:
                continue
            try:
                looks = self._pack(key, items[0].concept) or looks
                shifts = looks.shifts() if looks else {}
                with self.model.resident("text_encoder"), low_rank.applied(self.model.pipe.text_encoder, shifts):
                    found += [self._batch(items) for items in wanted]
            except FAULTS as error:
                self._give_up([item for batch in wanted for item in batch], error)
        return found, looks

    def _batch(self, items: list[Item]) -> _Batch:
        """The items with their encodings, and that of the negative prompt, which edits may move as any other."""
        negative = [self.plan.settings["negative_prompt"]] if self.plan.settings["true_cfg_scale"] > 1 else []
        encodings = encode(self.model, [*(item.drawn for item in items), *negative])
        return _Batch(items, encodings[: len(items)], encodings[-1] if negative else None)

    def _pack(self, key: str, concept: str) -> ConceptPack | None:
        """The pack of a recipe, made now if it is not there; None for the base model."""
        recipe = self.plan.recipes[key]
        if not recipe.looks:
            return None
        if concept in self.plan.faults:
            raise MokusError(self.plan.faults[concept])
        looks = self.plan.key_of(concept, recipe.bare)
        pack = self.shelf.learned(looks, recipe.bare, self.plan.photos[concept])
        if recipe.edit is None:
            return pack
        return self.shelf.bound(key, recipe, looks, self.plan.shorter(concept, recipe))

    def _draw(self, batches: Sequence[_Batch], pack: ConceptPack | None) -> None:
        """Draw and write batches of one looks."""
        if not batches:
            return
        with self.model.resident("transformer", "vae"), looks_loaded(self.model, [pack] if pack else []):
            for batch in batches:
                failed = False
                try:
                    self._draw_batch(batch)
                except FAULTS:
                    failed = True
                if failed:  # only after the except block: in it, all that the failed call held in memory is still held
                    self._draw_each(batch)

    def _draw_each(self, batch: _Batch) -> None:
        """Draw a batch's items alone, which shows which of them fails."""
        for item, encoding in zip(batch.items, batch.encodings, strict=True):
            try:
                self._draw_batch(_Batch([item], [encoding], batch.negative))
            except FAULTS as error:
                self._give_up([item], error)

    def _draw_batch(self, batch: _Batch) -> None:
        jobs = [(encoding, item.seed) for item, encoding in zip(batch.items, batch.encodings, strict=True)]
        images = draw(self.model, jobs, batch.negative, self.plan.settings)
        about = {**self.plan.settings, "model": self.model.id, "fingerprint": self.model.fingerprint}
        for item, image in zip(batch.items, images, strict=True):
            file = image_file(self.folder, item.key)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                save_png(Generated(image, item.drawn, item.seed, {**about, "pack": item.pack}), file)
            self._count(1, item.concept)

    def _give_up(self, items: Sequence[Item], error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.failed += [Failed(item.method, item.concept, item.key, reason) for item in items]
        self._count(len(items), items[0].concept)

    def _count(self, n: int, concept: str) -> None:
        self.done += n
        self.progress("images", self.done, self.total, {"concept": concept})


# --- a run's files ----------------------------------------------------------------------------------------------------


def write_plan(model: Model, plan: Plan, folder: Path, seeds: Sequence[int], command: str, source: str) -> None:
    """DIR/plan.json: what is asked for now, and what was before of the same suite, model and settings.

    What a method is now made by otherwise, with other settings of its editor, say, takes the place of what it was before: the
    images of both would be averaged.

    `source`: the suite as it was named, by which a report finds it again. Raises `MokusError` if the folder holds a run of
    another suite, model, settings or versions.
    """
    suite = plan.suite
    fields = {
        "suite": suite.name, "suite_sha256": digest(suite.model_dump()), "model": model.id, "fingerprint": model.fingerprint,
        "settings": {**plan.settings, "learn": asdict(plan.learn)}, "photos": {"n": PHOTOS, "seed": PHOTO_SEED},
        "versions": versions(),
    }  # fmt: skip
    rows = {(row["method"], row["key"], row["prompt"]): row for row in map(asdict, plan.items)}
    old = read_plan(folder) if (folder / "plan.json").is_file() else None
    seeds, commands = list(seeds), [command]
    if old:
        # a model may be named otherwise, as by another path; it is the same by its fingerprint
        check_same(folder, old, {name: value for name, value in fields.items() if name != "model"})
        packs: dict[tuple[str, str], set[str]] = {}
        for item in plan.items:
            packs.setdefault((item.method, item.concept), set()).add(item.pack)
        kept = [row for row in old["items"] if row["pack"] in packs.get((row["method"], row["concept"]), {row["pack"]})]
        rows = {(row["method"], row["key"], row["prompt"]): row for row in kept} | rows
        seeds = sorted({*old["seeds"], *seeds})
        commands = list(dict.fromkeys([*old["commands"], command]))
    methods = list(dict.fromkeys(row["method"] for row in rows.values()))
    write_json(folder / "plan.json", {
        **fields, "seeds": seeds, "methods": methods, "commands": commands,
        "suite_file": str(Path(source).resolve() if Path(source).is_file() else source),
        "items": list(rows.values()),
    })  # fmt: skip


def write_failed(plan: Plan, failed: Sequence[Failed], folder: Path) -> None:
    """DIR/failed.json: what failed now, and what failed before, is not there yet and was not tried again."""
    tried = {item.key for item in plan.items}
    before = [
        each for each in read_json(folder / "failed.json") or []
        if each["key"] not in tried and not image_file(folder, each["key"]).is_file()
    ]  # fmt: skip
    write_json(folder / "failed.json", [*before, *map(asdict, failed)])


def write_training(plan: Plan, shelf: Shelf, folder: Path) -> None:
    """DIR/training.json: {"rows"}, those of earlier runs in the folder among them."""
    old = read_json(folder / "training.json") or {"rows": []}
    rows = {(row["method"], row["concept"]): row for row in [*old["rows"], *training_rows(plan, shelf)]}
    write_json(folder / "training.json", {"rows": list(rows.values())})


def training_rows(plan: Plan, shelf: Shelf) -> list[dict[str, Any]]:
    """What each method's training of each concept took: {method, concept, seconds_learn, seconds_bind, knowledge, taken}.

    Seconds are None where a stop came in between; a method whose packs are not all there has no row.
    """
    packs: dict[tuple[str, str], dict[str, None]] = {}
    for item in plan.items:
        packs.setdefault((item.method, item.concept), {})[item.pack] = None
    rows = []
    for (method, concept), keys in packs.items():
        learned: dict[str, Any] = {}
        bound: dict[str, Any] = {}
        knowledge = taken = 0
        for key in filter(None, keys):
            recipe = plan.recipes[key]
            looks = plan.key_of(concept, recipe.bare)
            for name, into in ((looks, learned), *(((key, bound),) if recipe.edit else ())):
                into[name] = shelf.find(name)
            if recipe.edit and (there := bound[key]):
                knowledge, taken = there[1].knowledge, there[1].taken
        if not all((*learned.values(), *bound.values())):
            continue
        rows.append({
            "method": method, "concept": concept, "seconds_learn": _sum(learned), "seconds_bind": _sum(bound),
            "knowledge": knowledge, "taken": taken,
        })  # fmt: skip
    return rows


def _sum(packs: dict[str, Any]) -> float | None:
    seconds = [made.seconds for _, made in packs.values()]
    return None if None in seconds else sum(seconds)


# --- what it will take ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Of what is not there yet."""

    images: int
    learned: int  # packs
    bound: int  # pieces of knowledge
    seconds: float
    bytes: int


def estimate(model: Model, plan: Plan, folder: Path, batch_size: int) -> Estimate:
    """Time and disk, from two steps of a batch and one of the encoder on this machine; good to a factor of two."""
    missing = [item for item in plan.images().values() if not image_file(folder, item.key).is_file()]
    packs = {item.pack: item.concept for item in missing if item.pack}
    looks = {plan.key_of(concept, plan.recipes[key].bare) for key, concept in packs.items()}
    learned = [key for key in looks if not (folder / "packs" / key).is_dir()]
    made = {each.name for each in (folder / "packs").glob("*")}
    pieces = sum(_pieces(plan, key, concept, {*made, *packs}) for key, concept in packs.items() if key not in made)
    if not missing:
        return Estimate(0, 0, 0, 0.0, 0)
    drawing, encoding = _probe(model, plan, [item.drawn for item in missing], batch_size)
    guidance = 2 if plan.settings["true_cfg_scale"] > 1 else 1
    s = plan.learn
    step = (s.batch_size + s.prior_batch_size * (s.prior_weight > 0)) * 3 * drawing / guidance  # forward and backward
    seconds = len(missing) * (plan.settings["steps"] * drawing + encoding)
    seconds += len(learned) * s.steps * step + pieces * EDIT_PASSES * encoding
    image = plan.settings["size"] ** 2 * BYTES_PER_PIXEL
    return Estimate(
        len(missing), len(learned), pieces, seconds, round(len(missing) * image + len(packs) * _lora_bytes(model, s))
    )


def _pieces(plan: Plan, key: str, concept: str, there: set[str]) -> int:
    """How many pieces are bound for this pack, which goes on from the longest that is there or made with it."""
    recipe = plan.recipes[key]
    if not recipe.edit:
        return 0
    return len(recipe.knowledge) - max((n for n, k in plan.shorter(concept, recipe).items() if k in there), default=0)


EDIT_PASSES = 20 * 20 * 3  # evaluations of an edit, prompts in each, forward and backward
BYTES_PER_PIXEL = 1.7  # of a PNG


def _probe(model: Model, plan: Plan, prompts: Sequence[str], batch_size: int) -> tuple[float, float]:
    """Seconds of one denoising step of one image, in a batch, and of encoding one prompt."""
    n = min(batch_size, len(prompts))
    settings = {**plan.settings, "steps": 2}
    with model.resident("text_encoder"):
        encodings = encode(model, [*prompts[:n], settings["negative_prompt"]])
        began = time.perf_counter()
        encode(model, prompts[:1])
        encoding = time.perf_counter() - began
    with model.resident("transformer", "vae"), torch.no_grad():
        began = time.perf_counter()
        draw(
            model,
            [(each, 0) for each in encodings[:n]],
            encodings[n] if settings["true_cfg_scale"] > 1 else None,
            settings,
        )
        drawing = time.perf_counter() - began
    return drawing / 2 / n, encoding


def _lora_bytes(model: Model, settings: Any) -> int:
    sizes = [
        module.in_features + module.out_features
        for name, module in model.pipe.transformer.named_modules()
        if any(name.endswith(f".{target}") for target in settings.targets)
    ]
    return 4 * int(settings.rank) * sum(sizes)
