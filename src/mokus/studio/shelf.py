"""Images and encodings for those who wait: the packs that were last asked for are kept in memory, ready to draw.

Requests of different packs are drawn in one batch. What a pack means is in the encodings, which are made pack by pack; its
looks are a LoRA, of which PEFT applies another one to each row of a batch (`adapter_names`). A row is computed as if it were
alone, up to the rounding of batches.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from mokus.errors import MokusError
from mokus.generation import Generated, check_prompts, check_settings, draw, drawn_together, png_bytes, provenance
from mokus.low_rank import Shifts, applied
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.files import MANIFEST
from mokus.packs.together import shifts_of
from mokus.pipeline import encode, pad
from mokus.sizes import Size, simplest

if TYPE_CHECKING:
    from mokus.pipeline import Model

BARE = "__base__"  # PEFT's name for no adapter
ENCODINGS = 64  # that are kept: the negative prompt's above all

Wish = tuple[str | None, str, int]  # path of the pack or None for the base model, prompt, seed


@dataclass(frozen=True)
class _Ready:
    """A pack in memory; None is the base model without one."""

    pack: ConceptPack | None
    shifts: Sequence[Shifts]
    adapter: str  # of its LoRA on the transformer

    @property
    def digest(self) -> str:
        return self.pack.digest if self.pack else ""

    @property
    def packs(self) -> list[ConceptPack]:
        return [self.pack] if self.pack else []


class Shelf:
    """Packs in memory, the least recently used one goes first. The model is not bare until `clear`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bare = _Ready(None, (), BARE)
        self._packs: OrderedDict[str, _Ready] = OrderedDict()
        self._encodings: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._numbers = count()

    def draw(self, wishes: Sequence[Wish], size: Size, most: int) -> list[bytes | str]:
        """One batch with the model's own settings: for each wish a PNG or, of one that cannot be drawn, what is wrong.

        `size`: see `sizes`. At most `most` packs stay in memory, and no more may be wished for. Raises `MokusError` for a
        size that cannot be drawn.
        """
        settings = {**self._settings(), "size": simplest(size)}
        check_settings(self._model, settings)
        paths = dict.fromkeys(path for path, _, _ in wishes)
        if len(paths.keys() - {None}) > most:
            raise ValueError(f"{len(paths)} packs in one batch, more than the {most} that are kept")
        found = {path: self._found(path, most) for path in paths}  # once for the batch: a pack may change meanwhile
        answers: dict[int, bytes | str] = {}
        ready: dict[int, _Ready] = {}
        for i, (path, prompt, _) in enumerate(wishes):
            pack = found[path]
            fault = pack if isinstance(pack, str) else self._fault(prompt, settings["negative_prompt"])
            if isinstance(pack, str) or fault:
                answers[i] = fault
            else:
                ready[i] = pack
        guided = settings["true_cfg_scale"] > 1
        rows = list(ready.items())
        told = [self._encoded(each, wishes[i][1]) for i, each in rows]
        unwanted = [self._encoded(each, settings["negative_prompt"]) for _, each in rows] if guided else None
        for batch in drawn_together(self._model, told):
            jobs = [(told[k], wishes[rows[k][0]][2]) for k in batch]
            negatives = [unwanted[k] for k in batch] if unwanted else None
            adapters = [rows[k][1].adapter for k in batch]
            with self._model.resident("transformer", "vae"), self._looks(adapters):
                images = draw(self._model, jobs, negatives, settings)
            for k, image in zip(batch, images, strict=True):
                i, each = rows[k]
                about = {**settings, **provenance(self._model, each.packs)}
                answers[i] = png_bytes(Generated(image, wishes[i][1], wishes[i][2], about))
        return [answers[i] for i in range(len(wishes))]

    def embed(self, path: str | None, prompt: str, negative: str | None, most: int) -> bytes:
        """What the image transformer is told: safetensors of the arguments that `QwenImagePipeline` takes for it.

        prompt_embeds (1, s, d) and prompt_embeds_mask (1, s), int64, and the same of the negative prompt, by default the
        model's. Raises `MokusError` for a prompt or a pack that cannot be used.
        """
        usual = self._settings()["negative_prompt"] if negative is None else negative
        check_prompts(self._model, [prompt], usual)
        ready = self._ready(path, most)
        found: dict[str, Tensor] = {}
        for prefix, text in (("", prompt), ("negative_", usual)):
            embeds, mask = pad([self._encoded(ready, text)])
            found |= {f"{prefix}prompt_embeds": embeds.cpu(), f"{prefix}prompt_embeds_mask": mask.long().cpu()}
        return bytes_of(found)

    def clear(self) -> None:
        """Forget all packs; the model is bare again."""
        if any(each.adapter != BARE for each in self._packs.values()):
            self._model.pipe.unload_lora_weights()
        self._packs.clear()
        self._encodings.clear()

    # --- inside ---------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        usual = self._model.defaults
        return {
            "steps": usual.steps, "true_cfg_scale": float(usual.true_cfg_scale), "size": usual.size,
            "negative_prompt": usual.negative_prompt,
        }  # fmt: skip

    def _ready(self, path: str | None, most: int) -> _Ready:
        """The pack as it is on disk now."""
        if path is None:
            return self._bare
        found = self._packs.get(path)
        if found is None or found.digest != _digest(path):
            self._drop(path)
            pack = ConceptPack.open(path)
            pack.check_base(self._model)
            while len(self._packs) >= most:
                self._drop(next(iter(self._packs)))
            self._packs[path] = _Ready(pack, shifts_of([pack]), self._adapter(pack.lora()))
        self._packs.move_to_end(path)
        return self._packs[path]

    def _found(self, path: str | None, most: int) -> _Ready | str:
        try:
            return self._ready(path, most)
        except MokusError as error:
            return str(error)

    def _fault(self, prompt: str, negative: str) -> str:
        try:
            check_prompts(self._model, [prompt], negative)
        except MokusError as error:
            return str(error)
        return ""

    def _adapter(self, lora: Mapping[str, Tensor]) -> str:
        if not lora:
            return BARE
        name = f"mokus_{next(self._numbers)}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            self._model.pipe.load_lora_weights(dict(lora), adapter_name=name)
        return name

    def _drop(self, path: str) -> None:
        gone = self._packs.pop(path, None)
        if gone is None or gone.adapter == BARE:
            return
        if any(each.adapter != BARE for each in self._packs.values()):
            self._model.pipe.delete_adapters(gone.adapter)
        else:
            self._model.pipe.unload_lora_weights()

    def _encoded(self, ready: _Ready, text: str) -> Tensor:
        key = (ready.digest, text)
        if key not in self._encodings:
            with self._model.resident("text_encoder"), applied(self._model.pipe.text_encoder, *ready.shifts):
                self._encodings[key] = encode(self._model, [text])[0]
            while len(self._encodings) > ENCODINGS:
                self._encodings.popitem(last=False)
        self._encodings.move_to_end(key)
        return self._encodings[key]

    @contextmanager
    def _looks(self, adapters: list[str]) -> Iterator[None]:
        """Inside, each row of a batch has the looks of its adapter; also if the pipeline puts the rows without the prompt behind
        those with it, as some do for guidance."""
        layers = [module for module in self._model.pipe.transformer.modules() if isinstance(module, LoraLayer)]

        def choose(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return inputs, {**named, "adapter_names": adapters * (len(inputs[0]) // len(adapters))}

        hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _digest(path: str) -> str:
    """Of the pack that is there now, see `ConceptPack.digest`; empty if there is none."""
    try:
        return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""
