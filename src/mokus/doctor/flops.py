"""FLOPs of the image transformer and of the text encoder, from their shapes alone."""

from __future__ import annotations

from mokus.doctor.shape import Shape

TOKENS = 47  # of a prompt and the template's tail, as the image transformer sees them: a long one


def image_flops(
    shape: Shape, batch: int, size: int, tokens: int = TOKENS, backward: bool = False, again: float = 0.0
) -> float:
    """FLOPs of the image transformer for a batch of images of size x size pixels with so many tokens of text.

    A matrix of p numbers takes 2 p a token. A block of width d has 12 d^2 numbers for image tokens and as many for text
    tokens, and 12 d^2 more that modulate them, for one token a sample; attention over n + s tokens is two products:

        b L (24 d^2 (n + s + 1) + 4 d (n + s)^2)

    With a LoRA trained, `backward` is as much again for matrices, whose own gradients nobody wants, and five products for two
    in attention. Nothing below the first LoRA has a gradient, so the first block's 3 d^2 projections and what is before them are
    spared, nor has what the last block makes of the text, 9 d^2. `again`: the share of blocks that run forward a second time, as
    with gradient checkpointing.
    """
    d, n = shape.width, (size // shape.patch) ** 2
    config = shape.configs["transformer"]
    matrices, attention = 24 * d * d * (n + tokens + 1), 4 * d * (n + tokens) ** 2
    blocks = matrices * (1 + again + backward) + attention * (1 + again + 2.5 * backward)
    channels = int(config.get("in_channels", 64))
    ends = 2 * d * ((2 + backward) * channels * n + int(config["joint_attention_dim"]) * tokens)
    spared = backward * 2 * d * d * (3 * (n + tokens) + 9 * tokens)
    return batch * (shape.blocks * blocks + ends - spared)


def text_flops(
    shape: Shape, tokens: int, layers: int | None = None, backward_layers: int = 0, logits: bool = False
) -> float:
    """FLOPs of the text encoder for so many tokens in all; attention's products are small beside its matrices at some 60.

    `layers`: how many they pass, by default all; `backward_layers`: how many take part in the backward pass. `logits`: of
    every token as well.
    """
    text = shape.text
    d, heads = text.hidden_size, text.num_attention_heads
    narrow = d * text.num_key_value_heads // heads
    layer = 2 * d * d + 2 * d * narrow + 3 * d * text.intermediate_size
    head = d * text.vocab_size if logits else 0
    return 2.0 * tokens * (layer * ((text.num_hidden_layers if layers is None else layers) + backward_layers) + head)
