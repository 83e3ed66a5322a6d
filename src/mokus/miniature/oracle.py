"""The oracle: a small CNN that reads colour, shape, scene, style and character off an image of the synthetic world.

It is the judge of every figure about images, so it is trained on renders of everything, the held-out characters included
(the pipeline never sees those), on the same after a trip through the VAE, blurred and noisy, and on unnamed creatures
that resemble the characters and must be read as "none".
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mokus.miniature import vae, world
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.language import random_picture
from mokus.miniature.vae import to_tensor

NONE = "none"
FILE = "oracle.safetensors"
LABELS: dict[str, list[str]] = {
    "colour": [*world.COLOURS, "golden"],
    "shape": list(world.SHAPES),
    "scene": list(world.SCENES),
    "style": ["plain", *world.STYLES],
    "character": [NONE, *world.CHARACTERS],
}
COLOURLESS = ("pencil", "sepia")  # styles that leave no colour to read
IGNORE = -100


class Oracle(nn.Module):
    """Four strided convolution blocks, the mean over the image, one linear head per attribute."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 3 * width, 6 * width]
        blocks, last = [], 3
        for w in widths:
            blocks += [_block(last, w, 2), _block(w, w, 1)]
            last = w
        self.body = nn.Sequential(*blocks)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * last, len(values)) for name, values in LABELS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (b, 3, 64, 64) in [-1, 1] -> logits (b, labels) by attribute."""
        features = self.body(x)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: list[Image.Image]) -> list[dict[str, str]]:
        """What each image shows: {"colour", "shape", "scene", "style", "character"}; other sizes are resized to 64."""
        self.eval()
        size = (world.SIZE, world.SIZE)
        found: list[dict[str, str]] = []
        for i in range(0, len(images), 128):
            same = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images[i : i + 128]]
            best = {name: logits.argmax(dim=1).tolist() for name, logits in self(to_tensor(same)).items()}
            found += [{name: LABELS[name][best[name][j]] for name in LABELS} for j in range(len(same))]
        return found


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


@lru_cache(maxsize=1)
def load() -> Oracle:
    """The oracle shipped with the package."""
    return from_file(Path(str(files("mokus.miniature").joinpath("weights", FILE))))


def from_file(file: Path) -> Oracle:
    """An oracle from its weights."""
    oracle = Oracle()
    oracle.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()})
    return oracle.eval()


def example(rng: random.Random) -> tuple[Image.Image, list[int]]:
    """A random render and its labels, one index per attribute, IGNORE where there is nothing to read."""
    u = rng.random()
    subject = world.random_subject(rng, _material(rng))
    picture = random_picture(rng, subject, plain=0.5)
    scene = picture.scene or rng.choice(world.SCENES)
    picture = world.Picture(subject, scene, picture.style, picture.other)
    creature, character = None, NONE
    if u < 0.5:
        character = rng.choice(list(world.CHARACTERS))
        creature = world.CHARACTERS[character]
    elif u < 0.68:
        creature = world.random_character(rng)
    image = world.render(picture, rng, creature)
    labels = {"scene": scene, "style": picture.style, "character": character}
    if creature is None:
        labels["shape"] = subject.shape
        if picture.style not in COLOURLESS:
            labels["colour"] = subject.colour
    return image, [LABELS[name].index(labels[name]) if name in labels else IGNORE for name in LABELS]


def _material(rng: random.Random) -> str | None:
    return rng.choice([None, None, None, None, *world.MATERIALS])


def prepare(folder: Path, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` examples, every second one after a trip through the VAE: images uint8 (n, 3, 64, 64), labels (n, 5)."""
    rng = random.Random(seed)
    labels = []

    def drawn() -> Iterator[Image.Image]:
        for _ in range(n):
            image, label = example(rng)
            labels.append(label)
            yield image

    images = every_second_through_vae(folder, drawn(), "oracle")
    return images, torch.tensor(labels)


@torch.no_grad()
def every_second_through_vae(folder: Path, images: Iterator[Image.Image], name: str) -> Tensor:
    """Images uint8 (n, 3, 64, 64), every second one after a trip through `folder`/vae with a little noise on the latents.

    Prints how many are done, after the `name` of what is trained on them.
    """
    model = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    done: list[Tensor] = []
    with vae.still_images(), torch.autocast("cpu", torch.bfloat16):
        while drawn := list(islice(images, 100)):
            x = to_tensor(drawn)
            if len(drawn) > 1:
                z = model.encode(x[1::2, :, None]).latent_dist.mode()
                x[1::2] = model.decode(z + 0.1 * z.std() * torch.randn_like(z)).sample[:, :, 0].float().clamp(-1, 1)
            done.append(((x + 1) * 127.5).round().byte())
            if len(done) % 40 == 0:
                print(f"{name}: {100 * len(done)} examples", flush=True)
    return torch.cat(done)


def augmented(x: Tensor) -> Tensor:
    """Half blurred, noisy, a little brighter or darker: generated images are not as clean as renders."""
    x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) + 0.05 * torch.randn(len(x), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
    return x + share * (blurred - x) + 0.08 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum of the attributes' cross-entropies, each over the examples that have it."""
    parts = [
        F.cross_entropy(value.float(), labels[:, i], ignore_index=IGNORE) for i, value in enumerate(logits.values())
    ]
    return torch.stack(parts).sum()


def begin_with(oracle: Oracle, file: Path) -> None:
    """Take over the weights of an oracle of fewer labels: new labels are added last, so the known ones' rows come first."""
    weights = load_file(file)
    for name, own in oracle.state_dict().items():
        (own[: len(weights[name])] if own.ndim else own).copy_(weights[name])


def train(
    folder: Path,
    steps: int = 8000,
    batch: int = 64,
    lr: float = 3e-3,
    pool: int = 60_000,
    seed: int = 0,
    start_from: Path | None = None,
) -> None:
    """Train into `folder`/oracle.safetensors, resumable; needs `folder`/vae. Prints the loss.

    With `start_from`, a pipeline folder, its oracle is what training begins with, and new labels are learned on top.
    """
    torch.manual_seed(seed)
    images, labels = prepare(folder, pool, seed)
    oracle = Oracle()
    if start_from is not None:
        begin_with(oracle, start_from / FILE)
    oracle = oracle.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(oracle.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    start = load_checkpoint(folder / "oracle", model=oracle, optimiser=optimiser, schedule=schedule)
    began, running = time.time(), 9.0
    for step in range(start, steps):
        pick = torch.randint(pool, (batch,))
        x = augmented(images[pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(oracle(x), labels[pick])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        running = 0.97 * running + 0.03 * value.item()
        if (step + 1) % 100 == 0:
            eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
            print(f"oracle {step + 1}/{steps} loss {running:.4f} eta {eta:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(folder / "oracle", step + 1, model=oracle, optimiser=optimiser, schedule=schedule)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in oracle.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{FILE}.tmp")
    os.replace(folder / f"{FILE}.tmp", folder / FILE)


def accuracy(oracle: Oracle, n: int, seed: int) -> dict[str, float]:
    """Share of fresh renders read right, by attribute, and "all": every readable attribute of an image right."""
    rng = random.Random(seed)
    drawn = [example(rng) for _ in range(n)]
    read = oracle.read([image for image, _ in drawn])
    hits: dict[str, list[bool]] = {name: [] for name in LABELS}
    for found, (_, labels) in zip(read, drawn, strict=True):
        for name, label in zip(LABELS, labels, strict=True):
            if label != IGNORE:
                hits[name].append(LABELS[name].index(found[name]) == label)
    shares = {name: sum(h) / len(h) for name, h in hits.items()}
    return {**shares, "mean": sum(map(sum, hits.values())) / sum(map(len, hits.values()))}
