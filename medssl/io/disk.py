"""What the system says of a file that cannot be opened or read, as a refusal of that file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medssl.errors import ReadError


@contextmanager
def disk_faults(path: Path, *, missing: str = "E_MISSING") -> Iterator[None]:
    """Tell the faults of the disk apart.

    Args:
        path: For messages.
        missing: Code where there is no file.

    Raises:
        ReadError: E_MISSING (or ``missing``), E_PERMISSION, E_NOT_REGULAR for a folder, or E_READ.
    """
    try:
        yield
    except ReadError:
        raise
    except FileNotFoundError as error:
        raise ReadError(f"{path}: there is no such file. Check the path.", code=missing) from error
    except PermissionError as error:
        raise ReadError(f"{path}: no permission to read it. Ask its owner.", code="E_PERMISSION") from error
    except IsADirectoryError as error:
        raise ReadError(f"{path}: is a folder; give the name of an image file.", code="E_NOT_REGULAR") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror}). Check the disk.") from error
