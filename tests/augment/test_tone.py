from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import RandHistogramShift
from scipy import stats

from medssl.augment.tone import HistogramWarp, HistogramWarpConfig, Invert, InvertConfig
from medssl.errors import ConfigError

SEEDS = torch.tensor([21, 22])


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 - 1


@pytest.mark.parametrize("shape", [(2, 1, 9, 8, 7), (2, 1, 9, 8)])
def test_a_histogram_warp_equals_monais_with_the_same_knots(shape):
    x = images(*shape)
    warp = HistogramWarp(HistogramWarpConfig(num_knots=7, strength=1.0))
    params = warp.draw(SEEDS)
    found = warp.apply(x, params)
    for image, out, knots in zip(x, found, params["knots"], strict=True):
        theirs = RandHistogramShift(num_control_points=7, prob=1.0)
        theirs._do_transform = True
        theirs.reference_control_points = np.linspace(0, 1, 7)
        theirs.floating_control_points = knots.numpy()
        torch.testing.assert_close(out, torch.as_tensor(theirs(image, randomize=False)), rtol=0, atol=1e-5)


def test_each_channel_is_warped_over_its_own_range_and_a_constant_one_stays():
    x = torch.cat([images(2, 1, 6, 6), 100 * images(2, 1, 6, 6), torch.full((2, 1, 6, 6), 5.0)], dim=1)
    warp = HistogramWarp()
    params = warp.draw(SEEDS)
    found = warp.apply(x, params)
    for image, out, knots in zip(x.numpy(), found.numpy(), params["knots"].numpy(), strict=True):
        for channel, got in zip(image[:2], out[:2], strict=True):
            low, high = channel.min(), channel.max()
            expected = np.interp((channel - low) / (high - low), np.linspace(0, 1, 10), knots) * (high - low) + low
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, 2], x[:, 2])


def test_a_warp_keeps_the_order_and_both_ends():
    x = images(64, 1, 10, 10)
    found = HistogramWarp(HistogramWarpConfig(num_knots=5))(x, torch.arange(64)).flatten(1)
    order = x.flatten(1).argsort(dim=1)
    assert (found.gather(1, order).diff(dim=1) >= -1e-5).all()
    torch.testing.assert_close(found.amin(1), x.flatten(1).amin(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.amax(1), x.flatten(1).amax(1), rtol=0, atol=1e-5)


def test_knots_are_drawn_as_monai_draws_them():
    ours = HistogramWarp(HistogramWarpConfig(num_knots=4, strength=1.0)).draw(torch.arange(800))["knots"].numpy()
    theirs = RandHistogramShift(num_control_points=4, prob=1.0).set_random_state(0)
    drawn = []
    for _ in range(800):
        theirs.randomize()
        drawn.append(theirs.floating_control_points.copy())
    for place in (1, 2):
        assert stats.ks_2samp(ours[:, place], np.stack(drawn)[:, place]).pvalue > 0.01
    assert (np.diff(ours, axis=1) >= 0).all()


def test_strength_is_the_share_of_the_way_to_the_drawn_knots():
    seeds = torch.arange(200)
    whole = HistogramWarp(HistogramWarpConfig(num_knots=6, strength=1.0)).draw(seeds)["knots"]
    half = HistogramWarp(HistogramWarpConfig(num_knots=6, strength=0.5)).draw(seeds)["knots"]
    torch.testing.assert_close(half, (whole + torch.linspace(0, 1, 6)) / 2)
    assert (half.diff(dim=1) >= 0.5 / 5 - 1e-6).all()


def test_an_inversion_turns_the_range_of_each_channel_over_and_undoes_itself():
    x = images(2, 2, 5, 4, 3)
    invert = Invert(InvertConfig(p=1.0))
    found = invert(x, SEEDS)
    for image, out in zip(x.numpy(), found.numpy(), strict=True):
        for channel, got in zip(image, out, strict=True):
            np.testing.assert_allclose(got, channel.min() + channel.max() - channel, atol=1e-6)
    torch.testing.assert_close(invert(found, SEEDS), x, rtol=0, atol=1e-5)


def test_an_inversion_leaves_a_constant_and_is_made_for_half_of_the_samples_by_default():
    flat = torch.full((2, 1, 4, 4), 3.7)
    assert torch.equal(Invert(InvertConfig(p=1.0))(flat, SEEDS), flat)
    assert 0.4 < Invert().draw(torch.arange(500))["on"].float().mean() < 0.6


@pytest.mark.parametrize("cls", [HistogramWarp, Invert])
def test_hounsfield_units_have_one_meaning_and_are_not_redrawn(cls):
    assert cls.takes == {"zscore", "raw", "unit"}


@pytest.mark.parametrize("options", [{"num_knots": 2}, {"strength": 1.5}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        HistogramWarpConfig.parse(options)
