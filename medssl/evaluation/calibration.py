"""Whether a probability of 0.8 comes true in 8 of 10 cases, and how to make it so on a validation split."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import optimize, special

from medssl.errors import CaseError

Binning = Literal["width", "mass"]

_LEAST = 1e-12
_TEMPERATURES = (0.05, 20.0)


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
    edges = np.linspace(0, 1, bins + 1)
    if binning == "mass":
        ordered = np.sort(probability)
        firsts = np.unique(ordered[np.arange(1, bins) * len(ordered) // bins])  # first case of each later bin
        edges = np.concatenate([[0.0], firsts[(firsts > ordered[0]) & (firsts < 1)], [1.0]])
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


def fit_temperature(logits: Float64[np.ndarray, "n k"], truth: Int64[np.ndarray, " n"]) -> float:
    """Number to divide logits by so that the log loss of a validation split is least, in [0.05, 20].

    Logarithms of probabilities serve as logits. The decisions stay as they are. The ends are reached where the split
    holds no error, or nothing but chance.

    Raises:
        CaseError: if there is no case.

    Reference: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    Deviations: Brent's method on the logarithm of the temperature; the loss has one minimum there.
    """
    _check(len(truth))

    def loss(log_temperature: float) -> float:
        scaled = special.log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(np.take_along_axis(scaled, truth[:, None], axis=1).mean())

    low, high = (math.log(end) for end in _TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return math.exp(min((low, float(found.x), high), key=loss))


class Platt(NamedTuple):
    """A straight line on logits: ``sigmoid(slope * logit + intercept)``."""

    slope: float
    intercept: float

    def probability(self, logits: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Calibrated probability of each logit."""
        return np.asarray(special.expit(self.slope * logits + self.intercept), dtype=np.float64)


def fit_platt(logits: Float64[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> Platt:
    """Fit the line for one label of a multi-label task on a validation split.

    Targets are ``(N₊+1)/(N₊+2)`` and ``1/(N₋+2)`` in place of 1 and 0, so that the fit stays finite without errors.

    Raises:
        CaseError: if there is no case.

    Reference: Platt, Probabilistic outputs for support vector machines, 1999, section 2; Lin, Lin, Weng, A note on
        Platt's probabilistic outputs, Machine Learning 2007, eq. 1-2.
    Deviations: L-BFGS in place of their Newton method; the slope is that of the logit itself, minus their A.
    """
    _check(len(truth))
    positives, negatives = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(line: Float64[np.ndarray, " 2"]) -> tuple[float, Float64[np.ndarray, " 2"]]:
        z = line[0] * logits + line[1]
        error = special.expit(z) - target
        return float((np.logaddexp(0, z) - target * z).mean()), np.array([(error * logits).mean(), error.mean()])

    start = np.array([1.0, math.log((positives + 1) / (negatives + 1))])
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9})
    return Platt(float(found.x[0]), float(found.x[1]))


def _check(num_cases: int) -> None:
    if num_cases == 0:
        raise CaseError("calibration: no case; it is fitted on a validation split. Add one.", code="E_STATISTICS")
