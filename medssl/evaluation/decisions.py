"""How well scores, decisions and predicted numbers agree with the truth.

Scores are higher for positive; a case is called positive from a threshold on (``score >= threshold``). What the cases
do not define, as an AUROC of one class, is NaN, for the caller to say so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

_EQUAL = 1e-12


class Curve(NamedTuple):
    """What each threshold gives, from one above every score (nobody is positive) down to the lowest score.

    Args:
        thresholds: Falling; the first is infinite.
        sensitivity: Share of the positives that are called positive; NaN without positives.
        specificity: Share of the negatives that are not; NaN without negatives.
        precision: Share of those called positive that are; 1 where nobody is called.
    """

    thresholds: Float64[np.ndarray, " t"]
    sensitivity: Float64[np.ndarray, " t"]
    specificity: Float64[np.ndarray, " t"]
    precision: Float64[np.ndarray, " t"]


def curve(scores: Float64[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> Curve:
    """Sensitivity, specificity and precision at every score that occurs; equal scores fall together."""
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], truth[order]
    last = np.flatnonzero(np.append(np.diff(ordered) != 0, True))
    found = np.concatenate([[0], np.cumsum(hits)[last]]).astype(np.float64)
    called = np.concatenate([[0], last + 1]).astype(np.float64)
    positives, negatives = float(truth.sum()), float((~truth).sum())
    return Curve(
        np.concatenate([[math.inf], ordered[last]]),
        found / positives if positives else np.full(len(found), math.nan),
        1 - (called - found) / negatives if negatives else np.full(len(found), math.nan),
        np.divide(found, called, out=np.ones_like(found), where=called > 0),
    )


def auroc(found: Curve) -> float:
    """Chance that a positive case has a higher score than a negative one, equal scores counting half.

    It is the area under sensitivity over 1 - specificity, by trapezoids. NaN if a class is missing.

    Reference: Hanley, McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.
    Deviations: none.
    """
    return float(np.trapezoid(found.sensitivity, 1 - found.specificity))


def average_precision(found: Curve) -> float:
    """Precision at each threshold, weighted by the sensitivity that it adds: ``Σ (S_t - S_{t-1}) P_t``, no smoothing.

    NaN if a class is missing.
    """
    if math.isnan(found.specificity[0]):
        return math.nan
    return float((np.diff(found.sensitivity) * found.precision[1:]).sum())


def sensitivity_at(found: Curve, *, specificity: float) -> float:
    """Highest sensitivity of a threshold with at least this specificity; NaN if a class is missing."""
    if math.isnan(found.specificity[0]):
        return math.nan
    return float(found.sensitivity[found.specificity >= specificity - _EQUAL].max())


def specificity_at(found: Curve, *, sensitivity: float) -> float:
    """Highest specificity of a threshold with at least this sensitivity; NaN if a class is missing."""
    if math.isnan(found.sensitivity[0]):
        return math.nan
    return float(found.specificity[found.sensitivity >= sensitivity - _EQUAL].max())


def confusion(
    decided: Int64[np.ndarray, " n"], truth: Int64[np.ndarray, " n"], *, num_classes: int
) -> Int64[np.ndarray, "k k"]:
    """Number of cases by true class (row) and decided class (column)."""
    counts = np.bincount(truth * num_classes + decided, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def balanced_accuracy(counts: Int64[np.ndarray, "k k"]) -> float:
    """Mean share of right decisions over the classes that occur in the truth; NaN if only one does.

    Args:
        counts: As of :func:`confusion`.
    """
    totals = counts.sum(axis=1)
    there = totals > 0
    return float((np.diag(counts)[there] / totals[there]).mean()) if there.sum() > 1 else math.nan


def f1(decided: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and sensitivity; NaN if no case is positive, neither truly nor by decision."""
    total = int(decided.sum() + truth.sum())
    return 2 * int((decided & truth).sum()) / total if total else math.nan


def quadratic_kappa(counts: Int64[np.ndarray, "k k"]) -> float:
    """Agreement of ordered classes beyond chance, errors weighing as the square of their distance.

    ``1 - Σ w O / Σ w E`` with ``w_ij = (i - j)²``, O the counts and E those expected from the margins; NaN if truth and
    decisions are all of one and the same class.

    Reference: Cohen, Weighted kappa, Psychological Bulletin 1968.
    Deviations: none.
    """
    places = np.arange(len(counts))
    weights = (places[:, None] - places[None]) ** 2
    expected = counts.sum(axis=1)[:, None] * counts.sum(axis=0)[None] / counts.sum()
    chance = float((weights * expected).sum())
    return 1 - float((weights * counts).sum()) / chance if chance else math.nan


def rmse(predicted: Float64[np.ndarray, " n"], truth: Float64[np.ndarray, " n"]) -> float:
    """Root of the mean squared error, in the unit of the target."""
    return float(np.sqrt(((predicted - truth) ** 2).mean()))


def r_squared(predicted: Float64[np.ndarray, " n"], truth: Float64[np.ndarray, " n"]) -> float:
    """One less the squared error over that of the mean of the truth; below 0 is worse than that; NaN if all equal."""
    if np.ptp(truth) == 0:
        return math.nan
    return 1 - float(((predicted - truth) ** 2).sum()) / float(((truth - truth.mean()) ** 2).sum())


def concordance(predicted: Float64[np.ndarray, " n"], truth: Float64[np.ndarray, " n"]) -> float:
    """Correlation that shift and scale lower: ``2 s_xy / (s_x² + s_y² + (x̄ - ȳ)²)``; NaN if all equal.

    Variances are over n.

    Reference: Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 1989, eq. 1.
    Deviations: none.
    """
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return math.nan if np.ptp([predicted, truth]) == 0 else 0.0
    joint = float(((predicted - predicted.mean()) * (truth - truth.mean())).mean())
    return 2 * joint / float(predicted.var() + truth.var() + (predicted.mean() - truth.mean()) ** 2)
