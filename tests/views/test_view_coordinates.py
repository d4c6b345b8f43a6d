from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from array_cases import coordinate_case, world_case

from medssl.errors import CaseError
from medssl.views import RandomCrop, SliceViews, atlas_coordinates, body_coordinates, median_mm


def test_body_coordinates_run_from_the_first_to_the_last_face_of_the_body():
    body = np.zeros((1, 12, 10, 8), np.uint8)
    body[0, 2:6, 5, 1:8] = 1
    case = coordinate_case(body=body)
    faces = np.array([(1.5, 4.5, 0.5), (5.5, 5.5, 7.5)])
    np.testing.assert_allclose(body_coordinates(case, faces), [(0, 0, 0), (1, 1, 1)])
    np.testing.assert_allclose(body_coordinates(case, np.array([2, 5, 1])), (1 / 8, 1 / 2, 1 / 14))
    assert body_coordinates(case, np.zeros((4, 5, 3), np.int32)).shape == (4, 5, 3)
    assert (body_coordinates(case, np.array([(0, 0, 0)])) < 0).all()


def test_a_crop_carries_its_corners_in_the_body():
    body = np.zeros((1, 12, 10, 8), np.uint8)
    body[0, 2:10, 2:8, 1:7] = 1
    case = coordinate_case(spacing_mm=(1.0, 2.0, 0.5), body=body)
    for options in ({}, {"crop_mm": (3.0, 6.0, 2.0), "margin": 0.5}):
        for seed in range(5):
            view = RandomCrop((4, 3, 4), **options)([case], np.random.default_rng(seed))
            start, size = view["crop_box_mm"] / case.spacing_mm
            expected = (np.stack([start, start + size]) - (2, 2, 1)) / (8, 6, 6)
            np.testing.assert_allclose(view["image_body"], expected, atol=1e-6)
            assert view["image_body"].dtype == np.float32


def test_atlas_coordinates_go_through_the_world():
    case = world_case()
    atlas = np.array([[0.01, 0, 0, 1], [0, 0.02, 0.01, 2], [0, 0, 0.03, 3], [0, 0, 0, 1]])
    registered = dataclasses.replace(case, atlas_affine=atlas)
    ijk = np.array([(3, 4, 5), (0, 0, 0), (19, 2, 7)])
    world = np.stack([case.arrays["image"][:, i, j, k] for i, j, k in ijk])
    np.testing.assert_allclose(atlas_coordinates(registered, ijk), world @ atlas[:3, :3].T + atlas[:3, 3], atol=1e-5)
    view = RandomCrop((4, 4, 4))([registered], np.random.default_rng(0))
    corners = np.stack([view["image_affine"] @ (-0.5, -0.5, -0.5, 1), view["image_affine"] @ (3.5, 3.5, 3.5, 1)])
    np.testing.assert_allclose(view["image_atlas"], (corners @ atlas.T)[:, :3], atol=1e-5)
    assert SliceViews((4, 4), num_slices=2)([registered], np.random.default_rng(0))["slices_atlas"].shape == (2, 2, 3)


def test_a_case_that_is_not_registered_has_no_atlas_coordinates():
    case = coordinate_case()
    assert "image_atlas" not in RandomCrop((4, 4, 4))([case], np.random.default_rng(0))
    with pytest.raises(CaseError, match="case case_1: is registered to no atlas") as caught:
        atlas_coordinates(case, np.zeros((1, 3)))
    assert caught.value.code == "E_NO_ATLAS"


def test_the_median_size_is_that_of_each_axis():
    assert median_mm([(1.0, 2.0, 5.0), np.array([1.5, 2.0, 1.0]), (9.0, 2.0, 3.0)]) == [1.5, 2.0, 3.0]
