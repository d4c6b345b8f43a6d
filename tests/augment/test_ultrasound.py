from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from phantoms import REAL_DATA
from PIL import Image
from scipy import stats

from medssl.augment.ultrasound import (
    AcousticShadow,
    AcousticShadowConfig,
    DepthAttenuation,
    DepthAttenuationConfig,
    Speckle,
    SpeckleConfig,
    TimeGain,
    TimeGainConfig,
)
from medssl.errors import ConfigError

SEEDS = torch.tensor([41, 42])
ALL = (Speckle, TimeGain, DepthAttenuation, AcousticShadow)
SCANS = REAL_DATA / "busi_256" / "benign"


def even(*shape: int, low: float = 0.0, level: float = 1.0, high: float = 100.0) -> torch.Tensor:
    """One level all over, with room below and above so that nothing saturates, in the first two voxels of a row."""
    x = torch.full(shape, level)
    x.reshape(*shape[:2], -1)[..., 0] = low
    x.reshape(*shape[:2], -1)[..., 1] = high
    return x


def inner(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, 1:]


def test_a_speckle_without_grain_is_rayleigh_distributed_about_one():
    found = inner(Speckle(SpeckleConfig(amount=(1, 1), grain_voxels=(0, 0)))(even(2, 1, 90, 90), SEEDS))
    scale = math.sqrt(2 / math.pi)
    for sample in found:
        assert stats.kstest(sample.flatten().numpy(), "rayleigh", args=(0, scale)).pvalue > 0.01
    np.testing.assert_allclose(found.std(), math.sqrt(4 / math.pi - 1), rtol=0.02)


def test_a_speckle_of_half_the_amount_is_half_as_strong_and_keeps_the_mean():
    params = {"amount": torch.tensor([1.0, 0.5]), "grain_voxels": torch.ones(2), "field_seed": torch.tensor([7, 7])}
    whole, half = Speckle().change(even(2, 1, 20, 20), params, torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(inner(half[None]) - 1, (inner(whole[None]) - 1) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "depth_axis"), [((200, 200), 1), ((200, 200), 0), ((60, 40, 60), 2)])
def test_grains_are_as_broad_as_asked_across_the_beam_and_shorter_along_it(shape, depth_axis):
    config = SpeckleConfig(amount=(1, 1), grain_voxels=(1.5, 1.5), axial_ratio=0.5, depth_axis=depth_axis)
    field = Speckle(config)(even(1, 1, *shape), SEEDS[:1])[0, 0, 1:].square().double().numpy()
    for axis in range(len(shape)):
        sigma = 0.75 if axis == depth_axis else 1.5
        last = field.shape[axis] - 1
        ahead, behind = np.take(field, range(1, last + 1), axis), np.take(field, range(last), axis)
        expected = math.exp(-1 / (4 * sigma**2)) ** 2  # power of a complex field: squared correlation of the field
        assert abs(np.corrcoef(ahead.ravel(), behind.ravel())[0, 1] - expected) < 0.06


def test_a_speckle_is_as_strong_at_the_border_as_inside():
    x = even(300, 1, 12, 12)
    found = Speckle(SpeckleConfig(amount=(1, 1), grain_voxels=(1.5, 1.5)))(x, torch.arange(300))
    border = found[:, 0, -1]
    assert abs(border.mean() - 1) < 0.05
    assert abs(border.std() - math.sqrt(4 / math.pi - 1)) < 0.05


def test_all_channels_get_the_same_grain_and_samples_get_their_own():
    x = even(2, 3, 16, 16)
    found = Speckle()(x, SEEDS)
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found[0], found[1])


def test_a_time_gain_is_one_curve_over_depth_between_its_bounds():
    x = even(16, 1, 8, 40)
    found = inner(TimeGain(TimeGainConfig(factor=(0.5, 2.0)))(x, torch.arange(16)))
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found), rtol=0, atol=1e-5)
    curve = found[:, 0, 0].log()
    assert curve.abs().max() <= math.log(2) + 1e-4
    assert curve.std(dim=1).min() > 0.02
    assert curve.diff(dim=1).abs().max() < 0.35


def test_a_time_gain_of_equal_sliders_is_a_factor_and_rising_sliders_rise():
    x = even(2, 1, 6, 24)
    knots = torch.stack([torch.full((6,), 0.7), torch.linspace(-0.5, 0.5, 6)])
    flat, rising = TimeGain().change(x, {"log_gain": knots}, torch.ones(2, 2, dtype=torch.float64))[:, 0, 1:]
    torch.testing.assert_close(flat, torch.full_like(flat, math.exp(0.7)), rtol=0, atol=1e-5)
    assert (rising.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("shape", "axis"), [((5, 9), 1), ((9, 5), 0), ((4, 3, 7), 2)])
def test_depth_attenuation_is_exponential_above_the_darkest_voxel(shape, axis):
    x = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    darken = DepthAttenuation(DepthAttenuationConfig(rate=(0.3, 2.0), depth_axis=axis))
    params = darken.draw(SEEDS)
    found = darken.apply(x, params)
    for image, out, rate in zip(x.numpy(), found.numpy(), params["rate"].tolist(), strict=True):
        for channel, got in zip(image, out, strict=True):
            for place in np.ndindex(*shape):
                factor = math.exp(-rate * (place[axis] + 0.5) / shape[axis])
                expected = channel.min() + (channel[place] - channel.min()) * factor
                np.testing.assert_allclose(got[place], expected, atol=1e-5)


def step(value: float) -> float:
    value = min(1.0, max(0.0, value))
    return value * value * (3 - 2 * value)


@pytest.mark.parametrize(("shape", "spacing", "axis"), [((14, 12), (0.5, 0.2), 1), ((6, 9, 7), (0.4, 0.3, 1.1), 1)])
def test_an_acoustic_shadow_is_a_soft_cone_in_mm(shape, spacing, axis):
    x = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    config = AcousticShadowConfig(width=(0.2, 0.5), spread_deg=(5, 30), softness=0.4, depth_axis=axis)
    shadow = AcousticShadow(config)
    params = shadow.draw(SEEDS)
    found = shadow.apply(x, params, torch.tensor([spacing] * 2, dtype=torch.float64))
    edges = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    across = [other for other in range(len(shape)) if other != axis]
    for row in range(2):
        strength, width, start, spread = (
            params[key][row].item() for key in ("strength", "width", "start", "spread_deg")
        )
        image, low = x[row, 0], x[row, 0].min().item()
        breadth = width * max(edges[other] for other in across)
        for place in np.ndindex(*shape):
            offsets = [
                ((place[other] + 0.5) / shape[other] - middle) * edges[other]
                for other, middle in zip(across, params["lateral"][row].tolist(), strict=False)
            ]
            depth = ((place[axis] + 0.5) / shape[axis] - start) * edges[axis]
            half = breadth / 2 + max(depth, 0) * math.tan(math.radians(spread))
            inside = step((half - math.hypot(*offsets)) / (0.4 * breadth) + 0.5)
            kept = 1 - strength * inside * step(depth / (0.4 * breadth) + 0.5)
            np.testing.assert_allclose(found[row, 0][place], low + (image[place].item() - low) * kept, atol=1e-5)


def test_a_shadow_begins_below_its_start_and_keeps_what_lies_above():
    x = even(64, 1, 40, 40)
    shadow = AcousticShadow(AcousticShadowConfig(start=(0.6, 0.7), strength=(1, 1), width=(0.3, 0.3)))
    found = inner(shadow(x, torch.arange(64)))
    torch.testing.assert_close(found[..., :20], inner(x)[..., :20], rtol=0, atol=1e-5)
    assert (found[..., 32:].flatten(1).amin(dim=1) < 0.05).all()
    assert (found <= 1 + 1e-5).all()


def test_a_shadow_covers_a_single_slice_whatever_is_drawn_along_it():
    x = torch.rand(4, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    shadow = AcousticShadow()
    params = shadow.draw(torch.arange(4))
    torch.testing.assert_close(shadow.apply(x, params), shadow.apply(x[..., None], params)[..., 0])


@pytest.mark.parametrize("cls", [TimeGain, DepthAttenuation, AcousticShadow])
def test_a_surface_at_the_far_end_is_the_image_turned_over(cls):
    x = torch.rand(2, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    here, there = cls(cls.config_class()), cls(cls.config_class(is_surface_first=False))
    torch.testing.assert_close(there(x, SEEDS), here(x.flip(3), SEEDS).flip(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", ALL)
def test_the_black_surround_stays_black_and_white_saturates_wherever_zero_is(cls):
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, :3] = 0.0
    found = cls()(x, torch.arange(8))
    assert torch.equal(found[:, :, :3], x[:, :, :3])
    assert (found.flatten(1).amax(dim=1) <= x.flatten(1).amax(dim=1)).all()
    torch.testing.assert_close(cls()(x - 5, torch.arange(8)), found - 5, rtol=0, atol=1e-5)


@pytest.mark.realdata
@pytest.mark.skipif(not SCANS.is_dir(), reason="no shared folder of real images")
@pytest.mark.parametrize("cls", ALL)
def test_a_real_scan_keeps_its_structure(cls):
    scans = []
    for path in sorted(SCANS.iterdir())[:6]:
        with Image.open(path) as picture:
            scans.append(np.array(picture.convert("L")))
    x = torch.from_numpy(np.stack(scans)).transpose(1, 2)[:, None] / 255
    found = cls()(x, torch.arange(6))
    assert found.min() >= 0
    assert found.max() <= 1
    for image, out in zip(x, found, strict=True):
        assert not torch.equal(image, out)
        assert np.corrcoef(image.flatten().numpy(), out.flatten().numpy())[0, 1] > 0.8


@pytest.mark.parametrize("cls", ALL)
def test_a_depth_axis_that_a_picture_does_not_have_is_refused(cls):
    with pytest.raises(ConfigError, match="depth_axis is 2 and the images have 2 axes") as caught:
        cls(cls.config_class(depth_axis=2))(torch.rand(2, 1, 6, 6), SEEDS)
    assert caught.value.code == "E_SPATIAL_DIMS"


@pytest.mark.parametrize("cls", ALL)
def test_ultrasound_augments_are_for_ultrasound_alone(cls):
    assert cls.modalities == {"US"}
    assert "HU" not in cls.takes


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (SpeckleConfig, {"amount": [0.0, 2.0]}, "less than or equal to 1"),
        (SpeckleConfig, {"axial_ratio": 0.0}, "greater than 0"),
        (TimeGainConfig, {"num_knots": 3}, "greater than or equal to 4"),
        (DepthAttenuationConfig, {"rate": [-1.0, 0.0]}, "greater than or equal to 0"),
        (AcousticShadowConfig, {"spread_deg": [0.0, 80.0]}, "at most 60"),
        (AcousticShadowConfig, {"depth_axis": 3}, "depth_axis"),
    ],
)
def test_impossible_options_are_refused(config, options, reason):
    with pytest.raises(ConfigError, match=reason):
        config.parse(options)
