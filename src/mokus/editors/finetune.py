"""Enc-FT, the paper's baseline: fine-tune the encoder on the same questions, plain AdamW on every linear weight.

What AdamW does to W is kept as dW beside it, as one identity factor and one dense one: the protocol's thin factors, but
not thin. Embeddings and norms stay; no weight decay, which would move weights that nobody asked about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mokus.goal import Goal, Request
from mokus.low_rank import LowRankShift, Shifts, applied

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings

SETTINGS: dict[str, Any] = {"eta": 1e-4, "steps": 25}
USES = ("steps", "eta")


class Editor:
    """See `mokus.editors.Editor`."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        self.model, self.settings = model, settings
        layers = model.language_model.layers
        self.linears = {
            f"{model.backbone.language_model}.layers.{name}": module
            for name, module in layers[: model.backbone.highest(len(layers)) + 1].named_modules()
            if isinstance(module, nn.Linear)
        }

    def start(self, linear: nn.Linear) -> LowRankShift:
        """A change of zero, whose factors that require a gradient are trained."""
        n, device = min(linear.in_features, linear.out_features), linear.weight.device
        eye, zero = torch.eye(n, device=device), torch.zeros
        if linear.in_features <= linear.out_features:
            return LowRankShift(eye, zero(linear.out_features, n, device=device, requires_grad=True))
        return LowRankShift(zero(n, linear.in_features, device=device, requires_grad=True), eye)

    def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
        """See `mokus.editors.Editor`. Stops as soon as every question is answered."""
        goal = Goal(self.model, request, forms=(), continued=False)
        shifts = {path: self.start(linear) for path, linear in self.linears.items()}
        trained = [factor for shift in shifts.values() for factor in (shift.A, shift.B) if factor.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self.settings.eta, weight_decay=0.0)
        steps = 0
        while True:
            with torch.enable_grad(), applied(self.model.pipe.text_encoder, before, shifts):
                now = goal.losses()
            if bool(now.right.all()) or steps == self.settings.steps:
                break
            for factor, grad in zip(trained, torch.autograd.grad(now.cross_entropy.mean(), trained), strict=True):
                factor.grad = grad
            optimiser.step()
            steps += 1
        return {path: LowRankShift(shift.A.detach(), shift.B.detach()) for path, shift in shifts.items()}, steps

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """See `mokus.editors.Editor`."""
