from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from phantoms import REAL_DATA
from PIL import Image
from scipy import ndimage, stats

from medssl.augment.xray import (
    Collimation,
    CollimationConfig,
    Exposure,
    ExposureConfig,
    GridLines,
    GridLinesConfig,
    Scatter,
    ScatterConfig,
)
from medssl.errors import ConfigError

SEEDS = torch.tensor([11, 12])
CHESTS = REAL_DATA / "cxr_hannover" / "png"
CLASSES = [Exposure, GridLines, Collimation, Scatter]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).uniform(size=shape)).float()
    x[..., 0, 0], x[..., -1, -1] = 0.0, 1.0
    return x


def exposed(x: torch.Tensor, stops: float) -> torch.Tensor:
    return Exposure(ExposureConfig(stops=(stops, stops)))(x, SEEDS[: len(x)])


def test_twice_the_dose_doubles_the_exposure_that_a_value_shows():
    x = unit(1, 1, 6, 7)
    for stops in (-1.0, 0.5, 2.0):
        found = exposed(x, stops)
        for value, got in zip(x.flatten().tolist()[1:-1], found.flatten().tolist()[1:-1], strict=True):
            assert 1 / got - 1 == pytest.approx((1 / value - 1) * 2**stops, rel=1e-4)
    torch.testing.assert_close(exposed(exposed(x, 0.7), -0.3), exposed(x, 0.4), rtol=0, atol=1e-5)


def test_more_dose_darkens_and_keeps_both_ends_and_the_order():
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    bright, dark = exposed(x, -1.0).flatten(), exposed(x, 1.0).flatten()
    for out in (bright, dark):
        assert (out.diff() > 0).all()
        assert (out[0], out[-1]) == (0, pytest.approx(1, abs=1e-6))
    assert (dark[1:-1] < x.flatten()[1:-1]).all()
    assert (bright[1:-1] > x.flatten()[1:-1]).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_z_scored_picture_changes_as_one_from_zero_to_one(cls):
    x = unit(2, 2, 16, 12)
    augment = cls()
    torch.testing.assert_close(augment(x * 3 - 1, SEEDS), augment(x, SEEDS) * 3 - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(1, 1, 9, 1), (1, 1, 1, 7), (1, 3, 12, 10)])
def test_a_picture_stays_within_its_range_and_a_flat_one_stays_flat(cls, shape):
    x = torch.from_numpy(np.random.default_rng(1).normal(size=shape)).float()
    out = cls()(x, SEEDS[:1])
    assert torch.isfinite(out).all()
    assert out.min() >= x.min() - 1e-5
    assert out.max() <= x.max() + 1e-5
    torch.testing.assert_close(cls()(torch.full(shape, -2.5), SEEDS[:1]), torch.full(shape, -2.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_x_ray_augments_are_for_pictures_of_x_rays(cls):
    assert cls.modalities == {"XR"}
    assert cls.spatial_dims == {2}
    assert "HU" not in cls.takes


def test_grid_lines_equal_the_formula_written_with_loops():
    x = torch.full((2, 1, 9, 8), 0.5)
    x[..., 0, 0], x[..., 0, 1] = 0.0, 1.0
    grid = GridLines(GridLinesConfig(amplitude=(0.1, 0.2), angle_deg=(0.0, 90.0)))
    params = grid.draw(SEEDS)
    found = grid.apply(x, params)
    for sample, out in enumerate(found[:, 0].tolist()):
        (u, v), phase = params["wave"][sample].tolist(), float(params["phase"][sample])
        for i, row in enumerate(out):
            for j, got in enumerate(row):
                value = float(x[sample, 0, i, j]) + float(params["amplitude"][sample]) * math.sin(u * i + v * j + phase)
                assert got == pytest.approx(min(max(value, 0.0), 1.0), abs=1e-5)


@pytest.mark.parametrize(("angle", "axis"), [(0.0, 0), (90.0, 1)])
@pytest.mark.parametrize("pixels", [2.5, 4.0, 8.0])
def test_grid_lines_have_the_asked_spacing_and_direction(pixels, angle, axis):
    x = torch.full((1, 1, 80, 80), 0.5)
    x[..., 0, 0], x[..., -1, -1] = 0.0, 1.0
    config = GridLinesConfig(amplitude=(0.05, 0.05), spacing_pixels=(pixels, pixels), angle_deg=(angle, angle))
    stripes = (GridLines(config)(x, SEEDS[:1]) - x)[0, 0].numpy()
    power = np.abs(np.fft.fft2(stripes))[:41, :41]
    power[0, 0] = 0
    expected = (round(80 / pixels), 0) if axis == 0 else (0, round(80 / pixels))
    assert np.unravel_index(power.argmax(), power.shape) == expected
    assert stripes.std() * math.sqrt(2) == pytest.approx(0.05, rel=0.02)


def test_stripes_closer_than_two_pixels_cannot_be_drawn():
    with pytest.raises(ConfigError, match="at least 2 pixels"):
        GridLinesConfig.parse({"spacing_pixels": [1.0, 4.0]})
    with pytest.raises(ConfigError, match="lower bound comes first"):
        GridLinesConfig.parse({"spacing_pixels": [5.0, 4.0]})


@pytest.mark.parametrize("shape", [(64, 64), (90, 40), (13, 7)])
def test_a_collimator_never_covers_more_than_the_drawn_share_and_nearly_all_of_it(shape):
    seeds = torch.arange(60)
    x = torch.ones(60, 1, *shape)
    x[:, :, shape[0] // 2, shape[1] // 2] = 0.0  # so that there is a range
    collimation = Collimation(CollimationConfig(share=(0.0, 0.4), turn_deg=(-10.0, 10.0)))
    params = collimation.draw(seeds)
    out = collimation.apply(x, params)
    changed = (out != x).flatten(1).float().mean(dim=1)
    assert (changed <= params["share"] + 1e-6).all()
    assert (changed >= params["share"] - 4 / min(shape)).all()
    assert stats.kstest(params["share"].numpy(), "uniform", args=(0, 0.4)).pvalue > 0.01


def test_what_a_collimator_leaves_is_one_rectangle_with_the_drawn_turn():
    x = torch.ones(1, 1, 128, 128)
    x[0, 0, 64, 64] = 0.0
    collimation = Collimation(CollimationConfig(share=(0.4, 0.4), turn_deg=(5.0, 5.0)))
    out = collimation(x, SEEDS[:1])[0, 0]
    out[64, 64] = 1.0
    is_open = out.numpy() > 0.5
    assert ndimage.label(is_open)[1] == 1
    low, high = np.argwhere(is_open).min(axis=0), np.argwhere(is_open).max(axis=0)
    assert (low > 0).any() or (high < 127).any()
    rows = np.arange(50, 80)
    edge = [np.flatnonzero(is_open[row])[0] for row in rows]
    if min(edge) > 0:
        assert np.polyfit(rows, edge, 1)[0] == pytest.approx(math.tan(math.radians(5.0)), abs=0.02)
    assert float(out.min()) == 0.0


def test_a_collimator_leaves_labels_and_the_picture_inside_bit_for_bit():
    x = unit(2, 1, 40, 30)
    label = (x > 0.5).to(torch.uint8)
    collimation = Collimation(CollimationConfig(share=(0.2, 0.2)))
    params = collimation.draw(SEEDS)
    assert torch.equal(collimation.apply_label(label, params), label)
    out = collimation.apply(x, params)
    assert torch.equal(out[..., 12:28, 10:20], x[..., 12:28, 10:20])
    assert float(out.min()) == pytest.approx(0.0, abs=1e-6)


def test_scatter_equals_the_formula_with_scipys_blur():
    x = unit(2, 2, 30, 24)
    scatter = Scatter(ScatterConfig(fraction=(0.1, 0.6), decades=2.0))
    params = scatter.draw(SEEDS)
    found = scatter.apply(x, params)
    for sample in range(2):
        fraction, sigma = float(params["fraction"][sample]), float(params["reach"][sample]) * 30
        for channel in range(2):
            exposure = 10 ** (-2.0 * x[sample, channel].double().numpy())
            veil = ndimage.gaussian_filter(exposure, sigma, mode="nearest", truncate=3.0)
            expected = -np.log10((1 - fraction) * exposure + fraction * veil) / 2.0
            np.testing.assert_allclose(found[sample, channel], expected, atol=2e-5)


def test_scatter_takes_contrast_from_dense_parts_most_and_keeps_the_mean_exposure():
    x = torch.full((1, 1, 64, 64), 0.1)
    x[..., 16:48, 16:48] = 0.9
    x[..., 30:34, 30:34] = 1.0
    x[..., 4:8, 4:8] = 0.0
    config = ScatterConfig(fraction=(0.3, 0.3), reach=(0.1, 0.1), decades=1.5)
    out = Scatter(config)(x, SEEDS[:1])[0, 0]
    dense, thin = float(out[30, 32] - out[29, 32]), float(out[8, 6] - out[7, 6])  # 0.1 before
    assert dense < 0.9 * thin < 0.09
    before, after = (10 ** (-1.5 * picture) for picture in (x[0, 0], out))
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.02)


@pytest.mark.realdata
@pytest.mark.skipif(not CHESTS.is_dir(), reason="no shared data")
def test_a_real_chest_keeps_its_lungs_darker_than_its_heart_under_all_of_them():
    files = sorted(CHESTS.iterdir())[:4]
    pictures = [np.asarray(Image.open(file).convert("L").resize((256, 256)), dtype=np.float32) / 255 for file in files]
    x = torch.from_numpy(np.stack(pictures)).mT[:, None].contiguous()
    seeds = torch.arange(4)
    order = x.flatten(1).argsort(dim=1)
    dark, bright = order[:, 15_000:20_000], order[:, -20_000:-15_000]
    for cls in CLASSES:
        out = cls()(x, seeds).flatten(1)
        assert (out.gather(1, dark).median(dim=1).values < out.gather(1, bright).median(dim=1).values).all()
        assert float(out.min()) >= -1e-5
        assert float(out.max()) <= 1 + 1e-5
        assert (out.std(dim=1) > 0.3 * x.flatten(1).std(dim=1)).all()
