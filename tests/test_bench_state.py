"""What a benchmark keeps of its edits comes back to the last bit, or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from mokus.bench.state import load_edits, save_edits
from mokus.low_rank import LowRankShift

SETUP = {"fingerprint": "f", "settings": {"eta": 0.1, "layers": [1, 2]}}


def test_edits_come_back_with_what_was_said_of_them(tmp_path: Path) -> None:
    edits = [
        {"model.layers.1.mlp.down_proj": LowRankShift(torch.randn(2, 5), torch.randn(3, 2)),
         "a.b": LowRankShift(torch.randn(1, 4), torch.randn(6, 1))},
        {},
        {"a.b": LowRankShift(torch.randn(3, 4), torch.randn(6, 3))},
    ]  # fmt: skip
    save_edits(tmp_path / "new" / "x.safetensors", edits, SETUP, seconds=[1.0, 2.0, 3.0])
    found, more = load_edits(tmp_path / "new" / "x.safetensors", SETUP)
    assert [set(each) for each in found] == [set(each) for each in edits] and more["seconds"] == [1.0, 2.0, 3.0]
    for here, there in zip(found, edits, strict=True):
        assert all(torch.equal(here[p].A, there[p].A) and torch.equal(here[p].B, there[p].B) for p in there)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_edits_of_another_setup_are_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_edits(file, [{"a": LowRankShift(torch.ones(1, 2), torch.ones(2, 1))}], SETUP)
    assert load_edits(file, {**SETUP, "settings": {"eta": 0.2, "layers": [1, 2]}}) == ([], {})
    assert load_edits(tmp_path / "y.safetensors", SETUP) == ([], {})
    file.write_bytes(file.read_bytes()[:-3])
    assert load_edits(file, SETUP) == ([], {})
    file.write_bytes(b"no safetensors")
    assert load_edits(file, SETUP) == ([], {})
