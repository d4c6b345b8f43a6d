"""A strict walker over DICOM elements in little endian, which converts the wanted ones and jumps over the others."""

from __future__ import annotations

import struct
from pathlib import Path

from medssl.errors import ReadError
from medssl.io.dicom.dataset import NUMBERS, TEXT, Elements, PixelData, Value, convert
from medssl.io.dicom.tags import Table

PIXELS: Table = {
    0x7FE00008: ("FloatPixelData", "pixels"),
    0x7FE00009: ("DoubleFloatPixelData", "pixels"),
    0x7FE00010: ("PixelData", "pixels"),
}
DEEPEST = 16
UNDEFINED = 0xFFFFFFFF
LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)

_RAW = frozenset({b"UN", b"OB"})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xE000FFFE, 0xE00DFFFE, 0xE0DDFFFE
_DELIMITERS = 0xFFFE
_MOST_ITEMS = 2_000_000
_explicit = struct.Struct("<I2sH").unpack_from
_implicit = struct.Struct("<II").unpack_from
_u32 = struct.Struct("<I").unpack_from


def as_read(table: Table) -> Table:
    """The table with its tags as they come out of a file in one piece: element number above group number."""
    return {(tag & 0xFFFF) << 16 | tag >> 16: entry for tag, entry in table.items()}


def too_deep(path: Path) -> ReadError:
    """Refusal of sequences that are nested more than :data:`DEEPEST` deep."""
    return ReadError(
        f"{path}: sequences are nested more than {DEEPEST} deep, as no true image does. Do not trust it.",
        code="E_HEADER",
    )


class MoreNeededError(Exception):
    """The walker came to the end of the bytes at hand, not of the file."""


class StrangeError(Exception):
    """The walker met a construct that it does not know."""


class Walker:
    """One pass over the first bytes of a file.

    Args:
        data: First bytes, or all.
        size: Of the whole file.
        path: For messages.
        nested: What to keep of the items of sequences; all tables are given :func:`as_read`.
    """

    __slots__ = ("data", "items", "nested", "path", "pixels", "size")

    def __init__(self, data: bytes, *, size: int, path: Path, nested: Table) -> None:
        self.nested = nested
        self.data = data
        self.size = size
        self.path = path
        self.pixels: PixelData | None = None
        self.items = 0

    def meta(self, pos: int, wanted: Table) -> tuple[int, dict[str, Value]]:
        """Text elements of group 0002 from ``pos`` on, whatever its length element says, and where the rest begins."""
        data = self.data
        values: dict[str, Value] = {}
        try:
            while data[pos : pos + 2] == b"\2\0":
                tag, vr, length = _explicit(data, pos)
                pos += 8
                if vr in LONG_VRS:
                    length = _u32(data, pos)[0]
                    pos += 4
                hit = wanted.get(tag)
                if hit is not None:
                    values[hit[0]] = data[pos : pos + length].decode("latin-1").strip(" \0")
                pos += length
        except struct.error:
            raise self._short(pos + 12) from None
        if pos > len(data):
            raise self._short(pos)
        return pos, values

    def explicit(self, pos: int, end: int | None, values: dict[str, Value], *, wanted: Table, depth: int = 0) -> int:
        """Walk one data set with explicit value representations into ``values``.

        Args:
            pos: Where it begins.
            end: Where it ends; None for an item that a delimiter ends.
            values: Is filled.
            wanted: What to keep; :data:`PIXELS` end the walk.
            depth: Of nesting.

        Returns:
            Where the next data set begins.

        Raises:
            MoreNeededError: if more of the file is needed.
            StrangeError: if pydicom should look at it.
            ReadError: E_HEADER.
        """
        data = self.data
        limit = self.size if end is None else end
        find = wanted.get
        try:
            while pos < limit:
                tag, vr, length = _explicit(data, pos)
                hit = find(tag)
                if vr in SHORT_VRS:
                    start = pos + 8
                    if hit is None:
                        pos = start + length
                        continue
                elif vr in LONG_VRS:
                    length = _u32(data, pos + 8)[0]
                    start = pos + 12
                    if hit is None:
                        pos = self._undefined(start, vr, depth) if length == UNDEFINED else start + length
                        continue
                elif tag == _ITEM_END and end is None:
                    return pos + 8
                else:
                    raise StrangeError
                keyword, kind = hit
                if kind == "pixels":
                    self._found(keyword, start, length)
                    return self.size
                known = kind if vr in _RAW else vr.decode("ascii")
                if (known == "SQ") != (kind == "SQ"):
                    raise StrangeError
                if known == "SQ":
                    values[keyword], pos = self._items(start, length, self.nested, implicit=vr == b"UN", depth=depth)
                    continue
                pos = start + length
                raw = data[start:pos]
                if len(raw) != length:
                    raise self._short(pos)
                values[keyword] = raw.decode("latin-1").strip(" \0") if known in TEXT else self._convert(raw, known)
        except struct.error:
            raise self._short(pos + 12) from None
        return self._ended(pos, end)

    def implicit(self, pos: int, end: int | None, values: dict[str, Value], *, wanted: Table, depth: int = 0) -> int:
        """Walk one data set without value representations; see :meth:`explicit`."""
        data = self.data
        limit = self.size if end is None else end
        find = wanted.get
        try:
            while pos < limit:
                tag, length = _implicit(data, pos)
                start = pos + 8
                if tag & 0xFFFF == _DELIMITERS:
                    if tag == _ITEM_END and end is None:
                        return start
                    raise StrangeError
                hit = find(tag)
                if hit is None:
                    pos = self._undefined(start, b"UN", depth) if length == UNDEFINED else start + length
                    continue
                keyword, kind = hit
                if kind == "pixels":
                    self._found(keyword, start, length)
                    return self.size
                if kind == "SQ":
                    values[keyword], pos = self._items(start, length, self.nested, implicit=True, depth=depth)
                    continue
                pos = start + length
                raw = data[start:pos]
                if len(raw) != length:
                    raise self._short(pos)
                values[keyword] = self._convert(raw, kind)
        except struct.error:
            raise self._short(pos + 8) from None
        return self._ended(pos, end)

    def _items(self, pos: int, length: int, wanted: Table, *, implicit: bool, depth: int) -> tuple[list[Elements], int]:
        if depth >= DEEPEST:
            raise too_deep(self.path)
        walk = self.implicit if implicit else self.explicit
        end = None if length == UNDEFINED else pos + length
        limit = self.size if end is None else end
        if limit > self.size:
            raise self._short(limit)
        found: list[Elements] = []
        while pos < limit:
            tag, size = _implicit(self.data, pos)
            pos += 8
            if tag == _SEQUENCE_END and end is None:
                return found, pos
            if tag != _ITEM or (size != UNDEFINED and pos + size > limit):
                raise StrangeError
            if not wanted and size != UNDEFINED:
                pos += size
                continue
            values: dict[str, Value] = {}
            pos = walk(pos, None if size == UNDEFINED else pos + size, values, wanted=wanted, depth=depth + 1)
            found.append(Elements(self.path, values))
            self.items += 1
            if self.items > _MOST_ITEMS:
                raise ReadError(
                    f"{self.path}: sequences have more than {_MOST_ITEMS} items, as no true image does. "
                    "Do not trust it.",
                    code="E_HEADER",
                )
        return found, self._ended(pos, end)

    def _undefined(self, pos: int, vr: bytes, depth: int) -> int:
        """Where an unwanted value of undefined length ends."""
        if vr in {b"SQ", b"UN"}:
            return self._items(pos, UNDEFINED, {}, implicit=vr == b"UN", depth=depth)[1]
        if vr not in {b"OB", b"OW"}:
            raise StrangeError
        while True:
            tag, length = _implicit(self.data, pos)
            pos += 8
            if tag == _SEQUENCE_END:
                return pos
            if tag != _ITEM or length == UNDEFINED:
                raise StrangeError
            pos += length

    def _found(self, keyword: str, start: int, length: int) -> None:
        self.pixels = PixelData(keyword, start, None if length == UNDEFINED else length)

    def _convert(self, raw: bytes, vr: str) -> Value:
        try:
            return convert(raw, vr)
        except (struct.error, ValueError):
            raise ReadError(
                f"{self.path}: an element of type {vr} has {len(raw)} bytes, no multiple of "
                f"{NUMBERS.get(vr, ('', 4))[1]}. The header is damaged; copy the file again.",
                code="E_HEADER",
            ) from None

    def _ended(self, pos: int, end: int | None) -> int:
        if end is None or pos != end:
            raise self._short(pos)
        return pos

    def _short(self, needed: int) -> Exception:
        """What to raise where a value reaches beyond its bounds."""
        if len(self.data) < self.size and needed <= self.size:
            return MoreNeededError()
        return ReadError(
            f"{self.path}: an element reaches beyond the end of the file or of its sequence, at {self.size} bytes. "
            "Copy the file again from its source.",
            code="E_HEADER",
        )
