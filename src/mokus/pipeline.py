"""Load any `QwenImagePipeline`, the miniature by default, and encode prompts with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from mokus.errors import MokusError

MINIATURE = "miniature"
DEFAULTS_FILE = "mokus_defaults.json"
COMPONENTS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class Defaults:
    """What a model is best used with; a model folder may say so in `mokus_defaults.json`. Those here are Qwen-Image's."""

    size: int = 1024  # pixels, height and width
    steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    learn: dict[str, Any] = field(default_factory=dict)  # other defaults of LearnSettings
    edit: dict[str, Any] = field(default_factory=dict)  # other defaults of EditSettings


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with what identifies it."""

    pipe: QwenImagePipeline
    id: str  # hub id or folder; "miniature" for the one in the package
    fingerprint: str  # of configs and weights, see `fingerprint`
    defaults: Defaults
    device: torch.device

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels: one latent patch."""
        return int(self.pipe.vae_scale_factor) * 2

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Inside, only these components are on the device, the others in host memory; on a CPU nothing moves."""
        if self.device.type == "cpu":
            yield
            return
        for name in COMPONENTS:
            getattr(self.pipe, name).to(self.device if name in names else "cpu")
        try:
            yield
        finally:
            for name in names:
                getattr(self.pipe, name).to("cpu")


def load(model: str | Path | None = None, device: str | None = None, dtype: torch.dtype | None = None) -> Model:
    """Load a `QwenImagePipeline` from a folder or the hub; without a name the miniature in the package.

    `device`: "cpu", "cuda", "cuda:1"; a GPU if there is one. `dtype` of the weights: bfloat16 on a GPU, float32 on a CPU.
    Raises `MokusError` if there is no such model, it is of another kind, or the device is not there.
    """
    where = _device(device)
    source = str(files("mokus.miniature").joinpath("weights")) if model in (None, MINIATURE) else str(model)
    kind = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    index = _model_index(source)
    if index.get("_class_name") != "QwenImagePipeline":
        raise MokusError(
            f"{source} holds a {index.get('_class_name')}, expected a QwenImagePipeline such as Qwen/Qwen-Image."
        )
    pipe = QwenImagePipeline.from_pretrained(source, dtype=kind, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    for name in COMPONENTS:
        getattr(pipe, name).requires_grad_(False).eval()
    return Model(pipe, MINIATURE if model in (None, MINIATURE) else source, fingerprint(pipe), _defaults(source), where)


def encode(model: Model, prompts: Sequence[str]) -> list[Tensor]:
    """What the image transformer is told of each prompt: the final hidden states (s, d) of prompt and assistant tail.

    Each prompt is encoded by itself, without padding, so its encoding does not depend on the others.
    """
    known: dict[str, Tensor] = {}
    with torch.no_grad():
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = model.pipe.encode_prompt(prompt, device=model.device)[0][0]
    return [known[prompt] for prompt in prompts]


def pad(encodings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encodings (s_i, d) as one batch: (b, s, d) with zeros at the right, and the mask (b, s), bool."""
    lengths = torch.tensor([len(e) for e in encodings], device=encodings[0].device)
    embeds = torch.nn.utils.rnn.pad_sequence(list(encodings), batch_first=True)
    return embeds, torch.arange(embeds.shape[1], device=embeds.device)[None] < lengths[:, None]


def fingerprint(pipe: QwenImagePipeline) -> str:
    """sha256 over the components' configs and over each weight's name, shape and 64 evenly spaced values as bfloat16.

    Reads a few bytes of each weight only, so it is quick for any model; it does not depend on the dtype loaded, since
    values that bfloat16 holds survive any of them.
    """
    digest = hashlib.sha256()
    for name in COMPONENTS:
        component = getattr(pipe, name)
        digest.update(type(component).__name__.encode())
        for path, weight in sorted(component.state_dict().items()):
            digest.update(f"{name}.{path}{tuple(weight.shape)}".encode())
            flat = weight.flatten()
            values = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.bfloat16)
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MokusError(
            f"the device {name!r} is unknown, expected cpu, cuda or cuda:1; leave it out to choose."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MokusError(f"the device {name!r} is not there ({torch.cuda.device_count()} GPUs are); use --device cpu.")
    return device


def _model_index(source: str) -> dict[str, Any]:
    """The pipeline's model_index.json, from a folder or the hub."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.is_file():
            raise MokusError(
                f"{source} has no model_index.json; expected the folder of a saved QwenImagePipeline or a hub id."
            )
        return dict(json.loads(file.read_text(encoding="utf-8")))
    try:
        return dict(QwenImagePipeline.load_config(source))
    except OSError as error:  # neither a folder nor a reachable repository: the hub's errors derive from it
        raise MokusError(
            f"the model {source!r} is neither a folder here nor a repository that the hub gave; "
            "check the name and the connection, or leave --model out for the miniature."
        ) from error


def _defaults(source: str) -> Defaults:
    file = Path(source) / DEFAULTS_FILE
    if not file.is_file():
        return Defaults()
    return _read_defaults(file)


@lru_cache(maxsize=8)
def _read_defaults(file: Path) -> Defaults:
    return Defaults(**json.loads(file.read_text(encoding="utf-8")))
