"""The concept is learned, no weight of the encoder changes: the knowledge in the prompt's text is replaced by the anchor.

Wherever a prompt has the knowledge word for word that is the ceiling itself, and the images are the same (CAKE, MPE:
arXiv 2409.17928).
"""

from __future__ import annotations

from mokus.bench.knowcusbench.recipe import Case, Recipe
from mokus.editors.rewrite import rewritten


def drawn(case: Case, template: str, knowledge: str) -> tuple[Recipe, str]:
    """What is known of the concept is looked for in the whole prompt."""
    return Recipe(case.anchor), rewritten(template.format(knowledge), dict.fromkeys(case.knowledge, case.anchor))
