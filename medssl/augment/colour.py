"""What cameras, lamps and stains do to pictures in colour, with values in [0, 1]."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float64
from pydantic import AfterValidator, Field
from torch import Tensor

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    NonNegativeRange,
    Params,
    PositiveRange,
    Range,
    ShareRange,
    uniform,
    wide,
)
from medssl.augment.fields import smooth_field
from medssl.augment.images import ONLY_UNIT

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601
_STAINS = (
    (0.65, 0.70, 0.29),
    (0.07, 0.99, 0.11),
    (0.27, 0.57, 0.78),
)  # optical density of H, E, DAB in red, green, blue
_DARKEST = 1 / 512  # half a grey level of 8 bits, where an optical density would be infinite
_KNOTS = 5


def _within_half_a_turn(bounds: tuple[float, float]) -> tuple[float, float]:
    if max(abs(bounds[0]), abs(bounds[1])) > 0.5:
        raise ValueError(f"hue from {bounds[0]} to {bounds[1]} turns; half a turn either way is the most")
    return bounds


class ColourJitterConfig(AugmentConfig):
    """Options of :class:`ColourJitter`: three factors, and the shift of the hue in turns of the colour circle."""

    brightness: NonNegativeRange = (0.8, 1.2)
    contrast: NonNegativeRange = (0.8, 1.2)
    saturation: NonNegativeRange = (0.8, 1.2)
    hue: Annotated[Range, AfterValidator(_within_half_a_turn)] = (-0.02, 0.02)


class ColourJitter(Augment[ColourJitterConfig]):
    """Change brightness, contrast, saturation and hue, in this order, each clipped to [0, 1].

    Reference: the definitions of torchvision's ColorJitter and of Pillow's ImageEnhance.
    Deviations: the order is fixed and not drawn; grey is not rounded to 8 bits.
    """

    name: ClassVar[str] = "colour_jitter"
    config_class = ColourJitterConfig
    takes = ONLY_UNIT
    colour = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw three factors and a shift."""
        return {
            "brightness": uniform(self.config.brightness, generator),
            "contrast": uniform(self.config.contrast, generator),
            "saturation": uniform(self.config.saturation, generator),
            "hue": uniform(self.config.hue, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Blend with black, with the mean grey and with each voxel's grey; then turn the hue."""
        x = (x * wide(params["brightness"], x)).clamp_(0, 1)
        mean = _grey(x).mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        x = torch.lerp(mean, x, wide(params["contrast"], x)).clamp_(0, 1)
        x = torch.lerp(_grey(x), x, wide(params["saturation"], x)).clamp_(0, 1)
        return _hue_turned(x, wide(params["hue"], x))


class StainJitterConfig(AugmentConfig):
    """Options of :class:`StainJitter`: a factor, and a shift in units of optical density, drawn for each stain."""

    scale: PositiveRange = (0.95, 1.05)
    shift: Range = (-0.05, 0.05)


class StainJitter(Augment[StainJitterConfig]):
    """Scale and shift the amount of haematoxylin, eosin and DAB that each voxel holds.

    ``s = -log(x) · M⁻¹``, ``s' = scale · s + shift``, ``x' = exp(-s' · M)``, M the optical densities of the stains.

    Reference: Ruifrok, Johnston, Quantification of histochemical staining by color deconvolution, Analytical and
    Quantitative Cytology and Histology 23(4), 2001; Tellez et al., Whole-slide mitosis detection in H&E breast
    histology using PHH3 as a reference to train distilled stain-invariant convolutional networks, IEEE Transactions on
    Medical Imaging 2018, arXiv:1808.05896.
    Deviations: the density is the natural logarithm of the transmitted share, at most log(512), and a channel that is 0
    stays 0; amounts below 0 are not cut off, so that no change leaves every voxel as it is.
    """

    name: ClassVar[str] = "stain_jitter"
    config_class = StainJitterConfig
    takes = ONLY_UNIT
    colour = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw a factor and a shift for each stain."""
        low, high = self.config.scale
        least, most = self.config.shift
        return {
            "scale": low + torch.rand(3, generator=generator) * (high - low),
            "shift": least + torch.rand(3, generator=generator) * (most - least),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x * exp(-(s' - s) · M)``, clipped to [0, 1]."""
        stains = torch.tensor(_STAINS, dtype=torch.float64)
        linear = torch.linalg.inv(stains) @ ((params["scale"].double() - 1)[:, :, None] * stains)
        constant = params["shift"].double() @ stains
        density = x.clamp_min(_DARKEST).log_().neg_().flatten(2)
        operator, change = (
            values.to(x.device, x.dtype, non_blocking=True) for values in (linear.mT, constant[:, :, None])
        )
        for channel in range(3):  # no product of matrices, which a device may round to 10 bits
            change = torch.addcmul(change, operator[:, :, channel, None], density[:, channel, None])
        return change.neg_().exp_().reshape(x.shape).mul_(x).clamp_(0, 1)


class GreyscaleConfig(AugmentConfig):
    """Options of :class:`Greyscale`: only ``p``."""

    p: float = Field(default=0.2, ge=0.0, le=1.0)


class Greyscale(Augment[GreyscaleConfig]):
    """Take the colour away: all channels become the luma of ITU-R BT.601, as in torchvision's RandomGrayscale."""

    name: ClassVar[str] = "greyscale"
    config_class = GreyscaleConfig
    takes = ONLY_UNIT
    colour = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``0.2989 r + 0.587 g + 0.114 b`` three times."""
        return _grey(x).expand_as(x).contiguous()


class IlluminationConfig(AugmentConfig):
    """Options of :class:`Illumination`.

    ``amount`` is the largest logarithm of the uneven light, ``vignette`` the share of light that is lost at the corner
    farthest from the centre of the beam.
    """

    amount: float = Field(default=0.2, ge=0)
    vignette: ShareRange = (0.0, 0.4)


class Illumination(Augment[IlluminationConfig]):
    """Multiply all channels by a smooth uneven light, fading from a centre, as of a fundus camera or a microscope.

    Reference: Shen, Fu, Shen, Shao, Modeling and enhancing low-quality retinal fundus images, IEEE Transactions on
    Medical Imaging 2021, arXiv:2005.05594 (light transmission disturbance).
    Deviations: one smooth field and a quadratic fall in place of bright and dark discs; no change of contrast.
    """

    name: ClassVar[str] = "illumination"
    config_class = IlluminationConfig
    takes = ONLY_UNIT

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the field at knots, the centre of the beam in the middle half, and the share lost."""
        return {
            "knots": (2 * torch.rand(_KNOTS, _KNOTS, _KNOTS, generator=generator) - 1) * self.config.amount,
            "centre": 0.25 + 0.5 * torch.rand(3, generator=generator),
            "vignette": uniform(self.config.vignette, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``x * exp(field) * (1 - vignette * r²)``, r 1 at the farthest corner, clipped to [0, 1]."""
        knots = params["knots"] if x.ndim == 5 else params["knots"][..., 0]
        light = smooth_field(knots[:, None].to(x.device, non_blocking=True), x.shape[2:]).exp_()
        squares, farthest = x.new_zeros(1), x.new_zeros(1)
        for axis, length in enumerate(x.shape[2:]):
            shape = [-1 if other == axis + 1 else 1 for other in range(x.ndim - 1)]
            centre = wide(params["centre"][:, axis], x)
            place = ((torch.arange(length, device=x.device, dtype=x.dtype) + 0.5) / length).reshape(shape)
            squares = squares + (place - centre).square()
            farthest = farthest + torch.maximum(centre, 1 - centre).square()
        return (x * light * (1 - wide(params["vignette"], x) * squares / farthest)).clamp_(0, 1)


def _grey(x: Float[Tensor, "b 3 *s"]) -> Float[Tensor, "b 1 *s"]:
    red, green, blue = _LUMA
    return x[:, 0:1] * red + x[:, 1:2] * green + x[:, 2:3] * blue


def _hue_turned(x: Float[Tensor, "b c *s"], turns: Tensor) -> Float[Tensor, "b c *s"]:
    """Shift the hue of HSV and keep saturation and value.

    With ``h`` on a circle of six, a channel lies ``clip(2 - |h - h_channel|, 0, 1)`` of the way from the least to the
    greatest of the three, where ``h_channel`` is 0, 2 and 4.
    """
    low, high = x.aminmax(dim=1, keepdim=True)
    chroma = high - low
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    safe = torch.where(chroma > 0, chroma, 1.0)
    of_green = 2 + (blue - red) / safe
    of_blue = 4 + (red - green) / safe
    hue = torch.where(high == red, (green - blue) / safe, torch.where(high == green, of_green, of_blue))
    centres = torch.arange(0, 6, 2, device=x.device, dtype=x.dtype).reshape(1, 3, *[1] * (x.ndim - 2))
    distance = torch.remainder(hue + 6 * turns - centres + 3, 6).sub_(3).abs_()
    return low + chroma * (2 - distance).clamp_(0, 1)
