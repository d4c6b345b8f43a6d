"""SegResNet encoder: residual blocks at full resolution and below, strided convolutions between levels."""

from __future__ import annotations

from typing import Self

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import conv

GROUPS = 8


class Config(BaseConfig):
    """Shape of the encoder, one number a level, finest first; the finest is at full resolution."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    blocks: tuple[int, ...] = (1, 2, 2, 4)

    @model_validator(mode="after")
    def _one_number_a_level(self) -> Self:
        if not self.channels or len(self.channels) != len(self.blocks):
            raise ValueError(
                f"{len(self.channels)} channels and {len(self.blocks)} blocks; give each one number a level"
            )
        if any(width < GROUPS or width % GROUPS for width in self.channels) or min(self.blocks) < 1:
            raise ValueError(f"channels must be multiples of {GROUPS} and blocks at least 1")
        return self


class SegResNetEncoder(Backbone):
    """Encoder of SegResNet, equal to MONAI's on the same weights.

    Reference: Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018,
    arXiv:1810.11654, table 1.
    Deviations: none in the encoder; dropout and the variational branch are left out.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=config.channels,
            strides=[2**level for level in range(len(config.channels))],
        )
        self.levels = nn.ModuleList()
        previous = in_channels
        for i, (width, count) in enumerate(zip(config.channels, config.blocks, strict=True)):
            entry = conv(spatial_dims, previous, width, stride=2 if i else 1)
            self.levels.append(nn.Sequential(entry, *[_Block(spatial_dims, width) for _ in range(count)]))
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


class _Block(nn.Module):
    """Residual block with norm and activation before each convolution."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = conv(spatial_dims, channels, channels)
        self.conv2 = conv(spatial_dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.relu(self.norm1(x), inplace=True))
        h = self.conv2(F.relu(self.norm2(h), inplace=True))
        return x + h
