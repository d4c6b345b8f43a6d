"""The folder that a command writes: whole files or none, one writer at a time, a recipe and a journal inside."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from medssl.config import dump_yaml
from medssl.errors import EnvironmentFaultError, LockedError

_LOCK = ".lock"
_TEMPORARY = ".tmp-"
_FORMER = ".former-"


@contextmanager
def environment_faults(path: Path, doing: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into one sentence and exit code 5."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise EnvironmentFaultError(
                f"{path}: no space left while {doing}. Free space there and run the same command again.",
                code="E_DISK_FULL",
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise EnvironmentFaultError(
                f"{path}: no permission while {doing}. Choose a folder that you may write.", code="E_PERMISSION"
            ) from error
        raise


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file or none: temporary name beside it, fsync, rename, fsync of the folder.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written; the old file stays.
    """
    payload = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload)


@contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that becomes ``path`` when the block ends well.

    The temporary name keeps the suffixes of ``path``, since writers choose a format by them. It may become a
    file or a folder. With ``replace=False`` an existing target wins: the temporary is dropped.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written; nothing is left behind.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    with environment_faults(path, "writing"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            if temporary.is_dir():
                _place_folder(temporary, path, replace=replace)
            elif replace or not path.exists():
                temporary.replace(path)
            sync(path.parent, deep=False)
        finally:
            remove(temporary)


def sync(path: Path, *, deep: bool = True) -> None:
    """Flush a file, or a folder with (``deep``) what is in it, to the disk."""
    if deep and path.is_dir():
        for child in path.iterdir():
            sync(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> int:
    """Delete temporary files of dead processes in ``folder``; return how many.

    A folder whose replacement was cut short between two renames is put back first.
    """
    removed = 0
    for former in folder.glob(f"{_FORMER}*"):
        target = former.with_name(former.name.removeprefix(_FORMER))
        if target.exists():
            remove(former)
        else:
            former.rename(target)
    for path in folder.glob(f"{_TEMPORARY}*"):
        owner = path.name.removeprefix(_TEMPORARY).partition("-")[0]
        if not owner.isdigit() or not _alive(int(owner)):
            remove(path)
            removed += 1
    return removed


class RunFolder:
    """Output folder of one run, held by one process.

    Use as a context manager: entering makes and locks the folder, leaving unlocks it.

    Raises:
        LockedError: if a live process holds the folder; names host, process and start.
        EnvironmentFaultError: if the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / "journal.jsonl")

    def __enter__(self) -> Self:
        with environment_faults(self.path, "making the folder"):
            if self.path.exists() and not self.path.is_dir():
                raise EnvironmentFaultError(
                    f"{self.path}: is a file; a folder is needed. Choose another output name.", code="E_NOT_A_FOLDER"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            remove_stale(self.path)
            self._lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        (self.path / _LOCK).unlink(missing_ok=True)

    def write_recipe(self, recipe: Mapping[str, Any], *, name: str = "recipe.yaml") -> Path:
        """Write the resolved recipe before the work begins."""
        path = self.path / name
        atomic_write(path, dump_yaml(recipe))
        return path

    def _lock(self) -> None:
        lock = self.path / _LOCK
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "start": time.time()})
        for _ in range(2):
            try:
                handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                holder = _holder(lock)
                if holder is not None:
                    raise LockedError(
                        f"{self.path}: held by process {holder['pid']} on {holder['host']}. "
                        "Wait for it, stop it, or choose another folder."
                    ) from None
                lock.unlink(missing_ok=True)
                continue
            with os.fdopen(handle, "w") as file:
                file.write(mine)
            return
        raise LockedError(f"{self.path}: another run took the folder at this moment. Choose another folder.")


class Journal:
    """JSON-lines record of a run: one object a line with ``step`` and named scalars; append only.

    Args:
        path: The ``journal.jsonl`` to append to; made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def log(self, step: int | None = None, **values: object) -> None:
        """Append one line; numbers that are not finite are written as text, so that the file stays JSON."""
        line = {key: _plain(value) for key, value in values.items()}
        if step is not None:
            line = {"step": step, **line}
        if self._file is None:
            with environment_faults(self._path, "opening the journal"):
                _end_last_line(self._path)
                self._file = self._path.open("a", encoding="utf-8")
        with environment_faults(self._path, "writing the journal"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal; a last line cut by a kill is left out, and of a step written twice the later stays."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _end_last_line(path: Path) -> None:
    """A kill can cut the last line; end it, so that the next one is whole."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return value.name
    return value


def _place_folder(temporary: Path, path: Path, *, replace: bool) -> None:
    """Move a folder into place; where another writer was first, keep one of the two."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        if replace:
            old = path.with_name(f"{_FORMER}{path.name}")
            remove(old)
            path.rename(old)
            temporary.rename(path)
            remove(old)


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who holds the lock, or None when that process is gone."""
    try:
        holder: dict[str, Any] = json.loads(lock.read_text())
        pid = int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if holder.get("host") != socket.gethostname():
        return holder
    if holder.get("boot") != _boot() or not _alive(pid):
        return None
    return holder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
