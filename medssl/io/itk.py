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
from medssl.io.values import checked_grid, chosen_volumes, native_voxels

Encoding = Literal["raw", "deflate", "text"]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_MOST_HEADER_BYTES = 1 << 20
COMPRESSION_LEVEL = 6


@dataclass(frozen=True)
class Layout:
    """What a text header says of its voxels.

    Args:
        sizes: Voxels along the spatial axes, fastest first.
        inner: Values that lie side by side at each voxel.
        outer: How many such images follow one another.
        series: Which of the two counts volumes, of which one is to be chosen; the other counts channels.
        dtype: Stored type with byte order.
        encoding: How the voxels are written.
        columns_lps_mm: Step along each axis in the LPS frame, one a column.
        origin_lps_mm: Centre of the first voxel in the LPS frame.
        warnings: What was assumed.
    """

    sizes: tuple[int, int, int]
    inner: int
    outer: int
    series: Literal["inner", "outer"] | None
    dtype: np.dtype[Any]
    encoding: Encoding
    columns_lps_mm: Float64[np.ndarray, "3 3"]
    origin_lps_mm: Float64[np.ndarray, " 3"]
    warnings: tuple[str, ...]


def decode(
    layout: Layout,
    payload: bytes | memoryview,
    *,
    path: Path,
    name: Literal["metaimage", "nrrd"],
    data: bytes,
    volume: int | Literal["channels"] | None,
) -> Decoded:
    """Verify the voxels and bring them into the array order and the frame of medssl.

    Args:
        layout: From the header.
        payload: Bytes of the voxels as stored.
        path: For messages.
        name: The format.
        data: Bytes of the second file, where the voxels lie in one.
        volume: Which volume of a series to take, or all as ``channels``.

    Raises:
        ReadError: for damaged voxels. GeometryError: for an impossible grid. CaseError: E_NDIM, E_VOLUME.
    """
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ layout.columns_lps_mm
    affine[:3, 3] = _LPS_TO_RAS @ layout.origin_lps_mm
    geometry, far = checked_grid(layout.sizes, affine, path=path)
    inner, outer = range(layout.inner), range(layout.outer)
    count = {"inner": layout.inner, "outer": layout.outer, None: 1}[layout.series]
    chosen = chosen_volumes(count, volume=volume, path=path)
    if layout.series == "inner":
        inner = chosen
    elif layout.series == "outer":
        outer = chosen
    if min(len(inner), len(outer)) > 1:
        raise CaseError(f"{path}: {count} volumes of several channels; choose one with --volume.", code="E_NDIM")
    voxels, warnings = _voxels(layout, payload, outer, path=path)
    x, y, z = layout.sizes
    array = voxels.reshape(len(outer), z, y, x, layout.inner)
    if len(outer) > 1:
        array = array[..., inner.start].transpose(0, 3, 2, 1)
    else:
        array = array[0, ..., inner.start : inner.stop].transpose(3, 2, 1, 0)
    if len(inner) < layout.inner:
        array = array.copy(order="K")
    return Decoded(array, geometry, name, layout.warnings + warnings + far, data=data, volumes=count)


def header_lines(data: bytes, *, path: Path) -> Iterator[tuple[str, int]]:
    """Lines of a text header, each with the position of the byte behind it.

    Raises:
        ReadError: E_HEADER if the header does not end within a mebibyte.
    """
    position = 0
    while position < len(data):
        end = data.find(b"\n", position, _MOST_HEADER_BYTES)
        if end < 0:
            if len(data) > _MOST_HEADER_BYTES:
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


def sizes(values: Float64[np.ndarray, " n"], *, path: Path) -> tuple[tuple[int, int, int], int]:
    """Voxels along three axes, and how many volumes a fourth axis holds; a 2D image gets one slice.

    Raises:
        ReadError: E_HEADER for sizes below 1. CaseError: E_NDIM for 1D and for more than four dimensions.
    """
    if not (values >= 1).all() or (values != np.floor(values)).any() or (values > 2**31).any():
        raise ReadError(f"{path}: sizes {values.tolist()}; whole numbers from 1 on are needed.", code="E_HEADER")
    if len(values) < 2 or (values[4:] > 1).any():
        raise CaseError(
            f"{path}: {' x '.join(f'{v:.0f}' for v in values)} voxels; two or three dimensions and one of volumes "
            "are read. Split it into files.",
            code="E_NDIM",
        )
    x, y, z, volumes = (int(v) for v in [*values[:4], 1, 1][:4])
    return (x, y, z), volumes


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
    return _LPS_TO_RAS @ geometry.affine[:3, :3], _LPS_TO_RAS @ geometry.affine[:3, 3]


def written(values: Float64[np.ndarray, "*n"], separator: str = " ") -> str:
    """Numbers as text that reads back to the same bits."""
    return separator.join(repr(float(value)) for value in values.ravel())


def _voxels(
    layout: Layout, payload: bytes | memoryview, outer: range, *, path: Path
) -> tuple[Shaped[np.ndarray, " n"], tuple[str, ...]]:
    """Values of the images ``outer``, as they follow one another in the file."""
    one = layout.inner * int(np.prod(layout.sizes, dtype=object))
    count = len(outer) * one
    if layout.encoding == "text":
        values = _parse_text(bytes(payload), layout.outer * one, layout.dtype.newbyteorder("="), path=path)
        return values[outer.start * one : outer.stop * one], ()
    size = one * layout.dtype.itemsize
    needed = layout.outer * size
    integrity.check_size(needed, len(payload), path=path)
    if layout.encoding == "deflate":
        kept, warnings = integrity.inflate(
            payload,
            path=path,
            needed=needed,
            wbits=integrity.ZLIB_OR_GZIP,
            keep=slice(outer.start * size, outer.stop * size),
        )
        return native_voxels(kept, layout.dtype, count=count), warnings
    warnings = integrity.exactly(payload, needed, path=path)
    return native_voxels(payload, layout.dtype, count=count, offset=outer.start * size), warnings


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
