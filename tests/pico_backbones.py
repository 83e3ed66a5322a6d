"""Pico models of the other families: genuine pipelines with random weights, saved as folders like any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mokus import pipeline

LAYERS, WIDTH, STEPS = 4, 64, 3
SIZES = {"QwenImage21Pipeline": 64, "ZImagePipeline": 32}
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (  # Qwen3's, as far as these pipelines use it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def text_config(tok: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tok), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "bos_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def qwen_image_21(tok: Any) -> QwenImage21Pipeline:
    tok.add_special_tokens({"additional_special_tokens": VISION}, replace_extra_special_tokens=False)
    tok.chat_template = CHAT
    text = text_config(tok)
    text["rope_parameters"] |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tok.convert_tokens_to_ids(VISION), strict=True))  # fmt: skip
    return QwenImage21Pipeline(
        scheduler=scheduler(),
        vae=AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1,
            latents_mean=[0.1 * i for i in range(8)], latents_std=[1.0 + 0.2 * i for i in range(8)],
        ),
        text_encoder=Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        ),
        processor=pipeline.of_prompts("Qwen3VLProcessor", tok),
        transformer=QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=4,
            context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


def z_image(tok: Any) -> ZImagePipeline:
    """Its folder names the bare model, as those that are published do."""
    tok.chat_template = CHAT
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, layers_per_block=1, norm_num_groups=4,
            scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text_config(tok))).model,
        tokenizer=tok,
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
        ),
    )  # fmt: skip


MAKERS = {"QwenImage21Pipeline": qwen_image_21, "ZImagePipeline": z_image}


@torch.no_grad()
def save(family: str, tok: Any, folder: Path) -> Path:
    """A model of this family with random weights that keep the variance of what goes through them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = MAKERS[family](tok)
        for part in (pipe.text_encoder, pipe.transformer):
            for linear in part.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    pipe.save_pretrained(folder)
    if (folder / "processor").is_dir():  # published ones are whole
        preprocessor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2}
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    usual = {"size": SIZES[family], "steps": STEPS, "true_cfg_scale": 3.0}
    (folder / pipeline.DEFAULTS_FILE).write_text(json.dumps(usual), encoding="utf-8")
    return folder
