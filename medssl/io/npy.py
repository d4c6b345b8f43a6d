"""Arrays of NumPy, ``.npy``: (X, Y), (X, Y, Z) or (C, X, Y, Z) in the axis order of medssl.

The header is matched by a pattern rather than evaluated, objects are refused, and the size is compared with that of
the file before any memory is taken. A file says nothing of the world: the axes are taken as left, posterior, superior,
as for pictures, with 1 mm between voxels unless a spacing is given.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from medssl.errors import CaseError, ReadError
from medssl.io import integrity
from medssl.io.source import Decoded
from medssl.io.values import checked_grid, native_voxels

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
_MOST_HEADER_BYTES = 1 << 16
_DTYPE = re.compile(rb"'descr'\s*:\s*'([<>|=]?)([?a-zA-Z])(\d*)'")
_ORDER = re.compile(rb"'fortran_order'\s*:\s*(True|False)")
_SHAPE = re.compile(rb"'shape'\s*:\s*\(([\d\s,]*)\)")
_KINDS = {b"b", b"?", b"i", b"u", b"f"}
_MOST_ITEM_BYTES = 8


def read(data: bytes, *, path: Path, assume_spacing_mm: tuple[float, float, float] | None) -> Decoded:
    """Voxels of an array file.

    Args:
        data: The whole file.
        path: For messages.
        assume_spacing_mm: Distance between voxels along X, Y and Z.

    Raises:
        ReadError: E_HEADER, E_SIZE_LIE, E_TRUNCATED, E_TRAILING. CaseError: E_DTYPE, E_NDIM.
    """
    header, offset = _header(data, path=path)
    dtype = _dtype(header, path=path)
    shape, is_fortran = _shape(header, path=path)
    count = int(np.prod(shape, dtype=object))
    integrity.check_size(offset + count * dtype.itemsize, len(data), path=path)
    warnings = integrity.exactly(data, offset + count * dtype.itemsize, path=path)
    flat = native_voxels(data, dtype, count=count, offset=offset)
    array = flat.reshape(shape, order="F" if is_fortran else "C")
    if len(shape) == 2:
        array = array[..., None]
    if len(shape) < 4:
        array = array[None]
    x, y, z = assume_spacing_mm or (1.0, 1.0, 1.0)
    warnings += (
        "W_NO_XFORM: an array has no orientation; the axes were taken as left, posterior, superior.",
        f"W_SPACING_ASSUMED: spacing {[x, y, z]} mm was assumed."
        if assume_spacing_mm
        else "W_NO_SPACING: an array has no size in mm; 1 mm a voxel was assumed.",
    )
    geometry, far = checked_grid(array.shape[1:], np.diag([-x, -y, z, 1.0]), path=path)
    return Decoded(array.view(np.uint8) if array.dtype == bool else array, geometry, "npy", warnings + far)


def _header(data: bytes, *, path: Path) -> tuple[bytes, int]:
    """Text of the header and the place of the first voxel."""
    start = len(_MAGIC) + 2
    if len(data) < start:
        raise ReadError(f"{path}: ends within its header. Copy the file again.", code="E_TRUNCATED")
    size = _LENGTH_BYTES.get(data[len(_MAGIC)])
    if size is None:
        raise ReadError(f"{path}: an unknown version of the array format. Save the array anew.", code="E_HEADER")
    length = int.from_bytes(data[start : start + size], "little")
    offset = start + size + length
    if length > _MOST_HEADER_BYTES:
        raise ReadError(
            f"{path}: a header of {length} bytes; {_MOST_HEADER_BYTES} are the most. Save the array anew.",
            code="E_HEADER",
        )
    if len(data) < offset:
        raise ReadError(f"{path}: ends within its header. Copy the file again.", code="E_TRUNCATED")
    return data[start + size : offset], offset


def _dtype(header: bytes, *, path: Path) -> np.dtype[np.generic]:
    found = _DTYPE.search(header)
    if found is None or found[2] not in _KINDS or int(found[3] or 1) > _MOST_ITEM_BYTES:
        raise CaseError(
            f"{path}: its elements are no real numbers of up to 64 bits. Save it as such an array.", code="E_DTYPE"
        )
    return np.dtype((found[1] + found[2] + found[3]).decode("ascii"))


def _shape(header: bytes, *, path: Path) -> tuple[tuple[int, ...], bool]:
    """Sizes of all axes, and whether the first one is the fastest."""
    sizes, order = _SHAPE.search(header), _ORDER.search(header)
    if sizes is None or order is None:
        raise ReadError(f"{path}: the header has no shape or order. Save the array anew.", code="E_HEADER")
    shape = tuple(int(word) for word in sizes[1].split(b",") if word.strip())
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise CaseError(
            f"{path}: an array of shape {shape}; (X, Y), (X, Y, Z) or (C, X, Y, Z) is needed. Save it so.",
            code="E_NDIM",
        )
    return shape, order[1] == b"True"
