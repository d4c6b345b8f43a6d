"""Residual encoder of nnU-Net: a stem at full resolution, then stages that get deeper and coarser."""

from __future__ import annotations

import itertools
from typing import Literal, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import NormName, conv, halve, norm


class Config(BaseConfig):
    """Shape of the encoder, one number a stage, finest first; the default is that of ResEnc-L.

    It is large: 90 million parameters, and most of the work at full resolution. On a CPU halve ``channels`` or take
    fewer stages.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Literal[1, 2], ...] = Field((1, 2, 2, 2, 2, 2), description="relative to the stage before")
    blocks: tuple[int, ...] = Field((1, 3, 4, 6, 6, 6), description="residual blocks of two convolutions a stage")
    stem_channels: int | None = Field(None, ge=1, description="those of the first stage by default")
    norm: NormName = "instance"
    bias: bool = Field(True, description="whether the 3x3 convolutions have a bias, as nnU-Net's do")

    @model_validator(mode="after")
    def _one_number_a_stage(self) -> Self:
        if not self.channels or not len(self.channels) == len(self.strides) == len(self.blocks):
            raise ValueError(
                f"{len(self.channels)} channels, {len(self.strides)} strides and {len(self.blocks)} blocks; "
                "give each one number a stage"
            )
        if min(self.channels) < 1 or min(self.blocks) < 1:
            raise ValueError("channels and blocks must be at least 1")
        return self


class ResEncEncoder(Backbone):
    """Residual encoder of nnU-Net's ResEnc presets, equal to the published network on the same weights.

    Reference: Isensee et al., nnU-Net Revisited, MICCAI 2024, arXiv:2404.09556, section 2 (ResEnc presets); He et al.,
    Bag of Tricks for Image Classification, CVPR 2019, arXiv:1812.01187, section 4.2 (average pooling in the shortcut).
    Deviations: strides are equal along every axis, where nnU-Net plans them axis by axis; an odd size is rounded up,
    where the authors' network refuses it: the last voxel's mean in the shortcut is over those that are there; a stage
    of one voxel gets the shift of its norm, where torch's instance norm is an error.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=config.channels,
            strides=tuple(itertools.accumulate(config.strides, lambda a, b: a * b)),
        )
        previous = config.stem_channels or config.channels[0]
        self.stem = _ConvNorm(config, spatial_dims, in_channels, previous)
        self.stages = nn.ModuleList()
        for width, stride, count in zip(config.channels, config.strides, config.blocks, strict=True):
            blocks = [_Block(config, spatial_dims, previous, width, stride=stride)]
            blocks += [_Block(config, spatial_dims, width, width) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            previous = width

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""
        x = F.leaky_relu(self.stem(x), 0.01, inplace=True)
        pyramid = []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        return pyramid

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Stem, then one group a stage."""
        return [parameters_of(self.stem), *[parameters_of(stage) for stage in self.stages]]


class _ConvNorm(nn.Module):
    """Convolution and norm."""

    def __init__(
        self, config: Config, spatial_dims: int, source: int, target: int, *, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        bias = config.bias and kernel > 1
        self.conv = conv(spatial_dims, source, target, kernel=kernel, stride=stride, bias=bias)
        self.norm = norm(config.norm, target)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.conv(x))
        return h


class _Block(nn.Module):
    """``act(conv2(act(conv1(x))) + shortcut(x))``; the shortcut is averaged before its 1x1 convolution."""

    def __init__(self, config: Config, spatial_dims: int, source: int, target: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = _ConvNorm(config, spatial_dims, source, target, stride=stride)
        self.conv2 = _ConvNorm(config, spatial_dims, target, target)
        self.shortcut = nn.Identity() if source == target else _ConvNorm(config, spatial_dims, source, target, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(x), 0.01, inplace=True))
        return F.leaky_relu(h + self.shortcut(halve(x) if self.stride > 1 else x), 0.01, inplace=True)
