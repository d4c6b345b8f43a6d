"""The list that a scan writes for a DICOM image: which frames of which files make each of its volumes.

It stands for the image wherever a file is asked for. It holds paths, numbers of frames and words such as ``echo 2``;
nothing of a patient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import ReadError
from medssl.io import integrity
from medssl.io.dicom.model import Item
from medssl.runfolder import atomic_path

SUFFIX = ".dicom.json"

_VERSION = 1
_MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Listed:
    """One volume of a list.

    Args:
        what: What tells it from the others.
        frames: File, number of the frame in it, and number of the tile where the file is a mosaic.
    """

    what: str
    frames: tuple[tuple[Path, int, int | None], ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files, each once, in the order of their frames."""
        return tuple(dict.fromkeys(path for path, _, _ in self.frames))


def is_list(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a series list."""
    return head.startswith(integrity.SERIES_LIST_START)


def write_list(item: Item, path: Path) -> None:
    """Write the list of an image, readable by its owner only, unless it is there already.

    Args:
        item: The image.
        path: Of the list, by custom ending in :data:`SUFFIX`. Files below the folder above that of the list are named
            relative to it, so that both can move together; all others by their whole path.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    root = path.absolute().parent.parent
    names = {file: _name(file.absolute(), root, path.absolute().parent) for file in item.paths}
    files = {name: number for number, name in enumerate(names.values())}
    content = {
        "medssl_series_list": _VERSION,
        "files": list(files),
        "volumes": [
            {"what": stack.what, "frames": [[files[names[f.path]], f.index, f.tile] for f in stack.frames]}
            for stack in item.stacks
        ],
    }
    text = json.dumps(content, separators=(",", ":"))
    payload = text.encode("utf-8", "surrogateescape")
    if path.is_file() and path.read_bytes() == payload:
        return
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(payload)


def read_list(path: Path) -> tuple[Listed, ...]:
    """Volumes of a list, in its order.

    Raises:
        ReadError: E_MISSING and the like, or E_SERIES_LIST for a list that is damaged or of a later version.
    """
    data = integrity.read_bytes(path)
    try:
        if not is_list(data) or len(data) > _MOST_BYTES:
            raise ValueError
        content = json.loads(data.decode("utf-8", errors="surrogateescape"))
        if content["medssl_series_list"] != _VERSION:
            raise ValueError
        files = [path.parent / str(name) for name in content["files"]]
        return tuple(_listed(volume, files) for volume in content["volumes"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ReadError(
            f"{path}: is no series list of this version of medssl, or a damaged one. Scan the files again.",
            code="E_SERIES_LIST",
        ) from error


def _listed(volume: Any, files: Sequence[Path]) -> Listed:
    frames = []
    for number, index, tile in volume["frames"]:
        if not all(isinstance(n, int) and n >= 0 for n in (number, index, 0 if tile is None else tile)):
            raise ValueError
        frames.append((files[number], index, tile))
    if not frames:
        raise ValueError
    return Listed(str(volume["what"]), tuple(frames))


def _name(file: Path, root: Path, folder: Path) -> str:
    if not file.is_relative_to(root):
        return str(file)
    below = file.relative_to(root)
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else f"../{below}"
