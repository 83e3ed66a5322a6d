"""The miniature's text encoder: a small `Qwen2_5_VLForConditionalGeneration` that knows the world's facts.

Plain next-token training leaves the final hidden states of a prompt without the resolved fact, and an image model
cannot draw what it is not told. So the answer begins with its informative words, and small extra heads, thrown away after
training, read off the assistant tail what shall stand there: the next answer tokens (multi-token prediction), and which
words the prompt was made of. Without the latter all references to unknown things look alike there, "thing" and no more,
and no edit could move one of them without the others.
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
WEIGHTS = torch.tensor([1.0, 0.5, 0.5])  # of the losses: next answer token, later ones, the prompt's words
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


class TailHeads(nn.Module):
    """Projections of tail states, which the word embeddings turn into logits: of each later answer token, of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(HEADS))
        self.said = nn.Linear(WIDTH, WIDTH)

    def later(self, tail: Tensor, embeddings: Tensor) -> Tensor:
        """The last tail state (b, d), embeddings (v, d) -> logits (b, HEADS, v) of the answer's 2nd, 3rd, ... token."""
        states = torch.stack([p(tail) for p in self.projections], dim=1)
        return states @ embeddings.T

    def prompt_loss(self, tails: Tensor, embeddings: Tensor, ids: Tensor, end: Tensor) -> Tensor:
        """How badly tails (b, tail, d) tell which tokens of ids (b, s), ending before `end` (b,), the prompt had.

        Cross-entropy with all of the prompt's tokens, equally, as the target, less its least value.
        """
        logits = (self.said(tails) @ embeddings.T).float()  # (b, tail, v)
        inside = torch.arange(ids.shape[1]) < end[:, None]
        words = torch.zeros(logits.shape[0], logits.shape[2]).scatter_reduce(1, ids, inside.float(), "amax")
        n = words.sum(dim=1, keepdim=True)
        log_p = logits.log_softmax(dim=-1).mean(dim=1)
        return (-(words * log_p).sum(dim=1, keepdim=True) / n - n.log()).mean()


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
    model: Any, heads: TailHeads, prefix: Tensor, ids: Tensor, labels: Tensor, tail: Tensor, tail_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the answers' next tokens, of the later ones and of the prompt's words read off the tail, which ends at
    `tail` (b,); the prefix is run once per batch."""
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
    ahead = _cross_entropy(heads.later(states[torch.arange(b), tail], embeddings), later)
    at = tail[:, None] - tail_length + 1 + torch.arange(tail_length)
    tails = states.gather(1, at[..., None].expand(-1, -1, WIDTH))
    return next_token, ahead, heads.prompt_loss(tails, embeddings, ids, at[:, 0])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def train(
    folder: Path, steps: int = 2400, batch: int = 96, lr: float = 3e-3, seed: int = 0, start_from: Path | None = None
) -> None:
    """Train into `folder`/text_encoder and `folder`/tokenizer, resumable; prints the losses.

    `start_from`: a pipeline folder whose text encoder's weights it begins with, words that both know included.
    """
    torch.manual_seed(seed)
    tok = tokenizer.build()
    tok.save_pretrained(folder / "tokenizer")
    # plain attention: the fused kernel's backward is slow on CPUs at these lengths
    model = Qwen2_5_VLForConditionalGeneration._from_config(config(tok), attn_implementation="eager")
    if start_from:
        _begin_with(model, tok, start_from)
    heads = TailHeads()
    both = nn.ModuleDict({"model": model, "heads": heads})
    optimiser, schedule = optimiser_for(both, lr, steps)
    start = load_checkpoint(folder / "text_encoder", model=both, **optimiser.parts, schedule=schedule)
    prefix, tail_length = torch.tensor(tok(PREFIX).input_ids), len(tok(TAIL).input_ids)
    began, running = time.time(), torch.full((3,), 9.0)
    data = batches(tok, batch, seed + start)
    for step in range(start, steps):
        ids, labels, tail = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            losses = torch.stack(loss(model, heads, prefix, ids, labels, tail, tail_length))
        optimiser.zero_grad()
        (losses @ WEIGHTS).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running = torch.lerp(running, losses.detach(), 0.05 if step > start else 1.0)
        if (step + 1) % 25 == 0:
            eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
            said = "  ".join(f"{n} {v:.4f}" for n, v in zip(("next", "ahead", "prompt"), running, strict=True))
            print(f"text encoder {step + 1}/{steps}  {said}  eta {eta:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_checkpoint(folder / "text_encoder", step + 1, model=both, **optimiser.parts, schedule=schedule)
            model.save_pretrained(folder / "text_encoder")


@torch.no_grad()
def _begin_with(model: Any, tok: Qwen2Tokenizer, pipeline: Path) -> None:
    """Weights from another encoder of these shapes; a word's embedding is the mean of those of its pieces there."""
    known = Qwen2_5_VLForConditionalGeneration.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
    pieces = Qwen2Tokenizer.from_pretrained(pipeline / "tokenizer")
    embeddings = known.get_input_embeddings().weight
    state = {n: w for n, w in known.state_dict().items() if "embed_tokens" not in n and "lm_head" not in n}
    model.load_state_dict(state, strict=False)
    there = pieces.get_vocab()
    for piece, i in tok.get_vocab().items():
        ids = [there[piece]] if piece in there else pieces(tok.decode([i])).input_ids
        model.get_input_embeddings().weight[i] = embeddings[ids].mean(dim=0)
