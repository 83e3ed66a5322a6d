"""What a pack's mokus.json says, and what it may say: read strictly, since it may come from anywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

import mokus
from mokus.backbone import BACKBONES, QWEN_IMAGE
from mokus.errors import MokusError
from mokus.knowledge import LONGEST_TEXT, NOTHING_SEEN, hidden
from mokus.packs.files import ADAPTER, ADAPTER_CONFIG, FILE, README, as_json
from mokus.packs.weights import MAX_RANK, MODULE

DEEPEST = 40  # lists and mappings inside each other


def _printable(text: str) -> str:
    if NOTHING_SEEN.fullmatch(text):
        raise ValueError("expected one line of printable text, got nothing to be seen")
    if odd := hidden(text):
        raise ValueError(f"expected one line of printable text, got {odd}")
    return text


def _known_pipeline(name: str) -> str:
    if name not in BACKBONES:
        raise ValueError(f"expected one of {', '.join(BACKBONES)}, got {name[:60]!r}")
    return name


_Line = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
_Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_ModulePath = Annotated[str, Field(pattern=f"^{MODULE}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BoundKnowledge(_Strict):
    """One piece of knowledge in a pack, and how it was bound."""

    text: _Line
    questions: list[_Text]
    answer: _Line  # what it means now: the pack's anchor or, in a pack of words, what these words are replaced by
    editor: _Text
    eta: float
    steps: int = Field(ge=0)
    read_back: _Text  # what the text encoder answered the first question with
    alignment: float = Field(ge=0, le=1)  # how far image prompts' encodings moved to the anchor's
    settings: dict[str, JsonValue] = Field(default_factory=dict)  # all of stage 2's
    # phrases to keep, and how far they have moved; not written if there are none
    kept: dict[_Line, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
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
    negative_prompt: _Text


class Manifest(_Strict):
    """All that a mokus.json says."""

    format: Literal[1]
    versions: _Versions  # that the looks were learned with
    base_model: _Line
    fingerprint: _Sha256
    pipeline: Annotated[str, AfterValidator(_known_pipeline)] = QWEN_IMAGE.pipeline  # not written if it is this one
    defaults: _Defaults  # what the model is best used with, for the card
    anchor: _Line
    class_word: _Line
    settings: dict[str, JsonValue]
    knowledge: list[BoundKnowledge]
    files: dict[Annotated[str, Field(pattern=FILE)], _Sha256]

    @classmethod
    def without_usual(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields but for those that say what is meant without them."""
        usual = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        told = {name: value for name, value in fields.items() if name not in usual or value != usual[name]}
        knowledge = [
            {name: value for name, value in known.items() if name != "kept" or value} for known in told["knowledge"]
        ]
        return {**told, "knowledge": knowledge}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        texts = Counter(known.text for known in self.knowledge)
        if twice := [text for text, n in texts.items() if n > 1]:
            raise ValueError(f"the knowledge {twice[0]!r} is there twice")
        adapter = any(known.ranks for known in self.knowledge)
        if README not in self.files or {ADAPTER in self.files, ADAPTER_CONFIG in self.files} != {adapter}:
            raise ValueError("the files are not those that the knowledge needs")
        return self


def versions() -> dict[str, str]:
    """Of MoKus and the libraries that decide what an image looks like."""
    libraries = {name: version(name) for name in ("diffusers", "transformers", "peft")}  # not imported: seconds
    return {"mokus": mokus.__version__, "torch": torch.__version__, **libraries}


def parse(text: bytes, complaint: str) -> Manifest:
    """Read it. Raises `MokusError`, beginning with `complaint`, for anything that mokus would not have written."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(text, parse_constant=refuse)
        if _depth(value) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        as_json(value)  # 1e999 is infinite too, and half a character cannot be written
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise MokusError(f"{complaint}: {where}{': ' if where else ''}{first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise MokusError(f"{complaint}: it is no JSON ({error}).") from error


def _depth(value: Any) -> int:
    """Lists and mappings inside each other, counted without recursion."""
    levels, row = 0, [value]
    while row := [each for each in row if isinstance(each, (dict, list))]:
        levels += 1
        row = [part for each in row for part in (each.values() if isinstance(each, dict) else each)]
    return levels
