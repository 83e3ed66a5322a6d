"""Sweeps, as the paper has them: how many pieces of knowledge, the editor's step size, the layers it edits.

A sweep is a run like any other whose methods are one method at several values, named "mokus@knowledge=5". What is asked is
the same at all of them: each concept's first piece of knowledge, which is edited first and so has all others on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mokus.bench.knowcusbench.aggregate import MARK, load_run, swept
from mokus.bench.knowcusbench.manifest import Suite
from mokus.bench.knowcusbench.methods import Method, method
from mokus.bench.knowcusbench.recipe import Case, Recipe
from mokus.editors import EDITORS
from mokus.files import read_json, write_json
from mokus.pipeline import Defaults
from mokus.settings import EditSettings

COUNTS = (1, 2, 3, 4, 5, 10, 20)
ETAS = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the model's own
WINDOWS = 3  # parts of the edited layers, from the lowest to the highest, each edited alone


@dataclass(frozen=True)
class Sweep:
    """One setting at several values: the method at each, by name, in their order."""

    name: str
    values: dict[str, Any]
    methods: dict[str, Method]


def first_alone(suite: Suite) -> Suite:
    """The suite with every concept's first knowledge alone, which is what all values of a sweep are asked about."""
    concepts = tuple(concept.model_copy(update={"knowledge": concept.knowledge[:1]}) for concept in suite.concepts)
    return suite.model_copy(update={"concepts": concepts})


def knowledge_sweep(suite: Suite, editing: Mapping[str, EditSettings]) -> Sweep:
    """MoKus with so many pieces of knowledge: the concept's own, then those of the others."""
    most = sum(len(concept.knowledge) for concept in suite.concepts)
    counts = [n for n in COUNTS if n <= most]
    return _sweep("knowledge", "mokus", counts, [_with(suite, "mokus", n) for n in counts])


def eta_sweep(suite: Suite, editing: Mapping[str, EditSettings]) -> Sweep:
    """The paper's editor at several step sizes, on all of a concept's own knowledge."""
    own = editing["ultraedit"].eta
    etas = [float(f"{factor * own:.3g}") for factor in ETAS]
    return _sweep("eta", "mokus-paper", etas, [_with(suite, "mokus-paper", None, {"eta": eta}) for eta in etas])


def layers_sweep(suite: Suite, editing: Mapping[str, EditSettings]) -> Sweep:
    """The default editor in the lower, middle and upper edited layers alone, and in all."""
    own = editing["least_drift"].layers
    size = -(-len(own) // WINDOWS)
    windows = [own[i : i + size] for i in range(0, len(own), size)] + [own]
    labels = [f"{window[0]}-{window[-1]}" if window[1:] else str(window[0]) for window in windows]
    return _sweep("layers", "mokus", labels, [_with(suite, "mokus", None, {"layers": window}) for window in windows])


SWEEPS: dict[str, Callable[[Suite, Mapping[str, EditSettings]], Sweep]] = {
    "knowledge": knowledge_sweep,
    "eta": eta_sweep,
    "layers": layers_sweep,
}


def chosen(suite: Suite, names: Sequence[str], defaults: Defaults) -> list[Sweep]:
    """The sweeps of these names, for a model with these defaults."""
    editing = {name: EditSettings.for_editor(defaults, editor=name) for name in EDITORS}
    return [SWEEPS[name](suite, editing) for name in names]


def many(suite: Suite, first: str) -> tuple[str, ...]:
    """All knowledge of the suite: that of the concept whose first it is, then the others', one of each in turn."""
    own = next(concept for concept in suite.concepts if concept.knowledge[0].text == first)
    others = [concept.knowledge for concept in suite.concepts if concept is not own]
    turns = [known[i].text for i in range(max(map(len, others), default=0)) for known in others if i < len(known)]
    return (*(each.text for each in own.knowledge), *turns)


def _sweep(name: str, of: str, values: Sequence[Any], methods: Sequence[Method]) -> Sweep:
    names = [f"{of}{MARK}{name}={value}" for value in values]
    return Sweep(name, dict(zip(names, values, strict=True)), dict(zip(names, methods, strict=True)))


def _with(suite: Suite, of: str, n: int | None, changed: Mapping[str, Any] | None = None) -> Method:
    """A method with so many pieces of knowledge (None: the concept's own) and other settings of its editor."""
    own = {concept.knowledge[0].text: len(concept.knowledge) for concept in suite.concepts}

    def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
        known = many(suite, knowledge)[: own[knowledge] if n is None else n]
        recipe, prompt = method(of)(replace(case, knowledge=known), template, knowledge)
        edit = replace(recipe.edit, **changed) if recipe.edit and changed else recipe.edit
        return replace(recipe, edit=edit), prompt

    return drawn


def write(folder: Path, sweeps: Sequence[Sweep]) -> None:
    """DIR/ablation.json: {"sweeps": [{"name", "rows": [{"value", "label", "figures", "interval"}]}]}, of what is scored."""
    run = load_run(folder)
    found = [
        {"name": sweep.name, "rows": [{"value": v, "label": str(v), **swept(run, m)} for m, v in sweep.values.items()]}
        for sweep in sweeps
    ]
    old = (read_json(folder / "ablation.json") or {"sweeps": []})["sweeps"]
    kept = [each for each in old if each["name"] not in {sweep.name for sweep in sweeps}]
    write_json(folder / "ablation.json", {"sweeps": [*kept, *found]})
