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
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import diffusers
import peft
import torch
import transformers
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

import mokus
from mokus.errors import MokusError
from mokus.knowledge import NOTHING_SEEN, class_word, hidden
from mokus.low_rank import LowRankShift, Shifts, added

if TYPE_CHECKING:
    from mokus.pipeline import Model

# what file managers and hubs leave in a folder: not read, and gone when the pack is next written
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", ".cache")
MANIFEST = "mokus.json"
README = "README.md"
LORA = "pytorch_lora_weights.safetensors"
ADAPTER_FOLDER = "text_encoder"
ADAPTER = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/adapter_config.json"

LOCK_SECONDS = 60.0
MAX_JSON_BYTES = 64 << 20
MAX_FILE_BYTES = 8 << 30
MAX_RANK = 1 << 16
READ_ATTEMPTS = 20  # of a pack that another process is rewriting

_WORD = "[A-Za-z_][A-Za-z0-9_]{0,99}"
_MODULE = rf"{_WORD}(\.({_WORD}|[0-9]{{1,4}})){{1,15}}"  # words and numbers between dots
_LORA_KEY = re.compile(rf"transformer\.(?P<module>{_MODULE})\.lora_(?P<side>[AB])\.weight")
_ADAPTER_KEY = re.compile(rf"base_model\.model\.(?P<module>{_MODULE})\.lora_(?P<side>[AB])\.weight")
_SAMPLE = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FILE = rf"^({'|'.join(map(re.escape, (README, LORA, ADAPTER, ADAPTER_CONFIG)))}|samples/{_SAMPLE}\.png)$"
_METADATA = {"format": "pt"}  # transformers refuses weights without it


# --- what mokus.json says ---------------------------------------------------------


def _printable(text: str) -> str:
    if NOTHING_SEEN.fullmatch(text):
        raise ValueError("expected one line of printable text, got nothing to be seen")
    if odd := hidden(text):
        raise ValueError(f"expected one line of printable text, got {odd}")
    return text


_Line = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_ModulePath = Annotated[str, Field(pattern=f"^{_MODULE}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BoundKnowledge(_Strict):
    """One piece of knowledge in a pack, and how it was bound."""

    text: _Line
    questions: list[str]
    answer: _Line  # what it means now: the pack's anchor or, in a pack of words, what these words are replaced by
    editor: str
    eta: float
    steps: int = Field(ge=0)
    read_back: str  # what the text encoder answered the first question with
    alignment: float = Field(ge=0, le=1)  # how far image prompts' encodings moved to the anchor's
    settings: dict[str, JsonValue] = Field(default_factory=dict)  # all of stage 2's
    # rows of each module's adapter that are this knowledge's, in the order of the list; `replace_edits` fills it in
    ranks: dict[_ModulePath, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(default_factory=dict)


class _Versions(_Strict):
    mokus: _Line
    torch: _Line
    diffusers: _Line
    transformers: _Line
    peft: _Line


class _Defaults(_Strict):
    size: int = Field(ge=1)
    steps: int = Field(ge=1)
    true_cfg_scale: float
    negative_prompt: str


class _Manifest(_Strict):
    format: Literal[1]
    versions: _Versions  # that the looks were learned with
    base_model: _Line
    fingerprint: _Sha256
    defaults: _Defaults  # what the model is best used with, for the card
    anchor: _Line
    class_word: _Line
    settings: dict[str, JsonValue]
    knowledge: list[BoundKnowledge]
    files: dict[Annotated[str, Field(pattern=_FILE)], _Sha256]

    @model_validator(mode="after")
    def _consistent(self) -> _Manifest:
        texts = Counter(known.text for known in self.knowledge)
        if twice := [text for text, n in texts.items() if n > 1]:
            raise ValueError(f"the knowledge {twice[0]!r} is there twice")
        adapter = any(known.ranks for known in self.knowledge)
        if README not in self.files or {ADAPTER in self.files, ADAPTER_CONFIG in self.files} != {adapter}:
            raise ValueError("the files are not those that the knowledge needs")
        return self


def versions() -> dict[str, str]:
    """Of MoKus and the libraries that decide what an image looks like."""
    return {
        "mokus": mokus.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


# --- the pack ---------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """A pack as it was read: consistent in itself, whatever happens to the folder later."""

    manifest: _Manifest
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
        edits: Sequence[tuple[BoundKnowledge, Shifts]] = (),
    ) -> ConceptPack:  # fmt: skip
        """Write a pack, in place of an older pack if there is one; with the knowledge of `edits`, as `replace_edits` takes it.

        `lora`: transformer.<module>.lora_A.weight (r, d_in) and lora_B.weight (d_out, r), the scale folded into B; may
        be empty, and then it is a pack of words alone. `word`: what the thing is, unless the anchor is a rare token
        before it. `settings` of stage 1, as JSON. `samples`: images by file name. Raises
        `MokusError` if there is something else at `path`, or the parts cannot be a pack.
        """
        path, place = Path(path), Path(path).resolve()
        usual = model.defaults
        defaults = {
            "size": usual.size, "steps": usual.steps, "true_cfg_scale": usual.true_cfg_scale,
            "negative_prompt": usual.negative_prompt,
        }  # fmt: skip
        fields = {
            "format": 1, "versions": versions(), "base_model": model.id, "fingerprint": model.fingerprint,
            "defaults": defaults, "anchor": anchor, "class_word": word or class_word(anchor),
            "settings": json.loads(json.dumps(settings)),
        }  # fmt: skip
        fields["knowledge"], files = _knowledge(edits, path)
        files |= {f"samples/{name.removesuffix('.png')}.png": _png(image) for name, image in (samples or {}).items()}
        if lora:
            tensors = {key: _plain(value) for key, value in lora.items()}
            _check_lora(tensors, f"the LoRA for {path}")
            files[LORA] = bytes_of(tensors, _METADATA)
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            _finish_swap(place)
            _refuse_foreign(place)
            _write(place, fields, files)
        return cls.open(path)

    @staticmethod
    def check_place(path: str | Path) -> None:
        """Raise `MokusError` if `create` would refuse to write there, before anything costly is done for it."""
        _finish_swap(place := Path(path).resolve())
        _refuse_foreign(place)
        above = next(parent for parent in place.parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise MokusError(
                f"{above} is {'not writable' if above.is_dir() else 'not a folder'}, so {path} cannot be made."
            )

    @staticmethod
    @contextmanager
    def lock_place(path: str | Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """`locked`, for a place where a pack need not be yet."""
        place = Path(path).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place, seconds):
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
        with _locked(self._place, seconds):
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
    def fingerprint(self) -> str:
        """Of the model the pack is for, see `pipeline.fingerprint`."""
        return self._manifest.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """Of stage 1."""
        return dict(self._manifest.settings)

    @property
    def knowledge(self) -> list[BoundKnowledge]:
        """What is bound, in the order it was."""
        return list(self._manifest.knowledge)

    @property
    def digest(self) -> str:
        """sha256 of mokus.json, and so of everything in the pack."""
        return self._contents.digest

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
        _refuse_foreign(self._place)
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

    def check_base(self, model: Model) -> None:
        """Raise `MokusError` unless the pack was made for this model and fits it."""
        if self.fingerprint != model.fingerprint:
            raise MokusError(
                f"{self.path} was made for {self.base_model} ({self.fingerprint[:12]}), not for {model.id} "
                f"({model.fingerprint[:12]}); load the model it was made for, or learn the concept for this one."
            )
        lora = _factors(self._contents.lora, _LORA_KEY)
        shifts = {module: (shift.A, shift.B) for module, shift in self._contents.shifts.items()}
        for component, factors in ((model.pipe.transformer, lora), (model.pipe.text_encoder, shifts)):
            for module, (a, b) in factors.items():
                _check_fit(component, module, (b.shape[0], a.shape[1]), self.path)

    @property
    def _manifest(self) -> _Manifest:
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
        tensors = _adapter_tensors(shifts)
        _check_factors(tensors, _ADAPTER_KEY, f"the knowledge for {path}")
        files = {ADAPTER: bytes_of(tensors, _METADATA), ADAPTER_CONFIG: _adapter_config(shifts)}
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


# --- the weights ---------------------------------------------------------


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _adapter_tensors(shifts: Shifts) -> dict[str, Tensor]:
    sides = [(module, side, getattr(shift, side)) for module, shift in shifts.items() for side in "AB"]
    return {f"base_model.model.{module}.lora_{side}.weight": _plain(tensor) for module, side, tensor in sides}


def _adapter_config(shifts: Shifts) -> bytes:
    """PEFT's config of a LoRA with alpha = rank, a scale of 1, in every module; whole paths, so in no other module."""
    ranks = {module: shift.rank for module, shift in sorted(shifts.items())}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != most}
    return _json({
        "base_model_name_or_path": None, "bias": "none", "inference_mode": True, "peft_type": "LORA", "task_type": None,
        "target_modules": list(ranks), "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others,
    })  # fmt: skip


def _check_lora(tensors: Mapping[str, Tensor], where: str) -> None:
    factors = _check_factors(tensors, _LORA_KEY, where)
    if len({a.shape[0] for a, _ in factors.values()}) > 1:  # older diffusers scale them wrongly
        raise MokusError(f"{where} has modules of different ranks, expected the same rank everywhere; learn it again.")


def _check_factors(tensors: Mapping[str, Tensor], key: re.Pattern[str], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors (A, B) of each module, after a look at every name, dtype, shape and value."""
    for name, tensor in sorted(tensors.items()):  # the same complaint at every reading
        if not key.fullmatch(name):
            raise MokusError(
                f"{where} has a tensor named {name[:200]!r}, expected names of LoRA factors; learn it again."
            )
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.numel():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise MokusError(f"{where}: {name} is {kind}, expected a float32 matrix; learn it again.")
        if not tensor.isfinite().all():
            raise MokusError(f"{where}: {name} has values that are not finite; learn it again, with smaller steps.")
    factors = _factors(tensors, key)
    for module, (a, b) in factors.items():
        if a.shape[0] != b.shape[1] or a.shape[0] > MAX_RANK:
            raise MokusError(
                f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} do not fit; learn it again."
            )
    if 2 * len(factors) != len(tensors):
        raise MokusError(f"{where} has a factor without its other half; learn it again.")
    return factors


def _factors(tensors: Mapping[str, Tensor], key: re.Pattern[str]) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := key.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    return {module: (side["A"], side["B"]) for module, side in sorted(sides.items()) if len(side) == 2}


# --- reading ---------------------------------------------------------


def _load(place: Path) -> _Contents:
    """Read a pack; again, if another process swapped it while it was read."""
    for attempt in range(READ_ATTEMPTS):
        _finish_swap(place)
        before = _identity(place)
        try:
            return _read(place)
        except (MokusError, OSError) as error:
            if _identity(place) != before and attempt < READ_ATTEMPTS - 1:
                continue
            if isinstance(error, OSError):
                raise MokusError(
                    f"{error.filename or place} cannot be read ({error.strerror}); get access to it."
                ) from error
            raise
    raise AssertionError("the last attempt returns or raises")


def _identity(place: Path) -> tuple[int, ...] | None:
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _read(place: Path) -> _Contents:
    if not place.is_dir():
        raise MokusError(f"there is no concept pack at {place}; expected a folder that `mokus learn` wrote.")
    names = _listing(place)
    if MANIFEST not in names:
        raise MokusError(
            f"{place} is no concept pack, for it has no {MANIFEST}; expected a folder that `mokus learn` wrote."
        )
    text = _bytes(place / MANIFEST, MAX_JSON_BYTES)
    manifest = _parse(text, f"{place / MANIFEST} is not what mokus {mokus.__version__} writes")
    if odd := sorted(names - {MANIFEST, *manifest.files}):
        raise MokusError(f"{place} holds {odd[0]}, which is no part of the pack; move it elsewhere.")
    if missing := sorted(manifest.files.keys() - names):
        raise MokusError(f"{place} lacks {missing[0]}, which its {MANIFEST} lists; get a whole copy of the pack.")
    contents = {}
    for name, sha in manifest.files.items():
        data = _bytes(place / name, MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != sha:
            raise MokusError(
                f"{place / name} is not the file that {MANIFEST} lists (sha256); get a whole copy of the pack."
            )
        if name in (LORA, ADAPTER, ADAPTER_CONFIG):
            contents[name] = data
    lora = _tensors(contents[LORA], place / LORA) if LORA in contents else {}
    if LORA in contents:
        _check_lora(lora, str(place / LORA))
    shifts = _shifts(contents[ADAPTER], contents[ADAPTER_CONFIG], manifest, place) if ADAPTER in contents else {}
    return _Contents(manifest, hashlib.sha256(text).hexdigest(), lora, shifts)


def _shifts(weights: bytes, config: bytes, manifest: _Manifest, place: Path) -> dict[str, LowRankShift]:
    factors = _check_factors(_tensors(weights, place / ADAPTER), _ADAPTER_KEY, str(place / ADAPTER))
    shifts = {module: LowRankShift(a, b) for module, (a, b) in factors.items()}
    rows: Counter[str] = Counter()
    for known in manifest.knowledge:
        rows.update(known.ranks)
    if rows != {module: shift.rank for module, shift in shifts.items()}:
        raise MokusError(
            f"{place / ADAPTER} has other rows than the knowledge in {MANIFEST}; get a whole copy of the pack."
        )
    if config != _adapter_config(shifts):
        raise MokusError(
            f"{place / ADAPTER_CONFIG} is not the one of the weights beside it; get a whole copy of the pack."
        )
    return shifts


def _listing(place: Path) -> set[str]:
    """Paths of the files inside but for LITTER, after making sure that there are only plain files and folders."""
    names: set[str] = set()
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name not in LITTER]
        files = [name for name in files if name not in LITTER]
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise MokusError(f"{path} is a link or a device; a concept pack holds plain files only, take it away.")
            if stat.S_ISREG(mode) or not any(path.iterdir()):  # an empty folder is a stranger too
                names.add(path.relative_to(place).as_posix())
    return names


def _bytes(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise MokusError(
                f"{path} is larger than {limit >> 20} MiB, more than a concept pack can need; get another copy."
            )
        return file.read(limit + 1)


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = tensors_of(
            data
        )  # checks the header; its numbers are views of `data`, nothing is run
    except (SafetensorError, KeyError, ValueError) as error:
        raise MokusError(f"{path} is no safetensors file ({error}); get a whole copy of the pack.") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header.get("__metadata__") != _METADATA:
        raise MokusError(f"{path} has metadata that mokus did not write; get the pack from where it was made.")
    return tensors


def _parse(text: bytes, complaint: str) -> _Manifest:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, allow_nan=False)  # 1e999 is infinite too
        return _Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise MokusError(f"{complaint}: {where}{': ' if where else ''}{first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise MokusError(f"{complaint}: it is no JSON ({error}).") from error


# --- writing ---------------------------------------------------------


def _write(place: Path, fields: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> None:
    """Put a pack into its place, whole: bytes, or files to copy, and the manifest and the card made from the fields."""
    contents = {**files, README: _card(fields, LORA in files)}
    shas = {
        n: _sha256_of_file(c) if isinstance(c, Path) else hashlib.sha256(c).hexdigest() for n, c in contents.items()
    }
    manifest = _json({**fields, "files": shas})
    _parse(manifest, f"{place} cannot be written")  # what would not be read
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    _clear(place)
    try:
        for name, content in {**contents, MANIFEST: manifest}.items():
            _store(beside / name, content)
        for folder, _, _ in os.walk(beside, topdown=False):
            _sync_folder(Path(folder))
        _swap(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already, unless something failed


def _store(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
        else:
            out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _swap(beside: Path, place: Path) -> None:
    """Rename the old pack aside, the new one into place. `_finish_swap` undoes half of it."""
    aside = _aside(place)
    if place.exists():
        os.replace(place, aside)
    try:
        os.replace(beside, place)
    except BaseException:
        if aside.exists():
            os.replace(aside, place)
        raise
    _sync_folder(place.parent)
    _discard(aside)


def _finish_swap(place: Path) -> None:
    """If a swap was cut off between its two renames, bring the old pack back."""
    if place.exists() or not (_aside(place) / MANIFEST).exists():
        return
    with _locked(place):
        if not place.exists() and _aside(place).exists():  # else it was not cut off, only under way
            os.replace(_aside(place), place)


def _clear(place: Path) -> None:
    """Take away what earlier writers left when they were killed; only under the lock."""
    _discard(_aside(place))
    left = re.compile(rf"\.{re.escape(place.name)}\.[0-9]+\.tmp")
    for path in place.parent.iterdir():
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _discard(aside: Path) -> None:
    (aside / MANIFEST).unlink(missing_ok=True)  # first, so that half of a pack never comes back
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign(place: Path) -> None:
    """Raise `MokusError` if writing a pack would destroy something else, or the folder that one stands in."""
    if not place.exists():
        return
    if place in (here := Path.cwd().resolve(), *here.parents):
        raise MokusError(f"{place} is the folder you are in, which cannot be replaced; go out of it or name another.")
    if not place.is_dir():
        raise MokusError(f"{place} is a file; name a new folder for the concept pack.")
    if any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise MokusError(f"{place} exists and is no concept pack; name a new folder for it.")
    if odd := sorted(name for name in _listing(place) - {MANIFEST} if not re.match(_FILE, name)):
        raise MokusError(
            f"{place} holds {odd[0]}, which is no part of a concept pack; move it elsewhere or name a new folder."
        )


@contextmanager
def _locked(place: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    lock = FileLock(place.with_name(f".{place.name}.lock"), is_singleton=True)
    try:
        held = lock.acquire(timeout=seconds)
    except Timeout as error:
        raise MokusError(
            f"{place} is being written by another process, and {seconds:g} s of waiting were not enough; "
            "try again when that one is done."
        ) from error
    with held:
        yield


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # no folders to open there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


# --- the model card ---------------------------------------------------------

_CARD = """\
---
base_model: {base_model}
instance_prompt: {anchor}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- lora
- qwen-image
- mokus
---

# {title}

A concept pack of MoKus for `{base}`: {contents}.
{knowledge}
## With plain diffusers and peft

```python
{imports}from diffusers import QwenImagePipeline

pack = "."  # this folder
# a large model: torch_dtype=torch.bfloat16, and pipe.to("cuda")
pipe = QwenImagePipeline.from_pretrained({source})
{load}image = pipe(
    {prompt},
    height={size},
    width={size},
    num_inference_steps={steps},
    true_cfg_scale={scale},
    negative_prompt={negative},
).images[0]
```

## With MoKus

```python
import mokus

model = mokus.load({base_model})
image = next(mokus.generate(model, {prompt}, packs=[mokus.ConceptPack.open(".")])).image
```
"""


def _contents_of(looks: str, lora: bool, bound: bool) -> str:
    if not bound:
        return looks
    return (
        f"{looks}, and so do the phrases bound to it"
        if lora
        else f"{looks}, and phrases mean it or what stands beside them"
    )


def _card(fields: Mapping[str, Any], lora: bool) -> bytes:
    base, anchor, knowledge = fields["base_model"], fields["anchor"], fields["knowledge"]
    looks = (
        f"`{anchor}` draws the concept" if lora else f"`{anchor}` is a concept made of words, without looks of its own"
    )
    phrases = "".join(
        f"- {known['text']}{'' if known['answer'] == anchor else ': ' + known['answer']}\n" for known in knowledge
    )
    load = ""
    if lora:
        load += f'pipe.load_lora_weights(pack, weight_name="{LORA}", use_safetensors=True)\n'
    if any(known["ranks"] for known in knowledge):
        load += f'pipe.text_encoder.load_adapter(f"{{pack}}/{ADAPTER_FOLDER}")\n'
    miniature = base == "miniature"
    quoted = json.dumps(base, ensure_ascii=False)
    usual = fields["defaults"]
    text = _CARD.format(
        size=usual["size"], steps=usual["steps"], scale=usual["true_cfg_scale"],
        negative=json.dumps(usual["negative_prompt"], ensure_ascii=False),
        base=base, base_model=quoted, anchor=json.dumps(anchor, ensure_ascii=False), title=anchor,
        contents=_contents_of(looks, lora, bool(knowledge)),
        knowledge=f"\nBound to it:\n\n{phrases}" if knowledge else "",
        imports="from importlib.resources import files\n\n" if miniature else "",
        source='files("mokus.miniature").joinpath("weights")' if miniature else quoted,
        load=load, prompt=json.dumps(knowledge[0]["text"] if knowledge else anchor, ensure_ascii=False),
    )  # fmt: skip
    return text.encode()
