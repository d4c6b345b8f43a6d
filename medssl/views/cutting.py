"""How a crop lies over a case, which box is read for it, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, Triple, triple
from medssl.views.coordinates import atlas_coordinates, body_coordinates

_TOLERANCE = 1e-6  # voxels
_REDRAWS = 4


@dataclass(frozen=True)
class Cut:
    """A crop, laid over a place of a case.

    Where a voxel of the crop is at least twice as long as one of the case, the box is averaged by the whole factor,
    so that nothing aliases; label maps take the most frequent value, the lowest where two are.

    Args:
        place: The crop in voxels of the case.
        voxels: Voxels of the crop along each axis of the case.
        margin: Voxels of the crop that are read beyond it on each side.
        is_anywhere: Whether the voxel that should have been its centre was missing, so that any place was drawn.
        is_moved: Whether the place that was drawn did not do, so that another took its place.
        axes: The case's axis that each axis of the crop runs along.
        slab: How the voxels behind each other become one, along an axis where the crop has one voxel.
    """

    place: Box
    voxels: Triple
    margin: Triple = (0, 0, 0)
    is_anywhere: bool = False
    is_moved: bool = False
    axes: Triple = (0, 1, 2)
    slab: Literal["mean", "max"] = "mean"

    @cached_property
    def step(self) -> Float64[np.ndarray, " 3"]:
        """Voxels of the case a voxel of the crop, along each axis of the case."""
        step = np.asarray(self.place.size) / np.asarray(self.voxels)
        whole = np.round(step)
        snapped: Float64[np.ndarray, " 3"] = np.where((whole > 0) & (np.abs(step - whole) < _TOLERANCE), whole, step)
        return snapped

    @cached_property
    def factor(self) -> Int64[np.ndarray, " 3"]:
        """Voxels of the case that are averaged to one of the box."""
        factor: Int64[np.ndarray, " 3"] = np.maximum(1, np.floor(self.step)).astype(np.int64)
        return factor

    @cached_property
    def box_start(self) -> Int64[np.ndarray, " 3"]:
        """First voxel of the case that is read."""
        first = self._first - np.asarray(self.margin) * self.step - (self.factor - 1) / 2
        start: Int64[np.ndarray, " 3"] = np.floor(first + _TOLERANCE).astype(np.int64)
        return start

    @cached_property
    def box_shape(self) -> Int64[np.ndarray, " 3"]:
        """Voxels that the box needs, along the axes of the crop."""
        beyond = (np.asarray(self.voxels) - 1 + np.asarray(self.margin)) * self.step / self.factor
        shape: Int64[np.ndarray, " 3"] = np.ceil(self._in_box + beyond - _TOLERANCE).astype(np.int64) + 1
        return shape[list(self.axes)]

    @cached_property
    def to_case(self) -> Float64[np.ndarray, "4 4"]:
        """Crop voxel index to voxel index of the case."""
        return self._homogeneous(self.step, self._first)

    @cached_property
    def to_box(self) -> Float64[np.ndarray, "4 4"]:
        """Crop voxel index to voxel index of the box; both have the axes of the crop."""
        matrix = self._homogeneous(self.step / self.factor, self._in_box)
        matrix[:3] = matrix[list(self.axes)]
        return matrix

    def read(
        self, case: CaseArrays, name: str, shape: Int64[np.ndarray, " 3"] | None = None
    ) -> Shaped[np.ndarray, "c x y z"]:
        """The box in the stored type, of ``shape`` (along the axes of the crop) or as large as is needed."""
        size = np.empty(3, np.int64)
        size[list(self.axes)] = self.box_shape if shape is None else shape
        data = case.read(name, self.box_start.tolist(), (size * self.factor).tolist())
        if (self.factor > 1).any():
            data = self._border_extended(data, case)
            data = self._average(data) if name == "image" else _majority(data, self.factor)
        if self.axes != (0, 1, 2):
            data = np.ascontiguousarray(data.transpose(0, *(axis + 1 for axis in self.axes)))
        return data

    def is_constant(self, box: Shaped[np.ndarray, "c x y z"]) -> bool:
        """Whether the part of ``box`` under the crop has one value only in each channel."""
        first = self.to_box[:3, 3]
        last = first + np.diagonal(self.to_box)[:3] * (np.asarray(self.voxels)[list(self.axes)] - 1)
        low, high = np.floor(first + _TOLERANCE).astype(int), np.ceil(last - _TOLERANCE).astype(int) + 1
        part = box[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        one = part[:, :1, :1, :1]
        is_varied = (part[:, ::8, ::8, ::8] != one).any() or (part != one).any()
        return not is_varied

    def padded_share(self, case: CaseArrays) -> float:
        """Share of the crop that lies outside the volume."""
        inside = 1.0
        for start, size, length in zip(self.place.start, self.place.size, case.shape, strict=True):
            inside *= max(0.0, min(start + size, length) - max(start, 0.0)) / size
        return max(0.0, round(1.0 - inside, 9))

    def corners(self) -> Float64[np.ndarray, "2 3"]:
        """Voxel index of the low and the high corner; half a voxel off the centres of the corner voxels."""
        start, size = self.place.to_array()
        return np.stack([start - 0.5, start + size - 0.5])

    @cached_property
    def _first(self) -> Float64[np.ndarray, " 3"]:
        """Voxel index, in the case, of the centre of the crop's first voxel."""
        return np.asarray(self.place.start) + (self.step - 1) / 2

    @cached_property
    def _in_box(self) -> Float64[np.ndarray, " 3"]:
        """The same in the box, along the axes of the case."""
        first: Float64[np.ndarray, " 3"] = (self._first - self.box_start - (self.factor - 1) / 2) / self.factor
        return first

    def _homogeneous(
        self, scale: Float64[np.ndarray, " 3"], shift: Float64[np.ndarray, " 3"]
    ) -> Float64[np.ndarray, "4 4"]:
        matrix = np.zeros((4, 4))
        matrix[list(self.axes), range(3)] = scale[list(self.axes)]
        matrix[:3, 3], matrix[3, 3] = shift, 1.0
        return matrix

    def _border_extended(self, data: Shaped[np.ndarray, "c x y z"], case: CaseArrays) -> Shaped[np.ndarray, "c x y z"]:
        """Blocks that lie in the volume in part get its border in place of the filling, which is no tissue."""
        for axis, factor in enumerate(self.factor.tolist()):
            low = max(0, -int(self.box_start[axis]))
            high = min(data.shape[axis + 1], case.shape[axis] - int(self.box_start[axis]))
            if low < high and (low % factor or high % factor):
                index = np.arange(data.shape[axis + 1])
                index[low - low % factor : low] = low
                index[high : high + -high % factor] = high - 1
                data = data.take(index, axis=axis + 1)
        return data

    def _average(self, data: Shaped[np.ndarray, "c x y z"]) -> Shaped[np.ndarray, "c i j k"]:
        """Average, or take the maximum of, blocks of ``factor`` voxels; whole numbers stay whole."""
        dtype = data.dtype
        count = 1
        for axis, factor in enumerate(self.factor.tolist()):
            layers = [data[(slice(None),) * (axis + 1) + (slice(layer, None, factor),)] for layer in range(factor)]
            if self.slab == "max" and self.voxels[axis] == 1:
                data = np.maximum.reduce(layers)
            elif factor > 1:
                data, count = layers[0].astype(np.float32), count * factor
                for layer in layers[1:]:
                    data += layer
        mean = data / np.float32(count) if count > 1 else data
        return (np.rint(mean) if np.issubdtype(dtype, np.integer) else mean).astype(dtype, copy=False)


class Views(NamedTuple):
    """Crops of one kind from one case.

    Args:
        case: Where they come from.
        cuts: How each lies.
        boxes: What was read for each.
        is_constant: Whether each still had one value only after the last draw.
    """

    case: CaseArrays
    cuts: tuple[Cut, ...]
    boxes: Shaped[np.ndarray, "n c x y z"]
    is_constant: tuple[bool, ...]

    def fields(self, name: str) -> dict[str, np.ndarray]:
        """The named arrays of a stack of crops; see :class:`~medssl.views.base.ViewSampler`."""
        case, cuts = self.case, self.cuts
        spacing = np.asarray(case.spacing_mm)
        corners = np.stack([cut.corners() for cut in cuts])
        found = {
            name: self.boxes,
            f"{name}_to_box": np.stack([cut.to_box for cut in cuts]),
            f"{name}_spacing_mm": np.stack([(cut.step * spacing)[list(cut.axes)] for cut in cuts]),
            f"{name}_affine": np.stack([case.affine @ cut.to_case for cut in cuts]),
            f"{name}_body": np.sort(body_coordinates(case, corners), axis=1).astype(np.float32),
        }
        if case.atlas_affine is not None:
            found[f"{name}_atlas"] = atlas_coordinates(case, corners).astype(np.float32)
        return found

    def single(self, name: str) -> dict[str, np.ndarray]:
        """The named arrays of the only crop."""
        return {key: value[0] for key, value in self.fields(name).items()}


def read_views(case: CaseArrays, draws: Sequence[Callable[[], Sequence[Cut]]]) -> Views:
    """Draw groups of crops and read their boxes, all of one shape.

    A group with a crop of one value only is drawn again, up to four times.

    Args:
        case: The case.
        draws: Each gives one group; at every call of the same sizes, at places that differ by whole voxels.
    """
    groups = [draw() for draw in draws]
    shape = np.max([cut.box_shape for group in groups for cut in group], axis=0)
    cuts: list[Cut] = []
    boxes: list[Shaped[np.ndarray, "c x y z"]] = []
    constant: list[bool] = []
    for draw, first in zip(draws, groups, strict=True):
        group, read, blank = _read_group(case, first, shape)
        for _ in range(_REDRAWS):
            if not any(blank):
                break
            group, read, blank = _read_group(case, draw(), shape)
        cuts += group
        boxes += read
        constant += blank
    stack = np.stack(boxes) if len(boxes) > 1 else boxes[0][None]  # a single one is not copied
    return Views(case, tuple(cuts), stack, tuple(constant))


def notes(*views: Views) -> dict[str, np.ndarray]:
    """What is told of a sample beside its arrays; see :class:`~medssl.views.base.ViewSampler`."""
    padded = [cut.padded_share(view.case) for view in views for cut in view.cuts]
    anywhere = [cut.is_anywhere for view in views for cut in view.cuts]
    constant = [flag for view in views for flag in view.is_constant]
    return {
        "note_padded": _mean(padded),
        "note_anywhere": _mean(anywhere),
        "note_constant": _mean(constant),
    }


def _mean(values: Sequence[float]) -> np.ndarray:
    """By plain arithmetic: of a handful of numbers numpy makes fifty times the work."""
    return np.asarray(sum(values) / len(values), np.float32)


def _read_group(
    case: CaseArrays, group: Sequence[Cut], shape: Int64[np.ndarray, " 3"]
) -> tuple[Sequence[Cut], list[Shaped[np.ndarray, "c x y z"]], list[bool]]:
    boxes = [cut.read(case, "image", shape) for cut in group]
    return group, boxes, [cut.is_constant(box) for cut, box in zip(group, boxes, strict=True)]


def _majority(data: Shaped[np.ndarray, "c x y z"], factor: Int64[np.ndarray, " 3"]) -> Shaped[np.ndarray, "c i j k"]:
    """Most frequent value of each block of ``factor`` voxels, the lowest of those that are equally frequent."""
    x, y, z = triple("box", (np.asarray(data.shape[1:]) // factor).tolist())
    blocks = data.reshape(len(data), x, factor[0], y, factor[1], z, factor[2])
    found = np.zeros((len(data), x, y, z), data.dtype)
    most = np.zeros(found.shape, np.int64)
    for value in np.unique(data):
        count = (blocks == value).sum(axis=(2, 4, 6))
        found = np.where(count > most, value, found)
        most = np.maximum(most, count)
    return found
