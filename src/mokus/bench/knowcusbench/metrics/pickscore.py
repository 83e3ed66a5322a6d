"""PickScore (arXiv 2305.01569): a CLIP fine-tuned on which of two images people prefer; exp(logit scale) * cosine.

pick        with the prompt that holds the knowledge
pick_class  ... and the one with the class word
"""

from __future__ import annotations

from collections.abc import Sequence

from mokus.bench.knowcusbench.metrics import Shown, Values
from mokus.bench.knowcusbench.metrics.clip import Encoder


class Pick:
    """PickScore, or another CLIP that was trained to score. Raises `MokusError` for a model that cannot be had."""

    name = "pick"
    columns: tuple[str, ...] = ("pick", "pick_class")

    def __init__(self, name: str, processor: str | None = None, device: str | None = None) -> None:
        self.encoder = Encoder(name, processor, device, "pick", "--pick")
        self.about = self.encoder.about
        self.scale = float(self.encoder.model.logit_scale.exp())

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        images = self.encoder.images([each.image for each in shown])
        prompts = self.encoder.texts([each.prompt for each in shown])
        classes = self.encoder.texts([each.class_prompt for each in shown])
        return [
            {"pick": self.scale * float(prompt @ image), "pick_class": self.scale * float(class_ @ image)}
            for image, prompt, class_ in zip(images, prompts, classes, strict=True)
        ]
