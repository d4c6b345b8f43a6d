"""NIfTI-1 and NIfTI-2, single files and pairs, read with every field looked at and written with the source's geometry.

The header is parsed with nibabel; the voxels are taken from bytes whose number and checksum were verified first.
Choices: no scaling where the slope is 0 or not finite, as nibabel does; an unknown spatial unit is the millimetre;
without any transform the axes are those of nibabel (x flipped, centre at the origin), with a warning. Colour becomes
three channels of 8 bits with alpha laid on black, a vector at each voxel (five dimensions, the fourth 1) channels.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Shaped, UInt8

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.geometry import Geometry
from medssl.io import integrity
from medssl.io.nifti_affine import Header, Xform, world_affine
from medssl.io.source import Decoded, Source
from medssl.io.values import (
    check_float32,
    checked_grid,
    chosen_volumes,
    finite_range,
    label_dtype,
    native_voxels,
    slabs,
)
from medssl.volume import Volume

_SIZES: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_READABLE = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_COLOURS = {128: 3, 2304: 4}
_LIKE_MM = 1e-3
_SHEAR_DEG = 1e-3
_GZIP_LEVEL = 6
_WORDS = {"data_type", "db_name", "intent_name", "descrip", "aux_file"}
_GEOMETRY_FIELDS = (
    "dim",
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)


def read(
    data: bytes,
    *,
    path: Path,
    xform: Xform | None,
    assume_spacing_mm: tuple[float, float, float] | None,
    volume: int | Literal["channels"] | None = None,
) -> Decoded:
    """Voxels and grid of a NIfTI file; the array lies in memory as in the file, x fastest.

    Args:
        data: The whole file, perhaps gzipped; the header file of a pair.
        path: Where it came from; a pair's voxels lie beside it.
        xform: Which transform wins where both are set and disagree.
        assume_spacing_mm: Spacing to use where the header has none.
        volume: Which volume to take where the fourth dimension holds several, or all as ``channels``.

    Raises:
        ReadError: for damaged files. GeometryError: for impossible or ambiguous grids. CaseError: E_DTYPE, E_NDIM,
            E_VOLUME.
    """
    compressed = data[:2] == integrity.GZIP_MAGIC
    header = _parse(integrity.peek(data, path=path) if compressed else data[: max(_SIZES)], path=path)
    shape, count, is_vector = _shape(header, path=path)
    dtype, samples = _dtype(header, path=path)
    chosen = chosen_volumes(1 if is_vector else count, volume=volume, path=path)
    if is_vector:
        chosen = range(count)
    if samples > 1 and len(chosen) > 1:
        raise CaseError(f"{path}: {count} volumes in colour; choose one with --volume.", code="E_NDIM")
    is_pair = bytes(header["magic"])[:2] == b"ni"
    offset = _offset(header, path=path, is_pair=is_pair)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize * samples
    needed = offset + count * size
    begin, end = offset + chosen.start * size, offset + chosen.stop * size
    voxels = _voxels_of_pair(compressed=compressed, path=path) if is_pair else data
    integrity.check_size(needed, len(voxels), path=path)
    if not is_pair:
        _check_extensions(integrity.peek(data, path=path, count=offset) if compressed else data, header, offset, path)
    if compressed:
        kept, warnings = integrity.inflate(data, path=path, needed=needed, wbits=integrity.GZIP, keep=slice(begin, end))
        flat = native_voxels(kept, dtype, count=(end - begin) // dtype.itemsize)
    else:
        warnings = integrity.exactly(voxels, needed, path=path)
        flat = native_voxels(voxels, dtype, count=(end - begin) // dtype.itemsize, offset=begin)
    array = flat.reshape((samples, *shape, len(chosen)), order="F")
    if samples > 1:
        array, more = _colours(array[..., 0])
    else:
        array, more = _scaled(np.moveaxis(array[0], -1, 0), header, path=path)
    affine, said = world_affine(header, shape, path=path, xform=xform, assume_spacing_mm=assume_spacing_mm)
    geometry, far = checked_grid(shape, affine, path=path)
    return Decoded(
        array,
        geometry,
        f"nifti{_version(header)}",
        warnings + more + said + far,
        nifti_header=_without_words(header),
        data=voxels if is_pair else b"",
        volumes=1 if is_vector else count,
    )


def encode(volume: Volume, *, path: Path, like: Source | None) -> bytes:
    """Bytes of a NIfTI file; gzipped, without name or time, where ``path`` ends in ``.gz``.

    Args:
        volume: One channel; label maps are stored in the smallest of uint8, uint16 and int32.
        path: Name to write to, for its suffix and for messages.
        like: A source read from NIfTI on the same grid: its geometry fields are copied byte for byte, and nothing else.

    Raises:
        CaseError: E_NDIM for several channels. GeometryError: E_GEOMETRY if the volume is not on the grid of ``like``.
    """
    if volume.array.shape[0] != 1:
        raise CaseError(
            f"{path}: {volume.array.shape[0]} channels; NIfTI is written with one. Write .mha or .nrrd.", code="E_NDIM"
        )
    array = storable(volume, path=path)[0]
    if like is not None and like.nifti_header is not None:
        header = _like_header(like.nifti_header, volume.geometry, path=path)
    else:
        header = _new_header(volume.geometry)
    header.set_data_dtype(array.dtype)
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = header.single_magic
    voxels = array.astype(array.dtype.newbyteorder(header.endianness), copy=False).tobytes(order="F")
    data: bytes = header.binaryblock + bytes(4) + voxels
    if not path.name.lower().endswith(".gz"):
        return data
    engine = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, integrity.GZIP)
    return engine.compress(data) + engine.flush()


def storable(volume: Volume, *, path: Path) -> Shaped[np.ndarray, "c x y z"]:
    """Array in a type that every reader takes: label maps shrink, float16 and float64 become float32.

    Raises:
        CaseError: E_DTYPE for types that are no real numbers of at most 32 bits, float64 apart.
    """
    array = volume.array
    if volume.unit == "label":
        return array.astype(label_dtype(int(array.max())), copy=False)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind not in "ui" or array.dtype.itemsize > 4:
        raise CaseError(f"{path}: voxels of type {array.dtype} cannot be written. Convert to float32.", code="E_DTYPE")
    return array


def _parse(head: bytes, *, path: Path) -> Header:
    """Header whose size is 348 or 540 in one of the byte orders, as :func:`integrity.detect` has seen."""
    order: Literal["little", "big"] = "little" if int.from_bytes(head[:4], "little") in _SIZES else "big"
    size = int.from_bytes(head[:4], order)
    if len(head) < size:
        raise ReadError(f"{path}: ends within the {size} header bytes. Copy the file again.", code="E_TRUNCATED")
    header = _SIZES[size](head[:size], endianness=order, check=False)
    if bytes(header["magic"])[:3] not in {b"n+1", b"n+2", b"ni1", b"ni2"}:
        raise ReadError(
            f"{path}: an ANALYZE header, which says nothing of orientation. Convert it to NIfTI.", code="E_FORMAT"
        )
    return header


def _version(header: Header) -> int:
    return 1 if int(header["sizeof_hdr"]) == 348 else 2


def _shape(header: Header, *, path: Path) -> tuple[tuple[int, int, int], int, bool]:
    """Spatial sizes, how many values or volumes there are of them, and whether these are a vector at each voxel."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise ReadError(f"{path}: dim[0] is {dim[0]}; 1 to 7 is allowed. Take the source.", code="E_HEADER")
    sizes = dim[1 : dim[0] + 1]
    for axis, n in enumerate(sizes, start=1):
        if n < 1:
            raise ReadError(f"{path}: dim[{axis}] is {n}; at least 1 is needed. Take the source.", code="E_HEADER")
    x, y, z, volumes, vector, *rest = [*sizes, *[1] * 7][:7]
    if max(rest) > 1 or min(volumes, vector) > 1:
        raise CaseError(
            f"{path}: {' x '.join(map(str, sizes))} voxels; three dimensions and one of volumes or channels are read. "
            "Split it into files.",
            code="E_NDIM",
        )
    return (x, y, z), max(volumes, vector), vector > 1


def _dtype(header: Header, *, path: Path) -> tuple[np.dtype[Any], int]:
    """Stored type of a value, and how many values a voxel has: three or four for colour."""
    code = int(header["datatype"])
    if code not in _READABLE and code not in _COLOURS:
        name = nibabel.nifti1.data_type_codes.label.get(code, "unknown")
        raise CaseError(
            f"{path}: data type {code} ({name}); real values of up to 64 bits and 8-bit colour are read. "
            "Convert the file.",
            code="E_DTYPE",
        )
    samples = _COLOURS.get(code, 1)
    dtype = np.dtype(_READABLE.get(code, "u1")).newbyteorder(header.endianness)
    if int(header["bitpix"]) != dtype.itemsize * samples * 8:
        raise ReadError(
            f"{path}: bitpix is {int(header['bitpix'])}; data type {code} has {dtype.itemsize * samples * 8} bits. "
            "Take the source.",
            code="E_HEADER",
        )
    return dtype, samples


def _offset(header: Header, *, path: Path, is_pair: bool) -> int:
    offset = float(header["vox_offset"])
    least = 0 if is_pair else int(header["sizeof_hdr"]) + 4
    if not np.isfinite(offset) or offset != int(offset) or not least <= offset <= 2**31:
        raise ReadError(
            f"{path}: vox_offset is {offset:g}; a whole number from {least} on is needed. Take the source.",
            code="E_HEADER",
        )
    return int(offset)


def _voxels_of_pair(*, compressed: bool, path: Path) -> bytes:
    if compressed:
        raise ReadError(f"{path}: a gzipped header of a pair. Unpack both files first.", code="E_FORMAT")
    return integrity.read_bytes(path.with_suffix(".img"), missing="E_PAIR")


def _check_extensions(data: bytes, header: Header, offset: int, path: Path) -> None:
    """Extensions may hold names, so they are never kept; a broken one makes the voxels' place doubtful."""
    position = int(header["sizeof_hdr"])
    if len(data) < position + 4 or not data[position]:
        return
    order: Any = "little" if header.endianness == "<" else "big"
    position += 4
    while position + 8 <= offset:
        size = int.from_bytes(data[position : position + 4], order, signed=True)
        if size < 8 or size % 16 or position + size > offset:
            raise ReadError(
                f"{path}: a header extension of {size} bytes; multiples of 16 that end before the voxels are allowed. "
                "Take the source.",
                code="E_HEADER",
            )
        position += size


def _colours(array: UInt8[np.ndarray, "c x y z"]) -> tuple[UInt8[np.ndarray, "k x y z"], tuple[str, ...]]:
    """Red, green and blue as channels, one channel where they are equal, alpha laid on black."""
    warnings: tuple[str, ...] = ()
    colours = array[:3]
    if len(array) > 3 and (array[3] < 255).any():
        warnings = ("W_ALPHA: transparency was laid on black.",)
        for slab in slabs(colours):
            part = colours[..., slab]
            part[...] = (part.astype(np.uint16) * array[3:, ..., slab] + 127) // 255
    is_grey = all((colours[1:, ..., slab] == colours[:1, ..., slab]).all() for slab in slabs(colours))
    return (colours[:1] if is_grey else colours).copy(order="K"), warnings


def _scaled(
    array: Shaped[np.ndarray, "c x y z"], header: Header, *, path: Path
) -> tuple[Shaped[np.ndarray, "c x y z"], tuple[str, ...]]:
    """Apply slope and intercept; whole ones keep integers, others give float32."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        if slope in (np.inf, -np.inf) or (inter != 0 and np.isfinite(inter)):
            return array, (f"W_SCALING: slope {slope:g} with intercept {inter:g} was ignored; stored values are used.",)
        return array, ()
    if not np.isfinite(inter):
        raise ReadError(f"{path}: scl_inter is {inter:g}; a number is needed. Take the source.", code="E_HEADER")
    if (slope, inter) == (1, 0):
        return array, ()
    if array.dtype.kind in "ui" and slope == int(slope) and inter == int(inter):
        low, high = (int(v) * int(slope) + int(inter) for v in (array.min(), array.max()))
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(low, high) and max(low, high) <= np.iinfo(dtype).max:
                whole = np.empty_like(array, dtype=dtype)
                for slab in slabs(array):
                    whole[..., slab] = array[..., slab].astype(np.int64) * int(slope) + int(inter)
                return whole, ()
    least, most, bad = finite_range(array)
    if bad < array.size:
        check_float32(max(abs(least * slope + inter), abs(most * slope + inter)), path=path)
    scaled = np.empty_like(array, dtype=np.float32)
    for slab in slabs(array):
        scaled[..., slab] = array[..., slab].astype(np.float64) * slope + inter
    return scaled, ()


def _without_words(header: Header) -> bytes:
    """Bytes of the header, less the fields of free text, which may name a patient."""
    kept = header.copy()
    for field in _WORDS & set(kept.keys()):
        kept[field] = b""
    data: bytes = kept.binaryblock
    return data


def _like_header(raw: bytes, geometry: Geometry, *, path: Path) -> Header:
    """Fresh header with the geometry fields of ``raw``, in its version and byte order."""
    source = _parse(raw, path=path)
    shape, count, _ = _shape(source, path=path)
    candidates = []
    for xform in ("sform", "qform"):
        try:
            affine, _ = world_affine(source, shape, path=path, xform=xform, assume_spacing_mm=(1.0, 1.0, 1.0))
            candidates.append(Geometry(shape, affine))
        except GeometryError:
            continue
    if not any(geometry.isclose(candidate, atol_mm=_LIKE_MM) for candidate in candidates):
        raise GeometryError(
            f"{path}: the volume of {geometry.shape} voxels is not on the grid of its source. "
            "Resample it to the source's geometry first.",
            code="E_GEOMETRY",
        )
    header = type(source)(endianness=source.endianness)
    for field in _GEOMETRY_FIELDS:
        header[field] = source[field]
    if count > 1:
        header["dim"] = [3, *shape, 1, 1, 1, 1]
    return header


def _new_header(geometry: Geometry) -> Header:
    kind: Any = nibabel.Nifti1Header if max(geometry.shape) < 2**15 else nibabel.Nifti2Header
    header = kind(endianness="<")
    header.set_data_shape(geometry.shape)
    header.set_zooms(geometry.spacing_mm)
    header.set_xyzt_units("mm")
    header.set_sform(geometry.affine, code=1)
    if geometry.shear_deg < _SHEAR_DEG:
        header.set_qform(geometry.affine, code=1)
    return header
