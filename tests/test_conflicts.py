"""The same knowledge in packs that are used together: a sentence, or the one that is preferred and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from mokus.cli import app
from mokus.errors import MokusError
from mokus.generation import generate, packs_loaded, save_png
from mokus.low_rank import Shifts
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.together import chosen, shifts_of
from mokus.pipeline import Model

from .conftest import PackFactory

CONTESTED = "my favourite toy"


@pytest.fixture
def toy(tmp_path: Path, pico_pack: PackFactory) -> ConceptPack:
    return pico_pack(tmp_path / "toy.pack", knowledge=["my toy", CONTESTED, "the first one"])


@pytest.fixture
def dog(tmp_path: Path, pico_pack: PackFactory) -> ConceptPack:
    """Bound are the contested phrase between two others."""
    return pico_pack(tmp_path / "dog.pack", anchor="zwx dog", knowledge=["my dog", CONTESTED, "the second one"], seed=5)


@pytest.fixture
def cat(tmp_path: Path, pico_pack: PackFactory) -> ConceptPack:
    """No phrase of it is anywhere else, but some are inside others."""
    return pico_pack(
        tmp_path / "cat.pack", anchor="ohwx cat", knowledge=["my favourite toy robot", "favourite", "my"], seed=9
    )


def equal(one: Shifts, other: Shifts) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(shift.A, other[path].A) and torch.equal(shift.B, other[path].B) for path, shift in one.items()
    )


def all_equal(found: Sequence[Shifts], wanted: Sequence[Shifts]) -> bool:
    return len(found) == len(wanted) and all(equal(a, b) for a, b in zip(found, wanted, strict=True))


def without(pack: ConceptPack, *phrases: str) -> ConceptPack:
    """A copy of the pack in which phrases are unbound, read from the disk."""
    place = pack.path.with_name(f"{pack.path.name}-{'-'.join(phrases)}")
    shutil.copytree(pack.path, place)
    copy = ConceptPack.open(place)
    copy.replace_edits([(known, shifts) for known, shifts in copy.edits() if known.text not in phrases])
    return ConceptPack.open(place)


# --- which shifts -----------------------------------------------------------------------------------------------------


def test_without_a_conflict_they_are_the_packs_own(toy: ConceptPack, dog: ConceptPack, cat: ConceptPack) -> None:
    for packs in ([], [toy], [dog, cat], [cat, toy]):
        for prefer in (None, *packs):
            assert all_equal(shifts_of(packs, prefer), [pack.shifts() for pack in packs])


def test_a_phrase_inside_another_is_no_conflict(tmp_path: Path, pico_pack: PackFactory) -> None:
    one = pico_pack(tmp_path / "one", knowledge=["my toy", "toy", "mine"])
    other = pico_pack(tmp_path / "other", anchor="zwx robot", knowledge=["my toy robot", "toy robot", "my"], seed=3)
    assert all_equal(shifts_of([one, other]), [one.shifts(), other.shifts()])


def test_a_conflict_names_both_packs_and_the_phrase(toy: ConceptPack, dog: ConceptPack, cat: ConceptPack) -> None:
    sentence = (
        f"{toy.path} and {dog.path} both bind 'my favourite toy', so what it means is open; choose one of them "
        "with --prefer PACK (in Python prefer=), or unbind it in the other."
    )
    for packs in ([toy, dog], [cat, toy, dog], [toy, cat, dog]):
        with pytest.raises(MokusError, match=f"^{re.escape(sentence)}$"):
            shifts_of(packs)
    with pytest.raises(MokusError, match=re.escape(sentence)):  # nothing is settled by a third one
        shifts_of([toy, dog, cat], prefer=cat)


@pytest.mark.parametrize("spelling", ["My Favourite TOY", "my  favourite toy.", "MY FAVOURITE TOY"])
def test_the_spelling_does_not_matter(tmp_path: Path, pico_pack: PackFactory, toy: ConceptPack, spelling: str) -> None:
    other = pico_pack(tmp_path / "other", anchor="zwx dog", knowledge=[spelling], seed=4)
    with pytest.raises(MokusError, match="both bind 'my favourite toy'"):
        shifts_of([toy, other])
    assert all_equal(shifts_of([toy, other], toy), [toy.shifts(), {}])


def test_nor_do_the_accents_bytes(tmp_path: Path, pico_pack: PackFactory) -> None:
    texts = [unicodedata.normalize(form, "mein größtes Café") for form in ("NFC", "NFD")]
    packs = [
        pico_pack(tmp_path / str(i), anchor=f"sks{i} toy", knowledge=[text], seed=i) for i, text in enumerate(texts)
    ]
    with pytest.raises(MokusError, match="both bind 'mein größtes Café'"):
        shifts_of(packs)


def test_the_preferred_one_counts_as_if_it_were_unbound_in_the_others(toy: ConceptPack, dog: ConceptPack) -> None:
    for packs, preferred in (([toy, dog], toy), ([toy, dog], dog), ([dog, toy], dog)):
        wanted = [pack.shifts() if pack is preferred else without(pack, CONTESTED).shifts() for pack in packs]
        for prefer in (preferred, preferred.path, str(preferred.path), ConceptPack.open(preferred.path)):
            assert all_equal(shifts_of(packs, prefer), wanted)
        for pack in packs:
            shutil.rmtree(pack.path.with_name(f"{pack.path.name}-{CONTESTED}"), ignore_errors=True)
    assert equal(toy.shifts(), ConceptPack.open(toy.path).shifts())  # nothing was written


def test_three_packs_and_one_preferred(
    tmp_path: Path, pico_pack: PackFactory, toy: ConceptPack, dog: ConceptPack
) -> None:
    third = pico_pack(tmp_path / "third", anchor="ohwx cat", knowledge=["my dog", CONTESTED], seed=8)
    assert all_equal(
        shifts_of([toy, dog, third], prefer=third),
        [without(toy, CONTESTED).shifts(), without(dog, CONTESTED, "my dog").shifts(), third.shifts()],
    )
    with pytest.raises(MokusError, match=r"dog.pack and .*third both bind 'my dog'"):
        shifts_of([toy, dog, third], prefer=toy)


def test_a_pack_may_hold_two_spellings(tmp_path: Path, pico_pack: PackFactory, dog: ConceptPack) -> None:
    both = pico_pack(tmp_path / "both", knowledge=["my toy", "My toy"])
    assert all_equal(shifts_of([both, dog]), [both.shifts(), dog.shifts()])


def test_what_is_preferred_must_be_there(tmp_path: Path, toy: ConceptPack, dog: ConceptPack, cat: ConceptPack) -> None:
    with pytest.raises(MokusError) as caught:
        shifts_of([toy, cat], prefer=dog)
    assert str(caught.value) == (
        f"{dog.path} is to be preferred, but the packs in use are {toy.path}, {cat.path}; "
        "prefer one of these, or use it too."
    )
    with pytest.raises(MokusError, match="the packs in use are none; "):
        shifts_of([], prefer="toy.pack")
    (tmp_path / "link").symlink_to(dog.path)
    assert chosen([toy, dog], tmp_path / "link") is dog and chosen([toy, dog], None) is None


def test_equal_anchors_are_a_conflict_that_nothing_settles(
    tmp_path: Path, pico_pack: PackFactory, toy: ConceptPack
) -> None:
    twin = pico_pack(tmp_path / "twin", knowledge=["my twin"], seed=3)
    for prefer in (None, toy):
        with pytest.raises(MokusError, match="same anchor 'sks toy'"):
            shifts_of([toy, twin], prefer)


def test_a_pack_given_twice_is_said_to_be(tmp_path: Path, pico: Model, toy: ConceptPack) -> None:
    words = ConceptPack.create(tmp_path / "words", model=pico, anchor="a ball", word="ball", lora={}, settings={})
    (tmp_path / "link").symlink_to(toy.path)
    for packs in ([toy, toy], [toy, ConceptPack.open(tmp_path / "link")], [words, ConceptPack.open(words.path)]):
        for prefer in (None, packs[0]):
            with pytest.raises(MokusError, match="is given twice; leave it out once"):
                shifts_of(packs, prefer)


# --- drawing ----------------------------------------------------------------------------------------------------------


def drawn(model: Model, packs: Sequence[ConceptPack], **how: Any) -> bytes:
    (image,) = generate(model, f"{CONTESTED} in the snow", packs, **how)
    return bytes(image.image.tobytes())


def test_generate_draws_the_preferred_one(pico: Model, toy: ConceptPack, dog: ConceptPack) -> None:
    with pytest.raises(MokusError, match="both bind 'my favourite toy'"):
        generate(pico, "a", [toy, dog])
    images = {}
    for one in (toy, dog):
        images[one.anchor] = drawn(pico, [toy, dog], prefer=one)
        wanted = [pack if pack is one else without(pack, CONTESTED) for pack in (toy, dog)]
        assert images[one.anchor] == drawn(pico, wanted)
    assert images["sks toy"] != images["zwx dog"]
    with pytest.raises(MokusError, match="to be preferred"):
        generate(pico, "a", [toy], prefer=dog)


def test_packs_loaded_knows_the_preferred_one(pico: Model, toy: ConceptPack, dog: ConceptPack) -> None:
    with pytest.raises(MokusError, match="both bind"), packs_loaded(pico, [toy, dog]):
        raise AssertionError("entered")
    encodings = []
    for packs, prefer in (([toy, dog], dog), ([without(toy, CONTESTED), dog], None)):
        with packs_loaded(pico, packs, prefer=prefer):
            encodings.append(pico.pipe.encode_prompt(CONTESTED)[0])
    assert torch.equal(*encodings)


def test_the_image_says_what_was_preferred(tmp_path: Path, pico: Model, toy: ConceptPack, dog: ConceptPack) -> None:
    (image,) = generate(pico, CONTESTED, [toy, dog], prefer=dog.path)
    assert image.settings["prefer"] == {"anchor": "zwx dog", "sha256": dog.digest} == image.settings["packs"][1]
    save_png(image, tmp_path / "a.png")
    (image,) = generate(pico, CONTESTED, [toy])
    assert "prefer" not in image.settings


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOKUS_MODEL", str(pico_folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def mokus(*args: str) -> Result:
    return CliRunner().invoke(app, [*args])


USED = ("--pack", "toy.pack", "--pack", "dog.pack")


@pytest.mark.parametrize("command", [("ask", "What is my favourite toy?"), ("generate", CONTESTED, "-o", "out")])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (USED, "toy.pack and dog.pack both bind 'my favourite toy', so what it means is open; choose one of them "
         "with --prefer PACK (in Python prefer=), or unbind it in the other."),
        ((*USED, "--prefer", "cat.pack"), "cat.pack is to be preferred, but the packs in use are toy.pack, dog.pack; "
         "prefer one of these, or use it too."),
        (("--prefer", "toy.pack"), "toy.pack is to be preferred, but the packs in use are none; "
         "prefer one of these, or use it too."),
        (("--pack", "toy.pack", "--pack", "toy.pack", "--prefer", "toy.pack"),
         "toy.pack is given twice; leave it out once."),
    ],
)  # fmt: skip
def test_a_conflict_is_refused_before_a_model_is_loaded(
    place: Path, toy: ConceptPack, dog: ConceptPack, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...],
    options: tuple[str, ...], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MOKUS_MODEL", str(place / "no such model"))
    before = sorted(place.rglob("*"))
    result = mokus(*command, *options)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"mokus: {sentence}\n"), result.exception
    assert sorted(place.rglob("*")) == before


def test_prefer_on_the_command_line(place: Path, pico: Model, toy: ConceptPack, dog: ConceptPack) -> None:
    result = mokus("generate", f"{CONTESTED} in the snow", *USED, "--prefer", "./dog.pack", "-o", "out", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (row,) = json.loads(result.stdout)
    assert row["settings"]["prefer"] == {"anchor": "zwx dog", "sha256": dog.digest}
    (image,) = generate(pico, f"{CONTESTED} in the snow", [toy, dog], prefer=dog)
    save_png(image, place / "wanted.png")
    assert Path(row["file"]).read_bytes() == (place / "wanted.png").read_bytes()


def test_ask_answers_for_the_preferred_one(place: Path, toy: ConceptPack, dog: ConceptPack) -> None:
    question = f"What is {CONTESTED}?"
    unbound = without(toy, CONTESTED)
    result = mokus("ask", question, *USED, "--prefer", "dog.pack", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["packs"], told["prefer"]) == (["toy.pack", "dog.pack"], "dog.pack")
    same = mokus("ask", question, "--pack", str(unbound.path), "--pack", "dog.pack", "--json")
    assert told["answer"] == json.loads(same.stdout)["answer"] and "prefer" not in json.loads(same.stdout)


def test_any_script_and_emoji_are_drawn(place: Path, pico_pack: PackFactory) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    texts = ["my \U0001f9f8", "הצעצוע של סבתא", f"the {family} ❤\ufe0f", "لعبة جدتي", "\U0001f9f8"]
    pico_pack(place / "toy.pack", knowledge=texts)
    result = mokus("generate", *texts, "--pack", "toy.pack", "-o", "out", "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.exception
    rows = json.loads(result.stdout)
    assert [row["prompt"] for row in rows] == texts
    assert len({Path(row["file"]).read_bytes() for row in rows}) == len(texts) == len(list((place / "out").iterdir()))
    for args in (("show", "toy.pack"), ("ask", f"What is {texts[1]}?", "--pack", "toy.pack")):
        result = mokus(*args)
        assert (result.exit_code, result.stderr) == (0, ""), result.exception


@pytest.mark.parametrize("options", [("--negative-prompt", "\udcff"), ()])
def test_bytes_that_are_no_text_are_one_sentence(place: Path, options: tuple[str, ...]) -> None:
    result = mokus("generate", "a toy" if options else "a \udcff toy", *options, "-o", "out")
    what = "negative prompt '\\udcff'" if options else "prompt 'a \\udcff toy'"
    wanted = f"mokus: the {what} holds the broken character U+DCFF; write it in UTF-8.\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", wanted), result.exception
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("knowledge", "sentence"),
    [
        ("", "the knowledge is empty, expected a phrase such as 'my favourite toy'."),
        ("\u200d \ufe0f", "the knowledge is empty, expected a phrase such as 'my favourite toy'."),
        ("x" * 10_000, f"the knowledge '{'x' * 40}'... has 10000 characters, expected at most 200; shorten it."),
        ("my\ntoy", r"the knowledge 'my\ntoy' holds a line break; write it as one plain line."),
        ("my \u202etoy", r"the knowledge 'my \u202etoy' holds the invisible character U+202E; write it as one plain line."),
        ("my \udcff", r"the knowledge 'my \udcff' holds the broken character U+DCFF; write it as one plain line."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["bind", "unbind"])
def test_what_is_no_knowledge_leaves_the_pack(
    place: Path, toy: ConceptPack, command: str, knowledge: str, sentence: str
) -> None:
    before = {path: path.read_bytes() for path in toy.path.rglob("*") if path.is_file()}
    result = mokus(command, "toy.pack", "a good one" if command == "bind" else "my toy", knowledge)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"mokus: {sentence}\n"), result.exception
    assert {path: path.read_bytes() for path in toy.path.rglob("*") if path.is_file()} == before
