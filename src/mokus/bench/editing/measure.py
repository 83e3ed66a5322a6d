"""Readings of an edited encoder beside those of the unedited one: in text, in the encoding, in images.

All answers are greedy generations and count only if all of them is right. Near misses that an editor itself preserves or
watches are left out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mokus.bench.editing.cases import (
    DRAWN,
    PROMPTS,
    QUESTIONS,
    SEED,
    Case,
    captions,
    resolved,
)
from mokus.editors.rewrite import rewritten
from mokus.editors.watch import nearly
from mokus.encoder import answers, distance, tails
from mokus.generation import generate
from mokus.knowledge import questions
from mokus.low_rank import Shifts, applied
from mokus.miniature import oracle, world
from mokus.miniature.language import article
from mokus.miniature.world import Subject
from mokus.pipeline import Model, encode
from mokus.progress import Progress

Row = dict[str, Any]

IMAGES = 24  # of each kind, at most
CAPTIONS, DRIFT = 200, 1000


@dataclass
class Edited:
    """The encoder as it is after some edits."""

    shifts: Shifts = field(default_factory=dict)
    meant: dict[str, str] = field(default_factory=dict)  # for `rewrite`


class Measure:
    """Readings of an edited encoder beside those of the unedited one, which are taken once."""

    def __init__(self, model: Model, images: bool = True, progress: Progress | None = None) -> None:
        self.model, self.images, self.progress = model, images, progress
        self._answers: dict[str, str] = {}
        self._labels: dict[tuple[str, int], dict[str, str]] = {}

    def row(self, some: Sequence[Case], edited: Edited, known: dict[str, bool]) -> tuple[Row, dict[str, int]]:
        """All figures for these edits, and of how many cases each is. `known`: by phrase, whether it took when it was made."""
        hits: dict[str, list[bool]] = {
            "efficacy": [known[case.phrase] for case in some],
            "retention": self._says([(questions(c.phrase)[0], c.new.words) for c in some], edited),
            "generality_questions": self._says([(q.format(c.phrase), c.new.words) for c in some for q in QUESTIONS], edited),
            "generality_prompts": self._says(
                [(p.format(c.phrase), resolved(c.new.words, scene)) for c in some for p, scene in PROMPTS.items()], edited
            ),
            "locality_facts": self._as_before([f for g in world.bystanders() for f in twice(g.phrase)], edited),
            "locality_captions": self._as_before(captions(CAPTIONS, SEED), edited),
            "locality_near_miss": self._as_before([t for p in self._near(some) for t in twice(p)], edited),
            "one_hop": self._says(
                [(f"What {what} is {c.phrase}?", getattr(c.new, what)) for c in some for what in ("colour", "shape")], edited
            ),
        }  # fmt: skip
        hits |= self._probed(some, edited)
        row: Row = {key: sum(hit) / len(hit) if hit else None for key, hit in hits.items()}
        n = {key: len(hit) for key, hit in hits.items()}
        row["conditioning_drift"], n["conditioning_drift"] = self._drift(edited), DRIFT
        row["undo"] = self._undone(edited)
        for key, value in (self._drawn(some, edited) if self.images else {}).items():
            row[key], n[key] = (sum(value) / len(value) if value else None), len(value)
        return row, n

    # text

    def _ask(self, texts: Sequence[str], edited: Edited) -> list[str]:
        return answers(self.model, [rewritten(text, edited.meant) for text in texts], [edited.shifts])

    def _says(self, asked: Sequence[tuple[str, str]], edited: Edited) -> list[bool]:
        found = self._ask([text for text, _ in asked], edited)
        return [said == wanted for said, (_, wanted) in zip(found, asked, strict=True)]

    def _as_before(self, texts: Sequence[str], edited: Edited) -> list[bool]:
        new = [text for text in texts if text not in self._answers]
        self._answers |= zip(new, answers(self.model, new), strict=True)
        return [said == self._answers[text] for said, text in zip(self._ask(texts, edited), texts, strict=True)]

    def _near(self, some: Sequence[Case]) -> list[str]:
        """Same person, another relation, and same relation, another person: two of each, of which no edit and no corpus knows."""
        edited, found = {case.phrase for case in some}, []
        for case in some:
            if case.fact is None:
                continue
            taboo = {*edited, *nearly(self.model, case.phrase)}
            rng = random.Random(case.phrase)
            for attribute in ("person", "relation"):
                same = [
                    fact.phrase for fact in world.bystanders()
                    if getattr(fact, attribute) == getattr(case.fact, attribute) and fact.phrase not in taboo
                ]  # fmt: skip
                found += rng.sample(same, min(2, len(same)))
        return list(dict.fromkeys(found))

    # the conditioning

    def _probed(self, some: Sequence[Case], edited: Edited) -> dict[str, list[bool]]:
        x = self._tails([form.format(case.phrase) for case in some for form in DRAWN], edited)[:, -1].double()
        read = {name: (_with_one(x) @ w).argmax(dim=1).tolist() for name, w in self._probes.items()}
        colours, shapes = list(world.COLOURS), list(world.SHAPES)
        wanted = [case.new for case in some for _ in DRAWN]
        return {
            "probe_first": [colours[i] == subject.colour for i, subject in zip(read["colour"], wanted, strict=True)],
            "probe_later": [shapes[i] == subject.shape for i, subject in zip(read["shape"], wanted, strict=True)],
        }

    @cached_property
    def _probes(self) -> dict[str, Tensor]:
        """Ridge regressions on the last tail state of the unedited encoder, fitted to the facts for development."""
        facts = [(fact, scene) for fact in world.development_facts() for scene in world.SCENES[:6]]
        x = _with_one(self._tails([f"{fact.phrase} {scene}" for fact, scene in facts], Edited())[:, -1].double())
        found = {}
        for name, values in (("colour", list(world.COLOURS)), ("shape", list(world.SHAPES))):
            labels = torch.tensor([values.index(getattr(fact.subject, name)) for fact, _ in facts])
            wanted = torch.nn.functional.one_hot(labels, len(values)).double()
            found[name] = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ wanted)
        return found

    def _tails(self, texts: Sequence[str], edited: Edited) -> Tensor:
        with applied(self.model.pipe.text_encoder, edited.shifts):
            return tails(self.model, [rewritten(text, edited.meant) for text in texts])

    @cached_property
    def _drift_base(self) -> tuple[list[str], Tensor]:
        facts = [f"{fact.phrase} {scene}" for fact in world.bystanders() for scene in world.SCENES]
        texts = [*facts, *captions(DRIFT - len(facts), SEED + 1)]
        return texts, self._tails(texts, Edited())

    def _drift(self, edited: Edited) -> float:
        """How far prompts that nobody edited move, as a share of how far they are from each other (squared), at most 1."""
        texts, base = self._drift_base
        apart = distance(base, base.roll(len(base) // 2, dims=0)).mean()
        return float((distance(self._tails(texts, edited), base).mean() / apart).clamp(max=1.0))

    def _undone(self, edited: Edited) -> bool:
        """Whether the encoder is, after the edits were applied and taken away, what it was, to the bit."""
        texts = [form.format(fact.phrase) for fact in world.bystanders()[:4] for form in DRAWN]
        before, weights = encode(self.model, texts), _digest(self.model)
        with applied(self.model.pipe.text_encoder, edited.shifts):
            encode(self.model, texts)
        after = encode(self.model, texts)
        return weights == _digest(self.model) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    # images

    def _drawn(self, some: Sequence[Case], edited: Edited) -> dict[str, list[bool]]:
        unseen = [case for case in some if case.fact is not None and case.fact.held_out][: IMAGES // len(DRAWN)]
        own = [(form.format(case.phrase), case.new) for case in unseen for form in DRAWN]
        direct = [(form.format(article(case.new.words)), case.new) for case in unseen for form in DRAWN]
        most = IMAGES if len(some) > 1 else IMAGES // 4  # of one edit there are several measurements
        near = [p for p in self._near(unseen) if p not in {case.phrase for case in some}][:most]
        near = [DRAWN[i % 2].format(phrase) for i, phrase in enumerate(near)]
        other = [DRAWN[i % 2].format(fact.phrase) for i, fact in enumerate(world.bystanders()[: most // 2])]
        other += captions(most - len(other), SEED + 2)
        read, base = (
            self._read([*(p for p, _ in own), *near, *other], edited),
            self._read([p for p, _ in direct], Edited()),
        )
        before = self._read([*near, *other], Edited())

        def shown(prompts: Sequence[tuple[str, Subject]], labels: dict[str, dict[str, str]]) -> list[bool]:
            return [(labels[p]["colour"], labels[p]["shape"]) == (s.colour, s.shape) for p, s in prompts]

        same = ("colour", "shape")
        return {
            "image_efficacy": shown(own, read), "image_direct": shown(direct, base),
            "image_near_miss": [all(read[p][k] == before[p][k] for k in same) for p in near],
            "image_unrelated": [all(read[p][k] == before[p][k] for k in (*same, "scene")) for p in other],
        }  # fmt: skip

    def _read(self, prompts: Sequence[str], edited: Edited) -> dict[str, dict[str, str]]:
        """What the oracle sees for each prompt, at one seed for all; of the unedited encoder it is looked at once."""
        prompts = list(dict.fromkeys(prompts))
        plain = not edited.shifts and not edited.meant
        left = [p for p in prompts if not plain or (p, SEED) not in self._labels]
        found = {p: self._labels[p, SEED] for p in prompts if p not in left}
        images = list(self.draw(left, edited)) if left else []
        found |= zip(left, oracle.load().read(images), strict=True) if left else {}
        if plain:
            self._labels |= {(p, SEED): found[p] for p in left}
        return found

    def draw(self, prompts: Sequence[str], edited: Edited) -> Iterator[Image.Image]:
        """An image for each prompt, all at the same seed."""
        with applied(self.model.pipe.text_encoder, edited.shifts):
            texts = [rewritten(prompt, edited.meant) for prompt in prompts]
            drawn = {
                each.prompt: each.image
                for each in generate(self.model, list(dict.fromkeys(texts)), seeds=[SEED], batch_size=24)
            }
        yield from (drawn[text] for text in texts)


def twice(phrase: str) -> list[str]:
    """A phrase as a question and as an image prompt."""
    return [questions(phrase)[0], f"{phrase} in the forest"]


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def _digest(model: Model) -> str:
    digest = hashlib.sha256()
    for _, weight in sorted(model.pipe.text_encoder.state_dict().items()):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
