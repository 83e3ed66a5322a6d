"""Whatever photo comes in, an upright undistorted RGB square comes out, or one sentence that names the file."""

from __future__ import annotations

import os
import random
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mokus import photos
from mokus.errors import MokusError
from mokus.photos import load_photos, photos_of

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(width: int = 60, height: int = 40, colour: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def pixel(image: Image.Image, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
    return image.getpixel((int(x * image.width), int(y * image.height)))


def close(a: tuple[int, ...], b: tuple[int, ...], by: int = 4) -> bool:
    return all(abs(i - j) <= by for i, j in zip(a, b, strict=True))


def only(folder: Path, size: int = 32) -> Image.Image:
    (photo,) = load_photos(folder, size)
    assert photo.image.mode == "RGB" and photo.image.size == (size, size)
    return photo.image


def test_every_kind_of_file_by_name_whatever_the_case(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "d.WebP", "c.png"):
        picture().save(tmp_path / name)
    loaded = load_photos(tmp_path, 24)
    assert [photo.name for photo in loaded] == ["a.jpeg", "b.JPG", "c.png", "d.WebP"]
    assert all(photo.image.size == (24, 24) and close(pixel(photo.image), RED) for photo in loaded)


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_square_without_distortion(tmp_path: Path, wide: bool) -> None:
    """A ring in the middle of a long picture stays round and in the middle, and the ends are cut off."""
    y, x = np.mgrid[0:100, 0:300] - np.array([49.5, 149.5])[:, None, None]
    disc = (np.hypot(x, y) < 30)[..., None]
    values = np.where(disc, BLUE, np.where(np.abs(x)[..., None] > 55, RED, GREEN)).astype(np.uint8)
    Image.fromarray(values if wide else values.transpose(1, 0, 2)).save(tmp_path / "a.png")
    found = np.asarray(only(tmp_path, 50)).astype(float)
    blue = found[..., 2] > 128
    rows, columns = np.nonzero(blue)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1 and abs(np.ptp(rows) + 1 - 30) <= 1
    assert abs(rows.mean() - 24.5) < 0.5 and abs(columns.mean() - 24.5) < 0.5
    assert found[..., 0].max() < 128  # nothing of the red ends


def test_exif_that_cannot_be_written_anew(tmp_path: Path) -> None:
    """The maker as a fraction, where text should be: the picture is turned all the same."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    exif += (
        struct.pack("<HHII", 0x010F, 5, 1, 38)
        + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
        + struct.pack("<III", 0, 72, 1)
    )
    upright = picture(64, 64, GREEN)
    upright.paste(RED, (0, 0, 64, 32))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with pytest.raises(AttributeError):  # what Pillow's own transposition makes of it
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    found = np.asarray(only(tmp_path, 64)).astype(int)
    assert np.abs(found - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    """Undoing what a camera does to an upright picture gives the upright picture again."""
    upright = picture(64, 64, GREEN)
    upright.paste(RED, (0, 0, 32, 32))
    upright.paste(BLUE, (32, 0, 64, 32))
    ways = Image.Transpose
    stored = {
        1: None, 2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE,
        6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270,
    }[orientation]  # fmt: skip
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(only(tmp_path, 64)), np.asarray(upright))


def test_alpha_is_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (20, 0, 40, 40))
    image.save(tmp_path / "a.png")
    found = only(tmp_path, 40)
    assert pixel(found, 0.2) == (255, 255, 255) and close(pixel(found, 0.8), (127, 127, 127))


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = picture(40, 40, BLUE)
    image.paste(RED, (0, 0, 20, 40))
    paletted = image.quantize(4)
    paletted.save(tmp_path / "a.png", transparency=paletted.getpixel((5, 5)))
    found = only(tmp_path, 40)
    assert pixel(found, 0.2) == (255, 255, 255) and pixel(found, 0.8) == BLUE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (40, 40), "white")
    white.paste("black", (0, 0, 20, 40))
    white.convert(mode).save(
        tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), **({"quality": 95} if mode == "CMYK" else {})
    )
    found = only(tmp_path, 40)
    assert close(pixel(found, 0.2), (0, 0, 0)) and close(pixel(found, 0.8), (255, 255, 255))


@pytest.mark.parametrize("value", [0, 257, 20_000, 32_896, 65_535])
def test_sixteen_bits_are_scaled(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((40, 40), value, np.uint16)).save(tmp_path / "a.png")
    assert close(pixel(only(tmp_path)), (round(value / 257),) * 3, by=1)
    (wide,) = photos_of([Image.fromarray(np.full((40, 40), value, np.int32))], 32)
    assert close(pixel(wide.image), (round(value / 257),) * 3, by=1)


def test_captions_and_other_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("  a toy, naïve \n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text(" \n")
    for name in (".DS_Store", "notes.txt", "movie.mp4"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    picture().save(tmp_path / "more" / "z.png")
    warnings: list[str] = []
    loaded = load_photos(tmp_path, 32, warnings.append)
    assert [(photo.name, photo.caption) for photo in loaded] == [
        ("a.png", "a toy, naïve"),
        ("b.png", None),
        ("c.png", None),
    ]
    assert [Path(line.split(" is ignored")[0]).name for line in warnings] == ["more", "movie.mp4", "notes.txt"]
    assert load_photos(tmp_path, 32)[0].image.tobytes() == loaded[0].image.tobytes()


def test_images_in_memory_are_treated_alike(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8))
    image.save(tmp_path / "a.png")
    (from_memory,) = photos_of([image], 32)
    assert from_memory.image.tobytes() == only(tmp_path).tobytes() and from_memory.caption is None
    for bad in ([], ["a.png"], [picture(10, 10)]):
        with pytest.raises(MokusError):
            photos_of(bad, 32)  # type: ignore[arg-type]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(MokusError) as error:
        load_photos(folder, 32)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_no_folder_and_no_photos(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "not there")
    refused(tmp_path, str(tmp_path), "no photo")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "not a folder")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_broken_photos_never_cause_anything_but_a_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(file, exif=exif)
    whole, rng, refusals = file.read_bytes(), random.Random(0), 0
    for length in (0, 1, 20, len(whole) // 2):
        file.write_bytes(whole[:length])
        refused(tmp_path, name)
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 4, 30])):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            assert only(tmp_path).size == (32, 32)
        except MokusError as error:
            refusals += 1
            assert name in str(error) and "\n" not in str(error)
    assert refusals


def test_other_formats_under_a_photos_name(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", format="GIF")
    refused(tmp_path, "a.jpg")
    (tmp_path / "a.jpg").write_text("not a photo")
    refused(tmp_path, "a.jpg")


def bomb(side: int) -> bytes:
    """A tiny PNG that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_100, 13_400, 60_000])  # our limit, Pillow's, far beyond
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(bomb(side))
    refused(tmp_path, "a.png", f"{photos.MAX_PIXELS:,}")


def test_photos_too_small(tmp_path: Path) -> None:
    picture(400, 15).save(tmp_path / "a.png")
    refused(tmp_path, "a.png", "400 x 15")
    picture(16, 16).save(tmp_path / "a.png")
    assert only(tmp_path).size == (32, 32)


def test_what_is_no_file(tmp_path: Path) -> None:
    for number, make in enumerate((Path.mkdir, os.mkfifo, lambda path: path.symlink_to(tmp_path / "gone"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        picture().save(folder / "a.png")
        make(folder / "x.jpg")
        refused(folder, "x.jpg")


def test_unreadable_photos_and_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\xd8")
    refused(tmp_path, "a.txt", "UTF-8")
    (tmp_path / "a.txt").unlink()

    def forbidden(*_: object, **__: object) -> BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(photos.Image, "open", forbidden)  # a test may run as root, whom no permission stops
    refused(tmp_path, "a.png", "Permission denied")
