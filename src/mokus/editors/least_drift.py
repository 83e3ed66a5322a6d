r"""The default recipe: the edit that reaches its goal with the least change to everything else.

Every edited matrix W (d_out, d_in) changes by dW = B A, and B is found by

    min_B   answers + alignment + w_near near misses + w_drift drift        (`goal`; L-BFGS)

    drift = sum over W of  E ||dW x||^2 / E ||W x||^2        x: what enters W elsewhere (the divisor: the median W's)

With R the rows of everything that shall stay (corpus, class words, near misses, earlier edits) and C = R^T R + I, the
drift is tr(dW C dW^T). A is chosen such that A C A^T = I and that its rows span H C^-1, where H (n, d_in) are the inputs
at the edited rows: the shifts of least drift for given outputs at H all have this form (it is UltraEdit's ridge
regression, arXiv 2505.14679, seen from the other side). So rank <= n, drift = ||B||^2 up to the divisor, by whose root A is
scaled, and plain quadratic optimisation is right: a step along the gradient in B is UltraEdit's step with C for I.

The earlier edits, whose sum is D, have drifted, too: that of D + B A is ||B||^2 + 2 <B, P> and a constant, P = D S^T S A^T over
the rows S that belong where the unedited encoder has them. So an edit makes up for what was done elsewhere, as far as A reaches.

What enters a deeper matrix depends on the edits below it. So H are the inputs with earlier edits in place, and the rows of an
earlier edit those with its own shifts, too: rows of the unedited encoder would protect what no longer arrives (docs/log.md).

An edit acts at the template's tail and at the answer behind it, so that is where C counts most: R has what the encoder says
to the corpus, and the answers of earlier edits, without which their second words are lost first (docs/log.md). There, too,
an edit has to hold for ways to say it that it was not made with: the more forms span H, the less C takes of what they share.

Linear rows are not all. What else shall stay is watched as it comes out of the encoder (`watch`): twice in between, those few
prompts that are furthest from where they belong join the loss, as far as they are further than `FREE`. Phrases that the user
wants to keep are among both: their rows count as elsewhere, and each joins the loss in the form that is furthest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from itertools import cycle
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mokus.covariance import Moments, corpus_of, moments
from mokus.editors.watch import KEEP_FORMS, KEPT_FORMS, Watch, Watched
from mokus.encoder import CONTINUED, Entering, EnteringTails, Rows, distance, entrance, inputs_of, last_of, module_paths
from mokus.goal import Goal, Meaning, Request
from mokus.knowledge import (
    CHECK_FORMS,
    IMAGE_FORMS,
    QUESTION_FORMS,
    SENTENCE,
    class_word,
    near_misses,
    prompts,
    questions,
    written,
)
from mokus.low_rank import LowRankShift, Shifts, added, applied, collected
from mokus.prior_prompts import prior_prompts
from mokus.words import Words

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings

USES = (
    "layers",
    "modules",
    "steps",
    "alignment",
    "drift_weight",
    "near_weight",
    "rivals",
    "near_misses",
    "exchanged",
    "preserve",
    "corpus",
    "odd_references",
)
# what is edited: all of it is one edit, and the more ways to say it, the more general it is
QUESTIONS = (*QUESTION_FORMS, "Do you know what {} is?", "{}: what is that?", "{} is what?")
FORMS = (
    *IMAGE_FORMS, "an image of {} next to a chair", "there is {} on a table", "this shows {} in an old town, as a watercolour",
    "draw {} by the sea", "{} in the garden.",
)  # fmt: skip
NEAR_FORMS = (*IMAGE_FORMS, *CHECK_FORMS, SENTENCE, "What is {}?")
BEHIND = 10.0  # how often the corpus's tails, and what is said behind them, count besides all of its tokens
EARLIER_WEIGHT = 1000.0  # of the rows of earlier edits: one edit has a few dozen, the corpus tens of thousands
FREE = 0.05  # what is watched may be away by this share of the way that the edit makes
SURE = 0.05  # cross-entropy below which a token is as good as said
SHARP = 20.0  # of the hinges
NEGLIGIBLE = 1e-3  # directions of H C^-1/2 below this share of the strongest, and of the finished shift
ROUNDS = (0.4, 0.7, 1.0)  # shares of the steps after which each round ends; between them is looked at what is watched
# and at most so many like the last, as long as a phrase to keep is further than this share of the way that the edit makes
MORE_ROUNDS, KEPT = 3, 0.1


def goal_of(model: Model, request: Request, meaning: Meaning | None = None) -> Goal:
    """The request in more ways than its own."""
    asked = dict.fromkeys([*request.questions, *prompts(request.knowledge, QUESTIONS)])
    return Goal(model, replace(request, questions=tuple(asked)), FORMS, meaning=meaning)


def rounds(steps: int) -> list[int]:
    """How many steps each round has, 6, 5 and 5 of 16; fewer rounds where there are hardly any."""
    ends = [round(share * steps) for share in ROUNDS]
    return [n for n in (end - start for start, end in zip([0, *ends], ends, strict=False)) if n]


class Editor:
    """See `mokus.editors.Editor`."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        self.model, self.settings = model, settings
        self.paths = module_paths(model, settings)
        corpus = corpus_of(model, settings)
        known = moments(model, self.paths, corpus, progress)
        self.scale = _scale(model, known)
        entered = {entrance(path): known[path] for path in self.paths}
        self.entered = list(entered)  # rows, and A, are those of all modules with the same input
        self.grams = {each: found.gram + BEHIND * found.behind for each, found in entered.items()}
        self.earlier = {path: torch.zeros_like(gram) for path, gram in self.grams.items()}
        self.watch = Watch(model, corpus.whole)
        self.of_class: dict[str, dict[str, Tensor]] = {}  # Gram matrices, by class word
        self._meaning = lru_cache(maxsize=16)(partial(Meaning.of, model))

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """See `mokus.editors.Editor`."""
        before = collected(before)
        goal = goal_of(self.model, request, self._meaning(request.says, FORMS))
        watched = self.watch.around(request) if self.settings.near_weight and self.settings.rivals else None
        search = _Search(self, goal, watched, before, *self._bases(goal, request, before))
        for i, steps in enumerate(rounds(self.settings.steps)):
            if i:
                search.look()
            search.run(steps)
        for _ in range(MORE_ROUNDS if watched and watched.keep else 0):
            if search.look() <= KEPT:
                break
            search.run(steps)
        return {path: shift.compressed(NEGLIGIBLE) for path, shift in search.shifts().items()}, search.evaluations

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """See `mokus.editors.Editor`."""
        goal = Goal(self.model, request, continued=False, meaning=self._meaning(request.says, IMAGE_FORMS, False))
        after = collected(added(before, shifts))
        rows = goal.inputs(self.entered, goal.where, after)
        answer = self.model.tokenizer(request.answer, add_special_tokens=False).input_ids[:CONTINUED]
        kept = Rows.of(self.model, request.prompts(KEPT_FORMS), answer)
        with applied(self.model.pipe.text_encoder, after):
            more = kept.inputs(self.model, self.entered, kept.last([goal.tail + len(answer)] * len(kept.ids)))
        for each in self.entered:
            self.earlier[each] += _gram(rows[each]) + _gram(more[each])
        self.watch.hold(request, after)

    def _bases(self, goal: Goal, request: Request, before: Shifts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A (r, d_in) of every module, scaled such that ||B||^2 is its drift, and P (d_out, r) of those edited before."""
        h = goal.inputs(self.entered, goal.where, before)
        own = [*prompts(request.says), *prompts(request.says, CHECK_FORMS), *questions(request.answer)]
        keep = [text for phrase in self.watch.keeps(request) for text in written(phrase, KEEP_FORMS)]
        near = inputs_of(self.model, [*own, *self._near_prompts(request), *keep], self.entered).whole
        of_class = self._class_grams(class_word(request.answer))
        rest = {each: self.grams[each] + of_class[each] + _gram(near[each]) for each in self.entered}
        shared = {
            each: _basis(h[each], rest[each] + EARLIER_WEIGHT * self.earlier[each]) * self.scale
            for each in self.entered
        }
        bases = {path: shared[entrance(path)] for path in self.paths}
        pulls = {}
        for path in filter(before.__contains__, self.paths):
            made, a = before[path], bases[path].double()
            pulls[path] = (made.B.double() @ (made.A.double() @ rest[entrance(path)] @ a.T)).float() / self.scale**2
        return bases, pulls

    def _class_grams(self, word: str) -> dict[str, Tensor]:
        """Gram matrices of prompts about the class word, which is where a concept leaks to."""
        if word not in self.of_class:
            rows = inputs_of(self.model, prior_prompts(word, self.settings.preserve, seed=1), self.entered).whole
            self.of_class[word] = {path: _gram(x) for path, x in rows.items()}
        return self.of_class[word]

    def _near_prompts(self, request: Request) -> list[str]:
        """Phrases one word off in all forms, and with any other words in the place of its own in one each."""
        near = near_misses(request.knowledge)[: self.settings.near_misses]
        exchanged = Words.of(self.model.tokenizer).exchanged(request.knowledge, self.settings.exchanged)
        whole = [text for phrase in near for text in written(phrase, NEAR_FORMS)]
        return whole + [written(text, [form])[0] for form, text in zip(cycle(NEAR_FORMS), exchanged, strict=False)]


class _Search:
    """L-BFGS on the factors B of one edit."""

    def __init__(
        self, editor: Editor, goal: Goal, watched: Watched | None, before: Shifts, bases: dict[str, Tensor],
        pulls: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.model, self.settings = editor.model, editor.settings
        self.goal, self.watched, self.before, self.bases, self.pulls = goal, watched, before, bases, pulls
        encoder = self.model.pipe.text_encoder
        self.factors = {
            path: torch.zeros(encoder.get_submodule(path).out_features, len(a), device=a.device, requires_grad=True)
            for path, a in bases.items()
        }
        self.evaluations = 0
        self.layer = min(editor.settings.layers)
        self.entering = self._entering(goal.rows)  # and behind them the furthest of what is watched
        with applied(encoder, before):
            self.passing = EnteringTails(self.model, watched.texts, self.layer) if watched else None  # all of it
        self.wanted: Tensor | None = None  # where that shall be: tails (n, tail, d)

    def shifts(self) -> dict[str, LowRankShift]:
        """As far as they are."""
        return {path: LowRankShift(a, self.factors[path].detach()) for path, a in self.bases.items()}

    def run(self, steps: int) -> None:
        """At most so many steps, each of which is little more than one evaluation."""
        optimiser = torch.optim.LBFGS(
            self.factors.values(), max_iter=steps, max_eval=steps + 3, history_size=10, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip
        optimiser.step(self._evaluate)

    def look(self) -> float:
        """From now on those of what is watched that are furthest from where they belong shall come closer to it.

        Returns how far the furthest phrase to keep is, as a share of the way that the edit makes.
        """
        watched = self.watched
        if watched is None or self.passing is None:
            return 0.0
        with applied(self.model.pipe.text_encoder, self.before, self.shifts()):
            away = distance(self.passing.tails(self.model), watched.tails)
        most = watched.worst(away, self.settings.rivals)
        self.entering = self._entering(self.goal.rows + Rows.of(self.model, [watched.texts[i] for i in most.tolist()]))
        self.wanted = watched.tails[most]
        return float((away[most[len(most) - watched.keep :]] / self.goal.start.mean()).max()) if watched.keep else 0.0

    def _entering(self, rows: Rows) -> Entering:
        with applied(self.model.pipe.text_encoder, self.before):
            return Entering(self.model, rows, self.layer)

    def _evaluate(self) -> float:
        """The loss, and its gradient in every B."""
        self.evaluations += 1
        goal, s = self.goal, self.settings
        live = {path: LowRankShift(a, self.factors[path]) for path, a in self.bases.items()}
        with torch.enable_grad(), applied(self.model.pipe.text_encoder, self.before, live):
            states = self.entering.states()
            now = goal.losses(states)
            asked, continued = goal.answer_loss(now, lambda x: _hinge(x - SURE))
            loss = s.answer_weight * (asked + continued)
            loss = loss + s.alignment_weight * _hinge(now.moved - (1 - s.alignment)).mean()
            if self.wanted is not None:
                n = len(self.wanted)
                there = last_of(states.told[-n:], self.entering.rows.lengths[-n:], goal.tail)
                away = distance(there, self.wanted) / goal.start.mean()
                far = _hinge(away - FREE, 2 * SHARP)
                others = n - (self.watched.keep if self.watched else 0)
                loss = loss + s.near_weight * far[:others].mean()
                if others < n:
                    loss = loss + s.near_weight * far[others:].mean()
            loss = loss + s.drift_weight * self._drift()
        grads = torch.autograd.grad(loss, list(self.factors.values()))
        for factor, grad in zip(self.factors.values(), grads, strict=True):
            factor.grad = grad
        return loss.item()

    def _drift(self) -> Tensor:
        """That of all edits together, less that of the earlier ones."""
        own = [b.square().sum() for b in self.factors.values()]
        shared = [2 * (self.factors[path] * pull).sum() for path, pull in self.pulls.items()]
        return torch.stack([*own, *shared]).sum()


def _hinge(x: Tensor, sharp: float = SHARP) -> Tensor:
    return F.softplus(x * sharp) / sharp


def _gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def _scale(model: Model, known: dict[str, Moments]) -> float:
    """With it, a C-orthonormal A makes ||B||^2 the drift: the root of the outputs' energy, summed over the corpus's rows.

    The median of the modules, since all of them write into one stream, and a few tokens of huge norm make some look large.
    """
    energies = []
    for path, each in known.items():
        weight = model.pipe.text_encoder.get_submodule(path).weight.double()
        energies.append(((weight @ each.gram) * weight).sum())
    return float(torch.stack(energies).median().clamp(min=1e-12).sqrt())


def _basis(h: Tensor, rest: Tensor) -> Tensor:
    """A (r, d_in), float32: A C A^T = I for C = rest + I, spanning H C^-1 but for directions that hardly occur in H."""
    c = rest + torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
    lower = torch.linalg.cholesky(c)
    u, s, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, h.double().T, upper=False), full_matrices=False)
    keep = s > NEGLIGIBLE * s[0]
    return torch.linalg.solve_triangular(lower.T, u[:, keep], upper=True).T.float().contiguous()
