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

from medssl.errors import MedSSLError, ReadError
from medssl.io import integrity, metaimage, nifti, nrrd, raster
from medssl.io.source import IMAGE_SUFFIXES, Decoded, Source, is_image, stem, suffix
from medssl.io.values import checked_values
from medssl.runfolder import atomic_write
from medssl.volume import Unit, Volume

__all__ = ["IMAGE_SUFFIXES", "Source", "digest", "is_image", "read_volume", "stem", "write_volume"]

_SUFFIXES = {
    "nifti1": {".nii", ".nii.gz", ".hdr"},
    "nifti2": {".nii", ".nii.gz", ".hdr"},
    "metaimage": {".mha", ".mhd"},
    "nrrd": {".nrrd", ".nhdr"},
    "png": {".png"},
    "jpeg": {".jpg", ".jpeg"},
    "tiff": {".tif", ".tiff"},
    "bmp": {".bmp"},
}


def read_volume(
    path: Path,
    *,
    unit: Unit = "arbitrary",
    xform: Literal["sform", "qform"] | None = None,
    assume_spacing_mm: tuple[float, float, float] | None = None,
) -> tuple[Volume, Source]:
    """Read an image or a label map of any format, or refuse it.

    Args:
        path: NIfTI, MetaImage, NRRD, PNG, JPEG, TIFF or BMP file; the header file of a pair.
        unit: What the voxel values are; ``label`` wants whole numbers from 0 on and gives the smallest type.
        xform: Which NIfTI transform wins where two are set and disagree.
        assume_spacing_mm: Spacing to use where the file has none; noted as a warning.

    Returns:
        The volume, on the grid and with the axes of the file, and its source.

    Raises:
        ReadError: if the file is missing, damaged or of another kind.
        GeometryError: if its grid is impossible or ambiguous.
        CaseError: if its voxel values or dimensions break a rule.
    """
    path = _header_of(path)
    data = integrity.read_bytes(path)
    with _damage(path), np.errstate(all="ignore"):  # a damaged file holds odd numbers; each is checked where it is used
        decoded = _decode(data, path=path, unit=unit, xform=xform, assume_spacing_mm=assume_spacing_mm)
        array, said = checked_values(decoded.array, unit=unit, path=path)
    source = Source(
        path=path,
        digest=_sha256(data, decoded.data),
        format=decoded.format,
        warnings=_name_warning(path, data, decoded.format) + decoded.warnings + said,
        nifti_header=decoded.nifti_header,
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


def digest(path: Path) -> str:
    """Sha256 in hex of the bytes of an image file; of header and voxels one after the other for a pair.

    Raises:
        ReadError: if a file is missing or cannot be read.
    """
    path = _header_of(path)
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


def _decode(
    data: bytes,
    *,
    path: Path,
    unit: Unit,
    xform: Literal["sform", "qform"] | None,
    assume_spacing_mm: tuple[float, float, float] | None,
) -> Decoded:
    kind = integrity.detect(data, path=path)
    if kind == "nifti":
        return nifti.read(data, path=path, xform=xform, assume_spacing_mm=assume_spacing_mm)
    if kind == "metaimage":
        return metaimage.read(data, path=path, assume_spacing_mm=assume_spacing_mm)
    if kind == "nrrd":
        return nrrd.read(data, path=path, assume_spacing_mm=assume_spacing_mm)
    return raster.read(data, path=path, unit=unit, assume_spacing_mm=assume_spacing_mm)


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
    wanted = ".nii.gz" if is_gzip else sorted(_SUFFIXES[found])[0]
    return (f"W_EXTENSION: the content is {found}{' in gzip' if is_gzip else ''}; the name should end in {wanted}.",)
