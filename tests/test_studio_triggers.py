"""Which words of a prompt trigger which knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mokus.studio.triggers import pieces


def pack(anchor: str, *knowledge: str) -> Any:
    return SimpleNamespace(anchor=anchor, knowledge=[SimpleNamespace(text=text) for text in knowledge])


PACKS = {
    "toy": pack("sks toy", "my toy", "my toy robot", "the one (1962)", "ä. b"),
    "dog": pack("zwx dog", "my dog", "my toy"),
}


def marked(prompt: str, prefer: str = "", packs: dict[str, Any] = PACKS) -> list[tuple[str, str]]:
    return [(piece.text, piece.pack) for piece in pieces(prompt, packs, prefer) if piece.pack]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("My  Toy robot in the snow", [("My  Toy robot", "toy")]),  # the longest; capitals and spaces do not count
        ("my toy robots", [("my toy", "toy")]),  # whole words alone
        ("a sks toy beside my dog", [("sks toy", "toy"), ("my dog", "dog")]),
        ("the one (1962), at night", [("the one (1962)", "toy")]),  # no pattern, but text
        ("a\u0308. b", [("ä. b", "toy")]),  # however the letter is composed
        ("mytoy", []),
        ("", []),
    ],
)
def test_what_is_marked(prompt: str, expected: Sequence[tuple[str, str]]) -> None:
    assert marked(prompt) == expected


@pytest.mark.parametrize("prompt", ["my toy", "x my toy y my dog", "nothing at all", "  my dog  ", "", "<b>my toy</b>"])
def test_the_pieces_are_the_prompt(prompt: str) -> None:
    assert "".join(piece.text for piece in pieces(prompt, PACKS)) == prompt


def test_a_phrase_of_two_packs_is_of_the_one_that_is_preferred() -> None:
    assert marked("my toy", "dog") == [("my toy", "dog")]
    assert marked("my toy", "toy") == [("my toy", "toy")]
