"""Models of the hub or of a folder, what identifies them, and what is computed with them once."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import PIL
import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import cached_file
from transformers.utils import logging as chatter

from mokus.bench.knowcusbench.metrics import About
from mokus.errors import MokusError
from mokus.pipeline import device_of

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True)
class Pretrained:
    """A saved model: "owner/name" or "owner/name@revision" of the hub, or a folder. Read when it is first asked for.

    `metric` and `option` are for errors: what it is for, and how another one is named. Raises `MokusError` if it cannot be
    had; kinds are the `model_type`s expected, any if none is given.
    """

    name: str
    metric: str
    option: str
    kinds: tuple[str, ...] = ()

    def model(self, loader: Any, device: str | None = None) -> Any:
        """The model in float32, frozen, on the device; without one on a GPU if there is one."""
        where = device_of(device)
        with _quiet(bars=not self._here and sys.stderr.isatty()):
            model, found = self.load(loader, dtype=torch.float32, output_loading_info=True)
        # a pooler that nothing was saved for is made at random, and not used
        if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
            raise MokusError(
                f"the model {self.name!r} of {self.option} lacks {missing[0]} and {len(missing) - 1} other weights of a "
                f"{type(model).__name__}; get a whole copy, or name another."
            )
        return model.requires_grad_(False).eval().to(where)

    def image_processor(self) -> Any:
        """With Pillow's resampling, whatever else is installed, so that figures do not depend on it."""
        return self.load(transformers.AutoImageProcessor, backend="pil")

    def load(self, loader: Any, **settings: Any) -> Any:
        """`loader.from_pretrained` of it, at the commit that was found first."""
        if self._revision:
            settings["revision"] = self._revision
        with self._had():
            return loader.from_pretrained(self._source, **settings)

    @cached_property
    def about(self) -> About:
        """{"id", "revision", "sha256", versions}: the commit of a hub's model, the hash of a folder's files."""
        folder = Path(self._source)
        return {
            "id": folder.resolve().name if self._here else self._source,
            "revision": self._revision,
            "sha256": sha256(sorted(folder.glob("*"))) if self._here else None,
            **versions(),
        }

    @property
    def _here(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def _source(self) -> str:
        return self.name if self._here else self.name.partition("@")[0]

    @cached_property
    def _revision(self) -> str | None:
        """The commit, as the hub or the copy of it on this machine says; a branch may move while files are read."""
        asked = self.name.partition("@")[2]
        with self._had():
            if self._here:
                file = Path(self.name) / "config.json"
            elif found := cached_file(self._source, "config.json", **({"revision": asked} if asked else {})):
                file = Path(found)
            else:
                raise FileNotFoundError("it has no config.json")
            kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        if self.kinds and kind not in self.kinds:
            raise MokusError(
                f"the model {self.name!r} of {self.option} is of the kind {kind!r}, expected {' or '.join(self.kinds)}."
            )
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", file.as_posix())
        return commit[1] if commit and not self._here else None

    @contextmanager
    def _had(self) -> Iterator[None]:
        try:
            yield
        # of what is not there, what is damaged, and pickles that hold more than tensors
        except (OSError, SafetensorError, json.JSONDecodeError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(". ")
            raise MokusError(
                f"the model {self.name!r} cannot be had ({reason}); check the name and the connection, name another or a "
                f"folder by {self.option}, or leave the metric out by --without {self.metric}."
            ) from error


def versions() -> About:
    """Of the libraries that decide a figure."""
    return {
        "torch": str(torch.__version__), "transformers": str(transformers.__version__), "pillow": str(PIL.__version__),
    }  # fmt: skip


def sha256(files: Sequence[Path]) -> str:
    """Of names and contents; folders and hidden files are passed over."""
    found = hashlib.sha256()
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as contents:
                found.update(file.name.encode() + hashlib.file_digest(contents, "sha256").digest())
    return found.hexdigest()


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Inside, transformers says nothing of weights that are not used, such as a video model's memory; bars if wanted."""
    verbosity, bars_before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    if not bars:
        chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars_before:
            chatter.enable_progress_bar()


# --- computed once ----------------------------------------------------------------------------------------------------


def distinct(images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The images without repetitions of the same object, and where each of `images` is among them."""
    places: dict[int, int] = {}
    found: list[Image.Image] = []
    for image in images:
        if id(image) not in places:
            places[id(image)] = len(found)
            found.append(image)
    return found, [places[id(image)] for image in images]


class OfReferences(Generic[T]):
    """What is computed of a concept's references, kept for each tuple of them and each further word.

    What is given by name belongs to the references, such as their masks, and does not tell them apart.
    """

    def __init__(self, compute: Callable[..., T]) -> None:
        self._compute = compute
        # the tuple is kept as well, so that no other one gets its identity
        self._known: dict[tuple[Any, ...], tuple[tuple[Image.Image, ...], T]] = {}

    def __call__(self, references: tuple[Image.Image, ...], *further: str, **beside: Any) -> T:
        key = (id(references), *further)
        if key not in self._known:
            self._known[key] = (references, self._compute(references, *further, **beside))
        return self._known[key][1]
