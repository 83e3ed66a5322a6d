"""The optimiser of the miniature's trainings: Muon for hidden matrices and kernels, AdamW for everything else."""

from __future__ import annotations

import torch
from torch import nn


class MuonWithAdamW:
    """Two torch optimisers that step together: Muon needs matrices, AdamW takes embeddings, norms and biases."""

    def __init__(self, module: nn.Module, lr: float, not_matrices: tuple[str, ...]) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.kernels = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in not_matrices)]
        chosen = {id(p) for p in self.kernels}
        others = [p for _, p in named if id(p) not in chosen]
        # Muon takes matrices only: a convolution's kernel is seen as (out, in * window) through a view of its memory
        self.matrices = [nn.Parameter(p.data.flatten(1)) for p in self.kernels]
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """For checkpoints."""
        return {"muon": self.muon, "adamw": self.adamw}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.kernels:
            p.grad = None
        self.adamw.zero_grad()

    def step(self) -> None:
        """Step both."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self.muon.step()
        self.adamw.step()


class Schedule:
    """Linear warm-up, then linear decay to zero over the last `decay` share of the steps, of both optimisers."""

    def __init__(self, optimiser: MuonWithAdamW, lr: float, steps: int, warmup: int = 60, decay: float = 0.5) -> None:
        self.optimiser, self.lr, self.steps, self.warmup, self.decay = optimiser, lr, steps, warmup, decay
        self.done = 0
        self._set()

    def _set(self) -> None:
        rise = min(1.0, (self.done + 1) / self.warmup)
        fall = min(1.0, max(0.0, (self.steps - self.done) / (self.decay * self.steps)))
        for part in self.optimiser.parts.values():
            for group in part.param_groups:
                group["lr"] = self.lr * rise * fall

    def step(self) -> None:
        """One step further."""
        self.done += 1
        self._set()

    def state_dict(self) -> dict[str, int]:
        """For checkpoints."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From a checkpoint."""
        self.done = state["done"]
        self._set()


def optimiser_for(
    module: nn.Module, lr: float, steps: int, not_matrices: tuple[str, ...] = ("embed", "lm_head", "visual")
) -> tuple[MuonWithAdamW, Schedule]:
    """Both, ready to train `module` for `steps` steps."""
    optimiser = MuonWithAdamW(module, lr, not_matrices)
    return optimiser, Schedule(optimiser, lr, steps)
