from __future__ import annotations

import numpy as np
import pytest

from medssl.engine.probe import (
    knn_probe,
    knn_shares,
    linear_probabilities,
    linear_probe,
    regression_probe,
    ridge_values,
    uniformity,
)


def _clusters(n: int, *, seed: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.array([[4.0, 0, 0, 1], [0, 4.0, 0, 1], [0, 0, 4.0, 1]])
    labels = rng.integers(0, 3, n)
    return centres[labels] + spread * rng.standard_normal((n, 4)), labels + 5


def test_the_neighbours_tell_separate_clusters_apart() -> None:
    train, train_labels = _clusters(60, seed=0)
    test, test_labels = _clusters(40, seed=1)
    assert knn_probe(train, train_labels, test_features=test, test_labels=test_labels) == 1.0


def test_the_vote_is_the_weighted_sum_of_the_definition() -> None:
    rng = np.random.default_rng(3)
    train, labels = rng.standard_normal((30, 5)), rng.integers(0, 4, 30)
    test, truth = rng.standard_normal((25, 5)), rng.integers(0, 4, 25)
    right = 0
    for x, y in zip(test, truth, strict=True):
        cosine = [float(x @ t / np.linalg.norm(x) / np.linalg.norm(t)) for t in train]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:7]
        score = {c: sum(np.exp(cosine[i] / 0.2) for i in nearest if labels[i] == c) for c in range(4)}
        right += max(score, key=lambda c: score[c]) == y
    found = knn_probe(train, labels, test_features=test, test_labels=truth, num_neighbours=7, temperature=0.2)
    assert found == pytest.approx(right / 25)


def test_a_line_reads_what_is_linear_and_not_what_is_noise() -> None:
    train, train_labels = _clusters(90, seed=0)
    test, test_labels = _clusters(60, seed=1)
    assert linear_probe(train, train_labels, test_features=test, test_labels=test_labels) == 1.0
    rng = np.random.default_rng(2)
    noise = linear_probe(
        rng.standard_normal((300, 4)),
        rng.integers(0, 2, 300),
        test_features=rng.standard_normal((400, 4)),
        test_labels=rng.integers(0, 2, 400),
    )
    assert 0.4 < noise < 0.6


def test_the_linear_probe_ends_where_the_gradient_is_zero() -> None:
    # two points at -1 and +1, one weight w for their difference: d/dw [log(1 + exp(-2w)) + l2 w^2 / 2] = 0 at the
    # optimum; the class of any x is its sign, whatever l2 is
    x, y = np.array([[-1.0], [1.0]]), np.array([0, 1])
    assert linear_probe(x, y, test_features=np.array([[-0.01], [0.01]]), test_labels=y, l2=10.0) == 1.0


def test_a_constant_feature_harms_no_probe() -> None:
    train, labels = _clusters(60, seed=0)
    test, truth = _clusters(40, seed=1)
    train, test = np.hstack([train, np.full((60, 1), 1e6)]), np.hstack([test, np.full((40, 1), 1e6 + 1)])
    assert linear_probe(train, labels, test_features=test, test_labels=truth) == 1.0


def test_a_class_that_training_lacks_counts_as_wrong() -> None:
    train, labels = _clusters(60, seed=0)
    assert linear_probe(train, labels, test_features=train, test_labels=np.full(60, 9)) == 0.0
    assert knn_probe(train, labels, test_features=train, test_labels=np.full(60, 9)) == 0.0


def test_ridge_recovers_a_linear_position() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((3, 8))
    train_y, test_y = rng.random((80, 3)), rng.random((50, 3))
    train = train_y @ mixing + 5.0
    test = test_y @ mixing + 5.0
    r2 = regression_probe(train, train_y, test_features=test, test_targets=test_y, l2=1e-8)
    assert r2 == pytest.approx(1.0, abs=1e-4)


def test_ridge_equals_its_normal_equations_and_noise_scores_at_most_zero() -> None:
    rng = np.random.default_rng(1)
    train, train_y = rng.standard_normal((50, 4)), rng.standard_normal((50, 1))
    test, test_y = rng.standard_normal((40, 4)), rng.standard_normal((40, 1))
    x = (train - train.mean(0)) / train.std(0)
    z = (test - train.mean(0)) / train.std(0)
    # ridge as least squares with sqrt(l2 n) rows of regularisation
    rows = np.vstack([x, np.sqrt(0.1 * 50) * np.eye(4)])
    weight = np.linalg.lstsq(rows, np.vstack([train_y - train_y.mean(0), np.zeros((4, 1))]), rcond=None)[0]
    predicted = z @ weight + train_y.mean(0)
    expected = 1 - ((test_y - predicted) ** 2).sum() / ((test_y - test_y.mean(0)) ** 2).sum()
    found = regression_probe(train, train_y, test_features=test, test_targets=test_y, l2=0.1)
    assert found == pytest.approx(expected)
    assert found < 0.2


def test_by_default_ridge_has_as_much_penalty_as_samples_and_noise_is_not_fitted() -> None:
    rng = np.random.default_rng(1)
    train, train_y = rng.standard_normal((60, 50)), rng.standard_normal((60, 1))
    test, test_y = rng.standard_normal((40, 50)), rng.standard_normal((40, 1))
    sides = {"test_features": test, "test_targets": test_y}
    assert regression_probe(train, train_y, **sides) == regression_probe(train, train_y, **sides, l2=1.0)
    assert regression_probe(train, train_y, **sides) > regression_probe(train, train_y, **sides, l2=1e-2) + 0.5


def test_a_target_that_does_not_vary_is_left_out() -> None:
    rng = np.random.default_rng(0)
    y = rng.random((30, 2))
    y[:, 1] = 0.5
    assert regression_probe(y, y, test_features=y, test_targets=y, l2=1e-9) == pytest.approx(1.0, abs=1e-6)
    flat = np.full((30, 2), 0.5)
    assert np.isnan(regression_probe(y, flat, test_features=y, test_targets=flat))


@pytest.mark.parametrize("rows", [0, 3])
def test_sets_that_do_not_match_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="held-out set: "):
        knn_probe(
            np.ones((4, 2)),
            np.ones(4, int),
            test_features=np.ones((rows, 2)),
            test_labels=np.ones(max(0, rows - 1), int),
        )


def test_uniformity_is_the_mean_over_pairs_by_loops() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4))
    unit = [row / np.sqrt((row**2).sum()) for row in x]
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(x) == pytest.approx(np.log(np.mean(pairs)))
    assert uniformity(np.ones((5, 3))) == pytest.approx(0.0)
    assert np.isnan(uniformity(np.ones((1, 3))))


def test_shares_and_probabilities_sum_to_one_and_tell_the_classes_of_training() -> None:
    train, labels = _clusters(40, seed=0)
    test, _ = _clusters(15, seed=1)
    for classes, shares in (
        knn_shares(train, labels, test, num_neighbours=5),
        linear_probabilities(train, labels, test),
    ):
        assert classes.tolist() == [5, 6, 7]
        assert shares.shape == (15, 3)
        assert np.allclose(shares.sum(axis=1), 1)


def test_standardising_hides_what_all_rows_have_in_common() -> None:
    train, labels = _clusters(60, seed=0)
    test, truth = _clusters(40, seed=1)
    classes, shares = knn_shares(train + 1e4, labels, test + 1e4, num_neighbours=5, standardise=True)
    assert (classes[shares.argmax(axis=1)] == truth).all()


def test_ridge_is_the_closed_formula() -> None:
    rng = np.random.default_rng(0)
    x, y, new = rng.normal(size=(30, 3)), rng.normal(size=(30, 2)), rng.normal(size=(4, 3))
    scaled, scaled_new = (x - x.mean(0)) / x.std(0), (new - x.mean(0)) / x.std(0)
    weight = np.linalg.inv(scaled.T @ scaled + 0.5 * 30 * np.eye(3)) @ scaled.T @ (y - y.mean(0))
    assert np.allclose(ridge_values(x, y, new, l2=0.5), scaled_new @ weight + y.mean(0))
