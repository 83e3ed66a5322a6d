"""The images of a report: the methods beside each other, and the worst of one of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from html import escape

from PIL import Image

from mokus.bench.bootstrap import SEED
from mokus.bench.knowcusbench.aggregate import COLUMNS, KINDS, Run, Sample
from mokus.bench.knowcusbench.plan import image_file
from mokus.html import img

SHOWN, WORST = 3, 12  # concepts, images
SMALL = 160  # pixels, about twice what they are shown with

_BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises for a file that breaks off


def grids(run: Run) -> tuple[str, str]:
    """For some concepts, rows of knowledge and columns of methods, all of one seed; and the rule by which they were chosen."""
    concepts, rng = sorted({each.concept for each in run.samples}), random.Random(SEED)
    chosen = rng.sample(concepts, min(SHOWN, len(concepts)))
    seeds = sorted({each.seed for each in run.samples})
    if not any(image_file(run.folder, each.key).is_file() for each in run.samples):
        return "", ""
    found = {(each.method, each.kind, *each.pair): each for each in run.samples}
    shown = "".join(_concept(run, found, concept, seeds[0], rng) for concept in chosen)
    rule = (
        f"{len(chosen)} of {len(concepts)} concepts and a prompt for each piece of knowledge, drawn by Python's "
        f"random.Random({SEED}) from the sorted names, not by hand; every image has the seed {seeds[0]}."
    )
    outlined = " Outlined: the oracle sees the concept." if run.fidelity.key == "oracle_concept" else ""
    return shown, rule + outlined


Found = dict[tuple[str, str, str, int, str, int], Sample]


def _concept(run: Run, found: Found, concept: str, seed: int, rng: random.Random) -> str:
    of = [each for each in found.values() if each.concept == concept]
    pieces = sorted({each.knowledge for each in of})
    templates = {kind: sorted({each.template for each in of if each.kind == kind}) for kind in KINDS}
    tables = []
    for kind, title in zip(KINDS, ("the knowledge itself", "in a prompt"), strict=True):
        rows = [(kind, concept, piece, rng.choice(templates[kind]), seed) for piece in pieces if templates[kind]]
        if rows:
            tables.append(f"<div><h4>{title}</h4>{_grid(run, found, rows)}</div>")
    return f"<article><h3>{escape(concept)}</h3><div class=twice>{''.join(tables)}</div></article>"


def _grid(run: Run, found: Found, rows: Sequence[tuple[str, str, int, str, int]]) -> str:
    head = "".join(f"<th scope=col>{escape(method)}</th>" for method in run.methods)
    body = []
    for row in rows:
        cells = [found.get((method, *row)) for method in run.methods]
        prompt = next((each.prompt for each in cells if each), "")
        body.append(f"<tr><th scope=rowgroup colspan={len(cells)}>{escape(prompt)}</th></tr>")
        body.append(f"<tr>{''.join(_cell(run, each) for each in cells)}</tr>")
    return f"<div class=scroll><table class=grid><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _cell(run: Run, sample: Sample | None) -> str:
    picture = _picture(run, sample)
    return f"<td>{picture}</td>" if picture.startswith("<img") else f"<td class=lost>{picture}</td>"


def _picture(run: Run, sample: Sample | None) -> str:
    """The image with its scores, or why there is none."""
    if sample is None:
        return "<div>not asked</div>"
    file = image_file(run.folder, sample.key)
    if not file.is_file():
        return f"<div>{'failed' if sample.state == 'failed' else 'not drawn'}</div>"
    seen = sample.scores.get("oracle_concept") == 1
    try:
        with Image.open(file, formats=("PNG",)) as image:
            small = image.convert("RGB")
            small.thumbnail((SMALL, SMALL))
            return img(small, "hit" if seen else "", "; ".join([sample.method, *_told(sample)]))
    except _BROKEN:
        return "<div>cannot be read</div>"


def _told(sample: Sample) -> Iterator[str]:
    """An image's scores in words."""
    for column in COLUMNS:
        value = sample.scores.get(column.key)
        if value is not None and sample.kind in column.kinds:
            yield f"{column.name} {column.text(value)}"
        elif sample.outcome(column.key) == "miss":
            yield f"{column.name}: missed"


# --- the worst --------------------------------------------------------------------------------------------------------


def worst(run: Run, method: str, beside: str) -> tuple[str, list[str], str]:
    """A method's images of the lowest fidelity, each beside another method's of the same seed; the same in words; a note."""
    column = run.fidelity
    of = [each for kind in KINDS for each in run.of(method, kind) if each.outcome(column.key) == "value"]
    ranked = sorted(of, key=_rank(run))[:WORST]
    theirs = {(each.kind, *each.pair): each for kind in KINDS for each in run.of(beside, kind)}
    cards = "".join(_card(run, each, theirs.get((each.kind, *each.pair)), beside) for each in ranked)
    lines = [
        f"{each.concept}, {each.kind}, seed {each.seed}: “{each.prompt}”: {'; '.join(_told(each))} ({each.key}.png)"
        for each in ranked
    ]
    ties = ", and among equals on CLIP-I" if column.key != "clip_i" else ""
    note = f"The {len(ranked)} of {len(of):,} images of {method} that are lowest on {column.name}{ties}"
    note += f"; at the right of each, that of {beside} with the same seed." if theirs else "."
    if column.key == "oracle_concept" and of:
        lost = sum(each.scores[column.key] == 0 for each in of)
        note += f" The oracle does not see the concept in {lost:,} of them ({lost / len(of):.1%})."
    return f"<div class=worst>{cards}</div>", lines, note


def _rank(run: Run) -> Callable[[Sample], tuple[float, float, str, str]]:
    def rank(sample: Sample) -> tuple[float, float, str, str]:
        first, second = (sample.scores.get(name) for name in (run.fidelity.key, "clip_i"))
        return (first or 0.0, 2.0 if second is None else second, sample.key, sample.prompt)

    return rank


def _card(run: Run, sample: Sample, other: Sample | None, beside: str) -> str:
    pair = f"<div>{_picture(run, sample)}{escape(sample.method)}</div>"
    pair += f"<div>{_picture(run, other)}{escape(beside)}</div>" if other else ""
    about = f"{sample.concept}, seed {sample.seed}; {'; '.join(_told(sample))}"
    caption = f"<figcaption>{escape(sample.prompt)}<small>{escape(about)}</small></figcaption>"
    return f"<figure><div class=pair>{pair}</div>{caption}</figure>"
