"""A voxel grid in words that a person who never heard of an affine understands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from medssl.geometry import Geometry

_PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "R": "sagittal", "L": "sagittal"}
_RUNS = {
    "S": "from feet to head",
    "I": "from head to feet",
    "A": "from back to front",
    "P": "from front to back",
    "R": "from left to right",
    "L": "from right to left",
}
_STRAIGHT_DEG = 0.05
_THICKER = 1.05


def slice_axis(spacing_mm: Sequence[float]) -> int:
    """Array axis along which slices are counted: the one with the clearly largest step, else the third."""
    widest = max(range(3), key=lambda axis: spacing_mm[axis])
    return widest if spacing_mm[widest] > _THICKER * spacing_mm[2] else 2


def slices_in_words(orientation: str, *, axis: int = 2) -> str:
    """Plane and order of the slices along one array axis: ``axial slices from feet to head`` for RAS."""
    letter = orientation[axis]
    return f"{_PLANES[letter]} slices {_RUNS[letter]}"


def oblique_deg(geometry: Geometry, *, axis: int = 2) -> float:
    """Angle between the plane of the slices along ``axis`` and the nearest plane of the body, in degrees."""
    return float(np.degrees(np.arccos(min(1.0, np.abs(_normal(geometry, axis)).max()))))


def tilt_deg(geometry: Geometry, *, axis: int = 2) -> float:
    """Angle between the direction in which slices follow each other and their normal, in degrees."""
    cosine = abs(float(_normal(geometry, axis) @ geometry.directions[:, axis]))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def grid_in_words(geometry: Geometry) -> str:
    """Slices, size and voxel size in one sentence, with the angle where the grid is oblique or tilted."""
    x, y, z = geometry.shape
    size = " x ".join(f"{mm:.4g}" for mm in geometry.spacing_mm)
    if z == 1:
        dx, dy, dz = geometry.spacing_mm
        return f"one 2D image of {x} columns and {y} rows, pixels of {dx:.4g} x {dy:.4g} mm, {dz:.4g} mm thick"
    axis = slice_axis(geometry.spacing_mm)
    words = f"{slices_in_words(geometry.orientation, axis=axis)}, {x} x {y} x {z} voxels of {size} mm"
    oblique, tilt = oblique_deg(geometry, axis=axis), tilt_deg(geometry, axis=axis)
    if oblique >= _STRAIGHT_DEG:
        words += f", oblique by {oblique:.1f} degrees"
    if tilt >= _STRAIGHT_DEG:
        words += f", tilted by {tilt:.1f} degrees (each slice is shifted against the one before)"
    return words


def _normal(geometry: Geometry, axis: int) -> Float64[np.ndarray, " 3"]:
    """Unit vector across the plane of the slices along ``axis``."""
    across, along = (geometry.directions[:, other] for other in range(3) if other != axis)
    normal = np.cross(across, along)
    unit: np.ndarray = normal / np.linalg.norm(normal)
    return unit
