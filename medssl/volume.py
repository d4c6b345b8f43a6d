"""An image or a label map on its grid, and the functions that move it to another grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import SimpleITK as sitk  # noqa: N813  the alias of its own documentation
from jaxtyping import Float32, Float64, Int64, Shaped, UInt8, UInt16

from medssl.errors import GeometryError
from medssl.geometry import Geometry

Unit = Literal["HU", "SUV", "arbitrary", "label"]

_AIR_HU = -1024.0
_EXACT_VOXELS = 1e-3
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with the grid that they lie on.

    Args:
        array: Voxels, (C, X, Y, Z); RAS+ world through the geometry's affine.
        geometry: Grid of the array's last three axes.
        unit: ``HU``, ``SUV`` (PET, by body weight), ``arbitrary`` (MR, US, photographs) or ``label``; decides
            interpolation and fill.

    Raises:
        GeometryError: if the array does not fit the grid.
    """

    array: Shaped[np.ndarray, "c x y z"]
    geometry: Geometry
    unit: Unit

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.geometry.shape:
            raise GeometryError(
                f"volume: array of shape {self.array.shape} on a grid of {self.geometry.shape}; "
                "(C, X, Y, Z) with the sizes of the grid is needed.",
                code="E_SHAPE",
            )
        if self.unit not in get_args(Unit):
            raise GeometryError(f"volume: unit {self.unit!r}; one of {get_args(Unit)} is needed.", code="E_UNIT")

    @property
    def default_fill(self) -> float:
        """Value of what lies outside: background 0, no uptake 0, air -1024 HU, or the darkest voxel."""
        if self.unit in {"label", "SUV"}:
            return 0.0
        return _AIR_HU if self.unit == "HU" else float(self.array.min())


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """Permute and flip the array axes to ``orientation``; values and dtype stay bit for bit."""
    geometry = volume.geometry.reoriented(orientation)
    return Volume(_move(volume.array, volume.geometry, geometry, fill=0.0), geometry, volume.unit)


def reoriented_view(volume: Volume, orientation: str = "RAS") -> Volume:
    """As :func:`reorient`, without a copy: the voxels are those of ``volume``."""
    geometry = volume.geometry.reoriented(orientation)
    matrix = np.round(geometry.index_map(volume.geometry)).astype(np.int64)
    return Volume(_turned(volume.array, matrix), geometry, volume.unit)


def crop(volume: Volume, start: Sequence[int], shape: Sequence[int], *, fill: float | None = None) -> Volume:
    """Cut the box that begins at voxel ``start``; what lies outside the volume is padded.

    Args:
        volume: Source.
        start: First voxel (3,); negative begins before the volume.
        shape: Size of the box in voxels (3,); may reach beyond the end.
        fill: Value of the padding; by default background, air, or the darkest voxel.
    """
    geometry = volume.geometry.cropped(start, shape)
    value = volume.default_fill if fill is None else fill
    return Volume(_window(volume.array, start, geometry.shape, fill=value), geometry, volume.unit)


def respace(volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Resample to another spacing, with the same directions and the same middle of the field of view."""
    return resample_to(volume, volume.geometry.respaced(spacing_mm))


def resample_to(volume: Volume, geometry: Geometry, *, fill: float | None = None) -> Volume:
    """Sample a volume on another grid; the same function leads forth and back.

    Images are interpolated linearly, label maps take the nearest voxel. A grid that differs only by flips,
    permutations and whole voxels is reached by moving voxels, bit for bit.

    Args:
        volume: Source.
        geometry: Target grid; oblique, left-handed and sheared grids are welcome.
        fill: Value outside the source's field of view; by default background, air, or the darkest voxel.

    Returns:
        Volume on ``geometry``: labels in their own dtype, images in float32.
    """
    value = volume.default_fill if fill is None else fill
    is_label = volume.unit == "label"
    source = volume.array if is_label else volume.array.astype(np.float32, copy=False)
    if _is_exact(volume.geometry, geometry):
        return Volume(_move(source, volume.geometry, geometry, fill=value), geometry, volume.unit)
    matrix = geometry.index_map(volume.geometry)
    result = np.empty((source.shape[0], *geometry.shape), dtype=source.dtype)
    for channel, voxels in enumerate(source):
        result[channel] = _interpolate(voxels, matrix, geometry.shape, linear=not is_label, fill=value)
    return Volume(result, geometry, volume.unit)


def resample_argmax(
    scores: Float32[np.ndarray, "k x y z"], source: Geometry, target: Geometry, *, background: int = 0
) -> UInt8[np.ndarray, "a b c"] | UInt16[np.ndarray, "a b c"]:
    """Take class scores to another grid linearly and give the best class at each voxel.

    One class at a time with a running maximum, so that memory does not grow with the number of classes. Equal scores
    go to the lower class.

    Args:
        scores: One score map a class, on ``source``.
        source: Grid of the scores.
        target: Grid of the result.
        background: Class of voxels outside the source's field of view.

    Returns:
        Index of the best class, uint8, or uint16 for more than 256 classes; shape of ``target``.
    """
    if scores.ndim != 4 or scores.shape[1:] != source.shape:
        raise GeometryError(
            f"scores: shape {scores.shape} on a grid of {source.shape}; (classes, X, Y, Z) is needed.", code="E_SHAPE"
        )
    dtype = np.uint8 if scores.shape[0] <= 256 else np.uint16
    labels = np.full(target.shape, background, dtype=dtype)
    best = np.full(target.shape, _LOWEST, dtype=np.float32)
    exact, matrix = _is_exact(source, target), target.index_map(source)
    for index, score in enumerate(scores):
        if exact:
            moved = _move(score[None], source, target, fill=_LOWEST)[0]
        else:
            moved = _interpolate(score, matrix, target.shape, linear=True, fill=_LOWEST)
        better = moved > best
        labels[better] = index
        np.copyto(best, moved, where=better)
    return labels


def _is_exact(source: Geometry, target: Geometry) -> bool:
    """Whether every target voxel centre is a source voxel centre, to a thousandth of a voxel."""
    matrix = target.index_map(source)
    rounded = np.round(matrix)
    if not np.array_equal(np.abs(rounded[:3, :3]).sum(axis=0), (1, 1, 1)):
        return False
    if not np.array_equal(np.abs(rounded[:3, :3]).sum(axis=1), (1, 1, 1)):
        return False
    error = np.abs(matrix - rounded)[:3]
    return bool((error[:, :3] @ np.array(target.shape) + error[:, 3]).max() < _EXACT_VOXELS)


def _move(
    array: Shaped[np.ndarray, "c x y z"], source: Geometry, target: Geometry, *, fill: float
) -> Shaped[np.ndarray, "c a b d"]:
    """Reach ``target`` by permuting, flipping and cutting; the caller has checked that this is all it takes."""
    matrix = np.round(target.index_map(source)).astype(np.int64)
    axes = np.abs(matrix[:3, :3]).argmax(axis=0)
    moved = _turned(array, matrix)
    start = matrix[axes, 3]
    last = np.array(moved.shape[1:]) - 1
    start = np.where(matrix[axes, range(3)] < 0, last - start, start)
    return _window(moved, start.tolist(), target.shape, fill=fill)


def _turned(array: Shaped[np.ndarray, "c x y z"], matrix: Int64[np.ndarray, "4 4"]) -> Shaped[np.ndarray, "c a b d"]:
    """View with the axes permuted and flipped as ``matrix``, from target to source voxel, says."""
    axes = np.abs(matrix[:3, :3]).argmax(axis=0)
    flips = tuple(axis + 1 for axis, origin in enumerate(axes) if matrix[origin, axis] < 0)
    return np.flip(array.transpose(0, *(axes + 1)), flips)


def _window(
    array: Shaped[np.ndarray, "c x y z"], start: Sequence[int], shape: Sequence[int], *, fill: float
) -> Shaped[np.ndarray, "c a b d"]:
    """A contiguous copy of a box that may reach outside the array."""
    size = np.array(array.shape[1:])
    low = np.clip(start, 0, size)
    high = np.clip(np.add(start, shape), low, size)
    inside = array[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    if inside.shape[1:] == tuple(shape):
        return np.array(inside, order="C")
    result = np.full((array.shape[0], *shape), fill, dtype=array.dtype)
    a, b, c = (low - np.array(start)).clip(0, shape).tolist()
    dx, dy, dz = inside.shape[1:]
    result[:, a : a + dx, b : b + dy, c : c + dz] = inside
    return result


def _interpolate(
    voxels: Shaped[np.ndarray, "x y z"],
    matrix: Float64[np.ndarray, "4 4"],
    shape: tuple[int, int, int],
    *,
    linear: bool,
    fill: float,
) -> np.ndarray[Any, Any]:
    """Sample in index space, where shear and obliqueness are just a matrix; ``matrix`` leads target -> source.

    ITK keeps the first axis fastest, so the array goes in as it lies in memory and the matrix is reversed instead.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[2::-1, 2::-1].ravel().tolist())
    transform.SetTranslation(matrix[2::-1, 3].tolist())
    sampler = sitk.ResampleImageFilter()
    sampler.SetSize([int(n) for n in shape[::-1]])
    sampler.SetTransform(transform)
    sampler.SetInterpolator(sitk.sitkLinear if linear else sitk.sitkNearestNeighbor)
    sampler.SetDefaultPixelValue(fill)
    return sitk.GetArrayFromImage(sampler.Execute(image))
