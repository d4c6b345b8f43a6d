"""How crops lie in the boxes that were cut for them, and in the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """How crops lie in the boxes that were cut for them.

    Args:
        to_box: Crop voxel index to box voxel index, homogeneous, on the CPU.
        shape: Voxels of the crop along each axis.
        spacing_mm: Voxel size of each crop, on the CPU.
        extent: Voxels of each box that are its own, on the CPU; what lies behind was padded to stack boxes of
            different shape. None where none was.
    """

    to_box: Float64[Tensor, "b n n"]
    shape: tuple[int, ...]
    spacing_mm: Float64[Tensor, "b d"]
    extent: Int64[Tensor, "b d"] | None = None

    @classmethod
    def whole(cls, x: Shaped[Tensor, "b c *s"], spacing_mm: Sequence[float]) -> Frame:
        """Crops that are the boxes."""
        dims = x.ndim - 2
        spacing = torch.tensor([list(spacing_mm[:dims])] * len(x), dtype=torch.float64).reshape(len(x), dims)
        return cls(torch.eye(dims + 1, dtype=torch.float64).repeat(len(x), 1, 1), tuple(x.shape[2:]), spacing)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str, *, shape: Sequence[int]) -> Frame | None:
        """The frame that a sampler gave with the boxes ``name``; None if it gave crops as they are.

        Args:
            tensors: Of a batch; boxes (b, c, *s), or (b, v, c, *s) with several views a sample, which are taken as
                b times v crops.
            name: Of the boxes.
            shape: Voxels of the crop, of as many axes as the boxes have or one more, which is then dropped.
        """
        if f"{name}_to_box" not in tensors:
            return None
        to_box = tensors[f"{name}_to_box"].double().cpu().reshape(-1, 4, 4)
        spacing = tensors[f"{name}_spacing_mm"].double().cpu().reshape(-1, 3)
        extent = None
        if f"{name}_extent" in tensors:  # one a sample
            extent = tensors[f"{name}_extent"].cpu()
            extent = extent.repeat_interleave(len(to_box) // len(extent), dim=0)
        dims = tensors[name].ndim - tensors[f"{name}_to_box"].ndim + 1
        if dims == 2:
            kept = torch.tensor([0, 1, 3])
            to_box, spacing = to_box[:, kept][:, :, kept], spacing[:, :2]
            extent = None if extent is None else extent[:, :2]
        return cls(to_box, tuple(shape[:dims]), spacing, extent)

    def rows(self, chosen: Tensor) -> Frame:
        """The frame of some of the samples."""
        extent = None if self.extent is None else self.extent[chosen]
        return Frame(self.to_box[chosen], self.shape, self.spacing_mm[chosen], extent)


def follow(affine: Float64[Tensor, "b 4 4"], before: Frame, after: Frame) -> Float64[Tensor, "b 4 4"]:
    """The affine, crop voxel to world mm, of crops that a pipeline has moved from ``before`` to ``after``."""
    change = torch.linalg.solve(before.to_box, after.to_box)
    if len(before.shape) == 2:
        wide_change = torch.eye(4, dtype=torch.float64).repeat(len(change), 1, 1)
        kept = torch.tensor([0, 1, 3])
        wide_change[:, kept[:, None], kept] = change
        change = wide_change
    followed: Float64[Tensor, "b 4 4"] = affine.double() @ change
    return followed
