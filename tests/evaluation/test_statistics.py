"""Intervals and tests against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medssl.errors import CaseError
from medssl.evaluation.statistics import (
    cluster_bootstrap,
    crossed_bootstrap,
    crossed_permutation_test,
    paired_bootstrap_difference,
    paired_permutation_test,
    widened_tail,
)


def names(count: int) -> list[str]:
    return [f"s{index:03d}" for index in range(count)]


def test_one_case_a_subject_equals_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=30)
    tail = widened_tail(30, confidence=0.95)
    oracle = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        confidence_level=1 - 2 * tail,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = cluster_bootstrap(values, names(30), num=20_000)
    assert found.mean == pytest.approx(values.mean())
    spread = values.std() / math.sqrt(30)
    assert found.low == pytest.approx(oracle.low, abs=0.1 * spread)
    assert found.high == pytest.approx(oracle.high, abs=0.1 * spread)


def test_the_widening_vanishes_with_many_clusters_and_matches_its_formula_for_few() -> None:
    assert widened_tail(100_000, confidence=0.95) == pytest.approx(0.025, abs=1e-5)
    # t(0.975, 4) = 2.776445; sqrt(5/4) * 2.776445 = 3.104160; Phi(-3.104160) = 0.000954
    assert widened_tail(5, confidence=0.95) == pytest.approx(0.000954, abs=2e-6)


def test_scans_of_one_subject_are_drawn_together() -> None:
    values = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    clusters = ["a", "a", "b", "b", "c", "c"]
    wide = cluster_bootstrap(values, clusters, num=4000)
    repeated = cluster_bootstrap([0.0, 0.0, 1.0], ["a", "b", "c"], num=4000)
    assert wide == repeated


def test_clusters_of_unequal_size_weigh_by_their_cases() -> None:
    values, clusters = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = cluster_bootstrap(values, clusters, num=5000)
    assert found.mean == pytest.approx(2.0)
    # the draws are aa (1), ab or ba (2), bb (5), each end with probability 1/4
    assert (found.low, found.high) == (1.0, 5.0)


def test_interval_of_few_subjects_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(400):
        found = cluster_bootstrap(rng.normal(size=6), names(6), num=1000, seed=trial)
        hits += found.low <= 0 <= found.high
    assert hits / 400 > 0.92  # the plain percentile interval covers 0.86 here


def test_one_subject_has_no_interval() -> None:
    found = cluster_bootstrap([0.8, 0.9], ["a", "a"])
    assert found.mean == pytest.approx(0.85)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_same_seed_same_interval_and_the_order_of_cases_does_not_matter() -> None:
    values, clusters = np.random.default_rng(4).random(12), names(12)
    one = cluster_bootstrap(values, clusters, seed=7)
    order = np.random.default_rng(5).permutation(12)
    two = cluster_bootstrap(values[order], [clusters[index] for index in order], seed=7)
    assert one == pytest.approx(two)
    assert one != cluster_bootstrap(values, clusters, seed=8)


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.random(20), rng.random(20)
    clusters = [f"s{index // 2}" for index in range(20)]
    assert paired_bootstrap_difference(first, second, clusters, seed=2) == cluster_bootstrap(
        first - second, clusters, seed=2
    )
    constant = paired_bootstrap_difference(first + 0.25, first, clusters)
    assert constant == pytest.approx((0.25, 0.25, 0.25))


def test_permutation_test_equals_scipy_for_all_swaps() -> None:
    rng = np.random.default_rng(7)
    first, second = rng.normal(0.6, 1, size=9), rng.normal(size=9)
    oracle = stats.permutation_test(
        (first, second),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert paired_permutation_test(first, second, names(9)) == pytest.approx(oracle)


def test_permutation_test_by_chance_is_near_the_exact_one() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.normal(0.5, 1, size=13), rng.normal(size=13)
    exact = paired_permutation_test(first, second, names(13), num=2**13)
    drawn = paired_permutation_test(first, second, names(13), num=8000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 8000))


def test_subjects_are_swapped_whole() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4)
    clusters = ["a", "a", "b", "b"]
    sums = [3.0, 7.0]
    signs = itertools.product((-1, 1), repeat=2)
    expected = np.mean([abs(s * sums[0] + t * sums[1]) >= 10 for s, t in signs])
    assert paired_permutation_test(first, second, clusters) == expected == 0.5


def test_equal_arms_give_p_one_and_no_p_is_zero() -> None:
    assert paired_permutation_test(np.ones(30), np.ones(30), names(30), num=500) == 1.0
    assert paired_permutation_test(np.ones(30), np.zeros(30), names(30), num=500) == pytest.approx(1 / 501)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "0 values and 0 clusters"),
        ([1.0, 2.0], ["a"], "2 values and 1 clusters"),
        ([1.0, float("nan")], ["a", "b"], "1 of 2 values are not finite"),
    ],
)
def test_values_that_cannot_be_summarised_are_refused(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(CaseError, match=message) as error:
        cluster_bootstrap(values, clusters)
    assert error.value.code == "E_STATISTICS"


def test_values_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(CaseError, match="pairs are needed"):
        paired_bootstrap_difference([1.0], [1.0, 2.0], ["a"])


def test_one_run_is_the_cluster_bootstrap_up_to_its_draws() -> None:
    values = np.random.default_rng(10).random(15)
    one = crossed_bootstrap(values[None], names(15), num=4000)
    two = cluster_bootstrap(values, names(15), num=4000)
    assert one == pytest.approx(two, abs=0.02)


def test_the_spread_of_runs_widens_the_interval() -> None:
    rng = np.random.default_rng(11)
    cases = rng.normal(size=20)
    same = np.stack([cases, cases, cases])
    other = cases + np.array([-1.0, 0.0, 1.0])[:, None]
    narrow, wide = crossed_bootstrap(same, names(20)), crossed_bootstrap(other, names(20))
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_crossed_bootstrap_has_the_variance_of_its_formula() -> None:
    """Additive runs and cases: Var = Var(runs) / R + Var(cases) / C, with population variances of what is drawn."""
    rng = np.random.default_rng(12)
    runs, cases = rng.normal(size=8), rng.normal(size=40)
    found = crossed_bootstrap(runs[:, None] + cases, names(40), num=8000)
    spread = math.sqrt(runs.var() / 8 + cases.var() / 40)
    z = -stats.norm.ppf(widened_tail(40, confidence=0.95))
    assert (found.high - found.low) / 2 == pytest.approx(z * spread, rel=0.06)


def test_crossed_results_of_one_subject_have_no_interval() -> None:
    found = crossed_bootstrap(np.array([[1.0, 2.0], [3.0, 4.0]]), ["a", "a"])
    assert found.mean == pytest.approx(2.5)
    assert math.isnan(found.low)


def test_crossed_permutation_swaps_all_runs_of_a_subject() -> None:
    rng = np.random.default_rng(13)
    differences = rng.normal(0.4, 1, size=(3, 8))
    clusters = [f"s{index // 2}" for index in range(8)]
    means = differences.mean(axis=0)
    assert crossed_permutation_test(differences, clusters) == paired_permutation_test(means, np.zeros(8), clusters)
