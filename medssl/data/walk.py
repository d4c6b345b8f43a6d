"""Every file below a folder, and every folder that is not entered, so that nothing is lost in silence."""

from __future__ import annotations

import os
from pathlib import Path

from medssl.errors import ReadError


def walk(root: Path, *, follow_links: bool = False) -> list[tuple[Path, ReadError | None]]:
    """Paths of all files, relative to ``root`` and sorted; folders that are not entered come with the reason.

    Args:
        root: Folder to look through, with all below it.
        follow_links: Whether links to folders are entered; one that leads back up never is.
    """
    found: list[tuple[Path, ReadError | None]] = []

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        text = f"{path}: the folder cannot be read ({error.strerror}). Ask its owner, or leave it out."
        code = "E_PERMISSION" if isinstance(error, PermissionError) else "E_READ"
        found.append((path.relative_to(root), ReadError(text, code=code)))

    for name, folders, files in os.walk(root, followlinks=follow_links, onerror=unreadable):
        here = Path(name)
        found += [((here / file).relative_to(root), None) for file in files]
        for linked in [here / folder for folder in folders if (here / folder).is_symlink()]:
            if follow_links and not here.resolve().is_relative_to(linked.resolve()):
                continue
            folders.remove(linked.name)
            text = f"{linked}: is a link to a folder, which is not followed. Give the folder itself"
            text += ", for the link leads back up." if follow_links else ", or set follow_links: true in a scan."
            found.append((linked.relative_to(root), ReadError(text, code="E_LINK")))
    return sorted(found, key=lambda pair: pair[0])
