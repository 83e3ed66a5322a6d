"""Which words of a prompt a pack gives a meaning: its anchor, and the phrases that are bound in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from mokus.knowledge import standing_alone
from mokus.packs.concept_pack import ConceptPack


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt; `phrase` and `pack` say what gives it its meaning, and are empty for other words."""

    text: str
    phrase: str = ""
    pack: str = ""


def pieces(prompt: str, packs: Mapping[str, ConceptPack], prefer: str = "") -> list[Piece]:
    """The prompt in pieces, which together are the prompt (in Unicode's composed form).

    `packs` by name. Of phrases that overlap the longest counts; of a phrase that several packs bind, that of `prefer`.
    It is the words that are compared, whatever their capital letters and spaces; how far a prompt's encoding moves is not.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    found = [
        (match.start(), match.end(), phrase, name)
        for name, pack in packs.items()
        for phrase in [pack.anchor, *(known.text for known in pack.knowledge)]
        for match in _form(phrase).finditer(prompt)
    ]
    found.sort(key=lambda each: (each[0] - each[1], each[3] != prefer))  # longest first
    taken: list[tuple[int, int, str, str]] = []
    for each in found:
        if all(each[1] <= other[0] or other[1] <= each[0] for other in taken):
            taken.append(each)
    at, parts = 0, []
    for start, end, phrase, name in sorted(taken):
        parts += [Piece(prompt[at:start]), Piece(prompt[start:end], phrase, name)]
        at = end
    return [part for part in [*parts, Piece(prompt[at:])] if part.text]


def _form(phrase: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, unicodedata.normalize("NFC", phrase).split()))
    return re.compile(standing_alone(words), re.IGNORECASE)
