"""`mokus bench editing`. Heavy libraries are imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mokus.console import (
    Bars,
    JsonOption,
    ModelOption,
    load_model,
    parse_counts,
    parse_names,
    print_json,
    results_folder,
    stdout,
)


def editing(
    output: Annotated[
        Path,
        results_folder("Folder of results; a stopped run goes on there."),
    ] = Path("editing"),
    editors: Annotated[
        str | None, typer.Option(help="Which, with commas between them.", show_default="all of them")
    ] = None,
    edits: Annotated[
        str, typer.Option(help="Figures after so many edits, one on top of the other.")
    ] = "1,10,50,100,200",
    singles: Annotated[int, typer.Option(help="How many single edits the figures of one are the mean of.", min=1)] = 12,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Draw, and let the oracle judge.")] = True,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure knowledge editors: what they do to what was edited and to what was not. Writes results.json, report.html."""
    from mokus.editors import EDITORS, editor

    names = parse_names(editors) if editors is not None else list(EDITORS)
    for name in names:
        editor(name)
    counts = parse_counts(edits, "--edits")
    loaded = load_model(model, "cpu")
    from mokus.bench.editing import report

    with Bars() as progress:
        rows, page = report.report(loaded, output, names, counts, singles, images, progress)
    if as_json:
        return print_json(rows)
    stdout(width=130).print(report.table(rows))  # a table without its figures is none
    typer.echo(f"{output / 'results.json'}; open {page}")
