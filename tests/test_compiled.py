"""Compiled blocks learn the same and leave the model as it was; without a compiler that is a sentence."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mokus.errors import MokusError
from mokus.miniature import world
from mokus.pipeline import Model
from mokus.settings import LearnSettings
from mokus.training.compiled import blocks_compiled, check_compiler
from mokus.visual_concept import learn

from .conftest import SIZE

SETTINGS = LearnSettings(
    steps=3, rank=2, learning_rate=1e-2, prior_prompts=2, prior_steps=2, place_share=0.0, looks_share=0.0
)
CPU = torch.device("cpu")


@pytest.fixture
def images() -> list[Image.Image]:
    return world.character_photos("bobo", 1, seed=0, size=SIZE)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_learn_the_same(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    eager = learn(pico, images, "sks toy", tmp_path / "eager.pack", settings=SETTINGS).lora()
    assert not counters["stats"]["unique_graphs"]
    compiled = learn(pico, images, "sks toy", tmp_path / "a.pack", settings=replace(SETTINGS, compile=True)).lora()
    assert counters["stats"]["unique_graphs"]  # it really was
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-9)
    assert all(block._compiled_call_impl is None for block in pico.pipe.transformer.transformer_blocks)


def test_blocks_are_as_before_afterwards(pico: Model) -> None:
    blocks = pico.pipe.transformer.transformer_blocks
    with pytest.raises(KeyError), blocks_compiled(pico.pipe.transformer, CPU):
        assert all(block._compiled_call_impl is not None for block in blocks)
        raise KeyError
    assert all(block._compiled_call_impl is None for block in blocks)


def test_without_a_compiler(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MokusError, match="no no-such-compiler; install one"):
        learn(pico, images, "sks toy", tmp_path / "a.pack", settings=LearnSettings(compile=True))
    assert not list(tmp_path.iterdir())
    check_compiler(torch.device("meta"))  # which needs none


def test_a_class_without_repeated_blocks(pico: Model) -> None:
    with pytest.raises(MokusError, match="no repeated blocks"), blocks_compiled(torch.nn.Linear(1, 1), CPU):
        pass
