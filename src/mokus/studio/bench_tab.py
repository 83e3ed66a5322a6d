"""Benchmark: the reports of runs, and the figures of several runs beside each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from mokus.errors import MokusError
from mokus.studio.page import Given, Studio, shown_at

DEPTH = 3  # folders below those that are searched
MOST_FIGURES = 250
# A report carries its style and its pictures in it; it gets nothing else, and no script of it runs.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups; frame-ancestors 'none'"
)
LARGEST = 64 << 20  # bytes of a results.json
# keys of what describes a run, or is finer than a comparison of runs wants
_DETAILS = {
    "settings", "versions", "metrics", "bootstrap", "seeds", "interval", "by_concept", "counts", "commands", "ablation",
    "failed", "cut_missed", "claims", "differences", "answers", "cases", "training", "micro", "macro_misses_zero", "images",
    "concepts", "misses", "missing",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A folder of results; `id`, made of its path, tells the browser which, whatever other folders come and go."""

    id: str
    folder: Path
    title: str
    report: Path | None
    results: Path | None


def routes(studio: Studio) -> list[Route]:
    """Of this page."""

    def show(given: Given, error: str) -> Response:
        found = runs(studio.reports)
        wanted = [run for run in found if run.id in given.getlist("run") and run.results]
        rows: list[tuple[str, list[float | None]]] = []
        try:
            rows = compared([run.results for run in wanted if run.results])
        except MokusError as fault:
            error = error or str(fault)
        return studio.page(
            "benchmark.html", "/benchmark", error,
            runs=found, wanted=wanted, rows=rows[:MOST_FIGURES], more=max(0, len(rows) - MOST_FIGURES),
            folders=studio.reports,
        )  # fmt: skip

    def report(request: Request) -> Response:
        id = request.path_params["id"]
        run = next((each for each in runs(studio.reports) if each.id == id), None)
        if run is None or run.report is None:
            raise MokusError("this report is no longer there; see the list of those that are.")
        return FileResponse(run.report, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    return [shown_at("/benchmark", show), Route("/benchmark/{id:str}/report", report)]


def runs(folders: Sequence[Path]) -> list[Run]:
    """Folders with a report or results in these and a few levels below, in the order of their paths."""
    found = sorted({folder for top in folders for folder in _below(top, DEPTH)})
    made = []
    for folder in found:
        report, results = folder / "report.html", folder / "results.json"
        top = next(top for top in folders if folder.is_relative_to(top))
        title = folder.name if folder == top else str(folder.relative_to(top))
        id = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
        made.append(
            Run(id, folder, title, report if report.is_file() else None, results if results.is_file() else None)
        )
    return made


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    if (folder / "report.html").is_file() or (folder / "results.json").is_file():
        yield folder
    if depth:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _below(inner, depth - 1)


def compared(files: Sequence[Path]) -> list[tuple[str, list[float | None]]]:
    """Every figure that all of these results have, or at least two of several, with its value in each.

    Raises `MokusError` for a file that is no JSON, or not of a run.
    """
    columns = [_column(file) for file in files]
    names = list(dict.fromkeys(name for column in columns for name in column))
    least = min(2, len(columns))
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [row for row in rows if sum(value is not None for value in row[1]) >= least]


def _plain(name: str) -> str:
    return name.removeprefix("scores · ").removesuffix(" · macro").replace("_", " ")


def figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a results.json and what they are of: of a row in a list its words say it."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _DETAILS:
                yield from figures(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        for row in value:
            if row.get("perspective"):  # a part of what another row has all of
                continue
            words = [str(each) for key, each in row.items() if _tells(key, each)]
            numbers = {key: each for key, each in row.items() if not _tells(key, each)}
            yield from figures(numbers, " · ".join(filter(None, [name, *words])))


def _tells(key: str, value: Any) -> bool:
    return isinstance(value, str) or key == "edits"


def _column(file: Path) -> dict[str, float]:
    try:
        if file.stat().st_size > LARGEST:
            raise MokusError(f"{file} has more than {LARGEST >> 20} MB, which are no results of a run.")
        return {_plain(name): value for name, value in figures(json.loads(file.read_text(encoding="utf-8")))}
    except MokusError:
        raise
    except (OSError, ValueError, RecursionError, OverflowError) as error:  # cut off, nested without end, too large
        raise MokusError(f"{file} cannot be read as JSON ({error}); write the report of that run again.") from error
