"""What differs between families of pipelines whose image transformer is told of prompts by an LLM: all of it, in one table.

The method is the same for all of them, and nothing else in MoKus asks which model it has: stage 1 wants latents and a
velocity, stage 2 the layers of an LLM and which of them the image transformer is told, and drawing is the pipeline's own.
`docs/backbones.md` says what is tested, and how to add a family.

Latents are (b, n, c) here, whatever the transformer takes: n places of a grid with c numbers each. `told` are encodings as
`pipeline.pad` makes them: (b, s, d), padded at the right, with the mask (b, s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mokus import flow

COMPONENTS = ("transformer", "text_encoder", "vae")  # of a pipeline of any family
TEXT_ALONE = ("text_encoder",)  # what edits need of them
Told = tuple[Tensor, Tensor]
LONGEST = 1024  # tokens of a prompt that Qwen-Image can be given


@dataclass(frozen=True)
class Backbone:
    """One family. Functions of a pipeline take it as their first argument."""

    pipeline: str  # the class in diffusers, as `model_index.json` names it
    name: str  # in model cards
    # --- the text encoder
    text_encoder: str  # the class in transformers, the one with a head: it has to answer
    language_model: str  # where in it the module with the `layers` is
    template: Callable[[Any], str]  # around a prompt, which stands for {}
    encode: Callable[[Any, str, torch.device], Tensor]  # what the image transformer is told of a prompt: (s, d)
    # --- the image transformer, and drawing
    latent: Callable[[Any, Image.Image, torch.device], Tensor]  # of a photo: (1, n, c), float32
    call: Callable[[Any, Told, Told | None, Mapping[str, Any]], dict[str, Any]]  # what the pipeline is called with
    # --- what is as usual in most of them
    reads: tuple[int, ...] = (-1,)  # the layers whose outputs that is, side by side
    bare_text_encoder: bool = False  # whether folders as they are published name another class, without the head
    normed: bool = False  # through the final norm, which only the last layer's output can be
    processor: str = ""  # the class in transformers of a pipeline that has one; of it only the tokenizer is wanted
    longest: int = LONGEST  # tokens of a prompt with the template's tail
    tokenizer: Callable[[Any], Any] = lambda pipe: pipe.tokenizer
    patch: int = 1  # the VAE's latents along each side of a place
    velocity: Callable[..., Tensor] = flow.velocity  # as `flow.velocity`: z1 - z0, at the share t of noise
    mixes: bool = True  # whether prompts of several lengths may be drawn in one call
    scale: tuple[str, int] = ("true_cfg_scale", 0)  # the pipeline's word for guidance, and what it is less than ours
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda index: {}  # of `pipeline.Defaults`, by model_index

    def highest(self, layers: int) -> int:
        """Of so many layers the highest one that has a say in what the image transformer is told."""
        return max(layer % layers for layer in self.reads)

    def read(self, layers: Sequence[nn.Module]) -> list[nn.Module]:
        """The layers whose outputs it is told."""
        return [layers[layer] for layer in self.reads]


# --- Qwen-Image ---------------------------------------------------------


def _wan_latent(pipe: Any, image: Image.Image, device: torch.device, mode: str) -> Tensor:
    """By a VAE of videos, here of one frame, whose config has a mean and a deviation for each channel."""
    x = pipe.image_processor.preprocess(image.convert(mode)).to(device, pipe.vae.dtype)[:, :, None]
    z = pipe.vae.encode(x).latent_dist.mode().float()
    mean, std = (
        torch.tensor(pipe.vae.config[key], device=z.device).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    z = (z - mean) / std
    packed: Tensor = pipe._pack_latents(z, 1, z.shape[1], z.shape[3], z.shape[4])
    return packed


def _cfg(pipe: Any, told: Told, unwanted: Told | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {"prompt_embeds": told[0], "prompt_embeds_mask": told[1]}
    if unwanted is not None:
        given |= {"negative_prompt_embeds": unwanted[0], "negative_prompt_embeds_mask": unwanted[1]}
    return {**given, "true_cfg_scale": settings["true_cfg_scale"], "num_inference_steps": settings["steps"]}


QWEN_IMAGE = Backbone(
    pipeline="QwenImagePipeline",
    name="qwen-image",
    text_encoder="Qwen2_5_VLForConditionalGeneration",
    language_model="model.language_model",
    template=lambda pipe: pipe.prompt_template_encode,
    encode=lambda pipe, prompt, device: pipe.encode_prompt(prompt, device=device)[0][0],
    normed=True,
    patch=2,
    latent=lambda pipe, image, device: _wan_latent(pipe, image, device, "RGB"),
    longest=LONGEST,
    call=lambda *given: {**_cfg(*given), "max_sequence_length": LONGEST},
)


# --- Qwen-Image-2.1 ---------------------------------------------------------


def _velocity_21(
    transformer: Callable[..., Any], z: Tensor, t: Tensor, embeds: Tensor, mask: Tensor | None, grid: flow.Grid
) -> Tensor:
    """Texts of one length at a time: an image's places are counted from where its text ends, padding included."""
    n = z.shape[1]
    lengths = [embeds.shape[1]] * len(z) if mask is None else mask.sum(dim=1).tolist()
    parts, order = [], []
    for length in dict.fromkeys(lengths):
        rows = [i for i, other in enumerate(lengths) if other == length]
        slots = torch.arange(length + n // 4, device=z.device).expand(len(rows), -1) >= length  # one for 2 x 2 places
        parts.append(
            transformer(
                hidden_states=z[rows], timestep=t[rows], encoder_hidden_states=embeds[rows, :length],
                img_shapes=[[(1, *grid)]] * len(rows), img_mask=slots, return_dict=False,
            )[0][:, -n:]
        )  # fmt: skip
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=z.device).argsort()]


def _call_21(pipe: Any, told: Told, unwanted: Told | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A folder may bring noise levels of its own, and then the pipeline counts no steps: they are for their number only."""

    def trimmed(embeds: Tensor, mask: Tensor) -> Told:
        length = int(mask.sum(dim=1).max())
        return embeds[:, :length], mask[:, :length]

    steps, own = settings["steps"], pipe.config.sample_sigmas
    sigmas = np.linspace(1.0, 1 / steps, steps) if own and len(own) != steps else None
    return {**_cfg(pipe, trimmed(*told), trimmed(*unwanted) if unwanted else None, settings), "sigmas": sigmas}


QWEN_IMAGE_21 = Backbone(
    pipeline="QwenImage21Pipeline",
    name="qwen-image-2.1",
    text_encoder="Qwen3VLForConditionalGeneration",
    processor="Qwen3VLProcessor",
    language_model="model.language_model",
    template=lambda pipe: pipe.prompt_template_t2i,
    encode=lambda pipe, prompt, device: pipe.encode_prompt(prompt, device=device)[0][0],
    tokenizer=lambda pipe: pipe.processor.tokenizer,
    latent=lambda pipe, image, device: _wan_latent(pipe, image, device, "RGBA"),
    velocity=_velocity_21,
    call=_call_21,
    mixes=False,
    defaults=lambda index: {"steps": len(index.get("sample_sigmas") or ()) or 40, "true_cfg_scale": 1.0},
)


# --- Z-Image ---------------------------------------------------------


def _latent_z(pipe: Any, image: Image.Image, device: torch.device) -> Tensor:
    x = pipe.image_processor.preprocess(image).to(device, pipe.vae.dtype)
    z = pipe.vae.encode(x).latent_dist.mode().float()
    return ((z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor).flatten(2).transpose(1, 2)


def _texts(embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
    return list(embeds) if mask is None else [each[there] for each, there in zip(embeds, mask, strict=True)]


def _velocity_z(
    transformer: Callable[..., Any], z: Tensor, t: Tensor, embeds: Tensor, mask: Tensor | None, grid: flow.Grid
) -> Tensor:
    """It is asked at the share of image, not of noise, and says where the image is: z0 - z1."""
    images = list(z.transpose(1, 2).unflatten(2, (1, *grid)))  # (c, 1, h, w) each
    found = transformer(images, 1 - t, _texts(embeds, mask), return_dict=False)[0]
    return -torch.stack(found).flatten(2).transpose(1, 2)


def _call_z(pipe: Any, told: Told, unwanted: Told | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_embeds": _texts(*told),
        "negative_prompt_embeds": _texts(*unwanted) if unwanted else [],
        "guidance_scale": max(0.0, settings["true_cfg_scale"] - 1),
        "num_inference_steps": settings["steps"],
    }


Z_IMAGE = Backbone(
    pipeline="ZImagePipeline",
    name="z-image",
    text_encoder="Qwen3ForCausalLM",
    bare_text_encoder=True,
    language_model="model",
    template=lambda pipe: pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    ),
    encode=lambda pipe, prompt, device: pipe.encode_prompt(prompt, device, do_classifier_free_guidance=False)[0][0],
    reads=(-2,),
    longest=509,  # 512 with the three tokens before the prompt
    latent=_latent_z,
    velocity=_velocity_z,
    call=_call_z,
    scale=("guidance_scale", 1),
    defaults=lambda index: {"steps": 50, "true_cfg_scale": 6.0},
)


BACKBONES = {each.pipeline: each for each in (QWEN_IMAGE, QWEN_IMAGE_21, Z_IMAGE)}


def backbone_of(pipe: Any) -> Backbone:
    """The family of a loaded pipeline, or of what its class is derived from."""
    return next(BACKBONES[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in BACKBONES)
