"""The ceiling: the concept is learned, and the prompt names its anchor instead of the knowledge."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The anchor in the knowledge's place."""
    return Recipe(case.anchor), template.format(case.anchor)
