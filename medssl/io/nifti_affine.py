"""Where the voxels of a NIfTI file lie: q-form, s-form, pixdim and units brought to one affine, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Float64

from medssl.errors import GeometryError
from medssl.io.values import checked_grid

Xform = Literal["sform", "qform"]
Header = Any  # nibabel publishes no types

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_CONFLICT_MM = 0.1
_QUATERNION_ROUNDING = 4 * float(np.finfo(np.float32).eps)


def world_affine(
    header: Header,
    shape: tuple[int, int, int],
    *,
    path: Path,
    xform: Xform | None,
    assume_spacing_mm: tuple[float, float, float] | None,
) -> tuple[Float64[np.ndarray, "4 4"], tuple[str, ...]]:
    """Give the one transform that the header means, in mm, and what was assumed to find it.

    Args:
        header: Of nibabel.
        shape: Voxels along the three spatial axes.
        path: For messages.
        xform: Which transform wins where both are set and disagree.
        assume_spacing_mm: Spacing to use where the header has none.

    Raises:
        GeometryError: E_AFFINE, E_SPACING or E_XFORM_CONFLICT.
    """
    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    assumed = None if assume_spacing_mm is None else np.array(assume_spacing_mm) / scale
    header, warnings = _with_spacing(header, path=path, assumed=assumed)
    if scale != 1:
        warnings += (f"W_UNITS: positions in {'metres' if scale > 1 else 'micrometres'} were converted to mm.",)

    def matrix(get: Callable[[], np.ndarray[Any, Any]]) -> Float64[np.ndarray, "4 4"]:
        try:
            affine = np.array(get(), dtype=np.float64)
        except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
            raise GeometryError(f"{path}: the qform is no rotation. Repair the header.", code="E_AFFINE") from error
        affine[:3] *= scale
        return affine

    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        return matrix(header.get_base_affine), (
            *warnings,
            "W_NO_XFORM: no orientation is stored; left-right, front-back and head-foot are a guess.",
        )
    if has_sform and has_qform and xform is None:
        sform, qform = matrix(header.get_sform), matrix(header.get_qform)
        grid, _ = checked_grid(shape, sform, path=path)
        qform[:3, :3] = _unrounded(header, qform[:3, :3], sform[:3, :3])
        apart = grid.max_corner_distance_mm(checked_grid(shape, qform, path=path)[0])
        _check_conflict(apart, "sform and qform", path=path)
        return sform, warnings
    if has_qform and (xform == "qform" or not has_sform):
        return matrix(header.get_qform), warnings
    sform = matrix(header.get_sform)
    if xform is None:
        lengths = checked_grid(shape, sform, path=path)[0].spacing_mm
        pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64) * scale
        apart = float((np.abs(lengths - pixdim) * (np.array(shape) - 1)).max())
        _check_conflict(apart, "sform and pixdim", path=path)
    return sform, warnings


def _unrounded(
    header: Header, qform: Float64[np.ndarray, "3 3"], sform: Float64[np.ndarray, "3 3"]
) -> Float64[np.ndarray, "3 3"]:
    """Axes of the q-form, turned as the s-form says where both are the same but for rounding.

    A q-form stores three of the four numbers of a rotation as float32. Near half a turn, as in most axial series with a
    little tilt, the fourth follows from them with an error that moves a far corner by up to 1 mm.
    """
    lengths = np.linalg.norm(sform, axis=0)
    axes = sform / lengths
    rotation = axes * (1, 1, np.sign(np.linalg.det(axes)))
    stored = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    exact = nibabel.quaternions.mat2quat(rotation)[1:]
    is_same = min(np.abs(exact - stored).max(), np.abs(exact + stored).max()) <= _QUATERNION_ROUNDING
    is_same = is_same and np.linalg.det(qform) * np.linalg.det(sform) > 0
    return axes * np.linalg.norm(qform, axis=0) if is_same else qform


def _check_conflict(apart_mm: float, which: str, *, path: Path) -> None:
    if apart_mm > _CONFLICT_MM:
        raise GeometryError(
            f"{path}: {which} put a corner {apart_mm:.3g} mm apart; {_CONFLICT_MM} mm is allowed. "
            "Find out which is right and choose it with xform sform or qform.",
            code="E_XFORM_CONFLICT",
        )


def _with_spacing(
    header: Header, *, path: Path, assumed: Float64[np.ndarray, " 3"] | None
) -> tuple[Header, tuple[str, ...]]:
    """Header whose first three spacings are positive numbers; ``assumed`` is in the header's unit."""
    header = header.copy()
    pixdim = np.array(header["pixdim"][1:4], dtype=np.float64)
    warnings: tuple[str, ...] = ()
    dimensions = int(header["dim"][0])
    unused = np.arange(3) >= dimensions
    if unused.any():
        pixdim[unused & ~(np.isfinite(pixdim) & (pixdim > 0))] = 1
    bad = ~np.isfinite(pixdim) | (pixdim == 0)
    if bad.any():
        if assumed is None:
            raise GeometryError(
                f"{path}: pixdim {pixdim.tolist()}; positive spacings in mm are needed. "
                "Repair the header or say which spacing to assume.",
                code="E_SPACING",
            )
        pixdim[bad] = assumed[bad]
        warnings += (
            f"W_SPACING_ASSUMED: spacing {assumed[bad].tolist()} was assumed for axes {np.flatnonzero(bad).tolist()}.",
        )
    if (pixdim < 0).any():
        warnings += (f"W_PIXDIM: negative spacing {pixdim.tolist()} was taken as positive.",)
    if header["pixdim"][0] not in {-1, 1}:
        header["pixdim"][0] = 1  # by the standard 0 means 1; other values mean nothing
    header["pixdim"][1:4] = np.abs(pixdim)
    return header, warnings
