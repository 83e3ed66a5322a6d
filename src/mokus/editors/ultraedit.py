r"""UltraEdit (arXiv 2505.14679; MoKus section 4.2) as an exact low-rank change.

With inputs h_i and gradients g_i at the rows to edit, and inputs p_j at rows to preserve, the outputs shall move by

    v_i = - ||h_i||^2 g_i        at h_i,  and by 0 at p_j

and the change X = dW^T (d_in, d_out) is the ridge regression onto that,

    X = argmin ||R X - V||^2 + ||X||^2 = (R^T R + I)^-1 R^T V,        R = [H; P],  V = [V_e; 0]

Since V is zero at the preserved rows, R^T V = H^T V_e. With C = P^T P + I and the push-through identity,

    dW = B A,        A = (I + H C^-1 H^T)^-1 H C^-1  (n, d_in),        B = V_e^T  (d_out, n)

so the rank is at most n, however many rows are preserved, and A is known before the first step: repeated steps add to B
alone. Without preserved rows (C = I) this is the paper's edit in its dual form, (H^T H + I)^-1 H^T = H^T (H H^T + I)^-1:
an n x n solve in place of a d_in x d_in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokus.editors import reduced
from mokus.low_rank import LowRankShift


class Editor:
    """See `mokus.editors.Editor`. The solves are in float64: hundreds of similar rows are badly conditioned."""

    def __init__(self, inputs: Tensor, preserved: Tensor) -> None:
        h, p = inputs.double(), reduced(preserved.double())
        # C^-1 H^T by Woodbury: C^-1 = I - P^T (I + P P^T)^-1 P
        hc = h - torch.linalg.solve(_plus_identity(p @ p.T), p @ h.T).T @ p
        self.a = torch.linalg.solve(_plus_identity(hc @ h.T), hc).float()  # (n, d_in)
        self.size = (h * h).sum(dim=1).float()  # ||h_i||^2

    def shift(self, gradients: Tensor) -> LowRankShift:
        """The change of W (d_out, d_in) at step size 1, for gradients (n, d_out)."""
        return LowRankShift(self.a, -(self.size * gradients.T))


def _plus_identity(kernel: Tensor) -> Tensor:
    return kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
