from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from medssl.augment.base import Pipeline
from medssl.augment.spatial import Affine, AffineConfig, Mirror, MirrorConfig
from medssl.augment.warp import warp
from medssl.errors import ConfigError

SPACING = (0.8, 1.5, 2.5)
SHAPE = (14, 12, 9)


def volume(shape=SHAPE, seed=0, batch=1) -> torch.Tensor:
    smooth = np.random.default_rng(seed).normal(size=(batch, 1, *shape))
    return torch.from_numpy(ndimage.gaussian_filter(smooth, (0, 0, *[1.0] * len(shape)))).float()


def drawn(*, angle_deg=(0, 0, 0), shear=(0, 0, 0), shift_mm=(0, 0, 0), scale=1.0) -> dict[str, torch.Tensor]:
    """Parameters as :meth:`Affine.sample` would give them, chosen by hand."""
    return {
        "on": torch.tensor([True]),
        "angle": torch.tensor([[math.radians(a) for a in angle_deg]], dtype=torch.float64),
        "shear": torch.tensor([shear], dtype=torch.float64),
        "shift_mm": torch.tensor([shift_mm], dtype=torch.float64),
        "scale": torch.tensor([scale], dtype=torch.float64),
    }


GENERIC = {"angle_deg": (11, -7, 23), "shear": (0.1, -0.05, 0.08), "shift_mm": (1.1, -0.7, 2.2), "scale": 1.13}


def forward_mm(angle_deg, shear, shift_mm, scale) -> tuple[np.ndarray, np.ndarray]:
    """The map of the docstring, retyped: p' = Rz Ry Rx H s p + t."""
    a, b, c = (math.radians(angle) for angle in angle_deg)
    rx = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    ry = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    rz = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    h = np.array([[1, shear[0], shear[1]], [0, 1, shear[2]], [0, 0, 1]])
    return rz @ ry @ rx @ h * scale, np.array(shift_mm)


def by_scipy(array: np.ndarray, linear: np.ndarray, shift: np.ndarray, spacing, order=1) -> np.ndarray:
    """Resample with ``scipy.ndimage.affine_transform``: output voxel -> mm -> inverse map -> mm -> input voxel."""
    to_mm = np.diag(spacing)
    inverse = np.linalg.inv(to_mm) @ np.linalg.inv(linear) @ to_mm
    centre = (np.array(array.shape) - 1) / 2
    offset = centre - inverse @ (centre + np.linalg.inv(to_mm) @ shift)
    return ndimage.affine_transform(array, inverse, offset, order=order, mode="nearest")


def by_itk(array: np.ndarray, linear: np.ndarray, shift: np.ndarray, spacing, fill: float) -> np.ndarray:
    """Resample with SimpleITK, which works in mm by itself."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0).astype(np.float64))
    image.SetSpacing(spacing)
    transform = sitk.AffineTransform(3)
    transform.SetCenter([(n - 1) / 2 * s for n, s in zip(array.shape, spacing, strict=True)])
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation(shift.tolist())
    moved = sitk.Resample(image, image, transform.GetInverse(), sitk.sitkLinear, fill)
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def test_an_affine_equals_scipy_in_mm_with_anisotropic_spacing():
    x = volume()
    found = Affine(AffineConfig(spacing_mm=SPACING)).apply(x, drawn(**GENERIC))
    expected = by_scipy(x[0, 0].numpy(), *forward_mm(**GENERIC), SPACING)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)


def test_an_affine_equals_simpleitk_in_mm_with_anisotropic_spacing():
    x = volume(seed=1)
    affine = Affine(AffineConfig(spacing_mm=SPACING, fill=0.0))
    found = affine.apply(x, drawn(**GENERIC))[0, 0].numpy()
    inside = by_itk(np.ones(SHAPE), *forward_mm(**GENERIC), SPACING, 0.0) > 0.5
    inside &= affine.apply(torch.ones_like(x), drawn(**GENERIC))[0, 0].numpy() > 0.9999
    expected = by_itk(x[0, 0].numpy(), *forward_mm(**GENERIC), SPACING, 0.0)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-5)


def test_a_label_moves_by_nearest_neighbour_with_its_image():
    label = (torch.arange(math.prod(SHAPE)) % 251).reshape(1, 1, *SHAPE).to(torch.int16)
    found = Affine(AffineConfig(spacing_mm=SPACING)).apply_label(label, drawn(**GENERIC))
    expected = by_scipy(label[0, 0].numpy(), *forward_mm(**GENERIC), SPACING, order=0)
    assert found.dtype == torch.int16
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)


def test_a_2d_affine_equals_scipy_and_stays_in_the_plane():
    x = volume((15, 11))
    params = drawn(**GENERIC)
    found = Affine(AffineConfig(spacing_mm=SPACING)).apply(x, params)
    linear, shift = forward_mm((0, 0, 23), (0.1, 0, 0), GENERIC["shift_mm"], GENERIC["scale"])
    expected = by_scipy(x[0, 0].numpy(), linear[:2, :2], shift[:2], SPACING[:2])
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)


def test_a_quarter_turn_about_z_brings_anterior_to_where_left_is():
    x = torch.zeros(1, 1, 5, 5, 5)
    x[0, 0, 2, 4, 2] = 1  # +Y, anterior
    found = Affine().apply(x, drawn(angle_deg=(0, 0, 90)))
    assert found[0, 0, 0, 2, 2] == pytest.approx(1, abs=1e-5)  # -X, left


def test_a_translation_is_in_mm():
    x = volume()
    found = Affine(AffineConfig(spacing_mm=(1.0, 1.5, 2.5))).apply(x, drawn(shift_mm=(2.0, 3.0, -2.5)))
    np.testing.assert_allclose(found[0, 0, 2:, 2:, :-1], x[0, 0, :-2, :-2, 1:], atol=1e-5)


def test_a_scale_above_one_enlarges():
    x = torch.zeros(1, 1, 21, 21, 21)
    x[..., 8:13, 8:13, 8:13] = 1
    assert Affine().apply(x, drawn(scale=2.0)).sum() == pytest.approx(8 * 125, rel=0.2)


@pytest.mark.parametrize(("fill", "corner"), [(None, 5.0), (-3.0, -3.0)])
def test_outside_the_crop_the_border_is_extended_or_filled(fill, corner):
    x = torch.full((1, 1, 8, 8, 8), 5.0)
    affine = Affine(AffineConfig(fill=fill))
    assert affine.apply(x, drawn(shift_mm=(4, 0, 0)))[0, 0, 0, 4, 4] == pytest.approx(corner, abs=1e-6)
    label = affine.apply_label(torch.full((1, 1, 8, 8, 8), 3, dtype=torch.uint8), drawn(shift_mm=(4, 0, 0)))
    assert label[0, 0, 0, 4, 4] == (3 if fill is None else 0)


def test_draws_stay_within_their_bounds_and_reach_both_sides():
    config = AffineConfig(rotation_deg=(5.0, 10.0, 20.0), scale=(0.5, 2.0), shear=0.3, translation_mm=(1.0, 2.0, 3.0))
    params = Affine(config).draw(torch.arange(300))
    degrees = torch.rad2deg(params["angle"]).abs()
    assert (degrees <= torch.tensor([5.0, 10, 20])).all()
    assert (degrees.amax(0) > torch.tensor([4.5, 9, 18])).all()
    assert params["scale"].min() == pytest.approx(0.5, abs=0.03)
    assert params["scale"].max() == pytest.approx(2.0, abs=0.1)
    assert params["scale"].log().mean().abs() < 0.1
    assert (params["shear"].abs() <= 0.3).all()
    assert (params["shift_mm"].abs() <= torch.tensor([1.0, 2, 3])).all()
    assert params["shift_mm"].min() < -2.5


def test_one_slice_volumes_are_resampled_in_their_plane():
    x = volume((15, 11))[..., None]
    found = Affine().apply(x, drawn(angle_deg=(0, 0, 30)))
    np.testing.assert_allclose(found[..., 0], Affine().apply(x[..., 0], drawn(angle_deg=(0, 0, 30))), atol=1e-5)


@pytest.mark.parametrize(("axis", "dim"), [("LR", 2), ("AP", 3), ("SI", 4)])
def test_a_mirror_moves_voxels_along_its_anatomical_axis_bit_for_bit(axis, dim):
    x = volume()
    mirror = Mirror(MirrorConfig(axes=(axis,)))
    assert torch.equal(mirror(x, torch.tensor([7])), x.flip(dim))
    label = (x > 0).to(torch.uint8)
    assert torch.equal(mirror.apply_label(label, mirror.draw(torch.tensor([7]))), label.flip(dim))


def test_a_mirror_swaps_lateral_labels_only_where_left_and_right_change_places():
    label = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    label[:, :, 0], label[:, :, 3], label[:, :, 1] = 1, 2, 5
    seeds = torch.tensor([0])
    lateral = Mirror(MirrorConfig(axes=("LR",), swap_labels=((1, 2),)))
    found = lateral.apply_label(label, lateral.draw(seeds))
    assert found[0, 0, :, 0, 0].tolist() == [1, 0, 5, 2]
    upright = Mirror(MirrorConfig(axes=("SI",), swap_labels=((1, 2),)))
    assert torch.equal(upright.apply_label(label, upright.draw(seeds)), label)


def test_a_mirror_with_three_axes_draws_all_seven_sets_equally_often():
    signs = Mirror(MirrorConfig(axes=("LR", "AP", "SI"))).draw(torch.arange(700))["signs"]
    sets, counts = signs.unique(dim=0, return_counts=True)
    assert len(sets) == 7
    assert [1.0, 1.0, 1.0] not in sets.tolist()
    assert counts.min() > 60


def test_a_mirror_in_2d_refuses_the_axis_that_is_not_there():
    with pytest.raises(ConfigError, match="axis SI in 2D"):
        Mirror(MirrorConfig(axes=("SI",)))(volume((6, 6)), torch.tensor([0]))
    assert torch.equal(Mirror()(volume((6, 6)), torch.tensor([0])), volume((6, 6)).flip(2))


def test_spatial_augments_are_composed_into_one_resampling(monkeypatch):
    calls = []
    sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(torch.nn.functional, "grid_sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    x = volume()
    affine = Affine(AffineConfig(spacing_mm=SPACING))
    mirror = Mirror(MirrorConfig(axes=("LR",)))
    params = [drawn(**GENERIC), mirror.draw(torch.tensor([0])), drawn(angle_deg=(0, 4, 0))]
    found, label = Pipeline([affine, mirror, affine]).apply_to(x, params, label=(x > 0).long())
    assert len(calls) == 2  # the image and its label
    first, second = forward_mm(**GENERIC), forward_mm((0, 4, 0), (0, 0, 0), (0, 0, 0), 1.0)
    flip = np.diag([-1, 1, 1])
    expected = by_scipy(x[0, 0].numpy(), second[0] @ flip @ first[0], second[0] @ flip @ first[1], SPACING)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)
    assert label is not None
    assert label.dtype == torch.int64


def test_a_batch_mixes_samples_that_stay_mirror_and_turn():
    x = volume(batch=3)
    turned = Affine().matrix(drawn(angle_deg=(0, 0, 20)), 3)[0]
    matrix = torch.stack(
        [torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([-1.0, 1, -1, 1]).double()), turned]
    )
    found, label = warp([x, (x > 0).to(torch.uint8)], matrix)
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1], x[1].flip(1, 3))
    assert torch.equal(found[2:], Affine().apply(x[2:], drawn(angle_deg=(0, 0, 20))))
    assert torch.equal(label[1], (x[1] > 0).to(torch.uint8).flip(1, 3))
