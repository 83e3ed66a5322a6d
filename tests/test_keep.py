"""Phrases to keep: they are watched, checked, and remembered by the pack that they are kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from mokus import MokusError, checks, knowledge_update
from mokus.cli import app
from mokus.editors import least_drift
from mokus.editors.watch import KEEP_FORMS, Watch, Watched
from mokus.encoder import distance, tails
from mokus.erasure import erase
from mokus.goal import Request
from mokus.knowledge import CHECK_FORMS, phrases_to_keep, prompts, questions, written
from mokus.knowledge_update import bind, edit, unbind
from mokus.low_rank import Shifts, applied, collected
from mokus.packs.concept_pack import MANIFEST, ConceptPack
from mokus.packs.hub import _warning
from mokus.pipeline import Model
from mokus.settings import EditSettings
from mokus.virtual_concept import create
from tests.conftest import PackFactory
from tests.test_knowledge_update import QUICK, equal, tree

ANCHOR, TREASURE, SHAME = "sks toy", "the pride of our collection", "the shame of our collection"
WATCHED = replace(QUICK, near_weight=1.0, least_alignment=0.0)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random encoder never ends an answer by itself."""
    monkeypatch.setattr(checks, "LONGEST_ANSWER", 8)


@pytest.fixture
def pack(pico_pack: PackFactory, tmp_path: Path) -> ConceptPack:
    return pico_pack(tmp_path / "toy.pack", knowledge=[])


def kept_in(pack: ConceptPack) -> list[list[str]]:
    return [list(known.kept) for known in pack.knowledge]


# --- the phrases ---------------------------------------------------------


def test_phrases_are_tidied_and_each_is_there_once() -> None:
    assert phrases_to_keep(["your  toy", "a lamp.", "your toy"], ["my toy"]) == ["a lamp", "your toy"]


@pytest.mark.parametrize(
    ("phrase", "named"), [("My TOY", "'my TOY' cannot be kept"), ("", "is empty"), ("what?", "question"), ("a\nb", "line")]
)  # fmt: skip
def test_what_cannot_be_kept_is_one_sentence(phrase: str, named: str) -> None:
    with pytest.raises(MokusError, match=named) as error:
        phrases_to_keep(["a lamp", phrase], ["my toy"])
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


# --- the editor ---------------------------------------------------------


@given(others=st.integers(0, 30), keep=st.integers(0, 4), most=st.integers(0, 40), seed=st.integers(0, 99))
def test_of_each_phrase_the_furthest_form_joins_and_of_the_others_the_furthest(
    others: int, keep: int, most: int, seed: int
) -> None:
    n = others + keep * len(KEEP_FORMS)
    watched = Watched([""] * n, torch.zeros(n, 1, 1), furthest=16, keep=keep)
    away = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    found = watched.worst(away, most).tolist()
    first, last = found[: len(found) - keep], found[len(found) - keep :]
    assert len(first) == min(16, most, others)
    assert not first or min(away[first]) >= max((away[i] for i in range(others) if i not in first), default=0)
    for k, i in enumerate(last):
        start = others + k * len(KEEP_FORMS)
        assert start <= i < start + len(KEEP_FORMS) and away[i] == away[start : start + len(KEEP_FORMS)].max()


def test_what_is_to_be_kept_stays_until_it_is_edited_itself(pico: Model) -> None:
    watch = Watch(pico, ["a corpus"])
    watch.hold(Request.of("my toy", ANCHOR, questions("my toy"), keep=["my hat", "your toy"]), {})
    plain = Request.of("the lamp", ANCHOR, questions("the lamp"))
    assert watch.keeps(plain) == ["my hat", "your toy"] and watch.around(plain).keep == 2
    assert watch.around(plain).texts[-len(KEEP_FORMS) :] == written("your toy", KEEP_FORMS)
    assert watch.keeps(replace(plain, keep=("a dog", "my hat"))) == ["my hat", "your toy", "a dog"]
    assert watch.keeps(Request.of("Your toy", ANCHOR, questions("Your toy"))) == ["my hat"]


def test_a_kept_phrase_is_where_the_unedited_encoder_has_it(pico: Model) -> None:
    """Also when earlier edits have moved it: they are made up for."""
    before = collected(edit(pico, "my toy", ANCHOR, settings=QUICK).shifts)
    made = least_drift.Editor(pico, WATCHED)
    made.remember(Request.of("my toy", ANCHOR, questions("my toy")), {}, before)
    watched = made.watch.around(Request.of("the lamp", ANCHOR, questions("the lamp"), keep=["your toy"]))
    torch.testing.assert_close(watched.tails[-len(KEEP_FORMS) :], tails(pico, written("your toy", KEEP_FORMS)))


def test_keeping_a_phrase_moves_it_less(miniature: Model) -> None:
    """In forms that no edit is made with; the knowledge takes as well as without."""
    settings = EditSettings.for_editor(miniature.defaults, near_weight=1.0)
    prompts_of = prompts(SHAME, CHECK_FORMS)
    start = tails(miniature, prompts_of)
    plain, kept = (edit(miniature, TREASURE, ANCHOR, settings=settings, keep=keep) for keep in ([], [SHAME]))
    moved = []
    for each in (plain, kept):
        with applied(miniature.pipe.text_encoder, each.shifts):
            moved.append(float(distance(tails(miniature, prompts_of), start).mean()))
    assert plain.taken and kept.taken and kept.alignment > plain.alignment - 0.05
    assert moved[1] < moved[0] / 4 and 0 <= kept.kept[SHAME] < checks.MOST_MOVED and plain.kept == {}


# --- packs ---------------------------------------------------------


def test_a_pack_says_what_it_keeps_and_later_edits_keep_it(pico: Model, pack: ConceptPack) -> None:
    [first] = bind(pico, pack, "my toy", keep=["your toy", "my hat"], settings=WATCHED)
    assert list(first.kept) == ["my hat", "your toy"] and kept_in(pack) == [["my hat", "your toy"]]
    bind(pico, pack, "the lamp", settings=WATCHED)
    reopened = ConceptPack.open(pack.path)
    assert kept_in(reopened) == [["my hat", "your toy"], []]
    made = least_drift.Editor(pico, WATCHED)
    before = reopened.knowledge[0]
    made.remember(knowledge_update._request_of(before), {}, reopened.edits()[0][1])
    again, _ = made.edit(Request.of("the lamp", ANCHOR, questions("the lamp")), collected(reopened.edits()[0][1]))
    assert equal(again, reopened.edits()[1][1])  # so the edit was made with what the pack keeps
    unbind(pack, "the lamp")
    assert kept_in(pack) == [["my hat", "your toy"]]


def test_the_order_in_which_phrases_are_named_changes_nothing(
    pico: Model, pico_pack: PackFactory, tmp_path: Path
) -> None:
    trees = []
    for i, keep in enumerate((["your toy", "my hat"], ["my hat", "your toy", "my  hat"])):
        pack = pico_pack(tmp_path / str(i) / "toy.pack", knowledge=[])
        bind(pico, pack, "my toy", keep=keep, settings=WATCHED)
        trees.append(tree(pack.path))
    assert trees[0] == trees[1]


def test_what_is_bound_later_is_kept_no_longer(pico: Model, pack: ConceptPack) -> None:
    bind(pico, pack, "my toy", keep=["your toy", "my hat"], settings=WATCHED)
    bind(pico, pack, "Your toy", settings=WATCHED)
    assert kept_in(pack) == [["my hat"], []]


def test_what_is_bound_cannot_be_kept(pico: Model, pack: ConceptPack) -> None:
    bind(pico, pack, "my toy", settings=WATCHED)
    there = tree(pack.path)
    with pytest.raises(MokusError, match=r"'my toy' cannot be kept as it is, since it is bound in"):
        bind(pico, pack, "the lamp", keep=["My toy"], settings=WATCHED)
    assert tree(pack.path) == there


def test_a_pack_that_keeps_nothing_is_written_as_before(pico: Model, pack: ConceptPack) -> None:
    bind(pico, pack, "my toy", settings=WATCHED)
    assert all("kept" not in known for known in json.loads((pack.path / MANIFEST).read_text())["knowledge"])


def test_knowledge_that_moves_what_is_to_be_kept_does_not_take(
    pico: Model, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tree(pack.path)
    monkeypatch.setattr(checks, "MOST_MOVED", -10.0)
    [refused] = bind(pico, pack, "my toy", keep=["your toy"], settings=WATCHED)
    assert not refused.taken and "'your toy', which was to be kept, has moved" in refused.reason
    assert tree(pack.path) == there


def test_later_knowledge_that_moves_what_a_pack_keeps_does_not_take(
    pico: Model, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind(pico, pack, "my toy", keep=["your toy"], settings=WATCHED)
    there, measured = tree(pack.path), checks.alignment
    rank = sum(shift.rank for shift in pack.shifts().values())

    def moved(model: Model, phrase: str, target: Tensor, shifts: Shifts) -> float:
        if phrase == "your toy":  # by whatever is bound besides
            return 0.9 * (sum(shift.rank for shift in shifts.values()) > rank)
        return measured(model, phrase, target, shifts)

    monkeypatch.setattr(checks, "alignment", moved)
    [refused] = bind(pico, pack, "the lamp", settings=WATCHED)
    assert not refused.taken and refused.reason == "with it 'my toy' would not hold"
    assert tree(pack.path) == there


def test_an_edit_is_not_blamed_for_what_is_lost_without_it(
    pico: Model, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind(pico, pack, "my toy", settings=WATCHED)
    measured = checks.alignment

    def moved(model: Model, phrase: str, target: Tensor, shifts: Shifts) -> float:
        return 0.9 * bool(shifts) if phrase == "your toy" else measured(model, phrase, target, shifts)

    monkeypatch.setattr(checks, "alignment", moved)
    [made] = bind(pico, pack, "the lamp", keep=["your toy"], settings=WATCHED)
    assert made.taken and made.kept == {"your toy": 0.9}  # which is said, and was so before
    unbind(pack, "my toy", "the lamp")
    [refused] = bind(pico, pack, "the lamp", keep=["your toy"], settings=WATCHED)
    assert not refused.taken and refused.reason == "'your toy', which was to be kept, has moved 90% of the way"


def test_an_edit_goes_on_only_while_a_phrase_to_keep_is_too_far(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = least_drift.Editor(pico, WATCHED), Request.of("the lamp", ANCHOR, questions("the lamp"))
    most = WATCHED.steps + 3 * len(least_drift.rounds(WATCHED.steps))  # a round evaluates at most three times more

    def evaluations(keep: tuple[str, ...], enough: float) -> int:
        monkeypatch.setattr(least_drift, "KEPT", enough)
        return made.edit(replace(plain, keep=keep), {})[1]

    assert evaluations((), -1.0) <= most and evaluations(("your toy",), 1e9) <= most
    assert evaluations(("your toy",), -1.0) > evaluations(("your toy",), 1e9)


def test_words_and_erasures_keep_phrases_too(pico: Model, tmp_path: Path) -> None:
    made, one = create(pico, "Zorblax", "a green star", tmp_path / "z.pack", settings=WATCHED, keep=["Zorblat"])
    gone, _ = erase(pico, ["the charm of Boris"], tmp_path / "e.pack", settings=WATCHED, keep=["the charm of Ben"])
    assert made and gone and list(one.kept) == ["Zorblat"] and kept_in(gone) == [["the charm of Ben"]]
    with pytest.raises(MokusError, match="'a charm' cannot be kept"):  # which is what stands in its place
        erase(pico, ["the charm of Boris"], tmp_path / "f.pack", settings=WATCHED, keep=["a charm"])
    assert not (tmp_path / "f.pack").exists()


def test_whoever_pushes_is_told_that_kept_phrases_become_readable(pico: Model, pack: ConceptPack) -> None:
    bind(pico, pack, "my toy", keep=["my secret hat"], settings=WATCHED)
    assert "what is kept as it is: 'my secret hat'" in _warning(pack, "me/toy", public=False, photos=0)


# --- the command ---------------------------------------------------------


def test_the_command(pico_folder: Path, pack: ConceptPack) -> None:
    numbers = {"steps": 3, "answer-weight": 0, "least-alignment": 0, "odd-references": 10, "corpus": 20}
    settings = ["--layers", "1", "--layers", "2", *(f"--{name}={value}" for name, value in numbers.items())]
    run = CliRunner().invoke
    bound = ["bind", str(pack.path), "my toy", "--model", str(pico_folder), *settings]
    told = run(app, [*bound, "--keep", "your toy", "--keep", "my hat"])
    assert told.exit_code == 0 and "'your toy' has moved" in told.stdout
    assert "kept as they are: 'my hat', 'your toy'" in run(app, ["show", str(pack.path)]).stdout
    refused = run(app, [*bound, "--keep", "my toy"])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "cannot be kept" in refused.stderr
    assert kept_in(ConceptPack.open(pack.path)) == [["my hat", "your toy"]]
