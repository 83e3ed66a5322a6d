"""CLIP-I and CLIP-T: cosines of CLIP's embeddings, raw.

clip_i        mean over the references of the cosine of image and reference
clip_t        cosine of the image and the prompt with the knowledge
clip_t_class  ... and the prompt with the class word, which says what to draw to one that does not know the concept

Some scripts multiply CLIP-T by 2.5 or by 100; this one does not.
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


class Encoder:
    """A `CLIPModel` with tokenizer and image processor, from the hub or a folder. Its embeddings have length 1.

    `processor`: where tokenizer and image processor come from, if not from the model. Raises `MokusError` for a model that
    cannot be had or is no CLIP.
    """

    def __init__(
        self, name: str, processor: str | None = None, device: str | None = None, metric: str = "clip",
        option: str = "--clip",
    ) -> None:  # fmt: skip
        source = Pretrained(name, metric, option, ("clip",))
        beside = Pretrained(processor or name, metric, option)
        self.model = source.model(transformers.CLIPModel, device)
        self.tokenizer = beside.load(transformers.AutoTokenizer)
        self.image_processor = beside.image_processor()
        self.longest = int(self.model.config.text_config.max_position_embeddings)
        self.about = {**source.about, "text": f"cut off after {self.longest} tokens"}
        if processor:
            self.about |= {f"processor_{key}": beside.about[key] for key in ("id", "revision", "sha256")}
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings (n, d) on the CPU."""
        different, places = distinct(images)
        pixels = self.image_processor(images=different, return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output
        return F.normalize(features, dim=-1).cpu()[places]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, d) on the CPU, each computed once; what is too long is cut off."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            tokens = self.tokenizer(new, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            features = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1).cpu()
            self._texts |= zip(new, features, strict=True)
        return torch.stack([self._texts[text] for text in texts])


def miniature(device: str | None = None) -> Encoder:
    """The CLIP in the package, which was trained on the synthetic world."""
    from mokus.miniature import clip

    encoder = Encoder(str(clip.folder()), device=device)
    encoder.about["id"] = "miniature"
    return encoder


class Clip:
    """CLIP-I and CLIP-T."""

    name = "clip"
    columns: tuple[str, ...] = ("clip_i", "clip_t", "clip_t_class")

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.about = encoder, encoder.about
        self._references = OfReferences(encoder.images)

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        images = self.encoder.images([each.image for each in shown])
        references = [self._references(each.references) for each in shown]
        prompts = self.encoder.texts([each.prompt for each in shown])
        classes = self.encoder.texts([each.class_prompt for each in shown])
        return [
            {
                "clip_i": float((others @ image).mean()),
                "clip_t": float(prompt @ image),
                "clip_t_class": float(class_ @ image),
            }
            for image, others, prompt, class_ in zip(images, references, prompts, classes, strict=True)
        ]
