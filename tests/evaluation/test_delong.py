"""Areas under the curve with intervals: DeLong and Obuchowski retyped with loops, and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medssl.errors import CaseError
from medssl.evaluation.delong import auroc_interval, compare_aurocs
from medssl.evaluation.statistics import effective_clusters


def kernel(x: float, y: float) -> float:
    return 1.0 if x > y else 0.5 if x == y else 0.0


def delong_covariance(tables: list[np.ndarray], truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas and their covariance, equations 2 to 8 of the paper of 1988, pair by pair."""
    structural = []
    for scores in tables:
        x, y = scores[truth], scores[~truth]
        v10 = [sum(kernel(a, b) for b in y) / len(y) for a in x]
        v01 = [sum(kernel(a, b) for a in x) / len(x) for b in y]
        structural.append((np.mean(v10), v10, v01))
    areas = np.array([area for area, _, _ in structural])
    size = len(tables)
    covariance = np.zeros((size, size))
    m, n = int(truth.sum()), int((~truth).sum())
    for r in range(size):
        for s in range(size):
            s10 = sum((structural[r][1][i] - areas[r]) * (structural[s][1][i] - areas[s]) for i in range(m)) / (m - 1)
            s01 = sum((structural[r][2][j] - areas[r]) * (structural[s][2][j] - areas[s]) for j in range(n)) / (n - 1)
            covariance[r, s] = s10 / m + s01 / n
    return areas, covariance


def obuchowski_variance(scores: np.ndarray, truth: np.ndarray, clusters: list[str]) -> tuple[float, float]:
    """Area and variance of section 2 of the paper of 1997, cluster by cluster."""
    x, y = scores[truth], scores[~truth]
    area = float(np.mean([[kernel(a, b) for b in y] for a in x]))
    m, n = len(x), len(y)
    names = sorted(set(clusters))
    t10, t01 = [], []
    for name in names:
        own = [i for i, cluster in enumerate(clusters) if cluster == name]
        diseased = [i for i in own if truth[i]]
        healthy = [i for i in own if not truth[i]]
        v10 = sum(sum(kernel(scores[i], b) for b in y) / n for i in diseased)
        v01 = sum(sum(kernel(a, scores[i]) for a in x) / m for i in healthy)
        t10.append((len(diseased), v10 - len(diseased) * area))
        t01.append((len(healthy), v01 - len(healthy) * area))
    i10, i01, count = sum(k > 0 for k, _ in t10), sum(k > 0 for k, _ in t01), len(names)
    s10 = i10 / ((i10 - 1) * m) * sum(v * v for _, v in t10)
    s01 = i01 / ((i01 - 1) * n) * sum(v * v for _, v in t01)
    s11 = count / (count - 1) * sum(a * b for (_, a), (_, b) in zip(t10, t01, strict=True))
    return area, s10 / m + s01 / n + 2 * s11 / (m * n)


def variance_of(found: tuple[float, float, float], clusters: list[str]) -> float:
    """Variance that the interval was made with."""
    area, low, high = found
    quantile = stats.t.ppf(0.975, df=effective_clusters(clusters) - 1)
    reach = (math.log(high / (1 - high)) - math.log(low / (1 - low))) / 2
    return (reach / quantile * area * (1 - area)) ** 2


def two_readers(seed: int, num: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random(num) < 0.4
    shared = rng.normal(size=num) + truth
    return (shared + 0.5 * rng.normal(size=num)).round(1), (shared + rng.normal(size=num)).round(1), truth


@pytest.mark.parametrize("seed", range(4))
def test_one_case_a_subject_is_delong(seed: int) -> None:
    first, second, truth = two_readers(seed)
    clusters = [f"s{i}" for i in range(len(truth))]
    areas, covariance = delong_covariance([first, second], truth)
    found = auroc_interval(first, truth, clusters=clusters)
    assert found.mean == pytest.approx(areas[0])
    assert variance_of(found, clusters) == pytest.approx(covariance[0, 0])
    compared = compare_aurocs(first, second, truth=truth, clusters=clusters)
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert compared.difference == pytest.approx(areas[0] - areas[1])
    t = (areas[0] - areas[1]) / error
    assert compared.p == pytest.approx(2 * stats.t.sf(abs(t), df=len(truth) - 1))
    assert compared.high - compared.difference == pytest.approx(stats.t.ppf(0.975, df=len(truth) - 1) * error)


@pytest.mark.parametrize("seed", range(4))
def test_subjects_with_cases_of_both_classes_are_obuchowski(seed: int) -> None:
    first, second, truth = two_readers(seed, num=60)
    clusters = [f"s{i}" for i in np.random.default_rng(seed).integers(25, size=60)]
    area, variance = obuchowski_variance(first, truth, clusters)
    found = auroc_interval(first, truth, clusters=clusters)
    assert found.mean == pytest.approx(area)
    assert variance_of(found, clusters) == pytest.approx(variance)
    # the variance of a difference is linear in the structural components: that of one score on their difference
    compared = compare_aurocs(first, second, truth=truth, clusters=clusters)
    again = compare_aurocs(second, first, truth=truth, clusters=clusters)
    assert again == pytest.approx((-compared.difference, -compared.high, -compared.low, compared.p))


def test_the_difference_from_a_score_that_tells_nothing_has_the_variance_of_the_other() -> None:
    first, _, truth = two_readers(7, num=60)
    clusters = [f"s{i // 2}" for i in range(60)]
    _, variance = obuchowski_variance(first, truth, clusters)
    compared = compare_aurocs(first, np.zeros(60), truth=truth, clusters=clusters)
    quantile = stats.t.ppf(0.975, df=29)
    assert (compared.high - compared.low) / 2 == pytest.approx(quantile * math.sqrt(variance))


def test_a_perfect_area_keeps_an_open_interval_and_so_does_its_mirror() -> None:
    truth = np.arange(20) >= 10
    clusters = [f"s{i}" for i in range(20)]
    found = auroc_interval(np.arange(20.0), truth, clusters=clusters)
    assert (found.mean, found.high) == (1.0, 1.0)
    z, spare, low = stats.norm.ppf(0.975), 9.0, found.low
    inner = 1 + spare * ((1 - low) / (2 - low) + low / (1 + low))
    assert 1 - low == pytest.approx(z * math.sqrt(low * (1 - low) * inner / 100))
    assert 0.75 < low < 0.9
    mirrored = auroc_interval(-np.arange(20.0), truth, clusters=clusters)
    assert mirrored == pytest.approx((0.0, 0.0, 1 - low))


def test_what_is_not_known_is_nan() -> None:
    scores = np.array([0.1, 0.4, 0.6, 0.9])
    names = ["a", "b", "c", "d"]
    assert all(math.isnan(x) for x in auroc_interval(scores, np.ones(4, dtype=bool), clusters=names))
    truth = np.array([False, True, False, True])
    one = auroc_interval(scores, truth, clusters=["a", "b", "c", "b"])
    assert one.mean == 0.75
    assert math.isnan(one.low)
    assert math.isnan(compare_aurocs(scores, scores, truth=truth, clusters=["a", "b", "c", "b"]).p)


def test_equal_scores_differ_by_nothing_and_two_sure_areas_have_no_p() -> None:
    first, _, truth = two_readers(1)
    clusters = [f"s{i}" for i in range(40)]
    assert compare_aurocs(first, first, truth=truth, clusters=clusters) == (0.0, 0.0, 0.0, 1.0)
    sure = compare_aurocs(truth.astype(float), -truth.astype(float), truth=truth, clusters=clusters)
    assert sure.difference == 1.0
    assert math.isnan(sure.p)


def test_an_area_without_variance_has_no_interval() -> None:
    names = [f"s{i}" for i in range(20)]
    tied = auroc_interval(np.full(20, 0.3), np.arange(20) % 2 == 0, clusters=names)
    assert tied.mean == 0.5
    assert math.isnan(tied.low)
    for seed in range(30):  # one score a subject, who has a case of each class: rounding may make the variance negative
        count = 3 + seed
        scores = np.repeat(np.random.default_rng(seed).random(count), 2)
        subjects = np.repeat([f"s{i}" for i in range(count)], 2).tolist()
        found = auroc_interval(scores, np.arange(2 * count) % 2 == 0, clusters=subjects)
        assert found.mean == pytest.approx(0.5)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_scores_that_are_no_numbers_or_not_of_the_same_cases_are_refused() -> None:
    truth = np.array([False, True])
    with pytest.raises(CaseError, match="2 truths, 2 subjects"):
        auroc_interval(np.array([0.1, math.nan]), truth, clusters=["a", "b"])
    with pytest.raises(CaseError, match="1 subjects"):
        auroc_interval(np.array([0.1, 0.2]), truth, clusters=["a"])


def test_a_low_area_far_from_chance_keeps_its_interval_inside_the_unit() -> None:
    scores = np.concatenate([np.arange(400.0), np.arange(400.0) + 380.5])
    found = auroc_interval(scores, np.arange(800) < 400, clusters=[f"s{i}" for i in range(800)])
    assert 0 <= found.low < found.mean < found.high < 0.1


@pytest.mark.parametrize("count", [20, 50])
def test_the_interval_of_an_area_of_repeated_cases_holds_the_truth_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(count)
    held = 0
    for _ in range(500):
        subjects = np.repeat(np.arange(count), rng.integers(1, 6, size=count))
        truth = rng.random(len(subjects)) < 0.4
        shared = rng.normal(size=count)[subjects]
        scores = 1.8 * truth + math.sqrt(0.5) * shared + math.sqrt(0.5) * rng.normal(size=len(subjects))
        found = auroc_interval(scores, truth, clusters=subjects.astype(str).tolist())
        held += found.low <= stats.norm.cdf(1.8 / math.sqrt(2)) <= found.high
    assert 0.92 < held / 500 < 0.98
