"""What the commands share: options made from settings, progress bars, and errors as one sentence with exit code 2."""

from __future__ import annotations

import errno
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from types import TracebackType
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from mokus.errors import MokusError

err = Console(stderr=True, highlight=False)

# Faults of the place rather than of the program: no room, no permission, not a folder, ...
_FAULTS_OF_THE_DISK = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class Commands(TyperGroup):
    """A group of commands in which a user's mistake is one sentence on stderr and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MokusError as error:
            sentence = str(error)
        except OSError as error:
            if error.errno not in _FAULTS_OF_THE_DISK:
                raise
            sentence = f"{error.filename or 'the output'}: {error.strerror}"
        print(f"mokus: {sentence}", file=sys.stderr)
        raise typer.Exit(2)


class Bars:
    """A `progress(what, done, total, info)` callback that draws one bar per `what`, with the time left, on stderr."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), TextColumn("[dim]{task.fields[info]}"),
            console=err, disable=not err.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int, info: dict[str, Any]) -> None:
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items())
        if what not in self._tasks or self._progress.tasks[self._tasks[what]].completed > done:
            self._tasks[what] = self._progress.add_task(what, total=total, info="")
        self._progress.update(self._tasks[what], completed=done, total=total, info=text)


def settings_options(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of a settings dataclass.

    The command has a parameter `chosen: dict`, which receives the options that were given and nothing else, so that the
    defaults stay where they are: with the dataclass and the model. Help texts come from the fields' metadata.
    """
    hints = get_type_hints(settings)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters

        @wraps(command)
        def with_settings(**given: Any) -> None:
            chosen = {f.name: given.pop(f.name) for f in fields(settings) if f.name not in own}
            command(
                **given, chosen={name: value for name, value in chosen.items() if value not in (None, [])}
            )

        parameters = [p for p in own.values() if p.name != "chosen"]
        parameters += [_option(f, hints[f.name]) for f in fields(settings) if f.name not in own]
        with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters}
        del with_settings.__wrapped__  # type: ignore[attr-defined]
        return with_settings

    return decorate


def _option(field: Field[Any], kind: Any) -> inspect.Parameter:
    """The command-line option of one field: unset by default, its help saying what that means."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    option = typer.Option(
        help=field.metadata.get("help", ""), show_default=text.lower() or False, rich_help_panel="Settings"
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def parse_seeds(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise MokusError(
                f"--seeds got {text!r}, expected numbers and ranges of them such as '0-3' or '0,5,7'."
            )
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
        if len(seeds) > 10_000:
            raise MokusError(
                f"--seeds got {text!r}, which is more than 10,000 seeds; ask for fewer at a time."
            )
    return list(dict.fromkeys(seeds))


def file_names(prompts: list[str]) -> dict[str, str]:
    """A readable file name for every prompt, different ones for different prompts, the same whenever it is asked."""
    names: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        base = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "prompt"
        name, n = base, 2
        while name in names.values():
            name, n = f"{base}-{n}", n + 1
        names[prompt] = name
    return names
