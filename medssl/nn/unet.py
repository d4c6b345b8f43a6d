"""Residual U-Net encoder: strided residual blocks; the first may already halve the image, which is what a CPU likes."""

from __future__ import annotations

import itertools
from typing import Literal, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import NormName, ResidualBlock


class Config(BaseConfig):
    """Shape of the encoder, one number a level, finest first.

    The default has its finest level at half resolution: a full-resolution level costs more than all others together
    (``strides: [1, 2, 2, 2]`` asks for one). :class:`~medssl.nn.decoder.Decoder` returns to full resolution.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    strides: tuple[Literal[1, 2, 4], ...] = Field((2, 2, 2, 2), description="relative to the level before")
    blocks: tuple[int, ...] = Field((1, 1, 1, 1), description="residual blocks of two convolutions a level")
    norm: NormName = "group"

    @model_validator(mode="after")
    def _one_number_a_level(self) -> Self:
        if not self.channels or not len(self.channels) == len(self.strides) == len(self.blocks):
            raise ValueError(
                f"{len(self.channels)} channels, {len(self.strides)} strides and {len(self.blocks)} blocks; "
                "give each one number a level"
            )
        if min(self.channels) < 1 or min(self.blocks) < 1:
            raise ValueError("channels and blocks must be at least 1")
        return self


class ResidualUNetEncoder(Backbone):
    """Residual encoder of a U-Net.

    Reference: Isensee et al., nnU-Net Revisited, MICCAI 2024, arXiv:2404.09556 (residual encoder); He et al., Deep
    Residual Learning, CVPR 2016, arXiv:1512.03385 (basic block).
    Deviations: no separate stem, the first block is strided; group norm, which also works on one voxel, in place of
    instance norm; the shortcut is a strided 1x1 convolution without average pooling, whose CUDA backward pass has no
    fixed order.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=config.channels,
            strides=tuple(itertools.accumulate(config.strides, lambda a, b: a * b)),
        )
        self.levels = nn.ModuleList()
        previous = in_channels
        for width, stride, count in zip(config.channels, config.strides, config.blocks, strict=True):
            blocks = [ResidualBlock(spatial_dims, previous, width, stride=stride, norm_name=config.norm)]
            blocks += [ResidualBlock(spatial_dims, width, width, norm_name=config.norm) for _ in range(count - 1)]
            self.levels.append(nn.Sequential(*blocks))
            previous = width

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""
        pyramid = []
        for level in self.levels:
            x = level(x)
            pyramid.append(x)
        return pyramid

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """One group a level."""
        return [parameters_of(level) for level in self.levels]
