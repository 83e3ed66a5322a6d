"""The benchmark of knowledge editors as one self-contained HTML page: tables, charts and images, nothing loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mokus.bench.editing.charts import capacity, step_size
from mokus.bench.editing.figures import (
    BASELINE,
    COLOURS,
    EDITORS,
    FIGURES,
    RECIPE,
    WANTED,
    WANTED_AFTER,
    Figure,
    counts_of,
    measured_of,
    name_of,
    share,
    value_of,
)
from mokus.bench.editing.measure import Row
from mokus.files import write as write_file
from mokus.html import PAGE, html_table, img, section


def write(folder: Path, rows: list[Row], extra: dict[str, Any], setup: dict[str, Any]) -> Path:
    """Write `report.html` into a folder, all of it or nothing; returns its path."""
    return write_file(folder / "report.html", page(rows, extra, setup))


def page(rows: list[Row], extra: dict[str, Any], setup: dict[str, Any]) -> str:
    """The whole page."""
    editors = _editors(rows, extra)
    return PAGE.format(
        title="MoKus: knowledge editors compared",
        subtitle=_subtitle(rows),
        body="\n".join(
            section(title, note, content) for title, note, content in _sections(rows, extra, setup, editors) if content
        ),
        style=files("mokus").joinpath("report.css").read_text(encoding="utf-8"),
    )


def _subtitle(rows: list[Row]) -> str:
    editors, counts = len({row["editor"] for row in rows} - {BASELINE}), counts_of(rows)
    ways = f"{editors} way{'s' * (editors != 1)}"
    after = f"after {_listed(counts)} edit{'s' * (counts != [1])}" if counts != [0] else "before any edit"
    return f"{ways} to give a text encoder new knowledge, compared {after} on the same questions, prompts and images."


def _sections(
    rows: list[Row], extra: dict[str, Any], setup: dict[str, Any], editors: dict[str, int]
) -> list[tuple[str, str, str]]:
    """Title, note (HTML) and content (HTML) of every section; those without content are left out."""
    read = (
        f"<b>Bold and underlined</b>: the best of a column, <code>{BASELINE}</code> not in the running; "
        "↓ lower is better. "
        "Locality is only worth something beside efficacy: an editor that changes nothing keeps everything."
    )
    tables = [
        (_after(count), read if first else "", _figures(rows, count, editors))
        for first, count in zip([True] + [False] * len(rows), counts_of(rows), strict=False)
    ]
    return [
        ("What the figures mean", "Shares of cases, of which more is better, but for the cost.", _meanings()),
        *tables,
        ("Wanted", _wanted_note(rows), _wanted(rows)),
        ("Capacity", "What is left as edits are made one after the other.", capacity(rows, editors)),
        ("Step size", "The same edits with a smaller or a larger step.", step_size(extra, editors)),
        (
            "Where the shift is",
            "How far each layer moved after the largest number of edits, relative to its own norm (Frobenius). "
            "Bars are as long as their share of the editor's largest; compare editors by the values.",
            _norms(extra.get("norms") or {}, editors),
        ),
        (
            "Rounding",
            "The encoder cast to bfloat16, edits of one fact each: what is lost of the shift when it is added to the weights, "
            "and whether the edited question is answered.",
            _rounding(extra.get("rounding") or []),
        ),
        ("Images", "The same seed before and after the edit.", _images(extra.get("images") or [])),
        ("Settings", "", _settings(setup)),
    ]


def _after(count: int) -> str:
    return {0: "Before any edit", 1: "After one edit"}.get(count, f"After {count} sequential edits")


def _editors(rows: Iterable[Row], extra: dict[str, Any]) -> dict[str, int]:
    """Every editor, in the order of the tables, and the number of its colour."""
    seen = [*(row["editor"] for row in rows), *(extra.get("norms") or {})]
    seen += [entry["editor"] for entry in [*(extra.get("eta") or []), *(extra.get("images") or [])]]
    others = [editor for editor in dict.fromkeys(seen) if editor not in EDITORS]
    numbers = {editor: i if i < COLOURS else 1 + i % (COLOURS - 1) for i, editor in enumerate([*EDITORS, *others])}
    return {editor: number for editor, number in numbers.items() if editor in seen}


def _listed(values: Sequence[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _meanings() -> str:
    groups: dict[str, list[str]] = {}
    for figure in FIGURES:
        line = f"<dt>{escape(figure.name)}</dt><dd>{escape(figure.meaning)}</dd>"
        groups.setdefault(figure.group, []).append(line)
    blocks = "".join(f"<div><h3>{escape(group)}</h3><dl>{''.join(lines)}</dl></div>" for group, lines in groups.items())
    return f"<div class=meanings>{blocks}</div>"


def _figures(rows: list[Row], count: int, editors: dict[str, int]) -> str:
    """Editor x figure after so many edits, with the unedited encoder on top."""
    order = list(editors)
    shown = [row for row in rows if row["edits"] == count or row["editor"] == BASELINE]
    shown.sort(key=lambda row: order.index(row["editor"]))
    columns = [_column(shown, figure) for figure in FIGURES]
    body = "".join(
        f"<tr{' class=recipe' * (row['editor'] == RECIPE)}><th scope=row>{name_of(row['editor'])}</th>{''.join(cells)}</tr>"
        for row, cells in zip(shown, zip(*columns, strict=True), strict=True)
    )
    table = f"<table class=figures>{_head()}<tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>{_cases(shown)}" if shown else ""


def _head() -> str:
    groups = list(dict.fromkeys(figure.group for figure in FIGURES))
    sizes = {group: sum(figure.group == group for figure in FIGURES) for group in groups}
    top = "".join(f"<th class=group scope=colgroup colspan={sizes[group]}>{escape(group)}</th>" for group in groups)
    names = "".join(
        f'<th scope=col{_start(figure)} title="{escape(figure.meaning)}">{escape(figure.name)}{"&nbsp;↓" * figure.lower}</th>'
        for figure in FIGURES
    )
    return f"<thead><tr><th rowspan=2 scope=col>editor</th>{top}</tr><tr>{names}</tr></thead>"


def _start(figure: Figure) -> str:
    """The class of a group's first column."""
    first = next(other for other in FIGURES if other.group == figure.group)
    return " class=start" * (first is figure)


def _column(rows: Sequence[Row], figure: Figure) -> list[str]:
    """One figure's cells: the value before a bar as long as its share of 1, or of the largest; the best are marked."""
    running = measured_of((row for row in rows if row["editor"] != BASELINE), figure.key)
    best = figure.text((min if figure.lower else max)(running)) if running and figure.key != "undo" else None
    full = 1.0 if figure.text is share else max(measured_of(rows, figure.key), default=0.0) or 1.0
    cells = []
    for row in rows:
        value, classes = value_of(row, figure.key), ["start"] * bool(_start(figure))
        if value is None:
            cells.append(f'<td class="{" ".join([*classes, "none"])}" title="not measured">–</td>')
            continue
        text = figure.text(value)  # ties are ties as they are printed
        classes += ["best"] * (text == best and row["editor"] != BASELINE)
        length = 100 * min(max(value / full, 0.0), 1.0) if figure.key != "undo" else 0.0
        cells.append(f'<td class="{" ".join(classes)}" style="--v:{length:.1f}%"{_case(row, figure)}>{text}</td>')
    return cells


def _case(row: Row, figure: Figure) -> str:
    cases = (row.get("n") or {}).get(figure.key)
    return "" if cases is None else f' title="{escape(str(cases))} cases"'


def _cases(rows: Sequence[Row]) -> str:
    """How many cases stand behind the figures, in one line: figures of the same numbers together."""
    names: dict[str, list[str]] = {}
    for figure in FIGURES:
        cases = sorted({int(n) for row in rows if (n := (row.get("n") or {}).get(figure.key)) is not None})
        if cases:
            span = f"{cases[0]} to {cases[-1]}" if len(cases) > 1 else f"{cases[0]}"
            names.setdefault(span, []).append(f"{figure.group}: {figure.name}")
    if len(names) < 2:
        return "".join(f"<p class=cases>{span} cases behind every figure.</p>" for span in names)
    common, *others = sorted(names, key=lambda span: -len(names[span]))
    but = "; ".join(f"{span} behind {escape(', '.join(names[span]))}" for span in others)
    return f"<p class=cases>{common} cases behind every figure, but {but}.</p>"


def _recipe(rows: Iterable[Row], count: int) -> Row:
    return next((row for row in rows if row["editor"] == RECIPE and row["edits"] == count), {})


def _verdict(value: float | None, wanted: float) -> bool | None:
    return None if value is None else value >= wanted - 1e-9


def _wanted_note(rows: list[Row]) -> str:
    """How many of the wanted figures the default recipe reaches."""
    said = []
    for i, count in enumerate(WANTED_AFTER):
        verdicts = [_verdict(value_of(_recipe(rows, count), key), wanted[i]) for key, _, wanted in WANTED]
        known = [verdict for verdict in verdicts if verdict is not None]
        if known:
            said.append(f"{sum(known)} of {len(known)} after {count} edit{'s' * (count != 1)}")
    return f"What the default recipe, <code>{RECIPE}</code>, should reach" + (
        f": it does in {_listed(said)}." if said else "."
    )


def _wanted(rows: list[Row]) -> str:
    if not any(row["editor"] == RECIPE for row in rows):
        return ""
    top = "".join(
        f"<th class=group scope=colgroup colspan=3>{escape(_after(count).lower())}</th>" for count in WANTED_AFTER
    )
    names = "<th class=start>wanted</th><th>measured</th><th></th>" * len(WANTED_AFTER)
    body = []
    for key, name, wanted in WANTED:
        cells = "".join(
            _wanted_cells(value_of(_recipe(rows, count), key), least)
            for count, least in zip(WANTED_AFTER, wanted, strict=True)
        )
        body.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    head = f"<thead><tr><th rowspan=2 scope=col>figure</th>{top}</tr><tr>{names}</tr></thead>"
    table = f'<table class="figures wanted">{head}<tbody>{"".join(body)}</tbody></table>'
    return f"<div class=scroll>{table}</div>"


def _wanted_cells(value: float | None, least: float) -> str:
    verdict = _verdict(value, least)
    words = {True: "<span class=pass>✓ pass</span>", False: "<span class=miss>✗ miss</span>", None: "not measured"}
    measured = "–" if value is None else share(value)
    return f"<td class=start>{least:.0%}</td><td>{measured}</td><td class=verdict>{words[verdict]}</td>"


def _rounding(rows: list[Row]) -> str:
    head = ["editor", "of the shift lost", "answered, as a side branch", "answered, merged"]
    cells = [[row["editor"], *(share(row[key]) for key in ("lost", "side_branch", "merged"))] for row in rows]
    return html_table(head, cells) if rows else ""


def _settings(setup: dict[str, Any]) -> str:
    rows = [[str(k), v if isinstance(v, str) else json.dumps(v, default=str)] for k, v in setup.items()]
    table = html_table(["", ""], rows)
    return f"<details><summary>everything needed to do it again</summary>{table}</details>" if rows else ""


def _norms(norms: dict[str, dict[str, float]], editors: dict[str, int]) -> str:
    """Per editor one bar for each layer, in the order of the layers."""
    parts = []
    for editor, colour in editors.items():
        layers = norms.get(editor)
        if not layers:
            continue
        largest = max(layers.values()) or 1.0
        bars = "".join(
            f"<span>{escape(name.removeprefix('layers.'))}</span>"
            f"<div><i style='width:{70 * layers[name] / largest:.1f}%'></i><b>{layers[name]:.4f}</b></div>"
            for name in sorted(layers, key=_layer)
        )
        parts.append(f'<div class="norms s{colour}"><h3>{name_of(editor)}</h3><div class=bars>{bars}</div></div>')
    return f"<div class=editors>{''.join(parts)}</div>" if parts else ""


def _layer(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 3 before layer 12."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _images(images: Iterable[Row]) -> str:
    """Pairs before and after, together where the prompt and what is wanted are the same."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in images:
        prompt, wanted = str(entry["prompt"]), str(entry["wanted"])
        before = img(entry["before"], "", f"before: {prompt}")
        after = img(entry["after"], "", f"after, by {entry['editor']}: {prompt}")
        pair = f"<div class=pair>{before}<span aria-hidden=true>→</span>{after}</div>"
        figure = f"<figure><h4>{name_of(entry['editor'])}</h4>{pair}</figure>"
        groups.setdefault((prompt, wanted), []).append(figure)
    return "".join(
        f"<article><h3>{escape(prompt)}</h3><p class=note>wanted: {escape(wanted)}</p>"
        f"<div class=pairs>{''.join(pairs)}</div></article>"
        for (prompt, wanted), pairs in groups.items()
    )
