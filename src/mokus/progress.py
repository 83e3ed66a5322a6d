"""How long work tells how far it is: `progress(what, done, total, info)`, which `console.Bars` draws as one bar per `what`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int, dict[str, Any]], None]


def silent(what: str, done: int, total: int, info: dict[str, Any]) -> None:
    """Tells nobody."""
