"""Intervals and tests for results of cases that come in clusters: several scans of one subject count as one draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import stats

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


def crossed_bootstrap(
    grid: Float64[np.ndarray, "r n"],
    clusters: Sequence[str],
    *,
    num: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean over repeated runs and cases with a percentile interval; runs and clusters are both drawn anew.

    Args:
        grid: One row a run (a seed), one column a case.
        clusters: Subject of each column.
        num: Number of draws.
        seed: Seed of the draws.
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean of all values, lower and upper end; widened for few clusters as in :func:`cluster_bootstrap`. A single
        row says nothing about the spread of runs, and the interval is then of the clusters alone.

    Raises:
        CaseError: as :func:`cluster_bootstrap`.

    Reference: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007, arXiv:0712.1111.
    Deviations: the percentiles are widened.
    """
    by_run = [_by_cluster(row, clusters) for row in np.atleast_2d(np.asarray(grid, dtype=np.float64))]
    sums, sizes = np.stack([row[0] for row in by_run]), by_run[0][1]
    runs, count = sums.shape
    mean = float(sums.sum() / (runs * sizes.sum()))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(num)
    for draw in range(num):
        columns = np.bincount(rng.integers(count, size=count), minlength=count)
        rows = np.bincount(rng.integers(runs, size=runs), minlength=runs)
        means[draw] = rows @ sums @ columns / (runs * (sizes @ columns))
    tail = widened_tail(count, confidence=confidence)
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))


def crossed_permutation_test(
    differences: Float64[np.ndarray, "r n"], clusters: Sequence[str], *, num: int = 10000, seed: int = 0
) -> float:
    """Two-sided p of the mean of paired differences of several runs; arms are swapped subject by subject.

    All runs of a subject are swapped together, so this is :func:`paired_permutation_test` of the means over runs.

    Args:
        differences: One row a run, one column a case.
        clusters: Subject of each column.
        num: See :func:`paired_permutation_test`.
        seed: See :func:`paired_permutation_test`.
    """
    means = np.atleast_2d(np.asarray(differences, dtype=np.float64)).mean(axis=0)
    return paired_permutation_test(means, np.zeros_like(means), clusters, num=num, seed=seed)


def widened_tail(count: int, *, confidence: float) -> float:
    """Tail probability of the widened percentile interval of a mean of ``count`` independent draws."""
    quantile = stats.t.ppf((1 + confidence) / 2, df=count - 1)
    return float(stats.norm.cdf(-math.sqrt(count / (count - 1)) * quantile))


def paired_bootstrap_difference(
    first: Sequence[float] | Float64[np.ndarray, " n"],
    second: Sequence[float] | Float64[np.ndarray, " n"],
    clusters: Sequence[str],
    *,
    num: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean of ``first - second`` over the same cases, with the interval of :func:`cluster_bootstrap`."""
    return cluster_bootstrap(_differences(first, second), clusters, num=num, seed=seed, confidence=confidence)


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
