"""Bytes that can be trusted: regular files only, magic before suffix, every checksum looked at, no bombs."""

from __future__ import annotations

import stat
import zlib
from pathlib import Path
from typing import Literal

from medssl.errors import ReadError

GZIP_MAGIC = b"\x1f\x8b"
GZIP = 31
ZLIB_OR_GZIP = 47

_NIFTI_STARTS = {n.to_bytes(4, "little") for n in (348, 540)} | {n.to_bytes(4, "big") for n in (348, 540)}
_SLACK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1032  # no deflate stream grows by more than this factor
_PEEK_BYTES = 1 << 16


def read_bytes(path: Path, *, missing: str = "E_MISSING") -> bytes:
    """Content of a regular file; never blocks on a pipe or a device.

    Raises:
        ReadError: E_MISSING (or ``missing``), E_NOT_REGULAR, E_PERMISSION, E_EMPTY or E_READ.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ReadError(f"{path}: is no regular file; give the name of an image file.", code="E_NOT_REGULAR")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ReadError(f"{path}: there is no such file. Check the path.", code=missing) from error
    except PermissionError as error:
        raise ReadError(f"{path}: no permission to read it. Ask its owner.", code="E_PERMISSION") from error
    except ReadError:
        raise
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror}). Check the disk.") from error
    if not data:
        raise ReadError(f"{path}: is empty. Copy the file again from its source.", code="E_EMPTY")
    return data


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


def peek(data: bytes, *, path: Path) -> bytes:
    """First bytes of a gzip stream, without trust in the rest.

    Raises:
        ReadError: E_CRC or E_TRUNCATED if not even those inflate.
    """
    engine = zlib.decompressobj(GZIP)
    try:
        head = engine.decompress(data[:_PEEK_BYTES], _PEEK_BYTES)
    except zlib.error as error:
        raise ReadError(f"{path}: gzip data do not inflate ({error}). Copy the file again.", code="E_CRC") from error
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


def inflate(data: bytes, *, path: Path, needed: int, wbits: int) -> tuple[bytes, tuple[str, ...]]:
    """Inflate to the end of the stream, checksum and length looked at.

    Args:
        data: A zlib or gzip stream, perhaps with bytes behind it.
        path: For messages.
        needed: Bytes that the header declares; more than that and a little is refused as a bomb.
        wbits: ``GZIP`` or ``ZLIB_OR_GZIP``.

    Returns:
        The inflated bytes, and a warning where zeros follow the stream.

    Raises:
        ReadError: E_CRC, E_TRUNCATED, E_SIZE_LIE or E_TRAILING.
    """
    engine = zlib.decompressobj(wbits)
    limit = needed + _SLACK_BYTES
    try:
        result = engine.decompress(data, limit)
    except zlib.error as error:
        raise ReadError(
            f"{path}: compressed data are damaged ({error}). Copy the file again from its source.", code="E_CRC"
        ) from error
    if not engine.eof and len(result) >= limit:
        raise ReadError(
            f"{path}: inflates to more than the {needed} bytes that its header declares. Do not trust the file.",
            code="E_SIZE_LIE",
        )
    if not engine.eof:
        raise ReadError(
            f"{path}: compressed data end early, after {len(result)} of {needed} bytes or before the checksum. "
            "Copy the file again from its source.",
            code="E_TRUNCATED",
        )
    return result, trailing(engine.unused_data, path=path)


def exactly(data: bytes, needed: int, *, path: Path) -> tuple[str, ...]:
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
    return trailing(data[needed:], path=path)


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


Kind = Literal["nifti", "metaimage", "nrrd", "raster"]


def detect(data: bytes, *, path: Path) -> Kind:
    """Family of formats by the first bytes; the suffix has no say.

    Raises:
        ReadError: E_DICOM for DICOM, E_FORMAT for what medssl does not read.
    """
    is_gzip = data[:2] == GZIP_MAGIC
    head = peek(data, path=path)[:512] if is_gzip else data[:512]
    if head[128:132] == b"DICM":
        raise ReadError(f"{path}: is a DICOM file, which is not read yet. Convert the series to NIfTI.", code="E_DICOM")
    if head[:4] in _NIFTI_STARTS:
        return "nifti"
    if is_gzip:
        raise ReadError(f"{path}: holds compressed data that are no NIfTI. Unpack the file first.", code="E_FORMAT")
    if head.startswith(b"NRRD"):
        return "nrrd"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")):
        return "raster"
    keys = {line.split(b"=")[0].strip() for line in head.splitlines()}
    if keys & {b"ObjectType", b"NDims"}:
        return "metaimage"
    raise ReadError(
        f"{path}: begins as no format that medssl reads (NIfTI, MetaImage, NRRD, PNG, JPEG, TIFF, BMP). Convert it.",
        code="E_FORMAT",
    )
