"""NIfTI-1 and NIfTI-2, single files and pairs, read with every field looked at and written with the source's geometry.

The header is parsed with nibabel; the voxels are taken from bytes whose number and checksum were verified first.
Choices: no scaling where the slope is 0 or not finite, as nibabel does; an unknown spatial unit is the millimetre;
without any transform the axes are those of nibabel (x flipped, centre at the origin), with a warning.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Float64, Shaped

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.geometry import Geometry
from medssl.io import integrity
from medssl.io.source import Decoded, Source
from medssl.io.values import checked_grid, label_dtype
from medssl.volume import Volume

Xform = Literal["sform", "qform"]
Header = Any  # nibabel publishes no types

_SIZES: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_READABLE = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_CONFLICT_MM = 0.1
_LIKE_MM = 1e-3
_SHEAR_DEG = 1e-3
_GZIP_LEVEL = 6
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
    data: bytes, *, path: Path, xform: Xform | None, assume_spacing_mm: tuple[float, float, float] | None
) -> Decoded:
    """Voxels and grid of a NIfTI file.

    Args:
        data: The whole file, perhaps gzipped; the header file of a pair.
        path: Where it came from; a pair's voxels lie beside it.
        xform: Which transform wins where both are set and disagree.
        assume_spacing_mm: Spacing to use where the header has none.

    Raises:
        ReadError: for damaged files. GeometryError: for impossible or ambiguous grids. CaseError: E_DTYPE, E_NDIM.
    """
    compressed = data[:2] == integrity.GZIP_MAGIC
    header = _parse(integrity.peek(data, path=path) if compressed else data[: max(_SIZES)], path=path)
    raw = header.binaryblock
    shape = _shape(header, path=path)
    dtype = _dtype(header, path=path)
    is_pair = bytes(header["magic"])[:2] == b"ni"
    offset = _offset(header, path=path, is_pair=is_pair)
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    warnings: tuple[str, ...] = ()
    second = b""
    if compressed:
        integrity.check_size(offset + needed, len(data), path=path)
        data, warnings = integrity.inflate(data, path=path, needed=offset + needed, wbits=integrity.GZIP)
    if is_pair:
        second = integrity.read_bytes(path.with_suffix(".img"), missing="E_PAIR")
    else:
        _check_extensions(data, header, offset, path=path)
    voxels = second if is_pair else data
    integrity.check_size(offset + needed, len(voxels), path=path)
    warnings += integrity.exactly(voxels, offset + needed, path=path)
    stored = np.frombuffer(voxels, dtype=dtype, offset=offset, count=needed // dtype.itemsize)
    array = stored.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F")
    array, more = _scaled(array, header, path=path)
    affine, said = _affine(header, shape, path=path, xform=xform, assume_spacing_mm=assume_spacing_mm)
    geometry, far = checked_grid(shape, affine, path=path)
    return Decoded(
        np.ascontiguousarray(array)[None],
        geometry,
        f"nifti{_version(header)}",
        warnings + more + said + far,
        nifti_header=raw,
        data=second,
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


def _shape(header: Header, *, path: Path) -> tuple[int, int, int]:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise ReadError(f"{path}: dim[0] is {dim[0]}; 1 to 7 is allowed. Take the source.", code="E_HEADER")
    for axis, n in enumerate(dim[1 : dim[0] + 1], start=1):
        if n < 1:
            raise ReadError(f"{path}: dim[{axis}] is {n}; at least 1 is needed. Take the source.", code="E_HEADER")
    sizes = dim[1 : dim[0] + 1]
    if any(n > 1 for n in sizes[3:]):
        raise CaseError(
            f"{path}: {' x '.join(map(str, sizes))} voxels; three dimensions are read. Split the series into volumes.",
            code="E_NDIM",
        )
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _dtype(header: Header, *, path: Path) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code not in _READABLE:
        name = nibabel.nifti1.data_type_codes.label.get(code, "unknown")
        raise CaseError(
            f"{path}: data type {code} ({name}); real grey values of up to 64 bits are read. Convert the file.",
            code="E_DTYPE",
        )
    dtype = np.dtype(_READABLE[code]).newbyteorder(header.endianness)
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise ReadError(
            f"{path}: bitpix is {int(header['bitpix'])}; data type {code} has {dtype.itemsize * 8} bits. "
            "Take the source.",
            code="E_HEADER",
        )
    return dtype


def _offset(header: Header, *, path: Path, is_pair: bool) -> int:
    offset = float(header["vox_offset"])
    least = 0 if is_pair else int(header["sizeof_hdr"]) + 4
    if not np.isfinite(offset) or offset != int(offset) or not least <= offset <= 2**31:
        raise ReadError(
            f"{path}: vox_offset is {offset:g}; a whole number from {least} on is needed. Take the source.",
            code="E_HEADER",
        )
    return int(offset)


def _check_extensions(data: bytes, header: Header, offset: int, *, path: Path) -> None:
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


def _scaled(
    array: Shaped[np.ndarray, "x y z"], header: Header, *, path: Path
) -> tuple[Shaped[np.ndarray, "x y z"], tuple[str, ...]]:
    """Apply slope and intercept; whole ones keep integers."""
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
                return (array.astype(np.int64) * int(slope) + int(inter)).astype(dtype), ()
    return array.astype(np.float64) * slope + inter, ()


def _affine(
    header: Header,
    shape: tuple[int, int, int],
    *,
    path: Path,
    xform: Xform | None,
    assume_spacing_mm: tuple[float, float, float] | None,
) -> tuple[Float64[np.ndarray, "4 4"], tuple[str, ...]]:
    """The one transform that the header means, in mm, and what was assumed to find it."""
    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    assumed = None if assume_spacing_mm is None else np.array(assume_spacing_mm) / scale
    header, warnings = _with_spacing(header, path=path, assumed=assumed)
    if scale != 1:
        warnings += (f"W_UNITS: positions in {'metres' if scale > 1 else 'micrometres'} were converted to mm.",)

    def matrix(get: Callable[[], np.ndarray[Any, Any]]) -> Float64[np.ndarray, "4 4"]:
        try:
            affine = np.array(get(), dtype=np.float64)
        except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
            raise GeometryError(f"{path}: the qform is no rotation. Repair the header.", code="E_AFFINE") from error
        affine[:3] *= scale
        return affine

    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        return matrix(header.get_base_affine), (
            *warnings,
            "W_NO_XFORM: no orientation is stored; left-right, front-back and head-foot are a guess.",
        )
    if has_sform and has_qform and xform is None:
        sform, qform = matrix(header.get_sform), matrix(header.get_qform)
        grid, _ = checked_grid(shape, sform, path=path)
        apart = grid.max_corner_distance_mm(checked_grid(shape, qform, path=path)[0])
        _check_conflict(apart, "sform and qform", path=path)
        return sform, warnings
    if has_qform and (xform == "qform" or not has_sform):
        return matrix(header.get_qform), warnings
    sform = matrix(header.get_sform)
    if xform is None:
        lengths = checked_grid(shape, sform, path=path)[0].spacing_mm
        pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64) * scale
        apart = float((np.abs(lengths - pixdim) * (np.array(shape) - 1)).max())
        _check_conflict(apart, "sform and pixdim", path=path)
    return sform, warnings


def _check_conflict(apart_mm: float, which: str, *, path: Path) -> None:
    if apart_mm > _CONFLICT_MM:
        raise GeometryError(
            f"{path}: {which} put a corner {apart_mm:.3g} mm apart; {_CONFLICT_MM} mm is allowed. "
            "Find out which is right and choose it with xform sform or qform.",
            code="E_XFORM_CONFLICT",
        )


def _with_spacing(
    header: Header, *, path: Path, assumed: Float64[np.ndarray, " 3"] | None
) -> tuple[Header, tuple[str, ...]]:
    """Header whose first three spacings are positive numbers; ``assumed`` is in the header's unit."""
    header = header.copy()
    pixdim = np.array(header["pixdim"][1:4], dtype=np.float64)
    warnings: tuple[str, ...] = ()
    dimensions = int(header["dim"][0])
    unused = np.arange(3) >= dimensions
    if unused.any():
        pixdim[unused & ~(np.isfinite(pixdim) & (pixdim > 0))] = 1
    bad = ~np.isfinite(pixdim) | (pixdim == 0)
    if bad.any():
        if assumed is None:
            raise GeometryError(
                f"{path}: pixdim {pixdim.tolist()}; positive spacings in mm are needed. "
                "Repair the header or say which spacing to assume.",
                code="E_SPACING",
            )
        pixdim[bad] = assumed[bad]
        warnings += (
            f"W_SPACING_ASSUMED: spacing {assumed[bad].tolist()} was assumed for axes {np.flatnonzero(bad).tolist()}.",
        )
    if (pixdim < 0).any():
        warnings += (f"W_PIXDIM: negative spacing {pixdim.tolist()} was taken as positive.",)
    if header["pixdim"][0] not in {-1, 1}:
        header["pixdim"][0] = 1  # by the standard 0 means 1; other values mean nothing
    header["pixdim"][1:4] = np.abs(pixdim)
    return header, warnings


def _like_header(raw: bytes, geometry: Geometry, *, path: Path) -> Header:
    """Fresh header with the geometry fields of ``raw``, in its version and byte order."""
    source = _parse(raw, path=path)
    shape = _shape(source, path=path)
    candidates = []
    for xform in ("sform", "qform"):
        try:
            affine, _ = _affine(source, shape, path=path, xform=xform, assume_spacing_mm=(1.0, 1.0, 1.0))
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
