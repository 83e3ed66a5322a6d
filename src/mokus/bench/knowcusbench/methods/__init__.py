"""The methods that are compared, one small file each.

A method says, for a prompt with a piece of knowledge in it, which recipe draws it and what the prompt becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from mokus.bench.knowcusbench.recipe import Case, Recipe
from mokus.errors import MokusError

Method = Callable[[Case, str, str], tuple[Recipe, str]]  # (concept, prompt with {}, knowledge) -> recipe, prompt

# from the floor to the ceiling and what lies between
METHODS = ("base", "anchor", "rewrite", "mokus", "mokus-paper", "enc-ft", "naive-db")


def method(name: str) -> Method:
    """The method of that name. Raises `MokusError` for an unknown one."""
    if name not in METHODS:
        raise MokusError(f"there is no method {name!r}, expected some of {', '.join(METHODS)}.")
    return cast("Method", import_module(f"{__name__}.{name.replace('-', '_')}").drawn)


def about(name: str) -> str:
    """One line on the method."""
    method(name)
    text = import_module(f"{__name__}.{name.replace('-', '_')}").__doc__ or ""
    return text.strip().partition("\n")[0]
