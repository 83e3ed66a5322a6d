"""Naive-DB, the paper's baseline: stage 1 again for every knowledge, with the knowledge itself as the prompt."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The prompt as it is, by the model that was trained for this knowledge."""
    return Recipe(knowledge, class_word=case.class_word), template.format(knowledge)
