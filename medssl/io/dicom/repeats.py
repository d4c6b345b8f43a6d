"""SOP instances that are there more than once: equal copies, or two contents under one name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medssl.errors import MedSSLError
from medssl.io.dicom.model import Header, Pixels
from medssl.io.dicom.pixels import read_frames

SamePixels = Callable[[Header, Header], bool]

_CHUNK = 1 << 16


def distinct(
    headers: Sequence[Header], *, same: SamePixels
) -> tuple[list[Header], list[tuple[Path, Path]], tuple[Path, Path] | None]:
    """Each SOP instance once.

    Args:
        headers: Of images.
        same: Whether two files hold equal pixels; asked only where their headers agree.

    Returns:
        Headers without the copies; each copy with its original; and two files that claim one instance and differ, or
        None.
    """
    first: dict[str, Header] = {}
    kept: list[Header] = []
    copies: list[tuple[Path, Path]] = []
    for header in headers:
        instance = header.frames[0].instance
        original = first.setdefault(instance, header) if instance else header
        if original is header:
            kept.append(header)
        elif _content(original) == _content(header) and same(original, header):
            copies.append((header.path, original.path))
        else:
            return kept, copies, (original.path, header.path)
    return kept, copies, None


def equal_pixels(first: Header, second: Header) -> bool:
    """Whether two files hold equal pixels; stored in one way they are compared byte by byte, else after decoding."""
    one, other = first.pixels, second.pixels
    if one is None or other is None:
        return False
    try:
        if one.length is not None and replace(one, offset=0) == replace(other, offset=0):
            return _equal_bytes(first.path, one, second.path, other)
        pairs = zip(read_frames(first.path, one), read_frames(second.path, other), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)
    except (MedSSLError, OSError, ValueError):
        return False


def _equal_bytes(first: Path, one: Pixels, second: Path, other: Pixels) -> bool:
    with first.open("rb") as a, second.open("rb") as b:
        a.seek(one.offset)
        b.seek(other.offset)
        rest = one.length or 0
        while rest > 0:
            piece = a.read(min(_CHUNK, rest))
            if not piece or piece != b.read(len(piece)):
                return False
            rest -= len(piece)
    return True


def _content(header: Header) -> tuple[object, ...]:
    """What two copies of an instance must agree in; the coding of the pixels may differ."""
    pixels = header.pixels
    stored = pixels and (pixels.rows, pixels.columns, pixels.frames, pixels.samples, pixels.bits_stored)
    return header.modality, stored, tuple(replace(frame, path=Path()) for frame in header.frames)
