"""A decoder for any feature pyramid, back to the resolution of the image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.blocks import NormName, ResidualBlock, conv, norm, upsample

FULL_RESOLUTION_WIDTH = 8


class Decoder(nn.Module):
    """U-Net decoder over declared channels and strides.

    A step takes the coarser features through a 1x1 convolution, repeats voxels up to the skip's size, concatenates
    the skip and applies a residual convolution. Where the finest level is coarser than the image, a last and cheap
    step reaches full resolution: one convolution without norm, with the image as its skip if
    ``skip_image_channels`` is given.

    Args:
        channels: Channels of the pyramid, finest first.
        strides: Cumulative strides of the pyramid, finest first; each a multiple of the one before.
        spatial_dims: 2 or 3.
        out_channels: Channels of the result.
        width: Channels of each step, finest first, full-resolution step included; by default those of the pyramid,
            and 8 at full resolution.
        deep_supervision: Whether every step gives a result, not the finest alone.
        skip_image_channels: Channels of the image to concatenate at full resolution; 0 leaves it out. Without effect
            where the finest level is at full resolution already.
        norm_name: Normalisation of each step.

    Raises:
        ConfigError: if channels, strides and width do not fit together.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        spatial_dims: int,
        out_channels: int,
        *,
        width: Sequence[int] | None = None,
        deep_supervision: bool = False,
        skip_image_channels: int = 0,
        norm_name: NormName = "group",
    ) -> None:
        super().__init__()
        coarse = strides[0] > 1
        if width is None:
            width = [FULL_RESOLUTION_WIDTH] * coarse + list(channels[:-1])
        _check(channels, strides, width)
        self._config = {
            "channels": list(channels),
            "strides": list(strides),
            "spatial_dims": spatial_dims,
            "out_channels": out_channels,
            "width": list(width),
            "deep_supervision": deep_supervision,
            "skip_image_channels": skip_image_channels,
            "norm_name": norm_name,
        }
        self._skips_image = coarse and skip_image_channels > 0
        self._strides = [1] * coarse + list(strides)
        below = [*width, channels[-1]][1:]
        steps: list[nn.Module] = [
            _Step(spatial_dims, source, skip, target, norm_name=norm_name)
            for source, skip, target in zip(below[coarse:], channels[:-1], width[coarse:], strict=True)
        ]
        if coarse:
            image_channels = skip_image_channels if self._skips_image else 0
            steps.insert(0, _FullResolutionStep(spatial_dims, below[0], image_channels, width[0], norm_name=norm_name))
        self.steps = nn.ModuleList(steps)
        sources = list(width) or [channels[-1]]
        self.heads = nn.ModuleList(
            conv(spatial_dims, source, out_channels, kernel=1, bias=True)
            for source in (sources if deep_supervision else sources[:1])
        )

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this decoder again, as plain data."""
        return dict(self._config)

    @property
    def output_strides(self) -> tuple[int, ...]:
        """Stride of each result relative to the image, finest first."""
        return tuple(self._strides[: len(self.heads)])

    def forward(self, features: Sequence[Tensor], image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Decode a feature pyramid.

        Args:
            features: Feature pyramid, finest first.
            image: The image that the pyramid belongs to; gives size and skip of the full-resolution step.

        Returns:
            Tensors with ``out_channels``, finest first; the first has the image's size. One without deep supervision.
        """
        skips: list[Tensor | None] = list(features[:-1])
        shapes = [feature.shape[2:] for feature in features[:-1]]
        if len(self.steps) > len(shapes):
            skips.insert(0, image if self._skips_image else None)
            shapes.insert(0, image.shape[2:])
        h = features[-1]
        results = [] if len(self.steps) else [self.heads[0](h)]
        for i in reversed(range(len(self.steps))):
            factor = self._strides[i + 1] // self._strides[i]
            h = self.steps[i](h, skips[i], factor=factor, shape=shapes[i])
            if i < len(self.heads):
                results.insert(0, self.heads[i](h))
        return results


class _Step(nn.Module):
    """One step up to a level of the pyramid."""

    def __init__(self, spatial_dims: int, source: int, skip: int, target: int, *, norm_name: NormName) -> None:
        super().__init__()
        self.narrow = _Narrow(spatial_dims, source, target, norm_name=norm_name)
        self.mix = ResidualBlock(spatial_dims, target + skip, target, convs=1, norm_name=norm_name)

    def forward(self, x: Tensor, skip: Tensor, *, factor: int, shape: Sequence[int]) -> Tensor:
        h = upsample(self.narrow(x), factor=factor, shape=shape)
        mixed: Tensor = self.mix(torch.cat((h, skip.to(h.dtype)), dim=1))
        return mixed


class _FullResolutionStep(nn.Module):
    """The step to the image's own grid, where every operation is dear: one convolution, no norm.

    The convolution over features and image together is written as a sum of two: a tensor of 8 + 1 channels would
    fall off the quick paths of oneDNN.
    """

    def __init__(self, spatial_dims: int, source: int, skip: int, target: int, *, norm_name: NormName) -> None:
        super().__init__()
        self.narrow = _Narrow(spatial_dims, source, target, norm_name=norm_name)
        self.mix = conv(spatial_dims, target, target, bias=True)
        self.mix_image = conv(spatial_dims, skip, target) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None, *, factor: int, shape: Sequence[int]) -> Tensor:
        h = self.mix(upsample(self.narrow(x), factor=factor, shape=shape))
        if self.mix_image is not None:
            h = h + self.mix_image(skip)
        return F.leaky_relu(h, 0.01, inplace=True)


class _Narrow(nn.Sequential):
    """1x1 convolution before voxels are repeated, where it is cheap."""

    def __init__(self, spatial_dims: int, source: int, target: int, *, norm_name: NormName) -> None:
        super().__init__(
            conv(spatial_dims, source, target, kernel=1), norm(norm_name, target), nn.LeakyReLU(0.01, inplace=True)
        )


def _check(channels: Sequence[int], strides: Sequence[int], width: Sequence[int]) -> None:
    steps = len(channels) - 1 + (strides[0] > 1)
    if len(strides) != len(channels) or len(width) != steps:
        raise ConfigError(
            f"decoder: {len(channels)} channels, {len(strides)} strides and {len(width)} widths; a pyramid of "
            f"{len(channels)} levels with finest stride {strides[0]} takes {steps} widths. Correct `width`."
        )
    if any(coarser % finer for finer, coarser in itertools.pairwise(strides)):
        raise ConfigError(f"decoder: strides {tuple(strides)}; each must be a multiple of the one before.")
