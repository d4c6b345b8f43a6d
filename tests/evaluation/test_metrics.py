"""Scores against MONAI, brute force and closed forms; the rule of empty masks against the table that made it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy import ndimage

from medssl.errors import CaseError
from medssl.evaluation.metrics import Presence, Scores, score, score_labels
from medssl.evaluation.tally import tally
from medssl.geometry import Geometry


def grid(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape, np.diag((*spacing, 1.0)))


def blob(rng: np.random.Generator, shape: tuple[int, int, int], share: float = 0.3) -> np.ndarray:
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    return smooth > np.quantile(smooth, 1 - share)


SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (3.0, 0.5, 0.8)]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calling itself
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_those_of_monai_on_random_blobs(spacing: tuple[float, float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (18, 21, 15)
    prediction, reference = blob(rng, shape), blob(rng, shape, 0.2)
    ours = score(prediction, reference, geometry=grid(shape, spacing), nsd_tolerance_mm=1.45, with_area=True)
    p, r = torch.from_numpy(prediction)[None, None], torch.from_numpy(reference)[None, None]
    options = {"include_background": True, "spacing": spacing}
    assert ours.dice == pytest.approx(float(compute_dice(p, r)), abs=1e-6)
    assert ours.hd95_mm == pytest.approx(float(compute_hausdorff_distance(p, r, percentile=95, **options)), abs=1e-4)
    assert ours.hd_mm == pytest.approx(float(compute_hausdorff_distance(p, r, **options)), abs=1e-4)
    assert ours.nsd == pytest.approx(float(compute_surface_dice(p, r, [1.45], **options)), abs=1e-6)
    area = compute_surface_dice(p, r, [1.45], use_subvoxels=True, **options)
    assert ours.nsd_area == pytest.approx(float(area), abs=1e-6)
    assd = compute_average_surface_distance(p, r, symmetric=True, **options)
    assert ours.assd_mm == pytest.approx(float(assd), abs=1e-4)
    ml = float(np.prod(spacing)) / 1000
    assert ours.volume_ml == pytest.approx(prediction.sum() * ml)
    assert ours.volume_error_ml == pytest.approx((int(prediction.sum()) - int(reference.sum())) * ml)
    assert ours.presence is Presence.BOTH


def test_a_cube_moved_along_an_axis_has_closed_form_scores() -> None:
    shape, spacing = (20, 12, 12), (2.0, 1.0, 1.0)
    reference, prediction = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    reference[2:8, 3:9, 3:9] = True
    prediction[5:11, 3:9, 3:9] = True
    scores = score(prediction, reference, geometry=grid(shape, spacing), nsd_tolerance_mm=0.5)
    assert scores.dice == pytest.approx(0.5)
    assert scores.hd_mm == pytest.approx(6.0)
    assert (scores.volume_error_ml, scores.volume_error_percent) == (0, 0)
    assert scores.reference_ml == pytest.approx(216 * 2 / 1000)


def test_identical_masks_agree_fully() -> None:
    mask = blob(np.random.default_rng(0), (8, 8, 8))
    scores = score(mask, mask, geometry=grid((8, 8, 8)), nsd_tolerance_mm=0)
    assert (scores.dice, scores.nsd, scores.hd95_mm, scores.hd_mm, scores.assd_mm) == (1, 1, 0, 0, 0)


def test_both_empty_is_full_agreement_and_marked() -> None:
    empty = np.zeros((4, 4, 4), dtype=bool)
    scores = score(empty, empty, geometry=grid((4, 4, 4)), nsd_tolerance_mm=1)
    assert scores.presence is Presence.NEITHER
    assert (scores.dice, scores.nsd, scores.hd95_mm) == (1, 1, 0)
    area = score(empty, empty, geometry=grid((4, 4, 4)), nsd_tolerance_mm=1, with_area=True)
    assert area.nsd_area == 1
    assert area.volume_error_percent == 0


@pytest.mark.parametrize("presence", [Presence.MISSED, Presence.INVENTED])
def test_one_empty_takes_the_worst_value_of_every_metric(presence: Presence) -> None:
    empty, full = np.zeros((5, 5, 5), dtype=bool), np.ones((5, 5, 5), dtype=bool)
    prediction, reference = (empty, full) if presence is Presence.MISSED else (full, empty)
    geometry = grid((5, 5, 5), (1, 2, 3))
    scores = score(prediction, reference, geometry=geometry, nsd_tolerance_mm=1, with_area=True)
    assert scores.presence is presence
    assert (scores.dice, scores.nsd, scores.nsd_area) == (0, 0, 0)
    error = scores.volume_error_percent
    assert error == -100 if presence is Presence.MISSED else np.isnan(error)
    worst = 4 * np.sqrt(1 + 4 + 9)
    assert (scores.hd95_mm, scores.hd_mm, scores.assd_mm) == pytest.approx((worst,) * 3)


def test_missing_hard_cases_never_improves_a_mean() -> None:
    """Demands F1: MONAI's mean HD95 falls 8.0, 7.56, 7.0, ... as hard predictions are replaced by empty ones."""
    shape = (48, 48, 1)
    reference = np.zeros(shape, dtype=bool)
    reference[14:26, 14:26] = True
    empty = np.zeros(shape, dtype=bool)
    shifted = [np.roll(reference, 12 if hard else 4, axis=0) for hard in [True] * 5 + [False] * 5]

    def means(num_missed: int) -> tuple[float, float, float]:
        rows: list[Scores] = []
        for index, prediction in enumerate(shifted):
            shown = empty if index < num_missed else prediction
            rows.append(score(shown, reference, geometry=grid(shape), nsd_tolerance_mm=1))
        return tuple(float(np.mean([getattr(row, name) for row in rows])) for name in ("hd95_mm", "dice", "nsd"))

    table = [means(missed) for missed in range(6)]
    assert table[0][0] == pytest.approx(8.0)
    for before, after in itertools.pairwise(table):
        assert after[0] > before[0]
        assert after[1] <= before[1]
        assert after[2] <= before[2]


@pytest.mark.parametrize("seed", range(20))
def test_no_prediction_is_worse_than_the_empty_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (7, 6, 5)
    affine = np.eye(4)
    affine[:3, :3] += rng.uniform(-0.4, 0.4, size=(3, 3))
    geometry = Geometry(shape, affine)
    reference, prediction = rng.random(shape) > 0.8, rng.random(shape) > 0.9
    some = score(prediction, reference, geometry=geometry, nsd_tolerance_mm=1)
    none = score(np.zeros(shape, dtype=bool), reference, geometry=geometry, nsd_tolerance_mm=1)
    assert none.hd_mm >= some.hd_mm
    assert none.hd95_mm >= some.hd95_mm
    assert none.assd_mm >= some.assd_mm
    assert none.dice <= some.dice
    assert none.nsd <= some.nsd


@pytest.mark.parametrize(("values", "dtype"), [((1, 2, 7), np.uint8), ((1, 300, 70_001), np.int32)])
def test_each_label_scores_as_its_own_mask(values: tuple[int, ...], dtype: type) -> None:
    rng = np.random.default_rng(5)
    shape = (12, 11, 10)
    names = np.array((0, *values, 99), dtype=dtype)  # 99 is not asked for
    prediction, reference = (names[rng.integers(0, len(names), size=shape)] for _ in range(2))
    reference[reference == values[0]] = 0
    options = {"geometry": grid(shape, (1, 1, 2)), "nsd_tolerance_mm": 1.0}
    found = score_labels(prediction, reference, label_values=values, **options)
    assert list(found) == sorted(values)
    for value, scores in found.items():
        assert scores == score(prediction == value, reference == value, **options)
    assert found[values[0]].presence is Presence.INVENTED


def test_a_label_in_neither_map_is_a_true_negative() -> None:
    zero = np.zeros((3, 3, 3), dtype=np.uint8)
    found = score_labels(zero, zero, geometry=grid((3, 3, 3)), label_values=(4,), nsd_tolerance_mm=1)
    assert found[4].presence is Presence.NEITHER
    assert found[4].to_dict()["presence"] == "neither"
    assert "nsd_area" not in found[4].to_dict()
    assert score_labels(zero, zero, geometry=grid((3, 3, 3)), label_values=(), nsd_tolerance_mm=1) == {}


def test_other_shapes_are_refused() -> None:
    one, two = np.ones((2, 2, 2), dtype=bool), np.ones((2, 2, 3), dtype=bool)
    with pytest.raises(CaseError, match="one grid is needed") as error:
        score(one, two, geometry=grid((2, 2, 2)), nsd_tolerance_mm=1)
    assert error.value.code == "E_SHAPE"
    with pytest.raises(CaseError, match="one grid is needed"):
        score_labels(one.astype(int), two.astype(int), geometry=grid((2, 2, 2)), label_values=(1,), nsd_tolerance_mm=1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("dtype", "highest"), [(np.uint8, 255), (np.int16, 300), (np.int32, 90_000), (np.int64, 5)])
def test_voxels_are_counted_in_one_pass_in_every_layout_and_type(order: str, dtype: type, highest: int) -> None:
    rng = np.random.default_rng(highest)
    names = np.array((0, 1, 4, highest), dtype=dtype)
    prediction, reference = (
        np.asarray(names[rng.integers(0, 4, size=(7, 6, 5)) * (rng.random((7, 6, 5)) < 0.3)], order=order)
        for _ in range(2)
    )
    found = tally(prediction, reference, label_values=(4, 1, 0, highest, 77, 10**6))
    assert list(found) == sorted({0, 1, 4, 77, highest, 10**6})
    for value, counts in found.items():
        p, r = prediction == value, reference == value
        assert counts[:3] == (p.sum(), r.sum(), (p & r).sum())
        places = np.argwhere(p | r)
        if len(places):
            expected = tuple(slice(low, high + 1) for low, high in zip(places.min(0), places.max(0), strict=True))
            assert counts.box == expected
        else:
            assert prediction[counts.box].size == 0


@pytest.mark.parametrize("seed", range(5))
def test_long_runs_of_one_value_are_counted_to_the_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = np.repeat(rng.integers(0, 3, size=(2, 3, 2, 9), dtype=np.uint8), rng.integers(1, 90, size=9), axis=3)
    for axis in range(3):
        prediction, reference = (np.moveaxis(labels, 2, axis) for labels in maps)
        for value, counts in tally(prediction, reference, label_values=(0, 1, 2)).items():
            p, r = prediction == value, reference == value
            assert counts[:3] == (p.sum(), r.sum(), (p & r).sum())
            places = np.argwhere(p | r)
            assert [side.start for side in counts.box] == places.min(axis=0).tolist()
            assert [side.stop - 1 for side in counts.box] == places.max(axis=0).tolist()


def test_values_below_zero_are_passed_over() -> None:
    labels = np.array([-1, 2, 2, 0], dtype=np.int16).reshape(4, 1, 1)
    found = tally(labels, np.full_like(labels, 2), label_values=(0, 2))
    assert found[2][:3] == (2, 4, 2)
    assert found[0][:3] == (1, 0, 0)
