"""The miniature's image transformer: a small `QwenImageTransformer2DModel`, trained with the rectified-flow loss.

All that is frozen is computed once: `prepare` renders the pictures and stores their latents and their prompts' encodings.
Held-out facts are never among them, nor is any character. 10 % of the prompts are dropped for guidance.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mokus import flow
from mokus.miniature import language, vae, world
from mokus.miniature.checkpoint import FILE as CHECKPOINT
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.optimiser import optimiser_for
from mokus.miniature.text_encoder import PREFIX, TAIL

CONFIG = {
    "patch_size": 2,
    "in_channels": 32,
    "out_channels": 8,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 192,
    "axes_dims_rope": (8, 12, 12),
}
GRID = (world.SIZE // 8, world.SIZE // 8)
LENGTHS = (16, 26)  # text lengths of the batches: few, so that compiled code and oneDNN's kernels are reused
DROPPED = 0.1
EMA = 0.9995
# shape is decided at high noise, so lean towards it
TIMES = {"mean": 0.7, "std": 1.0}


class CpuAttentionProcessor:
    """The same joint attention as diffusers' processor, in the operations whose backward is fast on CPUs.

    Rotary embedding in real numbers and an explicit softmax: twice the speed of the complex product and the fused kernel.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None, attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert image_rotary_emb is not None and encoder_hidden_states_mask is not None
        head = attn.inner_dim // attn.heads

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, head))

        image_freqs, text_freqs = image_rotary_emb
        q = torch.cat([
            _rotate(attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states))), text_freqs),
            _rotate(attn.norm_q(split(attn.to_q(hidden_states))), image_freqs),
        ], dim=1).transpose(1, 2)  # (b, heads, s + n, head)  # fmt: skip
        k = torch.cat([
            _rotate(attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states))), text_freqs),
            _rotate(attn.norm_k(split(attn.to_k(hidden_states))), image_freqs),
        ], dim=1).transpose(1, 2)  # fmt: skip
        v = torch.cat(
            [split(attn.add_v_proj(encoder_hidden_states)), split(attn.to_v(hidden_states))], dim=1
        ).transpose(1, 2)
        masked = F.pad(~encoder_hidden_states_mask, (0, hidden_states.shape[1]))[:, None, None]
        weights = (q @ k.transpose(2, 3) * head**-0.5).masked_fill(masked, -1e4).softmax(dim=-1)
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        text, image = out[:, : encoder_hidden_states.shape[1]], out[:, encoder_hidden_states.shape[1] :]
        return attn.to_out[0](image), attn.to_add_out(text)


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """x (b, s, heads, d) rotated by complex freqs (s, d / 2), adjacent numbers as pairs."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs.real[:, None].to(x.dtype), freqs.imag[:, None].to(x.dtype)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


def training_lines(seed: int) -> Iterator[language.Line]:
    """An endless stream of prompts with their pictures: described, by a fact that may be shown, and unknown."""
    rng = random.Random(seed)
    shown = [fact for fact in world.facts() if not fact.held_out]
    while True:
        u = rng.random()
        if u < 0.45:
            yield language.direct_caption(rng)
        elif u < 0.85:
            yield language.fact_caption(rng, rng.choice(shown))
        else:
            yield language.unknown_caption(rng)


def prepare(folder: Path, n: int, seed: int = 1) -> dict[int, dict[str, Tensor]]:
    """Per text length: latents (m, 64, 32) and encodings (m, length, 192) of `n` pictures, with masks; kept on disk."""
    lines = list(islice(training_lines(seed), n))
    of_lines = hashlib.sha256(repr(lines).encode())
    of_latents = _digest(of_lines, folder / "vae")
    of_prompts = _digest(of_lines, folder / "vae", folder / "tokenizer", folder / "text_encoder")
    latents = _kept(folder / f"latents-{of_latents}.pt", lambda: draw_and_encode(folder, lines, seed))
    prompts = [line.prompt for line in lines]
    return _kept(folder / f"prompts-{of_prompts}.pt", lambda: encode_prompts(folder, prompts, latents))


def _digest(so_far: Any, *models: Path) -> str:
    """Of what has gone in so far and the files of saved models: what is kept is of just these."""
    digest = so_far.copy()
    for file in sorted(file for model in models for file in model.iterdir() if file.name != CHECKPOINT):
        digest.update(file.name.encode() + file.read_bytes())
    return str(digest.hexdigest()[:12])


def _kept(file: Path, compute: Callable[[], Any]) -> Any:
    if not file.exists():
        torch.save(compute(), beside := file.with_suffix(".tmp"))
        beside.replace(file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def draw_and_encode(folder: Path, lines: list[language.Line], seed: int) -> Tensor:
    """Packed, normalised latents (n, 64, 32) bf16 of the lines' pictures."""
    rng = random.Random(seed)
    model = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    latents = []
    with vae.still_images(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(lines), 100):
            images = [world.render(line.picture, rng) for line in lines[i : i + 100] if line.picture]
            latents.append(encode_images(model, vae.to_tensor(images)).bfloat16())
            _say("pictures", i, len(lines))
    return torch.cat(latents)


def encode_images(model: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] -> packed, normalised latents (b, n, 32)."""
    z = model.encode(x[:, :, None]).latent_dist.mode().float()  # (b, 8, 1, h / 4, w / 4)
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    z = (z - mean) / std
    return QwenImagePipeline._pack_latents(z, z.shape[0], z.shape[1], z.shape[3], z.shape[4])


@torch.no_grad()
def encode_prompts(folder: Path, prompts: list[str], latents: Tensor) -> dict[int, dict[str, Tensor]]:
    """The final hidden states of the prompts inside the template, its prefix dropped, as the pipeline computes them."""
    tok = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval().model.language_model
    prefix = torch.tensor([tok(PREFIX).input_ids])
    ids = [tok(prompt + TAIL).input_ids for prompt in prompts]
    data: dict[int, dict[str, Tensor]] = {}
    shortest = 0
    for length in LENGTHS:
        chosen = [i for i, row in enumerate(ids) if shortest < len(row) <= length]
        shortest = length
        if not chosen:
            continue
        states, masks = [], []
        for part in range(0, len(chosen), 200):
            rows = [ids[i] for i in chosen[part : part + 200]]
            batch = torch.full((len(rows), length), tok.pad_token_id)
            for row, text in zip(batch, rows, strict=True):
                row[: len(text)] = torch.tensor(text)
            mask = torch.arange(length)[None] < torch.tensor([len(r) for r in rows])[:, None]
            cache = DynamicCache()
            encoder(input_ids=prefix, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
            out = encoder(input_ids=batch, past_key_values=cache, use_cache=True).last_hidden_state
            states.append((out * mask[..., None]).bfloat16())
            masks.append(mask)
            _say(f"prompts of up to {length} tokens", part, len(chosen))
        data[length] = {"latents": latents[chosen], "embeds": torch.cat(states), "mask": torch.cat(masks)}
    return data


def _say(what: str, done: int, total: int) -> None:
    if done % 4000 == 0:
        print(f"mmdit: {what} {done}/{total}", flush=True)


def unconditional(folder: Path) -> tuple[Tensor, Tensor]:
    """Encoding (length, 192) and mask of the negative prompt " ", padded to the shortest length."""
    data = encode_prompts(folder, [" "], torch.zeros(1, 1))[LENGTHS[0]]
    return data["embeds"][0], data["mask"][0]


def train(
    folder: Path, steps: int = 12000, batch: int = 64, lr: float = 3e-3, pictures: int = 60_000, seed: int = 0,
    start_from: Path | None = None,
) -> None:  # fmt: skip
    """Train into `folder`/transformer, resumable; prints the loss and the speed.

    `start_from`: a pipeline folder whose transformer's weights it begins with.
    """
    torch.manual_seed(seed)
    data = prepare(folder, pictures)
    nothing, nothing_mask = unconditional(folder)
    model = QwenImageTransformer2DModel(**CONFIG)
    if start_from:
        model = QwenImageTransformer2DModel.from_pretrained(start_from / "transformer", dtype=torch.float32).train()
    model.set_attn_processor(CpuAttentionProcessor())
    average = QwenImageTransformer2DModel(**CONFIG)
    average.load_state_dict(model.state_dict())
    not_matrices = ("img_mod", "txt_mod", "img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")
    optimiser, schedule = optimiser_for(model, lr, steps, not_matrices)
    parts = {"model": model, "average": average, **optimiser.parts, "schedule": schedule}
    start = load_checkpoint(folder / "transformer", **parts)
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    counts = torch.tensor([len(data[length]["mask"]) for length in LENGTHS]).float()
    began, running = time.time(), 0.0
    for step in range(start, steps):
        random_ = torch.Generator().manual_seed(seed * 1_000_003 + step)
        length = LENGTHS[int(torch.multinomial(counts, 1, generator=random_))]
        part = data[length]
        pick = torch.randint(len(part["mask"]), (batch,), generator=random_)
        z0, embeds, mask = part["latents"][pick].float(), part["embeds"][pick].float(), part["mask"][pick]
        dropped = torch.rand(batch, generator=random_) < DROPPED
        embeds[dropped] = F.pad(nothing.float(), (0, 0, 0, length - LENGTHS[0]))
        mask[dropped] = F.pad(nothing_mask, (0, length - LENGTHS[0]))
        t = flow.logit_normal(batch, **TIMES, generator=random_)
        z1 = torch.randn(z0.shape, generator=random_)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = flow.velocity(model, flow.interpolate(z0, z1, t), t, embeds, mask, GRID)
        value = flow.loss(predicted, flow.target(z0, z1)).mean()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        _average(average, model, min(EMA, (step + 1) / (step + 10)))
        running = 0.98 * running + 0.02 * value.item() if step > start else value.item()
        if (step + 1) % 100 == 0:
            speed = (step + 1 - start) / (time.time() - began)
            eta = (steps - step - 1) / speed
            print(
                f"mmdit {step + 1}/{steps} loss {running:.4f} {speed * batch:.0f} images/s eta {eta:.0f} s", flush=True
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(folder / "transformer", step + 1, **parts)
            average.save_pretrained(folder / "transformer")


@torch.no_grad()
def _average(average: torch.nn.Module, model: torch.nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [p.data for p in model.parameters()], 1 - keep)
