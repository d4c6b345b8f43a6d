"""Boxes: axis-parallel and half-open, in the voxels of a prepared volume or in mm along its axes.

Voxel ``i`` occupies ``[i, i + 1)``. An array of boxes has the shape ``(n, 2, 3)``: start, then size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

from medssl.errors import CaseError, ConfigError

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """An axis-parallel box, ``[start, start + size)`` along each axis."""

    start: tuple[float, float, float]
    size: tuple[float, float, float]

    @classmethod
    def at(cls, start: Float64[np.ndarray, " 3"], size: Float64[np.ndarray, " 3"]) -> Box:
        """A box from two arrays."""
        return cls(floats(start), floats(size))

    def scaled(self, factor: Sequence[float | int]) -> Box:
        """The box in other units, for example voxels times ``spacing_mm``."""
        scale = np.asarray(factor, dtype=np.float64)
        return Box.at(scale * self.start, scale * self.size)

    def to_array(self) -> Float64[np.ndarray, "2 3"]:
        """Start and size as rows."""
        return np.array([self.start, self.size], dtype=np.float64)


def grid_boxes(grid: Sequence[int], cell: Sequence[float | int]) -> Float64[np.ndarray, "n 2 3"]:
    """Tile space with ``grid`` boxes of size ``cell``; box ``(i, j, k)`` is number ``(i * gy + j) * gz + k``.

    Args:
        grid: Boxes along each axis.
        cell: Size of one box along each axis, any unit.

    Returns:
        Start and size of each box, the first at the origin.
    """
    size = np.asarray(cell, dtype=np.float64)
    index = np.stack(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    return np.stack([index * size, np.broadcast_to(size, index.shape)], axis=1)


def overlap_fractions(
    targets: Float[np.ndarray, "t 2 3"], bases: Float[np.ndarray, "n 2 3"]
) -> Float64[np.ndarray, "t n"]:
    """Share of each target box that lies in each base box, ``vol(target ∩ base) / vol(target)``.

    Args:
        targets: Start and size of each target box.
        bases: Start and size of each base box, in the same unit.

    Returns:
        Fractions in [0, 1]; rows sum to at most 1 where the bases do not overlap.

    Raises:
        CaseError: if a target box has no volume.
    """
    start, size = np.asarray(targets, np.float64)[:, None, 0], np.asarray(targets, np.float64)[:, None, 1]
    base_start, base_size = np.asarray(bases, np.float64)[None, :, 0], np.asarray(bases, np.float64)[None, :, 1]
    if not np.all(size > 0):
        raise CaseError(f"target box of size {size.min(axis=(0, 1)).tolist()}: an overlap needs a size above 0.")
    common = np.minimum(start + size, base_start + base_size) - np.maximum(start, base_start)
    fractions: Float64[np.ndarray, "t n"] = np.prod(np.maximum(common, 0.0) / size, axis=-1)
    return fractions


def union_fraction(target: Float[np.ndarray, "2 3"], bases: Float[np.ndarray, "n 2 3"]) -> float:
    """Share of one box that lies in any of ``bases``, which may overlap each other.

    The faces of the bases cut the box into cells, each of which lies in a base as a whole or not at all.
    """
    low, high = target[0], target[0] + target[1]
    first, last = np.clip(bases[:, 0], low, high), np.clip(bases[:, 0] + bases[:, 1], low, high)
    cuts = [np.unique([low[axis], high[axis], *first[:, axis], *last[:, axis]]) for axis in range(3)]
    middles = np.stack(np.meshgrid(*((cut[1:] + cut[:-1]) / 2 for cut in cuts), indexing="ij"), axis=-1)
    x, y, z = (np.diff(cut) for cut in cuts)
    volumes = x[:, None, None] * y[:, None] * z
    inside = ((middles >= first[:, None, None, None]) & (middles < last[:, None, None, None])).all(axis=-1).any(axis=0)
    return float(volumes[inside].sum() / volumes.sum())


def position_labels(
    targets: Float[np.ndarray, "t 2 3"], bases: Float[np.ndarray, "n 2 3"]
) -> Float32[np.ndarray, "t n"]:
    """Overlap fractions as training labels: every target must touch a base.

    Raises:
        CaseError: if a target lies outside all bases, which leaves nothing to learn from it.
    """
    fractions = overlap_fractions(targets, bases)
    outside = np.flatnonzero(fractions.sum(axis=1) == 0)
    if outside.size:
        raise CaseError(
            f"target crop {outside[0]} overlaps none of the {len(bases)} base crops; "
            "a position label needs at least one. Draw targets inside the grid.",
            code="E_NO_OVERLAP",
        )
    return fractions.astype(np.float32)


def triple(name: str, values: Sequence[int]) -> Triple:
    """Three whole numbers above 0.

    Raises:
        ConfigError: if they are not; names the option.
    """
    if len(values) != 3 or any(int(value) != value or value < 1 for value in values):
        raise ConfigError(f"{name} is {list(values)}; it needs three whole numbers above 0.")
    return int(values[0]), int(values[1]), int(values[2])


def floats(values: Sequence[float | int] | Float64[np.ndarray, " 3"]) -> tuple[float, float, float]:
    """Three numbers as a tuple."""
    x, y, z = (float(value) for value in values)
    return x, y, z
