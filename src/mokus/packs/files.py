"""The files of a concept pack: their names, and how a folder of them is listed, read, locked and swapped in whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mokus.errors import MokusError

# what file managers and hubs leave in a folder: not read, and gone when the pack is next written
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", ".cache")
MANIFEST = "mokus.json"
README = "README.md"
LORA = "pytorch_lora_weights.safetensors"
ADAPTER_FOLDER = "text_encoder"
ADAPTER = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/adapter_config.json"

LOCK_SECONDS = 60.0
MAX_JSON_BYTES = 64 << 20
MAX_FILE_BYTES = 8 << 30

_SAMPLE = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
FILE = rf"^({'|'.join(map(re.escape, (README, LORA, ADAPTER, ADAPTER_CONFIG)))}|samples/{_SAMPLE}\.png)$"

# --- reading ---------------------------------------------------------


def identity(place: Path) -> tuple[int, ...] | None:
    """What tells a folder from another that was put in its place since; None if there is none."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def listing(place: Path) -> set[str]:
    """Paths of the files inside but for LITTER, after making sure that there are only plain files and folders."""
    names: set[str] = set()
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name not in LITTER]
        files = [name for name in files if name not in LITTER]
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise MokusError(f"{path} is a link or a device; a concept pack holds plain files only, take it away.")
            if stat.S_ISREG(mode) or not any(path.iterdir()):  # an empty folder is a stranger too
                names.add(path.relative_to(place).as_posix())
    return names


def bytes_in(path: Path, limit: int) -> bytes:
    """All of a file. Raises `MokusError` if it is larger than `limit` bytes."""
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise MokusError(
                f"{path} is larger than {limit >> 20} MiB, more than a concept pack can need; get another copy."
            )
        return file.read(size + 1)  # not limit + 1, for which Python would take memory at once


# --- writing ---------------------------------------------------------


def store(path: Path, content: bytes | Path) -> None:
    """Write a new file, bytes or a copy of another, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
        else:
            out.write(content)
        out.flush()
        os.fsync(out.fileno())


def swap(beside: Path, place: Path) -> None:
    """Rename the old pack aside, the new one into place. `finish_swap` undoes half of it."""
    aside = _aside(place)
    if place.exists():
        os.replace(place, aside)
    try:
        os.replace(beside, place)
    except BaseException:
        if aside.exists():
            os.replace(aside, place)
        raise
    sync_folder(place.parent)
    _discard(aside)


def half_swapped(place: Path) -> bool:
    """Whether nothing is there for now, because a swap is, or was cut off, between its two renames."""
    return not place.exists() and (_aside(place) / MANIFEST).exists()


def finish_swap(place: Path) -> None:
    """If a swap was cut off between its two renames, bring the old pack back; if it is under way, wait for it."""
    if not half_swapped(place):
        return
    with locked_place(place):
        if not place.exists() and _aside(place).exists():  # else it was not cut off, only under way
            os.replace(_aside(place), place)


def clear(place: Path) -> None:
    """Take away what earlier writers of a pack left when they were killed; only under the lock."""
    _discard(_aside(place))
    clear_begun(place)


def clear_begun(place: Path) -> None:
    """Take away what was begun for this place and not finished, by writers that were killed; only under the lock."""
    left = re.compile(rf"\.{re.escape(place.name)}\.[0-9]+\.tmp")
    for path in place.parent.iterdir():
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _discard(aside: Path) -> None:
    (aside / MANIFEST).unlink(missing_ok=True)  # first, so that half of a pack never comes back
    shutil.rmtree(aside, ignore_errors=True)


def refuse_inside(place: Path, itself: bool = True) -> None:
    """Raise `MokusError` if a place lies in a pack, which would then be refused as damaged, or is one `itself`."""
    real = Path(os.path.realpath(place))  # whatever links lead there
    if packs := [folder for folder in (real, *real.parents)[not itself :] if (folder / MANIFEST).is_file()]:
        raise MokusError(
            f"{place} is in the concept pack {packs[0]}, which holds nothing else; name another folder (-o)."
        )


def refuse_taken(place: Path, what: str) -> None:
    """Raise `MokusError` unless a new folder can be made there for `what`: nothing is there, or an empty one."""
    if not place.name or place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise MokusError(f"{place} exists already; name a new folder for the {what} with -o.")


def refuse_foreign(place: Path) -> None:
    """Raise `MokusError` if writing a pack would destroy something else, or the folder that one stands in."""
    if not place.exists():
        return
    if place in (here := Path.cwd().resolve(), *here.parents):
        raise MokusError(f"{place} is the folder you are in, which cannot be replaced; go out of it or name another.")
    if not place.is_dir():
        raise MokusError(f"{place} is a file; name a new folder for the concept pack.")
    if any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise MokusError(f"{place} exists and is no concept pack; name a new folder for it.")
    if odd := sorted(name for name in listing(place) - {MANIFEST} if not re.match(FILE, name)):
        raise MokusError(
            f"{place} holds {odd[0]}, which is no part of a concept pack; move it elsewhere or name a new folder."
        )


def check_place(path: str | Path) -> None:
    """Raise `MokusError` if no pack can be written there, before anything costly is done for it."""
    refuse_inside(Path(path), itself=False)
    finish_swap(place := Path(path).resolve())
    refuse_foreign(place)
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise MokusError(
            f"{above} is {'not writable' if above.is_dir() else 'not a folder'}, so {path} cannot be made."
        )


def check_free(path: str | Path, overwrite: bool) -> None:
    """`check_place`, and that an older pack is replaced only if it is said."""
    check_place(path)
    refuse_pack(Path(path), overwrite)


def refuse_pack(path: Path, overwrite: bool) -> None:
    """Raise `MokusError` if a pack is there, unless it is said that it may be replaced."""
    if not overwrite and (path / MANIFEST).is_file():
        raise MokusError(
            f"{path} is a concept pack already; name another folder, or replace it by --overwrite (in Python overwrite=True)."
        )


@contextmanager
def locked_place(place: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Inside, no other process or thread writes the pack at `place`; may be nested."""
    lock = FileLock(place.with_name(f".{place.name}.lock"), is_singleton=True)
    try:
        held = lock.acquire(timeout=seconds)
    except Timeout as error:
        raise MokusError(
            f"{place} is being written by another process, and {seconds:g} s of waiting were not enough; "
            "try again when that one is done."
        ) from error
    with held:
        yield


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name == "nt":  # no folders to open there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """In hex, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(value: Any) -> bytes:
    """Sorted and indented, so that the same value has the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
