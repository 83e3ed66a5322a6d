"""The run's rows as a page: beside them curves of step sizes, what rounding to bfloat16 loses, and images."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mokus import files
from mokus.bench.editing import page
from mokus.bench.editing.cases import DRAWN, PROMPTS, SEED, Case, cases, other_subject, resolved
from mokus.bench.editing.measure import Edited, Measure, Row, twice
from mokus.bench.editing.run import SINGLES, all_rows, run
from mokus.editors import EDITORS, editor
from mokus.encoder import answers
from mokus.knowledge import questions
from mokus.low_rank import merged
from mokus.miniature import world
from mokus.packs.manifest import versions
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.settings import EditSettings

ETAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def report(
    model: Model,
    folder: Path,
    editors: Sequence[str] = EDITORS,
    counts: Sequence[int] = (1, 10, 50, 100, 200),
    singles: int = SINGLES,
    images: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Row], Path]:
    """`run`, and DIR/report.html beside DIR/results.json: the rows and the page.

    The page has curves of step sizes and images beside; rounding to bfloat16 is measured, too.
    """
    run(model, folder, editors, counts, singles, images, progress)
    rows = all_rows(folder)
    last = {row["editor"]: row["norms"] for row in rows if row.get("norms")}  # of the most edits
    etas = _kept_value(folder / "etas.json", lambda: eta_curve(model, progress))
    bf16 = _kept_value(folder / "rounding.json", lambda: rounding(model, progress))
    extra = {"norms": last, "eta": etas, "images": pictures(model) if images else [], "rounding": bf16}
    about = {"model": model.id, "fingerprint": model.fingerprint, "seed": SEED, "singles": singles, **versions()}
    about |= {f"{name}": asdict(EditSettings.for_editor(model.defaults, editor=name)) for name in editors}
    return rows, page.write(folder, rows, extra, about)


def table(rows: Sequence[Row]) -> Table:
    """The main figures, for a terminal."""
    keys = {
        "efficacy": "efficacy", "generality_questions": "questions", "generality_prompts": "prompts",
        "locality_facts": "facts", "locality_captions": "captions", "locality_near_miss": "near", "retention": "retained",
        "one_hop": "one hop", "image_efficacy": "drawn", "conditioning_drift": "drift", "seconds_per_edit": "s/edit",
    }  # fmt: skip
    found = Table("editor", "edits", *keys.values(), box=None, pad_edge=False)
    for row in rows:
        values = [row.get(key) for key in keys]
        shown = [
            "" if v is None else f"{v:.2f}" if k == "seconds_per_edit" else f"{v:.3f}"
            for k, v in zip(keys, values, strict=True)
        ]
        found.add_row(row["editor"], str(row["edits"]), *shown)
    return found


def _kept_value(file: Path, made: Callable[[], Any]) -> Any:
    if not file.is_file():
        files.write_json(file, made(), indent=1)
    return files.read_json(file)


def rounding(model: Model, progress: Progress | None = None) -> list[Row]:
    """What merging into bfloat16 weights loses (design: small changes round away), beside the side branch.

    The text encoder cast to bfloat16, four single edits of facts for development: the share of ||dW|| that is lost, and
    whether the edited question is answered, with the shift as a side branch and merged.
    """
    encoder = copy.deepcopy(model.pipe.text_encoder).to(torch.bfloat16)
    pipe = copy.copy(model.pipe)
    pipe.text_encoder = encoder
    small, found = replace(model, pipe=pipe), []
    some = [Case(f.phrase, other_subject(random.Random(f.phrase), f.subject), f) for f in world.development_facts()[:4]]
    for name in ("least_drift", "ultraedit"):
        made = editor(name)(model, EditSettings.for_editor(model.defaults, editor=name))
        lost, beside, merged_ = [], [], []
        for i, case in enumerate(some):
            if progress:
                progress(f"rounding of {name}", i, len(some), {})
            shifts, _ = made.edit(case.request, {})
            beside += [answers(small, [questions(case.phrase)[0]], [shifts])[0] == case.new.words]
            with merged(encoder, shifts) as share:
                merged_ += [answers(small, [questions(case.phrase)[0]])[0] == case.new.words]
            lost.append(share)
        n = len(some)
        found.append({
            "editor": name, "lost": sum(lost) / n, "side_branch": sum(beside) / n, "merged": sum(merged_) / n,
        })  # fmt: skip
    return found


def eta_curve(model: Model, progress: Progress | None = None) -> list[Row]:
    """UltraEdit's step size, on facts for development: one edit each."""
    measure, points = Measure(model, images=False), []
    some = [Case(f.phrase, other_subject(random.Random(f.phrase), f.subject), f) for f in world.development_facts()[:6]]
    for i, eta in enumerate(ETAS):
        if progress:
            progress("step sizes", i, len(ETAS), {})
        rows = []
        for case in some:
            made = editor("ultraedit")(model, EditSettings.for_editor(model.defaults, editor="ultraedit", eta=eta))
            edited = Edited(made.edit(case.request, {})[0])
            hits = {
                "efficacy": measure._says([(questions(case.phrase)[0], case.new.words)], edited),
                "generality_prompts": measure._says(
                    [(p.format(case.phrase), resolved(case.new.words, s)) for p, s in PROMPTS.items()], edited
                ),
                "locality_near_miss": measure._as_before([t for p in measure._near([case]) for t in twice(p)], edited),
            }  # fmt: skip
            rows.append({key: sum(hit) / len(hit) for key, hit in hits.items()})
        points.append({"editor": "ultraedit", "eta": eta, **{k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}})
    if progress:
        progress("step sizes", len(ETAS), len(ETAS), {})
    return points


def pictures(model: Model, n: int = 6) -> list[Row]:
    """Before and after of the first edits whose facts the image transformer never saw, by the default editor."""
    measure, found = Measure(model), []
    for case in [case for case in cases(40) if case.fact and case.fact.held_out][:n]:
        made = editor(EDITORS[0])(model, EditSettings.for_editor(model.defaults, editor=EDITORS[0]))
        prompt = DRAWN[0].format(case.phrase)
        before = next(measure.draw([prompt], Edited()))
        after = next(measure.draw([prompt], Edited(made.edit(case.request, {})[0])))
        found.append(
            {"prompt": prompt, "editor": EDITORS[0], "wanted": case.new.words, "before": before, "after": after}
        )
    return found
