"""A change of a weight matrix as a product of two thin factors, and how to apply it without touching the weight.

Adding a small change to bf16 weights rounds much of it away, so it stays a side branch: y = W x + B (A x), computed in
float32. With float32 weights that is what PEFT computes of a LoRA of scale 1, to the bit; with bf16 weights the libraries
that load the LoRA cast its factors to bf16, which is not done here. Leaving `applied` restores the module bit for bit,
because nothing of it was changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mokus.memory import plain


@dataclass(frozen=True)
class LowRankShift:
    """dW = B A of a weight W (d_out, d_in): A (r, d_in), B (d_out, r), float32."""

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not (r, d_in) and (d_out, r)")

    @property
    def rank(self) -> int:
        """Rows of A: an upper bound of the rank of dW."""
        return self.A.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def dense(self) -> Tensor:
        """dW (d_out, d_in), for tests and small models."""
        return self.B @ self.A

    def to(self, device: torch.device | str) -> LowRankShift:
        """The same dW with its factors on a device."""
        return LowRankShift(self.A.to(device), self.B.to(device))

    def scaled(self, factor: float) -> LowRankShift:
        """factor dW."""
        return LowRankShift(self.A, self.B * factor)

    def __add__(self, other: LowRankShift) -> LowRankShift:
        """The sum, exact: the factors side by side, or over one A that both share, the sum of the Bs."""
        if self.A is other.A:
            return LowRankShift(self.A, self.B + other.B)
        return LowRankShift(torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1))

    def rows(self, start: int, stop: int) -> LowRankShift:
        """The part of dW that stands in some of the rows of A."""
        return LowRankShift(self.A[start:stop], self.B[:, start:stop])

    def compressed(self, tolerance: float = 1e-6) -> LowRankShift:
        """The same dW at its numerical rank, by QR of both factors and an SVD of the small core, in float64.

        Singular values below `tolerance` times the largest are dropped.
        """
        qa, ra = torch.linalg.qr(self.A.T.double())  # (d_in, r), (r, r)
        qb, rb = torch.linalg.qr(self.B.double())  # (d_out, r), (r, r)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        keep = int((s > tolerance * s[0]).sum()) if s.numel() and s[0] > 0 else 0
        root = s[:keep].sqrt()
        a, b = (vh[:keep] * root[:, None]) @ qa.T, qb @ (u[:, :keep] * root)
        return LowRankShift(a.float().contiguous(), b.float().contiguous())


Shifts = Mapping[
    str, LowRankShift
]  # by the path of a linear module, such as "model.language_model.layers.3.mlp.up_proj"


def added(*many: Shifts) -> dict[str, LowRankShift]:
    """The sum of several sets of shifts: module by module, the factors side by side in the order given."""
    total: dict[str, LowRankShift] = {}
    for shifts in many:
        for path, shift in shifts.items():
            total[path] = total[path] + shift if path in total else shift
    return total


def collected(shifts: Shifts) -> dict[str, LowRankShift]:
    """The same changes at no more than full rank: once its factors side by side cost more than a dense matrix, one is made.

    For many edits in a row, whose sum would take longer and longer to apply. Equal up to rounding.
    """
    found = dict(shifts)
    for path, shift in shifts.items():
        (d_out, rank), d_in = shift.B.shape, shift.A.shape[1]
        if rank > min(d_out, d_in):
            eye = torch.eye(min(d_out, d_in), device=shift.A.device)
            found[path] = LowRankShift(shift.dense(), eye) if d_out <= d_in else LowRankShift(eye, shift.dense())
    return found


@contextmanager
def applied(module: nn.Module, *many: Shifts) -> Iterator[None]:
    """Inside, every named linear module computes W x + sum of B (A x); outside it is as before, also after an exception.

    Raises `ValueError` for a path that is not a linear module of `module`, or factors that do not fit it.
    """
    branches: dict[str, list[LowRankShift]] = {}
    for shifts in many:
        for path, shift in shifts.items():
            linear = _linear(module, path)
            if shift.A.shape[1] != linear.in_features or shift.B.shape[0] != linear.out_features:
                raise ValueError(
                    f"the shift of {path} is {shift.B.shape[0]} x {shift.A.shape[1]}, "
                    f"the weight {linear.out_features} x {linear.in_features}"
                )
            if shift.rank:
                branches.setdefault(path, []).append(shift)
    with ExitStack() as stack:
        for path, several in branches.items():
            linear = _linear(module, path)
            stack.callback(linear.register_forward_hook(_side_branches(linear, several)).remove)
        yield


@contextmanager
def merged(module: nn.Module, shifts: Shifts) -> Iterator[float]:
    """Inside, the changes are added to the weights themselves, in their dtype, as the paper's code does; for comparison.

    Gives the share of the change that rounding loses, ||(W' - W) - dW|| / ||dW|| (Frobenius, over all modules). The weights
    are copied and put back, so they are the same bits afterwards. Raises `ValueError` for quantised weights.
    """
    for path in shifts:
        if not plain(_linear(module, path)):
            raise ValueError(
                f"{path} is quantised, and nothing can be added to its weight; a side branch can be `applied`"
            )
    kept = {path: _linear(module, path).weight.data.clone() for path in shifts}
    lost = whole = 0.0
    try:
        for path, shift in shifts.items():
            weight, dense = _linear(module, path).weight.data, shift.dense().to(kept[path].device)
            weight.add_(dense.to(weight.dtype))
            done = weight.double() - kept[path].double()
            lost, whole = (
                lost + float((done - dense.double()).square().sum()),
                whole + float(dense.double().square().sum()),
            )
        yield (lost / whole) ** 0.5 if whole else 0.0
    finally:
        for path, weight in kept.items():
            _linear(module, path).weight.data.copy_(weight)


def _linear(module: nn.Module, path: str) -> nn.Linear:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        found = None
    found = getattr(found, "base_layer", found)  # a module that PEFT has wrapped
    if not isinstance(found, nn.Linear):
        raise ValueError(f"{path} is not a linear module of {type(module).__name__}")
    return found


def _side_branches(linear: nn.Linear, shifts: list[LowRankShift]) -> Any:
    factors = [(s.A.to(linear.weight.device), s.B.to(linear.weight.device)) for s in shifts]

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, dtype = inputs[0].float(), output.dtype
        for a, b in factors:  # a weight that comes and goes need not have been where its inputs are
            output = output + F.linear(F.linear(x, a.to(x.device)), b.to(x.device))
        return output.to(dtype)

    return hook
