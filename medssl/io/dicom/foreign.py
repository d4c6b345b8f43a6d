"""Files that the walker leaves alone, read by pydicom into the same shape."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from medssl.io.dicom.dataset import TEXT, Elements, PixelData, Value, convert
from medssl.io.dicom.tags import BIG_ENDIAN, EXPLICIT, IMPLICIT, META, NO_META, Table
from medssl.io.dicom.walker import DEEPEST, LONG_VRS, PIXELS, UNDEFINED, too_deep


def read_foreign(data: bytes, *, path: Path, wanted: Table) -> Elements:
    """Elements of a file that pydicom understands.

    Args:
        data: Of the whole file.
        path: For messages.
        wanted: What to keep.

    Raises:
        ReadError: E_HEADER, whatever pydicom raises.
    """
    from medssl.io.dicom.objects import parsing  # with it comes pydicom, which most files do without

    with parsing(path):
        import pydicom

        file = io.BytesIO(data)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        implicit, little = dataset.original_encoding
        values = _values(dataset, path=path, wanted=wanted, depth=0)
        meta = _values(dataset.file_meta, path=path, wanted=META, depth=0)
        pixels = _pixels(file, big=little is False, implicit=bool(implicit))
    syntax = meta.pop("TransferSyntaxUID", "")
    warnings: tuple[str, ...] = ()
    if not isinstance(syntax, str) or not syntax:
        syntax, warnings = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN, (NO_META,)
    return Elements(path, meta | values, transfer_syntax=syntax, pixels=pixels, size=len(data), warnings=warnings)


def _values(dataset: Any, *, path: Path, wanted: Table, depth: int) -> dict[str, Value]:
    if depth > DEEPEST:
        raise too_deep(path)
    values: dict[str, Value] = {}
    for tag in dataset.keys() & wanted.keys():
        keyword, kind = wanted[tag]
        if kind == "SQ":
            items = dataset[tag].value
            values[keyword] = [
                Elements(path, _values(item, path=path, wanted=wanted, depth=depth + 1)) for item in items
            ]
            continue
        found = dataset.get_item(tag)
        if getattr(found, "is_raw", False):
            vr = kind if found.VR in {None, "UN"} else found.VR
            values[keyword] = convert(found.value or b"", vr, order="<" if found.is_little_endian else ">")
        elif kind in TEXT:
            values[keyword] = str(found.value or "").strip(" \0")
    return values


def _pixels(file: io.BytesIO, *, big: bool, implicit: bool) -> PixelData | None:
    """Where pixels begin, from where pydicom stopped."""
    start = file.tell()
    head = file.read(12)
    if len(head) < 8:
        return None
    order = ">" if big else "<"
    group, element, vr, short = struct.unpack_from(order + "HH2sH", head)
    known = PIXELS.get(group << 16 | element)
    if known is None:
        return None
    if implicit:
        length, start = struct.unpack_from("<I", head, 4)[0], start + 8
    elif vr in LONG_VRS:
        length, start = struct.unpack_from(order + "I", head, 8)[0], start + 12
    else:
        length, start = short, start + 8
    return PixelData(known[0], start, None if length == UNDEFINED else length)
