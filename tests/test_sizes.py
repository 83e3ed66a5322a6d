"""Sizes: a square is its side, however it was said; what cannot be drawn is one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokus.errors import MokusError
from mokus.sizes import MAX_SIZE, check_size, parsed, said, sides, simplest

SIDE = st.integers(1, MAX_SIZE)


@given(SIDE, SIDE)
def test_what_is_said_is_parsed_again(width: int, height: int) -> None:
    size = simplest((width, height))
    assert parsed(said(size)) == size and sides(size) == (width, height) and isinstance(size, int) == (width == height)
    assert simplest(list(sides(size))) == size  # as JSON has it


@pytest.mark.parametrize("text", ["", "0", "x", "64x", "x64", "0x64", "64x64x64", "64X64", "-64", "6.4", "٣٢", " 64"])
def test_what_is_no_size_is_none(text: str) -> None:
    assert parsed(text) is None


@given(SIDE, SIDE, st.sampled_from([1, 8, 16, 32]))
def test_a_size_is_refused_unless_it_is_a_multiple_and_the_one_that_is_named_would_do(
    width: int, height: int, multiple: int
) -> None:
    if width % multiple == 0 == height % multiple:
        return check_size((width, height), multiple)
    with pytest.raises(MokusError, match=rf"the size is {said((width, height))}, expected a multiple") as caught:
        check_size((width, height), multiple)
    named = parsed(str(caught.value).split("; ")[1].split()[0])
    assert named is not None
    check_size(named, multiple)


@pytest.mark.parametrize("size", [(64, MAX_SIZE + 8), MAX_SIZE + 8, (0, 64), -8, (64,), (64, 64, 64), (64, "64"), ()])
def test_other_sizes_are_refused(size: int | Sequence[int]) -> None:
    with pytest.raises(MokusError, match="the size is"):
        check_size(size, 8)
