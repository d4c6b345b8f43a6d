"""What the images of the shared folders are, and how far a reader's result is from that; no code of medssl is in here.

Truths are made by families_dicom.py for DICOM, by a conversion of dcm2niix or dicom2nifti for mosaics, by highdicom for
DICOM-SEG, by nibabel for NIfTI, and by SimpleITK for MetaImage and NRRD.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

NEAR_MM = 1e-3
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Image:
    """One volume as a reader gives it: voxels (C, X, Y, Z) and voxel index to world mm, RAS+."""

    array: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Truth:
    """One volume as it should be.

    Args:
        array: Voxels (C, X, Y, Z); not finite where any value is as good (padding).
        affines: Grids that are all right; slice k of a stack that is not on one grid has ``slices[k]`` instead.
        slices: Grid of each slice, (Z, 4, 4), third column unused; where given the affines only say how axes run.
        has_world: Whether the file says where the image lies; else only the spacing is compared.
        has_spacing: Whether the file says how large a pixel is.
        other: Voxels that are right as well (a MONOCHROME1 image as it is stored).
        tolerance: Largest difference of a value, for decoders of lossy data.
    """

    array: np.ndarray
    affines: tuple[np.ndarray, ...]
    slices: np.ndarray | None = None
    has_world: bool = True
    has_spacing: bool = True
    other: np.ndarray | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """How far one result is from the truth that it is nearest to."""

    corner_mm: float
    value_error: float
    which: int

    @property
    def is_right(self) -> bool:
        return self.corner_mm <= NEAR_MM and self.value_error == 0


def compare(results: Sequence[Image], truths: Sequence[Truth]) -> list[Verdict]:
    """Nearest truth of each result; a truth is used once, and a result of another shape is infinitely far."""
    if truths and truths[0].array.shape[0] == 3:
        results = [replace(image, array=_channels_first(image.array)) for image in results]
    results = _split(results, truths)
    left = set(range(len(truths)))
    verdicts = []
    for result in results:
        options = [_verdict(result, truths[which], which) for which in sorted(left)]
        best = min(options, key=lambda v: (v.corner_mm > NEAR_MM, v.value_error, v.corner_mm), default=None)
        verdicts.append(best or Verdict(np.inf, np.inf, -1))
        if best and best.is_right:
            left.remove(best.which)
    return verdicts


def _channels_first(array: np.ndarray) -> np.ndarray:
    """Colour as channels where a reader left it on the fourth axis."""
    if array.ndim == 5 and array.shape[0] == 1 and 3 in array.shape[3:]:
        return np.moveaxis(array[0], 2 + array.shape[3:].index(3), 0)
    if array.ndim == 4 and array.shape[0] == 1 and array.shape[3] == 3:
        return np.moveaxis(array[0], 2, 0)[..., None]
    return array


def _split(results: Sequence[Image], truths: Sequence[Truth]) -> Sequence[Image]:
    """Times given as channels, and the frames of a clip given as slices, one by one."""
    if len(results) != 1 or len(truths) < 2 or results[0].array.ndim != 4:
        return results
    array, affine = results[0].array, results[0].affine
    if array.shape[0] == len(truths):
        return [Image(channel[None], affine) for channel in array]
    if array.shape[3] == len(truths) and not any(truth.has_world for truth in truths):
        return [Image(array[..., [k]], affine) for k in range(len(truths))]
    return results


def _verdict(result: Image, truth: Truth, which: int) -> Verdict:
    best = Verdict(np.inf, np.inf, which)
    for affine in truth.affines:
        for array, grid in _alignments(result, affine, free=not truth.has_world):
            if array.shape[1:] != truth.array.shape[1:]:
                continue
            corner = _corner_distance(grid, affine, truth)
            error = min(_value_error(array, wanted, truth.tolerance) for wanted in _wanted(truth))
            found = Verdict(corner, error, which)
            best = min(best, found, key=lambda v: (v.corner_mm > NEAR_MM, v.value_error, v.corner_mm))
    return best


def _wanted(truth: Truth) -> list[np.ndarray]:
    return [truth.array] if truth.other is None else [truth.array, truth.other]


def _alignments(result: Image, affine: np.ndarray, *, free: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The result with its axes in the order and direction of ``affine``; every turn in the plane where that is free."""
    array, grid = result.array, result.affine.astype(np.float64)
    if array.ndim != 4 or grid.shape != (4, 4) or not np.isfinite(grid).all():
        return
    if free:
        for order, *flips in itertools.product(((0, 1, 2), (1, 0, 2)), (False, True), (False, True)):
            yield _turned(array, grid, order, (*flips, False))
        return
    directions = grid[:3, :3] / np.maximum(np.linalg.norm(grid[:3, :3], axis=0), 1e-12)
    wanted = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = wanted.T @ directions
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(cosines[i, p[i]]) for i in range(3)))
    yield _turned(array, grid, order, tuple(bool(cosines[i, order[i]] < 0) for i in range(3)))


def _turned(
    array: np.ndarray, grid: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[np.ndarray, np.ndarray]:
    array = array.transpose(0, *(axis + 1 for axis in order))
    grid = grid[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            grid[:3, 3] += grid[:3, axis] * (array.shape[axis + 1] - 1)
            grid[:3, axis] *= -1
            array = np.flip(array, axis + 1)
    return array, grid


def _corner_distance(grid: np.ndarray, affine: np.ndarray, truth: Truth) -> float:
    shape = truth.array.shape[1:]
    if not truth.has_world:
        if not truth.has_spacing:
            return 0.0
        steps = np.linalg.norm(grid[:3, :2], axis=0) - np.linalg.norm(affine[:3, :2], axis=0)
        return float(np.abs(steps * (np.array(shape[:2]) - 1)).max())
    worst = 0.0
    for k in range(shape[2]):
        place, right = (k, affine) if truth.slices is None else (0, truth.slices[k])
        for i, j in itertools.product((0, shape[0] - 1), (0, shape[1] - 1)):
            worst = max(worst, float(np.linalg.norm((grid @ [i, j, k, 1] - right @ [i, j, place, 1])[:3])))
    return worst


def _value_error(array: np.ndarray, wanted: np.ndarray, tolerance: float) -> float:
    """Largest difference; 0 where it is within the rounding of float32, or what a lossy decoder may do."""
    if array.shape[0] == 1 and wanted.shape[0] == 3 and (wanted == wanted[:1]).all():
        wanted = wanted[:1]
    if array.shape[0] != wanted.shape[0]:
        return float("inf")
    counts = np.isfinite(wanted)
    if not counts.any():
        return 0.0
    difference = np.abs(array.astype(np.float64) - wanted.astype(np.float64))[counts]
    error = float(np.where(np.isnan(difference), np.inf, difference).max())
    return 0.0 if error <= max(tolerance, 1e-5 * float(np.abs(wanted[counts]).max())) else error


def nifti_truths(*paths: Path) -> list[Truth]:
    """Volumes of NIfTI files, with both transforms where a file has two."""
    truths = []
    for path in paths:
        image: Any = nib.load(path)
        array = np.asanyarray(image.dataobj)
        if array.dtype.names:
            array = np.stack([array[name] for name in array.dtype.names], axis=-1)[..., None].swapaxes(-1, -2)
            array = array.reshape(*array.shape[:3], 1, -1)
        while array.ndim < 3:
            array = array[..., None]
        affines = [image.affine]
        header = image.header
        if header["sform_code"] and header["qform_code"] and not np.allclose(header.get_qform(), image.affine):
            affines.append(header.get_qform())
        volumes = array.reshape(*array.shape[:3], -1)
        if array.ndim == 5:
            groups = [np.moveaxis(array[..., 0, :], -1, 0)]
        else:
            groups = [volumes[..., k][None] for k in range(volumes.shape[-1])]
        truths += [Truth(group, tuple(affines)) for group in groups]
    return truths


def downward(truth: Truth) -> Truth:
    """The same voxels moved along the slices, so that the last slice takes the place of the first."""
    affine = truth.affines[0].copy()
    affine[:3, 3] -= affine[:3, 2] * (truth.array.shape[3] - 1)
    return replace(truth, affines=(affine,))


def itk_truths(path: Path) -> list[Truth]:
    """Volume of a file as SimpleITK reads it."""
    import SimpleITK as sitk  # noqa: N813

    return [Truth(i.array, (i.affine,)) for i in itk_images(sitk.ReadImage(str(path)))]


def itk_images(image: Any) -> list[Image]:
    """A SimpleITK image of two to four dimensions as volumes in RAS+."""
    import SimpleITK as sitk  # noqa: N813

    array = sitk.GetArrayFromImage(image)
    array = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    count = image.GetDimension()
    affine = np.eye(4)
    n = min(count, 3)
    direction = np.array(image.GetDirection()).reshape(count, count)[:n, :n]
    affine[:n, :n] = direction * np.array(image.GetSpacing())[:n]
    affine[:n, 3] = image.GetOrigin()[:n]
    affine = LPS_TO_RAS @ affine
    volumes = [array] if count < 4 else [array[:, t] for t in range(array.shape[1])]
    volumes = [v if count > 2 else v[:, None] for v in volumes]
    return [Image(v.transpose(0, 3, 2, 1), affine) for v in volumes]


def segmentation_truths(path: Path) -> list[Truth]:
    """DICOM-SEG by highdicom: one channel of segment numbers, or a channel a segment where they overlap."""
    import highdicom as hd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = hd.seg.segread(path)
        volume = seg.get_volume(rescale_fractional=True)  # (slices, rows, columns, segments)
    parts = np.moveaxis(volume.array.astype(np.float64) >= 0.5, -1, 0).transpose(0, 3, 2, 1)
    affine = LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]]
    if (parts.sum(axis=0) > 1).any():
        array = parts.astype(np.uint8)
    else:
        array = sum((k + 1) * part.astype(np.uint8) for k, part in enumerate(parts))[None]
    return [Truth(array, (affine,))]
