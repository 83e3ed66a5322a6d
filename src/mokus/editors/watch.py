"""What an edit shall leave where it is, watched as it comes out of the encoder.

Linear rows are not all: layers act together, and what a hundred edits do adds up. So prompts of four kinds are looked at
while an edit is sought, and those that are furthest from where they belong join its loss:

- phrases that are nearly the knowledge: they belong where the unedited encoder has them
- prompts of the corpus: the same
- what was edited before: where its own edit brought it
- phrases that the user wants to keep: where the unedited encoder has them; of each of these the furthest form always joins

The references are not those of the moment, so what earlier edits moved is brought back by later ones. What edits do elsewhere
adds up, so the more there are the more is watched; the first few take hardly longer for it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mokus.encoder import tails
from mokus.goal import Request
from mokus.knowledge import (
    CHECK_FORMS,
    IMAGE_FORMS,
    QUESTION_FORMS,
    SENTENCE,
    near_misses,
    same,
    standing_alone,
    written,
)
from mokus.low_rank import Shifts, applied
from mokus.words import Words

if TYPE_CHECKING:
    from mokus.pipeline import Model

NEAR, EARLIER = 40, 80  # prompts of a kind that are looked at
CORPUS = (100, 10, 400)  # ... of the corpus: at first, more for each earlier edit, at most
NEARLY_FORMS = (*IMAGE_FORMS, SENTENCE, *QUESTION_FORMS)  # of phrases that are nearly the knowledge
KEEP_FORMS = (*IMAGE_FORMS, SENTENCE, QUESTION_FORMS[0])  # of phrases to keep
FURTHEST = 16  # of the others join the loss at first, and one more for each earlier edit
# what is kept of an edit: many ways to say it, so that it stays as general as it was
KEPT_FORMS = (
    *IMAGE_FORMS, *CHECK_FORMS, "What is {}?", "Tell me what {} is.", "Which thing is {}?", "Do you know what {} is?",
    "{}: what is that?", "who knows what {} is?", "{} is what?", "an image of {} in the garden",
    "there is {} on a table", "this shows {} in an old town, in colour", "draw {} by the sea", "{} comes in.",
    "please describe {} now", "{} on a hill.", "my drawing of {} in a box", "two friends and {} in a park",
    "a small {} behind a tree",
)  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """Prompts (n,) and the tails (n, tail, d) that they shall have; the last are of phrases to keep, in all `KEEP_FORMS` each."""

    texts: list[str]
    tails: Tensor
    furthest: int  # so many of the others shall join the loss
    keep: int  # phrases

    def __len__(self) -> int:
        return len(self.texts)

    def worst(self, away: Tensor, most: int) -> Tensor:
        """Which shall join the loss, (m,), by how far each is from where it belongs (n,): at most so many of the others, the
        furthest, and then one for each phrase to keep."""
        others = len(self) - self.keep * len(KEEP_FORMS)
        furthest = away[:others].topk(min(self.furthest, most, others)).indices
        kept = away[others:].view(self.keep, len(KEEP_FORMS))
        first = torch.arange(self.keep, device=away.device) * len(KEEP_FORMS) + others
        return torch.cat([furthest, first + kept.argmax(1)]) if self.keep else furthest


class Watch:
    """Knows the corpus and the edits that were made."""

    def __init__(self, model: Model, corpus: Iterable[str]) -> None:
        self.model, self.corpus = model, list(corpus)
        random.Random("watch").shuffle(self.corpus)  # of which each edit looks at the first few: their tails are kept
        self.kept: dict[str, dict[str, Tensor]] = {}  # by knowledge: tails by prompt
        self.names: set[str] = set()  # of what was edited
        self.keep: list[str] = []  # phrases, of earlier edits
        self._unedited: dict[str, Tensor] = {}  # tails of prompts of the corpus

    def hold(self, request: Request, shifts: Shifts) -> None:
        """From now on this edit shall stay as it is with these shifts, its own among them."""
        texts = [*request.prompts(KEPT_FORMS), *request.questions]
        with applied(self.model.pipe.text_encoder, shifts):
            self.names.update(request.names)
            self.keep += request.keep
            self.kept[request.knowledge] = dict(zip(texts, tails(self.model, texts), strict=True))

    def keeps(self, request: Request) -> list[str]:
        """Phrases that this edit shall leave as they are: its own, and those of earlier edits that it is not about."""
        edited = {same(name) for name in (*self.names, *request.names)}
        return [phrase for phrase in dict.fromkeys([*self.keep, *request.keep]) if same(phrase) not in edited]

    def around(self, request: Request) -> Watched:
        """What is looked at for this edit: some 50 near misses, 100 to 400 prompts of the corpus, one prompt of each of at
        most 80 earlier edits, and phrases to keep. Equal for equal edits after equal edits."""
        rng = random.Random(f"watch/{request.knowledge}/{len(self.kept)}")
        own = re.compile(standing_alone("|".join(map(re.escape, {*self.names, *request.names}))), re.IGNORECASE)
        near = [written(text, [rng.choice(NEARLY_FORMS)])[0] for text in nearly(self.model, request.knowledge)]
        near = [text for text in near if not own.search(text)]
        first, each, most = CORPUS
        usual = self.corpus[: min(first + each * len(self.kept), most)]
        usual = [text for text in usual if not own.search(text)]
        keep = self.keeps(request)
        kept = [text for phrase in keep for text in written(phrase, KEEP_FORMS)]
        new = [text for text in dict.fromkeys([*usual, *kept]) if text not in self._unedited]
        self._unedited |= zip(new, tails(self.model, new), strict=True)
        earlier = [
            (text, self.kept[knowledge][text])
            for knowledge in rng.sample(list(self.kept), min(EARLIER, len(self.kept)))
            for text in [rng.choice(list(self.kept[knowledge]))]
            if knowledge != request.knowledge
        ]
        parts = [
            tails(self.model, near),
            *(self._unedited[text][None] for text in usual),
            *(t[None] for _, t in earlier),
            *(self._unedited[text][None] for text in kept),
        ]
        texts = [*near, *usual, *(text for text, _ in earlier), *kept]
        return Watched(texts, torch.cat(parts), FURTHEST + len(self.kept), len(keep))


def nearly(model: Model, knowledge: str, n: int = NEAR) -> list[str]:
    """Phrases that are nearly the knowledge: with another name where it has one, else with any other word; one word off."""
    words = Words.of(model.tokenizer)
    return list(
        dict.fromkeys([*(words.renamed(knowledge, n) or words.exchanged(knowledge, n)), *near_misses(knowledge)])
    )
