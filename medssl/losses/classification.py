"""Losses for whole images: one class of several, several labels at once, a grade, or a number."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-12  # a power below 1 has no finite slope at 0


def class_loss(
    logits: Float[Tensor, "n k"],
    target: Int64[Tensor, " n"],
    *,
    weights: Float[Tensor, " k"] | None = None,
    log_prior: Float[Tensor, " k"] | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of one class of several; mean over samples, weighted by the class of each.

    Args:
        logits: Scores before softmax.
        target: Index of the class.
        weights: Of each class; the mean is over the weights, as torch has it.
        log_prior: Log of each class's share, added to the scores while training.
        gamma: Focal factor ``(1 − p)^gamma`` on each sample; 0 is plain cross-entropy.
        smoothing: Share of the target that is spread evenly over all classes.

    Reference: Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314, equation 10;
    Lin et al., Focal loss, ICCV 2017, arXiv:1708.02002, equation 4; Szegedy et al., CVPR 2016, arXiv:1512.00567,
    section 7 (label smoothing).
    Deviations: the focal factor takes the probability of the target class, and weighs its smoothed loss too.
    """
    scores = logits.float() if log_prior is None else logits.float() + log_prior
    if not gamma:
        return F.cross_entropy(scores, target, weight=weights, label_smoothing=smoothing)
    log_p = F.log_softmax(scores, dim=1)
    own = log_p.gather(1, target[:, None])[:, 0]
    wanted = -(1 - smoothing) * own - smoothing * log_p.mean(dim=1)
    share = torch.ones_like(own) if weights is None else weights[target]
    return ((1 - own.exp()).clamp(min=_LEAST) ** gamma * wanted * share).sum() / share.sum()


def label_loss(
    logits: Float[Tensor, "n k"],
    target: Float[Tensor, "n k"],
    *,
    positive_weights: Float[Tensor, " k"] | None = None,
    log_odds: Float[Tensor, " k"] | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of each label; mean over samples and labels.

    Args:
        logits: Scores before the sigmoid.
        target: 1 where the label holds, else 0.
        positive_weights: Factor on the loss of positives of each label.
        log_odds: Log odds of each label, added to the scores while training.
        gamma: Focal exponent, as for :func:`class_loss`.
        smoothing: Targets become ``smoothing / 2`` and ``1 − smoothing / 2``.
    """
    scores = logits.float() if log_odds is None else logits.float() + log_odds
    soft = target * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(scores, soft, pos_weight=positive_weights, reduction="none")
    if gamma:
        p = scores.sigmoid()
        loss = loss * (target * (1 - p) + (1 - target) * p).clamp(min=_LEAST) ** gamma
    return loss.mean()


def grade_loss(
    logits: Float[Tensor, "n j"], target: Int64[Tensor, " n"], *, weights: Float[Tensor, " j"] | None = None
) -> Float[Tensor, ""]:
    """Binary cross-entropy of "at least grade j + 1" for each cut between grades; mean over samples and cuts.

    Args:
        logits: Scores of each of ``k − 1`` cuts.
        target: Index of the grade, 0 to ``k − 1``.
        weights: Of each cut.

    Reference: Cao, Mirjalili, Raschka, CORAL, Pattern Recognition Letters 2020, arXiv:1901.07884, equation 4.
    Deviations: none.
    """
    above = (target[:, None] > torch.arange(logits.shape[1], device=target.device)).float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), above, reduction="none")
    return (loss if weights is None else loss * weights).mean()


def number_loss(prediction: Float[Tensor, "n 1"], target: Float[Tensor, "n 1"], *, delta: float) -> Float[Tensor, ""]:
    """Huber loss, quadratic up to ``delta`` and linear beyond; both are in standard deviations of the training set."""
    return F.huber_loss(prediction.float(), target.float(), delta=delta)
