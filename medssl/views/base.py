"""What a sampler is, and what it needs of a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Shaped

from medssl.views.boxes import Triple

BODY = -1


@runtime_checkable
class CaseArrays(Protocol):
    """A prepared case whose arrays are read by crop."""

    @property
    def case_id(self) -> str:
        """Pseudonymous name of the case."""

    @property
    def shape(self) -> Triple:
        """Voxels along each axis."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel."""

    @property
    def affine(self) -> Float64[np.ndarray, "4 4"]:
        """Voxel index to world mm, RAS+; the axes may point anywhere."""

    @property
    def body_box(self) -> Float64[np.ndarray, "2 3"]:
        """Start and size in voxels of the box around the body; the whole volume where the body is not known."""

    @property
    def is_metric(self) -> bool:
        """Whether the voxel size in mm is known, and not only assumed."""

    @property
    def atlas_affine(self) -> Float64[np.ndarray, "4 4"] | None:
        """World mm to atlas coordinates; None where the case is not registered."""

    @property
    def fill(self) -> float:
        """Image value outside the volume."""

    @property
    def channels(self) -> int:
        """Channels of the image."""

    def has(self, name: str) -> bool:
        """Whether the case holds ``image``, ``label`` or ``body``."""

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Shaped[np.ndarray, "c x y z"]:
        """Voxels of the box at ``start`` in the stored type; what lies outside the volume is filled."""

    def foreground_voxels(self, value: int) -> Shaped[np.ndarray, "n 3"]:
        """Stored sample of the voxels where the label is ``value``, or of the body for ``BODY``."""


@runtime_checkable
class ViewSampler(Protocol):
    """Cuts the named arrays of one sample; equal generators give equal views.

    A crop ``image`` comes as the box (C, *box) that was read for it, in the stored type, with where it lies there:
    ``image_to_box`` (4, 4), crop voxel index to box voxel index; ``image_spacing_mm`` (3,); ``image_affine`` (4, 4),
    crop voxel index to world mm, RAS+; ``image_body`` (2, 3), its low and high corner in body coordinates; and
    ``image_atlas`` (2, 3) where the case is registered. Several views of a kind are stacked in front of each of these.
    Numbers for the journal are called ``note_...``: the share of the crop that lies outside the volume
    (``note_padded``), and the share of crops drawn without the voxel of the body or structure that was asked for
    (``note_anywhere``) and of crops that have one value only, after four further draws (``note_constant``).
    """

    @property
    def cases_per_sample(self) -> int:
        """How many cases one sample is cut from."""

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Named arrays of one sample."""


def median_mm(sizes: Sequence[Sequence[float] | Float64[np.ndarray, " 3"]]) -> list[float]:
    """Median of each of three edge lengths, which is that of each case where all have the same."""
    return [float(value) for value in np.median(np.asarray(sizes), axis=0)]
