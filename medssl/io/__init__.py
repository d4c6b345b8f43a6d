"""File to Volume and back; the only place that knows formats.

The first bytes decide the format, never the name. Every checksum is looked at and every size compared before a voxel
is believed. A file is read or refused with a code; whatever was assumed is a warning of its :class:`Source`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from medssl.errors import CaseError, MedSSLError, ReadError
from medssl.geometry import Geometry
from medssl.io import integrity, metaimage, nifti, npy, nrrd, raster
from medssl.io.dicom import contours, reader, segmentation, series_list
from medssl.io.dicom.elements import is_dicom
from medssl.io.source import IMAGE_SUFFIXES, Decoded, Source, is_image, stem, suffix
from medssl.io.values import checked_values, chosen_volumes
from medssl.runfolder import atomic_write
from medssl.volume import Unit, Volume

__all__ = ["IMAGE_SUFFIXES", "Source", "digest", "is_image", "read_volume", "stem", "write_volume"]

_HEAD_BYTES = 512
_SUFFIXES = {
    "nifti1": (".nii", ".nii.gz", ".hdr"),
    "nifti2": (".nii", ".nii.gz", ".hdr"),
    "metaimage": (".mha", ".mhd"),
    "nrrd": (".nrrd", ".nhdr"),
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "tiff": (".tif", ".tiff"),
    "bmp": (".bmp",),
    "npy": (".npy",),
}


def read_volume(
    path: Path,
    *,
    unit: Unit = "arbitrary",
    xform: Literal["sform", "qform"] | None = None,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    volume: int | Literal["channels"] | None = None,
    regularise: bool = False,
    fix_signedness: bool = False,
    pages: Literal["refuse", "stack"] = "refuse",
    on: Geometry | None = None,
) -> tuple[Volume, Source]:
    """Read an image or a label map of any format, or refuse it.

    Args:
        path: DICOM file, folder of DICOM files or series list of a scan; NIfTI, MetaImage, NRRD, PNG, JPEG, TIFF, BMP
            or npy file; the header file of a pair.
        unit: What the voxel values are; ``label`` wants whole numbers from 0 on and gives the smallest type. A DICOM
            image knows its own unit, which ``HU`` and ``SUV`` must meet.
        xform: Which NIfTI transform wins where two are set and disagree.
        assume_spacing_mm: Spacing to use where the file has none; noted as a warning.
        volume: Which of several volumes to take, from 0, or ``channels`` for all of them as channels of one.
        regularise: Fill missing slices and uneven slice distances of a DICOM series by interpolation.
        fix_signedness: Take DICOM values that are signed but labelled unsigned as what they are.
        pages: ``stack`` makes slices of the pages of a TIFF.
        on: Grid of the image that a DICOM-SEG or RTSTRUCT label belongs to.

    Returns:
        The volume, on the grid and with the axes of the file, and its source.

    Raises:
        ReadError: if the file is missing, damaged or of another kind.
        GeometryError: if its grid is impossible or ambiguous.
        CaseError: if its voxel values or dimensions break a rule, E_SEVERAL or E_NDIM for several volumes without a
            choice, E_UNIT for DICOM values that are no HU or SUV.
    """
    path = _header_of(path)
    with _damage(path), np.errstate(all="ignore"):  # a damaged file holds odd numbers; each is checked where it is used
        said: tuple[str, ...] = ()
        if _is_dicom(path):
            decoded = _decode_dicom(
                path, unit=unit, volume=volume, regularise=regularise, fix_signedness=fix_signedness, on=on
            )
            found = decoded.digest or _sha256(integrity.read_bytes(path))
        else:
            data = integrity.read_bytes(path)
            decoded = _decode(
                data, path=path, unit=unit, xform=xform, assume_spacing_mm=assume_spacing_mm, volume=volume, pages=pages
            )
            found, said = _sha256(data, decoded.data), _name_warning(path, data, decoded.format)
        unit = _unit(unit, decoded.unit, path=path)
        array, more = checked_values(decoded.array, unit=unit, path=path)
    source = Source(
        path=path,
        digest=found,
        format=decoded.format,
        warnings=said + decoded.warnings + more,
        nifti_header=decoded.nifti_header,
        facts=decoded.facts,
        volumes=decoded.volumes,
    )
    return Volume(array, decoded.geometry, unit), source


def write_volume(volume: Volume, path: Path, *, like: Source | None = None) -> None:
    """Write a whole file or none.

    Nothing of the source's description, names or extensions is ever copied.

    Args:
        volume: Label maps are stored in the smallest of uint8, uint16 and int32, images in their type or float32.
        path: ``.nii``, ``.nii.gz``, ``.mha`` or ``.nrrd``.
        like: Source whose grid the volume lies on; from NIfTI to NIfTI its geometry fields are copied byte for byte.

    Raises:
        ReadError: E_FORMAT for another suffix.
        GeometryError: E_GEOMETRY if the volume is not on the grid of ``like``.
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    kind = suffix(path)
    if kind in {".nii", ".nii.gz"}:
        payload = nifti.encode(volume, path=path, like=like)
    elif kind == ".mha":
        payload = metaimage.encode(volume, path=path)
    elif kind == ".nrrd":
        payload = nrrd.encode(volume, path=path)
    else:
        raise ReadError(f"{path}: .nii, .nii.gz, .mha and .nrrd are written. Choose one of these.", code="E_FORMAT")
    atomic_write(path, payload)


def digest(path: Path, *, volume: int | Literal["channels"] | None = None, regularise: bool = False) -> str:
    """Sha256 in hex of the bytes of an image: what :class:`Source` has after reading it with the same options.

    Args:
        path: As in :func:`read_volume`; of a pair, header and voxels are taken one after the other.
        volume: As in :func:`read_volume`; only the files of that volume count.
        regularise: As in :func:`read_volume`.

    Raises:
        ReadError: if a file is missing or cannot be read.
    """
    path = _header_of(path)
    if _is_dicom(path):
        return reader.digest(path, volume=volume, regularise=regularise)
    data = integrity.read_bytes(path)
    with _damage(path):
        second = _second_file(data, path=path)
    return _sha256(data, integrity.read_bytes(second, missing="E_PAIR") if second else b"")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """No damage of a file that a reader did not foresee comes out as anything but a refusal of that file."""
    try:
        yield
    except MedSSLError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, struct.error) as error:
        raise ReadError(
            f"{path}: the header holds impossible values ({type(error).__name__}). Take the source.", code="E_HEADER"
        ) from error


def _is_dicom(path: Path) -> bool:
    """Whether a path goes to the DICOM reader: folders, DICOM files, and the lists that a scan writes."""
    if path.is_dir():
        return True
    head = integrity.read_bytes(path, most=_HEAD_BYTES)
    return is_dicom(head) or series_list.is_list(head)


def _decode_dicom(
    path: Path,
    *,
    unit: Unit,
    volume: int | Literal["channels"] | None,
    regularise: bool,
    fix_signedness: bool,
    on: Geometry | None,
) -> Decoded:
    if unit == "label" and path.is_file():
        kind = reader.kind(path)
        if kind == "seg":
            return segmentation.read_segmentation(path, on=on)
        if kind == "rtstruct":
            return contours.read_contours(path, on=on)
    return reader.read(path, volume=volume, regularise=regularise, fix_signedness=fix_signedness)


def _unit(asked: Unit, found: Unit | None, *, path: Path) -> Unit:
    """Unit of the voxels: a label if one is asked for, else what the file says of itself, else what the caller says."""
    if found is None or asked in {"label", found}:
        return asked
    if asked != "arbitrary":
        raise CaseError(
            f"{path}: its values are {found}; {asked} is asked for. Choose another modality, or leave the file out.",
            code="E_UNIT",
        )
    return found


def _decode(
    data: bytes,
    *,
    path: Path,
    unit: Unit,
    xform: Literal["sform", "qform"] | None,
    assume_spacing_mm: tuple[float, float, float] | None,
    volume: int | Literal["channels"] | None,
    pages: Literal["refuse", "stack"],
) -> Decoded:
    kind = integrity.detect(data, path=path)
    if kind == "nifti":
        return nifti.read(data, path=path, xform=xform, assume_spacing_mm=assume_spacing_mm, volume=volume)
    if kind == "metaimage":
        return metaimage.read(data, path=path, assume_spacing_mm=assume_spacing_mm, volume=volume)
    if kind == "nrrd":
        return nrrd.read(data, path=path, assume_spacing_mm=assume_spacing_mm, volume=volume)
    chosen_volumes(1, volume=volume, path=path)
    if kind == "npy":
        return npy.read(data, path=path, assume_spacing_mm=assume_spacing_mm)
    return raster.read(data, path=path, unit=unit, assume_spacing_mm=assume_spacing_mm, pages=pages)


def _second_file(data: bytes, *, path: Path) -> Path | None:
    """The file of voxels beside a header, if there is one; damaged files count as one file."""
    kind = suffix(path)
    if kind == ".mhd":
        return metaimage.data_file(data, path=path)
    if kind == ".nhdr":
        return nrrd.data_file(data, path=path)
    return path.with_suffix(".img") if kind == ".hdr" else None


def _header_of(path: Path) -> Path:
    return path.with_suffix(".hdr") if path.suffix.lower() == ".img" else path


def _sha256(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _name_warning(path: Path, data: bytes, found: str) -> tuple[str, ...]:
    """Say so where the name promises another format, or compression, than the bytes hold."""
    kind = suffix(path)
    is_gzip = data[:2] == integrity.GZIP_MAGIC
    if kind in _SUFFIXES[found] and (kind == ".nii.gz") == is_gzip:
        return ()
    wanted = ".nii.gz" if is_gzip else _SUFFIXES[found][0]
    return (f"W_EXTENSION: the content is {found}{' in gzip' if is_gzip else ''}; the name should end in {wanted}.",)
