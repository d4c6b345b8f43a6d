from __future__ import annotations

import numpy as np
import pytest
from array_cases import ArrayCase, landmark_error, oblique_affine, world_case, world_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import CaseError, ConfigError
from medssl.views import MultiCrop


def places(view, case, name, voxels):
    """Start and size of each crop in voxels of the case, from its affine alone."""
    to_case = np.linalg.inv(case.affine) @ view[f"{name}_affine"]
    size = np.diagonal(to_case, axis1=1, axis2=2)[:, :3] * voxels
    return np.stack([to_case[:, :3, 3] - size / np.array(voxels) / 2 + 0.5, size], axis=1)


def counted_share(box, others, count=24):
    """Share of a box in the union of others, counted at a lattice of points."""
    axes = [box[0, a] + (np.arange(count) + 0.5) / count * box[1, a] for a in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return np.mean(np.any([((points >= o[0]) & (points < o.sum(axis=0))).all(axis=-1) for o in others], axis=0))


def test_a_sample_has_global_and_local_crops_with_where_they_lie():
    view = MultiCrop((8, 8, 8), (4, 4, 4), num_local=3)([world_case()], np.random.default_rng(0))
    for name, count in (("globals", 2), ("locals", 3)):
        assert view[name].shape[:2] == (count, 3)
        assert view[f"{name}_to_box"].shape == view[f"{name}_affine"].shape == (count, 4, 4)
        assert view[f"{name}_spacing_mm"].shape == (count, 3)
        assert view[f"{name}_body"].shape == (count, 2, 3)
    assert view["locals_overlap"].shape == (3,)
    only = MultiCrop((8, 8, 8), (4, 4, 4), num_local=0)([world_case()], np.random.default_rng(0))
    assert not any(name.startswith("locals") for name in only)


@settings(max_examples=25, deadline=None)
@given(world_cases, st.sampled_from([(6, 7, 8), (9, 9, 1), (5, 5, 5)]), st.floats(0, 1), st.integers(0, 2**32))
def test_landmarks_shares_and_overlaps_are_as_told(case, voxels, min_overlap, seed):
    local_voxels = tuple(min(4, n) for n in voxels)
    sampler = MultiCrop(voxels, local_voxels, min_overlap=min_overlap, margin=0.1)
    view = sampler([case], np.random.default_rng(seed))
    free = np.array(voxels) > 1
    for name, size, share in (("globals", voxels, (0.4, 1.0)), ("locals", local_voxels, (0.05, 0.4))):
        for number, place in enumerate(places(view, case, name, size)):
            error = landmark_error(
                case, view[name][number], view[f"{name}_to_box"][number], view[f"{name}_affine"][number], size
            )
            assert np.all(error < 1e-3)
            found = np.prod(place[1, free] / np.array(case.shape)[free])
            assert share[0] - 1e-9 <= found <= share[1] + 1e-9
            assert (place[1] <= np.array(case.shape) + 1e-6).all()
            assert (place[0] >= -1e-6).all()
            assert (place.sum(axis=0) <= np.array(case.shape) + 1e-6).all()
    assert (view["locals_overlap"] >= min_overlap - 1e-6).all()
    large = places(view, case, "globals", voxels)
    for place, overlap in zip(places(view, case, "locals", local_voxels), view["locals_overlap"], strict=True):
        assert overlap == pytest.approx(counted_share(place, large), abs=0.12)


def test_shares_are_drawn_evenly_over_the_whole_range():
    case = world_case((30, 30, 30))
    sampler = MultiCrop((8, 8, 8), (4, 4, 4), num_global=1, num_local=1, global_share=(0.4, 0.8))
    rng = np.random.default_rng(0)
    shares = [np.prod(places(sampler([case], rng), case, "globals", (8, 8, 8))[0, 1]) / 30**3 for _ in range(200)]
    assert np.mean(shares) == pytest.approx(0.6, abs=0.03)
    assert np.std(shares) == pytest.approx(0.4 / np.sqrt(12), abs=0.02)


def test_edges_are_stretched_against_each_other_within_the_aspect():
    case = world_case((30, 30, 30))
    sampler = MultiCrop((8, 8, 8), (4, 4, 4), num_local=4, aspect=1.5)
    view = sampler([case], np.random.default_rng(0))
    edges = places(view, case, "locals", (4, 4, 4))[:, 1]
    assert (edges.max(axis=1) / edges.min(axis=1) > 1.05).any()
    assert (edges.max(axis=1) / edges.min(axis=1) <= 1.5**2 + 1e-9).all()
    cubes = MultiCrop((8, 8, 8), (4, 4, 4), aspect=1.0)([case], np.random.default_rng(0))
    np.testing.assert_allclose(np.ptp(places(cubes, case, "locals", (4, 4, 4))[:, 1], axis=1), 0, atol=1e-9)


def test_a_reference_in_mm_gives_true_size():
    sampler = MultiCrop((8, 8, 8), (4, 4, 4), crop_mm=(12.0, 12.0, 12.0), global_share=(1.0, 1.0), aspect=1.0)
    for spacing in ((0.8, 1.1, 2.7), (1.0, 1.0, 1.0)):
        view = sampler([world_case(spacing_mm=spacing)], np.random.default_rng(0))
        np.testing.assert_allclose(view["globals_spacing_mm"], 1.5)
    unknown = ArrayCase({"image": np.zeros((1, 8, 8, 8), np.int16)}, is_metric=False)
    with pytest.raises(CaseError, match="crop_mm needs it"):
        sampler([unknown], np.random.default_rng(0))


def body_in_two_corners():
    image = np.random.default_rng(0).normal(size=(1, 30, 30, 30)).astype(np.float16)
    voxels = np.array([(3, 3, 3), (26, 26, 26)], np.int32)
    return ArrayCase(
        {"image": image, "body": np.ones((1, 30, 30, 30), np.uint8)},
        oblique=oblique_affine((1, 1, 1), (1, 1, 1), 0),
        voxels={-1: voxels},
    )


@pytest.mark.parametrize("local_share", [(0.0001, 0.0002), (0.001, 0.001)])
def test_a_local_crop_far_from_every_global_one_is_moved_into_one_and_counted(local_share):
    case = ArrayCase({"image": np.random.default_rng(0).normal(size=(1, 60, 60, 60)).astype(np.float16)})
    shares = {"global_share": (0.001, 0.001), "local_share": local_share}
    sampler = MultiCrop((8, 8, 8), (3, 3, 3), num_global=1, min_overlap=1.0, inside_body=False, **shares)
    for seed in range(5):
        view = sampler([case], np.random.default_rng(seed))
        assert view["note_moved"] == 1  # by chance one place in some thousands would do
        np.testing.assert_allclose(view["locals_overlap"], 1, atol=1e-6)
        volumes = np.prod(places(view, case, "locals", (3, 3, 3))[:, 1], axis=1) / 60**3
        assert (volumes >= local_share[0] - 1e-9).all()
        assert (volumes <= local_share[1] + 1e-9).all()


def test_crops_are_centred_in_the_body_and_in_the_region():
    case = body_in_two_corners()
    sampler = MultiCrop(
        (4, 4, 4), (2, 2, 2), global_share=(0.003, 0.005), local_share=(0.001, 0.002), region={"SI": (0.5, 1.0)}
    )
    for seed in range(10):
        view = sampler([case], np.random.default_rng(seed))
        middles = np.concatenate([view["globals_body"].mean(axis=1), view["locals_body"].mean(axis=1)])
        assert (np.abs(middles - 26.5 / 30) < 0.05).all()
        assert view["note_anywhere"] == 0
    assert view["globals"].dtype == np.float16


def test_equal_generators_give_equal_views():
    one, other = (MultiCrop((6, 6, 6), (3, 3, 3))([world_case()], np.random.default_rng(5)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_global": 0}, "num_global 0"),
        ({"num_local": -1}, "num_local -1"),
        ({"min_overlap": 1.5}, "min_overlap 1.5"),
        ({"aspect": 0.5}, "aspect 0.5"),
        ({"local_share": (0.0, 0.2)}, "must rise from above 0 to at most 1"),
        ({"local_share": (0.1, 0.5)}, "Lower local_share"),
        ({"crop_mm": (0.0, 1.0, 1.0)}, "crop_mm is"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        MultiCrop((8, 8, 8), (4, 4, 4), **options)
