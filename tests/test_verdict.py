"""How scores are read, and what is chosen on validation cases, beside exhaustive searches."""

from __future__ import annotations

import numpy as np
import pytest

from medssl import verdict as module
from medssl.tasks.targets import Targets
from medssl.verdict import Verdict


def test_each_kind_of_answer_has_its_columns_and_decision() -> None:
    binary = Verdict(column="y", kind="binary", classes=("no", "yes"), thresholds=(0.3,), temperature=2.0)
    p = binary.probabilities(np.array([[0.0, -1.0]]))[0]
    assert p[1] == pytest.approx(1 / (1 + np.exp(0.5)))
    assert binary.row(p)["decision"] == "yes"
    assert binary.columns == ("p_no", "p_yes", "decision")
    several = Verdict(column="y", kind="multiclass", classes=("a", "b", "c"))
    assert several.row(np.array([0.2, 0.5, 0.3]))["decision"] == "b"
    labels = Verdict(column="y", kind="multilabel", classes=("a", "b"), thresholds=(0.5, 0.1))
    assert labels.row(np.array([0.4, 0.2]))["decision"] == "b"
    assert labels.row(np.array([0.4, 0.05]))["decision"] == "none"
    assert labels.row(np.array([0.5, 0.1])) == {"p_a": 0.5, "p_b": 0.1, "decision": "a;b"}
    grades = Verdict(column="y", kind="ordinal", classes=("1", "2", "4"))
    assert grades.row(np.array([0.9, 0.25])) == {"value": pytest.approx(1 + 0.9 + 2 * 0.25), "decision": "2"}
    assert Verdict(column="y", kind="ordinal", classes=("low", "high")).row(np.array([0.7]))["value"] == 0.7
    number = Verdict(column="y", kind="regression", mean=50.0, spread=10.0)
    assert number.row(number.probabilities(np.array([[0.5]]))[0]) == {"value": 55.0, "decision": ""}
    assert number.columns == ("value", "decision")


def test_youdens_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, held = rng.random(15).round(1), rng.random(15) < 0.4
        held[:2] = True, False

        def gain(at: float, p: np.ndarray = p, held: np.ndarray = held) -> float:
            return (p[held] >= at).mean() + (p[~held] < at).mean()

        found = module._youden(p, held)
        assert found is not None
        assert gain(found) == pytest.approx(max(gain(at) for at in np.linspace(0, 1.01, 203)))
    assert module._youden(p, np.ones(15, bool)) is None


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "ordinal"])
def test_the_temperature_has_the_smallest_log_loss(kind: str) -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(60, 3)) * 4
    if kind == "multilabel":
        truth = (rng.random((60, 3)) < 1 / (1 + np.exp(-scores / 3))).astype(np.float32)
    else:
        truth = rng.integers(0, 3, (60, 1)).astype(np.float32)
    targets = Targets("y", kind, ("a", "b", "c", "d") if kind == "ordinal" else ("a", "b", "c"), {})  # type: ignore[arg-type]
    found = module._temperature(scores, truth, targets)

    def loss(t: float) -> float:
        total = 0.0
        for row, value in zip(scores / t, truth, strict=True):
            if kind == "multiclass":
                total -= np.log(np.exp(row[int(value[0])]) / np.exp(row).sum())
                continue
            held = value if kind == "multilabel" else value[0] > np.arange(3)
            p = 1 / (1 + np.exp(-row))
            total -= np.log(np.where(held, p, 1 - p)).sum()
        return total

    assert loss(found) <= min(loss(t) for t in np.geomspace(0.7, 19, 200)) + 1e-3
