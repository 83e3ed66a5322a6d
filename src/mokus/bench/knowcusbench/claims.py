"""What a run bears out of what is claimed, each claim with the figures that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mokus.bench.knowcusbench import paper
from mokus.bench.knowcusbench.aggregate import BY_KEY, KINDS, Column, Row, Run, difference, seconds, share

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not measured"
OF_CEILING, FLAT, FASTER = 0.03, 0.02, 4.0
FEWEST, MOST = 1, 20  # pieces of knowledge

Part = tuple[bool | None, str]  # whether it is so (None: not measured), and the figures in words


def claims(run: Run) -> list[Row]:
    """[{"claim", "verdict", "figures": [{"holds": true, false or null, "text"}]}]: one holds if all its parts do."""
    fidelity = run.fidelity
    told = [
        (f"mokus is within {fidelity.size(OF_CEILING)} of anchor, the ceiling, on {fidelity.name}", _near_anchor(run)),
        ("mokus is ahead of enc-ft and of mokus-paper on every column", _ahead(run)),
        (
            f"mokus is no worse than naive-db on {fidelity.name}, within the interval, and trains at least {FASTER:g} times "
            "as fast for all the knowledge of a concept",
            [*_no_worse(run), _faster(run)],
        ),
        (
            f"mokus is flat, within {fidelity.size(FLAT)} on {fidelity.name}, from {FEWEST} to {MOST} pieces of knowledge",
            _flat(run),
        ),
        (
            f"any two methods of the paper's table ({paper.SOURCE}) are in the same order here in each of its columns",
            _as_in_the_paper(run),
        ),
    ]
    return [_claim(text, list(parts)) for text, parts in told]


def _claim(text: str, parts: list[Part]) -> Row:
    known = [holds for holds, _ in parts]
    verdict = FAILS if False in known else HOLDS if known and None not in known else UNKNOWN
    return {"claim": text, "verdict": verdict, "figures": [{"holds": holds, "text": text} for holds, text in parts]}


def in_words(row: Row, column: Column) -> str:
    """A difference and its interval."""
    points = " points" if column.text is share else ""
    between = f" [{', '.join(map(column.difference, row['interval']))}]" if row["interval"] else ""
    return f"{column.difference(row['mean'])}{points}{between}"


def _compared(run: Run, method: str, reference: str, kind: str, column: Column) -> tuple[Row | None, str]:
    """The difference, if there is one, and all of it in words."""
    row = difference(run, method, reference, kind, column.key)
    where = f"{kind}, {column.name}: {method} - {reference}"
    if row["mean"] is None:
        return None, f"{where} has no images in common"
    return row, f"{where} is {in_words(row, column)}, {row['pairs']:,} pairs of {row['concepts']} concepts"


def _near_anchor(run: Run) -> Iterator[Part]:
    for kind in KINDS:
        row, text = _compared(run, "mokus", "anchor", kind, run.fidelity)
        yield (row["mean"] >= -OF_CEILING - 1e-12 if row else None), text


def _ahead(run: Run) -> Iterator[Part]:
    for reference in ("enc-ft", "mokus-paper"):
        columns = [(kind, column) for kind in KINDS for column in run.columns(kind)]
        if not columns or reference not in run.methods or "mokus" not in run.methods:
            yield None, f"mokus and {reference} were not both scored"
        for kind, column in columns if {reference, "mokus"} <= set(run.methods) else []:
            row, text = _compared(run, "mokus", reference, kind, column)
            yield (row["mean"] > 0 if row else None), text


def _no_worse(run: Run) -> Iterator[Part]:
    for kind in KINDS:
        row, text = _compared(run, "mokus", "naive-db", kind, run.fidelity)
        # of one concept there is no interval: then the means decide
        yield ((row["interval"] or (row["mean"],) * 2)[1] >= 0 if row else None), text


def _faster(run: Run) -> Part:
    ours, theirs = (seconds(run, method, "learn", "bind") for method in ("mokus", "naive-db"))
    both = sorted(ours.keys() & theirs.keys())
    mine, other = (sum(of[concept][0] for concept in both) / max(1, len(both)) for of in (ours, theirs))
    if not (mine and other):
        return None, "training: no concept has both the time of mokus and that of naive-db"
    pieces = {row["knowledge"] for row in run.training if row["method"] == "mokus" and row["concept"] in both}
    return other / mine >= FASTER, (
        f"training: mokus takes {mine:.1f} s, naive-db {other:.1f} s, {other / mine:.1f} times as long, for "
        f"{' or '.join(map(str, sorted(pieces)))} pieces of knowledge; means of {len(both)} concepts"
    )


def _flat(run: Run) -> Iterator[Part]:
    rows = [row for sweep in run.sweeps if sweep["name"].startswith("knowledge") for row in sweep["rows"]]
    found = False
    for name in dict.fromkeys(name for row in rows for name in row["figures"] if name.split()[-1] == run.fidelity.key):
        points = {float(row["value"]): row["figures"][name] for row in rows if row["figures"].get(name) is not None}
        points = {count: value for count, value in points.items() if FEWEST <= count <= MOST}
        if not points:
            continue
        found = True
        yield _level(name, points, run.fidelity)
    if not found:
        yield None, "there is no sweep over the number of pieces of knowledge"


def _level(name: str, points: dict[float, float], column: Column) -> Part:
    low, high = (choose(points, key=points.__getitem__) for choose in (min, max))
    close = points[high] - points[low] <= FLAT + 1e-12
    whole = min(points) <= FEWEST and max(points) >= MOST
    covered = "" if whole else f", measured from {min(points):g} to {max(points):g} alone"
    return (close if whole or not close else None), (
        f"{titled(name)}: lowest {column.text(points[low])} at {low:g}, highest {column.text(points[high])} at {high:g}{covered}"
    )


def titled(name: str) -> str:
    """The name of a figure in a sweep, "clip_i" or "generation clip_i", as it is shown."""
    *kind, key = name.split()
    return ", ".join([*kind, BY_KEY[key].name if key in BY_KEY else key.replace("_", ", ")])


def _as_in_the_paper(run: Run) -> Iterator[Part]:
    """Of every two methods and column of the paper's table: is the better one better here?"""
    found = False
    for better, worse, heading in _orders():
        row, text = _compared(run, better, worse, heading.kind, BY_KEY[heading.column])
        if row:
            found = True
            yield row["mean"] > 0, text
    if not found:
        yield None, "no two methods of the paper's table were scored in one of its columns"


def _orders() -> Iterable[tuple[str, str, Any]]:
    for heading in paper.HEADINGS:
        for i, one in enumerate(paper.TABLE):
            for other in paper.TABLE[i + 1 :]:
                first, second = sorted((one, other), key=lambda line: -line.figure(heading))
                yield first.method, second.method, heading
