"""The MR augments against TorchIO and MONAI with the same parameters.

Both give the real part of a faulty image, where ours, as a scanner, give its magnitude. So each is compared twice:
with the library as it is where the faulty image is real, and everywhere with the library's own code given a magnitude
as its last step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from monai.transforms import GibbsNoise, KSpaceSpikeNoise, RandRicianNoise
from phantoms import REAL_DATA
from scipy.spatial.transform import Rotation

from medssl.augment.fields import normal_field
from medssl.augment.mr import (
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

BRAIN = REAL_DATA / "open_ms_raw" / "patient20_study2_T1W.nii.gz"
ON = {"on": torch.tensor([True])}


class _Magnitude:
    """The last step of TorchIO's k-space transforms, with the magnitude in place of the real part."""

    @staticmethod
    def inv_fourier_transform(spectrum: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifftn(torch.fft.ifftshift(spectrum)).abs()


class GhostingOfMagnitude(_Magnitude, tio.Ghosting):
    pass


class SpikeOfMagnitude(_Magnitude, tio.Spike):
    pass


class MotionOfMagnitude(_Magnitude, tio.Motion):
    pass


class KSpaceSpikeOfMagnitude(KSpaceSpikeNoise):
    @staticmethod
    def inv_shift_fourier(k: torch.Tensor, spatial_dims: int, as_contiguous: bool = False) -> torch.Tensor:
        dims = tuple(range(-spatial_dims, 0))
        return torch.fft.ifftn(torch.fft.ifftshift(k, dim=dims), dim=dims).abs()


def picture(*shape: int) -> torch.Tensor:
    """From zero on, which is where TorchIO and MONAI have no signal."""
    x = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    x[0, 0].view(-1)[0] = 0.0
    return x


def brain() -> torch.Tensor:
    values = tio.ScalarImage(BRAIN).data[None, :, ::4, ::4, 8:40].float()
    return (values - values.min()) / values.max()


def volumes() -> list[Any]:
    needed = pytest.mark.skipif(not BRAIN.exists(), reason="no real data here")
    return [
        pytest.param(lambda: picture(16, 15, 13), id="even odd odd"),
        pytest.param(lambda: picture(17, 14, 12), id="odd even even"),
        pytest.param(brain, id="brain", marks=[pytest.mark.realdata, needed]),
    ]


def ghosting(x: torch.Tensor, axis: int, num_ghosts: int, intensity: float, first: float = 0.0) -> torch.Tensor:
    params = {
        **ON,
        "axis": torch.tensor([0.5]),
        "num_ghosts": torch.tensor([num_ghosts]),
        "intensity": torch.tensor([intensity]),
        "first": torch.tensor([first]),
    }
    return Ghosting(GhostingConfig(axes=(axis,))).apply(x, params)


@pytest.mark.parametrize("make", volumes())
@pytest.mark.parametrize(("axis", "num_ghosts"), [(0, 3), (1, 4), (2, 7)])
def test_ghosting_is_the_magnitude_of_torchios(make, axis, num_ghosts):
    x = make()
    library = GhostingOfMagnitude(num_ghosts=num_ghosts, axis=axis, intensity=0.6, restore=None)
    expected = library(tio.ScalarImage(tensor=x[0])).data
    np.testing.assert_allclose(ghosting(x, axis, num_ghosts, 0.6)[0], expected, atol=2e-6)


@pytest.mark.parametrize(("length", "num_ghosts"), [(16, 4), (24, 6), (18, 9), (20, 2)])
def test_ghosting_equals_torchios_where_a_struck_line_is_at_the_centre_of_k_space(length, num_ghosts):
    x = picture(length, 9, 8)
    expected = tio.Ghosting(num_ghosts=num_ghosts, axis=0, intensity=0.7, restore=None)(
        tio.ScalarImage(tensor=x[0])
    ).data
    first = (length // 2) % num_ghosts / num_ghosts
    assert first == 0.0
    np.testing.assert_allclose(ghosting(x, 0, num_ghosts, 0.7)[0], expected.abs(), atol=2e-6)


def test_torchios_ghosts_vanish_in_the_imaginary_part_where_ours_do_not():
    x = torch.zeros(1, 1, 20, 4, 4)  # the centre of k-space, at 10, is two lines from one that is struck
    x[0, 0, 3, 1, 1] = 1.0
    theirs = tio.Ghosting(num_ghosts=4, axis=0, intensity=1.0, restore=None)(tio.ScalarImage(tensor=x[0])).data[0]
    shifted = x[..., :18, :, :].contiguous()  # at 9, one line
    lost = tio.Ghosting(num_ghosts=4, axis=0, intensity=1.0, restore=None)(tio.ScalarImage(tensor=shifted[0])).data[0]
    assert theirs[8, 1, 1].abs() > 0.15
    assert lost[[7, 8], 1, 1].abs().max() < 0.25 * ghosting(shifted, 0, 4, 1.0)[0, 0, [7, 8], 1, 1].max()


def spikes(x: torch.Tensor, place: list[list[float]], intensity: float, phase: float = 0.0) -> torch.Tensor:
    count = len(place)
    params = {
        **ON,
        "is_there": torch.ones(1, count, dtype=torch.bool),
        "place": torch.tensor([place], dtype=torch.float64),
        "phase": torch.full((1, count), phase, dtype=torch.float64),
        "intensity": torch.tensor([intensity]),
    }
    return Spikes(SpikesConfig(num=(count, count))).apply(x, params)


@pytest.mark.parametrize("make", volumes())
def test_a_spike_is_the_magnitude_of_torchios(make):
    x, place = make(), [[0.3, 0.55, 0.8]]
    expected = SpikeOfMagnitude(np.array(place), intensity=0.4)(tio.ScalarImage(tensor=x[0])).data
    np.testing.assert_allclose(spikes(x, place, 0.4)[0], expected, atol=5e-6)


@pytest.mark.parametrize("place", [[0.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.5, 0.5]])
def test_a_spike_equals_torchios_where_its_wave_is_real(place):
    x = picture(12, 10, 8)
    expected = tio.Spike(np.array([place]), intensity=1.5)(tio.ScalarImage(tensor=x[0])).data
    np.testing.assert_allclose(spikes(x, [place], 1.5)[0], expected.abs(), atol=5e-6)


def test_torchio_makes_the_height_of_a_second_spike_depend_on_the_first_and_ours_is_the_same_for_all():
    x, place = picture(12, 10, 8), [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    apart = SpikeOfMagnitude(np.array(place), intensity=0.5)(tio.ScalarImage(tensor=x[0])).data
    np.testing.assert_allclose(spikes(x, place, 0.5)[0], apart, atol=5e-6)  # neither exceeds the centre
    above = SpikeOfMagnitude(np.array(place), intensity=2.0)(tio.ScalarImage(tensor=x[0])).data
    assert (spikes(x, place, 2.0)[0] - above).abs().max() > 0.5


@pytest.mark.parametrize("shape", [(12, 10, 8), (11, 9, 7), (12, 9)])
def test_a_spike_is_the_magnitude_of_monais_if_it_has_the_phase_that_is_there(shape):
    x = picture(*shape)
    index = tuple(n // 3 for n in shape)
    k = np.fft.fftshift(np.fft.fftn(x[0, 0].double().numpy()))
    top = np.abs(k).max()
    height = 0.5 * top
    library = KSpaceSpikeOfMagnitude(index, float(np.log(np.abs(k[index]) + height)))
    place = [(i + 0.5) / n for i, n in zip(index, shape, strict=True)]
    found = spikes(x, [[*place, 0.5][:3]], 0.5, phase=float(np.angle(k[index]) / (2 * np.pi)))
    np.testing.assert_allclose(found[0], library(x[0]), atol=1e-5)


def ringing(x: torch.Tensor, keep: float) -> torch.Tensor:
    params = {**ON, "axis": torch.tensor([0.0]), "cut": torch.tensor([1 - keep])}
    return Ringing(RingingConfig(axes=(1,))).apply(x, params)


def profile_and_mirror() -> torch.Tensor:
    """Odd in length and the same from both ends, so that it goes on over its faces as its mirror image does."""
    half = picture(1, 17)[0, 0, 0]
    return torch.cat([half, half[:-1].flip(0)])


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_ringing_equals_monais_on_a_profile_where_a_ball_is_a_slab_and_opposite_faces_go_on(keep):
    x = profile_and_mirror().expand(1, 1, 5, 33).contiguous()
    expected = GibbsNoise(alpha=1 - keep / np.sqrt(2))(x[0])
    np.testing.assert_allclose(ringing(x, keep)[0], expected.abs(), atol=2e-6)


@pytest.mark.parametrize("keep", [0.51, 0.71, 0.91])
def test_ringing_equals_monais_inside_and_keeps_the_faces_where_they_differ(keep):
    profile = torch.linspace(0, 1, 201)
    profile[80:120] += 0.5
    x = profile.expand(1, 1, 5, 201).contiguous()
    theirs = GibbsNoise(alpha=1 - keep / np.sqrt(2))(x[0]).abs()
    error = (ringing(x, keep)[0] - theirs)[0, 0].abs()
    assert error[70:130].max() < 0.02
    assert error[[0, -1]].min() > 2 * error[70:130].max()


def test_monais_ball_is_off_the_centre_of_k_space_for_even_lengths_and_ours_is_not():
    half = picture(1, 16)[0, 0, 0]
    x = torch.cat([half, half.flip(0)]).expand(1, 1, 6, 32).contiguous()
    lines = np.fft.rfft(x[0, 0, 0].double().numpy())
    theirs = np.fft.rfft(GibbsNoise(alpha=1 - 0.5 / np.sqrt(2))(x[0])[0, 0].numpy())
    kept = np.abs(theirs[7:10] / lines[7:10])
    np.testing.assert_allclose(kept, [1.0, 0.5, 0.0], atol=1e-4)  # one of a pair of lines is cut
    expected = np.abs(np.fft.irfft(np.where(np.arange(17) <= 8, lines, 0)))
    np.testing.assert_allclose(ringing(x, 0.5)[0, 0, 0], expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8)])
def test_rician_noise_equals_monais_with_the_same_noise(shape, monkeypatch):
    x = picture(*shape)
    noise = RicianNoise(RicianNoiseConfig(sigma=(0.2, 0.2)))
    params = noise.draw(torch.tensor([5]))
    fields = [normal_field(seeds, tuple(x.shape[1:]))[0] for seeds in params["field_seeds"].T]

    class Drawn:
        def normal(self, mean: float, std: float, size: tuple[int, ...]) -> np.ndarray:
            return mean + std * fields.pop(0).numpy()

    library = RandRicianNoise(prob=1.0, std=0.2, sample_std=False)
    monkeypatch.setattr(library, "R", Drawn())
    expected = library._add_noise(x[0], mean=0.0, std=0.2)
    np.testing.assert_allclose(noise.apply(x, params)[0], expected, atol=2e-6)
    assert fields == []


def in_air(shape: tuple[int, int, int]) -> torch.Tensor:
    x = torch.zeros(1, 1, *shape)
    middle = (0, 0, *[slice(n // 4, 3 * n // 4) for n in shape])
    x[middle] = picture(*x[middle].shape)[0, 0] + 0.2
    return x


@pytest.mark.parametrize("voxel_mm", [(1.0, 1.0, 1.0), (0.8, 1.1, 1.7)])
@pytest.mark.parametrize("turned", [0, 1, 2])
def test_motion_is_the_magnitude_of_torchios_about_the_centre(voxel_mm, turned):
    shape = (24, 21, 20)
    x = in_air(shape)
    degrees, shifts, times = [[0.0] * 3, [0.0] * 3], [[1.5, -1.0, 0.5], [-0.7, 2.0, 1.3]], [0.3, 0.7]
    degrees[0][turned], degrees[1][turned] = 5.0, -8.0
    # TorchIO turns about the origin of the world, so that is put into the middle of the grid
    affine = np.diag([*voxel_mm, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * voxel_mm
    library = MotionOfMagnitude(np.array(degrees), np.array(shifts), np.array(times), image_interpolation="linear")
    expected = library(tio.ScalarImage(tensor=x[0], affine=affine)).data

    # its poses map output to input in LPS+ and come after the one of the centre; ours map content in RAS+, in order
    flip = np.diag([-1.0, -1.0, 1.0])
    angles, moves = np.zeros((3, 3)), np.zeros((3, 3))
    for pose, (angle, shift) in zip((0, 2), zip(degrees, shifts, strict=True), strict=True):
        back = flip @ Rotation.from_euler("xyz", angle, degrees=True).as_matrix() @ flip
        angles[pose] = Rotation.from_matrix(back.T).as_euler("xyz")
        moves[pose] = -back.T @ flip @ shift
    motion = Motion(MotionConfig(num_moves=2, axes=(2,)))
    params = motion.draw(torch.tensor([0]))
    params["time"] = torch.tensor([times])
    params["pose_angle"], params["pose_shift_mm"] = torch.from_numpy(angles)[None], torch.from_numpy(moves)[None]
    found = motion.apply(x, params, torch.tensor([voxel_mm], dtype=torch.float64))
    np.testing.assert_allclose(found[0], expected, atol=2e-4)
