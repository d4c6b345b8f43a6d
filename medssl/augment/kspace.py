"""Lines of k-space: which axis they encode, and images put together from them.

A line is a plane of k-space across the phase-encoding axis. Faults that strike whole lines are one-dimensional, so
only that axis is transformed. Lines are counted with the centre of k-space at ``n // 2``, as ``fftshift`` puts it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Num
from pydantic import Field
from torch import Tensor

from medssl.augment.base import Augment, AugmentConfig, Params
from medssl.augment.images import NOT_HU
from medssl.augment.spatial import thick_axes

THICK_RATIO = 3.0


class LinesConfig(AugmentConfig):
    """Options of augments that strike lines of k-space.

    ``axes``: which array axes can be the phase-encoding one, 0 to 2 for X, Y, Z; the one of an image is drawn. Axes
    across thick slices (see :class:`~medssl.augment.spatial.AffineConfig`) are not encoded, and nor are axes of one
    voxel or, in 2D, axis 2; an image with no other axis stays as it is.
    """

    axes: tuple[Literal[0, 1, 2], ...] = Field(default=(0, 1, 2), min_length=1)
    thick_ratio: float = Field(default=THICK_RATIO, gt=1.0)


L = TypeVar("L", bound=LinesConfig)


class Lines(Augment[L]):
    """An augment that puts the lines of k-space together anew, from moved copies of the image.

    Where it does not ``wrap``, the crop is mirrored at its last face before the transform, so that no jump lies between
    opposite faces and nothing of one comes in at the other: the cosine transform in place of the Fourier transform.
    """

    takes = NOT_HU
    modalities = frozenset({"MR"})
    wraps: ClassVar[bool] = True

    @abstractmethod
    def lines(self, length: int, params: Params) -> Float32[Tensor, "b m n"]:
        """The weight that each of the ``length`` lines of each copy has."""

    def copies(
        self, signal: Float[Tensor, "b c *s"], lines: Float32[Tensor, "b m n"], params: Params, spacing_mm: Tensor
    ) -> Float[Tensor, "b m c *s"]:
        """The copies; the image alone unless something moves."""
        return signal[:, None]

    def axes(self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Tensor) -> Tensor:
        """Which axes of each sample are struck; one, drawn."""
        return _one_axis(params["axis"], self.encoded(x, spacing_mm))

    def encoded(self, x: Float[Tensor, "b c *s"], spacing_mm: Tensor) -> Tensor:
        """Which axes of each sample can be."""
        lengths = torch.tensor(x.shape[2:])
        named = torch.isin(torch.arange(x.ndim - 2), torch.tensor(self.config.axes))
        return named & (lengths > 1) & ~thick_axes(spacing_mm, self.config.thick_ratio)[:, : x.ndim - 2]

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Transform one axis, weigh and add the lines, transform back and take the magnitude."""
        low = darkest(x)
        real = x - low
        imaginary = torch.zeros_like(x)
        for axis, rows in _rows_by_axis(self.axes(x, params, spacing_mm)):
            there = rows.to(x.device, non_blocking=True)
            drawn = {key: value[rows] for key, value in params.items()}
            along, length = axis + 2, x.shape[axis + 2]
            signal = real[there]
            if not self.wraps:
                signal = torch.cat([signal, signal.flip(along)], dim=along)
            weights = self.lines(signal.shape[along], drawn)
            copies = self.copies(signal, weights, drawn, spacing_mm[rows])
            parts = _combine_lines(copies, weights, axis)
            real[there], imaginary[there] = (part.narrow(along, 0, length) for part in parts)
        return torch.hypot(real, imaginary).add_(low)


def frequencies(length: int) -> Int64[Tensor, " n"]:
    """Periods in the field of view of each line, from ``-(n // 2)`` on."""
    return torch.arange(length) - length // 2


def darkest(x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *_"]:
    """Give the least value of each sample and channel, ready to broadcast: where there is no signal."""
    return x.amin(dim=tuple(range(2, x.ndim)), keepdim=True)


def _one_axis(share: Float32[Tensor, " b"], allowed: Bool[Tensor, "b d"]) -> Bool[Tensor, "b d"]:
    """Pick one of the allowed axes of each sample, evenly by a share in [0, 1); none where none is allowed."""
    count = allowed.sum(dim=1)
    picked = (share * count).floor().long() + 1
    return allowed & (allowed.cumsum(dim=1) == picked[:, None])


def _rows_by_axis(chosen: Bool[Tensor, "b d"]) -> Iterator[tuple[int, Int64[Tensor, " g"]]]:
    """Give each axis that is chosen with the samples that chose it."""
    for axis, column in enumerate(chosen.unbind(dim=1)):
        rows = column.nonzero()[:, 0]
        if len(rows):
            yield axis, rows


def _combine_lines(
    copies: Float[Tensor, "b m c *s"], weights: Float[Tensor, "b m n"], axis: int
) -> tuple[Float[Tensor, "b c *s"], Float[Tensor, "b c *s"]]:
    """Give the real and the imaginary image of ``sum_m weights_m(k) F[copy_m](k)``.

    The even part of real weights makes the real image and the odd part the imaginary one, so that half spectra do.

    Args:
        copies: Real images, m of each sample.
        weights: Of the lines of each copy, on the CPU.
        axis: Spatial axis, from 0, of n voxels.
    """
    length = copies.shape[axis + 3]
    unshifted = torch.fft.ifftshift(weights, dim=-1)
    mirrored = unshifted.flip(-1).roll(1, -1)
    spectra = torch.fft.rfft(copies, dim=axis + 3)
    real = _image(spectra, (unshifted + mirrored) / 2, axis, length)
    odd = (unshifted - mirrored) / 2
    return real, _image(spectra, -1j * odd, axis, length) if odd.any() else torch.zeros_like(real)


def _image(
    spectra: Num[Tensor, "b m c *s"], weights: Num[Tensor, "b m n"], axis: int, length: int
) -> Float[Tensor, "b c *t"]:
    """Weigh half spectra, add the copies up and transform back."""
    shape = [*weights.shape[:2], *[1] * (spectra.ndim - 2)]
    shape[axis + 3] = length // 2 + 1
    half = weights[..., : length // 2 + 1].reshape(shape).to(spectra.device, non_blocking=True)
    image: Tensor = torch.fft.irfft((spectra * half).sum(dim=1), n=length, dim=axis + 2)
    return image
