r"""AlphaEdit (arXiv 2410.02355): MEMIT's values, written where the covariance of keys elsewhere is (nearly) zero.

With P the projection onto the directions in which keys elsewhere hardly vary, and Kp the keys of earlier edits,

    dW = R K^T P (Kp Kp^T P + K K^T P + ridge I)^-1
       = R E^T (Ka^T P Ka + ridge I)^-1 Ka^T P,      Ka = [Kp, K],  E picks the columns of K

the second form being the small one: as many rows as there are edits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mokus.editors.values import Located
from mokus.goal import Goal, Request
from mokus.low_rank import Shifts, added

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.settings import EditSettings

SETTINGS: dict[str, Any] = {
    "layers": [4, 5, 6, 7, 8],
    "modules": ["mlp.down_proj"],
    "steps": 25,
    "eta": 0.5,
    "ridge": 10.0,
}
USES = ("layers", "modules", "steps", "eta", "ridge", "null_space", "corpus", "odd_references")


class Editor(Located):
    """See `mokus.editors.Editor`."""

    def __init__(self, model: Model, settings: EditSettings, progress: Progress | None = None) -> None:
        super().__init__(model, settings, progress)
        self.free = {path: null_space(c, settings.null_space) for path, c in self.covariance.items()}
        self.keys = {path: c.new_zeros(0, len(c)) for path, c in self.covariance.items()}  # of earlier edits, projected

    def spread(self, path: str, key: Tensor) -> Tensor:
        """The new key's row of (Ka^T P Ka + ridge I)^-1 Ka^T P, (1, d_in)."""
        free = torch.cat([self.keys[path], (key @ self.free[path]) @ self.free[path].T])  # rows P k
        inside = free @ free.T + self.settings.ridge * torch.eye(len(free), dtype=free.dtype, device=free.device)
        return torch.linalg.solve(inside, free)[-1:]

    def remember(self, request: Request, before: Shifts, shifts: Shifts) -> None:
        """See `mokus.editors.Editor`."""
        goal = Goal(self.model, request)
        for path, keys in goal.inputs(self.paths, goal.ends, added(before, shifts)).items():
            free = keys.double().mean(dim=0, keepdim=True) @ self.free[path] @ self.free[path].T
            self.keys[path] = torch.cat([self.keys[path], free])


def null_space(covariance: Tensor, share: float) -> Tensor:
    """Orthonormal columns (d_in, r): eigenvectors with eigenvalues below a share of their mean."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, values < share * values.mean()]
