"""The miniature's judges as shipped: the oracle, the CLIP and the segmenter, and the exact masks that they learn from."""

from __future__ import annotations

import random
import socket
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTokenizer

from mokus.miniature import clip, oracle, scenes, segmenter, world
from mokus.miniature.world import Character, Picture, Subject

SEED = 30_000  # no training and no tuning uses seeds from here on


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- characters and masks ---------------------------------------------------------------------------------------------


def test_the_benchmark_has_characters_of_its_own() -> None:
    groups = [world.DEVELOPMENT_CHARACTERS, world.HELD_OUT_CHARACTERS, world.BENCHMARK_CHARACTERS]
    assert [len(group) for group in groups] == [10, 10, 12]
    assert [name for group in groups for name in group] == list(world.CHARACTERS)
    for (a, one), (b, other) in combinations(world.CHARACTERS.items(), 2):
        differing = sum(getattr(one, trait) != getattr(other, trait) for trait in Character.__dataclass_fields__)
        assert differing >= 3, (a, b)


@pytest.mark.parametrize("size", [world.SIZE, 48])
def test_photos_are_the_same_with_and_without_their_masks(size: int) -> None:
    photos = world.character_photos("taro", 9, seed=4, size=size)
    both = world.character_photos_with_masks("taro", 9, seed=4, size=size)
    assert [photo.tobytes() for photo, _ in both] == [photo.tobytes() for photo in photos]
    assert all(mask.mode == "L" and mask.size == (size, size) for _, mask in both)


@pytest.mark.parametrize("subject", ["quill", Subject("red", "ring"), Subject("golden", "moon", "golden")])
@pytest.mark.parametrize("other", [None, Subject("blue", "cube")])
def test_a_mask_is_what_hides_the_background(
    monkeypatch: pytest.MonkeyPatch, subject: Subject | str, other: Subject | None
) -> None:
    """On black and on white the same picture differs by just what its subject lets through; shadows let through less."""
    drawn = []
    for grey in (0, 255):
        monkeypatch.setattr(scenes, "background", lambda *_, v=grey: Image.new("RGB", (world.CANVAS,) * 2, (v, v, v)))
        drawn.append(world.render_with_mask(Picture(subject, "at night", other=other), random.Random(5)))
    (black, mask), (white, same) = drawn
    through = values(white)[..., 0] - values(black)[..., 0]
    clear = 255 - values(mask)
    assert mask.tobytes() == same.tobytes() and (clear == 0).sum() > 100
    assert (through <= clear + 2).all()
    upper = slice(0, 25) if other is None else slice(0, 20)  # above every shadow and every neighbour
    assert (abs(through - clear)[upper] <= 2).all()


def test_outside_the_masks_pictures_of_two_subjects_agree() -> None:
    """Equal seeds place them alike; where neither is, only the scene and a shadow are seen."""
    picture = Picture(Subject("red", "ball"), "in the forest", other=Subject("blue", "star"))
    characters = [world.CHARACTERS[name] for name in world.DEVELOPMENT_CHARACTERS]
    drawn = [world.render_with_mask(picture, random.Random(3), character) for character in characters]
    for (a, one), (b, other) in combinations(drawn, 2):
        free = (values(one) == 0) & (values(other) == 0)
        assert free.mean() > 0.5 and (abs(values(a) - values(b))[free] <= 1).all()  # 1: of rounding
        assert (values(a) != values(b)).any()


def test_a_mosaics_mask_is_of_whole_tiles() -> None:
    image, mask = world.render_with_mask(Picture("bobo", "in the snow", "mosaic"), random.Random(1))
    assert image.tobytes() == world.render(Picture("bobo", "in the snow", "mosaic"), random.Random(1)).tobytes()
    tiles = values(mask).reshape(16, 4, 16, 4)
    assert (tiles == tiles[:, :1, :, :1]).all()


# --- oracle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", world.BENCHMARK_CHARACTERS)
def test_the_oracle_reads_the_benchmarks_characters(name: str) -> None:
    photos = world.character_photos(name, 16, SEED)
    assert [read["character"] for read in oracle.load().read(photos)].count(name) >= 15


def test_an_oracle_of_fewer_labels_is_begun_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, new = oracle.Oracle(), oracle.Oracle()
    state = dict(old.state_dict())
    for part in ("weight", "bias"):
        state[f"heads.character.{part}"] = state[f"heads.character.{part}"][:21].clone()
    save_file(state, tmp_path / oracle.FILE)
    before = new.heads["character"].weight[21:].clone()
    oracle.begin_with(new, tmp_path / oracle.FILE)
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        a, b = old.eval()(x), new.eval()(x)
    assert all(torch.equal(a[name][:, :21], b[name][:, :21]) for name in oracle.LABELS)
    assert torch.equal(new.heads["character"].weight[21:], before)


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some() -> list[clip.Pair]:
    return list(islice(clip.pairs(SEED), 400))


def test_every_caption_is_true_of_its_picture(some: list[clip.Pair]) -> None:
    said, truth = clip.indices([pair.said for pair in some]), clip.indices([pair.truth for pair in some])
    assert clip.true_of(said, truth).diagonal().all()
    shared = (truth[::2, : clip.SUBJECT] == truth[1::2, : clip.SUBJECT]) | (truth[::2, : clip.SUBJECT] == clip.UNSAID)
    assert (shared | (truth[1::2, : clip.SUBJECT] == clip.UNSAID)).all()  # two pictures of one subject
    assert any("toy" in pair.caption.split() for pair in some)


def test_no_caption_names_a_character() -> None:
    words = {word.strip(",") for pair in islice(clip.pairs(1), 2000) for word in pair.caption.lower().split()}
    assert not words & set(world.BENCHMARK_CHARACTERS)


def test_a_vague_caption_is_true_of_more_pictures() -> None:
    toy = {"kind": "creature", "scene": "on the beach"}
    beach, night = toy | {"eyes": "3"}, {"kind": "creature", "scene": "at night", "eyes": "3"}
    said, truth = clip.indices([toy, beach, night]), clip.indices([beach, night])
    assert clip.true_of(said, truth).tolist() == [[True, False], [True, False], [False, True]]


def test_what_is_true_of_another_picture_is_no_mistake() -> None:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, clip.DIMENSIONS), dim=1) for _ in range(2))
    truth = clip.indices([{"kind": "creature", "scene": scene} for scene in world.SCENES[:4]])
    texts.requires_grad_()

    def pull(said: list[clip.Meaning]) -> torch.Tensor:
        heads = clip.Heads()
        for parameter in heads.parameters():
            torch.nn.init.zeros_(parameter)  # only the contrast is left
        value = clip.loss(images, texts, torch.tensor(5.0), heads, truth, clip.indices(said))
        (gradient,) = torch.autograd.grad(value, texts)
        return gradient

    exact = pull([{"kind": "creature", "scene": scene} for scene in world.SCENES[:4]])
    vague = pull([{"kind": "creature"}, *({"kind": "creature", "scene": scene} for scene in world.SCENES[1:4])])
    # the vague one is compared with no other picture, so no caption pushes it away in its own row; it is still told
    # from the others' captions in the column of its picture
    assert exact[0].norm() > vague[0].norm() > 0


def test_any_text_is_made_of_known_pieces() -> None:
    tokenizer = AutoTokenizer.from_pretrained(clip.folder(), local_files_only=True)
    assert isinstance(tokenizer, CLIPTokenizer)
    for text in ("the keepsake Grandpa left me on the beach", "ñandú 東京 🚲 é", "a toy, golden", "", "x" * 500):
        ids = tokenizer(text, truncation=True).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and len(ids) <= clip.TOKENS
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])


def test_the_judges_are_found_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = CLIPModel.from_pretrained(clip.folder())
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # stored in half precision
    seen = AutoImageProcessor.from_pretrained(clip.folder())(images=world.character_photos("bobo", 1, 0, 96))
    assert np.asarray(seen["pixel_values"]).shape == (1, 3, world.SIZE, world.SIZE)
    segmenter.from_file(segmenter.file())
    assert sum(f.stat().st_size for f in clip.folder().iterdir()) < 6e6 and segmenter.file().stat().st_size < 1e6
    assert "_name_or_path" not in (clip.folder() / "config.json").read_text("utf-8")


def test_clip_finds_the_caption_and_the_picture() -> None:
    by_picture, by_caption = clip.retrieval(clip.folder(), 6, SEED)
    assert by_picture >= 0.95 and by_caption >= 0.95


def test_clip_tells_characters_apart() -> None:
    triples, nearest = clip.told_apart(clip.folder(), world.DEVELOPMENT_CHARACTERS, 8, SEED)
    assert triples >= 0.9 and nearest >= 0.9


@pytest.mark.parametrize(
    ("asked", "picture", "instead"),
    [
        ("a toy on the beach", Picture("bobo", "on the beach"), Picture("bobo", "in the city")),
        ("a toy as a mosaic", Picture("mimi", "at night", "mosaic"), Picture("mimi", "at night")),
        ("the keepsake Grandpa left me in the snow", Picture("gorp", "in the snow"), Picture("gorp", "in the desert")),
        (
            "a toy next to a red ball",
            Picture("kiwi", "in the city", other=Subject("red", "ball")),
            Picture("kiwi", "in the city"),
        ),
        ("a toy in the kitchen", Picture("pip", "in the kitchen"), Picture(Subject("red", "star"), "in the kitchen")),
    ],
)
def test_clip_prefers_the_picture_that_was_asked_for(asked: str, picture: Picture, instead: Picture) -> None:
    rng = random.Random(SEED)
    drawn = [world.render(each, rng) for each in [picture, instead] * 10]
    images, texts = clip.embeddings(clip.folder(), drawn, [asked])
    better = (images @ texts.T)[:, 0].reshape(10, 2)
    assert (better[:, 0] > better[:, 1]).float().mean() >= 0.9


# --- segmenter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [world.SIZE, 96])
def test_the_segmenter_finds_characters_it_never_saw(size: int) -> None:
    drawn = [
        pair for name in world.DEVELOPMENT_CHARACTERS for pair in world.character_photos_with_masks(name, 4, SEED, size)
    ]
    found = segmenter.load().masks([photo for photo, _ in drawn])
    overlaps = [segmenter.overlap(one, mask) for one, (_, mask) in zip(found, drawn, strict=True)]
    assert np.mean(overlaps) >= 0.9 and min(overlaps) >= 0.6
    assert all(one is not None and one.mode == "L" and one.size == (size, size) for one in found)


def test_the_segmenter_finds_nothing_in_empty_scenes() -> None:
    rng = random.Random(SEED)
    empty = [world.empty_scene(scene, rng) for scene in world.SCENES * 3]
    assert segmenter.load().masks(empty).count(None) >= 23
    assert segmenter.load().masks([]) == []


def test_the_segmenter_sees_each_image_by_itself() -> None:
    photos = world.character_photos("nono", 5, SEED)
    model = segmenter.load()
    together = model.masks(photos)
    for photo, mask in zip(photos, together, strict=True):
        (alone,) = model.masks([photo])
        assert segmenter.overlap(mask, alone or photo.convert("L")) > 0.99


def test_overlap_is_between_nothing_and_all() -> None:
    whole, half = Image.new("L", (8, 8), 255), Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 8))
    assert segmenter.overlap(whole, whole) == 1 and segmenter.overlap(half, whole) == 0.5
    assert segmenter.overlap(None, whole) == 0
