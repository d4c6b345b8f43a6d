"""Losses of whole images against the papers' formulas, written with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medssl.losses.classification import class_loss, grade_loss, label_loss, number_loss

LOGITS = torch.tensor([[0.3, -1.2, 0.8], [2.0, 0.1, -0.5], [-0.2, 0.4, 0.9], [0.0, 0.0, 3.0]], dtype=torch.float64)
TARGET = torch.tensor([2, 1, 0, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 1.5])


def _softmax(row: list[float]) -> list[float]:
    top = [math.exp(value) for value in row]
    return [value / sum(top) for value in top]


@pytest.mark.parametrize(
    ("gamma", "smoothing", "weighted"),
    [(0.0, 0.0, False), (0.0, 0.1, False), (0.0, 0.0, True), (2.0, 0.0, True), (2.0, 0.1, False), (2.0, 0.1, True)],
)
def test_the_class_loss_follows_its_formula(gamma: float, smoothing: float, weighted: bool) -> None:
    total = share = 0.0
    for row, index in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        p = _softmax(row)
        loss = -(1 - smoothing) * math.log(p[index]) - smoothing * sum(map(math.log, p)) / 3
        weight = float(WEIGHTS[index]) if weighted else 1.0
        total += weight * (1 - p[index]) ** gamma * loss
        share += weight
    found = class_loss(LOGITS, TARGET, weights=WEIGHTS if weighted else None, gamma=gamma, smoothing=smoothing)
    assert float(found) == pytest.approx(total / share, rel=1e-5)


def test_the_log_prior_is_added_to_the_scores() -> None:
    prior = torch.log(torch.tensor([0.7, 0.2, 0.1]))
    assert torch.allclose(class_loss(LOGITS, TARGET, log_prior=prior), class_loss(LOGITS.float() + prior, TARGET))


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_label_loss_follows_its_formula(gamma: float, smoothing: float) -> None:
    held = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    factor = torch.tensor([2.0, 1.0, 0.5])
    odds = torch.tensor([0.1, -0.3, 0.0])
    total = 0.0
    for row, truth in zip(LOGITS.tolist(), held.tolist(), strict=True):
        for k in range(3):
            p = 1 / (1 + math.exp(-(row[k] + float(odds[k]))))
            soft = truth[k] * (1 - smoothing) + smoothing / 2
            loss = -float(factor[k]) * soft * math.log(p) - (1 - soft) * math.log(1 - p)
            total += loss * (1 - p if truth[k] else p) ** gamma
    found = label_loss(LOGITS, held, positive_weights=factor, log_odds=odds, gamma=gamma, smoothing=smoothing)
    assert float(found) == pytest.approx(total / 12, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_grade_loss_asks_of_each_cut_whether_the_grade_is_above(weighted: bool) -> None:
    cuts, weights = LOGITS[:, :2], torch.tensor([0.4, 1.6])
    total = 0.0
    for row, grade in zip(cuts.tolist(), TARGET.tolist(), strict=True):
        for j in range(2):
            p = 1 / (1 + math.exp(-row[j]))
            total -= (float(weights[j]) if weighted else 1.0) * math.log(p if grade > j else 1 - p)
    assert float(grade_loss(cuts, TARGET, weights=weights if weighted else None)) == pytest.approx(total / 8, rel=1e-5)


def test_the_number_loss_is_a_square_near_and_a_line_far() -> None:
    error = np.array([0.5, 3.0])
    expected = (0.5 * 0.5**2 + 1.0 * (3.0 - 0.5)) / 2
    found = number_loss(torch.tensor(error)[:, None], torch.zeros(2, 1), delta=1.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_focal_power_below_one_has_a_finite_slope_where_the_answer_is_sure() -> None:
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    total = class_loss(logits, torch.tensor([0]), gamma=0.5) + label_loss(logits, torch.tensor([[1.0, 0.0]]), gamma=0.5)
    total.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
