"""Whether a probability of 0.8 comes true in 8 of 10 cases."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

Binning = Literal["width", "mass"]

_LEAST = 1e-12


class Bin(NamedTuple):
    """Cases whose probability lies in [low, high), the last bin with its upper end.

    Args:
        low: Lower edge.
        high: Upper edge.
        cases: How many.
        probability: Their mean probability; NaN without cases.
        frequency: Share of them that came true; NaN without cases.
    """

    low: float
    high: float
    cases: int
    probability: float
    frequency: float


def reliability(
    probability: Float64[np.ndarray, " n"],
    came_true: Bool[np.ndarray, " n"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> list[Bin]:
    """Mean probability against frequency, bin by bin.

    Args:
        probability: In [0, 1].
        came_true: Whether the class was the true one.
        bins: How many, at most.
        binning: ``width`` cuts [0, 1] in equal parts; ``mass`` cuts at quantiles, so that bins hold about as many cases
            each; equal probabilities stay together, which may leave fewer bins.
    """
    edges = np.arange(bins + 1) / bins
    if binning == "mass":
        ordered = np.sort(probability)
        firsts = np.unique(ordered[np.arange(1, bins) * len(ordered) // bins])  # first case of each later bin
        edges = np.concatenate([[0.0], firsts[firsts > ordered[0]], [1.0]])
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, len(edges) - 2)
    count = len(edges) - 1
    cases = np.bincount(place, minlength=count)
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        means = np.bincount(place, weights=probability, minlength=count) / cases
        shares = np.bincount(place, weights=came_true, minlength=count) / cases
    columns = (edges[:-1].tolist(), edges[1:].tolist(), cases.tolist(), means.tolist(), shares.tolist())
    return [Bin(*row) for row in zip(*columns, strict=True)]


def calibration_error(
    probability: Float64[np.ndarray, " n"],
    came_true: Bool[np.ndarray, " n"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> float:
    """Expected calibration error: distance of mean probability and frequency, averaged over cases.

    Args:
        probability: Of the decided class for the error of an exclusive task, or of one class for its own.
        came_true: Whether that class was the true one.
        bins: See :func:`reliability`.
        binning: See :func:`reliability`.

    Reference: Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks, ICML 2017, arXiv:1706.04599,
        eq. 3 (width); Nixon et al., Measuring calibration in deep learning, arXiv:1904.01685, section 3.3 (mass).
    Deviations: bins hold their lower edge, not the upper one.
    """
    rows = [row for row in reliability(probability, came_true, bins=bins, binning=binning) if row.cases]
    return sum(row.cases * abs(row.probability - row.frequency) for row in rows) / len(probability)


def brier_terms(probabilities: Float64[np.ndarray, "n k"], truth: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Squared error of the probabilities of each case; their mean is the Brier score.

    Two classes: of one of them, in [0, 1]. More: summed over classes, in [0, 2], as Brier has it.

    Reference: Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 1950, eq. 2.
    Deviations: half the sum for two classes, as is usual today.
    """
    target = np.eye(probabilities.shape[1])[truth]
    terms: Float64[np.ndarray, " n"] = ((probabilities - target) ** 2).sum(axis=1)
    return terms / 2 if probabilities.shape[1] == 2 else terms


def log_loss_terms(
    probabilities: Float64[np.ndarray, "n k"], truth: Int64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Minus the natural logarithm of the probability of the true class of each case, taken as at least 1e-12."""
    of_truth = np.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
    return np.asarray(-np.log(np.maximum(of_truth, _LEAST)), dtype=np.float64)
