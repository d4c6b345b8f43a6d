"""Crops on a grid and targets between them, for tasks that learn where a crop lies; and linear resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from medssl.errors import ConfigError
from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, Triple, grid_boxes, position_labels, triple
from medssl.views.cutting import Cut, Views, notes
from medssl.views.placing import Placing, positive, require_mm


class GridCrops:
    """Base crops on a grid, target crops at random places in it, and how much of each target lies in each base.

    The window is the whole volume in ``resize`` mode and a random box of ``grid * cell_mm`` in ``crop`` mode. It is
    resized linearly to ``grid * crop_voxels`` and cut there, so that all overlaps are exact; the boxes in mm follow
    the resizing, each axis by its own factor. Crops are float32 where the window is resized, and of the stored type
    where it is taken as it is.

    Gives ``bases`` (K, C, *crop) and ``targets`` (R, C, *crop) with their fields and notes (see
    :class:`~medssl.views.base.ViewSampler`), ``overlap`` (R, K), ``base_boxes_mm`` (K, 2, 3) and ``target_boxes_mm``
    (R, 2, 3) within the prepared volume. The notes are those of the targets. Base ``(i, j, k)`` is
    number ``(i * gy + j) * gz + k``.

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
        self.grid = triple("grid", grid)
        self.crop_voxels = triple("crop_voxels", crop_voxels)
        self.num_targets = num_targets
        self.position_mode = position_mode
        self.cell_mm = positive("cell_mm", cell_mm)
        if num_targets < 1:
            raise ConfigError(f"num_targets is {num_targets}; it must be above 0.")
        self.base_boxes = grid_boxes(self.grid, self.crop_voxels)

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut bases and targets from ``cases[0]``.

        Raises:
            CaseError: E_SPACING_UNKNOWN, if ``cell_mm`` is used with a case whose voxel size is not known.
        """
        case = cases[0]
        window = self._window(case, rng)
        volume = case.read("image", [int(value) for value in window.start], [int(value) for value in window.size])
        if self._is_resized:
            volume = resize_linear(volume, self._extent())
        target_boxes = self.draw_targets(rng)
        voxel_mm = self.voxel_mm(case)
        shift = np.stack([np.asarray(window.start) * np.asarray(case.spacing_mm), np.zeros(3)])
        bases, targets = (self._views(case, volume, window, boxes) for boxes in (self.base_boxes, target_boxes))
        return {
            **bases.fields("bases"),
            **targets.fields("targets"),
            "bases_to_box": np.tile(np.eye(4), (len(self.base_boxes), 1, 1)),  # the window is resized already
            "targets_to_box": np.tile(np.eye(4), (self.num_targets, 1, 1)),
            "overlap": position_labels(target_boxes, self.base_boxes),
            "base_boxes_mm": self.base_boxes * voxel_mm + shift,
            "target_boxes_mm": target_boxes * voxel_mm + shift,
            **notes(targets),
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

    @property
    def _is_resized(self) -> bool:
        return self.position_mode == "resize" or self.cell_mm is not None

    def _extent(self) -> Triple:
        """Voxels of the window after resizing."""
        return triple("extent", [g * r for g, r in zip(self.grid, self.crop_voxels, strict=True)])

    def _window_shape(self, case: CaseArrays) -> Triple:
        """Voxels of the case, along each axis, that the grid is laid over."""
        if self.position_mode == "resize":
            return case.shape
        if self.cell_mm is None:
            return self._extent()
        require_mm(case, "cell_mm")
        cells = zip(self.grid, self.cell_mm, case.spacing_mm, strict=True)
        return triple("window", [max(1, round(g * cell / spacing)) for g, cell, spacing in cells])

    def _window(self, case: CaseArrays, rng: np.random.Generator) -> Box:
        """What the grid is laid over, in voxels of the case."""
        shape = np.asarray(self._window_shape(case), np.float64)
        if self.position_mode == "resize":
            return Box.at(np.zeros(3), shape)
        return Box.at(Placing().start(case, shape, np.empty((0, 3), np.int32), rng), shape)

    def _views(
        self, case: CaseArrays, volume: Shaped[np.ndarray, "c x y z"], window: Box, boxes: Float64[np.ndarray, "n 2 3"]
    ) -> Views:
        """Crops of the resized window, each its own box, with the place in the case that it shows."""
        step = np.asarray(window.size) / np.asarray(self._extent())
        crops, cuts = [], []
        for start, size in boxes:
            x, y, z = (slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True))
            crops.append(volume[:, x, y, z])
            cuts.append(Cut(Box.at(np.asarray(window.start) + start * step, size * step), self.crop_voxels))
        constant = tuple(bool((crop == crop[:, :1, :1, :1]).all()) for crop in crops)
        return Views(case, tuple(cuts), np.stack(crops), constant)


def resize_linear(array: Shaped[np.ndarray, "c x y z"], shape: Sequence[int]) -> Float32[np.ndarray, "c i j k"]:
    """Resize linearly over the same field of view, with a triangle filter as wide as the step where an axis shrinks.

    Edges are extended. An axis that keeps its length keeps its values bit for bit.
    """
    array = array.astype(np.float32, copy=False)
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
