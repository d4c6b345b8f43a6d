"""What MetaImage and NRRD share: voxels behind a text header, in the LPS frame of ITK.

Both are parsed here rather than by ITK, whose readers follow paths out of the folder, let damaged zlib data pass and
crash on some damaged files; the tests hold the results against ITK's on valid files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Shaped

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.geometry import Geometry
from medssl.io import integrity
from medssl.io.source import Decoded
from medssl.io.values import checked_grid

Encoding = Literal["raw", "deflate", "text"]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
MOST_HEADER_BYTES = 1 << 20
COMPRESSION_LEVEL = 6


@dataclass(frozen=True)
class Layout:
    """What a text header says of its voxels.

    Args:
        sizes: Voxels along the spatial axes, fastest first.
        channels: Values per voxel.
        interleaved: Whether the channels of a voxel lie side by side, rather than channel after channel.
        dtype: Stored type with byte order.
        encoding: How the voxels are written.
        columns_lps_mm: Step along each axis in the LPS frame, one a column.
        origin_lps_mm: Centre of the first voxel in the LPS frame.
        warnings: What was assumed.
    """

    sizes: tuple[int, int, int]
    channels: int
    interleaved: bool
    dtype: np.dtype[Any]
    encoding: Encoding
    columns_lps_mm: Float64[np.ndarray, "3 3"]
    origin_lps_mm: Float64[np.ndarray, " 3"]
    warnings: tuple[str, ...]


def decode(layout: Layout, payload: bytes, *, path: Path, name: Literal["metaimage", "nrrd"], data: bytes) -> Decoded:
    """Verify the voxels and bring them into the array order and the frame of medssl.

    Args:
        layout: From the header.
        payload: Bytes of the voxels as stored.
        path: For messages.
        name: The format.
        data: Bytes of the second file, where the voxels lie in one.
    """
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ layout.columns_lps_mm
    affine[:3, 3] = LPS_TO_RAS @ layout.origin_lps_mm
    geometry, far = checked_grid(layout.sizes, affine, path=path)
    voxels, warnings = _voxels(layout, payload, path=path)
    x, y, z = layout.sizes
    if layout.interleaved:
        array = voxels.reshape(z, y, x, layout.channels).transpose(3, 2, 1, 0)
    else:
        array = voxels.reshape(layout.channels, z, y, x).transpose(0, 3, 2, 1)
    return Decoded(np.ascontiguousarray(array), geometry, name, layout.warnings + warnings + far, data=data)


def header_lines(data: bytes, *, path: Path) -> Iterator[tuple[str, int]]:
    """Lines of a text header, each with the position of the byte behind it.

    Raises:
        ReadError: E_HEADER if the header does not end within a mebibyte.
    """
    position = 0
    while position < len(data):
        end = data.find(b"\n", position, MOST_HEADER_BYTES)
        if end < 0:
            if len(data) > MOST_HEADER_BYTES:
                raise ReadError(f"{path}: the text header does not end. Take the source.", code="E_HEADER")
            end = len(data)
        yield data[position:end].decode("latin-1").rstrip("\r"), end + 1
        position = end + 1


def numbers(text: str, count: int, *, what: str, path: Path) -> Float64[np.ndarray, " count"]:
    """The ``count`` numbers of a header field.

    Raises:
        ReadError: E_HEADER.
    """
    try:
        found = np.array([float(word) for word in text.split()])
    except ValueError:
        found = np.empty(0)
    if len(found) != count:
        raise ReadError(f"{path}: {what} does not hold {count} numbers. Take the source.", code="E_HEADER")
    return found


def whole_number(text: str, *, what: str, path: Path) -> int:
    """The one whole number from 1 on of a header field.

    Raises:
        ReadError: E_HEADER.
    """
    value = float(numbers(text, 1, what=what, path=path)[0])
    if not (value >= 1 and value.is_integer()):
        raise ReadError(
            f"{path}: {what} is {value:g}; a whole number from 1 on is needed. Take the source.", code="E_HEADER"
        )
    return int(value)


def sizes(values: Float64[np.ndarray, " n"], *, path: Path) -> tuple[int, int, int]:
    """Voxels along three axes; a 2D image gets one slice, trailing ones are dropped.

    Raises:
        ReadError: E_HEADER for sizes below 1. CaseError: E_NDIM for 1D and for more than three dimensions.
    """
    if not (values >= 1).all() or (values != np.floor(values)).any() or (values > 2**31).any():
        raise ReadError(f"{path}: sizes {values.tolist()}; whole numbers from 1 on are needed.", code="E_HEADER")
    if len(values) < 2 or (values[3:] > 1).any():
        raise CaseError(
            f"{path}: {' x '.join(f'{v:.0f}' for v in values)} voxels; two or three dimensions are read. "
            "Split the series into volumes.",
            code="E_NDIM",
        )
    x, y, z = (int(v) for v in [*values[:3], 1][:3])
    return x, y, z


def spacings(
    found: Float64[np.ndarray, " n"] | None, count: int, *, path: Path, assume: tuple[float, float, float] | None
) -> tuple[Float64[np.ndarray, " 3"], tuple[str, ...]]:
    """Three spacings in mm from what a header says, or from what the caller assumes.

    Raises:
        GeometryError: E_SPACING for zero, negative or non-finite spacings without an assumption.
    """
    result = np.ones(3)
    if found is not None:
        result[: min(3, count)] = found[:3]
        if np.isfinite(result).all() and (result > 0).all():
            return result, ()
        if assume is None:
            raise GeometryError(
                f"{path}: spacing {result.tolist()} mm; positive numbers are needed. "
                "Repair the header or say which spacing to assume.",
                code="E_SPACING",
            )
    if assume is not None:
        return np.array(assume), (f"W_SPACING_ASSUMED: spacing {list(assume)} mm was assumed.",)
    return result, ("W_SPACING_MISSING: no spacing is stored; 1 mm was assumed.",)


def ras_to_lps(geometry: Geometry) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, " 3"]]:
    """Steps along the axes, one a column, and origin in the LPS frame, mm."""
    return LPS_TO_RAS @ geometry.affine[:3, :3], LPS_TO_RAS @ geometry.affine[:3, 3]


def written(values: Float64[np.ndarray, "*n"], separator: str = " ") -> str:
    """Numbers as text that reads back to the same bits."""
    return separator.join(repr(float(value)) for value in values.ravel())


def _voxels(layout: Layout, payload: bytes, *, path: Path) -> tuple[Shaped[np.ndarray, " n"], tuple[str, ...]]:
    count = layout.channels * int(np.prod(layout.sizes, dtype=object))
    native = layout.dtype.newbyteorder("=")
    warnings: tuple[str, ...] = ()
    if layout.encoding == "text":
        return _parse_text(payload, count, native, path=path), warnings
    needed = count * layout.dtype.itemsize
    integrity.check_size(needed, len(payload), path=path)
    if layout.encoding == "deflate":
        payload, warnings = integrity.inflate(payload, path=path, needed=needed, wbits=integrity.ZLIB_OR_GZIP)
    warnings += integrity.exactly(payload, needed, path=path)
    return np.frombuffer(payload, layout.dtype, count=count).astype(native, copy=False), warnings


def _parse_text(payload: bytes, count: int, dtype: np.dtype[Any], *, path: Path) -> Shaped[np.ndarray, " n"]:
    words = payload.split()
    if len(words) != count:
        code = "E_TRUNCATED" if len(words) < count else "E_TRAILING"
        raise ReadError(f"{path}: {len(words)} numbers; {count} are needed. Copy the file again.", code=code)
    try:
        values = np.array([float(word) for word in words])
        if dtype.kind in "ui" and not ((values >= np.iinfo(dtype).min) & (values <= np.iinfo(dtype).max)).all():
            raise ValueError
    except ValueError as error:
        raise ReadError(f"{path}: holds words that are no numbers of type {dtype}.", code="E_HEADER") from error
    return values.astype(dtype)
