"""Change the size of features: by linear interpolation with a fixed order of sums on every device, or by cutting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def resize_linear(x: Float[Tensor, "b c *s"], shape: Sequence[int]) -> Float[Tensor, "b c *t"]:
    """Interpolate linearly to another size along each axis; ``x`` itself if none changes.

    Both grids cover the same extent, border to border (``align_corners=False``). Written as a product with one small
    matrix an axis, since the backward pass of torch's interpolation on CUDA adds in no fixed order.

    Args:
        x: Features, or a table of one vector a token.
        shape: Size wanted along each axis.
    """
    for axis, size in enumerate(shape, start=2):
        if x.shape[axis] != size:
            matrix = _weights(x.shape[axis], size).to(x.device, x.dtype)
            x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


def cut(x: Float[Tensor, "b c *s"], shape: Sequence[int]) -> Float[Tensor, "b c *t"]:
    """The first voxels of ``x`` along each axis, ``shape`` of them; ``x`` itself if that is all."""
    for axis, size in enumerate(shape, start=2):
        x = x if x.shape[axis] == size else x.narrow(axis, 0, size)
    return x


def _weights(source: int, target: int) -> Float[Tensor, "source target"]:
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    distance = (torch.arange(source, dtype=torch.float64)[:, None] - place).abs()
    return (1 - distance).clamp(min=0)
