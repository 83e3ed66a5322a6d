"""Lines over the number of edits and over step sizes, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mokus.bench.editing.figures import (
    BY_KEY,
    CAPACITY,
    RECIPE,
    STEP_SIZE,
    counts_of,
    measured_of,
    share,
    value_of,
)
from mokus.bench.editing.measure import Row

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 236, 40, 284, 12, 210
_GAP = 12.5  # between labels at the right
MARKERS = [  # around (0, 0), one per colour: what is told apart by colour is told apart by shape as well
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
    text: Callable[[float], str] = share
    top: float = 1.0
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ticks = self.ticks or sorted({x for points in self.lines.values() for x, _ in points})

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn; a single x is in the middle."""
        scale = math.log if self.logarithmic else float
        first, last = scale(self.ticks[0]), scale(self.ticks[-1])
        along = (scale(x) - first) / (last - first) if last > first else 0.5
        inner, right = _LEFT + 12, _RIGHT - 8
        return inner + along * (right - inner), _BOTTOM - (_BOTTOM - _TOP) * min(max(y / self.top, 0.0), 1.0)


def drawn_charts(charts: Iterable[Chart], editors: dict[str, int]) -> str:
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
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = chart.at(chart.ticks[0], part * chart.top)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>')
        if part in (0.0, 0.5, 1.0):
            text = f"{part:.0%}" if chart.text is share else f"{part * chart.top:.3g}"
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
        f'<path transform="translate({x:.1f} {y:.1f})" d="{MARKERS[colour]}">'
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
        f'<polyline points="-13,0 13,0"/><path d="{MARKERS[colour]}"/></g></svg>{escape(editor)}</span>'
        for editor, colour in editors.items()
    )
    return f"<div class=legend>{entries}</div>"


def capacity(rows: list[Row], editors: dict[str, int]) -> str:
    """The main figures over the number of edits."""
    counts = counts_of(rows)
    if counts == [0]:
        return ""
    charts = []
    for key, title in CAPACITY.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = value_of(row, key)
            if value is not None:  # what was measured before any edit is a level to compare with
                lines.setdefault(row["editor"], []).extend(
                    (float(x), value) for x in ([row["edits"]] if row["edits"] else counts)
                )
        drift = BY_KEY[key].text is not share
        top = _rounded_up(max(measured_of(rows, key), default=0.0)) if drift else 1.0
        charts.append(Chart(title, "edits", lines, True, BY_KEY[key].text, top, [float(count) for count in counts]))
    return drawn_charts(charts, editors)


def _rounded_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 6 or 8 times a power of ten: halves of it are short to write."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next((step for step in (1, 1.5, 2, 3, 4, 6, 8) if value <= step * power * (1 + 1e-9)), 10)


def step_size(extra: dict[str, Any], editors: dict[str, int]) -> str:
    """Figures over the step size of an editor that has one."""
    points = extra.get("eta") or []
    etas = [point["eta"] for point in points]
    logarithmic = bool(etas) and min(etas) > 0 and max(etas) / min(etas) >= 8
    charts = []
    for key, title in STEP_SIZE.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            value = value_of(point, key)
            if value is not None:
                lines.setdefault(point["editor"], []).append((float(point["eta"]), value))
        charts.append(Chart(title, "step size", lines, logarithmic))
    return drawn_charts(charts, editors)
