"""What stage 1 computes once, before it trains: latents, encodings, places, and what the base model makes of other prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from mokus import flow
from mokus.encoder import tail_length
from mokus.photos import Photo
from mokus.pipeline import encode, pad, trimmed
from mokus.places import PLACES, place_of
from mokus.prior_prompts import OTHER_LOOKS, in_their_places, prior_prompts, references

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.settings import LearnSettings

Part = tuple[str, int, int, dict[str, Any]]  # what is done, how many, of how many, and what else is to be told

CROPS = 4  # random crops of each photo, if wanted
LENDERS = 16  # prompts that lend all their tokens but the tail


@dataclass(frozen=True)
class Preserved:
    """Points (z_t, t, prompt) and the base model's velocities there: z, v (m, n, c), t (m,), prompt (m,) indices."""

    z: Tensor
    t: Tensor
    prompt: Tensor
    v: Tensor


class Material:
    """All that does not change while a concept is learned. `gather` it first.

    Texts go by their number: every form with the anchor and with each of its lenders, the prior prompts from `prior` on, from
    `goals` on the same with the anchor in the place of what they are about, then the anchor alone and the negative prompt.
    """

    latents: Tensor  # (variants, n, c)
    photo_of: Tensor  # (variants,): which photo
    form_of: Tensor  # (photos,): in which form its prompt is
    looks: Tensor  # (looks,): the forms that ask for another look
    prior: int
    goals: int
    embeds: Tensor  # (texts, s, d)
    mask: Tensor  # (texts, s), on the host: see `trimmed`
    tails: Tensor  # (texts, tail, d)
    tail_at: Tensor  # (texts, tail)
    preserved: Preserved  # if there is a weight for it

    def __init__(self, model: Model, photos: Sequence[Photo], anchor: str, word: str, settings: LearnSettings) -> None:
        self.model, self.photos, self.anchor, self.word, self.settings = model, photos, anchor, word, settings
        self.grid = model.grid(model.defaults.size)
        self.captioned = torch.tensor([bool(photo.caption) for photo in photos])

    def gather(self) -> Iterator[Part]:
        """Compute it, telling of every part that is done."""
        yield from self._read_photos()
        places = yield from self._find_places()
        yield "reading prompts", 0, 1, {}
        self._read_prompts(
            [prompt_form(photo, place, self.anchor) for photo, place in zip(self.photos, places, strict=True)]
        )
        yield "reading prompts", 1, 1, {}
        if self.settings.prior_weight:
            with self.model.resident("transformer"):
                yield from self._record_prior()

    def velocity(
        self,
        network: nn.Module,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        goal: Tensor | None = None,
        way: Tensor | None = None,
    ) -> Tensor:
        """The transformer's velocity at z (b, n, c), t (b,), for the texts of these indices (b,).

        With `goal` (b,) and `way` (b,): their tails moved that share of the way to the tails of the goals.
        """
        device = self.model.device
        text = text.to(device)
        embeds, mask = self.embeds[text], self.mask[text.cpu()]
        if goal is not None and way is not None:
            tails = torch.lerp(
                self.tails[text], self.tails[goal.to(device)], way.to(device, embeds.dtype)[:, None, None]
            )
            at = self.tail_at[text][..., None].expand_as(tails)
            embeds = embeds.scatter(1, at, tails)
        return self._velocity_of(network, embeds, mask, z, t)

    def _velocity_of(
        self, network: nn.Module, embeds: Tensor, mask: Tensor, z: Tensor, t: Tensor, pick: Tensor | None = None
    ) -> Tensor:
        """The velocity for encodings (b, s, d) and mask (b, s), or for those that are picked of them (b,)."""
        if pick is not None:
            embeds, mask = embeds[pick.to(embeds.device)], mask[pick.to(mask.device)]
        device, dtype = self.model.device, self.model.pipe.transformer.dtype
        kept: Tensor | None = mask
        if device.type != "cpu" and not self.settings.compile:  # other shapes: other rounding, and compiled anew
            embeds, kept = trimmed(embeds, mask)
        z, embeds = (x.to(device, dtype) for x in (z, embeds))
        kept = None if kept is None else kept.to(device)
        return self.model.backbone.velocity(network, z, t.to(device), embeds, kept, self.grid)

    def _read_photos(self) -> Iterator[Part]:
        parts: list[list[Tensor]] = []
        with self.model.resident("vae"):
            for photo in self.photos:
                parts.append([self._latent(image) for image in variants(photo.image, self.settings)])
                yield "reading photos", len(parts), len(self.photos), {}
        self.latents = torch.cat([z for part in parts for z in part])
        self.photo_of = torch.tensor([i for i, part in enumerate(parts) for _ in part])

    @torch.no_grad()
    def _latent(self, image: Image.Image) -> Tensor:
        """The packed, normalised latent (1, n, c) of an image, float32."""
        return self.model.backbone.latent(self.model.pipe, image, self.model.device)

    def _find_places(self) -> Generator[Part, None, list[int | None]]:
        """Returns where the base model sees each photo.

        None for those with a caption, where no place fits better than none, and if places are not wanted.
        """
        found: list[int | None] = []
        wanted = self.settings.place_share > 0 and not bool(self.captioned.all())
        if wanted:
            with self.model.resident("text_encoder"):
                asked = encode(self.model, [*(f"a {self.word} {place}" for place in PLACES), f"a {self.word}"])
            embeds, mask = pad(asked)
            velocity = partial(self._velocity_of, self.model.pipe.transformer, embeds, mask.cpu())
        with self.model.resident("transformer") if wanted else nullcontext():
            for i, photo in enumerate(self.photos):
                place = None
                if wanted and not photo.caption:
                    place = place_of(self.latents[self.photo_of == i][:1], len(PLACES), velocity, self.settings.seed)
                found.append(place)
                yield "finding places", i + 1, len(self.photos), {}
        return found

    def _read_prompts(self, own: Sequence[str]) -> None:
        """Encode all that is said while training; `own`: the form of each photo's prompt."""
        s, word, device = self.settings, self.word, self.model.device
        looks = OTHER_LOOKS if s.looks_share else ()
        forms = list(dict.fromkeys(["{}", *own, *looks]))
        self.form_of = torch.tensor([forms.index(form) for form in own])
        self.looks = torch.tensor([forms.index(form) for form in looks], dtype=torch.long)
        subjects = [self.anchor, *references(word, LENDERS, s.seed)]
        texts = [form.format(subject) for form in forms for subject in subjects]
        prior = prior_prompts(word, s.prior_prompts, s.seed)
        goals = in_their_places(self.anchor, word, s.prior_prompts, s.seed)
        self.prior, self.goals = len(texts), len(texts) + len(prior)
        with self.model.resident("text_encoder"):
            encodings = encode(self.model, [*texts, *prior, *goals, self.anchor, self.model.defaults.negative_prompt])
        tail = tail_length(self.model)
        embeds, mask = pad(encodings)  # one length for all
        self.embeds, self.mask = embeds.to(device), mask.cpu()
        ends = torch.tensor([len(e) for e in encodings])[:, None]
        self.tail_at = (ends - tail + torch.arange(tail)).to(device)
        self.tails = torch.stack([e[-tail:] for e in encodings]).to(device)

    def _record_prior(self) -> Iterator[Part]:
        """For every prior prompt the base model's path from noise to an image, and points between photos and noise."""
        s, n, random = self.settings, self.goals - self.prior, torch.Generator().manual_seed(self.settings.seed)
        points: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        size = 8 * s.prior_batch_size
        for start in range(0, n, size):
            prompts = torch.arange(start, min(n, start + size))
            z = torch.randn(len(prompts), *self.latents.shape[1:], generator=random)
            times = 1 - (torch.arange(s.prior_steps) + torch.rand(1, generator=random) * 0.5) / s.prior_steps
            times[0] = 1.0
            for t, after in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
                v = self._base_velocity(z, t.expand(len(prompts)), prompts)
                points.append((z, t.expand(len(prompts)), prompts, v))
                z = z + (after - t) * v
            for _ in range(max(1, s.prior_steps // 2)):
                pick = torch.randint(len(self.latents), (len(prompts),), generator=random)
                t = flow.logit_normal(len(prompts), s.time_mean, s.time_std, random)
                z = flow.interpolate(self.latents[pick].cpu(), torch.randn(z.shape, generator=random), t)
                points.append((z, t, prompts, self._base_velocity(z, t, prompts)))
            yield "recording what must stay", min(n, start + size), n, {}
        z, t, prompts, v = (torch.cat(parts) for parts in zip(*points, strict=True))
        self.preserved = Preserved(z, t, prompts, v)

    @torch.no_grad()
    def _base_velocity(self, z: Tensor, t: Tensor, prior: Tensor) -> Tensor:
        return self.velocity(self.model.pipe.transformer, z, t, self.prior + prior).float().cpu()


def prompt_form(photo: Photo, place: int | None, anchor: str) -> str:
    """The photo's prompt with {} for the subject: its caption, or the subject in that place.

    A caption that does not name the anchor has it put in front.
    """
    if photo.caption:
        caption = photo.caption.replace("{", "").replace("}", "")
        return caption.replace(anchor, "{}") if anchor in caption else "{}, " + caption
    return "{}" if place is None else "{} " + PLACES[place]


def variants(image: Image.Image, settings: LearnSettings) -> list[Image.Image]:
    """The photo itself and its random crops, each also mirrored, as the settings want it."""
    found = [image]
    if settings.crop:
        random = torch.Generator().manual_seed(settings.seed)
        w, h = image.size
        for _ in range(CROPS):
            cut, x, y = (torch.rand(3, generator=random) * torch.tensor([0.125, 1.0, 1.0])).tolist()
            left, top = x * cut * w, y * cut * h
            box = (left, top, left + (1 - cut) * w, top + (1 - cut) * h)
            found.append(image.resize(image.size, Image.Resampling.LANCZOS, box=box))
    return [*found, *(ImageOps.mirror(each) for each in found)] if settings.flip else found
