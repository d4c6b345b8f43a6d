from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import CaseError
from medssl.views import Box, GridCrops, grid_boxes, overlap_fractions, position_labels
from medssl.views.boxes import union_fraction

triples = st.tuples(*[st.integers(1, 5)] * 3)
places = st.tuples(*[st.integers(-4, 9)] * 3)


def brute_force(target: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of the target's voxels that lie in the base, counted one by one."""
    inside = total = 0
    for voxel in itertools.product(*(range(s, s + n) for s, n in zip(*target, strict=True))):
        total += 1
        inside += all(s <= v < s + n for v, s, n in zip(voxel, *base, strict=True))
    return inside / total


def box_around(centre: Sequence[float], size: Sequence[float]) -> np.ndarray:
    return np.array([[np.subtract(centre, np.divide(size, 2)), size]])


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((48, 48), {0: 1.0}),
        ((96, 96), {0: 0.25, 1: 0.25, 4: 0.25, 5: 0.25}),
        ((72, 120), {0: 0.1875, 1: 0.5625, 4: 0.0625, 5: 0.1875}),
    ],
)
def test_overlap_labels_of_the_4x4_grid_are_those_of_methods_t1(centre, expected):
    bases = grid_boxes((4, 4, 1), (96, 96, 96))
    label = overlap_fractions(box_around((*centre, 48), (96, 96, 96)), bases)[0]
    assert bases.shape == (16, 2, 3)
    assert {int(i): label[i] for i in np.flatnonzero(label)} == expected


def test_overlap_labels_of_a_3d_grid_are_those_of_methods_t1():
    bases = grid_boxes((2, 2, 2), (64, 64, 64))
    label = overlap_fractions(box_around((48, 64, 80), (64, 64, 64)), bases)[0].reshape(2, 2, 2)
    assert label[0, 0, 0] == 0.09375
    assert label[0, 0, 1] == 0.28125
    by_hand = [x * y * z for x in (0.75, 0.25) for y in (0.5, 0.5) for z in (0.25, 0.75)]
    np.testing.assert_array_equal(label.ravel(), by_hand)
    middle = overlap_fractions(box_around((64, 64, 64), (64, 64, 64)), bases)[0]
    np.testing.assert_array_equal(middle, np.full(8, 0.125))


@pytest.mark.parametrize(("grid", "most"), [((4, 4, 1), 4), ((3, 2, 3), 8)])
def test_a_thousand_random_targets_have_labels_that_sum_to_one_with_few_entries(grid, most):
    sampler = GridCrops(grid, (6, 5, 4), num_targets=1000)
    label = position_labels(sampler.draw_targets(np.random.default_rng(0)), sampler.base_boxes)
    np.testing.assert_allclose(label.sum(axis=1), 1, atol=1e-6)
    assert (label > 0).sum(axis=1).max() <= most
    assert label.dtype == np.float32


@settings(max_examples=150, deadline=None)
@given(places, triples, places, triples)
def test_overlap_equals_a_brute_force_voxel_count(start, size, base_start, base_size):
    found = overlap_fractions(np.array([[start, size]], float), np.array([[base_start, base_size]], float))
    assert found.shape == (1, 1)
    assert found[0, 0] == pytest.approx(brute_force((start, size), (base_start, base_size)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2**32))
def test_labels_of_drawn_targets_equal_a_brute_force_voxel_count(grid, crop, seed):
    sampler = GridCrops(grid, crop, num_targets=2)
    targets = sampler.draw_targets(np.random.default_rng(seed))
    label = position_labels(targets, sampler.base_boxes)
    for row, target in zip(label, targets.astype(int), strict=True):
        counted = [brute_force(tuple(target), tuple(base)) for base in sampler.base_boxes.astype(int)]
        np.testing.assert_allclose(row, counted, atol=1e-6)


def test_grid_boxes_run_with_the_first_axis_outermost():
    boxes = grid_boxes((2, 3, 4), (5, 6, 7.5))
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        np.testing.assert_array_equal(boxes[(i * 3 + j) * 4 + k], [[5 * i, 6 * j, 7.5 * k], [5, 6, 7.5]])


def test_a_target_outside_the_grid_raises_as_methods_t7_asks():
    bases = grid_boxes((2, 2, 2), (4, 4, 4))
    targets = np.array([[[0, 0, 0], [4, 4, 4]], [[8, 0, 0], [4, 4, 4]]], float)
    with pytest.raises(CaseError, match="target crop 1 overlaps none of the 8 base crops") as caught:
        position_labels(targets, bases)
    assert caught.value.code == "E_NO_OVERLAP"


def test_a_target_without_volume_is_refused():
    with pytest.raises(CaseError, match="size above 0"):
        overlap_fractions(np.array([[[0, 0, 0], [4, 0, 4]]], float), grid_boxes((1, 1, 1), (4, 4, 4)))


def test_a_box_scales_to_mm():
    assert Box((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)).scaled((1, 0.5, 2)) == Box((1.0, 1.0, 6.0), (4.0, 2.5, 12.0))


@settings(max_examples=80, deadline=None)
@given(places, triples, st.lists(st.tuples(places, triples), min_size=1, max_size=4))
def test_the_share_in_a_union_equals_a_brute_force_voxel_count(start, size, others):
    total = inside = 0
    for voxel in itertools.product(*(range(s, s + n) for s, n in zip(start, size, strict=True))):
        total += 1
        inside += any(
            all(s <= v < s + n for v, s, n in zip(voxel, first, edges, strict=True)) for first, edges in others
        )
    found = union_fraction(np.array([start, size], float), np.array(others, float))
    assert found == pytest.approx(inside / total, abs=1e-12)
