"""Settings as form fields, and what was filled in as settings: made from the dataclasses, as the command line's options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from mokus.errors import MokusError

Number = TypeVar("Number", int, float)

PREFIX = "set-"


@dataclass(frozen=True)
class Field:
    """One field of a form; `default`, as text, is what it is if nothing is filled in."""

    name: str
    label: str
    help: str
    kind: str  # "number", "text" or "yes or no"
    default: str
    value: str


def form_fields(settings: type, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> list[Field]:
    """A field for every setting that is a number, a text or a yes or no; lists are left to the command line."""
    hints, found = get_type_hints(settings), []
    for each in fields(settings):
        kind = {int: "number", float: "number", str: "text", bool: "yes or no"}.get(hints[each.name])
        if kind is None or each.default is MISSING:
            continue
        default = defaults.get(each.name, each.default)
        shown = ("yes" if default else "no") if kind == "yes or no" else f"{default}"
        label = each.name.replace("_", " ")
        value = given.get(PREFIX + each.name, "")
        found.append(Field(PREFIX + each.name, label, each.metadata["help"], kind, shown, str(value)))
    return found


def chosen(settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was filled in. Raises `MokusError` for what is not of the setting's kind."""
    hints, found = get_type_hints(settings), {}
    for each in fields(settings):
        value, kind = str(given.get(PREFIX + each.name, "")).strip(), hints[each.name]
        if not value or kind not in (int, float, str, bool):
            continue
        if kind in (int, float):
            found[each.name] = number(each.name.replace("_", " "), value, kind)
        else:
            found[each.name] = value == "yes" if kind is bool else value
    return found


def number(name: str, value: str, kind: type[Number]) -> Number:
    """What was filled in, as a number. Raises `MokusError` for what is none, or not finite."""
    wanted = "a whole number" if kind is int else "a number"
    try:
        found = kind(value)
    except ValueError as error:
        raise MokusError(f"{name} is {value[:40]!r}, expected {wanted}.") from error
    if isinstance(found, float) and not math.isfinite(found):
        raise MokusError(f"{name} is {value[:40]!r}, expected {wanted} that is finite.")
    return found
