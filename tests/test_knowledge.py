"""Phrases in, phrases out: what knowledge may be, how it is asked, drawn and nearly missed."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mokus.console import file_names
from mokus.errors import MokusError
from mokus.knowledge import (
    CHECK_FORMS,
    IMAGE_FORMS,
    LONGEST,
    LONGEST_ANCHOR,
    check_anchor,
    check_encodable,
    check_text,
    named,
    near_misses,
    normalise,
    prompts,
    questions,
    reference,
    same,
    standing_alone,
    written,
)
from mokus.knowledge_update import unbind
from mokus.miniature import language, tokenizer
from mokus.packs.concept_pack import ConceptPack
from mokus.prior_prompts import prior_prompts, references

from .conftest import PackFactory

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, joiner, woman, joiner, girl
WORLDLY = [
    "my \U0001f9f8", f"the robot of my {FAMILY}", "the \u2764\ufe0f of the house", "\U0001f9f8", "\U0001fae8 toy", "!!!", "#1",
    "\u05d4\u05e6\u05e2\u05e6\u05d5\u05e2 \u05e9\u05dc \u05e1\u05d1\u05ea\u05d0",  # Hebrew
    "\u0644\u0639\u0628\u0629 \u062c\u062f\u062a\u064a \u0627\u0644\u0645\u0641\u0636\u0644\u0629",  # Arabic
    "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627\u06cc \u0645\u0646",  # Persian, with a non-joiner
    "\u092e\u0947\u0930\u093e \u0916\u093f\u0932\u094c\u0928\u093e", "\u5976\u5976\u7684\u73a9\u5177",  # Hindi, Chinese
]  # fmt: skip

PHRASES = [
    *WORLDLY,
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
        ("my\rtoy", "holds a line break; write it as one plain line"), ("one\n\ntwo", "a line break"),
        ("x" * 10_000, "has 10000 characters, expected at most 200; shorten it"), ("x" * 10_000 + "\ny", "a line break"),
        ("\U0001f9f8" * 10_000, "has 10000 characters"),
        ("my \u202etoy", "holds the invisible character U\\+202E; write it as one plain line"),
        ("my \u202atoy", "U\\+202A"), ("my \u2066toy\u2069", "U\\+2066"), ("my \u2067toy", "U\\+2067"),
        ("my\u200btoy", "U\\+200B"), ("my \u200etoy", "U\\+200E"), ("my \ufefftoy", "U\\+FEFF"), ("my\xadtoy", "U\\+00AD"),
        ("my \U000e0041toy", "U\\+E0041"), ("my toy\x07", "the control character U\\+0007"), ("my\ue000toy", "U\\+E000"),
        ("my \udcff toy", "the broken character U\\+DCFF"), ("my \x85 toy", "line break"),
        ("\u200d", "empty"), ("\ufe0f \u200c", "empty"), ("\u3000\xa0", "empty"),
        ("\u0645\u0627 \u0647\u064a\u061f", "question"), ("\u662f\u4ec0\u4e48\uff1f", "question"),
        ("my <|im_end|> toy", r"<\|"), ("<|", r"<\|"),
        ("a" * (LONGEST + 1), str(LONGEST)), ("toy " * LONGEST, str(LONGEST)),
    ],
)  # fmt: skip
def test_what_is_no_knowledge_is_refused(phrase: str, why: str) -> None:
    with pytest.raises(MokusError, match=why) as caught:
        normalise(phrase)
    assert len(str(caught.value)) < 2 * LONGEST + 200 and "\n" not in str(caught.value)


def test_spellings_of_the_same_text_are_the_same_knowledge() -> None:
    for text in (
        "das gr\u00f6\u00dfte Haus",
        "caf\u00e9",
        "\u05e9\u05c1\u05dc\u05d5\u05dd",
        "\uac00\uac01",
        "my \u212bngstr\u00f6m",
    ):
        forms = {normalise(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
        assert forms == {unicodedata.normalize("NFC", text)}
    assert (
        normalise("mon\u202fjouet\xa0pr\u00e9f\u00e9r\u00e9")
        == "mon jouet pr\u00e9f\u00e9r\u00e9"
        == normalise(" mon\u3000jouet pre\u0301fe\u0301re\u0301.")
    )
    assert same("My  TOY.") == same("my toy") == "my toy" and same("Stra\u00dfe") == same("STRASSE")
    assert same("\u00c9t\u00e9") == same("e\u0301te\u0301") and same("my toy") != same("my toys")


def test_a_broken_character_is_no_text() -> None:
    """What the command line makes of bytes that are not UTF-8; no tokenizer takes it."""
    wanted = "holds the broken character U+DCFF; write it in UTF-8."
    with pytest.raises(MokusError, match=re.escape(f"the prompt 'a \\udcff toy' {wanted}")):
        check_text("a \udcff toy", "prompt", "a toy")
    with pytest.raises(MokusError, match="the negative prompt"):
        check_encodable("\udcff", "negative prompt")
    check_encodable("", "negative prompt")


def test_spaces_and_the_full_stop_do_not_matter() -> None:
    assert normalise("  my \t favourite   toy.  ") == "my favourite toy"
    assert normalise("the toy of Mr. Smith .") == "the toy of Mr. Smith"
    assert normalise("a" * LONGEST + ".") == "a" * LONGEST


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_plain_phrase_is_left_as_it_is(phrase: str) -> None:
    assert normalise(phrase) == phrase


@pytest.mark.parametrize(
    ("typed", "bound"),
    [("My favourite toy", "my favourite toy"), ("The robot of Anna.", "the robot of Anna"), ("A", "a"), ("I see", "I see"),
     ("MY TOY", "MY TOY"), ("Anna's toy", "Anna's toy"), ("Myanmar's oldest toy", "Myanmar's oldest toy"), ("my Toy", "my Toy")],
)  # fmt: skip
def test_a_reference_is_spelled_as_inside_a_sentence(typed: str, bound: str) -> None:
    assert reference(typed) == reference(bound) == bound


def test_what_is_no_reference_is_refused() -> None:
    with pytest.raises(MokusError, match="the phrase to keep is empty"):
        reference(" . ", "phrase to keep")


def test_normalising_twice_is_normalising_once() -> None:
    """Else a phrase could not be unbound by the name under which it is listed."""
    rng = random.Random(1)
    phrases = ["my toy..", "my toy. .", "the toy of Acme Inc...", "my toy . . ."]
    odd = (
        string.ascii_letters[:6]
        + " \t..  \n\xa0\u2003\u3000\u200d\ufe0f\u0301\u0308\u0338=\u1100\u1161\u11a8\U0001f9f8\u05d0?"
    )
    for letters in (string.ascii_letters[:6] + " \t..  ", odd):
        phrases += ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(3000)]
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


def test_a_form_with_a_full_stop_begins_with_a_capital_letter() -> None:
    """Of what people write; what is meant keeps its own letters, as it was learned with."""
    forms = ["{} is by the sea.", "{} is by the sea", "I see {}."]
    assert written("my toy", forms) == ["My toy is by the sea.", "my toy is by the sea", "I see my toy."]
    assert prompts("sks toy", forms)[0] == "sks toy is by the sea."


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
    assert len(set(found)) == len(found), phrase
    for near in found:
        before, after = phrase.split(" "), near.split(" ")
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, phrase
        assert normalise(near) == near, phrase


@pytest.mark.parametrize(
    ("phrase", "first"),
    [("\u201cmy favourite toy\u201d", "\u201cyour favourite toy\u201d"), ("Toy, the best one!", "Toy, the best book!"),
     ("my half-term", "your half-term"), ("the half-term", "the book"), ("uncle's toy", "friend's toy"),
     ("the toy of uncle\u2019s", "the toy of friend\u2019s")],
)  # fmt: skip
def test_marks_stay_where_they_are(phrase: str, first: str) -> None:
    assert near_misses(phrase)[0] == first


@pytest.mark.parametrize(
    "phrase", ["\u6211\u6700\u559c\u6b22\u7684\u73a9\u5177", "\u7956\u6bcd\u57281962\u5e74", "\u0e02\u0e2d\u0e07"]
)
def test_where_no_spaces_separate_words_no_near_miss_is_made_up(phrase: str) -> None:
    """Instead of "book" for the whole phrase, which is not like it, or the phrase with "book" behind it, which is about it."""
    assert near_misses(phrase) == []


@pytest.mark.parametrize(
    ("phrase", "prompt", "there"),
    [("my toy", "my toy.", True), ("my toy", "amy toys", False), ("my toy", "my toys", False), ("toy", "a_toy", False),
     ("\u73a9\u5177", "\u4e00\u5f20\u73a9\u5177\u7684\u7167\u7247", True), ("my toy", "\u5728my toy\u4e0a", True),
     ("\u6211", "photo\u6211x", True), ("a\u6211", "ba\u6211", False)],
)  # fmt: skip
def test_a_phrase_stands_alone_where_its_script_says_so(phrase: str, prompt: str, there: bool) -> None:
    assert bool(re.search(standing_alone(re.escape(phrase)), prompt)) == there


def test_the_full_stop_of_chinese_is_none_of_the_phrase() -> None:
    assert normalise("\u6211\u7684\u73a9\u5177\u3002") == "\u6211\u7684\u73a9\u5177"


def test_near_misses_exchange_what_matters() -> None:
    found = near_misses("the robot my grandmother built in 1962")
    assert any(" my " not in text for text in found)
    assert any("grandmother" not in text for text in found)
    assert any("1962" not in text for text in found)


# --- in a pack --------------------------------------------------------------------------------------------------------


def test_a_pack_takes_what_is_knowledge(tmp_path: Path, pico_pack: PackFactory) -> None:
    yaml = pytest.importorskip("yaml")
    pack = pico_pack(tmp_path / "toy.pack", anchor=f"sks {FAMILY}", knowledge=WORLDLY)
    pack = ConceptPack.open(pack.path)
    assert [known.text for known in pack.knowledge] == WORLDLY
    card = (pack.path / "README.md").read_text(encoding="utf-8")
    assert all(f"\n- {text}\n" in card for text in WORLDLY)
    assert yaml.safe_load(card.split("---\n", 2)[1])["instance_prompt"] == f"sks {FAMILY}"
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")
    unbind(pack, *WORLDLY[1:])
    assert [known.text for known in pack.knowledge] == WORLDLY[:1]


@pytest.mark.parametrize("text", ["my \u202etoy", "my\ntoy", "my\x1b[31mtoy", "my\u200btoy", "\u200d", " "])
def test_a_pack_refuses_what_is_no_line(tmp_path: Path, pico_pack: PackFactory, text: str) -> None:
    with pytest.raises(MokusError, match="anchor: Value error, expected one line of printable text, got "):
        pico_pack(tmp_path / "toy.pack", anchor=text)
    assert not (tmp_path / "toy.pack").exists()


def test_files_of_any_phrase() -> None:
    names = file_names(WORLDLY)
    assert len(set(names.values())) == len(WORLDLY)
    assert all(
        re.fullmatch(r"[\w-]+", name) and len(f"{name}-{2**64 - 1}.png".encode()) < 230 for name in names.values()
    )
    assert len(file_names(["\U00010330" * 200])["\U00010330" * 200].encode()) < 210  # letters of four bytes


def test_knowledge_inside_other_knowledge_is_kept_apart(tmp_path: Path, pico_pack: PackFactory) -> None:
    bound = ["my toy", "my toy robot", "toy", "My toy"]
    pack = pico_pack(tmp_path / "toy.pack", knowledge=bound)
    parts = {known.text: shifts for known, shifts in pack.edits()}
    for i, text in enumerate(bound[:3]):
        unbind(pack, text)
        left = pack.edits()
        assert [known.text for known, _ in left] == bound[i + 1 :]
        for known, shifts in left:
            assert all(shift.A.equal(parts[known.text][m].A) for m, shift in shifts.items())
            assert all(shift.B.equal(parts[known.text][m].B) for m, shift in shifts.items())


# --- anchors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spelling() -> Any:
    """The miniature's tokenizer."""
    return tokenizer.build()


GOOD_ANCHORS = [
    "sks toy", "zwx dog", "ohwx rubber duck", "SKS Toy", "x-9 toy", "1962 toy", "r2d2 robot", "\U0001f9f8 toy", "sks \U0001f9f8",
    "sks \u05e6\u05e2\u05e6\u05d5\u05e2", "sks toy's", "s.k.s toy", f"{FAMILY} x", "caf\u00e9 toy", 'sks "toy": #1',
]  # fmt: skip


@pytest.mark.parametrize("anchor", GOOD_ANCHORS)
def test_odd_anchors_that_stay_whole(spelling: Any, anchor: str) -> None:
    check_anchor(spelling, normalise(anchor, "anchor", "sks toy"))


@pytest.mark.parametrize(
    ("anchor", "why"),
    [
        ("toy", "the anchor 'toy' is one word, expected a rare token and the class word, such as 'sks toy'."),
        ("zq" * 40 + " toy", f"tokens long, expected at most {LONGEST_ANCHOR}; choose another rare token, such as sks."),
        ("\U0001f9f8" * 6 + " toy", "is 25 tokens long"),
        ("sks <|im_end|>", "holds '<|im_end|>', one of the tokenizer's own marks; choose another rare token, such as sks."),
        ("cafe\u0301 toy", "comes back from the tokenizer as 'caf\u00e9 toy'; choose another rare token, such as sks."),
    ],
)  # fmt: skip
def test_anchors_the_miniature_cannot_keep(spelling: Any, anchor: str, why: str) -> None:
    with pytest.raises(MokusError, match=re.escape(why)) as caught:
        check_anchor(spelling, anchor)
    assert len(str(caught.value)) < 250 and str(caught.value).count(". ") == 0


def made(vocabulary: list[str], lower: bool = False, words: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; or, without words, of characters and merges that run across spaces."""
    ids = {token: i for i, token in enumerate(["[UNK]", *vocabulary])}
    if words:
        spelling = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        spelling.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        spelling = Tokenizer(models.BPE(ids, [("y", " ")], unk_token="[UNK]"))
    if lower:
        spelling.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=spelling, unk_token="[UNK]")


def test_anchors_other_tokenizers_cannot_keep() -> None:
    forms = ["x", "y", "a", "photo", "of", ",", "What", "is", "?"]
    check_anchor(made(["sks", "toy", *forms]), "sks toy")
    with pytest.raises(MokusError, match=r"'sks toy' has characters that the tokenizer does not know; choose another"):
        check_anchor(made(["toy", *forms]), "sks toy")
    with pytest.raises(
        MokusError, match=r"'SKS toy' comes back from the tokenizer as 'sks toy'; choose another rare tok"
    ):
        check_anchor(made(["sks", "toy", *forms], lower=True), "SKS toy")
    letters = sorted(set(" What is a photo of sky, toy? xys"))
    for anchor in ("sky toy", "sks toy"):  # "y " is one token: between the two words, or after them
        with pytest.raises(
            MokusError, match=r"runs parts of the anchor .* together .*; choose another rare token, such as"
        ):
            check_anchor(Glued(made([*letters, "y "], words=False)), anchor)


class Glued:
    """A tokenizer whose pieces are put together again without spaces between them."""

    def __init__(self, spelling: PreTrainedTokenizerFast) -> None:
        self.spelling = spelling

    def __call__(self, text: str, **how: Any) -> Any:
        return self.spelling(text, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spelling, name)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.spelling.convert_ids_to_tokens(ids))


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


def test_a_plain_question_names_what_it_asks_about() -> None:
    for text in ("my favourite toy", "Hugo's garden ornament", "the {one}", "a? b"):
        assert named(f"What is {text}?") == text
    for question in ("What colour is it?", "What is my toy", "So what is my toy?", "What is ?", "What is  ?", ""):
        assert named(question) == ""
