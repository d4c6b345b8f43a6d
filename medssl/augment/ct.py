"""What a CT scanner and its reading room do to an image in HU: windows, dose, kernel, streaks and calibration.

The axial plane is spanned by the first two axes. A value may leave the range of HU here; the pipeline clips it after
the last of these augments and counts how often. Products and sums are separate operations: a fused one, such as
``lerp``, rounds by the place in memory, so that a voxel would depend on the size of the batch.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    NonNegativeRange,
    Params,
    PositiveRange,
    Range,
    uniform,
    wide,
)
from medssl.augment.fields import normal_field
from medssl.augment.images import ONLY_HU, Domain
from medssl.augment.intensity import along_axes, gaussian
from medssl.augment.windows import WINDOWS

_FWHM = 2 * math.sqrt(2 * math.log(2))
_AIR_HU = -1000.0
_PULL = 0.5


def _known(window: str | tuple[float, float]) -> str | tuple[float, float]:
    if isinstance(window, str):
        if window not in WINDOWS:
            near = difflib.get_close_matches(window, WINDOWS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(WINDOWS)}"
            raise ValueError(f"there is no window {window!r}; {hint}")
    elif window[0] >= window[1]:
        raise ValueError(f"window {window[0]} to {window[1]} HU is empty; give the low bound first")
    return window


WindowName = Annotated[str | tuple[float, float], AfterValidator(_known)]


class MultiWindowConfig(AugmentConfig):
    """Options of :class:`MultiWindow`: names or bounds in HU; each bound is moved by up to ``jitter_hu``."""

    windows: tuple[WindowName, ...] = Field(default=("lung", "soft", "bone"), min_length=1)
    jitter_hu: float = Field(default=0.0, ge=0.0)

    @property
    def bounds_hu(self) -> tuple[tuple[float, float], ...]:
        """Low and high of each window."""
        named = [
            (WINDOWS[name].low_hu, WINDOWS[name].high_hu) if isinstance(name, str) else name for name in self.windows
        ]
        return tuple(named)

    @model_validator(mode="after")
    def _opens(self) -> MultiWindowConfig:
        for low, high in self.bounds_hu:
            if high - low <= 2 * self.jitter_hu:
                raise ValueError(f"window {low} to {high} HU can close under a jitter of {self.jitter_hu}")
        if self.p != 1:
            raise ValueError(f"p is {self.p}; windows are applied to every sample or to none")
        return self


class MultiWindow(Augment[MultiWindowConfig]):
    """Map each of several HU ranges to [0, 1], one channel each: all windows of the first channel come first.

    With ``jitter_hu`` the ranges are an augmentation, without it they are a rule.
    """

    name: ClassVar[str] = "multi_window"
    config_class = MultiWindowConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw both bounds of each window in HU."""
        low, high = torch.tensor(self.config.bounds_hu).T
        shift = self.config.jitter_hu * (2 * torch.rand(2, len(low), generator=generator) - 1)
        return {"low_hu": low + shift[0], "high_hu": high + shift[1]}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b k *s"]:
        """Give ``(x - low) / (high - low)`` in [0, 1] for each window."""
        return _windowed(x, params["low_hu"], params["high_hu"])

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """The windows as configured, without jitter."""
        low, high = torch.tensor(self.config.bounds_hu).T.repeat(len(x), 1, 1).unbind(dim=1)
        return _windowed(x, low, high)

    def gives(self, domain: Domain) -> Domain:
        """Values in [0, 1]."""
        return "unit"

    def channels_out(self, channels: int) -> int:
        """One channel for each window of each channel."""
        return channels * len(self.config.windows)

    def bounds(self, params: Params) -> tuple[Float32[Tensor, " b"], Float32[Tensor, " b"]] | None:
        """Both bounds in HU where there is a single window."""
        return (params["low_hu"][:, 0], params["high_hu"][:, 0]) if len(self.config.windows) == 1 else None

    def fixed(self) -> tuple[object, ...]:
        """The windows as configured."""
        return "multi_window", self.config.bounds_hu


class HuNoiseConfig(AugmentConfig):
    """Options of :class:`HuNoise`.

    Attributes:
        dose: Share of the dose that the image was made with, above 0 and at most 1.
        sigma_hu: Noise of the image as it is.
        fwhm_mm: How far noise is correlated in the axial plane: the width at half height of the Gaussian that blurs
            white noise to it. Sharp kernels have less than a voxel.
    """

    dose: PositiveRange = (0.25, 1.0)
    sigma_hu: float = Field(default=12.0, ge=0.0)
    fwhm_mm: NonNegativeRange = (0.5, 1.5)

    @model_validator(mode="after")
    def _takes_away(self) -> HuNoiseConfig:
        if self.dose[1] > 1:
            raise ValueError(f"dose up to {self.dose[1]}; noise is only added, a dose is at most 1")
        return self


class HuNoise(Augment[HuNoiseConfig]):
    """Add the noise that a lower dose brings, correlated in the axial plane as by a reconstruction kernel.

    The variance of quantum noise is the inverse of the dose, so what is missing at a share ``dose`` is
    ``sigma_hu^2 * (1 / dose - 1)``. Slices are independent.

    Reference: Britten, Crotty, Kiremidjian, Grundy, Adam, The addition of computer simulated noise to investigate
    radiation dose and image quality in images with spatial correlation of statistical noise, British Journal of
    Radiology 2004.
    Deviations: noise is as strong behind dense and wide anatomy as elsewhere; its spectrum is a Gaussian, without the
    lack of low frequencies that filtered back-projection has; ``sigma_hu`` is that of a voxel of the crop, whatever
    its size.
    """

    name: ClassVar[str] = "hu_noise"
    config_class = HuNoiseConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the dose, the grain and the seed of the field."""
        dose = uniform(self.config.dose, generator)
        return {
            "sigma_hu": self.config.sigma_hu * math.sqrt(max(1 / dose - 1, 0.0)),
            "fwhm_mm": uniform(self.config.fwhm_mm, generator),
            "field_seed": torch.randint(2**62, (), generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + sigma * n`` with ``n`` of unit variance in every voxel, at the border too."""
        field = normal_field(params["field_seed"], tuple(x.shape[1:]), x.device)
        blurs = _in_plane(x, params["fwhm_mm"] / _FWHM, spacing_mm)
        noise = along_axes(field, [blur / blur.norm(dim=2, keepdim=True) for blur in blurs])
        return noise.mul_(wide(params["sigma_hu"], x)).add_(x)


class StreaksConfig(AugmentConfig):
    """Options of :class:`Streaks`.

    Attributes:
        amplitude_hu: Of the strongest streak at the source; where streaks cross they add up.
        num: Streaks; each goes both ways from the source.
        width_mm: Standard deviation across a streak.
        decay_mm: Distance from the source over which a streak falls to 37 percent.
        slab_mm: Thickness of the metal, and so of the slices that it spoils.
    """

    amplitude_hu: NonNegativeRange = (20.0, 200.0)
    num: int = Field(default=12, ge=2, le=64)
    width_mm: float = Field(default=1.5, gt=0.0)
    decay_mm: float = Field(default=60.0, gt=0.0)
    slab_mm: PositiveRange = (5.0, 20.0)


class Streaks(Augment[StreaksConfig]):
    """Add bright and dark streaks that leave a dense place, as metal causes them.

    The source is the brightest place near a drawn one in a drawn slice. Streaks cancel at the source itself, and
    are the same in each slice of a slab.

    Reference: none for the formula; De Man, Nuyts, Dupont, Marchal, Suetens, Metal streak artifacts in X-ray computed
    tomography, IEEE Transactions on Nuclear Science 1999, describes what it imitates.
    Deviations: a drawing of the artefact: no metal is put in, and no projection is simulated.
    """

    name: ClassVar[str] = "streaks"
    config_class = StreaksConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw place, thickness, and the direction and strength of each streak."""
        strength = 2 * torch.rand(self.config.num, generator=generator) - 1
        strength = strength - strength.mean()
        return {
            "amplitude_hu": uniform(self.config.amplitude_hu, generator) * strength / strength.abs().max(),
            "angle_rad": math.pi * torch.rand(self.config.num, generator=generator),
            "near": torch.rand(3, generator=generator),
            "slab_mm": uniform(self.config.slab_mm, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + sum_k a_k exp(-rho_k^2 / 2 width^2) exp(-r / decay)`` in the slices of the slab."""
        slices = x.shape[4] if x.ndim == 5 else 1
        middle = (params["near"][:, 2] * slices).long().clamp(max=slices - 1)
        plane = x[:, 0]
        if x.ndim == 5:
            index = middle.to(x.device, non_blocking=True)[:, None, None, None].expand(*plane.shape[:3], 1)
            plane = plane.gather(3, index)[..., 0]
        pattern = self._pattern(_to_source(plane, params["near"], spacing_mm), params)[:, None]
        if x.ndim == 4:
            return x + pattern
        away = (torch.arange(slices) - middle[:, None]).abs()
        share = ((params["slab_mm"] / 2 / spacing_mm[:, 2])[:, None] - away + 0.5).clamp(0, 1)
        return x + pattern[..., None] * share[:, None, None, None].to(x.device, x.dtype, non_blocking=True)

    def _pattern(self, to_source: tuple[Tensor, Tensor], params: Params) -> Float32[Tensor, "b x y"]:
        """Streaks of one slice, from the distance to the source along both axes in mm."""
        dx, dy = to_source
        angles, gains = (
            params["angle_rad"].to(dx.device, non_blocking=True),
            params["amplitude_hu"].to(dx.device, non_blocking=True),
        )
        pattern = torch.zeros(len(dx), dx.shape[1], dy.shape[2], device=dx.device)
        for angle, gain in zip(angles.T[..., None, None], gains.T[..., None, None], strict=True):
            across = (dy * angle.cos() - dx * angle.sin()) / self.config.width_mm
            pattern += gain * torch.exp(-0.5 * across**2)
        return pattern * torch.exp(-torch.sqrt(dx**2 + dy**2) / self.config.decay_mm)


class KernelSharpnessConfig(AugmentConfig):
    """Options of :class:`KernelSharpness`: below 0 softens, -1 gives the blurred image, above 0 sharpens.

    Little happens where voxels are much larger than ``sigma_mm``, as a kernel is hardly seen there.
    """

    amount: Range = (-0.7, 0.7)
    sigma_mm: NonNegativeRange = (0.5, 1.0)

    @model_validator(mode="after")
    def _is_moderate(self) -> KernelSharpnessConfig:
        if max(abs(bound) for bound in self.amount) > 1:
            raise ValueError(f"amount {self.amount}; it lies between -1 and 1")
        return self


class KernelSharpness(Augment[KernelSharpnessConfig]):
    """Sharpen or soften the axial plane, as a harder or softer reconstruction kernel does; noise goes with it.

    Reference: Ohkubo, Wada, Kayugawa, Matsumoto, Murao, Image filtering as an alternative to the application of a
    different reconstruction kernel in CT imaging, Medical Physics 2011, for the idea.
    Deviations: an unsharp mask with a Gaussian in place of the ratio of two measured transfer functions.
    """

    name: ClassVar[str] = "kernel_sharpness"
    config_class = KernelSharpnessConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the amount and the scale in mm."""
        return {
            "amount": uniform(self.config.amount, generator),
            "sigma_mm": uniform(self.config.sigma_mm, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + amount * (x - blur(x))``."""
        blurred = along_axes(x, _in_plane(x, params["sigma_mm"], spacing_mm))
        return (x - blurred).mul_(wide(params["amount"], x)).add_(x)


class HuShiftConfig(AugmentConfig):
    """Options of :class:`HuShift`; quality tests of scanners let water be 7 HU off."""

    shift_hu: Range = (-7.0, 7.0)


class HuShift(Augment[HuShiftConfig]):
    """Add a constant, as a scanner whose water is not at 0 HU."""

    name: ClassVar[str] = "hu_shift"
    config_class = HuShiftConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the constant."""
        return {"shift_hu": uniform(self.config.shift_hu, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + shift``."""
        return x + wide(params["shift_hu"], x)


class HuScaleConfig(AugmentConfig):
    """Options of :class:`HuScale`; quality tests of scanners let dense plastics be about 6 percent off."""

    percent: Range = (-5.0, 5.0)

    @model_validator(mode="after")
    def _keeps_order(self) -> HuScaleConfig:
        if max(abs(bound) for bound in self.percent) >= 100:
            raise ValueError(f"percent {self.percent}; 100 or more would reverse values")
        return self


class HuScale(Augment[HuScaleConfig]):
    """Stretch values by a few percent about water; air stays where it is, as a scanner is calibrated with both.

    Bone, fat and contrast medium move, as they do between tube voltages.
    """

    name: ClassVar[str] = "hu_scale"
    config_class = HuScaleConfig
    takes = ONLY_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the percentage."""
        return {"share": uniform(self.config.percent, generator) / 100}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x + share * x`` above water, ``x + share * x * (1 + x / 1000)`` between air and water."""
        return (1 - x / _AIR_HU).clamp_(0, 1).mul_(x).mul_(wide(params["share"], x)).add_(x)


def _windowed(
    x: Float[Tensor, "b c *s"], low: Float32[Tensor, "b w"], high: Float32[Tensor, "b w"]
) -> Float[Tensor, "b k *s"]:
    """Every channel in every window."""
    shape = (len(x), 1, low.shape[1], *[1] * (x.ndim - 2))
    low, high = (
        low.to(x.device, x.dtype, non_blocking=True).reshape(shape),
        high.to(x.device, x.dtype, non_blocking=True).reshape(shape),
    )
    return ((x[:, :, None] - low) / (high - low)).clamp_(0, 1).flatten(1, 2)


def _in_plane(
    x: Float[Tensor, "b c *s"], sigma_mm: Float32[Tensor, " b"], spacing_mm: Float64[Tensor, "b d"]
) -> list[Float32[Tensor, "b _ _"]]:
    """Gaussian blur of the first two axes."""
    sigmas = (sigma_mm / spacing_mm.T[:2]).float()
    return [gaussian(length, sigma) for length, sigma in zip(x.shape[2:4], sigmas, strict=True)]


def _to_source(
    plane: Float[Tensor, "b x y"], near: Float32[Tensor, "b 3"], spacing_mm: Float64[Tensor, "b d"]
) -> tuple[Float32[Tensor, "b x 1"], Float32[Tensor, "b 1 y"]]:
    """Distance in mm along both axes from the brightest place near a drawn one; a far one must be much brighter."""
    low, high = plane.flatten(1).aminmax(dim=1)
    score = (plane - low[:, None, None]) / torch.where(high > low, high - low, 1.0)[:, None, None]
    shares = [torch.arange(length) / length for length in plane.shape[1:]]
    dx, dy = ((share - near[:, axis, None]).to(plane.device, non_blocking=True) for axis, share in enumerate(shares))
    place = (score - _PULL * (dx[:, :, None] ** 2 + dy[:, None] ** 2)).flatten(1).argmax(dim=1)
    sources = (place // plane.shape[2], place % plane.shape[2])
    sizes = spacing_mm[:, :2].to(plane.device, torch.float32, non_blocking=True)
    index = [torch.arange(length, device=plane.device) for length in plane.shape[1:]]
    far = [
        (i - source[:, None]) * sizes[:, axis, None]
        for axis, (i, source) in enumerate(zip(index, sources, strict=True))
    ]
    return far[0][:, :, None], far[1][:, None]
