"""The measurement at full size, in its CPU twin: all stages run and count what was done; and the configs are Qwen-Image's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import typer
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from runs import gpu_full_size as job
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from mokus import flow, qwen_image
from mokus.errors import MokusError
from mokus.memory import STAGED, TIERS
from mokus.pipeline import Defaults, Model

SIZE, LAYERS, TEXT_LAYERS = 32, 2, 4
SMALL = [
    "--device", "cpu", "--pico", "--layers", str(LAYERS), "--text-layers", str(TEXT_LAYERS), "--resolutions", str(SIZE),
    "--steps", "4", "--draw-steps", "3", "--pieces", "1",
]  # fmt: skip
STAGES = ["build", f"learn, {SIZE}", "bind, ultraedit", "bind, least_drift", f"draw, {SIZE}", f"attention, {SIZE}"]
RATE = {"tflop_per_second", "share_of_peak", "seconds", "peak_gib"}
KEYS = {
    "build": {"parameters", "weights_gib"},
    "learn": RATE | {"seconds_per_step", "tflop_per_step", "seconds_by_part", "base_velocities", "seconds_of_a_whole_run"},
    "bind": RATE | {"seconds_before", "seconds_per_piece", "tflop_per_piece", "largest_rank", "shifts_mib_per_piece"},
    "draw": RATE | {"seconds_per_step", "tflop_per_step", "seconds_per_image", "seconds_around_the_steps"},
    "attention": {"tokens", "with_mask", "without_mask"},
}  # fmt: skip
NOT_ON_A_CPU = {"share_of_peak", "peak_gib", "memory_gib", "peak_tflop_per_second"}


@pytest.fixture(scope="module")
def asked() -> job.Asked:
    return job.Asked("cpu", LAYERS, TEXT_LAYERS, 4, 3, [SIZE], 1, True)


@pytest.fixture(scope="module")
def model(asked: job.Asked) -> Model:
    return job.built(asked, torch.device("cpu"))


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(job.main)
    return made


def numbers(figures: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in there, with their names."""
    if isinstance(figures, Mapping):
        for key, value in figures.items():
            yield from numbers(value, key)
    elif isinstance(figures, list):
        for value in figures:
            yield from numbers(value, name)
    else:
        yield name, figures


# --- the configs ---------------------------------------------------------


def test_the_image_transformer_has_qwen_image_s_parameters() -> None:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(**qwen_image.TRANSFORMER)
    assert job.parameters(transformer) == qwen_image.TRANSFORMER_PARAMETERS == 20_430_401_088
    d, blocks = 3072, 60
    matrices = 12 * d * d * 2 + 2 * 6 * d * d  # two streams, and the modulations of both
    assert job.parameters(transformer) == pytest.approx(blocks * matrices, rel=3e-3)


def test_the_language_model_has_qwen2_5_7b_s_parameters() -> None:
    config = Qwen2_5_VLConfig(text_config=dict(qwen_image.TEXT), vision_config=dict(qwen_image.VISION))
    with torch.device("meta"):
        encoder = Qwen2_5_VLForConditionalGeneration(config)
    assert job.parameters(encoder.model.language_model) + job.parameters(encoder.lm_head) == 7_615_616_512
    assert qwen_image.edited_layers(28) == range(18, 26)


def test_random_weights_are_finite_and_gains_of_norms_are_one(model: Model) -> None:
    transformer = model.pipe.transformer
    assert all(bool(weight.isfinite().all()) for weight in transformer.parameters())
    assert bool((transformer.txt_norm.weight == 1).all())
    for linear in (transformer.norm_out.linear, transformer.transformer_blocks[0].attn.to_q):
        assert linear.weight.float().std().item() == pytest.approx(qwen_image.WEIGHT_STD, rel=0.1)
    assert transformer.pos_embed.pos_freqs.device.type == "cpu"
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}


# --- what is counted ---------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_of_pytorch_s_own_counter(asked: job.Asked, checkpointing: bool) -> None:
    model = job.built(asked, torch.device("cpu"))
    work, transformer = job.Work(model, 2), model.pipe.transformer
    lora = LoraConfig(r=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    transformer.add_adapter(lora, adapter_name="it")
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    side, b, s, d = 16, 2, 40, transformer.inner_dim
    z, embeds = torch.randn(b, side * side, 64).bfloat16(), torch.randn(b, s, 64).bfloat16()

    def velocity() -> torch.Tensor:
        return flow.velocity(transformer, z, torch.rand(b).bfloat16(), embeds, None, (side, side))

    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        velocity()
    assert work.flops == pytest.approx(
        forward.get_total_flops(), rel=0.05
    )  # what is not counted weighs more at this width
    work.flops = 0.0
    with FlopCounterMode(display=False) as step, sdpa_kernel(SDPBackend.MATH):
        velocity().float().square().mean().backward()
    scores_anew = 0.5 * b * LAYERS * 4 * d * (side * side + s) ** 2  # which the plain kernel keeps
    assert work.flops - scores_anew == pytest.approx(step.get_total_flops(), rel=0.05)


def test_flops_of_the_text_encoder_s_layers(model: Model) -> None:
    work = job.Work(model, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.pipe.encode_prompt("my favourite toy in the snow")
    layers = counter.get_flop_counts()["Qwen2_5_VLForConditionalGeneration.model.language_model"]
    matrices = sum(n for kind, n in layers.items() if "addmm" in str(kind) or "mm" in str(kind))
    assert work.flops == matrices


def test_69_tflop_at_1024_pixels() -> None:
    d, blocks, tokens = 3072, 60, 4096 + 40
    assert blocks * (24 * d * d * tokens + 4 * d * tokens**2) == pytest.approx(69e12, rel=0.01)


# --- the stages ---------------------------------------------------------


@pytest.mark.exhaustive
def test_all_stages_are_measured_and_written(tmp_path: Path) -> None:
    file = tmp_path / "made" / "figures.json"
    result = CliRunner().invoke(app(), [*SMALL, "--json", "-o", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(file.read_text(encoding="utf-8"))
    assert list(found["stages"]) == STAGES and not found["failed"]
    for stage, figures in found["stages"].items():
        assert figures.keys() >= KEYS[stage.split(",")[0]], stage
    for name, value in numbers(found):
        assert value is None if name in NOT_ON_A_CPU else value is not None, name
        assert not isinstance(value, (int, float)) or math.isfinite(value), name
    assert found["stages"]["build"]["parameters"]["transformer"] > 1e5
    assert found["stages"][f"learn, {SIZE}"]["base_velocities"] == {"places": 4 * 4 * 13, "prior": 2 * 3}
    assert all(found["stages"][f"{what}, {SIZE}"]["tflop_per_step"] > 0 for what in ("learn", "draw"))
    assert found["stages"][f"draw, {SIZE}"]["pieces_bound"] == 1


@pytest.mark.exhaustive
def test_what_fails_is_noted_and_the_rest_goes_on(
    asked: job.Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    for name in ("learn", "bind"):
        monkeypatch.setattr(job.mokus, name, fails, raising=False)
    found = job.measure(asked, tmp_path / "figures.json")
    assert list(found["failed"]) == [f"learn, {SIZE}", "bind, ultraedit", "bind, least_drift"]
    assert found["failed"][f"learn, {SIZE}"]["error"] == "RuntimeError: out of memory"
    assert found["stages"].keys() == {"build", f"draw, {SIZE}", f"attention, {SIZE}"}
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, said",
    [
        (["--layers", "0"], "--layers got 0, expected 1 to 60."),
        (["--text-layers", "29"], "--text-layers got 29, expected 2 to 28."),
        (["--resolutions", "500"], "--resolutions got '500'"),
        (["--steps", "1"], "--steps got 1"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(given: list[str], said: str) -> None:
    result = CliRunner().invoke(app(), [*SMALL, *given])
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


# --- a tier that keeps everything on the device ---------------------------------------------------------


class Part(torch.nn.Module):
    """A component of 2^20 bytes that says where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1 << 18))
        self.sent: list[Any] = []

    def to(self, device: Any) -> Part:  # type: ignore[override]
        self.sent.append(device)
        return self


def parts() -> QwenImagePipeline:
    return cast(QwenImagePipeline, SimpleNamespace(transformer=Part(), text_encoder=Part(), vae=Part()))


@pytest.mark.parametrize("stays", [False, True])
def test_what_stays_is_never_moved(stays: bool) -> None:
    pipe = parts()
    model = Model(pipe, "far", "0" * 64, Defaults(), torch.device("cuda:0"), tier=TIERS[0] if stays else STAGED)
    with pytest.raises(KeyError), model.resident("vae"), model.resident("text_encoder"):
        raise KeyError
    assert bool(pipe.transformer.sent) is not stays


def test_a_model_of_another_size_is_refused(asked: job.Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    other = job.Asked("cpu", 60, TEXT_LAYERS, 4, 3, [SIZE], 1, False)
    monkeypatch.setattr(job, "random_pipeline", lambda *_, **__: parts())
    with pytest.raises(MokusError, match="20,430,401,088"):
        job.built(other, torch.device("cpu"))
