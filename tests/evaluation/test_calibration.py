"""Calibration against loops over bins and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medssl.evaluation.calibration import (
    brier_terms,
    calibration_error,
    log_loss_terms,
    reliability,
)


def test_bins_of_equal_width_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    chance = np.append(rng.random(300) * 0.85, [0.0, 0.2, 1.0])
    true = rng.random(303) < chance
    total = 0.0
    for row, low in zip(reliability(chance, true, bins=5), (0.0, 0.2, 0.4, 0.6, 0.8), strict=True):
        inside = [i for i, p in enumerate(chance) if low <= p < low + 0.2 - 1e-12 or (p == 1 and low == 0.8)]
        assert row.low == pytest.approx(low)
        assert row.cases == len(inside)
        assert row.probability == pytest.approx(np.mean(chance[inside]))
        assert row.frequency == pytest.approx(np.mean(true[inside]))
        total += len(inside) / 303 * abs(np.mean(chance[inside]) - np.mean(true[inside]))
    assert calibration_error(chance, true, bins=5) == pytest.approx(total)


def test_a_probability_at_an_edge_is_in_the_bin_above_it() -> None:
    tenths = [place / 10 for place in range(10)]
    rows = reliability(np.array(tenths), np.ones(10, dtype=bool))
    assert [row.probability for row in rows] == tenths
    assert [row.low for row in rows] == tenths


def test_bins_of_equal_mass_hold_as_many_cases_and_equal_probabilities_stay_together() -> None:
    chance = np.random.default_rng(1).random(200)
    rows = reliability(chance, chance > 0.5, bins=4, binning="mass")
    assert [row.cases for row in rows] == pytest.approx([50] * 4, abs=1)
    tied = np.repeat([0.1, 0.7], [90, 10])
    rows = reliability(tied, np.ones(100, dtype=bool), bins=10, binning="mass")
    assert [row.cases for row in rows] == [90, 10]
    sure = np.repeat([0.1, 0.3, 1.0], [30, 20, 50])
    rows = reliability(sure, sure > 0.2, bins=2, binning="mass")
    assert [row.cases for row in rows] == [50, 50]
    assert rows[1].probability == 1.0
    assert sum(row.cases for row in reliability(np.ones(9), np.ones(9, dtype=bool), bins=3, binning="mass")) == 9


def test_an_empty_bin_has_no_mean_and_no_weight() -> None:
    rows = reliability(np.array([0.1, 0.95]), np.array([False, True]), bins=10)
    assert math.isnan(rows[5].probability)
    assert math.isnan(rows[5].frequency)
    assert calibration_error(np.array([0.1, 0.95]), np.array([False, True])) == pytest.approx((0.1 + 0.05) / 2)


def test_brier_is_summed_over_many_classes_and_of_one_of_two() -> None:
    chances, truth = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]), np.array([1, 0])
    assert brier_terms(chances, truth) == pytest.approx([0.2**2 + 0.7**2 + 0.5**2, 0.0])
    assert brier_terms(np.array([[0.2, 0.8]]), np.array([0])) == pytest.approx([0.8**2])


def test_log_loss_is_that_of_the_true_class_and_finite() -> None:
    found = log_loss_terms(np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([0, 1]))
    assert found == pytest.approx([math.log(4), 12 * math.log(10)])
