"""One resampling of images and labels under an affine map of voxels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Float64, Shaped
from torch import Tensor
from torch.nn import functional as F


def warp(
    tensors: Sequence[Shaped[Tensor, "b _ *s"]], matrix: Float64[Tensor, "b n n"], *, fill: float | None = None
) -> list[Shaped[Tensor, "b _ *s"]]:
    """Move the content of ``tensors`` by ``matrix``; floats are images (linear), whole numbers labels (nearest).

    A sample under the identity keeps its values bit for bit, and one under a mirror is moved by index.

    Args:
        tensors: Images and labels on one grid.
        matrix: Homogeneous map of content from input to output, in voxels from the centre of the crop, one a sample,
            on the CPU.
        fill: Value of images outside the crop, where labels get 0; None extends the border.

    Returns:
        Tensors of the same types; those given, where nothing moves.
    """
    linear, shift = matrix[:, :-1, :-1], matrix[:, :-1, -1]
    signs = torch.diagonal(linear, dim1=1, dim2=2).sign()
    by_index = (linear == torch.diag_embed(signs)).flatten(1).all(1) & (shift == 0).all(1)
    resampled = (~by_index).nonzero()[:, 0]
    mirrored = (by_index & (signs < 0).any(1)).nonzero()[:, 0]
    if len(resampled) == 0 and len(mirrored) == 0:
        return list(tensors)
    first = tensors[0]
    grid = _grid(matrix[resampled], first.shape[2:], first.device) if len(resampled) else None
    outputs = []
    for tensor in tensors:
        if grid is not None and len(resampled) == len(tensor):
            outputs.append(_sample(tensor, grid, fill))
            continue
        out = tensor.clone()
        if grid is not None:
            out[resampled] = _sample(tensor[resampled], grid, fill)
        for index in mirrored.tolist():
            axes = [axis + 1 for axis, sign in enumerate(signs[index].tolist()) if sign < 0]
            out[index] = tensor[index].flip(axes)
        outputs.append(out)
    return outputs


def _grid(matrix: Float64[Tensor, "b n n"], shape: Sequence[int], device: torch.device) -> Float32[Tensor, "b *s d"]:
    """Where each output voxel is read from, in the coordinates of ``grid_sample``: last axis first, edges at ±1."""
    inverse = torch.linalg.inv(matrix)
    half = torch.tensor(shape, dtype=torch.float64) / 2
    theta = torch.cat([inverse[:, :-1, :-1] * half / half[:, None], inverse[:, :-1, -1:] / half[:, None]], dim=2)
    dims = len(half)
    theta = torch.cat([theta[:, :, :dims].flip(1, 2), theta[:, :, dims:].flip(1)], dim=2)
    size = [len(matrix), 1, *shape]
    return F.affine_grid(theta.to(device, torch.float32), size, align_corners=False)


def _sample(
    tensor: Shaped[Tensor, "b c *s"], grid: Float32[Tensor, "b *s d"], fill: float | None
) -> Shaped[Tensor, "b c *s"]:
    padding = "border" if fill is None else "zeros"
    if not tensor.is_floating_point():
        moved = F.grid_sample(tensor.float(), grid, mode="nearest", padding_mode=padding, align_corners=False)
        return moved.to(tensor.dtype)
    shift = fill or 0.0
    moved = F.grid_sample(tensor.float() - shift, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return (moved + shift).to(tensor.dtype)
