"""What an ultrasound scanner does to an image: grain, gain over depth, attenuation and shadows.

Depth runs along one array axis. Pictures are (columns, rows), so it is axis 1 there, and grows with the row. A volume
that was scanned from the front and brought to RAS has its surface at the far end of axis 1: ``is_surface_first`` is
then false.

Everything is multiplied into what exceeds the darkest voxel of each sample and channel, so that the black around the
sector stays black whatever constant the preparation has taken off, and nothing exceeds the brightest, as on a display
that saturates.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Float64
from pydantic import Field, model_validator
from torch import Tensor

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    NonNegativeRange,
    Params,
    PositiveRange,
    ShareRange,
    extremes,
    uniform,
    wide,
)
from medssl.augment.fields import normal_field, smooth_field
from medssl.augment.images import NOT_HU
from medssl.augment.intensity import along_axes, gaussian
from medssl.errors import ConfigError

_MOST_SPREAD_DEG = 60.0
_RAYLEIGH_MEAN = math.sqrt(math.pi / 2)


class _DepthConfig(AugmentConfig):
    """``depth_axis`` is the array axis along the beam; ``is_surface_first`` says that index 0 is nearest the probe."""

    depth_axis: Literal[0, 1, 2] = 1
    is_surface_first: bool = True


D = TypeVar("D", bound=_DepthConfig)


class SpeckleConfig(_DepthConfig):
    """Options of :class:`Speckle`.

    ``amount`` 1 is a fully developed speckle. ``grain_voxels`` is the standard deviation of a grain across the beam;
    along the beam it is ``axial_ratio`` times that, for pulses are shorter than beams are wide.
    """

    amount: ShareRange = (0.0, 0.4)
    grain_voxels: NonNegativeRange = (0.5, 1.5)
    axial_ratio: float = Field(default=0.5, gt=0, le=1)


class Speckle(Augment[SpeckleConfig]):
    """Multiply by ``1 + amount * (R - 1)``, R the length of a smooth complex normal field over its mean.

    R is Rayleigh distributed, as the echo of many small scatterers is. All channels get the same grain.

    Reference: Wagner, Smith, Sandrik, Lopez, Statistics of speckle in ultrasound B-scans, IEEE Transactions on Sonics
    and Ultrasonics 30(3), 1983.
    Deviations: the grain is laid on the displayed picture, whose logarithm was taken, in place of the echo; the point
    spread function is a Gaussian of one size everywhere.
    """

    name: ClassVar[str] = "speckle"
    config_class = SpeckleConfig
    takes = NOT_HU
    modalities = frozenset({"US"})

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw amount, grain and the seed of the field."""
        return {
            "amount": uniform(self.config.amount, generator),
            "grain_voxels": uniform(self.config.grain_voxels, generator),
            "field_seed": torch.randint(2**62, (), generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * (1 + amount * (R - 1))``."""
        depth_axis = _depth_axis(self, x)
        operators = []
        for axis, length in enumerate(x.shape[2:], start=2):
            ratio = self.config.axial_ratio if axis == depth_axis else 1.0
            operator = gaussian(length, params["grain_voxels"] * ratio)
            operators.append(operator / operator.norm(dim=2, keepdim=True))  # the variance stays 1, also at borders
        echo = along_axes(normal_field(params["field_seed"], (2, *x.shape[2:]), x.device), operators)
        grain = torch.hypot(echo[:, :1], echo[:, 1:]).div_(_RAYLEIGH_MEAN)
        return _amplified(x, grain.sub_(1).mul_(wide(params["amount"], x)).add_(1))


class TimeGainConfig(_DepthConfig):
    """Options of :class:`TimeGain`: the range of the gain at each slider, and how many there are."""

    factor: PositiveRange = (0.75, 1.25)
    num_knots: int = Field(default=6, ge=4)


class TimeGain(Augment[TimeGainConfig]):
    """Multiply by a smooth gain over depth, as the sliders of time-gain compensation do.

    Reference: Singla et al., Speckle and shadows: ultrasound-specific physics-based data augmentation for kidney
    segmentation, MIDL 2022.
    Deviations: the logarithm of the gain is a cubic B-spline, its coefficients drawn evenly and spread over the crop.
    """

    name: ClassVar[str] = "time_gain"
    config_class = TimeGainConfig
    takes = NOT_HU
    modalities = frozenset({"US"})

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the logarithm of the gain at each slider."""
        low, high = (math.log(bound) for bound in self.config.factor)
        return {"log_gain": low + torch.rand(self.config.num_knots, generator=generator) * (high - low)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * gain(depth)``."""
        axis = _depth_axis(self, x)
        knots = params["log_gain"] if self.config.is_surface_first else params["log_gain"].flip(1)
        curve = smooth_field(knots.to(x.device, non_blocking=True)[:, None], (x.shape[axis],))
        return _amplified(x, _along(curve[:, 0].exp(), axis, x))


class DepthAttenuationConfig(_DepthConfig):
    """Options of :class:`DepthAttenuation`: how often the signal falls to 1/e from top to bottom of the crop."""

    rate: NonNegativeRange = (0.0, 1.0)


class DepthAttenuation(Augment[DepthAttenuationConfig]):
    """Darken with depth, as tissue that absorbs more does.

    Reference: Østvik et al., Myocardial function imaging in echocardiography using deep learning, IEEE Transactions on
    Medical Imaging 40(5), 2021.
    Deviations: depth is measured along an array axis, from the top of the crop, and not from the apex of the sector.
    """

    name: ClassVar[str] = "depth_attenuation"
    config_class = DepthAttenuationConfig
    takes = NOT_HU
    modalities = frozenset({"US"})

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the rate."""
        return {"rate": uniform(self.config.rate, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * exp(-rate * depth)``, depth a share of the crop."""
        depth = _depth(self, x)
        return _amplified(x, (-wide(params["rate"], x) * depth).exp_())


class AcousticShadowConfig(_DepthConfig):
    """Options of :class:`AcousticShadow`.

    ``strength`` is the share of the signal that is lost, ``width`` the breadth of the shadow at its top as a share of
    the crop, ``start`` the depth of its top, ``spread_deg`` how far each edge leans outwards (0 for a linear probe),
    ``softness`` the breadth of the edges as a share of ``width``.
    """

    strength: ShareRange = (0.3, 0.8)
    width: ShareRange = (0.05, 0.25)
    start: ShareRange = (0.1, 0.7)
    spread_deg: NonNegativeRange = (0.0, 15.0)
    softness: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _falls(self) -> AcousticShadowConfig:
        if self.spread_deg[1] > _MOST_SPREAD_DEG:
            raise ValueError(f"spread_deg up to {self.spread_deg[1]}; at most {_MOST_SPREAD_DEG} is a shadow")
        return self


class AcousticShadow(Augment[AcousticShadowConfig]):
    """Darken what lies below a place, as below a rib, a stone or gas; a cone in 3D.

    Reference: Singla et al., Speckle and shadows: ultrasound-specific physics-based data augmentation for kidney
    segmentation, MIDL 2022; Smistad et al., Highlighting nerves and blood vessels for ultrasound-guided axillary nerve
    block procedures using neural networks, Journal of Medical Imaging 5(4), 2018 (shadows of drawn place and strength).
    Deviations: smooth steps in place of Gaussians; the axis of the shadow runs along the depth axis everywhere.
    """

    name: ClassVar[str] = "acoustic_shadow"
    config_class = AcousticShadowConfig
    takes = NOT_HU
    modalities = frozenset({"US"})

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw strength, shape and place; of the two lateral places 2D uses the first."""
        return {
            "strength": uniform(self.config.strength, generator),
            "width": uniform(self.config.width, generator),
            "start": uniform(self.config.start, generator),
            "spread_deg": uniform(self.config.spread_deg, generator),
            "lateral": torch.rand(2, generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * (1 - strength * inside * below)``; distances and angles are true in mm."""
        depth_axis = _depth_axis(self, x)
        shape = torch.tensor(x.shape[2:])
        edges_mm = (shape * spacing_mm).float()
        lateral_axes = [axis for axis in range(2, x.ndim) if axis != depth_axis]
        broad_mm = edges_mm[:, [axis - 2 for axis in lateral_axes]].amax(dim=1)
        square = x.new_zeros(1)
        for place, axis in enumerate(lateral_axes):
            if x.shape[axis] > 1:
                offset = _shares(x, axis) - wide(params["lateral"][:, place], x)
                square = square + (offset * wide(edges_mm[:, axis - 2], x)).square()
        depth_mm = wide(edges_mm[:, depth_axis - 2], x) * (_depth(self, x) - wide(params["start"], x))
        width_mm = params["width"] * broad_mm
        slope = wide((params["spread_deg"] * (math.pi / 180)).tan(), x)
        edge_mm = wide((self.config.softness * width_mm).clamp_min(1e-3), x)
        half_mm = wide(width_mm / 2, x) + depth_mm.clamp_min(0) * slope
        inside = _smooth_step((half_mm - square.sqrt()) / edge_mm + 0.5)
        below = _smooth_step(depth_mm / edge_mm + 0.5)
        return _amplified(x, 1 - wide(params["strength"], x) * inside * below)


def _amplified(x: Float[Tensor, "b c *s"], factor: Tensor) -> Float[Tensor, "b c *s"]:
    """Multiply what exceeds the darkest voxel, and saturate at the brightest."""
    low, high = extremes(x)
    return torch.lerp(low, x, factor.to(x.dtype)).clamp_(low, high)


def _depth_axis(augment: Augment[D], x: Tensor) -> int:
    """Axis of the tensor along which depth runs."""
    axis = augment.config.depth_axis
    if axis >= x.ndim - 2:
        raise ConfigError(
            f"augment {augment.name}: depth_axis is {axis} and the images have {x.ndim - 2} axes, counted from 0. "
            "Set depth_axis to one of them.",
            code="E_SPATIAL_DIMS",
        )
    return axis + 2


def _depth(augment: Augment[D], x: Tensor) -> Tensor:
    """Depth of the centre of each voxel as a share of the crop, ready to broadcast."""
    shares = _shares(x, _depth_axis(augment, x))
    return shares if augment.config.is_surface_first else 1 - shares


def _shares(x: Tensor, axis: int) -> Tensor:
    """Place of the centre of each voxel along an axis as a share of the crop, ready to broadcast."""
    length = x.shape[axis]
    return _along((torch.arange(length, device=x.device, dtype=x.dtype) + 0.5)[None] / length, axis, x)


def _along(values: Float[Tensor, "_ n"], axis: int, x: Tensor) -> Tensor:
    """One value for each place along an axis, ready to broadcast over ``x``."""
    return values.reshape(len(values), *[-1 if other == axis else 1 for other in range(1, x.ndim)])


def _smooth_step(x: Tensor) -> Tensor:
    """Rise from 0 to 1 while ``x`` does, level at both ends."""
    clipped = x.clamp(0, 1)
    return clipped.square() * (3 - 2 * clipped)
