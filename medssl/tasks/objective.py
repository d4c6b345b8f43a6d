"""What a segmentation is trained to do: the choice of a loss, and the distances that one of its terms needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32
from pydantic import Field
from scipy import ndimage
from torch import Tensor

from medssl import config as configuration
from medssl.losses.segmentation import Blend

LossName = Literal[
    "dice_ce", "dice_focal", "dice_topk", "tversky_ce", "tversky_focal", "focal_tversky_ce", "dice_ce_boundary"
]

_TERMS: dict[LossName, dict[str, Any]] = {
    "dice_ce": {},
    "dice_focal": {"voxel": "focal"},
    "dice_topk": {"voxel": "topk"},
    "tversky_ce": {"overlap": "tversky", "power": 1.0},
    "tversky_focal": {"overlap": "tversky", "voxel": "focal", "power": 1.0},
    "focal_tversky_ce": {"overlap": "tversky"},
    "dice_ce_boundary": {},
}


class LossConfig(configuration.Config):
    """The loss; the weights of its two main terms are ``dice_weight`` and ``ce_weight`` of the task.

    Args:
        name: An overlap term and a voxel-wise term; ``dice_ce_boundary`` adds a third, whose distances are computed on
            the CPU for every crop, so that it suits small crops and few structures.
        gamma: Of the focal loss: how much less a voxel counts that is right already.
        alpha: Of the Tversky loss: weight of what is predicted too much.
        beta: Of the Tversky loss: weight of what is missed.
        power: Of the focal Tversky loss.
        top_share: Of ``dice_topk``: share of the voxels, the worst, that the cross-entropy is taken of.
        boundary_weight: Of the boundary term at the end of the run; it rises from 0 in proportion to the steps.
    """

    name: LossName = "dice_ce"
    gamma: float = Field(2.0, ge=0)
    alpha: float = Field(0.3, ge=0)
    beta: float = Field(0.7, ge=0)
    power: float = Field(0.75, gt=0)
    top_share: float = Field(0.1, gt=0, le=1)
    boundary_weight: float = Field(0.01, gt=0)

    @property
    def needs_distance(self) -> bool:
        """Whether batches need :func:`signed_distance`."""
        return self.name == "dice_ce_boundary"

    def blend(self, *, overlap_weight: float, voxel_weight: float, include_background: bool, fraction: float) -> Blend:
        """The terms and their weights when ``fraction`` of the run is done."""
        shape = {"gamma": self.gamma, "alpha": self.alpha, "beta": self.beta, "power": self.power}
        return Blend(
            **{
                **shape,
                "top_share": self.top_share,
                "overlap_weight": overlap_weight,
                "voxel_weight": voxel_weight,
                "boundary_weight": self.boundary_weight * fraction if self.needs_distance else 0.0,
                "include_background": include_background,
                **_TERMS[self.name],
            }
        )


def signed_distance(masks: Bool[Tensor, "b k *s"], spacing_mm: Sequence[float]) -> Float32[Tensor, "b k *s"]:
    """Distance of each voxel to the border of each mask, below 0 inside, in units of the smallest voxel edge.

    Args:
        masks: One for each class or region; copied to the CPU, where the distances are computed.
        spacing_mm: Voxel size along the axes of the masks.

    Returns:
        On the device of ``masks``. Outside the distance to the nearest voxel of the mask; inside minus that to the
        nearest voxel beyond it, plus 1, and so at most 0; 0 throughout for a mask that is empty or full.

    Reference: Kervadec et al., Boundary loss for highly unbalanced segmentation, MIDL 2019, arXiv:1812.07032, section
        2 (and the released code for the inner voxels of the border, which have 0).
    Deviations: distances respect the voxel size.
    """
    unit = np.asarray(spacing_mm, float) / min(spacing_mm)
    inside = masks.cpu().numpy()
    found = np.zeros(inside.shape, np.float32)
    for place in np.ndindex(*inside.shape[:2]):
        mask = inside[place]
        if mask.any() and not mask.all():
            within = np.minimum(1.0 - ndimage.distance_transform_edt(mask, sampling=unit), 0.0)
            found[place] = np.where(mask, within, ndimage.distance_transform_edt(~mask, sampling=unit))
    return torch.from_numpy(found).to(masks.device)
