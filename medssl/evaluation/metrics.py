"""Overlap, surface and volume agreement of two label maps on one grid, in millimetres.

Definitions: a surface voxel belongs to the structure and touches, by a face, a voxel that does not; what lies
outside the image counts as background; an axis with one voxel has no faces. Distances run between the centres of
surface voxels in world millimetres, so that sheared and oblique grids need nothing special. HD95 is the larger of
the two directed 95th percentiles, NSD counts surface voxels: both as in MONAI. (DeepMind's package weighs surface
elements by area instead and gives slightly other numbers.)

Empty masks follow one rule that no model can profit from: both empty is full agreement (a true negative, to be
counted apart), and if only one is empty, every metric takes its worst value, for distances the image diagonal.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer
from scipy import ndimage, spatial

from medssl.errors import CaseError
from medssl.geometry import Geometry

_MAX_DIRECT_VALUE = 65535  # find_objects makes a list as long as the largest value


class Presence(enum.StrEnum):
    """Where a structure is: in the reference, in the prediction, in both, or in neither."""

    BOTH = "both"
    NEITHER = "neither"
    MISSED = "missed"
    INVENTED = "invented"


@dataclass(frozen=True)
class Scores:
    """Agreement of one structure in one case; volumes are of the prediction and of the reference."""

    presence: Presence
    dice: float
    nsd: float
    hd95_mm: float
    hd_mm: float
    assd_mm: float
    volume_ml: float
    reference_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Volume of the prediction minus that of the reference."""
        return self.volume_ml - self.reference_ml

    def to_dict(self) -> dict[str, float | str]:
        """Column names and values of a table row."""
        return {**asdict(self), "presence": self.presence.value, "volume_error_ml": self.volume_error_ml}


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface voxel of one mask to the nearest of the other, in mm, both ways."""

    to_reference: Float64[np.ndarray, " p"]
    to_prediction: Float64[np.ndarray, " r"]

    def percentile_mm(self, percent: float) -> float:
        """Larger of the two directed percentiles; 100 gives the Hausdorff distance."""
        return float(max(np.percentile(self.to_reference, percent), np.percentile(self.to_prediction, percent)))

    def mean_mm(self) -> float:
        """Mean over the surface voxels of both masks: the average symmetric surface distance."""
        return float(np.concatenate((self.to_reference, self.to_prediction)).mean())

    def share_within(self, tolerance_mm: float) -> float:
        """Share of the surface voxels of both masks no farther than ``tolerance_mm`` from the other: NSD."""
        return float((np.concatenate((self.to_reference, self.to_prediction)) <= tolerance_mm).mean())


def dice(prediction: Bool[np.ndarray, "x y z"], reference: Bool[np.ndarray, "x y z"]) -> float:
    """2 |P ∩ R| / (|P| + |R|); 1 if both are empty."""
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / size if size else 1.0


def surface_distances(
    prediction: Bool[np.ndarray, "x y z"], reference: Bool[np.ndarray, "x y z"], *, geometry: Geometry
) -> SurfaceDistances:
    """Distances between the surfaces of two masks that are both not empty.

    Args:
        prediction: Mask on the grid of ``geometry``, or on a part of it cut along its axes.
        reference: Mask of the same shape.
        geometry: Gives the directions and the spacing; its shape says which axes have one voxel only.

    Raises:
        CaseError: if one of the masks is empty; the distance is then not defined.
    """
    if not prediction.any() or not reference.any():
        raise CaseError(
            "surface distance: a mask is empty, two that are not are needed. Use `score`, which states a rule for it.",
            code="E_EMPTY_MASK",
        )
    faces = _faces(geometry.shape)
    surface_p = prediction & ~ndimage.binary_erosion(prediction, faces)
    surface_r = reference & ~ndimage.binary_erosion(reference, faces)
    return SurfaceDistances(
        _directed(surface_p, surface_r, geometry=geometry), _directed(surface_r, surface_p, geometry=geometry)
    )


def diagonal_mm(geometry: Geometry) -> float:
    """Largest distance between two voxel centres of a grid, in mm: no surface distance can be larger."""
    corners = geometry.corners_mm()
    return float(spatial.distance.pdist(corners).max())


def score(
    prediction: Bool[np.ndarray, "x y z"],
    reference: Bool[np.ndarray, "x y z"],
    *,
    geometry: Geometry,
    nsd_tolerance_mm: float,
) -> Scores:
    """All scores of one structure.

    Args:
        prediction: Mask on the grid of ``geometry``, or on a part of it that holds both structures.
        reference: Mask of the same shape.
        geometry: Grid of the whole image, for millimetres and for the diagonal.
        nsd_tolerance_mm: Surface voxels that are no farther apart than this agree.

    Returns:
        The scores; see the module for the rule of empty masks.

    Raises:
        CaseError: if the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise CaseError(
            f"score: prediction has shape {prediction.shape}, reference {reference.shape}; one grid is needed. "
            "Resample the prediction to the reference's grid.",
            code="E_SHAPE",
        )
    ml = abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000
    volumes = (int(np.count_nonzero(prediction)) * ml, int(np.count_nonzero(reference)) * ml)
    presence = _presence(has_prediction=volumes[0] > 0, has_reference=volumes[1] > 0)
    if presence is Presence.NEITHER:
        return Scores(presence, 1.0, 1.0, 0.0, 0.0, 0.0, *volumes)
    if presence is not Presence.BOTH:
        worst = diagonal_mm(geometry)
        return Scores(presence, 0.0, 0.0, worst, worst, worst, *volumes)
    distances = surface_distances(prediction, reference, geometry=geometry)
    return Scores(
        presence=presence,
        dice=dice(prediction, reference),
        nsd=distances.share_within(nsd_tolerance_mm),
        hd95_mm=distances.percentile_mm(95),
        hd_mm=distances.percentile_mm(100),
        assd_mm=distances.mean_mm(),
        volume_ml=volumes[0],
        reference_ml=volumes[1],
    )


def score_labels(
    prediction: Integer[np.ndarray, "x y z"],
    reference: Integer[np.ndarray, "x y z"],
    *,
    geometry: Geometry,
    label_values: Sequence[int],
    nsd_tolerance_mm: float,
) -> dict[int, Scores]:
    """Scores of each label value; every value is scored inside the box that holds it in either map.

    Args:
        prediction: Label map on the grid of ``geometry``.
        reference: Label map of the same shape.
        geometry: Grid of both.
        label_values: Positive values to score.
        nsd_tolerance_mm: See :func:`score`.
    """
    if prediction.shape != reference.shape:
        raise CaseError(
            f"score: prediction has shape {prediction.shape}, reference {reference.shape}; one grid is needed. "
            "Resample the prediction to the reference's grid.",
            code="E_SHAPE",
        )
    values = sorted(set(label_values))
    boxes_p, boxes_r = _boxes(prediction, values), _boxes(reference, values)
    scores = {}
    for value, box_p, box_r in zip(values, boxes_p, boxes_r, strict=True):
        box = _union(box_p, box_r)
        scores[value] = score(
            prediction[box] == value, reference[box] == value, geometry=geometry, nsd_tolerance_mm=nsd_tolerance_mm
        )
    return scores


def _presence(*, has_prediction: bool, has_reference: bool) -> Presence:
    if has_prediction:
        return Presence.BOTH if has_reference else Presence.INVENTED
    return Presence.MISSED if has_reference else Presence.NEITHER


def _faces(shape: tuple[int, int, int]) -> Bool[np.ndarray, "3 3 3"]:
    """Neighbours by a face along the axes that have more than one voxel."""
    faces = np.zeros((3, 3, 3), dtype=bool)
    faces[1, 1, 1] = True
    for axis in range(3):
        if shape[axis] > 1:
            line: list[int | slice] = [1, 1, 1]
            line[axis] = slice(None)
            faces[tuple(line)] = True
    return faces


def _directed(
    surface: Bool[np.ndarray, "x y z"], other: Bool[np.ndarray, "x y z"], *, geometry: Geometry
) -> Float64[np.ndarray, " n"]:
    """Distance of each voxel of ``surface`` to ``other``; voxels in both are at zero and need no search."""
    distances = np.zeros(int(np.count_nonzero(surface)))
    apart = np.argwhere(surface & ~other)
    if len(apart):
        tree = spatial.cKDTree(_millimetres(np.argwhere(other), geometry), leafsize=32)
        distances[: len(apart)] = tree.query(_millimetres(apart, geometry))[0]
    return distances


def _millimetres(ijk: Int64[np.ndarray, "n 3"], geometry: Geometry) -> Float64[np.ndarray, "n 3"]:
    """World positions but for a common shift, which distances do not see."""
    return np.asarray(ijk @ geometry.affine[:3, :3].T, dtype=np.float64)


def _boxes(labels: Integer[np.ndarray, "x y z"], values: Sequence[int]) -> Sequence[tuple[slice, ...] | None]:
    """Smallest box of each of the sorted positive ``values``, in one pass over the label map."""
    if not values:
        return []
    if values[-1] <= _MAX_DIRECT_VALUE:
        found = ndimage.find_objects(labels, max_label=values[-1])
        return [found[value - 1] for value in values]
    place = np.searchsorted(values, labels).clip(max=len(values) - 1)
    codes = np.where(np.asarray(values)[place] == labels, place + 1, 0)
    return ndimage.find_objects(codes, max_label=len(values))


def _union(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """Box that holds both; empty where there is neither."""
    if first is None or second is None:
        return first or second or (slice(0, 0),) * 3
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
