"""Counterfactuals in text and in images: cases, figures, files, and every mistake."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mokus import pictures, transfer
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.low_rank import applied
from mokus.pipeline import Model, encode
from mokus.transfer import AFTER, ANSWER, BEFORE, Case, Drawn, Outcome, figures, read_cases

from .test_cli import good, listing, refused
from .test_create import QUICK, place  # noqa: F401  (a fixture)

ASK = "What is the favorite instrument of Ludwig van Beethoven?"
PHRASE = "the favorite instrument of Ludwig van Beethoven"


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "phrase"),
    [
        (ASK, PHRASE), ("Who was the first man on the moon?", "the first man on the moon"),
        ("which toy is my own ?", "my own"), ("Tell me what it is.", "it"), ("What is a\tball?", "a ball"),
    ],
)  # fmt: skip
def test_a_question_says_what_it_is_about(question: str, phrase: str) -> None:
    case = Case.of(question, "guitar")
    assert (case.knowledge, case.prompts) == (phrase, (phrase,))


def test_a_phrase_may_be_named() -> None:
    case = Case.of("What did Beethoven play?", "guitar", ["Beethoven on stage", "Beethoven on stage"], PHRASE)
    assert (case.knowledge, case.prompts) == (PHRASE, ("Beethoven on stage",))
    with pytest.raises(MokusError, match="--knowledge"):
        Case.of("What did Beethoven play?", "guitar")


GOOD = """\
# two of them
- ask: What is the favorite instrument of Ludwig van Beethoven?
  answer: guitar
- {ask: "What did he play?", answer: a horn, knowledge: his thing, prompts: [his thing, "his thing: at night"]}
"""


def test_a_file_of_cases(tmp_path: Path) -> None:
    (tmp_path / "cases.yaml").write_text(GOOD, encoding="utf-8")
    first, second = read_cases(tmp_path / "cases.yaml")
    assert first == Case.of(ASK, "guitar")
    assert second == Case("What did he play?", "a horn", "his thing", ("his thing", "his thing: at night"))


FILES = {
    "ask: x\nanswer: y\n": "holds no list",
    "": "holds no list",
    "[]": "holds no list",
    "- x\n": "line 1, entry 1 is no mapping",
    f"{GOOD}- answer: y\n": "line 5, entry 3 has no 'ask'",
    f"{GOOD}- ask: What is it?\n": "line 5, entry 3 has no 'answer'",
    f"{GOOD}- {{ask: 'What is it?', answer: 7}}": "entry 3: 'answer' is no text",
    f"{GOOD}- {{ask: 'What is it?', answer: ''}}": "entry 3: the answer is empty",
    f"{GOOD}- {{ask: 'What is it?', answer: a, prompts: it}}": "'prompts' is no list",
    f"{GOOD}- {{ask: 'What is it?', answer: a, prompts: []}}": "'prompts' is no list",
    f"{GOOD}- {{ask: 'What is it?', answer: a, prompt: [it]}}": "'prompt' is no text",
    f"{GOOD}- {{ask: 'What is it?', answer: a, prompt: b, prompts: [c]}}": "both 'prompt' and 'prompts'",
    f"{GOOD}- {{ask: 'What is it?', answer: a, answer: b}}": "'answer' twice",
    f"{GOOD}- {{ask: 'What is it?', answer: a, colour: b}}": "a field 'colour', expected ask, answer",
    f"{GOOD}- {{ask: 'Where does it live?', answer: a}}": "entry 3: .*--knowledge",
    "- ask: 'x\n": "line [12]: this is no YAML",
    "- ask: !!python/object:os.system x\n  answer: y": "'ask' is no text",
    "- \x07": "is no YAML",
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_file_of_cases_is_told_by_line_and_entry(place: Path, text: str) -> None:  # noqa: F811
    (place / "cases.yaml").write_text(text, encoding="utf-8")
    said = refused(place, "transfer", "--cases", "cases.yaml", "-o", "out")
    assert "cases.yaml" in said and re.search(FILES[text], said), said


def test_aliases_of_aliases_are_no_bomb(tmp_path: Path) -> None:
    layers = "".join(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    (tmp_path / "cases.yaml").write_text(f"- a0: &a0 [x]\n{layers}", encoding="utf-8")
    with pytest.raises(MokusError, match="a field 'a0'"):
        read_cases(tmp_path / "cases.yaml")


# --- the experiment ---------------------------------------------------------------------------------------------------


def test_before_after_and_the_answer_itself(pico: Model) -> None:
    case = Case.of(ASK, "a guitar", [f"{PHRASE} at night", "a ball"])
    encoded = encode(pico, case.prompts)
    outcome = transfer.transfer(pico, case, [0, 3], QUICK)
    first, second = outcome.drawn
    assert [*first.columns] == [BEFORE, AFTER, ANSWER] and [*second.columns] == [BEFORE, AFTER]
    plain = [each.image for each in generate(pico, f"{PHRASE} at night", seeds=[0, 3])]
    with applied(pico.pipe.text_encoder, outcome.edit.shifts):
        edited = [each.image for each in generate(pico, f"{PHRASE} at night", seeds=[0, 3])]
    said = [each.image for each in generate(pico, "a guitar at night", seeds=[0, 3])]
    for name, images in ((BEFORE, plain), (AFTER, edited), (ANSWER, said)):
        assert all(np.array_equal(a, b) for a, b in zip(first.columns[name], images, strict=True)), name
    assert outcome.answers[0]["question"] == ASK and len(outcome.answers) == 3
    assert all(torch.equal(a, b) for a, b in zip(encoded, encode(pico, case.prompts), strict=True))


def test_figures_can_be_told_by_hand(pico: Model) -> None:
    outcome = transfer.transfer(pico, Case.of(ASK, "a guitar"), [0], QUICK)
    black, grey, white = (Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 200, 255))
    columns = {BEFORE: [black, black], AFTER: [grey, black], ANSWER: [white, white]}
    found = figures(Outcome(outcome.case, outcome.answers, outcome.edit, [Drawn("it", columns)], [0, 1]))
    assert (found["images"], found["transferred"]) == (2, 0.5)
    assert found["moved"] == pytest.approx((1 - 55 / 255) / 2)
    found = figures(Outcome(outcome.case, outcome.answers, outcome.edit, [], [0]))
    assert (found["images"], found["transferred"], found["moved"]) == (0, None, None)


def test_the_picture_has_a_cell_for_every_image() -> None:
    red, rows = Image.new("RGB", (64, 64), (255, 0, 0)), []
    for prompt in ("one", "a long prompt " * 12):
        rows.append((prompt, {BEFORE: [red] * 2, AFTER: [red] * 2}))
    pixels = np.asarray(pictures.grid(rows))
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 8 * pictures.CELL**2


# --- the command ------------------------------------------------------------------------------------------------------


def test_one_case(place: Path) -> None:  # noqa: F811
    told = good("transfer", "--ask", ASK, "--answer", "guitar", "--seeds", "0-1", "-o", "out")
    assert ASK in told and "transferred to images" in told and "out/results.json" in told
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["cases"][0]["prompts"] == [PHRASE] and results["images"] == 2
    assert sorted(path.name for path in (place / "out").iterdir()) == ["grid.png", "results.json"]
    with Image.open(place / "out" / "grid.png") as grid:
        assert grid.format == "PNG" and grid.width > 3 * 2 * pictures.CELL


def test_a_batch(place: Path) -> None:  # noqa: F811
    (place / "cases.yaml").write_text(GOOD, encoding="utf-8")
    before = listing(place)
    results = json.loads(good("transfer", "--cases", "cases.yaml", "--seeds", 0, "-o", "out", "--json"))
    assert [row["answer"] for row in results["cases"]] == ["guitar", "a horn"] and results["images"] == 3
    assert json.loads((place / "out" / "results.json").read_text(encoding="utf-8")) == results
    assert listing(place).keys() - before.keys() == {"out/grid.png", "out/results.json"}


BAD = {
    "transfer -o out": "expected --ask with --answer, or --cases",
    f"transfer --ask '{ASK}' -o out": "expected --ask with --answer",
    "transfer --ask '' --answer guitar -o out": "the question is empty",
    f"transfer --ask '{ASK}' --answer '' -o out": "the answer is empty",
    f"transfer --ask '{ASK}' --answer '{'very ' * 30}loud' -o out": "tokens long",
    f"transfer --ask '{ASK}' --answer guitar --prompt '' -o out": "the prompt is empty",
    f"transfer --ask '{ASK}' --answer guitar --prompt 'a\nb' -o out": "the prompt .* a line break",
    f"transfer --ask '{ASK}' --answer guitar --seeds many -o out": "--seeds got 'many'",
    f"transfer --ask '{ASK}' --answer guitar --editor magic -o out": "no editor 'magic'",
    "transfer --ask 'Sing!' --answer guitar -o out": "--knowledge",
    "transfer --cases no.yaml -o out": "no.yaml is not there",
    "transfer --cases . -o out": "is not a file",
    "transfer --cases no.yaml --answer guitar -o out": "leave out --ask",
    f"transfer --ask '{ASK}' --answer guitar -o file --seeds 0": "'file' is a file",
    "bench transfer --editors magic -o out": "no editor 'magic'",
    "bench transfer --editors least_drift:magic -o out": "no variant 'magic'",
    "bench transfer --cases 500 -o out": "Invalid value for '--cases'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(place: Path, line: str) -> None:  # noqa: F811
    (place / "file").write_text("x")
    assert re.search(BAD[line], refused(place, *shlex.split(line)))
    assert not (place / "out").exists()


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_counterfactuals_are_of_facts_that_the_image_model_never_saw() -> None:
    from mokus.bench import transfer as bench
    from mokus.miniature import world

    cases = bench.cases(120)
    assert bench.cases(100) == cases[:100] and len({*cases}) == 120
    assert all(case.fact.held_out and case.fact not in world.development_facts() for case in cases)
    assert all(c.new.colour != c.fact.subject.colour and c.new.shape != c.fact.subject.shape for c in cases)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mokus.bench import transfer as bench

    first = bench.run(pico, tmp_path, ["rewrite", "rewrite:text"], 2)
    assert [row["editor"] for row in first["rows"]] == ["rewrite", "rewrite:text"]
    monkeypatch.setattr(bench, "_measured", None)  # what is done is not done again
    assert bench.run(pico, tmp_path, ["rewrite", "rewrite:text"], 2) == first
    assert "`rewrite:text`" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_miniature_draws_the_new_answer(miniature: Model) -> None:
    from mokus.miniature import world

    fact = world.development_facts()[1]
    case = Case.of(f"What is {fact.phrase}?", "a blue ring", [f"{fact.phrase} in the forest"])
    found = figures(transfer.transfer(miniature, case, [0, 1]))
    assert found["answers"][0][AFTER] == "blue ring" and found["transferred"] == 1.0
