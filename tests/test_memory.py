"""Memory tiers on the pico model: the same results, or nearly; and a full memory is one sentence with the next tier."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import mokus
from mokus import flow, memory, pipeline, transfer
from mokus.backbone import COMPONENTS, TEXT_ALONE
from mokus.cli import app
from mokus.encoder import module_paths
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, applied, merged
from mokus.settings import EditSettings, LearnSettings
from tests.conftest import SIZE, PackFactory, random_shifts

PACKED = ("8bit", "4bit")


@pytest.fixture
def pico_of_my_own(pico_folder: Path) -> pipeline.Model:
    return pipeline.load(pico_folder, device="cpu")


def velocity(transformer: nn.Module, seed: int = 0) -> Tensor:
    """At fixed inputs."""
    random = torch.Generator().manual_seed(seed)
    config = transformer.config
    z = torch.randn(2, 16, config.in_channels, generator=random)
    embeds = torch.randn(2, 7, config.joint_attention_dim, generator=random)
    return flow.velocity(transformer, z, torch.tensor([0.3, 0.8]), embeds, None, (4, 4))


def gradients(transformer: nn.Module, tier: memory.Tier) -> list[Tensor]:
    """Of a LoRA with both factors alive, in a tier."""
    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(0)
    transformer.add_adapter(config, adapter_name="it")
    try:
        with memory.checkpointing(transformer, tier):
            trained = [p for p in transformer.parameters() if p.requires_grad]
            return list(torch.autograd.grad(velocity(transformer).square().mean(), trained))
    finally:
        transformer.unload_lora()
        transformer.requires_grad_(False)


# --- training ---------------------------------------------------------


@pytest.mark.parametrize("name", ["selective", "checkpointed"])
def test_checkpointing_changes_no_gradient(pico: pipeline.Model, name: str) -> None:
    plain = gradients(pico.pipe.transformer, memory.tier("all"))
    again = gradients(pico.pipe.transformer, memory.tier(name))
    assert len(plain) == len(again) > 0 and any(bool(g.any()) for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not pico.pipe.transformer.gradient_checkpointing


def test_selective_checkpointing_runs_forward_again_in_the_blocks_that_it_does_not_keep(pico: pipeline.Model) -> None:
    runs = [0] * len(pico.pipe.transformer.transformer_blocks)
    hooks = []
    for i, block in enumerate(pico.pipe.transformer.transformer_blocks):

        def count(*_: object, i: int = i) -> None:
            runs[i] += 1

        hooks.append(block.attn.register_forward_pre_hook(count))
    gradients(pico.pipe.transformer, memory.tier("selective"))
    for hook in hooks:
        hook.remove()
    assert runs == [1 if i % memory.SELECTED == 0 else 2 for i in range(len(runs))]


# --- weights of few bits ---------------------------------------------------------


@pytest.mark.parametrize("bits, tolerance, bytes_each", [(8, 0.05, 1.1), (4, 0.3, 0.6)])
def test_few_bits_are_near_and_small(
    pico_of_my_own: pipeline.Model, bits: int, tolerance: float, bytes_each: float
) -> None:
    transformer = pico_of_my_own.pipe.transformer
    blocks = transformer.transformer_blocks
    numbers = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        before = velocity(transformer)
        memory.quantise(blocks, bits, torch.device("cpu"))
        after = velocity(transformer)
    size = sum(m.weight.nbytes for m in blocks.modules() if isinstance(m, nn.Linear))
    assert size < bytes_each * numbers
    assert 0 < float((after - before).norm() / before.norm()) < tolerance
    assert not any(memory.plain(m) for m in blocks.modules() if isinstance(m, nn.Linear))
    assert all(g.dtype == torch.float32 for g in gradients(transformer, memory.tier("checkpointed")))


@pytest.mark.parametrize("used", [False, True])
def test_eight_bits_leave_nothing_behind_where_they_were(
    pico_of_my_own: pipeline.Model, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """Weights are moved as to and from a GPU: what `Module.to` moves is copied, what it does not know of stays."""
    to = nn.Module.to

    def copied(self: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return to(self, "cpu")._apply(torch.Tensor.clone)

    def check() -> None:
        layers: Any = [m for m in transformer.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.int8]
        assert layers
        for each in layers:
            held = (each.weight.data, each.weight.CB, each.state.CB)
            assert len({x.data_ptr() for x in held if x is not None}) == 1

    transformer, tier = pico_of_my_own.pipe.transformer, memory.tier("8bit")
    model = replace(pico_of_my_own, device=torch.device("cuda"), tier=tier)
    monkeypatch.setattr(nn.Module, "to", copied)
    memory.place(model.pipe, tier, torch.device("cpu"))
    check()
    with torch.no_grad():
        before = velocity(transformer if used else deepcopy(transformer))
        with model.resident("transformer"):
            check()
            assert torch.equal(velocity(transformer), before)
            check()
        check()
        assert torch.equal(velocity(transformer), before)


def test_four_bits_pass_gradients_on_after_they_were_used_without(
    pico_of_my_own: pipeline.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any CPU as on one with AVX-512 for bfloat16, where bitsandbytes has a layout that is for inference alone."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    transformer = pico_of_my_own.pipe.transformer
    memory.quantise(transformer.transformer_blocks, 4, torch.device("cpu"))
    with torch.no_grad():
        before = velocity(transformer)
    found = gradients(transformer, memory.tier("all"))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in found)
    with torch.no_grad():
        assert torch.equal(velocity(transformer), before)


@pytest.mark.parametrize("name", PACKED)
def test_the_method_runs_in_few_bits_and_its_packs_are_anyone_s(
    pico_folder: Path, pico: pipeline.Model, tmp_path: Path, name: str
) -> None:
    """The fingerprint is of the plain weights, so a pack made in one tier is used in another."""
    model = pipeline.load(pico_folder, device="cpu", tier=name)
    assert model.tier.name == name and model.fingerprint == pico.fingerprint
    photos = [Image.new("RGB", (SIZE, SIZE), (200, 30, 30))]
    settings = LearnSettings(steps=2, prior_prompts=1, prior_steps=1, place_share=0.0, looks_share=0.0)
    pack = mokus.learn(model, photos, "sks toy", tmp_path / "a.pack", settings=settings)
    lora = pack.lora()
    assert lora and all(x.dtype == torch.float32 and x.isfinite().all() for x in lora.values())
    for each in (model, pico):
        (drawn,) = mokus.generate(each, "sks toy", packs=[pack], steps=2)
        assert drawn.image.size == (SIZE, SIZE)


# --- layer by layer ---------------------------------------------------------


def test_offloading_draws_the_same_pixels(
    pico_folder: Path, pico: pipeline.Model, pico_pack: PackFactory, tmp_path: Path
) -> None:
    pack = pico_pack(tmp_path / "a.pack")
    streamed = pipeline.load(pico_folder, device="cpu", tier="offload")
    (one,), (other,) = (mokus.generate(m, "my favourite toy", packs=[pack], steps=2) for m in (pico, streamed))
    assert one.image.tobytes() == other.image.tobytes()
    (bare,) = mokus.generate(streamed, "my favourite toy", steps=2)
    assert bare.image.tobytes() != one.image.tobytes()


def test_offloading_neither_learns_nor_binds(pico_folder: Path, pico_pack: PackFactory, tmp_path: Path) -> None:
    streamed = pipeline.load(pico_folder, device="cpu", tier="offload")
    with pytest.raises(MokusError, match=r"'offload' can only generate.*learn"):
        mokus.learn(streamed, [Image.new("RGB", (SIZE, SIZE))], "sks toy", tmp_path / "new.pack")
    with pytest.raises(MokusError, match="to bind"):
        mokus.bind(streamed, pico_pack(tmp_path / "a.pack"), "the pride of our collection")
    assert not (tmp_path / "new.pack").exists()


def test_offloading_does_not_edit_for_a_transfer(pico_folder: Path, tmp_path: Path) -> None:
    def progress(*_: Any) -> None:
        raise AssertionError("something is drawn first")

    streamed = pipeline.load(pico_folder, device="cpu", tier="offload")
    case = transfer.Case.of("What is the favourite toy of Anna?", "a blue ring")
    with pytest.raises(MokusError, match=r"'offload' can only generate.*to bind"):
        transfer.transfer(streamed, case, progress=progress)


# --- the text encoder alone ---------------------------------------------------------


@pytest.mark.parametrize("name", [*PACKED, "offload", "all"])
def test_any_tier_is_taken_by_the_text_encoder_alone(
    pico_folder: Path, pico: pipeline.Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing is quantised, so bitsandbytes is not needed, and answers are those of the whole model."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    alone = pipeline.load(pico_folder, device="cpu", tier=name, text_alone=True)
    questions = ["What is my favourite toy?", "What is the pride of our collection?"]
    assert [mokus.ask(alone, each) for each in questions] == [mokus.ask(pico, each) for each in questions]


def test_a_full_memory_names_a_tier_that_needs_less_of_what_is_loaded() -> None:
    lower = {
        (loaded, task): memory.below(memory.tier("all"), ["text_encoder"], loaded, task)
        for loaded in (COMPONENTS, TEXT_ALONE)
        for task in ("generate", "bind")
    }
    assert {key: each.name if each else None for key, each in lower.items()} == {
        (COMPONENTS, "generate"): "staged", (COMPONENTS, "bind"): "staged",
        (TEXT_ALONE, "generate"): "offload", (TEXT_ALONE, "bind"): None,
    }  # fmt: skip
    with (
        pytest.raises(MokusError, match=r"none below it needs less .* --device cpu computes without a GPU"),
        memory.told(memory.tier("all"), torch.device("cuda"), ["text_encoder"], TEXT_ALONE, "bind"),
    ):
        raise torch.OutOfMemoryError


# --- a quantised text encoder, which a user may bring ---------------------------------------------------------


@pytest.fixture
def packed_encoder(pico_of_my_own: pipeline.Model) -> Iterator[pipeline.Model]:
    memory.quantise(pico_of_my_own.pipe.text_encoder.model.language_model.layers, 4, torch.device("cpu"))
    yield pico_of_my_own


def test_edits_are_applied_beside_quantised_weights_and_gone_without_a_trace(packed_encoder: pipeline.Model) -> None:
    encoder, shifts = packed_encoder.pipe.text_encoder, random_shifts(packed_encoder)
    before = pipeline.encode(packed_encoder, ["a toy"])[0]
    with applied(encoder, shifts):
        inside = pipeline.encode(packed_encoder, ["a toy"])[0]
    assert not torch.equal(before, inside)
    assert torch.equal(before, pipeline.encode(packed_encoder, ["a toy"])[0])
    path, shift = next(iter(shifts.items()))
    x = torch.randn(3, encoder.get_submodule(path).in_features)
    base = encoder.get_submodule(path)(x)
    with applied(encoder, {path: shift}):
        assert torch.allclose(encoder.get_submodule(path)(x) - base, x @ shift.dense().T, atol=1e-4)


def test_edits_are_neither_found_in_quantised_weights_nor_added_to_them(packed_encoder: pipeline.Model) -> None:
    settings = EditSettings(layers=[1], modules=["mlp.up_proj"])
    with pytest.raises(MokusError, match=r"'mlp.up_proj' is quantised.*bfloat16"):
        module_paths(packed_encoder, settings)
    linear = packed_encoder.pipe.text_encoder.model.language_model.layers[1].mlp.up_proj
    shift = LowRankShift(torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1))
    path = "model.language_model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match="quantised"), merged(packed_encoder.pipe.text_encoder, {path: shift}):
        pass


# --- a full memory ---------------------------------------------------------


@pytest.mark.parametrize(
    "name, stage, task, expected",
    [
        ("all", ["transformer"], "learn", "--tier selective'"),
        ("all", ["transformer", "vae"], "generate", "--tier staged'"),  # nothing is kept for a backward pass
        ("all", ["text_encoder"], "generate", "--tier staged'"),
        ("staged", ["transformer"], "learn", "--tier 8bit'"),
        ("staged", ["text_encoder"], "generate", "--tier offload'.*only generate"),  # which is never in few bits
        ("staged", ["text_encoder"], "bind", "none below it needs less.*--device cpu"),
        ("staged", ["vae"], "generate", "none below it needs less"),
        ("4bit", ["transformer", "vae"], "generate", "--tier offload'.*only generate"),
        ("4bit", ["transformer"], "learn", "none below it needs less"),
        ("offload", ["transformer", "vae"], "generate", "none below it needs less"),
    ],
)
def test_a_full_gpu_names_the_next_tier_that_needs_less(name: str, stage: list[str], task: str, expected: str) -> None:
    with (
        pytest.raises(MokusError, match=expected) as raised,
        memory.told(memory.tier(name), torch.device("cuda:0"), stage, task=task),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_a_full_host_is_told_and_other_errors_are_left_alone(pico: pipeline.Model) -> None:
    with pytest.raises(MokusError, match="mokus doctor"), pico.resident("vae"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), pico.resident("vae"):
        torch.ones(2, 3) @ torch.ones(2, 3)


# --- choosing ---------------------------------------------------------


@pytest.mark.parametrize("chosen", PACKED)
def test_a_missing_library_is_told_before_anything_is_loaded(
    chosen: str, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", read)
    with pytest.raises(MokusError, match=rf"'{chosen}' needs bitsandbytes.*pip install 'mokus\[quantise\]'"):
        pipeline.load(pico_folder, device="cpu", tier=chosen)
    monkeypatch.setattr(pipeline, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(pipeline, "_fitting", lambda *_: memory.tier(chosen))  # by itself, on a card that it fits
    with pytest.raises(MokusError, match="needs bitsandbytes"):
        pipeline.load(pico_folder)


def test_a_tier_by_name(pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline.load(pico_folder, device="cpu").tier is memory.CPU
    monkeypatch.setenv(memory.VARIABLE, "staged")
    assert pipeline.load(pico_folder, device="cpu").tier.name == "staged"
    with pytest.raises(MokusError, match=r"no memory tier 'huge', expected one of all, .*cpu"):
        pipeline.load(pico_folder, device="cpu", tier="huge")


def test_the_option_holds_for_one_command(pico_folder: Path, tmp_path: Path) -> None:
    before = os.environ.get(memory.VARIABLE)
    asked = ["ask", "What is it?", "--model", str(pico_folder), "--device", "cpu"]
    assert CliRunner().invoke(app, ["--tier", "offload", *asked]).exit_code == 0
    assert os.environ.get(memory.VARIABLE) == before
    wrong = CliRunner().invoke(app, ["--tier", "huge", *asked])
    assert wrong.exit_code == 2 and "no memory tier 'huge'" in wrong.output
    pack = tmp_path / "a.pack"
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (300, 300), (9, 99, 9)).save(photos / "a.png")
    learning = ["learn", str(photos), "--anchor", "sks toy", "-o", str(pack), "--model", str(pico_folder)]
    refused = CliRunner().invoke(app, ["--tier", "offload", *learning, "--device", "cpu"])
    assert refused.exit_code == 2 and "can only generate" in refused.output and not pack.exists()
