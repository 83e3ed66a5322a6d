"""The straight line between a latent and noise, and the velocity along it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mokus import flow
from mokus.pipeline import Model, encode, pad


def pair(seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 4, generator=random), torch.randn(3, 5, 4, generator=random), random


def test_the_line_goes_from_latent_to_noise() -> None:
    z0, z1, _ = pair()
    assert torch.equal(flow.interpolate(z0, z1, torch.zeros(3)), z0)
    assert torch.equal(flow.interpolate(z0, z1, torch.ones(3)), z1)
    assert torch.allclose(flow.interpolate(z0, z1, torch.full((3,), 0.5)), (z0 + z1) / 2)


def test_every_sample_has_its_own_time() -> None:
    z0, z1, _ = pair()
    t = torch.tensor([0.1, 0.5, 0.8])
    together = flow.interpolate(z0, z1, t)
    for i in range(3):
        assert torch.equal(together[i : i + 1], flow.interpolate(z0[i : i + 1], z1[i : i + 1], t[i : i + 1]))
        assert torch.allclose(together[i], z0[i] + t[i] * (z1[i] - z0[i]), atol=1e-6)


def test_the_target_is_the_lines_derivative() -> None:
    """By automatic differentiation, at every time: along any direction w, d(w z_t)/dt = w v."""
    z0, z1, random = pair()
    for _ in range(5):
        t, w = torch.rand(3, generator=random).requires_grad_(), torch.randn(z0.shape, generator=random)
        (slope,) = torch.autograd.grad((w * flow.interpolate(z0, z1, t)).sum(), t)
        assert torch.allclose(slope, (w * flow.target(z0, z1)).sum(dim=(1, 2)), rtol=1e-4, atol=1e-4)


def test_one_euler_step_with_the_true_velocity_maps_noise_to_data() -> None:
    z0, z1, _ = pair()
    t = torch.tensor([1.0, 0.7, 0.2])
    z_t = flow.interpolate(z0, z1, t)
    assert torch.allclose(z_t - t.view(-1, 1, 1) * flow.target(z0, z1), z0, atol=1e-6)
    # and many small ones do the same
    z = z1
    for _ in range(8):
        z = z - flow.target(z0, z1) / 8
    assert torch.allclose(z, z0, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.0), (-1.0, 0.3)])
def test_times_are_logit_normal(mean: float, std: float) -> None:
    n = 40_000
    t = flow.logit_normal(n, mean, std, torch.Generator().manual_seed(0))
    assert t.shape == (n,) and t.min() > 0 and t.max() < 1
    logits = torch.logit(t.double())
    # quantiles, not moments: the median is sigmoid(mean), and 68.3 % lie within one deviation
    assert float(t.median()) == pytest.approx(1 / (1 + math.exp(-mean)), abs=4 * 1.25 * std * 0.25 / math.sqrt(n))
    for quantile, z in ((0.1587, -1.0), (0.8413, 1.0)):
        assert float(logits.quantile(quantile)) == pytest.approx(mean + z * std, abs=0.03 * std)


def test_times_depend_on_their_generator_alone() -> None:
    torch.manual_seed(1)
    first = flow.logit_normal(6, 0.0, 1.0, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, flow.logit_normal(6, 0.0, 1.0, torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(flow.logit_normal(6, 0.0, 1.0, generator), flow.logit_normal(6, 0.0, 1.0, generator))
    assert torch.equal(flow.logit_normal(4, 0.7, 0.0, generator), torch.sigmoid(torch.full((4,), 0.7)))


def test_the_loss_is_one_value_per_sample() -> None:
    a, b, _ = pair()
    loss = flow.loss(a, b)
    assert loss.shape == (3,)
    assert torch.allclose(
        loss.double(), torch.stack([(x - y).square().mean() for x, y in zip(a.double(), b.double(), strict=True)])
    )
    assert torch.equal(flow.loss(a, a), torch.zeros(3))
    c = b.clone()
    c[1] += 1
    assert [bool(x) for x in flow.loss(a, c) == loss] == [True, False, True]
    assert torch.allclose(flow.loss(2 * a, 2 * b), 4 * loss)


def test_the_loss_is_computed_in_float32() -> None:
    """256.5 is no bfloat16 number: the difference of 1 and its square survive, their mean is not rounded to 8 bits."""
    wanted = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    predicted = torch.tensor([[[1.0, 1.0 + 2**-7]]], dtype=torch.bfloat16)
    loss = flow.loss(predicted, wanted)
    assert loss.dtype == torch.float32 and loss.item() == (1 + (1 + 2**-7) ** 2) / 2


def test_velocity_is_what_the_pipeline_asks_the_transformer_for(pico: Model) -> None:
    """A denoising step of the pipeline, written out with diffusers' own conventions."""
    transformer, grid = pico.pipe.transformer, (2, 3)
    embeds, mask = pad(encode(pico, ["a red ball", "a blue star in the snow at night"]))
    z = torch.randn(2, 6, transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.9])
    with torch.no_grad():
        found = flow.velocity(transformer, z, t, embeds, mask, grid)
        plain = transformer(
            hidden_states=z, timestep=t * 1000 / 1000, guidance=None, encoder_hidden_states_mask=mask,
            encoder_hidden_states=embeds, img_shapes=[[(1, 2, 3)], [(1, 2, 3)]],
        ).sample  # fmt: skip
        assert found.shape == z.shape and torch.equal(found, plain)
        # neither the other sample nor the padding has any influence
        for i in range(2):
            alone = flow.velocity(
                transformer, z[i : i + 1], t[i : i + 1], embeds[i : i + 1, : mask[i].sum()], None, grid
            )
            assert torch.allclose(alone[0], found[i], atol=1e-4)
        assert not torch.allclose(found, flow.velocity(transformer, z, 1 - t, embeds, mask, grid), atol=1e-2)
        assert not torch.allclose(found, flow.velocity(transformer, z, t, embeds, mask, (3, 2)), atol=1e-3)
