"""What a report is made of, each part as HTML and as Markdown; all text is escaped here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Protocol


class Part(Protocol):
    """Of a section."""

    def html(self) -> str:
        """For the page."""

    def markdown(self) -> str:
        """For the text; empty if only a page can show it."""


@dataclass(frozen=True)
class Section:
    """A heading, a note in plain text, and parts; one without parts is left out."""

    title: str
    note: str
    parts: Sequence[Part]

    def html(self) -> str:
        """A card of the page."""
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        return f"<section><h2>{escape(self.title)}</h2>{note}{''.join(part.html() for part in self.parts)}</section>"

    def markdown(self) -> str:
        """With an empty line between all parts."""
        parts = [f"## {plain(self.title)}", plain(self.note), *(part.markdown() for part in self.parts)]
        return "\n\n".join(filter(None, parts))


# What Markdown would take for more than text. A bracket matters before what a link needs, "_" at the edge of a word.
_SIGNS = re.compile(r"([\\`*<>#|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|&(?=#?\w+;))")


def plain(text: str) -> str:
    """Text of which Markdown makes nothing but text, on one line."""
    return _SIGNS.sub(r"\\\1", " ".join(text.split()))


@dataclass(frozen=True)
class Cell:
    """A figure, and below it, smaller, what it is worth."""

    text: str
    small: str = ""
    strong: bool = False
    title: str = ""  # what hovering says


NARROW = 9  # columns, up to which a table is not stretched
NONE = Cell("–", title="not measured")


@dataclass(frozen=True)
class Table:
    """Rows of figures below groups of columns."""

    corner: str
    groups: Sequence[tuple[str, Sequence[str]]]  # name, its columns
    rows: Sequence[tuple[str, Sequence[Cell]]]  # name, one cell for every column
    lit: str = ""  # the row that stands out
    folded: str = ""  # what to click on to see it

    def html(self) -> str:
        """Figures at the right of their columns, the rows' names always in sight."""
        body = "".join(
            f"<tr{' class=recipe' * (name == self.lit)}><th scope=row>{escape(name)}</th>{self._cells(cells)}</tr>"
            for name, cells in self.rows
        )
        kind = "figures narrow" if sum(len(names) for _, names in self.groups) <= NARROW else "figures"
        table = f'<div class=scroll><table class="{kind}">{self._head()}<tbody>{body}</tbody></table></div>'
        return f"<details><summary>{escape(self.folded)}</summary>{table}</details>" if self.folded else table

    def _head(self) -> str:
        top = "".join(
            f"<th class=group scope=colgroup colspan={len(names)}>{escape(group)}</th>" for group, names in self.groups
        )
        names = "".join(
            f"<th scope=col{' class=start' * (i == 0)}>{escape(name)}</th>"
            for _, names in self.groups
            for i, name in enumerate(names)
        )
        corner = f"<th rowspan=2 scope=col>{escape(self.corner)}</th>"
        if not any(group for group, _ in self.groups):
            return f"<thead><tr>{corner}{names}</tr></thead>"
        return f"<thead><tr>{corner}{top}</tr><tr>{names}</tr></thead>"

    def _cells(self, cells: Sequence[Cell]) -> str:
        starts = {sum(len(names) for _, names in self.groups[:i]) for i in range(len(self.groups))}
        return "".join(_cell(cell, i in starts) for i, cell in enumerate(cells))

    def markdown(self) -> str:
        """One table for each group, since text is narrow."""
        tables, at = [], 0
        for group, names in self.groups:
            head = [f"{self.corner} ({group})" if group and len(self.groups) > 1 else self.corner, *names]
            rows = [[plain(name), *map(_in_one_line, cells[at : at + len(names)])] for name, cells in self.rows]
            tables.append(_aligned([[plain(name) for name in head], *rows]))
            at += len(names)
        return "\n\n".join([plain(self.folded) + ":"] * bool(self.folded) + tables)


def _cell(cell: Cell, start: bool) -> str:
    classes = " ".join(["start"] * start + ["none"] * (cell.text == NONE.text))
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
    return f'<td class="{classes}"{title}>{text}{small}</td>'


def _in_one_line(cell: Cell) -> str:
    text = plain(f"{cell.text} ({cell.small})" if cell.small else cell.text)
    return f"**{text}**" if cell.strong else text


def _aligned(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are also ones in the source."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


@dataclass(frozen=True)
class Texts:
    """A table of words: at the left what, at the right which."""

    rows: Sequence[tuple[str, str]]
    folded: str = ""

    def html(self) -> str:
        """Words break anywhere rather than widen a phone's page."""
        body = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.rows)
        table = f"<table class=texts><tbody>{body}</tbody></table>"
        return f"<details><summary>{escape(self.folded)}</summary>{table}</details>" if self.folded else table

    def markdown(self) -> str:
        """A list."""
        heading = [plain(self.folded) + ":\n"] * bool(self.folded)
        return "\n".join(heading + [f"- **{plain(name)}**: {plain(text)}" for name, text in self.rows])


@dataclass(frozen=True)
class Lines:
    """A list."""

    lines: Sequence[str]

    def html(self) -> str:
        """In the order given."""
        return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in self.lines)}</ul>"

    def markdown(self) -> str:
        """The same."""
        return "\n".join(f"- {plain(line)}" for line in self.lines)


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it holds, and the figures that say so."""

    claim: str
    verdict: str
    figures: Sequence[tuple[bool | None, str]]

    def html(self) -> str:
        """What is against it first; the rest is folded if it is much."""
        kind = {"holds": "pass", "does not hold": "miss"}.get(self.verdict, "open")
        against = [figure for figure in self.figures if figure[0] is not True]
        rest = [figure for figure in self.figures if figure[0] is True]
        folded = f"<details><summary>{len(rest)} figures that bear it out</summary>{_marked(rest)}</details>"
        shown = _marked(against) + (folded if len(rest) > 4 else _marked(rest))
        heading = f"<h3><span class={kind}>{escape(self.verdict)}</span> {escape(self.claim)}</h3>"
        return f"<article class=claim>{heading}{shown}</article>"

    def markdown(self) -> str:
        """All of it."""
        lines = [f"- {_MARKS[holds]} {plain(text)}" for holds, text in self.figures]
        return "\n".join([f"**{plain(self.verdict)}**: {plain(self.claim)}", "", *lines])


_MARKS = {True: "✓", False: "✗", None: "–"}
_CLASSES = {True: "pass", False: "miss", None: "open"}


def _marked(figures: Sequence[tuple[bool | None, str]]) -> str:
    lines = "".join(f"<li class={_CLASSES[holds]}>{escape(text)}</li>" for holds, text in figures)
    return f"<ul class=marked>{lines}</ul>" if lines else ""


@dataclass(frozen=True)
class Page:
    """What only a page can show: made elsewhere, and escaped there. In Markdown another part stands in its place."""

    made: str = field(repr=False)
    instead: Part | None = None

    def html(self) -> str:
        """As it is."""
        return self.made

    def markdown(self) -> str:
        """The other part, if there is one."""
        return self.instead.markdown() if self.instead else ""
