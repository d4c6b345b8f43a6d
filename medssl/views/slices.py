"""Slices and slabs in three planes, each with its place in mm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float64, Shaped

from medssl.errors import ConfigError
from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, Triple, triple
from medssl.views.coordinates import AXES, anatomical_axes
from medssl.views.cutting import Cut, notes, read_views
from medssl.views.placing import Placing, Region, margin_voxels, positive, require_mm

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: dict[str, Triple] = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
"""Axes (LR, AP, SI) of the volume that the rows, the columns and the normal of a slice run along."""


class SliceViews:
    """Two-dimensional crops of a volume: axial (X, Y), coronal (X, Z) and sagittal (Y, Z).

    The planes take turns in a random order, so that each is seen as often as the others, or once more.

    Gives ``slices`` (n, C, *box, 1) with their fields and notes (see :class:`~medssl.views.base.ViewSampler`);
    ``slices_plane`` (n,), the number of the plane in ``PLANES``; and ``slices_position_mm`` (n,), how far the middle
    of the slice lies from the middle of the body box to the head, front or right. The third axis of a slice is its
    normal: ``slices_affine`` takes ``(row, column, 0)`` to world mm, and the third of ``slices_spacing_mm`` is the
    thickness.

    Args:
        crop_voxels: Rows and columns.
        planes: Which planes are drawn.
        num_slices: Slices a sample.
        crop_mm: Edge lengths along rows and columns, the same in every plane; None takes the voxels of the case.
        slab_mm: Thickness that is averaged, to whole voxels and at most the volume's; None takes one voxel.
        slab_mode: ``mean``, or ``max`` for a maximum intensity projection.
        jitter: How far from the middle of the body box the middle of a slice may lie, along each axis, as a share of
            the way to its faces: 0 is always the middle, 1 anywhere.
        margin: Share of the edge read beyond the crop, one number or one each for rows and columns.
        inside_body: Whether the middle is drawn from the body mask, where the case has one.
        region: Share of the body box that the middle lies in, in place of ``jitter`` along the axes that it names.

    Raises:
        ConfigError: for planes, numbers or sizes that cannot be.
    """

    cases_per_sample = 1

    def __init__(
        self,
        crop_voxels: Sequence[int],
        *,
        planes: Sequence[Plane] = ("axial", "coronal", "sagittal"),
        num_slices: int = 1,
        crop_mm: Sequence[float] | None = None,
        slab_mm: float | None = None,
        slab_mode: Literal["mean", "max"] = "mean",
        jitter: float = 1.0,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = True,
        region: Region | None = None,
    ) -> None:
        self.crop_voxels = triple("crop_voxels with one slice", [*crop_voxels, 1])
        self.planes = tuple(planes)
        self.num_slices = num_slices
        self.crop_mm = positive("crop_mm", crop_mm, 2)
        self.slab_mm = None if slab_mm is None else positive("slab_mm", [slab_mm], 1)
        self.slab_mode: Literal["mean", "max"] = slab_mode
        shares = (*margin, 0.0) if isinstance(margin, Sequence) else margin
        self.margin = margin_voxels(shares, self.crop_voxels)
        if not self.planes or not set(self.planes) <= PLANES.keys():
            raise ConfigError(f"planes is {list(planes)}; choose from {', '.join(PLANES)}.")
        if num_slices < 1 or not 0 <= jitter <= 1:
            raise ConfigError(f"num_slices {num_slices}, jitter {jitter}: they need at least 1, and 0 to 1.")
        around = dict.fromkeys(AXES, (0.5 - jitter / 2, 0.5 + jitter / 2)) if jitter < 1 else {}
        self.placing = Placing(inside_body, {**around, **(region or {})})

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut the slices from ``cases[0]``.

        Raises:
            CaseError: E_SPACING_UNKNOWN, if a size in mm is used with a case whose voxel size is not known.
        """
        case = cases[0]
        body = self.placing.body(case)
        turns = rng.permutation(len(self.planes))
        planes = [self.planes[turns[number % len(turns)]] for number in range(self.num_slices)]
        order, is_reversed = anatomical_axes(case)
        axes = [_along(order, PLANES[plane]) for plane in planes]
        views = read_views(case, [partial(self._draw, case, of_plane, body, rng) for of_plane in axes])
        start, size = case.body_box
        from_middle = [np.mean(cut.corners(), axis=0) + 0.5 - (start + size / 2) for cut in views.cuts]
        to_face = (
            np.where(is_reversed, -1.0, 1.0) * np.stack(from_middle)[:, order] * np.asarray(case.spacing_mm)[[*order]]
        )
        numbers = [list(PLANES).index(plane) for plane in planes]
        normals = [PLANES[plane][2] for plane in planes]
        return {
            **views.fields("slices"),
            "slices_plane": np.asarray(numbers, np.int64),
            "slices_position_mm": to_face[range(len(planes)), normals],
            **notes(views),
        }

    def _draw(
        self, case: CaseArrays, axes: Triple, body: Shaped[np.ndarray, "n 3"], rng: np.random.Generator
    ) -> list[Cut]:
        size = self._size(case, axes)
        place = Box.at(self.placing.start(case, size, body, rng), size)
        is_anywhere = self.placing.inside_body and not len(body)
        along = [axes.index(axis) for axis in range(3)]
        voxels = triple("crop_voxels", [self.crop_voxels[number] for number in along])
        x, y, z = (self.margin[number] for number in along)
        return [Cut(place, voxels, (x, y, z), is_anywhere, axes=axes, slab=self.slab_mode)]

    def _size(self, case: CaseArrays, axes: Triple) -> Float64[np.ndarray, " 3"]:
        """Edge lengths of a slice of the plane, in voxels of the case and along its axes."""
        size = np.ones(3)
        spacing = np.asarray(case.spacing_mm)[list(axes)]
        if self.crop_mm is None:
            size[:2] = self.crop_voxels[:2]
        else:
            require_mm(case, "crop_mm")
            size[:2] = self.crop_mm / spacing[:2]
        if self.slab_mm is not None:
            require_mm(case, "slab_mm")
            size[2] = min(max(1, round(self.slab_mm[0] / spacing[2])), case.shape[axes[2]])
        along: Float64[np.ndarray, " 3"] = np.empty(3)
        along[list(axes)] = size
        return along


def _along(order: Triple, plane: Triple) -> Triple:
    """Array axes of a plane, in an array whose axes nearest to LR, AP and SI are ``order``."""
    row, column, normal = plane
    return order[row], order[column], order[normal]
