"""Mutations of files: bits, lengths, numbers in binary and in text, and single elements of DICOM."""

from __future__ import annotations

import functools
import gzip
import io
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence

import pydicom
from fuzz_corpus import Seed

_BOUNDARIES = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_FLOATS = (0.0, -1.0, 1e-30, 1e30, 3.5e38, float("nan"), float("inf"), -float("inf"))
_TEXTS = (b"0", b"-1", b"1", b"65536", b"4294967296", b"99999999999999999999", b"1e308", b"nan", b"-inf", b"0,5", b"")
_VALUES = (b"\\", b"9", b"-", b" ", b"\0", b"\xff", b"1e", b"/../")
_VRS = (b"DS", b"IS", b"US", b"OB", b"OW", b"SQ", b"UN", b"UI", b"FD", b"AT", b"ZZ", b"\0\0")


def mutate(data: bytes, rng: random.Random, seeds: Sequence[Seed]) -> bytes:
    """A file with one mutation; parts of ``seeds`` may be spliced in. Compressed data are mutated inside, mostly."""
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.7:
        try:
            return gzip.compress(mutate(gzip.decompress(data), rng, seeds), 1, mtime=0)
        except (OSError, EOFError, zlib.error):
            pass  # an earlier mutation already broke the compression
    steps: list[Callable[..., bytes]] = [
        _flip,
        _flip,
        _truncate,
        _extend,
        _splice,
        _cut,
        _repeat,
        _number,
        _number,
        _text,
    ]
    if b"DICM" in data[:132] and rng.random() < 0.8:
        steps = [_tail, _tail, _digits, _digits, _value, _value, _value, _value, _without, _twice, _tag, _lie, _vr]
    mutant = rng.choice(steps)(data, rng, seeds)
    return _png_checksums(mutant) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else mutant


def _place(data: bytes, rng: random.Random) -> int:
    """A position; half of the time in the header."""
    return rng.randrange(min(len(data), 512) if rng.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        mutant[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def _tail(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """Bits in the second half, where pixels are; compressed pictures have their own headers there."""
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        mutant[rng.randrange(len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def _truncate(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    return data[: _place(data, rng)]


def _extend(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    return data + rng.choice((b"\0", b"\0" * 100, rng.randbytes(1), rng.randbytes(500), data))


def _splice(data: bytes, rng: random.Random, seeds: Sequence[Seed]) -> bytes:
    other = rng.choice(list(rng.choice(seeds).files.values()))
    start, length = _place(other, rng), rng.choice((4, 32, 256, 4096))
    where = _place(data, rng)
    skip = length if rng.random() < 0.5 else 0
    return data[:where] + other[start : start + length] + data[where + skip :]


def _cut(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    where = _place(data, rng)
    return data[:where] + data[where + rng.choice((1, 2, 4, 16, 128)) :]


def _repeat(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    where, length = _place(data, rng), rng.choice((1, 8, 64, 512))
    return data[:where] + data[where : where + length] * rng.choice((2, 3, 50)) + data[where + length :]


def _number(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    order, size = rng.choice("<>"), rng.choice((1, 2, 2, 4, 4, 8))
    if size >= 4 and rng.random() < 0.3:
        value = rng.choice(_FLOATS)
        packed = struct.pack(f"{order}{'f' if size == 4 and abs(value) < 3.4e38 else 'd'}", value)
    else:
        packed = (rng.choice(_BOUNDARIES) & (256**size - 1)).to_bytes(size, "little" if order == "<" else "big")
    where = _place(data, rng)
    return data[:where] + packed + data[where + len(packed) :]


def _text(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """Another number, or none, in place of a run of digits in the first 4 KiB."""
    digits = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not digits:
        return _flip(data, rng, _seeds)
    start = end = rng.choice(digits)
    while end < len(data) and chr(data[end]) in "0123456789.":
        end += 1
    return data[:start] + rng.choice(_TEXTS) + data[end:]


def _digits(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """Other digits in place of a number in text, anywhere, that leave every length as it is."""
    runs = [match for match in re.finditer(rb"[0-9][0-9.]*", data) if match.end() - match.start() < 17]
    if not runs:
        return _flip(data, rng, _seeds)
    run = rng.choice(runs)
    width = run.end() - run.start()
    fresh = bytes(rng.choice(b"0123456789.-") for _ in range(width))
    fresh = rng.choice((fresh, b"0" * width, b"9" * width, b" " * width, run.group()[::-1], b"1" + run.group()[1:]))
    return data[: run.start()] + fresh + data[run.end() :]


def _value(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """Another value of one DICOM element: filler, a boundary, a text of another length, or that of another element."""
    places = _elements(data)
    if not places:
        return _flip(data, rng, _seeds)
    head, start, end = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        return data[:start] + (rng.choice(_VALUES) * (end - start))[: end - start] + data[end:]
    if what == 1:
        size = min(end - start, rng.choice((1, 2, 4, 8)))
        fresh = (rng.choice(_BOUNDARIES) & (256**size - 1)).to_bytes(size, "little")
        return data[:start] + fresh + data[start + size :]
    value = rng.choice(_TEXTS) + rng.choice((b"", b"\\", b"\\1\\0\\0"))
    if what == 3:
        other = rng.choice(places)
        value = data[other[1] : min(other[2], other[1] + 60_000)]
    value += b" " * (len(value) % 2)
    return _with_length(data, head, start, len(value)) + value + data[end:]


def _without(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    places = _elements(data)
    head, _, end = rng.choice(places) if places else (0, 0, 1)
    return data[:head] + data[end:]


def _twice(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    places = _elements(data)
    head, _, end = rng.choice(places) if places else (0, 0, 1)
    return data[:end] + data[head:end] * rng.choice((1, 2, 40)) + data[end:]


def _tag(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """One element under the tag of another."""
    places = _elements(data) or ((0, 0, 0),)
    head, other = rng.choice(places)[0], rng.choice(places)[0]
    return data[:head] + data[other : other + 4] + data[head + 4 :]


def _lie(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    """A length that is not that of the value."""
    places = _elements(data)
    if not places:
        return _number(data, rng, _seeds)
    head, start, end = rng.choice(places)
    return _with_length(data, head, start, rng.choice((*_BOUNDARIES, end - start + 2, end - start - 2))) + data[start:]


def _vr(data: bytes, rng: random.Random, _seeds: Sequence[Seed]) -> bytes:
    places = _elements(data) or ((0, 0, 0),)
    head = rng.choice(places)[0]
    return data[: head + 4] + rng.choice(_VRS) + data[head + 6 :]


def _with_length(data: bytes, head: int, start: int, length: int) -> bytes:
    """Everything before a value, with another length of it."""
    width = 2 if start - head == 8 and data[head + 4 : head + 6].isalpha() else 4
    return data[: start - width] + (length & (256**width - 1)).to_bytes(width, "little")


@functools.lru_cache(maxsize=512)
def _elements(data: bytes) -> tuple[tuple[int, int, int], ...]:
    """Start of the tag, start and end of the value of the elements of the main data set, as pydicom finds them."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            for tag in dataset.keys():  # noqa: SIM118  a data set is no dict: iterating it would convert every value
                raw = dataset.get_item(tag)
                start = getattr(raw, "value_tell", getattr(raw, "file_tell", None))
                length = getattr(raw, "length", None)
                if start and length is not None and 0 < length < len(data):
                    short = data[start - 4 : start - 2].isalpha()
                    head = start - (8 if short or not data[start - 8 : start - 6].isalpha() else 12)
                    found.append((head, start, start + length))
        except Exception:  # whatever pydicom cannot find in a broken file is not mutated by element
            return ()
    return tuple(found)


def _png_checksums(data: bytes) -> bytes:
    """The same chunks with sums that fit, so that the mutation gets past them."""
    parts, where = [data[:8]], 8
    while where + 12 <= len(data):
        length = int.from_bytes(data[where : where + 4], "big")
        body = data[where + 4 : where + 8 + length]
        parts += [data[where : where + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        where += 12 + length
    return b"".join(parts)
