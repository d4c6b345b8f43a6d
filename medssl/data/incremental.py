"""What an earlier scan learnt of files that have not changed since, so that they are not opened again.

One JSON line for each file (its DICOM header, its refusal, or that it is no DICOM), for each pair of files that was
compared, and for each case that was checked. A file is the same while its size and its time of change are. Lines are
added as the work goes on, so that a scan that was killed is continued; at the end only what was used is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medssl import __version__, errors
from medssl.errors import MedSSLError
from medssl.io.dicom.header import from_dict, to_dict
from medssl.io.dicom.model import Header
from medssl.io.dicom.repeats import equal_pixels
from medssl.runfolder import atomic_write, environment_faults

_VERSION = 1
_PASSING = {
    "E_MEMORY",
    "E_HUNG",
    "E_READER_CRASH",
    "E_READER_LIMIT",
    "E_UNEXPECTED",
    "E_PERMISSION",
    "E_READ",
    "E_MISSING",
    "E_ENVIRONMENT",
}
_ERRORS = {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MedSSLError)}


@dataclass(frozen=True)
class Looked:
    """What a look at the start of a file gave: a header, a refusal, or neither where it is no DICOM."""

    header: Header | None = None
    error: MedSSLError | None = None


class Cache:
    """The lines of ``scan_cache.jsonl``, readable by its owner only.

    Args:
        path: The file; None keeps nothing.
        key: Of the tokens in the headers; what was learnt under another one is forgotten.
    """

    def __init__(self, path: Path | None, *, key: bytes) -> None:
        self._path = path
        self._head = {"scan_cache": _VERSION, "medssl": __version__, "key": hashlib.blake2b(key).hexdigest()[:16]}
        self._old: dict[str, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}
        self._stamps: dict[Path, list[int]] = {}
        self._handle = -1

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        with environment_faults(self._path, "opening the cache"):
            self._old = self._lines(self._path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | (0 if self._old else os.O_TRUNC)
            self._handle = os.open(self._path, flags, 0o600)
            os.fchmod(self._handle, 0o600)
            if not self._old:
                self._append([self._head])
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._path is None:
            return
        os.close(self._handle)
        if kind is None:
            lines = [self._head, *self._used.values()]
            atomic_write(self._path, "".join(json.dumps(line) + "\n" for line in lines), private=True)

    def looked(self, path: Path) -> Looked | None:
        """What is known of the start of a file, if it has not changed."""
        line = self._old.get(f"file {path}")
        self._stamps[path] = _stamp(path)  # before the file is read: one that grows meanwhile is read again next time
        if line is None or line.get("stamp") != self._stamps[path]:
            return None
        try:
            header = from_dict(line["header"]) if line["header"] is not None else None
            looked = Looked(header, _error(line["error"]))
        except (LookupError, TypeError, ValueError, AttributeError):
            return None
        self._used[f"file {path}"] = line
        return looked

    def keep_looks(self, looks: Iterable[tuple[Path, Looked]]) -> None:
        """Remember what the starts of files gave."""
        lines = []
        for path, look in looks:
            if look.error is not None and look.error.code in _PASSING:
                continue
            header = to_dict(look.header) if look.header is not None else None
            line = {
                "file": str(path),
                "stamp": self._stamps.get(path) or _stamp(path),
                "header": header,
                "error": _told(look.error),
            }
            self._used[f"file {path}"] = line
            lines.append(line)
        self._append(lines)

    def checked(self, fingerprint: str) -> Mapping[str, Any] | MedSSLError | None:
        """What the check of a case gave, if none of its files nor the rules have changed."""
        line = self._old.get(f"case {fingerprint}")
        if line is None:
            return None
        try:
            error = _error(line["error"])
            result: Mapping[str, Any] | MedSSLError = dict(line["result"]) if error is None else error
        except (LookupError, TypeError, ValueError):
            return None
        self._used[f"case {fingerprint}"] = line
        return result

    def keep_check(self, fingerprint: str, result: Mapping[str, Any] | MedSSLError) -> None:
        """Remember what the check of a case gave; a passing fault, such as full memory, is not kept."""
        error = result if isinstance(result, MedSSLError) else None
        if error is not None and error.code in _PASSING:
            return
        line = {"case": fingerprint, "result": None if error else result, "error": _told(error)}
        self._used[f"case {fingerprint}"] = line
        self._append([line])

    def same_pixels(self, first: Header, second: Header) -> bool:
        """Whether two files hold equal pixels, compared once while they do not change."""
        name = f"pair {first.path}|{second.path}"
        stamps = [_stamp(first.path), _stamp(second.path)]
        line = self._old.get(name, {})
        if line.get("stamp") != stamps or not isinstance(line.get("same"), bool):
            line = {"pair": [str(first.path), str(second.path)], "stamp": stamps, "same": equal_pixels(first, second)}
            self._append([line])
        self._used[name] = line
        return bool(line["same"])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self._path is not None and lines:
            with environment_faults(self._path, "writing the cache"):
                os.write(self._handle, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _lines(self, path: Path) -> dict[str, dict[str, Any]]:
        """Lines by what they are of; none where another version or key wrote them. A line cut by a kill is left out."""
        found: dict[str, dict[str, Any]] = {}
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != self._head:
                return {}
        except (FileNotFoundError, ValueError):
            return {}
        for text in lines:
            try:
                line = json.loads(text)
                found[_name(line)] = line
            except (ValueError, LookupError, TypeError):
                continue
        return found


def fingerprint(paths: Iterable[Path], rules: Mapping[str, Any]) -> str:
    """Name of a check: a hash of the state of the files that it reads and of the rules that it follows.

    Files that belong together (``.hdr`` and ``.img``, a detached header and its voxels) lie in one folder, so with such
    a header the whole folder counts.
    """
    files: set[Path] = set()
    for path in paths:
        files.add(path)
        if path.suffix.lower() in {".hdr", ".mhd", ".nhdr"}:
            files.update(child for child in path.parent.iterdir() if child.is_file())
        elif path.is_dir():
            files.update(child for child in path.rglob("*") if child.is_file())
    state = [(str(path), _stamp(path)) for path in sorted(files)]
    content = json.dumps([__version__, state, rules], sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _stamp(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns]


def _name(line: Mapping[str, Any]) -> str:
    """What a line is of."""
    if "file" in line:
        return f"file {line['file']}"
    return f"case {line['case']}" if "case" in line else f"pair {'|'.join(line['pair'])}"


def _told(error: MedSSLError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, error.code, error.message]


def _error(told: list[str] | None) -> MedSSLError | None:
    if told is None:
        return None
    name, code, message = told
    return _ERRORS[name](message, code=code)
