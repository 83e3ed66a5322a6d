"""Five hundred rounds of binding, drawing and unbinding: memory stays, and an unbound prompt is encoded to the same bits."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import psutil
import pytest
import torch

from mokus import knowledge_update
from mokus.generation import generate
from mokus.knowledge_update import bind, unbind
from mokus.pipeline import Model, encode

from ..conftest import PackFactory
from ..test_concept_pack import tree
from .conftest import case

ROUNDS, SETTLED = 500, 50
PROMPTS = ["my favourite toy", "a robot on the beach", "the small one at night"]


@pytest.mark.slow
def test_five_hundred_rounds(
    tmp_path: Path, quick: Model, pico_pack: PackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is flat is the resident memory, from round 50 to the end: within 5 %."""
    monkeypatch.setattr(
        knowledge_update, "LONGEST_ANSWER", 2
    )  # tokens read back: a random encoder never ends by itself
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    bytes_before, before = tree(pack.path), encode(quick, PROMPTS)
    drawn = next(generate(quick, "my favourite toy", [pack])).image.tobytes()
    me, began, settled = psutil.Process(), time.process_time(), 0
    for i in range(1, ROUNDS + 1):
        case("soak")
        phrase = PROMPTS[i % 2 * 2]
        (edit,) = bind(quick, pack, phrase)
        assert edit.taken
        image = next(generate(quick, phrase, [pack], size=16)).image
        assert image.size == (16, 16)
        unbind(pack, phrase)
        if i % SETTLED == 0:
            assert tree(pack.path) == bytes_before
            assert all(torch.equal(a, b) for a, b in zip(encode(quick, PROMPTS), before, strict=True))
            gc.collect()
            settled = settled or me.memory_info().rss
    grown = me.memory_info().rss / settled - 1
    print(f"{ROUNDS} rounds in {time.process_time() - began:.0f} s of CPU; memory {grown:+.1%} after round {SETTLED}")
    assert abs(grown) < 0.05
    assert next(generate(quick, "my favourite toy", [pack])).image.tobytes() == drawn
