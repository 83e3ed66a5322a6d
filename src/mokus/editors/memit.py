r"""MEMIT (arXiv 2210.07229): the value spread over several layers, against the covariance of keys elsewhere.

dW = R K^T (ridge C + K K^T)^-1,      K (d_in, n) keys, R (d_out, n) what their outputs still lack, C = E x x^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mokus.editors.values import Located

SETTINGS: dict[str, Any] = {
    "layers": [4, 5, 6, 7, 8],
    "modules": ["mlp.down_proj"],
    "steps": 25,
    "eta": 0.5,
    "ridge": 15000.0,
}
USES = ("layers", "modules", "steps", "eta", "ridge", "corpus", "odd_references")


class Editor(Located):
    """See `mokus.editors.Editor`."""

    def spread(self, path: str, key: Tensor) -> Tensor:
        """k^T (ridge C + k k^T)^-1, (1, d_in)."""
        return torch.linalg.solve(self.settings.ridge * self.covariance[path] + key.T @ key, key.T).T
