"""The image transformer's blocks compiled by torch.compile, one kernel after the other made for their shapes.

All blocks are alike, so one of them is compiled (diffusers' `compile_repeated_blocks`), which takes a minute rather than
many. Results are the same but for rounding.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mokus.errors import MokusError


@contextmanager
def blocks_compiled(transformer: Any, device: torch.device) -> Iterator[None]:
    """Inside, the blocks are compiled when they are first called with other shapes; afterwards they are as before.

    Raises `MokusError` if the class does not say what its blocks are, if there is no C++ compiler, which a CPU needs, and if
    the compilation fails.
    """
    from torch._dynamo.exc import TorchDynamoException

    blocks = getattr(transformer, "_repeated_blocks", None)
    if not blocks:
        raise MokusError(f"{type(transformer).__name__} has no repeated blocks to compile; leave --compile out.")
    check_compiler(device)
    try:
        transformer.compile_repeated_blocks()
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise MokusError(
            f"the image transformer cannot be compiled here ({reason}); mend that, or leave --compile out."
        ) from error
    finally:
        for module in transformer.modules():
            if type(module).__name__ in blocks:
                module._compiled_call_impl = None  # torch has no call that undoes Module.compile


def check_compiler(device: torch.device) -> None:
    """Raise `MokusError` if code for a CPU is wanted and torch would find no C++ compiler."""
    if device.type != "cpu":
        return
    wanted = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(wanted) is None:
        raise MokusError(
            f"--compile on a CPU needs a C++ compiler, and there is no {wanted}; install one, name it in the environment "
            "variable CXX, or leave --compile out."
        )
