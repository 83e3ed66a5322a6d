"""Knowledge editors: one file each, chosen by name, all behind one small protocol."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from mokus.errors import MokusError
from mokus.low_rank import LowRankShift

EDITORS = ("ultraedit",)


class Editor(Protocol):
    """Turns what was captured at one weight matrix W (d_out, d_in) into changes of it.

    Made from inputs (n, d_in), what enters W at the rows to edit, and preserved (m, d_in), m >= 0, what enters it at rows
    whose outputs shall stay. Both are of the unedited model and do not change from step to step.
    """

    def __init__(self, inputs: Tensor, preserved: Tensor) -> None: ...

    def shift(self, gradients: Tensor) -> LowRankShift:
        """The change of W for a step of size 1, given gradients (n, d_out) of the loss with respect to W's outputs."""
        ...


def editor(name: str) -> type[Editor]:
    """The editor of that name. Raises `MokusError` for an unknown one."""
    if name not in EDITORS:
        raise MokusError(f"there is no editor {name!r}, expected one of {', '.join(EDITORS)}.")
    return cast("type[Editor]", import_module(f"mokus.editors.{name}").Editor)


def reduced(rows: Tensor) -> Tensor:
    """At most d_in rows with the Gram matrix P^T P of rows P (m, d_in), which is all an editor needs of preserved ones.

    Its Cholesky factor, in float64, where what rounding does to it is nothing beside the I that is added to it; a QR
    decomposition gives the same in three times the time.
    """
    if len(rows) <= rows.shape[1]:
        return rows
    gram = sum(part.double().T @ part.double() for part in rows.split(8192))
    least = 1e-13 * torch.trace(gram)  # so that there is a factor although rows may depend on each other
    return torch.linalg.cholesky(gram + least * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), upper=True)
