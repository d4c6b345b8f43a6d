"""Scores carried to the source grid slab by slab, against resampling of the whole volume and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import grid, grids, noise, voxel_positions_mm
from scipy import ndimage

from medssl.evaluation.carry import carry
from medssl.evaluation.sliding_window import Slab
from medssl.geometry import Geometry


def slabs(scores: np.ndarray, axis: int, cuts: list[int]) -> list[Slab]:
    """The scores in pieces; each but the first begins with the last plane of the one before."""
    planes = np.moveaxis(scores, 1 + axis, 0)
    size = len(planes)
    ends = sorted({min(cut, size) for cut in cuts} | {size})
    starts = [0, *(end - 1 for end in ends[:-1])]
    return [
        Slab(torch.from_numpy(np.ascontiguousarray(planes[start:end])), start, axis)
        for start, end in zip(starts, ends, strict=True)
    ]


def moved_to(target: Geometry, source: Geometry) -> Geometry:
    affine = target.affine.copy()
    affine[:3, 3] += source.centre_mm - target.centre_mm
    return Geometry(target.shape, affine)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    source=grids(far=False, max_size=8),
    target=grids(far=False, sheared=True, max_size=8, max_angle_deg=45),
    axis=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 8), max_size=3),
)
def test_labels_equal_the_best_of_scores_interpolated_by_scipy(
    source: Geometry, target: Geometry, axis: int, cuts: list[int]
) -> None:
    check(source, moved_to(target, source), axis, cuts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, 9),) * 3),
    target_shape=st.tuples(*(st.integers(1, 9),) * 3),
    spacing=st.tuples(*(st.floats(0.5, 2.5),) * 3),
    orientation=st.sampled_from(["RAS", "LPS", "SAR", "IPL", "AIR"]),
    axis=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 9), max_size=3),
)
def test_labels_on_grids_along_the_same_axes_equal_scipy(
    shape: tuple[int, int, int],
    target_shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    orientation: str,
    axis: int,
    cuts: list[int],
) -> None:
    source = grid(shape, spacing_mm=spacing)
    check(source, moved_to(grid(target_shape, orientation=orientation), source), axis, cuts)


def check(source: Geometry, target: Geometry, axis: int, cuts: list[int]) -> None:
    scores = noise(source, channels=4).array.astype(np.float32)
    labels = carry(slabs(scores, axis, cuts), source, target, num_classes=4, background=2)
    assert labels.dtype == np.uint8
    assert labels.shape == target.shape
    indices = source.to_index(voxel_positions_mm(target))
    coordinates = np.moveaxis(indices, -1, 0)
    moved = np.stack([ndimage.map_coordinates(s.astype(float), coordinates, order=1, mode="nearest") for s in scores])
    ordered = np.sort(moved, axis=0)
    last = np.array(source.shape) - 1
    seen = ((indices > -0.499) & (indices < last + 0.499)).all(axis=-1)
    clear = seen & (ordered[-1] - ordered[-2] > 0.02 * (ordered[-1] - ordered[0]))
    outside = ((indices < -0.501) | (indices > last + 0.501)).any(axis=-1)
    assert np.array_equal(labels[clear], moved.argmax(axis=0)[clear])
    assert (labels[outside] == 2).all()


def test_whole_voxels_are_moved_exactly_and_ties_go_to_the_lower_class() -> None:
    source = grid((5, 4, 3), orientation="RAS")
    scores = np.random.default_rng(0).integers(0, 2, (300, 5, 4, 3)).astype(np.float32)
    labels = carry(slabs(scores, 0, [2, 4]), source, source.reoriented("SLP"), num_classes=300)
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, scores.argmax(axis=0)[::-1, ::-1].transpose(2, 0, 1))


def test_a_target_elsewhere_is_background() -> None:
    source = grid((4, 4, 4))
    scores = np.ones((2, 4, 4, 4), np.float32)
    for angle in (0.0, 20.0):
        far = grid((3, 3, 3), centre_mm=(900.0, 0.0, 0.0), angle_deg=angle)
        assert (carry(slabs(scores, 1, [2]), source, far, num_classes=2, background=1) == 1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_at_seams_equal_one_slab(axis: int) -> None:
    source = grid((9, 8, 7), spacing_mm=(1.0, 1.0, 1.0))
    target = moved_to(grid((20, 17, 15), spacing_mm=(0.45, 0.5, 0.5)), source)
    scores = noise(source, channels=3).array.astype(np.float32)
    whole = carry(slabs(scores, axis, []), source, target, num_classes=3)
    assert np.array_equal(carry(slabs(scores, axis, [1, 2, 5]), source, target, num_classes=3), whole)
