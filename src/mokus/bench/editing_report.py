"""The benchmark of knowledge editors as one self-contained HTML page: tables, charts and images, nothing loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mokus.files import write as write_file
from mokus.report import _PAGE, _image, _section, _table

Row = dict[str, Any]

BASELINE, RECIPE = "unedited", "least_drift"
EDITORS = [BASELINE, RECIPE, "ultraedit", "alphaedit", "memit", "rome", "finetune", "finetune_lora", "rewrite"]
COLOURS = 9  # .s0 to .s8 in the style sheet, with a marker each; .s0 is the baseline's


# --- the figures ------------------------------------------------------------------------------------------------------


def _share(value: float) -> str:
    return f"{value:.1%}"


def _drift(value: float) -> str:
    return f"{value:.3f}"


def _yes(value: float) -> str:
    return "yes" if value else "no"


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


@dataclass(frozen=True)
class Figure:
    """A column of the tables: its key in the rows, two lines of heading, and what it means in plain words."""

    key: str
    group: str
    name: str
    meaning: str
    text: Callable[[float], str] = _share
    lower: bool = False  # is lower better?


FIGURES = [
    Figure("efficacy", "the edit", "efficacy", "the edited question itself, greedy answer"),
    Figure("generality_questions", "the edit", "other questions", "generality: questions of forms never edited"),
    Figure("generality_prompts", "the edit", "image prompts", "generality: image prompts of forms never edited"),
    Figure("retention", "the edit", "retention", "all earlier edits, asked again after the last one"),
    Figure("locality_facts", "locality", "other facts", "other facts are answered as before"),
    Figure("locality_captions", "locality", "captions", "captions are answered as before"),
    Figure("locality_near_miss", "locality", "near misses", "near-misses of the edited phrase are answered as before"),
    Figure("one_hop", "reach", "one hop", "asked for its colour or shape, the edited phrase has the new answer's"),
    Figure(
        "probe_first",
        "reach",
        "probe, first",
        "a linear probe reads the new answer's colour (first word) off the encoding",
    ),
    Figure(
        "probe_later",
        "reach",
        "probe, later",
        "a linear probe reads the new answer's shape (later word) off the encoding",
    ),
    Figure("image_efficacy", "images", "new answer", "the oracle sees the new answer in the image"),
    Figure("image_near_miss", "images", "near misses", "images of near-misses that the edit did not hijack"),
    Figure("image_unrelated", "images", "unrelated", "images of unrelated prompts that keep what they show"),
    Figure("conditioning_drift", "cost", "drift", "movement of other prompts' encodings", _drift, True),
    Figure("undo", "cost", "undo", "undone, the encoder is restored bit for bit", _yes),
    Figure("seconds_per_edit", "cost", "time per edit", "time that one edit takes", _seconds, True),
    Figure("bytes_per_edit", "cost", "size per edit", "what one edit adds to what is stored", _bytes, True),
]
BY_KEY = {figure.key: figure for figure in FIGURES}
CAPACITY = {
    "efficacy": "Efficacy of the last edits",
    "retention": "Retention of all edits",
    "generality_prompts": "Generality: image prompts",
    "locality_facts": "Locality: other facts",
    "locality_near_miss": "Locality: near misses",
    "image_efficacy": "Images: the new answer is seen",
    "conditioning_drift": "Drift of other encodings (lower is better)",
}
STEP_SIZE = {
    "efficacy": "Efficacy",
    "generality_prompts": "Generality: image prompts",
    "locality_near_miss": "Locality: near misses",
}
WANTED_AFTER = (1, 100)
WANTED = [
    ("efficacy", "efficacy", (0.99, 0.97)),
    ("retention", "retention: all earlier edits", (0.99, 0.97)),
    ("generality_questions", "generality: questions", (0.97, 0.95)),
    ("generality_prompts", "generality: image prompts", (0.97, 0.95)),
    ("locality_facts", "locality: other facts", (0.99, 0.97)),
    ("locality_captions", "locality: captions", (0.99, 0.97)),
    ("locality_near_miss", "locality: near misses", (0.95, 0.90)),
    ("image_efficacy", "images, relative to direct captions", (0.95, 0.90)),
]


# --- the page ---------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: list[Row], extra: dict[str, Any], setup: dict[str, Any]) -> Path:
    """Write `report.html` into a folder, all of it or nothing; returns its path."""
    return write_file(folder / "report.html", page(rows, extra, setup))


def page(rows: list[Row], extra: dict[str, Any], setup: dict[str, Any]) -> str:
    """The whole page."""
    editors = _editors(rows, extra)
    return _PAGE.format(
        title="MoKus: knowledge editors compared",
        subtitle=_subtitle(rows),
        body="\n".join(
            _section(title, note, content) for title, note, content in _sections(rows, extra, setup, editors) if content
        ),
        style=files("mokus").joinpath("report.css").read_text(encoding="utf-8"),
    )


def _subtitle(rows: list[Row]) -> str:
    editors, counts = len({row["editor"] for row in rows} - {BASELINE}), _counts(rows)
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
        for first, count in zip([True] + [False] * len(rows), _counts(rows), strict=False)
    ]
    return [
        ("What the figures mean", "Shares of cases, of which more is better, but for the cost.", _meanings()),
        *tables,
        ("Wanted", _wanted_note(rows), _wanted(rows)),
        ("Capacity", "What is left as edits are made one after the other.", _capacity(rows, editors)),
        ("Step size", "The same edits with a smaller or a larger step.", _step_size(extra, editors)),
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


def _counts(rows: Iterable[Row]) -> list[int]:
    """The numbers of edits after which something was measured."""
    return sorted({int(row["edits"]) for row in rows} - {0}) or [0]


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


def _value(row: Row, key: str) -> float | None:
    """A figure of a row; None if it was not measured."""
    value = row.get(key)
    return None if value is None or math.isnan(value) else float(value)


def _measured(rows: Iterable[Row], key: str) -> list[float]:
    return [value for row in rows if (value := _value(row, key)) is not None]


# --- tables -----------------------------------------------------------------------------------------------------------


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
        f"<tr{' class=recipe' * (row['editor'] == RECIPE)}><th scope=row>{_name(row['editor'])}</th>{''.join(cells)}</tr>"
        for row, cells in zip(shown, zip(*columns, strict=True), strict=True)
    )
    table = f"<table class=figures>{_head()}<tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>{_cases(shown)}" if shown else ""


def _name(editor: str) -> str:
    return escape(editor) + " <small>default</small>" * (editor == RECIPE)


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
    running = _measured((row for row in rows if row["editor"] != BASELINE), figure.key)
    best = figure.text((min if figure.lower else max)(running)) if running and figure.key != "undo" else None
    full = 1.0 if figure.text is _share else max(_measured(rows, figure.key), default=0.0) or 1.0
    cells = []
    for row in rows:
        value, classes = _value(row, figure.key), ["start"] * bool(_start(figure))
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
        verdicts = [_verdict(_value(_recipe(rows, count), key), wanted[i]) for key, _, wanted in WANTED]
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
            _wanted_cells(_value(_recipe(rows, count), key), least)
            for count, least in zip(WANTED_AFTER, wanted, strict=True)
        )
        body.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    head = f"<thead><tr><th rowspan=2 scope=col>figure</th>{top}</tr><tr>{names}</tr></thead>"
    table = f'<table class="figures wanted">{head}<tbody>{"".join(body)}</tbody></table>'
    return f"<div class=scroll>{table}</div>"


def _wanted_cells(value: float | None, least: float) -> str:
    verdict = _verdict(value, least)
    words = {True: "<span class=pass>✓ pass</span>", False: "<span class=miss>✗ miss</span>", None: "not measured"}
    measured = "–" if value is None else _share(value)
    return f"<td class=start>{least:.0%}</td><td>{measured}</td><td class=verdict>{words[verdict]}</td>"


def _rounding(rows: list[Row]) -> str:
    head = ["editor", "of the shift lost", "answered, as a side branch", "answered, merged"]
    cells = [[row["editor"], *(_share(row[key]) for key in ("lost", "side_branch", "merged"))] for row in rows]
    return _table(head, cells) if rows else ""


def _settings(setup: dict[str, Any]) -> str:
    rows = [[str(k), v if isinstance(v, str) else json.dumps(v, default=str)] for k, v in setup.items()]
    table = _table(["", ""], rows)
    return f"<details><summary>everything needed to do it again</summary>{table}</details>" if rows else ""


# --- charts -----------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 236, 40, 284, 12, 210
_GAP = 12.5  # between labels at the right
_MARKERS = [  # around (0, 0), one per colour: what is told apart by colour is told apart by shape as well
    "",
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.4 -3.4h6.8v6.8h-6.8z",
    "M0 -4.4L4.2 3.2H-4.2z",
    "M0 -4.8L4.4 0L0 4.8L-4.4 0z",
    "M0 4.4L4.2 -3.2H-4.2z",
    "M-1.4 -4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
    "M-4.4 0L3.2 -4.2V4.2z",
    "M4.4 0L-3.2 -4.2V4.2z",
]


@dataclass
class Chart:
    """Lines over a common x: points by editor, what the axes hold and how values are written."""

    title: str
    x_name: str
    lines: dict[str, list[tuple[float, float]]]
    logarithmic: bool
    text: Callable[[float], str] = _share
    top: float = 1.0
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ticks = self.ticks or sorted({x for points in self.lines.values() for x, _ in points})

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn; a single x is in the middle."""
        scale = math.log if self.logarithmic else float
        first, last = scale(self.ticks[0]), scale(self.ticks[-1])
        share = (scale(x) - first) / (last - first) if last > first else 0.5
        inner, right = _LEFT + 12, _RIGHT - 8
        return inner + share * (right - inner), _BOTTOM - (_BOTTOM - _TOP) * min(max(y / self.top, 0.0), 1.0)


def _charts(charts: Iterable[Chart], editors: dict[str, int]) -> str:
    """All charts that have something to show, below one legend."""
    some = [chart for chart in charts if chart.lines]
    shown = {editor: colour for editor, colour in editors.items() if any(editor in chart.lines for chart in some)}
    drawn = "".join(_drawn(chart, editors) for chart in some)
    return f"{_legend(shown)}<div class=charts>{drawn}</div>" if some else ""


def _drawn(chart: Chart, editors: dict[str, int]) -> str:
    order = [editor for editor in editors if chart.lines.get(editor)]
    order.sort(key=lambda editor: editor == RECIPE)  # the recipe on top
    lines = "".join(_line(chart, editor, editors[editor]) for editor in order)
    label = f"{escape(chart.title)} by {escape(chart.x_name)}"
    svg = f'<svg class=chart viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">'
    return f"<figure><h4>{escape(chart.title)}</h4>{svg}{_axes(chart)}{lines}{_labels(chart, editors, order)}</svg></figure>"


def _axes(chart: Chart) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = chart.at(chart.ticks[0], share * chart.top)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>')
        if share in (0.0, 0.5, 1.0):
            text = f"{share:.0%}" if chart.text is _share else f"{share * chart.top:.3g}"
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor=end>{text}</text>')
    reached = -math.inf
    for tick in chart.ticks:
        x, text = chart.at(tick, 0.0)[0], f"{tick:g}"
        half = 3.2 * len(text) + 2
        parts.append(f'<line x1="{x:.1f}" y1="{_BOTTOM}" x2="{x:.1f}" y2="{_BOTTOM + 4}"/>')
        if x - half > reached:  # labels that would overlap are left out
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 17}" text-anchor=middle>{text}</text>')
            reached = x + half
    parts.append(f'<text x="{_RIGHT + 14}" y="{_BOTTOM + 17}">{escape(chart.x_name)}</text>')
    return "".join(parts)


def _line(chart: Chart, editor: str, colour: int) -> str:
    points = sorted(chart.lines[editor])
    at = [chart.at(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    marks = "".join(
        f'<path transform="translate({x:.1f} {y:.1f})" d="{_MARKERS[colour]}">'
        f"<title>{escape(editor)}, {point[0]:g} {escape(chart.x_name)}: {chart.text(point[1])}</title></path>"
        for (x, y), point in zip(at, points, strict=True)
    )
    return f'<g class="s{colour}{" recipe" * (editor == RECIPE)}"><polyline points="{path}"/>{marks}</g>'


def _labels(chart: Chart, editors: dict[str, int], order: Sequence[str]) -> str:
    """Every line's name beside its end, moved apart where ends are close."""
    ends = {editor: chart.at(*max(chart.lines[editor])) for editor in order}
    names = sorted(order, key=lambda editor: (ends[editor][1], editors[editor]))
    heights = _apart([ends[editor][1] for editor in names], _TOP - 4, _BOTTOM)
    parts = []
    for editor, height in zip(names, heights, strict=True):
        x, y = ends[editor]
        kind = f"s{editors[editor]}{' recipe' * (editor == RECIPE)}"
        short = editor if len(editor) <= 14 else f"{editor[:13]}…"
        parts.append(
            f'<g class="label {kind}"><polyline points="{x + 6:.1f},{y:.1f} {_RIGHT + 10},{height:.1f}"/>'
            f'<text x="{_RIGHT + 14}" y="{height + 3.8:.1f}">{escape(short)}</text></g>'
        )
    return "".join(parts)


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Sorted heights, moved down and then up until they are `_GAP` apart and above the bottom."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _GAP if placed else top))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], placed[i + 1] - _GAP if i + 1 < len(placed) else bottom)
    return placed


def _legend(editors: dict[str, int]) -> str:
    entries = "".join(
        f'<span><svg viewBox="-13 -7 26 14" aria-hidden=true><g class="s{colour}{" recipe" * (editor == RECIPE)}">'
        f'<polyline points="-13,0 13,0"/><path d="{_MARKERS[colour]}"/></g></svg>{escape(editor)}</span>'
        for editor, colour in editors.items()
    )
    return f"<div class=legend>{entries}</div>"


def _capacity(rows: list[Row], editors: dict[str, int]) -> str:
    counts = _counts(rows)
    if counts == [0]:
        return ""
    charts = []
    for key, title in CAPACITY.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = _value(row, key)
            if value is not None:  # what was measured before any edit is a level to compare with
                lines.setdefault(row["editor"], []).extend(
                    (float(x), value) for x in ([row["edits"]] if row["edits"] else counts)
                )
        drift = BY_KEY[key].text is not _share
        top = _rounded_up(max(_measured(rows, key), default=0.0)) if drift else 1.0
        charts.append(Chart(title, "edits", lines, True, BY_KEY[key].text, top, [float(count) for count in counts]))
    return _charts(charts, editors)


def _rounded_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 6 or 8 times a power of ten: halves of it are short to write."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next((step for step in (1, 1.5, 2, 3, 4, 6, 8) if value <= step * power * (1 + 1e-9)), 10)


def _step_size(extra: dict[str, Any], editors: dict[str, int]) -> str:
    points = extra.get("eta") or []
    etas = [point["eta"] for point in points]
    logarithmic = bool(etas) and min(etas) > 0 and max(etas) / min(etas) >= 8
    charts = []
    for key, title in STEP_SIZE.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            value = _value(point, key)
            if value is not None:
                lines.setdefault(point["editor"], []).append((float(point["eta"]), value))
        charts.append(Chart(title, "step size", lines, logarithmic))
    return _charts(charts, editors)


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
        parts.append(f'<div class="norms s{colour}"><h3>{_name(editor)}</h3><div class=bars>{bars}</div></div>')
    return f"<div class=editors>{''.join(parts)}</div>" if parts else ""


def _layer(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 3 before layer 12."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


# --- images -----------------------------------------------------------------------------------------------------------


def _images(images: Iterable[Row]) -> str:
    """Pairs before and after, together where the prompt and what is wanted are the same."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in images:
        prompt, wanted = str(entry["prompt"]), str(entry["wanted"])
        before = _image(entry["before"], "", f"before: {prompt}")
        after = _image(entry["after"], "", f"after, by {entry['editor']}: {prompt}")
        pair = f"<div class=pair>{before}<span aria-hidden=true>→</span>{after}</div>"
        figure = f"<figure><h4>{_name(entry['editor'])}</h4>{pair}</figure>"
        groups.setdefault((prompt, wanted), []).append(figure)
    return "".join(
        f"<article><h3>{escape(prompt)}</h3><p class=note>wanted: {escape(wanted)}</p>"
        f"<div class=pairs>{''.join(pairs)}</div></article>"
        for (prompt, wanted), pairs in groups.items()
    )
