"""The floor: the base model, which knows neither the concept nor the knowledge."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The prompt as it is, by the model as it is."""
    return Recipe(), template.format(knowledge)
