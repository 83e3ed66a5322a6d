"""How much memory a computation takes, found by doing it with tensors that have shapes and no contents.

Modules and inputs are on torch's meta device; what runs is the real code, LoRA, checkpointing and backward pass included,
while `Tally` adds up the storages that are alive at once. So nothing here knows what a block keeps. Two things differ from a
real device: attention is that of the fused kernels, which keep no scores, and what kernels need for themselves is unseen.

Image transformers are rehearsed with FEW and one more of their blocks, and the rest follow in a line, since all are alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mokus import flow
from mokus.backbone import QWEN_IMAGE
from mokus.encoder import Rows
from mokus.low_rank import LowRankShift, applied

FEW = 2  # blocks
PREFIX_TOKENS = 34  # of the template, before the prompt
RANK = 60  # of an edit's shifts; those of Qwen-Image's size had up to 61


@dataclass(frozen=True)
class Use:
    """Bytes besides the weights: the most at any time, and what is left when the forward pass is done."""

    peak: float
    kept: float

    def further(self, one_more: Use, blocks: int) -> Use:
        """So many blocks on, if this and `one_more` are one block apart."""
        return Use(
            self.peak + blocks * (one_more.peak - self.peak), self.kept + blocks * (one_more.kept - self.kept)
        )  # fmt: skip


class Tally(TorchDispatchMode):
    """Inside, bytes of storages that come to be and are alive: `now`, and the most so far, `peak`. Those `known` do not count."""

    def __init__(self, known: Sequence[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {t.untyped_storage()._cdata: None for m in known for t in _tensors(m)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.seen[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.now -= size


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Attention(torch.autograd.Function):
    """What a fused kernel takes, keeps and gives back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    found: Tensor = _Attention.apply(query, key, value)
    return found


Watched = Callable[..., AbstractContextManager[Any]]  # of modules; gives something with `now` and `peak`, in bytes


@contextmanager
def tallied(*modules: nn.Module) -> Iterator[Tally]:
    """On the meta device torch would take attention's plain formula, which keeps all scores."""
    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", _fused), Tally(modules) as tally:
        yield tally


# --- the parts of the pipeline ---------------------------------------------------------
# Each runs on the device that its module is on, so that a benchmark can watch the same on a real one.


def image_step(
    build: Callable[[int], Any], blocks: int, batch: int, side: int, tokens: int, targets: Sequence[str], rank: int,
    backward: bool, checkpointed: bool,
) -> Use:  # fmt: skip
    """A forward pass of an image transformer with a LoRA, and its backward pass, if wanted.

    `build(n)`: the transformer with n blocks, on the meta device. `batch` samples of `side` x `side` patches, `tokens` of text.
    """
    few, more = (
        stepped(build(n), batch, side, tokens, targets, rank, backward, checkpointed)
        for n in (min(FEW, blocks), min(FEW, blocks) + 1)
    )
    return few.further(more, blocks - min(FEW, blocks))


def stepped(
    transformer: Any, batch: int, side: int, tokens: int, targets: Sequence[str], rank: int, backward: bool,
    checkpointed: bool, watched: Watched = tallied,
) -> Use:  # fmt: skip
    """The same of one transformer, which keeps its adapter."""
    if backward:
        transformer.add_adapter(LoraConfig(r=rank, target_modules=list(targets)), adapter_name="rehearsal")
        for p in transformer.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    if checkpointed:
        transformer.enable_gradient_checkpointing()
    d, channels, weight = (
        transformer.config.joint_attention_dim, transformer.config.in_channels, transformer.proj_out.weight
    )  # fmt: skip
    made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    z, t = torch.rand(batch, side * side, channels, **made), torch.rand(batch, **made)
    embeds, mask = (
        torch.rand(batch, tokens, d, **made),
        torch.ones(batch, tokens, dtype=torch.bool, device=weight.device),
    )
    with watched(transformer) as tally, torch.set_grad_enabled(backward):
        v = flow.velocity(transformer, z, t, embeds, mask, (side, side))
        kept = tally.now
        if backward:
            flow.loss(v, torch.zeros(v.shape, device=weight.device)).mean().backward()
    return Use(tally.peak, kept)


def reading(encoder: Any, rows: int, tokens: int, watched: Watched = tallied) -> Use:
    """The text encoder's forward pass over so many prompts of so many tokens each, behind the template's prefix."""
    model, texts = _as_model(encoder), _rows(encoder, rows, tokens)
    with watched(encoder) as tally, torch.no_grad():
        texts.encode(model)
        kept = tally.now
    return Use(tally.peak, kept)


def edit(build: Callable[[int], Any], edited: int, above: int, modules: Sequence[str], rows: int, tokens: int) -> Use:
    """One evaluation of an edit: so many edited layers, and layers above them, with their backward pass.

    `build(n)`: the text encoder with n layers. Layers below the edited ones keep nothing. Those above count as edited ones.
    """
    few, more = (evaluated(build(n), n, modules, rows, tokens) for n in (FEW, FEW + 1))
    return few.further(more, edited + above - FEW)


def evaluated(
    encoder: Any, edited: int, modules: Sequence[str], rows: int, tokens: int, watched: Watched = tallied
) -> Use:  # fmt: skip
    """The same of one text encoder, of whose layers the first so many are edited."""
    model, texts = _as_model(encoder), _rows(encoder, rows, tokens)
    paths = [f"model.language_model.layers.{n}.{name}" for n in range(edited) for name in modules]
    shifts = {path: _shift(encoder.get_submodule(path)) for path in paths}
    with watched(encoder) as tally, applied(encoder, shifts):
        states = texts.encode(model)
        kept = tally.now
        torch.autograd.grad(states.float().square().mean(), [shift.B for shift in shifts.values()])
    return Use(tally.peak, kept)


def _shift(linear: nn.Linear) -> LowRankShift:
    device = linear.weight.device
    a = torch.rand(RANK, linear.in_features, device=device)
    return LowRankShift(a, torch.zeros(linear.out_features, RANK, device=device, requires_grad=True))


def _as_model(encoder: Any) -> Any:
    return SimpleNamespace(
        pipe=SimpleNamespace(text_encoder=encoder), device=encoder.lm_head.weight.device, backbone=QWEN_IMAGE,
        language_model=encoder.get_submodule(QWEN_IMAGE.language_model),
    )  # fmt: skip


def _rows(encoder: Any, rows: int, tokens: int) -> Rows:
    made: dict[str, Any] = {"dtype": torch.long, "device": encoder.lm_head.weight.device}
    return Rows(
        torch.zeros(1, PREFIX_TOKENS, **made), torch.zeros(rows, tokens, **made), torch.full((rows,), tokens, **made)
    )  # fmt: skip


def vae(model: Any, batch: int, size: int, decoding: bool, watched: Watched = tallied) -> Use:
    """Images of size x size pixels into latents, or out of them."""
    weight = next(model.parameters())
    made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    side = size // 2 ** len(model.temperal_downsample)
    with watched(model) as tally, torch.no_grad():
        if decoding:
            model.decode(torch.rand(batch, model.config.z_dim, 1, side, side, **made))
        else:
            model.encode(torch.rand(batch, 3, 1, size, size, **made)).latent_dist.mode()
    return Use(tally.peak, tally.now)
