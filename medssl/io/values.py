"""Rules for voxel values and grids that hold for every format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8

from medssl.errors import CaseError, GeometryError
from medssl.geometry import Geometry
from medssl.volume import Unit

_MOST_NONFINITE = 0.05
_LABEL_TOLERANCE = 1e-3
_FLOAT32_INTEGERS = 2**24
_SPACING_MM = (0.01, 50.0)
_SLAB_VOXELS = 1 << 17
_FAR_MM = 1e5  # float32, as NIfTI stores positions, is coarser than 0.004 mm from here on


def checked_grid(
    shape: tuple[int, ...], affine: Shaped[np.ndarray, "4 4"], *, path: Path
) -> tuple[Geometry, tuple[str, ...]]:
    """Grid of a file, or a refusal that names the file.

    Raises:
        GeometryError: E_AFFINE, E_SHAPE, or E_SPACING outside 0.01 to 50 mm along an axis of several voxels.
    """
    x, y, z = shape
    try:
        geometry = Geometry((x, y, z), affine)
    except GeometryError as error:
        raise GeometryError(f"{path}: {error.message}", code=error.code) from error
    low, high = _SPACING_MM
    for count, spacing in zip(geometry.shape, geometry.spacing_mm, strict=True):
        if count > 1 and not low <= spacing <= high:
            raise GeometryError(
                f"{path}: spacing {spacing:.4g} mm; {low} to {high} mm is plausible. Repair the header or its unit.",
                code="E_SPACING",
            )
    far = float(np.abs(geometry.corners_mm()).max())
    if far > _FAR_MM:
        return geometry, (f"W_ORIGIN: the grid lies {far:.3g} mm from the origin, where NIfTI loses precision.",)
    return geometry, ()


def chosen_volumes(count: int, *, volume: int | Literal["channels"] | None, path: Path) -> range:
    """Which of the ``count`` volumes of a file become the channels of the result.

    Args:
        count: Volumes along the fourth axis.
        volume: Number of the one to take, ``channels`` for all of them, None where there is but one.
        path: For messages.

    Raises:
        CaseError: E_NDIM if there are several and none was chosen, E_VOLUME if there is none of that number.
    """
    if volume == "channels" or (volume is None and count == 1):
        return range(count)
    if volume is None:
        raise CaseError(
            f"{path}: holds {count} volumes, and one is read. Choose it with --volume, 0 to {count - 1}, or take all "
            "as channels with --volume channels; in a scan, say --volumes all, middle or channels.",
            code="E_NDIM",
        )
    if not 0 <= volume < count:
        raise CaseError(
            f"{path}: has no volume {volume}; its volumes are 0 to {count - 1}. Choose one of these.", code="E_VOLUME"
        )
    return range(volume, volume + 1)


def native_voxels(
    data: bytes | memoryview | UInt8[np.ndarray, " n"], dtype: np.dtype[Any], *, count: int, offset: int = 0
) -> Shaped[np.ndarray, " count"]:
    """``count`` voxels of type ``dtype`` from byte ``offset`` on: aligned, in native byte order, free to be changed.

    Bytes that may be written to are used as they are; their owner gives them up.
    """
    stored = np.frombuffer(data, dtype, count=count, offset=offset)
    native = dtype.newbyteorder("=")
    if not (stored.flags.writeable and stored.flags.aligned):
        return stored.astype(native)
    return stored if dtype.isnative else stored.byteswap(inplace=True).view(native)


def slabs(array: Shaped[np.ndarray, "*axes z"]) -> Iterator[slice]:
    """Ranges of the last axis that hold some 100,000 voxels each, for work that must not take the room of a volume."""
    depth = array.shape[-1]
    step = max(1, _SLAB_VOXELS * depth // max(1, array.size))
    return (slice(start, start + step) for start in range(0, depth, step))


def finite_range(array: Shaped[np.ndarray, "*axes z"]) -> tuple[float, float, int]:
    """Smallest and largest finite value, and the number of voxels that are NaN or infinite."""
    low, high, bad = float(array.min()), float(array.max()), 0
    if np.isfinite([low, high]).all():
        return low, high, bad
    low, high = np.inf, -np.inf
    for slab in slabs(array):
        finite = array[..., slab][np.isfinite(array[..., slab])]
        bad += array[..., slab].size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high, bad


def check_float32(largest: float, *, path: Path) -> None:
    """Refuse values beyond those of 32-bit floats.

    Raises:
        CaseError: E_RANGE.
    """
    if largest > float(np.finfo(np.float32).max):
        raise CaseError(
            f"{path}: values up to {largest:.3g}; float32 ends at 3.4e38. Rescale the image.", code="E_RANGE"
        )


def checked_values(
    array: Shaped[np.ndarray, "c x y z"], *, unit: Unit, path: Path
) -> tuple[Shaped[np.ndarray, "c x y z"], tuple[str, ...]]:
    """Voxels by the rules of their unit.

    Images keep integers of up to 32 bits and become float32 otherwise; voxels that are not finite take the smallest
    finite value. Label maps become the smallest of uint8, uint16 and int32 that holds them; several channels are
    overlapping classes, each 0 or 1. The array may be changed in place.

    Raises:
        CaseError: E_NONFINITE, E_RANGE, E_LABEL_VALUE or E_NDIM.
    """
    if unit == "label":
        return _label(array, path=path), ()
    return _float(array, path=path) if array.dtype.kind == "f" else (_integer(array, path=path), ())


def label_dtype(maximum: int) -> type[np.uint8] | type[np.uint16] | type[np.int32]:
    """Smallest of uint8, uint16 and int32 that holds labels 0 to ``maximum``."""
    if maximum <= np.iinfo(np.uint8).max:
        return np.uint8
    return np.uint16 if maximum <= np.iinfo(np.uint16).max else np.int32


def _integer(array: Shaped[np.ndarray, "c x y z"], *, path: Path) -> Shaped[np.ndarray, "c x y z"]:
    if array.dtype.itemsize <= 4:
        return array
    low, high = int(array.min()), int(array.max())
    limits = np.iinfo(np.int32)
    if low < limits.min or high > limits.max:
        raise CaseError(
            f"{path}: values from {low} to {high}; 32-bit integers are the most. Rescale the image.", code="E_RANGE"
        )
    return array.astype(np.int32)


def _float(
    array: Shaped[np.ndarray, "c x y z"], *, path: Path
) -> tuple[Shaped[np.ndarray, "c x y z"], tuple[str, ...]]:
    low, high, bad = finite_range(array)
    if bad > _MOST_NONFINITE * array.size:
        raise CaseError(
            f"{path}: {bad} of {array.size} voxels are NaN or infinite; at most 5 % may be. Repair the image.",
            code="E_NONFINITE",
        )
    check_float32(max(-low, high), path=path)
    if not bad:
        return array.astype(np.float32, copy=False), ()
    repaired = array.astype(np.float32, copy=not array.flags.writeable)
    for slab in slabs(repaired):
        np.copyto(repaired[..., slab], low, where=~np.isfinite(repaired[..., slab]))
    return repaired, (f"W_NONFINITE: {bad} voxels that are NaN or infinite were set to {low:.6g}.",)


def _label(array: Shaped[np.ndarray, "c x y z"], *, path: Path) -> Shaped[np.ndarray, "c x y z"]:
    if array.dtype.kind == "f":
        low, high = _whole_range(array, path=path)
    else:
        low, high = int(array.min()), int(array.max())
    if low < 0:
        raise CaseError(f"{path}: label value {low}; labels begin at 0. Renumber them.", code="E_LABEL_VALUE")
    most = np.iinfo(np.int32).max if array.dtype != np.float32 else _FLOAT32_INTEGERS
    if high > most:
        raise CaseError(f"{path}: label value {high}; {most} is the most. Renumber the labels.", code="E_RANGE")
    if array.shape[0] != 1 and high > 1:
        raise CaseError(
            f"{path}: label map of {array.shape[0]} channels with values up to {high}; "
            "one channel of label numbers, or channels of 0 and 1 for overlapping classes, are needed.",
            code="E_NDIM",
        )
    if array.dtype.kind != "f":
        return array.astype(label_dtype(high), copy=False)
    labels = np.empty_like(array, dtype=label_dtype(high))
    for slab in slabs(array):
        labels[..., slab] = np.rint(array[..., slab])
    return labels


def _whole_range(array: Shaped[np.ndarray, "c x y z"], *, path: Path) -> tuple[int, int]:
    """Smallest and largest label of floats that are whole numbers but for rounding."""
    low, high = np.inf, -np.inf
    for slab in slabs(array):
        values = array[..., slab]
        if not np.isfinite(values).all():
            raise CaseError(f"{path}: a label map with NaN or infinite voxels. Repair the label.", code="E_NONFINITE")
        nearest = np.rint(values)
        error = float(np.abs(values - nearest).max())
        if error > _LABEL_TOLERANCE:
            raise CaseError(
                f"{path}: label values up to {error:.3g} away from a whole number; 0.001 is allowed. "
                "Give a label map, not a probability or a resampled image.",
                code="E_LABEL_VALUE",
            )
        low, high = min(low, float(nearest.min())), max(high, float(nearest.max()))
    return int(low), int(high)
