"""From judgements to scores, before and after, of all that was edited, by category, and of the controls.

WiScore of an image with consistency C, realism R and aesthetic quality A, 0 to 2 each (WISE, arXiv 2503.07265):

    legacy            (0.7 C + 0.2 R + 0.1 A) / 2      0 to 1
    legacy, no half    0.7 C + 0.2 R + 0.1 A           0 to 2; what MoKus's table seems to report (arXiv 2603.12743: 0.81 -> 1.33)
    verified           the judge's one score           0 or 1; not to be compared with the others

An entry's score is the mean over its seeds, a category's the mean over its entries. *Overall* weighs the six fields as WISE
does, where all six are there. Only entries with a score both before and after count, so that both means are of the same; how
many do not is said beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mokus.bench import bootstrap
from mokus.bench.wise.entries import FIELDS, Version
from mokus.bench.wise.judge import Judgement, Question, read_judgement
from mokus.bench.wise.run import AFTER, BEFORE

Row = dict[str, Any]
Scores = dict[str, int]
RESAMPLES = 2000  # of entries
WEIGHTS: dict[Version, dict[str, float]] = {
    "legacy": {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1},
    "verified": {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12},
}


@dataclass(frozen=True)
class Variant:
    """One way to make a number of a judgement."""

    name: str
    protocol: Version
    most: float
    of: Callable[[Scores], float]


def wiscore(scores: Scores) -> float:
    """Legacy, 0 to 1."""
    return wiscore_no_half(scores) / 2


def wiscore_no_half(scores: Scores) -> float:
    """Legacy without the factor 1/2, 0 to 2."""
    return 0.7 * scores["consistency"] + 0.2 * scores["realism"] + 0.1 * scores["aesthetic"]


VARIANTS = (
    Variant("legacy", "legacy", 1.0, wiscore),
    Variant("legacy, no half", "legacy", 2.0, wiscore_no_half),
    Variant("verified", "verified", 1.0, lambda scores: float(scores["score"])),
)
PARTS = tuple(
    Variant(name, "legacy", 2.0, lambda scores, name=name: float(scores[name]))  # type: ignore[misc]
    for name in ("consistency", "realism", "aesthetic")
)

Judged = dict[tuple[int, str, int, Version], Judgement]


def judged(folder: Path, asked: dict[tuple[int, str, int, Version], Question]) -> Judged:
    """What is kept of these questions."""
    found = {where: read_judgement(folder, question.key) for where, question in asked.items()}
    return {where: judgement for where, judgement in found.items() if judgement}


def results(plan: Row, judgements: Judged, protocols: Sequence[str]) -> Row:
    """All figures, of the protocols by which a judge was asked:

    variants   {name: {"most", "edited", "controls", "overall", "categories": [...], "subcategories": [...]}}, and of the three
               legacy scores one by one, parts {name: the same}. `edited`, `controls` and each category: {"before", "after",
               "ratio", "difference", "interval", "entries", "missing", "unchanged"}; `unchanged` is the share of images
               whose score is the same.
    judgements {"scored", "failed", "missing"}
    """
    used = {protocol for _, _, _, protocol in judgements}
    wanted = len(plan["items"]) * len(protocols)
    scored = sum(each.status == "scored" for each in judgements.values())
    failed = len(judgements) - scored
    return {
        "variants": {v.name: _variant(plan, judgements, v) for v in VARIANTS if v.protocol in used},
        "parts": {v.name: _variant(plan, judgements, v) for v in PARTS if v.protocol in used},
        "judgements": {"scored": scored, "failed": failed, "missing": wanted - scored - failed},
        "bootstrap": bootstrap.about(RESAMPLES),
    }


def _variant(plan: Row, judgements: Judged, variant: Variant) -> Row:
    pairs = _pairs(plan, judgements, variant)
    entries = plan["entries"]
    edited = [entry for entry in entries if not entry["control"]]

    def by(name: str, some: Sequence[Row]) -> list[Row]:
        names = dict.fromkeys(entry[name] for entry in some if entry[name])
        return [{"name": n, **_figures([e for e in some if e[name] == n], pairs)} for n in names]

    fields = by("field", edited)
    return {
        "most": variant.most, "edited": _figures(edited, pairs),
        "controls": _figures([entry for entry in entries if entry["control"]], pairs),
        "overall": _overall(fields, WEIGHTS[plan["version"]]), "categories": by("category", edited),
        "fields": fields, "subcategories": by("subcategory", edited),
        "controls_by_subcategory": by("subcategory", [entry for entry in entries if entry["control"]]),
    }  # fmt: skip


Pairs = dict[int, list[tuple[float, float]]]  # by prompt_id, before and after at each seed that has both


def _pairs(plan: Row, judgements: Judged, variant: Variant) -> Pairs:
    found: Pairs = {}
    for entry in plan["entries"]:
        for seed in plan["seeds"]:
            both = [judgements.get((entry["prompt_id"], when, seed, variant.protocol)) for when in (BEFORE, AFTER)]
            values = [variant.of(each.scores) for each in both if each and each.status == "scored"]
            if len(values) == 2:
                found.setdefault(entry["prompt_id"], []).append((values[0], values[1]))
    return found


def _figures(entries: Sequence[Row], pairs: Pairs) -> Row:
    there = [pairs[entry["prompt_id"]] for entry in entries if entry["prompt_id"] in pairs]
    if not there:
        return {
            "before": None, "after": None, "ratio": None, "difference": None, "interval": None, "entries": 0,
            "missing": len(entries), "unchanged": None,
        }  # fmt: skip
    means = np.array([np.mean(each, axis=0) for each in there])  # (entries, 2)
    before, after = (float(value) for value in means.mean(axis=0))
    same = [abs(a - b) < 1e-9 for each in there for a, b in each]
    return {
        "before": before, "after": after, "ratio": after / before if before else None, "difference": after - before,
        "interval": _interval(means[:, 1] - means[:, 0]), "entries": len(there), "missing": len(entries) - len(there),
        "unchanged": sum(same) / len(same),
    }  # fmt: skip


def _interval(differences: Any) -> list[float] | None:
    """The mean difference's 95 % percentile bootstrap over entries; None if there is only one."""
    found = bootstrap.interval(differences, RESAMPLES)
    return None if found is None else list(found)


def _overall(fields: Iterable[Row], weights: dict[str, float]) -> Row | None:
    """WISE's weighted sum, if all six fields have entries with scores."""
    by_name = {row["name"]: row for row in fields if row["entries"]}
    if set(by_name) != set(FIELDS):
        return None
    before, after = (sum(weights[name] * by_name[name][when] for name in FIELDS) for when in ("before", "after"))
    return {"before": before, "after": after, "ratio": after / before if before else None}


def cost(judgements: Iterable[Judgement], price_in: float | None, price_out: float | None) -> Row:
    """Tokens of all attempts, of equal images once, and what they cost, if both prices, per million tokens, are known."""
    once = {each.key: each for each in judgements}.values()
    tokens_in, tokens_out = sum(each.tokens_in for each in once), sum(each.tokens_out for each in once)
    known = price_in is not None and price_out is not None
    return {
        "requests": sum(each.attempts for each in once), "tokens_in": tokens_in, "tokens_out": tokens_out,
        "uncounted": sum(each.uncounted for each in once),
        "cost": (tokens_in * (price_in or 0) + tokens_out * (price_out or 0)) / 1e6 if known else None,
    }  # fmt: skip
