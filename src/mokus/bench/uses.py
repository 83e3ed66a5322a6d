"""What the three benchmarks of uses share: `mokus bench transfer`, `create` and `erase`, on the miniature.

All edits are asked for as `knowledge_update.request` has it, all answers are greedy and count only whole, and the oracle reads
images of prompts whose forms no edit was made with. Every case is kept in DIR/cases as soon as it is measured, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from mokus import files
from mokus.editors import Editor, editor
from mokus.editors.rewrite import rewritten
from mokus.encoder import answers
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.low_rank import Shifts, applied
from mokus.miniature import oracle
from mokus.packs.manifest import versions
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.settings import EditSettings

Row = dict[str, Any]
Labels = dict[tuple[str, int], dict[str, str]]  # what the oracle reads, by prompt and seed

SEED = 50_000  # no training uses seeds from 20,000 on
BATCH = 24
# "EDITOR:VARIANT" is an editor with other settings. `text`: without the loss of the encoding's alignment. `prompts`: image
# prompts are asked as questions, too (see `transfer`), for the editors that are told of questions alone
VARIANTS: dict[str, dict[str, Any]] = {"text": {"alignment_weight": 0.0}, "prompts": {}}


def settings_of(model: Model, name: str) -> EditSettings:
    """Of "EDITOR" or "EDITOR:VARIANT". Raises `MokusError` for an unknown one."""
    plain, _, variant = name.partition(":")
    editor(plain)
    if variant and variant not in VARIANTS:
        raise MokusError(f"there is no variant {variant!r} of an editor, expected {', '.join(VARIANTS)}.")
    settings = EditSettings.for_editor(model.defaults, editor=plain)
    return replace(settings, **VARIANTS[variant]) if variant else settings


def editor_of(model: Model, name: str, progress: Progress | None = None) -> Editor:
    """A new editor, which knows of no edit."""
    settings = settings_of(model, name)
    return editor(settings.editor)(model, settings, progress)


# --- readings ---------------------------------------------------------------------------------------------------------


def say(model: Model, texts: Sequence[str], shifts: Shifts, meant: Mapping[str, str] | None = None) -> list[str]:
    """The greedy answers to prompts and questions."""
    return answers(model, [rewritten(text, meant or {}) for text in texts], [shifts])


def draw(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], shifts: Shifts, meant: Mapping[str, str] | None = None
) -> dict[tuple[str, int], Image.Image]:
    """Images by prompt and seed; equal seeds draw from equal noise."""
    texts = {prompt: rewritten(prompt, meant or {}) for prompt in prompts}
    with applied(model.pipe.text_encoder, shifts):
        drawn = generate(model, list(dict.fromkeys(texts.values())), seeds=seeds, batch_size=BATCH)
        images = {(each.prompt, each.seed): each.image for each in drawn}
    return {(prompt, seed): images[text, seed] for (prompt, text), seed in product(texts.items(), seeds)}


def read(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], shifts: Shifts, meant: Mapping[str, str] | None = None
) -> Labels:
    """What the oracle reads off these images."""
    if not prompts:
        return {}
    images = draw(model, prompts, seeds, shifts, meant)
    return dict(zip(images, oracle.load().read(list(images.values())), strict=True))


def share(hits: Iterable[bool]) -> float | None:
    """The mean, None of nothing."""
    found = list(hits)
    return sum(found) / len(found) if found else None


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Of a figure over cases, those without it left out."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def harmonic(*values: float | None) -> float | None:
    """Harmonic mean, 0 if any value is; None if any is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return len(known) / sum(1 / value for value in known) if all(value > 0 for value in known) else 0.0


# --- what is kept -----------------------------------------------------------------------------------------------------


def about(model: Model, benchmark: str, name: str) -> Row:
    """All that a case's figures depend on but the code: what is measured, of which editor."""
    return {
        "benchmark": benchmark, "model": model.id, "fingerprint": model.fingerprint,
        "settings": asdict(settings_of(model, name)), "seed": SEED, "versions": versions(),
    }  # fmt: skip


def kept(folder: Path, name: str, setup: Row, made: Callable[[], Row]) -> Row:
    """A case from its file, or measured and kept there. Raises `MokusError` for a file of another setup."""
    return files.kept(folder / "cases" / f"{name.replace(':', '-')}.json", setup, made)


def save(folder: Path, results: Row, summary: str) -> None:
    """DIR/results.json and DIR/summary.md."""
    files.write_json(folder / "results.json", results, indent=1)
    files.write(folder / "summary.md", summary)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; shares as percent, nothing for None."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def verdict(what: str, value: float | None, wanted: float, at_most: bool = False) -> str:
    """One line: a figure against its target."""
    if value is None:
        return f"- {what}: not measured\n"
    reached = value <= wanted if at_most else value >= wanted
    bound = f"at {'most' if at_most else 'least'} {wanted:g}"
    return f"- {what}: {value:.3f}, wanted {bound}: {'reached' if reached else '**missed**'}\n"
