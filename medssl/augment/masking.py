"""Augments that hide parts of an image, and the boxes that these and others cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field
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
)
from medssl.augment.fields import uniform_field

Fill = Literal["mean", "min", "noise"]

_AXES = {"LR": 0, "AP": 1, "SI": 2}


class CutoutConfig(AugmentConfig):
    """Options of :class:`Cutout`.

    ``num`` is the most boxes, drawn evenly from 1; ``edge`` is a share of the crop along each axis; ``edge_mm`` takes
    its place where it is given; ``fill`` is the mean or minimum of each channel, or noise over its range.
    """

    num: int = Field(default=3, ge=1)
    edge: ShareRange = (0.1, 0.3)
    edge_mm: NonNegativeRange | None = None
    fill: Fill = "mean"


class Cutout(Augment[CutoutConfig]):
    """Hide boxes, each of its own edges and place, wholly inside the crop; the label map is left as it is.

    Reference: DeVries, Taylor, Improved regularization of convolutional neural networks with cutout,
    arXiv:1708.04552, section 3.
    Deviations: boxes in place of a square, in mm on request; they do not reach over the border.
    """

    name: ClassVar[str] = "cutout"
    config_class = CutoutConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw edges (a share of the crop, or mm), places and the number of boxes."""
        edge = self.config.edge if self.config.edge_mm is None else self.config.edge_mm
        return {**draw_boxes(self.config.num, edge, generator), "field_seed": draw_seeds(1, generator)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Fill the boxes."""
        lengths = torch.tensor(x.shape[2:], dtype=torch.float64)
        if self.config.edge_mm is not None:
            lengths = 1 / spacing_mm[:, None]
        edges = params["edge"][..., : x.ndim - 2] * lengths
        hidden = box_mask(edges, params["place"], params["count"], shape=x.shape[2:], device=x.device)
        return fill_in(x, hidden, self.config.fill, params["field_seed"][:, 0])


class BlocksConfig(AugmentConfig):
    """Options of :class:`Blocks`.

    ``edge_mm`` of the blocks, the same along every axis and rounded to voxels; ``share`` of the blocks that are
    hidden; ``fill`` as in :class:`CutoutConfig`.
    """

    edge_mm: PositiveRange = (8.0, 16.0)
    share: ShareRange = (0.2, 0.6)
    fill: Fill = "mean"


class TubesConfig(BlocksConfig):
    """Options of :class:`Tubes`: as of :class:`Blocks`, and the axis that the tubes run along."""

    axis: Literal["LR", "AP", "SI"] = "SI"


B = TypeVar("B", bound=BlocksConfig)


class _Grid(Augment[B]):
    """A share of the blocks of a grid, which lies anywhere, is hidden."""

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the edge in mm, the place of the grid, the share, and the seeds of the blocks and of noise."""
        return {
            "edge_mm": uniform(self.config.edge_mm, generator),
            "place": torch.rand(3, generator=generator, dtype=torch.float64),
            "share": uniform(self.config.share, generator),
            "field_seed": draw_seeds(2, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Fill the hidden blocks."""
        edges = (params["edge_mm"][:, None] / spacing_mm).round().clamp(min=1).long()
        masks = []
        for edge, place, share, seeds in zip(
            edges, params["place"], params["share"].tolist(), params["field_seed"], strict=True
        ):
            blocks = self._blocks_of_voxels(x.shape[2:], edge, (place[: len(edge)] * edge).long())
            hidden = _hide(tuple(int(index[-1]) + 1 for index in blocks), share, seeds[:1]).to(
                x.device, non_blocking=True
            )
            for axis, index in enumerate(blocks):
                hidden = hidden.index_select(axis, index.to(x.device, non_blocking=True))
            masks.append(hidden[None])
        return fill_in(x, torch.stack(masks), self.config.fill, params["field_seed"][:, 1])

    def _blocks_of_voxels(
        self, shape: Sequence[int], edge: Int64[Tensor, " d"], shift: Int64[Tensor, " d"]
    ) -> list[Int64[Tensor, " n"]]:
        """For each axis, the block along it that each voxel belongs to."""
        return [
            torch.div(torch.arange(length) + first, size, rounding_mode="floor")
            for length, size, first in zip(shape, edge, shift, strict=True)
        ]


class Blocks(_Grid[BlocksConfig]):
    """Hide a share of the blocks of a grid.

    ``round(share * blocks)`` are hidden, but never all; those at the border of the crop are cut by it.

    Reference: Singh, Lee, Hide-and-Seek, ICCV 2017, arXiv:1704.04232, section 3.1.
    Deviations: a number of blocks in place of a probability for each; the grid is in mm and lies anywhere; filled with
    the mean of the sample, not of the data set.
    """

    name: ClassVar[str] = "blocks"
    config_class = BlocksConfig


class Tubes(_Grid[TubesConfig]):
    """Hide blocks of the plane across an axis, all along the axis, so that no neighbouring slice gives them away.

    In 2D tubes along SI are blocks.

    Reference: Tong, Song, Wang, Wang, VideoMAE, NeurIPS 2022, arXiv:2203.12602, section 3.3.
    Deviations: an axis of space in place of time; a fill in place of dropped tokens.
    """

    name: ClassVar[str] = "tubes"
    config_class = TubesConfig

    def _blocks_of_voxels(
        self, shape: Sequence[int], edge: Int64[Tensor, " d"], shift: Int64[Tensor, " d"]
    ) -> list[Int64[Tensor, " n"]]:
        """Along the axis of the tubes all voxels belong to one block."""
        blocks = super()._blocks_of_voxels(shape, edge, shift)
        axis = _AXES[self.config.axis]
        return [torch.zeros_like(index) if place == axis else index for place, index in enumerate(blocks)]


def draw_seeds(num: int, generator: torch.Generator) -> Int64[Tensor, " num"]:
    """Seeds of random fields."""
    return torch.randint(2**62, (num,), generator=generator)


def draw_boxes(most: int, edge: tuple[float, float], generator: torch.Generator) -> Params:
    """Draw boxes: ``count`` of them (1 to ``most``, evenly), with an ``edge`` and a ``place`` for each of three axes.

    Args:
        most: Rows of ``edge`` and ``place``; only the first ``count`` mean something.
        edge: Bounds of the edges, in the units of the caller.
        generator: Of the sample.
    """
    low, high = edge
    return {
        "count": torch.randint(1, most + 1, (), generator=generator),
        "edge": low + torch.rand(most, 3, generator=generator, dtype=torch.float64) * (high - low),
        "place": torch.rand(most, 3, generator=generator, dtype=torch.float64),
    }


def box_mask(
    edges: Float64[Tensor, "b k d"],
    place: Float64[Tensor, "b k e"],
    count: Int64[Tensor, " b"],
    *,
    shape: Sequence[int],
    device: torch.device,
) -> Bool[Tensor, "b 1 *s"]:
    """Where the boxes are: the union of the first ``count`` of each sample.

    Args:
        edges: In voxels, on the CPU; rounded to whole ones, at least 1 unless 0 and at most the crop.
        place: In [0, 1), on the CPU: 0 is the first place where the box is inside the crop, towards 1 the last. Axes
            that the crop lacks are not looked at.
        count: Number of boxes of each sample.
        shape: Of the crop.
        device: Where the mask is wanted.
    """
    is_there = torch.arange(edges.shape[1]) < count[:, None]
    inside = []
    for axis, length in enumerate(shape):
        size = torch.where(edges[..., axis] > 0, edges[..., axis].round().clamp(1, length), 0).long()
        first = (place[..., axis] * (length - size + 1)).long()
        voxel = torch.arange(length)
        along = (voxel >= first[..., None]) & (voxel < (first + size)[..., None]) & is_there[..., None]
        wide_shape = [*along.shape[:2], *[1] * axis, length, *[1] * (len(shape) - axis - 1)]
        inside.append(along.reshape(wide_shape).to(device, non_blocking=True))
    mask = torch.zeros(len(edges), 1, *shape, dtype=torch.bool, device=device)
    for box in range(edges.shape[1]):
        found = inside[0][:, box]
        for along in inside[1:]:
            found = found & along[:, box]
        mask |= found[:, None]
    return mask


def noise_in_range(x: Float[Tensor, "b c *s"], seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c *s"]:
    """Even noise over the range of each sample and channel, of the shape of ``x``."""
    low, high = extremes(x)
    return uniform_field(seeds, x.shape[1:], x.device).to(x.dtype).mul_(high - low).add_(low)


def fill_in(
    x: Float[Tensor, "b c *s"], hidden: Bool[Tensor, "b 1 *s"], fill: Fill, seeds: Int64[Tensor, " b"]
) -> Float[Tensor, "b c *s"]:
    """Replace what is hidden by the mean or minimum of the channel, or by noise over its range from ``seeds``."""
    if fill == "noise":
        return torch.where(hidden, noise_in_range(x, seeds), x)
    value = extremes(x)[0] if fill == "min" else channel_means(x)
    return torch.where(hidden, value, x)


def channel_means(x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c ..."]:
    """Mean of each sample and channel, ready to broadcast; summed in double, so that no batch changes its bits."""
    means = x.flatten(2).mean(dim=2, dtype=torch.float64).to(x.dtype)
    return means.reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def _hide(counts: tuple[int, ...], share: float, seed: Int64[Tensor, " 1"]) -> Bool[Tensor, " *k"]:
    """Which blocks of a grid are hidden: ``share`` of them, never all, in an order that the seed decides."""
    num = torch.Size(counts).numel()
    order = uniform_field(seed, (1, num), "cpu")[0, 0].argsort(stable=True)
    hidden = torch.zeros(num, dtype=torch.bool)
    hidden[order[: min(round(share * num), num - 1)]] = True
    return hidden.reshape(counts)
