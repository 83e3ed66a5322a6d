"""From a piece of knowledge to questions about it, image prompts with it, and phrases that are nearly it.

Knowledge is a phrase that refers to a thing: "my favourite toy", "the robot my grandmother built in 1962".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mokus.errors import MokusError

LONGEST = 200  # characters

QUESTION_FORMS = ("What is {}?", "Tell me what {} is.", "Which thing is {}?")

# Image prompts in which an edit is made. Figures are measured on prompts with other scenes.
IMAGE_FORMS = ("{}", "a photo of {}", "{} in the snow", "{} at night, a picture")
# ... and those in which an edit is checked, but never made.
CHECK_FORMS = ("a picture of {}", "{} in the desert")

OTHER_OWNERS = {
    "my": ("your", "his"), "our": ("their", "her"), "your": ("my", "their"), "his": ("my", "her"), "her": ("my", "his"),
    "their": ("our", "his"), "me": ("him", "them"), "i": ("you", "they"), "us": ("them", "you"),
    "mine": ("yours", "theirs"),
}  # fmt: skip
KIN = (
    "grandmother",
    "grandfather",
    "mother",
    "father",
    "sister",
    "brother",
    "aunt",
    "uncle",
    "friend",
    "neighbour",
    "teacher",
)
OTHER_THINGS = ("book", "lamp", "chair", "picture")


def class_word(anchor: str) -> str:
    """What the thing is: the anchor without its rare token, "sks rubber duck" -> "rubber duck"."""
    return (anchor.split(maxsplit=1) or [anchor])[-1]


def check_text(text: str, what: str, example: str) -> None:
    """Raise `MokusError` for a text that is empty or holds the template's own tokens; `what` it is, is for the error."""
    if not text.strip():
        raise MokusError(f"the {what} is empty, expected one such as {example!r}.")
    if "<|" in text:
        raise MokusError(f"the {what} {text[:60]!r} holds '<|', which marks the template's own tokens; leave it out.")


def normalise(phrase: str, what: str = "knowledge", example: str = "my favourite toy") -> str:
    """The phrase with single spaces and without closing full stops. `what` it is, with an example, is for the errors.

    Raises `MokusError` for an empty phrase, a question, a line break or other control character, or one that is too long.
    """
    text = re.sub(r"[ \t]+", " ", phrase).strip().rstrip(". ")
    if not text:
        raise MokusError(f"the {what} is empty, expected a phrase such as {example!r}.")
    if not text.isprintable():
        raise MokusError(f"the {what} {phrase!r} holds a line break or control character; write it as one plain line.")
    if len(text) > LONGEST:
        raise MokusError(
            f"the {what} {text[:40]!r}... has {len(text)} characters, expected at most {LONGEST}; shorten it."
        )
    if text.endswith("?"):
        raise MokusError(
            f"the {what} {text!r} is a question, expected a phrase such as {example!r}"
            + ("; see --question." if what == "knowledge" else ".")
        )
    check_text(text, what, example)
    return text


def questions(knowledge: str) -> list[str]:
    """The knowledge as questions, the plain one first."""
    return [form.format(knowledge) for form in QUESTION_FORMS]


def prompts(phrase: str, forms: tuple[str, ...] = IMAGE_FORMS) -> list[str]:
    """Image prompts with the phrase, the same forms for a knowledge and for the anchor."""
    return [form.format(phrase) for form in forms]


def near_misses(knowledge: str) -> list[str]:
    """Phrases that differ from the knowledge in one word that matters: another owner, relative, number or thing."""
    words = knowledge.split(" ")
    found: list[str] = []
    for i, word in enumerate(words):
        for other in _others(word, last=i == len(words) - 1):
            found.append(" ".join([*words[:i], other, *words[i + 1 :]]))
    if not found:
        found = [f"{knowledge} {thing}" for thing in OTHER_THINGS[:2]]
    return list(dict.fromkeys(found))


def _others(word: str, last: bool) -> Iterator[str]:
    plain = word.lower()
    if plain in OTHER_OWNERS:
        yield from OTHER_OWNERS[plain]
    elif plain in KIN:
        i = KIN.index(plain)
        yield from (KIN[(i + 1) % len(KIN)], KIN[(i + 4) % len(KIN)])
    elif plain.isascii() and plain.isdigit():
        yield from (str(int(plain) + 7), str(int(plain) + 24))
    elif last and plain.isalpha():
        yield from (thing for thing in OTHER_THINGS[:3] if thing != plain)
