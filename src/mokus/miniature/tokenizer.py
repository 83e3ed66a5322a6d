"""The miniature's tokenizer: a `Qwen2Tokenizer` whose small byte-level BPE is trained on the world's own text."""

from __future__ import annotations

import json
from itertools import islice

from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

from mokus.miniature import language

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 4096
TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)


def build() -> Qwen2Tokenizer:
    """Train the BPE; the template's words weigh enough that each is one token, which makes its prefix 34 tokens, its tail 5."""
    lines = islice(language.training_lines(seed=7), 40_000)
    corpus = [TEMPLATE] * 2000 + [f"{line.prompt}\n{line.answer}\n {line.answer}" for line in lines]
    bpe = Qwen2Tokenizer()._tokenizer  # its normaliser and pre-tokenizer
    bpe.model = BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS,
        model_max_length=2048,
    )
