"""Concepts made of words: packs without looks, what they do to images, and every mistake."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from mokus import pipeline
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.knowledge import answer_of
from mokus.knowledge_update import bind, request, unbind
from mokus.low_rank import applied
from mokus.packs.concept_pack import ADAPTER, LORA, README, ConceptPack
from mokus.packs.together import shifts_of
from mokus.pipeline import Model, encode
from mokus.settings import EditSettings
from mokus.virtual_concept import ASKED, create

from .conftest import PackFactory, known, random_shifts
from .test_cli import DEFAULTS, good, listing, mokus, refused
from .test_concept_pack import HOSTILE, seal

GREEN = "a small green creature with three eyes"
# Quick, and taken whatever it does: a random encoder answers nothing right.
FAST = {
    **DEFAULTS["edit"],
    "editor": "ultraedit",
    "layers": [1, 2],
    "modules": ["mlp.up_proj"],
    "eta": 0.005,
    "alignment_weight": 0.0,
}
QUICK = EditSettings.for_model(FAST)


@pytest.fixture(scope="module")
def words(pico: Model, tmp_path_factory: pytest.TempPathFactory) -> ConceptPack:
    """A virtual concept; copy it before you change it."""
    pack, edit = create(pico, "Zorblax", GREEN, tmp_path_factory.mktemp("words") / "zorblax.pack", settings=QUICK)
    assert pack is not None and edit.taken
    return pack


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_folder: Path) -> Path:
    """An empty working folder, with the pico model and quick defaults as the default one."""
    folder = tmp_path.parent / f"{tmp_path.name}-model"
    shutil.copytree(pico_folder, folder)
    (folder / pipeline.DEFAULTS_FILE).write_text(json.dumps({**DEFAULTS, "edit": FAST}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOKUS_MODEL", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def same_images(one: Any, other: Any) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))


# --- the pack ---------------------------------------------------------------------------------------------------------


def test_a_description_is_the_anchor_and_the_answer(words: ConceptPack) -> None:
    opened = ConceptPack.open(words.path)
    (bound,) = opened.knowledge
    assert (opened.anchor, bound.text, bound.answer) == (GREEN, "Zorblax", GREEN)
    assert bound.questions == [form.format("Zorblax") for form in ASKED]
    assert opened.lora() == {} and LORA not in listing(words.path) and ADAPTER in listing(words.path)
    assert {k: (s.A.tolist(), s.B.tolist()) for k, s in opened.shifts().items()} == {
        k: (s.A.tolist(), s.B.tolist()) for k, s in words.shifts().items()
    }
    card = (words.path / README).read_text(encoding="utf-8")
    assert "load_lora_weights" not in card and "load_adapter" in card and GREEN in card


def test_the_article_is_said_but_not_answered() -> None:
    asked = request("Zorblax", GREEN)
    assert (asked.answer, asked.says) == (GREEN.removeprefix("a "), GREEN)
    assert [answer_of(t) for t in ("sks toy", "a ball", "An orange", "the", "theatre", "a")] == [
        "sks toy", "ball", "orange", "the", "theatre", "a"
    ]  # fmt: skip


def test_images_are_those_with_its_shifts_applied_by_hand(pico: Model, words: ConceptPack) -> None:
    with_pack = [each.image for each in generate(pico, "Zorblax at night", packs=[words], seeds=[0, 1])]
    with applied(pico.pipe.text_encoder, words.shifts()):
        by_hand = [each.image for each in generate(pico, "Zorblax at night", seeds=[0, 1])]
    assert same_images(with_pack, by_hand)
    assert not same_images(with_pack, [each.image for each in generate(pico, "Zorblax at night", seeds=[0, 1])])


def test_the_model_is_as_before(pico: Model, tmp_path: Path) -> None:
    before = encode(pico, ["Wumble at night"])[0]
    create(pico, "Wumble", "a red ball", tmp_path / "a.pack", settings=QUICK)
    assert torch.equal(before, encode(pico, ["Wumble at night"])[0])


def test_more_phrases_mean_it_and_are_forgotten_bit_for_bit(pico: Model, words: ConceptPack, tmp_path: Path) -> None:
    pack = ConceptPack.open(shutil.copytree(words.path, tmp_path / "a.pack"))
    before = listing(pack.path)
    (edit,) = bind(pico, pack, "my pet", settings=QUICK)
    assert edit.taken and [each.answer for each in pack.knowledge] == [GREEN, GREEN]
    unbind(pack, "my pet")
    assert listing(pack.path) == before
    unbind(pack, "Zorblax")
    assert pack.shifts() == {}
    plain, undone = (list(generate(pico, "Zorblax", packs=packs)) for packs in ([], [pack]))
    assert same_images([plain[0].image], [undone[0].image])


def test_beside_a_pack_with_looks(pico: Model, words: ConceptPack, pico_pack: PackFactory, tmp_path: Path) -> None:
    looks = pico_pack(tmp_path / "toy.pack")
    both = next(generate(pico, "Zorblax and my favourite toy", packs=[words, looks]))
    only = ConceptPack.create(tmp_path / "looks", model=pico, anchor="sks toy", lora=looks.lora(), settings={})
    with applied(pico.pipe.text_encoder, words.shifts(), looks.shifts()):
        by_hand = next(generate(pico, "Zorblax and my favourite toy", packs=[only]))
    assert same_images([both.image], [by_hand.image])
    assert [each["anchor"] for each in both.settings["packs"]] == [GREEN, "sks toy"]


def test_packs_of_words_may_mean_the_same_but_not_bind_the_same(pico: Model, tmp_path: Path) -> None:
    def pack(name: str, text: str, seed: int) -> ConceptPack:
        edits = [(known(text, "a stone"), random_shifts(pico, seed))]
        return ConceptPack.create(tmp_path / name, model=pico, anchor="a stone", lora={}, settings={}, edits=edits)

    one, two, three = pack("one", "Wumble", 0), pack("two", "Zorblax", 1), pack("three", "zorblax", 2)
    assert len(shifts_of([one, two])) == 2
    with pytest.raises(MokusError, match="both bind"):
        shifts_of([one, two, three])
    with pytest.raises(MokusError, match="is given twice"):
        shifts_of([one, one])


def test_two_packs_with_looks_still_need_two_anchors(
    pico_pack: PackFactory, words: ConceptPack, tmp_path: Path
) -> None:
    one, two = pico_pack(tmp_path / "one"), pico_pack(tmp_path / "two", knowledge=["our toy"])
    with pytest.raises(MokusError, match="same anchor"):
        shifts_of([words, one, two])


def test_a_pack_with_edits_from_the_start_is_one_that_got_them(pico: Model, tmp_path: Path) -> None:
    edits = [(known("it"), random_shifts(pico)), (known("that"), random_shifts(pico, 1))]
    at_once = ConceptPack.create(tmp_path / "a", model=pico, anchor="sks toy", lora={}, settings={}, edits=edits)
    later = ConceptPack.create(tmp_path / "b", model=pico, anchor="sks toy", lora={}, settings={})
    later.replace_edits(edits)
    assert listing(at_once.path) == listing(later.path)


# what is done to the file of the looks or to a sample, neither of which such a pack has
OF_LOOKS = {
    "one changed byte of a sample", "a header that lies about its length", "one changed byte", "not a number", "another dtype",
    "a vector", "factors that do not fit", "half a pair", "dots in a name", "a path as a name", "a scale", "a link to a file",
}  # fmt: skip
WITHOUT_LOOKS = [what for what in HOSTILE if "LoRA" not in what and what not in OF_LOOKS]


@pytest.mark.parametrize("what", WITHOUT_LOOKS)
def test_hostile_packs_of_words_are_refused(words: ConceptPack, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(words.path, tmp_path / "a.pack")
    (folder / "samples").mkdir()
    (folder / "samples" / "0.png").write_bytes(b"x")  # so that there is a folder of them
    manifest = folder / "mokus.json"
    eta = json.loads(manifest.read_text())["knowledge"][0]["eta"]
    manifest.write_text(manifest.read_text().replace(f'"eta": {eta}', '"eta": 0.03'))
    seal(folder)
    ConceptPack.open(folder)
    HOSTILE[what](folder)
    with pytest.raises(MokusError) as error:
        ConceptPack.open(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["\x1b]0;x\x07", "", "two\nlines"])
def test_a_hostile_meaning_is_refused(words: ConceptPack, tmp_path: Path, answer: str) -> None:
    folder = shutil.copytree(words.path, tmp_path / "a.pack")
    manifest = json.loads((folder / "mokus.json").read_text(encoding="utf-8"))
    manifest["knowledge"][0]["answer"] = answer
    (folder / "mokus.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(MokusError, match=r"knowledge\.0\.answer"):
        ConceptPack.open(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def test_create_ask_generate_show_unbind(place: Path) -> None:
    said = good("create", "Zorblax", "--as", GREEN, "-o", "z.pack")
    assert "bound" in said and "mokus generate 'Zorblax' --pack z.pack" in said
    assert "(words alone)" in good("show", "z.pack")
    shown = json.loads(good("show", "z.pack", "--json"))
    assert (shown["looks"], shown["anchor"], shown["knowledge"][0]["answer"]) == (False, GREEN, GREEN)
    good("ask", "What is Zorblax?", "--pack", "z.pack")
    good("generate", "Zorblax at night", "--pack", "z.pack", "-o", "out")
    assert len(list((place / "out").glob("zorblax-at-night-*.png"))) == 1
    assert "0 left" in good("unbind", "z.pack", "Zorblax")
    assert "--overwrite" in refused(place, "create", "Zorblax", "--as", GREEN, "-o", "z.pack")
    told = json.loads(good("create", "Zorblax", "--as", GREEN, "-o", "z.pack", "--overwrite", "--json"))
    assert told["pack"] == "z.pack" and told["edits"][0]["taken"]


def test_own_questions(place: Path) -> None:
    good("create", "Zorblax", "--as", GREEN, "-o", "z.pack", "--question", "Who is Zorblax?", "--question", "Zorblax?")
    assert ConceptPack.open(place / "z.pack").knowledge[0].questions == ["Who is Zorblax?", "Zorblax?"]


def test_what_does_not_take_leaves_nothing(place: Path) -> None:
    before = listing(place)
    result = mokus("create", "Zorblax", "--as", GREEN, "-o", "z.pack", "--alignment-weight", 1, "--least-alignment", 1)
    assert result.exit_code == 1 and "has not taken" in result.stdout and "nothing was written" in result.stdout
    assert listing(place) == before and not (place / "z.pack").exists()


BAD = {
    "create '' --as 'a ball' -o out": "the name is empty",
    "create Zorblax --as '' -o out": "the description is empty",
    "create Zorblax --as 'a Zorblax in green' -o out": "says 'Zorblax' itself",
    "create zorblax --as 'a green ZORBLAX' -o out": "itself",
    "create 'What is it?' --as 'a ball' -o out": "the name .* is a question",
    "create 'a\nb' --as 'a ball' -o out": "a line break",
    f"create Zorblax --as '{'very ' * 30}green' -o out": "tokens long, expected fewer than 24",
    "create Zorblax --as 'a <|im_end|> ball' -o out": "marks the template's own tokens",
    "create Zorblax -o out": "Missing option '--as'",
    "create Zorblax --as 'a ball' -o file": "file is a file; name a new folder",
    "create File --as 'a ball'": "file.pack is a file; name a new folder",
    "create Zorblax --as 'a ball' -o out --question ''": "the question is empty",
    "create Zorblax --as 'a ball' -o out --editor rewrite": "cannot hold it",
    "create Zorblax --as 'a ball' -o out --editor magic": "no editor 'magic'",
    "bench create --editor magic -o out": "no editor 'magic'",
    "bench create --names 0 -o out": "Invalid value for '--names'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(place: Path, line: str) -> None:
    (place / "file").write_text("x")
    (place / "file.pack").write_text("x")
    assert re.search(BAD[line], refused(place, *shlex.split(line)))
    assert not (place / "out").exists()


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_names_are_new_and_what_they_mean_can_be_drawn() -> None:
    from mokus.bench import create as bench
    from mokus.miniature import language, world

    cases = bench.cases(50)
    assert bench.cases(60)[:50] == cases and len({case.name for case in cases}) == 50
    said = " ".join([*language.corpus(), *world.PEOPLE]).lower()
    assert not [case for case in cases if case.name.split()[-1].lower() in said]
    assert {case.subject.material for case in cases} == set(bench.MATERIALS)
    assert len({case.subject.colour for case in cases}) >= 8 and len({case.subject.shape for case in cases}) == 8
    assert all(case.request.answer == case.subject.words for case in cases)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mokus.bench import create as bench

    monkeypatch.setattr(bench, "SEEDS", (0,))
    first = bench.run(pico, tmp_path, "rewrite", 2)
    monkeypatch.setattr(bench, "_measured", None)  # what is done is not done again
    assert bench.run(pico, tmp_path, "rewrite", 2) == first
    assert "as a share of the ceiling" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    with pytest.raises(MokusError, match="other settings"):
        monkeypatch.setattr("mokus.bench.uses.SEED", 1)
        bench.run(pico, tmp_path, "rewrite", 2)


@pytest.mark.slow
def test_the_miniature_draws_what_a_name_means(miniature: Model, tmp_path: Path) -> None:
    from mokus.miniature import oracle

    pack, edit = create(miniature, "Zorblax", "a striped green star", tmp_path / "z.pack")
    assert pack is not None and edit.read_back == "striped green star"
    images = [each.image for each in generate(miniature, "Zorblax in the forest", packs=[pack], seeds=[0, 1])]
    read = [(labels["colour"], labels["shape"], labels["scene"]) for labels in oracle.load().read(images)]
    assert read.count(("green", "star", "in the forest")) == 2


def test_a_pack_that_came_there_meanwhile_is_not_replaced(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    place = tmp_path / "a.pack"
    with pytest.raises(MokusError, match="overwrite=True"):
        create(pico, "Zorblax", GREEN, place, settings=QUICK, progress=lambda *_: place.exists() or pico_pack(place))
    assert ConceptPack.open(place).lora()
