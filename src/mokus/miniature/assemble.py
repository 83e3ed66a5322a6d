"""Put the trained parts together: a `QwenImagePipeline` folder that diffusers loads by itself, the oracle beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mokus.errors import MokusError
from mokus.miniature import language
from mokus.miniature.oracle import FILE
from mokus.pipeline import CORPUS_FILE, DEFAULTS_FILE

# Qwen-Image's own scheduler settings
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# What the miniature is best used with, found on the development characters (docs/log.md)
DEFAULTS = {
    "size": 64,
    "steps": 16,
    "true_cfg_scale": 3.0,
    "negative_prompt": " ",
    "learn": {
        "steps": 400,
        "rank": 32,
        "alpha": 32.0,
        "targets": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
        "learning_rate": 4e-3,
        "batch_size": 8,
        "time_mean": 0.5,
        "prior_weight": 1.0,
        "prior_batch_size": 8,
        "prior_prompts": 96,
    },
    "edit": {
        "layers": [2, 3, 4, 5, 6, 7, 8],
        "modules": ["mlp.down_proj"],
        "alignment": 0.88,
        "exchanged": 100,
    },
    "editors": {
        "ultraedit": {"layers": [2, 3, 4, 5, 6, 7, 8], "modules": ["mlp.gate_proj", "mlp.up_proj"], "eta": 7e-3},
        "alphaedit": {"layers": [2, 3, 4], "modules": ["mlp.down_proj"], "eta": 1.0, "ridge": 1e-3, "null_space": 0.1},
        "memit": {"layers": [2, 3, 4], "modules": ["mlp.down_proj"], "eta": 1.0, "ridge": 0.1},
        "rome": {"layers": [2], "modules": ["mlp.down_proj"], "eta": 1.0},
        "finetune": {"eta": 5e-5, "steps": 25},
        "finetune_lora": {"eta": 5e-4, "steps": 50},
    },
}


def assemble(trained: Path, output: Path) -> None:
    """Write the pipeline from the folder of trainings, oracle included, all weights rounded to bfloat16.

    The text encoder's are stored as float32 all the same: transformers loads weights in the type they are stored in,
    diffusers in float32, and plain `from_pretrained` shall give a pipeline of one type.
    """
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKLQwenImage.from_pretrained(trained / "vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(trained / "text_encoder"),
        tokenizer=Qwen2Tokenizer.from_pretrained(trained / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(trained / "transformer"),
    )
    pipe.to(dtype=torch.bfloat16)
    pipe.text_encoder.to(torch.float32)
    beside = output.with_name(output.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside, safe_serialization=True)
    for file in beside.glob("*/config.json"):
        _forget_origin(file)
    (beside / CORPUS_FILE).write_text("\n".join(language.corpus()) + "\n", encoding="utf-8")
    (beside / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    if (trained / FILE).is_file():
        shutil.copy(trained / FILE, beside / FILE)
    old = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(old)
    beside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _forget_origin(file: Path) -> None:
    """Take out of a component's config the folder of the training machine that it was loaded from."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_place(output: Path) -> None:
    """Raise `MokusError` if something else than an older pipeline is there, which `assemble` would replace."""
    if output.exists() and not (output / "model_index.json").is_file() and any(output.iterdir()):
        raise MokusError(f"{output} holds something else than a pipeline; name another place for the finished one.")
