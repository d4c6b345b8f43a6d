"""The folder that a command writes: whole files or none, one writer at a time, a recipe and a journal inside."""

from __future__ import annotations

import errno
import fcntl
import hashlib
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
_HELD: set[int] = set()
_TEMPORARY = ".tmp-"
_FORMER = ".former-"
_MOST_SUFFIX = 16
_FOREIGN_SECONDS = 86_400

_FULL = ("E_DISK_FULL", "no space left", "Free space there and run the same command again.")
_FORBIDDEN = ("E_PERMISSION", "no permission", "Choose a folder that you may write.")
_NOT_A_FOLDER = ("E_NOT_A_FOLDER", "a file lies where a folder is needed", "Choose another output name.")
_BROKEN = ("E_DISK", "the disk or its connection failed", "Mend it and run the same command again.")
_FAULTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.ENAMETOOLONG: ("E_NAME", "the name is too long for this disk", "Choose a shorter one."),
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
}
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def environment_faults(path: Path, doing: str) -> Iterator[None]:
    """Turn a fault of the disk, its permissions or its names into one sentence and exit code 5."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        code, what, remedy = _FAULTS[error.errno]
        raise EnvironmentFaultError(f"{path}: {what} while {doing}. {remedy}", code=code) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        EnvironmentFaultError: if a file lies in its place or the disk forbids it.
    """
    with environment_faults(path, "making the folder"):
        path.mkdir(parents=True, exist_ok=True)


def atomic_write(path: Path, data: bytes | str, *, private: bool = False) -> None:
    """Write a whole file or none: temporary name beside it, fsync, rename, fsync of the folder.

    Args:
        path: What to write.
        data: Its content.
        private: Whether only its owner may read it.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written; the old file stays.
    """
    payload = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        if private:
            temporary.touch(mode=0o600)
        temporary.write_bytes(payload)


@contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that becomes ``path`` when the block ends well.

    The temporary name keeps the end of the suffixes of ``path``, since writers choose a format by them, and no more,
    since names end at 255 bytes. It may become a file or a folder. With ``replace=False`` an existing target wins: the
    temporary is dropped.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written; nothing is left behind.
    """
    kept = "".join(path.suffixes[-2:])[-_MOST_SUFFIX:]
    temporary = path.with_name(f"{_TEMPORARY}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{kept}")
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

    Those of another machine, or of processes that this one cannot see, go when they are older than a day. A folder
    whose replacement was cut short between two renames is put back first.
    """
    removed = 0
    for former in folder.glob(f"{_FORMER}*"):
        for old in former.iterdir():
            if not (folder / old.name).exists():
                old.rename(folder / old.name)
        remove(former)
    for path in folder.glob(f"{_TEMPORARY}*"):
        if _is_stale(path):
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
        self._handle = -1

    def __enter__(self) -> Self:
        make_folder(self.path)
        with environment_faults(self.path, "locking the folder"):
            self._handle = self._lock()
            _HELD.add(self._handle)
            remove_stale(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        (self.path / _LOCK).unlink(missing_ok=True)
        _HELD.discard(self._handle)
        os.close(self._handle)

    def write_recipe(self, recipe: Mapping[str, Any], *, name: str = "recipe.yaml") -> Path:
        """Write the resolved recipe before the work begins."""
        path = self.path / name
        atomic_write(path, dump_yaml(recipe))
        return path

    def _lock(self) -> int:
        """Handle of the lock file, held by ``flock``, which the kernel frees when this process ends."""
        path = self.path / _LOCK
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            holder = _holder(path, handle)
            if holder is not None:
                os.close(handle)
                raise LockedError(
                    f"{self.path}: held by process {holder['pid']} on {holder['host'] or 'this machine'}. Wait for it, "
                    f"stop it, or choose another folder; if that machine is gone, delete {_LOCK} there."
                )
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
            os.close(handle)  # its last holder removed the file between the opening and the lock
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "start": time.time()}
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(mine).encode())
        return handle


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
    """Lines of a journal; a line cut by a kill is left out, and of what a resumed run wrote twice the later stays.

    Two lines are of one thing when step and keys are the same and, for alarms, the sentence.
    """
    lines: dict[Any, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        thing = (line["step"], tuple(sorted(line)), line.get("alarm")) if "step" in line else number
        lines.pop(thing, None)
        lines[thing] = line
    return list(lines.values())


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
            former = path.with_name(f"{_FORMER}{secrets.token_hex(4)}")
            former.mkdir()
            path.rename(former / path.name)
            temporary.rename(path)
            remove(former)


def _holder(path: Path, handle: int) -> dict[str, Any] | None:
    """Who holds the lock; None when nobody does any more, and then this process holds it."""
    is_held = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_held = True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        is_held = _told(path)["boot"] == _boot() and _alive(_told(path)["pid"])
    told = _told(path)
    # the kernel answers for its own processes; a lock of another machine may be invisible from here
    is_foreign = told["host"] not in {"", socket.gethostname()} and told["boot"] != _boot()
    return told if is_held or is_foreign else None


def _told(lock: Path) -> dict[str, Any]:
    """What the lock file says of its holder."""
    try:
        told = json.loads(lock.read_text())
        return {"host": str(told["host"]), "pid": int(told["pid"]), "boot": str(told["boot"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "", "pid": 0, "boot": ""}


def _machine() -> str:
    """Short name of the machine, since it started, and of the processes that this one can see there."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {_boot()} {namespace}".encode()).hexdigest()[:12]


def _is_stale(temporary: Path) -> bool:
    place, _, rest = temporary.name.removeprefix(_TEMPORARY).partition("-")
    pid = rest.partition("-")[0]
    if place == _machine() and pid.isdigit():
        return not _alive(int(pid))
    try:
        return time.time() - temporary.lstat().st_mtime > _FOREIGN_SECONDS
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _drop_inherited() -> None:
    """Close a forked child's copies of the locks, or they would outlive a parent that was killed."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_inherited)
