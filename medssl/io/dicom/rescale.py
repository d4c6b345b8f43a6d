"""Stored values to output values: slope and intercept of every frame, padding, and signs that the header has wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Shaped

from medssl.errors import ReadError

R = TypeVar("R")

_AIR_HU = -1024.0
_MOST_HU = 3071.0
_LOW_QUARTER, _HIGH_QUARTER = 1 << 14, 3 << 14


@dataclass(frozen=True)
class Scale:
    """How the stored values of one frame become output values.

    Args:
        slope: Factor.
        intercept: Added after it.
        padding: Lowest and highest stored value that stand for no data.
    """

    slope: float = 1.0
    intercept: float = 0.0
    padding: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Values:
    """Output values of a frame: ends without and with padding, voxels of padding, and where padding lies."""

    inner: tuple[float, float]
    outer: tuple[float, float]
    padded: int = 0
    padding: tuple[float, float] = (0.0, 0.0)


def checked_scale(slope: float, intercept: float, padding: tuple[float, float] | None, *, path: Path) -> Scale:
    """Scale of a frame.

    Raises:
        ReadError: E_RESCALE for a slope of zero, or numbers that are not finite.
    """
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise ReadError(
            f"{path}: rescale slope {slope:g} and intercept {intercept:g}; finite numbers and a slope other than 0 are "
            "needed. Take the source.",
            code="E_RESCALE",
        )
    return Scale(slope, intercept, padding)


def signed_if_wrapped(
    array: Shaped[np.ndarray, "c z y x"], scales: Sequence[Scale], *, fix: bool, path: Path
) -> tuple[Shaped[np.ndarray, "c z y x"], tuple[str, ...]]:
    """Find values of 16 bits that are signed and labelled unsigned: all near 0 or near 65536, nothing between.

    Args:
        array: Stored values of a CT, which has no values that far apart.
        scales: One a frame; padding says nothing about the sign.
        fix: Take them as signed; else they are refused.
        path: For messages.

    Raises:
        ReadError: E_SIGNEDNESS.
    """
    if array.dtype != np.uint16 or array.max() < _HIGH_QUARTER:
        return array, ()
    if ((array >= _LOW_QUARTER) & (array < _HIGH_QUARTER)).any():
        return array, ()
    if not any(_is_high(array[:, z], scale.padding) for z, scale in enumerate(scales)):
        return array, ()
    if not fix:
        raise ReadError(
            f"{path}: stored values up to {int(array.max())} with none from {_LOW_QUARTER} to {_HIGH_QUARTER - 1} are "
            "signed but labelled unsigned. Read it with fix_signedness, or correct the header.",
            code="E_SIGNEDNESS",
        )
    return array.view(np.int16), ("W_SIGNEDNESS: values labelled unsigned were taken as signed.",)


def _is_high(stored: np.ndarray[Any, Any], padding: tuple[float, float] | None) -> bool:
    """Whether a frame has values near 65536 that are no padding."""
    high = stored[stored >= _HIGH_QUARTER]
    return bool((high if padding is None else high[(high < padding[0]) | (high > padding[1])]).size)


def rescaled(
    array: Shaped[np.ndarray, "c z y x"], scales: Sequence[Scale], *, is_hu: bool
) -> tuple[Shaped[np.ndarray, "c z y x"], tuple[str, ...]]:
    """Apply slope and intercept frame by frame, and fill what is padding.

    Whole slopes and intercepts keep integers (int16 where all values fit, else int32); all others give float32.
    Padding that lies outside the values of an image takes air in HU, else the smallest other value. The array may be
    changed in place.

    Args:
        array: Stored grey values.
        scales: One a frame, along z.
        is_hu: Whether the output is HU.

    Returns:
        Output values of one type, and a warning that tells the share of padding.
    """
    is_plain = all((scale.slope, scale.intercept) == (1, 0) for scale in scales)
    if is_plain and all(scale.padding is None for scale in scales):
        return array, ()
    values = _side_by_side(lambda z: _values(array[:, z], scales[z]), len(scales))
    low, high = min(found.inner[0] for found in values), max(found.inner[1] for found in values)
    filled = [found.padded > 0 and _is_outside(found.padding, low, high, is_hu=is_hu) for found in values]
    fill = _AIR_HU if is_hu else low
    ends = [found.inner if is_filled else found.outer for found, is_filled in zip(values, filled, strict=True)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    said: tuple[str, ...] = ()
    if any(filled):
        low, high = min(low, fill), max(high, fill)
        share = sum(found.padded for found, is_filled in zip(values, filled, strict=True) if is_filled) / array.size
        said = (f"W_PADDING: {share:.1%} of the voxels are padding and were set to {fill:.6g}.",)
    target = _target(array, scales, low, high, is_plain=is_plain)
    _side_by_side(lambda z: _apply(array[:, z], target[:, z], scales[z], fill=fill if filled[z] else None), len(scales))
    return target, said


def _side_by_side(function: Callable[[int], R], count: int) -> list[R]:
    """Results for every slice, a run of neighbours on each core."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        runs = [range(count * i // cores, count * (i + 1) // cores) for i in range(cores)]
        return [result for run in pool.map(lambda run: [function(z) for z in run], runs) for result in run]


def _target(
    array: np.ndarray[Any, Any], scales: Sequence[Scale], low: float, high: float, *, is_plain: bool
) -> np.ndarray[Any, Any]:
    """Where the output goes: the array itself, under another type if need be, or a new one."""
    is_whole = all(float(n).is_integer() for scale in scales for n in (scale.slope, scale.intercept))
    if array.dtype.kind == "f" or not is_whole:
        return array if is_plain else np.empty(array.shape, np.float32)
    if is_plain and _fits(low, high, array.dtype):
        return array
    if _fits(low, high, np.dtype(np.int16)):
        return array.view(np.int16) if array.itemsize == 2 else np.empty(array.shape, np.int16)
    return np.empty(array.shape, np.int32 if _fits(low, high, np.dtype(np.int32)) else np.float32)


def _apply(stored: np.ndarray[Any, Any], target: np.ndarray[Any, Any], scale: Scale, *, fill: float | None) -> None:
    mask = None
    if fill is not None and scale.padding is not None:
        mask = (stored >= scale.padding[0]) & (stored <= scale.padding[1])
    if (scale.slope, scale.intercept) == (1, 0) and np.may_share_memory(stored, target):
        pass
    elif np.may_share_memory(stored, target):  # sums modulo 65536 are right, since all results fit
        bits = target.view(np.uint16)
        if scale.slope != 1:
            bits *= np.uint16(int(scale.slope) % 65536)
        bits += np.uint16(int(scale.intercept) % 65536)
    elif target.dtype.kind == "i":
        target[...] = stored.astype(np.int64) * int(scale.slope) + int(scale.intercept)
    else:
        target[...] = stored.astype(np.float64) * scale.slope + scale.intercept
    if mask is not None:
        target[mask] = fill


def _values(frame: np.ndarray[Any, Any], scale: Scale) -> _Values:
    def output(low: float, high: float) -> tuple[float, float]:
        ends = (scale.slope * low + scale.intercept, scale.slope * high + scale.intercept)
        return min(ends), max(ends)

    least, most = float(frame.min()), float(frame.max())
    outer = output(least, most)
    if scale.padding is None or scale.padding[1] < least or scale.padding[0] > most:
        return _Values(outer, outer)
    others = frame[(frame < scale.padding[0]) | (frame > scale.padding[1])]
    inner = output(float(others.min()), float(others.max())) if others.size else (math.inf, -math.inf)
    return _Values(inner, outer, frame.size - others.size, output(*scale.padding))


def _is_outside(padding: tuple[float, float], low: float, high: float, *, is_hu: bool) -> bool:
    """Whether padding cannot be taken for tissue; 0 below everything else is a floor already."""
    if low > high:
        return False
    if is_hu:
        return padding[1] < _AIR_HU or padding[0] > _MOST_HU
    return (padding[1] < low and padding[1] != 0) or padding[0] > high


def _fits(low: float, high: float, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= low and high <= limits.max)
