"""NRRD: ``.nrrd`` in one file, ``.nhdr`` with its voxels in a second file of the same folder."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from medssl.errors import CaseError, GeometryError, ReadError
from medssl.io import integrity, itk
from medssl.io.nifti import storable
from medssl.io.source import Decoded
from medssl.volume import Volume

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_KINDS = {name: kind for kind, names in _TYPES.items() for name in names}
_ENCODINGS: dict[str, itk.Encoding] = {
    "raw": "raw",
    "gzip": "deflate",
    "gz": "deflate",
    "text": "text",
    "txt": "text",
    "ascii": "text",
}
_SPACES = {
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "lps": (1.0, 1.0, 1.0),
}
_SPATIAL_KINDS = {"domain", "space"}
_SERIES_KINDS = {"time"}


def read(
    data: bytes,
    *,
    path: Path,
    assume_spacing_mm: tuple[float, float, float] | None,
    volume: int | Literal["channels"] | None = None,
) -> Decoded:
    """Voxels and grid of an NRRD file.

    An axis of kind ``time`` holds volumes, of which one must be chosen; one of kind ``list`` holds channels unless a
    volume is chosen; all other axes that are not spatial hold channels.

    Args:
        data: The whole ``.nrrd`` or ``.nhdr`` file.
        path: Where it came from; ``.nhdr`` voxels are looked for beside it only.
        assume_spacing_mm: Spacing to use where the header has none.
        volume: Which volume to take where there are several, or all as ``channels``.

    Raises:
        ReadError: for damaged files. GeometryError: for impossible grids. CaseError: E_DTYPE, E_NDIM, E_VOLUME.
    """
    fields, end = _fields(data, path=path)
    layout = _layout(fields, path=path, assume_spacing_mm=assume_spacing_mm, is_list_series=isinstance(volume, int))
    second = _second(fields, path=path)
    if second is None:
        return itk.decode(layout, memoryview(data)[end:], path=path, name="nrrd", data=b"", volume=volume)
    voxels = integrity.read_bytes(second, missing="E_PAIR")
    return itk.decode(layout, voxels, path=path, name="nrrd", data=voxels, volume=volume)


def data_file(data: bytes, *, path: Path) -> Path | None:
    """The second file of an ``.nhdr``, None for an ``.nrrd``."""
    return _second(_fields(data, path=path)[0], path=path)


def encode(volume: Volume, *, path: Path) -> bytes:
    """Bytes of a gzipped ``.nrrd`` file; ``path`` is for messages."""
    array = storable(volume, path=path)
    columns, origin = itk.ras_to_lps(volume.geometry)
    vectors = [f"({itk.written(column, ',')})" for column in columns.T]
    shape = [str(n) for n in volume.geometry.shape]
    kinds = ["domain"] * 3
    if array.shape[0] > 1:
        shape, kinds, vectors = [str(array.shape[0]), *shape], ["vector", *kinds], ["none", *vectors]
    engine = zlib.compressobj(itk.COMPRESSION_LEVEL, zlib.DEFLATED, integrity.GZIP)
    voxels = engine.compress(array.astype(array.dtype.newbyteorder("<"), copy=False).T.tobytes()) + engine.flush()
    lines = (
        "NRRD0004",
        f"type: {_TYPES[array.dtype.str[1:]][-1]}",
        f"dimension: {len(shape)}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(shape)}",
        f"space directions: {' '.join(vectors)}",
        f"kinds: {' '.join(kinds)}",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({itk.written(origin, ',')})",
    )
    return "".join(f"{line}\n" for line in lines).encode("ascii") + b"\n" + voxels


def _fields(data: bytes, *, path: Path) -> tuple[dict[str, str], int]:
    """Fields up to the blank line, and the place of the first byte behind it."""
    fields: dict[str, str] = {}
    end = len(data)
    for line, after in itk.header_lines(data, path=path):
        if not line:
            end = after
            break
        key, separator, value = line.partition(":")
        if separator and not line.startswith("#") and not value.startswith("="):
            fields[key.strip().lower()] = value.strip()
    return fields, end


def _second(fields: dict[str, str], *, path: Path) -> Path | None:
    name = fields.get("data file", fields.get("datafile"))
    return None if name is None else integrity.companion(path, name)


def _layout(
    fields: dict[str, str],
    *,
    path: Path,
    assume_spacing_mm: tuple[float, float, float] | None,
    is_list_series: bool,
) -> itk.Layout:
    dimensions = itk.whole_number(fields.get("dimension", ""), what="dimension", path=path)
    counts = itk.numbers(fields.get("sizes", ""), dimensions, what="sizes", path=path)
    kind, encoding = fields.get("type", "").lower(), fields.get("encoding", "").lower()
    if kind not in _KINDS:
        raise CaseError(f"{path}: its type is no real number of up to 64 bits. Convert it.", code="E_DTYPE")
    skips = {fields.get(key, "0") for key in ("line skip", "lineskip", "byte skip", "byteskip")}
    if encoding not in _ENCODINGS or skips != {"0"}:
        raise ReadError(
            f"{path}: encoding {encoding[:20]!r}; raw, gzip and text without skipped bytes are read. Convert it.",
            code="E_ENCODING",
        )
    spatial, kinds, vectors = _axes(fields, dimensions, path=path)
    is_spatial = np.array(spatial)
    shape, volumes = itk.sizes(counts[is_spatial], path=path)
    others = int(counts[~is_spatial].prod())
    if volumes > 1 and not all(spatial):
        raise CaseError(f"{path}: four spatial axes and one of channels. Split it into files.", code="E_NDIM")
    inner, outer = (1, others * volumes) if spatial[0] else (others, 1)
    series: Literal["inner", "outer"] | None = None
    if volumes > 1 or _SERIES_KINDS & kinds or (is_list_series and "list" in kinds):
        series = "outer" if spatial[0] else "inner"
    columns, origin, warnings = _placed(fields, vectors, is_spatial, path=path, assume_spacing_mm=assume_spacing_mm)
    return itk.Layout(
        sizes=shape,
        inner=inner,
        outer=outer,
        series=series,
        dtype=np.dtype(_KINDS[kind]).newbyteorder(">" if fields.get("endian", "").lower() == "big" else "<"),
        encoding=_ENCODINGS[encoding],
        columns_lps_mm=columns,
        origin_lps_mm=origin,
        warnings=warnings,
    )


def _axes(
    fields: dict[str, str], dimensions: int, *, path: Path
) -> tuple[list[bool], set[str], list[np.ndarray | None]]:
    """Which axes are spatial, the kinds of the others, and the step along each spatial one if the header has it."""
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * dimensions
    directions = _vectors(fields["space directions"], path=path) if "space directions" in fields else None
    if len(kinds) != dimensions or (directions is not None and len(directions) != dimensions):
        raise ReadError(f"{path}: kinds or directions do not fit {dimensions} axes. Take the source.", code="E_HEADER")
    spatial = [kind in _SPATIAL_KINDS for kind in kinds]
    if directions is None:
        steps: list[np.ndarray | None] = [None] * sum(spatial)
    else:
        if "kinds" not in fields and directions[0] is None:
            spatial[0] = False
        if any((step is None) is is_spatial for step, is_spatial in zip(directions, spatial, strict=True)):
            raise GeometryError(
                f"{path}: a direction is missing on a spatial axis, or given on another. Repair the header.",
                code="E_SPACE_DIRS",
            )
        steps = [step for step in directions if step is not None]
    if spatial.count(False) > 1 or (not all(spatial) and spatial[0] and spatial[-1]) or not any(spatial):
        raise CaseError(
            f"{path}: axes of kinds {' '.join(kinds)}; spatial axes and at most one other, "
            "at an end, are read. Split it into files.",
            code="E_NDIM",
        )
    return spatial, {kind for kind, is_spatial in zip(kinds, spatial, strict=True) if not is_spatial}, steps


def _placed(
    fields: dict[str, str],
    steps: list[np.ndarray | None],
    is_spatial: Bool[np.ndarray, " n"],
    *,
    path: Path,
    assume_spacing_mm: tuple[float, float, float] | None,
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, " 3"], tuple[str, ...]]:
    """Steps along the axes and origin in LPS mm, and what was assumed."""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", ""))))
    if units - {"mm", "", "millimeter", "none"}:
        raise GeometryError(f"{path}: its space units are not mm. Convert it to mm.", code="E_UNITS")
    space = fields.get("space", "").lower()
    if space and space not in _SPACES:
        raise GeometryError(
            f"{path}: space {space[:40]!r}; LPS, RAS and LAS are read. Convert it to one of these.", code="E_SPACE"
        )
    warnings: tuple[str, ...] = ()
    if not space:
        warnings = ("W_NO_SPACE: no anatomical space is stored; the world was taken as left, posterior, superior.",)
    to_lps = np.diag(_SPACES.get(space, (1.0, 1.0, 1.0)))
    origin = np.zeros(3)
    if "space origin" in fields:
        place = _vectors(fields["space origin"], path=path)[0]
        if place is None:
            raise ReadError(f"{path}: the space origin is no vector. Take the source.", code="E_HEADER")
        origin[: len(place)] = place
    given = [step for step in steps if step is not None]
    if given:
        lengths = np.array([np.linalg.norm(step) for step in given])
        _, said = itk.spacings(lengths, len(given), path=path, assume=None)
        return to_lps @ _columns(given), to_lps @ origin, warnings + said
    count = len(steps)
    stored = fields.get("spacings")
    found = None
    if stored is not None:
        found = itk.numbers(stored, len(is_spatial), what="spacings", path=path)[is_spatial]
    spacing, said = itk.spacings(found, count, path=path, assume=assume_spacing_mm)
    return to_lps @ np.diag(spacing), to_lps @ origin, warnings + said


def _columns(steps: list[np.ndarray]) -> Float64[np.ndarray, "3 3"]:
    """Up to three steps as columns; a single slice gets the normal of its plane, 1 mm long."""
    columns = np.eye(3)
    for axis, step in enumerate(steps[:3]):
        columns[:, axis] = 0
        columns[: len(step), axis] = step
    if len(steps) == 2:
        normal = np.cross(columns[:, 0], columns[:, 1])
        columns[:, 2] = normal / (np.linalg.norm(normal) or 1.0)
    return columns


def _vectors(text: str, *, path: Path) -> list[np.ndarray | None]:
    """``(a,b,c)`` and ``none`` words of a field."""
    vectors: list[np.ndarray | None] = []
    for word in re.findall(r"\([^)]*\)|[^\s()]+", text):
        if not word.startswith("("):
            if word.lower() != "none":
                raise ReadError(f"{path}: a direction is neither a vector nor none. Take the source.", code="E_HEADER")
            vectors.append(None)
            continue
        inner = word[1:-1].replace(",", " ")
        count = len(inner.split())
        if count not in {2, 3}:
            raise CaseError(f"{path}: vectors of {count} numbers; 2 or 3 are read. Split the series.", code="E_NDIM")
        vectors.append(itk.numbers(inner, count, what="a vector", path=path))
    return vectors
