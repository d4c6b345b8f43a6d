"""Distances between the surfaces of two masks on one grid, in millimetres, by both definitions that are in use.

*Surface voxels* belong to the mask and touch, by a face, a voxel that does not; distances run between their centres and
every voxel counts the same. So do MONAI, medpy and SimpleITK's contours.

*Surface elements* lie on the corners between voxels. Each stands for the piece of surface in its 2x2x2 neighbourhood
and counts with the area of that piece; so does DeepMind's surface-distance, and MONAI with ``use_subvoxels``. The piece
is that of marching cubes: its vertices are the midpoints of the edges that the surface crosses; where a face can be cut
in two ways, the corners that are fewer in the neighbourhood are kept apart; and each closed line of vertices is filled
with those triangles that have the largest area on a cube of side 1. In an image of one slice areas become lengths; in
one of a single line of voxels the elements are the surface voxels.

Both: what lies outside the image is background, an axis with one voxel has no faces, and positions are world
millimetres, so that anisotropic, oblique and sheared grids need nothing special.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, UInt8
from scipy import spatial

from medssl.errors import CaseError
from medssl.geometry import Geometry

_ROUNDING_MM = 1e-6  # a distance that equals the tolerance must be within it, however it was rounded
_RING = (0, 1, 3, 2)  # the corners of a square in the order of `itertools.product`, taken round

_Point = tuple[int, ...]


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface voxel or element of one mask to the nearest of the other, in mm, both ways.

    Args:
        to_reference: Of the surface of the prediction.
        to_prediction: Of the surface of the reference.
        weights: What each of the first counts, and each of the second; by default all count the same.
    """

    to_reference: Float64[np.ndarray, " p"]
    to_prediction: Float64[np.ndarray, " r"]
    weights: tuple[Float64[np.ndarray, " p"], Float64[np.ndarray, " r"]] | None = None

    def percentile_mm(self, percent: float) -> float:
        """Larger of the two directed percentiles, each point counting the same; 100 gives the Hausdorff distance."""
        return float(max(np.percentile(self.to_reference, percent), np.percentile(self.to_prediction, percent)))

    def mean_mm(self) -> float:
        """Mean over the points of both surfaces, each counting the same: the average symmetric surface distance."""
        return float(np.concatenate((self.to_reference, self.to_prediction)).mean())

    def share_within(self, tolerance_mm: float) -> float:
        """Share of both surfaces, by weight, no farther than ``tolerance_mm`` from the other: NSD."""
        is_within = np.concatenate((self.to_reference, self.to_prediction)) <= tolerance_mm + _ROUNDING_MM
        if self.weights is None:
            return float(is_within.mean())
        weights = np.concatenate(self.weights)
        return float(weights[is_within].sum() / weights.sum())


def surface_distances(
    prediction: Bool[np.ndarray, "x y z"], reference: Bool[np.ndarray, "x y z"], *, geometry: Geometry
) -> SurfaceDistances:
    """Distances between the surface voxels of two masks that are both not empty.

    Args:
        prediction: Mask on the grid of ``geometry``, or on a part of it cut along its axes.
        reference: Mask of the same shape.
        geometry: Gives the directions and the spacing; its shape says which axes have one voxel only.

    Raises:
        CaseError: if one of the masks is empty; the distance is then not defined.
    """
    _check(prediction, reference)
    surface_p, surface_r = (_surface(mask, geometry.shape) for mask in (prediction, reference))
    return SurfaceDistances(
        _directed(surface_p, surface_r, geometry=geometry), _directed(surface_r, surface_p, geometry=geometry)
    )


def surface_elements(
    prediction: Bool[np.ndarray, "x y z"], reference: Bool[np.ndarray, "x y z"], *, geometry: Geometry
) -> SurfaceDistances:
    """Distances between the surface elements of two masks that are both not empty, with their areas in mm².

    Args:
        prediction: Mask on the grid of ``geometry``, or on a part of it cut along its axes.
        reference: Mask of the same shape.
        geometry: Gives the directions and the spacing; its shape says which axes have one voxel only.

    Raises:
        CaseError: if one of the masks is empty; the distance is then not defined.

    Reference: Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
        radiotherapy, 2018, arXiv:1809.04430, section "surface DSC"; elements as in their code, `surface-distance`.
    Deviations: none on orthogonal grids (areas equal theirs); sheared ones, which they do not know, are measured too.
    """
    thick = tuple(axis for axis in range(3) if geometry.shape[axis] > 1)
    if len(thick) < 2:
        return surface_distances(prediction, reference, geometry=geometry)
    _check(prediction, reference)
    areas = _areas(geometry, thick)
    codes_p, codes_r = (_codes(mask, thick) for mask in (prediction, reference))
    is_p, is_r = (np.logical_and(codes != 0, codes != len(areas) - 1) for codes in (codes_p, codes_r))
    return SurfaceDistances(
        _directed(is_p, is_r, geometry=geometry),
        _directed(is_r, is_p, geometry=geometry),
        (_sorted_weights(codes_p, is_p, is_r, areas), _sorted_weights(codes_r, is_r, is_p, areas)),
    )


def diagonal_mm(geometry: Geometry) -> float:
    """Largest distance between two voxel centres of a grid, in mm: no surface distance can be larger."""
    corners = geometry.corners_mm()
    return float(spatial.distance.pdist(corners).max())


def _check(prediction: Bool[np.ndarray, "x y z"], reference: Bool[np.ndarray, "x y z"]) -> None:
    if not prediction.any() or not reference.any():
        raise CaseError(
            "surface distance: a mask is empty, two that are not are needed. Use `score`, which states a rule for it.",
            code="E_EMPTY_MASK",
        )


def _surface(mask: Bool[np.ndarray, "x y z"], shape: tuple[int, int, int]) -> Bool[np.ndarray, "x y z"]:
    """Voxels of the mask with a face neighbour outside, along the axes on which the image has more than one voxel."""
    if shape == (1, 1, 1):
        return mask
    inner = mask.copy()
    for axis in range(3):
        if shape[axis] == 1:
            continue
        along, kept = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        kept[1:] &= along[:-1]
        kept[:-1] &= along[1:]
        kept[0] = kept[-1] = False
    inner ^= mask
    return inner


def _directed(
    surface: Bool[np.ndarray, "x y z"], other: Bool[np.ndarray, "x y z"], *, geometry: Geometry
) -> Float64[np.ndarray, " n"]:
    """Distance of each point of ``surface`` to ``other``: first the points not in both, in the order of the array.

    Points in both are at zero and need no search.
    """
    distances = np.zeros(int(np.count_nonzero(surface)))
    apart = _positions(surface & ~other, geometry)
    if len(apart):
        tree = spatial.cKDTree(_positions(other, geometry), leafsize=32)
        distances[: len(apart)] = tree.query(apart)[0]
    return distances


def _positions(points: Bool[np.ndarray, "x y z"], geometry: Geometry) -> Float64[np.ndarray, "n 3"]:
    """World positions but for a common shift, which distances do not see."""
    ijk = np.stack(np.unravel_index(np.flatnonzero(points), points.shape), axis=1).astype(np.float64)
    return np.asarray(ijk @ geometry.affine[:3, :3].T)


def _codes(mask: Bool[np.ndarray, "x y z"], thick: Sequence[int]) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Which of the voxels around each corner are in the mask: bit k for the k-th corner of the neighbourhood."""
    padded = np.pad(mask, [(int(axis in thick),) * 2 for axis in range(3)]).view(np.uint8)
    codes = np.zeros([size - int(axis in thick) for axis, size in enumerate(padded.shape)], dtype=np.uint8)
    for bit, corner in enumerate(itertools.product((0, 1), repeat=len(thick))):
        part = [slice(None)] * 3
        for axis, step in zip(thick, corner, strict=True):
            part[axis] = slice(step, padded.shape[axis] - 1 + step)
        codes |= padded[tuple(part)] << np.uint8(bit)
    return codes


def _sorted_weights(
    codes: UInt8[np.ndarray, "x y z"],
    surface: Bool[np.ndarray, "x y z"],
    other: Bool[np.ndarray, "x y z"],
    areas: Float64[np.ndarray, " codes"],
) -> Float64[np.ndarray, " n"]:
    """Area of each element, in the order of :func:`_directed`."""
    return np.asarray(areas[np.concatenate((codes[surface & ~other], codes[surface & other]))])


def _areas(geometry: Geometry, thick: Sequence[int]) -> Float64[np.ndarray, " codes"]:
    """Area in mm² of the surface in each neighbourhood; in mm in an image of one slice."""
    if len(thick) == 2:
        to_mm = geometry.affine[:3, list(thick)]
        corners = list(itertools.product((0, 1), repeat=2))
        ring = [corners[index] for index in _RING]
        cuts = [_cuts(ring, _fewer(corners, code)) for code in range(16)]
        return np.array([sum(math.dist(to_mm @ start, to_mm @ end) / 2 for start, end in part) for part in cuts])
    sides = _triangle_sides() @ geometry.affine[:3, :3].T
    return np.asarray(np.linalg.norm(np.cross(sides[:, :, 0], sides[:, :, 1]), axis=-1).sum(axis=1) / 2)


@functools.cache
def _triangle_sides() -> Float64[np.ndarray, "codes 4 2 3"]:
    """Two sides of each triangle of the surface in each neighbourhood of 2x2x2 voxels, in voxels; unused ones are 0."""
    corners = list(itertools.product((0, 1), repeat=3))
    faces = [[corner for corner in corners if corner[axis] == side] for axis in range(3) for side in (0, 1)]
    sides = np.zeros((256, 4, 2, 3))
    for code in range(256):
        fewer = _fewer(corners, code)
        cuts = [cut for face in faces for cut in _cuts([face[index] for index in _RING], fewer)]
        triangles = [triangle for loop in _loops(cuts) for triangle in _filled(loop)]
        for index, (a, b, c) in enumerate(triangles):
            sides[code, index] = (b - a) / 2, (c - a) / 2
    return sides


def _fewer(corners: Sequence[_Point], code: int) -> set[_Point]:
    """Corners that the code names, or the others if those are fewer."""
    named = {corner for bit, corner in enumerate(corners) if code >> bit & 1}
    return named if 2 * len(named) <= len(corners) else set(corners) - named


def _cuts(ring: Sequence[_Point], inside: set[_Point]) -> list[tuple[_Point, _Point]]:
    """Lines between the middles (times 2) of the sides of a square that part the corners ``inside`` from the others."""
    is_inside = [corner in inside for corner in ring]
    middles = [tuple(map(sum, zip(ring[index], ring[index - 1], strict=True))) for index in range(4)]
    crossed = [middles[index] for index in range(4) if is_inside[index] != is_inside[index - 1]]
    if len(crossed) < 4:
        return [(crossed[0], crossed[1])] if crossed else []
    return [(middles[index], middles[(index + 1) % 4]) for index in range(4) if is_inside[index]]


def _loops(cuts: Sequence[tuple[_Point, _Point]]) -> Iterator[Float64[np.ndarray, "n 3"]]:
    """The closed lines that the cuts of all faces form; each point ends two cuts."""
    ends: dict[_Point, list[_Point]] = {}
    for start, end in cuts:
        ends.setdefault(start, []).append(end)
        ends.setdefault(end, []).append(start)
    while ends:
        loop = [next(iter(ends))]
        while following := [point for point in ends.pop(loop[-1]) if point in ends]:
            loop.append(following[0])
        yield np.array(loop, dtype=np.float64)


def _filled(loop: Float64[np.ndarray, "n 3"]) -> Sequence[Float64[np.ndarray, "3 3"]]:
    """Triangles between the points of a closed line, those of all choices that have the largest area."""
    choices = [[loop[list(triangle)] for triangle in choice] for choice in _triangulations(tuple(range(len(loop))))]

    def area(triangles: Sequence[Float64[np.ndarray, "3 3"]]) -> float:
        total = sum(float(np.linalg.norm(np.cross(b - a, c - a))) for a, b, c in triangles)
        return round(total, 9)  # equal areas are those of mirror images, which must not be told apart by rounding

    return max(choices, key=area)


def _triangulations(points: tuple[int, ...]) -> Iterator[list[tuple[int, int, int]]]:
    """Every way to cut a polygon into triangles."""
    if len(points) < 3:
        yield []
        return
    for place in range(1, len(points) - 1):
        for left in _triangulations(points[: place + 1]):
            for right in _triangulations(points[place:]):
                yield [*left, (points[0], points[place], points[-1]), *right]
