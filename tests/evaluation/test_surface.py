"""Surface distances against brute force, scipy's distance transform, SimpleITK's contours and DeepMind's areas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from phantoms import rotation
from scipy import ndimage, spatial

from medssl.errors import CaseError
from medssl.evaluation.surface import diagonal_mm, surface_distances, surface_elements
from medssl.geometry import Geometry


def grid(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape, np.diag((*spacing, 1.0)))


def brute_surface(mask: np.ndarray) -> np.ndarray:
    """Indices of mask voxels with a face neighbour outside the mask or outside the image."""
    points = []
    for index in np.argwhere(mask):
        for axis, step in itertools.product(range(3), (-1, 1)):
            if mask.shape[axis] == 1:
                continue
            near = index.copy()
            near[axis] += step
            if not 0 <= near[axis] < mask.shape[axis] or not mask[tuple(near)]:
                points.append(index)
                break
    return np.array(points)


def contour_sitk(mask: np.ndarray) -> np.ndarray:
    """Surface voxels by SimpleITK; an axis with one voxel is no axis, outside is background."""
    padded = np.pad(mask.squeeze(), 1).astype(np.uint8)
    contour = sitk.GetArrayFromImage(sitk.LabelContour(sitk.GetImageFromArray(padded), fullyConnected=False))
    return contour[(slice(1, -1),) * contour.ndim].astype(bool).reshape(mask.shape)


def random_mask(rng: np.random.Generator, shape: tuple[int, int, int], kind: str) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    if kind == "one":
        mask[tuple(rng.integers(0, shape))] = True
    elif kind == "full":
        mask[:] = True
    elif kind == "noise":
        mask = rng.random(shape) < rng.uniform(0.05, 0.9)
    else:
        smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
        mask = smooth > np.quantile(smooth, rng.uniform(0.3, 0.95))
    if not mask.any():
        mask[0, 0, 0] = True
    return mask


def directed(surface: np.ndarray, other: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    return ndimage.distance_transform_edt(~other, sampling=spacing)[surface]


def check_against_oracles(seed: int) -> None:
    """All measures of one random pair of masks, on an anisotropic and rotated grid."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(2, 12, size=3))
    if seed % 7 == 0:
        shape = (*shape[:2], 1) if seed % 2 else (1, *shape[1:])
    kinds = ("blob", "blob", "noise", "one", "full")
    prediction, reference = (random_mask(rng, shape, str(rng.choice(kinds))) for _ in range(2))
    spacing = rng.uniform(0.3, 4, size=3)
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng.normal(size=3), rng.uniform(0, 90)) @ np.diag(spacing)
    affine[:3, 3] = rng.normal(0, 500, size=3)
    geometry = Geometry(shape, affine)
    tolerance = rng.uniform(0, 4)

    found = surface_distances(prediction, reference, geometry=geometry)
    surface_p, surface_r = contour_sitk(prediction), contour_sitk(reference)
    to_r, to_p = directed(surface_p, surface_r, spacing), directed(surface_r, surface_p, spacing)
    np.testing.assert_allclose(np.sort(found.to_reference), np.sort(to_r), atol=1e-6)
    np.testing.assert_allclose(np.sort(found.to_prediction), np.sort(to_p), atol=1e-6)
    table = spatial.distance.cdist(*(brute_surface(mask) @ affine[:3, :3].T for mask in (prediction, reference)))
    nearest_r, nearest_p = table.min(axis=1), table.min(axis=0)
    assert found.percentile_mm(100) == pytest.approx(max(nearest_r.max(), nearest_p.max()), abs=1e-6)
    expected = max(np.percentile(nearest_r, 95), np.percentile(nearest_p, 95))
    assert found.percentile_mm(95) == pytest.approx(expected, abs=1e-6)
    both = np.concatenate((nearest_r, nearest_p))
    assert found.mean_mm() == pytest.approx(both.mean(), abs=1e-6)
    assert found.share_within(tolerance) == pytest.approx((both <= tolerance + 1e-6).mean(), abs=1e-12)

    if min(shape) > 1:
        elements = surface_elements(prediction, reference, geometry=geometry)
        areas, kernel = create_table_neighbour_code_to_surface_area(spacing.tolist())
        codes_p, codes_r = (
            ndimage.correlate(np.pad(mask, 1).astype(np.int64), kernel.squeeze().numpy(), mode="constant", origin=-1)
            for mask in (prediction, reference)
        )
        edge_p, edge_r = ((codes > 0) & (codes < 255) for codes in (codes_p, codes_r))
        distances = (directed(edge_p, edge_r, spacing), directed(edge_r, edge_p, spacing))
        weights = (areas.numpy()[codes_p[edge_p]], areas.numpy()[codes_r[edge_r]])
        for ours, theirs in zip((elements.to_reference, elements.to_prediction), distances, strict=True):
            np.testing.assert_allclose(np.sort(ours), np.sort(theirs), atol=1e-6)
        assert elements.weights is not None
        for ours, theirs in zip(elements.weights, weights, strict=True):
            np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-5)
        within, area = np.concatenate(distances) <= tolerance + 1e-6, np.concatenate(weights)
        assert elements.share_within(tolerance) == pytest.approx(area[within].sum() / area.sum(), abs=1e-6)


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_all_measures_equal_independent_oracles_on_random_masks(start: int) -> None:
    for seed in range(start, start + 20):
        check_against_oracles(seed)


@pytest.mark.slow
def test_all_measures_equal_independent_oracles_on_500_random_masks() -> None:
    for seed in range(500):
        check_against_oracles(1000 + seed)


@pytest.mark.parametrize("seed", range(3))
def test_surface_distances_equal_brute_force_in_world_millimetres_on_a_sheared_oblique_grid(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    shape = (9, 8, 7)
    affine = np.eye(4)
    affine[:3, :3] = np.diag((1.0, 0.6, 3.0)) + rng.uniform(-0.3, 0.3, size=(3, 3))
    affine[:3, 3] = (1e5, -500, 3)
    prediction, reference = random_mask(rng, shape, "blob"), random_mask(rng, shape, "blob")
    found = surface_distances(prediction, reference, geometry=Geometry(shape, affine))
    surface_p = brute_surface(prediction) @ affine[:3, :3].T
    surface_r = brute_surface(reference) @ affine[:3, :3].T
    table = spatial.distance.cdist(surface_p, surface_r)
    np.testing.assert_allclose(np.sort(found.to_reference), np.sort(table.min(axis=1)), atol=1e-9)
    np.testing.assert_allclose(np.sort(found.to_prediction), np.sort(table.min(axis=0)), atol=1e-9)


def test_the_area_of_a_box_on_a_sheared_grid_is_that_of_its_faces_without_the_cut_edges() -> None:
    """Faces of n x m x k voxels shrink by half a voxel at each edge, where slanted pieces take their place."""
    affine = np.eye(4)
    affine[:3, :3] = ((2.0, 0.5, 0.0), (0.0, 1.0, 0.3), (0.0, 0.0, 3.0))
    shape, sizes = (12, 12, 12), np.array((5, 4, 6))
    mask = np.zeros(shape, dtype=bool)
    mask[2:7, 3:7, 2:8] = True
    found = surface_elements(mask, mask, geometry=Geometry(shape, affine))
    assert found.weights is not None
    step = affine[:3, :3]
    expected = 0.0
    for axis in range(3):
        i, j = (other for other in range(3) if other != axis)
        flat = np.linalg.norm(np.cross(step[:, i], step[:, j]))
        expected += 2 * (sizes[i] - 1) * (sizes[j] - 1) * flat
        for sign in (-1, 1):  # two pairs of edges along this axis
            slant = np.linalg.norm(np.cross(step[:, axis], (step[:, i] + sign * step[:, j]) / 2))
            expected += 2 * (sizes[axis] - 1) * slant
    for signs in itertools.product((-1, 1), repeat=2):  # eight corners, equal in opposite pairs
        a, b, c = (step * (1, *signs)).T / 2
        expected += 2 * np.linalg.norm(np.cross(b - a, c - a)) / 2
    assert found.weights[0].sum() == pytest.approx(expected)


def test_in_an_image_of_one_slice_the_surface_is_the_outline() -> None:
    mask = np.zeros((9, 9, 1), dtype=bool)
    mask[2:7, 2:7] = True
    other = mask.copy()
    other[4, 4] = False  # a hole in the middle adds four inner outline voxels
    geometry = grid((9, 9, 1), (2.0, 1.0, 7.0))
    found = surface_distances(mask, other, geometry=geometry)
    assert len(found.to_reference) == 16
    assert len(found.to_prediction) == 20
    elements = surface_elements(mask, other, geometry=geometry)
    assert elements.weights is not None
    corner = np.hypot(1.0, 0.5)
    assert elements.weights[0].sum() == pytest.approx(2 * 4 * (2.0 + 1.0) + 4 * corner)
    assert elements.weights[1].sum() == pytest.approx(2 * 4 * (2.0 + 1.0) + 8 * corner)


@pytest.mark.parametrize("shape", [(9, 1, 1), (1, 1, 1)])
def test_in_a_line_or_a_point_elements_are_voxels(shape: tuple[int, int, int]) -> None:
    mask = np.ones(shape, dtype=bool)
    other = mask.copy()
    other[3:] = False
    for measure in (surface_distances, surface_elements):
        found = measure(mask, other, geometry=grid(shape, (2.0, 1.0, 1.0)))
        assert found.percentile_mm(100) == (12.0 if shape[0] > 1 else 0.0)  # from voxel 8 to voxel 2
        assert found.share_within(0.0) == (0.5 if shape[0] > 1 else 1.0)


def test_a_distance_equal_to_the_tolerance_is_within_it_however_it_is_rounded() -> None:
    shape = (12, 5, 5)
    mask, other = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    mask[3, 2, 2] = other[6, 2, 2] = True
    found = surface_distances(mask, other, geometry=grid(shape, (0.1, 1.0, 1.0)))
    assert found.to_reference[0] > 0.3
    assert found.share_within(0.3) == 1
    assert found.share_within(0.29) == 0


def test_the_two_definitions_differ_and_both_are_theirs_on_a_known_mask() -> None:
    """One voxel against the same voxel and a neighbour: counted 2 of 3 voxels, weighed by area much less."""
    shape = (7, 7, 7)
    one, two = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    one[3, 3, 3] = two[3, 3, 3] = two[4, 3, 3] = True
    assert surface_distances(one, two, geometry=grid(shape)).share_within(0.5) == pytest.approx(2 / 3)
    elements = surface_elements(one, two, geometry=grid(shape))
    assert elements.weights is not None
    triangle, half_side = np.sqrt(3) / 8, np.sqrt(2) / 2
    assert elements.weights[0].sum() == pytest.approx(8 * triangle)
    assert elements.weights[1].sum() == pytest.approx(8 * triangle + 4 * half_side)
    shared = 4 * triangle + 4 * half_side + 8 * triangle
    assert elements.share_within(0.5) == pytest.approx(shared / (shared + 4 * triangle))


def test_diagonal_is_the_largest_distance_between_corner_voxels_also_with_shear() -> None:
    assert diagonal_mm(grid((4, 5, 13), (1, 1, 1))) == pytest.approx(13.0)
    affine = np.eye(4)
    affine[0, 1] = 1.0
    assert diagonal_mm(Geometry((2, 2, 1), affine)) == pytest.approx(np.sqrt(5))


@pytest.mark.parametrize("measure", [surface_distances, surface_elements])
def test_an_empty_mask_has_no_surface(measure: object) -> None:
    mask = np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(CaseError, match="a mask is empty") as error:
        measure(mask, ~mask, geometry=grid((2, 2, 2)))  # type: ignore[operator]
    assert error.value.code == "E_EMPTY_MASK"
