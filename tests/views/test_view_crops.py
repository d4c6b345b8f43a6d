from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from array_cases import FILL, ArrayCase, coordinate_case, landmark_error, sampled, world_case, world_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medssl.errors import CaseError, ConfigError
from medssl.views import CaseArrays, LabelledCrop, RandomCrop, ViewSampler


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


def test_cases_and_samplers_are_what_the_protocols_say():
    assert isinstance(coordinate_case(), CaseArrays)
    assert isinstance(RandomCrop((3, 3, 3)), ViewSampler)


def test_equal_generators_give_equal_views():
    case = labelled_case()
    for sampler in (
        RandomCrop((3, 3, 3), margin=0.5, crop_mm=(4.0, 4.0, 4.0)),
        LabelledCrop((3, 3, 3), (1, 2), region={"AP": (0.2, 0.9)}),
    ):
        assert sampler.cases_per_sample == 1
        one, other = (sampler([case], np.random.default_rng(5)) for _ in range(2))
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("dtype", [np.int16, np.float16, np.float32, np.uint8])
def test_a_crop_keeps_the_stored_type(dtype):
    image = np.random.default_rng(0).integers(0, 100, (1, 24, 24, 24)).astype(dtype)
    case = ArrayCase({"image": image})
    for options in ({}, {"crop_mm": (20.0, 20.0, 20.0)}):
        view = RandomCrop((8, 8, 8), **options)([case], np.random.default_rng(0))
        assert view["image"].dtype == dtype


def test_a_crop_of_the_cases_own_voxels_is_an_exact_move_by_whole_voxels():
    case = world_case()
    for seed in range(5):
        view = RandomCrop((6, 5, 4), margin=(0.25, 0.0, 0.5))([case], np.random.default_rng(seed))
        expected = np.eye(4)
        expected[:3, 3] = (2, 0, 2)  # a quarter of 6, rounded up; none; half of 4
        np.testing.assert_array_equal(view["image_to_box"], expected)
        assert view["image"].shape == (3, 10, 5, 8)
        np.testing.assert_array_equal(view["image_spacing_mm"], case.spacing_mm)
        start = np.rint(view["crop_box_mm"][0] / case.spacing_mm).astype(int)
        np.testing.assert_array_equal(view["image"], case.read("image", start - (2, 0, 2), (10, 5, 8)))
        np.testing.assert_allclose(view["image_affine"], case.affine @ translation(start), atol=1e-12)


def translation(shift):
    matrix = np.eye(4)
    matrix[:3, 3] = shift
    return matrix


@settings(max_examples=60, deadline=None)
@given(
    world_cases,
    st.tuples(*[st.integers(1, 9)] * 3),
    st.none() | st.tuples(*[st.floats(2.0, 60.0)] * 3),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.integers(0, 2**32),
)
def test_every_landmark_in_a_crop_lies_where_its_affine_says(case, voxels, crop_mm, margin, seed):
    sampler = RandomCrop(voxels, crop_mm=crop_mm, margin=margin)
    view = sampler([case], np.random.default_rng(seed))
    error = landmark_error(case, view["image"], view["image_to_box"], view["image_affine"], voxels)
    assert np.all(error < 1e-3)
    np.testing.assert_allclose(view["image_spacing_mm"], sampler.voxel_mm(case))
    np.testing.assert_allclose(np.linalg.norm(view["image_affine"][:3, :3], axis=0), view["image_spacing_mm"])


@settings(max_examples=60, deadline=None)
@given(
    world_cases,
    st.tuples(*[st.integers(1, 9)] * 3),
    st.none() | st.tuples(*[st.floats(2.0, 60.0)] * 3),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**32),
)
def test_a_box_holds_the_crop_and_its_margin_and_hardly_more(case, voxels, crop_mm, margin, seed):
    view = RandomCrop(voxels, crop_mm=crop_mm, margin=margin)([case], np.random.default_rng(seed))
    beyond = np.where(np.array(voxels) == 1, 0, np.ceil(margin * np.array(voxels) - 1e-9))
    scale, shift = np.diagonal(view["image_to_box"])[:3], view["image_to_box"][:3, 3]
    first, last = shift - beyond * scale, shift + (np.array(voxels) - 1 + beyond) * scale
    size = np.array(view["image"].shape[1:])
    assert (first > -1e-5).all()
    assert (first < 1).all()
    assert (last < size - 1 + 1e-5).all()
    assert (last > size - 2).all()


def test_a_blob_is_found_where_it_is_in_crops_of_finer_and_of_coarser_voxels():
    case = world_case((40, 36, 30), spacing_mm=(0.8, 1.0, 1.7))
    truth = case.affine @ (19.3, 17.6, 14.2, 1)
    distance = np.linalg.norm(case.arrays["image"] - truth[:3, None, None, None], axis=0)
    blob = ArrayCase({"image": np.rint(1000 * np.exp(-((distance / 4) ** 2) / 2)).astype(np.int16)[None] + FILL})
    blob = ArrayCase(blob.arrays, case.spacing_mm, oblique=case.oblique)
    for voxel_mm in (0.6, 1.0, 1.9, 2.6):
        size = [n * s for n, s in zip(blob.shape, blob.spacing_mm, strict=True)]
        voxels = [int(edge / voxel_mm) for edge in size]
        view = RandomCrop(voxels, crop_mm=[n * voxel_mm for n in voxels])([blob], np.random.default_rng(0))
        crop = sampled(view["image"], view["image_to_box"], voxels)[0] - FILL
        found = view["image_affine"] @ (*ndimage.center_of_mass(np.maximum(crop, 0)), 1)
        assert np.linalg.norm(found - truth) < 0.1 * voxel_mm


def test_a_crop_in_mm_has_the_same_size_in_every_case():
    sampler = RandomCrop((8, 8, 1), crop_mm=(16.0, 12.0, 99.0))
    for spacing in ((1.0, 1.0, 3.0), (0.5, 0.7, 1.0), (3.0, 2.0, 5.0)):
        view = sampler([coordinate_case((40, 40, 5), spacing)], np.random.default_rng(0))
        np.testing.assert_allclose(view["image_spacing_mm"], (2.0, 1.5, spacing[2]))
        np.testing.assert_allclose(view["crop_box_mm"][1], (16.0, 12.0, spacing[2]))
        assert view["image"].shape[3] == 1
        assert view["image_to_box"][2].tolist() == [0, 0, 1, 0]


def test_a_box_of_fine_voxels_is_averaged_and_its_label_goes_by_majority():
    rng = np.random.default_rng(0)
    image = rng.integers(-900, 900, (2, 12, 9, 5)).astype(np.int16)
    label = rng.integers(0, 4, (1, 12, 9, 5)).astype(np.uint8)
    case = ArrayCase({"image": image, "label": label})
    view = LabelledCrop((4, 4, 5), (1,), crop_mm=(12.0, 8.0, 5.0))([case], np.random.default_rng(1))
    np.testing.assert_array_equal(view["image_to_box"], np.eye(4))
    centre = (np.linalg.inv(case.affine) @ view["image_affine"])[:3, 3]
    start = np.rint(centre - (1, 0.5, 0)).astype(int)
    assert view["image"].shape == (2, 4, 4, 5)
    for i, j, k in np.ndindex(4, 4, 5):
        x, y, z = np.add(start, (3 * i, 2 * j, k))
        block = image[:, x : x + 3, y : y + 2, z]
        np.testing.assert_array_equal(view["image"][:, i, j, k], np.rint(block.mean(axis=(1, 2))))
        counts = np.bincount(label[0, x : x + 3, y : y + 2, z].ravel(), minlength=4)
        assert view["label"][0, i, j, k] == np.argmax(counts)
    assert view["label"].dtype == np.uint8


def test_a_size_in_mm_of_a_case_without_voxel_size_is_refused():
    case = ArrayCase({"image": np.zeros((1, 8, 8, 8), np.int16)}, is_metric=False)
    RandomCrop((4, 4, 4))([case], np.random.default_rng(0))
    with pytest.raises(CaseError, match="case case_1: its voxel size in mm is not known, and crop_mm") as caught:
        RandomCrop((4, 4, 4), crop_mm=(4.0, 4.0, 4.0))([case], np.random.default_rng(0))
    assert caught.value.code == "E_SPACING_UNKNOWN"
    assert "Set assume_spacing_mm in the preparation" in str(caught.value)


def test_a_region_is_a_share_of_the_body_and_holds_the_centres():
    body = np.zeros((1, 40, 30, 60), np.uint8)
    body[0, 4:36, 5:25, 10:50] = 1
    case = coordinate_case((40, 30, 60), (1.0, 1.0, 1.5), body=body)
    heights, sides = [], []
    for inside_body in (True, False):
        sampler = RandomCrop((4, 4, 6), inside_body=inside_body, region={"SI": (0.5, 0.7), "LR": (0.25, 0.75)})
        for seed in range(60):
            view = sampler([case], np.random.default_rng(seed))
            middle = view["image_body"].mean(axis=0)
            heights.append(middle[2])
            sides.append(middle[0])
            assert view["note_anywhere"] == 0
    assert 0.5 - 0.025 <= min(heights) <= max(heights) <= 0.7 + 0.025  # a voxel is 1/40 of the body
    assert max(heights) - min(heights) > 0.15
    assert 0.25 - 0.032 <= min(sides) <= max(sides) <= 0.75 + 0.032


def test_without_a_body_voxel_in_the_region_any_place_in_it_is_taken_and_counted():
    body = np.zeros((1, 20, 20, 20), np.uint8)
    body[0, :, :, [0, 19]] = 1
    case = coordinate_case((20, 20, 20), body=body)
    sampler = RandomCrop((4, 4, 4), region={"SI": (0.4, 0.6)})
    for seed in range(20):
        view = sampler([case], np.random.default_rng(seed))
        assert view["note_anywhere"] == 1
        assert 0.4 <= view["image_body"].mean(axis=0)[2] <= 0.6
    whole = RandomCrop((4, 4, 4))
    assert whole([case], np.random.default_rng(0))["note_anywhere"] == 0
    assert whole([coordinate_case()], np.random.default_rng(0))["note_anywhere"] == 1
    empty = coordinate_case((8, 8, 8), body=np.zeros((1, 8, 8, 8), np.uint8))
    assert whole([empty], np.random.default_rng(0))["note_anywhere"] == 1
    narrow = RandomCrop((4, 4, 5), inside_body=False, region={"SI": (0.501, 0.502)})
    assert narrow([case], np.random.default_rng(0))["image_body"].mean(axis=0)[2] == pytest.approx(0.5, abs=0.03)


def test_a_structure_that_is_not_in_the_region_counts_as_not_found():
    case = labelled_case()
    sampler = LabelledCrop((3, 3, 3), (1, 2), foreground_share=1.0, region={"LR": (0.4, 0.7)})
    for seed in range(10):
        view = sampler([case], np.random.default_rng(seed))
        assert 2 in view["label"]
        assert view["note_anywhere"] == 0
    view = LabelledCrop((3, 3, 3), (1,), foreground_share=1.0, region={"LR": (0.4, 0.7)})(
        [case], np.random.default_rng(0)
    )
    assert view["note_anywhere"] == 1


def test_the_share_of_a_crop_outside_the_volume_is_told():
    case = coordinate_case((6, 10, 8))
    view = RandomCrop((8, 10, 16), margin=0.5)([case], np.random.default_rng(0))
    assert view["note_padded"] == pytest.approx(1 - 6 / 8 * 8 / 16)
    assert (view["image"] == FILL).mean() > view["note_padded"]
    assert RandomCrop((6, 4, 8), margin=0.5)([case], np.random.default_rng(0))["note_padded"] == 0


def half_black_case():
    image = np.zeros((1, 40, 8, 8), np.int16)
    image[:, 20:] = np.random.default_rng(0).integers(0, 100, (1, 20, 8, 8))
    return ArrayCase({"image": image})


def test_a_crop_of_one_value_is_drawn_again():
    case = half_black_case()
    views = [RandomCrop((4, 8, 8))([case], np.random.default_rng(seed)) for seed in range(300)]
    constant = [bool((view["image"] == view["image"].flat[0]).all()) for view in views]
    assert [bool(view["note_constant"]) for view in views] == constant
    assert np.mean(constant) == pytest.approx((17 / 37) ** 5, abs=0.02)


def test_a_crop_that_stays_of_one_value_is_counted_after_four_more_draws():
    case = ArrayCase({"image": np.full((2, 12, 12, 12), 3, np.int16)})
    view = RandomCrop((4, 4, 4))([case], np.random.default_rng(0))
    assert view["note_constant"] == 1
    assert len(case.reads) == 5


def test_a_crop_is_black_even_if_its_margin_is_not():
    image = np.zeros((1, 9, 9, 9), np.int16)
    image[:, 0] = image[0, :, 8, 8] = 5
    view = RandomCrop((3, 3, 3), margin=1.0, region=dict.fromkeys(("LR", "AP", "SI"), (0.5, 0.5)))(
        [ArrayCase({"image": image})], np.random.default_rng(0)
    )
    assert view["image"].max() == 5
    assert view["note_constant"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"crop_voxels": (4, 4)}, "crop_voxels is .* three whole numbers above 0"),
        ({"crop_mm": (4.0, 4.0)}, "crop_mm is .* 3 numbers above 0"),
        ({"crop_mm": (4.0, 0.0, 4.0)}, "crop_mm is .* 3 numbers above 0"),
        ({"margin": -0.1}, "margin is -0.1; it needs one share"),
        ({"margin": (0.1, 0.1)}, "one for each axis"),
        ({"region": {"IS": (0.1, 0.2)}}, "region: there is no axis IS; axes are LR, AP, SI"),
        ({"region": {"SI": (0.8, 0.2)}}, r"region: the bounds of SI are swapped; write {SI: \[0.2, 0.8\]}"),
        ({"region": {"AP": (30, 70)}}, "region: AP needs two shares of the body, from 0 to 1"),
        ({"region": {"AP": (0.3,)}}, "region: AP needs two shares of the body, from 0 to 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        RandomCrop(**{"crop_voxels": (4, 4, 4), **options})


def test_small_structures_are_drawn_more_often_when_balanced_by_size():
    label = np.zeros((1, 12, 10, 8), np.uint8)
    label[0, :, :, :4] = 1  # 480 voxels
    label[0, 6, :3, 6] = 2  # 3 voxels
    case = coordinate_case(label=label)
    rng = np.random.default_rng(0)
    sampler = LabelledCrop((1, 1, 1), (1, 2, 9), foreground_share=1.0, class_balance="inverse_sqrt")
    found = [int(sampler([case], rng)["label"].item()) for _ in range(600)]
    weights = 1 / np.sqrt([480, 3])
    assert np.mean(np.equal(found, 2)) == pytest.approx((weights / weights.sum())[1], abs=0.04)
    assert sum(name == "label" and shape == case.shape for name, _, shape in case.reads) == 1


@dataclass(frozen=True)
class FactCase(ArrayCase):
    facts: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [({"drawn": "2; 1"}, [True, True, False]), ({"drawn": "9"}, [False, False, True]), ({}, [True] * 3)],
)
def test_a_labelled_crop_says_which_structures_were_drawn(facts, expected):
    case = FactCase(labelled_case().arrays, facts=facts)
    view = LabelledCrop((3, 3, 3), (1, 2, 9), annotated="drawn")([case], np.random.default_rng(0))
    assert view["annotated"].tolist() == expected
    assert "annotated" not in LabelledCrop((3, 3, 3), (1, 2))([case], np.random.default_rng(0))


def test_a_fact_that_is_no_list_of_values_is_refused():
    case = FactCase(labelled_case().arrays, facts={"drawn": "liver"})
    with pytest.raises(CaseError, match="fact drawn is not a list of label values") as error:
        LabelledCrop((3, 3, 3), (1, 2), annotated="drawn")([case], np.random.default_rng(0))
    assert error.value.code == "E_LABEL_SET"
