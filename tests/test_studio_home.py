"""The studio's folder: names from a browser, and photos as the model will see them."""

from __future__ import annotations

import os
import random
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mokus import MokusError
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.files import LORA
from mokus.photos import load_photos
from mokus.studio.home import MOST_PHOTOS, Home
from mokus.training.checkpoint import checkpoint_of
from tests.conftest import PackFactory

SIZE = 32


def png(image: Image.Image) -> bytes:
    image.save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def lying_on_its_side() -> bytes:
    """A JPEG, 96 x 64 as stored, that a camera which was turned has taken: upright its left half is blue."""
    upright = Image.new("RGB", (64, 96), "red")
    ImageDraw.Draw(upright).rectangle((0, 0, 31, 95), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer := BytesIO(), "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "x" * 65, "a\nb", "ä"])
def test_a_name_never_leads_outside(home: Home, name: str) -> None:
    for way in (home.pack, home.new_pack, home.photos):
        with pytest.raises(MokusError, match="cannot be the name"):
            way(name)


def test_a_pack_whose_folder_has_another_name_is_a_fault(home: Home, pico_pack: PackFactory) -> None:
    names = ["with space.pack", "пример.pack", "toy", "x" * 65 + ".pack", "good.pack", ".hidden.pack"]
    for name in names:
        pico_pack(home.packs_folder / name)
    (home.packs_folder / "no-pack").mkdir()
    (home.packs_folder / os.fsdecode(b"\xff.pack")).mkdir()  # no UTF-8, which no page can hold
    packs, faults = home.packs()
    assert list(packs) == ["good"]
    assert sorted(faults) == sorted(["with space", "пример", "toy", "x" * 65, "\\udcff"])
    assert all("rename it" in fault for fault in faults.values())


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "packs", "secret.txt", "../../home/../secret.png"])
def test_only_pictures_of_this_folder_are_given_out(home: Home, path: str) -> None:
    (home.path.parent / "secret.png").write_bytes(png(Image.new("RGB", (1, 1))))
    (home.path / "secret.txt").write_text("x", encoding="utf-8")
    assert home.inside(path) is None


def test_a_link_to_the_outside_is_not_given_out(home: Home) -> None:
    (outside := home.path.parent / "secret.png").write_bytes(png(Image.new("RGB", (1, 1))))
    (home.packs_folder / "link.png").symlink_to(outside)
    assert home.inside("packs/link.png") is None


def test_what_is_shown_is_what_the_model_is_given(home: Home) -> None:
    name = home.new_photos()
    assert home.add_photos(name, [("IMG 1.JPG", lying_on_its_side())], SIZE) == []
    [seen], [photo] = home.seen(name), load_photos(home.photos(name), SIZE)
    shown = Image.open(seen.square)
    assert shown.tobytes() == photo.image.tobytes()
    assert shown.getpixel((4, 4))[2] > 200 > 60 > shown.getpixel((4, 4))[0]  # upright: blue is at the left
    assert seen.about == "96 × 64, turned upright, cut to the middle square"
    assert Image.open(seen.whole).size == (64, 96)


def test_what_is_cut_off_is_faded_and_the_rest_is_not(home: Home) -> None:
    name = home.new_photos()
    home.add_photos(name, [("wide.png", png(Image.new("RGB", (90, 30), "red")))], SIZE)
    whole = Image.open(home.seen(name)[0].whole)
    assert whole.getpixel((45, 15)) == (255, 0, 0) != whole.getpixel((5, 15))


def test_a_file_that_is_no_photo_is_named_and_the_others_are_kept(home: Home) -> None:
    name, good = home.new_photos(), png(Image.new("RGB", (20, 20)))
    files = [("a.png", good), ("broken.jpg", b"\xff\xd8nothing"), ("tiny.png", png(Image.new("RGB", (3, 3)))),
             ("list.txt", b"x"), ("b.png", good)]  # fmt: skip
    faults = home.add_photos(name, files, SIZE)
    assert [fault.split()[0] for fault in faults] == ["broken.jpg", "tiny.png", "list.txt"]
    assert not any(str(home.path) in fault for fault in faults)  # it says the user's name of it
    assert [seen.name for seen in home.seen(name)] == ["001-a.png", "002-b.png"]


def test_photos_of_one_name_do_not_replace_each_other(home: Home) -> None:
    name = home.new_photos()
    files = [("a.png", png(Image.new("RGB", (20, 20), colour))) for colour in ("red", "blue")]
    home.add_photos(name, [*files, ("../../a.png", files[0][1])], SIZE)
    assert len(home.seen(name)) == 3
    home.remove_photo(name, "001-a.png")
    assert [seen.name for seen in home.seen(name)] == ["002-a.png", "003-a.png"]
    assert sorted(path.name for path in (home.photos(name) / ".seen").iterdir()) == [
        "002-a.png.png", "002-a.png.whole.png", "003-a.png.png", "003-a.png.whole.png",
    ]  # fmt: skip


def test_a_set_has_an_end(home: Home) -> None:
    name, file = home.new_photos(), ("a.png", png(Image.new("RGB", (16, 16))))
    with pytest.raises(MokusError, match=f"at most {MOST_PHOTOS}"):
        home.add_photos(name, [file] * (MOST_PHOTOS + 1), 16)


def test_a_free_name_is_free_and_can_be_a_name(home: Home) -> None:
    letters = random.Random(0)
    for _ in range(50):
        wanted = "".join(letters.choice("aZ0 .-/<’é") for _ in range(letters.randint(0, 60)))
        home.new_pack(home.free_name(wanted)).mkdir()  # it raises for one that is taken or cannot be a name


def test_the_name_of_what_is_learned_so_far_is_not_free(home: Home) -> None:
    checkpoint_of(home.new_pack("toy")).parent.mkdir()
    assert home.free_name("toy") == "toy-2"
    assert home.free_name("toy", [str(home.packs_folder / "toy-2.pack")]) == "toy-3"
    with pytest.raises(MokusError, match=r"learned so far for a pack named 'toy' already; choose another"):
        home.new_pack("toy")


def test_a_pack_is_read_when_it_has_changed_and_then_alone(
    home: Home, pico_pack: PackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, open_one = [], ConceptPack.open

    def opened(path: Path) -> ConceptPack:
        read.append(path.name)
        return open_one(path)

    for name in ("a", "b"):
        pico_pack(home.new_pack(name), knowledge=["my favourite toy"])
    monkeypatch.setattr(ConceptPack, "open", opened)
    for _ in range(2):
        packs, _ = home.packs()
        assert [known.text for known in packs["b"].knowledge] == ["my favourite toy"]
        assert not packs["b"].lora() and not packs["b"].shifts()  # weights of all packs would not fit
    assert read == ["a.pack", "b.pack"]
    open_one(home.pack("b")).replace_edits([])  # as another process does it
    assert home.packs()[0]["b"].knowledge == [] and read[2:] == ["b.pack"]
    shutil.rmtree(home.pack("a"))
    assert list(home.packs()[0]) == ["b"] and read[3:] == []
    with (home.pack("b") / LORA).open("r+b") as file:  # in its place, to the same size
        file.write(b"x")
    for _ in range(2):
        packs, faults = home.packs()
        assert packs == {} and "sha256" in faults["b"]


def test_a_pack_that_cannot_be_read_is_told_of(home: Home) -> None:
    (home.packs_folder / "broken.pack").mkdir()
    packs, faults = home.packs()
    assert packs == {} and list(faults) == ["broken"]
