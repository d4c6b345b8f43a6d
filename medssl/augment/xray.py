"""What exposure, grid, collimator and scatter do to a projection picture, bright where little radiation came through.

All lengths are in pixels, for files of pictures seldom tell how large a pixel is.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from pydantic import AfterValidator, Field
from torch import Tensor

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    Params,
    Range,
    ShareRange,
    extremes,
    uniform,
    wide,
)
from medssl.augment.images import Domain
from medssl.augment.intensity import along_axes, gaussian

_PICTURES: frozenset[Domain] = frozenset({"unit", "zscore"})
_XR = frozenset({"XR"})
_PLANE = frozenset({2})
_EDGE_PIXELS = 2.0


def _resolved(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 2 <= bounds[0] <= bounds[1]:
        raise ValueError(f"spacing {bounds}; stripes are at least 2 pixels apart, and the lower bound comes first")
    return bounds


class ExposureConfig(AugmentConfig):
    """Options of :class:`Exposure`; one stop is twice the dose."""

    stops: Range = (-1.0, 1.0)


class Exposure(Augment[ExposureConfig]):
    """Take the picture with more or less dose: a tone curve with a toe and a shoulder, dark for more.

    A value ``v`` of the range of each sample and channel mapped to [0, 1] shows the exposure ``1 / v - 1``, which is
    straight in the logarithm of exposure for middle tones and levels off at both ends; both ends stay.

    Reference: none; the shape is that of Hurter and Driffield's characteristic curve.
    Deviations: a logistic curve in place of a measured one.
    """

    name: ClassVar[str] = "exposure"
    config_class = ExposureConfig
    takes = _PICTURES
    modalities = _XR
    spatial_dims = _PLANE

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the change of dose in stops."""
        return {"stops": uniform(self.config.stops, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``v / (v + (1 - v) * 2 ** stops)``."""
        low, span = _range(x)
        value = ((x - low) / span).clamp_(0, 1)
        return value.div_((1 - value).mul_(wide(params["stops"].exp2(), x)).add_(value)).mul_(span).add_(low)


class GridLinesConfig(AugmentConfig):
    """Options of :class:`GridLines`.

    Attributes:
        amplitude: Height of a stripe as a share of the range of the image.
        spacing_pixels: From stripe to stripe, at least 2.
        angle_deg: Between the normal of the stripes and the first axis; at 0 they run along the second.
    """

    amplitude: ShareRange = (0.005, 0.03)
    spacing_pixels: Annotated[tuple[float, float], AfterValidator(_resolved)] = (2.5, 8.0)
    angle_deg: Range = (-3.0, 3.0)


class GridLines(Augment[GridLinesConfig]):
    """Add the faint stripes of an anti-scatter grid, or their moiré with the pixels."""

    name: ClassVar[str] = "grid_lines"
    config_class = GridLinesConfig
    takes = _PICTURES
    modalities = _XR
    spatial_dims = _PLANE

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw strength, wave vector and phase."""
        angle = uniform(self.config.angle_deg, generator) * (math.pi / 180)
        turn = 2 * math.pi / uniform(self.config.spacing_pixels, generator)
        return {
            "amplitude": uniform(self.config.amplitude, generator),
            "wave": turn * torch.tensor([math.cos(angle), math.sin(angle)]),
            "phase": 2 * math.pi * torch.rand((), generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + amplitude * range * sin(wave · pixel + phase)``, clipped to the old range."""
        low, high = extremes(x)
        wave = params["wave"].to(x.device, non_blocking=True)
        u, v = (torch.arange(length, device=x.device) * wave[:, axis, None] for axis, length in enumerate(x.shape[2:]))
        stripes = (u[:, :, None] + v[:, None] + wide(params["phase"], u[:, :, None])).sin_()[:, None]
        return (stripes * (wide(params["amplitude"], x) * (high - low))).add_(x).clamp_(low, high)


class CollimationConfig(AugmentConfig):
    """Options of :class:`Collimation`: the share of the picture that is covered, and the turn of the blades."""

    share: ShareRange = (0.03, 0.2)
    turn_deg: Range = (-5.0, 5.0)


class Collimation(Augment[CollimationConfig]):
    """Cover all outside of a slightly turned rectangle with the darkest value of each sample and channel.

    No more than the drawn share of the pixels changes; each edge fades over two pixels. Labels stay: what is
    covered is still there.
    """

    name: ClassVar[str] = "collimation"
    config_class = CollimationConfig
    takes = _PICTURES
    modalities = _XR
    spatial_dims = _PLANE

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the share, and a rectangle whose size is set by it: centre and half edges as shares of the picture."""
        return {
            "share": uniform(self.config.share, generator),
            "turn_rad": uniform(self.config.turn_deg, generator) * (math.pi / 180),
            "centre": 0.45 + 0.1 * torch.rand(2, generator=generator),
            "half": 0.4 + 0.1 * torch.rand(2, generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Cover the pixels that lie farthest out, as many as the share allows."""
        outside = _outside(x, params)
        flat, total = outside.flatten(1), outside[0].numel()
        kept = total - (params["share"].double() * total).floor().long()
        limit = torch.stack([row.kthvalue(max(keep, 1)).values for row, keep in zip(flat, kept.tolist(), strict=True)])
        shade = ((outside - limit[:, None, None]) / _EDGE_PIXELS).clamp_(0, 1)[:, None]
        return (extremes(x)[0] - x).mul_(shade).add_(x)


class ScatterConfig(AugmentConfig):
    """Options of :class:`Scatter`.

    Attributes:
        fraction: Of the exposure that is scattered radiation, on top of what the picture has.
        reach: Standard deviation of the scattered radiation as a share of the longer edge.
        decades: Of exposure that the range of the picture shows.
    """

    fraction: ShareRange = (0.0, 0.4)
    reach: ShareRange = (0.05, 0.15)
    decades: float = Field(default=1.5, gt=0.0)


class Scatter(Augment[ScatterConfig]):
    """Lay a veil of scattered radiation over the picture: contrast falls most where little came through.

    The exposure, ``10 ** (-decades * v)`` for a value ``v`` of the range mapped to [0, 1], is mixed with its own
    blur, which keeps its mean.

    Reference: Love, Kruger, Scatter estimation for a digital radiographic system using convolution filtering, Medical
    Physics 1987, for scatter as a blur of the primary radiation.
    Deviations: a Gaussian in place of their kernel; the picture is taken as free of scatter.
    """

    name: ClassVar[str] = "scatter"
    config_class = ScatterConfig
    takes = _PICTURES
    modalities = _XR
    spatial_dims = _PLANE

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the fraction and the reach."""
        return {
            "fraction": uniform(self.config.fraction, generator),
            "reach": uniform(self.config.reach, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give the logarithm of ``(1 - fraction) * exposure + fraction * blur(exposure)``."""
        low, span = _range(x)
        slope = -self.config.decades * math.log(10)
        exposure = ((x - low) / span).clamp_(0, 1).mul_(slope).exp_()
        sigma = params["reach"] * max(x.shape[2:])
        veil = along_axes(exposure, [gaussian(length, sigma) for length in x.shape[2:]])
        mixed = (veil - exposure).mul_(wide(params["fraction"], x)).add_(exposure)
        return mixed.log_().div_(slope).mul_(span).add_(low)


def _range(x: Float[Tensor, "b c *s"]) -> tuple[Tensor, Tensor]:
    """Least value of each sample and channel, and how far the greatest is from it; 1 where it is constant."""
    low, high = extremes(x)
    return low, torch.where(high > low, high - low, 1.0)


def _outside(x: Float[Tensor, "b c *s"], params: Params) -> Float32[Tensor, "b x y"]:
    """How many pixels each pixel lies outside of a turned rectangle; negative inside."""
    width, height = x.shape[2:]
    size = torch.tensor([width, height])
    centre, half = (
        (params["centre"] * size - 0.5).to(x.device, non_blocking=True),
        (params["half"] * size).to(x.device, non_blocking=True),
    )
    cos, sin = (
        params["turn_rad"].cos().to(x.device, non_blocking=True)[:, None, None],
        params["turn_rad"].sin().to(x.device, non_blocking=True)[:, None, None],
    )
    dx = (torch.arange(width, device=x.device) - centre[:, :1])[:, :, None]
    dy = (torch.arange(height, device=x.device) - centre[:, 1:])[:, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return torch.maximum(along.abs() - half[:, :1, None], across.abs() - half[:, 1:, None])
