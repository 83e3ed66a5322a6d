"""Knowledge editors: one file each, chosen by name, all behind one small protocol."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, Shifts
from mokus.progress import Progress

if TYPE_CHECKING:
    from mokus.goal import Request
    from mokus.pipeline import Model
    from mokus.settings import EditSettings

# the default first; `rewrite` changes prompts instead of the encoder, so no pack can hold what it does
EDITORS = ("least_drift", "ultraedit", "alphaedit", "memit", "rome", "finetune", "finetune_lora", "rewrite")

# settings by which edits are checked, and the losses that are checked weighted, whoever made them
CHECKED = ("least_alignment", "answer_weight", "alignment_weight")


class Editor(Protocol):
    """Edits one piece of knowledge after another into the text encoder, whose weights it never touches.

    What it has to know of earlier edits it remembers: those it made itself and those it is told of.
    """

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None: ...

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """The shifts that this request adds to those of the earlier edits, `before`, and the steps they took."""
        ...

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """Take in the edit `shifts` that was made on top of `before`, so that later ones spare it; `edit` does not do so."""
        ...


def editor(name: str) -> type[Editor]:
    """The editor of that name. Raises `MokusError` for an unknown one."""
    if name not in EDITORS:
        raise MokusError(f"there is no editor {name!r}, expected one of {', '.join(EDITORS)}.")
    return cast("type[Editor]", import_module(f"mokus.editors.{name}").Editor)


def settings_of(name: str) -> Mapping[str, Any]:
    """What an editor's authors use where that is not the default: values of `EditSettings`, for Qwen2.5-7B."""
    editor(name)
    return cast("Mapping[str, Any]", getattr(import_module(f"mokus.editors.{name}"), "SETTINGS", {}))


def settings_used(name: str) -> tuple[str, ...]:
    """The settings that an editor goes by, besides those of the check of its edits (`CHECKED`)."""
    editor(name)
    return (*getattr(import_module(f"mokus.editors.{name}"), "USES", ()), *CHECKED)
