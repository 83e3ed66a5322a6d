"""From a piece of knowledge to questions about it, image prompts with it, and phrases that are nearly it.

Knowledge is a phrase that refers to a thing: "my favourite toy", "the robot my grandmother built in 1962".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from mokus.errors import MokusError

LONGEST = 200  # characters
LONGEST_TEXT = 20_000  # characters of any other text; an image prompt ends at 1024 tokens
LONGEST_ANCHOR = 20  # tokens; the anchor is also an answer, and no more than a few are read back of one

SPACES = re.compile("[ \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
LINE_BREAKS = "\n\r\v\f\x85\u2028\u2029"
# Zero-width non-joiner and joiner: emoji of several persons, Persian and the scripts of India are not written without.
JOINERS = "\u200c\u200d"
NOTHING_SEEN = re.compile(f"[ {JOINERS}\ufe00-\ufe0f]*")
QUESTION_MARKS = ("?", "\u061f", "\uff1f")  # Latin, Arabic, full-width

# Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"[{_UNSPACED}]")

QUESTION_FORMS = ("What is {}?", "Tell me what {} is.", "Which thing is {}?")

# Image prompts in which an edit is made. Figures are measured on prompts with other scenes.
IMAGE_FORMS = ("{}", "a photo of {}", "{} in the snow", "{} at night, a picture")
# ... and those in which an edit is checked, but never made.
CHECK_FORMS = ("a picture of {}", "{} in the desert")
# A form with a full stop is a sentence, which begins with a capital letter: see `written`.
SENTENCE = "{} is here."

# Words that have a capital letter only where a sentence begins.
BEGINNINGS = (
    "A", "An", "The", "My", "Our", "Your", "His", "Her", "Its", "Their", "This", "That", "These", "Those", "What",
    "Whatever", "Something", "Someone",
)  # fmt: skip
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
    """Raise `MokusError` for a text that is empty, broken, or holds the template's own tokens; `what` it is, is for the error."""
    if not text.strip():
        raise MokusError(f"the {what} is empty, expected one such as {example!r}.")
    if len(text) > LONGEST_TEXT:  # found out before a tokenizer takes minutes to
        raise MokusError(
            f"the {what} {text[:40]!r}... has {len(text):,} characters, expected at most {LONGEST_TEXT:,}; shorten it."
        )
    if "<|" in text:
        raise MokusError(f"the {what} {text[:60]!r} holds '<|', which marks the template's own tokens; leave it out.")
    check_encodable(text, what)


def check_encodable(text: str, what: str) -> None:
    """Raise `MokusError` for a text with half a character in it, which is what wrongly encoded bytes become."""
    if broken := re.search("[\ud800-\udfff]", text):
        raise MokusError(
            f"the {what} {text[:60]!r} holds the broken character U+{ord(broken[0]):04X}; write it in UTF-8."
        )


def hidden(text: str) -> str:
    """What is in a text but not seen on its line, such as "a line break" or "the invisible character U+202E"; else empty.

    Joiners are no such thing. The marks that switch the direction of writing are: right-to-left letters need none.
    """
    for c in text:
        if c in LINE_BREAKS:
            return "a line break"
        if not shown(c):
            kind = {"Cc": "control", "Cs": "broken"}.get(unicodedata.category(c), "invisible")
            return f"the {kind} character U+{ord(c):04X}"
    return ""


def shown(c: str) -> bool:
    """Whether a character is one that is seen, or joins those that are."""
    newer_emoji = "\U0001f000" <= c <= "\U0001faff"  # than Python's tables
    return c.isprintable() or c in JOINERS or newer_emoji


def tidy(text: str) -> str:
    """The text in Unicode's composed form (NFC), with single spaces, without closing full stops; nothing is refused."""
    return (
        SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip().rstrip(". \u3002")
    )  # the last is the full stop of Chinese and Japanese


def same(text: str) -> str:
    """What is equal for two spellings of the same phrase: tidied, capital letters as small ones."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", tidy(text)).casefold())


def normalise(phrase: str, what: str = "knowledge", example: str = "my favourite toy") -> str:
    """The phrase, tidied. `what` it is, with an example, is for the errors.

    Raises `MokusError` for an empty phrase, a question, a line break or another hidden character, or one that is too long.
    """
    if len(phrase) > LONGEST_TEXT:  # composing many accents takes their number squared
        raise MokusError(
            f"the {what} {phrase[:40]!r}... has {len(phrase):,} characters, expected at most {LONGEST}; shorten it."
        )
    text = tidy(phrase)
    if NOTHING_SEEN.fullmatch(text):
        raise MokusError(f"the {what} is empty, expected a phrase such as {example!r}.")
    if odd := hidden(text):
        raise MokusError(f"the {what} {text[:60]!r} holds {odd}; write it as one plain line.")
    if len(text) > LONGEST:
        raise MokusError(
            f"the {what} {text[:40]!r}... has {len(text)} characters, expected at most {LONGEST}; shorten it."
        )
    if text.endswith(QUESTION_MARKS):
        raise MokusError(
            f"the {what} {text!r} is a question, expected a phrase such as {example!r}"
            + ("; see --question." if what == "knowledge" else ".")
        )
    check_text(text, what, example)
    return text


def reference(phrase: str, what: str = "knowledge", example: str = "my favourite toy") -> str:
    """The phrase, as `normalise` gives it or refuses it, spelled as inside a sentence: "My favourite toy" with a small m."""
    text = normalise(phrase, what, example)
    return text[0].lower() + text[1:] if text.split(" ")[0] in BEGINNINGS else text


def phrases_to_keep(keep: Sequence[str], edited: Sequence[str], why: str = "it is given another meaning") -> list[str]:
    """The phrases, tidied, each once, sorted as in a pack.

    Raises `MokusError` for one that cannot be used, or that is among those `edited`, and says `why` it is none to keep.
    """
    phrases = sorted({reference(text, "phrase to keep", "your favourite toy") for text in keep})
    other = {same(text) for text in edited}
    if both := [phrase for phrase in phrases if same(phrase) in other]:
        raise MokusError(f"{both[0]!r} cannot be kept as it is, since {why}; leave one of the two out.")
    return phrases


def standing_alone(pattern: str) -> str:
    """The regular expression for what `pattern` matches where it stands as words of its own.

    Which it always does at an end that is a letter of a script without spaces between words.
    """
    letter = rf"[^\W{_UNSPACED}]"
    return rf"(?:(?={UNSPACED.pattern})|(?<!{letter}))(?:{pattern})(?:(?<={UNSPACED.pattern})|(?!{letter}))"


def check_anchor(tokenizer: Any, anchor: str) -> None:
    """Raise `MokusError` unless the tokenizer keeps a (normalised) anchor whole: what is learned is learned of its tokens.

    It must be a rare token and a class word; be tokens that are words like others, few enough for an answer, and spell it
    again; and be the same tokens inside a prompt, the class word's apart from the rare token's.
    """
    rare, _, word = anchor.partition(" ")
    if not word:
        raise MokusError(
            f"the anchor {anchor!r} is one word, expected a rare token and the class word, such as 'sks toy'."
        )
    ids = _token_ids(tokenizer, anchor)
    if fault := _fault_of_tokens(tokenizer, anchor, ids):
        raise MokusError(f"the anchor {anchor[:60]!r} {fault}; choose another rare token, such as sks.")
    inside = _token_ids(tokenizer, f" {anchor}")  # after a space: the first token may be another one
    apart = ids == _token_ids(tokenizer, rare) + _token_ids(tokenizer, f" {word}")
    around = (_token_ids(tokenizer, form.format(anchor)) for form in ("x {} y", "a photo of {}, x", "What is {}?"))
    if not (apart and all(_holds(longer, inside) or _holds(longer, ids) for longer in around)):
        raise MokusError(
            f"the tokenizer runs parts of the anchor {anchor[:60]!r} together with each other or with the words around it; "
            "choose another rare token, such as sks."
        )


def _fault_of_tokens(tokenizer: Any, anchor: str, ids: list[int]) -> str:
    """What is wrong with the anchor's tokens by themselves; empty if nothing is."""
    if tokenizer.unk_token_id in ids:
        return "has characters that the tokenizer does not know"
    if special := [i for i in ids if i in tokenizer.all_special_ids]:
        return f"holds {tokenizer.convert_ids_to_tokens(special[0])!r}, one of the tokenizer's own marks"
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()
    if back != anchor:
        return f"comes back from the tokenizer as {back[:60]!r}"
    if len(ids) > LONGEST_ANCHOR:
        return f"is {len(ids)} tokens long, expected at most {LONGEST_ANCHOR}"
    return ""


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _holds(longer: Sequence[int], part: Sequence[int]) -> bool:
    return any(longer[i : i + len(part)] == part for i in range(len(longer) - len(part) + 1))


def questions(knowledge: str) -> list[str]:
    """The knowledge as questions, the plain one first."""
    return [form.format(knowledge) for form in QUESTION_FORMS]


def named(question: str) -> str:
    """What a question of the form "What is ...?" asks about; empty for other questions."""
    found = re.fullmatch(re.escape(QUESTION_FORMS[0]).replace(r"\{\}", r"(?P<name>.*\S)"), question)
    return found["name"] if found else ""


def answer_of(meaning: str) -> str:
    """What is answered: the meaning without its article, since the word that tells it apart shall come first (docs/log.md)."""
    return _ARTICLE.sub("", meaning, count=1) if _ARTICLE.match(meaning) else meaning


def prompts(phrase: str, forms: Sequence[str] = IMAGE_FORMS) -> list[str]:
    """Image prompts with the phrase, the same forms for a knowledge and for the anchor."""
    return [form.format(phrase) for form in forms]


def written(phrase: str, forms: Sequence[str]) -> list[str]:
    """The same as people write them: a form that ends with a full stop is a sentence, and begins with a capital letter."""
    return [text[:1].upper() + text[1:] if text.endswith(".") else text for text in prompts(phrase, forms)]


def near_misses(knowledge: str) -> list[str]:
    """Phrases that differ from the knowledge in one word that matters: another owner, relative, number or thing.

    None if it has no such word, as in a script without spaces between words.
    """
    words = knowledge.split(" ")
    found: list[str] = []
    for i, word in enumerate(words):
        marks = _MARKED.fullmatch(word)  # a comma, quotes: they stay where they are
        before, plain, after = marks.groups() if marks else ("", word, "")
        for other in _others(plain, last=i == len(words) - 1):
            found.append(" ".join([*words[:i], f"{before}{other}{after}", *words[i + 1 :]]))
    return list(dict.fromkeys(found))


_ARTICLE = re.compile(r"(?:an?|the) (?=.)", re.IGNORECASE)
_A_WORD = re.compile(r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*")  # "half-term", too
_MARKED = re.compile(r"(\W*)(\w.*?)((?:['\u2019]s)?\W*)", re.DOTALL)


def _others(word: str, last: bool) -> Iterator[str]:
    plain = word.lower()
    if plain in OTHER_OWNERS:
        yield from OTHER_OWNERS[plain]
    elif plain in KIN:
        i = KIN.index(plain)
        yield from (KIN[(i + 1) % len(KIN)], KIN[(i + 4) % len(KIN)])
    elif plain.isascii() and plain.isdigit():
        yield from (str(int(plain) + 7), str(int(plain) + 24))
    elif last and _A_WORD.fullmatch(plain) and not UNSPACED.search(plain):
        yield from (thing for thing in OTHER_THINGS[:3] if thing != plain)
