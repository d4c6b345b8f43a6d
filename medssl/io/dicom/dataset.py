"""The elements of one DICOM data set, by keyword, and how bytes become values."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from medssl.errors import ReadError

Value = Union[str, int, float, "tuple[int, ...]", "tuple[float, ...]", bytes, "list[Elements]"]

TEXT = frozenset({"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"})
NUMBERS = {
    "US": ("H", 2),
    "SS": ("h", 2),
    "UL": ("I", 4),
    "SL": ("i", 4),
    "FL": ("f", 4),
    "FD": ("d", 8),
    "UV": ("Q", 8),
    "SV": ("q", 8),
}
_LONGEST_DS = 16
_EMPTY: tuple[object, ...] = ("", b"", (), [])


@dataclass(frozen=True)
class PixelData:
    """Where the pixels of a file lie.

    Args:
        keyword: ``PixelData``, ``FloatPixelData`` or ``DoubleFloatPixelData``.
        offset: Of the first byte of the value in the file (inflated behind the meta group, where it is deflated).
        length: Bytes of the value as the file says, or None where it is encapsulated.
    """

    keyword: str
    offset: int
    length: int | None


class Elements:
    """Values of one data set, or of one item of a sequence, by keyword of the standard.

    Text has no padding; DS and IS stay text until they are asked for as numbers. Binary values are little endian.

    Args:
        path: File, for messages.
        values: By keyword.
        transfer_syntax: UID; ``""`` in items.
        pixels: Where the pixels lie; None in items and in files without.
        size: Bytes of the file (inflated, where it is deflated); 0 in items.
        file_size: Bytes of the file as it is.
        warnings: ``W_CODE: sentence`` strings.
    """

    __slots__ = ("file_size", "path", "pixels", "size", "transfer_syntax", "values", "warnings")

    def __init__(
        self,
        path: Path,
        values: dict[str, Value],
        *,
        transfer_syntax: str = "",
        pixels: PixelData | None = None,
        size: int = 0,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.values = values
        self.transfer_syntax = transfer_syntax
        self.pixels = pixels
        self.size = size
        self.file_size = size
        self.warnings = warnings

    def __contains__(self, keyword: str) -> bool:
        """Whether there is a value that is not empty."""
        return keyword in self.values and self.values[keyword] not in _EMPTY

    def text(self, keyword: str) -> str:
        """Text without padding, several values joined by backslashes; ``""`` where absent."""
        value = self.values.get(keyword, "")
        if not isinstance(value, str):
            return ""
        return "\\".join(map(str.strip, value.split("\\"))) if " " in value and "\\" in value else value

    def raw(self, keyword: str) -> bytes:
        """Bytes as stored; ``b""`` where absent."""
        value = self.values.get(keyword, b"")
        return value if isinstance(value, bytes) else b""

    def sequence(self, keyword: str) -> list[Elements]:
        """Items of a sequence; none where absent."""
        value = self.values.get(keyword)
        return value if isinstance(value, list) else []

    def first(self, keyword: str) -> Elements | None:
        """First item of a sequence, or None."""
        items = self.sequence(keyword)
        return items[0] if items else None

    def numbers(self, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
        """Finite numbers of an element; None where it is absent or empty.

        Args:
            keyword: Of the element.
            count: How many there must be; any number if None.

        Raises:
            ReadError: E_TAG.
        """
        value = self.values.get(keyword, "")
        if isinstance(value, str):
            if not value:
                return None
            try:
                result = tuple(map(float, value.split("\\")))
            except ValueError:
                raise self._wrong(keyword) from None  # the cause quotes the value
            if "_" in value:
                raise self._wrong(keyword)
        elif isinstance(value, tuple):
            if not value:
                return None
            result = value
        elif isinstance(value, int | float):
            result = (value,)
        else:
            raise self._wrong(keyword)
        if (count is not None and len(result) != count) or not all(map(math.isfinite, result)):
            raise self._wrong(keyword)
        return result

    def number(self, keyword: str) -> float | None:
        """One finite number; None where absent or empty.

        Raises:
            ReadError: E_TAG.
        """
        found = self.numbers(keyword, 1)
        return None if found is None else found[0]

    def integer(self, keyword: str) -> int | None:
        """One whole number; None where absent or empty.

        Raises:
            ReadError: E_TAG.
        """
        value = self.values.get(keyword)
        if isinstance(value, int):
            return value
        found = self.numbers(keyword, 1)
        if found is None:
            return None
        if not float(found[0]).is_integer():
            raise self._wrong(keyword)
        return int(found[0])

    def is_long(self, keyword: str) -> bool:
        """Whether a decimal string is longer than the 16 characters that the standard allows."""
        value = self.text(keyword)
        return len(value) > _LONGEST_DS and any(len(part) > _LONGEST_DS for part in value.split("\\"))

    def _wrong(self, keyword: str) -> ReadError:
        return ReadError(
            f"{self.path}: {keyword} holds something else than the numbers that must stand there. "
            "Correct it at the source.",
            code="E_TAG",
        )


def convert(raw: bytes, vr: str, *, order: str = "<") -> Value:
    """Value of an element.

    Args:
        raw: Stored bytes.
        vr: Value representation.
        order: ``<`` or ``>``.

    Raises:
        struct.error: if the length does not fit.
    """
    if vr in TEXT:
        return raw.decode("latin-1").strip(" \0")
    if vr == "US" and len(raw) == 2:
        return int.from_bytes(raw, "little" if order == "<" else "big")
    if vr in NUMBERS:
        letter, width = NUMBERS[vr]
        if len(raw) == width:
            number: int | float = struct.unpack(order + letter, raw)[0]
            return number
        return struct.unpack(f"{order}{len(raw) // width}{letter}", raw)
    if vr == "AT":
        halves = struct.unpack(f"{order}{len(raw) // 2}H", raw)
        return tuple(group << 16 | element for group, element in zip(halves[::2], halves[1::2], strict=True))
    return raw
