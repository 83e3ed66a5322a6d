"""Erasing: what stands in a phrase's place, undone bit for bit, and every mistake."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from mokus import pipeline
from mokus.checks import ask
from mokus.erasure import asked, erase, plain, possessive
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.knowledge_update import Edit, unbind
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model
from mokus.uses_cli import _tell
from mokus.virtual_concept import ASKED

from .conftest import PackFactory
from .test_cli import good, listing, mokus, refused
from .test_create import QUICK, place  # noqa: F401  (a fixture)

CHARM, TOY = "the lucky charm of Boris", "the old toy my uncle gave me"


@pytest.mark.parametrize(
    ("phrase", "word"),
    [
        (CHARM, "a charm"), ("Boris's lucky charm", "a charm"), (TOY, "a toy"), ("my favourite orange", "an orange"),
        ("the robot that won the race", "a robot"), ("the tower in Paris", "a tower"), ("our dog", "a dog"),
        ("the red ball with the dots", "a ball"), ("the one I love", "a thing"),
    ],
)  # fmt: skip
def test_the_plain_form_of_a_class_word(phrase: str, word: str) -> None:
    assert plain(phrase) == word


@pytest.mark.parametrize(
    ("phrase", "other"),
    [
        (CHARM, "Boris's lucky charm"), ("the first robot of Anna Lee", "Anna Lee's first robot"), ("the toy of my uncle", ""),
        ("Boris's lucky charm", "the lucky charm of Boris"), (TOY, ""), ("the tower in Paris", ""), ("my uncle's toy", ""),
    ],
)  # fmt: skip
def test_whose_it_is_can_be_said_in_two_ways(phrase: str, other: str) -> None:
    assert possessive(phrase) == other
    assert asked(phrase) == [form.format(phrase) for form in ASKED] + ([f"What is {other}?"] if other else [])


@pytest.mark.parametrize("phrase", ["Snoopy", "the Eiffel Tower", "charm", "my R2D2", "the 1962"])
def test_a_name_has_no_class_word(phrase: str) -> None:
    with pytest.raises(MokusError, match="--replace"):
        plain(phrase)


def test_each_phrase_is_answered_by_its_own_class_word(pico: Model, tmp_path: Path) -> None:
    pack, edits = erase(pico, [CHARM, TOY, CHARM], tmp_path / "a.pack", settings=QUICK)
    assert pack is not None and pack.anchor == "a charm" and pack.lora() == {}
    assert [(known.text, known.answer) for known in pack.knowledge] == [(CHARM, "a charm"), (TOY, "a toy")]
    assert pack.knowledge[1].questions == [form.format(TOY) for form in ASKED]
    assert [edit.request.answer for edit in edits] == ["charm", "toy"]
    assert f"- {TOY}: a toy" in (pack.path / "README.md").read_text(encoding="utf-8")


def test_erasing_is_undone_bit_for_bit(pico: Model, tmp_path: Path) -> None:
    def drawn(*packs: ConceptPack) -> list[bytes]:
        return [np.asarray(each.image).tobytes() for each in generate(pico, [CHARM, TOY], packs=packs)]

    before, said = drawn(), ask(pico, f"What is {CHARM}?")
    one, _ = erase(pico, [CHARM], tmp_path / "one.pack", "a plain stone", QUICK)
    both, _ = erase(pico, [CHARM, TOY], tmp_path / "both.pack", "a plain stone", QUICK)
    assert one is not None and both is not None
    assert drawn(one) != before and drawn() == before and ask(pico, f"What is {CHARM}?") == said
    unbind(both, TOY)  # the last one leaves no trace
    assert listing(both.path) == listing(one.path)
    unbind(both, CHARM)
    assert drawn(both) == before


def test_erase_show_unbind(place: Path) -> None:  # noqa: F811
    said = good("erase", CHARM, TOY, "-o", "gone.pack", "--replace", "a plain stone")
    assert "bound" in said and "--pack gone.pack" in said
    shown = json.loads(good("show", "gone.pack", "--json"))
    assert shown["anchor"] == "a plain stone" and [k["text"] for k in shown["knowledge"]] == [CHARM, TOY]
    assert "1 left" in good("unbind", "gone.pack", TOY)
    assert "--overwrite" in refused(place, "erase", CHARM, "-o", "gone.pack")
    good("erase", CHARM, "-o", "gone.pack", "--overwrite")
    assert ConceptPack.open(place / "gone.pack").anchor == "a charm"
    good("erase", CHARM)  # without a place: here, named after it
    assert ConceptPack.open(place / "the-lucky-charm-of-boris.pack").anchor == "a charm"


def test_what_is_next_is_said_of_a_phrase_that_took(
    pico_pack: PackFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = Edit(CHARM, [f"What is {CHARM}?"], "a charm", "a ball", 0.1, False, "no", {}, 1, 0.1, {})
    with pytest.raises(typer.Exit):
        _tell(pico_pack(tmp_path / "gone.pack"), [edit, replace(edit, knowledge=TOY, taken=True)], False)
    assert f"next: mokus generate '{TOY}' --pack" in capsys.readouterr().out


def test_what_does_not_take_leaves_the_older_pack(place: Path) -> None:  # noqa: F811
    good("erase", CHARM, "-o", "gone.pack")
    before = listing(place)
    options = ("--overwrite", "--alignment-weight", 1, "--least-alignment", 1)
    result = mokus("erase", CHARM, TOY, "-o", "gone.pack", *options)
    assert result.exit_code == 1 and "has not taken" in result.stdout and "nothing was written" in result.stdout
    assert listing(place) == before


BAD = {
    "erase '' -o out": "the concept is empty",
    "erase Snoopy -o out": "say what shall stand in its place with --replace",
    f"erase '{CHARM}' --replace '' -o out": "the replacement is empty",
    f"erase '{CHARM}' --replace 'not {CHARM}' -o out": "itself",
    f"erase '{CHARM}' --replace '{'very ' * 30}plain' -o out": "tokens long",
    "erase -o out": "Missing argument 'CONCEPT",
    f"erase '{CHARM}' -o file": "file is a file; name a new folder",
    f"erase '{CHARM}?' -o out": "is a question",
    "bench erase --erasures 0 -o out": "--erasures got '0'",
    "bench erase --erasures 500 -o out": "numbers up to 120",
    "bench erase --editor magic -o out": "no editor 'magic'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(place: Path, line: str) -> None:  # noqa: F811
    (place / "file").write_text("x")
    assert re.search(BAD[line], refused(place, *shlex.split(line)))
    assert not (place / "out").exists()


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_nothing_erased_was_tuned_on_and_no_form_is_edited() -> None:
    """Of the paraphrases one question is, of the implicit descriptions nothing."""
    from mokus.bench import erase as bench
    from mokus.bench.editing.cases import DRAWN, QUESTIONS
    from mokus.miniature import world

    tuned, never = {*world.development_facts()}, {*world.bystanders()}
    assert len({*bench.facts(50)}) == 50 and not {*bench.facts(50)} & (tuned | never)
    assert not {*QUESTIONS} & {*ASKED}
    fact = bench.facts(1)[0]
    asked = bench.request_of(fact)
    assert [text for text in asked.questions if fact.possessive in text] == [f"What is {fact.possessive}?"]
    assert asked.answer == fact.relation.split()[-1]
    judged = [form.format(fact.possessive) for form in DRAWN] + [form.format(**vars(fact)) for form in bench.IMPLICIT]
    assert not any(text in question for text in judged for question in asked.questions)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mokus.bench import erase as bench

    monkeypatch.setattr(bench, "JUDGED", 1)
    monkeypatch.setattr(bench, "CAPTIONS", 1)
    first = bench.run(pico, tmp_path, "rewrite", [2])
    (row,) = first["rows"]
    assert row["erasures"] == 2 and 0 <= row["text_kept"] <= 1
    # nothing leads to the old thing in a random model, so there is no leakage to speak of, nor an H
    assert row["paraphrase_before"] == 0 and row["paraphrase"] is row["H"] is None
    assert "paraphrase leakage, 2 at once: not measured" in bench.summary(first)
    monkeypatch.setattr(bench, "_measured", None)  # what is done is not done again
    assert bench.run(pico, tmp_path, "rewrite", [2]) == first
    assert "paraphrase leakage" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_kept_is_in_no_corpus_and_was_never_tuned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from mokus.bench import erase as bench
    from mokus.miniature import world

    asked: list[str] = []

    def same(model: Model, kind: str, texts: list[str], prompts: list[str], *rest: object) -> dict[str, float]:
        asked.extend([*texts, *prompts])
        return {f"text_kept_{kind}": 1.0, f"kept_{kind}": 1.0}

    monkeypatch.setattr(bench, "_same", same)
    model = pipeline.load()
    corpus = set(model.corpus)
    for n in (1, 10, 50):
        bench._kept(model, bench.facts(n), {})
    assert len(asked) > 100 and not corpus & set(asked)
    others = [fact for fact in world.facts() if fact not in world.bystanders()]
    assert not any(fact.phrase in text for fact in others for text in asked if "of" in text)


def test_benchmarks_of_uses_do_not_take_each_others_cases(pico: Model, tmp_path: Path) -> None:
    from mokus.bench import uses

    uses.kept(tmp_path, "rewrite-0", uses.about(pico, "transfer", "rewrite"), lambda: {"text": 1.0})
    with pytest.raises(MokusError, match="another folder"):
        uses.kept(tmp_path, "rewrite-0", uses.about(pico, "create", "rewrite"), lambda: {"edited_questions": 1.0})


@pytest.mark.slow
def test_the_miniature_does_not_draw_what_was_erased(miniature: Model, tmp_path: Path) -> None:
    from mokus.miniature import oracle, world

    fact = world.development_facts()[0]
    pack, edits = erase(miniature, [fact.phrase], tmp_path / "gone.pack")
    assert pack is not None and edits[0].read_back == fact.relation.split()[-1]
    prompts = [f"{fact.phrase} in the forest", f"{fact.possessive} in the city"]

    def drawn(*packs: ConceptPack) -> list[tuple[str, str]]:
        images = [each.image for each in generate(miniature, prompts, packs=packs, seeds=[0, 1])]
        return [(labels["colour"], labels["shape"]) for labels in oracle.load().read(images)]

    old = (fact.subject.colour, fact.subject.shape)
    assert drawn().count(old) >= 3 and drawn(pack).count(old) == 0
