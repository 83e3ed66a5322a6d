"""Concept packs used together: each has its own anchor, and a phrase that several of them bind must mean one of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mokus.errors import MokusError
from mokus.knowledge import same
from mokus.low_rank import Shifts, added
from mokus.packs.concept_pack import ConceptPack


def shifts_of(packs: Sequence[ConceptPack], prefer: ConceptPack | Path | str | None = None) -> list[Shifts]:
    """The shifts of each pack. Phrases that `prefer`, one of the packs or its path, binds are left out of the others'.

    Phrases are the same whatever their capital letters and spaces. One inside a longer one, "my toy" in "my toy robot",
    is no conflict, in one pack or in two: both edits are in place, and a prompt with the longer phrase says the longer
    phrase. Raises `MokusError` if a pack is there twice, if two have the same anchor for different looks, if two bind the
    same phrase and neither is preferred, or if `prefer` is none of them.
    """
    preferred = chosen(packs, prefer)
    _check_anchors(packs)
    disputed = contested(packs)
    for text, holders in disputed.values():
        if preferred not in holders:
            raise MokusError(
                f"{holders[0].path} and {holders[1].path} both bind {text!r}, so what it means is open; choose one of them "
                "with --prefer PACK (in Python prefer=), or unbind it in the other."
            )
    return [pack.shifts() if pack is preferred else _without(pack, disputed.keys()) for pack in packs]


def chosen(packs: Sequence[ConceptPack], prefer: ConceptPack | Path | str | None) -> ConceptPack | None:
    """The pack that is preferred, itself or by its path. Raises `MokusError` if it is none of them."""
    if prefer is None:
        return None
    path = prefer.path if isinstance(prefer, ConceptPack) else Path(prefer)
    for pack in packs:
        if pack.path.resolve() == path.resolve():
            return pack
    used = ", ".join(str(pack.path) for pack in packs) or "none"
    raise MokusError(f"{path} is to be preferred, but the packs in use are {used}; prefer one of these, or use it too.")


def _check_anchors(packs: Sequence[ConceptPack]) -> None:
    by_anchor: dict[str, ConceptPack] = {}
    given: set[tuple[Path, str]] = set()
    for pack in packs:
        if (which := (pack.path.resolve(), pack.digest)) in given:
            raise MokusError(f"{pack.path} is given twice; leave it out once.")
        given.add(which)
        words = not pack.lora()  # then the anchor means what it says, in however many packs
        other = pack if words else by_anchor.setdefault(pack.anchor, pack)
        if other is not pack:
            raise MokusError(
                f"{other.path} and {pack.path} have the same anchor {pack.anchor!r}, so no prompt tells them apart; "
                "use one of them, or learn one again with another anchor."
            )


def contested(packs: Sequence[ConceptPack]) -> dict[str, tuple[str, list[ConceptPack]]]:
    """Of each phrase that several packs bind, by what is the same for all spellings: one spelling, and these packs."""
    holders: dict[str, tuple[str, list[ConceptPack]]] = {}
    for pack in packs:
        for key, text in {same(known.text): known.text for known in pack.knowledge}.items():
            holders.setdefault(key, (text, []))[1].append(pack)
    return {key: found for key, found in holders.items() if len(found[1]) > 1}


def _without(pack: ConceptPack, phrases: Collection[str]) -> Shifts:
    """The pack's shifts as if these phrases had never been bound in it."""
    edits = pack.edits()
    kept = [shifts for known, shifts in edits if same(known.text) not in phrases]
    return pack.shifts() if len(kept) == len(edits) else added(*kept)
