"""Losses for label maps: an overlap term, a voxel-wise term and a boundary term, plain and deeply supervised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from medssl.losses.terms import boundary_loss, dice_loss, focal, tversky_loss, voxel_mean

IGNORED = -1
"""Class index of voxels that take part in no term."""

_NEVER = -1e9  # a score that no softmax gives any mass to


class SegmentationTerms(NamedTuple):
    """The weighted sum and its two terms before weighting, scalars."""

    total: Float[Tensor, ""]
    dice: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]


class Terms(NamedTuple):
    """The weighted sum, what it is made of before weighting, by name, and the weights; scalars."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]


@dataclass(frozen=True)
class Blend:
    """Which terms a segmentation loss adds, and how each is shaped.

    Args:
        overlap: Dice, or Tversky with ``alpha``, ``beta`` and ``power``.
        voxel: Cross-entropy; focal with ``gamma``; or cross-entropy of the worst ``top_share`` of the voxels.
        overlap_weight: Of the overlap term.
        voxel_weight: Of the voxel-wise term.
        boundary_weight: Of the boundary term; it needs distances.
        include_background: Whether class 0 is in the overlap and boundary terms.
        alpha: See :func:`~medssl.losses.terms.tversky_loss`, and so ``beta`` and ``power``.
        beta: See there.
        power: See there.
        gamma: See :func:`~medssl.losses.terms.focal`.
        top_share: See :func:`~medssl.losses.terms.voxel_mean`.
    """

    overlap: Literal["dice", "tversky"] = "dice"
    voxel: Literal["cross_entropy", "focal", "topk"] = "cross_entropy"
    overlap_weight: float = 1.0
    voxel_weight: float = 1.0
    boundary_weight: float = 0.0
    include_background: bool = False
    alpha: float = 0.3
    beta: float = 0.7
    power: float = 1.0
    gamma: float = 2.0
    top_share: float = 0.1

    def overlap_of(self, p: Tensor, g: Tensor, share: Tensor) -> Float[Tensor, "b k"]:
        """The overlap term of each sample and class."""
        if self.overlap == "dice":
            return dice_loss(p, g, share)
        return tversky_loss(p, g, share, alpha=self.alpha, beta=self.beta, power=self.power)

    def voxel_of(self, per_voxel: Float[Tensor, " b *s"], share: Float[Tensor, " b *s"]) -> Float[Tensor, ""]:
        """The voxel-wise term from the cross-entropy of each voxel."""
        shaped = focal(per_voxel, gamma=self.gamma) if self.voxel == "focal" else per_voxel
        return voxel_mean(shaped, share, top_share=self.top_share if self.voxel == "topk" else 1.0)

    def add(self, overlap: Tensor, voxel: Tensor, boundary: Tensor | None = None) -> Terms:
        """The terms by name, and their weighted sum."""
        parts = {f"{self.overlap}_loss": overlap, "cross_entropy" if self.voxel != "focal" else "focal_loss": voxel}
        weights = dict(zip(parts, (self.overlap_weight, self.voxel_weight), strict=True))
        if boundary is not None:
            parts["boundary_loss"], weights["boundary_loss"] = boundary, self.boundary_weight
        return _weighted(parts, weights)


def dice_ce(
    logits: Float[Tensor, "b k *s"],
    target: Integer[Tensor, "b 1 *s"],
    *,
    include_background: bool = False,
    ignore_value: int | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> SegmentationTerms:
    """Add soft Dice loss and cross-entropy, in float32: :func:`label_terms` in its plainest form.

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
    blend = Blend(overlap_weight=weights[0], voxel_weight=weights[1], include_background=include_background)
    total, parts, _ = label_terms(logits, target, blend, ignore_value=ignore_value)
    return SegmentationTerms(total, parts["dice_loss"], parts["cross_entropy"])


def label_terms(
    logits: Float[Tensor, "b k *s"],
    target: Integer[Tensor, "b 1 *s"],
    blend: Blend,
    *,
    ignore_value: int | None = IGNORED,
    known: Bool[Tensor, "b k"] | None = None,
    distance: Float[Tensor, "b k *s"] | None = None,
) -> Terms:
    """Loss of scores of classes that exclude each other, in float32.

    Where a case is annotated in part, the probability of the classes that nobody drew is added to background's before
    anything is compared (the marginal loss): such a class may lie anywhere in what the label map calls background.

    Args:
        logits: Scores of ``k`` classes, before softmax.
        target: Class index of each voxel, or ``ignore_value``.
        blend: Which terms.
        ignore_value: Voxels with this index take part in no term.
        known: Which classes are annotated in a sample; None takes all. Background always is.
        distance: Signed distances to the border of each class, for the boundary term.

    Returns:
        Total and terms; all are 0 with gradient 0 where every voxel is ignored.

    Raises:
        ValueError: if the shapes do not fit, or, on the CPU, a class index is out of range.

    Reference: Shi et al., Marginal loss and exclusion loss for partially supervised multi-organ segmentation, Medical
        Image Analysis 2021, arXiv:2007.03868, section 3.2.
    Deviations: no exclusion loss.
    """
    _check(logits, target, ignore_value)
    with torch.autocast(logits.device.type, enabled=False):
        scores, index = logits.float(), target[:, 0].long()
        valid = torch.ones_like(index, dtype=torch.bool) if ignore_value is None else index != ignore_value
        index = index.where(valid, torch.zeros_like(index))
        if known is not None:
            known = known.clone()
            known[:, 0] = True
            index = index * known.gather(1, index.flatten(1)).reshape(index.shape)
            scores = _merged(scores, known)
        share = valid.to(scores.dtype)
        g = torch.stack([(index == k) for k in range(scores.shape[1])], dim=1).to(scores.dtype)
        p, every = scores.softmax(dim=1), share.unsqueeze(1)
        first = 0 if blend.include_background else 1
        overlap = _class_mean(blend.overlap_of(p, g, every), known, first)
        voxel = blend.voxel_of(F.cross_entropy(scores, index, reduction="none"), share)
        boundary = None
        if distance is not None:
            boundary = _class_mean(boundary_loss(p, distance.float(), every), known, first)
        return blend.add(overlap, voxel, boundary)


def deeply(
    outputs: Sequence[Tensor], target: Integer[Tensor, "b 1 *s"], loss: Callable[[Tensor, Tensor, int], Terms]
) -> Terms:
    """Sum a loss over the resolutions of a decoder, each half the weight of the finer one.

    The weights ``1, ½, ¼, ...`` are divided by their sum. The target is brought to a coarser grid by nearest voxel. A
    term that only the finest level has, such as the boundary's, is taken as it is.

    Args:
        outputs: Scores ``(b, k, *s)`` of each resolution, finest first.
        target: Class indices at the finest resolution.
        loss: Of scores, a target on their grid, and the number of the level, 0 for the finest.

    Returns:
        Weighted sums of the total and of each term.

    Raises:
        ValueError: if ``outputs`` is empty.

    Reference: Isensee et al., nnU-Net, Nature Methods 2021, arXiv:1904.08128, supplementary note 2.
    Deviations: none.
    """
    if not outputs:
        raise ValueError("no output to compare with the target: deep supervision needs at least one.")
    levels = [loss(logits, _nearest(target, logits.shape[2:]), level) for level, logits in enumerate(outputs)]
    weights = [0.5**level for level in range(len(levels))]
    parts = {}
    for name in levels[0].parts:
        of_level = [(w, terms.parts[name]) for w, terms in zip(weights, levels, strict=True) if name in terms.parts]
        parts[name] = torch.stack([w * value for w, value in of_level]).sum() / sum(w for w, _ in of_level)
    return _weighted(parts, levels[0].weights)


def _weighted(parts: dict[str, Tensor], weights: dict[str, float]) -> Terms:
    return Terms(torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts, weights)


def _merged(scores: Tensor, known: Tensor) -> Tensor:
    """Scores in which background has the mass of all classes that are not known, and those have none."""
    shape = (*known.shape, *(1,) * (scores.ndim - 2))
    unknown = ~known.reshape(shape)
    pooled = unknown.clone()
    pooled[:, 0] = True
    background = scores.masked_fill(~pooled, _NEVER).logsumexp(dim=1, keepdim=True)
    return torch.cat((background, scores[:, 1:].masked_fill(unknown[:, 1:], _NEVER)), dim=1)


def _class_mean(terms: Float[Tensor, "b k"], known: Tensor | None, first: int) -> Tensor:
    """Mean over samples and the classes that count; 0 where none does."""
    if known is None:
        return terms[:, first:].mean()
    weight = known[:, first:].to(terms.dtype)
    return (terms[:, first:] * weight).sum() / weight.sum().clamp(min=1.0)


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
