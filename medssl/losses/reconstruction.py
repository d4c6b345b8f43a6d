"""Losses on what was hidden from the network, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mse(
    prediction: Float[Tensor, "b c *s"], target: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b 1 *s"]
) -> Float[Tensor, ""]:
    """Mean squared error over the masked voxels.

    ``Σ mask (prediction − target)² / (C Σ mask)``. Whatever the prediction is elsewhere changes neither the value nor
    any gradient, not even where it is not finite.

    Args:
        prediction: What the network made of the visible voxels.
        target: The image, or :func:`normalise_blocks` of it.
        mask: True where a voxel was hidden.

    Returns:
        The mean, float32, in squared units of the target.

    Raises:
        ValueError: if the shapes do not fit, or, on the CPU, nothing is masked.

    Reference: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377, section 3.
    Deviations: none.
    """
    if prediction.shape != target.shape or mask.shape != (len(target), 1, *target.shape[2:]):
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}, mask {tuple(mask.shape)}: "
            "prediction and target must be equal in shape, and the mask too but for one channel."
        )
    with torch.autocast(target.device.type, enabled=False):
        count = mask.sum() * target.shape[1]
        if count.device.type == "cpu" and count == 0:  # elsewhere the step would wait here, and gets NaN
            raise ValueError("no voxel is masked: the loss needs at least one. Raise mask_ratio.")
        # a choice, not a product with the mask: 0 * nan is nan
        difference = torch.where(mask, prediction.float() - target.float(), 0.0)
        return difference.square().sum() / count


def visible_mean(image: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b 1 *s"]) -> Float[Tensor, "b c *ones"]:
    """Mean of the voxels of each sample and channel that are not masked; 0 where all are masked.

    Returns:
        Float32 with spatial axes of length 1: the best guess of a network that sees no structure.
    """
    axes = tuple(range(2, image.ndim))
    visible = (~mask).float()
    total = (image.float() * visible).sum(dim=axes, keepdim=True)
    return total / visible.sum(dim=axes, keepdim=True).clamp(min=1.0)


def normalise_blocks(image: Float[Tensor, "b c *s"], block: Sequence[int], *, eps: float = 1e-6) -> Tensor:
    """Give every block and channel mean 0 and variance 1, the target that makes local contrast count.

    ``(x − mean) / sqrt(var + eps)`` with the unbiased variance, over the voxels of one block.

    Args:
        image: Spatial axes must be multiples of ``block``.
        block: Block size in voxels, one number a spatial axis.
        eps: Added to the variance; flat blocks become 0.

    Returns:
        Normalised image, float32, same shape. Predicting 0 has an error of about 1.

    Reference: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377, section 4.1.
    Deviations: each channel is normalised by itself.
    """
    with torch.autocast(image.device.type, enabled=False):
        split: list[int] = []
        for length, edge in zip(image.shape[2:], block, strict=True):
            split += [length // edge, edge]
        blocks = image.float().reshape(*image.shape[:2], *split)
        inner = tuple(range(3, blocks.ndim, 2))
        mean = blocks.mean(dim=inner, keepdim=True)
        variance = blocks.var(dim=inner, keepdim=True)
        return ((blocks - mean) / torch.sqrt(variance + eps)).reshape(image.shape)
