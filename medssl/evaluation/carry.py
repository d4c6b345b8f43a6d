"""Carry class scores to the grid of the source, slab by slab, and take the best class there.

Scores are interpolated linearly and compared on the fly: no resampled score is kept, so that what is held beside the
slab is one label map.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8, UInt16

from medssl.augment.threads import share
from medssl.evaluation.sliding_window import Slab
from medssl.geometry import Geometry
from medssl.volume import resample_argmax

_EXACT_VOXELS = 1e-3

Labels = UInt8[np.ndarray, "i j k"] | UInt16[np.ndarray, "i j k"]


class _Steps(NamedTuple):
    """How the voxels of one target axis lie between those of a source axis.

    ``place`` is the target's range that sees the source; for each voxel in it, ``low`` and ``high`` are its neighbours
    and ``share`` the distance from ``low``.
    """

    place: slice
    low: Int64[np.ndarray, " n"]
    high: Int64[np.ndarray, " n"]
    share: Float32[np.ndarray, " n"]


def carry(
    slabs: Iterable[Slab], source: Geometry, target: Geometry, *, num_classes: int, background: int = 0
) -> Labels:
    """Best class of each voxel of ``target``; equal scores go to the lower class.

    Args:
        slabs: Scores on ``source``, as :func:`~medssl.evaluation.sliding_window.score_slabs` gives them.
        source: Grid of the scores.
        target: Grid of the result; any axes, any spacing, oblique and sheared ones too.
        num_classes: Number of classes.
        background: Class of voxels outside the source's field of view, half a voxel around the outermost centres.

    Returns:
        Index of the best class, uint8, or uint16 for more than 256 classes; shape of ``target``.
    """
    labels = np.full(target.shape, background, dtype=np.uint8 if num_classes <= 256 else np.uint16)
    matrix = target.index_map(source)
    axes = _partners(matrix, target)
    if axes is None:
        for slab in slabs:
            _carry_oblique(slab, source, target, labels=labels, background=background)
        return labels
    places = [matrix[row, column] * np.arange(target.shape[column]) + matrix[row, 3] for row, column in enumerate(axes)]
    for slab in slabs:
        order = (slab.axis, *(axis for axis in range(3) if axis != slab.axis))
        steps = [
            _steps(places[axis], source.shape[axis], *(_reach(slab) if axis == slab.axis else (None, None)))
            for axis in order
        ]
        into = labels.transpose([axes[axis] for axis in order])[tuple(step.place for step in steps)]
        if into.size:
            _best(np.ascontiguousarray(slab.scores.numpy()), steps, into)
    return labels


def _partners(matrix: Float64[np.ndarray, "4 4"], target: Geometry) -> list[int] | None:
    """Axis of the target along which each source axis is walked; None where a step of the target moves along two."""
    axes = np.abs(matrix[:3, :3]).argmax(axis=1)
    if len(set(axes)) < 3:
        return None
    others = np.abs(matrix[:3, :3])
    others[range(3), axes] = 0
    return axes.tolist() if (others @ np.array(target.shape)).max() < _EXACT_VOXELS else None


def _reach(slab: Slab) -> tuple[int, int]:
    """First and last plane of the slab."""
    return slab.start, slab.start + len(slab.scores) - 1


def _inside(places: Float64[np.ndarray, "*s"], size: int, first: int, last: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which places lie between two planes of an axis; the edge belongs to the slab behind it, or else is outside."""
    after = places >= (-0.5 if first == 0 else first)
    before: np.ndarray[Any, np.dtype[np.bool_]] = places <= size - 0.5 if last == size - 1 else places < last
    return after & before


def _steps(places: Float64[np.ndarray, " n"], size: int, first: int | None, last: int | None) -> _Steps:
    """Neighbours in the voxels ``first`` to ``last``, numbered from ``first``; None stands for all."""
    first, last = first or 0, size - 1 if last is None else last
    nearest = np.round(places)
    snapped = np.where(np.abs(places - nearest) < _EXACT_VOXELS, nearest, places)
    found = np.flatnonzero(_inside(snapped, size, first, last))
    place = slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
    clipped = snapped[place].clip(first, last) - first
    low = clipped.astype(np.int64)
    high = np.minimum(low + 1, last - first)
    return _Steps(place, low, high, (clipped - low).astype(np.float32))


def _best(scores: Float32[np.ndarray, "n k u v"], steps: list[_Steps], labels: Labels) -> None:
    from medssl.evaluation.carry_loop import best_classes

    neighbours = tuple(array for step in steps for array in (step.low, step.high))
    shares = tuple(step.share for step in steps)
    share(
        lambda start, stop: best_classes(scores, neighbours, shares, labels, start, stop),
        len(labels),
        voxels=labels.size,
    )


def _carry_oblique(slab: Slab, source: Geometry, target: Geometry, *, labels: Labels, background: int) -> None:
    """One slab where the grids are askew: resampled in the box of the target that sees it, kept between its planes."""
    first, last = _reach(slab)
    shape = list(source.shape)
    shape[slab.axis] = last - first + 1
    start = [first if axis == slab.axis else 0 for axis in range(3)]
    grid = source.cropped(start, shape)
    around = grid.cropped((-1, -1, -1), np.add(shape, 2).tolist())  # the edge is half a voxel outside
    corners = target.to_index(around.corners_mm())
    low = np.floor(corners.min(axis=0)).clip(0, target.shape).astype(int)
    high = np.ceil(corners.max(axis=0) + 1).clip(low, target.shape).astype(int)
    if (low == high).any():
        return
    box = target.cropped(low.tolist(), (high - low).tolist())
    row = box.index_map(source)[slab.axis]
    i, j, k = np.ogrid[tuple(slice(n) for n in box.shape)]
    seen = _inside(row[0] * i + row[1] * j + row[2] * k + row[3], source.shape[slab.axis], first, last)
    scores = np.ascontiguousarray(np.moveaxis(slab.scores.numpy(), 0, 1 + slab.axis))
    into = labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    np.copyto(into, resample_argmax(scores, grid, box, background=background), where=seen, casting="unsafe")
