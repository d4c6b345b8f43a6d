"""Where a voxel grid lies in the patient: shape and affine, and every change that only moves the grid.

Voxel index (integer = centre of the voxel) times affine gives world millimetres, RAS+: x grows to the patient's right,
y to the front, z to the head. The affine may be oblique, left-handed or sheared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from medssl.errors import GeometryError

_LETTERS = ("LR", "PA", "IS")
_SMALLEST_VOLUME_SHARE = 1e-4
_COVER_TOLERANCE_VOXELS = 0.05


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape and affine of a voxel grid; a value, so that every change gives a new one.

    Args:
        shape: Number of voxels along each array axis (X, Y, Z), each at least 1; a 2D image has Z = 1.
        affine: Voxel index to world mm (RAS+), (4, 4); finite, not singular, last row 0 0 0 1.

    Raises:
        GeometryError: if the shape or the affine breaks these rules.
    """

    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"]

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"grid: shape {shape}; three sizes of at least 1 are needed.", code="E_SHAPE")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or tuple(affine[3]) != (0, 0, 0, 1):
            raise GeometryError(
                "grid: the affine is not a finite 4x4 matrix with last row 0 0 0 1. Repair the header.", code="E_AFFINE"
            )
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if (lengths == 0).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < _SMALLEST_VOLUME_SHARE:
            raise GeometryError(
                f"grid: the affine is singular, axes of length {_mm(lengths)} mm span no volume. Repair the header.",
                code="E_AFFINE",
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Geometry:
        """Read back what :meth:`to_dict` gave."""
        return cls(tuple(data["shape"]), np.array(data["affine"], dtype=np.float64))

    def to_dict(self) -> dict[str, Any]:
        """Shape and affine as lists, ready for JSON; nothing is rounded."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each array axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """World position of the centre of voxel (0, 0, 0)."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def directions(self) -> Float64[np.ndarray, "3 3"]:
        """Unit vectors of the array axes in the world, one a column."""
        directions: np.ndarray = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return directions

    @property
    def orientation(self) -> str:
        """Where each array axis points, nearest of R/L, A/P, S/I; ``RAS`` is the frame of medssl."""
        worlds = _nearest_world_axes(self.directions)
        return "".join(_LETTERS[w][int(self.affine[w, axis] >= 0)] for axis, w in enumerate(worlds))

    @property
    def shear_deg(self) -> float:
        """Largest deviation of two array axes from a right angle, in degrees."""
        cosines = self.directions.T @ self.directions
        return float(np.degrees(np.arcsin(np.clip(np.abs(cosines[np.triu_indices(3, 1)]).max(), 0, 1))))

    @property
    def centre_mm(self) -> Float64[np.ndarray, " 3"]:
        """World position of the middle of the field of view."""
        return self.to_world((np.array(self.shape) - 1) / 2)

    def to_world(self, ijk: ArrayLike) -> Float64[np.ndarray, "*batch 3"]:
        """World mm of voxel indices (..., 3); fractions allowed."""
        points: np.ndarray = np.asarray(ijk, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return points

    def to_index(self, xyz_mm: ArrayLike) -> Float64[np.ndarray, "*batch 3"]:
        """Voxel indices, with fractions, of world points (..., 3) in mm."""
        offsets = np.asarray(xyz_mm, dtype=np.float64) - self.affine[:3, 3]
        indices: np.ndarray = offsets @ np.linalg.inv(self.affine[:3, :3]).T
        return indices

    def index_map(self, other: Geometry) -> Float64[np.ndarray, "4 4"]:
        """Matrix that takes a voxel index of this grid to the index of the same world point in ``other``."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.linalg.solve(other.affine[:3, :3], self.affine[:3, :3])
        matrix[:3, 3] = other.to_index(self.affine[:3, 3])
        return matrix

    def corners_mm(self) -> Float64[np.ndarray, "8 3"]:
        """World positions of the eight outermost voxel centres; the last array axis turns fastest."""
        return self.to_world(list(itertools.product(*((0, n - 1) for n in self.shape))))

    def cropped(self, start: Sequence[int], shape: Sequence[int]) -> Geometry:
        """Grid of the box that begins at voxel ``start``; a negative start or a long shape pads."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(start)
        return Geometry(_triple(shape), affine)

    def reoriented(self, orientation: str = "RAS") -> Geometry:
        """The same voxels with array axes permuted and flipped to ``orientation``.

        Raises:
            GeometryError: if ``orientation`` is not one letter each of R/L, A/P, S/I.
        """
        worlds = _nearest_world_axes(self.directions)
        wanted = _parse_orientation(orientation)
        shape, affine, origin = [1, 1, 1], np.eye(4), self.affine[:3, 3].copy()
        for axis, (world, positive) in enumerate(wanted):
            source = worlds.index(world)
            column = self.affine[:3, source]
            shape[axis] = self.shape[source]
            if (column[world] >= 0) == positive:
                affine[:3, axis] = column
            else:
                affine[:3, axis] = -column
                origin += column * (shape[axis] - 1)
        affine[:3, 3] = origin
        return Geometry(_triple(shape), affine)

    def respaced(self, spacing_mm: Sequence[float]) -> Geometry:
        """Grid of other spacing with the same directions and middle, that covers the field of view to 0.05 voxel.

        Raises:
            GeometryError: if a spacing is not a positive number.
        """
        new = np.array(spacing_mm, dtype=np.float64)
        if new.shape != (3,) or not np.isfinite(new).all() or (new <= 0).any():
            raise GeometryError(f"spacing {spacing_mm}: three positive numbers in mm are needed.", code="E_SPACING")
        covering = np.ceil(np.array(self.shape) * self.spacing_mm / new - _COVER_TOLERANCE_VOXELS)
        shape = np.maximum(1, covering)
        return _centred(self.centre_mm, self.directions * new, shape)

    def orthogonalised(self) -> Geometry:
        """Grid with right angles and the same spacing that covers this one, for formats and networks without shear.

        The directions are the orthonormal ones nearest to the present ones (polar decomposition); the size is the
        least that covers the sheared box to within 0.05 voxel. A grid with right angles comes back with its own.
        """
        left, _, right = np.linalg.svd(self.directions)
        columns = left @ right * self.spacing_mm
        half = np.abs(np.linalg.solve(columns, self.affine[:3, :3])) @ np.array(self.shape)
        shape = np.maximum(1, np.ceil(half - _COVER_TOLERANCE_VOXELS))
        return _centred(self.centre_mm, columns, shape)

    def max_corner_distance_mm(self, other: Geometry) -> float:
        """Largest distance between the same corner of two grids; infinite where the shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        return float(np.linalg.norm(self.corners_mm() - other.corners_mm(), axis=1).max())

    def isclose(self, other: Geometry, *, atol_mm: float = 1e-3) -> bool:
        """Whether two grids have the same shape and no corner further apart than ``atol_mm``."""
        return self.max_corner_distance_mm(other) <= atol_mm


def _nearest_world_axes(directions: Float64[np.ndarray, "3 3"]) -> tuple[int, ...]:
    """World axis of each array axis: the assignment with the largest sum of |cosine|.

    Ties (45 degrees) go by the sign of the products of components, which neither a flip nor a permutation of the
    array axes changes, so that there and back is the identity.
    """

    def score(worlds: tuple[int, ...]) -> tuple[float, float]:
        cosines = [directions[w, axis] for axis, w in enumerate(worlds)]
        products = [directions[w, axis] * directions[(w + 1) % 3, axis] for axis, w in enumerate(worlds)]
        return round(sum(map(abs, cosines)), 6), round(sum(products), 6)

    return max(itertools.permutations(range(3)), key=score)


def _parse_orientation(orientation: str) -> list[tuple[int, bool]]:
    """World axis and sign of each letter."""
    found = [(w, letters.index(c) == 1) for c in orientation for w, letters in enumerate(_LETTERS) if c in letters]
    if len(orientation) != 3 or sorted(w for w, _ in found) != [0, 1, 2]:
        raise GeometryError(
            f"orientation {orientation!r}: one letter each of R/L, A/P and S/I is needed, for example RAS.",
            code="E_ORIENTATION",
        )
    return found


def _centred(
    centre_mm: Float64[np.ndarray, " 3"], columns: Float64[np.ndarray, "3 3"], shape: Float64[np.ndarray, " 3"]
) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = centre_mm - columns @ ((shape - 1) / 2)
    return Geometry(_triple(shape), affine)


def _triple(values: Sequence[float] | np.ndarray) -> tuple[int, int, int]:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _mm(lengths: np.ndarray) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths)
