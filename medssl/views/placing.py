"""Where a crop may lie: its size in voxels of the case, and the draw of its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeGuard

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from pydantic import BeforeValidator

from medssl.errors import CaseError, ConfigError
from medssl.views.base import BODY, CaseArrays
from medssl.views.boxes import Triple
from medssl.views.coordinates import AXES, anatomical_axes, body_coordinates

Region = Mapping[str, tuple[float, float]]

_TOLERANCE = 1e-6  # voxels; below what a double loses in mm


def _edges(value: object) -> object:
    if value is None:
        return None
    if not _are_numbers(value, 3) or min(value) <= 0:
        raise ValueError("give three numbers in mm above 0, such as [64, 64, 64]")
    return tuple(value)


def _shares(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("write {SI: [0.3, 0.7]}; the part of the body belongs in the preparation")
    if (fault := _region_fault(value)) is not None:
        raise ValueError(fault)
    return {axis: tuple(bounds) for axis, bounds in value.items()}


def _region_fault(region: Mapping[str, object]) -> str | None:
    """What is wrong with a region as somebody wrote it, and what to write."""
    for axis, bounds in region.items():
        if axis not in AXES:
            return f"there is no axis {axis}; axes are {', '.join(AXES)}, as in {{SI: [0.3, 0.7]}}"
        if not _are_numbers(bounds, 2) or not all(0 <= bound <= 1 for bound in bounds):
            return f"{axis} needs two shares of the body, from 0 to 1; write {{{axis}: [0.3, 0.7]}}"
        if bounds[0] > bounds[1]:
            return f"the bounds of {axis} are swapped; write {{{axis}: [{bounds[1]}, {bounds[0]}]}}"
    return None


def _are_numbers(value: object, count: int) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
    )


EdgesMm = Annotated[tuple[float, float, float] | None, BeforeValidator(_edges)]
"""Three edge lengths in mm above 0, as an option of a configuration."""

RegionOption = Annotated[dict[str, tuple[float, float]] | None, BeforeValidator(_shares)]
"""A :data:`Region` as an option of a configuration."""


@dataclass(frozen=True)
class Placing:
    """Which places of a crop are drawn.

    Args:
        inside_body: Whether centres are drawn from the body mask.
        region: ``{"SI": (0.3, 0.7)}``: the share of the body box, along each axis named, that centres lie in.

    Raises:
        ConfigError: for an unknown axis, or bounds that are not two shares in order.
    """

    inside_body: bool = False
    region: Region = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (fault := _region_fault(self.region)) is not None:
            raise ConfigError(f"region: {fault}.")

    def body(self, case: CaseArrays) -> Shaped[np.ndarray, "n 3"]:
        """Sampled voxels of the body in the region; none if they are not wanted, or there is no mask."""
        if not self.inside_body or not case.has("body"):
            return np.empty((0, 3), np.int32)
        return self.within(case, case.foreground_voxels(BODY))

    def within(self, case: CaseArrays, voxels: Shaped[np.ndarray, "n 3"]) -> Shaped[np.ndarray, "m 3"]:
        """Those of ``voxels`` that lie in the region."""
        if not self.region or not len(voxels):
            return voxels
        shares = body_coordinates(case, voxels)
        inside = np.ones(len(voxels), bool)
        for axis, (low, high) in self.region.items():
            inside &= (shares[:, AXES[axis]] >= low) & (shares[:, AXES[axis]] <= high)
        return voxels[inside]

    def start(
        self,
        case: CaseArrays,
        size: Float64[np.ndarray, " 3"],
        centres: Shaped[np.ndarray, "n 3"],
        rng: np.random.Generator,
    ) -> Float64[np.ndarray, " 3"]:
        """First face of a crop, a whole voxel, moved inside the volume; where the volume is smaller, in its middle.

        Args:
            case: The case.
            size: Edge lengths of the crop in voxels of the case.
            centres: Voxels of which one is to be the centre; if there are none, anywhere in the region.
            rng: Source of the draw.
        """
        free = np.floor(np.asarray(case.shape) - size + _TOLERANCE)
        most = np.maximum(free, 0)
        if len(centres):
            start = np.floor(centres[rng.integers(len(centres))] + 0.5 - size / 2)
        else:
            low, high = self._bounds(case, size, most)
            start = rng.integers(low, high + 1).astype(np.float64)
        middle = np.ceil((np.asarray(case.shape) - size) / 2 - 0.5 - _TOLERANCE)
        placed: Float64[np.ndarray, " 3"] = np.where(free >= 0, np.clip(start, 0, most), middle)
        return placed

    def _bounds(
        self, case: CaseArrays, size: Float64[np.ndarray, " 3"], most: Float64[np.ndarray, " 3"]
    ) -> tuple[Int64[np.ndarray, " 3"], Int64[np.ndarray, " 3"]]:
        """First and last start with the centre in the region, in [0, ``most``]; the nearest one if there is none."""
        low, high = np.zeros(3), most.copy()
        body_start, body_size = case.body_box
        axes, is_reversed = anatomical_axes(case)
        for name, bounds in self.region.items():
            axis = axes[AXES[name]]
            shares = (1 - bounds[1], 1 - bounds[0]) if is_reversed[AXES[name]] else bounds
            first, last = (body_start[axis] + share * body_size[axis] - size[axis] / 2 for share in shares)
            if math.ceil(first) > math.floor(last):
                first = last = round((first + last) / 2)
            low[axis] = np.clip(math.ceil(first), 0, most[axis])
            high[axis] = np.clip(math.floor(last), 0, most[axis])
        return low.astype(np.int64), high.astype(np.int64)


def size_in_voxels(
    case: CaseArrays, crop_voxels: Sequence[int], crop_mm: Sequence[float] | None
) -> Float64[np.ndarray, " 3"]:
    """Edge lengths, in voxels of the case, of a crop of ``crop_voxels`` that is ``crop_mm`` large.

    An axis of one voxel is one slice of the case, whatever ``crop_mm`` says.

    Raises:
        CaseError: E_SPACING_UNKNOWN, if a size in mm meets a case whose voxel size is not known.
    """
    voxels = np.asarray(crop_voxels, np.float64)
    if crop_mm is None:
        return voxels
    require_mm(case, "crop_mm")
    size: Float64[np.ndarray, " 3"] = np.where(voxels == 1, 1.0, np.asarray(crop_mm) / np.asarray(case.spacing_mm))
    return size


def require_mm(case: CaseArrays, option: str) -> None:
    """Refuse a case whose voxel size is not known.

    Raises:
        CaseError: E_SPACING_UNKNOWN; names the option that is given in mm.
    """
    if not case.is_metric:
        raise CaseError(
            f"case {case.case_id}: its voxel size in mm is not known, and {option} needs it. "
            f"Set assume_spacing_mm in the preparation and prepare again, or leave {option} out.",
            code="E_SPACING_UNKNOWN",
        )


def positive(name: str, values: Sequence[float] | None, count: int = 3) -> tuple[float, ...] | None:
    """Edge lengths above 0, or None.

    Raises:
        ConfigError: if they are not ``count`` numbers above 0; names the option.
    """
    if values is None:
        return None
    if len(values) != count or min(values) <= 0:
        raise ConfigError(f"{name} is {list(values)}; it needs {count} numbers above 0.")
    return tuple(float(value) for value in values)


def margin_voxels(margin: float | Sequence[float], crop_voxels: Sequence[int]) -> Triple:
    """Voxels of the crop that are read beyond it on each side, from a share of its edge; none along a single slice.

    Raises:
        ConfigError: if a share is below 0, or there is not one for each axis.
    """
    count = len(crop_voxels)
    shares = tuple(margin) if isinstance(margin, Sequence) else (margin,) * count
    if len(shares) != count or min(shares) < 0:
        raise ConfigError(f"margin is {margin}; it needs one share, or one for each axis, of at least 0.")
    pairs = zip(shares, crop_voxels, strict=True)
    x, y, z = (0 if n == 1 else math.ceil(share * n - _TOLERANCE) for share, n in pairs)
    return x, y, z
