"""Siemens mosaics: one picture that holds the slices of a whole volume as tiles."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.frames import along, normal
from medssl.io.dicom.model import Frame

_PROTOCOL = re.compile(rb"### ASCCONV BEGIN.*?###(.*?)### ASCCONV END", re.DOTALL)
_MOST_TILES = 4096
_AXES = ("Sag", "Cor", "Tra")


def is_mosaic(elements: Elements) -> bool:
    """Whether the image type says mosaic."""
    return "MOSAIC" in elements.text("ImageType").upper().split("\\")


def tiles(elements: Elements, whole: Frame) -> tuple[Frame, ...]:
    """Frames of a mosaic, in the order of its tiles.

    The position of the file is that of the first pixel of one slice of the mosaic's size around the centre of the first
    tile, so that the tile begins half the difference of both extents further in.

    Args:
        elements: Of the file.
        whole: The mosaic as one frame.

    Raises:
        ReadError: E_NO_GEOMETRY, E_TAG or E_HEADER.
    """
    private = _csa(elements)
    count, direction = _count(private), _vector(private, "SliceNormalVector")
    if direction is None:
        count, direction = _from_protocol(elements)
    count = elements.integer("SiemensNumberOfImagesInMosaic") or count
    position, orientation, spacing = whole.position_mm, whole.orientation, whole.spacing_mm
    step = whole.between_mm
    if not count or direction is None or position is None or orientation is None or spacing is None or not step:
        raise ReadError(
            f"{elements.path}: a mosaic must give number, spacing and direction of its slices, in the header of its "
            "maker too, and does not. Export it with private elements, or as single slices.",
            code="E_NO_GEOMETRY",
        )
    across = math.ceil(math.sqrt(count))
    if count > _MOST_TILES or whole.rows % across or whole.columns % across:
        raise ReadError(
            f"{elements.path}: {count} tiles do not divide a mosaic of {whole.rows} x {whole.columns} pixels. "
            "Take the file from its source.",
            code="E_TAG",
        )
    rows, columns = whole.rows // across, whole.columns // across
    right = spacing[1] * (whole.columns - columns) / 2
    down = spacing[0] * (whole.rows - rows) / 2
    corner = [position[i] + right * orientation[i] + down * orientation[i + 3] for i in range(3)]
    agreement = sum(a * b for a, b in zip(normal(orientation), direction, strict=True))
    signed = math.copysign(step, agreement)
    traits = dict(whole.traits)
    b_value = _vector(private, "B_value", 1)
    if b_value is not None:
        traits.setdefault("b_value", b_value[0])
    return tuple(
        replace(
            whole,
            tile=tile,
            rows=rows,
            columns=columns,
            position_mm=along(corner, orientation, signed * tile),
            traits=traits,
        )
        for tile in range(count)
    )


def _csa(elements: Elements) -> dict[str, Any]:
    """Tags of the maker's own header; none where it is absent."""
    raw = elements.raw("SiemensCSAImageHeader")
    if not raw:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nibabel.nicom import csareader

            found: dict[str, Any] = csareader.read(raw)["tags"]
    except Exception as error:
        raise ReadError(
            f"{elements.path}: the maker's header of a mosaic is damaged ({type(error).__name__}). "
            "Take the file from its source.",
            code="E_HEADER",
        ) from None
    return found


def _from_protocol(elements: Elements) -> tuple[int | None, list[float] | None]:
    """Number of slices, and the direction they are counted in, of the scan protocol in the series header."""
    found = _PROTOCOL.search(elements.raw("SiemensCSASeriesHeader"))
    if found is None:
        return None, None
    text = found[1].decode("latin-1")
    size = re.search(r"sSliceArray\.lSize\s*=\s*(\d+)", text)
    places = [
        [float(number[1]) if (number := _entry(text, f"asSlice[{index}].sPosition.d{axis}")) else 0.0 for axis in _AXES]
        for index in (0, 1)
    ]
    turned = any((mark := _entry(text, f"ucImageNumb{axis}")) and int(mark[1], 16) for axis in _AXES)
    direction = [(a - b if turned else b - a) for a, b in zip(*places, strict=True)]
    return int(size[1]) if size else None, direction if any(direction) else None


def _entry(text: str, name: str) -> re.Match[str] | None:
    return re.search(rf"sSliceArray\.{re.escape(name)}\s*=\s*(0x[0-9a-fA-F]+|[-+]?[0-9.]+(?:e[-+]?\d+)?)", text)


def _count(private: dict[str, Any]) -> int | None:
    found = _vector(private, "NumberOfImagesInMosaic", 1)
    return None if found is None else int(found[0])


def _vector(private: dict[str, Any], name: str, count: int = 3) -> list[float] | None:
    items = private.get(name, {}).get("items", [])
    if len(items) < count or not all(isinstance(item, int | float) and math.isfinite(item) for item in items[:count]):
        return None
    return [float(item) for item in items[:count]]
