"""Second moments of what enters the edited modules, over a corpus: what the editors take for "everything else".

Gathered once per model and kept in the platform's cache folder (`MOKUS_CACHE` names another), one file per module or per
several that are entered by the same. A file says which model, corpus and module it is of, and how far it got, so that a
stopped run goes on, and what is stale, foreign or damaged is found out and gathered anew. Memory: two matrices (d_in, d_in)
for each module of a pass, and as many modules in a pass as fit `MEMORY`.

What the encoder says to a prompt counts, too: an edit that leaves all prompts where they are can still end their
continuations otherwise, the second word of an answer first (docs/log.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mokus.encoder import CHUNK, CONTINUED, entrance, inputs_at_prefix, inputs_of, of_equal_length
from mokus.errors import MokusError
from mokus.knowledge import questions
from mokus.prior_prompts import in_places, prior_prompts
from mokus.progress import Progress
from mokus.words import Words

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.settings import EditSettings


FORMAT = "3"
MEMORY = 8 << 30  # bytes of matrices in one pass
SAVE_EVERY = 20.0  # seconds
CLASS_WORDS = ["toy", "dog", "robot", "house", "shoe", "lamp", "bird", "vase", "book", "bag"]


@dataclass(frozen=True)
class Corpus:
    """Prompts whose tokens are all counted, and those of which only the template's tail is."""

    whole: list[str]
    tails: list[str]

    @property
    def sha256(self) -> str:
        """Of its texts."""
        return hashlib.sha256(json.dumps([self.whole, self.tails], ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Moments:
    """Of what enters one module, or several: gram = sum of x x^T (d_in, d_in), float64, over so many rows x; behind: the same
    over the tails of whole prompts and what the encoder says to them."""

    gram: Tensor
    behind: Tensor
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.behind + other.behind, self.rows + other.rows)


def corpus_of(model: Model, settings: EditSettings) -> Corpus:
    """The corpus for a model: prompts that any model knows, its own if its folder brings some, and odd references.

    Its own (`mokus_corpus.txt`, a prompt a line) stand for what it was trained on, as Wikipedia does in MEMIT.
    """
    whole: list[str] = []
    for word in CLASS_WORDS:
        some = prior_prompts(word, settings.corpus // len(CLASS_WORDS), seed=0)
        whole += some + [questions(text)[0] for text in some[::2] if not text.startswith("a ")]
    return Corpus([*whole, *model.corpus], list(_odd(model.tokenizer, settings.odd_references)))


@lru_cache(maxsize=4)
def _odd(tokenizer: Any, n: int) -> tuple[str, ...]:
    return tuple(in_places(Words.of(tokenizer).references(n, seed=0), seed=0))


def moments(model: Model, paths: Sequence[str], corpus: Corpus, progress: Progress | None = None) -> dict[str, Moments]:
    """Of every module, from the cache or gathered now. `progress("gathering statistics", prompts done, all, {})`.

    Modules that are entered by the same (`encoder.entrance`) have the same moments in common.
    """
    folder = cache_folder() / "statistics"
    entered = list(dict.fromkeys(map(entrance, paths)))
    found: dict[str, Moments] = {}
    with _usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{_key(model, '', corpus)}.lock").acquire()  # another process may be at it
    with lock:
        _clear(folder, [_key(model, path, corpus) for path in entered])
        for group in _passes(model, entered):
            found |= _one_pass(model, group, corpus, folder, progress)
    return {path: found[entrance(path)] for path in paths}


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """A folder that cannot be made or written, or a full disk, is a `MokusError` that says which variable names another."""
    try:
        yield
    except OSError as error:
        raise MokusError(
            f"the statistics cannot be kept in {folder} ({error.strerror or error}); make room or get access there, or name "
            "another folder by the variable MOKUS_CACHE."
        ) from error


def _clear(folder: Path, keys: Sequence[str]) -> None:
    """Take away what writers left when they were killed; only under the lock, so none of it is still being written."""
    for key in keys:
        for left in folder.glob(f".{key}.safetensors.*.tmp"):
            left.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where statistics are kept."""
    return Path(os.environ.get("MOKUS_CACHE") or platformdirs.user_cache_path("mokus"))


# --- gathering ---------------------------------------------------------


def _passes(model: Model, paths: Sequence[str]) -> Iterator[list[str]]:
    """The modules in groups whose matrices fit the memory."""
    group: list[str] = []
    held = 0
    for path in paths:
        size = 2 * 8 * model.pipe.text_encoder.get_submodule(path).in_features ** 2
        if group and held + size > MEMORY:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    yield group


def _one_pass(
    model: Model, paths: list[str], corpus: Corpus, folder: Path, progress: Progress | None
) -> dict[str, Moments]:
    files = {path: folder / f"{_key(model, path, corpus)}.safetensors" for path in paths}
    state = {path: _read(file, _about(model, path, corpus), model.device) for path, file in files.items()}
    grams = {path: known[0] if (known := state[path]) else _nothing(model, path) for path in paths}
    if all(known and known[1] == known[2] for known in state.values()):
        return grams  # it takes longer to tokenize a corpus than to read its moments
    chunks = _chunks(model, corpus)
    total = len(corpus.whole) + len(corpus.tails)
    counted = {path: known[1] if (known := state[path]) else 0 for path in paths}  # chunks
    done = min(counted.values())
    saved = time.monotonic()
    prompts = sum(len(texts) for texts, _ in chunks[:done])
    for i in range(done, len(chunks) + 1):
        late = [path for path in paths if counted[path] <= i]
        if late:
            for path, more in _moments(model, chunks, i, late).items():
                grams[path] = grams[path] + more
                counted[path] = i + 1
        last = i == len(chunks)
        if late and (last or time.monotonic() - saved > SAVE_EVERY):
            for path in late:
                _write(files[path], grams[path], counted[path], len(chunks) + 1, _about(model, path, corpus))
            saved = time.monotonic()
        if progress and late:
            progress("gathering statistics", prompts, total, {})
        if not last:
            prompts += len(chunks[i][0])
    if progress:
        progress("gathering statistics", total, total, {})
    return grams


def _chunks(model: Model, corpus: Corpus) -> list[tuple[list[str], bool]]:
    """Prompts a few at a time, and whether only their tails count; in a fixed order, which a resumed run relies on."""
    return [
        (equal, tail)
        for texts, tail in ((corpus.whole, False), (corpus.tails, True))
        for equal in of_equal_length(model, texts)
    ]


def _moments(model: Model, chunks: list[tuple[list[str], bool]], i: int, paths: list[str]) -> dict[str, Moments]:
    """Of the i-th chunk; after the last one, of the template's prefix, which every prompt shares."""
    if i == len(chunks):
        return {path: Moments(_gram(x), _gram(x[:0]), len(x)) for path, x in inputs_at_prefix(model, paths).items()}

    texts, tail = chunks[i]
    found = inputs_of(model, texts, paths, said=0 if tail else CONTINUED)
    rows, behind = (found.tail, found.said) if tail else (found.whole, found.behind)
    return {path: Moments(_gram(x), _gram(behind[path]), len(x)) for path, x in rows.items()}


def _gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def _nothing(model: Model, path: str) -> Moments:
    width = model.pipe.text_encoder.get_submodule(path).in_features
    nothing = torch.zeros(width, width, dtype=torch.float64, device=model.device)
    return Moments(nothing, nothing, 0)


# --- the cache ---------------------------------------------------------


def _about(model: Model, path: str, corpus: Corpus) -> dict[str, str]:
    return {"format": f"{FORMAT}/{CHUNK}", "fingerprint": model.fingerprint, "corpus": corpus.sha256, "module": path}


def _key(model: Model, path: str, corpus: Corpus) -> str:
    return hashlib.sha256(json.dumps(_about(model, path, corpus)).encode()).hexdigest()[:40]


def _read(file: Path, about: dict[str, str], device: torch.device) -> tuple[Moments, int, int] | None:
    """What is in the cache, how many chunks it has counted and of how many; None if there is nothing to trust."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said, both = opened.metadata() or {}, [opened.get_tensor("gram"), opened.get_tensor("behind")]
        whole = (
            said.get("sha256") == _sha256(*both, said.get("rows"), said.get("chunks"))
            and {k: said.get(k) for k in about} == about
        )
        if whole and all(x.ndim == 2 and x.shape[0] == x.shape[1] and bool(x.isfinite().all()) for x in both):
            counted, of = map(int, said["chunks"].split("/"))
            return Moments(both[0].to(device), both[1].to(device), int(said["rows"])), counted, of
        why = "is of another model or corpus, or damaged"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        why = f"cannot be read ({error})"
    logging.getLogger("mokus").warning("the statistics in %s %s; they are gathered anew.", file, why)
    return None


def _write(file: Path, value: Moments, counted: int, of: int, about: dict[str, str]) -> None:
    gram, behind = value.gram.cpu().contiguous(), value.behind.cpu().contiguous()
    rows, chunks = str(value.rows), f"{counted}/{of}"
    said = {**about, "rows": rows, "chunks": chunks, "sha256": _sha256(gram, behind, rows, chunks)}
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _usable(file.parent):
        try:
            beside.write_bytes(save({"gram": gram, "behind": behind}, said))
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)


def _sha256(gram: Tensor, behind: Tensor, *counts: str | None) -> str:
    digest = hashlib.sha256()
    for tensor in (gram, behind):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    digest.update("/".join(map(str, counts)).encode())
    return digest.hexdigest()
