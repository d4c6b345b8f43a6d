"""Convolutional parts that encoders and decoders share: deterministic, 2D and 3D, quick on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NormName = Literal["group", "instance", "layer"]

GROUP_CHANNELS = 16


def conv(
    spatial_dims: int, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, bias: bool = False
) -> nn.Conv2d | nn.Conv3d:
    """Convolution that turns ``n`` voxels into ``ceil(n / stride)``, with weights drawn for a leaky rectifier."""
    cls = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    layer = cls(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, a=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def norm(name: NormName, channels: int) -> nn.GroupNorm:
    """Normalisation without batch statistics.

    All three are group norms: "group" has groups of 16 channels (one group where 16 does not divide ``channels``),
    "instance" one channel a group, "layer" one group. "instance" is of no use on a level of one voxel, where it gives
    its shift alone; the other two work there, and are several times quicker on a CPU in bfloat16.
    """
    if name == "instance":
        return _InstanceNorm(channels, channels)
    grouped = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
    return nn.GroupNorm({"group": grouped, "layer": 1}[name], channels)


class _InstanceNorm(nn.GroupNorm):
    """One channel a group; a single voxel gives the shift, where torch refuses a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0].numel() > 1:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - x) * self.weight.view(shape) + self.bias.view(shape)


class ResidualBlock(nn.Module):
    """``act(norm(conv(...)) + shortcut)`` with one or more 3x3(x3) convolutions, the first of them strided.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels in.
        out_channels: Channels out.
        stride: Stride of the first convolution and of the 1x1 shortcut.
        convs: Number of convolutions.
        norm_name: Normalisation after each convolution.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        convs: int = 2,
        norm_name: NormName = "group",
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * convs
        self.convs = nn.ModuleList(
            conv(spatial_dims, widths[i], widths[i + 1], stride=stride if i == 0 else 1) for i in range(convs)
        )
        self.norms = nn.ModuleList(norm(norm_name, out_channels) for _ in range(convs))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = conv(spatial_dims, in_channels, out_channels, kernel=1, stride=stride)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b k *t"]:
        """Features of ``x``, ``ceil(n / stride)`` voxels along each axis."""
        h = x
        for i, (convolve, normalise) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = normalise(convolve(h))
            if i + 1 < len(self.convs):
                h = F.leaky_relu(h, 0.01, inplace=True)
        return F.leaky_relu(h + self.shortcut(x), 0.01, inplace=True)


def upsample(x: Float[Tensor, "b c *s"], *, factor: int, shape: Sequence[int]) -> Float[Tensor, "b c *t"]:
    """Repeat every voxel ``factor`` times along each axis and cut the end to spatial ``shape``.

    Voxel ``i`` of the result is voxel ``i // factor`` of ``x``. Linear interpolation is left out on purpose: its
    backward pass on CUDA adds in no fixed order.
    """
    if factor > 1:
        x = F.interpolate(x, scale_factor=float(factor), mode="nearest")
    for axis, size in enumerate(shape, start=2):
        x = x.narrow(axis, 0, size) if x.shape[axis] != size else x
    return x


def halve(x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *t"]:
    """Mean over blocks of two voxels along each axis, ``ceil(n / 2)`` voxels; the last block may hold one alone.

    Written as sums of slices: the backward pass of average pooling on CUDA adds in no fixed order.
    """
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        if size % 2:
            x = torch.cat((x, x.narrow(axis, size - 1, 1)), dim=axis)
        first, second = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]).unbind(axis + 1)
        x = (first + second) * 0.5
    return x
