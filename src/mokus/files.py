"""Files that are written whole or not at all, and results that are kept, so that a stopped run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mokus.errors import MokusError


def write(file: Path, content: bytes | str) -> Path:
    """Write a file, text as UTF-8, beside its place and put it there; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return file


def copy(folder: Path, target: Path) -> Path:
    """Copy a folder to a place where there is none.

    As `shutil.copytree`, but the first file that cannot be copied ends it with its own `OSError`, which says what is wrong.
    """
    target.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            (target / path.relative_to(folder)).mkdir()
        else:
            shutil.copy2(path, target / path.relative_to(folder))
    return target


def write_json(file: Path, value: Any, indent: int | None = None) -> Path:
    """The same with JSON."""
    return write(file, json.dumps(value, ensure_ascii=False, indent=indent) + "\n" * (indent is not None))


def read_json(file: Path) -> Any:
    """The file's contents, or None if it is not there. Raises `MokusError` if it is no JSON."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MokusError(f"{file} is no JSON ({error}); take it away, and run the benchmark again.") from error


def kept(file: Path, setup: Any, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of results from its file, or made now and kept there. Raises `MokusError` for a file of another setup."""
    known = read_json(file)
    if known is None:
        row = json.loads(json.dumps(made()))
        write_json(file, {**row, "setup": setup}, indent=1)
        return dict(row)
    if not isinstance(known, dict) or known.pop("setup", None) != json.loads(json.dumps(setup)):
        raise MokusError(f"{file} is of a run with other settings, model or versions; name another folder with -o.")
    return dict(known)
