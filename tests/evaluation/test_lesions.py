"""Lesions one by one: matching, counts, FROC and AP against hand counts and the definitions retyped with loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from medssl.evaluation.lesions import Lesion, find_lesions, lesion_sentences, lesion_tables
from medssl.geometry import Geometry

SHAPE = (24, 10, 6)
GEOMETRY = Geometry(SHAPE, np.diag((1.0, 2.0, 5.0, 1.0)))  # 0.01 ml a voxel


def mask(*spans: tuple[int, int]) -> np.ndarray:
    """Bars along the first axis."""
    found = np.zeros(SHAPE, dtype=bool)
    for start, stop in spans:
        found[start:stop, 3:5, 2:4] = True
    return found


def kinds(lesions: list[Lesion]) -> list[str]:
    return [lesion.kind for lesion in lesions]


def test_lesions_are_matched_one_to_one_by_overlap_and_measured_in_ml() -> None:
    found = find_lesions(mask((0, 4), (10, 12), (20, 22)), mask((1, 5), (15, 17)), geometry=GEOMETRY)
    assert kinds(found) == ["found", "missed", "invented", "invented"]
    first, second, third, fourth = found
    assert (first.reference_ml, first.predicted_ml, first.iou) == pytest.approx((0.16, 0.16, 3 / 5))
    assert (second.lesion, second.reference_ml, second.predicted_ml, second.iou) == (2, pytest.approx(0.08), 0, 0)
    assert [third.lesion, fourth.lesion] == [2, 3]
    assert third.predicted_ml == pytest.approx(0.08)
    assert all(math.isnan(lesion.score) for lesion in found)


def test_one_blob_over_two_lesions_finds_one_by_iou_and_both_by_any() -> None:
    prediction, reference = mask((2, 14)), mask((2, 5), (8, 14))
    assert kinds(find_lesions(prediction, reference, geometry=GEOMETRY)) == ["missed", "found"]
    assert kinds(find_lesions(prediction, reference, geometry=GEOMETRY, rule="any")) == ["found", "found"]
    apart = find_lesions(reference, prediction, geometry=GEOMETRY)
    assert kinds(apart) == ["found", "invented"]
    assert kinds(find_lesions(reference, prediction, geometry=GEOMETRY, rule="any")) == ["found"]


def test_pairs_below_the_threshold_do_not_match() -> None:
    prediction, reference = mask((0, 10)), mask((8, 12))
    assert kinds(find_lesions(prediction, reference, geometry=GEOMETRY, min_iou=0.2)) == ["missed", "invented"]
    assert kinds(find_lesions(prediction, reference, geometry=GEOMETRY, min_iou=1 / 6)) == ["found"]


def test_as_many_pairs_as_can_be_come_before_the_largest_overlap() -> None:
    """P0 overlaps R0 (0.5) and R1 (0.33), P1 only R0 a little: both are matched, though P0-R0 is the best pair."""
    reference, prediction = mask((4, 10), (11, 15)), mask((2, 6), (8, 13))
    overlaps = find_lesions(prediction, reference, geometry=GEOMETRY, min_iou=0.2)
    assert kinds(overlaps) == ["found", "found"]
    assert [lesion.iou for lesion in overlaps] == pytest.approx([2 / 8, 2 / 7])


def test_corners_connect_and_empty_masks_have_no_lesion() -> None:
    diagonal = np.zeros(SHAPE, dtype=bool)
    diagonal[2, 2, 2] = diagonal[3, 3, 3] = True
    assert kinds(find_lesions(diagonal, diagonal, geometry=GEOMETRY)) == ["found"]
    empty = np.zeros(SHAPE, dtype=bool)
    assert find_lesions(empty, empty, geometry=GEOMETRY) == []
    assert kinds(find_lesions(empty, diagonal, geometry=GEOMETRY)) == ["missed"]
    assert kinds(find_lesions(diagonal, empty, geometry=GEOMETRY, scores=np.full(SHAPE, 0.25))) == ["invented"]


def brute_match(prediction: np.ndarray, reference: np.ndarray, min_iou: float) -> int:
    """Largest number of pairs over every one-to-one choice."""
    (labels_p, num_p), (labels_r, num_r) = (ndimage.label(m, np.ones((3, 3, 3))) for m in (prediction, reference))
    iou = np.zeros((num_p, num_r))
    for p, r in itertools.product(range(num_p), range(num_r)):
        one, two = labels_p == p + 1, labels_r == r + 1
        iou[p, r] = (one & two).sum() / (one | two).sum()
    small, large = (iou, num_r) if num_p <= num_r else (iou.T, num_p)
    choices = itertools.permutations(range(large), small.shape[0])
    return max(sum(small[k, place] >= min_iou for k, place in enumerate(choice)) for choice in choices)


@pytest.mark.parametrize("seed", range(6))
def test_the_number_of_matches_is_the_largest_of_every_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, 16, 14, 1)), (0, 1.6, 1.6, 0))
    prediction, reference = smooth > np.quantile(smooth, 0.8, axis=(1, 2, 3), keepdims=True)
    grid = Geometry((16, 14, 1), np.eye(4))
    found = find_lesions(prediction, reference, geometry=grid, min_iou=0.05)
    assert kinds(found).count("found") == brute_match(prediction, reference, 0.05)


def table(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Rows of case, kind and score; every case is a subject."""
    names = ["case_id", "kind", "score"]
    found = pd.DataFrame(rows, columns=names).assign(label=1, lesion=1, reference_ml=1.0, predicted_ml=1.0, iou=0.5)
    return found.assign(subject_id=found["case_id"])


def searched(*case_ids: str) -> pd.DataFrame:
    return pd.DataFrame({"case_id": case_ids, "subject_id": case_ids, "label": 1})


ROWS = [
    ("a", "found", 0.9),
    ("a", "missed", math.nan),
    ("a", "invented", 0.8),
    ("b", "found", 0.8),
    ("b", "invented", 0.3),
    ("b", "invented", 0.95),
    ("c", "found", 0.2),
]


def test_counts_are_by_case_and_undefined_ones_say_why() -> None:
    cases = lesion_tables(table(ROWS), searched("a", "b", "c", "d"), num=100)["lesion_cases"].set_index("case_id")
    assert cases.index.tolist()[:2] == ["b", "a"] or cases.index.tolist()[:2] == ["a", "b"]
    assert cases.loc["a", ["found", "missed", "invented"]].tolist() == [1, 1, 1]
    assert cases.loc["a", ["sensitivity", "precision", "f1"]].tolist() == [0.5, 0.5, 0.5]
    assert cases.loc["b", "f1"] == pytest.approx(2 / 4)
    assert cases.loc["d", ["sensitivity", "precision", "f1"]].isna().all()
    assert cases["note"].to_dict() == {"a": "", "b": "", "c": "", "d": "no lesion in the reference"}


def test_pooled_numbers_are_ratios_of_sums_and_curves_are_those_of_the_definition() -> None:
    found = lesion_tables(table(ROWS), searched("a", "b", "c", "d"), num=200)
    pooled = found["lesion_summary"].set_index("metric")
    assert pooled["value"][["sensitivity", "precision", "f1", "fp_per_case"]].tolist() == pytest.approx(
        [3 / 4, 3 / 6, 6 / 10, 3 / 4]
    )
    assert (pooled["low"] <= pooled["value"] + 1e-12).all()
    assert (pooled["value"] <= pooled["high"] + 1e-12).all()
    assert pooled[["cases", "subjects", "found", "missed", "invented"]].drop_duplicates().to_numpy().tolist() == [
        [4, 4, 3, 1, 3]
    ]
    points, ap, last = [], 0.0, 0.0
    for threshold in (0.95, 0.9, 0.8, 0.3, 0.2):  # retyped: who is at or above the threshold
        hits = sum(kind == "found" and score >= threshold for _, kind, score in ROWS)
        false = sum(kind == "invented" and score >= threshold for _, kind, score in ROWS)
        points.append((threshold, false / 4, hits / 4, hits / (hits + false)))
        ap += (hits / 4 - last) * hits / (hits + false)
        last = hits / 4
    curve = found["froc"][["score", "fp_per_case", "sensitivity", "precision"]]
    np.testing.assert_allclose(curve.to_numpy(), points)
    assert pooled["value"]["ap"] == pytest.approx(ap)
    at = {rate: max([s for _, f, s, _ in points if f <= rate], default=0.0) for rate in (0.125, 0.25, 0.5, 1, 2, 4, 8)}
    for rate, value in at.items():
        assert pooled["value"][f"sensitivity_at_{rate:g}_fp"] == pytest.approx(value)
    assert pooled["value"]["froc_mean"] == pytest.approx(np.mean(list(at.values())))
    (sentence,) = lesion_sentences(found["lesion_summary"])
    assert sentence.startswith("Lesions of label 1: 3 of 4 found, 3 invented in 4 cases; sensitivity 0.750 (95 % int")


def test_without_scores_there_are_no_curves_and_one_subject_has_no_interval() -> None:
    rows = table([("a", "found", math.nan), ("a", "invented", math.nan)])
    found = lesion_tables(rows, searched("a"), num=100)
    assert "froc" not in found
    pooled = found["lesion_summary"].set_index("metric")
    assert list(pooled.index) == ["sensitivity", "precision", "f1", "fp_per_case"]
    assert pooled["low"].isna().all()
    assert set(pooled["note"]) == {"one subject: no interval"}
    assert lesion_sentences(found["lesion_summary"])[0].endswith("sensitivity 1.000, precision 0.500, F1 0.667.")


def test_what_no_lesion_defines_is_said() -> None:
    none = lesion_tables(table([]), searched("a", "b"), num=100)["lesion_summary"].set_index("metric")
    assert none["note"].to_dict() == {
        "sensitivity": "no lesion in any reference",
        "precision": "no lesion was predicted",
        "f1": "no lesion in any map",
        "fp_per_case": "",
    }
    assert none["value"]["fp_per_case"] == 0
    found = lesion_tables(table([("a", "invented", 0.5), ("b", "invented", 0.7)]), searched("a", "b"), num=100)
    pooled = found["lesion_summary"].set_index("metric")
    assert pooled["value"][["precision", "f1"]].tolist() == [0, 0]
    assert math.isnan(pooled["value"]["ap"])
    assert pooled["note"]["froc_mean"] == "no lesion in any reference"
    assert "sensitivity not defined (no lesion in any reference)" in lesion_sentences(found["lesion_summary"])[0]
