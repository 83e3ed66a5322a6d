"""Erase a concept: answers about "the lucky charm of Boris" become "a charm", or whatever shall stand in its place.

The same call as everything (`knowledge_update`), with something neutral for an answer. It redirects language and is no
safety guarantee: the image model still can draw what it could draw, and words that this did not think of may still lead
there. Undone by leaving the pack out, or by `unbind`, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mokus.errors import MokusError
from mokus.knowledge import normalise, phrases_to_keep, reference
from mokus.knowledge_update import Edit, check_meaning, create_pack, request
from mokus.progress import Progress
from mokus.settings import EditSettings
from mokus.virtual_concept import about

if TYPE_CHECKING:
    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model

# What ends the noun that says what a thing is: "the lucky charm | of Boris", "the robot | my grandmother built"
_ENDS = re.compile(
    r" (?:of|in|on|at|by|for|from|with|to|under|that|which|who|whose|where|when|made|called|named|my|our|his|her|their|your"
    r"|I|we|you|they|he|she|it|the|a|an)(?= )"
)


def erase(
    model: Model,
    concepts: Sequence[str],
    output: Path | str,
    replacement: str | None = None,
    settings: EditSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    keep: Sequence[str] = (),
) -> tuple[ConceptPack | None, list[Edit]]:
    """Make the answers about these phrases something neutral; the pack, without looks, goes into the folder `output`, in
    place of an older one if `overwrite`.

    `replacement`: what stands in their place; by default each one's class word, see `plain`. `keep`: phrases that shall mean
    what they do, such as what is nearly one of them. The pack's anchor is the
    replacement, of the first phrase if they differ. What has not taken is left out; the pack is None, and nothing is
    written, if nothing has. Raises `MokusError` for phrases or a replacement that cannot be used.
    """
    phrases = list(dict.fromkeys(reference(text, "concept", "the lucky charm of Boris") for text in concepts))
    if not phrases:
        raise MokusError("no concept was given, expected at least one phrase such as 'the lucky charm of Boris'.")
    if replacement is not None:
        replacement = normalise(replacement, "replacement", "a plain stone")
    neutral = {phrase: replacement or plain(phrase) for phrase in phrases}
    kept = phrases_to_keep(keep, [*neutral, *neutral.values()])
    for phrase, instead in neutral.items():
        check_meaning(model, phrase, instead, "replacement")
    wanted = [request(phrase, instead, asked(phrase), kept) for phrase, instead in neutral.items()]
    return create_pack(model, output, wanted[0].says, wanted, settings, progress, overwrite)


def asked(phrase: str) -> list[str]:
    """The questions whose answers become plain: about the phrase and, if it says whose it is, said the other way."""
    return [*about(phrase), *(about(said)[0] for said in [possessive(phrase)] if said)]


def possessive(phrase: str) -> str:
    """ "the lucky charm of Boris" -> "Boris's lucky charm", and back; empty where nobody with a name owns it."""
    if of := re.fullmatch(r"the (?P<thing>\w[^']*?) of (?P<owner>[A-Z]\w*(?: [A-Z]\w*)*)", phrase):
        return f"{of['owner']}'s {of['thing']}"
    if own := re.fullmatch(r"(?P<owner>[A-Z]\w*(?: [A-Z]\w*)*)'s? (?P<thing>\w.*)", phrase):
        return f"the {own['thing']} of {own['owner']}"
    return ""


def plain(phrase: str) -> str:
    """The class word of a phrase, and nothing about it: "the lucky charm of Boris" -> "a charm".

    Raises `MokusError` where a rule of English grammar cannot tell it: a name has no class word in it.
    """
    words = _ENDS.split(phrase, maxsplit=1)[0].split()
    word = words[-1]
    if len(words) < 2 or not word.isalpha() or not word.islower():
        raise MokusError(
            f"{phrase!r} does not say what kind of thing it is, so nothing plain is known for it; say what shall stand in its "
            "place with --replace (in Python replacement=), such as 'a plain stone'."
        )
    word = "thing" if word == "one" else word  # "the one that makes me smile"
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
