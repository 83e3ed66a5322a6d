"""`mokus bench transfer`, `create` and `erase`. Heavy libraries are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mokus.console import Bars, JsonOption, load_model, parse_counts, parse_names, print_json, results_folder
from mokus.errors import MokusError
from mokus.settings import EditSettings

ModelOption = Annotated[
    str | None,
    typer.Option("--model", envvar="MOKUS_MODEL", show_default="the miniature", help="A model of the miniature's world."),
]  # fmt: skip
OutputOption = Annotated[
    Path,
    results_folder("Folder of results; a stopped run goes on there."),
]
DEFAULT = EditSettings().editor
EditorOption = Annotated[str, typer.Option("--editor", help="Which editor.")]


def register(bench: typer.Typer) -> None:
    """Add the three commands."""
    for command in (transfer, create, erase):
        bench.command()(command)


def transfer(
    output: OutputOption = Path("transfer-bench"),
    editors: Annotated[str | None, typer.Option(help="Which, with commas between them.", show_default="all")] = None,
    cases: Annotated[int, typer.Option(help="Counterfactual facts, of 120.", min=1, max=120)] = 100,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Does what is edited in text show in images? Every editor, on facts that the image transformer never saw."""
    names = parse_names(editors) if editors is not None else None
    _check(names or [])
    loaded = load_model(model, "cpu")
    from mokus.bench import transfer

    with Bars() as progress:
        results = transfer.run(loaded, output, names or transfer.DEFAULT, cases, progress)
    _tell(output, results, transfer.summary(results), as_json)


def create(
    output: OutputOption = Path("create-bench"),
    editor: EditorOption = DEFAULT,
    names: Annotated[int, typer.Option(help="New names.", min=1, max=200)] = 50,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """New names bound to descriptions: each attribute read off images, beside the description in the prompt."""
    _check([editor])
    loaded = load_model(model, "cpu")
    from mokus.bench import create

    with Bars() as progress:
        results = create.run(loaded, output, editor, names, progress)
    _tell(output, results, create.summary(results), as_json)


def erase(
    output: OutputOption = Path("erase-bench"),
    editor: EditorOption = DEFAULT,
    erasures: Annotated[
        str, typer.Option(help="Figures after so many, one on top of the other; at most 120.")
    ] = "1,10,50",
    singles: Annotated[int, typer.Option(help="Single erasures that the figures of one are the mean of.", min=1)] = 8,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erased, kept, and what other words still lead to, after one erasure and after many."""
    _check([editor])
    counts = parse_counts(erasures, "--erasures")
    if max(counts) > 120:
        raise MokusError(
            f"--erasures got {erasures!r}, expected numbers up to 120, which is as many facts as are reported on."
        )
    loaded = load_model(model, "cpu")
    from mokus.bench import erase

    with Bars() as progress:
        results = erase.run(loaded, output, editor, counts, singles, progress)
    _tell(output, results, erase.summary(results), as_json)


def _check(names: list[str]) -> None:
    from mokus.editors import editor

    for name in names:
        editor(name.partition(":")[0])


def _tell(output: Path, results: dict[str, Any], summary: str, as_json: bool) -> None:
    if as_json:
        return print_json(results)
    typer.echo(summary)
    typer.echo(str(output / "results.json"))
