"""What ROME, MEMIT and AlphaEdit share: keys, and the value that makes the answer likely (MEMIT, arXiv 2210.07229, eq. 16).

The key is what enters a module where an answer begins, the last token of the template's tail; their authors take the last
token of the subject, but there this kind of encoder has not looked the subject up yet (docs/log.md). The value is the
hidden state behind the last edited layer plus d, which is found by Adam.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mokus.covariance import corpus_of, moments
from mokus.encoder import module_paths
from mokus.errors import MokusError
from mokus.goal import Goal, Request
from mokus.low_rank import LowRankShift, Shifts, added, applied

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings

DECAY = 0.05  # weight of ||d||^2 / ||z||^2
CLAMP = 4.0  # ||d|| <= CLAMP ||z||, as their authors'


class Located(ABC):
    """The common part of the three: gathers statistics, finds d, spreads it over the layers."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        self.model, self.settings = model, settings
        self.paths = module_paths(model, settings)
        if wrong := [path for path in self.paths if not path.endswith("mlp.down_proj")]:
            raise MokusError(
                f"the editor {settings.editor!r} cannot edit {wrong[0]}, expected mlp.down_proj: it gives a module's output a "
                "value of the hidden state behind its layer."
            )
        known = moments(model, self.paths, corpus_of(model, settings), progress)
        self.covariance = {path: known[path].gram / known[path].rows for path in self.paths}  # (d_in, d_in)

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """See `mokus.editors.Editor`."""
        goal = Goal(self.model, request)
        wanted = value(goal, self.paths[-1], before, self.settings.steps, self.settings.eta)
        shifts: dict[str, LowRankShift] = {}
        for i, path in enumerate(self.paths):
            total = added(before, shifts)
            left = wanted - state(goal, self.paths[-1], total)
            key = goal.inputs([path], goal.ends, total)[path].mean(dim=0, keepdim=True)
            residual = left.mean(dim=0) / (len(self.paths) - i)
            shifts[path] = LowRankShift(self.spread(path, key.double()).float(), residual[:, None].float())
        return shifts, self.settings.steps

    @abstractmethod
    def spread(self, path: str, key: Tensor) -> Tensor:
        """A (1, d_in) such that residual A is the change of the module with this key (1, d_in)."""

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:  # noqa: B027  (AlphaEdit alone has something to)
        """See `mokus.editors.Editor`."""


def state(goal: Goal, path: str, shifts: Shifts) -> Tensor:
    """Hidden states (rows, d) behind the module's layer, where answers begin."""
    layer = path.split(".mlp.")[0]
    found: list[Tensor] = []

    def keep(_: Any, inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = goal.encoder.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.no_grad(), applied(goal.encoder, shifts):
            goal.rows.encode(goal.model)
    finally:
        handle.remove()
    return found[-1][goal.ends].float()  # the first is the prefix's


def value(goal: Goal, path: str, before: Shifts, steps: int, rate: float) -> Tensor:
    """z + d (rows, d): d the same for all rows, found by Adam, at most CLAMP times as long as z."""
    start = state(goal, path, before)
    length = start.norm(dim=1).mean()
    d = torch.zeros(start.shape[1], device=start.device, requires_grad=True)
    optimiser = torch.optim.Adam([d], lr=rate)
    for _ in range(steps):
        with torch.enable_grad(), applied(goal.encoder, before), _pushed(goal, path, d):
            asked, continued = goal.answer_loss(goal.losses())
            loss = asked + continued + DECAY * d.square().sum() / length.square()
        (d.grad,) = torch.autograd.grad(loss, [d])
        optimiser.step()
        with torch.no_grad():
            d *= (CLAMP * length / d.norm().clamp(min=1e-12)).clamp(max=1.0)
    return start + d.detach()


@contextmanager
def _pushed(goal: Goal, path: str, d: Tensor) -> Iterator[None]:
    """Inside, d is added to what the module puts out where answers begin."""
    where = goal.ends[..., None]

    def hook(_: Any, inputs: Any, output: Tensor) -> Tensor:
        return output + (where * d).to(output.dtype) if output.shape[:2] == where.shape[:2] else output

    handle = goal.encoder.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
