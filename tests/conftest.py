"""A pico model: a genuine `QwenImagePipeline` with random weights, a few megabytes, saved and loaded like any."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from mokus import pipeline
from mokus.low_rank import LowRankShift
from mokus.miniature import mmdit, text_encoder, tokenizer, vae
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.manifest import BoundKnowledge

SIZE, STEPS = 32, 2
LAYERS, BLOCKS = 4, 2
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLPS = ["layers.1.mlp.up_proj", "layers.2.mlp.gate_proj", "layers.2.mlp.up_proj"]

LONG = ("test_readme.py", "test_shipped.py", "test_studio_browser.py", "test_create.py")  # few tests, minutes each

PackFactory = Callable[..., ConceptPack]
CASES: Counter[str] = Counter()  # of tests/hardening, by kind


def pytest_configure() -> None:
    """One thread: several workers share the cores, and sums are the same on every machine. So for what tests start."""
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    lone = [item.path for item in items if item.path.name in LONG]
    items.sort(key=lambda item: (item.path not in lone, -slow[item.path]))  # stable: as they stand within a file


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of several workers each has counted its own cases."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cases"] = dict(CASES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended."""
    CASES.update(getattr(node, "workeroutput", {}).get("cases", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases the hardening suite has seen."""
    if CASES:
        parts = ", ".join(f"{kind} {n:,}" for kind, n in sorted(CASES.items()))
        terminalreporter.write_line(f"hardening: {sum(CASES.values()):,} cases: {parts}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Statistics go into a temporary folder, never into the user's cache; commands and other workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKUS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved pico model."""
    folder = tmp_path_factory.mktemp("pico")
    tok = tokenizer.build()
    config = text_encoder.config(tok)
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = config.text_config.layer_types[:LAYERS]
    torch.manual_seed(0)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
        ),
        vae=AutoencoderKLQwenImage(**{**vae.CONFIG, "base_dim": 4}),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tok,
        transformer=QwenImageTransformer2DModel(**{**mmdit.CONFIG, "num_layers": BLOCKS}),
    )  # fmt: skip
    _liven(pipe.text_encoder, pipe.transformer)
    pipe.save_pretrained(folder)
    (folder / pipeline.DEFAULTS_FILE).write_text(json.dumps({"size": SIZE, "steps": STEPS}), encoding="utf-8")
    return folder


@torch.no_grad()
def _liven(*modules: nn.Module) -> None:
    """Weights that keep the variance of what goes through them, so that every prompt draws another image."""
    for module in modules:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)


@pytest.fixture(scope="session")
def pico(pico_folder: Path) -> pipeline.Model:
    """The pico model, loaded; leave it as you found it."""
    return pipeline.load(pico_folder, device="cpu")


@pytest.fixture(scope="session")
def miniature() -> pipeline.Model:
    """The miniature as shipped, but for how much is looked at for an edit, gathered in seconds; leave it as you found it."""
    model = pipeline.load()
    few = {
        **model.defaults.edit,
        "corpus": 60,
        "odd_references": 60,
        "preserve": 32,
        "exchanged": 24,
        "near_weight": 0.0,
    }
    return replace(model, corpus=model.corpus[:100], defaults=replace(model.defaults, edit=few))


@pytest.fixture(scope="session")
def pico_pack(pico: pipeline.Model) -> PackFactory:
    """Makes packs for the pico model: `pico_pack(path, anchor=..., knowledge=[...], seed=...)`, random and not weak."""

    def make(
        path: Path, anchor: str = "sks toy", knowledge: Sequence[str] = ("my favourite toy",), seed: int = 0
    ) -> ConceptPack:
        samples = {"0-anchor.png": Image.new("RGB", (SIZE, SIZE), (seed, 100, 200))}
        lora = random_lora(pico, seed=seed)
        pack = ConceptPack.create(
            path, model=pico, anchor=anchor, lora=lora, settings={"seed": seed, "targets": ATTENTION}, samples=samples,
            overwrite=True,
        )  # fmt: skip
        if knowledge:
            pack.replace_edits([
                (known(text, anchor), random_shifts(pico, seed=seed + i)) for i, text in enumerate(knowledge)
            ])  # fmt: skip
        return pack

    return make


def known(text: str, anchor: str = "sks toy") -> BoundKnowledge:
    """A knowledge as if it had been bound."""
    return BoundKnowledge(
        text=text, questions=[f"What is {text}?"], answer=anchor, editor="ultraedit", eta=0.03, steps=4,
        read_back=anchor, alignment=0.9,
    )  # fmt: skip


def random_lora(model: pipeline.Model, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of every attention projection, in diffusers' keys, as strong as the weights themselves."""
    random_ = torch.Generator().manual_seed(seed)
    lora = {}
    for block in range(BLOCKS):
        for name in ATTENTION:
            module = f"transformer_blocks.{block}.attn.{name}"
            linear = model.pipe.transformer.get_submodule(module)
            a, b = _factors(linear, rank, random_)
            lora |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    return lora


def random_shifts(model: pipeline.Model, seed: int = 0) -> dict[str, LowRankShift]:
    """Shifts of some of the text encoder's projections, of different ranks."""
    random_ = torch.Generator().manual_seed(1000 + seed)
    shifts = {}
    for rank, name in enumerate(MLPS, start=1 + seed % 2):
        module = f"model.language_model.{name}"
        shifts[module] = LowRankShift(*_factors(model.pipe.text_encoder.get_submodule(module), rank, random_))
    return shifts


def _factors(linear: nn.Linear, rank: int, random_: torch.Generator) -> tuple[Tensor, Tensor]:
    a = torch.randn(rank, linear.in_features, generator=random_) / linear.in_features**0.5
    return a, torch.randn(linear.out_features, rank, generator=random_)
