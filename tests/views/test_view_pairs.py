from __future__ import annotations

import numpy as np
import pytest
from array_cases import landmark_error, world_case, world_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import ConfigError
from medssl.views import OverlapPair


def common_share(view, case, voxels):
    """Share of the first crop that lies in the second, from the affines alone."""
    to_case = np.linalg.inv(case.affine) @ view["views_affine"]
    size = np.diagonal(to_case, axis1=1, axis2=2)[:, :3] * voxels
    start = to_case[:, :3, 3] - size / np.array(voxels) / 2
    common = np.minimum(*(start + size)) - np.maximum(*start)
    return np.prod(np.maximum(common, 0) / size[0])


@settings(max_examples=80, deadline=None)
@given(
    world_cases,
    st.tuples(*[st.integers(1, 8)] * 3).filter(lambda v: max(v) > 1),
    st.none() | st.just((6.0, 5.0, 7.0)),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**32),
)
def test_the_overlap_is_exactly_the_one_drawn_and_landmarks_lie_where_the_affines_say(
    case, voxels, crop_mm, low, width, seed
):
    high = low + width * (1 - low)
    sampler = OverlapPair(voxels, min_overlap=low, max_overlap=high, crop_mm=crop_mm)
    view = sampler([case], np.random.default_rng(seed))
    assert view["views"].shape[:2] == (2, 3)
    assert low - 1e-6 <= view["overlap"] <= high + 1e-6
    assert view["overlap"] == pytest.approx(common_share(view, case, voxels), abs=1e-6)
    for number in range(2):
        error = landmark_error(
            case, view["views"][number], view["views_to_box"][number], view["views_affine"][number], voxels
        )
        assert np.all(error < 1e-3)


def test_the_overlap_is_drawn_evenly_and_every_direction_occurs():
    case = world_case((40, 40, 40))
    rng = np.random.default_rng(0)
    views = [OverlapPair((8, 8, 8), min_overlap=0.2, max_overlap=0.8)([case], rng) for _ in range(300)]
    overlaps = np.array([float(view["overlap"]) for view in views])
    assert overlaps.mean() == pytest.approx(0.5, abs=0.03)
    assert overlaps.std() == pytest.approx(0.6 / np.sqrt(12), abs=0.02)
    to_case = [np.linalg.inv(case.affine) @ view["views_affine"] for view in views]
    ways = np.array([matrices[1, :3, 3] - matrices[0, :3, 3] for matrices in to_case])
    assert (np.abs((ways > 0).mean(axis=0) - 0.5) < 0.1).all()
    assert np.abs(np.corrcoef(np.abs(ways).T) - np.eye(3)).max() < 0.6


def test_both_crops_lie_inside_a_volume_that_can_hold_them():
    case = world_case((20, 20, 5))
    for seed in range(50):
        view = OverlapPair((12, 12, 5), min_overlap=0.3, max_overlap=0.4)([case], np.random.default_rng(seed))
        assert view["note_padded"] == 0
        assert view["note_anywhere"] == 1  # the case has no body mask


def test_a_volume_too_small_for_both_is_filled_and_the_share_is_kept():
    case = world_case((9, 9, 5))
    view = OverlapPair((8, 8, 5), min_overlap=0.2, max_overlap=0.2)([case], np.random.default_rng(0))
    assert view["overlap"] == pytest.approx(0.2)
    assert common_share(view, case, (8, 8, 5)) == pytest.approx(0.2)
    assert view["note_padded"] > 0.1


def test_a_full_overlap_is_the_same_crop_twice():
    view = OverlapPair((4, 4, 4), min_overlap=1.0)([world_case()], np.random.default_rng(0))
    np.testing.assert_array_equal(view["views"][0], view["views"][1])
    np.testing.assert_array_equal(view["views_to_box"], np.stack([np.eye(4)] * 2))


def test_equal_generators_give_equal_views():
    one, other = (OverlapPair((6, 6, 6))([world_case()], np.random.default_rng(5)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("shares", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_shares_out_of_order_are_refused(shares):
    with pytest.raises(ConfigError, match="must rise from above 0 to at most 1"):
        OverlapPair((4, 4, 4), min_overlap=shares[0], max_overlap=shares[1])


def test_crops_of_one_voxel_are_refused():
    with pytest.raises(ConfigError, match="cannot overlap in part"):
        OverlapPair((1, 1, 1))
