"""Phrases in, phrases out: what knowledge may be, how it is asked, drawn and nearly missed."""

from __future__ import annotations

import random
import string

import pytest

from mokus.errors import MokusError
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS, LONGEST, near_misses, normalise, prompts, questions
from mokus.miniature import language
from mokus.prior_prompts import prior_prompts, references

PHRASES = [
    "my favourite toy", "the robot my grandmother built in 1962", "the one that makes me smile", "My dog", "it", "R2-D2",
    "the lamp", "a gift from my teacher", "our neighbour's car", "the toy {} of {0}", "the 2 of us", "das größte Haus",
    "the thing I keep at No. 7", "the 5 cent coin", "our sister, her aunt and their book",
]  # fmt: skip


MIXED = (
    "my",
    "your",
    "her",
    "it",
    "the",
    "of",
    "1",
    "7",
    "23",
    "24",
    "25",
    "31",
    "1962",
    "aunt",
    "mother",
    "lamp",
    "toy",
)


def random_phrases(n: int) -> list[str]:
    """References of the synthetic world, and words with numbers among them."""
    rng = random.Random(0)
    found = [language.unknown_reference(rng)[0] for _ in range(n)]
    for _ in range(n):
        words = [rng.choice(MIXED) for _ in range(4)]
        found.append(" ".join(words))
    return found


# --- normalise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "why"),
    [
        ("", "empty"), ("  \t ", "empty"), (".", "empty"), (" . ", "empty"),
        ("what is my favourite toy?", "question"), ("my toy ?", "question"), ("What is it?.", "question"),
        ("my\ntoy", "line break"), ("my\x00toy", "control"), ("my\x1b[31mtoy", "control"), ("my\u2028toy", "line break"),
        ("my <|im_end|> toy", r"<\|"), ("<|", r"<\|"),
        ("a" * (LONGEST + 1), str(LONGEST)), ("toy " * LONGEST, str(LONGEST)),
    ],
)  # fmt: skip
def test_what_is_no_knowledge_is_refused(phrase: str, why: str) -> None:
    with pytest.raises(MokusError, match=why) as caught:
        normalise(phrase)
    assert len(str(caught.value)) < 2 * LONGEST + 200 and "\n" not in str(caught.value)


def test_spaces_and_the_full_stop_do_not_matter() -> None:
    assert normalise("  my \t favourite   toy.  ") == "my favourite toy"
    assert normalise("the toy of Mr. Smith .") == "the toy of Mr. Smith"
    assert normalise("a" * LONGEST + ".") == "a" * LONGEST


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_plain_phrase_is_left_as_it_is(phrase: str) -> None:
    assert normalise(phrase) == phrase


def test_normalising_twice_is_normalising_once() -> None:
    """Else a phrase could not be unbound by the name under which it is listed."""
    rng = random.Random(1)
    phrases = ["my toy..", "my toy. .", "the toy of Acme Inc...", "my toy . . ."]
    phrases += ["".join(rng.choices(string.ascii_letters[:6] + " \t..  ", k=rng.randint(1, 12))) for _ in range(3000)]
    checked = 0
    for phrase in phrases:
        try:
            once = normalise(phrase)
        except MokusError:
            continue
        assert normalise(once) == once, phrase
        checked += 1
    assert checked > 1000


# --- questions, prompts, near misses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phrase", PHRASES)
def test_the_phrase_is_in_all_that_is_made_of_it(phrase: str) -> None:
    asked, drawn, checked = questions(phrase), prompts(phrase), prompts(phrase, CHECK_FORMS)
    for texts in (asked, drawn, checked):
        assert len(set(texts)) == len(texts) > 0
        assert all(phrase in text for text in texts)
    assert asked[0] == f"What is {phrase}?" and drawn[0] == phrase


def test_checks_are_made_on_forms_that_were_not_edited() -> None:
    assert not set(CHECK_FORMS) & set(IMAGE_FORMS)


def test_forms_are_the_same_for_anchor_and_knowledge() -> None:
    for one, other in zip(prompts("my favourite toy"), prompts("sks toy"), strict=True):
        assert one.replace("my favourite toy", "sks toy") == other


@pytest.mark.parametrize("phrase", PHRASES)
def test_near_misses_are_one_word_off(phrase: str) -> None:
    check_near_misses(phrase)


def test_near_misses_of_any_phrase_are_one_word_off() -> None:
    for phrase in random_phrases(300):
        check_near_misses(phrase)


@pytest.mark.parametrize("phrase", ["the car with 0 wheels", "0", "the coin of ² euros", "the ① in the list", "toy ٣"])
def test_numbers_that_are_easy_to_get_wrong(phrase: str) -> None:
    check_near_misses(phrase)


def check_near_misses(phrase: str) -> None:
    found = near_misses(phrase)
    assert found and len(set(found)) == len(found), phrase
    assert phrase not in found, phrase
    for near in found:
        before, after = phrase.split(" "), near.split(" ")
        if len(after) > len(before):  # nothing in it could be exchanged: one word more
            assert after[:-1] == before, phrase
        else:
            assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, phrase
        assert normalise(near) == near, phrase


def test_near_misses_exchange_what_matters() -> None:
    found = near_misses("the robot my grandmother built in 1962")
    assert any(" my " not in text for text in found)
    assert any("grandmother" not in text for text in found)
    assert any("1962" not in text for text in found)


# --- prior prompts ----------------------------------------------------------------------------------------------------


def test_prior_prompts_are_as_many_as_wanted_and_the_same_again() -> None:
    for class_word in ("toy", "dog", "zeppelin"):
        for n in (0, 1, 7, 100):
            found = prior_prompts(class_word, n, seed=3)
            assert len(found) == n and found == prior_prompts(class_word, n, seed=3)
            assert all(text == text.strip() and text and "{" not in text and "  " not in text for text in found)
    assert prior_prompts("toy", 50, 0) != prior_prompts("toy", 50, 1)
    assert prior_prompts("toy", 50, 0) != prior_prompts("dog", 50, 0)


def test_prior_prompts_do_not_depend_on_global_randomness() -> None:
    random.seed(0)
    state = random.getstate()
    prior_prompts("toy", 40, 0)
    assert random.getstate() == state


def test_prior_prompts_hold_the_class_word_other_things_and_captions() -> None:
    found = prior_prompts("zeppelin", 96, 0)
    with_class = [text for text in found if "zeppelin" in text]
    assert 0.2 * len(found) < len(with_class) < 0.8 * len(found)
    assert any(text in ("zeppelin", "a zeppelin") or text.startswith(("a zeppelin ", "zeppelin ")) for text in found)
    assert any("red" in text or "blue" in text or "green" in text for text in found)
    assert len(set(found)) > 0.8 * len(found)


def test_references_are_different_and_in_an_order_of_the_seed() -> None:
    for class_word in ("toy", "book", "zeppelin"):
        for seed in range(20):
            found = references(class_word, 16, seed)
            assert len(found) == len(set(found)) == 16 and found == references(class_word, 16, seed)
            assert sum(class_word in text for text in found) >= 4
    assert references("toy", 16, 0) != references("toy", 16, 1)
    assert references("toy", 5, 0) == references("toy", 16, 0)[:5]
