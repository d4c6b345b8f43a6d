"""The terms that segmentation losses are made of, for a softmax over classes and for sigmoids of regions alike."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SMOOTH = 1e-5
_LEAST = 1e-12  # a power below 1 has no finite gradient at 0


def dice_loss(
    p: Float[Tensor, "b k *s"], g: Float[Tensor, "b k *s"], share: Float[Tensor, "b 1 *s"]
) -> Float[Tensor, "b k"]:
    """Soft Dice loss ``1 − (2 Σ p g + δ) / (Σ p + Σ g + δ)`` of each sample and class.

    Args:
        p: Probabilities.
        g: 1 where the voxel is of the class, else 0.
        share: 1 where a voxel counts, else 0.

    Returns:
        Loss in [0, 1]; of a class that a sample does not hold it falls to 0 with the predicted mass.

    Reference: Milletari, Navab, Ahmadi, V-Net, 3DV 2016, arXiv:1606.04797, section 3.
    Deviations: the denominator is not squared, as in nnU-Net.
    """
    hit, mass = _sums(p * g, share), _sums(p, share) + _sums(g, share)
    return 1.0 - (2.0 * hit + SMOOTH) / (mass + SMOOTH)


def tversky_loss(
    p: Float[Tensor, "b k *s"],
    g: Float[Tensor, "b k *s"],
    share: Float[Tensor, "b 1 *s"],
    *,
    alpha: float,
    beta: float,
    power: float = 1.0,
) -> Float[Tensor, "b k"]:
    """Tversky loss of each sample and class; with ``power`` below 1 the focal one.

    ::

        T    = (Σ p g + δ) / (Σ p g + alpha Σ p (1 − g) + beta Σ (1 − p) g + δ)
        loss = (1 − T) ** power

    Args:
        p: Probabilities.
        g: 1 where the voxel is of the class, else 0.
        share: 1 where a voxel counts, else 0.
        alpha: Weight of what is predicted too much; with ``beta`` 0.5 each it is Dice.
        beta: Weight of what is missed.
        power: 1 is the Tversky loss; ¾ raises the gradient of classes that are nearly right less than of those that
            are not.

    Returns:
        Loss in [0, 1].

    Reference: Salehi, Erdogmus, Gholipour, Tversky loss, MLMI 2017, arXiv:1706.05721, eq. 3 and 4; Abraham and Khan, A
        novel focal Tversky loss, ISBI 2019, arXiv:1810.07842, eq. 4 (``power`` is its 1/γ).
    Deviations: a smoothing of 1e-5 above and below.
    """
    hit = _sums(p * g, share)
    extra, missed = _sums(p, share) - hit, _sums(g, share) - hit
    index = (hit + SMOOTH) / (hit + alpha * extra + beta * missed + SMOOTH)
    loss = (1.0 - index).clamp(min=0.0)
    return loss if power == 1.0 else (loss + SMOOTH) ** power - SMOOTH**power


def focal(per_voxel: Float[Tensor, "*any"], *, gamma: float) -> Float[Tensor, "*any"]:
    """Focal loss ``(1 − q)^γ (− log q)`` from the cross-entropy ``− log q`` of each voxel.

    Reference: Lin et al., Focal loss for dense object detection, ICCV 2017, arXiv:1708.02002, eq. 4.
    Deviations: no class weight α; the mean runs over all voxels, not over the foreground.
    """
    return (-torch.expm1(-per_voxel)).clamp(min=_LEAST) ** gamma * per_voxel


def voxel_mean(
    per_voxel: Float[Tensor, " b *s"], share: Float[Tensor, " b *s"], *, top_share: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over the voxels that count, or over the worst of them.

    Args:
        per_voxel: Loss of each voxel, not below 0.
        share: 1 where a voxel counts, else 0.
        top_share: Only this share of the batch's voxels, the worst, is in the mean; 1 takes all.

    Returns:
        The mean; 0 where no voxel counts.

    Reference: Wu, Shen, van den Hengel, Bridging category-level and instance-level semantic image segmentation,
        arXiv:1605.06885, section 4 (online bootstrapping, "top-k").
    Deviations: a share of the voxels, as in nnU-Net's variant, where the paper keeps a number of pixels.
    """
    counted = per_voxel * share
    if top_share >= 1.0:
        return counted.sum() / share.sum().clamp(min=1.0)
    kept = math.ceil(top_share * counted.numel())
    worst = counted.flatten().topk(kept, sorted=False).values
    return worst.sum() / share.sum().clamp(min=1.0, max=float(kept))


def boundary_loss(
    p: Float[Tensor, "b k *s"], distance: Float[Tensor, "b k *s"], share: Float[Tensor, "b 1 *s"]
) -> Float[Tensor, "b k"]:
    """Mean of ``p`` times the signed distance to the reference's border, of each sample and class.

    Args:
        p: Probabilities.
        distance: Signed distance to the border, below 0 inside; 0 throughout for a class that is not there.
        share: 1 where a voxel counts, else 0.

    Returns:
        Loss in the unit of ``distance``, below 0 where the prediction is good.

    Reference: Kervadec et al., Boundary loss for highly unbalanced segmentation, MIDL 2019, arXiv:1812.07032, eq. 5.
    Deviations: none.
    """
    return _sums(p * distance, share) / share.flatten(1).sum(dim=1, keepdim=True).clamp(min=1.0)


def _sums(x: Tensor, share: Tensor) -> Tensor:
    """Sum over space of the voxels that count, (b, k)."""
    return (x * share).flatten(2).sum(dim=2)
