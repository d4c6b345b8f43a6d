from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.augment import power as module
from medssl.augment.base import extremes
from medssl.augment.power import power


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(module, "compiled", lambda: None)
    return str(request.param)


def images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(-3, 5, shape)).float()


def expected(x: torch.Tensor, exponent: torch.Tensor) -> np.ndarray:
    """The formula in float64."""
    values = x.double().numpy()
    axes = tuple(range(2, values.ndim))
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    powers = exponent.double().numpy().reshape(-1, *[1] * (values.ndim - 1))
    return low + (high - low) * ((values - low) / (high - low)) ** powers


@pytest.mark.parametrize("shape", [(3, 2, 7, 9), (3, 1, 5, 6, 7), (3, 1, 40, 40, 41)])
def test_a_power_on_the_range_equals_the_formula(way, shape):
    x, exponent = images(*shape), torch.tensor([0.3, 1.0, 4.0])
    low, high = extremes(x)
    found = power(x, exponent, low=low, high=high)
    np.testing.assert_allclose(found.numpy(), expected(x, exponent), atol=5e-6, rtol=0)
    torch.testing.assert_close(found[1], x[1], atol=2e-6, rtol=0)


def test_the_kernel_follows_tiny_numbers_to_their_last_digits():
    x = torch.cat([torch.zeros(1), torch.logspace(-30, 0, 1000)]).reshape(1, 1, 7, 11, 13)
    for exponent in (0.5, 1.0, 2.0):
        found = power(x, torch.tensor([exponent]), low=torch.zeros(1, 1, 1, 1, 1), high=torch.ones(1, 1, 1, 1, 1))
        wanted = x.double() ** exponent
        kept = wanted > 1e-37
        torch.testing.assert_close(found.double()[kept], wanted[kept], rtol=3e-5, atol=0)
        assert float(found[0, 0, 0, 0, 0]) == 0.0


def test_a_constant_stays_and_what_is_not_finite_shows(way):
    x = images(2, 1, 4, 5, 6)
    x[0], x[1, 0, 1, 2, 3] = 2.5, torch.nan
    low, high = extremes(x)
    found = power(x, torch.tensor([0.7, 0.7]), low=low, high=high)
    assert torch.equal(found[0], x[0])
    assert found[1].isnan().any()


def test_an_image_that_is_not_contiguous_is_not_changed(way):
    x = images(2, 6, 5, 4).transpose(1, 3)
    before = x.clone()
    low, high = extremes(x)
    found = power(x, torch.tensor([2.0, 0.5]), low=low, high=high)
    torch.testing.assert_close(found, power(before.contiguous(), torch.tensor([2.0, 0.5]), low=low, high=high))
    assert torch.equal(x, before)
