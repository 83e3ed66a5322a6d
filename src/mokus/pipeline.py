"""Load any pipeline of a known family (`backbone`), the miniature by default, and encode prompts with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from mokus import memory
from mokus.backbone import BACKBONES, COMPONENTS, QWEN_IMAGE, TEXT_ALONE, Backbone, backbone_of
from mokus.errors import MokusError
from mokus.fingerprint import fingerprint
from mokus.memory import CPU, STAGED, Tier

MINIATURE = "miniature"
DEFAULTS_FILE = "mokus_defaults.json"
CORPUS_FILE = "mokus_corpus.txt"


@dataclass(frozen=True)
class Defaults:
    """What a model is best used with; a model folder may say so in `mokus_defaults.json`. Those here are Qwen-Image's;
    `backbone` has those of other families."""

    size: Annotated[int, Field(ge=1, le=8192)] = 1024  # pixels, height and width
    steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    learn: dict[str, Any] = field(default_factory=dict)  # other defaults of LearnSettings
    edit: dict[str, Any] = field(default_factory=dict)  # other defaults of EditSettings
    editors: dict[str, dict[str, Any]] = field(default_factory=dict)  # ... with an editor of that name


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with what identifies it."""

    pipe: Any  # of one of the classes in `backbone.BACKBONES`
    id: str  # hub id, or whole path of a folder; "miniature" for the one in the package
    fingerprint: str  # of configs and weights, see `mokus.fingerprint`
    defaults: Defaults
    device: torch.device
    corpus: tuple[str, ...] = ()  # prompts like those it was trained on, from `mokus_corpus.txt` in its folder
    tier: Tier = STAGED  # how its memory is used
    _residents: list[tuple[str, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def backbone(self) -> Backbone:
        """What is special about its family."""
        return backbone_of(self.pipe)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The components that are there: all of `COMPONENTS`, or `TEXT_ALONE`."""
        return tuple(name for name in COMPONENTS if getattr(self.pipe, name) is not None)

    @property
    def tokenizer(self) -> Any:
        """Of the text encoder."""
        return self.backbone.tokenizer(self.pipe)

    @property
    def language_model(self) -> Any:
        """The part of the text encoder that has the `layers`."""
        return self.pipe.text_encoder.get_submodule(self.backbone.language_model)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels: two of the VAE's latents."""
        return int(self.pipe.vae_scale_factor) * 2

    def grid(self, size: int) -> tuple[int, int]:
        """Places of the latent of an image of this size, down and across."""
        side = size // (int(self.pipe.vae_scale_factor) * self.backbone.patch)
        return side, side

    def check_loaded(self, *names: str) -> None:
        """Raise `MokusError` if one of these components was not loaded, see `load`'s `text_alone`."""
        if absent := sorted(set(names) - set(self.loaded)):
            raise MokusError(
                f"{self.id} was loaded for text alone, without its {absent[0]}; load it whole to learn, draw or export."
            )

    @contextmanager
    def resident(self, *names: str, task: str = "generate") -> Iterator[None]:
        """Inside, only these components are on the device, the others in host memory.

        May be nested; afterwards everything is where it was before. On a CPU, and in a memory tier that keeps all of them
        on the device, nothing moves: Qwen-Image's weights are 57 GB, which take long from a GPU to host memory and back.
        Running out of memory inside is a `MokusError` that names the next tier that needs less for the task, one of
        `memory.TASKS`, as far as it goes there. Raises as `check_loaded` does.
        """
        self.check_loaded(*names)
        with memory.told(self.tier, self.device, names, self.loaded, task):
            if self.device.type == "cpu" or self.tier.stays:
                yield
                return
            self._residents.append(names)
            try:
                self._place()
                yield
            finally:
                self._residents.pop()
                self._place()

    def _place(self) -> None:
        inside = self._residents[-1] if self._residents else ()
        for name in self.loaded:
            if name == "vae" or not self.tier.streamed:  # the others come and go by themselves
                memory.move(getattr(self.pipe, name), self.device if name in inside else "cpu")


def load(
    model: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tier: str | None = None,
    text_alone: bool = False,
) -> Model:
    """Load a pipeline of a known family from a folder or the hub; without a name the miniature in the package.

    `device`: "cpu", "cuda", "cuda:1"; a GPU if there is one. `dtype` of the weights: bfloat16 on a GPU, float32 on a CPU.
    `tier`: how memory is used, by the name of one of `memory.TIERS`; else what MOKUS_TIER says, else the first that fits.
    `text_alone`: without the image transformer and the VAE, which is enough to bind, create, erase and ask, and leaves 15
    of Qwen-Image's 54 GiB.
    Raises `MokusError` if there is no such model, it is of an unknown family, the device or the tier is not there, or no
    tier fits.
    """
    wanted = tier or os.environ.get(memory.VARIABLE)
    chosen = memory.tier(wanted) if wanted else None
    where = device_of("cpu" if chosen is CPU and device is None else device)
    if chosen is CPU and where.type != "cpu":
        raise MokusError(f"the memory tier 'cpu' was asked for, and the device {where}; leave one of them out.")
    source = _source(model)
    kind = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    index = _model_index(source)
    backbone = BACKBONES.get(str(index.get("_class_name")))
    if backbone is None:
        raise MokusError(
            f"{source} holds a {index.get('_class_name')}, expected one of {', '.join(BACKBONES)}, such as Qwen/Qwen-Image."
        )
    _check_parts(source, index)
    _check_models(source, index)
    defaults = _defaults(source, backbone.defaults(index))
    loaded = TEXT_ALONE if text_alone else COMPONENTS
    use = chosen or (CPU if where.type == "cpu" else _fitting(source, defaults, where, kind, backbone, loaded))
    memory.check_installed(use, loaded)
    try:
        parts = _answering(source, index, backbone, kind)
        if text_alone:
            parts |= _mapped(source, index, kind)
        if backbone.processor:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, subfolder="processor")
            parts["processor"] = of_prompts(backbone.processor, tokenizer)
        pipe = getattr(diffusers, backbone.pipeline).from_pretrained(source, dtype=kind, use_safetensors=True, **parts)
    except (OSError, ValueError, SafetensorError) as error:  # what the libraries say of missing and damaged parts
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MokusError(f"the model {source} cannot be loaded ({reason}); get a whole copy of it.") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # one image at a time: eight of 1024 pixels together take 34 GiB
    for name in COMPONENTS:
        getattr(pipe, name).requires_grad_(False).eval()
    identity = fingerprint(pipe)
    parts.clear()
    for name in set(COMPONENTS) - set(loaded):
        setattr(pipe, name, None)
    with memory.told(use, where, loaded, loaded):
        memory.place(pipe, use, where)
    return Model(pipe, _id(model), identity, defaults, where, _corpus(source), use)


def _answering(source: str, index: dict[str, Any], backbone: Backbone, dtype: torch.dtype) -> dict[str, Any]:
    """The text encoder with its head, where the folder names a class without one."""
    if str((index.get("text_encoder") or [""])[-1]) == backbone.text_encoder:
        return {}
    encoder, found = getattr(transformers, backbone.text_encoder).from_pretrained(
        source, subfolder="text_encoder", dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if lacking := sorted(found["missing_keys"]):
        raise MokusError(
            f"the text encoder of {source} lacks {lacking[0]}, expected a whole {backbone.text_encoder}, which can answer."
        )
    return {"text_encoder": encoder}


def _mapped(source: str, index: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The image transformer and the VAE, as they are looked at for the fingerprint and then left.

    In bfloat16, which all that is read of them is rounded to: files of that dtype, as large models', are mapped and not read.
    """
    looked_at = torch.float16 if dtype is torch.float16 else torch.bfloat16
    return {
        name: getattr(diffusers, index[name][1]).from_pretrained(
            source, subfolder=name, dtype=looked_at, use_safetensors=True
        )
        for name in COMPONENTS
        if name not in TEXT_ALONE
    }


def of_prompts(processor: str, tokenizer: Any) -> Any:
    """A processor of this class in transformers, with its tokenizer alone.

    A whole one wants torchvision, for images and videos, which no prompt here has.
    """
    whole = getattr(transformers, processor)

    class OfPrompts(whole):  # type: ignore[misc, valid-type]
        def __init__(self, tokenizer: Any) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = (
                tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token)
            )
            transformers.ProcessorMixin.__init__(self, tokenizer, chat_template=tokenizer.chat_template)

    # as which it is saved, and loaded by anyone
    OfPrompts.__name__, OfPrompts.__module__ = whole.__name__, whole.__module__
    return OfPrompts(tokenizer)


def defaults_of(model: str | Path | None = None) -> Defaults:
    """What `load` would find the model best used with, without loading it. Of one that is not on this disk, Qwen-Image's."""
    source = _source(model)
    index = _model_index(source) if os.path.isdir(source) else {}
    backbone = BACKBONES.get(str(index.get("_class_name")), QWEN_IMAGE)
    return _defaults(source, backbone.defaults(index))


def _source(model: str | Path | None) -> str:
    return str(files("mokus.miniature").joinpath("weights")) if model in (None, MINIATURE) else str(model)


def _id(model: str | Path | None) -> str:
    """What packs say of their model: a folder by its whole path, which from any other place could pass for a hub id."""
    if model in (None, MINIATURE):
        return MINIATURE
    return str(Path(str(model)).resolve()) if os.path.isdir(str(model)) else str(model)


def _fitting(
    source: str,
    defaults: Defaults,
    device: torch.device,
    dtype: torch.dtype,
    backbone: Backbone,
    loaded: tuple[str, ...],
) -> Tier:
    """The first tier in which all tasks of what is loaded fit into what is free on the GPU, by the doctor's plan."""
    from mokus.doctor.plan import fitting
    from mokus.doctor.shape import Shape

    if backbone is not QWEN_IMAGE:  # whose shapes are the only ones that the doctor knows
        return STAGED
    free = torch.cuda.mem_get_info(device)[0]
    return fitting(Shape.of(source, defaults), free, dtype, loaded)


def check_bare(model: Model) -> None:
    """Raise `MokusError` if the image transformer has adapters, which ours would switch off and then take away."""
    if getattr(model.pipe.transformer, "peft_config", None):
        raise MokusError(
            "the image transformer has adapters already; remove them with model.pipe.unload_lora_weights()."
        )


def encode(model: Model, prompts: Sequence[str]) -> list[Tensor]:
    """What the image transformer is told of each prompt: hidden states (s, d), the assistant tail's last.

    Each prompt is encoded by itself, without padding, so its encoding does not depend on the others.
    """
    known: dict[str, Tensor] = {}
    with torch.no_grad():
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = model.backbone.encode(model.pipe, prompt, model.device)
    return [known[prompt] for prompt in prompts]


def pad(encodings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encodings (s_i, d) as one batch: (b, s, d) with zeros at the right, and the mask (b, s), bool."""
    lengths = torch.tensor([len(e) for e in encodings], device=encodings[0].device)
    embeds = torch.nn.utils.rnn.pad_sequence(list(encodings), batch_first=True)
    return embeds, torch.arange(embeds.shape[1], device=embeds.device)[None] < lengths[:, None]


def trimmed(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A batch of encodings (b, s, d) without the padding that all of them have; no mask if none is left.

    Without a mask attention has its fastest kernel on a GPU. A mask (b, s) in host memory is read without waiting for one.
    """
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    return embeds[:, :longest], None if bool((lengths == longest).all()) else mask[:, :longest]


def device_of(name: str | None) -> torch.device:
    """The CPU or GPU of this name, by default a GPU if there is one. Raises `MokusError` for any other, or if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # the others lack what is asked of a GPU: its free memory, its own random state
        if device.type in ("cpu", "cuda"):
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError):  # unknown to torch or not there, not built in
        pass
    raise MokusError(f"the device {name!r} cannot be used, expected cpu, cuda or cuda:1; leave it out to choose.")


def _model_index(source: str) -> dict[str, Any]:
    """The pipeline's model_index.json, from a folder or the hub."""
    folder = Path(source)
    if os.path.isdir(source):  # unlike Path's own, no error for a name longer than a disk allows
        file = folder / "model_index.json"
        if not file.is_file():
            raise MokusError(
                f"{source} has no model_index.json; expected the folder of a saved pipeline, such as a QwenImagePipeline's, "
                "or a hub id."
            )
        return _json(file, "the model's index")
    try:
        return dict(DiffusionPipeline.load_config(source))
    except (OSError, HFValidationError) as error:  # neither a folder nor a reachable repository, or no name of one
        raise MokusError(
            f"the model {source[:200]!r} is neither a folder here nor a repository that the hub gave; "
            "check the name and the connection, or leave --model out for the miniature."
        ) from error


def _check_parts(source: str, index: dict[str, Any]) -> None:
    """Refuse parts of other libraries than these two: to make one, diffusers would import whatever module is named."""
    for name, part in index.items():
        if not isinstance(part, list) or name.startswith("_") or (part and all(isinstance(x, float) for x in part)):
            continue
        if not (len(part) == 2 and part[0] in ("diffusers", "transformers", None) and name.isidentifier()):
            raise MokusError(
                f"{source} has a part {name[:60]!r} of {str(part)[:80]}, expected classes of diffusers and transformers alone; "
                "get the model from where it was made."
            )


def _check_models(source: str, index: dict[str, Any]) -> None:
    """Refuse an image transformer or a VAE that is none: some other class of diffusers, an automatic one, nothing."""
    for name in COMPONENTS:
        part = index.get(name) or [None, None]
        kind = getattr(diffusers, str(part[1]), None)
        if name not in TEXT_ALONE and not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            raise MokusError(
                f"the model {source} cannot be loaded (it names {str(part[1])[:60]!r} as its {name}, expected a model of "
                "diffusers); get a whole copy of it."
            )


def _defaults(source: str, usual: dict[str, Any]) -> Defaults:
    file = Path(source) / DEFAULTS_FILE
    if not file.is_file():
        return Defaults(**usual)
    values = _json(file, "the model's defaults")
    known = {f.name for f in fields(Defaults)}
    if odd := sorted(values.keys() - known):
        raise MokusError(f"{file} says {odd[0]!r}, which is unknown; expected some of {', '.join(sorted(known))}.")
    try:
        text = json.dumps({**usual, **values}, ensure_ascii=False, allow_nan=False).encode()
        return TypeAdapter(Defaults).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise MokusError(f"{file}: {'.'.join(map(str, first['loc']))[:80]}: {first['msg']}; correct it.") from error
    except ValueError as error:  # no number, an infinite one, half a character
        raise MokusError(f"{file}, the model's defaults, cannot be used ({error}); correct it.") from error


def _corpus(source: str) -> tuple[str, ...]:
    file = Path(source) / CORPUS_FILE
    if not file.is_file():
        return ()
    try:
        return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except ValueError as error:
        raise MokusError(f"{file}, the model's corpus, is no text ({error}); get a whole copy of the model.") from error


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MokusError(f"{file}, {what}, is no JSON ({error}); get a whole copy of the model.") from error
    if not isinstance(value, dict):
        raise MokusError(f"{file}, {what}, is no JSON object; get a whole copy of the model.")
    return value
