"""What a worker can do: one function per kind of job, which calls the library's public function of that name.

They run in the worker's process. The process that asks imports this module for their names and parameters alone, so heavy
libraries are imported inside. Paths are text, what they return is plain JSON.
"""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokus.errors import MokusError
from mokus.settings import AT_ONCE

if TYPE_CHECKING:
    from mokus.generation import Generated
    from mokus.knowledge_update import Edit
    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model
    from mokus.settings import EditSettings

BUSY_SECONDS = 5.0  # to wait for another process that works on the same pack

Settings = Mapping[str, Any] | None


@dataclass(frozen=True)
class Task:
    """What a job needs to know of where it runs."""

    model: Callable[[], Model]  # loads it the first time
    folder: Path  # for its images
    resuming: bool  # it was stopped, or crashed, before
    progress: Callable[[str, int, int, dict[str, Any]], None]  # raises `Stopped` if the job shall end
    show: Callable[[Path], None]  # tells of an image
    seen: set[str] = field(default_factory=set)

    def show_copy(self, image: Path) -> None:
        """Tell of an image that will not stay where it is."""
        if image.name not in self.seen and image.is_file():
            self.seen.add(image.name)
            shutil.copyfile(image, self.folder / image.name)
            self.show(self.folder / image.name)


@contextmanager
def alone(*packs: str) -> Iterator[None]:
    """Inside, no other process works on these packs, which need not be there yet. Raises `MokusError` if one does."""
    from mokus.packs.concept_pack import ConceptPack

    with ExitStack() as held:
        for pack in sorted({str(Path(pack).resolve()) for pack in packs}):
            held.enter_context(ConceptPack.lock_place(pack, BUSY_SECONDS))
        yield


# --- the kinds ---------------------------------------------------------


def learn(
    task: Task, photos: str, anchor: str, output: str, class_word: str | None = None, overwrite: bool = False,
    settings: Settings = None,
) -> dict[str, Any]:  # fmt: skip
    """`mokus learn`: what is in the new pack, and how long it took."""
    from mokus.settings import LearnSettings
    from mokus.training.checkpoint import checkpoint_of
    from mokus.visual_concept import learn

    place, began = Path(output), time.perf_counter()
    model = task.model()
    wanted = LearnSettings.for_model(model.defaults.learn, **(settings or {}))
    checkpoint = checkpoint_of(place)

    def watch(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if what == "learning" and wanted.preview_every:
            task.show_copy(checkpoint.with_name(f"step-{done:05d}.png"))
        task.progress(what, done, total, info)

    with alone(output):
        pack = learn(
            model, Path(photos), anchor, place, class_word=class_word, settings=wanted,
            resume=task.resuming and checkpoint.is_file(), overwrite=overwrite, progress=watch,
        )  # fmt: skip
    return {**_summary(pack), "seconds": time.perf_counter() - began}


def bind(
    task: Task, pack: str, knowledge: list[str], questions: list[str] | None = None, keep: Sequence[str] = (),
    settings: Settings = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """`mokus bind`: what became of each piece of knowledge."""
    from mokus.knowledge_update import bind

    opened, model = _open(pack), task.model()
    with alone(pack):
        edits = bind(
            model, opened, *knowledge, questions=questions, keep=keep, settings=_editing(model, settings),
            progress=task.progress,
        )  # fmt: skip
    return _told(edits)


def unbind(task: Task, pack: str, knowledge: list[str]) -> dict[str, Any]:
    """`mokus unbind`: what is left in the pack."""
    from mokus.knowledge_update import unbind

    opened = _open(pack)
    unbind(opened, *knowledge)
    return _summary(opened)


def ask(
    task: Task, question: str, packs: Sequence[str] = (), prefer: str | None = None, before: bool = False
) -> dict[str, Any]:
    """`before`: also what the base model answers."""
    from mokus.checks import ask
    from mokus.packs.together import shifts_of

    opened, model = [_open(path) for path in packs], task.model()
    for each in opened:
        each.check_base(model)
    answer = ask(model, question, shifts_of(opened, prefer))
    return {"question": question, "answer": answer, **({"before": ask(model, question)} if before else {})}


def check(task: Task, pack: str) -> list[dict[str, Any]]:
    """Every question of all that is bound, with all of it in place: does it still hold?"""
    from mokus.checks import ask, reads_back
    from mokus.knowledge import answer_of

    opened, model = _open(pack), task.model()
    opened.check_base(model)
    asked = [(known, question) for known in opened.knowledge for question in known.questions]
    rows = []
    for i, (known, question) in enumerate(asked):
        task.progress("asking", i, len(asked), {"knowledge": known.text})
        answer = ask(model, question, [opened.shifts()])
        rows.append({
            "knowledge": known.text, "question": question, "expected": answer_of(known.answer), "answer": answer,
            "holds": reads_back(answer, known.answer),
        })  # fmt: skip
    task.progress("asking", len(asked), len(asked), {})
    return rows


def generate(
    task: Task, prompts: list[str], packs: Sequence[str] = (), prefer: str | None = None, seeds: Sequence[int] = (0,),
    steps: int | None = None, true_cfg_scale: float | None = None, size: int | None = None,
    negative_prompt: str | None = None, batch_size: int = AT_ONCE,
) -> list[dict[str, Any]]:  # fmt: skip
    """`mokus generate`: the images, put on the job as they are drawn."""
    opened, model = [_open(path) for path in packs], task.model()
    drawn = _drawn(
        task, "", model, prompts, packs=opened, seeds=seeds, batch_size=batch_size, steps=steps,
        true_cfg_scale=true_cfg_scale, size=size, negative_prompt=negative_prompt, prefer=prefer,
    )  # fmt: skip
    return [
        {"file": str(file), "prompt": each.prompt, "seed": each.seed, "settings": each.settings} for each, file in drawn
    ]


def effects(task: Task, pack: str, knowledge: str) -> list[dict[str, Any]]:
    """What the pack does to phrases like that which nobody bound; see `side_effects`."""
    from mokus.side_effects import side_effects

    opened, model = _open(pack), task.model()
    found = side_effects(model, opened, knowledge, progress=lambda done, n: task.progress("asking", done, n, {}))
    return [vars(effect) for effect in found]


def compare(
    task: Task, prompts: list[str], packs: Sequence[str] = (), prefer: str | None = None, seeds: Sequence[int] = (0,),
    steps: int | None = None, true_cfg_scale: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every prompt by the base model and, if there are packs, with them, at equal seeds."""
    opened, model = [_open(path) for path in packs], task.model()
    sides: dict[str, list[ConceptPack]] = {"base": [], **({"customized": opened} if opened else {})}
    rows: dict[str, dict[int, dict[str, Any]]] = {text: {seed: {"seed": seed} for seed in seeds} for text in prompts}
    for side, used in sides.items():
        for each, file in _drawn(
            task, side, model, prompts, packs=used, prefer=prefer if used else None, seeds=seeds, steps=steps,
            true_cfg_scale=true_cfg_scale,
        ):  # fmt: skip
            rows[each.prompt][each.seed][side] = str(file)
    return [{"prompt": prompt, "images": list(found.values())} for prompt, found in rows.items()]


def create(
    task: Task, name: str, description: str, output: str, questions: list[str] | None = None, overwrite: bool = False,
    settings: Settings = None, keep: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """`mokus create`: the new pack of words, and whether it took."""
    from mokus.virtual_concept import create

    model = task.model()
    with alone(output):
        pack, edit = create(
            model, name, description, output, questions, _editing(model, settings), task.progress, overwrite, keep
        )
    return {"pack": str(pack.path) if pack else None, "edits": _told([edit])}


def erase(
    task: Task, concepts: list[str], output: str, replacement: str | None = None, overwrite: bool = False,
    settings: Settings = None, keep: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """`mokus erase`: the new pack of words, and what took."""
    from mokus.erasure import erase

    model = task.model()
    with alone(output):
        pack, edits = erase(
            model, concepts, output, replacement, _editing(model, settings), task.progress, overwrite, keep
        )
    return {"pack": str(pack.path) if pack else None, "edits": _told(edits)}


def transfer(
    task: Task, ask: str, answer: str, prompts: Sequence[str] = (), knowledge: str | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3), settings: Settings = None,
) -> dict[str, Any]:  # fmt: skip
    """`mokus transfer`: what is answered and drawn, before and after."""
    from mokus.transfer import Case, run

    case, model = Case.of(ask, answer, prompts, knowledge), task.model()
    results, files = run(model, [case], task.folder, seeds, _editing(model, settings), task.progress)
    task.show(next(file for file in files if file.suffix == ".png"))
    return results


KINDS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (learn, bind, unbind, ask, check, effects, generate, compare, create, erase, transfer)
}


def check_call(kind: str, arguments: Mapping[str, Any]) -> None:
    """Raise `MokusError` unless there is such a kind, and it takes these arguments."""
    if kind not in KINDS:
        raise MokusError(f"there is no job {kind!r}, expected one of {', '.join(KINDS)}.")
    try:
        inspect.signature(KINDS[kind]).bind(None, **arguments)
    except TypeError as error:
        raise MokusError(f"{kind} does not go with these arguments ({error}).") from error


# --- what they share ---------------------------------------------------------


def _drawn(task: Task, side: str, model: Model, prompts: list[str], **how: Any) -> Iterator[tuple[Generated, Path]]:
    """Images and the files they are in, named after prompt and seed and, if there are several, the side."""
    from mokus.console import file_names
    from mokus.generation import generate, save_png

    def watch(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        task.progress(f"{what}: {side}" if side else what, done, total, info)

    names = file_names(prompts)
    for each in generate(model, prompts, progress=watch, **how):
        file = task.folder / "-".join(filter(None, [side, names[each.prompt], f"{each.seed}.png"]))
        save_png(each, file)
        task.show(file)
        yield each, file


def _open(path: str) -> ConceptPack:
    from mokus.packs.concept_pack import ConceptPack

    return ConceptPack.open(path)


def _editing(model: Model, settings: Settings) -> EditSettings:
    from mokus.settings import EditSettings

    return EditSettings.for_editor(model.defaults, **(settings or {}))


def _told(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    return [edit.as_json() for edit in edits]


def _summary(pack: ConceptPack) -> dict[str, Any]:
    return {
        "pack": str(pack.path), "anchor": pack.anchor, "class_word": pack.class_word,
        "knowledge": [known.text for known in pack.knowledge], "base_model": pack.base_model,
    }  # fmt: skip
