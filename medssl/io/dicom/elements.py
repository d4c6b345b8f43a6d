"""The elements of a DICOM file that matter, read from its first bytes; its pixels stay where they are."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO, cast

from isal import isal_zlib
from isal.igzip_lib import IsalError

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.foreign import read_foreign
from medssl.io.dicom.tags import BIG_ENDIAN, DEFLATED, EXPLICIT, IMAGE, IMPLICIT, META, NO_META, Table
from medssl.io.dicom.walker import LONG_VRS, PIXELS, SHORT_VRS, MoreNeededError, StrangeError, Walker, as_read
from medssl.io.disk import disk_faults

_HEAD_BYTES = 1 << 14
_GROWTH = 16
_INFLATE_FLOOR = 64 << 20
_INFLATE_RATIO = 200
_INFLATE_ERROR = cast("type[Exception]", IsalError)  # its stub makes an instance of the class
_PROGRAMS = (b"MZ", b"\x7fELF")
_IMAGE, _META = as_read(IMAGE), as_read(META)
_TOP = as_read(IMAGE | PIXELS)
_VRS = SHORT_VRS | LONG_VRS
_PROGRAM = "W_PREAMBLE: the file begins like a program; only its image is used. Do not run it."


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes (160 are enough) is DICOM, with preamble or without."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16:
        return False
    return _begins(head, "<") or _begins(head, ">")


def read_elements(path: Path, *, head_only: bool = True, also: Table | None = None) -> Elements:
    """Elements of a file, without its pixels.

    Args:
        path: Regular file.
        head_only: Read no further than to where the pixels begin; else the whole file at once.
        also: Elements to keep beside those of :data:`medssl.io.dicom.tags.IMAGE`.

    Raises:
        ReadError: E_MISSING, E_NOT_REGULAR, E_PERMISSION, E_EMPTY, E_READ, E_FORMAT (no DICOM), E_HEADER or E_BOMB.
    """
    wanted = IMAGE if also is None else IMAGE | also
    with disk_faults(path), _open(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ReadError(f"{path}: is no regular file; give the name of an image file.", code="E_NOT_REGULAR")
        size = status.st_size
        data = file.read(_HEAD_BYTES if head_only else size)
        while True:
            try:
                return _walk(data, path, size=size, wanted=wanted)
            except MoreNeededError:
                more = file.read(len(data) * _GROWTH)
                size = size if more else len(data)
                data += more
            except StrangeError:
                return read_foreign(data + file.read(), path=path, wanted=wanted)


def parse(data: bytes, path: Path, *, also: Table | None = None) -> Elements:
    """Elements of the bytes of a whole file; as :func:`read_elements`.

    Raises:
        ReadError: E_EMPTY, E_FORMAT, E_HEADER or E_BOMB.
    """
    wanted = IMAGE if also is None else IMAGE | also
    try:
        return _walk(data, path, size=len(data), wanted=wanted)
    except StrangeError:
        return read_foreign(data, path=path, wanted=wanted)


def content(data: bytes, path: Path) -> bytes:
    """Bytes of a whole file that the offset of its pixels counts in: inflated where the file is deflated.

    Raises:
        ReadError: as :func:`parse`.
    """
    walker = Walker(data, size=len(data), path=path, nested=_META)
    start, meta = walker.meta(_start(data, path), _META)
    return _inflate(data, start, path) if meta.get("TransferSyntaxUID") == DEFLATED else data


def _open(path: Path) -> BinaryIO:
    """Open without waiting for the other end of a pipe."""
    return open(path, "rb", buffering=0, opener=_without_waiting)


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def _start(data: bytes, path: Path) -> int:
    if not data:
        raise ReadError(f"{path}: is empty. Copy the file again from its source.", code="E_EMPTY")
    if not is_dicom(data[:160]):
        raise ReadError(f"{path}: is no DICOM file. Give DICOM files, or another format by itself.", code="E_FORMAT")
    return 132 if data[128:132] == b"DICM" else 0


def _walk(data: bytes, path: Path, *, size: int, wanted: Table) -> Elements:
    start = _start(data, path)
    nested = _IMAGE if wanted is IMAGE else as_read(wanted)
    walker = Walker(data, size=size, path=path, nested=nested)
    pos, values = walker.meta(start, _META)
    named = values.pop("TransferSyntaxUID", "")
    syntax = named if isinstance(named, str) else ""
    warnings: tuple[str, ...] = ()
    if start and data.startswith(_PROGRAMS):
        warnings += (_PROGRAM,)
    if syntax == DEFLATED:
        if len(data) < size:
            raise MoreNeededError
        data = _inflate(data, pos, path)
        walker = Walker(data, size=len(data), path=path, nested=nested)
    if not start and not _begins(data, "<"):
        raise StrangeError
    is_implicit = data[pos + 4 : pos + 6] not in _VRS
    if not start or not syntax:
        warnings += (NO_META,)
        syntax = syntax or (IMPLICIT if is_implicit else EXPLICIT)
    if syntax == BIG_ENDIAN or (is_implicit != (syntax == IMPLICIT) and pos < walker.size):
        raise StrangeError
    top = _TOP if wanted is IMAGE else as_read(wanted | PIXELS)
    walk = walker.implicit if is_implicit else walker.explicit
    walk(pos, walker.size, values, wanted=top)
    found = Elements(path, values, transfer_syntax=syntax, pixels=walker.pixels, size=walker.size, warnings=warnings)
    found.file_size = size
    return found


def _inflate(data: bytes, start: int, path: Path) -> bytes:
    """The file with everything behind ``start`` inflated, within bounds."""
    limit = max(_INFLATE_FLOOR, _INFLATE_RATIO * len(data))
    engine = isal_zlib.decompressobj(-15)
    try:
        body = engine.decompress(data[start:], limit)
    except _INFLATE_ERROR as error:
        raise ReadError(
            f"{path}: the deflated part does not inflate ({error}). Copy the file again from its source.",
            code="E_HEADER",
        ) from None
    if len(body) >= limit:
        raise ReadError(
            f"{path}: inflates to more than {limit} bytes, from {len(data)}. Do not trust the file.", code="E_BOMB"
        )
    if not engine.eof:
        raise ReadError(
            f"{path}: the deflated part ends early, after {len(body)} bytes. Copy the file again from its source.",
            code="E_HEADER",
        )
    return data[:start] + body


def _begins(head: bytes, order: str) -> bool:
    """Whether bytes begin as a data set: an early element of a sane length, and a later one behind it."""
    group, element, vr, short = struct.unpack_from(order + "HH2sH", head)
    if group not in {0x0002, 0x0008} or element > 0x0018:
        return False
    if vr in SHORT_VRS:
        length = 8 + short
    elif vr in LONG_VRS:
        length = 12 + int(struct.unpack_from(order + "I", head, 8)[0])
    elif order == "<":
        length = 8 + int(struct.unpack_from("<I", head, 4)[0])
    else:
        return False
    if length % 2 or length > 1024:
        return False
    if length + 4 > len(head):
        return vr in SHORT_VRS
    follower = struct.unpack_from(order + "HH", head, length)
    return (group, element) < follower and follower[0] in {0x0002, 0x0008, 0x0010}
