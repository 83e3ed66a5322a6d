"""Figures of a run, with their uncertainty: what `results.json` holds.

A *micro* mean is over images, a *macro* mean over the concepts' own means, so that a concept counts as much as any other.
Intervals say what other concepts might have given: concepts are drawn with replacement, and the interval holds 95 % of the
macro means (percentile bootstrap; Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). Differences between
two methods are of images that have the concept, knowledge, prompt and seed in common.

An image has a value in a column, or is a *miss* (null: nothing was segmented, say), or was not *asked* (the oracle, where
nothing is expected of it), or it is *missing* (not drawn, not scored, this metric left out) or *failed*. A mean is over the
values; beside it stands what it would be if every miss counted as 0.

`results.json`:

    suite, suite_sha256, model, fingerprint, seeds, methods, commands, versions, settings   as in plan.json
    metrics        {name: {"id", "revision", ...}}, as in scores.json
    bootstrap      {"resamples", "seed", "level"}
    fidelity       the column that says whether it is the concept: oracle_concept if it was measured, else clip_i
    counts         [{"method", "planned", "scored", "failed", "missing"}], images
    scores         [{"method", "kind", "perspective", "column", "micro", "macro", "interval": [low, high] or null,
                   "macro_misses_zero", "images", "concepts", "misses", "missing", "failed"}]; perspective "" is all of them,
                   `images` and `concepts` are those with a value
    by_concept     [{"method", "kind", "concept", "mean", "images"}] of the fidelity
    differences    [{"method", "reference", "kind", "column", "mean", "interval", "pairs", "concepts"}], method - reference,
                   a macro mean
    training       [{"method", "seconds", "interval", "learn", "bind", "concepts", "unknown", "knowledge", "taken"}]: means
                   over concepts, of all the knowledge of a concept; `unknown` is how many were stopped in between
    claims         see `claims`
    ablation       the sweeps of ablation.json, of the scores as they are now; one that was made in another folder as it is there
    failed         as in failed.json, and what could not be scored
    cut_missed     {concept: photos of which no subject could be cut out}; CLIP-I-Seg leaves them out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mokus.bench import bootstrap
from mokus.bench.bootstrap import RESAMPLES, SEED, Interval
from mokus.errors import MokusError
from mokus.files import read_json

KINDS = ("reconstruction", "generation")
REFERENCES = ("mokus", "anchor")
TRAINED = "training_seconds"  # of a sweep, besides the columns
MARK = "@"  # in the names of a sweep's methods, which are no methods of the tables
ASKED = "oracle_asked"  # the one column that is null, too, where there is nothing to measure

CUT_MISSED = "clip_i_seg_references_missed"  # in scores.json, but no metric
NOT_DRAWN = "not drawn"  # in scores.json, of items that nothing is wrong with

Values = Mapping[str, Sequence[float]]  # by concept
Row = dict[str, Any]


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A metric as it is shown."""

    key: str
    name: str
    meaning: str
    kinds: tuple[str, ...] = KINDS
    text: Callable[[float], str] = "{:.3f}".format

    def difference(self, value: float) -> str:
        """A difference with its sign, of shares in points."""
        text = f"{100 * value:+.1f}" if self.text is share else f"{value:+.3f}"
        return text if float(text) else text[1:]  # neither +0 nor -0

    def size(self, value: float) -> str:
        """How large a difference is: "3 points", "0.03"."""
        return f"{100 * value:g} points" if self.text is share else f"{value:g}"


def share(value: float) -> str:
    """A share of 1 as per cent."""
    return f"{value:.1%}"


_PROMPTS = ("generation",)  # what follows a prompt is measured where there is more than the concept in it
COLUMNS = (
    Column("oracle_concept", "concept (oracle)", "share of images in which the oracle sees the concept", text=share),
    Column("clip_i", "CLIP-I", "cosine of the image and the photos"),
    Column("clip_i_seg_source", "CLIP-I-Seg (photos)", "the same, with the background of the photos taken away"),
    Column("clip_i_seg_both", "CLIP-I-Seg (both)", "the same, with the background of photos and image taken away"),
    Column("dino", "DINO", "cosine of the image and the photos, by DINO"),
    Column("oracle_asked", "asked (oracle)",
           "share of the scenes and styles asked for that the oracle sees; it reads no materials and no second thing",
           _PROMPTS, share),
    Column("clip_t", "CLIP-T", "cosine of the image and the prompt, with the knowledge in it", _PROMPTS),
    Column("clip_t_class", "CLIP-T (class)", "the same, with the class word for the knowledge", _PROMPTS),
    Column("pick", "Pick", "PickScore of the image and the prompt, with the knowledge in it", _PROMPTS, "{:.2f}".format),
    Column("pick_class", "Pick (class)", "the same, with the class word for the knowledge", _PROMPTS, "{:.2f}".format),
)  # fmt: skip
BY_KEY = {column.key: column for column in COLUMNS}


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One item of a method, and what was measured of its image."""

    method: str
    key: str
    concept: str
    kind: str
    perspective: str
    knowledge: int
    template: str
    prompt: str
    seed: int
    expected: bool  # whether the oracle is asked anything
    state: str  # "scored", "failed", "missing"
    scores: Mapping[str, float | None]

    @property
    def pair(self) -> tuple[str, int, str, int]:
        """What an image of another method has in common with this one."""
        return self.concept, self.knowledge, self.template, self.seed

    def outcome(self, column: str) -> str:
        """What became of it in a column: "value", "miss", "unasked", "missing" or "failed"."""
        if column not in self.scores:
            return "failed" if self.state == "failed" else "missing"
        if self.scores[column] is not None:
            return "value"
        return "unasked" if column == ASKED and not self.expected else "miss"


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    plan: Row
    samples: list[Sample]
    metrics: Row
    training: list[Row]
    failed: list[Row]  # as in failed.json, and what could not be scored
    cut_missed: dict[
        str, int
    ]  # by concept, of how many photos no subject could be cut out; they are left out of CLIP-I-Seg
    recorded: list[Row]  # the sweeps of ablation.json, as they were when it was written
    absent: list[str]  # of its files

    @property
    def methods(self) -> list[str]:
        """Those of the tables, in the plan's order."""
        return [name for name in self.plan["methods"] if MARK not in name]

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[Sample]]:
        groups: dict[tuple[str, str], list[Sample]] = {}
        for each in self.samples:
            groups.setdefault((each.method, each.kind), []).append(each)
        return groups

    def of(self, method: str, kind: str, perspective: str = "") -> list[Sample]:
        """A method's samples of a kind, and of a perspective if one is named."""
        return [each for each in self._groups.get((method, kind), ()) if perspective in ("", each.perspective)]

    @cached_property
    def perspectives(self) -> list[str]:
        """Those of the generation prompts, in the plan's order."""
        return list(dict.fromkeys(each.perspective for each in self.samples if each.perspective))

    def columns(self, kind: str) -> list[Column]:
        """Those shown of a kind of which anything was measured."""
        return [column for column in COLUMNS if (kind, column.key) in self._measured and kind in column.kinds]

    @cached_property
    def _measured(self) -> set[tuple[str, str]]:
        return {(each.kind, name) for each in self.samples for name in each.scores}

    @cached_property
    def sweeps(self) -> list[Row]:
        """Those of ablation.json, of the scores as they are now; one whose images are not in the plan as it was recorded."""
        return [_as_scored(self, sweep) for sweep in self.recorded]

    @property
    def fidelity(self) -> Column:
        """What says whether an image shows the concept: the oracle, where there is one."""
        return BY_KEY["oracle_concept" if any(name == "oracle_concept" for _, name in self._measured) else "clip_i"]


def load_run(folder: Path) -> Run:
    """All that is there of a run. Raises `MokusError` if there is no plan, or for a file that is not what a run writes."""
    plan = _read(folder, "plan.json", dict)
    if plan is None:
        raise MokusError(
            f"{folder} holds no plan.json, expected the folder that 'mokus bench knowcus run -o DIR' fills."
        )
    files = {name: _read(folder, name, kind) for name, kind in _FILES.items()}
    absent = [name for name in ("training.json", "scores.json") if files[name] is None]
    scored, failed = files["scores.json"] or {"metrics": {}, "rows": []}, files["failed.json"] or []
    training = files["training.json"] or {"rows": []}
    try:
        rows = {_identity(row): _values(row) for row in scored["rows"]}
        gone = {row["key"] for row in failed}
        samples = [_sample(item, rows.get(_identity(item)), item["key"] in gone) for item in plan["items"]]
        lost = failed + [row for row in scored.get("missing", ()) if row["reason"] != NOT_DRAWN]
        return Run(
            folder, {**plan, "methods": list(plan["methods"])}, samples, dict(scored["metrics"]),
            [_fields(row, *_TRAINING) for row in training["rows"]],
            [_fields(row, "method", "concept", "key", "reason") for row in lost],
            {row["concept"]: int(row[CUT_MISSED]) for row in scored["rows"] if row.get(CUT_MISSED)},
            [_sweep(sweep) for sweep in (files["ablation.json"] or {"sweeps": []})["sweeps"]], absent,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MokusError(
            f"a file in {folder} is not as a run writes it ({error!r}); run the benchmark there again."
        ) from error


_FILES: dict[str, type] = {"scores.json": dict, "training.json": dict, "failed.json": list, "ablation.json": dict}


_TRAINING = ("method", "concept", "seconds_learn", "seconds_bind", "knowledge", "taken")


def _fields(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names}


def _sweep(sweep: Row) -> Row:
    rows = [
        {"value": row["value"], "label": str(row.get("label") or row["value"]), "figures": dict(row["figures"]),
         "interval": dict(row.get("interval") or {})}
        for row in sweep["rows"]
    ]  # fmt: skip
    return {"name": str(sweep["name"]), "rows": rows}


def _read(folder: Path, name: str, kind: type) -> Any:
    value = read_json(folder / name)
    if value is not None and not isinstance(value, kind):
        raise MokusError(f"{folder / name} holds a {type(value).__name__}, expected a {kind.__name__}; take it away.")
    return value


def _identity(row: Row) -> tuple[str, str, str, str]:
    """By which a score is found: two methods may have an image in common, and be asked for it in other words."""
    return row["key"], row["prompt"], row["class_prompt"], row["concept"]


def _values(row: Row) -> dict[str, float | None]:
    return {name: _finite(row[name]) for name in BY_KEY if name in row}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _sample(item: Row, scores: dict[str, float | None] | None, failed: bool) -> Sample:
    names = ("method", "key", "concept", "kind", "perspective", "knowledge", "template", "prompt", "seed")
    state = "scored" if scores is not None else "failed" if failed else "missing"
    return Sample(**_fields(item, *names), expected=bool(item["expected"]), state=state, scores=scores or {})


# --- means and intervals ----------------------------------------------------------------------------------------------


def macro(values: Values) -> float | None:
    """Mean of the concepts' means; None if there is no value. `values`: by concept, none of them empty."""
    return float(np.mean(_means(values))) if values else None


def micro(values: Values) -> float | None:
    """Mean of all values."""
    return float(np.mean([value for some in values.values() for value in some])) if values else None


def interval(values: Values, resamples: int = RESAMPLES, seed: int = SEED) -> Interval | None:
    """The macro mean's 95 % interval over concepts, which are drawn with replacement; None if there is only one."""
    return bootstrap.interval(_means(values), resamples, seed)


def _means(values: Values) -> NDArray[np.float64]:
    return np.array([np.mean(values[concept]) for concept in sorted(values)])


def _grouped(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for concept, value in pairs:
        found.setdefault(concept, []).append(value)
    return found


def values_of(samples: Iterable[Sample], column: str, misses: float | None = None) -> dict[str, list[float]]:
    """A column's values by concept; a miss has none, or the one that `misses` says."""
    kept = ("value",) if misses is None else ("value", "miss")
    some = ((each.concept, each.scores[column]) for each in samples if each.outcome(column) in kept)
    return _grouped((concept, misses if value is None else value) for concept, value in some)  # type: ignore[misc]


def figure(samples: Sequence[Sample], column: str) -> Row:
    """A column's means over samples of one method, its interval, and how many of them have no value and why."""
    values = values_of(samples, column)
    outcomes = [each.outcome(column) for each in samples]
    return {
        "micro": micro(values), "macro": macro(values), "interval": interval(values),
        "macro_misses_zero": macro(values_of(samples, column, 0.0)),
        "images": outcomes.count("value"), "concepts": len(values), "misses": outcomes.count("miss"),
        "missing": outcomes.count("missing"), "failed": outcomes.count("failed"),
    }  # fmt: skip


def difference(run: Run, method: str, reference: str, kind: str, column: str) -> Row:
    """method - reference, over images that differ in nothing else and have a value in both."""
    theirs = {each.pair: each.scores[column] for each in run.of(reference, kind) if each.outcome(column) == "value"}
    ours = [each for each in run.of(method, kind) if each.outcome(column) == "value" and each.pair in theirs]
    values = _grouped((each.concept, each.scores[column] - theirs[each.pair]) for each in ours)  # type: ignore[operator]
    return {
        "method": method, "reference": reference, "kind": kind, "column": column,
        "mean": macro(values), "interval": interval(values), "pairs": len(ours), "concepts": len(values),
    }  # fmt: skip


def swept(run: Run, method: str) -> Row:
    """What ablation.json holds of one value of a sweep: {"figures", "interval"}, by "kind column", and "training_seconds"."""
    rows = {f"{kind} {c.key}": figure(run.of(method, kind), c.key) for kind in KINDS for c in run.columns(kind)}
    measured = {name: row for name, row in rows.items() if row["images"]}
    figures = {name: row["macro"] for name, row in measured.items()}
    between = {name: row["interval"] for name, row in measured.items()}
    if trained := seconds(run, method, "learn", "bind"):
        figures[TRAINED], between[TRAINED] = macro(trained), interval(trained)
    return {"figures": figures, "interval": between}


def _as_scored(run: Run, sweep: Row) -> Row:
    """The sweep with figures of the scores as they are: since it was recorded, images may be added or scored by others."""
    planned = {name.partition(MARK)[2]: name for name in run.plan["methods"] if MARK in name}
    methods = [planned.get(f"{sweep['name']}={row['label']}") for row in sweep["rows"]]
    if None in methods:  # made in another folder
        return sweep
    return {**sweep, "rows": [{**row, **swept(run, m)} for row, m in zip(sweep["rows"], methods, strict=True) if m]}


def seconds(run: Run, method: str, *parts: str) -> dict[str, list[float]]:
    """One value for each concept, the sum of what its stages took; none where one of them was stopped in between."""
    rows = {
        row["concept"]: [row[f"seconds_{part}"] for part in parts] for row in run.training if row["method"] == method
    }
    return {concept: [float(sum(some))] for concept, some in rows.items() if None not in some}


def training_time(run: Run, method: str) -> Row | None:
    """Seconds to train a method for all the knowledge of a concept; None if none was trained."""
    rows = [row for row in run.training if row["method"] == method]
    if not rows:
        return None
    learn, bind, both = (seconds(run, method, *parts) for parts in (("learn",), ("bind",), ("learn", "bind")))
    return {
        "method": method, "seconds": macro(both), "interval": interval(both), "learn": macro(learn), "bind": macro(bind),
        "concepts": len(both), "unknown": len(rows) - len(both),
        "knowledge": sum(row["knowledge"] for row in rows), "taken": sum(row["taken"] for row in rows),
    }  # fmt: skip


# --- all of it --------------------------------------------------------------------------------------------------------


def aggregate(run: Run) -> Row:
    """All figures, as `results.json` holds them but for the claims."""
    about = ("suite", "suite_sha256", "model", "fingerprint", "seeds", "versions", "settings")
    return {
        **{name: run.plan.get(name) for name in about}, "methods": run.methods, "commands": commands(run.plan),
        "metrics": run.metrics, "bootstrap": bootstrap.about(),
        "fidelity": run.fidelity.key, "counts": [_counted(run, method) for method in run.methods],
        "scores": [row for kind in KINDS for method in run.methods for row in _scores(run, method, kind)],
        "by_concept": [row for kind in KINDS for method in run.methods for row in _by_concept(run, method, kind)],
        "differences": [
            difference(run, method, reference, kind, column.key)
            for reference in REFERENCES if reference in run.methods
            for method in run.methods if method != reference
            for kind in KINDS for column in run.columns(kind)
        ],
        "training": [row for method in run.methods if (row := training_time(run, method))],
        "ablation": run.sweeps, "failed": run.failed, "cut_missed": run.cut_missed,
    }  # fmt: skip


def commands(plan: Row) -> list[str]:
    """With which the run was made, as far as they are known."""
    return list(plan.get("commands") or filter(None, [plan.get("command")]))


def _counted(run: Run, method: str) -> Row:
    states = [each.state for each in run.samples if each.method == method]
    return {"method": method, "planned": len(states), **{s: states.count(s) for s in ("scored", "failed", "missing")}}


def _scores(run: Run, method: str, kind: str) -> list[Row]:
    perspectives = ["", *(run.perspectives if kind == "generation" else [])]
    groups = {perspective: run.of(method, kind, perspective) for perspective in perspectives}
    return [
        {"method": method, "kind": kind, "perspective": perspective, "column": column.key, **figure(some, column.key)}
        for perspective, some in groups.items()
        for column in run.columns(kind)
    ]


def _by_concept(run: Run, method: str, kind: str) -> list[Row]:
    values = values_of(run.of(method, kind), run.fidelity.key)
    return [
        {"method": method, "kind": kind, "concept": concept, "mean": float(np.mean(some)), "images": len(some)}
        for concept, some in values.items()
    ]
