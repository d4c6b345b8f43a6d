from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from phantoms import REAL_DATA
from scipy import stats

from medssl.augment.ct import (
    HuNoise,
    HuNoiseConfig,
    HuScale,
    HuScaleConfig,
    HuShift,
    HuShiftConfig,
    KernelSharpness,
    KernelSharpnessConfig,
    MultiWindow,
    MultiWindowConfig,
    Streaks,
    StreaksConfig,
)
from medssl.augment.images import HU_RANGE
from medssl.augment.pipeline import Pipeline
from medssl.augment.windows import WINDOWS
from medssl.errors import ConfigError

SEEDS = torch.tensor([11, 12])
TRUNK = REAL_DATA / "nifti_geometry" / "ts_ct" / "example_ct.nii.gz"


def hu(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1024, 2000, size=shape)).float()


def spacing(*mm: float, batch: int = 2) -> torch.Tensor:
    return torch.tensor([mm] * batch, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("abdomen", -150, 250),
        ("angio", -100, 500),
        ("bone", -500, 1300),
        ("brain", 0, 80),
        ("liver", -45, 105),
        ("lung", -1350, 150),
        ("mediastinum", -125, 225),
        ("soft", -160, 240),
        ("stroke", 20, 60),
    ],
)
def test_a_named_window_spans_level_and_width(name, low, high):
    assert (WINDOWS[name].low_hu, WINDOWS[name].high_hu) == (low, high)
    assert WINDOWS[name].shows
    assert WINDOWS[name].source


@pytest.mark.parametrize("shape", [(2, 2, 5, 4, 3), (2, 2, 5, 4)])
def test_each_window_gives_a_channel_and_those_of_the_first_channel_come_first(shape):
    x = hu(*shape)
    windows = MultiWindow(MultiWindowConfig(windows=("lung", (-200.0, 300.0), "brain")))
    found = windows(x, SEEDS)
    expected = []
    for channel in (0, 1):
        for low, high in ((-1350, 150), (-200, 300), (0, 80)):
            expected.append(np.clip((x[:, channel].numpy() - low) / (high - low), 0, 1))
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-6)
    assert windows.channels_out(2) == found.shape[1] == 6
    assert torch.equal(windows.normalise(x), found)
    assert windows.gives("HU") == "unit"


def test_window_bounds_jitter_independently_within_what_is_asked_and_prediction_sees_none():
    windows = MultiWindow(MultiWindowConfig(windows=("lung", "soft"), jitter_hu=20.0))
    params = windows.draw(torch.arange(400))
    for key, centre in (("low_hu", (-1350, -160)), ("high_hu", (150, 240))):
        shift = params[key] - torch.tensor(centre)
        assert stats.kstest(shift.flatten().numpy(), "uniform", args=(-20, 40)).pvalue > 0.01
        assert abs(np.corrcoef(shift.T.numpy())[0, 1]) < 0.15
    x = hu(1, 1, 4, 4, 4)
    assert torch.equal(windows.normalise(x), MultiWindow(MultiWindowConfig(windows=("lung", "soft")))(x, SEEDS[:1]))


def test_windows_that_differ_are_different_rules():
    lung, soft = (MultiWindow(MultiWindowConfig(windows=(name,))).fixed() for name in ("lung", "soft"))
    assert lung != soft
    assert lung == MultiWindow(MultiWindowConfig(windows=((-1350.0, 150.0),), jitter_hu=3.0)).fixed()


def test_a_single_window_is_applied_in_the_resampling_with_the_same_result():
    x = hu(2, 1, 6, 5, 4)
    one = MultiWindow(MultiWindowConfig(windows=("soft",), jitter_hu=10.0))
    several = MultiWindow(MultiWindowConfig(windows=("soft", "lung")))
    assert one.bounds(one.draw(SEEDS)) is not None
    assert several.bounds(several.draw(SEEDS)) is None
    torch.testing.assert_close(Pipeline([one])(x, SEEDS).image, one(x, SEEDS), rtol=0, atol=1e-5)
    assert Pipeline([several])(x, SEEDS).image.shape == (2, 2, 6, 5, 4)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (MultiWindowConfig, {"windows": ["lnug"]}, "did you mean lung"),
        (MultiWindowConfig, {"windows": ["??"]}, "known are abdomen"),
        (MultiWindowConfig, {"windows": []}, "windows"),
        (MultiWindowConfig, {"windows": [[100.0, -100.0]]}, "is empty"),
        (MultiWindowConfig, {"windows": ["stroke"], "jitter_hu": 20.0}, "can close"),
        (MultiWindowConfig, {"p": 0.5}, "every sample or to none"),
        (HuNoiseConfig, {"dose": [0.5, 1.5]}, "at most 1"),
        (HuNoiseConfig, {"dose": [0.0, 1.0]}, "dose"),
        (KernelSharpnessConfig, {"amount": [-2.0, 0.0]}, "between -1 and 1"),
        (StreaksConfig, {"num": 1}, "num"),
        (HuScaleConfig, {"percent": [0.0, 100.0]}, "reverse"),
    ],
)
def test_what_physics_forbids_is_refused(config, options, says):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        config.parse(options)


@pytest.mark.parametrize("dose", [0.1, 0.25, 0.5, 0.9])
def test_noise_makes_up_for_the_dose_in_every_voxel_up_to_the_border(dose):
    noise = HuNoise(HuNoiseConfig(dose=(dose, dose), sigma_hu=10.0, fwhm_mm=(2.0, 2.0)))
    field = noise(torch.zeros(64, 1, 12, 12, 16), torch.arange(64), spacing(0.8, 1.0, 5.0, batch=64))
    expected = 10.0**2 / dose - 10.0**2  # what the full dose has is there already
    assert float(field.var()) == pytest.approx(expected, rel=0.03)
    by_place = field.var(dim=(0, 1, 4))
    assert by_place[0].mean() == pytest.approx(expected, rel=0.1)
    assert by_place[:, -1].mean() == pytest.approx(expected, rel=0.1)
    assert abs(float(field.mean())) < 0.05 * math.sqrt(expected)
    assert stats.kurtosis(field[:, :, 6, 6].flatten().numpy()) == pytest.approx(0, abs=0.4)


def test_noise_is_correlated_in_the_plane_by_the_kernel_in_mm_and_not_between_slices():
    fwhm, sizes = 2.5, (0.8, 1.25, 1.0)
    noise = HuNoise(HuNoiseConfig(dose=(0.5, 0.5), fwhm_mm=(fwhm, fwhm)))
    field = noise(torch.zeros(1, 1, 64, 64, 64), SEEDS[:1], spacing(*sizes, batch=1))[0, 0].numpy()
    field = field[8:-8, 8:-8]
    sigma = fwhm / 2.354820045
    for lag in (1, 2, 3):
        # white noise through a Gaussian of sigma is correlated as a Gaussian of sigma * sqrt(2)
        along = np.corrcoef(field[lag:].ravel(), field[:-lag].ravel())[0, 1]
        across = np.corrcoef(field[:, lag:].ravel(), field[:, :-lag].ravel())[0, 1]
        assert along == pytest.approx(math.exp(-((lag * sizes[0]) ** 2) / (4 * sigma**2)), abs=0.03)
        assert across == pytest.approx(math.exp(-((lag * sizes[1]) ** 2) / (4 * sigma**2)), abs=0.03)
    assert abs(np.corrcoef(field[..., 1:].ravel(), field[..., :-1].ravel())[0, 1]) < 0.02


def test_noise_does_not_depend_on_the_image():
    noise, x = HuNoise(), hu(2, 1, 8, 8, 4)
    torch.testing.assert_close(noise(x, SEEDS) - x, noise(torch.zeros_like(x), SEEDS), rtol=0, atol=1e-3)


def with_metal(shape: tuple[int, ...], place: tuple[int, ...]) -> torch.Tensor:
    x = torch.full((1, 1, *shape), 40.0)
    x[(0, 0, *place)] = 3000.0
    return x


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 2.0), (0.6, 1.3, 5.0)])
def test_streaks_equal_the_formula_written_with_loops(sizes):
    shape, metal = (21, 17, 9), (12, 5)
    x = with_metal(shape, metal)
    streaks = Streaks(StreaksConfig(num=3, amplitude_hu=(100.0, 100.0), decay_mm=20.0, width_mm=1.2))
    params = streaks.draw(SEEDS[:1])
    found = streaks.apply(x, params, spacing(*sizes, batch=1)) - x
    middle = int(params["near"][0, 2] * shape[2])
    expected = np.zeros(shape)
    for i, j, k in np.ndindex(*shape):
        dx, dy = (i - metal[0]) * sizes[0], (j - metal[1]) * sizes[1]
        covered = float(params["slab_mm"]) / 2 / sizes[2] - abs(k - middle) + 0.5
        for angle, gain in zip(params["angle_rad"][0].tolist(), params["amplitude_hu"][0].tolist(), strict=True):
            across = dy * math.cos(angle) - dx * math.sin(angle)
            value = gain * math.exp(-0.5 * (across / 1.2) ** 2) * math.exp(-math.hypot(dx, dy) / 20.0)
            expected[i, j, k] += value * min(max(covered, 0.0), 1.0)
    np.testing.assert_allclose(found[0, 0], expected, atol=2e-3)


def test_streaks_cancel_at_the_metal_and_the_strongest_has_the_drawn_amplitude():
    streaks = Streaks(StreaksConfig(amplitude_hu=(20.0, 200.0)))
    params = streaks.draw(torch.arange(200))
    np.testing.assert_allclose(params["amplitude_hu"].sum(dim=1), 0, atol=1e-3)
    strongest = params["amplitude_hu"].abs().amax(dim=1)
    assert stats.kstest(strongest.numpy(), "uniform", args=(20, 180)).pvalue > 0.01
    x = with_metal((32, 32, 4), (20, 9))
    added = Streaks(StreaksConfig(amplitude_hu=(150.0, 150.0), slab_mm=(100.0, 100.0)))(x, SEEDS[:1]) - x
    np.testing.assert_allclose(added[0, 0, 20, 9], 0, atol=1e-3)
    assert added[0, 0, 19:22, 8:11].abs().max() > 10


def test_streaks_fade_with_the_distance_in_mm_and_stay_within_their_slab():
    x = with_metal((64, 64, 16), (32, 32))
    streaks = Streaks(StreaksConfig(num=24, amplitude_hu=(100.0, 100.0), decay_mm=15.0, slab_mm=(6.0, 6.0)))
    params = streaks.draw(SEEDS[:1])
    added = (streaks.apply(x, params, spacing(1.0, 1.0, 2.0, batch=1)) - x)[0, 0]
    radius = np.hypot(*np.meshgrid(np.arange(64) - 32, np.arange(64) - 32, indexing="ij"))
    spoiled = added.abs().amax(dim=(0, 1)) > 0
    assert spoiled.sum() == 3  # 6 mm are three slices of 2 mm
    image = added[:, :, spoiled][..., 1]
    assert float(image[(radius > 25) & (radius < 30)].abs().max()) < 100 * math.exp(-25 / 15) * 3
    assert image[(radius > 2) & (radius < 8)].std() > 2 * image[(radius > 20) & (radius < 26)].std()


def test_streaks_leave_the_bright_place_that_is_near():
    x = torch.full((1, 1, 40, 40), 40.0)
    x[0, 0, 8, 8] = x[0, 0, 30, 32] = 2500.0
    streaks = Streaks(StreaksConfig(num=16, width_mm=1.0, decay_mm=5.0))
    params = streaks.draw(SEEDS[:1])
    for near, place in (((0.1, 0.3), (8, 8)), ((0.7, 0.9), (30, 32))):
        params["near"][0, :2] = torch.tensor(near)
        added = (streaks.apply(x, params) - x)[0, 0].square()
        index = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij"))
        centre = (index * added).sum(dim=(1, 2)) / added.sum()
        np.testing.assert_allclose(centre, place, atol=1.5)


def test_a_kernel_of_minus_one_blurs_and_the_sum_of_opposite_amounts_is_the_image():
    x, sizes = hu(2, 1, 14, 12, 4), spacing(0.7, 0.7, 3.0)
    blurred, soft, sharp = (
        KernelSharpness(KernelSharpnessConfig(amount=(amount, amount), sigma_mm=(0.8, 0.8)))(x, SEEDS, sizes)
        for amount in (-1.0, -0.4, 0.4)
    )
    np.testing.assert_allclose((soft + sharp) / 2, x, atol=1e-3)
    assert blurred.std() < soft.std() < x.std() < sharp.std()
    for out in (blurred, soft, sharp):
        np.testing.assert_allclose(out[..., 1:-1, :].mean(), x.mean(), rtol=0.2)
    one_slice = x.clone()
    one_slice[..., 0] = 0
    changed = KernelSharpness()(one_slice, SEEDS, sizes) - KernelSharpness()(x, SEEDS, sizes)
    assert torch.equal(changed[..., 1:], torch.zeros_like(changed[..., 1:]))


def test_a_shift_moves_every_value_alike():
    x = hu(2, 1, 5, 5)
    shifted = HuShift(HuShiftConfig(shift_hu=(3.0, 9.0)))(x, SEEDS) - x
    assert ((shifted > 2.9) & (shifted < 9.1)).all()
    assert (shifted.flatten(1).amax(1) - shifted.flatten(1).amin(1)).max() < 1e-3


@pytest.mark.parametrize("percent", [-5.0, 5.0, 50.0])
def test_a_scale_keeps_water_air_and_the_order_of_values(percent):
    x = torch.linspace(-1024, 3071, 4096).reshape(1, 1, 64, 64)
    found = HuScale(HuScaleConfig(percent=(percent, percent)))(x, SEEDS[:1]).flatten()
    for value, got in zip(x.flatten().tolist()[::7], found.tolist()[::7], strict=True):
        gain = percent / 100 * (1 if value >= 0 else max(0.0, 1 + value / 1000))
        assert got == pytest.approx(value * (1 + gain), abs=1e-3)
    assert (found.diff() > 0).all()


def test_values_that_leave_the_range_of_hu_are_clipped_and_counted():
    x = torch.full((1, 1, 4, 4, 4), -1020.0)
    x[..., :2] = 3000.0
    view = Pipeline([HuShift(HuShiftConfig(shift_hu=(-110.0, -110.0)))])(x, SEEDS[:1])
    assert float(view.notes["hu_clipped"][0]) == pytest.approx(0.5)
    assert float(view.image.min()) == HU_RANGE[0]
    assert float(view.image.max()) == 2890.0


@pytest.mark.parametrize("value", HU_RANGE)
def test_air_and_metal_that_noise_moves_out_of_the_range_of_hu_are_clipped_and_not_counted(value):
    x = torch.full((1, 1, 24, 24, 24), value)
    x[..., :2] = 0.0
    view = Pipeline([HuNoise(HuNoiseConfig(dose=(0.5, 0.5)))])(x, SEEDS[:1])
    assert float(view.notes["hu_clipped"][0]) == 0.0
    assert HU_RANGE[0] <= float(view.image.min()) < float(view.image.max()) <= HU_RANGE[1]


@pytest.mark.realdata
@pytest.mark.skipif(not TRUNK.is_file(), reason="no shared data")
def test_on_a_real_scan_of_the_trunk_windows_show_their_tissue_and_streaks_leave_the_hip_implant():
    image = sitk.ReadImage(str(TRUNK))
    x = torch.from_numpy(sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32))[None, None]
    x = x.clamp(*HU_RANGE)
    sizes = spacing(*image.GetSpacing(), batch=1)
    lung, soft, bone = MultiWindow().normalise(x)[0]
    muscle, air = (x[0, 0] > 30) & (x[0, 0] < 80), x[0, 0] < -950
    assert 0.4 < float(soft[muscle].mean()) < 0.6
    assert 0.25 < float(bone[muscle].mean()) < 0.35
    assert float(lung[air].mean()) < 0.3
    assert float(soft[air].max()) == 0.0
    streaks = Streaks(StreaksConfig(amplitude_hu=(150.0, 150.0), decay_mm=10.0))
    params = streaks.draw(SEEDS[:1])
    metal = (x[0, 0] > 2500).nonzero()
    level = int(metal[:, 2].median())
    params["near"][0] = torch.tensor([0.2, 0.5, (level + 0.5) / x.shape[4]])
    added = (streaks.apply(x, params, sizes) - x)[0, 0, :, :, level].abs()
    source = torch.stack(torch.meshgrid(*[torch.arange(n) for n in added.shape], indexing="ij")).flatten(1).float()
    centre = (source * added.flatten()).sum(dim=1) / added.sum()
    nearest = (metal[metal[:, 2] == level][:, :2].float() - centre).norm(dim=1).min()
    assert nearest * image.GetSpacing()[0] < 15
    low_dose = HuNoise(HuNoiseConfig(dose=(0.25, 0.25)))(x, SEEDS[:1], sizes)
    before, after = float(x[0, 0][muscle].var()), float(low_dose[0, 0][muscle].var())
    assert after - before == pytest.approx(3 * 12.0**2, rel=0.05)
