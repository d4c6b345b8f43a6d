from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from array_cases import ArrayCase, coordinate_case, landmark_error, world_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medssl.errors import CaseError, ConfigError
from medssl.views import GridCrops, overlap_fractions, resize_linear


def test_grid_crops_of_a_volume_of_the_grids_size_are_plain_cuts():
    case = coordinate_case((6, 8, 5), spacing_mm=(1.0, 2.0, 3.0))
    view = GridCrops((2, 2, 1), (3, 4, 5), num_targets=3)([case], np.random.default_rng(0))
    assert {name: value.shape for name, value in view.items()} == {
        "bases": (4, 1, 3, 4, 5),
        "bases_to_box": (4, 4, 4),
        "bases_spacing_mm": (4, 3),
        "bases_affine": (4, 4, 4),
        "bases_body": (4, 2, 3),
        "targets": (3, 1, 3, 4, 5),
        "targets_to_box": (3, 4, 4),
        "targets_spacing_mm": (3, 3),
        "targets_affine": (3, 4, 4),
        "targets_body": (3, 2, 3),
        "overlap": (3, 4),
        "base_boxes_mm": (4, 2, 3),
        "target_boxes_mm": (3, 2, 3),
        "note_padded": (),
        "note_anywhere": (),
        "note_constant": (),
    }
    for number, (i, j) in enumerate(itertools.product(range(2), range(2))):
        np.testing.assert_array_equal(view["bases"][number], case.read("image", (3 * i, 4 * j, 0), (3, 4, 5)))
        np.testing.assert_allclose(view["base_boxes_mm"][number], [[3 * i, 8 * j, 0], [3, 8, 15]])
    for crop, box in zip(view["targets"], view["target_boxes_mm"], strict=True):
        start = np.rint(box[0] / (1, 2, 3)).astype(int)
        np.testing.assert_array_equal(crop, case.read("image", start, (3, 4, 5)))


def test_boxes_in_mm_follow_the_anisotropic_resize_and_keep_the_overlaps():
    case = coordinate_case((9, 10, 7), spacing_mm=(2.0, 1.0, 3.0))
    view = GridCrops((3, 2, 2), (4, 4, 4), num_targets=4)([case], np.random.default_rng(1))
    ends = view["base_boxes_mm"].sum(axis=1)
    np.testing.assert_allclose(ends.max(axis=0), (18, 10, 21))
    np.testing.assert_allclose(view["base_boxes_mm"][0], [[0, 0, 0], [6, 5, 10.5]])
    np.testing.assert_allclose(
        overlap_fractions(view["target_boxes_mm"], view["base_boxes_mm"]), view["overlap"], atol=1e-6
    )


def test_every_place_of_a_target_can_be_drawn_and_a_single_cell_axis_stays():
    starts = GridCrops((2, 2, 1), (3, 2, 4), num_targets=400).draw_targets(np.random.default_rng(0))[:, 0]
    assert [sorted(set(column)) for column in starts.T.tolist()] == [[0, 1, 2, 3], [0, 1, 2], [0]]


def test_crop_mode_without_a_cell_cuts_a_window_as_it_is():
    case = coordinate_case((12, 10, 8), spacing_mm=(1.0, 0.5, 2.0))
    sampler = GridCrops((2, 2, 1), (3, 4, 5), position_mode="crop")
    firsts = set()
    for seed in range(12):
        view = sampler([case], np.random.default_rng(seed))
        for crop, box in zip(view["bases"], view["base_boxes_mm"], strict=True):
            start = np.rint(box[0] / (1, 0.5, 2)).astype(int)
            np.testing.assert_array_equal(crop, case.read("image", start, (3, 4, 5)))
        firsts.add(float(view["bases"][0, 0, 0, 0, 0]))
    assert len(firsts) > 3


def test_crop_mode_takes_a_window_of_the_cells_true_size():
    case = coordinate_case((20, 30, 8), spacing_mm=(2.0, 1.0, 3.0))
    sampler = GridCrops((2, 2, 1), (4, 4, 4), position_mode="crop", cell_mm=(12.0, 12.0, 12.0))
    view = sampler([case], np.random.default_rng(0))
    np.testing.assert_allclose(view["base_boxes_mm"][:, 1], np.full((4, 3), 12.0))
    low, high = view["base_boxes_mm"][:, 0].min(axis=0), view["base_boxes_mm"].sum(axis=1).max(axis=0)
    assert (low >= 0).all()
    assert (high <= (40, 30, 24)).all()
    assert view["bases"].min() >= 0


def test_enlarging_equals_scipy_zoom_over_the_same_field_of_view():
    array = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    found = resize_linear(array, (10, 9, 7))
    for channel in range(2):
        expected = ndimage.zoom(array[channel], (2, 1.5, 1), order=1, mode="nearest", grid_mode=True)
        np.testing.assert_allclose(found[channel], expected, atol=1e-5)
    assert found.dtype == np.float32


def test_shrinking_equals_the_antialiased_resize_of_torch():
    array = np.random.default_rng(0).normal(size=(3, 17, 12, 4)).astype(np.float32)
    found = resize_linear(array, (6, 5, 4))
    planes = torch.from_numpy(array).movedim(-1, 1)
    expected = torch.nn.functional.interpolate(planes, size=(6, 5), mode="bilinear", antialias=True).movedim(1, -1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_resizing_to_the_same_shape_keeps_every_bit():
    array = np.random.default_rng(0).normal(size=(1, 5, 6, 7)).astype(np.float32)
    assert np.array_equal(resize_linear(array, (5, 6, 7)), array)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"num_targets": 0}, "must be above 0"), ({"cell_mm": (1.0, 0.0, 1.0)}, "cell_mm is .* 3 numbers above 0")],
)
def test_grid_crops_without_targets_or_cells_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        GridCrops((2, 2, 1), (4, 4, 4), **options)


def test_a_grid_without_cells_is_refused():
    with pytest.raises(ConfigError, match=r"grid is .* three whole numbers above 0"):
        GridCrops((2, 2, 0), (4, 4, 4))


def test_equal_generators_give_equal_grids():
    one, other = (GridCrops((2, 2, 2), (3, 3, 3))([coordinate_case()], np.random.default_rng(5)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_crops_are_of_the_stored_type_unless_the_window_is_resized():
    image = np.random.default_rng(0).integers(-900, 900, (1, 12, 12, 6)).astype(np.int16)
    case = ArrayCase({"image": image})
    cut = GridCrops((2, 2, 1), (3, 3, 3), position_mode="crop")([case], np.random.default_rng(0))
    assert cut["bases"].dtype == cut["targets"].dtype == np.int16
    for options in ({}, {"position_mode": "crop", "cell_mm": (3.0, 3.0, 3.0)}):
        view = GridCrops((2, 2, 1), (3, 3, 3), **options)([case], np.random.default_rng(0))
        assert view["bases"].dtype == view["targets"].dtype == np.float32


def test_cells_in_mm_of_a_case_without_voxel_size_are_refused():
    case = ArrayCase({"image": np.zeros((1, 12, 12, 6), np.int16)}, is_metric=False)
    sampler = GridCrops((2, 2, 1), (3, 3, 3), position_mode="crop", cell_mm=(3.0, 3.0, 3.0))
    with pytest.raises(CaseError, match="cell_mm needs it") as caught:
        sampler([case], np.random.default_rng(0))
    assert caught.value.code == "E_SPACING_UNKNOWN"


@settings(max_examples=30, deadline=None)
@given(world_cases, st.tuples(*[st.integers(1, 2)] * 3), st.tuples(*[st.integers(2, 6)] * 3), st.integers(0, 2**32))
def test_landmarks_of_the_resized_crops_lie_where_their_affine_says(case, grid, crop, seed):
    view = GridCrops(grid, crop)([case], np.random.default_rng(seed))
    for name in ("bases", "targets"):
        for number in range(len(view[name])):
            error = landmark_error(
                case, view[name][number], view[f"{name}_to_box"][number], view[f"{name}_affine"][number], crop
            )
            assert np.all(error < 0.1)
    np.testing.assert_allclose(view["bases_body"].min(axis=(0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(view["bases_body"].max(axis=(0, 1)), 1, atol=1e-6)


def test_padding_and_blank_targets_are_told():
    case = ArrayCase({"image": np.zeros((1, 4, 8, 8), np.int16)})
    view = GridCrops((1, 1, 1), (8, 8, 8), num_targets=2, position_mode="crop")([case], np.random.default_rng(0))
    assert view["note_padded"] == 0.5
    assert view["note_constant"] == 0
    inside = GridCrops((1, 1, 1), (4, 4, 4), position_mode="crop")([case], np.random.default_rng(0))
    assert inside["note_constant"] == 1
