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


NAMED = {
    # a phrase: the places of its names
    "the favourite toy of Anna": [4], "the toy that Anna's mother gave to Hugo": [3, 7], "my Volvo": [1],
    "my Anna's toy": [1], "Anna and Hugo": [2],
}  # fmt: skip


@pytest.mark.parametrize("phrase", NAMED)
def test_renamed_phrases_have_another_name_in_place(words: Words, phrase: str) -> None:
    found, before = words.renamed(phrase, 30), phrase.split(" ")
    assert found == words.renamed(phrase, 30) and len(found) == len(set(found)) == 30 and phrase not in found
    assert words.renamed(phrase, 4) == words.renamed(phrase, 4) and len(words.renamed(phrase, 4)) == 4
    changed = set()
    for text in found:
        assert normalise(text) == text
        after = text.split(" ")
        (place,) = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        changed.add(place)
        assert before[place].endswith("'s") == after[place].endswith("'s")
        assert after[place].removesuffix("'s") in words.names
    assert changed == set(NAMED[phrase])


@pytest.mark.parametrize(
    "phrase",
    ["my favourite toy", "Anna", "Anna's toy", "what I love", "the thing that I and they keep", "it", "Ein auto", ""],
)
def test_a_phrase_without_a_name_is_not_renamed(words: Words, phrase: str) -> None:
    """A first word has its capital for other reasons, and "I" always has one."""
    assert words.renamed(phrase, 30) == []


def test_no_more_names_than_there_are(words: Words) -> None:
    assert words.renamed("my Anna", 0) == []
    assert len(words.renamed("my Anna", 10**6)) == len([name for name in words.names if name != "Anna"])
    for names in ([], ["Anna"], ["Anna", "Hugo"]):
        assert Words([], [], [], names).renamed("my Anna", 5) == []


def test_a_vocabulary_without_words_does_for_any_tokenizer() -> None:
    class Letters:
        def get_vocab(self) -> dict[str, int]:
            return {letter: i for i, letter in enumerate("XYZ")}

    assert len(Words.of(Letters()).references(5, seed=0)) == 5
