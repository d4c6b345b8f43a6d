"""DICOM structure sets (RTSTRUCT) as label maps: closed planar contours filled on the grid of their image.

A voxel belongs to a region where its centre lies inside an odd number of the region's contours of that slice, so that a
contour inside another cuts a hole. A centre on the border counts where the inside follows along the array axes, so that
neighbours that share a border share no voxel. Names of regions, which are free text, are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.geometry import Geometry
from medssl.io.dicom import objects
from medssl.io.dicom.masks import Plane, Target, compose
from medssl.io.dicom.tags import CONTOURS
from medssl.io.source import Decoded

_FILLED = {"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"}
_CONTOUR_DATA = 0x30060050
_FARTHEST_MM = 1e6
_MOST_REGION = 65535
_INTERPRETED = {
    "EXTERNAL", "PTV", "CTV", "GTV", "TREATED_VOLUME", "IRRAD_VOLUME", "BOLUS", "AVOIDANCE", "ORGAN", "MARKER",
    "CONTRAST_AGENT", "CAVITY", "BRACHY_CHANNEL", "SUPPORT", "FIXATION", "CONTROL", "OAR",
}  # fmt: skip

_ON_SLICE_MM = 0.1
_TILT_SLICES = 0.5
# Of a voxel: positions come with three to six decimals, and a border on a voxel centre has to stay there.
_SNAP_DECIMALS = 3
_EDGES_AT_ONCE = 1024


@dataclass(frozen=True)
class _Contour:
    """A closed polygon: region, and corners (N, 3) as voxel indices of the image."""

    region: int
    corners: Float64[np.ndarray, "n 3"]


@dataclass(frozen=True)
class _Section:
    """What one region covers of one slice: polygons (N, 2) in voxels of that slice."""

    region: int
    slice: int
    polygons: tuple[Float64[np.ndarray, "n 2"], ...]


def read_contours(path: Path, *, on: Geometry | None) -> Decoded:
    """Regions of an RTSTRUCT file, filled on the grid of its image.

    Args:
        path: File.
        on: Grid of the image; its slices have to be parallel to the contours, whichever array axis counts them.

    Returns:
        One channel whose voxels hold ROI numbers; where regions overlap, one channel of 0 and 1 a region, in ascending
        order of their numbers. Facts are ``region_<number>``: the interpreted type, such as ORGAN or PTV.

    Raises:
        CaseError: E_NEEDS_IMAGE without ``on``; E_NO_REGION where nothing can be filled. GeometryError: E_GEOMETRY
            where no contour lies on the image, or one is tilted against its slices. ReadError: E_FORMAT, E_HEADER,
            E_TAG, E_BOMB.
    """
    if on is None:
        raise CaseError(
            f"{path}: contours are filled on the grid of an image, and none was given. Give the image with --on.",
            code="E_NEEDS_IMAGE",
        )
    with objects.parsing(path):
        dataset = objects.read_object(path, (CONTOURS,), name="DICOM structure set")
        contours, skipped = _contours(dataset, on, path=path)
        target = _target(contours, on)
        sections, warnings = _sections(contours, target, path=path)
        regions, renumbered = _regions({contour.region for contour in contours})

        def planes() -> Iterator[Plane]:
            for section in sections:
                yield Plane(regions[section.region], section.slice, _filled(section.polygons, target.shape[:2]))

        array, said = compose(planes, regions=sorted(regions.values()), target=target, path=path)
        facts = _facts(dataset, regions, path=path)
    if skipped:
        warnings += (f"W_CONTOUR_KIND: {skipped} points, lines and contours of less than three points were left out.",)
    return Decoded(array, on, "dicom", warnings + renumbered + said, unit="label", facts=facts)


def _contours(dataset: Any, on: Geometry, *, path: Path) -> tuple[list[_Contour], int]:
    """All that can be filled, by region, and how many others there are."""
    contours, skipped, seen = [], 0, set()
    for item in objects.items(dataset, "ROIContourSequence"):
        region = objects.whole(item, "ReferencedROINumber", path=path)
        if region in seen:
            raise ReadError(f"{path}: two lists of contours for ROI {region}. Export it again.", code="E_TAG")
        seen.add(region)
        for contour in objects.items(item, "ContourSequence"):
            points = _points(contour, region, path=path)
            if contour.get("ContourGeometricType") in _FILLED and len(points) >= 3:
                contours.append(_Contour(region, on.to_index(objects.ras(points))))
            else:
                skipped += 1
    if not contours:
        raise CaseError(
            f"{path}: no closed contour that could be filled. Give a structure set with drawn regions.",
            code="E_NO_REGION",
        )
    return sorted(contours, key=lambda contour: contour.region), skipped


def _points(contour: Any, region: int, *, path: Path) -> Float64[np.ndarray, "n 3"]:
    """Corners in LPS mm, read from the raw text: a plan holds a million numbers."""
    raw = contour.get_item(_CONTOUR_DATA)
    text = b"" if raw is None else raw.value or b""
    try:
        values = np.array(text.rstrip(b" \0").split(b"\\") if text else [], dtype=np.float64)
    except (ValueError, AttributeError):
        values = np.full(1, np.nan)
    promised = contour.get("NumberOfContourPoints")
    is_whole = values.size % 3 == 0 and (promised is None or int(promised) * 3 == values.size)
    if not is_whole or not (np.abs(values) < _FARTHEST_MM).all():
        raise ReadError(
            f"{path}: a contour of ROI {region} holds something else than its number of points in mm. Export it again.",
            code="E_TAG",
        )
    return values.reshape(-1, 3)


def _target(contours: Sequence[_Contour], on: Geometry) -> Target:
    """The image seen along the array axis in which contours extend least: this axis counts the slices."""
    extent = np.sum([np.ptp(contour.corners, axis=0) for contour in contours], axis=0)
    across = int(extent.argmin())
    u, v = (axis for axis in range(3) if axis != across)
    return Target(on, (u, v, across))


def _sections(contours: Sequence[_Contour], target: Target, *, path: Path) -> tuple[list[_Section], tuple[str, ...]]:
    """Contours sorted to slices; where a region has several planes for one slice, the nearest counts."""
    u, v, across = target.axes
    step_mm = target.geometry.spacing_mm[across]
    planes: dict[tuple[int, int], dict[float, list[Float64[np.ndarray, "n 2"]]]] = {}
    outside = cut = 0
    for contour in contours:
        along = contour.corners[:, across]
        if np.ptp(along) > _TILT_SLICES:
            raise GeometryError(
                f"{path}: a contour of ROI {contour.region} crosses {np.ptp(along) * step_mm:.3g} mm of slices; "
                "contours within a slice are needed. Give the image that was drawn on.",
                code="E_GEOMETRY",
            )
        place = round(float(along.mean()), _SNAP_DECIMALS)
        index = int(np.floor(place + 0.5))
        if not 0 <= index < target.shape[2]:
            outside += 1
            continue
        polygon = np.round(contour.corners[:, (u, v)], _SNAP_DECIMALS)
        cut += bool((polygon < -0.5).any() or (polygon > np.array(target.shape[:2]) - 0.5).any())
        planes.setdefault((contour.region, index), {}).setdefault(place, []).append(polygon)
    if not planes:
        raise GeometryError(
            f"{path}: none of {len(contours)} contours lies on a slice of the image. Give the image that was drawn on.",
            code="E_GEOMETRY",
        )
    sections, farther, farthest = [], 0, 0.0
    for (region, index), places in sorted(planes.items()):
        nearest = min(places, key=lambda place: (abs(place - index), place))
        farther += sum(map(len, places.values())) - len(places[nearest])
        farthest = max(farthest, abs(nearest - index) * step_mm)
        sections.append(_Section(region, index, tuple(places[nearest])))
    warnings = []
    if outside:
        warnings.append(f"W_CONTOUR_OFF: {outside} contours beyond the slices of the image were left out.")
    if farther:
        warnings.append(f"W_CONTOUR_OFF: {farther} contours were left out where another lies nearer to the slice.")
    if farthest > _ON_SLICE_MM:
        warnings.append(f"W_CONTOUR_OFF: contours lie up to {farthest:.3g} mm from the slice that they were put on.")
    if cut:
        warnings.append(f"W_CONTOUR_CUT: {cut} contours reach beyond the edge of the image and were cut there.")
    return sections, (*warnings, *_gaps(sections))


def _gaps(sections: Sequence[_Section]) -> Iterator[str]:
    """Regions with empty slices between filled ones: drawn on every other slice, or in several parts."""
    filled = Counter(section.region for section in sections)
    for region, count in filled.items():
        slices = [section.slice for section in sections if section.region == region]
        empty = max(slices) - min(slices) + 1 - count
        if empty:
            yield f"W_CONTOUR_GAP: ROI {region} has no contour on {empty} slices between its ends; they stay empty."


def _regions(numbers: set[int]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Label value of each ROI number: itself, or its rank where a number is no label value."""
    if min(numbers) >= 1 and max(numbers) <= _MOST_REGION:
        return {number: number for number in numbers}, ()
    ranks = {number: rank for rank, number in enumerate(sorted(numbers), start=1)}
    return ranks, ("W_ROI_NUMBER: an ROI number is no label value; regions were numbered from 1 in their order.",)


def _facts(dataset: Any, regions: dict[int, int], *, path: Path) -> dict[str, str | float]:
    facts: dict[str, str | float] = {}
    for item in objects.items(dataset, "RTROIObservationsSequence"):
        label = regions.get(objects.whole(item, "ReferencedROINumber", path=path))
        kind = item.get("RTROIInterpretedType")
        if label is not None and kind in _INTERPRETED:
            facts[f"region_{label}"] = str(kind)
    return facts


def _filled(polygons: Sequence[Float64[np.ndarray, "n 2"]], shape: tuple[int, int]) -> Bool[np.ndarray, "u v"]:
    """Voxel centres inside an odd number of polygons.

    Along each line of voxels in u, the sides that it crosses at or before a voxel are counted: odd is inside.
    """
    crossings = np.zeros((shape[1], shape[0] + 1), dtype=np.uint8)
    for polygon in polygons:
        ends = np.roll(polygon, -1, axis=0)
        for start in range(0, len(polygon), _EDGES_AT_ONCE):
            part = slice(start, start + _EDGES_AT_ONCE)
            lines, columns = _crossed(polygon[part], ends[part], shape)
            np.bitwise_xor.at(crossings, (lines, columns), 1)
    inside = np.bitwise_xor.accumulate(crossings, axis=1)[:, :-1]
    return inside.T.astype(bool)


def _crossed(
    starts: Float64[np.ndarray, "n 2"], ends: Float64[np.ndarray, "n 2"], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Line and first voxel at or behind each crossing of a side with a line of voxel centres.

    Sides are taken upwards, with their lower end and without the upper one, so that both neighbours of a shared side
    cross it at the same place.
    """
    is_up = (starts[:, 1] <= ends[:, 1])[:, None]
    low, high = np.where(is_up, starts, ends), np.where(is_up, ends, starts)
    first = np.clip(np.ceil(low[:, 1]), 0, shape[1]).astype(np.int64)
    stop = np.clip(np.ceil(high[:, 1]), 0, shape[1]).astype(np.int64)
    counts = stop - first
    side = np.repeat(np.arange(len(low)), counts)
    lines = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[side]
    lean = (high[side] - low[side]).T
    at = low[side, 0] + (lines - low[side, 1]) * lean[0] / lean[1]
    columns = np.clip(np.ceil(np.round(at, _SNAP_DECIMALS * 2)), 0, shape[0]).astype(np.int64)
    return lines, columns
