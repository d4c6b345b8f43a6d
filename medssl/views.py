"""Where crops are cut from a case: boxes, grids, overlap fractions and the samplers that workers run.

Boxes are half-open and axis-parallel, ``start`` and ``size`` in the voxels of a prepared volume or in mm along its
axes: voxel ``i`` occupies ``[i, i + 1)``. An array of boxes has the shape ``(n, 2, 3)``: start, then size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Shaped

from medssl.errors import CaseError, ConfigError

BODY = -1

Triple = tuple[int, int, int]


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
    def channels(self) -> int:
        """Channels of the image."""

    def has(self, name: str) -> bool:
        """Whether the case holds ``image``, ``label`` or ``body``."""

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Shaped[np.ndarray, "c x y z"]:
        """Voxels of the box at ``start``; what lies outside the volume is filled."""

    def foreground_voxels(self, value: int) -> Shaped[np.ndarray, "n 3"]:
        """Stored sample of the voxels where the label is ``value``, or of the body for ``BODY``."""


@runtime_checkable
class ViewSampler(Protocol):
    """Cuts the named arrays of one sample; equal generators give equal views."""

    @property
    def cases_per_sample(self) -> int:
        """How many cases one sample is cut from."""

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Named arrays of one sample."""


@dataclass(frozen=True)
class Box:
    """An axis-parallel box, ``[start, start + size)`` along each axis."""

    start: tuple[float, float, float]
    size: tuple[float, float, float]

    def scaled(self, factor: Sequence[float | int]) -> Box:
        """The box in other units, for example voxels times ``spacing_mm``."""
        scale = np.asarray(factor, dtype=np.float64)
        return Box(_floats(scale * self.start), _floats(scale * self.size))

    def to_array(self) -> Float64[np.ndarray, "2 3"]:
        """Start and size as rows."""
        return np.array([self.start, self.size], dtype=np.float64)


def grid_boxes(grid: Sequence[int], cell: Sequence[float | int]) -> Float64[np.ndarray, "n 2 3"]:
    """Tile space with ``grid`` boxes of size ``cell``; box ``(i, j, k)`` is number ``(i * gy + j) * gz + k``.

    Args:
        grid: Boxes along each axis.
        cell: Size of one box along each axis, any unit.

    Returns:
        Start and size of each box, the first at the origin.
    """
    size = np.asarray(cell, dtype=np.float64)
    index = np.stack(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    return np.stack([index * size, np.broadcast_to(size, index.shape)], axis=1)


def overlap_fractions(
    targets: Float[np.ndarray, "t 2 3"], bases: Float[np.ndarray, "n 2 3"]
) -> Float64[np.ndarray, "t n"]:
    """Share of each target box that lies in each base box, ``vol(target ∩ base) / vol(target)``.

    Args:
        targets: Start and size of each target box.
        bases: Start and size of each base box, in the same unit.

    Returns:
        Fractions in [0, 1]; rows sum to at most 1 where the bases do not overlap.

    Raises:
        CaseError: if a target box has no volume.
    """
    start, size = np.asarray(targets, np.float64)[:, None, 0], np.asarray(targets, np.float64)[:, None, 1]
    base_start, base_size = np.asarray(bases, np.float64)[None, :, 0], np.asarray(bases, np.float64)[None, :, 1]
    if not np.all(size > 0):
        raise CaseError(f"target box of size {size.min(axis=(0, 1)).tolist()}: an overlap needs a size above 0.")
    common = np.minimum(start + size, base_start + base_size) - np.maximum(start, base_start)
    fractions: Float64[np.ndarray, "t n"] = np.prod(np.maximum(common, 0.0) / size, axis=-1)
    return fractions


def position_labels(
    targets: Float[np.ndarray, "t 2 3"], bases: Float[np.ndarray, "n 2 3"]
) -> Float32[np.ndarray, "t n"]:
    """Overlap fractions as training labels: every target must touch a base.

    Raises:
        CaseError: if a target lies outside all bases, which leaves nothing to learn from it.
    """
    fractions = overlap_fractions(targets, bases)
    outside = np.flatnonzero(fractions.sum(axis=1) == 0)
    if outside.size:
        raise CaseError(
            f"target crop {outside[0]} overlaps none of the {len(bases)} base crops; "
            "a position label needs at least one. Draw targets inside the grid.",
            code="E_NO_OVERLAP",
        )
    return fractions.astype(np.float32)


class RandomCrop:
    """One crop at a random place.

    Gives ``image`` (C, *crop), ``crop_box_mm`` (2, 3) within the prepared volume, and ``position`` (3,), the centre
    of the crop as a share of the volume, in [0, 1]. A volume smaller than the crop is filled evenly on both sides.

    Args:
        crop_voxels: Size of the crop; 1 on the last axis for 2D images.
        inside_body: Whether the centre is drawn from the body mask, where the case has one.
    """

    cases_per_sample = 1

    def __init__(self, crop_voxels: Sequence[int], *, inside_body: bool = True) -> None:
        self.crop_voxels = _triple("crop_voxels", crop_voxels)
        self.inside_body = inside_body

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut one crop from ``cases[0]``."""
        case = cases[0]
        body = case.foreground_voxels(BODY) if self.inside_body and case.has("body") else np.empty((0, 3), np.int32)
        start = _start_at(case.shape, self.crop_voxels, body, rng)
        centre = (np.asarray(start) + np.asarray(self.crop_voxels) / 2) / np.asarray(case.shape)
        return {
            "image": case.read("image", start, self.crop_voxels),
            "crop_box_mm": Box(_floats(start), _floats(self.crop_voxels)).scaled(case.spacing_mm).to_array(),
            "position": np.clip(centre, 0, 1).astype(np.float32),
        }


class LabelledCrop:
    """One crop of image and label, more often on a structure than chance would have it.

    Gives ``image`` (C, *crop) and ``label`` (1, *crop). A centre that is too near the border is moved inwards, with
    the drawn voxel still in the crop.

    Args:
        crop_voxels: Size of the crop; 1 on the last axis for 2D images.
        label_values: Values of the structures; 0 is background and never drawn.
        foreground_share: Probability that the crop is centred on a voxel of a structure, drawn evenly from those that
            the case has; otherwise the place is random.
    """

    cases_per_sample = 1

    def __init__(
        self, crop_voxels: Sequence[int], label_values: Sequence[int], *, foreground_share: float = 0.67
    ) -> None:
        self.crop_voxels = _triple("crop_voxels", crop_voxels)
        self.label_values = tuple(value for value in label_values if value != 0)
        self.foreground_share = foreground_share

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut one crop from ``cases[0]``.

        Raises:
            CaseError: if the case has no label.
        """
        case = cases[0]
        if not case.has("label"):
            raise CaseError(f"case {case.case_id}: has no label, and this task needs one. Select labelled cases.")
        voxels = np.empty((0, 3), np.int32)
        if rng.random() < self.foreground_share:
            present = [found for value in self.label_values if len(found := case.foreground_voxels(value))]
            if present:
                voxels = present[rng.integers(len(present))]
        start = _start_at(case.shape, self.crop_voxels, voxels, rng)
        return {name: case.read(name, start, self.crop_voxels) for name in ("image", "label")}


class GridCrops:
    """Base crops on a grid, target crops at random places in it, and how much of each target lies in each base.

    The window is the whole volume in ``resize`` mode and a random box of ``grid * cell_mm`` in ``crop`` mode. It is
    resized linearly to ``grid * crop_voxels`` and cut there, so that all overlaps are exact; the boxes in mm follow
    the resizing, each axis by its own factor.

    Gives ``bases`` (K, C, *crop), ``targets`` (R, C, *crop), ``overlap`` (R, K), ``base_boxes_mm`` (K, 2, 3) and
    ``target_boxes_mm`` (R, 2, 3) within the prepared volume. Base ``(i, j, k)`` is number ``(i * gy + j) * gz + k``.

    Args:
        grid: Base crops along each axis; targets do not move along an axis of one cell.
        crop_voxels: Size of every crop.
        num_targets: Target crops a sample.
        position_mode: ``resize`` makes positions comparable between subjects, ``crop`` keeps true size.
        cell_mm: Size of a base in ``crop`` mode; None takes ``crop_voxels`` as they are, without resizing.

    Reference: Wu, Zhuang, Chen, VoCo, CVPR 2024, arXiv:2402.17300, sections 3.1 and 3.2.
    Deviations: overlaps are 3D volumes, not in-plane areas; the last start is drawn too, so that places are symmetric;
    a window is averaged, not only interpolated, where it shrinks.
    """

    cases_per_sample = 1

    def __init__(
        self,
        grid: Sequence[int],
        crop_voxels: Sequence[int],
        *,
        num_targets: int = 2,
        position_mode: Literal["resize", "crop"] = "resize",
        cell_mm: Sequence[float | int] | None = None,
    ) -> None:
        self.grid = _triple("grid", grid)
        self.crop_voxels = _triple("crop_voxels", crop_voxels)
        self.num_targets = num_targets
        self.position_mode = position_mode
        self.cell_mm = None if cell_mm is None else _floats(cell_mm)
        if num_targets < 1 or (self.cell_mm is not None and min(self.cell_mm) <= 0):
            raise ConfigError(f"num_targets {num_targets}, cell_mm {cell_mm}: both must be above 0.")
        self.base_boxes = grid_boxes(self.grid, self.crop_voxels)

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut bases and targets from ``cases[0]``."""
        case = cases[0]
        start, shape = self._window(case, rng)
        extent = self._extent()
        volume = resize_linear(case.read("image", start, shape), extent)
        target_boxes = self.draw_targets(rng)
        voxel_mm = self.voxel_mm(case)
        origin_mm = np.asarray(start) * np.asarray(case.spacing_mm)
        shift = np.stack([origin_mm, np.zeros(3)])
        return {
            "bases": _cut(volume, self.base_boxes),
            "targets": _cut(volume, target_boxes),
            "overlap": position_labels(target_boxes, self.base_boxes),
            "base_boxes_mm": self.base_boxes * voxel_mm + shift,
            "target_boxes_mm": target_boxes * voxel_mm + shift,
        }

    def draw_targets(self, rng: np.random.Generator) -> Float64[np.ndarray, "r 2 3"]:
        """Boxes of the target crops in voxels of the resized window; integer starts, all inside the grid."""
        free = (np.asarray(self.grid) - 1) * np.asarray(self.crop_voxels)
        starts = rng.integers(0, free + 1, size=(self.num_targets, 3))
        return np.stack([starts, np.broadcast_to(self.crop_voxels, starts.shape)], axis=1).astype(np.float64)

    def voxel_mm(self, case: CaseArrays) -> Float64[np.ndarray, " 3"]:
        """Edge lengths of a voxel of the crops of ``case``, after resizing."""
        shrink = np.asarray(self._window_shape(case)) / np.asarray(self._extent())
        size: Float64[np.ndarray, " 3"] = np.asarray(case.spacing_mm) * shrink
        return size

    def _extent(self) -> Triple:
        """Voxels of the window after resizing."""
        return _triple("extent", [g * r for g, r in zip(self.grid, self.crop_voxels, strict=True)])

    def _window_shape(self, case: CaseArrays) -> Triple:
        """Voxels of the case, along each axis, that the grid is laid over."""
        if self.position_mode == "resize":
            return case.shape
        if self.cell_mm is None:
            return self._extent()
        cells = zip(self.grid, self.cell_mm, case.spacing_mm, strict=True)
        return _triple("window", [max(1, round(g * cell / spacing)) for g, cell, spacing in cells])

    def _window(self, case: CaseArrays, rng: np.random.Generator) -> tuple[Triple, Triple]:
        """Start and shape, in voxels of the case, of what the grid is laid over."""
        shape = self._window_shape(case)
        if self.position_mode == "resize":
            return (0, 0, 0), shape
        return _start_at(case.shape, shape, np.empty((0, 3), np.int32), rng), shape


def median_mm(sizes: Sequence[Sequence[float] | Float64[np.ndarray, " 3"]]) -> list[float]:
    """Median of each of three edge lengths, which is that of each case where all have the same."""
    return [float(value) for value in np.median(np.asarray(sizes), axis=0)]


def resize_linear(array: Float32[np.ndarray, "c x y z"], shape: Sequence[int]) -> Float32[np.ndarray, "c i j k"]:
    """Resize linearly over the same field of view, with a triangle filter as wide as the step where an axis shrinks.

    Edges are extended. An axis that keeps its length keeps its values bit for bit.
    """
    order = sorted(range(3), key=lambda axis: shape[axis] / array.shape[axis + 1])
    for axis in order:
        length = array.shape[axis + 1]
        if length != shape[axis]:
            weights = resize_weights(length, shape[axis])
            array = np.moveaxis(np.tensordot(array, weights, axes=(axis + 1, 1)), -1, axis + 1)
    return np.ascontiguousarray(array, dtype=np.float32)


def resize_weights(source: int, target: int) -> Float32[np.ndarray, "i x"]:
    """Weights that resize one axis from ``source`` to ``target`` voxels; rows sum to 1. See :func:`resize_linear`."""
    step = source / target
    width = max(1.0, step)
    centres = (np.arange(target) + 0.5) * step - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(source)[None] - centres[:, None]) / width)
    normalised: Float32[np.ndarray, "i x"] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


def _cut(volume: Float32[np.ndarray, "c x y z"], boxes: Float64[np.ndarray, "n 2 3"]) -> Float32[np.ndarray, "n c *s"]:
    crops = []
    for start, size in boxes.astype(np.int64):
        x, y, z = (slice(a, a + b) for a, b in zip(start, size, strict=True))
        crops.append(volume[:, x, y, z])
    return np.stack(crops)


def _start_at(
    volume: Triple, crop: Triple, centres: Shaped[np.ndarray, "n 3"], rng: np.random.Generator
) -> tuple[int, int, int]:
    """Start of a crop centred on one of ``centres``, or anywhere if there are none, moved inside the volume."""
    free = np.asarray(volume) - np.asarray(crop)
    if len(centres):
        start = centres[rng.integers(len(centres))].astype(np.int64) - np.asarray(crop) // 2
    else:
        start = rng.integers(0, np.maximum(free, 0) + 1)
    start = np.where(free >= 0, np.clip(start, 0, np.maximum(free, 0)), free // 2)
    return int(start[0]), int(start[1]), int(start[2])


def _triple(name: str, values: Sequence[int]) -> Triple:
    if len(values) != 3 or any(int(value) != value or value < 1 for value in values):
        raise ConfigError(f"{name} is {list(values)}; it needs three whole numbers above 0.")
    return int(values[0]), int(values[1]), int(values[2])


def _floats(values: Sequence[float | int] | Float64[np.ndarray, " 3"]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
