"""Augments that mix the images of a group: the style of their spectra, their values, or boxes cut from one another."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from pydantic import Field
from scipy.special import betaincinv
from torch import Tensor

from medssl.augment.base import Draws, Mixing, MixingConfig, Params, ShareRange, extremes, uniform, wide
from medssl.augment.images import NOT_HU
from medssl.augment.masking import box_mask, channel_means

_FLOOR = 1e-5
_LEAST = 1e-12


class BatchStylesConfig(MixingConfig):
    """Options of :class:`BatchStyles`.

    ``size`` of the window of low frequencies, as a share of the spectrum along each axis; 0 moves the mean alone. The
    bounds were chosen by eye on brain MR, where a window of 0.3 hides the anatomy under the texture of the reference.
    """

    size: ShareRange = (0.02, 0.1)


class BatchStyles(Mixing[BatchStylesConfig]):
    """Give all images of a group the low-frequency amplitudes of one of them; each keeps its own phases.

    Reference and window are those that the first sample of the group draws, so all that are touched get one style. What
    exceeds the range of the image and its reference is clipped. The spectrum takes opposite borders of a crop for
    neighbours, so a crop that ends in bright tissue carries that edge in its style. Label maps stay as they are.

    Reference: Scalbert, Vakalopoulou, Couzinié-Devy, Towards domain-invariant self-supervised learning with batch
    styles standardization, ICLR 2024, arXiv:2303.06088, section 3 and appendix.
    Deviations: the window has an odd number of frequencies about zero, so that the image stays real; the size is that
    of its sides, not its area; the mean moves with its sign, for images here can be negative; in 3D one spectrum of
    the volume.
    """

    name: ClassVar[str] = "batch_styles"
    config_class = BatchStylesConfig
    takes = NOT_HU
    moves_labels = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the place of the reference in the group and the window; those of the first sample count."""
        return {
            "reference": torch.randint(self.config.group, (), generator=generator),
            "size": uniform(self.config.size, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Exchange amplitudes."""
        rows = torch.arange(len(x))
        first = rows - rows % self.config.group
        return _restyle(x, first + params["reference"][first], torch.ones(len(x)), params["size"][first])


class FourierMixConfig(MixingConfig):
    """Options of :class:`FourierMix`.

    ``weight`` of the partner's amplitudes; ``size`` of the window of low frequencies, as a share of the spectrum along
    each axis, by eye as in :class:`BatchStylesConfig`; 1 takes all, as the paper does.
    """

    weight: ShareRange = (0.0, 1.0)
    size: ShareRange = (0.02, 0.1)


class FourierMix(Mixing[FourierMixConfig]):
    """Mix low-frequency amplitudes with those of another image of the group; each keeps its own phases.

    What exceeds the range of both images is clipped. Label maps stay as they are.

    Reference: Xu, Zhang, Zhang, Wang, Tian, A Fourier-based framework for domain generalization, CVPR 2021,
    arXiv:2105.11120, amplitude mix; the window as in Yang, Soatto, FDA, CVPR 2020, arXiv:2004.05498.
    Deviations: as of :class:`BatchStyles`.
    """

    name: ClassVar[str] = "fourier_mix"
    config_class = FourierMixConfig
    takes = NOT_HU
    moves_labels = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the partner, its weight and the window."""
        return {
            "partner": torch.randint(1, self.config.group, (), generator=generator),
            "weight": uniform(self.config.weight, generator),
            "size": uniform(self.config.size, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Mix amplitudes."""
        rows = partner_rows(params["partner"], self.config.group)
        return _restyle(x, rows, params["weight"], params["size"])


class MixupConfig(MixingConfig):
    """Options of :class:`Mixup`: both parameters of the Beta distribution of the partner's weight."""

    alpha: float = Field(default=0.3, gt=0.0)


class Mixup(Mixing[MixupConfig]):
    """Average with another image of the group; targets must be mixed by ``partner`` and ``weight`` of the draw.

    ``(1 - weight) * x + weight * x[partner_rows]``. There is no mean of two label maps, so they are refused.

    Reference: Zhang, Cisse, Dauphin, Lopez-Paz, mixup, ICLR 2018, arXiv:1710.09412, eq. 1 and section 2.
    Deviations: the weight is drawn for each sample, not for the batch.
    """

    name: ClassVar[str] = "mixup"
    config_class = MixupConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the partner and its weight, by the inverse of the distribution function."""
        partner = torch.randint(1, self.config.group, (), generator=generator)
        even = torch.rand((), generator=generator, dtype=torch.float64)
        weight = betaincinv(self.config.alpha, self.config.alpha, even.numpy())
        return {"partner": partner, "weight": torch.tensor(weight, dtype=torch.float32)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Average."""
        rows = partner_rows(params["partner"], self.config.group).to(x.device, non_blocking=True)
        return x.lerp(x[rows], wide(params["weight"], x))


class CutmixConfig(MixingConfig):
    """Options of :class:`Cutmix`: ``share`` of the volume of the crop that the box takes."""

    share: ShareRange = (0.0, 0.5)


class Cutmix(Mixing[CutmixConfig]):
    """Put a box of another image of the group into this one, at its place; the label map goes with it.

    The box has the proportions of the crop. Targets of a whole image must be mixed by ``partner`` and ``weight``, the
    share of the box before it is rounded to voxels.

    Reference: Yun, Han, Oh, Chun, Choe, Yoo, CutMix, ICCV 2019, arXiv:1905.04899, eq. 1 and 2.
    Deviations: the box lies wholly inside the crop; drawn for each sample, not for the batch; the share is at most a
    half unless asked for, so that an image stays mostly itself.
    """

    name: ClassVar[str] = "cutmix"
    config_class = CutmixConfig
    moves_labels = True

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the partner, the share of the box and its place."""
        return {
            "partner": torch.randint(1, self.config.group, (), generator=generator),
            "weight": uniform(self.config.share, generator),
            "place": torch.rand(3, generator=generator, dtype=torch.float64),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Put the boxes in."""
        return self._cut(x, params)

    def apply_label(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Put the same boxes of the partners' label maps in."""
        return torch.where(wide(params["on"], y, dtype=torch.bool), self._cut(y, params), y)

    def _cut(self, x: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        rows = partner_rows(params["partner"], self.config.group).to(x.device, non_blocking=True)
        lengths = torch.tensor(x.shape[2:], dtype=torch.float64)
        thick = max(1, int((lengths > 1).sum()))
        edges = params["weight"].double()[:, None, None] ** (1 / thick) * lengths
        one = torch.ones(len(x), dtype=torch.int64)
        mask = box_mask(edges, params["place"][:, None], one, shape=x.shape[2:], device=x.device)
        return torch.where(mask, x[rows], x)


def partner_rows(partner: Int64[Tensor, " b"], group: int) -> Int64[Tensor, " b"]:
    """The row of the batch that each sample is mixed with: ``partner`` places further in its group, and round."""
    rows = torch.arange(len(partner))
    return rows - rows % group + (rows + partner) % group


def _restyle(
    x: Float[Tensor, "b c *s"], rows: Int64[Tensor, " b"], weight: Float32[Tensor, " b"], size: Float32[Tensor, " b"]
) -> Float[Tensor, "b c *s"]:
    """Move the mean and the amplitudes in a window by a share towards those of other rows of the batch.

    ``x + F^-1[(gain - 1) F(x)] + weight * (mean' - mean)`` with ``gain = 1 + weight * (|F'| / |F| - 1)`` in the window:
    nothing at all changes at a weight of 0 or with the image itself. Amplitudes below 1e-5 of the largest have a phase
    of rounding errors, so their gain fades to 1.
    """
    axes = tuple(range(2, x.ndim))
    chosen, share = rows.to(x.device, non_blocking=True), wide(weight, x)
    mean = channel_means(x)
    spectrum = torch.fft.rfftn(x - mean, dim=axes)
    amplitude = spectrum.abs()
    floor = (_FLOOR * amplitude.amax(dim=axes, keepdim=True)).clamp_min(_LEAST)
    gain = (amplitude[chosen] - amplitude).mul_(amplitude).div_(amplitude.square().add_(floor.square()))
    gain.mul_(_window(x.shape[2:], size).to(x.device, non_blocking=True)).mul_(share)
    out: Tensor = torch.fft.irfftn(spectrum.mul_(gain), s=x.shape[2:], dim=axes)
    low, high = extremes(x)
    out = out.add_(x).add_(share * (mean[chosen] - mean))
    return out.clamp_(torch.minimum(low, low[chosen]), torch.maximum(high, high[chosen]))


def _window(shape: torch.Size, size: Float32[Tensor, " b"]) -> Bool[Tensor, "b 1 *f"]:
    """Which frequencies of a real spectrum are at most ``size / 2`` of the sampling rate along every axis."""
    inside = torch.ones(len(size), 1, *[1] * len(shape), dtype=torch.bool)
    for axis, length in enumerate(shape):
        count = length // 2 + 1 if axis == len(shape) - 1 else length
        frequency = torch.arange(count)
        frequency = torch.minimum(frequency, length - frequency)
        half = (size.double() * length / 2 + 1e-6).floor()
        along = frequency <= half[:, None]
        inside = inside & along.reshape(len(size), 1, *[1] * axis, count, *[1] * (len(shape) - axis - 1))
    return inside
