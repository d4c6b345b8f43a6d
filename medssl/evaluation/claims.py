"""Claims by which several machines share the runs of a study in one folder: each run is done once."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from medssl.runfolder import make_folder


class Claim:
    """A file that whoever does a piece of work makes, renews, and takes away at the end.

    The file is made in one step that only one machine can win. A thread renews its time; a file that was not renewed
    for ``expires_s`` belongs to a machine that is gone, and is taken over. Times are those of the file system, so that
    clocks of machines may differ.

    Args:
        path: The file, in a folder that all machines see.
        expires_s: Seconds without renewal after which a claim is void.
    """

    def __init__(self, path: Path, *, expires_s: float = 600.0) -> None:
        self.path = path
        self._expires_s = expires_s
        self._token = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._ended = threading.Event()
        self._renewal: threading.Thread | None = None

    def take(self) -> bool:
        """Make the claim; False if another machine or process holds it."""
        make_folder(self.path.parent)
        if not self._make() and not (self._remove_void() and self._make()):
            return False
        self._ended.clear()
        self._renewal = threading.Thread(target=self._renew, daemon=True)
        self._renewal.start()
        return True

    def release(self) -> None:
        """Take the claim away, unless another machine has taken it over."""
        self._ended.set()
        if self._renewal is not None:
            self._renewal.join()
            self._renewal = None
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text() == self._token:
                self.path.unlink()

    def wait(self, *, every_s: float = 2.0) -> Self:
        """Take the claim as soon as it is free; for use in a ``with``."""
        while not self.take():
            time.sleep(every_s)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _make(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(self._token)
        return True

    def _remove_void(self) -> bool:
        """Take an expired claim out of the way; False if it is a live one."""
        aside = self.path.with_name(f".void-{secrets.token_hex(8)}")
        try:
            holder = self.path.read_text()
            if _now(self.path) - self.path.stat().st_mtime < self._expires_s:
                return False
            self.path.rename(aside)
        except FileNotFoundError:
            return True
        is_void = aside.read_text() == holder
        if not is_void:  # another machine took over in between, and this is its claim
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()
        return is_void

    def _renew(self) -> None:
        while not self._ended.wait(self._expires_s / 5):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)


def _now(path: Path) -> float:
    """What the file system calls now."""
    probe = path.with_name(f".now-{secrets.token_hex(8)}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now
