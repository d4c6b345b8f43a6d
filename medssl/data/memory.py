"""Cases that stay in memory once they are decoded, so that a crop is a copy: for runs that cut in their own process.

Workers decode side by side and each has a memory of its own; they read the store as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medssl.data.store import StoredCase

_MEMORY = Path("/proc/meminfo")


class Room:
    """Bytes that decoded arrays may still take."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` bytes, which are then taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


def keep_decoded(cases: Sequence[StoredCase], *, limit_mib: int | None = None) -> None:
    """Let each case keep its arrays from the first crop on, as long as there is room for all of them.

    Args:
        cases: Of this process; in others they forget it.
        limit_mib: Room in MiB; None takes a quarter of the memory that is free now, 0 keeps nothing.
    """
    room = Room((free_mib() // 4 if limit_mib is None else limit_mib) << 20)
    for case in cases:
        case.room = room


def free_mib() -> int:
    """Memory in MiB that can be had without swapping; 0 where the system does not say."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable:")), 0)
