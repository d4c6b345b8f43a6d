"""Rules for voxel values and grids that hold for every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from medssl.errors import CaseError, GeometryError
from medssl.geometry import Geometry
from medssl.volume import Unit

_MOST_NONFINITE = 0.05
_LABEL_TOLERANCE = 1e-3
_FLOAT32_INTEGERS = 2**24
_SPACING_MM = (0.01, 50.0)
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


def checked_values(
    array: Shaped[np.ndarray, "c x y z"], *, unit: Unit, path: Path
) -> tuple[Shaped[np.ndarray, "c x y z"], tuple[str, ...]]:
    """Voxels by the rules of their unit.

    Images keep integers of up to 32 bits and become float32 otherwise; voxels that are not finite take the smallest
    finite value. Label maps become the smallest of uint8, uint16 and int32 that holds them.

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
    finite = np.isfinite(array)
    bad = int(array.size - np.count_nonzero(finite))
    if bad > _MOST_NONFINITE * array.size:
        raise CaseError(
            f"{path}: {bad} of {array.size} voxels are NaN or infinite; at most 5 % may be. Repair the image.",
            code="E_NONFINITE",
        )
    largest = float(np.abs(array, where=finite, out=np.zeros_like(array)).max())
    if largest > float(np.finfo(np.float32).max):
        raise CaseError(
            f"{path}: values up to {largest:.3g}; float32 ends at 3.4e38. Rescale the image.", code="E_RANGE"
        )
    if not bad:
        return array.astype(np.float32, copy=False), ()
    fill = float(array[finite].min())
    repaired = np.where(finite, array, fill).astype(np.float32)
    return repaired, (f"W_NONFINITE: {bad} voxels that are NaN or infinite were set to {fill:.6g}.",)


def _label(array: Shaped[np.ndarray, "c x y z"], *, path: Path) -> Shaped[np.ndarray, "c x y z"]:
    if array.shape[0] != 1:
        raise CaseError(
            f"{path}: label map of {array.shape[0]} channels; one channel of label numbers is needed.", code="E_NDIM"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise CaseError(f"{path}: a label map with NaN or infinite voxels. Repair the label.", code="E_NONFINITE")
        nearest = np.rint(array)
        error = float(np.abs(array - nearest).max())
        if error > _LABEL_TOLERANCE:
            raise CaseError(
                f"{path}: label values up to {error:.3g} away from a whole number; 0.001 is allowed. "
                "Give a label map, not a probability or a resampled image.",
                code="E_LABEL_VALUE",
            )
        array = nearest
    low, high = int(array.min()), int(array.max())
    if low < 0:
        raise CaseError(f"{path}: label value {low}; labels begin at 0. Renumber them.", code="E_LABEL_VALUE")
    most = np.iinfo(np.int32).max if array.dtype != np.float32 else _FLOAT32_INTEGERS
    if high > most:
        raise CaseError(f"{path}: label value {high}; {most} is the most. Renumber the labels.", code="E_RANGE")
    return array.astype(label_dtype(high))
