"""Intervals and tests against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from medssl.errors import CaseError
from medssl.evaluation.statistics import (
    bootstrap,
    cluster_bootstrap,
    cluster_proportion,
    crossed_mean,
    effective_clusters,
    holm,
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


def test_differences_that_cancel_have_a_p_of_one_and_equal_sums_count_whatever_their_rounding() -> None:
    for tenths in ([22, 12, -8, 6, -7, -25], [1, 8, -2, -4, 6, -9], [1, 2, -3], [5, -1, 3, 3]):
        swaps = [abs(sum(a * b for a, b in zip(signs, tenths, strict=True))) for signs in signs_of(len(tenths))]
        expected = np.mean([swap >= abs(sum(tenths)) for swap in swaps])
        found = paired_permutation_test(np.array(tenths) / 10, np.zeros(len(tenths)), names(len(tenths)))
        assert found == pytest.approx(expected)


def signs_of(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=count))


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
        paired_permutation_test([1.0], [1.0, 2.0], ["a"])


def test_the_spread_of_runs_widens_the_interval() -> None:
    rng = np.random.default_rng(11)
    cases = rng.normal(size=20)
    same = np.stack([cases, cases, cases])
    other = cases + np.array([-1.0, 0.0, 1.0])[:, None]
    narrow, wide = crossed_mean(same, names(20)), crossed_mean(other, names(20))
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_without_spread_of_runs_it_is_the_one_sample_t_test_over_subjects() -> None:
    cases = np.random.default_rng(12).normal(0.3, 1, size=25)
    found = crossed_mean(np.stack([cases] * 3), names(25))
    reference = stats.ttest_1samp(cases, 0.0)
    interval = reference.confidence_interval()
    assert found == pytest.approx((cases.mean(), interval.low, interval.high, reference.pvalue))


def test_cases_of_one_subject_count_as_one() -> None:
    values = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    merged = np.array([[1.5, 6.0], [3.5, 8.0]])
    assert crossed_mean(values, ["a", "a", "b"]) == crossed_mean(merged, ["a", "b"])


@pytest.mark.parametrize("spread_of_runs", [0.0, 0.3, 1.0])
def test_the_crossed_interval_holds_the_truth_as_often_as_it_says_with_three_runs(spread_of_runs: float) -> None:
    rng = np.random.default_rng(13)
    held = 0
    for _ in range(600):
        grid = 0.5 + rng.normal(0, spread_of_runs, (3, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 0.5, (3, 30))
        found = crossed_mean(grid, names(30))
        held += found.low <= 0.5 <= found.high
    assert held / 600 > 0.93


@pytest.mark.parametrize("grid", [np.ones((1, 4)), np.array([[1.0, 2.0], [3.0, 4.0]])])
def test_one_run_or_one_subject_has_no_interval(grid: np.ndarray) -> None:
    found = crossed_mean(grid, names(4) if grid.shape[1] == 4 else ["a", "a"])
    assert math.isnan(found.low)
    assert math.isnan(found.p)


def test_equal_values_have_a_point_for_an_interval() -> None:
    assert crossed_mean(np.full((2, 3), 0.5), names(3)) == (0.5, 0.5, 0.5, 0.0)
    assert crossed_mean(np.zeros((2, 3)), names(3)).p == 1.0


def test_clusters_of_unequal_size_count_as_fewer() -> None:
    assert effective_clusters(["a", "b", "c"]) == pytest.approx(3)
    assert effective_clusters(["a", "a", "a", "b"]) == pytest.approx(16 / 10)
    lopsided = ["a"] * 1000 + ["b"]
    found = cluster_bootstrap([0.0] * 1000 + [1.0], lopsided, num=200)  # 1.002 clusters: Student's quantile is endless
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_share_between_is_the_mean_and_a_full_one_stays_open() -> None:
    hits = [True, False, True, True]
    assert cluster_proportion(hits, names(4)) == cluster_bootstrap(np.array(hits, dtype=float), names(4))
    exact = stats.binomtest(12, 12).proportion_ci(0.95, method="exact")
    assert cluster_proportion([True] * 12, names(12)) == pytest.approx((1.0, exact.low, 1.0))
    assert cluster_proportion([False] * 12, names(12)) == pytest.approx((0.0, 0.0, 1 - exact.low))
    # twice as many cases of the same subjects prove no more
    assert cluster_proportion([True] * 24, names(12) * 2) == pytest.approx((1.0, exact.low, 1.0))
    assert math.isnan(cluster_proportion([True, True], ["a", "a"]).low)


@pytest.mark.parametrize(("method", "oracle"), [("percentile", "percentile"), ("bca", "BCa")])
def test_intervals_of_any_number_equal_those_of_scipy(method: Literal["percentile", "bca"], oracle: str) -> None:
    values = np.random.default_rng(20).gamma(1.5, size=30)
    tail = widened_tail(30, confidence=0.95)
    reference = stats.bootstrap(
        (values,),
        np.std,
        method=oracle,
        confidence_level=1 - 2 * tail,
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    )
    (found,) = bootstrap(lambda rows: np.array([values[rows].std()]), names(30), method=method, num=10_000)
    spread = reference.standard_error
    assert found.value == pytest.approx(values.std())
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.15 * spread)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.15 * spread)


def test_whole_subjects_are_drawn_for_any_number_too() -> None:
    values = np.array([1.0, 1.0, 1.0, 5.0])
    clusters = ["a", "a", "a", "b"]
    seen: set[tuple[float, ...]] = set()

    def mean(rows: np.ndarray) -> np.ndarray:
        seen.add(tuple(sorted(values[rows])))
        return np.array([values[rows].mean()])

    (found,) = bootstrap(mean, clusters, num=200)
    assert seen == {(1, 1, 1, 5), (1, 1, 1, 1, 1, 1), (5, 5)}
    assert found == (2.0, 1.0, 5.0, 0.0)


def test_draws_that_do_not_define_a_number_are_counted_and_left_out() -> None:
    values = np.array([1.0, 2.0, np.nan])

    def both(rows: np.ndarray) -> np.ndarray:
        return np.array([np.nan if np.isnan(values[rows]).any() else values[rows].mean(), len(rows)])

    first, second = bootstrap(both, names(3), num=3000)
    assert math.isnan(first.value)
    assert first.undefined == pytest.approx(1 - (2 / 3) ** 3, abs=0.03)
    assert second == (3.0, 3.0, 3.0, 0.0)

    def one_or_seven(rows: np.ndarray) -> np.ndarray:
        if set(rows) == {0, 1, 2}:
            return np.ones(1)
        return np.array([np.nan if 0 in rows else 7.0])

    (known,) = bootstrap(one_or_seven, names(3), num=500, method="bca")
    assert 0 < known.undefined < 1
    assert known.low <= 1.0 <= known.high


def test_a_number_that_no_draw_moves_has_a_point_and_one_subject_has_no_interval() -> None:
    (found,) = bootstrap(lambda rows: np.ones(1), names(5), num=100, method="bca")
    assert found == (1.0, 1.0, 1.0, 0.0)
    (alone,) = bootstrap(lambda rows: np.array([float(len(rows))]), ["a", "a"], num=100)
    assert alone.value == 2.0
    assert math.isnan(alone.low)
    with pytest.raises(CaseError, match="no case"):
        bootstrap(lambda rows: np.ones(1), [])


def test_holm_steps_down_from_the_smallest_p() -> None:
    # 4 tests: 0.01 * 4, max(0.04, 0.015 * 3), max(0.045, 0.03 * 2), max(0.06, 0.9 * 1)
    assert holm([0.03, 0.01, 0.9, 0.015]) == pytest.approx([0.06, 0.04, 0.9, 0.045])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(CaseError, match="between 0 and 1"):
        holm([0.1, float("nan")])


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_interval_of_repeated_cases_of_few_subjects_holds_the_truth_as_often_as_it_says(correlation: float) -> None:
    rng = np.random.default_rng(30)
    held = 0
    for trial in range(500):
        subjects = np.repeat(np.arange(20), rng.geometric(0.4, size=20).clip(max=8))
        values = math.sqrt(correlation) * rng.normal(size=20)[subjects]
        values = values + math.sqrt(1 - correlation) * rng.normal(size=len(subjects))
        found = cluster_bootstrap(values, subjects.astype(str).tolist(), num=1000, seed=trial)
        held += found.low <= 0 <= found.high
    assert 0.92 < held / 500 < 0.98


@pytest.mark.slow
def test_every_cell_of_the_coverage_table_lies_between_93_and_97_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "bootstrap_coverage.py"
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr("sys.argv", [str(script), "--runs", "1000", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert len((tmp_path / "bootstrap_coverage.csv").read_text().splitlines()) == 46
