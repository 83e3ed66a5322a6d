"""The segmenter: a tiny U-Net that finds the subject of an image of the synthetic world, be it a shape or a creature.

It is trained on renders with their exact masks, half of them after a trip through the VAE, blurred and noisy; never on a
character. Some show an empty scene, so that it can say that there is nothing. A second thing beside is not the subject.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mokus.miniature import oracle, world
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.language import random_picture
from mokus.miniature.vae import to_tensor

FILE = "segmenter.safetensors"
LEAST = 0.01  # of the image; what covers less is not a subject
EMPTY = 0.08  # share of the training pictures without a subject


class Segmenter(nn.Module):
    """Three times halved and doubled again, with what was there before beside it; a logit for each pixel."""

    def __init__(self, widths: Sequence[int] = (16, 32, 48, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, 64, 64) in [-1, 1] -> logits (b, 64, 64)."""
        before = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            before.append(x)
        for block, beside in zip(reversed(self.up), reversed(before[:-1]), strict=True):
            x = block(torch.cat([beside, F.interpolate(x, scale_factor=2)], dim=1))
        return self.out(x)[:, 0]

    @torch.no_grad()
    def masks(self, images: Sequence[Image.Image]) -> list[Image.Image | None]:
        """The subject of each image: mode L, 0 or 255, as large as the image; None where nothing is found.

        Images that are not 64x64 are seen at that size.
        """
        self.eval()
        size = (world.SIZE, world.SIZE)
        found: list[Image.Image | None] = []
        for i in range(0, len(images), 128):
            some = images[i : i + 128]
            seen = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in some]
            for image, share in zip(some, self(to_tensor(seen)).sigmoid(), strict=True):
                if (share > 0.5).float().mean() < LEAST:
                    found.append(None)
                else:
                    soft = Image.fromarray((255 * share).round().byte().numpy())
                    found.append(soft.resize(image.size, Image.Resampling.BILINEAR).point(lambda v: 255 * (v > 127)))
        return found


def _block(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a in (inputs, outputs):
        layers += [nn.Conv2d(a, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def file() -> Path:
    """Where the shipped weights are."""
    return Path(str(files("mokus.miniature").joinpath("weights", FILE)))


@lru_cache(maxsize=1)
def load() -> Segmenter:
    """The segmenter shipped with the package."""
    return from_file(file())


def from_file(weights: Path) -> Segmenter:
    """A segmenter from its weights."""
    segmenter = Segmenter()
    segmenter.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()})
    return segmenter.eval()


def example(rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """A random render and the mask of its subject, both 64x64."""
    subject = world.random_subject(rng, rng.choice([None, None, None, *world.MATERIALS]))
    if rng.random() < EMPTY:
        return world.empty_scene(rng.choice(world.SCENES), rng), Image.new("L", (world.SIZE, world.SIZE))
    creature = world.random_character(rng) if rng.random() < 0.65 else None
    return world.render_with_mask(random_picture(rng, subject, plain=0.5), rng, creature)


def prepare(folder: Path, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` examples, every second one after a trip through the VAE: uint8 images (n, 3, 64, 64), masks (n, 64, 64)."""
    rng = random.Random(seed)
    masks = []

    def drawn() -> Iterator[Image.Image]:
        for _ in range(n):
            image, mask = example(rng)
            masks.append(np.asarray(mask))
            yield image

    images = oracle.every_second_through_vae(folder, drawn(), "segmenter")
    return images, torch.from_numpy(np.stack(masks))


def train(
    folder: Path, steps: int = 1500, batch: int = 64, lr: float = 3e-3, pool: int = 16_000, seed: int = 0
) -> None:
    """Train into `folder`/segmenter.safetensors, resumable; needs `folder`/vae. Prints the loss."""
    torch.manual_seed(seed)
    segmenter = Segmenter().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(segmenter.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    parts = {"model": segmenter, "optimiser": optimiser, "schedule": schedule}
    start = load_checkpoint(folder / "segmenter", **parts)
    images, masks = prepare(folder, pool if start < steps else 2, seed)
    began, running = time.time(), 0.7
    for step in range(start, steps):
        pick = torch.randint(pool, (batch,))
        x = oracle.augmented(images[pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = segmenter(x)
        value = F.binary_cross_entropy_with_logits(logits.float(), masks[pick].float() / 255)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        running = 0.97 * running + 0.03 * value.item()
        if (step + 1) % 100 == 0:
            eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
            print(f"segmenter {step + 1}/{steps} loss {running:.4f} eta {eta:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(folder / "segmenter", step + 1, **parts)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in segmenter.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{FILE}.tmp")
    os.replace(folder / f"{FILE}.tmp", folder / FILE)


def overlap(found: Image.Image | None, mask: Image.Image) -> float:
    """Intersection over union of two masks of one size, each taken as all that is more than half covered; 0 for None."""
    if found is None:
        return 0.0
    a, b = (np.asarray(each) > 127 for each in (found, mask))
    return float((a & b).sum() / max(1, (a | b).sum()))
