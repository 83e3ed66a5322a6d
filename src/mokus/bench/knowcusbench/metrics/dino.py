"""DINO: mean over the references of the cosine of two images' class tokens in the last layer, after DreamBooth.

More than CLIP's, these embeddings tell two things of one kind apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mokus.bench.knowcusbench.metrics import Shown, Values
from mokus.bench.knowcusbench.metrics.pretrained import OfReferences, Pretrained, distinct

if TYPE_CHECKING:
    from PIL import Image


class Dino:
    """A vision transformer, from the hub or a folder. Raises `MokusError` for one that cannot be had."""

    name = "dino"
    columns: tuple[str, ...] = ("dino",)

    def __init__(self, name: str, device: str | None = None) -> None:
        source = Pretrained(name, "dino", "--dino", ("vit", "dinov2", "dinov3_vit"))
        self.model = source.model(transformers.AutoModel, device)
        self.image_processor = source.image_processor()
        self.about = source.about
        self._references = OfReferences(self._embedded)

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        images = self._embedded([each.image for each in shown])
        return [
            {"dino": float((self._references(each.references) @ image).mean())}
            for each, image in zip(shown, images, strict=True)
        ]

    @torch.no_grad()
    def _embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """Class tokens (n, d) of length 1, on the CPU."""
        different, places = distinct(images)
        pixels = self.image_processor(images=different, return_tensors="pt")["pixel_values"]
        hidden = self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state
        return F.normalize(hidden[:, 0], dim=-1).cpu()[places]
