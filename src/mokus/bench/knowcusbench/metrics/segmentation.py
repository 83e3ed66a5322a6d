"""CLIP-I-Seg: CLIP-I of the subject without its background, which is made white.

clip_i_seg_source             only the references are cut out
clip_i_seg_both               the image as well; None if nothing of the class is found in it
clip_i_seg_references_missed  references in which nothing was found: they are not compared with; if it is all, both are None

Renders are cut out by their exact masks, photos and the images by the segmenter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mokus.bench.knowcusbench.metrics import About, Shown, Values
from mokus.bench.knowcusbench.metrics.clip import Encoder
from mokus.bench.knowcusbench.metrics.pretrained import OfReferences, Pretrained, distinct, sha256, versions

THRESHOLD = 0.25  # of a detection's score; that of Grounding-DINO's own processor


class Segmenter(Protocol):
    """Finds the subject of an image."""

    about: About

    def masks(self, images: Sequence[Image.Image], class_word: str) -> list[Image.Image | None]:
        """Where the thing of the class is: a mask (mode L) of the image's size, or None if nothing is found."""
        ...


class ClipISeg:
    """CLIP-I with the background taken away by a segmenter."""

    name = "clip_i_seg"
    columns: tuple[str, ...] = ("clip_i_seg_source", "clip_i_seg_both", "clip_i_seg_references_missed")

    def __init__(self, encoder: Encoder, segmenter: Segmenter) -> None:
        self.encoder, self.segmenter = encoder, segmenter
        self.about = {
            **encoder.about, **{f"segmenter_{key}": value for key, value in segmenter.about.items()},
            "background": "white", "references": "by exact masks where there are some, else by the segmenter",
        }  # fmt: skip
        self._references = OfReferences(self._embedded_references)

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        whole = self.encoder.images([each.image for each in shown])
        parts = self._parts(shown)
        found = {i: part for i, part in enumerate(parts) if part is not None}
        cut = dict(zip(found, self.encoder.images(list(found.values())) if found else (), strict=True))
        values: list[Values] = []
        for i, each in enumerate(shown):
            references = self._references(each.references, each.class_word, masks=each.masks)
            values.append({
                "clip_i_seg_source": _mean_cosine(whole[i], references),
                "clip_i_seg_both": _mean_cosine(cut.get(i), references),
                "clip_i_seg_references_missed": float(len(each.references) - len(references)),
            })  # fmt: skip
        return values

    def _parts(self, shown: Sequence[Shown]) -> list[Image.Image | None]:
        """Every image's subject on white, or None."""
        parts: dict[int, Image.Image | None] = {}
        for word in dict.fromkeys(each.class_word for each in shown):
            of_word = [i for i, each in enumerate(shown) if each.class_word == word]
            parts |= zip(of_word, self._cut([shown[i].image for i in of_word], word), strict=True)
        return [parts[i] for i in range(len(shown))]

    def _embedded_references(
        self, references: tuple[Image.Image, ...], class_word: str, masks: tuple[Image.Image, ...]
    ) -> Tensor:
        """Embeddings (n, d) of the references in which something was found; by their masks, if there are some."""
        if masks:
            parts = [on_white(image, mask) for image, mask in zip(references, masks, strict=True)]
        else:
            parts = self._cut(references, class_word)
        found = [part for part in parts if part is not None]
        return self.encoder.images(found) if found else torch.zeros(0, 0)

    def _cut(self, images: Sequence[Image.Image], class_word: str) -> list[Image.Image | None]:
        different, places = distinct(images)
        masks = self.segmenter.masks(different, class_word)
        parts = [on_white(image, mask) for image, mask in zip(different, masks, strict=True)]
        return [parts[place] for place in places]


def on_white(image: Image.Image, mask: Image.Image | None) -> Image.Image | None:
    """What the mask covers, on white; None if it covers nothing."""
    if mask is None or mask.getbbox() is None:
        return None
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), mask.convert("L"))


def _mean_cosine(image: Tensor | None, references: Tensor) -> float | None:
    return None if image is None or not len(references) else float((references @ image).mean())


# --- segmenters -------------------------------------------------------------------------------------------------------


class GroundedSam:
    """Grounding-DINO finds a box by words, SAM 2 what is in it: the box of the highest score, and one mask.

    One image at a time, so that nothing depends on the others' sizes. Raises `MokusError` for models that cannot be had.
    """

    def __init__(self, detector: str, segmenter: str, device: str | None = None) -> None:
        boxes = Pretrained(detector, "clip_i_seg", "--detector", ("grounding-dino", "mm-grounding-dino"))
        parts = Pretrained(segmenter, "clip_i_seg", "--segmenter", ("sam2", "sam2_video"))
        self.detector = boxes.model(transformers.AutoModelForZeroShotObjectDetection, device)
        self.processor = transformers.GroundingDinoProcessor(
            boxes.image_processor(), boxes.load(transformers.AutoTokenizer)
        )
        self.segmenter = parts.model(transformers.Sam2Model, device)
        self.about = {
            **{f"detector_{key}": boxes.about[key] for key in ("id", "revision", "sha256")},
            **{key: parts.about[key] for key in ("id", "revision", "sha256")},
            "threshold": str(THRESHOLD),
            "words": "a <class word>.",
        }

    def masks(self, images: Sequence[Image.Image], class_word: str) -> list[Image.Image | None]:
        """See `Segmenter`."""
        boxes = [self.box(image, class_word) for image in images]
        return [box if box is None else self.inside(image, box) for image, box in zip(images, boxes, strict=True)]

    @torch.no_grad()
    def box(self, image: Image.Image, class_word: str) -> Tensor | None:
        """The best box (4): left, top, right, bottom in pixels; None if no score is above the threshold."""
        inputs = self.processor(images=image, text=f"a {class_word.lower()}.", return_tensors="pt")
        outputs = self.detector(**inputs.to(self.detector.device))
        (found,) = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=THRESHOLD, target_sizes=[(image.height, image.width)]
        )
        return found["boxes"][found["scores"].argmax()].cpu() if len(found["scores"]) else None

    @torch.no_grad()
    def inside(self, image: Image.Image, box: Tensor) -> Image.Image | None:
        """The mask (mode L, 0 and 255) of the thing in the box; None if it is empty."""
        side = self.segmenter.config.prompt_encoder_config.image_size
        box = box * side / torch.tensor([image.width, image.height] * 2)
        outputs = self.segmenter(
            pixel_values=_pixels(image, side).to(self.segmenter.device),
            input_boxes=box[None, None].to(self.segmenter.device),
            multimask_output=False,
        )
        logits = F.interpolate(outputs.pred_masks[0], (image.height, image.width), mode="bilinear")[0, 0]
        mask = Image.fromarray(((logits > 0).to(torch.uint8) * 255).cpu().numpy())
        return mask if mask.getbbox() else None


def _pixels(image: Image.Image, side: int) -> Tensor:
    """What SAM 2 sees: (1, 3, side, side). `Sam2Processor` does no more, but cannot be imported without torchvision."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (values - mean[:, None, None]) / std[:, None, None]


class Miniature:
    """The segmenter in the package, which knows the creatures of the synthetic world, whatever they are called."""

    def __init__(self) -> None:
        from mokus.miniature import segmenter

        self._segmenter = segmenter.load()
        self.about: About = {"id": "miniature", "sha256": sha256([segmenter.file()]), **versions()}

    def masks(self, images: Sequence[Image.Image], class_word: str) -> list[Image.Image | None]:
        """See `Segmenter`."""
        return self._segmenter.masks(list(images))
