"""Overlap, surface and volume agreement of two label maps on one grid, in millimetres.

Dice counts voxels. HD95 is the larger of the two directed 95th percentiles between surface voxels, HD the same with
100, ASSD the mean over the surface voxels of both: as in MONAI. NSD, the share of both surfaces within the tolerance,
has two names: ``nsd`` counts surface voxels as MONAI does, ``nsd_area`` weighs surface elements by their area as
DeepMind does; see :mod:`medssl.evaluation.surface` for both.

Empty masks follow one rule that no model can profit from: both empty is full agreement (a true negative, to be
counted apart), and if only one is empty, every metric takes its worst value, for distances the image diagonal.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Integer

from medssl.errors import CaseError
from medssl.evaluation.surface import diagonal_mm, surface_distances, surface_elements
from medssl.evaluation.tally import Tally, tally
from medssl.geometry import Geometry


class Presence(enum.StrEnum):
    """Where a structure is: in the reference, in the prediction, in both, or in neither."""

    BOTH = "both"
    NEITHER = "neither"
    MISSED = "missed"
    INVENTED = "invented"


@dataclass(frozen=True)
class Scores:
    """Agreement of one structure in one case; volumes are of the prediction and of the reference.

    ``nsd_area`` is None where it was not asked for.
    """

    presence: Presence
    dice: float
    nsd: float
    hd95_mm: float
    hd_mm: float
    assd_mm: float
    volume_ml: float
    reference_ml: float
    nsd_area: float | None = None

    @property
    def volume_error_ml(self) -> float:
        """Volume of the prediction minus that of the reference."""
        return self.volume_ml - self.reference_ml

    @property
    def volume_error_percent(self) -> float:
        """The same in percent of the reference; 0 if both are empty, and NaN, an empty cell, if only the reference."""
        if self.reference_ml:
            return 100 * self.volume_error_ml / self.reference_ml
        return math.nan if self.volume_ml else 0.0

    def to_dict(self) -> dict[str, float | str]:
        """Column names and values of a table row."""
        columns = {**asdict(self), "presence": self.presence.value, "volume_error_ml": self.volume_error_ml}
        if self.nsd_area is None:
            del columns["nsd_area"]
        return {**columns, "volume_error_percent": self.volume_error_percent}


def score(
    prediction: Bool[np.ndarray, "x y z"],
    reference: Bool[np.ndarray, "x y z"],
    *,
    geometry: Geometry,
    nsd_tolerance_mm: float,
    with_area: bool = False,
) -> Scores:
    """All scores of one structure; see :func:`score_labels`.

    Args:
        prediction: Mask on the grid of ``geometry``.
        reference: Mask of the same shape.
        geometry: Grid of both.
        nsd_tolerance_mm: Surface voxels that are no farther apart than this agree.
        with_area: Also ``nsd_area``.

    Raises:
        CaseError: if the shapes differ.
    """
    return score_labels(
        prediction.view(np.uint8),
        reference.view(np.uint8),
        geometry=geometry,
        label_values=(1,),
        nsd_tolerance_mm=nsd_tolerance_mm,
        with_area=with_area,
    )[1]


def score_labels(
    prediction: Integer[np.ndarray, "x y z"],
    reference: Integer[np.ndarray, "x y z"],
    *,
    geometry: Geometry,
    label_values: Sequence[int],
    nsd_tolerance_mm: float,
    with_area: bool = False,
) -> dict[int, Scores]:
    """Scores of each label value; every value is scored inside the box that holds it in either map.

    Args:
        prediction: Label map on the grid of ``geometry``.
        reference: Label map of the same shape.
        geometry: Grid of both, for millimetres and for the diagonal.
        label_values: Positive values to score.
        nsd_tolerance_mm: Surfaces that are no farther apart than this agree.
        with_area: Also ``nsd_area``, which takes about as long as all the others.

    Returns:
        The scores of each value; see the module for the rule of empty masks.

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
    scores = {}
    for value, counts in tally(prediction, reference, label_values=label_values).items():
        presence = _presence(counts)
        volumes = (counts.prediction * ml, counts.reference * ml)
        if presence is Presence.NEITHER:
            scores[value] = Scores(presence, 1.0, 1.0, 0.0, 0.0, 0.0, *volumes, 1.0 if with_area else None)
            continue
        if presence is not Presence.BOTH:
            worst = diagonal_mm(geometry)
            scores[value] = Scores(presence, 0.0, 0.0, worst, worst, worst, *volumes, 0.0 if with_area else None)
            continue
        masks = (prediction[counts.box] == value, reference[counts.box] == value)
        distances = surface_distances(*masks, geometry=geometry)
        elements = surface_elements(*masks, geometry=geometry) if with_area else None
        scores[value] = Scores(
            presence=presence,
            dice=2 * counts.both / (counts.prediction + counts.reference),
            nsd=distances.share_within(nsd_tolerance_mm),
            hd95_mm=distances.percentile_mm(95),
            hd_mm=distances.percentile_mm(100),
            assd_mm=distances.mean_mm(),
            volume_ml=volumes[0],
            reference_ml=volumes[1],
            nsd_area=None if elements is None else elements.share_within(nsd_tolerance_mm),
        )
    return scores


def _presence(counts: Tally) -> Presence:
    if counts.prediction:
        return Presence.BOTH if counts.reference else Presence.INVENTED
    return Presence.MISSED if counts.reference else Presence.NEITHER
