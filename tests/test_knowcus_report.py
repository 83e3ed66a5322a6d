"""KnowCusBench's figures and report: right by hand and by another way, safe, self-contained, the same every time."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mokus.bench import bootstrap
from mokus.bench.knowcusbench import aggregate as figures
from mokus.bench.knowcusbench import paper, report, report_charts, report_images
from mokus.bench.knowcusbench.aggregate import aggregate, load_run
from mokus.bench.knowcusbench.claims import FAILS, HOLDS, UNKNOWN, claims
from mokus.bench.knowcusbench.methods import METHODS
from mokus.bench.knowcusbench.plan import image_file
from mokus.errors import MokusError

from .test_demo import Page, pictures

NASTY = "<script>alert('x')</script><img src=http://evil onerror=1> | `&` \"my\" toy's"
PROMPTS = {"{}": "", "{} on the beach": "background", "{} in the style of a mosaic": "style"}
Score = Callable[[dict[str, Any]], dict[str, float | None] | None]


def close(item: dict[str, Any]) -> dict[str, float | None]:
    """Made-up scores: better for the later methods, a little different for every image."""
    rng = random.Random(f"{item['key']}{item['method']}")
    level = 0.2 + 0.1 * METHODS.index(item["method"].partition("@")[0])
    values: dict[str, float | None] = {"clip_i": level + rng.random() / 10, "clip_t": level / 3 + rng.random() / 20}
    values["oracle_concept"] = float(rng.random() < level)
    values["oracle_asked"] = float(rng.random() < 0.9) if item["expected"] else None
    return values


class Folder:
    """A run's folder as the runner fills it, with tiny images and made-up scores."""

    def __init__(
        self, path: Path, methods: Iterable[str] = METHODS, concepts: Iterable[str] = ("bear", "boot", "cat"),
        knowledge: Iterable[str] = ("the gift", "what she lost"), seeds: Iterable[int] = (0, 1), score: Score = close,
    ) -> None:  # fmt: skip
        self.path, self.score = path, score
        self.concepts, self.knowledge, self.seeds = list(concepts), list(knowledge), list(seeds)
        self.items = [
            self.item(*parts)
            for parts in itertools.product(methods, self.concepts, range(len(self.knowledge)), PROMPTS, self.seeds)
        ]
        self.plan: dict[str, Any] = {
            "suite": "made-up", "suite_sha256": "0" * 64, "model": "pico", "fingerprint": "f" * 8, "seeds": self.seeds,
            "methods": list(methods), "settings": {"steps": 2, "size": 8}, "versions": {"mokus": "0"},
            "commands": ["mokus bench knowcus run -o DIR"],
        }  # fmt: skip
        self.training = [
            {"method": method, "concept": concept, "seconds_learn": 60.0 if method == "naive-db" else 10.0,
             "seconds_bind": 2.0, "knowledge": 2, "taken": 2}
            for method in methods for concept in self.concepts
        ]  # fmt: skip
        self.failed: list[dict[str, Any]] = []

    def item(self, method: str, concept: str, knowledge: int, template: str, seed: int) -> dict[str, Any]:
        text = self.knowledge[knowledge]
        drawn = "rewrite" if method == "anchor" else method  # the two draw the same images
        key = hashlib.sha256(repr((drawn, concept, text, template, seed)).encode()).hexdigest()[:32]
        return {
            "method": method, "key": key, "concept": concept, "kind": "generation" if PROMPTS[template] else "reconstruction",
            "perspective": PROMPTS[template], "knowledge": knowledge, "template": template,
            "prompt": template.replace("{}", text), "class_prompt": template.replace("{}", "a toy"), "seed": seed,
            "expected": {"scene": "on the beach"} if PROMPTS[template] == "background" else {},
        }  # fmt: skip

    def write(self) -> Path:
        """All files."""
        rows = {}
        for item in self.items:
            scores = self.score(item)
            identity = {name: item[name] for name in ("key", "prompt", "class_prompt", "concept")}
            if scores is not None:
                rows.setdefault(tuple(identity.values()), {**identity, **scores})
                file = image_file(self.path, item["key"])
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), f"#{item['key'][:6]}").save(file)
        metrics = {"clip": {"id": "some/clip", "revision": "abc123"}}
        self.dump("plan.json", {**self.plan, "items": self.items})
        self.dump("scores.json", {"metrics": metrics, "rows": list(rows.values())})
        self.dump("training.json", {"rows": self.training})
        self.dump("failed.json", self.failed)
        return self.path

    def dump(self, name: str, value: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def whole(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.write()
    return folder


def written(folder: Path) -> tuple[dict[str, Any], str, str]:
    """The results, the text and the page."""
    results, paths = report.write(folder)
    assert [path.name for path in paths] == ["results.json", "report.md", "report.html"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    return results, *(path.read_text(encoding="utf-8") for path in paths[1:])


def found(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row that is as wanted."""
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


# --- figures ----------------------------------------------------------------------------------------------------------


def test_macro_and_micro_by_hand(tmp_path: Path) -> None:
    by_concept: dict[str, list[float | None]] = {"bear": [1.0, 0.5], "boot": [0.0, None]}  # by seed
    folder = Folder(tmp_path, ["mokus"], by_concept, ["the gift"])
    folder.score = lambda item: {"clip_i": by_concept[item["concept"]][item["seed"]]}
    row = found(aggregate(load_run(folder.write()))["scores"], kind="reconstruction", column="clip_i")
    assert row["macro"] == pytest.approx((0.75 + 0.0) / 2) and row["micro"] == pytest.approx(1.5 / 3)
    assert (row["images"], row["concepts"], row["misses"], row["missing"], row["failed"]) == (3, 2, 1, 0, 0)
    assert row["macro_misses_zero"] == pytest.approx(0.375)
    assert row["interval"] == pytest.approx([0.0, 0.75])  # four equally likely draws: 0, 0.375 twice, 0.75


def test_every_outcome_is_counted(tmp_path: Path) -> None:
    outcomes: list[Any] = [0.5, None, float("nan"), "absent", "undrawn", "failed"]
    folder = Folder(tmp_path, ["mokus"], ["bear"], ["the gift"], range(6))

    def score(item: dict[str, Any]) -> dict[str, float | None] | None:
        outcome = outcomes[item["seed"]]
        if outcome in ("undrawn", "failed"):
            return None
        return {"dino": 0.1, "oracle_asked": None} | ({} if outcome == "absent" else {"clip_i": outcome})

    folder.score = score
    folder.failed = [
        {"method": "mokus", "concept": "bear", "key": item["key"], "reason": "no memory"}
        for item in folder.items if item["seed"] == 5
    ]  # fmt: skip
    results, _, _ = written(folder.write())
    counts = {"images": 1, "misses": 2, "missing": 2, "failed": 1}
    row = found(results["scores"], kind="reconstruction", column="clip_i")
    assert {name: row[name] for name in counts} == counts and row["interval"] is None
    assert results["counts"] == [{"method": "mokus", "planned": 18, "scored": 12, "failed": 3, "missing": 3}]
    asked = {row["perspective"]: row["misses"] for row in results["scores"] if row["column"] == "oracle_asked"}
    assert asked == {"": 4, "background": 4, "style": 0}  # nothing is asked of a style here


def exact_quantiles(means: list[float], at: tuple[float, float]) -> tuple[float, float]:
    """Of the bootstrap's whole distribution, every possible draw once."""
    draws = sorted(sum(draw) / len(means) for draw in itertools.product(means, repeat=len(means)))
    return draws[round(at[0] * len(draws))], draws[round(at[1] * len(draws))]


@pytest.mark.parametrize("means", [[0.1, 0.4, 0.5, 0.9], [0.0, 0.0, 1.0, 0.2, 0.7], [3.0, -1.0, 2.0, 5.0, 5.5]])
def test_interval_is_that_of_all_possible_draws(means: list[float]) -> None:
    low, high = figures.interval({str(i): [mean] for i, mean in enumerate(means)}) or (0.0, 0.0)
    bounds = [exact_quantiles(means, (0.025 + error, 0.975 + error)) for error in (-0.006, 0.006)]  # 4 standard errors
    assert bounds[0][0] - 1e-9 <= low <= bounds[1][0] + 1e-9
    assert bounds[0][1] - 1e-9 <= high <= bounds[1][1] + 1e-9


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        values = {str(i): [value] for i, value in enumerate(rng.normal(0.3, 1.0, 35))}
        low, high = figures.interval(values, 1000) or (0.0, 0.0)
        held += low <= 0.3 <= high
    assert 0.90 <= held / 400 <= 0.98


def test_intervals_move_with_the_values() -> None:
    values = {"a": [0.1, 0.3], "b": [0.5], "c": [0.2, 0.2, 0.9], "d": [0.4]}
    low, high = figures.interval(values) or (0.0, 0.0)
    assert low < (figures.macro(values) or 0.0) < high
    assert figures.interval(dict(reversed(values.items()))) == (low, high)  # whatever order concepts come in
    moved = figures.interval({name: [3 * value - 1 for value in some] for name, some in values.items()})
    assert moved == pytest.approx((3 * low - 1, 3 * high - 1))
    assert figures.interval({"a": [0.1, 0.9]}) is None and figures.interval({}) is None and figures.macro({}) is None


def test_differences_are_of_images_in_common(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus", "enc-ft"], ["bear", "boot"], ["the gift"], range(3))
    level = {"mokus": 0.9, "enc-ft": 0.5}

    def score(item: dict[str, Any]) -> dict[str, float | None] | None:
        lost = item["method"] == "mokus" and item["concept"] == "bear" and item["seed"] == 0
        hard = 0.4 * (item["seed"] == 0) + 0.1 * (item["concept"] == "boot") * (item["method"] == "mokus")
        return None if lost else {"clip_i": level[item["method"]] - hard}

    folder.score = score
    run = load_run(folder.write())
    row = figures.difference(run, "mokus", "enc-ft", "reconstruction", "clip_i")
    assert (row["pairs"], row["concepts"]) == (5, 2)
    assert row["mean"] == pytest.approx((0.4 + 0.3) / 2)  # the means themselves, over other images, differ by more
    back = figures.difference(run, "enc-ft", "mokus", "reconstruction", "clip_i")
    assert back["mean"] == pytest.approx(-row["mean"])
    assert back["interval"] == pytest.approx([-end for end in reversed(row["interval"])])


@pytest.mark.parametrize("name", ["prompt", "class_prompt"])
def test_one_image_of_two_methods(tmp_path: Path, name: str) -> None:
    """Shared images are the same to what sees images alone, whatever they were asked for."""
    folder = Folder(tmp_path, ["anchor", "rewrite"])
    results = aggregate(load_run(folder.write()))
    assert len({item["key"] for item in folder.items}) * 2 == len(folder.items)
    assert all(row["mean"] == 0 and row["interval"] == (0, 0) for row in results["differences"])
    for item in folder.items:
        if item["method"] == "anchor":
            item[name] = item["template"].replace("{}", "sks toy")
    folder.score = lambda item: {"clip_t": 1.0 if "sks" in item[name] else 0.0}
    run = load_run(folder.write())
    assert figures.difference(run, "anchor", "rewrite", "generation", "clip_t")["mean"] == 1


def test_training_time(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for row in folder.training:
        if row["method"] == "mokus":
            row.update(
                {"bear": {"seconds_bind": 6.0}, "cat": {"seconds_learn": None, "taken": 1}}.get(row["concept"], {})
            )
    rows = aggregate(load_run(folder.write()))["training"]
    mine = found(rows, method="mokus")
    assert mine["seconds"] == pytest.approx((16 + 12) / 2) and (mine["concepts"], mine["unknown"]) == (2, 1)
    assert (mine["learn"], mine["taken"], mine["knowledge"]) == (10.0, 5, 6)
    assert found(rows, method="naive-db")["seconds"] == 62


def test_sweeps_are_no_methods(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus"])
    folder.items += [{**item, "method": "mokus@knowledge=3"} for item in folder.items]
    folder.plan["methods"] = ["mokus", "mokus@knowledge=3"]
    run = load_run(folder.write())
    results, text, page = written(folder.path)
    assert results["methods"] == ["mokus"] and "mokus@" not in page + text + json.dumps(results["scores"])
    swept = figures.swept(run, "mokus@knowledge=3")
    row = found(results["scores"], kind="generation", perspective="", column="clip_t")
    assert swept["figures"]["generation clip_t"] == row["macro"]
    assert swept["interval"]["generation clip_t"] == row["interval"]


def test_a_sweep_is_of_the_scores_as_they_are(tmp_path: Path) -> None:
    """Scored anew, or with more seeds, since ablation.json was written; one of another folder stays as it is there."""
    folder = Folder(tmp_path, ["mokus@knowledge=1", "mokus@knowledge=5"], seeds=[0])
    folder.write()
    names = {"knowledge": (1, 5), "eta": (0.1, 0.3), "layers": ("1-2", "3")}
    old = {"figures": {"generation clip_t": 0.99}, "interval": {"generation clip_t": [0.98, 1.0]}}
    sweeps = [
        {"name": name, "rows": [{"value": v, "label": str(v), **old} for v in values]} for name, values in names.items()
    ]
    folder.dump("ablation.json", {"sweeps": sweeps})
    results, text, _ = written(tmp_path)
    assert results["ablation"][1:] == sweeps[1:]
    assert [row["value"] for row in results["ablation"][0]["rows"]] == [1, 5]
    for row in results["ablation"][0]["rows"]:
        samples = load_run(tmp_path).of(f"mokus@knowledge={row['value']}", "generation")
        now = figures.figure(samples, "clip_t")
        assert row["figures"]["generation clip_t"] == now["macro"] != 0.99
        assert row["interval"]["generation clip_t"] == now["interval"]
    section = text.partition("## Ablation: knowledge")[2].partition("## ")[0]
    assert section and "0.990" not in section and text.count("0.990") == 4


# --- claims -----------------------------------------------------------------------------------------------------------


def verdicts(folder: Folder, levels: dict[str, float], counts: dict[int, float] | None = None) -> list[str]:
    """Of the claims in their order, if every method has one score everywhere."""
    folder.score = lambda item: dict.fromkeys(("clip_i", "clip_t"), levels[item["method"]])
    folder.write()
    if counts:
        rows = [{"value": n, "figures": {"generation clip_i": value}} for n, value in counts.items()]
        folder.dump("ablation.json", {"sweeps": [{"name": "knowledge", "rows": rows}]})
    return [claim["verdict"] for claim in claims(load_run(folder.path))]


LEVELS = {"anchor": 0.8, "mokus": 0.775, "mokus-paper": 0.6, "enc-ft": 0.5, "naive-db": 0.77}


@pytest.mark.parametrize(
    "levels, counts, expected",
    [
        ({}, {1: 0.81, 5: 0.8, 20: 0.79}, [HOLDS, HOLDS, HOLDS, HOLDS]),
        ({"anchor": 0.81}, {1: 0.81, 5: 0.83, 20: 0.8}, [FAILS, HOLDS, HOLDS, FAILS]),
        ({"anchor": 0.7}, {1: 0.8, 5: 0.8}, [HOLDS, HOLDS, HOLDS, UNKNOWN]),
        ({"mokus-paper": 0.775}, {1: 0.8, 5: 0.7}, [HOLDS, FAILS, HOLDS, FAILS]),
        ({"enc-ft": 0.78, "naive-db": 0.78}, None, [HOLDS, FAILS, FAILS, UNKNOWN]),
    ],
)
def test_verdicts(
    tmp_path: Path, levels: dict[str, float], counts: dict[int, float] | None, expected: list[str]
) -> None:
    assert verdicts(Folder(tmp_path, LEVELS), LEVELS | levels, counts)[:4] == expected


def test_the_time_decides_as_well(tmp_path: Path) -> None:
    folder = Folder(tmp_path, LEVELS)
    for row in folder.training:
        row["seconds_bind"] = 6.0  # 66 against 16 s
    assert verdicts(folder, LEVELS)[2] == HOLDS
    for row in folder.training:
        row["seconds_bind"] = 7.0  # 67 against 17 s
    assert verdicts(folder, LEVELS)[2] == FAILS
    folder.training = []
    assert verdicts(folder, LEVELS)[2] == UNKNOWN


def test_the_paper_s_order(tmp_path: Path) -> None:
    assert verdicts(Folder(tmp_path, LEVELS), LEVELS)[4] == FAILS  # no MoKus of the paper beats the baseline here
    ours = {line.method: {} for line in paper.TABLE}
    for line in paper.TABLE:
        for heading in paper.HEADINGS:
            ours[line.method][heading.kind, heading.column] = line.figure(heading)
    folder = Folder(tmp_path, ours)
    folder.score = lambda item: {
        column: value for (kind, column), value in ours[item["method"]].items() if kind == item["kind"]
    }
    assert claims(load_run(folder.write()))[4]["verdict"] == HOLDS


def test_the_oracle_is_asked_first_whether_it_is_the_concept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus", "anchor"])
    folder.score = lambda item: {"clip_i": 1.0, "oracle_concept": float(item["method"] == "anchor")}
    results, text, _ = written(folder.write())
    assert results["fidelity"] == "oracle_concept" and results["claims"][0]["verdict"] == FAILS
    assert "-100.0 points" in results["claims"][0]["figures"][0]["text"] and "-100.0 points" in text


# --- the page ---------------------------------------------------------------------------------------------------------


class Balanced(Page):
    """A page whose every tag is closed where it should be."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        self.open: list[str] = []
        super().__init__(html)
        assert self.open == [] and html.startswith("<!doctype html>")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.open += [tag] * (tag not in self.VOID)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


SWEEPS = [
    {
        "name": "knowledge",
        "rows": [{"value": n, "figures": {"generation clip_i": 0.8 - n / 1000, "generation clip_t": None}} for n in (1, 5, 20)],
    },
    {
        "name": "layers",
        "rows": [
            {"value": [1, 2], "label": "1-2", "figures": {"oracle_concept": 0.5}, "interval": {"oracle_concept": [0.4, 0.7]}},
            {"value": [3], "label": "3", "figures": {}, "interval": {"oracle_concept": None}},
        ],
    },
]  # fmt: skip


def test_the_page_is_whole_and_loads_nothing(whole: Folder) -> None:
    whole.dump("ablation.json", {"sweeps": SWEEPS})
    _, _, html = written(whole.path)
    page = Balanced(html)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.loads and all(load.startswith("data:image/") for load in page.loads)
    assert not re.search(r"http|//", re.sub(r"base64,[^\"]*", "", html))
    for title in (
        "Results", "What this run does not bear out", "The paper's own figures", "By perspective", "Differences", "Images",
        "Worst cases", "Ablation: knowledge", "Ablation: layers", "Training time", "Misses and failures", "What was run",
    ):  # fmt: skip
        assert title in page.text
    for text in (*METHODS, "some/clip, abc123", "mokus bench knowcus run -o DIR", "not comparable", "1-2"):
        assert text in page.text


@pytest.mark.parametrize("where", ["knowledge", "concepts", "everything"])
def test_what_others_write_is_text(tmp_path: Path, where: str) -> None:
    folder = Folder(tmp_path, concepts=[NASTY] if where == "concepts" else ["bear"], knowledge=[NASTY, "the gift"])
    folder.score = lambda item: None if item["method"] == "enc-ft" else close(item)
    folder.failed = [
        {"method": "enc-ft", "concept": folder.concepts[0], "key": folder.items[0]["key"], "reason": NASTY}
    ]
    if where == "everything":
        names = ("suite", "model", "fingerprint", "suite_sha256")
        folder.plan |= {name: NASTY for name in names} | {"versions": {NASTY: NASTY}, "settings": {NASTY: [NASTY]}}
        folder.plan["commands"] = [NASTY]
        other = [{**item, "method": NASTY, "perspective": NASTY} for item in folder.items if item["method"] == "mokus"]
        folder.items += other
        folder.plan["methods"] = [*METHODS, NASTY]
        folder.score = lambda item: close({**item, "method": "mokus"})
    folder.write()
    figure = {"value": 1, "label": NASTY, "figures": {NASTY: 1.0}, "interval": {NASTY: [0, 2]}}
    folder.dump("ablation.json", {"sweeps": [{"name": NASTY, "rows": [figure]}]})
    _, text, html = written(folder.path)
    page = Balanced(html)
    assert "script" not in page.tags and all(load.startswith("data:image/") for load in page.loads)
    assert NASTY in page.text and "<script" not in html and "<img src=http" not in html
    assert not re.search(r"(?<!\\)<", text)  # Markdown's HTML
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, "a bar that is text makes another column"


def test_the_same_run_gives_the_same_bytes(whole: Folder) -> None:
    whole.dump("ablation.json", {"sweeps": SWEEPS})
    first = [path.read_bytes() for path in report.write(whole.path)[1]]
    bootstrap.draws.cache_clear()
    assert [path.read_bytes() for path in report.write(whole.path)[1]] == first


def test_intervals_and_misses_are_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.score = lambda item: {
        **close(item),
        "clip_i": None if item["seed"] == 0 else 0.5 + (item["concept"] == "cat"),
    }
    _, text, html = written(folder.write())
    assert re.search(r"<td class=\"[^\"]*\" title=\"micro mean 0.833, 6 images of 3 concepts\">(<b>)?0.833", html)
    assert "0.500–1.500" in html and "0.500–1.500" in text
    misses = text.split("## Misses and failures")[1]
    assert "6 of 12 (0.417)" in misses and "126 values missed" in misses


def test_the_paper_is_kept_apart(whole: Folder) -> None:
    _, text, _ = written(whole.path)
    section = text.split("## The paper's own figures")[1].split("\n## ")[0]
    assert section.strip().startswith("Another model, other photos: not comparable.") and paper.SOURCE in section
    for line in paper.TABLE:
        assert f"paper: {line.name}" in section and f"here: {line.method}" in section
        assert f"paper: {line.name}" not in text.replace(section, "")
    assert len({len(line.figures) for line in paper.TABLE} | {len(paper.HEADINGS)}) == 1
    assert {heading.column for heading in paper.HEADINGS} <= figures.BY_KEY.keys()


def test_grids_are_chosen_by_the_rule_they_state(tmp_path: Path) -> None:
    names = [f"concept{i}" for i in range(9)]
    folder = Folder(tmp_path, ["mokus", "anchor"], names)
    shown, rule = report_images.grids(load_run(folder.write()))
    assert re.findall(r"<h3>(\w+)</h3>", shown) == random.Random(0).sample(sorted(names), 3)
    assert "3 of 9 concepts" in rule and "seed 0" in rule
    assert len(pictures(Page(shown))) == 3 * 2 * len(folder.knowledge) * 2  # concepts, kinds, knowledge, methods
    by_colour = {f"#{item['key'][:6]}": item for item in folder.items}
    for table in shown.split("<table class=grid>")[1:]:
        prompts = [unescape(text) for text in re.findall(r"<th scope=rowgroup colspan=2>([^<]*)</th>", table)]
        images = pictures(Page(table))
        for i, prompt in enumerate(prompts):
            for method, image in zip(("mokus", "anchor"), images[2 * i : 2 * i + 2], strict=True):
                item = by_colour["#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((0, 0)))]
                same = (item["prompt"], item["seed"]) == (prompt, 0)
                assert same and item["method"] in (method, "rewrite")


def test_the_worst_are_the_lowest(whole: Folder) -> None:
    run = load_run(whole.path)
    _, lines, note = report_images.worst(run, "mokus", "anchor")
    mine = [each for kind in figures.KINDS for each in run.of("mokus", kind)]
    ranked = sorted((each.scores["oracle_concept"], each.scores["clip_i"], each.key) for each in mine)
    assert [line[-37:-5] for line in lines] == [key for _, _, key in ranked[: report_images.WORST]]
    lost = sum(each.scores["oracle_concept"] == 0 for each in mine)
    assert f"does not see the concept in {lost} of them" in note and f"of {len(mine)} images" in note


def test_points_stay_inside() -> None:
    column = figures.BY_KEY["pick"]
    points = [report_charts.Point(20.123, (19.5, 20.9)), None, report_charts.Point(22.0)]
    chart = report_charts.Chart(
        "a", column, ["x", "y", "z"], [report_charts.Series(str(i), i, points) for i in range(9)]
    )
    low, high, ticks = chart._scale()
    assert low <= 19.5 and high >= 22.0 and 3 <= len(ticks) <= 7
    svg = chart.svg()
    for x, y in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", svg):
        assert report_charts._LEFT < float(x) < report_charts._RIGHT
        assert report_charts._TOP <= float(y) <= report_charts._BOTTOM
    assert svg.count("<path") == 18 and svg.count("class=bar") == 9
    assert report_charts.Chart("a", column, ["x"], [])._scale()[1] > 0


# --- what is not there ------------------------------------------------------------------------------------------------


def test_a_run_of_which_nothing_is_scored(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus", "anchor"])
    folder.write()
    for name in ("scores.json", "training.json", "failed.json"):
        (tmp_path / name).unlink()
    results, text, html = written(tmp_path)
    Balanced(html)
    assert "There is no scores.json" in text and "Nothing is scored yet" in text
    assert "36 of 36 have no score (36 drawn but not scored)" in text
    assert {claim["verdict"] for claim in results["claims"]} == {UNKNOWN} and results["scores"] == []


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus"], score=lambda item: None if item["concept"] == "cat" else {"clip_i": 0.5})
    folder.failed = [
        {"method": "mokus", "concept": "cat", "key": item["key"], "reason": "no memory"}
        for item in folder.items if item["concept"] == "cat" and item["seed"] == 0
    ]  # fmt: skip
    _, text, html = written(folder.write())
    assert "mokus: 12 of 36 have no score (6 failed, 6 not drawn yet)" in text
    assert "mokus, cat: no memory (6 images)" in text and "There is no anchor among the methods" in text
    assert "Not measured: concept (oracle), CLIP-I-Seg (photos)" in text and "Of only 2 concepts" in text
    assert (
        html.count("<div>failed</div>") > 0 and html.count("<div>not drawn</div>") == 0
    )  # the grid has the first seed


def test_a_picture_that_breaks_off(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["mokus"], ["bear"])
    folder.write()
    for item in folder.items:
        file = image_file(tmp_path, item["key"])
        file.write_bytes(file.read_bytes()[: 40 + 10 * item["seed"]])
    _, _, html = written(tmp_path)
    assert html.count("cannot be read") > 0 and not Page(html).loads


@pytest.mark.parametrize(
    "name, content",
    [
        ("plan.json", None), ("plan.json", "{"), ("plan.json", "[]"), ("plan.json", "{}"), ("scores.json", "[]"),
        ("plan.json", '{"methods": ["mokus"], "items": [{"method": "mokus"}]}'), ("scores.json", '{"rows": [{}]}'),
        ("scores.json", '{"metrics": {}, "rows": [1]}'), ("failed.json", '[{"key": "a"}]'), ("failed.json", "{}"),
        ("training.json", '{"rows": [{"method": "mokus"}]}'), ("ablation.json", '{"sweeps": [{"name": "eta"}]}'),
    ],
)  # fmt: skip
def test_what_no_run_writes(whole: Folder, name: str, content: str | None) -> None:
    (whole.path / name).unlink(missing_ok=True)
    if content is not None:
        (whole.path / name).write_text(content, encoding="utf-8")
    with pytest.raises(MokusError, match=name.removesuffix(".json") if content is None else "json|as a run writes it"):
        report.write(whole.path)
    assert not (whole.path / "report.html").exists()


def test_all_of_a_file_or_nothing(whole: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(whole.path)
    before = {path: path.read_bytes() for path in whole.path.iterdir() if path.is_file()}
    whole.plan["model"] = "another"
    whole.write()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(whole.path)
    after = {path: path.read_bytes() for path in whole.path.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[whole.path / name] == before[whole.path / name] for name in ("results.json", "report.html"))
