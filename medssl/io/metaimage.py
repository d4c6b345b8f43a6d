"""MetaImage: ``.mha`` in one file, ``.mhd`` with its voxels in a second file of the same folder."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.io import integrity, itk
from medssl.io.nifti import storable
from medssl.io.source import Decoded
from medssl.volume import Volume

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items() if "LONG" not in name}
_UNIT_LENGTH_TOLERANCE = 1e-3


def read(
    data: bytes,
    *,
    path: Path,
    assume_spacing_mm: tuple[float, float, float] | None,
    volume: int | Literal["channels"] | None = None,
) -> Decoded:
    """Voxels and grid of a MetaImage.

    Args:
        data: The whole ``.mha`` or ``.mhd`` file.
        path: Where it came from; ``.mhd`` voxels are looked for beside it only.
        assume_spacing_mm: Spacing to use where the header has none.
        volume: Which volume to take where a fourth axis holds several, or all as ``channels``.

    Raises:
        ReadError: for damaged files. GeometryError: for impossible grids. CaseError: E_DTYPE, E_NDIM, E_VOLUME.
    """
    fields, end = _fields(data, path=path)
    layout = _layout(fields, path=path, assume_spacing_mm=assume_spacing_mm)
    name = fields["ElementDataFile"]
    if name == "LOCAL":
        return itk.decode(layout, memoryview(data)[end:], path=path, name="metaimage", data=b"", volume=volume)
    voxels = integrity.read_bytes(integrity.companion(path, name), missing="E_PAIR")
    return itk.decode(layout, voxels, path=path, name="metaimage", data=voxels, volume=volume)


def data_file(data: bytes, *, path: Path) -> Path | None:
    """The second file of an ``.mhd``, None for an ``.mha``."""
    name = _fields(data, path=path)[0]["ElementDataFile"]
    return None if name == "LOCAL" else integrity.companion(path, name)


def encode(volume: Volume, *, path: Path) -> bytes:
    """Bytes of a compressed ``.mha`` file; ``path`` is for messages."""
    array = storable(volume, path=path)
    columns, origin = itk.ras_to_lps(volume.geometry)
    spacing = np.array(volume.geometry.spacing_mm)
    voxels = zlib.compress(array.astype(array.dtype.newbyteorder("<"), copy=False).T.tobytes(), itk.COMPRESSION_LEVEL)
    lines = (
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(voxels)}",
        f"TransformMatrix = {itk.written((columns / spacing).T)}",
        f"Offset = {itk.written(origin)}",
        "CenterOfRotation = 0 0 0",
        f"ElementSpacing = {itk.written(spacing)}",
        f"DimSize = {' '.join(map(str, volume.geometry.shape))}",
        f"ElementNumberOfChannels = {array.shape[0]}",
        f"ElementType = {_NAMES[array.dtype]}",
        "ElementDataFile = LOCAL",
    )
    return "".join(f"{line}\n" for line in lines).encode("ascii") + voxels


def _fields(data: bytes, *, path: Path) -> tuple[dict[str, str], int]:
    """Fields up to ``ElementDataFile``, and the place of the first byte behind them."""
    fields: dict[str, str] = {}
    for line, end in itk.header_lines(data, path=path):
        key, _, value = line.partition("=")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields, end
    raise ReadError(f"{path}: the header does not say where the voxels are. Take the source.", code="E_HEADER")


def _layout(fields: dict[str, str], *, path: Path, assume_spacing_mm: tuple[float, float, float] | None) -> itk.Layout:
    dimensions = itk.whole_number(fields.get("NDims", ""), what="NDims", path=path)
    shape, volumes = itk.sizes(itk.numbers(fields.get("DimSize", ""), dimensions, what="DimSize", path=path), path=path)
    element = fields.get("ElementType", "")
    if element not in _TYPES:
        raise CaseError(f"{path}: its ElementType is none of {', '.join(_TYPES)}. Convert it.", code="E_DTYPE")
    if fields.get("HeaderSize", "0") != "0":
        raise ReadError(f"{path}: skips HeaderSize bytes, which is not read. Convert it to .mha.", code="E_ENCODING")
    if fields.get("DistanceUnits", "mm") not in {"mm", "?"}:
        raise GeometryError(f"{path}: its DistanceUnits are not mm. Convert it to mm.", code="E_UNITS")
    channels = itk.whole_number(fields.get("ElementNumberOfChannels", "1"), what="channels", path=path)
    stored = fields.get("ElementSpacing", fields.get("ElementSize"))  # ITK falls back in the same way
    found = None if stored is None else itk.numbers(stored, dimensions, what="ElementSpacing", path=path)
    spacing, warnings = itk.spacings(found, dimensions, path=path, assume=assume_spacing_mm)
    directions, said = _directions(fields, dimensions, path=path)
    origin = np.zeros(3)
    offset = next((fields[key] for key in ("Offset", "Position", "Origin") if key in fields), None)
    if offset is not None:
        used = min(3, dimensions)
        origin[:used] = itk.numbers(offset, dimensions, what="Offset", path=path)[:used]
    is_big = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
    encoding: itk.Encoding = "raw"
    if _is_true(fields, "CompressedData"):
        encoding = "deflate"
    elif fields.get("BinaryData", "True").lower() == "false":
        encoding = "text"
    return itk.Layout(
        sizes=shape,
        inner=channels,
        outer=volumes,
        series="outer",
        dtype=np.dtype(_TYPES[element]).newbyteorder(">" if is_big else "<"),
        encoding=encoding,
        columns_lps_mm=directions * spacing,
        origin_lps_mm=origin,
        warnings=warnings + said,
    )


def _directions(fields: dict[str, str], dimensions: int, *, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Unit vectors of the axes, one a column; the header holds them one a row."""
    directions = np.eye(3)
    stored = next((fields[key] for key in ("TransformMatrix", "Rotation", "Orientation") if key in fields), None)
    if stored is None:
        return directions, ("W_NO_XFORM: no orientation is stored; the axes were taken as left, posterior, superior.",)
    matrix = itk.numbers(stored, dimensions**2, what="TransformMatrix", path=path).reshape(dimensions, dimensions)
    used = min(3, dimensions)
    directions[:used, :used] = matrix[:used, :used].T
    lengths = np.linalg.norm(directions, axis=0)
    if not (np.abs(lengths - 1) < _UNIT_LENGTH_TOLERANCE).all():
        raise GeometryError(
            f"{path}: direction vectors of length {lengths.tolist()}; 1 is needed. Repair the header.", code="E_AFFINE"
        )
    return directions, ()


def _is_true(fields: dict[str, str], key: str) -> bool:
    return fields.get(key, "False").lower() == "true"
