"""The diffusion classifier: the place whose prompt explains a photo best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mokus.places import PLACES, place_of


def velocity_that_knows(latent: Tensor, place: int, off: list[float]):  # type: ignore[no-untyped-def]
    """True for `place`: then z1 - z0 can be computed from z_t and z0. For the others it is off by so much."""

    def velocity(z: Tensor, t: Tensor, places: Tensor) -> Tensor:
        true = (z - latent) / t.view(-1, 1, 1)  # z_t = z0 + t (z1 - z0)
        return true + torch.tensor([0.0 if i == place else off[i] for i in places.tolist()]).view(-1, 1, 1)

    return velocity


@pytest.mark.parametrize("place", [0, 2, 3])
def test_the_place_that_explains_the_photo_is_found(place: int) -> None:
    latent = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    assert place_of(latent, 4, velocity_that_knows(latent, place, [0.5, 0.4, 0.3, 0.2, 0.1]), seed=0) == place


def test_no_place_is_better_than_a_wrong_one() -> None:
    latent = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    assert place_of(latent, 4, velocity_that_knows(latent, 9, [0.5, 0.4, 0.3, 0.2, 0.1]), seed=0) is None


def test_places_are_prompts() -> None:
    assert len(set(PLACES)) == len(PLACES) and all(place == place.strip() and "{" not in place for place in PLACES)
