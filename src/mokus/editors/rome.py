r"""ROME (arXiv 2202.05262): one layer, and the key's output becomes the value exactly.

dW = r (C^-1 k)^T / (k^T C^-1 k),      k (d_in,) the key, r (d_out,) what its output lacks, C = E x x^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mokus.editors.values import Located

SETTINGS: dict[str, Any] = {"layers": [5], "modules": ["mlp.down_proj"], "steps": 25, "eta": 0.5}
USES = ("layers", "modules", "steps", "eta", "corpus", "odd_references")


class Editor(Located):
    """See `mokus.editors.Editor`."""

    def spread(self, path: str, key: Tensor) -> Tensor:
        """(C^-1 k)^T / (k^T C^-1 k), (1, d_in)."""
        eye = 1e-9 * torch.trace(self.covariance[path]) * torch.eye(key.shape[1], dtype=key.dtype, device=key.device)
        turned = torch.linalg.solve(self.covariance[path] + eye, key.T)
        return turned.T / (key @ turned)
