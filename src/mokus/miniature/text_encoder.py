"""The miniature's text encoder: a small `Qwen2_5_VLForConditionalGeneration` that knows the world's facts.

Plain next-token training leaves the final hidden states of a prompt without the resolved fact, and an image model
cannot draw what it is not told. So the answer begins with its informative words, and small extra heads (multi-token
prediction, thrown away after training) read the next answer tokens off the last state of the assistant tail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mokus.miniature import language, tokenizer
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.optimiser import optimiser_for

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
HEADS = 8  # extra heads: the 2nd .. 9th answer token, read at the tail
ANSWER = 14  # tokens of the longest answer, its end included
WIDTH, LAYERS = 192, 10


def config(tok: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """10 layers of width 192; a vision tower of the smallest size, which the class requires and nothing uses."""
    end = tok.convert_tokens_to_ids("<|im_end|>")
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": tok.pad_token_id,
            "eos_token_id": end,
            "pad_token_id": tok.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
        image_token_id=tok.pad_token_id,
        video_token_id=tok.pad_token_id,
        vision_start_token_id=tok.pad_token_id,
    )  # fmt: skip


class NextTokenHeads(nn.Module):
    """Residual projections of a tail state, one for each later answer token; the word embeddings turn them into logits."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(HEADS))

    def forward(self, tail: Tensor, embeddings: Tensor) -> Tensor:
        """tail (b, d), embeddings (v, d) -> logits (b, HEADS, v)."""
        states = torch.stack([p(tail) for p in self.projections], dim=1)
        return states @ embeddings.T


def batches(tok: Qwen2Tokenizer, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Right-padded ids (b, s) of prompt + tail + answer, labels (b, s), and where the tail's last token stands (b,)."""
    lines = language.training_lines(seed)
    tail, end = tok(TAIL).input_ids, tok.convert_tokens_to_ids("<|im_end|>")
    while True:
        # sort a larger draw by length, so that little is padding
        rows = []
        for line in islice(lines, size * 8):
            prompt = tok(line.prompt).input_ids + tail
            rows.append((prompt, [*tok(line.answer).input_ids, end]))
        rows.sort(key=lambda r: len(r[0]) + len(r[1]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        order = torch.randperm(len(chunks)).tolist()
        for i in order:
            yield _padded(chunks[i], tok.pad_token_id)


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    length = math.ceil(max(len(p) + len(a) for p, a in rows) / 8) * 8
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) - 1 : len(p) + len(a) - 1] = torch.tensor(a)  # the label stands where it is predicted
    return ids, labels, torch.tensor([len(p) - 1 for p, _ in rows])


def loss(
    model: Any, heads: NextTokenHeads, prefix: Tensor, ids: Tensor, labels: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    """Next-token loss of the answers + half the multi-token loss at the tail; the prefix is run once per batch."""
    b, _ = ids.shape
    language_model, embeddings = model.model.language_model, model.get_input_embeddings().weight
    cache = DynamicCache()
    language_model(input_ids=prefix[None], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(b)
    states = language_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    # fixed shapes (b, ANSWER) rather than a ragged selection: oneDNN prepares each new shape anew, which is slow
    labels = F.pad(labels, (0, ANSWER), value=-100)
    at = tail[:, None] + torch.arange(ANSWER)
    answers = states.gather(1, at.clamp(max=states.shape[1] - 1)[..., None].expand(-1, -1, WIDTH))
    next_token = _cross_entropy(answers @ embeddings.T, labels.gather(1, at))
    later = labels.gather(1, tail[:, None] + 1 + torch.arange(HEADS))
    return next_token, _cross_entropy(heads(states[torch.arange(b), tail], embeddings), later)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def train(folder: Path, steps: int = 2400, batch: int = 96, lr: float = 3e-3, seed: int = 0) -> None:
    """Train into `folder`/text_encoder and `folder`/tokenizer, resumable; prints the losses."""
    torch.manual_seed(seed)
    tok = tokenizer.build()
    tok.save_pretrained(folder / "tokenizer")
    # plain attention: the fused kernel's backward is slow on CPUs at these lengths
    model = Qwen2_5_VLForConditionalGeneration._from_config(config(tok), attn_implementation="eager")
    heads = NextTokenHeads()
    both = nn.ModuleDict({"model": model, "heads": heads})
    optimiser, schedule = optimiser_for(both, lr, steps)
    start = load_checkpoint(folder / "text_encoder", model=both, **optimiser.parts, schedule=schedule)
    prefix = torch.tensor(tok(PREFIX).input_ids)
    began, running = time.time(), (9.0, 9.0)
    data = batches(tok, batch, seed + start)
    for step in range(start, steps):
        ids, labels, tail = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            next_token, ahead = loss(model, heads, prefix, ids, labels, tail)
        optimiser.zero_grad()
        (next_token + 0.5 * ahead).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running = (0.95 * running[0] + 0.05 * next_token.item(), 0.95 * running[1] + 0.05 * ahead.item())
        if (step + 1) % 25 == 0:
            eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
            print(
                f"text encoder {step + 1}/{steps} next {running[0]:.4f} ahead {running[1]:.4f} eta {eta:.0f} s",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_checkpoint(folder / "text_encoder", step + 1, model=both, **optimiser.parts, schedule=schedule)
            model.save_pretrained(folder / "text_encoder")
