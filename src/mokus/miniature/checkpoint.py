"""Checkpoints of the miniature's trainings: one file, written beside and moved into place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, step: int, **parts: Any) -> None:
    """Write `folder`/checkpoint.pt atomically: the step and the state_dict of every part."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "checkpoint.tmp"
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, beside)
    os.replace(beside, folder / FILE)


def load_checkpoint(folder: Path, **parts: Any) -> int:
    """Restore every part from `folder`/checkpoint.pt and return its step; 0 when there is none."""
    file = folder / FILE
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
