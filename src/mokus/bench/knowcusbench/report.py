"""The report of a run: results.json, and the same to read as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mokus.bench.bootstrap import RESAMPLES, SEED
from mokus.bench.knowcusbench import paper
from mokus.bench.knowcusbench.aggregate import (
    BY_KEY,
    COLUMNS,
    KINDS,
    Column,
    Row,
    Run,
    aggregate,
    load_run,
)
from mokus.bench.knowcusbench.claims import FAILS, HOLDS, UNKNOWN, claims, titled
from mokus.bench.knowcusbench.methods import METHODS, about
from mokus.bench.knowcusbench.plan import image_file
from mokus.bench.knowcusbench.report_charts import Chart, Point, Series, charts
from mokus.bench.knowcusbench.report_images import grids, worst
from mokus.bench.knowcusbench.report_layout import (
    NONE,
    Cell,
    Lines,
    Page,
    Part,
    Section,
    Table,
    Texts,
    Verdict,
    plain,
)
from mokus.files import write as write_file
from mokus.html import PAGE

OURS = "mokus"
COMPARED = ("mokus", "mokus-paper", "enc-ft", "naive-db")  # in the running; the floor and the ceilings are not
COLOURS = {"base": 0, "mokus": 1, "naive-db": 2, "anchor": 3, "mokus-paper": 4, "rewrite": 5, "enc-ft": 6}
FEW = 8  # concepts, below which a percentile bootstrap's intervals are too narrow to trust
LISTED = 60  # failures; more are counted


def write(folder: Path) -> tuple[Row, list[Path]]:
    """Write results.json, report.md and report.html into a run's folder, each whole or not at all.

    Returns the results and the paths. Nothing of it depends on when it is written, so the same run gives the same bytes.
    Raises `MokusError` if the folder holds no run, or a file that no run writes.
    """
    run = load_run(Path(folder))
    results = aggregate(run) | {"claims": claims(run)}
    sections = [section for section in _sections(run, results) if section.parts]
    title = f"KnowCusBench: {results['suite']}"
    page = PAGE.format(
        title=escape(title), subtitle=escape(_subtitle(run, results)), style=_style(),
        body="\n".join(section.html() for section in sections),
    )  # fmt: skip
    text = [f"# {plain(title)}", plain(_subtitle(run, results)), *(section.markdown() for section in sections)]
    contents = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": "\n\n".join(text) + "\n",
        "report.html": page,
    }
    return results, [write_file(run.folder / name, content) for name, content in contents.items()]


def _style() -> str:
    places = (("mokus", "report.css"), ("mokus.bench.knowcusbench", "report.css"))
    return "\n".join(files(package).joinpath(name).read_text(encoding="utf-8") for package, name in places)


def _subtitle(run: Run, results: Row) -> str:
    methods, seeds = len(run.methods), len(results["seeds"] or ())
    concepts = len({each.concept for each in run.samples})
    scored = sum(row["scored"] for row in results["counts"])
    planned = sum(row["planned"] for row in results["counts"])
    return (
        f"{_several(methods, 'method')}, {_several(concepts, 'concept')} and {_several(seeds, 'seed')} with "
        f"{results['model']}: {scored:,} of {planned:,} images are scored."
    )


def _several(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


# --- the sections -----------------------------------------------------------------------------------------------------


def _sections(run: Run, results: Row) -> list[Section]:
    counted = Counter(row["verdict"] for row in results["claims"])
    phrases = {FAILS: "not borne out", UNKNOWN: UNKNOWN, HOLDS: "borne out"}
    verdicts = ", ".join(f"{counted[name]} {phrase}" for name, phrase in phrases.items() if counted[name])
    return [
        Section("What is missing", "", list(_missing(run, results))),
        Section("Results", _results_note(run), _results(run, results)),
        Section(
            "What this run does not bear out",
            f"What is claimed, and what the figures above say. Of {len(results['claims'])} claims: {verdicts}. "
            "In brackets: 95 % intervals of differences between images that differ in nothing but the method.",
            _claims(results),
        ),
        Section(
            "The paper's own figures",
            f"Another model, other photos: not comparable. The figures of {paper.SOURCE}, of {paper.MODEL}, beside those of "
            "the same methods here. The paper does not say which side it segments nor which prompt CLIP-T and Pick score; ours "
            "are CLIP-I-Seg with the photos' background taken away and the prompt with the knowledge in it, macro means.",
            _paper(results),
        ),
        Section("By perspective", _perspective_note(run), _perspectives(run, results)),
        Section(
            "Differences",
            "Macro means over images that have concept, knowledge, prompt and seed in common, with 95 % intervals; shares in "
            "points. Bold: the interval leaves out 0.",
            _differences(run, results),
        ),
        *_images(run, results),
        *_sweeps(run),
        Section(
            "Training time",
            "Seconds for all the knowledge of a concept, means over concepts. 'Taken' is the knowledge that passed the "
            "editor's own checks; what has not is not used by mokus.",
            _training(results),
        ),
        Section("Misses and failures", _misses_note(results), list(_misses(run, results))),
        Section("What was run", "", _run(run, results)),
    ]


def _missing(run: Run, results: Row) -> Iterator[Part]:
    """What a whole run would have."""
    lines = [f"There is no {name}." for name in run.absent]
    lines += [f"There is no {name} among the methods." for name in METHODS if name not in run.methods]
    for row in results["counts"]:
        if row["scored"] == row["planned"]:
            continue
        waiting = [each for each in run.samples if each.method == row["method"] and each.state == "missing"]
        drawn = sum(image_file(run.folder, each.key).is_file() for each in waiting)
        parts = {"failed": row["failed"], "not drawn yet": len(waiting) - drawn, "drawn but not scored": drawn}
        why = ", ".join(f"{n:,} {what}" for what, n in parts.items() if n)
        lines.append(
            f"{row['method']}: {row['planned'] - row['scored']:,} of {row['planned']:,} have no score ({why})."
        )
    measured = {column for row in results["scores"] for column in [row["column"]] if row["images"]}
    if unmeasured := [column.name for column in COLUMNS if column.key not in measured]:
        lines.append(f"Not measured: {', '.join(unmeasured)}.")
    if lines:
        yield Lines(lines)


def _results_note(run: Run) -> str:
    concepts = len({each.concept for each in run.samples if each.state == "scored"})
    if not concepts:
        return "Nothing is scored yet."
    note = (
        "Macro means: of the concepts' own means, each with its 95 % interval over concepts "
        f"({RESAMPLES:,} bootstrap resamples, seed {SEED}). Bold: the best of {', '.join(COMPARED)}; base is the "
        "floor, anchor and rewrite are ceilings. Misses are left out of a mean and counted further down."
    )
    if concepts == 1:
        return note + " There is only one concept, so there are no intervals."
    few = f" Of only {concepts} concepts, the intervals are narrower than they should be." if concepts < FEW else ""
    return note + few


def _results(run: Run, results: Row) -> list[Part]:
    columns = [(kind, column) for kind in KINDS for column in run.columns(kind)]
    times = {row["method"]: row for row in results["training"]}
    if not columns and not times:
        return [Lines(["No image has a score and no training time is known."])]
    found = {(row["method"], row["kind"], row["column"]): row for row in results["scores"] if not row["perspective"]}
    best = {key: _best([found[name, *key] for name in COMPARED if (name, *key) in found], column) for key, column in
            (((kind, column.key), column) for kind, column in columns)}  # fmt: skip
    rows, means = [], []
    for method in run.methods:
        here = [(found[method, kind, column.key], column) for kind, column in columns]
        cells = [_mean(row, column, method, best[row["kind"], column.key]) for row, column in here]
        rows.append((method, [*cells, _seconds(times.get(method))]))
        means.append((method, [Cell(column.text(row["micro"])) if row["images"] else NONE for row, column in here]))
    groups = [(kind, [column.name for column in run.columns(kind)]) for kind in KINDS if run.columns(kind)]
    table = Table("method", [*groups, ("training", ["seconds\u00a0↓"])], rows, lit=OURS)
    return [table, Table("method", groups, means, folded="micro means, over all images")] if columns else [table]


def _best(rows: Sequence[Row], column: Column) -> str:
    """The largest as it is printed: ties are ties."""
    values = [row["macro"] for row in rows if row["macro"] is not None]
    return column.text(max(values)) if len(values) > 1 else ""


def _mean(row: Row, column: Column, method: str, best: str) -> Cell:
    if row["macro"] is None:
        return NONE
    text = column.text(row["macro"])
    title = f"micro mean {column.text(row['micro'])}, {row['images']:,} images of {row['concepts']} concepts"
    return Cell(text, _between(row, column), text == best and method in COMPARED, title)


def _between(row: Row, column: Column) -> str:
    if not row["interval"]:
        return ""
    low, high = map(column.text, row["interval"])
    return f"{low.removesuffix('%')}–{high}"


def _seconds(row: Row | None) -> Cell:
    if row is None or row["seconds"] is None:
        return NONE
    between = f"{row['interval'][0]:.1f}–{row['interval'][1]:.1f}" if row["interval"] else ""
    return Cell(f"{row['seconds']:.1f}", between, title=f"{row['concepts']} concepts")


def _claims(results: Row) -> list[Part]:
    """What fails first."""
    order = [FAILS, UNKNOWN, HOLDS]
    rows = sorted(results["claims"], key=lambda row: order.index(row["verdict"]))
    return [Verdict(row["claim"], row["verdict"], [(f["holds"], f["text"]) for f in row["figures"]]) for row in rows]


def _paper(results: Row) -> list[Part]:
    """Its lines, each above ours."""
    found = {(row["method"], row["kind"], row["column"]): row for row in results["scores"] if not row["perspective"]}
    times = {row["method"]: row for row in results["training"]}
    rows: list[tuple[str, list[Cell]]] = []
    for line in paper.TABLE:
        theirs = [Cell(f"{value:.2f}" if value > 1 else f"{value:.3f}") for value in line.figures]
        rows.append((f"paper: {line.name}", [*theirs, Cell(f"{60 * line.minutes:.0f}")]))
        for method in [OURS] * (line.method == "mokus-paper") + [line.method]:
            ours = [found.get((method, heading.kind, heading.column)) for heading in paper.HEADINGS]
            cells = [Cell(BY_KEY[row["column"]].text(row["macro"])) if row and row["images"] else NONE for row in ours]
            if cells != [NONE] * len(cells):
                rows.append((f"here: {method}", [*cells, Cell(_seconds(times.get(method)).text)]))
    groups = [(kind, [heading.name for heading in paper.HEADINGS if heading.kind == kind]) for kind in KINDS]
    return [Table("another model, other photos", [*groups, ("training", ["seconds\u00a0↓"])], rows)]


# --- breakdowns -------------------------------------------------------------------------------------------------------


def _focus(run: Run) -> list[Column]:
    """Two columns that say the most of a generation: is it the concept, and does it follow the prompt?"""
    measured = run.columns("generation")
    following = [
        column for column in (BY_KEY["oracle_asked"], BY_KEY["clip_t_class"], BY_KEY["clip_t"]) if column in measured
    ]
    return [column for column in [run.fidelity, *following[:1]] if column in measured]


def _perspective_note(run: Run) -> str:
    names = " and ".join(column.name for column in _focus(run))
    return f"Generation prompts by what they ask for: macro means of {names} with 95 % intervals. All columns: results.json."


def _perspectives(run: Run, results: Row) -> list[Part]:
    found = {(row["method"], row["perspective"], row["column"]): row for row in results["scores"] if row["perspective"]}
    places = {
        column.key: [
            p for p in run.perspectives if any(found[method, p, column.key]["images"] for method in run.methods)
        ]
        for column in _focus(run)
    }
    columns = [column for column in _focus(run) if places[column.key]]
    drawn = [
        Chart(column.name, column, places[column.key], [
            Series(method, _colour(run, method), [_point(found[method, p, column.key]) for p in places[column.key]])
            for method in run.methods
        ])
        for column in columns
    ]  # fmt: skip
    cells = [(p, column) for column in columns for p in places[column.key]]
    rows = [(method, [_mean(found[method, p, c.key], c, method, "") for p, c in cells]) for method in run.methods]
    table = Table("method", [(column.name, places[column.key]) for column in columns], rows, lit=OURS)
    return [Page(charts(drawn)), table] if columns else []


def _point(row: Row) -> Point | None:
    return None if row["macro"] is None else Point(row["macro"], row["interval"])


def _colour(run: Run, method: str) -> int:
    others = [name for name in run.methods if name not in COLOURS]
    return COLOURS[method] if method in COLOURS else 7 + others.index(method) % 2


def _differences(run: Run, results: Row) -> list[Part]:
    tables: list[Part] = []
    for reference in dict.fromkeys(row["reference"] for row in results["differences"]):
        found = {
            (row["method"], row["kind"], row["column"]): row
            for row in results["differences"] if row["reference"] == reference
        }  # fmt: skip
        rows = [
            (f"{method} − {reference}", [_gap(found[method, kind, c.key], c) for kind in KINDS for c in run.columns(kind)])
            for method in run.methods if method != reference
        ]  # fmt: skip
        groups = [(kind, [column.name for column in run.columns(kind)]) for kind in KINDS if run.columns(kind)]
        if groups:
            tables.append(Table("", groups, rows))
    return tables


def _gap(row: Row, column: Column) -> Cell:
    if row["mean"] is None:
        return NONE
    low, high = row["interval"] or (0.0, 0.0)
    between = f"{column.difference(low)} to {column.difference(high)}" if row["interval"] else ""
    title = f"{row['pairs']:,} pairs of {row['concepts']} concepts"
    return Cell(column.difference(row["mean"]), between, low > 0 or high < 0, title)


def _images(run: Run, results: Row) -> list[Section]:
    shown, rule = grids(run)
    cards, lines, note = worst(run, OURS, "anchor")
    return [
        Section("Images", rule, [Page(shown, Lines(["in report.html"]))] if shown else []),
        Section("Worst cases", note, [Page(cards, Lines(lines))] if lines else []),
        Section("By concept", f"Means of {run.fidelity.name} over each concept's images.", _concepts(run, results)),
    ]


def _concepts(run: Run, results: Row) -> list[Part]:
    found = {(row["concept"], row["kind"], row["method"]): row["mean"] for row in results["by_concept"]}
    kinds = [kind for kind in KINDS if any(key[1] == kind for key in found)]
    concepts = sorted({key[0] for key in found})
    rows = []
    for concept in concepts:
        means = [found.get((concept, kind, method)) for kind in kinds for method in run.methods]
        rows.append((concept, [NONE if mean is None else Cell(run.fidelity.text(mean)) for mean in means]))
    groups = [(kind, run.methods) for kind in kinds]
    return [Table("concept", groups, rows, folded=_several(len(rows), "concept"))] if rows else []


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweeps(run: Run) -> list[Section]:
    notes = {
        "knowledge": "How many pieces of knowledge are bound at once.",
        "eta": "The editor's step size.",
        "layers": "The layers of the text encoder that are edited.",
    }
    return [
        Section(f"Ablation: {sweep['name']}", notes.get(sweep["name"].split()[0], ""), _sweep(sweep))
        for sweep in run.sweeps
    ]


def _sweep(sweep: Row) -> list[Part]:
    rows = sweep["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    if not names:
        return []
    columns = {name: BY_KEY.get(name.split()[-1], Column(name, name, "", text="{:.1f}".format)) for name in names}
    places = [row["label"] for row in rows]
    drawn = [
        Chart(titled(name), column, places, [Series(sweep["name"], COLOURS[OURS], [_swept(row, name) for row in rows])], True,
              sweep["name"])
        for name, column in columns.items()
    ]  # fmt: skip
    table = [(place, [_swept_cell(_swept(row, name), column) for name, column in columns.items()])
             for place, row in zip(places, rows, strict=True)]  # fmt: skip
    parts: list[Part] = [Page(charts(drawn)), Table(sweep["name"], [("", [titled(name) for name in names])], table)]
    if sweep["name"].startswith("knowledge"):
        theirs = [
            (str(n), [Cell(f"{seg:.3f}"), Cell(f"{text:.3f}"), Cell(f"{seconds:.1f}")])
            for n, (seg, text, seconds) in paper.KNOWLEDGE.items()
        ]
        heads = ["reconstruction, CLIP-I-Seg", "generation, CLIP-T", "training, seconds"]
        group = f"the paper's, of another model and other photos: not comparable ({paper.SOURCE})"
        parts.append(Table(sweep["name"], [(group, heads)], theirs, folded="the paper's own figures"))
    return parts


def _swept(row: Row, name: str) -> Point | None:
    value = row["figures"].get(name)
    between = row["interval"].get(name)
    return None if value is None else Point(value, tuple(between) if between else None)


def _swept_cell(point: Point | None, column: Column) -> Cell:
    return NONE if point is None else Cell(column.text(point.value), _between({"interval": point.interval}, column))


# --- the rest ---------------------------------------------------------------------------------------------------------


def _training(results: Row) -> list[Part]:
    rows = []
    for row in results["training"]:
        stages = [Cell(f"{row[stage]:.1f}") if row[stage] is not None else NONE for stage in ("learn", "bind")]
        taken = Cell(f"{row['taken']} of {row['knowledge']}") if row["knowledge"] else Cell("none to bind")
        counts = [Cell(str(row["concepts"])), Cell(str(row["unknown"]))]
        rows.append((row["method"], [*stages, _seconds(row), taken, *counts]))
    names = ["learning", "binding", "both", "knowledge taken", "concepts", "stopped in between"]
    return [Table("method", [("", names)], rows, lit=OURS)] if rows else []


def _misses_note(results: Row) -> str:
    misses = sum(row["misses"] for row in results["scores"] if not row["perspective"])
    failed = len(results["failed"])
    if not misses and not failed:
        return ""
    return (
        f"{_several(misses, 'value')} missed (nothing was segmented, say), {_several(failed, 'image')} failed. Below each "
        "number of misses: the macro mean if every miss counted as 0."
    )


def _misses(run: Run, results: Row) -> Iterator[Part]:
    rows = [row for row in results["scores"] if not row["perspective"]]
    columns = [(kind, column) for kind in KINDS for column in run.columns(kind)
               if any(row["misses"] for row in rows if (row["kind"], row["column"]) == (kind, column.key))]  # fmt: skip
    found = {(row["method"], row["kind"], row["column"]): row for row in rows}
    if columns:
        groups = [(kind, [c.name for k, c in columns if k == kind]) for kind in dict.fromkeys(k for k, _ in columns)]
        cells = [(m, [_missed(found[m, kind, column.key], column) for kind, column in columns]) for m in run.methods]
        yield Table("method", groups, cells, lit=OURS)
    alike = Counter((row["method"], row["concept"], row["reason"]) for row in results["failed"])
    if alike:
        lines = [f"{m}, {concept}: {reason} ({_several(n, 'image')})" for (m, concept, reason), n in alike.items()]
        more = [f"... and {len(lines) - LISTED} more, see failed.json"] if len(lines) > LISTED else []
        yield Lines(lines[:LISTED] + more)
    if run.cut_missed:
        photos = ", ".join(f"{n} of {concept}" for concept, n in sorted(run.cut_missed.items()))
        yield Lines([f"Photos of which no subject could be cut out, and which CLIP-I-Seg leaves out: {photos}."])
    if not columns and not alike and results["scores"]:
        yield Lines(["No image was missed by a metric, and none failed."])


def _missed(row: Row, column: Column) -> Cell:
    all_of = row["images"] + row["misses"]
    zeros = "" if row["macro_misses_zero"] is None or not row["misses"] else column.text(row["macro_misses_zero"])
    return Cell(f"{row['misses']:,} of {all_of:,}", zeros)


def _run(run: Run, results: Row) -> list[Part]:
    concepts = {each.concept for each in run.samples}
    facts = {
        "suite": f"{results['suite']} ({_several(len(concepts), 'concept')}, sha256 {results['suite_sha256']})",
        "model": results["model"], "fingerprint": results["fingerprint"],
        "seeds": ", ".join(map(str, results["seeds"] or ())),
        "versions": ", ".join(f"{name} {number}" for name, number in (results["versions"] or {}).items()),
        **{f"command {i}" if i > 1 else "command": line for i, line in enumerate(results["commands"], start=1)},
    }  # fmt: skip
    counts = [
        (row["method"], [Cell(f"{row[what]:,}") for what in ("planned", "scored", "failed", "missing")])
        for row in results["counts"]
    ]
    settings = [(name, _json(value)) for name, value in (results["settings"] or {}).items()]
    metrics = [(name, _metric(value)) for name, value in results["metrics"].items()]
    parts: list[Part] = [
        Texts([(name, str(value)) for name, value in facts.items() if value]),
        Table("images", [("", ["planned", "scored", "failed", "missing"])], counts),
        Texts([(name, about(name)) for name in run.methods if name in METHODS], folded="methods"),
        Texts([(column.name, column.meaning) for column in COLUMNS], folded="columns"),
    ]
    some = [("metrics: ids and revisions", metrics), ("settings", settings)]
    return [*parts, *(Texts(rows, folded=name) for name, rows in some if rows)]


def _metric(value: Any) -> str:
    if not isinstance(value, dict):
        return _json(value)
    first = [str(value[name]) for name in ("id", "revision") if value.get(name)]
    rest = [f"{name} {_json(some)}" for name, some in value.items() if name not in ("id", "revision")]
    return ", ".join(first + rest)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
