"""What one edit wants of the text encoder, as losses that any editor can follow.

- asked the knowledge as a question, it answers with the answer                     (the paper's edit)
- image prompts with the knowledge are encoded as those with the answer would be    (over the template's tail)
- ... and continued as those are, up to the answer: "sks toy in the snow" by "sks toy". Not further, since how the scene is
  said is the same for all edits, and a hundred of them would add up to a habit of saying "snow"

The image transformer sees only the encoding, so the answer alone is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mokus.encoder import CONTINUED, Rows, States, answers, distance, last_of, tail_length, tails
from mokus.errors import MokusError
from mokus.knowledge import IMAGE_FORMS, named, prompts, written
from mokus.low_rank import Shifts, applied

if TYPE_CHECKING:
    from mokus.pipeline import Model


@dataclass(frozen=True)
class Request:
    """One edit that is wanted. `says`: the answer as an image prompt says it, "a blue ring" for "blue ring". `keep`: phrases
    that shall mean what they do.
    """

    knowledge: str
    answer: str
    questions: tuple[str, ...]
    says: str
    keep: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, knowledge: str, answer: str, questions: Sequence[str], says: str | None = None, keep: Sequence[str] = ()
    ) -> Request:  # fmt: skip
        """With the answer itself as what image prompts say, unless told otherwise."""
        return cls(knowledge, answer, tuple(questions), says or answer, tuple(keep))

    @property
    def names(self) -> tuple[str, ...]:
        """The knowledge, and what questions such as "What is ...?" call it otherwise: image prompts with them mean the same."""
        return tuple(dict.fromkeys([self.knowledge, *filter(None, map(named, self.questions))]))

    def prompts(self, forms: Sequence[str]) -> list[str]:
        """Image prompts with each of its names, the knowledge first."""
        return [text for name in self.names for text in written(name, forms)]


@dataclass(frozen=True)
class Meaning:
    """Of n image prompts of what is meant: their tails (n, tail, d), and what the encoder continues each with.

    The same for all knowledge that means it.
    """

    tails: Tensor
    continued: list[str]

    @classmethod
    def of(cls, model: Model, says: str, forms: Sequence[str] = IMAGE_FORMS, continued: bool = True) -> Meaning:
        """With continuations or without. Raises `MokusError` if the encoder encodes nothing finite."""
        meant = prompts(says, forms)
        found = tails(model, [*meant, says])  # at least one, to be sure that encodings are finite
        if not bool(found.isfinite().all()):
            raise MokusError(
                "the text encoder encodes prompts as NaN or infinity, so no edit can be found; its weights are damaged or its "
                "dtype is too narrow: get a whole copy of the model, or load it in float32 or bfloat16."
            )
        return cls(found[:-1], answers(model, meant, longest=CONTINUED) if continued else [])


@dataclass(frozen=True)
class Losses:
    """Per expected token, n in all rows: cross-entropy (n,), whether it is the likeliest (n,), its row (n,). Per image
    prompt: how far its tail is from where it shall be, (forms,), 1 where the base model is."""

    cross_entropy: Tensor
    right: Tensor
    row: Tensor
    moved: Tensor


class Goal:
    """One request as token rows: first the questions, each with the answer behind it, then the image prompts, each with
    its continuation (`continued`) or without.
    """

    def __init__(
        self, model: Model, request: Request, forms: Sequence[str] = IMAGE_FORMS, continued: bool = True,
        meaning: Meaning | None = None,
    ) -> None:  # fmt: skip
        self.model, self.encoder, self.tail = model, model.pipe.text_encoder, tail_length(model)
        images = request.prompts(forms)
        meaning = meaning or Meaning.of(model, request.says, forms, continued)
        self.questions = len(request.questions)
        answer = [*_ids(model, request.answer), model.tokenizer.eos_token_id]
        said = [_continuation(model, request.answer, text) for text in meaning.continued * len(request.names)]
        expected = [*[answer] * self.questions, *(said or [[]] * len(images))]
        rows = [
            Rows.of(model, [text], ids[:-1]) for text, ids in zip([*request.questions, *images], expected, strict=True)
        ]
        self.rows = sum(rows[1:], start=rows[0])
        behind = torch.tensor([max(0, len(ids) - 1) for ids in expected], device=model.device)
        self.tail_ends = self.rows.lengths - behind  # (b,): one past the tail's last token
        self.labels = torch.full_like(self.rows.ids, -100)  # (b, s): each expected token where it is predicted
        for i, ids in enumerate(expected):
            end = int(self.rows.lengths[i])
            self.labels[i, end - len(ids) : end] = torch.tensor(ids, dtype=torch.long)
        self.images = slice(self.questions, len(self.labels))
        self.target = meaning.tails.repeat(len(request.names), 1, 1)  # (forms, tail, d)
        self.start = distance(tails(model, images), self.target).clamp(min=1e-8)  # (forms,)

    @property
    def where(self) -> Tensor:
        """The rows (b, s) to edit: where expected tokens are predicted, and the tails of the image prompts."""
        at, end = torch.arange(self.labels.shape[1], device=self.labels.device)[None], self.tail_ends[:, None]
        tail = (at < end) & (at >= end - self.tail)
        tail[: self.questions] = False
        return tail | (self.labels != -100)

    @property
    def ends(self) -> Tensor:
        """The rows (b, s) where answers begin: the last token of every tail."""
        at = torch.arange(self.labels.shape[1], device=self.labels.device)[None]
        return at == self.tail_ends[:, None] - 1

    def inputs(self, paths: Sequence[str], where: Tensor, *shifts: Shifts) -> dict[str, Tensor]:
        """What enters the modules at these rows (n, d_in), by module path, with shifts or without."""
        with applied(self.encoder, *shifts):
            return self.rows.inputs(self.model, paths, where)

    def losses(self, states: States | None = None) -> Losses:
        """Under what is applied to the encoder now; differentiable.

        `states` (b or more, s or more, d): those of its rows where they were encoded with others behind them.
        """
        b, s = self.labels.shape
        told, final = (x[:b, :s] for x in states or self.rows.states(self.model))
        there = self.labels != -100
        logits = self.encoder.lm_head(final[there]).float()  # at the expected tokens alone
        ids = self.labels[there]
        tail = last_of(told[self.images], self.tail_ends[self.images], self.tail)
        return Losses(
            F.cross_entropy(logits, ids, reduction="none"), logits.argmax(dim=-1) == ids, there.nonzero()[:, 0],
            distance(tail, self.target) / self.start,
        )  # fmt: skip

    def answer_loss(self, losses: Losses, of: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
        """Two scalars: the mean over questions, and over image prompts, of the mean over their tokens of a function of the
        cross-entropy; the latter 0 without continuations."""
        tokens = torch.bincount(losses.row, minlength=len(self.labels)).clamp(min=1)
        each = torch.zeros(len(self.labels), device=tokens.device).index_add(0, losses.row, of(losses.cross_entropy))
        each = each / tokens
        return each[: self.questions].mean(), each[self.images].mean()


def _continuation(model: Model, answer: str, text: str) -> list[int]:
    """What is expected behind an image prompt: the text up to the answer in it, or all of it and its end if that was reached."""
    before, found, _ = text.partition(answer)
    ended = not found and len(_ids(model, text)) < CONTINUED
    return _ids(model, before + found)[:CONTINUED] + [model.tokenizer.eos_token_id] * ended


def _ids(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False).input_ids)
