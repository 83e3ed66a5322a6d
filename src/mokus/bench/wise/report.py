"""The report of a run: results.json, and the same to read as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from mokus.bench.knowcusbench.plan import image_file
from mokus.bench.knowcusbench.report_layout import NONE, Cell, Lines, Page, Part, Section, Table, Texts, plain
from mokus.bench.wise.entries import Version
from mokus.bench.wise.judge import questions
from mokus.bench.wise.knowledge import FILE as KNOWLEDGE
from mokus.bench.wise.run import AFTER, BEFORE, FAILED, edit_records, read_plan
from mokus.bench.wise.score import VARIANTS, Judged, cost, judged, results
from mokus.errors import MokusError
from mokus.files import read_json
from mokus.files import write as write_file
from mokus.html import PAGE, img

Row = dict[str, Any]
JUDGE = "judge.json"  # whom the run's judgements were asked of, written when it is asked
SHOWN, PICTURE = 4, 160  # entries of each category; pixels
LISTED = 20
_BROKEN = (OSError, SyntaxError, ValueError)


def write(folder: Path) -> tuple[Row, list[Path]]:
    """Write results.json, report.md and report.html into a run's folder, each whole or not at all.

    Raises `MokusError` if the folder holds no run, or one that was not judged.
    """
    plan, judge = read_plan(folder), read_json(folder / JUDGE)
    if not judge:
        raise MokusError(
            f"{folder} is not judged yet; do it by 'mokus bench wise judge {folder} --judge URL --judge-model NAME'."
        )
    protocols: list[Version] = judge["protocols"]
    found = judged(folder, questions(folder, plan, protocols, judge["model"], judge["options"]))
    figures = _whole(folder, plan, judge, found)
    title = "WISE, before and after"
    sections = [section for section in _sections(folder, plan, figures, found) if section.parts]
    style = "\n".join(
        files(package).joinpath("report.css").read_text(encoding="utf-8")
        for package in ("mokus", "mokus.bench.knowcusbench")
    )
    subtitle = _subtitle(plan, figures)
    page = PAGE.format(
        title=escape(title), subtitle=escape(subtitle), style=style, body="\n".join(s.html() for s in sections)
    )
    text = [f"# {plain(title)}", plain(subtitle), *(section.markdown() for section in sections)]
    contents = {
        "results.json": json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": "\n\n".join(text) + "\n", "report.html": page,
    }  # fmt: skip
    return figures, [write_file(folder / name, content) for name, content in contents.items()]


def _whole(folder: Path, plan: Row, judge: Row, found: Judged) -> Row:
    edits = edit_records(folder, plan)
    edited = [entry for entry in plan["entries"] if not entry["control"]]
    commands = list(dict.fromkeys([*plan["commands"], judge["command"]]))
    return {
        "source": plan["source"], "data": plan["version"], "source_sha256": plan["source_sha256"], "model": plan["model"],
        "fingerprint": plan["fingerprint"], "versions": plan["versions"], "commands": commands, "seeds": plan["seeds"],
        "settings": plan["settings"], "edit": plan["edit"], "judge": judge,
        "entries": {"edited": len(edited), "controls": len(plan["entries"]) - len(edited)},
        "edits": {
            "asked": sum(map(len, plan["batches"])), "batches": len(plan["batches"]), "made": len(edits),
            "taken": sum(each["taken"] for each in edits),
            "without_answer": len(edited) - sum(map(len, plan["batches"])),
            "seconds": sum(each["seconds"] for each in edits),
        },
        **results(plan, found, judge["protocols"]),
        "cost": cost(found.values(), judge.get("price_in"), judge.get("price_out")),
        "failed": [*(read_json(folder / FAILED) or []), *_failed_judgements(found)],
    }  # fmt: skip


def _failed_judgements(found: Judged) -> list[Row]:
    return [
        {"prompt_id": i, "when": f"judged {when}, {protocol}", "seed": seed, "reason": judgement.reason}
        for (i, when, seed, protocol), judgement in found.items()
        if judgement.status == "failed"
    ]


def _subtitle(plan: Row, figures: Row) -> str:
    n, first = figures["entries"], next(iter(figures["variants"].items()), None)
    text = (
        f"{n['edited']:,} entries edited in {figures['edits']['batches']} batches, {n['controls']:,} controls, with "
        f"{plan['model']}, judged by {figures['judge']['model']}"
    )
    if first is None or first[1]["edited"]["before"] is None:
        return f"{text}: no scores yet."
    row = first[1]["edited"]
    return f"{text}: {row['before']:.2f} before, {row['after']:.2f} after ({first[0]})."


# --- the sections -----------------------------------------------------------------------------------------------------


def _sections(folder: Path, plan: Row, figures: Row, found: Judged) -> Iterator[Section]:
    note = (
        "All that was edited; an edit that has not taken counts with the image that came of it. In small: the 95 % interval of "
        "the difference (bootstrap over entries)."
    )
    yield Section("Scores", note, [_scores(figures)])
    note = (
        "Entries of which nothing was edited, drawn with the edits of others in place. Unchanged: the image's score is the same "
        "before and after."
    )
    yield Section("Controls", note, _controls(figures))
    yield Section("By category", "", list(_categories(figures)))
    yield Section("Edits", "", _edits(folder, plan, figures))
    yield Section("Images", *_pictures(folder, plan, found))
    yield Section("Failures", "", _failures(figures))
    yield Section("The run", "", _run(plan, figures))


def _scores(figures: Row) -> Table:
    variants = {**figures["variants"], **figures["parts"]}
    weighted = any(variant["overall"] for variant in variants.values())
    rows = [
        (f"{name} (0 to {each['most']:g})", [*_cells(each["edited"]), *(_overall(each["overall"]) if weighted else [])])
        for name, each in variants.items()
    ]
    groups = [("mean over entries", ["before", "after", "ratio", "entries", "without a score"])]
    return Table("score", [*groups, *([("WISE's weights", ["before", "after"])] if weighted else [])], rows)


def _cells(row: Row) -> list[Cell]:
    interval = row["interval"]
    small = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
    return [
        _number(row["before"]), Cell(_number(row["after"]).text, small, strong=row["after"] is not None),
        Cell(f"{row['ratio']:.2f}") if row["ratio"] else NONE, Cell(f"{row['entries']:,}"), Cell(f"{row['missing']:,}"),
    ]  # fmt: skip


def _overall(row: Row | None) -> list[Cell]:
    return [_number(row["before"]), _number(row["after"])] if row else [NONE, NONE]


def _number(value: float | None) -> Cell:
    return NONE if value is None else Cell(f"{value:.3f}")


def _controls(figures: Row) -> list[Part]:
    if not figures["entries"]["controls"]:
        return []
    rows = []
    for name, variant in figures["variants"].items():
        for row in (variant["controls"], *variant["controls_by_subcategory"]):
            share = NONE if row["unchanged"] is None else Cell(f"{row['unchanged']:.1%}", strong="name" not in row)
            rows.append(
                (
                    f"{name}: {row.get('name', 'all')}",
                    [share, _number(row["before"]), _number(row["after"]), Cell(f"{row['entries']:,}")],
                )
            )
    return [Table("score", [("", ["unchanged", "before", "after", "entries"])], rows)]


def _categories(figures: Row) -> Iterator[Table]:
    for name, variant in figures["variants"].items():
        for what in ("categories", "fields", "subcategories"):
            rows = [(row["name"], _cells(row)) for row in variant[what]]
            same = what == "fields" and [row["name"] for row in variant["categories"]] == [name for name, _ in rows]
            if rows and not same:
                corner = {"categories": "category", "fields": "field", "subcategories": "subcategory"}[what]
                folded = "" if what == "categories" else f"{name}, by {corner}"
                groups = [("", ["before", "after", "ratio", "entries", "without a score"])]
                yield Table(f"{corner} ({name})", groups, rows, folded=folded)


def _edits(folder: Path, plan: Row, figures: Row) -> list[Part]:
    edits, records = figures["edits"], edit_records(folder, plan)
    lines = [
        f"{edits['taken']:,} of {edits['made']:,} edits made have taken; {edits['asked']:,} were asked for.",
        f"{edits['without_answer']:,} entries have no answer that could be edited; they are drawn and judged all the same.",
    ]
    if records:
        alignments = [row["alignment"] for row in records if "alignment" in row]
        mean = f", mean alignment {sum(alignments) / len(alignments):.2f}" if alignments else ""
        lines.append(f"{edits['seconds'] / len(records):.1f} s an edit{mean}.")
    known = {row["prompt_id"]: row for row in read_json(folder / KNOWLEDGE) or []}
    missing = [row for row in records if not row["taken"]]
    rows = [(_named(known, row["prompt_id"]), row["reason"]) for row in missing[:LISTED]]
    return [
        Lines(lines),
        *([Texts(rows, folded=f"the first {len(rows)} of {len(missing)} that have not taken")] if rows else []),
    ]


def _named(known: dict[int, Row], prompt_id: int) -> str:
    row = known.get(prompt_id, {})
    return f"{prompt_id}: {row.get('knowledge', '')} -> {row.get('answer', '')}"


def _failures(figures: Row) -> list[Part]:
    counted = Counter((row["when"], row["reason"]) for row in figures["failed"])
    lines = [f"{when}: {reason} ({n:,})" for (when, reason), n in counted.most_common(LISTED)]
    if missing := figures["judgements"]["missing"]:
        lines.append(f"{missing:,} judgements are still to be asked for.")
    return [Lines(lines)] if lines else []


def _run(plan: Row, figures: Row) -> list[Part]:
    judge, price = figures["judge"], figures["cost"]
    money = (
        f", {price['cost']:.4f} at {judge['price_in']:g} and {judge['price_out']:g} per million"
        if price["cost"] is not None
        else ""
    )
    facts = {
        "data": f"{plan['source']} ({plan['version']}, sha256 {plan['source_sha256']})",
        "model": f"{plan['model']}, fingerprint {plan['fingerprint']}",
        "judge": f"{judge['model']} ({', '.join(judge['protocols'])})",
        "judged": f"{figures['judgements']['scored']:,} scored, {figures['judgements']['failed']:,} failed",
        "requests": f"{price['requests']:,}; {price['tokens_in']:,} tokens in, {price['tokens_out']:,} out{money}"
        + (f"; {price['uncounted']:,} answers did not say" if price["uncounted"] else ""),
        "seeds": ", ".join(map(str, plan["seeds"])),
        "versions": ", ".join(f"{name} {number}" for name, number in plan["versions"].items()),
        **{f"command {i}" if i > 1 else "command": line for i, line in enumerate(figures["commands"], start=1)},
    }
    settings = [(name, str(value)) for name, value in {**plan["settings"], **plan["edit"]}.items()]
    return [Texts(list(facts.items())), Texts(settings, folded="settings")]


# --- the images -------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, plan: Row, found: Judged) -> tuple[str, Sequence[Part]]:
    """A few entries of every category, before and after, drawn by lot and not by hand."""
    rng, seed = random.Random("shown"), plan["seeds"][0]
    by_category: dict[str, list[Row]] = {}
    for entry in plan["entries"]:
        by_category.setdefault(f"{entry['category'] or 'entries'}{' (controls)' * entry['control']}", []).append(entry)
    keys = {(item["prompt_id"], item["when"]): item["key"] for item in plan["items"] if item["seed"] == seed}
    shown = ""
    for name, entries in by_category.items():
        some = sorted(rng.sample(entries, min(SHOWN, len(entries))), key=lambda entry: int(entry["prompt_id"]))
        cards = "".join(_card(folder, entry, keys, seed, found) for entry in some)
        shown += f"<article><h3>{escape(name)}</h3><div class=worst>{cards}</div></article>"
    note = (
        f"At most {SHOWN} entries of every category, chosen by lot (Python's random.Random); at the left before, at the right "
        f"after, both of seed {seed}."
    )
    return note, [Page(shown)]


def _card(folder: Path, entry: Row, keys: dict[tuple[int, str], str], seed: int, found: Judged) -> str:
    both = []
    for when in (BEFORE, AFTER):
        key = keys.get((entry["prompt_id"], when), "")
        told = _told(entry["prompt_id"], when, seed, found)
        both.append(f"<div>{_picture(image_file(folder, key), f'{when}: {told}')}{escape(told)}</div>")
    caption = f"{escape(entry['prompt'])}<small>{escape(entry['explanation'])}</small>"
    return f"<figure><div class=pair>{''.join(both)}</div><figcaption>{caption}</figcaption></figure>"


def _picture(file: Path, title: str) -> str:
    if not file.is_file():
        return "<div class=lost>not drawn</div>"
    try:
        with Image.open(file, formats=("PNG",)) as image:
            small = image.convert("RGB")
            small.thumbnail((PICTURE, PICTURE))
            return img(small, "", title)
    except _BROKEN:
        return "<div class=lost>cannot be read</div>"


def _told(prompt_id: int, when: str, seed: int, found: Judged) -> str:
    for variant in VARIANTS:
        judgement = found.get((prompt_id, when, seed, variant.protocol))
        if judgement and judgement.status == "scored":
            return f"{variant.of(judgement.scores):.2f}"
    return "no score"
