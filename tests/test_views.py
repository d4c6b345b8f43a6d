from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medssl.errors import CaseError, ConfigError
from medssl.views import (
    BODY,
    Box,
    GridCrops,
    LabelledCrop,
    RandomCrop,
    grid_boxes,
    overlap_fractions,
    position_labels,
    resize_linear,
)


@dataclass(frozen=True)
class ArrayCase:
    """A case in memory; voxels outside it read as -7 (image) or 0."""

    arrays: dict[str, np.ndarray]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    case_id: str = "case_1"
    voxels: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.arrays["image"].shape[1:]

    @property
    def channels(self) -> int:
        return len(self.arrays["image"])

    def has(self, name: str) -> bool:
        return name in self.arrays

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        source = self.arrays[name]
        out = np.full((len(source), *shape), -7 if name == "image" else 0, source.dtype)
        for index in itertools.product(*(range(n) for n in shape)):
            place = tuple(s + i for s, i in zip(start, index, strict=True))
            if all(0 <= p < n for p, n in zip(place, self.shape, strict=True)):
                out[:, *index] = source[:, *place]
        return out

    def foreground_voxels(self, value: int) -> np.ndarray:
        if value in self.voxels:
            return self.voxels[value]
        mask = self.arrays["body"][0] > 0 if value == BODY else self.arrays["label"][0] == value
        return np.argwhere(mask).astype(np.int32)


def coordinate_case(shape=(12, 10, 8), spacing_mm=(1.0, 1.0, 1.0), **arrays) -> ArrayCase:
    """An image whose value says which voxel it is: 10000 x + 100 y + z."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    image = (10000 * x + 100 * y + z).astype(np.float32)[None]
    return ArrayCase({"image": image, **arrays}, spacing_mm)


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


triples = st.tuples(*[st.integers(1, 5)] * 3)
places = st.tuples(*[st.integers(-4, 9)] * 3)


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


def test_a_random_crop_says_in_mm_and_as_a_share_where_it_was_cut():
    case = coordinate_case(spacing_mm=(1.0, 2.0, 0.5))
    for seed in range(20):
        view = RandomCrop((4, 6, 8))([case], np.random.default_rng(seed))
        first = int(view["image"][0, 0, 0, 0])
        start = np.array([first // 10000, first // 100 % 100, first % 100])
        np.testing.assert_allclose(view["crop_box_mm"], [start * (1, 2, 0.5), (4, 12, 4)])
        np.testing.assert_allclose(view["position"], np.add(start, (2, 3, 4)) / (12, 10, 8), rtol=1e-6)
        np.testing.assert_array_equal(view["image"], case.read("image", start, (4, 6, 8)))


def test_a_random_crop_takes_all_places_equally_often():
    case = coordinate_case((6, 1, 1))
    rng = np.random.default_rng(0)
    starts = [int(RandomCrop((4, 1, 1))([case], rng)["image"][0, 0, 0, 0]) // 10000 for _ in range(600)]
    assert np.bincount(starts).tolist() == pytest.approx([200, 200, 200], abs=45)


def test_a_random_crop_is_centred_in_the_body_where_there_is_a_mask():
    body = np.zeros((1, 12, 10, 8), np.uint8)
    body[0, 6, 5, 4] = 1
    case = coordinate_case(body=body)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert RandomCrop((3, 3, 3))([case], rng)["image"][0, 1, 1, 1] == 60504
    elsewhere = {RandomCrop((3, 3, 3), inside_body=False)([case], rng)["image"][0, 1, 1, 1] for _ in range(8)}
    assert len(elsewhere) > 1


def test_a_volume_smaller_than_the_crop_is_filled_on_both_sides():
    case = coordinate_case((2, 10, 8))
    view = RandomCrop((6, 10, 8))([case], np.random.default_rng(0))
    assert view["image"].shape == (1, 6, 10, 8)
    assert np.flatnonzero(view["image"][0, :, 0, 0] != -7).tolist() == [2, 3]
    np.testing.assert_allclose(view["crop_box_mm"][0], (-2, 0, 0))
    np.testing.assert_allclose(view["position"], 0.5)


def labelled_case() -> ArrayCase:
    label = np.zeros((1, 12, 10, 8), np.uint8)
    label[0, 0, 0, 0] = 1
    label[0, 6, 5, 2:6] = 2
    return coordinate_case(label=label)


def test_a_labelled_crop_on_foreground_holds_the_drawn_voxel_and_draws_structures_evenly():
    case = labelled_case()
    rng = np.random.default_rng(0)
    ones = 0
    for _ in range(200):
        view = LabelledCrop((3, 3, 3), (0, 1, 2, 9), foreground_share=1.0)([case], rng)
        found = set(np.unique(view["label"])) - {0}
        assert found in ({1}, {2})
        ones += found == {1}
        assert view["label"].shape == (1, 3, 3, 3)
        assert view["label"].dtype == np.uint8
    assert 70 < ones < 130


def test_the_foreground_share_of_labelled_crops_is_as_asked():
    label = np.zeros((1, 100, 1, 1), np.uint8)
    label[0, 50] = 1
    case = coordinate_case((100, 1, 1), label=label)
    sampler = LabelledCrop((1, 1, 1), (1,), foreground_share=0.67)
    rng = np.random.default_rng(0)
    hits = np.mean([sampler([case], rng)["label"].any() for _ in range(600)])
    assert hits == pytest.approx(0.67 + 0.33 / 100, abs=0.06)


def test_a_labelled_crop_keeps_image_and_label_on_one_grid():
    x, y, z = np.meshgrid(np.arange(12), np.arange(10), np.arange(8), indexing="ij")
    label = (10000 * x + 100 * y + z).astype(np.int32)[None]
    case = coordinate_case(label=label)
    for share in (0.0, 1.0):
        sampler = LabelledCrop((5, 4, 3), (60504, 110907), foreground_share=share)
        view = sampler([case], np.random.default_rng(3))
        np.testing.assert_array_equal(view["image"], view["label"])


def test_a_labelled_crop_is_random_where_the_case_has_none_of_the_structures():
    sampler = LabelledCrop((3, 3, 3), (7,), foreground_share=1.0)
    assert sampler([labelled_case()], np.random.default_rng(0))["image"].shape == (1, 3, 3, 3)


def test_a_labelled_crop_of_a_case_without_label_is_refused():
    with pytest.raises(CaseError, match="case case_1: has no label"):
        LabelledCrop((3, 3, 3), (1,))([coordinate_case()], np.random.default_rng(0))


def test_grid_crops_of_a_volume_of_the_grids_size_are_plain_cuts():
    case = coordinate_case((6, 8, 5), spacing_mm=(1.0, 2.0, 3.0))
    view = GridCrops((2, 2, 1), (3, 4, 5), num_targets=3)([case], np.random.default_rng(0))
    assert {name: value.shape for name, value in view.items()} == {
        "bases": (4, 1, 3, 4, 5),
        "targets": (3, 1, 3, 4, 5),
        "overlap": (3, 4),
        "base_boxes_mm": (4, 2, 3),
        "target_boxes_mm": (3, 2, 3),
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


def test_equal_generators_give_equal_views():
    case = labelled_case()
    for sampler in (RandomCrop((3, 3, 3)), LabelledCrop((3, 3, 3), (1, 2)), GridCrops((2, 2, 2), (3, 3, 3))):
        assert sampler.cases_per_sample == 1
        one, other = (sampler([case], np.random.default_rng(5)) for _ in range(2))
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("make", [lambda: RandomCrop((4, 4)), lambda: GridCrops((2, 2, 0), (4, 4, 4))])
def test_sizes_that_are_not_three_whole_numbers_are_refused(make):
    with pytest.raises(ConfigError, match="three whole numbers above 0"):
        make()


@pytest.mark.parametrize("options", [{"num_targets": 0}, {"cell_mm": (1.0, 0.0, 1.0)}])
def test_grid_crops_without_targets_or_cells_are_refused(options):
    with pytest.raises(ConfigError, match="must be above 0"):
        GridCrops((2, 2, 1), (4, 4, 4), **options)


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
