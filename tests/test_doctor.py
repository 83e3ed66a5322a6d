"""The doctor's estimates against real tensors of the pico model, PyTorch's counter and an H200; and its command."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import doctor as bench
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mokus import cli, memory, pipeline, qwen_image
from mokus.backbone import COMPONENTS, TEXT_ALONE
from mokus.cli import app
from mokus.doctor import machine, rehearsal
from mokus.doctor import plan as doctor
from mokus.doctor.flops import TOKENS, image_flops, text_flops
from mokus.doctor.machine import GIB, Machine
from mokus.doctor.shape import PUBLISHED, Shape
from mokus.errors import MokusError
from mokus.miniature import tokenizer
from mokus.pipeline import Defaults
from mokus.settings import EditSettings, LearnSettings

from . import pico_backbones

TARGETS = LearnSettings().targets


@pytest.fixture(scope="module")
def published() -> Shape:
    return Shape.of(PUBLISHED)


@pytest.fixture(scope="module")
def small(pico_folder: Path) -> Shape:
    """Pico's shape, with edits of a layer that it has."""
    return Shape.of(str(pico_folder), Defaults(size=32, steps=2, edit={"layers": [1, 2]}))


def card(gib: float) -> Machine:
    return Machine("a card", gib * GIB, None, None, None)


# --- weights ---------------------------------------------------------


def test_qwen_image_s_numbers_with_its_whole_vision_tower(published: Shape) -> None:
    assert published.parameters["transformer"] == qwen_image.TRANSFORMER_PARAMETERS
    assert published.parameters["text_encoder"] == qwen_image.TEXT_ENCODER_PARAMETERS == 8_292_166_656
    assert published.patch == 16 and published.width == 3072


def test_bytes_of_weights_are_those_of_the_model_loaded(small: Shape, pico: pipeline.Model) -> None:
    loaded = {name: sum(p.nbytes for p in getattr(pico.pipe, name).parameters()) for name in COMPONENTS}
    assert small.weights(memory.CPU, torch.float32) == loaded


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_in_few_bits_are_those_of_bitsandbytes(published: Shape, bits: int) -> None:
    """Of a matrix of Qwen-Image's width: what it holds, its scales included."""
    linear = torch.nn.Linear(3072, 3072, bias=False, dtype=torch.bfloat16)
    holder = torch.nn.ModuleList([linear])
    memory.quantise(holder, bits, torch.device("cpu"))
    weight: Any = holder[0].weight
    if bits == 4:
        state = weight.quant_state
        held = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    else:
        held = weight.nbytes
    name = f"{bits}bit"
    saved = published.weights(memory.tier("staged"), torch.bfloat16)["transformer"]
    saved -= published.weights(memory.tier(name), torch.bfloat16)["transformer"]
    assert saved / published.matrices == pytest.approx(2 - held / 3072**2, rel=1e-3)


# --- FLOPs ---------------------------------------------------------


@pytest.mark.parametrize("backward, checkpointed", [(False, False), (True, False), (True, True)])
def test_flops_are_those_of_pytorch_s_counter_at_real_width(
    published: Shape, backward: bool, checkpointed: bool
) -> None:
    """In two blocks, of which one is the first and one the last, and so have less to do in the backward pass."""
    shape = published.with_layers(2)
    bare = shape.build("transformer", torch.bfloat16)
    counted = bench.counted(bare, (2, 64, TOKENS, TARGETS, 4, backward, checkpointed))
    estimated = image_flops(shape, 2, 1024, backward=backward, again=float(checkpointed))
    scores_anew = backward * 2 * 0.5 * 2 * 4 * 3072 * (64 * 64 + TOKENS) ** 2  # which the plain kernel keeps
    assert estimated - scores_anew == pytest.approx(counted, rel=0.01)


def test_flops_of_the_text_encoder(small: Shape, pico: pipeline.Model) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rehearsal.reading(pico.pipe.text_encoder, 3, 20)
    tokens = rehearsal.PREFIX_TOKENS + 3 * 20
    scores = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in scores.items() if "attention" not in str(kind) and "bmm" not in str(kind))
    assert text_flops(small, tokens) == pytest.approx(products, rel=1e-6)


# --- memory beside the weights ---------------------------------------------------------


def real_peak(pico: pipeline.Model, checkpointed: bool) -> int:
    """Of a training step with contents, by the same tally."""
    transformer = pipeline.load(pico.id, device="cpu").pipe.transformer

    def watched(*modules: torch.nn.Module) -> rehearsal.Tally:
        return rehearsal.Tally(modules)

    return int(rehearsal.stepped(transformer, 2, 8, 11, TARGETS, 4, True, checkpointed, watched).peak)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_rehearsed_training_step_takes_what_a_real_one_does(
    small: Shape, pico: pipeline.Model, checkpointed: bool
) -> None:
    bare = small.build("transformer", torch.float32)
    rehearsed = rehearsal.stepped(bare, 2, 8, 11, TARGETS, 4, True, checkpointed).peak
    assert rehearsed == pytest.approx(real_peak(pico, checkpointed), rel=0.03)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_more_blocks_follow_in_a_line(small: Shape, checkpointed: bool) -> None:
    def bare(n: int) -> Any:
        return small.with_layers(n).build("transformer", torch.float32)

    given = (2, 8, 11, TARGETS, 4, True, checkpointed)
    assert rehearsal.image_step(bare, 7, *given).peak == pytest.approx(
        rehearsal.stepped(bare(7), *given).peak, rel=1e-3
    )


def test_more_edited_layers_follow_in_a_line(small: Shape) -> None:
    def bare(n: int) -> Any:
        return small.with_layers(text_layers=n).build("text_encoder", torch.float32)

    modules = EditSettings().modules
    several = rehearsal.evaluated(bare(5), 5, modules, 6, 9).peak
    assert rehearsal.edit(bare, 5, 0, modules, 6, 9).peak == pytest.approx(several, rel=1e-3)


def test_checkpointing_holds_less_and_selective_something_between(small: Shape) -> None:
    several = small.with_layers(8)
    every, some, none = (
        doctor.need(several, "learn", memory.tier(name), 128, 1, torch.float32).stages[-1].beside
        for name in ("all", "selective", "checkpointed")
    )
    assert none < some < every


# --- an H200 ---------------------------------------------------------


def test_the_h200_s_memory_and_flops_at_full_size() -> None:
    rows = list(bench.full_size())
    assert len(rows) == 1 + 4 * 4 + 4
    assert rows[0]["estimated"] == rows[0]["measured"]  # bytes of weights
    for row in rows:
        assert abs(row["error"]) <= bench.WANTED, row
        if row["what"].endswith("peak memory"):
            assert abs(row["error"]) < 0.02, row


# --- plans ---------------------------------------------------------


@pytest.mark.parametrize("gib, name", [(24, "4bit"), (48, "staged"), (80, "selective"), (140, "all")])
def test_learning_at_1024_pixels_fits(published: Shape, gib: float, name: str) -> None:
    plan = doctor.plan(published, "learn", card(gib), 1024)
    assert plan.chosen is not None and plan.chosen.tier.name == name
    assert plan.chosen.peak * doctor.MARGIN + doctor.CONTEXT <= gib * GIB
    assert plan.below is None or plan.below.peak < plan.chosen.peak


def test_the_next_tier_down_is_one_that_needs_less(published: Shape) -> None:
    """Binding loads the text encoder alone, and needs as much in all tiers."""
    binding = doctor.plan(published, "bind", card(24))
    assert binding.chosen is not None and binding.chosen.tier.name == "all" and binding.below is None
    drawing = doctor.plan(published, "generate", card(80))
    assert drawing.below is not None and drawing.below.tier.name == "staged"


def test_a_smaller_card_never_gets_a_larger_tier(published: Shape) -> None:
    order = [tier.name for tier in memory.TIERS]
    found = []
    for gib in (140, 90, 80, 60, 48, 40, 32, 24, 18):
        chosen = doctor.plan(published, "learn", card(gib), 1024).chosen
        found.append(order.index(chosen.tier.name) if chosen else len(order))
    assert found == sorted(found)


def test_nothing_fits_a_tiny_card(published: Shape) -> None:
    plan = doctor.plan(published, "learn", card(8), 1024)
    assert plan.chosen is None and plan.as_json()["tier"] is None
    with pytest.raises(MokusError, match="in any memory tier"):
        doctor.fitting(published, 4 * GIB, torch.bfloat16)


def test_a_full_host_counts_as_well(small: Shape) -> None:
    roomy = Machine("CPU", None, 64 * GIB, None, 0.02)
    assert (chosen := doctor.plan(small, "learn", roomy).chosen) is not None and chosen.tier is memory.CPU
    assert doctor.plan(small, "learn", replace(roomy, host=float(1 << 20))).chosen is None


@pytest.mark.parametrize("gib", [4, 79])
def test_too_little_host_memory_changes_no_command_s_tier(published: Shape, gib: float) -> None:
    """A command chooses by the GPU alone, and `usual` with the host's memory says what it chooses."""
    short = replace(card(gib), host=32 * GIB)
    found = doctor.usual(published, short)
    assert found == doctor.usual(published, card(gib))
    if found:
        assert found is doctor.fitting(published, gib * GIB, torch.bfloat16)
    assert doctor.plan(published, "generate", short).chosen is None


def test_a_small_model_needs_no_plan_and_a_large_one_is_planned(small: Shape, published: Shape) -> None:
    assert doctor.fitting(small, 8 * GIB, torch.bfloat16) is memory.TIERS[0]
    assert doctor.fitting(published, 79 * GIB, torch.bfloat16).name == "selective"
    assert doctor.fitting(published, 24 * GIB, torch.bfloat16).name == "4bit"  # all three tasks
    # the encoder alone fits as long as gate and up share moments
    assert doctor.fitting(published, 24 * GIB, torch.bfloat16, TEXT_ALONE).name == "all"
    assert doctor.fitting(published, 12 * GIB, torch.bfloat16, TEXT_ALONE).name == "offload"  # it can still be asked


def test_binding_needs_the_memory_of_the_text_encoder_alone(published: Shape) -> None:
    encoder = published.parameters["text_encoder"] * 2
    everything = sum(published.parameters.values()) * 2
    (plan,) = {doctor.plan(published, "bind", card(gib)).needs for gib in (24, 80)}
    for need in plan[:-1]:  # of the GPU
        assert need.peak < encoder + 5 * GIB and need.host == encoder + doctor.PYTHON
    whole = doctor.need(published, "bind", memory.tier("all"), 1024, 8, torch.bfloat16)  # in Python, of a whole model
    assert whole.peak - plan[0].peak == everything - encoder and whole.host == everything + doctor.PYTHON
    assert doctor.plan(published, "bind", replace(card(24), host=24 * GIB)).chosen == plan[0]
    short = doctor.plan(published, "generate", replace(card(24), host=24 * GIB))
    assert short.chosen is None


def test_eight_images_of_1024_pixels_are_planned_and_drawn_where_one_is(published: Shape) -> None:
    """What `mokus generate` draws at a time by default is what the doctor plans with by default."""
    (generate, plan) = (inspect.signature(each).parameters for each in (cli.generate, doctor.plan))
    assert generate["batch_size"].default == plan["batch"].default == 8
    given: tuple[Any, ...] = (published, "generate", memory.tier("staged"), 1024)
    one, eight = (doctor.need(*given, batch, torch.bfloat16) for batch in (1, 8))
    assert one.peak < eight.peak < one.peak + GIB / 4
    for stage in eight.stages:
        assert stage.beside < 5 * GIB, stage


@pytest.mark.parametrize(
    "task, size, words",
    [("paint", 32, "learn, bind, generate"), ("learn", 33, "multiple of"), ("learn", 8208, "at most 8192")],
)
def test_what_cannot_be_planned(small: Shape, task: str, size: int, words: str) -> None:
    with pytest.raises(MokusError, match=words):
        doctor.plan(small, task, card(1), size)


def shallow() -> Shape:
    """Qwen-Image with 12 layers in its text encoder, of which 18 to 25 would be edited."""
    return Shape.of(PUBLISHED).with_layers(text_layers=12)


def test_edits_of_layers_that_are_not_there_are_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, that of `bind`; the other tasks are planned, and a command's tier is theirs."""
    words = "layer 18 is to be edited, but the text encoder has layers 0 to 11"
    with pytest.raises(MokusError, match=words):
        doctor.plan(shallow(), "bind", card(79))
    tier = doctor.fitting(shallow(), 79 * GIB, torch.bfloat16)
    assert tier.name == "selective"
    assert doctor.need(shallow(), "learn", tier, 1024, 8, torch.bfloat16).fits_gpu(card(79))
    with_12 = shallow()
    monkeypatch.setattr(Shape, "of", lambda *_: with_12)
    result = run("--task", "bind", "--gpu-memory", "79")
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert run("--task", "generate", "--gpu-memory", "79").exit_code == 0


def test_edits_of_modules_that_are_not_there_are_no_plan(small: Shape) -> None:
    odd = replace(small, defaults=Defaults(size=32, edit={"layers": [1], "modules": ["mlp.nothing"]}))
    with pytest.raises(MokusError, match="99"):  # what the folder says of the editor counts, as it does for bind
        doctor.check_bind(replace(small, defaults=Defaults(size=32, editors={"least_drift": {"layers": [99]}})))
    with pytest.raises(MokusError, match=r"'mlp\.nothing' is no module"):
        doctor.plan(odd, "bind", card(1))


def test_previews_are_drawn_beside_what_learning_holds(published: Shape) -> None:
    """With the VAE, and the LoRA's gradient and moments where they are in a training step."""
    often = replace(published, defaults=replace(published.defaults, learn={"preview_every": 10}))
    given: tuple[Any, ...] = ("learn", memory.tier("staged"), 1024, 1, torch.bfloat16)
    without, with_previews = (doctor.need(shape, *given).stages for shape in (published, often))
    assert with_previews[:-1] == without
    drawing = doctor.need(published, "generate", *given[1:])
    assert with_previews[-1].resident == ("transformer", "vae")
    assert drawing.peak < with_previews[-1].peak < drawing.peak + GIB


def test_what_must_stay_is_on_the_host_twice_as_it_is_joined(published: Shape) -> None:
    """Points of 4096 tokens with 64 channels, each with a velocity, in float32."""
    settings = LearnSettings()
    points = settings.prior_prompts * (settings.prior_steps + settings.prior_steps // 2)
    given: tuple[Any, ...] = (memory.tier("staged"), 1024, 1, torch.bfloat16)
    learn, generate = (doctor.need(published, task, *given).host for task in ("learn", "generate"))
    assert learn - generate == 2 * points * 2 * 4096 * 64 * 4


# --- this machine ---------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("memory.max", "1048576\n", 2**20),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "2097152\n", 2**21),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),  # as version 1 says that there is no limit
        ("unknown", "1", None),
    ],
)
def test_host_memory_is_what_the_container_may_take(
    name: str, text: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "cpu_tflops", lambda: 1.0)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.this_machine(torch.device("cpu")).host == (expected or whole)


# --- the command ---------------------------------------------------------


def run(*given: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *given])


def test_the_command_plans_for_a_machine_that_is_not_here() -> None:
    result = run("--model", PUBLISHED, "--task", "learn", "--gpu-memory", "24", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert (found["tier"], found["next_tier"], found["resolution"]) == ("4bit", None, 1024)
    assert found["machine"]["gpu"] == 24 and found["seconds"] is None
    assert max(each["peak_gib"] for each in found["stages"]) == next(
        each["gpu_gib"] for each in found["tiers"] if each["tier"] == "4bit"
    )
    assert next(each["tier"] for each in found["tiers"] if each["fits"]) == "4bit"
    none = run("--model", PUBLISHED, "--task", "learn", "--gpu-memory", "8")
    assert none.exit_code == 1 and "fits in no tier" in none.stdout


def test_the_command_says_which_tiers_are_taken() -> None:
    given = ["--model", PUBLISHED, "--task", "bind", "--task", "generate", "--gpu-memory"]
    found = json.loads(run(*given, "24", "--json").stdout)
    assert [(each["tier"], each["usual_tier"]) for each in found] == [("all", "all"), ("4bit", "4bit")]
    told = run(*given, "24").stdout
    assert "all to 4bit" in told and "all to checkpointed" in told  # what needs the same is one line
    assert "commands that draw or learn take tier 4bit" in told and "commands that bind or ask take tier all" in told
    found = json.loads(run(*given, "12", "--json").stdout)
    assert [(each["tier"], each["usual_tier"]) for each in found] == [(None, "offload"), ("offload", "offload")]
    assert "commands that ask take tier offload; to bind, take --device cpu" in " ".join(
        run(*given, "12").stdout.split()
    )
    assert "no command that is to draw or learn runs" in run(*given, "4").stdout


def test_too_little_host_memory_is_a_warning_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--model", PUBLISHED, "--task", "generate", "--device", "cpu"]
    for host, warned in ((32, True), (100, False)):
        short = replace(card(79), host=host * GIB)
        monkeypatch.setattr(machine, "this_machine", lambda *_, short=short: short)
        result = run(*given)
        told = " ".join(result.stdout.split())
        assert result.exit_code == int(warned), told
        assert "commands that draw or learn take tier selective" in told
        assert (
            ("of host memory, and there are 32.0 GiB" in told)
            == ("fits in no tier, too little host memory" in told)
            == warned
        )
        (found,) = json.loads(run(*given, "--json").stdout)
        assert found["usual_tier"] == "selective" and found["tiers"][1]["fits_host"] is not warned


def test_a_tier_whose_library_is_not_installed_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--model", PUBLISHED, "--task", "learn", "--gpu-memory", "24"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (found,) = json.loads(run(*given, "--json").stdout)
    assert [each["tier"] for each in found["tiers"] if each["lacks"]] == ["8bit", "4bit"]
    told = run(*given).stdout
    assert told.count("lacks") == 2 and "not installed: bitsandbytes; pip install 'mokus[quantise]'" in told
    assert "lacks" not in run("--model", PUBLISHED, "--task", "bind", "--gpu-memory", "24").stdout  # nor needs it
    monkeypatch.undo()
    told = run(*given).stdout
    assert "lacks" not in told and "quantise" not in told


def test_the_command_plans_for_this_machine(pico_folder: Path) -> None:
    result = run("--model", str(pico_folder), "--device", "cpu", "--task", "generate", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["tier"] == "cpu" and 0 < found["seconds"] < 60 and found["machine"]["host"] > 1
    assert found["usual_tier"] == "cpu"
    told = run("--model", str(pico_folder), "--device", "cpu", "--task", "generate")
    assert told.exit_code == 0 and "generate at 32 pixels: tier cpu" in told.stdout


@pytest.mark.parametrize("family", sorted(pico_backbones.MAKERS))
def test_other_families_are_not_planned_yet_which_is_one_sentence(family: str, tmp_path: Path) -> None:
    folder = pico_backbones.save(family, tokenizer.build(), tmp_path / family)
    result = run("--model", str(folder), "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert "planned only for Qwen-Image's" in " ".join(result.output.split()) and "'staged'" in result.output


@pytest.mark.parametrize(
    "name, config, words",
    [
        ("transformer", "[1]", "holds no JSON object"),
        ("transformer", "{}", "num_layers of the transformer"),
        ("transformer", {"num_layers": "two"}, "num_layers of the transformer"),
        ("transformer", {"num_layers": 0}, "num_layers of the transformer"),
        ("transformer", {"axes_dims_rope": []}, "the config of transformer"),
        ("transformer", {"in_channels": -1}, "the config of transformer"),
        ("transformer", {"in_channels": 48}, "in_channels"),
        ("transformer", {"axes_dims_rope": [4, 6, 8]}, "expected 18 by the axes_dims_rope"),
        ("transformer", {"attention_head_dim": 30}, "attention_head_dim"),
        ("transformer", {"joint_attention_dim": 128}, "expected 192 by the text encoder's width"),
        ("text_encoder", {"text_config": {"hidden_size": 192, "num_key_value_heads": 5}}, "the text encoder's"),
        ("vae", {"z_dim": 12}, "by the vae's z_dim"),
        ("text_encoder", {"vision_config": None}, "vision_config of the text encoder"),
        ("text_encoder", {"text_config": [1]}, "text_config of the text encoder"),
        ("text_encoder", {"image_token_id": "x"}, "the config of text_encoder"),
        ("vae", "null", "holds no JSON object"),
        ("vae", {"base_dim": "x"}, "the config of vae"),
    ],
)
def test_damaged_configs_are_one_sentence(
    name: str, config: str | dict[str, Any], words: str, pico_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pico_folder, tmp_path / "damaged", ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / name / "config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps({**whole, **config}) if isinstance(config, dict) else config
    file.write_text(text, encoding="utf-8")
    result = run("--model", str(folder), "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(
    "given, words",
    [
        (["--resolution", "10000000"], "at most 8192 pixels"),
        (["--batch-size", "10000000000"], "Invalid value for '--batch-size'"),
        (["--task", "paint"], "--task got 'paint'"),
        (["--gpu-memory", "-3"], "--gpu-memory got -3"),
        (["--gpu", "H100"], "goes with --gpu-memory"),
        (["--gpu-memory", "24", "--device", "cuda"], "leave one out"),
        (["--model", "/nowhere/to/be/found"], "the configs of"),
    ],
)
def test_mistakes_are_one_sentence(given: list[str], words: str) -> None:
    result = run(*given)
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
