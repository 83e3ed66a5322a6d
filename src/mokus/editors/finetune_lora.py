"""Enc-FT by a LoRA: as `finetune`, but each weight changes by two thin factors that are trained (arXiv 2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mokus.editors import finetune
from mokus.low_rank import LowRankShift

if TYPE_CHECKING:
    from mokus.editors import Progress
    from mokus.pipeline import Model
    from mokus.settings import EditSettings

SETTINGS: dict[str, Any] = {"eta": 2e-4, "steps": 50}
RANK = 8


class Editor(finetune.Editor):
    """See `mokus.editors.Editor`."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        super().__init__(model, settings, progress)
        self.random = torch.Generator().manual_seed(0)

    def start(self, linear: nn.Linear) -> LowRankShift:
        """A random, B zero, both trained."""
        a = torch.randn(RANK, linear.in_features, generator=self.random) / linear.in_features**0.5
        device = linear.weight.device
        return LowRankShift(
            a.to(device).requires_grad_(), torch.zeros(linear.out_features, RANK, device=device, requires_grad=True)
        )
