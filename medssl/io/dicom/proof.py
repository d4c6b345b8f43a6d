"""Proof that frames make one regular grid in the patient, from their positions and directions alone.

Slice distance and slant come from the positions; tags that claim a distance are only compared with them. Positions may
leave the regular grid by 1 % of the step and by no more than 0.05 mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from medssl.errors import GeometryError
from medssl.geometry import Geometry
from medssl.io.dicom.model import Frame, Stack

_LENGTH_TOLERANCE = 0.01
_ORTHOGONALITY_TOLERANCE = 1e-3
_STEP_SHARE = 0.01
_STEP_TOLERANCE_MM = 0.05
_STEEPEST_TILT_DEG = 60.0
_MOST_SLICES_PER_FRAME = 4
_LISTED = 3

_RAS_FROM_LPS = np.array([-1.0, -1.0, 1.0])
_Array = NDArray[np.float64]


def axes(frame: Frame, *, where: str) -> tuple[Float64[np.ndarray, " 3"], ...]:
    """Unit vectors (LPS) along a row, along a column, and of the normal, their cross product.

    Args:
        frame: With an orientation.
        where: Object named in a refusal.

    Raises:
        GeometryError: E_IOP, if the directions are not unit vectors within 1 %, or not at a right angle within 0.001.
    """
    row, column = np.asarray(frame.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if not (np.abs(lengths - 1) <= _LENGTH_TOLERANCE).all():
        raise GeometryError(
            f"{where}: ImageOrientationPatient has directions of length {lengths[0]:.4g} and {lengths[1]:.4g}; both "
            "must be 1. Export the series again.",
            code="E_IOP",
        )
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > _ORTHOGONALITY_TOLERANCE:
        raise GeometryError(
            f"{where}: ImageOrientationPatient has directions at {np.degrees(np.arccos(row @ column)):.2f} degrees; "
            "90 are needed. Export the series again.",
            code="E_IOP",
        )
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def heights(frames: Sequence[Frame], *, where: str) -> Float64[np.ndarray, " n"]:
    """Position of each frame along the normal of the first, mm."""
    normal = axes(frames[0], where=where)[2]
    result: _Array = _positions(frames) @ normal
    return result


def same_place_mm(sorted_heights: Float64[np.ndarray, " n"]) -> float:
    """Distance up to which two of these heights, ascending, count as one place: 1 % of the usual step."""
    steps = np.diff(sorted_heights)
    steps = steps[steps > _STEP_TOLERANCE_MM * _STEP_SHARE]
    return _tolerance(float(np.median(steps))) if steps.size else _STEP_TOLERANCE_MM * _STEP_SHARE


def prove(frames: Sequence[Frame], *, where: str, what: str = "", regularise: bool = False) -> Stack:
    """Order frames of one orientation, matrix and pixel spacing by place, and prove that the slices are evenly spaced.

    Args:
        frames: At least one, with position and orientation.
        where: Object named in a refusal.
        what: As in :class:`Stack`.
        regularise: Put slices with gaps or uneven distances on a regular grid of the smallest step.

    Returns:
        Stack whose third array axis ascends along the normal.

    Raises:
        GeometryError: E_IOP, E_SPACING, E_NO_GEOMETRY, E_DUP_POSITION, E_MISSING_SLICE or E_NONUNIFORM.
    """
    if len(frames) == 1:
        return single(frames[0], where=where, what=what)
    row, column, normal = axes(frames[0], where=where)
    spacing = _spacing(frames[0], where=where)
    height = _positions(frames) @ normal
    order = np.argsort(height, kind="stable")
    ordered = tuple(frames[i] for i in order)
    height, positions = height[order], _positions(ordered)
    _check_directions(ordered, where=where)
    _check_distinct(ordered, height, where=where)
    span = positions[-1] - positions[0]
    _check_slant(span, normal, where=where)
    sideways = positions - positions[0] - np.outer((height - height[0]) / (height[-1] - height[0]), span)
    if np.abs(sideways).max() > _tolerance(float(np.diff(height).min())):
        raise GeometryError(
            f"{where}: slices are shifted within their own plane by up to {np.abs(sideways).max():.3g} mm; they must "
            "lie on one straight line. Export the series again, or leave out the odd slices.",
            code="E_NONUNIFORM",
        )
    count, places = len(ordered), None
    even = (height[-1] - height[0]) / (count - 1)
    warnings: tuple[str, ...] = ()
    gaps: tuple[int, ...] = ()
    if np.abs(height - height[0] - even * np.arange(count)).max() > _tolerance(even):
        error, count = _uneven(height, where=where)
        if not regularise or count > _MOST_SLICES_PER_FRAME * len(ordered):
            raise error
        even = (height[-1] - height[0]) / (count - 1)
        places = (height - height[0]) / even
        near = np.round(places)
        taken = set(near[np.abs(places - near) <= _STEP_SHARE].astype(int).tolist())
        gaps = tuple(k for k in range(count) if k not in taken)
        warnings = (
            f"W_REGULARISED: {len(ordered)} unevenly spaced slices were put on a grid of {count} slices, "
            f"{even:.4g} mm apart; {len(gaps)} of them are interpolated.",
        )
    geometry = _geometry(ordered[0], (row * spacing[1], column * spacing[0], span / (count - 1)), count)
    return Stack(
        frames=ordered,
        geometry=geometry,
        what=what,
        warnings=(*warnings, *_tilt(span, normal), *_claims(ordered, even)),
        gaps=gaps,
        places=None if places is None else tuple(places.tolist()),
    )


def single(frame: Frame, *, where: str, what: str = "") -> Stack:
    """One frame as a 2D image; in the patient where the file says so, else at the corner of a plane of its own.

    Args:
        frame: With or without position, orientation and spacing.
        where: Object named in a refusal.
        what: As in :class:`Stack`.

    Raises:
        GeometryError: E_IOP or E_SPACING.
    """
    warnings: tuple[str, ...] = ()
    if frame.spacing_mm is None:
        warnings = ("W_NO_SPACING: the file does not say how large a pixel is; 1 mm is assumed.",)
        spacing = (1.0, 1.0)
    else:
        spacing = _spacing(frame, where=where)
    if frame.position_mm is None or frame.orientation is None:
        geometry = Geometry((frame.columns, frame.rows, 1), np.diag([-spacing[1], -spacing[0], 1.0, 1.0]))
    else:
        row, column, normal = axes(frame, where=where)
        _positions([frame])
        thickness = frame.thickness_mm if frame.thickness_mm and frame.thickness_mm > 0 else 1.0
        geometry = _geometry(frame, (row * spacing[1], column * spacing[0], normal * thickness), 1)
    return Stack(frames=(frame,), geometry=geometry, what=what, warnings=warnings)


def _positions(frames: Sequence[Frame]) -> _Array:
    positions = np.array([frame.position_mm for frame in frames], dtype=np.float64)
    if not np.isfinite(positions).all():
        raise GeometryError(
            f"{frames[0].path}: ImagePositionPatient is not three numbers. Export the series again.",
            code="E_NO_GEOMETRY",
        )
    return positions


def _spacing(frame: Frame, *, where: str) -> tuple[float, float]:
    if frame.spacing_mm is None:
        raise GeometryError(
            f"{where}: there is no PixelSpacing; slices with a position need one. Export the series again.",
            code="E_NO_GEOMETRY",
        )
    if not (np.isfinite(frame.spacing_mm).all() and min(frame.spacing_mm) > 0):
        raise GeometryError(
            f"{where}: the pixel spacing is {frame.spacing_mm[0]:g} x {frame.spacing_mm[1]:g} mm; two positive numbers "
            "are needed. Repair PixelSpacing.",
            code="E_SPACING",
        )
    return frame.spacing_mm


def _check_directions(frames: Sequence[Frame], *, where: str) -> None:
    """Corners of a slice may not leave the common direction by more than slices may leave their place."""
    turned = {frame.orientation for frame in frames}
    if len(turned) == 1:
        return
    spacing = frames[0].spacing_mm or (1.0, 1.0)
    extent = np.repeat([frames[0].columns * spacing[1], frames[0].rows * spacing[0]], 3)
    off = np.abs(np.array(list(turned), dtype=np.float64) - np.asarray(frames[0].orientation)) * extent
    if off.max() > _STEP_TOLERANCE_MM:
        raise GeometryError(
            f"{where}: slices are turned against each other, by {off.max():.3g} mm at the far corner; "
            f"{_STEP_TOLERANCE_MM} mm are allowed. Export the series again.",
            code="E_IOP",
        )


def _check_distinct(frames: Sequence[Frame], height: _Array, *, where: str) -> None:
    steps = np.diff(height)
    mean = (height[-1] - height[0]) / steps.size
    close = np.flatnonzero(steps <= max(_STEP_SHARE * mean, 1e-6))
    if not close.size:
        return
    first = int(close[0])
    raise GeometryError(
        f"{where}: {close.size + 1} slices lie at places that are taken, the first {height[first]:.2f} mm along the "
        f"normal ({frames[first].path.name} and {frames[first + 1].path.name}); one slice a place is needed. "
        "Keep one of them.",
        code="E_DUP_POSITION",
    )


def _check_slant(span: _Array, normal: _Array, *, where: str) -> None:
    angle = _slant_deg(span, normal)
    if angle > _STEEPEST_TILT_DEG:
        raise GeometryError(
            f"{where}: positions leave the normal of the slices by {angle:.0f} degrees; at most "
            f"{_STEEPEST_TILT_DEG:.0f} are a tilted gantry. Export the series again.",
            code="E_IOP",
        )


def _slant_deg(span: _Array, normal: _Array) -> float:
    along = abs(float(span @ normal))
    return float(np.degrees(np.arctan2(np.linalg.norm(span - (span @ normal) * normal), along)))


def _uneven(height: _Array, *, where: str) -> tuple[GeometryError, int]:
    """What is wrong with uneven heights, and the number of slices of a regular grid that covers them."""
    steps = np.diff(height)
    unit = float(np.median(steps[steps <= steps.min() + _tolerance(float(steps.min()))]))
    counts = np.maximum(1, np.round(steps / unit))
    slices = int(counts.sum()) + 1
    unit = (height[-1] - height[0]) / (slices - 1)
    places = np.concatenate([[0], np.cumsum(counts)])
    fits = np.abs(height - height[0] - unit * places).max() <= _tolerance(unit)
    if fits and (counts > 1).sum() <= (counts == 1).sum():
        missing = sorted(set(range(slices)) - set(places.astype(int).tolist()))
        listed = ", ".join(f"{height[0] + unit * k:.2f}" for k in missing[:_LISTED])
        more = ", ..." if len(missing) > _LISTED else ""
        return GeometryError(
            f"{where}: {len(missing)} of {slices} slices missing, at {listed}{more} mm along the normal (step "
            f"{unit:.4g} mm). {_advice(slices, height.size)}",
            code="E_MISSING_SLICE",
        ), slices
    finest = round((height[-1] - height[0]) / float(steps.min())) + 1
    return GeometryError(
        f"{where}: slice distances vary from {steps.min():.4g} to {steps.max():.4g} mm over {height.size} slices; one "
        f"distance is needed. {_advice(finest, height.size)}",
        code="E_NONUNIFORM",
    ), finest


def _advice(slices: int, present: int) -> str:
    """What helps where ``present`` slices lie on a grid of ``slices``."""
    if slices > _MOST_SLICES_PER_FRAME * present:
        return "Export the series again."
    return "Export them again, or read with --regularise to interpolate them."


def _tilt(span: _Array, normal: _Array) -> tuple[str, ...]:
    if np.linalg.norm(span - (span @ normal) * normal) <= _STEP_TOLERANCE_MM:
        return ()
    return (
        f"W_TILT: the slices lean by {_slant_deg(span, normal):.2f} degrees (gantry tilt); the sheared grid is kept.",
    )


def _claims(frames: Sequence[Frame], step: float) -> tuple[str, ...]:
    """Slice distance as the tags claim it; thickness counts only where no distance is given."""
    for name, values in (
        ("SpacingBetweenSlices", {abs(frame.between_mm) for frame in frames if frame.between_mm}),
        ("SliceThickness", {abs(frame.thickness_mm) for frame in frames if frame.thickness_mm}),
    ):
        wrong = [value for value in values if abs(value - step) > _STEP_SHARE * step]
        if wrong:
            return (
                f"W_SPACING_TAG: {name} says {wrong[0]:.4g} mm, the positions {step:.4g} mm; the positions are used.",
            )
        if values:
            break
    return ()


def _geometry(first: Frame, columns: tuple[Any, ...], slices: int) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.stack(columns, axis=1)
    affine[:3, 3] = first.position_mm
    affine[:3] *= _RAS_FROM_LPS[:, None]
    return Geometry((first.columns, first.rows, slices), affine)


def _tolerance(step: float) -> float:
    return min(_STEP_SHARE * abs(step), _STEP_TOLERANCE_MM) + 1e-9
