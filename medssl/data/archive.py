"""Zipped and tarred exports, unpacked under names of our own after a look at every member."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from medssl.errors import ReadError
from medssl.io import integrity
from medssl.io.source import suffix
from medssl.runfolder import atomic_write, environment_faults, make_folder, remove

_ZIP = (".zip",)
_TAR = (".tar", ".tar.gz", ".tgz")
_MOST_MEMBERS = 200_000
_MOST_BYTES = 200 << 30
_FREE_RATIO_BYTES = 1 << 30
_MOST_RATIO = 200
_MOST_HEADER_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 20
_DETACHED = {".mhd", ".nhdr"}
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
_SUFFIX = re.compile(r"^\.[A-Za-z0-9]{1,8}$")
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    EOFError,
    ValueError,
    LookupError,
    struct.error,
    RuntimeError,
)


def is_archive(path: Path) -> bool:
    """Whether the name ends as that of an archive that :func:`unpack` reads."""
    return path.name.lower().endswith(_ZIP + _TAR)


def unpack(path: Path, into: Path) -> list[tuple[Path, Path]]:
    """Unpack the regular files of an archive; one that was unpacked before and has not changed is not read again.

    No name of the archive becomes one of the disk: folders and files are numbered, the suffix is kept. The files of a
    folder with a detached header (``.mhd``, ``.nhdr``) keep their plain names, since the header names its voxels.

    Args:
        path: ``.zip``, ``.tar``, ``.tar.gz`` or ``.tgz``.
        into: Folder for a folder of the archive's own.

    Returns:
        Name in the archive, and where it lies now, of each file.

    Raises:
        ReadError: E_ARCHIVE for a damaged archive, or a member that is a link, a device or leads out; E_BOMB for one
            of more than 200,000 members, 200 GiB, or 200 times its own size; E_MISSING and the like where the archive
            cannot be opened.
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    integrity.read_into(bytearray(1), path)  # refuses what is missing, forbidden, or no regular file
    state = path.stat()
    name = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode("utf-8", "surrogateescape")
    target = into / hashlib.blake2b(name, digest_size=8).hexdigest()
    known = _unpacked_before(target)
    if known is not None:
        return known
    make_folder(into)
    temporary = into / f".unpacking-{target.name}"
    remove(temporary)
    remove(target)
    with environment_faults(into, "unpacking an archive"):
        temporary.mkdir(mode=0o700)
        try:
            with _damage(path):
                members = list(_extract(path, temporary, size=state.st_size))
            atomic_write(temporary / "members.json", json.dumps(members))
            temporary.rename(target)
        finally:
            remove(temporary)
    return [(Path(item), target / place) for item, place, _ in members]


@dataclass(frozen=True)
class _Member:
    name: PurePosixPath
    handle: Any


def _extract(path: Path, folder: Path, *, size: int) -> Iterator[tuple[str, str, int]]:
    """Write each file; give its name in the archive, its place in ``folder`` and its bytes."""
    limit = min(_MOST_BYTES, max(_FREE_RATIO_BYTES, _MOST_RATIO * size))
    total = 0
    with _opened(path) as archive:
        members = _checked(path, archive)
        places = _places(member.name for member in members)
        for member in members:
            place = folder / places[member.name]
            place.parent.mkdir(mode=0o700, exist_ok=True)
            written = 0
            with _stream(archive, member) as source, place.open("xb") as file:
                while block := source.read(_BLOCK_BYTES):
                    written += len(block)
                    if total + written > limit:
                        raise _bomb(path, f"unpacks to more than {limit} bytes from {size}")
                    file.write(block)
            total += written
            yield str(member.name), places[member.name], written
        if isinstance(archive, tarfile.TarFile):
            _check_end(path, archive, limit=limit)


def _check_end(path: Path, archive: tarfile.TarFile, *, limit: int) -> None:
    """Refuse a tar without its end mark, or whose compressed stream does not end well; tarfile looks at neither."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.TarError("no end mark")
    while file.read(_BLOCK_BYTES):
        if file.tell() > 2 * limit:
            raise _bomb(path, f"unpacks to more than {limit} bytes")


def _checked(path: Path, archive: zipfile.ZipFile | tarfile.TarFile) -> list[_Member]:
    """The regular files, once every member has been looked at."""
    members: list[_Member] = []
    seen: set[PurePosixPath] = set()
    declared = 0
    for count, (raw, is_folder, is_regular, size, handle) in enumerate(_listed(archive)):
        declared += size
        if count >= _MOST_MEMBERS:
            raise _bomb(path, f"has more than {_MOST_MEMBERS} members")
        if declared > _MOST_BYTES or declared > shutil.disk_usage(path.parent).total:
            raise _bomb(path, f"declares {declared} bytes")
        name = PurePosixPath(raw.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or re.match(r"^[A-Za-z]:", raw):
            raise _refusal(path, f"member {count} leads out of the archive")
        if is_folder:
            continue
        if not is_regular or not name.parts:
            raise _refusal(path, f"member {count} is a link, a device or nameless; only files and folders are taken")
        if name in seen:
            raise _refusal(path, f"member {count} has the name of another one")
        seen.add(name)
        members.append(_Member(name, handle))
    return members


def _listed(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[tuple[str, bool, bool, int, Any]]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)
            yield info.filename, info.is_dir(), mode in {0, stat.S_IFREG}, info.file_size, info
    else:
        for member in archive:
            yield member.name, member.isdir(), member.isreg(), member.size, member


def _places(names: Iterable[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Numbered folder and name of each file; the two halves of a pair (``.hdr``, ``.img``) share a number."""
    folders: dict[PurePosixPath, list[PurePosixPath]] = {}
    for name in names:
        folders.setdefault(name.parent, []).append(name)
    places: dict[PurePosixPath, str] = {}
    for number, files in enumerate(folders.values()):
        has_detached = any(name.suffix.lower() in _DETACHED for name in files)
        keeps_names = has_detached and all(_PLAIN_NAME.match(name.name) for name in files)
        stems: dict[str, int] = {}
        for name in files:
            kept = _kept_suffix(name)
            order = stems.setdefault(name.name.removesuffix(kept), len(stems))
            places[name] = f"{number:06d}/{name.name if keeps_names else f'{order:06d}{kept}'}"
    return places


def _kept_suffix(name: PurePosixPath) -> str:
    known = suffix(Path(name.name))
    if known is not None:
        return name.name[-len(known) :]
    return name.suffix if _SUFFIX.match(name.suffix) else ""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    if path.name.lower().endswith(_ZIP):
        with zipfile.ZipFile(path) as archive:
            yield archive
        return
    with path.open("rb") as file:
        is_gzip = file.read(2) == integrity.GZIP_MAGIC
        file.seek(0)
        plain: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        cautious: Any = _Cautious(plain)
        with tarfile.TarFile(fileobj=cautious) as archive:
            yield archive


def _stream(archive: zipfile.ZipFile | tarfile.TarFile, member: _Member) -> IO[bytes]:
    stream = archive.open(member.handle) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member.handle)
    if stream is None:
        raise tarfile.TarError("no content")
    return stream


class _Cautious:
    """A file that gives no more at once than a header may have, for tarfile believes the length that a header says."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.mode = "rb"
        self.name = ""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.TarError("header too long")
        data: bytes = self._file.read(size)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        place: int = self._file.seek(offset, whence)
        return place

    def tell(self) -> int:
        place: int = self._file.tell()
        return place


def _unpacked_before(folder: Path) -> list[tuple[Path, Path]] | None:
    """What an earlier call left, if every file is there with the size that it had."""
    try:
        members = json.loads((folder / "members.json").read_bytes())
        if all((folder / place).stat().st_size == size for _, place, size in members):
            return [(Path(item), folder / place) for item, place, _ in members]
    except (OSError, ValueError, TypeError):
        pass
    return None


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ReadError:
        raise
    except _DAMAGE as error:
        raise _refusal(path, f"is damaged or of a kind that is not read ({type(error).__name__})") from error


def _refusal(path: Path, fault: str) -> ReadError:
    return ReadError(
        f"{path}: {fault}. Unpack it by hand if you trust it, and give the folder, or pack it again.", code="E_ARCHIVE"
    )


def _bomb(path: Path, fault: str) -> ReadError:
    return ReadError(
        f"{path}: {fault}; this is more than an archive of scans can hold. Unpack it by hand if you trust it.",
        code="E_BOMB",
    )
