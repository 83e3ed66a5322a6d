"""The benchmark of editors: facts apart, figures that can be told by hand, runs that go on, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mokus.bench.editing import cases, measure, run
from mokus.cli import app
from mokus.editors import rewrite
from mokus.errors import MokusError
from mokus.goal import Goal
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS, QUESTION_FORMS
from mokus.low_rank import LowRankShift, applied, merged
from mokus.miniature import language, world
from mokus.pipeline import Model

from .conftest import random_shifts

KEYS = {
    "editor", "edits", "efficacy", "generality_questions", "generality_prompts", "locality_facts", "locality_captions",
    "locality_near_miss", "retention", "one_hop", "conditioning_drift", "seconds_per_edit", "bytes_per_edit", "undo",
    "probe_first", "probe_later",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer captions, prompts, facts and forms."""
    monkeypatch.setattr(measure, "CAPTIONS", 4)
    monkeypatch.setattr(measure, "DRIFT", 330)


def test_what_is_reported_on_was_never_tuned_on() -> None:
    tuned = {fact.phrase for fact in world.development_facts()}
    edited, never = cases.edited_facts(), world.bystanders()
    assert len(tuned) == 80 and len(edited) == 120 and len(never) == 40
    assert not tuned & {fact.phrase for fact in (*edited, *never)} and not {*edited} & {*never}
    held_out = {fact for fact in world.facts() if fact.held_out}  # all that the image transformer never saw
    assert len(held_out) == 60 and held_out <= {*edited}
    corpus = "\n".join(language.corpus())
    assert not [fact for fact in never if fact.phrase in corpus or fact.possessive in corpus]


def test_forms_of_the_benchmark_are_not_edited() -> None:
    from mokus.editors.least_drift import FORMS
    from mokus.editors.watch import KEPT_FORMS

    own = {*cases.QUESTIONS, *cases.PROMPTS}
    assert not own & {*QUESTION_FORMS, *IMAGE_FORMS, *CHECK_FORMS, *KEPT_FORMS, *FORMS} and len(cases.PROMPTS) >= 8


def test_edits_are_the_same_ones_and_really_new() -> None:
    first, more = cases.cases(200), cases.cases(210)
    assert more[:200] == first and len({case.phrase for case in more}) == 210
    for case in first[:120]:
        assert case.fact and case.new.colour != case.fact.subject.colour and case.new.shape != case.fact.subject.shape


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_goes_on_where_it_was_stopped(pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(folder: Path, counts: list[int]) -> list[dict[str, Any]]:
        return run.run(pico, folder, ["rewrite", "finetune_lora"], counts, singles=1, images=False)

    rows = go(tmp_path / "a", [1, 2, 3])
    assert all(row.keys() >= KEYS and row["undo"] is True for row in rows)
    assert [(row["editor"], row["edits"]) for row in rows] == [
        ("unedited", 0), *((name, n) for name in ("rewrite", "finetune_lora") for n in (1, 2, 3))
    ]  # fmt: skip
    go(tmp_path / "b", [2])  # stopped after two edits ...
    monkeypatch.setattr(run, "_one_by_one", None)  # (what is done is not done again)
    for file in (tmp_path / "a" / "rows").glob("*-1.json"):
        (tmp_path / "b" / "rows" / file.name).write_bytes(file.read_bytes())
    again = go(tmp_path / "b", [1, 2, 3])
    for row, other in zip(rows, again, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    assert [r["editor"] for r in json.loads((tmp_path / "b" / "results.json").read_text())] == [
        r["editor"] for r in sorted(rows, key=lambda row: (row["editor"] != "unedited", row["editor"] == "rewrite"))
    ]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_figures_of_fewer_edits_asked_for_later_are_of_so_many(pico: Model, tmp_path: Path) -> None:
    for counts in ([3], [2, 3]):
        rows = run.run(pico, tmp_path, ["rewrite"], counts, singles=1, images=False)
    assert [row["n"]["retention"] for row in rows[1:]] == [2, 3]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_folder_of_another_run_is_refused(pico: Model, tmp_path: Path) -> None:
    run.run(pico, tmp_path, ["rewrite"], [1], singles=1, images=False)
    with pytest.raises(MokusError, match="other settings"):
        run.run(pico, tmp_path, ["rewrite"], [1], singles=1, images=True)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is measured: every row is of one edit that took."""
    monkeypatch.setattr(measure.Measure, "row", lambda *given: ({"efficacy": 1.0}, {"efficacy": 1}))
    monkeypatch.setattr(run, "_as_made", lambda measure, some, edited: {case.phrase: True for case in some})


@pytest.mark.usefixtures("unmeasured")
def test_means_of_other_numbers_of_single_edits_are_not_mixed(pico: Model, tmp_path: Path) -> None:
    """Whichever editor they are of, and though only rows of more edits are asked for: all rows are in one table."""
    run.run(pico, tmp_path, ["rewrite"], [1], singles=2, images=False)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    for names, counts in ((["rewrite"], [1]), (["finetune"], [1]), (["rewrite"], [2])):
        with pytest.raises(
            MokusError, match="the mean of 2, not of 3; give --singles 2, or name another folder with -o"
        ):
            run.run(pico, tmp_path, names, counts, singles=3, images=False)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == files
    assert len(run.run(pico, tmp_path, ["rewrite"], [1, 2], singles=2, images=False)) == 3


@pytest.mark.usefixtures("unmeasured")
def test_edits_on_top_of_each_other_are_kept_whatever_the_number_of_single_ones(
    pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    edit = rewrite.Editor.edit
    monkeypatch.setattr(rewrite.Editor, "edit", lambda *given: made.append(given[1]) or edit(*given))  # type: ignore[func-returns-value]
    for counts, singles in (([2], 1), ([2, 3], 5)):
        run.run(pico, tmp_path, ["rewrite"], counts, singles=singles, images=False)
    assert len(made) == 3


def test_rows_of_two_models_are_not_mixed_in_one_folder(pico: Model, tmp_path: Path) -> None:
    (tmp_path / "setup.json").write_text('{"setup": {"fingerprint": "of another model"}}', encoding="utf-8")
    with pytest.raises(MokusError, match="other settings, model or versions"):
        run.run(pico, tmp_path, ["rewrite"], [1], singles=1, images=False)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["setup.json"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--editors", "magic"], "no editor 'magic'"),
        (["--edits", "0,5"], "numbers from 1"),
        (["--edits", "many"], "numbers from 1"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], why: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "editing", "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 2 and why in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_norm_of_a_shift_is_that_of_its_product(pico: Model) -> None:
    shifts = random_shifts(pico)
    for path, norm in run.norms(pico, shifts).items():
        full = "model.language_model." + path
        weight = pico.pipe.text_encoder.get_submodule(full).weight
        assert norm == pytest.approx(float(shifts[full].dense().norm() / weight.norm()), rel=1e-4)


def test_merging_rounds_and_comes_back_bit_for_bit() -> None:
    """bfloat16 keeps eight bits: a change of a thousandth of the weight is mostly lost, one as large as it is not."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)).to(torch.bfloat16)
    before = layer[0].weight.clone()
    lost = {}
    for size in (1e-4, 1.0):
        shift = LowRankShift(torch.randn(2, 64), size * float(before.detach().float().std()) * torch.randn(48, 2))
        with merged(layer, {"0": shift}) as share:
            lost[size] = share
            assert not torch.equal(layer[0].weight, before) or size < 1e-3
        assert torch.equal(layer[0].weight, before)
    assert lost[1e-4] > 0.5 and lost[1.0] < 0.02
    with pytest.raises(RuntimeError), merged(layer, {"0": shift}):
        raise RuntimeError
    assert torch.equal(layer[0].weight, before)


def test_an_edit_says_what_the_figures_count(pico: Model) -> None:
    """The answer that is asked for is the whole of it: a goal of the new subject has its words as labels."""
    case = cases.cases(1)[0]
    goal = Goal(pico, case.request)
    ids = goal.labels[0][goal.labels[0] != -100]
    assert pico.pipe.tokenizer.decode(ids, skip_special_tokens=True).strip() == case.new.words
    with applied(pico.pipe.text_encoder, random_shifts(pico)):
        assert goal.losses().moved.shape == (len(IMAGE_FORMS),)
