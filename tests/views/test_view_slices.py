from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from array_cases import ArrayCase, coordinate_case, landmark_error, world_case, world_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import CaseError, ConfigError
from medssl.views import PLANES, SliceViews

AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # rows, columns, normal


@settings(max_examples=60, deadline=None)
@given(
    world_cases,
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.none() | st.just((9.0, 6.0)),
    st.none() | st.floats(0.5, 12.0),
    st.integers(0, 2**32),
)
def test_landmarks_of_every_plane_lie_where_the_affine_says(case, voxels, crop_mm, slab_mm, seed):
    sampler = SliceViews(voxels, num_slices=4, crop_mm=crop_mm, slab_mm=slab_mm, margin=0.2)
    view = sampler([case], np.random.default_rng(seed))
    assert view["slices"].shape[-1] == 1
    for number, plane in enumerate(view["slices_plane"]):
        rows, columns, normal = list(AXES.values())[plane]
        affine = view["slices_affine"][number]
        error = landmark_error(case, view["slices"][number], view["slices_to_box"][number], affine, (*voxels, 1))
        assert np.all(error < 1e-3)
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        expected = case.affine[:3, [rows, columns, normal]] / np.array(case.spacing_mm)[[rows, columns, normal]]
        np.testing.assert_allclose(directions, expected, atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), view["slices_spacing_mm"][number])
        middle = case.affine @ (*((np.array(case.shape) - 1) / 2), 1)
        centre = affine @ ((voxels[0] - 1) / 2, (voxels[1] - 1) / 2, 0, 1)
        assert view["slices_position_mm"][number] == pytest.approx((centre - middle)[:3] @ expected[:, 2], abs=1e-6)


def test_rows_and_columns_are_those_of_the_plane():
    case = coordinate_case((12, 10, 8))
    for plane, (rows, columns, normal) in AXES.items():
        view = SliceViews((4, 3), planes=[plane])([case], np.random.default_rng(0))
        assert list(PLANES)[view["slices_plane"][0]] == plane
        found = view["slices"][0, 0, :, :, 0]
        steps = (10000, 100, 1)
        assert (np.diff(found, axis=0) == steps[rows]).all()
        assert (np.diff(found, axis=1) == steps[columns]).all()
        place = int(found[0, 0]) // steps[normal] % 100
        assert view["slices_position_mm"][0] == place + 0.5 - case.shape[normal] / 2


def test_planes_take_turns():
    view = SliceViews((4, 4), num_slices=7)([world_case()], np.random.default_rng(0))
    assert sorted(Counter(view["slices_plane"].tolist()).values()) == [2, 2, 3]
    firsts = {
        int(SliceViews((4, 4))([world_case()], np.random.default_rng(seed))["slices_plane"][0]) for seed in range(20)
    }
    assert firsts == {0, 1, 2}


def test_pixels_are_isotropic_where_the_size_is_given_in_mm():
    case = world_case((20, 20, 8), spacing_mm=(0.8, 1.0, 4.0))
    view = SliceViews((6, 8), num_slices=3, crop_mm=(9.0, 12.0))([case], np.random.default_rng(0))
    np.testing.assert_allclose(view["slices_spacing_mm"][:, :2], 1.5)
    thickness = [case.spacing_mm[list(AXES.values())[plane][2]] for plane in view["slices_plane"]]
    np.testing.assert_allclose(view["slices_spacing_mm"][:, 2], thickness)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_slab_is_the_mean_or_the_maximum_of_its_slices(mode):
    image = np.random.default_rng(0).integers(-500, 500, (2, 9, 8, 7)).astype(np.int16)
    case = ArrayCase({"image": image}, (1.0, 1.0, 2.0))
    sampler = SliceViews((9, 8), planes=["axial"], slab_mm=6.4, slab_mode=mode)
    for seed in range(6):
        view = sampler([case], np.random.default_rng(seed))
        middle = view["slices_position_mm"][0] / 2 + 3.5
        start = round(middle - 1.5)
        part = image[..., start : start + 3]
        expected = part.max(axis=-1) if mode == "max" else np.rint(part.mean(axis=-1))
        np.testing.assert_array_equal(view["slices"][0, ..., 0], expected)
        assert view["slices"].dtype == np.int16
        assert view["slices_spacing_mm"][0, 2] == 6.0
    assert SliceViews((9, 8), planes=["axial"], slab_mm=99.0)([case], np.random.default_rng(0))["note_padded"] == 0


def test_a_jitter_keeps_slices_near_the_middle_of_the_body():
    body = np.zeros((1, 40, 40, 40), np.uint8)
    body[0, 10:40, 10:40, 10:40] = 1
    case = coordinate_case((40, 40, 40), body=body)
    for jitter in (0.0, 0.4):
        sampler = SliceViews((4, 4), num_slices=3, jitter=jitter)
        found = [sampler([case], np.random.default_rng(seed))["slices_position_mm"] for seed in range(30)]
        assert np.abs(found).max() <= 15 * jitter + 0.5
        assert np.abs(found).max() > 10 * jitter
    high = SliceViews((4, 4), jitter=0.2, region={"SI": (0.8, 1.0)})
    views = [high([case], np.random.default_rng(seed))["slices_body"].mean(axis=1)[0] for seed in range(20)]
    assert min(view[2] for view in views) > 0.75
    assert all(0.35 < view[0] < 0.65 for view in views)


def test_equal_generators_give_equal_views():
    one, other = (SliceViews((6, 6), num_slices=3)([world_case()], np.random.default_rng(5)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("options", [{"crop_mm": (4.0, 4.0)}, {"slab_mm": 3.0}])
def test_sizes_in_mm_of_a_case_without_voxel_size_are_refused(options):
    case = ArrayCase({"image": np.zeros((1, 8, 8, 8), np.int16)}, is_metric=False)
    with pytest.raises(CaseError, match=f"{next(iter(options))} needs it") as caught:
        SliceViews((4, 4), **options)([case], np.random.default_rng(0))
    assert caught.value.code == "E_SPACING_UNKNOWN"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"crop_voxels": (4, 4, 4)}, "three whole numbers"),
        ({"planes": ()}, "choose from axial, coronal, sagittal"),
        ({"num_slices": 0}, "num_slices 0"),
        ({"jitter": 2.0}, "jitter 2.0"),
        ({"slab_mm": 0.0}, "slab_mm is"),
        ({"crop_mm": (4.0, 4.0, 4.0)}, "crop_mm is .* 2 numbers"),
        ({"margin": (0.1, -0.1)}, "margin"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        SliceViews(**{"crop_voxels": (4, 4), **options})
