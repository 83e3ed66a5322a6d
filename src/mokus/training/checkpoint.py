"""The checkpoint of a run of stage 1: one file, in a folder beside the pack that it will write, whole or not there."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from mokus import files
from mokus.errors import MokusError

PARTS = {"identity", "step", "lora", "optimiser", "previews"}
# what torch raises for a file that it did not write
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError)


def checkpoint_of(output: Path) -> Path:
    """Where the checkpoint of a run that writes its pack to `output` is kept."""
    place = output.resolve()
    return place.parent / f".{place.name}.learning" / "checkpoint.pt"


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Inside, no other run keeps checkpoints there. Raises `MokusError` at once if one does.

    The lock is the operating system's, so it ends with the process; its file stays, beside the folder. It is not the pack's
    lock, for an older pack at the output may be used and changed for the hours that this takes.
    """
    folder = file.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder.with_name(f"{folder.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        pack = folder.with_name(folder.name.removeprefix(".").removesuffix(".learning"))
        raise MokusError(
            f"another run is already learning {pack}; wait until it is done, or name another folder."
        ) from error
    with lock:
        yield


def write(file: Path, identity: str, step: int, state: Mapping[str, Any], previews: Mapping[str, Image.Image]) -> None:
    """Keep the state after so many steps, and what was drawn until then; `identity` says of which run."""
    arrays = {name: torch.from_numpy(np.array(image)) for name, image in previews.items()}
    torch.save({"identity": identity, "step": step, "previews": arrays, **state}, whole := io.BytesIO())
    for left in file.parent.glob(f".{file.name}.*.tmp"):  # by writers that were killed; there is but one at a time
        left.unlink(missing_ok=True)
    files.write(file, whole.getvalue())


def check_there(file: Path) -> None:
    """Raise `MokusError` if there is none."""
    if not file.is_file():
        raise MokusError(f"there is nothing to resume in {file.parent}; leave --resume out to begin.")


def read(file: Path, identity: str) -> dict[str, Any]:
    """Its `identity`, `step`, `lora`, `optimiser`, and `previews` as images; `rates` of learning, which older ones lack.

    Raises `MokusError` if there is none, or it is damaged or of another run.
    """
    check_there(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE:
        found = None
    if not (isinstance(found, dict) and set(found) >= PARTS):
        raise MokusError(f"{file} is damaged; take it away, and leave --resume out to begin anew.")
    if found["identity"] != identity:
        raise MokusError(
            f"the stopped run in {file.parent} had another model, other photos, another anchor or other settings; "
            "give the same ones to resume it, or remove that folder to begin anew."
        )
    return {**found, "previews": {name: Image.fromarray(x.numpy()) for name, x in found["previews"].items()}}


def remove(file: Path) -> None:
    """Take it away, with the previews beside it."""
    shutil.rmtree(file.parent, ignore_errors=True)
