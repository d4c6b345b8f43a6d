"""What frozen features know, told by the simplest readers there are: neighbours, a line, a plane.

A probe is fitted on training subjects and scored on held-out ones; hand it features, not networks.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.optimize import minimize
from scipy.spatial.distance import pdist
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
    _check("held-out", test_features, test_labels)
    classes, shares = knn_shares(
        train_features, train_labels, test_features, num_neighbours=num_neighbours, temperature=temperature
    )
    return float(np.mean(classes[shares.argmax(1)] == test_labels))


def knn_shares(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    standardise: bool = False,
) -> tuple[Int[np.ndarray, " k"], Float64[np.ndarray, "m k"]]:
    """Classes of the training set, and each one's share of the vote of :func:`knn_probe`.

    Args:
        train_features: See :func:`knn_probe`, and so the others.
        train_labels: Class of each.
        test_features: Rows of held-out subjects.
        num_neighbours: Voters.
        temperature: Sharpness of the vote.
        standardise: Bring each feature to mean 0 and spread 1 of the training set first, so that what all rows have in
            common does not make every cosine nearly 1; the paper does not.
    """
    _check("training", train_features, train_labels)
    classes, coded = np.unique(train_labels, return_inverse=True)
    if standardise:
        train_features, test_features = _standardised(train_features, test_features)
    cosine = _unit(test_features) @ _unit(train_features).T
    k = min(num_neighbours, len(train_labels))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    closeness = np.take_along_axis(cosine, nearest, 1)
    weight = np.exp((closeness - closeness[:, :1]) / temperature)  # the nearest has 1, so that no sum is 0
    votes = np.zeros((len(test_features), len(classes)))
    np.add.at(votes, (np.arange(len(test_features))[:, None], coded[nearest]), weight)
    return classes, votes / votes.sum(axis=1, keepdims=True)


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
    _check("held-out", test_features, test_labels)
    classes, probabilities = linear_probabilities(train_features, train_labels, test_features, l2=l2)
    return float(np.mean(classes[probabilities.argmax(1)] == test_labels))


def linear_probabilities(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    l2: float = 1e-2,
) -> tuple[Int[np.ndarray, " k"], Float64[np.ndarray, "m k"]]:
    """Classes of the training set, and each one's probability by the regression of :func:`linear_probe`."""
    _check("training", train_features, train_labels)
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
    return classes, np.exp(log_softmax(x_test @ weight[:-1] + weight[-1], axis=1))


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
    _check("held-out", test_features, test_targets)
    y_test = np.asarray(test_targets, float)
    residual = ((y_test - ridge_values(train_features, train_targets, test_features, l2=l2)) ** 2).sum(0)
    spread = ((y_test - y_test.mean(0)) ** 2).sum(0)
    varies = spread > 0
    if not varies.any():
        return float("nan")
    return float(np.mean(1.0 - residual[varies] / spread[varies]))


def ridge_values(
    train_features: Float[np.ndarray, "n d"],
    train_targets: Float[np.ndarray, "n t"],
    test_features: Float[np.ndarray, "m d"],
    *,
    l2: float = 1.0,
) -> Float64[np.ndarray, "m t"]:
    """What the regression of :func:`regression_probe` says of held-out rows."""
    _check("training", train_features, train_targets)
    x, x_test = _standardised(train_features, test_features)
    y = np.asarray(train_targets, float)
    gram = x.T @ x + l2 * len(x) * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x.T @ (y - y.mean(0)))
    values: Float64[np.ndarray, "m t"] = x_test @ weight + y.mean(0)
    return values


def uniformity(features: Float[np.ndarray, "n d"], *, sharpness: float = 2.0) -> float:
    """How evenly unit features lie on the sphere: ``log mean exp(-t |x - y|²)`` over pairs; 0 when all are equal.

    Lower is more even. NaN for fewer than two rows.

    Reference: Wang, Isola, Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere, ICML 2020, arXiv:2005.10242, section 4.1.2 (t = 2).
    Deviations: none.
    """
    unit = _unit(features)
    if len(unit) < 2:
        return float("nan")
    return float(np.log(np.exp(-sharpness * pdist(unit, "sqeuclidean")).mean()))


def _check(name: str, features: np.ndarray, answers: np.ndarray) -> None:
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
