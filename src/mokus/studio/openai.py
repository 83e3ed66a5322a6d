"""What goes over the wire: the requests and errors of OpenAI's images API, as far as it is spoken here, and ours."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mokus.errors import MokusError
from mokus.packs.files import LORA, MANIFEST
from mokus.sizes import MAX_SIZE, Size, parsed, sides

NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a pack: no path can be written in it

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


def check_folder(packs: Path | None) -> None:
    """Raise `MokusError` if that folder is not there."""
    if packs is not None and not packs.is_dir():
        raise MokusError(f"there is no folder {packs}; expected one with concept packs in it (--packs).")


class ApiError(Exception):
    """An error as OpenAI tells it."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """With how long to wait, and whom to be."""
        found = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str
    model: str | None = None  # a pack's name, or the base model's, which it is without one
    user: str | None = None  # of no consequence


class ImagesRequest(_Request):
    """POST /v1/images/generations. `seed` is ours: image i of n is drawn at seed + i."""

    n: Annotated[int, Field(ge=1)] | None = 1
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    quality: Literal["auto", "standard"] | None = "auto"
    output_format: Literal["png"] | None = "png"
    seed: Seed | None = None


class EmbedsRequest(_Request):
    """POST /v1/prompt_embeds."""

    negative_prompt: str | None = None  # the model's own
    response_format: Literal["b64_json", "safetensors"] | None = "b64_json"


def size_of(size: str | None, usual: int, most: int, multiple: int) -> Size:
    """The pixels of an image, as many as a square of `most` has or fewer. Raises `ApiError` for what is not drawn here."""
    if size in (None, "auto"):
        return usual
    found = parsed(str(size)) if "x" in str(size) else None
    if found is None:
        raise ApiError(
            400, f"the size is {str(size)[:20]!r}, expected width and height such as '{usual}x{usual}'.", param="size"
        )
    width, height = sides(found)
    if width * height > most * most or max(width, height) > MAX_SIZE or width % multiple or height % multiple:
        raise ApiError(
            400, f"the size is {width}x{height}, expected multiples of {multiple}, and no more pixels than {most}x{most} has.",
            param="size",
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Models:
    """The base model, and the packs in one folder by their names."""

    base: str
    fingerprint: str
    folder: Path | None

    @classmethod
    def of(cls, model: dict[str, Any], folder: Path | None) -> Models:
        """`model` as the worker describes it. Raises `MokusError` if the folder is not there."""
        check_folder(folder)
        base = Path(model["id"]).name if Path(model["id"]).is_absolute() else model["id"]
        return cls(base, model["fingerprint"], folder.resolve() if folder else None)

    def listed(self) -> list[dict[str, Any]]:
        """The base model, and the packs for it by their names; others are not served, see `left_out`."""
        rows = [{"id": self.base, "object": "model", "created": 0, "owned_by": "mokus"}]
        for path in self._folders():
            if isinstance(about := self._about(path.name), dict):
                created = int((path / MANIFEST).stat().st_mtime)
                rows.append({"id": path.name, "object": "model", "created": created, "owned_by": "mokus", **about})
        return rows

    def left_out(self) -> dict[str, str]:
        """Packs that are not served, by the names of their folders, with why; hidden ones are packs that are being written."""
        packs = [path.name for path in self._folders() if path.name[0] != "." and (path / MANIFEST).is_file()]
        return {name: why for name in packs if isinstance(why := self._about(name), str)}

    def find(self, name: str | None) -> str | None:
        """The path of a pack, or None for the base model. Raises `ApiError` if there is neither."""
        if name is None or name == self.base:
            return None
        if self.folder and isinstance(self._about(name), dict):
            return str(self.folder / name)
        raise ApiError(
            404, f"the model {name[:100]!r} is not here; GET /v1/models lists those that are.", code="model_not_found",
            param="model",
        )  # fmt: skip

    def plain(self, sentence: str) -> str:
        """A sentence of the library without the place of the folder."""
        return sentence.replace(f"{self.folder}/", "") if self.folder else sentence

    def _folders(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder else []

    def _about(self, name: str) -> dict[str, Any] | str:
        """What a visitor may want to know of a pack, or why it is not served; the worker looks at it more closely."""
        if name == self.base:
            return "the base model has this name; rename its folder"
        if not self.folder or not NAME.fullmatch(name):
            return "a model cannot have this name; rename its folder to letters a to z, digits, dots and dashes"
        try:
            says = json.loads((self.folder / name / MANIFEST).read_bytes())
            if says["fingerprint"] != self.fingerprint:
                return f"it was made for another base model than {self.base}"
            knowledge = [str(known["text"]) for known in says["knowledge"]]
            " ".join([says["anchor"], *knowledge]).encode()  # half a character can be in no answer
            return {"anchor": str(says["anchor"]), "knowledge": knowledge, "looks": LORA in says["files"]}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return f"its {MANIFEST} cannot be read"
