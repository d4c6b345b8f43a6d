"""Augments that change intensities and leave every voxel in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float32, Float64
from pydantic import Field, model_validator
from torch import Tensor

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    NonNegativeRange,
    Params,
    PositiveRange,
    Range,
    extremes,
    uniform,
    wide,
)
from medssl.augment.fields import add_normal
from medssl.augment.images import NOT_HU, ONLY_HU, Domain
from medssl.augment.power import power
from medssl.augment.products import product
from medssl.augment.windows import WINDOWS
from medssl.views import resize_weights

_TRUNCATE = 3.0


class NoiseConfig(AugmentConfig):
    """Options of :class:`Noise`; ``sigma`` in the units of the image."""

    sigma: NonNegativeRange = (0.0, 0.1)


class Noise(Augment[NoiseConfig]):
    """Add Gaussian noise, the same on every device; see :mod:`medssl.augment.fields`."""

    name: ClassVar[str] = "noise"
    config_class = NoiseConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the standard deviation and the seed of the field."""
        return {
            "sigma": uniform(self.config.sigma, generator),
            "field_seed": torch.randint(2**62, (), generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + sigma * n``."""
        return add_normal(x, params["field_seed"], params["sigma"])


class BlurConfig(AugmentConfig):
    """Options of :class:`Blur`; the standard deviation is the same in mm along every axis."""

    sigma_mm: NonNegativeRange = (0.4, 1.0)


class Blur(Augment[BlurConfig]):
    """Blur with a Gaussian, cut off at three standard deviations, with the border extended."""

    name: ClassVar[str] = "blur"
    config_class = BlurConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the standard deviation in mm."""
        return {"sigma_mm": uniform(self.config.sigma_mm, generator)}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Convolve each axis in turn."""
        sigmas = (params["sigma_mm"] / spacing_mm.T).float()
        return along_axes(x, [gaussian(length, sigma) for length, sigma in zip(x.shape[2:], sigmas, strict=True)])


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

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the zoom."""
        return {"zoom": uniform(self.config.zoom, generator)}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Resize each axis down and up again."""
        return along_axes(x, [_down_and_up(length, params["zoom"]) for length in x.shape[2:]])


class ThickSlicesConfig(AugmentConfig):
    """Options of :class:`ThickSlices`; across which axis slices lie, and how thick they become."""

    thickness_mm: PositiveRange = (2.0, 6.0)
    axis: Literal["LR", "AP", "SI"] = "SI"


class ThickSlices(Augment[ThickSlicesConfig]):
    """Average along one axis to thicker slices and interpolate back, as a scan of fewer slices would look.

    Slices that are as thick already stay as they are.
    """

    name: ClassVar[str] = "thick_slices"
    config_class = ThickSlicesConfig
    spatial_dims = frozenset({3})

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the thickness in mm."""
        return {"thickness_mm": uniform(self.config.thickness_mm, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Resize one axis down and up again."""
        axis = ("LR", "AP", "SI").index(self.config.axis)
        zoom = (spacing_mm[:, axis] / params["thickness_mm"]).clamp(max=1.0)
        return along_axes(x, [_down_and_up(x.shape[axis + 2], zoom.float())], first=axis)


class GammaConfig(AugmentConfig):
    """Options of :class:`Gamma`; drawn evenly in the logarithm, above 1 darkens."""

    gamma: PositiveRange = (0.7, 1.5)


class Gamma(Augment[GammaConfig]):
    """Raise intensities to a power, on the range of each sample and channel mapped to [0, 1], and map back."""

    name: ClassVar[str] = "gamma"
    config_class = GammaConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the exponent."""
        low, high = (math.log(bound) for bound in self.config.gamma)
        return {"gamma": math.exp(uniform((low, high), generator))}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + range * ((x - low) / range) ** gamma``; a constant channel stays as it is."""
        low, high = extremes(x)
        return power(x, params["gamma"], low=low, high=high)


class BrightnessConfig(AugmentConfig):
    """Options of :class:`Brightness`; ``shift`` in the units of the image."""

    shift: Range = (-0.2, 0.2)


class Brightness(Augment[BrightnessConfig]):
    """Add a constant."""

    name: ClassVar[str] = "brightness"
    config_class = BrightnessConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the constant."""
        return {"shift": uniform(self.config.shift, generator)}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + shift``."""
        return x + wide(params["shift"], x)


class ContrastConfig(AugmentConfig):
    """Options of :class:`Contrast`."""

    factor: PositiveRange = (0.8, 1.25)


class Contrast(Augment[ContrastConfig]):
    """Stretch intensities about the mean of each sample and channel, within the range that they had."""

    name: ClassVar[str] = "contrast"
    config_class = ContrastConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the factor."""
        return {"factor": uniform(self.config.factor, generator)}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Give ``mean + factor * (x - mean)``, clipped to the old range."""
        low, high = extremes(x)
        mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        factor = wide(params["factor"], x)
        out = (x * factor).add_(mean * (1 - factor))
        return torch.minimum(torch.maximum(out, low, out=out), high, out=out)  # clamp takes ten times as long


class WindowConfig(AugmentConfig):
    """Options of :class:`Window`: both bounds, or a window by its name; each is moved by up to ``jitter_hu``."""

    named: str | None = None
    low_hu: float = -175.0
    high_hu: float = 250.0
    jitter_hu: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, given: Any) -> Any:
        name = given.get("named") if isinstance(given, dict) else None
        if name is None:
            return given
        if name not in WINDOWS:
            raise ValueError(f"there is no window {name!r}; known are {', '.join(WINDOWS)}")
        bounds = {"low_hu": WINDOWS[name].low_hu, "high_hu": WINDOWS[name].high_hu}
        if any(given.get(key, value) != value for key, value in bounds.items()):
            raise ValueError(f"window {name} has bounds of its own; give named, or low_hu and high_hu")
        return {**given, **bounds}

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
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw both bounds in HU."""
        jitter = (-self.config.jitter_hu, self.config.jitter_hu)
        return {
            "low_hu": self.config.low_hu + uniform(jitter, generator),
            "high_hu": self.config.high_hu + uniform(jitter, generator),
        }

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Give ``(x - low) / (high - low)`` in [0, 1]."""
        low = wide(params["low_hu"], x)
        return ((x - low) / (wide(params["high_hu"], x) - low)).clamp_(0, 1)

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The window as configured, without jitter."""
        return ((x - self.config.low_hu) / (self.config.high_hu - self.config.low_hu)).clamp_(0, 1)

    def gives(self, domain: Domain) -> Domain:
        """Values in [0, 1]."""
        return "unit"

    def bounds(self, params: Params) -> tuple[Float32[Tensor, " b"], Float32[Tensor, " b"]]:
        """Both bounds in HU."""
        return params["low_hu"], params["high_hu"]

    def fixed(self) -> tuple[object, ...]:
        """The window as configured."""
        return "window", self.config.low_hu, self.config.high_hu


class RescaleConfig(AugmentConfig):
    """Options of :class:`Rescale`: the values that become 0 and 1, in the units of the image."""

    low: float = 0.0
    high: float = 255.0

    @model_validator(mode="after")
    def _opens(self) -> RescaleConfig:
        if self.high <= self.low:
            raise ValueError(f"high {self.high} is not above low {self.low}")
        if self.p != 1:
            raise ValueError(f"p is {self.p}; a rescaling is applied to every sample or to none")
        return self


class Rescale(Augment[RescaleConfig]):
    """Map a range of values to [0, 1] and clip: a rule, not an augmentation. For colours of 8 bits, 0 to 255."""

    name: ClassVar[str] = "rescale"
    config_class = RescaleConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {"low": torch.tensor(self.config.low), "high": torch.tensor(self.config.high)}

    def change(
        self,
        x: Float[Tensor, "b c *s"],
        params: Params,
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float[Tensor, "b c *s"]:
        """Give ``(x - low) / (high - low)`` in [0, 1]."""
        return self.normalise(x)

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The same."""
        return ((x - self.config.low) / (self.config.high - self.config.low)).clamp_(0, 1)

    def gives(self, domain: Domain) -> Domain:
        """Values in [0, 1]."""
        return "unit"

    def bounds(self, params: Params) -> tuple[Float32[Tensor, " b"], Float32[Tensor, " b"]]:
        """Both bounds."""
        return params["low"], params["high"]

    def fixed(self) -> tuple[object, ...]:
        """The range."""
        return "rescale", self.config.low, self.config.high


def along_axes(
    x: Float[Tensor, "b c *s"], matrices: Sequence[Float32[Tensor, "b _ _"]], *, first: int = 0
) -> Float[Tensor, "b c *s"]:
    """Apply a linear operator along each axis; small dense matrices outrun convolutions at the size of a crop.

    Args:
        x: Images.
        matrices: One a sample, for as many axes as there are matrices.
        first: Spatial axis of the first of them.
    """
    shape = x.shape
    for axis, matrix in enumerate(matrices, start=first + 2):
        operator = matrix.to(x.device, x.dtype, non_blocking=True)
        if axis == x.ndim - 1:
            x = product(x.reshape(shape[0], -1, shape[axis]), operator.mT).reshape(shape)
        else:
            planes = x.reshape(shape[0], -1, shape[axis], math.prod(shape[axis + 1 :]))
            x = product(operator[:, None], planes).reshape(shape)
    return x


def gaussian(length: int, sigma: Float32[Tensor, " b"]) -> Float32[Tensor, "b n n"]:
    """Gaussian blur of one axis as matrices, with the border extended; ``sigma`` in voxels."""
    sigma = sigma.double()  # the width of the taps depends on the neighbours, and so would the rounding of their sum
    radius = (_TRUNCATE * sigma + 0.5).floor()[:, None]
    reach = int(radius.max())
    offset = torch.arange(-reach, reach + 1)
    taps = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-6)[:, None]) ** 2) * (offset.abs() <= radius)
    taps = taps / taps.sum(dim=1, keepdim=True)
    source = (torch.arange(length)[:, None] + offset).clamp(0, length - 1).expand(len(sigma), -1, -1)
    weights = taps[:, None].expand_as(source)
    return torch.zeros(len(sigma), length, length, dtype=torch.float64).scatter_add_(2, source, weights).float()


def _down_and_up(length: int, zoom: Float32[Tensor, " b"]) -> Float32[Tensor, "b n n"]:
    """Resizing of one axis to a share of its length and back as matrices."""
    fewer = [max(1, round(length * value)) for value in zoom.tolist()]
    return torch.stack([torch.from_numpy(resize_weights(few, length) @ resize_weights(length, few)) for few in fewer])
