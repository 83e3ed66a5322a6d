"""What the commands share: options made from settings, progress bars, and errors as one sentence with exit code 2."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, Field, fields
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from mokus.errors import MokusError
from mokus.knowledge import shown
from mokus.packs.files import refuse_inside
from mokus.settings import SEEDS
from mokus.sizes import Size, parsed

if TYPE_CHECKING:
    from mokus.knowledge_update import Edit
    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model

err = Console(stderr=True, highlight=False)

# options that many commands have
ModelOption = Annotated[
    str | None,
    typer.Option("--model", envvar="MOKUS_MODEL", show_default="the miniature",
                 help="Hub id or folder of a QwenImagePipeline such as Qwen/Qwen-Image, or of another known family."),
]  # fmt: skip
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where to compute: cpu, cuda, cuda:1.", show_default="a GPU if there is one"),
]
PackArgument = Annotated[Path, typer.Argument(metavar="PACK", help="The concept pack, a folder.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="PHRASE",
                 help="A phrase like it that shall mean what it does: 'your favourite toy'; may be repeated."),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
SeedsOption = Annotated[str, typer.Option(help="Numbers and ranges: 0-3 or 0,5,7.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a concept pack that is there.")]


def results_folder(help: str) -> Any:
    """The option of a folder for what a command writes; a file there, or a pack around it, is refused before any work."""
    return typer.Option("--output", "-o", metavar="DIR", file_okay=False, callback=_outside_packs, help=help)


def _outside_packs(folder: Path) -> Path:
    refuse_inside(folder)
    return folder


MOST_SEEDS = 10_000

# Faults of the place rather than of the program: no room, no permission, not a folder, ...
_FAULTS_OF_THE_DISK = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


# Of a wrong option or argument. Typer has it from click or, since 0.25, brings its own; this is the one it raises.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A group of commands in which a user's mistake is one sentence on stderr and exit code 2, never a traceback."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not args:  # shows the help, which typer does by an error
            return super().make_context(info_name, args, parent, **extra)
        with one_sentence():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with one_sentence():
            return super().invoke(ctx)


@contextmanager
def one_sentence() -> Iterator[None]:
    """A user's mistake inside ends the program with one sentence on stderr and exit code 2, Ctrl-C with 130."""
    try:
        yield
        return
    except KeyboardInterrupt:
        note("stopped.")
        raise typer.Exit(130) from None
    except MokusError as error:
        sentence = str(error)
    except _UsageError as error:
        if not error.format_message():  # type: ignore[attr-defined]  # the help was shown, which is all it is about
            raise typer.Exit(2) from None
        command = getattr(getattr(error, "ctx", None), "command_path", "mokus")
        sentence = f"{error.format_message()} See '{command} --help'."  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno not in _FAULTS_OF_THE_DISK:
            raise
        sentence = f"{error.filename or 'the output'}: {error.strerror}."
    note(sentence)
    raise typer.Exit(2)


def note(sentence: str) -> None:
    """One line on stderr."""
    print(f"mokus: {visible(' '.join(sentence.split()))}", file=sys.stderr)


def visible(text: str) -> str:
    """The text with what a terminal would obey or not show as \\u....: a stranger's pack or file name may hold anything."""
    return "".join(c if shown(c) else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    return json.dumps(c)[1:-1] if c > "\x7f" else f"\\u{ord(c):04x}"


def stdout(width: int | None = None) -> Console:
    """For tables on stdout, in which what users wrote may look like markup."""
    return Console(highlight=False, markup=False, emoji=False, width=width)


def print_json(value: Any) -> None:
    """JSON on stdout; what a terminal would obey is escaped, so that it comes back as it was."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo("".join(c if c == "\n" or shown(c) else _escaped(c) for c in text))


def hush() -> None:
    """Of a program's own process: bitsandbytes, on a CPU with AVX-512 for bfloat16, recommends another package at every start."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_model(
    model: str | None, device: str | None = None, dtype: Any = None, tier: str | None = None, text_alone: bool = False
) -> Model:
    """`mokus.load`, with the libraries' own bars, of files read or downloaded, only for large models on a terminal."""
    bars = model is not None and err.is_terminal
    with nullcontext() if bars else err.status("loading the model"):
        import diffusers.utils.logging
        import transformers.utils.logging

        from mokus.pipeline import load

        if not bars:
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        return load(model, device, dtype, tier, text_alone)


class Bars:
    """A `progress(what, done, total, info)` callback that draws one bar per `what`, with the time left, on stderr.

    `transient`: the bars go away at the end. Where stderr is not a terminal, or if they are `hidden`, nothing is drawn.
    """

    def __init__(self, transient: bool = False, hidden: bool = False) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), TextColumn("[dim]{task.fields[info]}"),
            console=err, disable=hidden or not err.is_terminal, transient=transient,
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
        self._progress.update(self._tasks[what], completed=done, total=total, info=escape(text))


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
            command(**given, chosen={name: value for name, value in chosen.items() if value not in (None, [])})

        parameters = [p for p in own.values() if p.name != "chosen"]
        parameters += [_option(f, hints[f.name]) for f in fields(settings) if f.name not in own]
        with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters}
        del with_settings.__wrapped__
        return with_settings

    return decorate


def _option(field: Field[Any], kind: Any) -> inspect.Parameter:
    """The command-line option of one field: unset by default, its help saying what that means."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    option = typer.Option(
        help=field.metadata["help"], show_default=f"{text.lower()}, or the model's own", rich_help_panel="Settings"
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]. `option`: where it was given, for the errors."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,99})(?:-(\d{1,99}))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise MokusError(f"{option} got {text!r}, expected numbers and ranges of them such as '0-3' or '0,5,7'.")
        some = range(int(found[1]), int(found[2] or found[1]) + 1)
        if some.stop > SEEDS:
            raise MokusError(f"{option} got {text!r}, expected seeds from 0 to 2^64 - 1; take smaller ones.")
        if len(seeds) + (some.stop - some.start) > MOST_SEEDS:
            raise MokusError(
                f"{option} got {text!r}, which is more than {MOST_SEEDS:,} seeds; ask for fewer at a time."
            )
        seeds += some
    return list(dict.fromkeys(seeds))


def parse_size(text: str | None) -> Size | None:
    """ "1024" or "1664x928", width and height in pixels."""
    if text is not None and parsed(text) is None:
        raise MokusError(f"--size got {text!r}, expected pixels such as 1024, or width and height such as 1664x928.")
    return None if text is None else parsed(text)


def parse_counts(text: str, option: str) -> list[int]:
    """ "1,10,100" -> [1, 10, 100]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        raise MokusError(
            f"{option} got {text!r}, expected numbers from 1 with commas between them, such as '1,10,100'."
        )
    return sorted({int(part) for part in parts})


def parse_names(text: str) -> list[str]:
    """ "taro, momo" -> ["taro", "momo"]; whoever takes them says which there are."""
    return [name.strip() for name in text.split(",")]


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """A readable file name for every prompt, different ones for different prompts, the same whenever it is asked.

    Where the readable part does not tell the whole prompt, the beginning of a hash does.
    """
    names = {}
    for prompt in prompts:
        name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48] or "prompt"
        whole = name == prompt.replace(" ", "-") and "-" not in prompt
        names[prompt] = name if whole else f"{name}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return names


# --- packs and edits ---------------------------------------------------------


def open_pack(path: Path) -> ConceptPack:
    """The pack in a folder. Raises `MokusError` if it is none, or damaged."""
    from mokus.packs.concept_pack import ConceptPack

    return ConceptPack.open(path)


def print_edits(edits: list[Edit]) -> None:
    """A table of how edits went, and why those that have not taken have not."""
    table = Table("knowledge", "", "reads back", "alignment", "steps", "seconds", box=None, pad_edge=False)
    for edit in edits:
        word = "bound" if edit.taken else "not taken"
        table.add_row(
            edit.knowledge,
            word,
            visible(edit.read_back),
            f"{edit.alignment:.2f}",
            str(edit.steps),
            f"{edit.seconds:.1f}",
        )
    stdout().print(table)
    for edit in edits:
        if not edit.taken:
            typer.echo(f"{edit.knowledge!r} has not taken and is left unbound: {edit.reason}.")
        for phrase, moved in edit.kept.items():
            typer.echo(f"{phrase!r} has moved {moved:.0%} of the way by it.")
