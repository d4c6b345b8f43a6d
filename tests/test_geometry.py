from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import ORIENTATIONS, grid, grids

from medssl.errors import GeometryError
from medssl.geometry import Geometry

many = settings(max_examples=200, deadline=None, derandomize=True)
some = settings(max_examples=50, deadline=None, derandomize=True)
points = st.lists(st.tuples(*(st.floats(-20, 20) for _ in range(3))), min_size=1, max_size=4)


@many
@given(grids(sheared=True, max_angle_deg=45), points)
def test_index_to_world_and_back_is_the_identity(geometry, ijk):
    world = geometry.to_world(ijk)
    assert np.allclose(world, nibabel.affines.apply_affine(geometry.affine, np.array(ijk)), atol=1e-9)
    assert np.allclose(geometry.to_index(world), ijk, atol=1e-7)


@many
@given(grids())
def test_world_positions_equal_those_of_simpleitk(geometry):
    image = sitk.Image([int(n) for n in geometry.shape], sitk.sitkUInt8)
    lps = np.diag([-1, -1, 1])
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin((lps @ geometry.origin_mm).tolist())
    image.SetDirection((lps @ geometry.affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    last = [n - 1 for n in geometry.shape]
    expected = lps @ np.array(image.TransformIndexToPhysicalPoint([int(n) for n in last]))
    assert np.allclose(geometry.to_world(last), expected, atol=1e-6)
    assert np.allclose(geometry.corners_mm()[-1], expected, atol=1e-6)


@some
@given(grids(sheared=True))
def test_orientation_equals_that_of_nibabel(geometry):
    assert geometry.orientation == "".join(nibabel.aff2axcodes(geometry.affine))


@many
@given(grids(sheared=True), st.sampled_from(ORIENTATIONS))
def test_reoriented_equals_nibabel(geometry, orientation):
    array = np.zeros(geometry.shape, dtype=np.uint8)
    image = nibabel.Nifti1Image(array, geometry.affine)
    start = nibabel.io_orientation(geometry.affine)
    change = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(orientation))
    expected = image.as_reoriented(change)
    result = geometry.reoriented(orientation)
    assert result.shape == expected.shape
    assert np.allclose(result.affine, expected.affine, atol=1e-6)
    assert result.orientation == orientation


@some
@given(grids(sheared=True, max_angle_deg=45), st.sampled_from(ORIENTATIONS))
def test_reoriented_there_and_back_is_the_identity(geometry, orientation):
    back = geometry.reoriented(orientation).reoriented(geometry.orientation)
    assert back.shape == geometry.shape
    assert np.allclose(back.affine, geometry.affine, atol=1e-8)


def test_a_tie_of_45_degrees_comes_back_to_the_same_axes():
    geometry = grid((3, 4, 5), axis=(0, 0, 1), angle_deg=45.0)
    for orientation in ORIENTATIONS:
        assert geometry.reoriented(orientation).reoriented(geometry.orientation).isclose(geometry)


@some
@given(grids(sheared=True), st.lists(st.integers(-4, 4), min_size=6, max_size=6))
def test_cropped_twice_is_cropped_by_the_sum(geometry, starts):
    first, second = starts[:3], starts[3:]
    twice = geometry.cropped(first, (5, 6, 7)).cropped(second, (2, 3, 4))
    once = geometry.cropped(np.add(first, second).tolist(), (2, 3, 4))
    assert twice.isclose(once, atol_mm=1e-6)
    assert np.allclose(twice.to_world((0, 0, 0)), geometry.to_world(np.add(first, second)), atol=1e-6)


@some
@given(grids(), st.tuples(*(st.floats(0.3, 6) for _ in range(3))))
def test_respaced_keeps_directions_and_centre(geometry, spacing_mm):
    result = geometry.respaced(spacing_mm)
    assert np.allclose(result.spacing_mm, spacing_mm)
    assert np.allclose(result.directions, geometry.directions, atol=1e-9)
    assert np.allclose(result.centre_mm, geometry.centre_mm, atol=1e-6)
    for n, old, new, found in zip(geometry.shape, geometry.spacing_mm, spacing_mm, result.shape, strict=True):
        assert (found - 1) * new < n * old <= (found + 0.05) * new + 1e-9


@some
@given(grids(sheared=True, max_angle_deg=45))
def test_orthogonalised_has_right_angles_and_covers_the_sheared_box(geometry):
    result = geometry.orthogonalised()
    assert result.shear_deg < 1e-5
    assert np.allclose(result.spacing_mm, geometry.spacing_mm)
    inside = result.to_index(geometry.corners_mm())
    assert (inside > -0.56).all()
    assert (inside < np.array(result.shape) - 0.44).all()


@some
@given(grids(max_angle_deg=45))
def test_orthogonalised_leaves_right_angles_alone(geometry):
    assert geometry.orthogonalised().isclose(geometry)


@some
@given(grids(sheared=True))
def test_a_grid_survives_json_to_the_last_bit(geometry):
    back = Geometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert back.shape == geometry.shape
    assert np.array_equal(back.affine, geometry.affine)


@some
@given(grids(far=False), grids(far=False), points)
def test_index_maps_compose_through_the_world(first, second, ijk):
    moved = np.c_[np.array(ijk), np.ones(len(ijk))] @ first.index_map(second).T
    assert np.allclose(moved[:, :3], second.to_index(first.to_world(ijk)), atol=1e-8)


def test_shear_is_the_angle_missing_to_90_degrees():
    assert grid(shear=0.0, angle_deg=20.0).shear_deg == pytest.approx(0, abs=1e-6)
    assert grid(shear=np.tan(np.radians(15))).shear_deg == pytest.approx(15, abs=1e-9)


def test_corner_distance_is_infinite_for_other_shapes_and_in_mm_else():
    one = grid((3, 4, 5))
    assert one.max_corner_distance_mm(grid((3, 4, 6))) == float("inf")
    assert one.max_corner_distance_mm(grid((3, 4, 5), centre_mm=(3, 4, 0))) == pytest.approx(5)
    assert one.isclose(grid((3, 4, 5), centre_mm=(5e-4, 0, 0)))
    assert not one.isclose(grid((3, 4, 5), centre_mm=(5e-3, 0, 0)))


def test_the_affine_cannot_be_changed_afterwards():
    affine = np.eye(4)
    geometry = Geometry((2, 2, 2), affine)
    affine[0, 3] = 7
    assert geometry.origin_mm == (0, 0, 0)
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 3] = 7


@pytest.mark.parametrize(
    ("shape", "affine", "code"),
    [
        ((0, 2, 2), np.eye(4), "E_SHAPE"),
        ((2, 2), np.eye(4), "E_SHAPE"),
        ((2, 2, 2), np.full((4, 4), np.nan), "E_AFFINE"),
        ((2, 2, 2), np.eye(3), "E_AFFINE"),
        ((2, 2, 2), np.ones((4, 4)), "E_AFFINE"),
        ((2, 2, 2), np.diag([1.0, 0, 1, 1]), "E_AFFINE"),
        ((2, 2, 2), np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "E_AFFINE"),
    ],
)
def test_an_impossible_grid_is_refused(shape, affine, code):
    with pytest.raises(GeometryError) as caught:
        Geometry(shape, affine)
    assert caught.value.code == code


def test_wrong_orientations_and_spacings_are_refused():
    for orientation in ("RA", "RRS", "XYZ", "ras"):
        with pytest.raises(GeometryError, match="R/L"):
            grid().reoriented(orientation)
    for spacing_mm in ((1, 1), (1, 1, 0), (1, 1, -1), (1, 1, np.nan)):
        with pytest.raises(GeometryError, match="positive"):
            grid().respaced(spacing_mm)
