"""Decisions against definitions by loops over pairs, thresholds and cells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medssl.evaluation.decisions import (
    auroc,
    average_precision,
    balanced_accuracy,
    concordance,
    confusion,
    curve,
    f1,
    quadratic_kappa,
    r_squared,
    rmse,
    sensitivity_at,
    specificity_at,
)


def some_cases(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random(60) < 0.4
    scores = rng.normal(size=60) + truth
    return (scores.round(0) if ties else scores), truth


def at_threshold(scores: np.ndarray, truth: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """Sensitivity, specificity and precision by counting one case after the other."""
    tp = fp = tn = fn = 0
    for score, positive in zip(scores, truth, strict=True):
        called = score >= threshold
        tp += called and positive
        fp += called and not positive
        tn += not called and not positive
        fn += not called and positive
    return tp / (tp + fn), tn / (tn + fp), tp / (tp + fp) if tp + fp else 1.0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_the_share_of_pairs_in_the_right_order_with_ties_as_half(seed: int, ties: bool) -> None:
    scores, truth = some_cases(seed, ties=ties)
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[truth], scores[~truth])]
    assert auroc(curve(scores, truth)) == pytest.approx(np.mean(pairs))
    statistic = stats.mannwhitneyu(scores[truth], scores[~truth]).statistic
    assert auroc(curve(scores, truth)) == pytest.approx(statistic / (truth.sum() * (~truth).sum()))


@pytest.mark.parametrize("ties", [False, True])
def test_every_point_of_the_curve_is_what_its_threshold_counts(ties: bool) -> None:
    scores, truth = some_cases(3, ties=ties)
    found = curve(scores, truth)
    assert found.thresholds.tolist() == [math.inf, *sorted(set(scores), reverse=True)]
    for point in zip(*found, strict=True):
        assert point[1:] == pytest.approx(at_threshold(scores, truth, point[0]))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_the_sum_over_thresholds(ties: bool) -> None:
    scores, truth = some_cases(4, ties=ties)
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        sensitivity, _, precision = at_threshold(scores, truth, threshold)
        total += (sensitivity - before) * precision
        before = sensitivity
    assert average_precision(curve(scores, truth)) == pytest.approx(total)


def test_average_precision_of_a_known_ranking() -> None:
    # positives at ranks 1, 3 and 4: (1/1 + 2/3 + 3/4) / 3
    scores, truth = np.array([9.0, 8, 7, 6, 5]), np.array([True, False, True, True, False])
    assert average_precision(curve(scores, truth)) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 0.9, 1.0])
def test_operating_points_are_the_best_of_all_thresholds(target: float) -> None:
    scores, truth = some_cases(5, ties=False)
    points = [at_threshold(scores, truth, threshold) for threshold in (math.inf, *scores)]
    found = curve(scores, truth)
    assert sensitivity_at(found, specificity=target) == pytest.approx(max(a for a, b, _ in points if b >= target))
    assert specificity_at(found, sensitivity=target) == pytest.approx(max(b for a, b, _ in points if a >= target))


@pytest.mark.parametrize("truth", [np.zeros(3, dtype=bool), np.ones(3, dtype=bool)])
def test_one_class_defines_nothing(truth: np.ndarray) -> None:
    found = curve(np.array([0.1, 0.5, 0.9]), truth)
    for value in (
        auroc(found),
        average_precision(found),
        sensitivity_at(found, specificity=0.9),
        specificity_at(found, sensitivity=0.9),
    ):
        assert math.isnan(value)


def test_confusion_balanced_accuracy_and_f1_of_a_written_out_table() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    decided = np.array([0, 0, 1, 1, 2, 2])
    counts = confusion(decided, truth, num_classes=4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert balanced_accuracy(counts) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert f1(decided == 1, truth == 1) == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert math.isnan(f1(decided == 3, truth == 3))
    assert math.isnan(balanced_accuracy(confusion(decided[:3], truth[:3], num_classes=3)))


def test_quadratic_kappa_is_the_sum_over_pairs_of_cases() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=50)
    decided = (truth + rng.integers(-1, 2, size=50)).clip(0, 3)
    seen = np.mean([(a - b) ** 2 for a, b in zip(truth, decided, strict=True)])
    chance = np.mean([(a - b) ** 2 for a, b in itertools.product(truth, decided)])
    assert quadratic_kappa(confusion(decided, truth, num_classes=4)) == pytest.approx(1 - seen / chance)
    assert math.isnan(quadratic_kappa(confusion(np.ones(3, dtype=int), np.ones(3, dtype=int), num_classes=2)))


def test_errors_of_numbers_against_scipy_and_definitions() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(50, 10, size=40)
    predicted = 0.8 * truth + rng.normal(5, 4, size=40)
    fit = stats.linregress(predicted, truth)
    straight = fit.slope * predicted + fit.intercept
    assert r_squared(straight, truth) == pytest.approx(fit.rvalue**2)
    assert r_squared(np.full(40, truth.mean()), truth) == pytest.approx(0.0)
    assert rmse(predicted, truth) == pytest.approx(math.sqrt(sum((predicted - truth) ** 2) / 40))
    bias = predicted.std() / truth.std()
    shift = (predicted.mean() - truth.mean()) / math.sqrt(predicted.std() * truth.std())
    accuracy = 2 / (bias + 1 / bias + shift**2)  # Lin 1989: concordance is correlation times this
    assert concordance(predicted, truth) == pytest.approx(stats.pearsonr(predicted, truth).statistic * accuracy)
    assert math.isnan(r_squared(predicted, np.ones(40)))
    assert math.isnan(concordance(np.ones(3), np.ones(3)))


@pytest.mark.parametrize("count", [3, 6, 7, 11])
def test_numbers_that_are_all_equal_define_no_agreement_whatever_their_rounding(count: int) -> None:
    tenths = np.full(count, 0.1)  # their mean is not 0.1 for most counts
    assert math.isnan(r_squared(np.arange(count) / 3, tenths))
    assert math.isnan(r_squared(tenths, tenths))
    assert math.isnan(concordance(tenths, tenths))
    assert concordance(np.full(count, 0.3), tenths) == 0.0
    assert concordance(np.arange(count) / 3, tenths) == 0.0
