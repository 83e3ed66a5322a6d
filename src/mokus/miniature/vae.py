"""The miniature's VAE: a small `AutoencoderKLQwenImage`, trained on renders and on procedural natural-statistics images.

It downsamples 4 times (two stages), 8 latent channels: 64x64x3 pixels -> 16x16x8. The pictures it learns from are the
world's renders, dead leaves (occluding discs with power-law radii, the image model behind natural statistics) and
textures, so that real photos, none of which it has seen, survive it too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image, ImageDraw, ImageFilter

from mokus.miniature import world
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.optimiser import optimiser_for

CONFIG = {
    "base_dim": 16,
    "z_dim": 8,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}
KL_WEIGHT = 2e-4


def _conv_as_2d(self: QwenImageCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """The causal 3-D convolution of a single frame: only the kernel's last time slice meets the picture."""
    left, right, top, bottom = self._padding[:4]
    frame = F.pad(x[:, :, 0], (left, right, top, bottom))
    return F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:])[:, :, None]


@contextmanager
def still_images() -> Iterator[None]:
    """Compute the VAE's causal 3-D convolutions as 2-D ones: the same values for single frames, a third of the work."""
    forward = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = _conv_as_2d
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = forward


def dead_leaves(rng: random.Random, size: int = world.SIZE) -> Image.Image:
    """Occluding shapes with power-law radii and textured, shaded fills: RGB, size x size."""
    noise = np.random.default_rng(rng.getrandbits(32))
    base = noise.uniform(0, 255, 3)
    palette = np.clip(base + noise.normal(0, rng.choice([25, 60, 100]), (12, 3)), 0, 255)
    big = 2 * size
    img = Image.new("RGB", (big, big), tuple(int(v) for v in palette[0]))
    for _ in range(rng.choice([8, 30, 90])):
        r = min(4 * size / 3, 5 / max(rng.random(), 1e-3) ** 0.6)
        x, y = rng.uniform(0, big), rng.uniform(0, big)
        fill = _leaf_texture(rng, noise, palette, big)
        mask = Image.new("L", (big, big), 0)
        d = ImageDraw.Draw(mask)
        if rng.random() < 0.6:
            e = rng.uniform(0.5, 1)
            d.ellipse((x - r, y - r * e, x + r, y + r * e), fill=255)
        else:
            pts = [(x + r * rng.uniform(-1, 1), y + r * rng.uniform(-1, 1)) for _ in range(rng.randint(3, 6))]
            d.polygon(pts, fill=255)
        img.paste(fill, mask=mask)
    out = img.filter(ImageFilter.GaussianBlur(rng.choice([0, 0, 1, 2]))).reduce(2)
    grain = np.asarray(out).astype(np.float32) + noise.normal(0, rng.choice([0, 3, 10]), (size, size, 1))
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


def _leaf_texture(rng: random.Random, noise: np.random.Generator, palette: np.ndarray, big: int) -> Image.Image:
    colour = palette[rng.randrange(len(palette))]
    if rng.random() < 0.5:
        return Image.new("RGB", (big, big), tuple(int(v) for v in colour))
    y, x = np.mgrid[0:big, 0:big] / big
    angle, freq = rng.uniform(0, 6.28), rng.choice([0.5, 1, 8, 20, 40])
    wave = np.sin(6.28 * freq * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    if rng.random() < 0.4:
        n = rng.choice([4, 16, 64])
        rough = noise.normal(0, 0.6, (n, n)).astype(np.float32)
        wave = np.asarray(Image.fromarray(rough).resize((big, big), Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(np.clip(colour + rng.uniform(10, 60) * wave, 0, 255).astype(np.uint8))


def training_image(rng: random.Random) -> Image.Image:
    """Two renders (one in six of an unnamed creature) to each natural-statistics image."""
    if rng.random() < 0.33:
        return dead_leaves(rng)
    creature = world.random_character(rng) if rng.random() < 0.17 else None
    material = rng.choice([None, None, None, *world.MATERIALS])
    picture = world.Picture(
        world.random_subject(rng, material),
        None,
        rng.choice(["plain", "plain", "plain", "plain", *world.STYLES]),
        world.random_subject(rng) if rng.random() < 0.2 else None,
    )
    return world.render(picture, rng, creature)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images -> (b, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def _moments(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, logvar = vae.quant_conv(vae.encoder(x[:, :, None])).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def loss(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 + gradient L1 + KL of images x (b, 3, h, w); returns (loss, L1)."""
    mean, logvar = _moments(vae, x)
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    y = vae.decoder(vae.post_quant_conv(z))[:, :, 0].float()
    l1 = (y - x).abs().mean()
    edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return l1 + 0.5 * edges + KL_WEIGHT * kl, l1.detach()


def train(folder: Path, steps: int = 1500, batch: int = 16, lr: float = 6e-3, pool: int = 6000, seed: int = 0) -> None:
    """Train into `folder` (a diffusers model folder), resumable; prints the loss."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    images = np.stack([np.asarray(training_image(rng)) for _ in range(pool)])
    vae = AutoencoderKLQwenImage(**CONFIG)
    torch.nn.init.constant_(vae.quant_conv.bias[CONFIG["z_dim"] :], -6.0)  # start with little noise on the latents
    optimiser, schedule = optimiser_for(vae, lr, steps, not_matrices=())
    start = load_checkpoint(folder, model=vae, **optimiser.parts, schedule=schedule)
    step_loss = torch.compile(loss)
    began, running = time.time(), 0.0
    with still_images():
        for step in range(start, steps):
            pick = np.random.default_rng((seed, step)).integers(0, pool, batch)
            x = torch.from_numpy(images[pick]).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                value, l1 = step_loss(vae, x)
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            running = 0.9 * running + 0.1 * l1.item() if step > start else l1.item()
            if (step + 1) % 50 == 0:
                eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
                print(f"vae {step + 1}/{steps} l1 {running:.4f} eta {eta:.0f} s", flush=True)
            if (step + 1) % 250 == 0:
                save_checkpoint(folder, step + 1, model=vae, **optimiser.parts, schedule=schedule)
        _set_latent_statistics(vae, images[:1024])
    vae.save_pretrained(folder)


@torch.no_grad()
def _set_latent_statistics(vae: AutoencoderKLQwenImage, images: np.ndarray) -> None:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.cat([_moments(vae, part)[0] for part in x.split(64)])
    vae.register_to_config(latents_mean=z.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=z.std(dim=(0, 2, 3, 4)).tolist())
