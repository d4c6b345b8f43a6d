"""DICOM segmentations (SEG) as label maps on the grid of their image, or on the smallest regular grid of their own.

The number of a segment is its label value. Free text, such as the name of a segment, is never read; of the coded
property types those of well-known schemes are kept.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer, Shaped
from pydicom.encaps import generate_frames

from medssl import codecs
from medssl.errors import CaseError, GeometryError, ReadError
from medssl.geometry import Geometry
from medssl.io.dicom import objects
from medssl.io.dicom.masks import Plane, Target, compose
from medssl.io.dicom.tags import BIG_ENDIAN, EXPLICIT, IMPLICIT, SEGMENTATIONS
from medssl.io.source import Decoded
from medssl.io.values import checked_grid, label_dtype

_NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN}
_TYPES = ("BINARY", "FRACTIONAL", "LABELMAP")
_MOST_SEGMENTS = 65535
_FRAMES_AT_ONCE = 64
_SCHEMES = {"SCT", "SRT", "SNM3", "DCM", "FMA", "UMLS", "NCIt", "RADLEX"}
_CODE = re.compile(r"[0-9A-Za-z.-]{1,16}")

_ON_GRID_MM = 0.1
_SAME_SLICE_MM = 0.01
_UNEVEN_MM, _UNEVEN_SHARE = 0.05, 0.01
_UNIT_LENGTH, _RIGHT_ANGLE = 0.01, 1e-3


@dataclass(frozen=True)
class _Place:
    """Where a frame lies: world RAS+ mm of its first pixel, and the steps from column to column and row to row."""

    corner: Float64[np.ndarray, " 3"]
    right: Float64[np.ndarray, " 3"]
    down: Float64[np.ndarray, " 3"]
    between_mm: float | None
    thickness_mm: float | None


@dataclass(frozen=True)
class _Frame:
    """One picture of the file; ``segment`` is None in a label map, which holds all of them."""

    segment: int | None
    place: _Place | None


def read_segmentation(path: Path, *, on: Geometry | None = None) -> Decoded:
    """Segments of a DICOM SEG file of type BINARY, FRACTIONAL or LABELMAP.

    Args:
        path: File.
        on: Grid of the image; each frame has to be a whole slice of it, to 0.1 mm. Without it the grid is the smallest
            regular one of the frames, where slices without a frame are empty.

    Returns:
        One channel whose voxels hold segment numbers; where segments overlap, one channel of 0 and 1 a segment, in
        ascending order of their numbers. Facts are ``region_<number>``: coding scheme and code value.

    Raises:
        ReadError: E_FORMAT, E_HEADER, E_TAG, E_PIXEL_LENGTH, E_BOMB, and those of decoding. GeometryError: E_GEOMETRY
            off the grid ``on``; E_NO_GEOMETRY, E_IOP, E_NONUNIFORM, E_SPACING without it. CaseError: E_DUP_POSITION for
            two frames of a segment at one place, E_LABEL_VALUE for numbers without a segment.
    """
    with objects.parsing(path):
        dataset = objects.read_object(path, SEGMENTATIONS, name="DICOM segmentation")
        kind = dataset.get("SegmentationType")
        if kind not in _TYPES:
            raise ReadError(f"{path}: SegmentationType is none of {', '.join(_TYPES)}. Export it again.", code="E_TAG")
        facts = _segments(dataset, is_map=kind == "LABELMAP", path=path)
        regions = sorted(facts)
        frames = _frames(dataset, regions, is_map=kind == "LABELMAP", path=path)
        size = (objects.whole(dataset, "Columns", path=path), objects.whole(dataset, "Rows", path=path))
        if on is None:
            target, slices, warnings = _own_target(frames, size, path=path)
        else:
            target, slices, warnings = *_given_target(frames, size, on, path=path), ()
        _refuse_doubles(frames, slices, path=path)
        picture = _pictures(dataset, size, len(frames), path=path)
        if kind == "LABELMAP":
            array = _label_map(picture, slices, regions, target, background=dataset.get("PixelPaddingValue"), path=path)
        else:
            least = 1
            if kind == "FRACTIONAL":
                least = (objects.whole(dataset, "MaximumFractionalValue", path=path) + 1) // 2
                warnings += ("W_FRACTIONAL: values of half the maximum and above became the segment, the rest not.",)

            def planes() -> Iterator[Plane]:
                for index, (frame, place) in enumerate(zip(frames, slices, strict=True)):
                    yield Plane(int(frame.segment or 0), place, picture(index) >= least)

            array, said = compose(planes, regions=regions, target=target, path=path)
            warnings += said
    named = {f"region_{number}": meaning for number, meaning in facts.items() if meaning}
    return Decoded(array, target.geometry, "dicom", warnings, unit="label", facts=named)


def _segments(dataset: Any, *, is_map: bool, path: Path) -> dict[int, str]:
    """Number of each segment and the code of its type, empty where it is of no well-known scheme."""
    segments: dict[int, str] = {}
    for item in objects.items(dataset, "SegmentSequence"):
        number = objects.whole(item, "SegmentNumber", path=path)
        if is_map and number == 0:
            continue
        if not 1 <= number <= _MOST_SEGMENTS or number in segments:
            raise ReadError(
                f"{path}: segment number {number}; numbers from 1 to {_MOST_SEGMENTS}, each once, are needed. "
                "Export the segmentation again.",
                code="E_TAG",
            )
        code: Any = next(iter(objects.items(item, "SegmentedPropertyTypeCodeSequence")), {})
        scheme, value = str(code.get("CodingSchemeDesignator", "")), str(code.get("CodeValue", ""))
        segments[number] = f"{scheme} {value}" if scheme in _SCHEMES and _CODE.fullmatch(value) else ""
    if not segments:
        raise ReadError(f"{path}: no segment is described. Export the segmentation again.", code="E_TAG")
    return segments


def _frames(dataset: Any, regions: Sequence[int], *, is_map: bool, path: Path) -> list[_Frame]:
    own = objects.items(dataset, "PerFrameFunctionalGroupsSequence")
    count = objects.whole(dataset, "NumberOfFrames", path=path)
    if count < 1 or count != len(own):
        raise ReadError(
            f"{path}: {count} frames promised, {len(own)} described. Export the segmentation again.", code="E_TAG"
        )
    shared: Any = next(iter(objects.items(dataset, "SharedFunctionalGroupsSequence")), {})
    frames = []
    for groups in own:
        segment = None
        if not is_map:
            identification = _group(groups, shared, "SegmentIdentificationSequence")
            segment = objects.whole(identification, "ReferencedSegmentNumber", path=path)
            if segment not in regions:
                raise ReadError(
                    f"{path}: a frame of segment {segment}, which is not described. Export the segmentation again.",
                    code="E_TAG",
                )
        frames.append(_Frame(segment, _place(groups, shared, path=path)))
    return frames


def _group(groups: Any, shared: Any, keyword: str) -> Any:
    """First item of a functional group of a frame, or of all frames."""
    return next(iter(objects.items(groups, keyword) or objects.items(shared, keyword)), {})


def _place(groups: Any, shared: Any, *, path: Path) -> _Place | None:
    measures = _group(groups, shared, "PixelMeasuresSequence")
    corner = objects.numbers(_group(groups, shared, "PlanePositionSequence"), "ImagePositionPatient", 3, path=path)
    orientation = objects.numbers(
        _group(groups, shared, "PlaneOrientationSequence"), "ImageOrientationPatient", 6, path=path
    )
    spacing = objects.numbers(measures, "PixelSpacing", 2, path=path)
    if corner is None or orientation is None or spacing is None:
        return None
    right, down = orientation.reshape(2, 3)
    lengths = np.linalg.norm((right, down), axis=1)
    if np.abs(lengths - 1).max() > _UNIT_LENGTH or abs(right @ down) > _RIGHT_ANGLE:
        raise GeometryError(
            f"{path}: ImageOrientationPatient is no pair of unit vectors at right angles. Repair the header.",
            code="E_IOP",
        )
    between, thickness = (
        objects.numbers(measures, keyword, 1, path=path) for keyword in ("SpacingBetweenSlices", "SliceThickness")
    )
    return _Place(
        objects.ras(corner),
        objects.ras(right / lengths[0] * spacing[1]),
        objects.ras(down / lengths[1] * spacing[0]),
        None if between is None else float(between[0]),
        None if thickness is None else float(thickness[0]),
    )


def _given_target(
    frames: Sequence[_Frame], size: tuple[int, int], on: Geometry, *, path: Path
) -> tuple[Target, list[int]]:
    """How the frames lie on the grid of the image, and the slice of each."""
    places = [frame.place for frame in frames]
    if on.shape == (*size, 1) and not any(places):
        return Target(on), [0] * len(frames)
    first, *_ = places
    if first is None:
        raise GeometryError(f"{path}: {_NO_GEOMETRY}", code="E_NO_GEOMETRY")
    steps = np.linalg.solve(on.affine[:3, :3], np.stack([first.right, first.down], axis=1))
    u, v = np.abs(steps).argmax(axis=0).tolist()
    if u == v:
        raise _off_grid("the frames are turned against the image", path=path)
    target = Target(on, (u, v, 3 - u - v), (bool(steps[u, 0] < 0), bool(steps[v, 1] < 0), False))
    if target.shape[:2] != size:
        found = f"frames of {size[0]} x {size[1]} pixels, slices of {target.shape[0]} x {target.shape[1]}"
        raise _off_grid(found, path=path)
    turned = _turned(target)
    slices = []
    for number, place in enumerate(places):
        if place is None:
            raise GeometryError(f"{path}: {_NO_GEOMETRY}", code="E_NO_GEOMETRY")
        index = round(float(turned.to_index(place.corner)[2]))
        found_mm = _corners(place, size)
        needed_mm = turned.to_world([(0, 0, index), (size[0] - 1, 0, index), (0, size[1] - 1, index)])
        distance = float(np.linalg.norm(found_mm - needed_mm, axis=1).max())
        if distance > _ON_GRID_MM:
            raise _off_grid(f"frame {number} lies {distance:.3g} mm from the nearest slice", path=path)
        if not 0 <= index < target.shape[2]:
            raise _off_grid(f"frame {number} lies outside the {target.shape[2]} slices", path=path)
        slices.append(index)
    return target, slices


_NO_GEOMETRY = "frames without position, orientation or spacing. Give a segmentation that carries them."


def _off_grid(found: str, *, path: Path) -> GeometryError:
    return GeometryError(
        f"{path}: {found}; whole slices of the image, to {_ON_GRID_MM} mm, are needed. "
        "Give the image that was segmented.",
        code="E_GEOMETRY",
    )


def _turned(target: Target) -> Geometry:
    """The grid of a target with the axes of its pictures."""
    affine = target.geometry.affine.copy()
    affine[:3, :3] = affine[:3, target.axes]
    for axis, (flip, count) in enumerate(zip(target.flips, target.shape, strict=True)):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (count - 1)
            affine[:3, axis] *= -1
    return Geometry(target.shape, affine)


def _corners(place: _Place, size: tuple[int, int]) -> Float64[np.ndarray, "3 3"]:
    """World mm of the first pixel, the last of the first row, and the last of the first column."""
    columns, rows = size
    return np.stack([place.corner, place.corner + (columns - 1) * place.right, place.corner + (rows - 1) * place.down])


def _own_target(
    frames: Sequence[_Frame], size: tuple[int, int], *, path: Path
) -> tuple[Target, list[int], tuple[str, ...]]:
    """Smallest regular grid that has a slice at each frame, the slice of each, and what was assumed."""
    places = [frame.place for frame in frames if frame.place is not None]
    if len(places) < len(frames):
        raise GeometryError(f"{path}: {_NO_GEOMETRY}", code="E_NO_GEOMETRY")
    first = places[0]
    shifts = [_corners(place, size) - place.corner for place in places]
    if np.abs(np.array(shifts) - shifts[0]).max() > _ON_GRID_MM:
        raise GeometryError(
            f"{path}: frames of different orientation or spacing make no grid. Give the image that was segmented.",
            code="E_GEOMETRY",
        )
    normal = np.cross(first.right, first.down)
    normal /= np.linalg.norm(normal)
    corners = np.array([place.corner for place in places])
    heights = corners @ normal
    order = np.argsort(heights, kind="stable")
    is_new = np.diff(heights[order], prepend=-np.inf) > _SAME_SLICE_MM
    ranks = np.empty(len(frames), dtype=np.int64)
    ranks[order] = np.cumsum(is_new) - 1
    distinct = corners[order[is_new]]
    warnings: tuple[str, ...] = ()
    if len(distinct) == 1:
        step = first.between_mm or first.thickness_mm or 1.0
        ladder, origin, along = np.zeros(1, dtype=np.int64), distinct[0], normal * step
        warnings = (f"W_SINGLE_SLICE: one slice; {step:.4g} mm were taken as its thickness.",)
    else:
        ladder, origin, along = _ladder(distinct, normal, first.between_mm, path=path)
    affine = np.eye(4)
    affine[:3] = np.stack([first.right, first.down, along, origin], axis=1)
    geometry, far = checked_grid((*size, int(ladder[-1]) + 1), affine, path=path)
    return Target(geometry), ladder[ranks].tolist(), warnings + far


def _ladder(
    corners: Float64[np.ndarray, "n 3"], normal: Float64[np.ndarray, " 3"], claimed_mm: float | None, *, path: Path
) -> tuple[Integer[np.ndarray, " n"], Float64[np.ndarray, " 3"], Float64[np.ndarray, " 3"]]:
    """Slice number of each corner, and the line through them: origin and step, in mm."""
    gaps = np.diff(corners @ normal)
    step = float(gaps.min())
    if claimed_mm and 0 < claimed_mm < step:
        off = np.abs(gaps - np.rint(gaps / claimed_mm) * claimed_mm).max()
        step = claimed_mm if off <= min(_UNEVEN_MM, _UNEVEN_SHARE * claimed_mm) else step
    ladder = np.concatenate(([0.0], np.cumsum(np.rint(gaps / step))))
    design = np.stack([np.ones_like(ladder), ladder], axis=1)
    (origin, along), *_ = np.linalg.lstsq(design, corners, rcond=None)
    off = float(np.linalg.norm(design @ (origin, along) - corners, axis=1).max())
    if off > min(_UNEVEN_MM, _UNEVEN_SHARE * step):
        raise GeometryError(
            f"{path}: frames lie up to {off:.3g} mm off a regular grid of {step:.4g} mm. "
            "Give the image that was segmented.",
            code="E_NONUNIFORM",
        )
    return ladder.astype(np.int64), origin, along


def _refuse_doubles(frames: Sequence[_Frame], slices: Sequence[int], *, path: Path) -> None:
    taken = {(frame.segment, place) for frame, place in zip(frames, slices, strict=True)}
    if len(taken) < len(frames):
        raise CaseError(
            f"{path}: {len(frames) - len(taken)} frames at the place of another of the same segment; one is needed. "
            "Split the segmentation by time point.",
            code="E_DUP_POSITION",
        )


def _pictures(
    dataset: Any, size: tuple[int, int], count: int, *, path: Path
) -> Callable[[int], Shaped[np.ndarray, "columns rows"]]:
    """Function that gives the stored values of a frame."""
    columns, rows = size
    bits = objects.whole(dataset, "BitsAllocated", path=path)
    if bits not in {1, 8, 16} or dataset.get("SamplesPerPixel", 1) != 1:
        raise ReadError(
            f"{path}: {columns} x {rows} pixels of {bits} bits; 1, 8 or 16 bits of one sample are needed. "
            "Export the segmentation again.",
            code="E_TAG",
        )
    data: bytes = dataset.get("PixelData") or b""
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", IMPLICIT))
    if syntax not in _NATIVE:
        spec = codecs.Spec(syntax, rows, columns, bits_allocated=max(8, bits))
        frames = list(generate_frames(data, number_of_frames=count))
        if len(frames) != count:
            raise ReadError(
                f"{path}: {len(frames)} compressed frames, {count} are needed. Copy the file again.",
                code="E_PIXEL_LENGTH",
            )

        @functools.lru_cache(maxsize=1)
        def batch(number: int) -> list[Shaped[np.ndarray, "rows columns"]]:
            some = frames[number * _FRAMES_AT_ONCE : (number + 1) * _FRAMES_AT_ONCE]
            return codecs.decode(some, spec, names=[path] * len(some))

        return lambda index: batch(index // _FRAMES_AT_ONCE)[index % _FRAMES_AT_ONCE].T
    needed = (columns * rows * count * bits + 7) // 8
    if len(data) not in {needed, needed + 1}:
        raise ReadError(
            f"{path}: {len(data)} bytes of pixels, {needed} are needed. Copy the file again from its source.",
            code="E_PIXEL_LENGTH",
        )
    area, order = columns * rows, ">" if syntax == BIG_ENDIAN else "<"

    def picture(index: int) -> Shaped[np.ndarray, "columns rows"]:
        if bits == 1:
            start, skip = divmod(index * area, 8)
            packed = np.frombuffer(data, np.uint8, count=(skip + area + 7) // 8, offset=start)
            values = np.unpackbits(packed, bitorder="little")[skip : skip + area]
        else:
            values = np.frombuffer(data, f"{order}u{bits // 8}", count=area, offset=index * area * bits // 8)
        return values.reshape(rows, columns).T

    return picture


def _label_map(
    picture: Callable[[int], Shaped[np.ndarray, "columns rows"]],
    slices: Sequence[int],
    regions: Sequence[int],
    target: Target,
    *,
    background: int | None,
    path: Path,
) -> Integer[np.ndarray, "1 x y z"]:
    array = target.zeros(1, label_dtype(max(regions)), path=path)
    canvas = target.view(array)[0]
    known = np.full(_MOST_SEGMENTS + 1, -1, dtype=np.int32)
    known[[0, *regions]] = [0, *regions]
    if background is not None and background not in regions:
        known[background] = 0
    for index, place in enumerate(slices):
        values = picture(index)
        numbers = known[values]
        if numbers.min() < 0:
            raise CaseError(
                f"{path}: value {values[numbers < 0].min()}, which no segment has as its number. "
                "Export the segmentation again.",
                code="E_LABEL_VALUE",
            )
        canvas[:, :, place] = numbers
    return array
