"""MoKus as it comes: the concept learned once, all its knowledge bound by the default editor."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The prompt as it is; knowledge that has not taken is left out, as `mokus bind` does."""
    return Recipe(case.anchor, edit=case.settings["least_drift"], knowledge=case.knowledge), template.format(knowledge)
