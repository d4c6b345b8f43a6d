"""The U-Net encoder of Models Genesis, in which SuPreM's weights are published too."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import conv, norm
from medssl.nn.resnet import FrozenBatchNorm, max_pool


class Config(BaseConfig):
    """Shape of the encoder; the published weights have ``width: 32, levels: 4, norm: frozen_batch``."""

    width: int = Field(16, ge=1, description="channels of the first convolution; each level ends with twice as many")
    levels: int = Field(4, ge=1)
    norm: Literal["group", "frozen_batch"] = Field(
        "group", description="frozen_batch: batch norm with the statistics of published weights, never updated"
    )


class GenesisEncoder(Backbone):
    """Two convolutions a level, the second doubling the channels, and a maximum over 2 voxels between levels.

    Reference: Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912, after Cicek et al., 3D U-Net, MICCAI 2016,
    arXiv:1606.06650, figure 2.
    Deviations: group norm, or batch norm whose statistics are never updated; an odd size is rounded up, where the
    authors' network rounds down.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        inner = [config.width * 2**level for level in range(config.levels)]
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=[2 * width for width in inner],
            strides=[2**level for level in range(config.levels)],
        )
        self.levels = nn.ModuleList()
        previous = in_channels
        for width in inner:
            first = _ConvNorm(config, spatial_dims, previous, width)
            self.levels.append(nn.Sequential(first, _ConvNorm(config, spatial_dims, width, 2 * width)))
            previous = 2 * width

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""
        pyramid: list[Tensor] = []
        for level in self.levels:
            x = level(max_pool(x, size=2) if pyramid else x)
            pyramid.append(x)
        return pyramid

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """One group a level."""
        return [parameters_of(level) for level in self.levels]


class _ConvNorm(nn.Module):
    """Convolution, norm and rectifier."""

    def __init__(self, config: Config, spatial_dims: int, source: int, target: int) -> None:
        super().__init__()
        self.conv = conv(spatial_dims, source, target, bias=True)
        self.norm: nn.Module = FrozenBatchNorm(target) if config.norm == "frozen_batch" else norm("group", target)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))
