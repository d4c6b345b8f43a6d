"""Dice and cross-entropy for label maps, plain and deeply supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

_SMOOTH = 1e-5


class SegmentationTerms(NamedTuple):
    """The weighted sum and its two terms before weighting, scalars."""

    total: Float[Tensor, ""]
    dice: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]


def dice_ce(
    logits: Float[Tensor, "b k *s"],
    target: Integer[Tensor, "b 1 *s"],
    *,
    include_background: bool = False,
    ignore_value: int | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> SegmentationTerms:
    """Add soft Dice loss and cross-entropy, in float32.

    With ``p`` the softmax and ``g`` the one-hot target, per sample and class::

        dice          = mean(1 − (2 Σ p g + δ) / (Σ p + Σ g + δ))      δ = 1e-5
        cross_entropy = mean over voxels of − log p[target]
        total         = weights[0] dice + weights[1] cross_entropy

    A class that a sample does not hold still counts: its term falls from 1 to 0 as the predicted mass goes to 0.

    Args:
        logits: Scores of ``k`` classes, before softmax.
        target: Class index of each voxel, ``0 .. k − 1``, or ``ignore_value``.
        include_background: Whether class 0 is in the Dice term; it always is in the cross-entropy.
        ignore_value: Voxels with this value take no part in either term.
        weights: Of Dice and of cross-entropy.

    Returns:
        Total and terms; all are 0 with gradient 0 where every voxel is ignored.

    Raises:
        ValueError: if the shapes do not fit, or, on the CPU, a class index is out of range.

    Reference: Milletari, Navab, Ahmadi, V-Net, 3DV 2016, arXiv:1606.04797, section 3; Isensee et al., nnU-Net, Nature
    Methods 2021, arXiv:1904.08128, for the sum.
    Deviations: the denominator is not squared, as in nnU-Net.
    """
    _check(logits, target, ignore_value)
    with torch.autocast(logits.device.type, enabled=False):
        scores, index = logits.float(), target[:, 0].long()
        valid = torch.ones_like(index, dtype=torch.bool) if ignore_value is None else index != ignore_value
        index = index.where(valid, torch.zeros_like(index))
        share = valid.to(scores.dtype)
        dice = _soft_dice_loss(scores, index, share, first_class=0 if include_background else 1)
        per_voxel = F.cross_entropy(scores, index, reduction="none")
        cross_entropy = (per_voxel * share).sum() / share.sum().clamp(min=1.0)
        return SegmentationTerms(weights[0] * dice + weights[1] * cross_entropy, dice, cross_entropy)


def deep_dice_ce(
    outputs: Sequence[Tensor],
    target: Integer[Tensor, "b 1 *s"],
    *,
    include_background: bool = False,
    ignore_value: int | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> SegmentationTerms:
    """Sum :func:`dice_ce` over the resolutions of a decoder, each half the weight of the finer one.

    The weights ``1, ½, ¼, ...`` are divided by their sum. The target is brought to a coarser grid by nearest voxel.

    Args:
        outputs: Logits ``(b, k, *s)`` of each resolution, finest first; one element is plain :func:`dice_ce`.
        target: Class indices at the finest resolution.
        include_background: See :func:`dice_ce`.
        ignore_value: See :func:`dice_ce`.
        weights: See :func:`dice_ce`.

    Returns:
        Weighted sums of the total and of both terms.

    Raises:
        ValueError: as :func:`dice_ce`, or if ``outputs`` is empty.

    Reference: Isensee et al., nnU-Net, Nature Methods 2021, arXiv:1904.08128, supplementary note 2.
    Deviations: none.
    """
    if not outputs:
        raise ValueError("no output to compare with the target: deep supervision needs at least one.")
    level_weights = [0.5**level for level in range(len(outputs))]
    levels = [
        dice_ce(
            logits,
            _nearest(target, logits.shape[2:]),
            include_background=include_background,
            ignore_value=ignore_value,
            weights=weights,
        )
        for logits in outputs
    ]
    stacked = torch.stack([torch.stack(terms) for terms in levels])
    share = torch.tensor(level_weights, dtype=stacked.dtype) / sum(level_weights)
    share = share.to(stacked.device, non_blocking=True)
    total, dice, cross_entropy = share @ stacked
    return SegmentationTerms(total, dice, cross_entropy)


def _soft_dice_loss(scores: Tensor, index: Tensor, share: Tensor, *, first_class: int) -> Tensor:
    num_classes = scores.shape[1]
    probability = scores.softmax(dim=1) * share.unsqueeze(1)
    one_hot = torch.stack([(index == k) for k in range(num_classes)], dim=1).to(scores.dtype) * share.unsqueeze(1)
    axes = tuple(range(2, scores.ndim))
    common = (probability * one_hot).sum(dim=axes)[:, first_class:]
    mass = (probability.sum(dim=axes) + one_hot.sum(dim=axes))[:, first_class:]
    return (1.0 - (2.0 * common + _SMOOTH) / (mass + _SMOOTH)).mean()


def _nearest(target: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(target.shape[2:]) == tuple(shape):
        return target
    return F.interpolate(target.float(), size=tuple(shape), mode="nearest-exact").to(target.dtype)


def _check(logits: Tensor, target: Tensor, ignore_value: int | None) -> None:
    if target.shape != (len(logits), 1, *logits.shape[2:]):
        raise ValueError(
            f"target {tuple(target.shape)} against logits {tuple(logits.shape)}: "
            "the target needs one channel and the sizes of the logits."
        )
    if logits.shape[1] < 2:
        raise ValueError(f"{logits.shape[1]} class: a softmax needs background and at least one structure.")
    if target.device.type != "cpu":  # each step would wait here
        return
    values = target if ignore_value is None else target[target != ignore_value]
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= logits.shape[1]):
        raise ValueError(
            f"target values {int(values.min())} to {int(values.max())} with {logits.shape[1]} classes: "
            f"indices must be 0 to {logits.shape[1] - 1}. Map label values to class indices first."
        )
