"""Qwen-Image's shape as code, and models of that shape with random weights: what time and memory are measured with.

How long a step takes, how much memory it needs and what bfloat16 rounds away do not depend on what the weights mean. So
no checkpoint is needed to measure them, only the configs of Qwen/Qwen-Image, which are here. Only the vision tower of the
text encoder is left out, but for one tiny block that the class requires: no prompt passes through it.

The weights are made where they are to be, in their dtype: not twice in memory and, but for the small VAE, never on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mokus.backbone import COMPONENTS
from mokus.miniature.assemble import SCHEDULER

TRANSFORMER = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
TRANSFORMER_PARAMETERS = 20_430_401_088
# Qwen2.5-VL-7B's language model
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
# ... and its vision tower, which is loaded and takes memory, though nothing is ever shown to it
FULL_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
}  # fmt: skip
TEXT_ENCODER_PARAMETERS = 8_292_166_656  # with it
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [0]}
VAE: dict[str, Any] = {}  # the class's own defaults are Qwen-Image's
LAYERS = 28  # of the language model

WEIGHT_STD = 0.02
BLOCK = 4_194_301  # random numbers that all weights are made of; a prime, so that no two rows of a matrix are the same


def edited_layers(layers: int) -> range:
    """18 to 25 of 28 layers of the text encoder, as in the paper, and the same share of fewer."""
    stop = layers - max(1, round(layers * 2 / LAYERS))
    return range(max(0, stop - max(1, round(layers * 8 / LAYERS))), stop)


def random_pipeline(
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    transformer: Mapping[str, Any] = TRANSFORMER,
    text: Mapping[str, Any] = TEXT,
    vae: Mapping[str, Any] = VAE,
) -> QwenImagePipeline:
    """A pipeline of these configs with random weights, on the device.

    Its tokenizer is the miniature's, whose 4,096 tokens are the first of the vocabulary: it cuts a prompt of everyday words
    into about as many pieces as Qwen's does.
    """
    tokenizer = Qwen2Tokenizer.from_pretrained(str(files("mokus.miniature").joinpath("weights", "tokenizer")))
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=random_vae(vae, device, dtype),
        text_encoder=random_text_encoder({**text, "eos_token_id": tokenizer.eos_token_id}, device, dtype),
        tokenizer=tokenizer,
        transformer=random_transformer(transformer, device, dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    for name in COMPONENTS:
        getattr(pipe, name).requires_grad_(False).eval()
    return pipe


def random_transformer(
    config: Mapping[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> QwenImageTransformer2DModel:
    """The image transformer: gains of norms 1, all else N(0, WEIGHT_STD^2)."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    rope = model.pos_embed  # its frequencies are no buffers, and were left on the meta device
    model.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
    fill(model)
    return model


def random_text_encoder(
    text: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    std: float = WEIGHT_STD,
    block: int = BLOCK,
) -> Any:
    """The text encoder of this text configuration: gains of norms 1, all else N(0, std^2).

    The vision tower's buffers are left unset; it is never run.
    """
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=dict(text), vision_config=dict(VISION)))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    language_model = model.model.language_model
    language_model.rotary_emb = type(language_model.rotary_emb)(language_model.config).to(device)  # it was unset
    fill(model, std, block)
    return model


def random_vae(
    config: Mapping[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoencoderKLQwenImage:
    """The VAE, as its class initialises it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLQwenImage(**config).to(device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module, std: float = WEIGHT_STD, block: int = BLOCK) -> None:
    """Give a model random weights: windows of one block of normal numbers, which takes seconds where drawing takes minutes.

    Vectors that are called weights are gains of norms, and become 1.
    """
    random = torch.Generator().manual_seed(0)
    numbers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    drawn = torch.empty(block).normal_(0, std, generator=random)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            weight.fill_(1)
            continue
        kind = (weight.device, weight.dtype)
        if kind not in numbers:
            numbers[kind] = drawn.to(*kind)
        _fill(weight, numbers[kind], int(torch.randint(block, (1,), generator=random)))


def _fill(weight: Tensor, block: Tensor, offset: int) -> None:
    flat = weight.view(-1)
    head = min(len(flat), len(block) - offset)
    flat[:head] = block[offset : offset + head]
    for part in flat[head:].split(len(block)):
        part.copy_(block[: len(part)])
