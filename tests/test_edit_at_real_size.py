"""The benchmark at real size compares two forms of the same edit: both see, and make, the same. On a tiny configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import typer
from benchmarks import edit_at_real_size as job
from torch import Tensor
from typer.testing import CliRunner

from mokus.low_rank import LowRankShift, applied

LAYERS = 5
TINY = {
    **job.TEXT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
}  # fmt: skip
KEYS = {
    "solve_ratio", "step_ratio", "size_ratio", "error_ours", "error_reference", "seconds_per_knowledge", "peak_memory_gib",
    "lost_by_bf16", "missed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BLOCK", 10_007)
    monkeypatch.setattr(job, "WEIGHT_STD", 0.2)


@pytest.fixture
def model() -> Any:
    return job.built(TINY, torch.float32)


@pytest.fixture
def questions() -> job.Asked:
    return job.asked(TINY["vocab_size"])


def once(model: Any, questions: job.Asked) -> job.Kept:
    return job.kept(model, job.prefix_cache(model, questions.ids[:1, : job.PREFIX]), questions)


def loss(model: Any, questions: job.Asked) -> float:
    with torch.no_grad():
        return questions.loss(model(input_ids=questions.ids).logits[:, -job.ANSWER :]).item()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for path, rows in ours.items():
        torch.testing.assert_close(rows, theirs[path], rtol=1e-3, atol=1e-4)


def test_the_paper_s_layers_of_28_and_the_same_share_of_fewer() -> None:
    assert job.edited_layers(28) == range(18, 26) and len(job.paths_of(28)) == 16
    for layers in range(2, 29):
        edited = job.edited_layers(layers)
        assert 1 <= len(edited) <= 8 and edited.start >= 0 and edited.stop < layers


def test_weights_are_random_and_no_row_comes_twice(model: Any) -> None:
    text = model.model.language_model
    weight = text.layers[0].mlp.gate_proj.weight
    assert weight.std().item() == pytest.approx(job.WEIGHT_STD, rel=0.1)
    assert len(weight.unique(dim=0)) == len(weight)
    assert not torch.equal(weight, text.layers[1].mlp.gate_proj.weight)
    assert (text.norm.weight == 1).all() and text.rotary_emb.inv_freq[0] == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_both_forms_capture_the_same(model: Any, questions: job.Asked) -> None:
    ours = job.captured(model, once(model, questions), questions, {})
    theirs = job.captured_by_backward(model, questions)
    assert list(ours.inputs) == job.paths_of(LAYERS)
    assert_same(ours.inputs, theirs.inputs)
    assert_same(ours.gradients, theirs.gradients)
    assert all(len(rows) == job.QUESTIONS * job.ANSWER for rows in ours.inputs.values())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_later_step_captures_what_the_edited_model_does_if_the_prefix_stays(model: Any, questions: job.Asked) -> None:
    paths = job.paths_of(LAYERS)
    sizes = {path: model.get_submodule(path).weight.shape for path in paths}
    shifts = {path: LowRankShift(torch.randn(2, i) * 0.3, torch.randn(o, 2) * 0.3) for path, (o, i) in sizes.items()}
    plain, prefix = once(model, questions), questions.ids[:1, : job.PREFIX]
    with applied(model, shifts):
        moved = job.kept(model, job.prefix_cache(model, prefix), questions)
        theirs = job.captured_by_backward(model, questions)
    ours = job.captured(model, moved, questions, shifts)
    assert_same(ours.inputs, theirs.inputs)
    assert_same(ours.gradients, theirs.gradients)
    torch.testing.assert_close(plain.states, moved.states)  # nothing below the first edited layer moves


def test_both_forms_solve_for_the_same_change() -> None:
    h, g = torch.randn(9, 40), torch.randn(9, 24)
    (ours,) = job.thin(h, [g], eta=0.1)
    assert ours.rank == 9
    assert job.relative(ours.dense(), job.dense(h.double(), g.double(), eta=0.1)) < 1e-6
    mine, theirs = job.errors(h, g)
    assert mine < 1e-6 and theirs < 1e-3


def test_gate_and_up_share_one_solve(model: Any, questions: job.Asked) -> None:
    seen = job.captured(model, once(model, questions), questions, {})
    shifts = job.thin_of_all(seen.inputs, seen.gradients)
    gate, up = (shifts[path] for path in list(shifts)[:2])
    assert gate.A is up.A
    for path, shift in shifts.items():
        exact = job.dense(seen.inputs[path].double(), seen.gradients[path].double())
        assert job.relative(shift.dense(), exact) < 1e-6


def test_either_form_makes_the_answer_likelier(model: Any, questions: job.Asked) -> None:
    before = loss(model, questions)
    seen = job.captured(model, once(model, questions), questions, {})
    shifts = job.thin_of_all(seen.inputs, seen.gradients, eta=1e-3)
    with applied(model, shifts):
        ours = loss(model, questions)
    assert loss(model, questions) == before
    for path, h in seen.inputs.items():
        job.add_to_weight(model.get_submodule(path), job.dense(h, seen.gradients[path], eta=1e-3))
    assert ours < before and loss(model, questions) == pytest.approx(ours, rel=1e-4)


def test_steps_add_up_at_the_rank_of_one() -> None:
    h = torch.randn(4, 8)
    first, second = ({"m": job.thin(h, [torch.randn(4, 6)])[0]} for _ in range(2))
    total = job.sum_of(job.sum_of({}, first), second)["m"]
    assert total.rank == 4
    torch.testing.assert_close(total.dense(), first["m"].dense() + second["m"].dense())


def test_bf16_rounds_small_changes_away() -> None:
    weight = torch.empty(200, 300).normal_(0, 0.02).bfloat16()
    shares = [job.lost(weight, torch.empty(200, 300).normal_(0, std)) for std in (1e-2, 1e-4, 1e-5)]
    assert shares[0] < 0.02 < shares[1] < shares[2] <= 1.5
    assert job.lost(weight.float(), torch.empty(200, 300).normal_(0, 1e-5)) < 1e-3


def test_bytes_are_those_of_the_file() -> None:
    shift = LowRankShift(torch.randn(3, 100), torch.randn(200, 3))
    size = job.sizes({"a": shift, "b": LowRankShift(shift.A, shift.B + 1)})
    assert 2 * shift.nbytes < size["ours"] < 2 * shift.nbytes + 1000
    assert size["dense bfloat16"] == 2 * 200 * 100 * 2 and size["dense float32"] == 2 * size["dense bfloat16"]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_all_figures(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "TEXT", TINY)
    result = CliRunner().invoke(app(), ["--layers", str(LAYERS), *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if not as_json:
        assert "solve_ratio" in result.stdout and "lost_by_bf16, one step" in result.stdout
        return
    figures = json.loads(result.stdout)
    assert figures.keys() >= KEYS and figures["layers"] == LAYERS and figures["matrices"] == 2
    assert figures["error_ours"] < 1e-6
    assert figures["difference_inputs"] < 0.1  # bf16
    assert set(figures["missed"]) <= set(job.WANTED)


@pytest.mark.parametrize("layers", ["0", "1", "29", "-3"])
def test_an_impossible_number_of_layers_is_one_sentence(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "built", lambda *_: pytest.fail("nothing is built"))
    result = CliRunner().invoke(app(), ["--layers", layers])
    assert result.exit_code == 2
    assert result.stderr == f"mokus: --layers got {layers}, expected 2 to 28.\n" and not result.stdout


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.os, "sysconf", lambda _: 2**16)  # 4 GiB
    result = CliRunner().invoke(app(), [])
    assert result.exit_code == 2 and "needs about" in result.stderr and len(result.stderr.splitlines()) == 1


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(job.main)
    return made
