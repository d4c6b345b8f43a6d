"""What frozen features know, told by the simplest readers there are: neighbours, a line, a plane.

A probe is fitted on training subjects and scored on held-out ones; hand it features, not networks.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

_STD_FLOOR = 1e-6


def knn_probe(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    *,
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a vote of the nearest training features.

    ``score(c) = Σ_{i in kNN, label_i = c} exp(cos(x, x_i) / temperature)``; the smallest label wins a tie.

    Args:
        train_features: One row a sample.
        train_labels: Class of each.
        test_features: Rows of held-out subjects.
        test_labels: Class of each.
        num_neighbours: Voters; at most ``n`` are used.
        temperature: Sharpness of the vote.

    Returns:
        Share of right answers, in [0, 1].

    Raises:
        ValueError: if a set is empty or rows and labels differ in number.

    Reference: Wu et al., Unsupervised feature learning via non-parametric instance discrimination, CVPR 2018,
    arXiv:1805.01978, section 3.4.
    Deviations: none.
    """
    _check(train_features, train_labels, test_features, test_labels)
    classes, coded = np.unique(train_labels, return_inverse=True)
    cosine = _unit(test_features) @ _unit(train_features).T
    k = min(num_neighbours, len(train_labels))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weight = np.exp((np.take_along_axis(cosine, nearest, 1) - 1.0) / temperature)
    votes = np.zeros((len(test_labels), len(classes)))
    np.add.at(votes, (np.arange(len(test_labels))[:, None], coded[nearest]), weight)
    return float(np.mean(classes[votes.argmax(1)] == test_labels))


def linear_probe(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    *,
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    l2: float = 1e-2,
) -> float:
    """Accuracy of multinomial logistic regression on standardised features.

    Minimises ``mean cross-entropy + l2 / 2 · |W|²`` with L-BFGS; bias without penalty.

    Args:
        train_features: One row a sample.
        train_labels: Class of each.
        test_features: Rows of held-out subjects.
        test_labels: Class of each; one that training lacks counts as wrong.
        l2: Strength of the penalty.

    Returns:
        Share of right answers, in [0, 1].

    Raises:
        ValueError: if a set is empty or rows and labels differ in number.
    """
    _check(train_features, train_labels, test_features, test_labels)
    x, x_test = _standardised(train_features, test_features)
    classes, coded = np.unique(train_labels, return_inverse=True)
    target = np.eye(len(classes))[coded]
    shape = (x.shape[1] + 1, len(classes))

    def objective(flat: Float64[np.ndarray, " p"]) -> tuple[float, Float64[np.ndarray, " p"]]:
        weight = flat.reshape(shape)
        log_p = log_softmax(x @ weight[:-1] + weight[-1], axis=1)
        error = (np.exp(log_p) - target) / len(x)
        gradient = np.vstack([x.T @ error + l2 * weight[:-1], error.sum(0)])
        return float(-(target * log_p).sum() / len(x) + 0.5 * l2 * (weight[:-1] ** 2).sum()), gradient.ravel()

    found = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weight = np.asarray(found.x).reshape(shape)
    return float(np.mean(classes[(x_test @ weight[:-1] + weight[-1]).argmax(1)] == test_labels))


def regression_probe(
    train_features: Float[np.ndarray, "n d"],
    train_targets: Float[np.ndarray, "n t"],
    *,
    test_features: Float[np.ndarray, "m d"],
    test_targets: Float[np.ndarray, "m t"],
    l2: float = 1.0,
) -> float:
    """R² of ridge regression, such as of crop positions; averaged over targets.

    Args:
        train_features: One row a sample.
        train_targets: Numbers to foretell, such as a position in [0, 1] along each axis.
        test_features: Rows of held-out subjects.
        test_targets: Theirs.
        l2: Penalty on standardised features, as a share of the number of samples; strong by default, since a probe
            often has fewer crops than features.

    Returns:
        ``1 − Σ(y − ŷ)² / Σ(y − ȳ)²``, at most 1; 0 is the held-out mean, below 0 is worse. NaN if no target varies.

    Raises:
        ValueError: if a set is empty or rows and targets differ in number.
    """
    _check(train_features, train_targets, test_features, test_targets)
    x, x_test = _standardised(train_features, test_features)
    y, y_test = np.asarray(train_targets, float), np.asarray(test_targets, float)
    gram = x.T @ x + l2 * len(x) * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x.T @ (y - y.mean(0)))
    residual = ((y_test - x_test @ weight - y.mean(0)) ** 2).sum(0)
    spread = ((y_test - y_test.mean(0)) ** 2).sum(0)
    varies = spread > 0
    if not varies.any():
        return float("nan")
    return float(np.mean(1.0 - residual[varies] / spread[varies]))


def _check(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray) -> None:
    for name, features, answers in (("training", train, train_y), ("held-out", test, test_y)):
        if len(features) == 0 or len(features) != len(answers):
            raise ValueError(
                f"{name} set: {len(features)} rows of features and {len(answers)} answers; a probe needs as many of "
                "each, and at least one."
            )


def _unit(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    values = np.asarray(features, float)
    unit: Float64[np.ndarray, "n d"] = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return unit


def _standardised(
    train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"]
) -> tuple[Float64[np.ndarray, "n d"], Float64[np.ndarray, "m d"]]:
    """Both sets in units of the training set's mean and standard deviation."""
    values = np.asarray(train, float)
    mean, std = values.mean(0), values.std(0)
    scale = np.where(std > _STD_FLOOR * max(1.0, float(np.abs(values).max())), std, np.inf)
    return (values - mean) / scale, (np.asarray(test, float) - mean) / scale
