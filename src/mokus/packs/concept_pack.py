"""The concept pack: what was learned, as a folder that plain diffusers and peft load.

    toy.pack/
      mokus.json                            what is in it, and the sha256 of every other file
      README.md                             model card
      pytorch_lora_weights.safetensors      stage 1: LoRA of the image transformer; a pack of words alone has none
      text_encoder/adapter_config.json      stage 2: all bound knowledge as one PEFT adapter of the text encoder,
      text_encoder/adapter_model.safetensors    only if there is any
      samples/*.png

Nothing in it depends on the time, so a pack in which knowledge was bound and unbound has the bytes it had before.
It is written whole beside its place and swapped in, so it is there either as before or as after. A pack may come from
anywhere: reading trusts nothing in it, runs nothing of it, and refuses what `create` and `replace_edits` would not have
written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

import mokus
from mokus.errors import MokusError
from mokus.knowledge import class_word, same
from mokus.low_rank import LowRankShift, Shifts, added
from mokus.packs.card import card
from mokus.packs.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    LOCK_SECONDS,
    LORA,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    README,
    as_json,
    bytes_in,
    check_place,
    clear,
    finish_swap,
    half_swapped,
    identity,
    listing,
    locked_place,
    refuse_foreign,
    refuse_inside,
    refuse_pack,
    sha256_of_file,
    store,
    swap,
    sync_folder,
)
from mokus.packs.manifest import BoundKnowledge, Manifest, parse, versions
from mokus.packs.weights import (
    ADAPTER_KEY,
    LORA_KEY,
    METADATA,
    adapter_config,
    adapter_tensors,
    check_factors,
    check_lora,
    factors_of,
    plain,
    tensors_in,
)
from mokus.pictures import png_of

if TYPE_CHECKING:
    from mokus.pipeline import Model

READ_ATTEMPTS = 20  # of a pack that another process is rewriting


# --- the pack ---------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """A pack as it was read: consistent in itself, whatever happens to the folder later."""

    manifest: Manifest
    digest: str  # sha256 of mokus.json, which names every other file's: it identifies the pack
    lora: dict[str, Tensor]
    shifts: dict[str, LowRankShift]


class ConceptPack:
    """A concept: the LoRA that knows its looks, and the shifts of the text encoder that know how it is referred to.

    What `open` or `create` gives is a snapshot in memory; `reload` takes a new one.
    """

    def __init__(self, path: Path, contents: _Contents) -> None:
        self.path = path
        self._contents = contents

    @classmethod
    def create(
        cls, path: str | Path, *, model: Model, anchor: str, lora: Mapping[str, Tensor], settings: Mapping[str, Any],
        word: str | None = None, samples: Mapping[str, Image.Image] | None = None,
        edits: Sequence[tuple[BoundKnowledge, Shifts]] = (), overwrite: bool = False,
    ) -> ConceptPack:  # fmt: skip
        """Write a pack, with the knowledge of `edits`, as `replace_edits` takes it.

        An older pack at `path` is replaced only if `overwrite` says so, however late it came there.

        `lora`: transformer.<module>.lora_A.weight (r, d_in) and lora_B.weight (d_out, r), the scale folded into B; may
        be empty, and then it is a pack of words alone. `word`: what the thing is, unless the anchor is a rare token
        before it. `settings` of stage 1, as JSON. `samples`: images by file name. Raises
        `MokusError` if there is something else at `path`, or the parts cannot be a pack.
        """
        path, place = Path(path), Path(path).resolve()
        refuse_inside(path, itself=False)
        usual = model.defaults
        defaults = {
            "size": usual.size, "steps": usual.steps, "true_cfg_scale": usual.true_cfg_scale,
            "negative_prompt": usual.negative_prompt,
        }  # fmt: skip
        fields = {
            "format": 1, "versions": versions(), "base_model": model.id, "fingerprint": model.fingerprint,
            "pipeline": model.backbone.pipeline,
            "defaults": defaults, "anchor": anchor, "class_word": word or class_word(anchor),
            "settings": json.loads(json.dumps(settings)),
        }  # fmt: skip
        fields["knowledge"], files = _knowledge(edits, path)
        files |= {f"samples/{name.removesuffix('.png')}.png": png_of(image) for name, image in (samples or {}).items()}
        if lora:
            tensors = {key: plain(value) for key, value in lora.items()}
            check_lora(tensors, f"the LoRA for {path}")
            files[LORA] = bytes_of(tensors, METADATA)
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked_place(place):
            finish_swap(place)
            refuse_foreign(place)
            refuse_pack(path, overwrite)
            _write(place, fields, files)
        return cls.open(path)

    @staticmethod
    def check_place(path: str | Path) -> None:
        """Raise `MokusError` if `create` would refuse to write there, before anything costly is done for it."""
        check_place(path)

    @staticmethod
    @contextmanager
    def lock_place(path: str | Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """`locked`, for a place where a pack need not be yet."""
        refuse_inside(Path(path), itself=False)
        place = Path(path).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked_place(place, seconds):
            yield

    @classmethod
    def open(cls, path: str | Path) -> ConceptPack:
        """Read a pack, all of it. Raises `MokusError` if there is none or anything in it is not as it must be."""
        return cls(Path(path), _load(Path(path).resolve()))

    def reload(self) -> None:
        """Take in what another process wrote since."""
        self._contents = _load(self._place)

    @contextmanager
    def locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Inside, no other process or thread writes the pack; may be nested.

        To change a pack according to what is in it, `reload` inside. Raises `MokusError` after waiting for `seconds`.
        """
        with locked_place(self._place, seconds):
            yield

    @property
    def anchor(self) -> str:
        """Rare token and class word, such as "sks toy"."""
        return self._manifest.anchor

    @property
    def class_word(self) -> str:
        """What the thing is: as a rule the anchor without its rare token."""
        return self._manifest.class_word

    @property
    def base_model(self) -> str:
        """Hub id or folder of the model the pack is for."""
        return self._manifest.base_model

    @property
    def pipeline(self) -> str:
        """The class in diffusers of the model's pipeline, as in `backbone.BACKBONES`."""
        return self._manifest.pipeline

    @property
    def fingerprint(self) -> str:
        """Of the model the pack is for, see `mokus.fingerprint`."""
        return self._manifest.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """Of stage 1."""
        return dict(self._manifest.settings)

    @property
    def knowledge(self) -> list[BoundKnowledge]:
        """What is bound, in the order it was."""
        return list(self._manifest.knowledge)

    def bound(self, text: str) -> list[BoundKnowledge]:
        """What of its knowledge this text means: the piece spelled so; if there is none, those with other capital letters."""
        exact = [known for known in self.knowledge if known.text == text]
        return exact or [known for known in self.knowledge if same(known.text) == same(text)]

    @property
    def digest(self) -> str:
        """sha256 of mokus.json, and so of everything in the pack."""
        return self._contents.digest

    @property
    def files(self) -> list[str]:
        """Paths of all files in the pack but mokus.json, which lists them."""
        return sorted(self._manifest.files)

    def lora(self) -> dict[str, Tensor]:
        """The LoRA of the image transformer, keys and tensors as in its file."""
        return dict(self._contents.lora)

    def shifts(self) -> dict[str, LowRankShift]:
        """The shifts of the text encoder's modules, all knowledge together, rows in the order of the list."""
        return dict(self._contents.shifts)

    def edits(self) -> list[tuple[BoundKnowledge, dict[str, LowRankShift]]]:
        """Every knowledge with its own part of the shifts."""
        first: Counter[str] = Counter()  # row of each module's adapter that no earlier knowledge has
        edits = []
        for known in self.knowledge:
            ends = {module: first[module] + rank for module, rank in known.ranks.items()}
            edits.append((known, {m: self._contents.shifts[m].rows(first[m], end) for m, end in ends.items()}))
            first.update(known.ranks)
        return edits

    def replace_edits(self, edits: Sequence[tuple[BoundKnowledge, Shifts]]) -> None:
        """Write the pack with this knowledge instead of what it had; `ranks` are counted anew.

        Raises `MokusError` if the pack was changed since it was read, or the shifts cannot be a pack's.
        """
        refuse_foreign(self._place)
        old = self._manifest
        kept = [name for name in old.files if name == LORA or name.startswith("samples/")]
        knowledge, files = _knowledge(edits, self.path)
        files |= {name: self._place / name for name in kept}
        fields = {**old.model_dump(exclude={"files"}), "knowledge": knowledge}
        with self.locked():
            if _load(self._place).digest != self.digest:  # reads all, so nothing broken is carried over
                raise MokusError(f"{self.path} was changed by another process since it was read; try again.")
            _write(self._place, fields, files)
            self.reload()

    def copy(self, path: str | Path, *, base_model: str | None = None) -> ConceptPack:
        """The same pack at another place, in which nothing may be, with its card written anew; for a model of that name.

        Byte for byte what this version writes. Raises `MokusError` if `path` is taken, or the pack was changed since it
        was read.
        """
        place = Path(path).resolve()
        if place.exists():
            raise MokusError(f"{path} exists already; name a new folder for the copy of {self.path}.")
        refuse_inside(place, itself=False)
        fields = self._manifest.model_dump(exclude={"files"})
        names = [name for name in self._manifest.files if name != README]
        place.parent.mkdir(parents=True, exist_ok=True)
        with self.locked(), locked_place(place):
            if _load(self._place).digest != self.digest:
                raise MokusError(f"{self.path} was changed by another process since it was read; try again.")
            files = {name: self._place / name for name in names}
            _write(place, {**fields, "base_model": base_model or self.base_model}, files)
        return ConceptPack.open(path)

    def check_base(self, model: Model) -> None:
        """Raise `MokusError` unless the pack was made for this model and fits it."""
        if self.fingerprint != model.fingerprint:
            raise MokusError(
                f"{self.path} was made for {self.base_model} ({self.fingerprint[:12]}), not for {model.id} "
                f"({model.fingerprint[:12]}); load the model it was made for, or learn the concept for this one."
            )
        lora = factors_of(self._contents.lora, LORA_KEY)
        shifts = {module: (shift.A, shift.B) for module, shift in self._contents.shifts.items()}
        for component, factors in ((model.pipe.transformer, lora), (model.pipe.text_encoder, shifts)):
            for module, (a, b) in factors.items() if component is not None else ():
                _check_fit(component, module, (b.shape[0], a.shape[1]), self.path)

    @property
    def _manifest(self) -> Manifest:
        return self._contents.manifest

    @property
    def _place(self) -> Path:
        return self.path.resolve()

    def __repr__(self) -> str:
        return f"ConceptPack({str(self.path)!r}, anchor={self.anchor!r}, knowledge={[k.text for k in self.knowledge]})"


def _knowledge(
    edits: Sequence[tuple[BoundKnowledge, Shifts]], path: Path
) -> tuple[list[dict[str, Any]], dict[str, bytes | Path]]:
    """What the manifest says of these edits, the rows of each counted, and the adapter's files, if there is any row."""
    edits = [(known, {m: shift for m, shift in shifts.items() if shift.rank}) for known, shifts in edits]
    told = [known.model_copy(update={"ranks": {m: s.rank for m, s in shifts.items()}}) for known, shifts in edits]
    files: dict[str, bytes | Path] = {}
    if shifts := added(*(shifts for _, shifts in edits)):
        tensors = adapter_tensors(shifts)
        check_factors(tensors, ADAPTER_KEY, f"the knowledge for {path}")
        files = {ADAPTER: bytes_of(tensors, METADATA), ADAPTER_CONFIG: adapter_config(shifts)}
    return [known.model_dump() for known in told], files


def _check_fit(component: nn.Module, module: str, shape: tuple[int, int], path: Path) -> None:
    try:
        found = component.get_submodule(module)
    except AttributeError:
        found = None
    found = getattr(found, "base_layer", found)  # a module that PEFT has wrapped
    wanted = (found.out_features, found.in_features) if isinstance(found, nn.Linear) else None
    if wanted != shape:
        there = "no linear module" if wanted is None else f"{wanted[0]} x {wanted[1]}"
        raise MokusError(
            f"{path} changes {module} of {type(component).__name__} by {shape[0]} x {shape[1]}, but it is {there}; "
            "the pack is not what its fingerprint says, learn it again."
        )


# --- reading ---------------------------------------------------------


def _load(place: Path) -> _Contents:
    """Read a pack; again, if another process swapped it while it was read."""
    for attempt in range(READ_ATTEMPTS):
        finish_swap(place)
        before = identity(place)
        try:
            return _read(place)
        except (MokusError, OSError) as error:
            # in this order: between the two looks a swap may end, but then the second one sees it
            swapped = half_swapped(place) or identity(place) != before
            if swapped and attempt < READ_ATTEMPTS - 1:
                continue
            if isinstance(error, OSError):
                raise MokusError(
                    f"{error.filename or place} cannot be read ({error.strerror}); get access to it."
                ) from error
            raise
    raise AssertionError("the last attempt returns or raises")


def _read(place: Path) -> _Contents:
    if not place.is_dir():
        raise MokusError(f"there is no concept pack at {place}; expected a folder that `mokus learn` wrote.")
    names = listing(place)
    if MANIFEST not in names:
        raise MokusError(
            f"{place} is no concept pack, for it has no {MANIFEST}; expected a folder that `mokus learn` wrote."
        )
    text = bytes_in(place / MANIFEST, MAX_JSON_BYTES)
    manifest = parse(text, f"{place / MANIFEST} is not what mokus {mokus.__version__} writes")
    if odd := sorted(names - {MANIFEST, *manifest.files}):
        raise MokusError(f"{place} holds {odd[0]}, which is no part of the pack; move it elsewhere.")
    if missing := sorted(manifest.files.keys() - names):
        raise MokusError(f"{place} lacks {missing[0]}, which its {MANIFEST} lists; get a whole copy of the pack.")
    contents = {}
    for name, sha in manifest.files.items():
        data = bytes_in(place / name, MAX_FILE_BYTES if name in (LORA, ADAPTER) else MAX_JSON_BYTES)
        if hashlib.sha256(data).hexdigest() != sha:
            raise MokusError(
                f"{place / name} is not the file that {MANIFEST} lists (sha256); get a whole copy of the pack."
            )
        if name in (LORA, ADAPTER, ADAPTER_CONFIG):
            contents[name] = data
    lora = tensors_in(contents[LORA], place / LORA) if LORA in contents else {}
    if LORA in contents:
        check_lora(lora, str(place / LORA))
    shifts = _shifts(contents[ADAPTER], contents[ADAPTER_CONFIG], manifest, place) if ADAPTER in contents else {}
    return _Contents(manifest, hashlib.sha256(text).hexdigest(), lora, shifts)


def _shifts(weights: bytes, config: bytes, manifest: Manifest, place: Path) -> dict[str, LowRankShift]:
    factors = check_factors(tensors_in(weights, place / ADAPTER), ADAPTER_KEY, str(place / ADAPTER))
    shifts = {module: LowRankShift(a, b) for module, (a, b) in factors.items()}
    rows: Counter[str] = Counter()
    for known in manifest.knowledge:
        rows.update(known.ranks)
    if rows != {module: shift.rank for module, shift in shifts.items()}:
        raise MokusError(
            f"{place / ADAPTER} has other rows than the knowledge in {MANIFEST}; get a whole copy of the pack."
        )
    if config != adapter_config(shifts):
        raise MokusError(
            f"{place / ADAPTER_CONFIG} is not the one of the weights beside it; get a whole copy of the pack."
        )
    return shifts


# --- writing ---------------------------------------------------------


def _write(place: Path, fields: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> None:
    """Put a pack into its place, whole: bytes, or files to copy, and the manifest and the card made from the fields."""
    samples = [name for name in files if name.startswith("samples/")]
    contents = {**files, README: card(fields, LORA in files, samples)}
    shas = {n: sha256_of_file(c) if isinstance(c, Path) else hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    manifest = as_json({**Manifest.without_usual(fields), "files": shas})
    parse(manifest, f"{place} cannot be written")  # what would not be read
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    clear(place)
    try:
        for name, content in {**contents, MANIFEST: manifest}.items():
            store(beside / name, content)
        for folder, _, _ in os.walk(beside, topdown=False):
            sync_folder(Path(folder))
        swap(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already, unless something failed
