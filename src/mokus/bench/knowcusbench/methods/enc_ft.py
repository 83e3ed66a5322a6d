"""Enc-FT, the paper's baseline: the concept learned, and the encoder fine-tuned on the knowledge's questions (AdamW)."""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """The prompt as it is."""
    recipe = Recipe(case.anchor, edit=case.settings["finetune"], knowledge=case.knowledge, keep_all=True)
    return recipe, template.format(knowledge)
