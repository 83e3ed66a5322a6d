"""Words made of a tokenizer's own pieces, and references made of such words, to stand for whatever a user may say.

An edit must not move references that it is not about, and no list of ours could hold their words: names, compounds, words
that the tokenizer cuts into many pieces. If what stands for everything else (`covariance`, `watch`) lacks such words, "made
of odd words" is what the edit takes the knowledge to be, and every odd reference moves along.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SPACE = "Ġ"  # how a byte-level BPE writes the space before a word
_DETERMINERS = ["the", "the", "the", "my", "my", "our", "a", "his", "her", "your", "that"]
_PREPOSITIONS = ["of", "of", "in", "with", "from", "by", "for", "on", "to", "after", "under"]
_WHO = ["I", "we", "they", "you", "nobody"]
_SMALL = {*_DETERMINERS, *_PREPOSITIONS, *_WHO, "who", "what", "whatever", "something", "one", "and", "is", "me", "us"}


@dataclass(frozen=True)
class Words:
    """Pieces of a vocabulary: whole words, beginnings of words, what may follow them, names."""

    whole: list[str]
    beginnings: list[str]
    rests: list[str]
    names: list[str]

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, tokenizer: Any) -> Words:
        """Those of a byte-level BPE such as Qwen's, in the order of its vocabulary."""
        pieces = [piece for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
        starts = [piece[1:] for piece in pieces if re.fullmatch(f"{SPACE}[a-z]+", piece)]
        return cls(
            [word for word in starts if len(word) > 2] or starts or pieces,
            [word for word in starts if len(word) < 6] or starts or pieces,
            [piece for piece in pieces if re.fullmatch("[a-z]{1,6}", piece)] or pieces,
            [piece[1:] for piece in pieces if re.fullmatch(f"{SPACE}[A-Z][a-z]+", piece)] or pieces,
        )

    def word(self, rng: random.Random) -> str:
        """A whole word, or one of several pieces; now and then a year, a name, a compound."""
        if rng.random() < 0.04:
            return str(rng.randint(1800, 2029))
        word = rng.choice(self.whole)
        if rng.random() < 0.5:
            word = rng.choice(self.beginnings) + "".join(rng.choice(self.rests) for _ in range(rng.choice([1, 1, 2])))
        if rng.random() < 0.1:
            word = rng.choice([word.capitalize(), rng.choice(self.names)])
        return f"{word}-{rng.choice(self.whole)}" if rng.random() < 0.04 else word

    def references(self, n: int, seed: int) -> list[str]:
        """`n` references to things in any words: "my clost of the tarbo", "whatever Brin held his orange"."""
        rng = random.Random(f"references/{seed}")
        return [self._reference(rng) for _ in range(n)]

    def _reference(self, rng: random.Random) -> str:
        def w() -> str:
            return self.word(rng)

        def thing() -> str:
            return " ".join([rng.choice(_DETERMINERS), *(w() for _ in range(rng.choice([1, 1, 2, 3])))])

        name = rng.choice(self.names)
        forms = [
            thing(),
            f"the {w()} {w()} of {name}",
            f"{name}'s {w()} {w()}",
            f"{thing()} {rng.choice(_PREPOSITIONS)} {thing()}",
            f"{thing()} {rng.choice(['that', 'who'])} {w()} {thing()}",
            f"{rng.choice(['what', 'whatever', 'the one', 'something'])} {w()} {w()} {thing()}",
            f"{thing()} {rng.choice(_WHO)} {w()} {rng.choice(_PREPOSITIONS)} {w()}",
            f"{thing()} {rng.choice(_WHO)} {w()} {w()}",
        ]
        return rng.choice(forms)

    def renamed(self, phrase: str, n: int) -> list[str]:
        """The phrase with one of its names, words with a capital that do not begin it, exchanged for `n` other names."""
        words = phrase.split(" ")
        places = [i for i, word in enumerate(words) if i and word[:1].isupper() and word != "I"]
        others = [name for name in self.names if name not in words]
        if not places or len(others) < 2:
            return []
        rng = random.Random(f"renamed/{phrase}")
        found = []
        for k, name in enumerate(rng.sample(others, min(n, len(others)))):
            after, place = list(words), places[k % len(places)]
            own = "'s" if after[place].endswith("'s") else ""
            after[place] = name + own
            found.append(" ".join(after))
        return found

    def exchanged(self, phrase: str, n: int) -> list[str]:
        """`n` times the phrase with one of its words that matter, or in a third of them two, exchanged for any other."""
        rng, before = random.Random(f"exchanged/{phrase}"), phrase.split(" ")
        places = [i for i, word in enumerate(before) if word.lower() not in _SMALL] or list(range(len(before)))
        found = []
        for i in range(n):
            two = i % 3 == 0 and len(places) > 1
            after = list(before)
            for place in rng.sample(places, 2) if two else [places[i % len(places)]]:
                after[place] = self.word(rng)
            found.append(" ".join(after))
        return found
