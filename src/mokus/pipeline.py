"""Load any `QwenImagePipeline`, the miniature by default, and encode prompts with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from safetensors import SafetensorError
from torch import Tensor

from mokus import memory
from mokus.errors import MokusError
from mokus.memory import CPU, STAGED, Tier

MINIATURE = "miniature"
DEFAULTS_FILE = "mokus_defaults.json"
CORPUS_FILE = "mokus_corpus.txt"
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
    editors: dict[str, dict[str, Any]] = field(default_factory=dict)  # ... with an editor of that name


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with what identifies it."""

    pipe: QwenImagePipeline
    id: str  # hub id or folder; "miniature" for the one in the package
    fingerprint: str  # of configs and weights, see `fingerprint`
    defaults: Defaults
    device: torch.device
    corpus: tuple[str, ...] = ()  # prompts like those it was trained on, from `mokus_corpus.txt` in its folder
    tier: Tier = STAGED  # how its memory is used
    _residents: list[tuple[str, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels: one latent patch."""
        return int(self.pipe.vae_scale_factor) * 2

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Inside, only these components are on the device, the others in host memory.

        May be nested; afterwards everything is where it was before. On a CPU, and in a memory tier that keeps all of them
        on the device, nothing moves: Qwen-Image's weights are 57 GB, which take long from a GPU to host memory and back.
        Running out of memory inside is a `MokusError` that names the next tier.
        """
        with memory.told(self.tier, self.device):
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
        for name in ("vae",) if self.tier.streamed else COMPONENTS:  # the others come and go by themselves
            getattr(self.pipe, name).to(self.device if name in inside else "cpu")


def load(
    model: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tier: str | None = None,
) -> Model:
    """Load a `QwenImagePipeline` from a folder or the hub; without a name the miniature in the package.

    `device`: "cpu", "cuda", "cuda:1"; a GPU if there is one. `dtype` of the weights: bfloat16 on a GPU, float32 on a CPU.
    `tier`: how memory is used, by the name of one of `memory.TIERS`; else what MOKUS_TIER says, else the first that fits.
    Raises `MokusError` if there is no such model, it is of another kind, the device or the tier is not there, or no tier fits.
    """
    wanted = tier or os.environ.get(memory.VARIABLE)
    chosen = memory.tier(wanted) if wanted else None
    where = device_of("cpu" if chosen is CPU and device is None else device)
    if chosen is CPU and where.type != "cpu":
        raise MokusError(f"the memory tier 'cpu' was asked for, and the device {where}; leave one of them out.")
    source = str(files("mokus.miniature").joinpath("weights")) if model in (None, MINIATURE) else str(model)
    kind = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    index = _model_index(source)
    if index.get("_class_name") != "QwenImagePipeline":
        raise MokusError(
            f"{source} holds a {index.get('_class_name')}, expected a QwenImagePipeline such as Qwen/Qwen-Image."
        )
    defaults = defaults_of(source)
    use = chosen or (CPU if where.type == "cpu" else _fitting(source, defaults, where, kind))
    try:
        pipe = QwenImagePipeline.from_pretrained(source, dtype=kind, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:  # what the libraries say of missing and damaged parts
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MokusError(f"the model {source} cannot be loaded ({reason}); get a whole copy of it.") from error
    pipe.set_progress_bar_config(disable=True)
    for name in COMPONENTS:
        getattr(pipe, name).requires_grad_(False).eval()
    identity = fingerprint(pipe)
    with memory.told(use, where):
        memory.place(pipe, use, where)
    name = MINIATURE if model in (None, MINIATURE) else source
    return Model(pipe, name, identity, defaults, where, _corpus(source), use)


def _fitting(source: str, defaults: Defaults, device: torch.device, dtype: torch.dtype) -> Tier:
    """The first tier in which all tasks fit into what is free on the GPU, by the doctor's plan."""
    from mokus import doctor

    free = torch.cuda.mem_get_info(device)[0]
    return doctor.fitting(doctor.Shape.of(source, defaults), free, dtype)


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
    """sha256 over the components' configs, the vocabulary, and each weight's name, shape and 64 of its values as bfloat16.

    Reads a few bytes of each weight only, so it is quick for any model; it does not depend on the dtype loaded, since
    values that bfloat16 holds survive any of them.
    """
    digest = hashlib.sha256()
    for name in COMPONENTS:
        component = getattr(pipe, name)
        digest.update(type(component).__name__.encode() + _config(component).encode())
        for path, weight in sorted(component.state_dict().items()):
            digest.update(f"{name}.{path}{tuple(weight.shape)}".encode())
            flat = weight.flatten()
            values = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.bfloat16)
            digest.update(values.view(torch.int16).numpy().tobytes())
    digest.update(json.dumps(sorted(pipe.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _config(component: Any) -> str:
    """The config as JSON, without what depends on where and how it was loaded."""

    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        volatile = ("transformers_version", "dtype", "torch_dtype")
        return {k: plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in volatile}

    config = component.config
    return json.dumps(
        plain(config.to_dict() if hasattr(config, "to_dict") else dict(config)), sort_keys=True, default=str
    )


def device_of(name: str | None) -> torch.device:
    """The device of this name, by default a GPU if there is one. Raises `MokusError` if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown to torch, not built in, not there
        pass
    raise MokusError(f"the device {name!r} is not there, expected cpu, cuda or cuda:1; leave it out to choose.")


def _model_index(source: str) -> dict[str, Any]:
    """The pipeline's model_index.json, from a folder or the hub."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.is_file():
            raise MokusError(
                f"{source} has no model_index.json; expected the folder of a saved QwenImagePipeline or a hub id."
            )
        return _json(file, "the model's index")
    try:
        return dict(QwenImagePipeline.load_config(source))
    except OSError as error:  # neither a folder nor a reachable repository: the hub's errors derive from it
        raise MokusError(
            f"the model {source!r} is neither a folder here nor a repository that the hub gave; "
            "check the name and the connection, or leave --model out for the miniature."
        ) from error


def defaults_of(source: str) -> Defaults:
    """What the model's folder says of its use, else Qwen-Image's. Raises `MokusError` for what cannot be read."""
    file = Path(source) / DEFAULTS_FILE
    if not file.is_file():
        return Defaults()
    values = _json(file, "the model's defaults")
    known = {f.name for f in fields(Defaults)}
    if odd := sorted(values.keys() - known):
        raise MokusError(f"{file} says {odd[0]!r}, which is unknown; expected some of {', '.join(sorted(known))}.")
    return Defaults(**values)


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
    except ValueError as error:
        raise MokusError(f"{file}, {what}, is no JSON ({error}); get a whole copy of the model.") from error
    if not isinstance(value, dict):
        raise MokusError(f"{file}, {what}, is no JSON object; get a whole copy of the model.")
    return value
