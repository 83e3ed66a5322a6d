"""A concept from words alone: "Zorblax" is a small green creature with three eyes. No photos, no LoRA.

The same call as everything (`knowledge_update`): several questions about the name get the description as their answer, and
image prompts with the name are encoded as those with the description are. What comes of it is what the image model makes
of the description: the edit says what a name means, it shows the model nothing new. After the virtual concepts of MoKus,
arXiv 2603.12743.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mokus.knowledge import check_text, normalise, phrases_to_keep
from mokus.knowledge_update import Edit, check_meaning, create_pack, request
from mokus.progress import Progress
from mokus.settings import EditSettings

if TYPE_CHECKING:
    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model

# what can be asked about a thing and its attributes: all of it is answered by the description
ASKED = ("What is {}?", "What does {} look like?", "Describe {}.", "What colour is {}?", "What shape is {}?")


def create(
    model: Model,
    name: str,
    description: str,
    output: Path | str,
    questions: Sequence[str] | None = None,
    settings: EditSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    keep: Sequence[str] = (),
) -> tuple[ConceptPack | None, Edit]:
    """Give a name a meaning; the pack, without looks, goes into the folder `output`, in place of an older one if `overwrite`.

    The pack's anchor is the description, so phrases that are bound to it later mean it as well. `questions` replaces
    `ASKED`; `keep`: phrases that shall mean what they do. The pack is None, and nothing is written, if the edit has not
    taken. Raises `MokusError` for a name, a description or a phrase to keep that cannot be used.
    """
    name = normalise(name, "name", "Zorblax")
    description = normalise(description, "description", "a small green creature with three eyes")
    check_meaning(model, name, description, "description")
    for question in questions or ():
        check_text(question, "question", f"What is {name}?")
    wanted = request(name, description, questions or about(name), phrases_to_keep(keep, [name, description]))
    pack, edits = create_pack(model, output, description, [wanted], settings, progress, overwrite)
    return pack, edits[0]


def about(phrase: str) -> list[str]:
    """Questions about a thing and its attributes, the plain one first."""
    return [form.format(phrase) for form in ASKED]
