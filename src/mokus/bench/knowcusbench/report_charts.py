"""Figures with their intervals as inline SVG: points beside each other, or joined to lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mokus.bench.bootstrap import Interval
from mokus.bench.editing.charts import MARKERS
from mokus.bench.knowcusbench.aggregate import Column, share

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 236, 44, 374, 12, 202
_APART = 11.0  # at most, between points of the same place


@dataclass(frozen=True)
class Point:
    """A figure and its interval, if it has one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """A name, its colour (.s0 to .s8 of the style sheet, with a marker each), and a point for every place, or none."""

    name: str
    colour: int
    points: Sequence[Point | None]


@dataclass(frozen=True)
class Chart:
    """Series over places that are named below; `joined` if the places have an order."""

    title: str
    column: Column
    places: Sequence[str]
    series: Sequence[Series]
    joined: bool = False
    below: str = ""  # what the places are

    def svg(self) -> str:
        """All of it, with its title above."""
        low, high, ticks = self._scale()
        drawn = "".join(self._series(i, low, high) for i in range(len(self.series)))
        label = escape(f"{self.title} by {self.below or ', '.join(self.places)}")
        axes = "".join(self._axes(low, high, ticks))
        svg = f'<svg class=chart viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">{axes}{drawn}</svg>'
        return f"<figure><h4>{escape(self.title)}</h4>{svg}</figure>"

    def _scale(self) -> tuple[float, float, list[float]]:
        """Where the vertical axis begins and ends, and its ticks; that of shares is always the same."""
        if self.column.text is share:
            return 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]
        points = [point for line in self.series for point in line.points if point]
        ends = [end for point in points for end in (point.interval or ()) + (point.value,)]
        low, high = min(ends, default=0.0), max(ends, default=1.0)
        step = _round(max(high - low, 0.004) / 4)
        first, last = math.floor(low / step), math.ceil(high / step)
        last = max(last, first + 1)
        return first * step, last * step, [i * step for i in range(first, last + 1)]

    def _axes(self, low: float, high: float, ticks: Sequence[float]) -> Iterator[str]:
        for tick in ticks:
            y = _height(tick, low, high)
            text = f"{tick:.0%}" if self.column.text is share else f"{tick:.4g}"
            yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>'
            yield f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor=end>{text}</text>'
        for i, place in enumerate(self.places):
            yield f'<text x="{self._middle(i):.1f}" y="{_BOTTOM + 16}" text-anchor=middle>{escape(place)}</text>'
        if self.below:
            yield f'<text x="{_RIGHT}" y="{_BOTTOM + 31}" text-anchor=end>{escape(self.below)}</text>'

    def _middle(self, place: int) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (place + 0.5) / len(self.places)

    def _series(self, number: int, low: float, high: float) -> str:
        line = self.series[number]
        apart = min(_APART, 0.9 * (_RIGHT - _LEFT) / len(self.places) / len(self.series))
        aside = 0.0 if self.joined else apart * (number - (len(self.series) - 1) / 2)
        marks, path = [], []
        for i, (place, point) in enumerate(zip(self.places, line.points, strict=True)):
            if point is None:
                continue
            x, y = self._middle(i) + aside, _height(point.value, low, high)
            path.append(f"{x:.1f},{y:.1f}")
            between = ""
            if point.interval:
                bottom, top = (_height(end, low, high) for end in point.interval)
                marks.append(f'<line class=bar x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{top:.1f}"/>')
                between = f" ({' to '.join(map(self.column.text, point.interval))})"
            told = escape(f"{line.name}, {place}: {self.column.text(point.value)}{between}")
            mark = (
                f'<path transform="translate({x:.1f} {y:.1f})" d="{_marker(line.colour)}"><title>{told}</title></path>'
            )
            marks.append(mark)
        joined = f'<polyline points="{" ".join(path)}"/>' if self.joined else ""
        return f"<g class=s{line.colour}>{joined}{''.join(marks)}</g>"


def charts(several: Sequence[Chart]) -> str:
    """Charts below one legend; no legend where there is nothing to tell apart."""
    names = {line.name: line.colour for chart in several for line in chart.series}
    legend = "".join(
        f'<span><svg viewBox="-8 -7 16 14" aria-hidden=true><g class=s{colour}><path d="{_marker(colour)}"/></g></svg>'
        f"{escape(name)}</span>"
        for name, colour in names.items()
    )
    above = f'<div class="legend points">{legend}</div>' if len(names) > 1 else ""
    return f"{above}<div class=charts>{''.join(chart.svg() for chart in several)}</div>" if several else ""


def _marker(colour: int) -> str:
    return MARKERS[colour] or "M-4 -1.2h8v2.4h-8z"  # the baseline, which is a line elsewhere


def _height(value: float, low: float, high: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(max((value - low) / (high - low), 0.0), 1.0)


def _round(step: float) -> float:
    """The next of 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in (1, 2, 2.5, 5, 10) if step <= nice * power * (1 + 1e-9))
