"""What benchmarks' folders share: one run at a time, of one kind, and edits that are kept so that a stopped one goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mokus import files
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, Shifts


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other run writes into the folder. Raises `MokusError` if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout as error:
            raise MokusError(f"another run is at work in {folder}; wait for it, or choose another folder.") from error
        yield


def check_same(folder: Path, old: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `MokusError` with what differs, unless the run that a folder holds is of these fields and versions.

    `old`: the folder's plan. `now`: the fields of a run that would go on there; of "versions", each that differs is named.
    """
    differing = [name for name in now if name != "versions" and old.get(name) != now[name]]
    before, versions = old.get("versions"), now["versions"]
    before = before if isinstance(before, dict) else {}
    differing += [
        f"{name} ({before.get(name, 'none')}, now {versions.get(name, 'none')})"
        for name in {**before, **versions} if before.get(name) != versions.get(name)
    ]  # fmt: skip
    if differing:
        raise MokusError(f"{folder} holds a run with another {' and '.join(differing)}; name another folder with -o.")


def save_edits(file: Path, edits: Sequence[Shifts], setup: Any, **more: Any) -> None:
    """Keep the shifts of some edits, as safetensors; in its metadata what they depend on, and more to be remembered of them."""
    tensors = {
        f"{i}/{path}/{side}": getattr(shift, side).detach().contiguous().clone()
        for i, shifts in enumerate(edits) for path, shift in shifts.items() for side in "AB"
    }  # fmt: skip
    about = {"edits": len(edits), "setup": setup, **more}
    files.write(file, save(tensors, metadata={"about": json.dumps(about)}))


def load_edits(file: Path, setup: Any) -> tuple[list[Shifts], dict[str, Any]]:
    """The same, edits and more; no edits if they are not there, damaged, or were made with another setup."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("about", "{}"))
            if about.pop("setup", None) != json.loads(json.dumps(setup)):
                return [], {}
            edits: list[dict[str, LowRankShift]] = [{} for _ in range(about["edits"])]
            for name in sorted(opened.keys()):
                i, path, side = name.split("/")
                if side == "A":
                    edits[int(i)][path] = LowRankShift(opened.get_tensor(name), opened.get_tensor(f"{i}/{path}/B"))
    except (OSError, SafetensorError):
        return [], {}
    return list(edits), about
