"""MoKus as in the paper: the same with its editor, UltraEdit, one step per knowledge and no checks."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The prompt as it is."""
    recipe = Recipe(case.anchor, edit=case.settings["ultraedit"], knowledge=case.knowledge, keep_all=True)
    return recipe, template.format(knowledge)
