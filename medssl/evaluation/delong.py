"""The area under the ROC curve with its interval, and two of them on the same cases; a subject may have many cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy import optimize, stats

from medssl.errors import CaseError
from medssl.evaluation.statistics import Interval, effective_clusters

_NO_ERROR = 1e-12
_ROUNDING = 1e-12


class Comparison(NamedTuple):
    """First area minus the second, its interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def auroc_interval(
    scores: Float64[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    *,
    clusters: Sequence[str],
    confidence: float = 0.95,
) -> Interval:
    """Area under the ROC curve, with an interval on the logit scale that stays inside [0, 1].

    The variance is DeLong's where every subject has one case, and Obuchowski's where subjects have several, positive
    and negative mixed. The quantile is Student's with the effective number of clusters less one. An area of 0 or 1 has
    no variance; its interval is Newcombe's, with clusters as cases.

    Args:
        scores: Higher for positive.
        truth: Which cases are positive.
        clusters: Subject of each case.
        confidence: Share of such intervals that hold the true area.

    Returns:
        Area and ends; all NaN with one class only, and NaN ends where a class comes from one subject or another area
        has no variance, as that of one score for all.

    Raises:
        CaseError: if the lengths differ or a score is not finite.

    Reference: DeLong, DeLong, Clarke-Pearson, Comparing the areas under two or more correlated ROC curves, Biometrics
        1988, eq. 5-8; Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 1997, section 2; logit
        scale: Pepe, The Statistical Evaluation of Medical Tests, 2003, section 5.2.4; areas of 0 and 1: Newcombe,
        Confidence intervals for an effect size measure based on the Mann-Whitney statistic, Part 2, Statistics in
        Medicine 2006, method 5.
    Deviations: Student's quantile for the normal one, which is too small at 20 subjects.
    """
    areas, covariance, counts = _areas([scores], truth, clusters)
    area, variance = float(areas[0]), float(covariance[0, 0])
    if math.isnan(area) or min(counts) < 2:
        return Interval(area, math.nan, math.nan)
    if area in {0.0, 1.0}:
        bound = _perfect_bound(*counts, confidence=confidence)
        return Interval(area, bound, 1.0) if area == 1 else Interval(area, 0.0, 1 - bound)
    error = math.sqrt(variance)
    if error < _NO_ERROR:
        return Interval(area, math.nan, math.nan)
    reach = _quantile(clusters, confidence) * error / (area * (1 - area))
    centre = math.log(area / (1 - area))
    return Interval(area, _sigmoid(centre - reach), _sigmoid(centre + reach))


def compare_aurocs(
    first: Float64[np.ndarray, " n"],
    second: Float64[np.ndarray, " n"],
    *,
    truth: Bool[np.ndarray, " n"],
    clusters: Sequence[str],
    confidence: float = 0.95,
) -> Comparison:
    """Difference of the areas that two scores of the same cases have.

    Args:
        first: Scores, higher for positive.
        second: Scores of the same cases.
        truth: Which cases are positive.
        clusters: Subject of each case.
        confidence: Share of such intervals that hold the true difference.

    Returns:
        The difference; ends and p are NaN where a class comes from less than two subjects, or where a difference other
        than 0 has no variance.

    Raises:
        CaseError: if the lengths differ or a score is not finite.

    Reference: DeLong et al. 1988, section 4; Obuchowski 1997, section 3, as in :func:`auroc_interval`.
    Deviations: Student's quantile, as there.
    """
    areas, covariance, counts = _areas([first, second], truth, clusters)
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if math.isnan(difference) or min(counts) < 2:
        return Comparison(difference, math.nan, math.nan, math.nan)
    error = math.sqrt(max(variance, 0.0))
    if error < _NO_ERROR:
        same = (0.0, 0.0, 1.0) if abs(difference) < 1e-12 else (math.nan, math.nan, math.nan)
        return Comparison(difference, *same)
    reach = _quantile(clusters, confidence) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, df=effective_clusters(clusters) - 1))
    return Comparison(difference, difference - reach, difference + reach, p)


def _areas(
    scores: Sequence[Float64[np.ndarray, " n"]], truth: Bool[np.ndarray, " n"], clusters: Sequence[str]
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, "k k"], tuple[int, int]]:
    """Areas, their covariance, and the numbers of clusters with a positive and with a negative case."""
    table = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(truth, dtype=bool)
    if table.shape[1:] != truth.shape or len(clusters) != len(truth) or not np.isfinite(table).all():
        raise CaseError(
            f"AUROC: scores of shape {table.shape[1:]}, {truth.size} truths, {len(clusters)} subjects; each case "
            "needs one of each, the score finite. Correct the table.",
            code="E_STATISTICS",
        )
    kinds, size = len(table), len(np.unique(np.asarray(clusters)))
    num_positive, num_negative = int(truth.sum()), int((~truth).sum())
    if min(num_positive, num_negative) == 0:
        return np.full(kinds, math.nan), np.full((kinds, kinds), math.nan), (0, 0)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    ours, theirs = index[truth], index[~truth]
    weights = (np.bincount(ours, minlength=size), np.bincount(theirs, minlength=size))
    areas = np.empty(kinds)
    positive, negative = np.empty((kinds, size)), np.empty((kinds, size))
    for row, values in enumerate(table):
        ranks = stats.rankdata(values)
        of_positive = (ranks[truth] - stats.rankdata(values[truth])) / num_negative
        of_negative = 1 - (ranks[~truth] - stats.rankdata(values[~truth])) / num_positive
        areas[row] = of_positive.mean()
        positive[row] = np.bincount(ours, weights=of_positive, minlength=size) - weights[0] * areas[row]
        negative[row] = np.bincount(theirs, weights=of_negative, minlength=size) - weights[1] * areas[row]
    counts = (int((weights[0] > 0).sum()), int((weights[1] > 0).sum()))
    if min(counts) < 2:
        return areas, np.full((kinds, kinds), math.nan), counts
    cross = positive @ negative.T
    covariance = (
        counts[0] / (counts[0] - 1) * (positive @ positive.T) / num_positive**2
        + counts[1] / (counts[1] - 1) * (negative @ negative.T) / num_negative**2
    )
    scale = np.sqrt(covariance.diagonal())
    covariance += size / (size - 1) * (cross + cross.T) / (num_positive * num_negative)
    covariance[np.abs(covariance) <= _ROUNDING * np.outer(scale, scale)] = 0.0  # both parts may cancel
    return areas, covariance, counts


def _perfect_bound(positive: int, negative: int, *, confidence: float) -> float:
    """Least area that still gives an observed area of 1 often enough."""
    z = stats.norm.ppf((1 + confidence) / 2)
    spare = (positive + negative) / 2 - 1

    def excess(area: float) -> float:
        inner = 1 + spare * ((1 - area) / (2 - area) + area / (1 + area))
        return 1 - area - z * math.sqrt(area * (1 - area) * inner / (positive * negative))

    return float(optimize.brentq(excess, 1e-9, 1 - 1e-9))


def _quantile(clusters: Sequence[str], confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, df=effective_clusters(clusters) - 1))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
