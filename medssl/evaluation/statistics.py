"""Intervals and tests for results of cases that come in clusters: several scans of one subject count as one draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import optimize, stats

from medssl.errors import CaseError

_CHUNK = 1000


class Interval(NamedTuple):
    """A mean with its interval; the ends are NaN where fewer than two clusters leave the spread unknown."""

    mean: float
    low: float
    high: float


def cluster_bootstrap(
    values: Sequence[float] | Float64[np.ndarray, " n"],
    clusters: Sequence[str],
    *,
    num: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean over cases with a percentile interval, whole clusters drawn with replacement.

    The percentiles are widened so that the interval of a mean of few clusters covers as often as it says: with C
    clusters the tail is Φ(-√(C/(C-1)) t), t the quantile of Student's distribution with C-1 degrees of freedom.

    Args:
        values: One number a case.
        clusters: Subject of each case.
        num: Number of draws.
        seed: Seed of the draws.
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean of all values, lower and upper end.

    Raises:
        CaseError: if there is no value, a value is not finite, or the lengths differ.

    Reference: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 2015,
        arXiv:1411.5279, section 3.2 ("expanded percentile").
    Deviations: none.
    """
    sums, sizes = _by_cluster(values, clusters)
    mean = float(sums.sum() / sizes.sum())
    count = len(sums)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(num)
    for start in range(0, num, _CHUNK):
        stop = min(start + _CHUNK, num)
        drawn = rng.integers(count, size=(stop - start, count))
        means[start:stop] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = widened_tail(count, confidence=confidence)
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))


def widened_tail(count: int, *, confidence: float) -> float:
    """Tail probability of the widened percentile interval of a mean of ``count`` independent draws."""
    quantile = stats.t.ppf((1 + confidence) / 2, df=count - 1)
    return float(stats.norm.cdf(-math.sqrt(count / (count - 1)) * quantile))


def paired_permutation_test(
    first: Sequence[float] | Float64[np.ndarray, " n"],
    second: Sequence[float] | Float64[np.ndarray, " n"],
    clusters: Sequence[str],
    *,
    num: int = 10000,
    seed: int = 0,
) -> float:
    """Two-sided p of the mean difference when first and second are swapped at random, cluster by cluster.

    Args:
        first: One number a case.
        second: One number for each of the same cases.
        clusters: Subject of each case; all cases of a subject are swapped together.
        num: Number of random swaps; where all 2^C swaps are no more than this, all are taken and p is exact.
        seed: Seed of the swaps.

    Returns:
        Share of swaps with a difference at least as large as the observed one; never 0.
    """
    sums, _ = _by_cluster(_differences(first, second), clusters)
    observed = abs(sums.sum()) * (1 - 1e-12)  # equal sums added in another order must count as equal
    count = len(sums)
    if count <= math.log2(num):
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return float((np.abs(signs @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, num, _CHUNK):
        signs = rng.choice((-1.0, 1.0), size=(min(_CHUNK, num - start), count))
        extreme += int((np.abs(signs @ sums) >= observed).sum())
    return (extreme + 1) / (num + 1)


class CrossedMean(NamedTuple):
    """A mean over seeds and subjects, its interval, and the two-sided p of a mean of 0.

    The ends and p are NaN where there are fewer than two seeds or two subjects.
    """

    mean: float
    low: float
    high: float
    p: float


def crossed_mean(
    values: Float64[np.ndarray, "s n"], clusters: Sequence[str], *, confidence: float = 0.95
) -> CrossedMean:
    """Mean over seeds (rows) and subjects (clusters of columns) that were both drawn from many.

    The mean is a grand mean plus an effect of the seeds plus one of the subjects. Each effect has Student's interval
    of its own, ``t(S - 1) sqrt(var(row means) / S)`` and ``t(C - 1) sqrt(var(column means) / C)``; the interval of
    the sum reaches as far as the root of the sum of their squares. A bootstrap of three seeds would be too narrow by
    construction. The residual is counted in both terms, which errs on the wide side.

    Args:
        values: One number a seed and case.
        clusters: Subject of each case; every subject counts the same.
        confidence: Share of such intervals that hold the true mean.

    Raises:
        CaseError: if there is no value, a value is not finite, or the lengths differ.

    Reference: Zou, Donner, Construction of confidence limits about effect measures, Statistics in Medicine 2008, eq. 4
        (recovering a variance from the interval of each term).
    Deviations: none.
    """
    subjects = np.stack([np.divide(*_by_cluster(row, clusters)) for row in values])
    num_seeds, num_subjects = subjects.shape
    mean = float(subjects.mean())
    if min(num_seeds, num_subjects) < 2:
        return CrossedMean(mean, math.nan, math.nan, math.nan)
    error_seed = math.sqrt(float(subjects.mean(axis=1).var(ddof=1)) / num_seeds)
    error_subject = math.sqrt(float(subjects.mean(axis=0).var(ddof=1)) / num_subjects)

    def reach(p: float) -> float:
        by_seed = stats.t.isf(p / 2, df=num_seeds - 1) * error_seed
        return math.hypot(by_seed, stats.t.isf(p / 2, df=num_subjects - 1) * error_subject)

    if error_seed == error_subject == 0:
        return CrossedMean(mean, mean, mean, float(mean == 0))
    p = optimize.brentq(lambda p: reach(p) - abs(mean), 1e-12, 1.0) if reach(1e-12) > abs(mean) else 1e-12
    distance = reach(1 - confidence)
    return CrossedMean(mean, mean - distance, mean + distance, float(p))


def _differences(
    first: Sequence[float] | Float64[np.ndarray, " n"], second: Sequence[float] | Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise CaseError(
            f"paired comparison: {one.size} against {two.size} values; pairs are needed. Give both for the same cases.",
            code="E_STATISTICS",
        )
    return one - two


def _by_cluster(
    values: Sequence[float] | Float64[np.ndarray, " n"], clusters: Sequence[str]
) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
    """Sum and number of values in each cluster, clusters sorted by name."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) != len(clusters) or len(array) == 0:
        raise CaseError(
            f"statistics: {array.size} values and {len(clusters)} clusters; one of each a case is needed.",
            code="E_STATISTICS",
        )
    if not np.isfinite(array).all():
        raise CaseError(
            f"statistics: {int((~np.isfinite(array)).sum())} of {len(array)} values are not finite; leaving them out "
            "would flatter a model that fails. Give the worst value of the metric for them.",
            code="E_STATISTICS",
        )
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, weights=array), np.bincount(index).astype(np.float64)
