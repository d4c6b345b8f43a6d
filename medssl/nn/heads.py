"""Small networks on top of an encoder: pooled embeddings, projectors, voxel reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from medssl.nn.blocks import conv

ProjectorNorm = Literal["layer", "batch"]


class Projector(nn.Module):
    """Multi-layer perceptron from an embedding to the space of a loss: linear, norm, ReLU; the last linear alone.

    Args:
        in_features: Size of the embedding.
        hidden_features: Width of the hidden layers.
        out_features: Size of the projection.
        layers: Number of linear layers, at least 1.
        norm: "layer" depends on no other sample; "batch" is batch norm without weights and without running
            statistics, as in the published VoCo (statistics of the batch in evaluation too).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        layers: int = 3,
        norm: ProjectorNorm = "layer",
    ) -> None:
        super().__init__()
        widths = [in_features] + [hidden_features] * (layers - 1) + [out_features]
        modules: list[nn.Module] = []
        for i in range(layers):
            modules.append(nn.Linear(widths[i], widths[i + 1]))
            if i < layers - 1:
                modules += [_norm(norm, widths[i + 1]), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*modules)

    def forward(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Project embeddings ``h``."""
        z: Tensor = self.layers(h)
        return z


class ReconstructionHead(nn.Module):
    """Voxels from one feature level: each feature gives the block of voxels it stands for, by one linear map.

    Args:
        in_channels: Channels of the level.
        out_channels: Channels of the image.
        stride: Voxels of the image a voxel of the level, along each axis.
        spatial_dims: 2 or 3.

    Reference: Xie et al., SimMIM, CVPR 2022, arXiv:2111.09886, section 3.3 (linear prediction head).
    Deviations: none.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, spatial_dims: int) -> None:
        super().__init__()
        self.stride = stride
        self.predict = conv(spatial_dims, in_channels, out_channels * stride**spatial_dims, kernel=1, bias=True)

    def forward(self, feature: Float[Tensor, "b c *s"], shape: Sequence[int]) -> Float[Tensor, "b k *t"]:
        """Voxels of ``feature``, cut at the end of each axis to spatial ``shape``."""
        blocks = self.predict(feature)
        dims = feature.ndim - 2
        grid = blocks.shape[2:]
        blocks = blocks.reshape(blocks.shape[0], -1, *[self.stride] * dims, *grid)
        axes = [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]
        voxels = blocks.permute(0, 1, *axes).reshape(*blocks.shape[:2], *[size * self.stride for size in grid])
        cut: Tensor = voxels[(..., *(slice(size) for size in shape))]
        return cut


def pool_pyramid(features: Sequence[Tensor]) -> Float32[Tensor, "b d"]:
    """Mean over space of every level, concatenated; finest level first, in float32."""
    return torch.cat([f.mean(dim=tuple(range(2, f.ndim)), dtype=torch.float32) for f in features], dim=1)


def _norm(name: ProjectorNorm, features: int) -> nn.Module:
    if name == "layer":
        return nn.LayerNorm(features)
    return nn.BatchNorm1d(features, affine=False, track_running_stats=False)
