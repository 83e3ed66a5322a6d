"""The run: every image is planned, knowledge is edited in batches, and each entry is drawn before and after at equal seeds.

A batch is some edits in a row, each on top of the earlier ones (`editors.Editor` remembers them), as users bind knowledge.
Its entries are drawn with all of the batch's shifts, and so are the controls dealt out to it, entries that nobody edits; then
the shifts are dropped. An edit that has not taken is left out of its batch, as `bind` does, and its entry is drawn and judged
all the same.

An image's key is a hash of model, edits, prompt, seed and settings, so what is there need not be drawn again. Edits are kept
until the images of their batch are drawn. One item that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mokus.bench.knowcusbench.plan import image_file
from mokus.bench.knowcusbench.recipe import digest
from mokus.bench.knowcusbench.run import FAULTS
from mokus.bench.state import check_same, load_edits, save_edits
from mokus.bench.wise.entries import Entries, Entry
from mokus.bench.wise.knowledge import Knowledge
from mokus.editors import Editor, editor, rewrite
from mokus.errors import MokusError
from mokus.files import read_json, write_json
from mokus.generation import Generated, check_settings, draw, save_png
from mokus.knowledge import check_text
from mokus.knowledge_update import edit, request
from mokus.low_rank import Shifts, added, applied
from mokus.packs.manifest import versions
from mokus.pipeline import Model, encode
from mokus.progress import Progress, silent
from mokus.settings import EditSettings

PLAN, FAILED, EDITS = "plan.json", "failed.json", "edits"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Item:
    """One image."""

    prompt_id: int
    when: str  # BEFORE or AFTER
    seed: int
    prompt: str
    batch: int  # whose edits are in place; -1 for none
    key: str  # of the image file


@dataclass(frozen=True)
class Batch:
    """Edits in a row, and the entries that are drawn with them."""

    number: int
    knowledge: tuple[Knowledge, ...]
    entries: tuple[Entry, ...]

    def key(self, plan: Plan, n: int | None = None) -> str:
        """Of the first `n` edits; what they are kept under."""
        asked = [(k.knowledge, k.answer, k.questions) for k in self.knowledge[:n]]
        return digest(plan.fingerprint, asdict(plan.editing), asked)[:32]


@dataclass
class Plan:
    """All of a run."""

    suite: Entries
    fingerprint: str  # of the model
    knowledge: dict[int, Knowledge]  # by prompt_id
    batches: list[Batch]
    seeds: list[int]
    settings: dict[str, Any]  # steps, true_cfg_scale, size, negative_prompt
    editing: EditSettings
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """An item that could not be made; `when` is "edit" where it was the edit."""

    prompt_id: int
    when: str
    reason: str
    seed: int = -1


def make_plan(
    model: Model,
    suite: Entries,
    knowledge: dict[int, Knowledge],
    batch: int = 10,
    seeds: Sequence[int] = (0,),
    editing: EditSettings | None = None,
    **settings: Any,
) -> Plan:
    """Plan all batches and images. `batch`: edits in a row; `settings`: `steps` and `size`, where they are not the model's.

    Raises `MokusError` for settings that the model cannot draw or edit with.
    """
    default = model.defaults
    drawing = {
        "steps": settings.get("steps") or default.steps, "size": settings.get("size") or default.size,
        "true_cfg_scale": float(default.true_cfg_scale), "negative_prompt": default.negative_prompt,
    }  # fmt: skip
    check_settings(model, drawing)
    editing = editing or EditSettings.for_editor(default)
    if editing.editor == "rewrite":
        rewrite.refuse()
    plan = Plan(suite, model.fingerprint, knowledge, _batches(suite, knowledge, batch), list(seeds), drawing, editing)
    plan.items = list(_items(plan))
    return plan


def _batches(suite: Entries, knowledge: dict[int, Knowledge], size: int) -> list[Batch]:
    """Entries in their order, `size` at a time, and the controls dealt out evenly."""
    edited = [entry for entry in suite.entries if not entry.control]
    controls = [entry for entry in suite.entries if entry.control]
    parts = [edited[i : i + size] for i in range(0, len(edited), size)]
    found = []
    for number, entries in enumerate(parts):
        taught = [knowledge[entry.prompt_id] for entry in entries if knowledge[entry.prompt_id].answer]
        found.append(Batch(number, tuple(taught), (*entries, *controls[number :: len(parts)])))
    return found


def _items(plan: Plan) -> Iterator[Item]:
    def item(entry: Entry, when: str, seed: int, batch: int, edits: str) -> Item:
        key = digest(plan.fingerprint, edits, entry.prompt, seed, plan.settings)[:32]
        return Item(entry.prompt_id, when, seed, entry.prompt, batch, key)

    for entry in plan.suite.entries:
        for seed in plan.seeds:
            yield item(entry, BEFORE, seed, -1, "")
    for batch in plan.batches:
        edits = batch.key(plan) if batch.knowledge else ""
        for entry in batch.entries:
            for seed in plan.seeds:
                yield item(entry, AFTER, seed, batch.number, edits)


def write_plan(model: Model, plan: Plan, folder: Path, command: str) -> None:
    """DIR/plan.json: what judging and the report need.

    Raises `MokusError` if the folder holds a run of other data or another model, or one with other versions.
    """
    same = {
        "source_sha256": plan.suite.sha256, "version": plan.suite.version, "fingerprint": plan.fingerprint,
        "versions": versions(),
    }  # fmt: skip
    old = read_json(folder / PLAN)
    if old:
        check_same(folder, old, same)
    write_json(folder / PLAN, {
        **same, "source": plan.suite.source, "model": model.id, "settings": plan.settings, "edit": asdict(plan.editing),
        "seeds": plan.seeds, "batches": [
            [{"prompt_id": k.prompt_id, "key": batch.key(plan, n + 1)} for n, k in enumerate(batch.knowledge)]
            for batch in plan.batches
        ],
        "commands": list(dict.fromkeys([*(old or {}).get("commands", []), command])),
        "entries": [entry.model_dump() | {"field": entry.field} for entry in plan.suite.entries],
        "items": [asdict(item) for item in plan.items],
    })  # fmt: skip


def read_plan(folder: Path) -> dict[str, Any]:
    """A run's plan. Raises `MokusError` if the folder holds none."""
    plan = read_json(folder / PLAN)
    if not isinstance(plan, dict) or "items" not in plan:
        raise MokusError(f"{folder} holds no run; make one by 'mokus bench wise run -o {folder}'.")
    return plan


class Runner:
    """Makes what is planned."""

    def __init__(
        self, model: Model, plan: Plan, folder: Path, batch_size: int = 8, progress: Progress | None = None
    ) -> None:
        self.model, self.plan, self.folder, self.batch_size = model, plan, folder, batch_size
        self.progress: Progress = progress or silent
        self.failed: list[Failed] = []
        self.done = 0

    def run(self) -> list[Failed]:
        """Draw everything that is not there yet; returns what failed, which is in DIR/failed.json, too."""
        by_batch: dict[int, list[Item]] = {}
        for item in self.plan.items:
            by_batch.setdefault(item.batch, []).append(item)
        self._draw(by_batch[-1], {})
        for batch in self.plan.batches:
            self._batch(batch, by_batch[batch.number])
        write_json(self.folder / FAILED, [asdict(each) for each in self.failed])
        return self.failed

    def _batch(self, batch: Batch, items: list[Item]) -> None:
        """Edit, draw, and forget the shifts."""
        self._forget_failed(batch, items)
        keys = [batch.key(self.plan, n + 1) for n in range(len(batch.knowledge))]
        if self._there(items) and all(self._record(key) for key in keys):
            self._count(len(items))
            return
        self._draw(items, self._edited(batch))
        if self._there(items):
            for key in keys:
                self._shifts_file(key).unlink(missing_ok=True)

    def _forget_failed(self, batch: Batch, items: list[Item]) -> None:
        """Of an edit that failed, and of what was made without it in place, nothing is kept: all of it is tried again."""
        keys = [batch.key(self.plan, n + 1) for n in range(len(batch.knowledge))]
        failed = [n for n, key in enumerate(keys) if (self._record(key) or {}).get("failed")]
        if failed:
            for key in keys[failed[0] :]:
                self._record_file(key).unlink(missing_ok=True)
            for item in items:
                image_file(self.folder, item.key).unlink(missing_ok=True)

    # edits

    def _edited(self, batch: Batch) -> Shifts:
        """The shifts of all edits of a batch that took; those that are kept are not made again."""
        before: Shifts = {}
        with self.model.resident("text_encoder"):
            made: Editor | None = None
            for n, knowledge in enumerate(batch.knowledge):
                key = batch.key(self.plan, n + 1)
                shifts = self._kept(key)
                made = made or editor(self.plan.editing.editor)(self.model, self.plan.editing, self.progress)
                if shifts is None:
                    shifts = self._edit(made, knowledge, key, before)
                if shifts:
                    made.remember(request(knowledge.knowledge, knowledge.answer, knowledge.questions), before, shifts)
                    before = added(before, shifts)
                self.progress("edits of a batch", n + 1, len(batch.knowledge), {"batch": batch.number + 1})
        return before

    def _edit(self, made: Editor, knowledge: Knowledge, key: str, before: Shifts) -> Shifts:
        """One edit, kept on disk; empty if it failed or has not taken."""
        record: dict[str, Any] = {"prompt_id": knowledge.prompt_id, "taken": False, "failed": ""}
        shifts: Shifts = {}
        try:
            done = edit(
                self.model, knowledge.knowledge, knowledge.answer, knowledge.questions, self.plan.editing, made, before
            )
        except FAULTS as error:
            record |= {"failed": _first_line(error), "reason": _first_line(error), "seconds": 0.0}
            self.failed.append(Failed(knowledge.prompt_id, "edit", record["failed"]))
        else:
            shifts = done.shifts if done.taken else {}
            names = ("taken", "reason", "read_back", "alignment", "steps", "seconds")
            record |= {name: getattr(done, name) for name in names}
        save_edits(self._shifts_file(key), [shifts], key)
        write_json(self._record_file(key), record)
        return shifts

    def _kept(self, key: str) -> Shifts | None:
        """The shifts of an edit made before; None if it has to be made, as where they are damaged."""
        if self._record(key) is None:
            return None
        edits, _ = load_edits(self._shifts_file(key), key)
        return edits[0] if edits else None

    def _record(self, key: str) -> dict[str, Any] | None:
        found = read_json(self._record_file(key))
        return found if isinstance(found, dict) else None

    def _record_file(self, key: str) -> Path:
        return self.folder / EDITS / f"{key}.json"

    def _shifts_file(self, key: str) -> Path:
        return self.folder / EDITS / f"{key}.safetensors"

    # images

    def _draw(self, items: list[Item], shifts: Shifts) -> None:
        """Draw the chunks of which an image is missing."""
        chunks = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        for chunk in chunks:
            if self._there(chunk):
                self._count(len(chunk))
                continue
            failed = False
            try:
                self._draw_chunk(chunk, shifts)
            except FAULTS:
                failed = True
            if failed:  # only after the except block: in it, all that the failed call held in memory is still held
                self._draw_each(chunk, shifts)

    def _draw_each(self, chunk: list[Item], shifts: Shifts) -> None:
        """Draw a chunk's items alone, which shows which of them fails."""
        for item in chunk:
            try:
                self._draw_chunk([item], shifts)
            except FAULTS as error:
                self.failed.append(Failed(item.prompt_id, item.when, _first_line(error), item.seed))
                self._count(1)

    def _draw_chunk(self, items: list[Item], shifts: Shifts) -> None:
        settings = self.plan.settings
        for item in items:
            check_text(item.prompt, "prompt", "my favourite toy in the snow")
        negative = [settings["negative_prompt"]] if settings["true_cfg_scale"] > 1 else []
        with self.model.resident("text_encoder"), applied(self.model.pipe.text_encoder, shifts):
            encodings = encode(self.model, [*(item.prompt for item in items), *negative])
        jobs = [(encoding, item.seed) for encoding, item in zip(encodings, items, strict=False)]
        with self.model.resident("transformer", "vae"), torch.no_grad():
            images = draw(self.model, jobs, encodings[-1] if negative else None, settings)
        about = {**settings, "model": self.model.id, "fingerprint": self.model.fingerprint}
        for item, image in zip(items, images, strict=True):
            file = image_file(self.folder, item.key)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                save_png(Generated(image, item.prompt, item.seed, about), file)
            self._count(1)

    def _there(self, items: Sequence[Item]) -> bool:
        return all(image_file(self.folder, item.key).is_file() for item in items)

    def _count(self, n: int) -> None:
        self.done += n
        self.progress("images", self.done, len(self.plan.items), {})


def edit_records(folder: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """How the edits of a plan went, of those that were made."""
    keys = [edit["key"] for batch in plan["batches"] for edit in batch]
    records = [read_json(folder / EDITS / f"{key}.json") for key in keys]
    return [record for record in records if record]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
