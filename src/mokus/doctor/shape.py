"""A pipeline as its configs describe it: built without contents, counted exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers.utils.logging as log
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mokus.backbone import COMPONENTS
from mokus.errors import MokusError
from mokus.memory import STAGED, Tier
from mokus.pipeline import MINIATURE, Defaults, defaults_of

PUBLISHED = "Qwen/Qwen-Image"
CONFIG = "config.json"
TRANSFORMER = "QwenImageTransformer2DModel"  # the kind that is planned
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")  # of it, which are read here
# what classes raise that are made by configs of nonsense
UNUSABLE = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A pipeline's configs, and what can be known from them."""

    source: str
    configs: Mapping[str, Mapping[str, Any]]  # by component
    defaults: Defaults = field(default_factory=Defaults)

    @classmethod
    def of(cls, source: str | None = None, defaults: Defaults | None = None) -> Shape:
        """Read the configs from a folder or the hub; those of Qwen-Image are at hand.

        Raises `MokusError` if there are none, or they are of another family, or say too little.
        """
        if source in (None, MINIATURE):
            source = str(files("mokus.miniature").joinpath("weights"))
        assert source is not None
        if Path(source).is_dir() or source != PUBLISHED:
            found = {name: _config(source, name) for name in COMPONENTS}
        else:
            found = published()
        _check(source, found)
        shape = cls(source, found, defaults or defaults_of(source))
        shape._check_together()
        return shape

    def with_layers(self, layers: int | None = None, text_layers: int | None = None) -> Shape:
        """The same with other numbers of blocks of the image transformer, or layers of the text encoder.

        With the latter, the vision tower has one block, for speed: no prompt passes through it.
        """
        found = {name: dict(config) for name, config in self.configs.items()}
        if layers is not None:
            found["transformer"]["num_layers"] = layers
        if text_layers is not None:
            whole = found["text_encoder"]
            text = dict(whole["text_config"]) if "text_config" in whole else whole  # older configs are flat
            text.pop("layer_types", None)
            text["num_hidden_layers"] = text_layers
            if text is not whole:
                whole["text_config"] = text
            whole["vision_config"] = {**whole.get("vision_config", {}), "depth": 1}
        return Shape(self.source, found, self.defaults)

    def build(self, name: str, dtype: torch.dtype) -> Any:
        """A component on the meta device: shapes, no contents."""
        import diffusers
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        config = dict(self.configs[name])
        try:
            with torch.device("meta"), _quiet():
                if name == "text_encoder":
                    made = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
                else:
                    default = {"transformer": TRANSFORMER, "vae": "AutoencoderKLQwenImage"}[name]
                    made = getattr(diffusers, default).from_config(config)
                    if name == "vae":
                        made.enable_slicing()  # as `pipeline.load` has it
                return nn.Module.to(made, dtype).eval().requires_grad_(False)
        except UNUSABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise MokusError(
                f"the config of {name} in {self.source} makes no {name} of Qwen-Image's kind ({reason}); see README.md for "
                "the models that can be used."
            ) from error

    def _check_together(self) -> None:
        """Raise `MokusError` unless the sizes fit each other, which no class checks before it runs."""
        small = self.with_layers(1, 1)
        image, vae, whole = (
            small.build(name, torch.bfloat16).config for name in ("transformer", "vae", "text_encoder")
        )
        text = whole.get_text_config()
        heads, shared = text.num_attention_heads, max(1, text.num_key_value_heads)
        rotated = sum((text.rope_parameters or {}).get("mrope_section", ()))
        for name, size, what, expected in (
            ("transformer's attention_head_dim", image.attention_head_dim, "axes_dims_rope", sum(image.axes_dims_rope)),
            ("transformer's in_channels", image.in_channels, "vae's z_dim in patches of 4", 4 * vae.z_dim),
            ("transformer's out_channels", image.out_channels, "vae's z_dim", vae.z_dim),
            ("transformer's joint_attention_dim", image.joint_attention_dim, "text encoder's width", text.hidden_size),
            ("text encoder's hidden_size", text.hidden_size, "heads and mrope_section", 2 * rotated * heads),
            ("text encoder's num_attention_heads", heads, "num_key_value_heads", heads // shared * shared),
        ):  # fmt: skip
            if size != expected:
                raise MokusError(
                    f"the {name} in {self.source} is {size}, expected {expected} by the {what}; get a whole copy of the model."
                )

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers in each component, the text encoder's vision tower included."""
        return {name: sum(sizes) for name, (sizes, _) in _numbers(key_of(self)).items()}

    @property
    def matrices(self) -> int:
        """Numbers in the linear layers of the image transformer's blocks, which 8 and 4 bits are for."""
        return _numbers(key_of(self))["transformer"][1]

    @property
    def largest(self) -> dict[str, int]:
        """Numbers in each component's largest matrix: what comes and goes at once."""
        return {name: max(sizes) for name, (sizes, _) in _numbers(key_of(self)).items()}

    @cached_property
    def text(self) -> Any:
        """The config of the text encoder's language model."""
        from transformers import Qwen2_5_VLConfig

        return Qwen2_5_VLConfig.from_dict(dict(self.configs["text_encoder"])).get_text_config()

    @property
    def blocks(self) -> int:
        """Of the image transformer."""
        return int(self.configs["transformer"]["num_layers"])

    @property
    def width(self) -> int:
        """d, of the image transformer."""
        config = self.configs["transformer"]
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    @property
    def patch(self) -> int:
        """Pixels of one image token's side."""
        return 2 * 2 ** len(self.configs["vae"].get("temperal_downsample") or [False, True, True])

    def weights(self, tier: Tier, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of each component in a tier.

        NF4 has half a byte a number, a byte of scale for 64 of them and a float32 for 256 scales; LLM.int8() a byte a number.
        """
        found = {name: n * dtype.itemsize for name, n in self.parameters.items()}
        if tier.bits < 16:
            each = 1.0 if tier.bits == 8 else 0.5 + 1 / 64 + 4 / (64 * 256)
            found["transformer"] += int(self.matrices * (each - dtype.itemsize))
        return found


def published() -> dict[str, dict[str, Any]]:
    """The configs of Qwen/Qwen-Image, as `qwen_image` has them, with the whole vision tower."""
    from mokus.qwen_image import FULL_VISION, TEXT, TRANSFORMER, VAE

    text = {"text_config": dict(TEXT), "vision_config": dict(FULL_VISION)}
    return {"transformer": dict(TRANSFORMER), "text_encoder": text, "vae": dict(VAE)}


def _check(source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what is of another family, and configs without what is read here; the classes check the rest."""
    transformer, text = configs["transformer"], configs["text_encoder"]
    kind = transformer.get("_class_name", TRANSFORMER)
    if kind != TRANSFORMER:
        raise MokusError(
            f"{source} has a {kind}, and memory is planned only for Qwen-Image's {TRANSFORMER} so far; models of other "
            f"families take the memory tier {STAGED.name!r} unless another one is named by --tier."
        )
    for key in SIZES:
        value = transformer.get(key)
        if type(value) is not int or value < 1:
            raise MokusError(
                f"{key} of the transformer in {source} is {str(value)[:60]!r}, expected a whole number from 1; get a whole copy "
                "of the model."
            )
    for key in ("text_config", "vision_config"):
        if not isinstance(text.get(key, {}), Mapping):
            raise MokusError(
                f"{key} of the text encoder in {source} is {str(text[key])[:60]!r}, expected a JSON object; get a whole copy of "
                "the model."
            )


def _config(source: str, name: str) -> dict[str, Any]:
    folder = Path(source)
    if folder.is_dir():
        file = folder / name / CONFIG
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(source, f"{name}/{CONFIG}"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise MokusError(
                f"the configs of {source!r} are neither a folder here nor in a repository that the hub gave; check the name "
                f"and the connection, or leave --model out for the miniature ({PUBLISHED}'s are at hand)."
            ) from error
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MokusError(f"{file} cannot be read as a config ({error}); get a whole copy of the model.") from error
    if not isinstance(found, dict):
        raise MokusError(f"{file} holds no JSON object, which a config is; get a whole copy of the model.")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, diffusers does not warn of keys in a config that it has no use for."""
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


SHAPES: dict[str, Shape] = {}  # by their configs, for the caches


def key_of(shape: Shape) -> str:
    """A shape as text, equal for equal configs; the shape is found by it again."""
    key = json.dumps({name: dict(config) for name, config in shape.configs.items()}, sort_keys=True, default=str)
    SHAPES[key] = shape
    return key


@lru_cache(maxsize=8)
def _numbers(key: str) -> dict[str, tuple[list[int], int]]:
    """Of each component the numbers in every tensor of weights, and those in the matrices of its blocks, if it has such."""
    found = {}
    for name in COMPONENTS:
        made = SHAPES[key].build(name, torch.bfloat16)
        blocks = getattr(made, "transformer_blocks", ())
        linear = sum(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
        found[name] = ([p.numel() for p in made.parameters()], linear)
    return found
