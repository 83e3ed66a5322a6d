"""The baseline without an edit: the knowledge in a prompt is replaced by the answer (CAKE, MPE: arXiv 2409.17928).

It changes prompts and not the encoder, so nothing of it can be kept in a pack, and it knows only the phrase as it is
written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mokus.errors import MokusError
from mokus.knowledge import standing_alone
from mokus.low_rank import LowRankShift, Shifts

if TYPE_CHECKING:
    from mokus.goal import Request
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings


def rewritten(prompt: str, meant: Mapping[str, str]) -> str:
    """The prompt with each knowledge replaced by what it means, the longest first, as whole words, in any case."""
    if not meant:
        return prompt
    longest = sorted(meant, key=len, reverse=True)
    pattern = "|".join(f"({re.escape(knowledge)})" for knowledge in longest)
    return re.sub(
        standing_alone(pattern), lambda m: meant[longest[(m.lastindex or 1) - 1]], prompt, flags=re.IGNORECASE
    )


class Editor:
    """See `mokus.editors.Editor`; shifts nothing."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        self.meant: dict[str, str] = {}

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """See `mokus.editors.Editor`."""
        self.meant[request.knowledge] = request.says
        return {}, 0

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """See `mokus.editors.Editor`."""
        self.meant[request.knowledge] = request.says


def refuse() -> None:
    """Raise `MokusError`: a pack cannot hold a rewrite."""
    raise MokusError(
        "the editor 'rewrite' changes prompts and not the text encoder, so a pack cannot hold it; "
        "expected another editor, or write the anchor into the prompt yourself."
    )
