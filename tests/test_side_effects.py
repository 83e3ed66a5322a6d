"""What a pack does to phrases that nobody bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mokus import MokusError
from mokus.knowledge import near_misses
from mokus.low_rank import LowRankShift
from mokus.pipeline import Model, encode
from mokus.side_effects import BOUND, NEAR, OTHER, side_effects
from tests.conftest import PackFactory, known, random_shifts


def test_the_bound_phrase_comes_first_and_what_is_bound_is_no_side_effect(
    pico: Model, pico_pack: PackFactory, tmp_path: Path
) -> None:
    pack = pico_pack(tmp_path / "p", knowledge=["my favourite toy", "your favourite toy"])
    told: list[tuple[int, int]] = []
    found = side_effects(pico, pack, "My favourite toy", most=2, progress=lambda done, n: told.append((done, n)))
    assert (found[0].phrase, found[0].kind) == ("my favourite toy", BOUND)
    near = [each.phrase for each in found if each.kind == NEAR]
    assert near == [each for each in near_misses("my favourite toy") if each != "your favourite toy"][:2]
    assert [each.kind for each in found[3:]] == [OTHER] * 3 and told == [(i, 6) for i in range(1, 7)]
    assert all(each.moved != 0 for each in found)  # a random edit moves everything


def test_of_two_spellings_the_one_that_is_asked_for(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    pack = pico_pack(tmp_path / "p", knowledge=["my toy", "My toy", "a hat"])
    for asked, found in (("My toy", "My toy"), ("my toy", "my toy"), ("A  hat.", "a hat")):
        assert side_effects(pico, pack, asked, most=0)[0].phrase == found
    assert [known.text for known in pack.bound("MY TOY")] == ["my toy", "My toy"] and pack.bound("a toy") == []


def test_an_edit_that_changes_nothing_has_none(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    pack = pico_pack(tmp_path / "p", knowledge=[])
    nothing = {name: LowRankShift(shift.A, 0 * shift.B) for name, shift in random_shifts(pico).items()}
    pack.replace_edits([(known("my toy"), nothing)])
    before = encode(pico, ["my toy"])[0]
    for each in side_effects(pico, pack, "my toy"):
        assert each.moved == 0 and each.before == each.after
    assert torch.equal(encode(pico, ["my toy"])[0], before)


def test_what_is_not_bound_has_no_side_effects(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    with pytest.raises(MokusError, match="is not bound"):
        side_effects(pico, pico_pack(tmp_path / "p"), "another")
