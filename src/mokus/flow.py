"""Rectified flow: the straight line between a latent and noise, and the velocity along it.

Names: z0 is a latent, z1 noise, t in (0, 1) the share of noise, v the velocity. Latents are packed as the transformer
takes them: (b, n, c), n patches of c = 4 z_dim numbers; for those that take others see `backbone`. Source: MoKus section
4.1; Esser et al. 2024 (2403.03206) for the logit-normal density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # patches down and across


def logit_normal(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Timesteps t (n,) in (0, 1) with logit(t) ~ N(mean, std^2); a mean above 0 leans towards noise."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def interpolate(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z0 + t z1, with z0, z1 (b, n, c) and t (b,)."""
    t = t.view(-1, 1, 1)
    return (1 - t) * z0 + t * z1


def target(z0: Tensor, z1: Tensor) -> Tensor:
    """The velocity dz_t/dt = z1 - z0, the same at every t."""
    return z1 - z0


def velocity(
    transformer: Callable[..., Any], z_t: Tensor, t: Tensor, embeds: Tensor, mask: Tensor | None, grid: Grid
) -> Tensor:
    """Qwen-Image's velocity (b, n, c) at z_t (b, n, c), t (b,), for encoded prompts (b, s, d) with mask (b, s)."""
    shapes = [[(1, *grid)]] * z_t.shape[0]
    return transformer(
        hidden_states=z_t, timestep=t.to(z_t.dtype), encoder_hidden_states=embeds, encoder_hidden_states_mask=mask,
        img_shapes=shapes, return_dict=False,
    )[0]  # fmt: skip


def loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of velocities (b, n, c), in float32: (b,), one value per sample."""
    return F.mse_loss(predicted.float(), wanted.float(), reduction="none").mean(dim=(1, 2))
