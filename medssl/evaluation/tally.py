"""One compiled pass over two label maps: how many voxels each label has, and the box that holds it in either.

Import this file only where label maps are counted, for Numba is slow to load. Loops run compiled, so that no coverage
is counted in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt16

from medssl.augment.jit import compile_loop

_SIZES: dict[np.dtype[Any], int] = {np.dtype(np.uint8): 2**8, np.dtype(np.uint16): 2**16}

Box = tuple[slice, slice, slice]


class Tally(NamedTuple):
    """What was counted of one label value; the box is that of both maps together, and empty where there is none."""

    prediction: int
    reference: int
    both: int
    box: Box


def tally(
    prediction: Integer[np.ndarray, "x y z"], reference: Integer[np.ndarray, "x y z"], *, label_values: Sequence[int]
) -> dict[int, Tally]:
    """Count each of the ``label_values``, from 0 on, in two maps of one shape; other values are passed over."""
    values = sorted(set(label_values))
    is_turned = prediction.flags.f_contiguous and not prediction.flags.c_contiguous
    maps = [np.ascontiguousarray(labels.T if is_turned else labels) for labels in (prediction, reference)]
    maps, names = _narrowed(maps, values)
    places: UInt16[np.ndarray, " codes"] = np.zeros(_SIZES[maps[0].dtype], dtype=np.uint16)
    is_possible = names >= 0
    places[names[is_possible]] = np.flatnonzero(is_possible) + 1
    sizes = np.zeros((3, len(values) + 1), dtype=np.int64)
    seen = [np.zeros((len(values) + 1, size), dtype=np.bool_) for size in maps[0].shape]
    _count(maps[0], maps[1], places, sizes, *seen)
    counts = {}
    for place, value in enumerate(values, start=1):
        extents = [_extent(along[place]) for along in (reversed(seen) if is_turned else seen)]
        prediction_size, reference_size, both_size = (int(size) for size in sizes[:, place])
        counts[value] = Tally(prediction_size, reference_size, both_size, (extents[0], extents[1], extents[2]))
    return counts


def _narrowed(
    maps: Sequence[Integer[np.ndarray, "x y z"]], values: Sequence[int]
) -> tuple[list[Integer[np.ndarray, "x y z"]], Int64[np.ndarray, " k"]]:
    """The maps as small unsigned integers of one type, and what stands for each of the sorted ``values`` in them."""
    for dtype, size in _SIZES.items():
        is_narrow = all(labels.dtype == dtype or (labels.min() >= 0 and labels.max() < size) for labels in maps)
        if is_narrow and maps[0].size:
            names = [value if value < size else -1 for value in values]
            return [labels.astype(dtype, copy=False) for labels in maps], np.array(names, dtype=np.int64)
    coded = []
    for labels in maps:
        place = np.searchsorted(values, labels)
        found = np.asarray([*values, -1])[place] == labels
        coded.append(np.where(found, place + 1, 0).astype(np.uint16))
    return coded, np.arange(1, len(values) + 1)


def _extent(seen: Bool[np.ndarray, " n"]) -> slice:
    found = np.flatnonzero(seen)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


@compile_loop(contract=False)
def _count(  # noqa: PLR0917  a compiled loop takes no keywords
    prediction: Integer[np.ndarray, "x y z"],
    reference: Integer[np.ndarray, "x y z"],
    places: UInt16[np.ndarray, " codes"],
    sizes: Int64[np.ndarray, "3 k"],
    seen_x: Bool[np.ndarray, "k x"],
    seen_y: Bool[np.ndarray, "k y"],
    seen_z: Bool[np.ndarray, "k z"],
) -> None:  # pragma: no cover  compiled
    """Add to ``sizes`` the voxels in the prediction, in the reference and in both; place 0 collects what is neither."""
    depth = prediction.shape[2]
    for x in range(prediction.shape[0]):
        for y in range(prediction.shape[1]):
            start = 0
            while start < depth:
                first, second = prediction[x, y, start], reference[x, y, start]
                stop = start + 1
                while stop < depth and prediction[x, y, stop] == first and reference[x, y, stop] == second:
                    stop += 1
                p, r = places[first], places[second]
                if p or r:
                    sizes[0, p] += stop - start
                    sizes[1, r] += stop - start
                    if p == r:
                        sizes[2, p] += stop - start
                    seen_x[p, x] = seen_x[r, x] = True
                    seen_y[p, y] = seen_y[r, y] = True
                    seen_z[p, start:stop] = True
                    seen_z[r, start:stop] = True
                start = stop
