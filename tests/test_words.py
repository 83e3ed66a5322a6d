"""Words and references made of a tokenizer's own pieces."""

from __future__ import annotations

import pytest

from mokus.knowledge import normalise
from mokus.pipeline import Model
from mokus.words import Words

PHRASES = ["my favourite toy", "the robot my grandmother built in 1962", "it", "R2-D2", "the one that is"]


@pytest.fixture(scope="module")
def words(pico: Model) -> Words:
    return Words.of(pico.pipe.tokenizer)


def test_references_are_plain_phrases_and_the_same_again(words: Words) -> None:
    found = words.references(300, seed=0)
    assert len(found) == 300 and len(set(found)) > 290 and found == words.references(300, seed=0)
    assert found != words.references(300, seed=1)
    assert all(normalise(text) == text for text in found)


def test_references_have_words_of_one_piece_and_of_several_names_numbers_and_compounds(
    pico: Model, words: Words
) -> None:
    said = " ".join(words.references(300, seed=0)).split()
    pieces = [len(pico.pipe.tokenizer(f" {word}").input_ids) for word in said]
    assert 0.1 < sum(n > 1 for n in pieces) / len(pieces) < 0.7
    assert any(word.isdigit() for word in said) and any("-" in word for word in said)
    assert any(word[0].isupper() and word != "I" for word in said)


@pytest.mark.parametrize("phrase", PHRASES)
def test_exchanged_phrases_differ_in_one_or_two_words(words: Words, phrase: str) -> None:
    found, before = words.exchanged(phrase, 60), phrase.split(" ")
    assert len(found) == 60 and found == words.exchanged(phrase, 60)
    changes = [sum(a != b for a, b in zip(before, text.split(" "), strict=True)) for text in found]
    assert set(changes) <= {0, 1, 2} and changes.count(0) <= 2  # a word may be exchanged for itself
    assert len(before) < 3 or 2 in changes


def test_a_vocabulary_without_words_does_for_any_tokenizer() -> None:
    class Letters:
        def get_vocab(self) -> dict[str, int]:
            return {letter: i for i, letter in enumerate("XYZ")}

    assert len(Words.of(Letters()).references(5, seed=0)) == 5
