"""The page of the benchmark of editors: complete, self-contained, safe, and right about what is best."""

from __future__ import annotations

import os
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mokus.bench.editing import charts, figures
from mokus.bench.editing import page as report

from .test_demo import Page, pictures

NASTY = "<script>alert('x')</script><img src=http://evil onerror=1> & \"my\" toy's"
SHARES = [figure.key for figure in figures.FIGURES if figure.text is figures.share]


def row(editor: str, edits: int, share: float | None = 0.5, **figures: Any) -> dict[str, Any]:
    cost = {"conditioning_drift": 0.01, "undo": True, "seconds_per_edit": 0.5, "bytes_per_edit": 2048.0}
    return {"editor": editor, "edits": edits, **dict.fromkeys(SHARES, share), **cost, **figures}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    measured = [row(editor, count) for editor in figures.EDITORS[1:] for count in (1, 10, 100)]
    return [row("unedited", 0, 0.0, conditioning_drift=0.0), *measured]


@pytest.fixture
def extra() -> dict[str, Any]:
    image = Image.new("RGB", (32, 32), "teal")
    return {
        "norms": {"memit": {f"layers.{i}.mlp.down_proj": 0.01 * i for i in (12, 3)}},
        "eta": [
            {"editor": "ultraedit", "eta": eta, "efficacy": eta, "generality_prompts": None, "locality_near_miss": 0.9}
            for eta in (0.5, 1.0)
        ],
        "images": [{"prompt": "my toy", "editor": "rome", "wanted": "red star", "before": image, "after": image}],
    }


def cells(html: str, title: str, editor: str) -> dict[str, tuple[str, bool]]:
    """A row of the table below a heading: figure -> text and whether it is marked as the best."""
    table = html.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    line = next(line for line in table.split("<tr")[1:] if re.search(rf"scope=row>{editor}\b", line))
    found = re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', line)
    return {
        figure.key: (text, "best" in classes.split())
        for figure, (classes, text) in zip(figures.FIGURES, found, strict=True)
    }


def test_every_editor_and_figure_is_there(rows: list[Any], extra: dict[str, Any], tmp_path: Path) -> None:
    path = report.write(tmp_path / "new", rows, extra, {"seed": 7, "layers": [3, 4]})
    assert path == tmp_path / "new" / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for title in ("After one edit", "After 10 sequential edits", "After 100 sequential edits"):
        for editor in figures.EDITORS:
            assert len(cells(html, title, editor)) == len(figures.FIGURES)
    for name in [figure.name for figure in figures.FIGURES] + [figure.meaning for figure in figures.FIGURES]:
        assert name in page.text
    for title in ("Wanted", "Capacity", "Step size", "Where the shift is", "Images", "Settings"):
        assert f"<h2>{title}</h2>" in html
    assert len(re.findall(r"<svg class=chart", html)) == len(figures.CAPACITY) + 2  # nothing of eta was None
    assert "8 ways" in page.text and "1, 10 and 100 edits" in page.text and "[3, 4]" in page.text
    assert html.index(">3.mlp.down_proj<") < html.index(">12.mlp.down_proj<")
    assert [picture.size for picture in pictures(page)] == [(32, 32)] * 2


def test_nothing_is_loaded(rows: list[Any], extra: dict[str, Any]) -> None:
    html = report.page(rows, extra, {"seed": 7})
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(load.startswith("data:image/") for load in page.loads)
    assert not re.search(r"http|//", re.sub(r"base64,[^\"]*", "", html))


def test_what_others_write_is_text(rows: list[Any], extra: dict[str, Any]) -> None:
    extra["images"][0] |= {"prompt": NASTY, "editor": NASTY, "wanted": NASTY}
    extra["norms"] = {NASTY: {NASTY: 0.1}}
    extra["eta"] = [{"editor": NASTY, "eta": 0.5, "efficacy": 0.5}]
    html = report.page([*rows, row(NASTY, 1)], extra, {NASTY: NASTY, "b": [NASTY]})
    page = Page(html)
    assert "script" not in page.tags and all(load.startswith("data:image/") for load in page.loads)
    assert page.text.count(NASTY) >= 6 and "<script" not in html and "<img src=http" not in html


def test_the_best_is_marked(rows: list[Any]) -> None:
    rows = [row for row in rows if row["editor"] in ("unedited", "memit", "rome", "rewrite")]
    better = {"efficacy": 0.9, "image_near_miss": 0.9, "conditioning_drift": 0.001, "bytes_per_edit": 10.0}
    next(row for row in rows if row["editor"] == "rome" and row["edits"] == 10).update(better, seconds_per_edit=60.0)
    html = report.page(rows, {}, {})
    table = {editor: cells(html, "After 10 sequential edits", editor) for editor in ("unedited", "memit", "rome")}
    assert {key for key, (_, best) in table["memit"].items() if not best} == {*better, "undo"}
    assert {key for key, (_, best) in table["rome"].items() if not best} == {"seconds_per_edit", "undo"}
    assert not any(best for _, best in table["unedited"].values())  # though its drift is the least
    texts = {key: text for key, (text, _) in table["rome"].items()}
    assert texts["efficacy"] == "90.0%" and texts["conditioning_drift"] == "0.001"
    assert texts["seconds_per_edit"] == "60.0 s" and texts["bytes_per_edit"] == "10 B" and texts["undo"] == "yes"


def test_what_is_wanted_is_compared(rows: list[Any]) -> None:
    for measured in rows:
        if measured["editor"] == figures.RECIPE and measured["edits"] == 1:
            measured.update(efficacy=0.99, generality_questions=0.969, locality_captions=None)
        measured["image_direct"] = 1.0
    html = report.page(rows, {}, {}).split("<h2>Wanted</h2>")[1].split("</section>")[0]
    assert "1 of 7 after 1 edit and 0 of 8 after 100 edits" in unescape(html)
    assert html.count("✓ pass") == 1 and html.count("✗ miss") == 14 and html.count("not measured") == 1
    assert "<h2>Wanted</h2>" not in report.page([row("memit", 1)], {}, {})


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("unedited", 0)],
        [row("memit", 10)],
        [row("memit", 10, None, conditioning_drift=None, undo=None, seconds_per_edit=None, bytes_per_edit=None)],
        [{"editor": "least_drift", "edits": 1}, {"editor": "unedited", "edits": 0}],
        [row("memit", 1, float("nan"), conditioning_drift=0.0, bytes_per_edit=0, seconds_per_edit=0)],
        [row("memit", 1, n={"efficacy": 40, "one_hop": None}), row("rome", 1, n={"efficacy": 30})],
        [row(f"editor {i}", 1) for i in range(30)],
    ],
)
def test_what_is_missing_is_left_out(rows: list[Any]) -> None:
    for extra in ({}, {"norms": {}, "eta": [], "images": []}, {"norms": {"memit": {}, "rome": {"layers.1": 0.0}}}):
        html = report.page(rows, extra, {})
        assert "<h2>Images</h2>" not in html and "<h2>Step size</h2>" not in html and "<h2>Settings</h2>" not in html
        assert "nan" not in re.sub("<style>.*</style>", "", html, flags=re.DOTALL)


def test_lines_and_labels_stay_inside() -> None:
    assert charts._apart([10.0, 11.0, 200.0], 8, 210) == [10.0, 10.0 + charts._GAP, 200.0]
    crowded = charts._apart([209.0] * 5, 8, 210)
    assert crowded[-1] == 210 and all(b - a >= charts._GAP - 1e-9 for a, b in pairwise(crowded))
    chart = charts.Chart("a", "edits", {"memit": [(10.0, 2.0)]}, logarithmic=True)
    x, y = chart.at(10.0, 2.0)
    assert charts._LEFT < x < charts._RIGHT and y == charts._TOP


@pytest.mark.parametrize("value, top", [(0.0, 1.0), (0.012, 0.015), (0.3, 0.3), (1.224, 1.5), (9.0, 10.0)])
def test_axes_end_at_round_values(value: float, top: float) -> None:
    assert charts._rounded_up(value) == pytest.approx(top)


def test_all_of_it_or_nothing(rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(tmp_path, rows, {}, {})
    assert os.listdir(tmp_path) == ["report.html"]
    before = (tmp_path / "report.html").read_bytes()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, rows[:2], {}, {"seed": 1})
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_bytes() == before
