"""Bytes that can be trusted: regular files only, magic before suffix, every checksum looked at, no bombs."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError
from jaxtyping import UInt8

from medssl.errors import ReadError
from medssl.io.dicom.elements import is_dicom
from medssl.io.disk import disk_faults

Kind = Literal["nifti", "metaimage", "nrrd", "raster", "npy", "dicom", "series list"]

GZIP_MAGIC = b"\x1f\x8b"
SERIES_LIST_START = b'{"medssl_series_list":'
GZIP = 31
ZLIB_OR_GZIP = 47

_NIFTI_STARTS = {n.to_bytes(4, "little") for n in (348, 540)} | {n.to_bytes(4, "big") for n in (348, 540)}
_STARTS: dict[bytes, Kind] = {
    b"NRRD": "nrrd",
    b"\x93NUMPY": "npy",
    SERIES_LIST_START: "series list",
    b"\x89PNG": "raster",
    b"\xff\xd8\xff": "raster",
    b"II*\0": "raster",
    b"MM\0*": "raster",
    b"BM": "raster",
}
_SLACK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1032  # no deflate stream grows by more than this factor
_PEEK_BYTES = 1 << 16
_INFLATE_ERROR = cast("type[Exception]", IsalError)  # its stub makes an instance of the class
_FEED_BYTES = 1 << 16  # small enough that the voxels of one feed are still in the processor's cache when they are moved


def read_bytes(path: Path, *, missing: str = "E_MISSING", most: int = -1) -> bytes:
    """Content of a regular file, or its first ``most`` bytes; never blocks on a pipe or a device.

    Raises:
        ReadError: E_MISSING (or ``missing``), E_NOT_REGULAR, E_PERMISSION, E_EMPTY or E_READ.
    """
    with _opened(path, missing=missing) as file:
        data = file.read(most)
    if not data:
        raise ReadError(f"{path}: is empty. Copy the file again from its source.", code="E_EMPTY")
    return data


def read_into(buffer: bytearray, path: Path) -> int:
    """Fill a buffer from the start of a regular file; the number of bytes read.

    Raises:
        ReadError: as :func:`read_bytes`, but for E_EMPTY.
    """
    with _opened(path, missing="E_MISSING") as file:
        return file.readinto(buffer)


@contextmanager
def _opened(path: Path, *, missing: str) -> Iterator[BufferedReader]:
    """A regular file, with the faults of the disk told apart."""
    with disk_faults(path, missing=missing):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ReadError(f"{path}: is no regular file; give the name of an image file.", code="E_NOT_REGULAR")
        with path.open("rb") as file:
            yield file


def companion(header: Path, name: str) -> Path:
    """The data file that a header names: a plain file name in the header's own folder, after following links.

    Raises:
        ReadError: E_PATH for anything that leads elsewhere, or for lists and patterns of files.
    """
    folder = header.parent.resolve()
    plain = bool(name) and not any(mark in name for mark in ("/", "\\", "%", "\0", "..")) and name.upper() != "LIST"
    if not plain or (folder / name).resolve().parent != folder:
        raise ReadError(
            f"{header}: names its voxels outside its own folder or as a list; "
            "one plain file name is needed. Put both files into one folder.",
            code="E_PATH",
        )
    return header.parent / name


def peek(data: bytes, *, path: Path, count: int = _PEEK_BYTES) -> bytes:
    """First ``count`` bytes of a gzip stream, or all that there are, without trust in the rest.

    Raises:
        ReadError: E_CRC or E_TRUNCATED if not even those inflate.
    """
    engine = isal_zlib.decompressobj(GZIP)
    head = b"".join(_inflated(engine, memoryview(data), limit=count, path=path))
    if not head and not engine.eof:
        raise ReadError(f"{path}: gzip data end at once. Copy the file again from its source.", code="E_TRUNCATED")
    return head


def check_size(needed: int, found: int, *, path: Path) -> None:
    """Refuse a header that promises more than the file could hold, before any memory is taken.

    Raises:
        ReadError: E_SIZE_LIE.
    """
    if needed > _DEFLATE_LIMIT * found + _SLACK_BYTES:
        raise ReadError(
            f"{path}: the header promises {needed} bytes, the file has {found}. "
            "The header is damaged; take the source.",
            code="E_SIZE_LIE",
        )


def inflate(
    data: bytes | memoryview, *, path: Path, needed: int, wbits: int, keep: slice | None = None
) -> tuple[UInt8[np.ndarray, " n"], tuple[str, ...]]:
    """Inflate to the end of the stream, checksum and length looked at, and keep a part.

    Args:
        data: A zlib or gzip stream, perhaps with bytes behind it.
        path: For messages.
        needed: Bytes that the header declares; more than that and a little is refused as a bomb.
        wbits: ``GZIP`` or ``ZLIB_OR_GZIP``.
        keep: First byte and the one behind the last byte to hand out; by default all that are needed.

    Returns:
        The bytes kept, in an array that may be written to, and a warning where zeros follow.

    Raises:
        ReadError: E_CRC, E_TRUNCATED, E_SIZE_LIE or E_TRAILING.
    """
    begin, end, _ = (keep or slice(0, needed)).indices(needed)
    kept = np.empty(end - begin, dtype=np.uint8)
    into = kept.data
    engine = isal_zlib.decompressobj(wbits)
    limit = needed + _SLACK_BYTES
    done, fed, extra = 0, 0, b""
    for block in _inflated(engine, memoryview(data), limit=limit, path=path):
        fed += _FEED_BYTES
        first, last = max(begin, done), min(end, done + len(block))
        if first < last:
            into[first - begin : last - begin] = memoryview(block)[first - done : last - done]
        extra += block[max(0, needed - done) :]
        done += len(block)
    if not engine.eof and done >= limit:
        raise ReadError(
            f"{path}: inflates to more than the {needed} bytes that its header declares. Do not trust the file.",
            code="E_SIZE_LIE",
        )
    if not engine.eof or done < needed:
        raise ReadError(
            f"{path}: compressed data end early, after {done} of {needed} bytes or before the checksum. "
            "Copy the file again from its source.",
            code="E_TRUNCATED",
        )
    behind = engine.unused_data + bytes(data[fed:])
    return kept, trailing(extra, path=path) + trailing(behind, path=path)


def _inflated(engine: Any, data: memoryview, *, limit: int, path: Path) -> Iterator[bytes]:
    """One block of inflated bytes for each feed, up to ``limit`` bytes in all.

    Fed bit by bit, so that neither the stream nor what comes of it is ever copied as a whole.
    """
    for position in range(0, len(data), _FEED_BYTES):
        try:
            block = engine.decompress(data[position : position + _FEED_BYTES], limit)
        except _INFLATE_ERROR as error:
            raise ReadError(
                f"{path}: compressed data are damaged ({error}). Copy the file again from its source.", code="E_CRC"
            ) from error
        limit -= len(block)
        yield block
        if engine.eof or limit <= 0:
            return


def exactly(data: bytes | memoryview, needed: int, *, path: Path) -> tuple[str, ...]:
    """Check that ``data`` has ``needed`` bytes; zeros behind them are let through with a warning.

    Raises:
        ReadError: E_TRUNCATED or E_TRAILING.
    """
    if len(data) < needed:
        raise ReadError(
            f"{path}: has {len(data)} of the {needed} bytes that its header declares. "
            "Copy the file again from its source.",
            code="E_TRUNCATED",
        )
    return trailing(bytes(memoryview(data)[needed:]), path=path)


def trailing(extra: bytes, *, path: Path) -> tuple[str, ...]:
    """Warning for zeros behind the end of the data; nothing for nothing.

    Raises:
        ReadError: E_TRAILING for anything else.
    """
    if not extra:
        return ()
    if extra.strip(b"\0"):
        raise ReadError(
            f"{path}: {len(extra)} unknown bytes follow the image. The file was altered; take the source.",
            code="E_TRAILING",
        )
    return (f"W_TRAILING: {len(extra)} zero bytes after the image were ignored.",)


def detect(data: bytes, *, path: Path) -> Kind:
    """Family of formats by the first bytes; the suffix has no say.

    Raises:
        ReadError: E_FORMAT for what medssl does not read.
    """
    if is_dicom(data[:512]):
        return "dicom"
    is_gzip = data[:2] == GZIP_MAGIC
    head = peek(data, path=path)[:512] if is_gzip else data[:512]
    if head[:4] in _NIFTI_STARTS:
        return "nifti"
    if is_gzip:
        raise ReadError(f"{path}: holds compressed data that are no NIfTI. Unpack the file first.", code="E_FORMAT")
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    keys = {line.split(b"=")[0].strip() for line in head.splitlines()}
    if keys & {b"ObjectType", b"NDims"}:
        return "metaimage"
    raise ReadError(
        f"{path}: begins as no format that medssl reads "
        "(DICOM, NIfTI, MetaImage, NRRD, PNG, JPEG, TIFF, BMP, npy). Convert it.",
        code="E_FORMAT",
    )
