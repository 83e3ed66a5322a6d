"""The text encoder inside the template of image generation: prompts as token rows, what they are encoded as, what it answers.

The template is the *prefix*, the same for all prompts (in Qwen-Image a system text, 34 tokens), the prompt, and the *tail*:
<|im_end|>, a line break, <|im_start|>, assistant, a line break. Answers follow the tail; the image transformer sees
hidden states of prompt and tail, the final ones or those of a lower layer (`backbone`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from mokus.capture import recorded
from mokus.errors import MokusError
from mokus.low_rank import Shifts, applied
from mokus.memory import plain

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.settings import EditSettings

LONGEST_ANSWER = 24  # tokens of an answer that is read back
CHUNK = 64  # prompts encoded at a time
CONTINUED = 8  # tokens that are looked at, at most, of what is said to a prompt that is no question
# modules of a layer that are entered by the same as another one, in the text encoders of all families in `backbone`
ENTERED_ALIKE = {
    "mlp.up_proj": "mlp.gate_proj", "self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj",
}  # fmt: skip


def module_paths(model: Model, settings: EditSettings) -> list[str]:
    """The paths, in the text encoder, of the weight matrices that are edited, lowest first.

    Raises `MokusError` for a layer or module that it does not have, and for a layer that the image transformer is not told of.
    """
    layers = model.language_model.layers
    check_edited(settings, layers[0], len(layers), model.backbone.highest(len(layers)))
    names = dict.fromkeys(settings.modules)
    inside = model.backbone.language_model
    return [f"{inside}.layers.{layer}.{name}" for layer in sorted(set(settings.layers)) for name in names]


def check_edited(settings: EditSettings, one: nn.Module, count: int, highest: int) -> None:
    """Raise `MokusError` for a layer or module to be edited that is not there, or is beyond what the image transformer is told.

    `one` is any of the text encoder's `count` layers, which may be without contents.
    """
    for layer in settings.layers:
        if not 0 <= layer < count:
            raise MokusError(f"layer {layer} is to be edited, but the text encoder has layers 0 to {count - 1}.")
        if layer > highest:
            raise MokusError(
                f"layer {layer} is to be edited, but the image transformer is told what comes out of layer {highest}, so no "
                f"edit above it shows in images; choose from layers 0 to {highest}."
            )
    for name in settings.modules:
        if not isinstance(dict(one.named_modules()).get(name), nn.Linear):
            raise MokusError(
                f"{name!r} is no module of the text encoder's layers with a weight matrix, expected names such as "
                "mlp.gate_proj."
            )
        if not plain(one.get_submodule(name)):
            raise MokusError(
                f"{name!r} is quantised in this text encoder, and edits are found in plain weights; edit with the model in "
                "bfloat16 or float32. Packs that are there can be used with it."
            )


def entrance(path: str) -> str:
    """The one of all modules with the same input that stands for them: gate_proj for up_proj, most stand for themselves."""
    for name, first in ENTERED_ALIKE.items():
        if path.endswith(f".{name}"):
            return path.removesuffix(name) + first
    return path


# --- the template ---------------------------------------------------------


def in_template(model: Model, prompt: str) -> str:
    """The prompt with the template around it."""
    before, _, after = model.backbone.template(model.pipe).partition("{}")
    return f"{before}{prompt}{after}"


def tail_length(model: Model) -> int:
    """Tokens of the template after the prompt."""
    _, _, after = model.backbone.template(model.pipe).partition("{}")
    return len(model.tokenizer(after).input_ids)


def prefix_length(model: Model) -> int:
    """Tokens of the template before the prompt: 34 in Qwen-Image."""
    before, _, _ = model.backbone.template(model.pipe).partition("{}")
    return len(model.tokenizer(before).input_ids)


def token_ids(model: Model, prompt: str) -> list[int]:
    """The prompt in the template, prefix and tail included."""
    return _token_ids(model, [prompt])[0]


def _token_ids(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    """Those of several, which a tokenizer does together in a tenth of the time."""
    texts = [in_template(model, prompt) for prompt in prompts]
    return list(model.tokenizer(texts).input_ids) if texts else []


def _prefix(model: Model) -> Tensor:
    return torch.tensor([token_ids(model, "")[: prefix_length(model)]], device=model.device)


@torch.no_grad()
def _prefix_cache(model: Model, prefix: Tensor) -> DynamicCache:
    """Keys and values (1, prefix, ...) of the prefix, with what is applied now: run once for all prompts that follow it."""
    cache = DynamicCache()
    model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True)
    return cache


# --- rows ---------------------------------------------------------


class States(NamedTuple):
    """Hidden states of token rows: those that the image transformer is told (b, s, d), and the final ones (b, s, width),
    which the next token is read off. In Qwen-Image they are the same."""

    told: Tensor
    final: Tensor


@dataclass(frozen=True)
class Rows:
    """Prompts in the template as token rows: ids (b, s) after the template's prefix, padded at the right; lengths (b,)."""

    prefix: Tensor
    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, model: Model, texts: Sequence[str], answer: Sequence[int] = ()) -> Rows:
        """The prompts, each followed by the tokens of an answer."""
        begin = prefix_length(model)
        rows = [torch.tensor([*ids[begin:], *answer]) for ids in _token_ids(model, texts)]
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

    def encode(self, model: Model, prefix: DynamicCache | None = None) -> Tensor:
        """What the image transformer is told (b, s, d)."""
        return self.states(model, prefix).told

    def states(self, model: Model, prefix: DynamicCache | None = None) -> States:
        """Those of all rows (b, s, ...).

        The prefix, the same for all, is run once, if it is not given as `_prefix_cache` has it; attention is causal, so
        neither it nor any other token depends on the padding, and no edited row has a gradient from it.
        """
        return self._run(model, _read(model), prefix)[0]

    @torch.no_grad()
    def inputs(self, model: Model, paths: Sequence[str], where: Tensor) -> dict[str, Tensor]:
        """What enters the modules (n, d_in), by module path, at the n tokens where the mask (b, s) is true."""
        with recorded(model.pipe.text_encoder, paths) as record:
            self.encode(model)
        return record.rows(where)

    def _run(
        self, model: Model, read: Sequence[nn.Module], prefix: DynamicCache | None = None
    ) -> tuple[States, DynamicCache]:
        cache = DynamicCache()
        for i, layer in enumerate((_prefix_cache(model, self.prefix) if prefix is None else prefix).layers):
            cache.update(layer.keys, layer.values, i)
        cache.batch_repeat_interleave(len(self.ids))
        return _states(model.language_model, read, input_ids=self.ids, past_key_values=cache), cache


def _read(model: Model) -> list[nn.Module]:
    """The layers whose outputs the image transformer is told; none if it is told the final states."""
    return [] if model.backbone.normed else model.backbone.read(model.language_model.layers)


def _states(language_model: nn.Module, read: Sequence[nn.Module], **inputs: Any) -> States:
    told: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        for layer in read:
            stack.callback(layer.register_forward_hook(lambda layer, _, out: told.update({layer: out})).remove)
        final: Tensor = language_model(**inputs, use_cache=True).last_hidden_state
    return States(torch.cat([told[layer] for layer in read], dim=-1) if read else final, final)


class Entering:
    """Rows on their way into a layer of the language model: what an edit of that layer and of those above it never changes.

    Prefix and rows are run through the layers below once, with what is applied then; `states` goes on from there, several
    rows in one line where they fit, so that little is computed for padding. An edit of layers 18 to 25 of 28 is sought in
    less than half the time.
    """

    def __init__(self, model: Model, rows: Rows, layer: int) -> None:
        lowest = min(read % len(model.language_model.layers) for read in model.backbone.reads)
        self.model, self.rows, self.layer = model, rows, min(layer, lowest)
        reached: list[Tensor] = []
        hook = model.language_model.norm.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
        try:
            with torch.no_grad(), _some_layers(model.language_model, slice(self.layer)):
                rows._run(model, [])
        finally:
            hook.remove()
        self.prefix, own = reached  # (1, prefix, d), (b, s, d)
        self.lines = Lines.of(rows.lengths.tolist(), rows.ids.shape[1], self.prefix.shape[1], own)
        self.own = self.lines.laid(own)  # (lines, width, d)

    def states(self) -> States:
        """The same as `Rows.states`, (b, s, ...), up to rounding, but for zeros at the padding."""
        language_model, read, lines = self.model.language_model, _read(self.model), self.lines
        with _some_layers(language_model, slice(self.layer, None)):
            cache = DynamicCache()
            with torch.no_grad():
                language_model(inputs_embeds=self.prefix, past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(self.own))
            cache.layers[0] = cache.layers[self.layer]  # is asked how much has been seen already
            found = _states(
                language_model, read, inputs_embeds=self.own, past_key_values=cache, attention_mask=lines.mask,
                position_ids=lines.positions,
            )  # fmt: skip
        return States(*(lines.taken_up(x) for x in found))


@dataclass(frozen=True)
class Lines:
    """Rows (b, s) of unequal length, one behind the other in fewer lines (n, w), none of which sees another.

    `at` (n, w): which of the b s tokens stands there, the first in place of padding; `where` (b, s): its place among the n w,
    past the end for padding. `mask` (n, 1, w, prefix + w) is added to attention scores, `positions` (n, w) count from the
    row's own start.
    """

    at: Tensor
    where: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], longest: int, prefix: int, like: Tensor) -> Lines:
        """For rows of these lengths in (b, longest), behind a prefix that all of them see; mask of the dtype of `like`."""
        lines = _together(lengths, 2 * max(lengths))
        width = max(sum(lengths[row] for row in line) for line in lines)
        at = torch.zeros(len(lines), width, dtype=torch.long)
        where = torch.full((len(lengths), longest), at.numel())
        row_at, place = torch.full_like(at, -1), torch.zeros_like(at)
        for i, line in enumerate(lines):
            begin = 0
            for row in line:
                n = lengths[row]
                here, tokens = slice(begin, begin + n), torch.arange(n)
                at[i, here], row_at[i, here], place[i, here] = row * longest + tokens, row, tokens
                where[row, :n] = i * width + begin + tokens
                begin += n
        sees = (row_at[:, :, None] == row_at[:, None, :]) & (place[:, :, None] >= place[:, None, :])
        mask = torch.zeros(len(lines), 1, width, prefix + width, dtype=like.dtype)
        mask[:, 0, :, prefix:].masked_fill_(~sees, torch.finfo(like.dtype).min)
        return cls(*(x.to(like.device) for x in (at, where, mask, prefix + place)))

    def laid(self, rows: Tensor) -> Tensor:
        """(b, s, d) -> (n, w, d)."""
        return rows.flatten(0, 1)[self.at]

    def taken_up(self, lines: Tensor) -> Tensor:
        """(n, w, d) -> (b, s, d), zeros where a row has ended."""
        flat = lines.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])[self.where]


def _together(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows by number, such that those of a line are at most so long together: the longest first, each where it fits first."""
    lines: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        i = next((i for i, room in enumerate(left) if room >= lengths[row]), len(lines))
        if i == len(lines):
            lines.append([])
            left.append(most)
        lines[i].append(row)
        left[i] -= lengths[row]
    return lines


@contextmanager
def _some_layers(language_model: nn.Module, which: slice) -> Iterator[None]:
    """Inside, the language model has only these of its layers."""
    layers = cast("nn.ModuleList", language_model.layers)
    try:
        language_model.layers = layers[which]
        yield
    finally:
        language_model.layers = layers


def last_of(states: Tensor, lengths: Tensor, n: int) -> Tensor:
    """The states (b, n, d) of each row's last n tokens."""
    at = lengths[:, None] - n + torch.arange(n, device=lengths.device)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))


@torch.no_grad()
def tails(model: Model, texts: Sequence[str]) -> Tensor:
    """What the image transformer is told (n, tail, d) at the prompts' tails."""
    width = model.pipe.text_encoder.config.get_text_config().hidden_size * len(model.backbone.reads)
    found = torch.zeros(len(texts), tail_length(model), width, device=model.device, dtype=model.pipe.text_encoder.dtype)
    prefix = _prefix_cache(model, _prefix(model))
    for which in _alike_in_length(model, texts):
        rows = Rows.of(model, [texts[i] for i in which])
        found[which] = last_of(rows.encode(model, prefix), rows.lengths, tail_length(model))
    return found


def _alike_in_length(model: Model, texts: Sequence[str]) -> Iterator[list[int]]:
    """Texts by number, a few at a time, with little padding."""
    lengths = list(map(len, _token_ids(model, texts)))
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]


class EnteringTails:
    """Prompts on their way into a layer, as in `Entering`, whose tails are asked for several times, under other edits each."""

    def __init__(self, model: Model, texts: Sequence[str], layer: int) -> None:
        self.parts = [
            (which, Entering(model, Rows.of(model, [texts[i] for i in which]), layer))
            for which in _alike_in_length(model, texts)
        ]

    @torch.no_grad()
    def tails(self, model: Model) -> Tensor:
        """The same as `tails` up to rounding."""
        last = [last_of(part.states().told, part.rows.lengths, tail_length(model)) for _, part in self.parts]
        order = torch.tensor([i for which, _ in self.parts for i in which])
        return torch.cat(last)[order.argsort().to(model.device)]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance (rows,) of states (rows, tail, d)."""
    return (a.float() - b.float()).square().mean(dim=(1, 2))


# --- what passes through the modules that are edited ---------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What enters modules, (m, d_in) by module path: at tokens of prompts, at the template's tail, at what the encoder says."""

    prompt: dict[str, Tensor]
    tail: dict[str, Tensor]
    said: dict[str, Tensor]

    @property
    def whole(self) -> dict[str, Tensor]:
        """At all that comes after the template's prefix and before the answer."""
        return _joined(self.prompt, self.tail)

    @property
    def behind(self) -> dict[str, Tensor]:
        """At all that comes behind the prompts themselves, which is where edits act."""
        return _joined(self.tail, self.said)


def _joined(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.cat([part[path] for part in parts]) for path in parts[0]}


@torch.no_grad()
def inputs_of(model: Model, texts: Sequence[str], paths: Sequence[str], said: int = 0) -> Inputs:
    """What enters the modules at prompts, the shortest first, and at the first `said` tokens of what the encoder says to each."""
    encoder, n = model.pipe.text_encoder, tail_length(model)
    nothing = {path: torch.zeros(0, encoder.get_submodule(path).in_features, device=model.device) for path in paths}
    prompt, tail, said_rows = [nothing], [nothing], [nothing]
    prefix = _prefix_cache(model, _prefix(model))
    for equal in of_equal_length(model, texts):
        with recorded(encoder, paths) as record:
            for i, (_, ids) in enumerate(_saying(model, equal, said, prefix)):
                at_end = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - n).expand_as(ids)
                if i:
                    said_rows.append(record.rows(at_end))
                else:
                    prompt.append(record.rows(~at_end))
                    tail.append(record.rows(at_end))
    return Inputs(_joined(*prompt), _joined(*tail), _joined(*said_rows))


@torch.no_grad()
def inputs_at_prefix(model: Model, paths: Sequence[str]) -> dict[str, Tensor]:
    """Inputs (prefix, d_in), by module path, at the template's prefix."""
    with recorded(model.pipe.text_encoder, paths) as record:
        _prefix_cache(model, _prefix(model))
    return record.rows(torch.ones(1, prefix_length(model), dtype=torch.bool, device=model.device))


# --- answers ---------------------------------------------------------


@torch.no_grad()
def answers(
    model: Model, texts: Sequence[str], shifts: Sequence[Shifts] = (), longest: int = LONGEST_ANSWER
) -> list[str]:
    """What the text encoder answers, greedily, to each text inside the prompt template, with shifts or without.

    At most `longest` tokens each. Texts of equal length are run together, so none is padded and an answer does not
    depend on the others, up to rounding.
    """
    said: dict[str, str] = {}
    with model.resident("text_encoder"), applied(model.pipe.text_encoder, *shifts):
        prefix = _prefix_cache(model, _prefix(model))
        for equal in of_equal_length(model, list(dict.fromkeys(texts))):
            tokens: list[list[int]] = [[] for _ in equal]
            for going, ids in islice(_saying(model, equal, longest, prefix), 1, None):  # not the prompts
                for row, token in zip(going, ids[:, 0].tolist(), strict=True):
                    tokens[row].append(token)
            decoded = (str(model.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in tokens)
            said |= zip(equal, decoded, strict=True)
    return [said[text] for text in texts]


def of_equal_length(model: Model, texts: Sequence[str]) -> Iterator[list[str]]:
    """Those with equally many tokens together, `CHUNK` at most at a time, the shortest first: none needs padding."""
    lengths = dict(zip(texts, map(len, _token_ids(model, texts)), strict=True))
    for _, group in groupby(sorted(texts, key=lengths.__getitem__), lengths.__getitem__):
        equal = list(group)
        yield from (equal[i : i + CHUNK] for i in range(0, len(equal), CHUNK))


def _saying(
    model: Model, texts: Sequence[str], longest: int, prefix: DynamicCache
) -> Iterator[tuple[list[int], Tensor]]:
    """Texts of equal length, and then a token at a time of what is said to them, greedily and at most `longest`.

    `prefix`: its keys and values, see `_prefix_cache`.
    After each pass: which texts, by number, took part, since others have ended, and the tokens (rows, s) that were run.
    """
    encoder, rows = model.pipe.text_encoder, Rows.of(model, texts)
    (_, states), cache = rows._run(model, _read(model), prefix)
    going = list(range(len(texts)))
    yield going, rows.ids
    for _ in range(longest):
        tokens = encoder.lm_head(states[:, -1]).argmax(dim=-1)
        on = tokens != model.tokenizer.eos_token_id
        if not on.any():
            return
        if not on.all():
            cache.batch_select_indices(on.nonzero()[:, 0])
        going = [row for row, goes_on in zip(going, on.tolist(), strict=True) if goes_on]
        tokens = tokens[on][:, None]
        states = model.language_model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        yield going, tokens
