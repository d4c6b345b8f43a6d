"""The four distortions of Models Genesis: shuffled windows, bent intensities, painting inside and outside of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field
from torch import Tensor

from medssl.augment.base import Augment, AugmentConfig, Draws, Params, Share, ShareRange, extremes, uniform
from medssl.augment.fields import uniform_field
from medssl.augment.images import NOT_HU
from medssl.augment.masking import box_mask, draw_boxes, draw_seeds, fill_in

_ORDERS = 64
_CURVE_POINTS = 4096
_LEVELS = 1024


class LocalShuffleConfig(AugmentConfig):
    """Options of :class:`LocalShuffle`.

    ``edge`` of the windows as a share of the crop along each axis; ``share`` of the windows that are shuffled.
    """

    edge: ShareRange = (0.03, 0.1)
    share: ShareRange = (0.5, 1.0)


class LocalShuffle(Augment[LocalShuffleConfig]):
    """Shuffle the voxels within small windows: texture is lost, and the histogram of each window is kept.

    Reference: Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912, section 2, local pixel shuffling.
    Deviations: windows are the whole cells of a grid that lies anywhere, of one size a sample, where the authors' code
    draws 10 000 windows, of up to a tenth of each axis, that overlap; each takes one of 64 orders drawn for the
    sample; all channels of a voxel move together.
    """

    name: ClassVar[str] = "local_shuffle"
    config_class = LocalShuffleConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw edges and place of the grid along three axes, the share of windows, and seeds."""
        low, high = self.config.edge
        return {
            "edge": low + torch.rand(3, generator=generator, dtype=torch.float64) * (high - low),
            "place": torch.rand(3, generator=generator, dtype=torch.float64),
            "share": uniform(self.config.share, generator),
            "field_seed": draw_seeds(3, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Move voxels within the chosen windows of each sample."""
        shape = torch.tensor(x.shape[2:])
        edges = (params["edge"][:, : len(shape)] * shape).round().clamp(min=1).long()
        shifts = torch.minimum(edges, shape - edges + 1)
        starts = (params["place"][:, : len(shape)] * shifts).long()
        counts = (shape - starts).div(edges, rounding_mode="floor")
        out = x.clone()
        for row, (edge, start, count, share, seeds) in enumerate(
            zip(
                edges.tolist(),
                starts.tolist(),
                counts.tolist(),
                params["share"].tolist(),
                params["field_seed"],
                strict=True,
            )
        ):
            inside = [slice(first, first + num * size) for first, num, size in zip(start, count, edge, strict=True)]
            region: tuple[slice, ...] = (slice(None), *inside)
            out[row][region] = _shuffle(x[row][region], edge, share, seeds)
        return out


class NonlinearConfig(AugmentConfig):
    """Options of :class:`Nonlinear`.

    ``strength`` 0 keeps intensities, 1 puts the two inner points of the curve anywhere within ``most_off`` above and
    below the diagonal. With 0.4 the middle half of the range keeps at least a quarter of it; 1 is the whole square, as
    in the paper, where a curve may make nearly all white or black. ``reverse`` is the probability that the curve falls,
    so that bright becomes dark.
    """

    strength: Share = 1.0
    most_off: Share = 0.4
    reverse: Share = 0.0


class Nonlinear(Augment[NonlinearConfig]):
    """Bend intensities by a monotone cubic Bezier curve over the range of each sample and channel.

    ``(v, w)(t) = 3 t (1-t)^2 p1 + 3 t^2 (1-t) p2 + t^3 (1, 1)`` with ``p1, p2`` in the unit square maps ``v`` to
    ``w``. Both coordinates rise with ``t`` wherever the points lie, so the order of intensities is kept, or turned
    round.

    Reference: Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912, section 2, non-linear transformation.
    Deviations: the inner points are kept near the diagonal unless ``most_off`` is 1, where the paper draws them from
    the whole square; ``reverse`` is 0 unless asked for, where the authors' code takes 0.5, and turns a curve upside
    down, where theirs turns the order of its values round; over the whole square these are as likely; read from a
    table of 1024 levels.
    """

    name: ClassVar[str] = "nonlinear"
    config_class = NonlinearConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the two inner points of the curve and whether it falls."""
        across, share = torch.rand(2, 2, generator=generator, dtype=torch.float64).unbind(dim=1)
        lowest, highest = (across - self.config.most_off).clamp(min=0), (across + self.config.most_off).clamp(max=1)
        drawn = torch.stack([across, lowest + share * (highest - lowest)], dim=1)
        on_line = torch.tensor([[1 / 3, 1 / 3], [2 / 3, 2 / 3]], dtype=torch.float64)
        return {
            "points": on_line + self.config.strength * (drawn - on_line),
            "is_reversed": torch.rand((), generator=generator) < self.config.reverse,
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Look each intensity up; a constant channel stays as it is."""
        low, high = extremes(x)
        span = high - low
        level = (x - low).div_(torch.where(span > 0, span, 1.0)).clamp_(0, 1).mul_(_LEVELS - 1)
        below = level.floor().clamp_(max=_LEVELS - 2)
        table = _curve(params["points"], params["is_reversed"]).to(x.device, x.dtype, non_blocking=True)
        index = below.long().flatten(1)
        at = table.gather(1, index).reshape(x.shape)
        step = table.diff(dim=1).gather(1, index).reshape(x.shape)
        return level.sub_(below).mul_(step).add_(at).mul_(span).add_(low)


class InPaintingConfig(AugmentConfig):
    """Options of :class:`InPainting`: the most boxes, drawn evenly from 1, and their edges as a share of the crop."""

    num: int = Field(default=5, ge=1)
    edge: ShareRange = (1 / 6, 1 / 3)


class InPainting(Augment[InPaintingConfig]):
    """Replace boxes by even noise over the range of each channel: the context around must explain them.

    Reference: Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912, section 2, in-painting; numbers as in the
    authors' code.
    Deviations: the number of boxes is drawn evenly; they may touch the border; channels have noise of their own.
    """

    name: ClassVar[str] = "in_painting"
    config_class = InPaintingConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the boxes and the seed of the noise."""
        boxes = draw_boxes(self.config.num, self.config.edge, generator)
        return {**boxes, "field_seed": draw_seeds(1, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Paint inside."""
        return fill_in(x, _boxes(x, params), "noise", params["field_seed"][:, 0])


class OutPaintingConfig(AugmentConfig):
    """Options of :class:`OutPainting`: the most boxes that are kept, drawn evenly from 1, and their edges."""

    num: int = Field(default=5, ge=1)
    edge: ShareRange = (3 / 7, 4 / 7)


class OutPainting(Augment[OutPaintingConfig]):
    """Replace all but a union of boxes by even noise over the range of each channel.

    Reference: Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912, section 2, out-painting; numbers as in the
    authors' code.
    Deviations: as of :class:`InPainting`.
    """

    name: ClassVar[str] = "out_painting"
    config_class = OutPaintingConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the boxes and the seed of the noise."""
        boxes = draw_boxes(self.config.num, self.config.edge, generator)
        return {**boxes, "field_seed": draw_seeds(1, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Paint outside."""
        return fill_in(x, ~_boxes(x, params), "noise", params["field_seed"][:, 0])


def _boxes(x: Float[Tensor, "b c *s"], params: Params) -> Tensor:
    """Where the boxes of each sample are, edges as a share of the crop."""
    shape = x.shape[2:]
    edges = params["edge"][..., : len(shape)] * torch.tensor(shape, dtype=torch.float64)
    return box_mask(edges, params["place"], params["count"], shape=shape, device=x.device)


def _shuffle(
    image: Float[Tensor, " c *s"], edge: Sequence[int], share: float, seeds: Int64[Tensor, " 3"]
) -> Float[Tensor, " c *s"]:
    """Shuffle a share of the cells of an image that is made of whole cells."""
    counts = [length // size for length, size in zip(image.shape[1:], edge, strict=True)]
    size, num = math.prod(edge), math.prod(counts)
    split = [image.shape[0], *[part for pair in zip(counts, edge, strict=True) for part in pair]]
    dims = len(edge)
    order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2)]
    cells = image.reshape(split).permute(order)
    draws = [
        uniform_field(seeds[:1], (_ORDERS, size)),
        uniform_field(seeds[1:2], (num,)),
        uniform_field(seeds[2:], (num,)),
    ]
    order_of, taken, chance = (draw[0].to(image.device, non_blocking=True) for draw in draws)  # small
    orders = order_of.argsort(dim=1, stable=True)[(taken * _ORDERS).long()]
    source = torch.where(chance[:, None] < share, orders, torch.arange(size, device=image.device))
    moved = cells.reshape(-1, num, size).gather(2, source.expand(len(image), -1, -1))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return moved.reshape(cells.shape).permute(inverse).reshape(image.shape)


def _curve(points: Float64[Tensor, "b 2 2"], is_reversed: Tensor) -> Float64[Tensor, "b n"]:
    """Values of each curve at evenly spread levels, from the curve drawn finely."""
    t = np.linspace(0, 1, _CURVE_POINTS)
    powers = np.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)])
    levels = np.linspace(0, 1, _LEVELS)
    tables = []
    for inner, is_falling in zip(points.numpy(), is_reversed.tolist(), strict=True):
        v, w = np.maximum.accumulate(inner.T @ powers + t**3, axis=1)
        tables.append(np.interp(levels, v, 1 - w if is_falling else w))
    return torch.from_numpy(np.stack(tables))
