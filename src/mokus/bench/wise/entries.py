"""The entries of WISE (arXiv 2503.07265), read from the user's own copy: its data carries no licence, so none of it is here.

A file is a JSON list of objects with `prompt_id`, `Prompt`, `Explanation`, `Category` and `Subcategory`; both releases have
these, the *legacy* one of 2025 (`data/`, now `WISE_legacy/data/`) and the *verified* one of 2026 (`data_verified/`), which
exchanges some two hundred prompts and is scored 0 or 1. One key is ours: an entry with `"Control": true` is never edited.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mokus.bench.knowcusbench.recipe import digest
from mokus.errors import MokusError

Version = Literal["legacy", "verified"]
VERSIONS: tuple[Version, ...] = ("legacy", "verified")

# The file names of both releases; the verified ones end in "_verified". `merge.json` repeats the other three.
STEMS = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
MERGED = "merge"

# The six fields that the overall score weighs, and the last prompt_id of each, by version.
FIELDS = ("culture", "time", "space", "biology", "physics", "chemistry")
LAST_IDS: dict[Version, tuple[int, ...]] = {
    "legacy": (400, 567, 700, 800, 900, 1000),
    "verified": (400, 520, 640, 760, 880, 1000),
}
_WORDS = {"culture": "cultur", "time": "time", "space": "space", "biology": "biolog", "physics": "physic",
          "chemistry": "chemi"}  # fmt: skip
LARGEST = 64 << 20  # bytes of a file; WISE's own have half a million
LISTED = 5  # faults named in an error; more are counted


class Entry(BaseModel):
    """One entry: what is asked, and what a right image shows."""

    model_config = ConfigDict(frozen=True, extra="ignore", str_strip_whitespace=True, populate_by_name=True)

    prompt_id: int = Field(ge=0)
    prompt: str = Field(alias="Prompt", min_length=1, max_length=4000)
    explanation: str = Field(alias="Explanation", min_length=1, max_length=8000)
    category: str = Field(default="", alias="Category")
    subcategory: str = Field(default="", alias="Subcategory")
    control: bool = Field(default=False, alias="Control")
    field: str = Field(default="", exclude=True)  # one of FIELDS, or empty where it is none of WISE's


@dataclass(frozen=True)
class Entries:
    """What a run asks about."""

    source: str  # the file or folder it was read from
    version: Version
    sha256: str  # of all entries
    entries: tuple[Entry, ...]

    def some(
        self, limit: int | None = None, categories: Sequence[str] | None = None, control_every: int = 0
    ) -> Entries:
        """Of some categories (their names, subcategories or fields), the first `limit`; of what is left, every n-th a control.

        Raises `MokusError` for an unknown category, or if nothing but controls is left.
        """
        wanted = {name.strip().casefold() for name in categories or ()}
        known = {name for entry in self.entries for name in names_of(entry)}
        if unknown := [name for name in wanted if name not in {each.casefold() for each in known}]:
            raise MokusError(
                f"{self.source} has no category {unknown[0]!r}, expected some of {', '.join(sorted(known))}."
            )
        left = [entry for entry in self.entries if not wanted or wanted & {n.casefold() for n in names_of(entry)}][
            :limit
        ]
        if control_every:
            left = [
                entry.model_copy(update={"control": entry.control or i % control_every == control_every - 1})
                for i, entry in enumerate(left)
            ]
        if not any(not entry.control for entry in left):
            raise MokusError(f"{self.source} leaves no entry to edit; ask for more of it.")
        return replace(self, entries=tuple(left))


def names_of(entry: Entry) -> list[str]:
    """What an entry may be chosen by."""
    return [name for name in (entry.category, entry.subcategory, entry.field) if name]


def load(source: Path, version: Version | None = None) -> Entries:
    """Read a JSON file, a folder of them, or a clone of the WISE repository.

    `version` says which release a clone's data are taken of, or what a file of another name is. Raises `MokusError`, with file
    and entry, for what is missing or cannot be read.
    """
    files = _files(Path(source), version)
    found: list[Entry] = []
    faults: list[str] = []
    seen: dict[int, str] = {}
    kinds = {_version_of(file) for file in files} if version is None else {version}
    if len(kinds) > 1:
        raise MokusError(f"{source} mixes legacy and verified files; name one of them, or its folder.")
    kind = kinds.pop()
    for file in files:
        for at, value in enumerate(_values(file), start=1):
            entry = _entry(file, at, value, kind, faults)
            if entry is None:
                continue
            where = f"{file.name}, entry {at}"
            if entry.prompt_id in seen:
                faults.append(f"{where}: prompt_id {entry.prompt_id} is that of {seen[entry.prompt_id]}, too")
                continue
            seen[entry.prompt_id] = where
            found.append(entry)
    if faults:
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise MokusError(f"{'; '.join(faults[:LISTED])}{more}. Correct the file, or get a whole copy of WISE.")
    if not found:
        raise MokusError(
            f"{source} holds no entries, expected a JSON list of objects with prompt_id, Prompt, Explanation."
        )
    whole = digest([entry.model_dump() for entry in found])
    return Entries(str(source), kind, whole, tuple(found))


def _files(source: Path, version: Version | None) -> list[Path]:
    """The files that a path means."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise MokusError(
            f"{source} is not there, expected a JSON file of WISE, its folder, or a clone of github.com/PKU-YuanGroup/WISE."
        )
    if own := _json_files(source):
        return own
    places: dict[Version, list[Path]] = {
        "legacy": [source / "WISE_legacy" / "data", source / "data"], "verified": [source / "data_verified"],
    }  # fmt: skip
    there = {kind: files for kind in VERSIONS for place in reversed(places[kind]) if (files := _json_files(place))}
    if version is None and len(there) > 1:
        raise MokusError(f"{source} has both releases of WISE; say which by --data legacy or --data verified.")
    chosen = there.get(version) if version else next(iter(there.values()), None)
    if not chosen:
        raise MokusError(
            f"{source} has no {version or 'JSON'} data of WISE, expected files such as {STEMS[0]}.json in it, in data/, "
            "in WISE_legacy/data/ or in data_verified/."
        )
    return chosen


def _json_files(folder: Path) -> list[Path]:
    """WISE's own files where they are; else every JSON file of the folder."""
    if not folder.is_dir():
        return []
    files = sorted(file for file in folder.glob("*.json") if file.is_file())
    own = [file for file in files if _stem(file) in STEMS]
    return sorted(own, key=lambda file: STEMS.index(_stem(file))) or files


def _stem(file: Path) -> str:
    return file.stem.removesuffix("_verified")


def _version_of(file: Path) -> Version:
    return "verified" if file.stem.endswith("_verified") or file.parent.name == "data_verified" else "legacy"


def _values(file: Path) -> list[Any]:
    if (size := file.stat().st_size) > LARGEST:
        raise MokusError(f"{file} has {size:,} bytes, expected a JSON file of WISE of at most {LARGEST:,}.")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number of thousands of digits
        raise MokusError(f"{file} is no JSON ({error}); get a whole copy of it.") from error
    if not isinstance(values, list):
        raise MokusError(f"{file} holds a {type(values).__name__}, expected a JSON list of WISE's entries.")
    return values


def _entry(file: Path, at: int, value: Any, version: Version, faults: list[str]) -> Entry | None:
    """The entry, or None and a line in `faults`."""
    where = f"{file.name}, entry {at}"
    if not isinstance(value, dict):
        faults.append(f"{where} is a {type(value).__name__}, expected an object")
        return None
    if "prompt_id" in value:
        where += f" (prompt_id {str(value['prompt_id'])[:20]})"
    try:
        entry = Entry.model_validate(value)
    except ValidationError as error:
        faults += [f"{where}: {'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors()]
        return None
    return entry.model_copy(update={"field": field_of(entry, _stem(file), version)})


def field_of(entry: Entry, stem: str, version: Version) -> str:
    """Which of the six fields an entry belongs to: by the words of its category, else, in WISE's own files, by its number."""
    for text in (entry.category.casefold(), entry.subcategory.casefold()):
        if found := [name for name, word in _WORDS.items() if word in text]:
            return found[0]
    if stem not in (*STEMS, MERGED):
        return ""
    return next((n for n, last in zip(FIELDS, LAST_IDS[version], strict=True) if entry.prompt_id <= last), "")


def wise_json(entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """Entries as WISE writes them, for suites of our own."""
    for entry in entries:
        row = entry.model_dump(by_alias=True, exclude={"control"})
        yield row | ({"Control": True} if entry.control else {})
