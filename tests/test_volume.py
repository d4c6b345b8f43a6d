from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import BALLS_MM, ORIENTATIONS, balls, centroid_mm, grid, grids, noise, ramp, voxel_positions_mm
from scipy import ndimage

from medssl.errors import GeometryError
from medssl.geometry import Geometry
from medssl.volume import Volume, crop, reorient, resample_argmax, resample_to, respace

many = settings(max_examples=200, deadline=None, derandomize=True)
some = settings(max_examples=40, deadline=None, derandomize=True)


def indices_in(source, target):
    return source.to_index(voxel_positions_mm(target))


def inside(source, target, margin):
    """Voxels of target at least ``margin`` voxels inside the outermost voxel centres of source."""
    indices = indices_in(source, target)
    return ((indices >= margin) & (indices <= np.array(source.shape) - 1 - margin)).all(axis=-1)


@many
@given(grids(sheared=True, max_angle_deg=45), st.sampled_from(ORIENTATIONS))
def test_reorient_moves_every_value_to_its_world_position(geometry, orientation):
    volume = noise(geometry, channels=2)
    moved = reorient(volume, orientation)
    assert moved.array.dtype == volume.array.dtype
    assert moved.array.flags.c_contiguous
    at = np.rint(indices_in(geometry, moved.geometry)).astype(int)
    assert np.abs(at - indices_in(geometry, moved.geometry)).max() < 1e-3
    assert np.array_equal(moved.array, volume.array[:, at[..., 0], at[..., 1], at[..., 2]])
    back = reorient(moved, geometry.orientation)
    assert np.array_equal(back.array, volume.array)
    assert np.array_equal(resample_to(moved, geometry).array, volume.array)


@some
@given(grids(sheared=True), st.lists(st.integers(-4, 9), min_size=3, max_size=3), st.integers(1, 12))
def test_crop_equals_numpy_padding_and_goes_back(geometry, start, size):
    volume = noise(geometry)
    result = crop(volume, start, (size, size, size), fill=-9)
    padded = np.pad(volume.array[0], 32, constant_values=-9)
    expected = padded[tuple(slice(32 + s, 32 + s + size) for s in start)]
    assert np.array_equal(result.array[0], expected)
    assert np.array_equal(resample_to(volume, result.geometry, fill=-9).array, result.array)
    whole = crop(crop(volume, (-3, -3, -3), np.add(geometry.shape, 6)), (3, 3, 3), geometry.shape)
    assert np.array_equal(whole.array, volume.array)
    assert whole.geometry.isclose(geometry)


@some
@given(grids(far=False, max_size=12), grids(far=False, sheared=True, max_size=9, max_angle_deg=45))
def test_images_equal_scipy_on_any_pair_of_grids(source, target):
    target = Geometry(target.shape, moved_to(target, source))
    volume = noise(source)
    result = resample_to(volume, target, fill=-7).array[0]
    coordinates = np.moveaxis(indices_in(source, target), -1, 0)
    expected = ndimage.map_coordinates(volume.array[0].astype(np.float64), coordinates, order=1, mode="nearest")
    seen = inside(source, target, -0.499)
    outside = ~inside(source, target, -0.501)
    assert np.allclose(result[seen], expected[seen], atol=1e-4)
    assert (result[outside] == -7).all()


@some
@given(grids(far=False, max_size=12), grids(far=False, sheared=True, max_size=9, max_angle_deg=45))
def test_labels_equal_scipy_away_from_ties(source, target):
    target = Geometry(target.shape, moved_to(target, source))
    volume = noise(source, unit="label")
    result = resample_to(volume, target).array[0]
    assert result.dtype == np.uint8
    indices = indices_in(source, target)
    clear = (np.abs(indices - np.floor(indices) - 0.5) > 1e-3).all(axis=-1)
    expected = ndimage.map_coordinates(volume.array[0], np.moveaxis(indices, -1, 0), order=0, mode="grid-constant")
    assert np.array_equal(result[clear], expected[clear])


def moved_to(target, source):
    affine = target.affine.copy()
    affine[:3, 3] += source.centre_mm - target.centre_mm
    return affine


@some
@given(grids(far=False, max_size=8), grids(far=False, max_size=6))
def test_images_equal_simpleitk_in_world_space(source, target):
    target = Geometry(target.shape, moved_to(target, source))
    volume = noise(source)
    image = placed(sitk.GetImageFromArray(volume.array[0].T), source)
    reference = placed(sitk.Image([int(n) for n in target.shape], sitk.sitkFloat32), target)
    expected = sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), sitk.sitkLinear, -7.0)).T
    clear = inside(source, target, -0.499) | ~inside(source, target, -0.501)
    assert np.allclose(resample_to(volume, target, fill=-7).array[0][clear], expected[clear], atol=1e-4)


def placed(image, geometry):
    lps = np.diag([-1, -1, 1])
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin((lps @ geometry.origin_mm).tolist())
    image.SetDirection((lps @ geometry.affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    return image


@some
@given(grids(far=False, sheared=True, max_size=9), st.tuples(*(st.floats(0.4, 4) for _ in range(3))))
def test_a_ramp_in_mm_stays_the_same_ramp_on_any_grid(geometry, spacing_mm):
    result = respace(ramp(geometry), spacing_mm)
    expected = ramp(result.geometry).array
    seen = inside(geometry, result.geometry, 0)
    assert np.allclose(result.array[:, seen], expected[:, seen], atol=0.02)


@pytest.mark.parametrize("angle_deg", [0.0, 20.0, 45.0])
@pytest.mark.parametrize("shear", [0.0, 0.2])
def test_balls_keep_their_place_through_an_oblique_grid_and_back(angle_deg, shear):
    source = grid((90, 90, 60), spacing_mm=(1, 1, 1.5), orientation="LPS", angle_deg=12.0)
    away = grid((100, 100, 100), orientation="PIR", angle_deg=angle_deg, shear=shear, centre_mm=(1.3, 0.4, -0.2))
    there = resample_to(balls(source), away)
    back = resample_to(there, source)
    for label, (centre, radius) in BALLS_MM.items():
        assert np.linalg.norm(centroid_mm(there, label) - centre) < 0.15
        volume_mm3 = (there.array == label).sum() * abs(np.linalg.det(away.affine[:3, :3]))
        assert volume_mm3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
        both = ((back.array == label) & (balls(source).array == label)).sum()
        assert 2 * both / ((back.array == label).sum() + (balls(source).array == label).sum()) > 0.93


def test_a_left_ball_stays_left():
    volume = reorient(balls(grid((70, 70, 50), orientation="LPI")), "RAS")
    assert np.argwhere(volume.array[0] == 1)[:, 0].mean() < np.argwhere(volume.array[0] == 2)[:, 0].mean()


@some
@given(grids(far=False, max_size=7), grids(far=False, sheared=True, max_size=7))
def test_argmax_of_resampled_scores_equals_the_definition(source, target):
    target = Geometry(target.shape, moved_to(target, source))
    scores = noise(source, channels=4).array
    labels = resample_argmax(scores, source, target, background=2)
    coordinates = np.moveaxis(indices_in(source, target), -1, 0)
    moved = np.stack(
        [ndimage.map_coordinates(s.astype(np.float64), coordinates, order=1, mode="nearest") for s in scores]
    )
    ordered = np.sort(moved, axis=0)
    seen = inside(source, target, -0.499) & (ordered[-1] - ordered[-2] > 1e-3)
    assert np.array_equal(labels[seen], moved.argmax(axis=0)[seen])
    assert (labels[~inside(source, target, -0.501)] == 2).all()


def test_argmax_on_a_flipped_grid_is_exact_and_of_the_smallest_type():
    source = grid((4, 5, 6), orientation="LPS")
    scores = noise(source, channels=300).array
    labels = resample_argmax(scores, source, source.reoriented("RAS"))
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, scores.argmax(axis=0)[::-1, ::-1])
    assert resample_argmax(scores[:3], source, source).dtype == np.uint8
    with pytest.raises(GeometryError, match="scores"):
        resample_argmax(scores[:, 1:], source, source)


@pytest.mark.parametrize(("unit", "fill"), [("HU", -1024), ("label", 0), ("arbitrary", 3)])
def test_padding_takes_the_value_of_the_unit(unit, fill):
    array = np.full((1, 2, 2, 2), 3, dtype=np.int16)
    volume = Volume(array, grid((2, 2, 2)), unit)
    result = crop(volume, (-1, 0, 0), (2, 2, 2))
    assert (result.array[0, 0] == fill).all()
    assert result.array.dtype == np.int16
    far = resample_to(volume, grid((2, 2, 2), centre_mm=(100.3, 0.2, 0)))
    assert (far.array == fill).all()


def test_images_become_float32_and_labels_keep_their_type():
    geometry = grid((4, 4, 4))
    shifted = grid((4, 4, 4), centre_mm=(0.3, 0, 0))
    for dtype in (np.uint8, np.int16, np.float16, np.float32):
        image = Volume(np.ones((1, 4, 4, 4), dtype=dtype), geometry, "arbitrary")
        assert resample_to(image, shifted).array.dtype == np.float32
        assert resample_to(image, geometry).array.dtype == np.float32
    for dtype in (np.uint8, np.uint16, np.int32):
        label = Volume(np.ones((1, 4, 4, 4), dtype=dtype), geometry, "label")
        assert resample_to(label, shifted).array.dtype == dtype


def test_a_box_that_misses_the_volume_is_all_fill():
    volume = noise(grid((3, 3, 3)))
    for start in ((9, 0, 0), (-9, 0, 0)):
        assert (crop(volume, start, (2, 2, 2), fill=5).array == 5).all()


def test_an_array_that_does_not_fit_its_grid_is_refused():
    for array in (np.zeros((2, 2, 2)), np.zeros((1, 2, 2, 3))):
        with pytest.raises(GeometryError) as caught:
            Volume(array, grid((2, 2, 2)), "HU")
        assert caught.value.code == "E_SHAPE"
    with pytest.raises(GeometryError, match="unit"):
        Volume(np.zeros((1, 2, 2, 2)), grid((2, 2, 2)), "mm")
