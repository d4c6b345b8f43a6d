"""Is it learning at all? Rank of the embeddings, collapse, and the loss of a network that has learned nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_RANKME_EPS = 1e-7
_MIN_RANK_SHARE = 0.05
_MIN_FEATURE_STD = 1e-3
_FOLLOW = 0.5
_MOST_EMPTY_VIEWS = 0.05
_EMPTY_VIEWS = {
    "blank": "have one value only",
    "fallback": "failed in augmentation and were shown plain",
    "anywhere": "were cut anywhere, for no body was found where they were to be cut",
}


def rank_me(embeddings: Float[Tensor, "n d"]) -> float:
    """RankMe: exponential of the entropy of the singular values, in [1, min(n, d)].

    ``p_k = σ_k / Σσ + ε``, ``RankMe = exp(−Σ p_k log p_k)``. Comparable only for the same ``d``, the same layer and
    the same normalisation; high rank is necessary, not sufficient. The singular values are taken in float64.

    Args:
        embeddings: One row a sample; the original wants ``n >= 10 d``.

    Returns:
        The rank; slightly above ``d`` for an exact identity, since ε makes Σp exceed 1. All zeros give 0.

    Reference: Garrido et al., RankMe, ICML 2023, arXiv:2210.02885, eq. 2.
    Deviations: none.
    """
    return _entropy_rank(embeddings.double(), eps=_RANKME_EPS)


def effective_rank(embeddings: Float[Tensor, "n d"]) -> float:
    """Entropy rank after the mean over samples is taken away; 0 when all samples are equal.

    Unlike RankMe it does not see a large common offset, so that it tells how many directions the samples spread in.

    Args:
        embeddings: One row a sample.

    Reference: Roy, Vetterli, The effective rank, EUSIPCO 2007.
    Deviations: the matrix is centred.
    """
    values = embeddings.double()
    centred = values - values.mean(0)
    if float(centred.abs().max()) <= 1e-12 * max(1.0, float(values.abs().max())):
        return 0.0
    return _entropy_rank(centred, eps=0.0)


def feature_std(embeddings: Float[Tensor, "n d"]) -> float:
    """Spread of the normalised embeddings: 0 when all are equal, near 1 when directions are uniform.

    ``sqrt(d)`` times the mean over features of the standard deviation over samples of ``z / |z|``.

    Reference: Chen, He, SimSiam, CVPR 2021, arXiv:2011.10566, section 4.1.
    Deviations: scaled by ``sqrt(d)``.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * math.sqrt(embeddings.shape[1]))


def embedding_health(embeddings: Float[Tensor, "n d"]) -> dict[str, float]:
    """The numbers that :func:`collapse_alarm` judges, for a held-out check to return.

    Args:
        embeddings: One row a sample, at least two samples.

    Returns:
        ``rank_me``, ``rank`` (effective), ``rank_share`` (of the rank that ``n`` and ``d`` allow) and ``feature_std``.
    """
    n, d = embeddings.shape
    rank = effective_rank(embeddings)
    return {
        "rank_me": rank_me(embeddings),
        "rank": rank,
        "rank_share": rank / max(1, min(n - 1, d)),
        "feature_std": feature_std(embeddings),
    }


def views_alarm(means: Mapping[str, float]) -> str | None:
    """A sentence if more than one view in twenty teaches nothing, else None; from the means of ``views/...``."""
    for name, what in _EMPTY_VIEWS.items():
        share = means.get(f"views/{name}", 0.0)
        if share > _MOST_EMPTY_VIEWS:
            return f"{share:.0%} of the views {what}; look at them with medssl gallery"
    return None


def collapse_alarm(results: Mapping[str, float]) -> str | None:
    """A sentence if results of a check say that the features collapsed: rank share < 5 %, or std < 0.001."""
    share, std = results.get("rank_share", 1.0), results.get("feature_std", 1.0)
    if share < _MIN_RANK_SHARE:
        return f"features collapsed: their rank is {share:.1%} of what it could be, under {_MIN_RANK_SHARE:.0%}"
    if std < _MIN_FEATURE_STD:
        return f"features collapsed: their standard deviation is {std:.2g}, under {_MIN_FEATURE_STD}"
    return None


class PlateauAlarm:
    """Warns once while the loss, or another number, stays where a network that ignores its input would be.

    Args:
        chance: Value for such a network; None switches the alarm off.
        monitor: What is watched, for the sentence.
        tolerance: The running mean must fall below ``chance * (1 - tolerance)``.
        after_step: Steps of grace.
    """

    def __init__(
        self, chance: float | None, *, monitor: str = "loss", tolerance: float = 0.02, after_step: int = 0
    ) -> None:
        self.chance = chance
        self.monitor = monitor
        self._bound = math.inf if chance is None else chance - tolerance * abs(chance)
        self._tolerance = tolerance
        self._after_step = after_step
        self._mean: float | None = None
        self._raised = False

    def update(self, step: int, value: float) -> str | None:
        """Take in the mean of the latest window; a sentence if it is time to worry.

        Args:
            step: Steps taken so far.
            value: Mean since the last call.
        """
        if not math.isfinite(value):
            return None
        self._mean = value if self._mean is None else self._mean + _FOLLOW * (value - self._mean)
        if self._mean < self._bound:
            self._raised = False
            return None
        if self.chance is None or step < self._after_step or self._raised:
            return None
        self._raised = True
        return (
            f"{self.monitor} {self._mean:.4g} is not below {self.chance:.4g} by {self._tolerance:.0%} after {step} "
            f"steps; {self.chance:.4g} is what a network gets that ignores its input"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"mean": self._mean, "raised": self._raised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._mean, self._raised = state["mean"], state["raised"]


def _entropy_rank(matrix: Float[Tensor, "n d"], *, eps: float) -> float:
    singular = torch.linalg.svdvals(matrix)
    total = singular.sum()
    if float(total) <= 0:
        return 0.0
    p = singular / total + eps
    return float(torch.exp(-torch.xlogy(p, p).sum()))
