"""The studio's folder: packs, uploaded photos, reports; the worker keeps its jobs and their images there, too.

Names come from a browser, so none of them leads outside.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock
from PIL import ExifTags, Image

from mokus.console import visible
from mokus.errors import MokusError
from mokus.files import copy
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.files import MANIFEST, identity
from mokus.photos import MIN_SIDE, SUFFIXES, TURNS, load_photos, upright
from mokus.training.checkpoint import checkpoint_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SUFFIX = ".pack"
MOST_PHOTOS = 100  # in one set
TOO_MANY = f"a concept is learned from at most {MOST_PHOTOS} photos here; take some away."
LARGEST_PHOTO = 64 << 20  # bytes
_SEEN = ".seen"  # hidden, so that `load_photos` passes it over
_WHOLE_SIDE = 192  # pixels


_State = dict[Path, tuple[int, ...] | None]


@dataclass(frozen=True)
class SeenPhoto:
    """An uploaded photo and what the model will see of it."""

    name: str
    about: str  # "4032 x 3024, turned upright, cut to the middle square"
    square: Path  # what the model sees
    whole: Path  # all of it, upright, with what is cut off faded


class Home:
    """One folder with everything the studio keeps."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._packs: dict[Path, tuple[_State, ConceptPack]] = {}  # as they were last read
        for folder in (self.packs_folder, self.photos_folder, self.reports_folder):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def packs_folder(self) -> Path:
        """Where concept packs are."""
        return self.path / "packs"

    @property
    def photos_folder(self) -> Path:
        """Where uploaded photos are, a folder for each concept."""
        return self.path / "photos"

    @property
    def reports_folder(self) -> Path:
        """Where reports of benchmarks are."""
        return self.path / "reports"

    # --- packs ---------------------------------------------------------

    def packs(self) -> tuple[dict[str, ConceptPack], dict[str, str]]:
        """All packs by name, without their weights, and what is wrong with those that cannot be read.

        A page is made while one types, so a pack is read again only when it has changed.
        """
        packs, faults, read = {}, {}, {}
        for path in sorted(filter(_maybe_pack, self.packs_folder.iterdir())):
            name = path.name.removesuffix(SUFFIX)
            try:
                _check_folder(path.name)
                state = _state(path)  # before it is read: what changes meanwhile is read the next time
                before, pack = self._packs.get(path, (None, None))
                if pack is None or before != state:
                    pack = _without_weights(ConceptPack.open(path))
                packs[name], read[path] = pack, (state, pack)
            except MokusError as error:
                faults[visible(name)] = str(error)
        self._packs = read
        return packs, faults

    def pack(self, name: str) -> Path:
        """Where the pack of that name is. Raises `MokusError` for a name that is none, or of no pack."""
        path = self._place(_checked(name, "pack"))
        if not path.is_dir():
            raise MokusError(f"there is no pack named {name!r}; choose one of the list.")
        return path

    def new_pack(self, name: str, promised: Collection[str] = ()) -> Path:
        """Where a new pack goes. Raises `MokusError` for a name that cannot be one's, or is another's.

        `promised`: paths of packs that are still to be made.
        """
        path = self._place(_checked(name.strip().replace(" ", "-"), "pack"))
        if whose := _holder(path, promised):
            raise MokusError(f"there is {whose} named {name!r} already; choose another name.")
        return path

    def take(self, name: str, pack: Path) -> Path:
        """Copy a pack in from elsewhere, whole or not at all. Raises `MokusError` as `new_pack` does."""
        with FileLock(self.packs_folder / ".take.lock"):  # a button may be pressed twice
            path = self.new_pack(name)
            beside = path.with_name(f".{path.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)  # of a copying that was killed
            try:
                os.replace(copy(pack, beside), path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return path

    def free_name(self, wanted: str, promised: Collection[str] = ()) -> str:
        """The name, or one like it that no pack has or will have; `promised` as in `new_pack`."""
        stem = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:40] or "concept"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
        return next(name for name in names if not _holder(self._place(name), promised))

    def _place(self, name: str) -> Path:
        return self.packs_folder / f"{name}{SUFFIX}"

    # --- photos ---------------------------------------------------------

    def new_photos(self) -> str:
        """The name of a new, empty set of photos."""
        name = secrets.token_hex(6)
        (self.photos_folder / name).mkdir()
        return name

    def photos(self, name: str) -> Path:
        """The folder of a set. Raises `MokusError` if there is none."""
        folder = self.photos_folder / _checked(name, "set of photos")
        if not folder.is_dir():
            raise MokusError("these photos are no longer there; add them again.")
        return folder

    def add_photos(self, name: str, files: Sequence[tuple[str, bytes]], size: int) -> list[str]:
        """Keep uploaded files (their name, their bytes) that are usable photos; returns what is wrong with the others.

        `size`: of the square that the model sees, pixels.
        """
        folder, faults = self.photos(name), []
        there = len(list(_photos_in(folder)))
        for given, content in files:
            if there >= MOST_PHOTOS:
                raise MokusError(TOO_MANY)
            if len(content) > LARGEST_PHOTO:
                faults.append(f"{given} has {len(content) >> 20} MB, expected at most {LARGEST_PHOTO >> 20}.")
                continue
            try:
                _keep(folder, given, content, size)
                there += 1
            except MokusError as error:
                faults.append(str(error))
        return faults

    def remove_photo(self, name: str, photo: str) -> None:
        """Take one photo out of a set."""
        folder = self.photos(name)
        for path in (folder / _checked(photo, "photo"), *_seen(folder, photo)):
            path.unlink(missing_ok=True)

    def seen(self, name: str) -> list[SeenPhoto]:
        """The photos of a set, in their order."""
        folder = self.photos(name)
        return [SeenPhoto(path.name, _about(path), *_seen(folder, path.name)) for path in _photos_in(folder)]

    # --- files ---------------------------------------------------------

    def inside(self, relative: str) -> Path | None:
        """A picture in this folder, by its path from here; None for anything else."""
        try:
            path = (self.path / relative).resolve()
            known = path.is_relative_to(self.path) and path.suffix.lower() == ".png"
            return path if known and path.is_file() else None
        except (OSError, ValueError):  # too long, or a zero byte: no file can be called that
            return None

    def address(self, path: str | Path) -> str:
        """Where the browser finds a picture of this folder."""
        return f"/files/{Path(path).resolve().relative_to(self.path).as_posix()}"


def _state(pack: Path) -> _State:
    """What changes with anything in the pack's folder."""
    inside = [Path(folder, name) for folder, folders, files in os.walk(pack) for name in (*folders, *files)]
    return {path: identity(path) for path in (pack, *inside)}


def _without_weights(pack: ConceptPack) -> ConceptPack:
    return ConceptPack(pack.path, replace(pack._contents, lora={}, shifts={}))


def _maybe_pack(path: Path) -> bool:
    """Whether a folder is meant as a pack; hidden ones are packs that are being written."""
    meant = path.suffix == SUFFIX or (path / MANIFEST).is_file()
    return meant and path.is_dir() and not path.name.startswith(".")


def _holder(path: Path, promised: Collection[str]) -> str:
    """What has this place, in words; empty if it is free."""
    if path.exists():
        return "a pack"
    if str(path) in promised:
        return "a job that is not done, for a pack"
    return "what was learned so far for a pack" if checkpoint_of(path).parent.exists() else ""


def _check_folder(name: str) -> None:
    if not NAME.fullmatch(name.removesuffix(SUFFIX)) or not name.endswith(SUFFIX):
        raise MokusError(
            f"a pack's folder cannot be called that here, expected up to 64 letters a to z, digits, dots and dashes, "
            f"and {SUFFIX} at the end; rename it."
        )


def _checked(name: str, what: str) -> str:
    if not NAME.fullmatch(name):
        raise MokusError(
            f"{name[:60]!r} cannot be the name of a {what}, expected up to 64 letters a to z, digits, dots and dashes."
        )
    return name


def _photos_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES)


def _seen(folder: Path, photo: str) -> tuple[Path, Path]:
    return folder / _SEEN / f"{photo}.png", folder / _SEEN / f"{photo}.whole.png"


def _keep(folder: Path, given: str, content: bytes, size: int) -> None:
    """Check a file by itself before it comes to the others, and draw what the model will see of it."""
    number = 1 + max((int(path.name.split("-")[0]) for path in _photos_in(folder)), default=0)
    stem, suffix = os.path.splitext(Path(given.replace("\\", "/")).name)
    if suffix.lower() not in SUFFIXES:
        raise MokusError(
            f"{given} is no photo that can be read here, expected a file that ends in {', '.join(SUFFIXES)}."
        )
    safe = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40] or "photo"
    name = f"{number:03d}-{safe}{suffix.lower()}"
    (folder / _SEEN).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder / _SEEN) as alone:
        file = Path(alone) / name
        file.write_bytes(content)
        try:
            [photo] = load_photos(alone, max(size, MIN_SIDE))
        except MokusError as error:
            raise MokusError(str(error).replace(str(file), given)) from error
        square, whole = _seen(folder, name)
        photo.image.save(square)
        _faded(file).save(whole)
        os.replace(file, folder / name)


def _faded(path: Path) -> Image.Image:
    """All of a photo, small, with what is outside its middle square faded."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * _WHOLE_SIDE, 2 * _WHOLE_SIDE))
        small = upright(image)
    small.thumbnail((_WHOLE_SIDE, _WHOLE_SIDE))
    side, (width, height) = min(small.size), small.size
    left, top = (width - side) // 2, (height - side) // 2
    middle = small.crop((left, top, left + side, top + side))
    faded = Image.blend(small, Image.new("RGB", small.size, "#8a8f99"), 0.7)
    faded.paste(middle, (left, top))
    return faded


def _about(path: Path) -> str:
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in TURNS
    parts = [f"{width} × {height}"]
    parts += ["turned upright"] * turned + ["cut to the middle square"] * (width != height)
    return ", ".join(parts)
