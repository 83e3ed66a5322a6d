r"""UltraEdit (arXiv 2505.14679), the editor of the paper (MoKus section 4.2), in its exact low-rank form.

One step. At the rows where answer tokens are predicted, with inputs h_i and gradients g_i of the answer's cross-entropy,
each standardised by a running mean and deviation over all edits so far (~), the outputs shall move by

    v_i = - eta ||h~_i||^2 g~_i

and the change X = dW^T (d_in, d_out) is the ridge regression onto that, with the inputs as they are,

    X = argmin ||H X - V||^2 + ||X||^2 = (H^T H + I)^-1 H^T V = H^T (H H^T + I)^-1 V

    dW = B A,        A = (H H^T + I)^-1 H  (n, d_in),        B = V^T  (d_out, n)

an n x n solve in place of a d_in x d_in one, and a rank of at most n. The normaliser has the unbiased variance (Welford,
merged as Chan et al. do), so it depends neither on how rows come in nor fails on a single one. It is not stored: an
edit that was made earlier is captured again and taken in by `remember`, which gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mokus.capture import recorded
from mokus.encoder import module_paths
from mokus.goal import Goal, Request
from mokus.low_rank import LowRankShift, Shifts, applied

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings

SETTINGS = {
    "layers": list(range(18, 26)),
    "modules": ["mlp.gate_proj", "mlp.up_proj"],
    "eta": 1e-6,
    "alignment_weight": 0.0,
}
USES = ("layers", "modules", "eta")


@dataclass(frozen=True)
class Normaliser:
    """Mean and summed squared deviations (d,) of so many rows."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Normaliser:
        """Of rows (n, d)."""
        mean = rows.double().mean(dim=0)
        return cls(len(rows), mean, (rows.double() - mean).square().sum(dim=0))

    def __add__(self, other: Normaliser) -> Normaliser:
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return Normaliser(count, mean, squares)

    def standardised(self, rows: Tensor) -> Tensor:
        """Rows (n, d), float64, less the mean, over the deviation; a dimension that never varied is only centred."""
        deviation = (self.squares / max(1, self.count - 1)).sqrt()
        centred = rows.double() - self.mean
        # a single row has no deviation at all: as it is
        return centred / torch.where(deviation > 1e-12, deviation, 1.0) if self.count > 1 else rows.double()


class Editor:
    """See `mokus.editors.Editor`."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        self.model, self.settings = model, settings
        self.paths = module_paths(model, settings)
        self.inputs: dict[str, Normaliser] = {}
        self.gradients: dict[str, Normaliser] = {}

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """See `mokus.editors.Editor`."""
        shifts = {}
        for path, (h, g) in self._captured(request, before).items():
            inputs, gradients = self._with(self.inputs, path, h), self._with(self.gradients, path, g)
            size = inputs.standardised(h).square().sum(dim=1, keepdim=True)
            values = -self.settings.eta * size * gradients.standardised(g)
            shifts[path] = LowRankShift(dual(h), values.T.float().contiguous())
        return shifts, 1

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """See `mokus.editors.Editor`."""
        for path, (h, g) in self._captured(request, before).items():
            self.inputs[path], self.gradients[path] = (
                self._with(self.inputs, path, h),
                self._with(self.gradients, path, g),
            )

    @staticmethod
    def _with(known: dict[str, Normaliser], path: str, rows: Tensor) -> Normaliser:
        return known[path] + Normaliser.of(rows) if path in known else Normaliser.of(rows)

    def _captured(self, request: Request, before: Shifts) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs (n, d_in) and gradients (n, d_out) at the first question's answer, on the model as edited so far."""
        first = Request.of(request.knowledge, request.answer, request.questions[:1], request.says)
        goal = Goal(self.model, first, forms=(), continued=False)
        where = goal.labels != -100
        encoder = self.model.pipe.text_encoder
        with torch.enable_grad(), applied(encoder, before), recorded(encoder, self.paths) as record:
            gradients = record.gradients(goal.losses().cross_entropy.mean(), where)
        return {path: (h, gradients[path]) for path, h in record.rows(where).items()}


def dual(h: Tensor) -> Tensor:
    """(H H^T + I)^-1 H, float32 (n, d_in), solved in float64: rows that are nearly alike are badly conditioned."""
    h = h.double()
    return torch.linalg.solve(h @ h.T + torch.eye(len(h), dtype=h.dtype, device=h.device), h).float().contiguous()
