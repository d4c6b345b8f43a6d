from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchio as tio
from phantoms import REAL_DATA
from scipy import fft, stats

from medssl.augment.images import Images
from medssl.augment.mr import (
    BiasField,
    BiasFieldConfig,
    Ghosting,
    GhostingConfig,
    Motion,
    MotionConfig,
    RicianNoise,
    RicianNoiseConfig,
    Ringing,
    RingingConfig,
    Spikes,
    SpikesConfig,
)
from medssl.augment.spatial import Affine, AffineConfig
from medssl.errors import ConfigError

SEEDS = torch.tensor([11, 12])
BRAIN = REAL_DATA / "open_ms_raw" / "patient01_study1_T1W.nii.gz"
STRUCK = [Ghosting(), Ringing(), Ringing(RingingConfig(every_axis=True)), Motion(), Spikes(), RicianNoise()]


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def block(*shape: int) -> torch.Tensor:
    """Noise in air, far enough from the border to be moved."""
    x = torch.zeros(1, 1, *shape)
    middle = (0, 0, *[slice(n // 3, 2 * n // 3) for n in shape])
    x[middle] = torch.rand(x[middle].shape, generator=torch.Generator().manual_seed(0)) + 0.5
    return x


def magnitude(m: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Weigh the lines of k-space, its centre at n // 2."""
    along = [1] * m.ndim
    along[axis] = -1
    k = np.fft.fftshift(np.fft.fft(m, axis=axis), axes=axis) * weights.reshape(along)
    return np.abs(np.fft.ifft(np.fft.ifftshift(k, axes=axis), axis=axis))


def spacing(*mm: float, batch: int = 1) -> torch.Tensor:
    return torch.tensor([mm] * batch, dtype=torch.float64)


def test_a_bias_field_equals_torchios():
    x = torch.rand(1, 1, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0, 0] = 0.0  # TorchIO multiplies what is; here the darkest voxel is zero
    bias = BiasField(BiasFieldConfig(coefficient=0.5))
    params = bias.draw(torch.tensor([3]))
    cube = params["coefficients"][0]
    terms = [cube[i, j, k].item() for i in range(4) for j in range(4 - i) for k in range(4 - i - j)]
    expected = tio.BiasField(coefficients=terms, order=3)(tio.ScalarImage(tensor=x[0])).data
    assert torch.count_nonzero(cube) == 20
    np.testing.assert_allclose(bias.apply(x, params)[0], expected, rtol=2e-5, atol=1e-6)


def test_a_bias_field_in_2d_is_the_polynomial_without_z_and_a_single_slice_is_at_its_middle():
    x = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    bias = BiasField()
    params = bias.draw(torch.tensor([3]))
    torch.testing.assert_close(bias.apply(x, params), bias.apply(x[..., None], params)[..., 0])


def test_a_bias_field_keeps_the_darkest_voxel_wherever_zero_is():
    x = images(1, 1, 8, 8, 8)
    bias = BiasField()
    torch.testing.assert_close(bias(x + 5, SEEDS[:1]), bias(x, SEEDS[:1]) + 5, atol=1e-5, rtol=0)
    assert bias(x, SEEDS[:1]).argmin() == x.argmin()


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.1, 0.3, 2.0])
def test_rician_noise_has_the_distribution_of_rice(signal):
    x = torch.full((1, 1, 40, 40, 40), signal)
    x[..., 0] = 0.0  # the darkest voxel, which is no signal
    found = RicianNoise(RicianNoiseConfig(sigma=(0.1, 0.1)))(x, SEEDS[:1])[..., 1:].flatten().double().numpy()
    law = stats.rice(signal / 0.1, scale=0.1)
    assert abs(found.mean() - law.mean()) < 5 * law.std() / math.sqrt(len(found))
    assert found.var() == pytest.approx(law.var(), rel=0.03)
    assert stats.kstest(found[::7], law.cdf).pvalue > 0.01


def test_rician_noise_in_air_is_rayleigh_and_independent_of_where_zero_is():
    noise = RicianNoise(RicianNoiseConfig(sigma=(0.2, 0.2)))
    air = noise(torch.full((1, 1, 30, 30, 30), -1.5), SEEDS[:1]) + 1.5
    assert air.mean().item() == pytest.approx(0.2 * math.sqrt(math.pi / 2), rel=0.02)
    assert air.var().item() == pytest.approx(0.04 * (2 - math.pi / 2), rel=0.05)
    x = images(1, 1, 8, 8, 8)
    torch.testing.assert_close(noise(x + 5, SEEDS[:1]), noise(x, SEEDS[:1]) + 5, atol=1e-5, rtol=0)


def test_a_spike_is_one_wave_of_the_drawn_height_frequency_and_phase():
    x = torch.rand(2, 2, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    spikes = Spikes(SpikesConfig(num=(2, 3), intensity=(0.2, 0.9)))
    params = spikes.draw(SEEDS)
    found = spikes.apply(x, params)
    for sample in range(2):
        for channel in range(2):
            m = x[sample, channel].double().numpy()
            m = m - m.min()
            k = np.fft.fftshift(np.fft.fftn(m))
            top = np.abs(k).max() * params["intensity"][sample].item()
            for is_there, place, phase in zip(
                params["is_there"][sample], params["place"][sample].numpy(), params["phase"][sample], strict=True
            ):
                index = tuple(int(share * n) for share, n in zip(place, m.shape, strict=True))
                k[index] += top * np.exp(2j * np.pi * phase.item()) * bool(is_there)
            expected = np.abs(np.fft.ifftn(np.fft.ifftshift(k))) + x[sample, channel].min().item()
            np.testing.assert_allclose(found[sample, channel], expected, atol=1e-5)


def test_stripes_of_the_default_height_are_seen_and_do_not_dominate():
    x = torch.full((300, 1, 24, 24), 1.0)
    x[:, :, 0, 0] = 0.0
    spread = (Spikes()(x, torch.arange(300)) - x)[:, 0, 1:].flatten(1).std(dim=1)
    assert spread.max() < 0.14
    assert spread.median() > 0.03


def test_the_number_of_spikes_and_their_places_vary():
    params = Spikes(SpikesConfig(num=(1, 3))).draw(torch.arange(300))
    counts = params["is_there"].sum(dim=1)
    assert counts.unique().tolist() == [1, 2, 3]
    assert counts.bincount().tolist()[1] == pytest.approx(100, abs=30)
    assert stats.kstest(params["place"].flatten().numpy(), "uniform").pvalue > 0.01


def test_a_spike_strikes_a_single_one_of_thick_slices():
    x = torch.rand(1, 1, 16, 16, 9, generator=torch.Generator().manual_seed(0))
    spikes = Spikes(SpikesConfig(num=(1, 1), intensity=(0.5, 0.5)))
    params = spikes.draw(SEEDS[:1])
    change = (spikes.apply(x, params, spacing(1, 1, 5)) - x).abs().amax(dim=(0, 1, 2, 3))
    struck = int(params["place"][0, 0, 2] * 9)
    assert change[struck] > 0.05
    assert (change[torch.arange(9) != struck] < 1e-6).all()
    thin = (spikes.apply(x, params, spacing(1, 1, 2)) - x).abs().amax(dim=(0, 1, 2, 3))
    assert (thin > 0.05).all()


@pytest.mark.parametrize(("length", "ghosts"), [(48, 4), (49, 7), (50, 2), (60, 5)])
def test_ghosts_of_a_point_lie_at_every_nth_part_of_the_field_of_view(length, ghosts):
    x = torch.zeros(1, 1, length, 6)
    x[0, 0, 5, 3] = 1.0
    config = GhostingConfig(num_ghosts=(ghosts, ghosts), intensity=(0.8, 0.8), axes=(0,))
    out = Ghosting(config)(x, SEEDS[:1])[0, 0]
    line = out[:, 3]
    places = {(5 + round(j * length / ghosts)) % length for j in range(ghosts)}
    assert set(line.argsort()[-ghosts:].tolist()) == places
    assert line[5].item() == pytest.approx(1 - 0.8 / ghosts, abs=0.8 / length * 3)
    if length % ghosts == 0:
        others = sorted(places - {5})
        np.testing.assert_allclose(line[others], 0.8 / ghosts, atol=0.8 / length * 1.5)
    assert (out[:, [0, 1, 2, 4, 5]] < 1e-6).all()


def test_ghosting_equals_weights_on_the_lines_of_k_space_written_with_loops():
    x = images(2, 2, 13, 12, 10)
    ghosting = Ghosting(GhostingConfig(centre=0.25))
    params = ghosting.draw(torch.tensor([3, 4]))
    found = ghosting.apply(x, params)
    for sample, out in enumerate(found):
        axis = int(params["axis"][sample] * 3)
        n = x.shape[axis + 2]
        period = int(params["num_ghosts"][sample])
        first = int(params["first"][sample] * period)
        weights = np.ones(n)
        for line in range(n):
            if (line - first) % period == 0 and abs(line - n // 2) > 0.25 * n / 2:
                weights[line] = 1 - params["intensity"][sample].item()
        for image, got in zip(x[sample].double().numpy(), out, strict=True):
            expected = magnitude(image - image.min(), weights, axis) + image.min()
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_kept_centre_of_k_space_leaves_a_smooth_image_without_ghosts():
    x = (1 + torch.cos(2 * torch.pi * torch.arange(32) / 32)).expand(1, 1, 8, 32).contiguous()
    out = Ghosting(GhostingConfig(centre=0.2, axes=(1,)))(x, SEEDS[:1])
    torch.testing.assert_close(out, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(13, 12, 10), (13, 12)])
def test_ringing_keeps_the_energy_of_the_lines_that_are_there(shape):
    x = images(2, 1, *shape).abs()
    x.flatten(1)[:, 0] = 0.0
    ringing = Ringing(RingingConfig(every_axis=True))
    params = ringing.draw(SEEDS)
    found = ringing.apply(x, params)
    for sample in range(2):
        m = x[sample, 0].double().numpy()
        k = fft.dctn(m, norm="ortho")
        keep = np.ones_like(m)
        for axis, n in enumerate(m.shape):
            inside = np.arange(n) <= (1 - params["cut"][sample].item()) * n  # half a period a line
            keep *= inside.reshape([-1 if a == axis else 1 for a in range(m.ndim)])
        expected = fft.idctn(k * keep, norm="ortho")
        np.testing.assert_allclose(found[sample, 0], np.abs(expected), atol=1e-5)
        energy = found[sample, 0].double().square().sum().item()
        assert energy == pytest.approx(((k * keep) ** 2).sum(), rel=1e-5)


def test_ringing_overshoots_a_step_by_the_constant_of_wilbraham_and_gibbs():
    x = torch.zeros(1, 1, 512, 2)
    x[:, :, 128:384] = 1.0
    out = Ringing(RingingConfig(cut=(0.9, 0.9), axes=(0,)))(x, SEEDS[:1])
    overshoot = 0.0894899
    assert out.max().item() - 1 == pytest.approx(overshoot, abs=0.005)


def test_a_face_of_a_crop_does_not_ring_with_the_jump_to_the_opposite_one():
    x = torch.linspace(0, 1, 64).view(1, 1, 64, 1).expand(1, 1, 64, 64).contiguous()
    change = (Ringing(RingingConfig(cut=(0.4, 0.4), axes=(0,)))(x, SEEDS[:1]) - x)[0, 0].abs()
    lines = np.fft.fft(x[0, 0, :, 0].double().numpy())
    wrapped = np.abs(np.fft.ifft(np.where(np.abs(np.fft.fftfreq(64)) <= 0.3, lines, 0))) - x[0, 0, :, 0].numpy()
    assert change.max() < 0.01
    assert np.abs(wrapped).max() > 0.19


def test_lines_are_struck_along_one_axis_drawn_evenly_and_along_all_if_asked_for():
    x = images(1, 1, 12, 12, 12)
    counts = [0, 0, 0]
    for seed in range(90):
        change = (Ringing(RingingConfig(cut=(0.5, 0.5)))(x, torch.tensor([seed])) - x)[0, 0].double().numpy()
        sums = [np.abs(change.sum(axis=axis)).max() for axis in range(3)]
        counts[int(np.argmin(sums))] += 1  # the mean along the axis that is cut stays, up to the magnitude
    assert min(counts) > 15


@pytest.mark.parametrize("augment", [Ghosting(), Ringing(), Motion()])
def test_a_batch_of_several_phase_axes_equals_its_samples(augment):
    x = images(6, 1, 10, 11, 12).sigmoid()
    seeds = torch.arange(6)
    assert (augment.draw(seeds)["axis"] * 3).floor().unique().numel() == 3
    whole = augment(x, seeds)
    for place in range(6):
        torch.testing.assert_close(
            augment(x[place : place + 1], seeds[place : place + 1])[0], whole[place], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("augment", [Ghosting(), Ringing(RingingConfig(every_axis=True)), Ringing()])
def test_thick_slices_are_not_mixed_with_one_another(augment):
    x = torch.zeros(8, 1, 12, 12, 10)
    x[..., 4] = images(8, 1, 12, 12).abs()
    out = augment(x, torch.arange(8), spacing(1, 1, 4, batch=8))
    assert (out[..., torch.arange(10) != 4] == 0).all()
    assert ((out - x).abs().amax(dim=(1, 2, 3, 4)) > 0.01).all()


def test_motion_of_thick_slices_stays_in_their_plane():
    x = torch.zeros(8, 1, 16, 16, 8)
    x[:, :, 4:12, 6:10, 4] = 1.0
    config = MotionConfig(rotation_deg=(20.0, 20.0, 20.0), translation_mm=(2.0, 2.0, 0.0))
    out = Motion(config)(x, torch.arange(8), spacing(1, 1, 4, batch=8))
    assert (out[..., torch.arange(8) != 4] < 1e-6).all()
    assert ((out - x).abs().amax(dim=(1, 2, 3, 4)) > 0.01).all()


def test_an_image_without_a_phase_axis_stays_as_it_is():
    x = images(1, 1, 9, 8, 1)
    for config in (GhostingConfig(axes=(2,)), GhostingConfig(axes=(2,), thick_ratio=1.5)):
        torch.testing.assert_close(Ghosting(config)(x, SEEDS[:1]), x, atol=1e-6, rtol=0)
    thick = images(1, 1, 9, 8, 7)
    out = Ghosting(GhostingConfig(axes=(2,)))(thick, SEEDS[:1], spacing(1, 1, 3))
    torch.testing.assert_close(out, thick, atol=1e-6, rtol=0)
    plane = images(1, 1, 9, 8)
    torch.testing.assert_close(Ghosting(GhostingConfig(axes=(2,)))(plane, SEEDS[:1]), plane, atol=1e-6, rtol=0)


def test_motion_by_whole_voxels_keeps_the_energy_and_equals_rolled_copies_put_together_with_loops():
    x = block(24, 21, 18)
    motion = Motion(MotionConfig(rotation_deg=(0.0, 0.0, 0.0), num_moves=3))
    params = motion.draw(SEEDS[:1])
    shifts = torch.tensor([[2, -3, 1], [0, 0, 3], [-1, 2, 0], [4, 1, -2]])
    params["pose_shift_mm"] = shifts[None].double() * torch.tensor([0.5, 1.0, 1.2], dtype=torch.float64)
    found = motion.apply(x, params, spacing(0.5, 1.0, 1.2))[0, 0]
    assert found.double().square().sum().item() == pytest.approx(x.double().square().sum().item(), rel=1e-4)

    axis = int(params["axis"][0] * 3)
    m, n = x[0, 0].double().numpy(), x.shape[axis + 2]
    starts = [0, *(int(time * n) for time in params["time"][0]), n]
    k = np.zeros(m.shape, dtype=complex)
    for start, stop, shift in zip(starts[:-1], starts[1:], shifts.tolist(), strict=True):
        moved = m if start <= n // 2 < stop else np.roll(m, shift, axis=(0, 1, 2))
        spectrum = np.moveaxis(np.fft.fftshift(np.fft.fft(moved, axis=axis), axes=axis), axis, 0)
        np.moveaxis(k, axis, 0)[start:stop] = spectrum[start:stop]
    expected = np.abs(np.fft.ifft(np.fft.ifftshift(k, axes=axis), axis=axis))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_moves_come_in_order_at_even_times_and_the_pose_of_the_centre_is_that_of_the_image():
    motion = Motion(MotionConfig(num_moves=4))
    params = motion.draw(torch.arange(200))
    assert (params["time"].diff(dim=1) > 0).all()
    assert ((params["time"] - torch.arange(1, 5) / 5).abs() <= 0.3 / 5 + 1e-6).all()
    lines = motion.lines(37, params)
    assert torch.equal(lines.sum(dim=1), torch.ones(200, 37))
    smooth = torch.zeros(4, 1, 32, 32)
    smooth[:, :, 10:22, 10:22] = 1.0
    out = Motion(MotionConfig(translation_mm=(6.0, 6.0, 6.0), num_moves=1))(smooth, torch.arange(4))
    coordinates = torch.arange(32.0)
    for sample in out[:, 0]:
        for axis in range(2):
            profile = sample.sum(dim=1 - axis)
            assert ((profile * coordinates).sum() / profile.sum()).item() == pytest.approx(15.5, abs=1.0)


def test_motion_in_2d_turns_in_the_plane_alone():
    x = block(30, 27)
    config = MotionConfig(rotation_deg=(30.0, 30.0, 0.0), translation_mm=(0.0, 0.0, 9.0))
    torch.testing.assert_close(Motion(config)(x, SEEDS[:1]), x, atol=1e-6, rtol=0)
    turned = Motion(MotionConfig(rotation_deg=(0.0, 0.0, 30.0), translation_mm=(0.0, 0.0, 0.0)))(x, SEEDS[:1])
    assert (turned - x).abs().max() > 0.1


def test_a_pose_is_that_of_the_augment_affine():
    x = block(24, 22, 20)
    motion = Motion(MotionConfig(num_moves=1, axes=(2,), rotation_deg=(10.0, 8.0, 6.0)))
    params = motion.draw(SEEDS[:1])
    params["time"] = torch.tensor([[0.1]])  # the pose before the move has the first two lines of 20
    pose = {key.removeprefix("pose_"): value[:, 0] for key, value in params.items() if key.startswith("pose_")}
    moved = Affine(AffineConfig()).change(x, {"on": torch.tensor([True]), **pose}, spacing(1, 1, 1))[0, 0].numpy()
    first = np.arange(20) < 2
    k = [np.fft.fftshift(np.fft.fft(image, axis=2), axes=2) for image in (moved, x[0, 0].numpy())]
    expected = np.abs(np.fft.ifft(np.fft.ifftshift(np.where(first, *k), axes=2), axis=2))
    np.testing.assert_allclose(motion.apply(x, params)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("augment", STRUCK, ids=lambda augment: augment.name)
def test_zero_is_the_darkest_voxel_wherever_it_lies(augment):
    x = images(2, 2, 9, 8, 7)
    torch.testing.assert_close(augment(x + 5, SEEDS), augment(x, SEEDS) + 5, atol=2e-5, rtol=0)


@pytest.mark.parametrize("augment", STRUCK[:-1], ids=lambda augment: augment.name)
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5), (1, 1, 1), (1, 7, 2)])
def test_a_constant_image_stays(augment, shape):
    x = torch.full((2, 1, *shape), -3.0)
    torch.testing.assert_close(augment(x, SEEDS), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("augment", [*STRUCK, BiasField()], ids=lambda augment: augment.name)
def test_they_are_for_magnetic_resonance_and_not_for_hounsfield_units(augment):
    assert augment.modalities == {"MR"}
    assert "HU" not in augment.takes
    assert Images().domain in augment.takes


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (GhostingConfig, {"num_ghosts": [1, 4]}, "greater than or equal to 2"),
        (GhostingConfig, {"num_ghosts": [5, 4]}, "lower bound 5 is above"),
        (GhostingConfig, {"intensity": [0.5, 1.5]}, "less than or equal to 1"),
        (GhostingConfig, {"axes": [3]}, "0, 1 or 2"),
        (GhostingConfig, {"axes": []}, "at least 1"),
        (RingingConfig, {"cut": [-0.5, 0.5]}, "greater than or equal to 0"),
        (RingingConfig, {"thick_ratio": 1.0}, "greater than 1"),
        (SpikesConfig, {"num": [0, 2]}, "greater than or equal to 1"),
        (MotionConfig, {"num_moves": 0}, "greater than or equal to 1"),
        (RicianNoiseConfig, {"sigma": [-0.1, 0.1]}, "greater than or equal to 0"),
    ],
)
def test_impossible_options_are_refused(config, options, reason):
    with pytest.raises(ConfigError, match=reason):
        config.parse(options)


@pytest.mark.realdata
@pytest.mark.skipif(not BRAIN.exists(), reason="no real data here")
@pytest.mark.parametrize("augment", [*STRUCK, BiasField()], ids=lambda augment: augment.name)
def test_a_brain_stays_recognisable_and_the_air_around_it_takes_the_fault(augment):
    volume = tio.ScalarImage(BRAIN)
    x = volume.data[None, :, ::3, ::3, 10:26].float()
    x = ((x - x.mean()) / x.std()).repeat(4, 1, 1, 1, 1)
    out = augment(x, torch.arange(4), spacing(2.16, 2.16, 3.0, batch=4))
    tissue = x > 0
    for before, after, inside in zip(x, out, tissue, strict=True):
        assert np.corrcoef(before.flatten(), after.flatten())[0, 1] > 0.8
        assert (after - before)[inside].abs().mean() > 0.001
        assert after.min() >= before.min() - 1e-5
    if augment.name in {"ghosting", "spikes", "rician_noise"}:
        assert (out[~tissue].mean() - x[~tissue].mean()) > 0.01
