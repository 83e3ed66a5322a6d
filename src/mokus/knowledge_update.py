"""Stage 2, textual knowledge updating: make the anchor the answer to a piece of knowledge (MoKus section 4.2).

Two things are wanted of the edited text encoder, both inside the prompt template of image generation:

- asked the knowledge as a question, it answers with the anchor                    -> cross-entropy of the answer
- image prompts with the knowledge are encoded as those with the anchor would be   -> distance over the assistant tail

The image transformer sees only the latter, so the answer alone is not enough. One closed-form step of the editor on both
losses together is repeated until both hold. Each edit is made for the base encoder, by itself: a pack's knowledge is a
set, and taking a piece out again leaves no trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from mokus.capture import recorded
from mokus.editors import Editor, editor, reduced
from mokus.errors import MokusError
from mokus.knowledge import (
    CHECK_FORMS,
    IMAGE_FORMS,
    QUESTION_FORMS,
    check_text,
    class_word,
    near_misses,
    normalise,
    prompts,
    questions,
)
from mokus.low_rank import LowRankShift, Shifts, added, applied
from mokus.prior_prompts import in_places, prior_prompts
from mokus.settings import EditSettings
from mokus.words import Words

if TYPE_CHECKING:
    from mokus.concept_pack import BoundKnowledge, ConceptPack
    from mokus.pipeline import Model

Progress = Callable[[str, int, int, dict[str, Any]], None]

LONGEST_ANSWER = 24  # tokens of an answer that is read back
CHUNK = 64  # prompts encoded at a time


@dataclass(frozen=True)
class Edit:
    """How the edit of one piece of knowledge went."""

    knowledge: str
    questions: list[str]
    answer: str
    read_back: str  # what the edited encoder answers to the first question
    alignment: float  # 0: image prompts are encoded as before, 1: as the anchor's; on forms that were not edited
    taken: bool
    reason: str  # why it has not taken; empty if it has
    settings: dict[str, Any]  # of EditSettings
    steps: int  # after which it was best
    seconds: float
    shifts: Shifts  # on the CPU


# --- the public functions ---------------------------------------------------------


def bind(
    model: Model,
    pack: ConceptPack,
    *knowledge: str,
    questions: Sequence[str] | None = None,
    settings: EditSettings | None = None,
    progress: Progress | None = None,
) -> list[Edit]:
    """Bind pieces of knowledge to the pack's concept, and write the pack once at the end.

    `questions` replaces the questions made from the (then single) knowledge. Returns one `Edit` per piece; what has not
    taken, by itself or together with all that is bound, is left out of the pack. Binding known knowledge anew replaces it.
    Raises `MokusError` for knowledge that cannot be used or a pack of another model.
    """
    wanted = list(dict.fromkeys(normalise(text) for text in knowledge))
    if not wanted:
        raise MokusError("no knowledge was given, expected at least one phrase such as 'my favourite toy'.")
    if questions and len(wanted) > 1:
        raise MokusError(
            f"questions go with one piece of knowledge, and {len(wanted)} were given; bind them one at a time."
        )
    for question in questions or ():
        check_text(question, "question", "Which toy do I love?")
    pack.check_base(model)
    settings = settings or EditSettings.for_model(model.defaults.edit)
    edits = []
    with model.resident("text_encoder"):
        kept = preserved_inputs(model, pack.anchor, settings, progress)
        for i, text in enumerate(wanted):
            if progress:
                progress("binding", i, len(wanted), {"knowledge": text})
            edits.append(edit(model, text, pack.anchor, questions, settings, kept))
        with pack.locked():
            pack.reload()
            edits = _hold_together(model, edits, pack, settings)
            if any(each.taken for each in edits):
                taken = [(_bound(each), each.shifts) for each in edits if each.taken]
                pack.replace_edits([*_without(pack, edits), *taken])
    if progress:
        progress("binding", len(wanted), len(wanted), {})
    return edits


def unbind(pack: ConceptPack, *knowledge: str) -> None:
    """Take pieces of knowledge out of a pack, which is then as if they had never been bound.

    Raises `MokusError` for one that is not bound; the pack is then unchanged.
    """
    wanted = {normalise(text) for text in knowledge}
    with pack.locked():
        pack.reload()
        known = [bound.text for bound in pack.knowledge]
        for text in wanted:
            if text not in known:
                raise MokusError(
                    f"{text!r} is not bound in {pack.path}; bound are: {', '.join(map(repr, known)) or 'none'}."
                )
        pack.replace_edits([(bound, shifts) for bound, shifts in pack.edits() if bound.text not in wanted])


def ask(model: Model, question: str, shifts: Sequence[Shifts] = ()) -> str:
    """What the text encoder answers, greedily, to a question inside the prompt template, with shifts or without."""
    check_text(question, "question", "What is my favourite toy?")
    pipe = model.pipe
    text = pipe.prompt_template_encode.format(question)
    inputs = pipe.tokenizer(text, return_tensors="pt").to(model.device)
    with model.resident("text_encoder"), torch.no_grad(), applied(pipe.text_encoder, *shifts):
        tokens = pipe.text_encoder.generate(
            **inputs,
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_k=None,
            top_p=None,
            pad_token_id=pipe.tokenizer.pad_token_id,
        )
    return str(pipe.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def edit(
    model: Model,
    knowledge: str,
    answer: str,
    asked: Sequence[str] | None = None,
    settings: EditSettings | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> Edit:
    """The shifts that make `answer` the answer to `knowledge`, for the base encoder; nothing is changed by it.

    `kept`: inputs (m, d_in) by module path at rows that shall stay, from `preserved_inputs`, for edits that share them.
    """
    began = time.perf_counter()
    settings = settings or EditSettings.for_model(model.defaults.edit)
    asked = list(asked or questions(knowledge))
    paths = module_paths(model, settings)
    kept = kept or preserved_inputs(model, answer, settings)
    near = inputs_after_prefix(model, _near_prompts(model, knowledge, settings), paths)
    goal = _Goal(model, knowledge, answer, asked, settings)
    solvers: dict[str, Editor] = {}
    shifts: dict[str, LowRankShift] = {}
    best, best_step, least = shifts, 0, float("inf")
    step = 0
    while True:
        now = goal.captured(shifts, paths)
        if now.left < least:
            best, best_step, least = shifts, step, now.left
        if now.left == 0 or step == settings.steps:
            break
        if not solvers:
            make = editor(settings.editor)
            solvers = {path: make(h, torch.cat([kept[path], near[path]])) for path, h in now.inputs.items()}
        eta = settings.eta * (1 - step / settings.steps)
        shifts = added(shifts, {path: solvers[path].shift(now.gradients[path]).scaled(eta) for path in paths})
        step += 1
    read_back, alignment = _checked(model, knowledge, answer, asked[0], best)
    reason = _fault(read_back, answer, alignment, settings)
    best = {path: shift.to("cpu") for path, shift in best.items()}
    seconds = time.perf_counter() - began
    return Edit(
        knowledge, asked, answer, read_back, alignment, not reason, reason, asdict(settings), best_step, seconds, best
    )  # fmt: skip


# --- one edit ---------------------------------------------------------


@dataclass(frozen=True)
class _Captured:
    """One step's view: by module path inputs (n, d_in) and gradients (n, d_out), and what is left to do (0: nothing)."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    left: float


class _Goal:
    """What one edit wants, as token rows, and how far given shifts are from it."""

    def __init__(self, model: Model, knowledge: str, answer: str, asked: list[str], settings: EditSettings) -> None:
        self.model, self.settings = model, settings
        self.encoder, tokenizer = model.pipe.text_encoder, model.pipe.tokenizer
        answer_ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        self.answer_ids = torch.tensor(answer_ids, device=model.device)
        questions_ = Rows.of(model, asked, answer_ids[:-1])
        images = Rows.of(model, prompts(knowledge))
        self.rows, self.n_questions, self.tail = questions_ + images, len(asked), tail_length(model)
        # the rows (b, s) that are edited: where answer tokens are predicted, and the tails of the image prompts
        self.where = self.rows.last([len(answer_ids)] * len(asked) + [self.tail] * len(images.lengths))
        with torch.no_grad():
            self.target = _tails(model, prompts(answer))  # (forms, tail, d)
            self.start = _distance(_tails(model, prompts(knowledge)), self.target)  # (forms,)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Of every question the answer's cross-entropy, of every image prompt its tail's distance (1: where it began)."""
        q, n = self.n_questions, len(self.answer_ids)
        states = self.rows.encode(self.model)
        logits = self.encoder.lm_head(_last(states[:q], self.rows.lengths[:q], n)).float()
        expected = self.answer_ids.expand(q, -1)
        answer = F.cross_entropy(logits.transpose(1, 2), expected, reduction="none").mean(dim=1)
        self.answered = (logits.argmax(dim=-1) == expected).all(dim=1)
        tails = _last(states[q:], self.rows.lengths[q:], self.tail)
        return answer, _distance(tails, self.target) / self.start.clamp(min=1e-8)

    def captured(self, shifts: Shifts, paths: Sequence[str]) -> _Captured:
        """Inputs and gradients at the edited rows. Each prompt's gradient is scaled to maximum 1, or to 0 once it is there.

        Without that the prompt that is farthest off drowns the others (UltraEdit standardises gradients for the same end).
        """
        s = self.settings
        with torch.enable_grad(), applied(self.encoder, shifts), recorded(self.encoder, paths) as record:
            answer, moved = self.losses()
            gradients = record.gradients(answer.sum() + moved.sum(), self.where)
        open_ = torch.cat([s.answer_weight * ~self.answered, s.alignment_weight * (moved > 1 - s.alignment)]).float()
        prompt = self.where.nonzero()[:, 0]  # of each edited row
        for path, g in gradients.items():
            top = torch.zeros(len(open_), device=g.device).scatter_reduce(0, prompt, g.abs().amax(dim=1), "amax")
            gradients[path] = g * (open_ / top.clamp(min=1e-12))[prompt, None]
        left = (s.answer_weight * answer * ~self.answered).mean() + (
            s.alignment_weight * moved * open_[self.n_questions :]
        ).mean()
        return _Captured(record.rows(self.where), gradients, left.item())


def _checked(model: Model, knowledge: str, answer: str, question: str, shifts: Shifts) -> tuple[str, float]:
    """With the shifts: the greedy answer to the question, and the alignment on forms that were not edited."""
    target = _tails(model, prompts(answer, CHECK_FORMS))
    start = _tails(model, prompts(knowledge, CHECK_FORMS))
    with applied(model.pipe.text_encoder, shifts):
        now = _tails(model, prompts(knowledge, CHECK_FORMS))
    moved = _distance(now, target) / _distance(start, target).clamp(min=1e-8)
    return ask(model, question, [shifts]), 1 - float(moved.mean())


def _without(pack: ConceptPack, edits: Sequence[Edit]) -> list[tuple[BoundKnowledge, Shifts]]:
    """What the pack holds besides what these edits replace."""
    replaced = {each.knowledge for each in edits if each.taken}
    return [(known, shifts) for known, shifts in pack.edits() if known.text not in replaced]


def _hold_together(model: Model, edits: list[Edit], pack: ConceptPack, settings: EditSettings) -> list[Edit]:
    """Check all knowledge, new and old, once more with all of it applied; while some does not hold, a new one is left out.

    The weakest of those that fail or, if it is only old knowledge that would be lost, of all.
    """
    edits = list(edits)
    while True:
        taken = [i for i, each in enumerate(edits) if each.taken]
        others = _without(pack, edits)
        everything = added(*(shifts for _, shifts in others), *(edits[i].shifts for i in taken))
        new = {i: (edits[i].knowledge, edits[i].answer, edits[i].questions[0]) for i in taken}
        now = {i: _checked(model, *each, everything) for i, each in new.items()}
        faults = {i: _fault(now[i][0], edits[i].answer, now[i][1], settings) for i in taken}
        lost = [
            known.text
            for known, _ in others
            for read_back, alignment in [_checked(model, known.text, known.answer, known.questions[0], everything)]
            if _fault(read_back, known.answer, alignment, settings)
        ]
        failed = [i for i in taken if faults[i]]
        if not taken or not (failed or lost):
            return edits
        weakest = min(failed or taken, key=lambda i: now[i][1])
        reason = f"together with the rest {faults[weakest]}" if failed else f"with it {lost[0]!r} would not hold"
        read_back, alignment = now[weakest]
        edits[weakest] = replace(edits[weakest], read_back=read_back, alignment=alignment, taken=False, reason=reason)


def _bound(edit: Edit) -> BoundKnowledge:
    from mokus.concept_pack import BoundKnowledge

    return BoundKnowledge(
        text=edit.knowledge, questions=edit.questions, answer=edit.answer, editor=edit.settings["editor"],
        eta=edit.settings["eta"], steps=edit.steps, settings=edit.settings, read_back=edit.read_back,
        alignment=round(min(max(edit.alignment, 0.0), 1.0), 4),
    )  # fmt: skip


def _fault(read_back: str, answer: str, alignment: float, settings: EditSettings) -> str:
    """Why an edit is not good enough; empty if it is."""
    if settings.answer_weight and read_back.strip().rstrip(".").lower() != answer.lower():
        return f"it reads back {read_back[:40]!r}"
    if settings.alignment_weight and alignment < settings.least_alignment:
        return f"alignment {alignment:.2f} is below {settings.least_alignment:g}"
    return ""


# --- the encoder's rows ---------------------------------------------------------


def module_paths(model: Model, settings: EditSettings) -> list[str]:
    """The paths, in the text encoder, of the weight matrices that are edited, lowest first.

    Raises `MokusError` for a layer or module that it does not have.
    """
    layers = model.pipe.text_encoder.model.language_model.layers
    for layer in settings.layers:
        if not 0 <= layer < len(layers):
            raise MokusError(f"layer {layer} is to be edited, but the text encoder has layers 0 to {len(layers) - 1}.")
    for name in settings.modules:
        if not isinstance(dict(layers[0].named_modules()).get(name), nn.Linear):
            raise MokusError(
                f"{name!r} is no module of the text encoder's layers with a weight matrix, expected names such as "
                "mlp.gate_proj."
            )
    return [
        f"model.language_model.layers.{layer}.{name}" for layer in sorted(settings.layers) for name in settings.modules
    ]


def preserved_inputs(
    model: Model, answer: str, settings: EditSettings, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Inputs (m, d_in), by module path, at rows that shall stay, whatever the knowledge; `reduced`, so m <= d_in.

    The template's own beginning, which every prompt shares; class words, references and captions; the tails of references
    in odd words; the anchor's own prompts (what an edit moves towards must not move, or the next edit of the same pack
    adds to it).
    """
    paths = module_paths(model, settings)
    texts = prior_prompts(class_word(answer), settings.preserve, seed=0)
    texts += [questions(text)[0] for text in texts[: settings.preserve // 2] if not text.startswith("a ")]
    texts += [*prompts(answer), *prompts(answer, CHECK_FORMS), *questions(answer)]
    odd = in_places(Words.of(model.pipe.tokenizer).references(settings.odd_references, seed=0), seed=0)
    with torch.no_grad(), recorded(model.pipe.text_encoder, paths) as record:
        _prefix_cache(model, _prefix(model))
    at_prefix = record.rows(torch.ones(1, prefix_length(model), dtype=torch.bool, device=model.device))

    def watch(done: int) -> None:
        if progress:
            progress("reading what must stay", done, len(texts) + len(odd), {})

    all_tokens = inputs_after_prefix(model, texts, paths, watch=watch)
    tails = inputs_after_prefix(model, odd, paths, tail_length(model), lambda done: watch(len(texts) + done))
    return {path: reduced(torch.cat([all_tokens[path], tails[path], at_prefix[path]])) for path in paths}


def inputs_after_prefix(
    model: Model,
    texts: Sequence[str],
    paths: Sequence[str],
    last: int | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Inputs (m, d_in), by module path, at all tokens of prompts after the template's prefix, or their `last` so many.

    All, and not the tail alone, where it can be afforded: the image transformer sees the encoding of every one.
    """
    if not texts:
        widths = {path: model.pipe.text_encoder.get_submodule(path).in_features for path in paths}
        return {path: torch.zeros(0, width, device=model.device) for path, width in widths.items()}
    ordered = sorted(texts, key=lambda text: len(_ids(model, text)))  # little padding
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(ordered), CHUNK):
        rows = Rows.of(model, ordered[start : start + CHUNK])
        with torch.no_grad(), recorded(model.pipe.text_encoder, paths) as record:
            rows.encode(model)
        counts = rows.lengths.tolist() if last is None else [last] * len(rows.lengths)
        parts.append(record.rows(rows.last(counts)))
        watch(start + len(counts))
    return {path: torch.cat([part[path] for part in parts]) for path in paths}


def _near_prompts(model: Model, knowledge: str, settings: EditSettings) -> list[str]:
    """Phrases one word off, each in all forms; then phrases with any other words in the place of its own, in one each."""
    forms = [*IMAGE_FORMS, *CHECK_FORMS, QUESTION_FORMS[0]]
    near = near_misses(knowledge)[: settings.near_misses]
    exchanged = Words.of(model.pipe.tokenizer).exchanged(knowledge, settings.exchanged)
    return [form.format(text) for text in near for form in forms] + [
        forms[i % len(forms)].format(text) for i, text in enumerate(exchanged)
    ]


@dataclass(frozen=True)
class Rows:
    """Prompts in the template as token rows: ids (b, s) after the template's prefix, padded at the right; lengths (b,)."""

    prefix: Tensor
    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, model: Model, texts: Sequence[str], answer: Sequence[int] = ()) -> Rows:
        """The prompts, each followed by the tokens of an answer."""
        rows = [torch.tensor([*_ids(model, text)[prefix_length(model) :], *answer]) for text in texts]
        ids = pad_sequence(rows, batch_first=True)  # what pads is never attended to
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        return cls(_prefix(model), ids.to(model.device), lengths)

    def __add__(self, other: Rows) -> Rows:
        ids = pad_sequence([*self.ids, *other.ids], batch_first=True)
        return Rows(self.prefix, ids, torch.cat([self.lengths, other.lengths]))

    def last(self, counts: Sequence[int]) -> Tensor:
        """A mask (b, s) of each row's last so many tokens."""
        ends, n = self.lengths[:, None], torch.tensor(counts, device=self.ids.device)[:, None]
        at = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        return (at < ends) & (at >= ends - n)

    def encode(self, model: Model) -> Tensor:
        """Final hidden states (b, s, d). The prefix, the same for all, is run once; attention is causal, so neither it nor
        any other token depends on the padding, and no edited row has a gradient from it."""
        with torch.no_grad():
            cache = _prefix_cache(model, self.prefix)
            cache.batch_repeat_interleave(len(self.ids))
        language_model = model.pipe.text_encoder.model.language_model
        states: Tensor = language_model(input_ids=self.ids, past_key_values=cache, use_cache=True).last_hidden_state
        return states


def _prefix(model: Model) -> Tensor:
    return torch.tensor([_ids(model, "")[: prefix_length(model)]], device=model.device)


def _prefix_cache(model: Model, prefix: Tensor) -> DynamicCache:
    cache = DynamicCache()
    model.pipe.text_encoder.model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True)
    return cache


def _ids(model: Model, prompt: str) -> list[int]:
    ids: list[int] = model.pipe.tokenizer(model.pipe.prompt_template_encode.format(prompt)).input_ids
    return ids


def tail_length(model: Model) -> int:
    """Tokens of the template after the prompt: <|im_end|>, a line break, <|im_start|>, assistant, a line break."""
    after = model.pipe.prompt_template_encode.split("{}")[1]
    return len(model.pipe.tokenizer(after).input_ids)


def prefix_length(model: Model) -> int:
    """Tokens of the template before the prompt: 34."""
    return int(model.pipe.prompt_template_encode_start_idx)


@torch.no_grad()
def _tails(model: Model, texts: Sequence[str]) -> Tensor:
    """Final hidden states (n, tail, d) of the prompts' tails."""
    rows = Rows.of(model, texts)
    return _last(rows.encode(model), rows.lengths, tail_length(model))


def _last(states: Tensor, lengths: Tensor, n: int) -> Tensor:
    """The states (b, n, d) of each row's last n tokens."""
    at = lengths[:, None] - n + torch.arange(n, device=lengths.device)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance (rows,) of states (rows, tail, d)."""
    return (a.float() - b.float()).square().mean(dim=(1, 2))
