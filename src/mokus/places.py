"""Where a photo was taken, as the base model itself sees it: a diffusion classifier (Li et al. 2023, arXiv 2303.16203).

Stage 1 says the place in a photo's prompt, so that the background belongs to those words and the concept is free of it:
"sks toy on the beach". Without that the concept is drawn well by itself, and poorly in a scene that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mokus import flow

PLACES = (
    "on the beach", "in the snow", "in the forest", "in the desert", "at night", "in the city", "under water",
    "in the kitchen", "in the garden", "on a sofa", "on a table", "in the street",
)  # fmt: skip
NOISES = 4  # for each photo, the same for every place
TIMES = (0.9, 0.98)  # nearly noise: where the prompt, not the image, tells the background

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # z_t (b, n, c), t (b,), index of the place (b,) -> (b, n, c)


@torch.no_grad()
def place_of(latent: Tensor, n: int, velocity: Velocity, seed: int) -> int | None:
    """Which of `n` places the photo with this latent (1, n, c) shows; None if none of them fits better than no place.

    The place under whose prompt the base model's velocity is nearest to the true one; `velocity`'s place `n` is no place.
    """
    random = torch.Generator().manual_seed(seed)
    z0 = latent.cpu().expand(NOISES, -1, -1)
    z1 = torch.randn(z0.shape, generator=random)
    t = torch.linspace(*TIMES, NOISES)
    z, wanted = flow.interpolate(z0, z1, t), flow.target(z0, z1)
    losses = torch.stack([
        flow.loss(velocity(z, t, torch.full((NOISES,), place)).cpu(), wanted).mean() for place in range(n + 1)
    ])  # (n + 1,)  # fmt: skip
    best = int(losses[:n].argmin())
    return best if losses[best] < losses[n] else None
