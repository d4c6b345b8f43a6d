"""Augments that change intensities and leave every voxel in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from pydantic import Field, model_validator
from torch import Tensor

from medssl.augment.base import Augment, AugmentConfig, NonNegativeRange, Params, PositiveRange, Range, Spacing
from medssl.views import resize_weights

_TRUNCATE = 3.0
_BIAS_ORDER = 3


class NoiseConfig(AugmentConfig):
    """Options of :class:`Noise`; ``sigma`` in the units of the image."""

    sigma: NonNegativeRange = (0.0, 0.1)


class Noise(Augment[NoiseConfig]):
    """Add Gaussian noise; the field is drawn on the CPU, so that every device sees the same."""

    name: ClassVar[str] = "noise"
    config_class = NoiseConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the standard deviation and the seed of the field."""
        return {
            "sigma": _uniform(self.config.sigma, generator),
            "field_seed": torch.randint(2**62, (), generator=generator),
        }

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``x + sigma * n``."""
        field = torch.empty(x.shape, dtype=torch.float32)
        generator = torch.Generator()
        for row, seed in zip(field, params["field_seed"].tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return x + _wide(params["sigma"], x) * field.to(x.device, non_blocking=True)


class BlurConfig(AugmentConfig):
    """Options of :class:`Blur`; the standard deviation is the same in mm along every axis."""

    sigma_mm: NonNegativeRange = (0.4, 1.0)
    spacing_mm: Spacing = (1.0, 1.0, 1.0)


class Blur(Augment[BlurConfig]):
    """Blur with a Gaussian, cut off at three standard deviations, with the border extended."""

    name: ClassVar[str] = "blur"
    config_class = BlurConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the standard deviation in mm."""
        return {"sigma_mm": _uniform(self.config.sigma_mm, generator)}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Convolve each axis in turn."""
        lengths = x.shape[2:]
        sigmas = [params["sigma_mm"] / spacing for spacing in self.config.spacing_mm[: len(lengths)]]
        return _along_axes(x, [_gaussian(length, sigma) for length, sigma in zip(lengths, sigmas, strict=True)])


class LowResolutionConfig(AugmentConfig):
    """Options of :class:`LowResolution`; a ``zoom`` of 0.5 keeps every second voxel's worth."""

    zoom: PositiveRange = (0.5, 1.0)

    @model_validator(mode="after")
    def _shrinks(self) -> LowResolutionConfig:
        if self.zoom[1] > 1:
            raise ValueError(f"zoom up to {self.zoom[1]}; a low resolution has at most 1")
        return self


class LowResolution(Augment[LowResolutionConfig]):
    """Shrink with averaging and enlarge linearly, over the same field of view."""

    name: ClassVar[str] = "low_resolution"
    config_class = LowResolutionConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the zoom."""
        return {"zoom": _uniform(self.config.zoom, generator)}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Resize each axis down and up again."""
        return _along_axes(x, [_down_and_up(length, params["zoom"]) for length in x.shape[2:]])


class GammaConfig(AugmentConfig):
    """Options of :class:`Gamma`; drawn evenly in the logarithm, above 1 darkens."""

    gamma: PositiveRange = (0.7, 1.5)


class Gamma(Augment[GammaConfig]):
    """Raise intensities to a power, on the range of each sample and channel mapped to [0, 1], and map back."""

    name: ClassVar[str] = "gamma"
    config_class = GammaConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the exponent."""
        low, high = (math.log(bound) for bound in self.config.gamma)
        return {"gamma": _uniform((low, high), generator).exp()}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``low + range * ((x - low) / range) ** gamma``; a constant channel stays as it is."""
        low, high = _bounds(x)
        span = torch.where(high > low, high - low, 1.0)
        return ((x - low) / span).clamp_(0, 1).pow_(_wide(params["gamma"], x)).mul_(span).add_(low)


class BrightnessConfig(AugmentConfig):
    """Options of :class:`Brightness`; ``shift`` in the units of the image."""

    shift: Range = (-0.2, 0.2)


class Brightness(Augment[BrightnessConfig]):
    """Add a constant."""

    name: ClassVar[str] = "brightness"
    config_class = BrightnessConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the constant."""
        return {"shift": _uniform(self.config.shift, generator)}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``x + shift``."""
        return x + _wide(params["shift"], x)


class ContrastConfig(AugmentConfig):
    """Options of :class:`Contrast`."""

    factor: PositiveRange = (0.8, 1.25)


class Contrast(Augment[ContrastConfig]):
    """Stretch intensities about the mean of each sample and channel, within the range that they had."""

    name: ClassVar[str] = "contrast"
    config_class = ContrastConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the factor."""
        return {"factor": _uniform(self.config.factor, generator)}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``mean + factor * (x - mean)``, clipped to the old range."""
        low, high = _bounds(x)
        mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        return (x - mean).mul_(_wide(params["factor"], x)).add_(mean).clamp_(low, high)


class BiasFieldConfig(AugmentConfig):
    """Options of :class:`BiasField`; ``coefficient`` is the largest amount of each polynomial term."""

    coefficient: float = Field(default=0.3, ge=0.0)


class BiasField(Augment[BiasFieldConfig]):
    """Multiply by a smooth field, ``exp`` of a cubic polynomial in the place, as the coil of a scanner does.

    The field acts on what exceeds the darkest voxel of each sample and channel, so that air stays dark whatever
    constant the preparation has taken off.

    Reference: Sudre, Cardoso, Ourselin, Longitudinal segmentation of age-related white matter hyperintensities,
    Medical Image Analysis 2017, as in TorchIO's RandomBiasField.
    Deviations: zero is moved to the darkest voxel.
    """

    name: ClassVar[str] = "bias_field"
    config_class = BiasFieldConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the coefficient of ``x^i y^j z^k`` for all ``i + j + k <= 3``."""
        side = torch.arange(_BIAS_ORDER + 1)
        used = side[:, None, None] + side[:, None] + side <= _BIAS_ORDER
        even = 2 * torch.rand(used.shape, generator=generator) - 1
        return {"coefficients": even * used * self.config.coefficient}

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * exp(polynomial)`` with places in [-1, 1] along each axis."""
        field = params["coefficients"].to(x.device)
        if x.ndim == 4:
            field = field[..., 0]
        for length in x.shape[2:]:
            place = torch.linspace(-1, 1, length, device=x.device) if length > 1 else x.new_zeros(1)
            powers = torch.stack([place**exponent for exponent in range(_BIAS_ORDER + 1)])
            field = torch.tensordot(field, powers, dims=([1], [0]))
        low, _ = _bounds(x)
        return (x - low).mul_(field.exp_()[:, None]).add_(low)


class WindowConfig(AugmentConfig):
    """Options of :class:`Window`; each bound is moved by up to ``jitter_hu``."""

    low_hu: float = -175.0
    high_hu: float = 250.0
    jitter_hu: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _opens(self) -> WindowConfig:
        if self.high_hu - self.low_hu <= 2 * self.jitter_hu:
            raise ValueError(f"window {self.low_hu} to {self.high_hu} HU can close under a jitter of {self.jitter_hu}")
        if self.p != 1:
            raise ValueError(f"p is {self.p}; a window is applied to every sample or to none")
        return self


class Window(Augment[WindowConfig]):
    """Map a HU range to [0, 1] and clip; with ``jitter_hu`` the range is an augmentation, without it a rule."""

    name: ClassVar[str] = "window"
    config_class = WindowConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw both bounds in HU."""
        jitter = (-self.config.jitter_hu, self.config.jitter_hu)
        return {
            "low_hu": self.config.low_hu + _uniform(jitter, generator),
            "high_hu": self.config.high_hu + _uniform(jitter, generator),
        }

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Give ``(x - low) / (high - low)`` in [0, 1]."""
        low = _wide(params["low_hu"], x)
        return ((x - low) / (_wide(params["high_hu"], x) - low)).clamp_(0, 1)

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The window as configured, without jitter."""
        return ((x - self.config.low_hu) / (self.config.high_hu - self.config.low_hu)).clamp_(0, 1)


def _uniform(bounds: tuple[float, float], generator: torch.Generator) -> Float32[Tensor, ""]:
    return bounds[0] + torch.rand((), generator=generator) * (bounds[1] - bounds[0])


def _wide(values: Float[Tensor, " b"], x: Float[Tensor, "b c *s"]) -> Tensor:
    """One value a sample, on the device of ``x`` and ready to broadcast over it."""
    return values.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def _bounds(x: Float[Tensor, "b c *s"]) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each sample and channel."""
    axes = tuple(range(2, x.ndim))
    return x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)


def _along_axes(x: Float[Tensor, "b c *s"], matrices: Sequence[Float32[Tensor, "b _ _"]]) -> Float[Tensor, "b c *s"]:
    """Apply a linear operator along each axis; small dense matrices outrun convolutions at the size of a crop."""
    shape = x.shape
    for axis, matrix in enumerate(matrices, start=2):
        operator = matrix.to(x.device, x.dtype, non_blocking=True)
        if axis == x.ndim - 1:
            x = (x.reshape(shape[0], -1, shape[axis]) @ operator.mT).reshape(shape)
        else:
            x = (operator[:, None] @ x.reshape(shape[0], -1, shape[axis], math.prod(shape[axis + 1 :]))).reshape(shape)
    return x


def _gaussian(length: int, sigma: Float32[Tensor, " b"]) -> Float32[Tensor, "b n n"]:
    """Gaussian blur of one axis as matrices; ``sigma`` in voxels."""
    radius = (_TRUNCATE * sigma + 0.5).floor()[:, None]
    reach = int(radius.max())
    offset = torch.arange(-reach, reach + 1)
    taps = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-6)[:, None]) ** 2) * (offset.abs() <= radius)
    taps = taps / taps.sum(dim=1, keepdim=True)
    source = (torch.arange(length)[:, None] + offset).clamp(0, length - 1).expand(len(sigma), -1, -1)
    weights = taps[:, None].expand_as(source)
    return torch.zeros(len(sigma), length, length).scatter_add_(2, source, weights)


def _down_and_up(length: int, zoom: Float32[Tensor, " b"]) -> Float32[Tensor, "b n n"]:
    """Resizing of one axis to a share of its length and back as matrices."""
    fewer = [max(1, round(length * value)) for value in zoom.tolist()]
    return torch.stack([torch.from_numpy(resize_weights(few, length) @ resize_weights(length, few)) for few in fewer])
