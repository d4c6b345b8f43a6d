"""What DICOM files are by the formulas of the standard: PS3.3 C.7.6.2.1.1 for positions, C.11.1 for values.

No code of medssl is in here. Pixels are decoded by pydicom; each frame is placed by its own position, so that a gap or
a tilt shows.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from families_truth import LPS_TO_RAS, Truth, itk_truths
from pydicom.pixels import apply_color_lut

LOSSY = {
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55",
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91",
}  # fmt: skip


@dataclass(frozen=True)
class _Frame:
    picture: np.ndarray  # (C, X, Y)
    stored: np.ndarray | None
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: tuple[float, float] | None
    tolerance: float
    thickness: float


def dicom_truths(paths: Sequence[Path]) -> list[Truth]:
    """Volumes of DICOM files: one for each series, orientation, spacing and matrix, and for each time at one place.

    The second frame at a place, in the order of instance and frame numbers, belongs to the second volume, and so on: no
    rule of the standard, but true of the data at hand, as the conversions beside them show. Files without a position,
    and frames of a clip, are one 2D image each.

    Raises:
        Exception: whatever pydicom says of a file that it cannot decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups: dict[tuple[Any, ...], list[_Frame]] = defaultdict(list)
        datasets = [pydicom.dcmread(path, force=True) for path in paths]
        for path, dataset in sorted(zip(paths, datasets, strict=True), key=lambda pair: _number(pair[1])):
            for index, frame in enumerate(_frames(dataset)):
                if frame.position is None or frame.orientation is None or frame.spacing is None:
                    groups[path, index].append(frame)
                else:
                    where = tuple(np.round(frame.orientation, 3)), frame.spacing, frame.picture.shape
                    same = [key for key in groups if key[:-1] == (dataset.get("SeriesInstanceUID"), where)]
                    taken = sum(any(_same_place(frame, other) for other in groups[key]) for key in same)
                    groups[dataset.get("SeriesInstanceUID"), where, taken].append(frame)
        return [_stacked(group) for group in groups.values()]


def _number(dataset: pydicom.Dataset) -> int:
    return int(dataset.get("InstanceNumber") or 0)


def _same_place(one: _Frame, other: _Frame) -> bool:
    return bool(np.abs(one.position - other.position).max() < 1e-3)


def _stacked(frames: list[_Frame]) -> Truth:
    first = frames[0]
    if first.position is None or first.orientation is None:
        sy, sx = first.spacing or (1.0, 1.0)
        other = None if first.stored is None else first.stored[..., None]
        flat = np.diag([-sx, -sy, 1.0, 1.0])
        return Truth(
            first.picture[..., None], (flat,), has_world=False, has_spacing=first.spacing is not None, other=other,
            tolerance=first.tolerance,
        )  # fmt: skip
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    frames = sorted(frames, key=lambda frame: float(normal @ frame.position))
    slices = np.array([_plane(frame, first.thickness) for frame in frames])
    affine = slices[0].copy()
    if len(frames) > 1:
        affine[:3, 2] = (slices[-1, :3, 3] - slices[0, :3, 3]) / (len(frames) - 1)
    other = None if first.stored is None else np.stack([frame.stored for frame in frames], axis=-1)
    array = np.stack([frame.picture for frame in frames], axis=-1)
    return Truth(array, (affine,), slices=slices, other=other, tolerance=max(frame.tolerance for frame in frames))


def _plane(frame: _Frame, thickness: float) -> np.ndarray:
    row, column = frame.orientation[:3], frame.orientation[3:]
    affine = np.eye(4)
    affine[:3, 0] = row * frame.spacing[1]
    affine[:3, 1] = column * frame.spacing[0]
    affine[:3, 2] = np.cross(row, column) * thickness
    affine[:3, 3] = frame.position
    return LPS_TO_RAS @ affine


def _frames(dataset: pydicom.Dataset) -> Iterator[_Frame]:
    array = dataset.pixel_array  # pydicom 3 gives YBR as RGB
    samples = int(dataset.get("SamplesPerPixel", 1))
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
        array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
        samples = 3
    array = array.reshape(count, *array.shape[-3 if samples > 1 else -2 :])
    lossy = str(dataset.file_meta.get("TransferSyntaxUID", "")) in LOSSY
    for index, stored in enumerate(array):
        yield _frame(dataset, stored, index, samples=samples, lossy=lossy)


def _frame(dataset: pydicom.Dataset, stored: np.ndarray, index: int, *, samples: int, lossy: bool) -> _Frame:
    groups = [dataset.get("SharedFunctionalGroupsSequence"), dataset.get("PerFrameFunctionalGroupsSequence")]
    shared = groups[0][0] if groups[0] else pydicom.Dataset()
    own = groups[1][index] if groups[1] else pydicom.Dataset()

    def value(sequence: str, keyword: str) -> Any:
        for holder in (own, shared):
            if holder.get(sequence):
                return holder[sequence][0].get(keyword)
        return None if groups[1] else dataset.get(keyword)

    slope, intercept = (value("PixelValueTransformationSequence", f"Rescale{name}") for name in ("Slope", "Intercept"))
    position, orientation = (
        value("PlanePositionSequence", "ImagePositionPatient"),
        value("PlaneOrientationSequence", "ImageOrientationPatient"),
    )
    spacing = value("PixelMeasuresSequence", "PixelSpacing") or _other_spacing(dataset)
    spacing = None if spacing and min(map(float, spacing)) <= 0 else spacing
    stored = np.moveaxis(stored, -1, 0).swapaxes(1, 2) if samples > 1 else stored.T[None]
    picture = stored.astype(np.float64)
    if samples == 1:
        picture = picture * float(1 if slope is None else slope) + float(intercept or 0)
    padding = dataset.get("PixelPaddingValue")
    if padding is not None and dataset.get("Modality") in {"CT", "MR", "PT"}:
        ends = sorted((int(padding), int(dataset.get("PixelPaddingRangeLimit", padding))))
        picture[(stored >= ends[0]) & (stored <= ends[1])] = np.nan
    flipped = None
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        top = -1 if dataset.PixelRepresentation else 2 ** int(dataset.BitsStored) - 1
        flipped, picture = picture, (top - stored.astype(np.float64)) * float(slope or 1) + float(intercept or 0)
    is_clip = int(dataset.get("NumberOfFrames", 1) or 1) > 1 and not groups[1]
    return _Frame(
        picture,
        flipped,
        None if position is None or is_clip else np.array(position, dtype=np.float64),
        None if not orientation else np.array(orientation, dtype=np.float64),
        None if not spacing else (float(spacing[0]), float(spacing[1])),
        (3.0 if samples > 1 else 2.0) * abs(float(slope or 1)) if lossy else 0.0,
        float(value("PixelMeasuresSequence", "SliceThickness") or 1),
    )


def _other_spacing(dataset: pydicom.Dataset) -> Sequence[float] | None:
    """Size of a pixel of an image without PixelSpacing, by the rules of PS3.3 10.7 and C.8.5.5."""
    if dataset.get("ImagerPixelSpacing"):
        factor = float(dataset.get("EstimatedRadiographicMagnificationFactor") or 1)
        return [float(step) / factor for step in dataset.ImagerPixelSpacing]
    regions = dataset.get("SequenceOfUltrasoundRegions") or []
    steps = {
        (10 * abs(region.PhysicalDeltaY), 10 * abs(region.PhysicalDeltaX))
        for region in regions
        if region.get("PhysicalUnitsXDirection") == 3 and region.get("PhysicalUnitsYDirection") == 3
    }
    if len(steps) == 1 and len(regions) == 1:
        return list(steps.pop())
    return dataset.get("NominalScannedPixelSpacing") or None


def itk_dicom_truths(path: Path) -> list[Truth]:
    """Picture of a DICOM file with lossy data that pydicom cannot decode, as SimpleITK reads it."""
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    tolerance = 2 * abs(float(dataset.get("RescaleSlope") or 1))
    return [
        replace(truth, tolerance=tolerance, has_world="ImagePositionPatient" in dataset) for truth in itk_truths(path)
    ]
