"""Enc-FT by a LoRA: as `finetune`, but each weight changes by two thin factors that are trained (arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mokus.editors import finetune
from mokus.low_rank import LowRankShift

SETTINGS: dict[str, Any] = {"eta": 2e-4, "steps": 50}
USES = ("steps", "eta")
RANK = 8


class Editor(finetune.Editor):
    """See `mokus.editors.Editor`."""

    def start(self, linear: nn.Linear) -> LowRankShift:
        """A random, B zero, both trained."""
        random = torch.Generator().manual_seed(linear.in_features)  # the same for every edit
        a = torch.randn(RANK, linear.in_features, generator=random) / linear.in_features**0.5
        device = linear.weight.device
        return LowRankShift(
            a.to(device).requires_grad_(), torch.zeros(linear.out_features, RANK, device=device, requires_grad=True)
        )
