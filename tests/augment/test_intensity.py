from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio as tio
from scipy import ndimage, stats

from medssl.augment.intensity import (
    Blur,
    BlurConfig,
    Brightness,
    BrightnessConfig,
    Contrast,
    ContrastConfig,
    Gamma,
    GammaConfig,
    LowResolution,
    LowResolutionConfig,
    Noise,
    NoiseConfig,
    Rescale,
    RescaleConfig,
    ThickSlices,
    ThickSlicesConfig,
    Window,
    WindowConfig,
)
from medssl.augment.windows import WINDOWS
from medssl.errors import ConfigError

SEEDS = torch.tensor([11, 12])


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


@pytest.mark.parametrize("shape", [(2, 2, 12, 9, 7), (2, 1, 12, 9)])
def test_blur_equals_scipys_gaussian_filter_in_mm(shape):
    x = images(*shape)
    spacing = (0.5, 1.0, 2.0)
    blur = Blur(BlurConfig(sigma_mm=(0.3, 2.0)))
    params = blur.draw(SEEDS)
    found = blur.apply(x, params, torch.tensor([spacing[: x.ndim - 2]] * 2, dtype=torch.float64))
    for image, out, sigma_mm in zip(x, found, params["sigma_mm"].tolist(), strict=True):
        for channel, got in zip(image.numpy(), out.numpy(), strict=True):
            sigma = [sigma_mm / s for s in spacing[: channel.ndim]]
            expected = ndimage.gaussian_filter(channel, sigma, mode="nearest", truncate=3.0)
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_blur_of_a_sample_does_not_depend_on_how_strongly_its_neighbour_is_blurred():
    x = images(2, 1, 12, 12, 12)
    blur = Blur(BlurConfig(sigma_mm=(0.3, 2.5)))
    torch.testing.assert_close(blur(x, SEEDS)[:1], blur(x[:1], SEEDS[:1]), rtol=0, atol=1e-6)


def test_gamma_equals_torchio_on_images_from_zero_to_one():
    x = torch.rand(2, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0, 0], x[:, :, 0, 0, 1] = 0.0, 1.0
    gamma = Gamma(GammaConfig(gamma=(0.5, 2.0)))
    params = gamma.draw(SEEDS)
    found = gamma.apply(x, params)
    for image, out, exponent in zip(x, found, params["gamma"].tolist(), strict=True):
        expected = tio.Gamma(gamma=[exponent])(tio.ScalarImage(tensor=image)).data
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_gamma_keeps_range_and_order_of_z_scored_images_and_leaves_a_constant():
    x = images(2, 2, 8, 8, 8) * 3
    x[1, 1] = -4.0
    found = Gamma()(x, SEEDS)
    torch.testing.assert_close(found.amin((2, 3, 4)), x.amin((2, 3, 4)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.amax((2, 3, 4)), x.amax((2, 3, 4)), atol=1e-5, rtol=0)
    order = x[0, 0].flatten().argsort()
    assert (found[0, 0].flatten()[order].diff() >= -1e-6).all()
    assert torch.equal(found[1, 1], x[1, 1])


def test_gamma_is_drawn_evenly_in_its_logarithm():
    exponent = Gamma(GammaConfig(gamma=(0.5, 2.0))).draw(torch.arange(400))["gamma"]
    assert stats.kstest(exponent.log2().numpy(), "uniform", args=(-1, 2)).pvalue > 0.01


def test_noise_is_gaussian_of_the_drawn_strength_and_independent_between_samples():
    noise = Noise(NoiseConfig(sigma=(0.3, 0.3)))
    field = noise(torch.zeros(2, 1, 20, 20, 20), SEEDS)
    for sample in field:
        assert stats.kstest(sample.flatten().numpy(), "norm", args=(0, 0.3)).pvalue > 0.01
    assert abs(np.corrcoef(field[0].flatten(), field[1].flatten())[0, 1]) < 0.05


def test_brightness_adds_a_constant():
    x = images(2, 1, 4, 4, 4)
    shift = (Brightness(BrightnessConfig(shift=(0.1, 0.4)))(x, SEEDS) - x).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert ((shift >= 0.1 - 1e-6) & (shift <= 0.4)).all()


def test_contrast_stretches_about_the_mean_within_the_old_range():
    x = images(2, 2, 6, 6, 6)
    contrast = Contrast(ContrastConfig(factor=(0.5, 2.0)))
    params = contrast.draw(SEEDS)
    found = contrast.apply(x, params)
    for image, out, factor in zip(x.numpy(), found.numpy(), params["factor"].tolist(), strict=True):
        for channel, got in zip(image, out, strict=True):
            expected = np.clip(channel.mean() + factor * (channel - channel.mean()), channel.min(), channel.max())
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_low_resolution_keeps_constants_and_ramps_and_loses_detail():
    low = LowResolution(LowResolutionConfig(zoom=(0.5, 0.5)))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16, 16)
    np.testing.assert_allclose(low(ramp, SEEDS[:1])[..., 3:-3], ramp[..., 3:-3], atol=1e-4)
    stripes = (torch.arange(16) % 2).float().expand(1, 1, 16, 16, 16)
    np.testing.assert_allclose(low(stripes, SEEDS[:1])[..., 2:-2], 0.5, atol=0.15)
    flat = torch.full((1, 1, 9, 7, 1), 3.0)
    np.testing.assert_allclose(low(flat, SEEDS[:1]), flat, atol=1e-5)


def test_a_low_resolution_equals_a_resize_by_torch_in_the_plane():
    x = images(1, 1, 16, 12)
    small = torch.nn.functional.interpolate(x, size=(8, 6), mode="bilinear", antialias=True)
    expected = torch.nn.functional.interpolate(small, size=(16, 12), mode="bilinear")
    found = LowResolution(LowResolutionConfig(zoom=(0.5, 0.5)))(x, SEEDS[:1])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_window_maps_hu_to_zero_one_and_clips():
    hu = torch.tensor([-1024.0, -175.0, 37.5, 250.0, 3000.0]).reshape(1, 1, 5, 1, 1)
    window = Window(WindowConfig(low_hu=-175.0, high_hu=250.0))
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]).reshape(1, 1, 5, 1, 1)
    assert torch.equal(window(hu, SEEDS[:1]), expected)
    assert torch.equal(window.normalise(hu), expected)


def test_the_bounds_of_a_window_jitter_in_training_only():
    window = Window(WindowConfig(low_hu=0.0, high_hu=100.0, jitter_hu=10.0))
    params = window.draw(torch.arange(200))
    assert params["low_hu"].min() < -9
    assert params["low_hu"].max() > 9
    assert params["high_hu"].min() < 91
    hu = torch.full((2, 1, 2, 2, 2), 50.0)
    assert not torch.equal(window(hu, SEEDS)[0], window(hu, SEEDS)[1])
    assert torch.equal(window.normalise(hu), hu / 100)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (WindowConfig, {"low_hu": 0.0, "high_hu": 10.0, "jitter_hu": 5.0}, "can close"),
        (WindowConfig, {"p": 0.5}, "every sample or to none"),
        (LowResolutionConfig, {"zoom": [0.5, 2.0]}, "at most 1"),
        (GammaConfig, {"gamma": [2.0, 0.5]}, "lower bound 2.0 is above"),
        (GammaConfig, {"gamma": [0.0, 0.5]}, "greater than 0"),
        (NoiseConfig, {"sigma": [-1.0, 0.5]}, "greater than or equal to 0"),
        (BlurConfig, {"p": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_options_are_refused(config, options, reason):
    with pytest.raises(ConfigError, match=reason):
        config.parse(options)


def test_thick_slices_are_averages_across_one_axis_only():
    x = images(2, 1, 9, 8, 24)
    thick = ThickSlices(ThickSlicesConfig(thickness_mm=(3.0, 3.0)))
    found = thick.apply(x, thick.draw(SEEDS), torch.ones(2, 3, dtype=torch.float64))
    for place in range(1, 7):  # triangle filter of three voxels' width at the centre of each thick slice
        middle = 3 * place + 1
        expected = sum(x[..., middle + k] * (1 - abs(k) / 3) for k in range(-2, 3)) / 3
        torch.testing.assert_close(found[..., middle], expected, rtol=0, atol=1e-5)
    moved = thick.apply(x.transpose(2, 3), thick.draw(SEEDS), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(moved.transpose(2, 3), found, rtol=0, atol=1e-6)


def test_slices_that_are_thick_already_stay_as_they_are():
    x = images(2, 1, 9, 8, 12)
    thick = ThickSlices(ThickSlicesConfig(thickness_mm=(3.0, 4.0)))
    spacing = torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found = thick.apply(x, thick.draw(SEEDS), spacing)
    torch.testing.assert_close(found[0], x[0], rtol=0, atol=1e-6)
    assert not torch.allclose(found[1], x[1], atol=1e-2)


def test_a_rescaling_is_a_rule_that_prediction_needs_too():
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2) * 50
    rescale = Rescale(RescaleConfig(low=50.0, high=250.0))
    expected = ((x - 50) / 200).clamp(0, 1)
    assert torch.equal(rescale.normalise(x), expected)
    assert torch.equal(rescale(x, SEEDS[:1]), expected)
    assert rescale.gives("raw") == "unit"
    with pytest.raises(ConfigError, match=r"high 0\.0 is not above low 1\.0"):
        RescaleConfig.parse({"low": 1.0, "high": 0.0})
    with pytest.raises(ConfigError, match="every sample or to none"):
        RescaleConfig.parse({"p": 0.5})


def test_a_window_may_be_called_by_its_name():
    lung = WindowConfig.parse({"named": "lung", "jitter_hu": 20.0})
    assert (lung.low_hu, lung.high_hu) == (WINDOWS["lung"].low_hu, WINDOWS["lung"].high_hu)
    assert WindowConfig.parse(lung.to_dict()) == lung
    with pytest.raises(ConfigError, match="there is no window 'lungs'; known are"):
        WindowConfig.parse({"named": "lungs"})
    with pytest.raises(ConfigError, match="has bounds of its own"):
        WindowConfig.parse({"named": "lung", "low_hu": -900.0})
