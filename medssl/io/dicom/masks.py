"""Masks of numbered regions laid on a grid: one label map, or a channel a region where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from medssl.errors import ReadError
from medssl.geometry import Geometry
from medssl.io.values import label_dtype

_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Plane:
    """What one region covers of one slice.

    Args:
        number: Of the region, at least 1.
        slice: Number of the slice of the target.
        mask: Voxels of the slice, (U, V) as the target counts them.
    """

    number: int
    slice: int
    mask: Bool[np.ndarray, "u v"]


@dataclass(frozen=True)
class Target:
    """A grid together with the way in which pictures lie on it.

    Args:
        geometry: Grid of the result.
        axes: Array axis of the grid along which a picture's first index, its second, and the slices run.
        flips: Whether each of them runs backwards.
    """

    geometry: Geometry
    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of a picture (U, V), and the number of slices."""
        u, v, slices = (self.geometry.shape[axis] for axis in self.axes)
        return u, v, slices

    def zeros(self, channels: int, dtype: type[np.integer[Any]], *, path: Path) -> Integer[np.ndarray, "c x y z"]:
        """Background everywhere; the memory runs along x, then y, then z.

        Raises:
            ReadError: E_BOMB above 4 GiB.
        """
        x, y, z = self.geometry.shape
        needed = channels * x * y * z * np.dtype(dtype).itemsize
        if needed > _MOST_BYTES:
            raise ReadError(
                f"{path}: {channels} channels of {x} x {y} x {z} voxels; {_MOST_BYTES >> 30} GiB is the most. "
                "Split the object or choose fewer regions.",
                code="E_BOMB",
            )
        return np.zeros((channels, z, y, x), dtype).transpose(0, 3, 2, 1)

    def view(self, array: Integer[np.ndarray, "c x y z"]) -> Integer[np.ndarray, "c u v slices"]:
        """The same memory with the axes of the pictures."""
        turned = array.transpose(0, *(axis + 1 for axis in self.axes))
        u, v, slices = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return turned[:, u, v, slices]


def compose(
    planes: Callable[[], Iterable[Plane]], *, regions: Sequence[int], target: Target, path: Path
) -> tuple[Integer[np.ndarray, "c x y z"], tuple[str, ...]]:
    """Paint all regions.

    Args:
        planes: Gives every plane, at most one for a region and a slice; called a second time where regions overlap.
        regions: Their numbers in ascending order, those without a plane too.
        target: Where to paint.
        path: For messages.

    Returns:
        One channel whose voxels hold the number of their region; or, with a warning, where two regions share a voxel,
        one channel a region in the order of ``regions``, of 0 and 1.

    Raises:
        ReadError: E_BOMB above 4 GiB.
    """
    labels = target.zeros(1, label_dtype(max(regions)), path=path)
    canvas = target.view(labels)[0]
    for plane in planes():
        picture = canvas[:, :, plane.slice]
        if picture[plane.mask].any():
            break
        picture[plane.mask] = plane.number
    else:
        return labels, ()
    del labels, canvas, picture
    channels = target.zeros(len(regions), np.uint8, path=path)
    rows = dict(zip(regions, target.view(channels), strict=True))
    for plane in planes():
        rows[plane.number][:, :, plane.slice][plane.mask] = 1
    numbers = ", ".join(map(str, regions))
    return channels, (f"W_OVERLAP: regions overlap; each became a channel of 0 and 1, in this order: {numbers}.",)
