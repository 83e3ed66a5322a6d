"""What passes through chosen linear modules at chosen token positions: their inputs, and the loss's gradients at their outputs.

Only activations get gradients, never weights, and nothing below the first recorded module takes part in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mokus.errors import MokusError


@dataclass
class Record:
    """Of one forward pass: by module path, inputs (b, s, d_in) and outputs (b, s, d_out)."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, where: Tensor) -> dict[str, Tensor]:
        """Inputs (n, d_in), float32, at the n positions where the mask (b, s) is true.

        Raises `MokusError` if one of them is not finite.
        """
        return {path: _finite(x.detach()[where].float(), "inputs", path) for path, x in self.inputs.items()}

    def gradients(self, loss: Tensor, where: Tensor) -> dict[str, Tensor]:
        """Gradients (n, d_out), float32, of the loss with respect to the outputs at these positions.

        Raises `MokusError` if one of them is not finite.
        """
        grads = torch.autograd.grad(loss, list(self.outputs.values()))
        return {path: _finite(g[where].float(), "gradients", path) for path, g in zip(self.outputs, grads, strict=True)}


@contextmanager
def recorded(module: nn.Module, paths: Sequence[str]) -> Iterator[Record]:
    """Record the named linear modules of `module` in the forward pass made inside."""
    record = Record()
    with ExitStack() as stack:
        for path in paths:
            hook = module.get_submodule(path).register_forward_hook(_keeper(record, path))
            stack.callback(hook.remove)
        yield record


def _finite(x: Tensor, what: str, path: str) -> Tensor:
    """The same rows, or a `MokusError`: nothing can be solved from them, and all that is made of them would be lost."""
    if not x.isfinite().all():
        found = "NaN" if x.isnan().any() else "infinity"
        raise MokusError(
            f"the {what} of {path} hold {found}, expected finite numbers; the model's weights are damaged or its dtype is "
            "too narrow, so get a whole copy of it and load it in float32 or bfloat16."
        )
    return x


def _keeper(record: Record, path: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # the first recorded module: the graph begins here
        record.inputs[path] = inputs[0]
        if torch.is_grad_enabled():  # without gradients nobody asks for the outputs, which are many bytes
            record.outputs[path] = output
        return output

    return hook
