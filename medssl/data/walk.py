"""Every file below a folder or in its archives, and what is not entered, so that nothing is lost in silence."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from medssl.data.archive import is_archive, unpack
from medssl.errors import ReadError


@dataclass(frozen=True)
class Entry:
    """A file, or a place that was not entered.

    Args:
        item: Its name: the path relative to the root; ``export.zip/a/b.dcm`` for a member of an archive.
        path: Where it lies.
        fault: Why it was not entered, for folders and archives that were not.
    """

    item: Path
    path: Path
    fault: ReadError | None = None

    @property
    def is_hidden(self) -> bool:
        """Whether its name, or that of a folder on the way to it, begins with a dot."""
        return any(part.startswith(".") for part in self.item.parts)


def walk(
    root: Path, *, follow_links: bool = False, unpack_to: Path | None = None, leave_out: Collection[Path] = ()
) -> list[Entry]:
    """All files, sorted by name; folders and archives that are not entered come with the reason.

    Args:
        root: Folder to look through, with all below it; or one archive.
        follow_links: Whether links to folders are entered; one that leads back up never is.
        unpack_to: Folder to unpack archives into; without it they are files like others.
        leave_out: Folders not to enter and files not to name, such as those that medssl itself writes.

    Raises:
        EnvironmentFaultError: if an archive does not fit on the disk.
    """
    if root.is_file():
        return sorted(_opened(Entry(Path(root.name), root), unpack_to, root=None), key=lambda entry: entry.item)
    found: list[Entry] = []
    strange = {path.resolve() for path in leave_out}

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        text = f"{path}: the folder cannot be read ({error.strerror}). Ask its owner, or leave it out."
        code = "E_PERMISSION" if isinstance(error, PermissionError) else "E_READ"
        found.append(Entry(path.relative_to(root), path, ReadError(text, code=code)))

    for name, folders, files in os.walk(root, followlinks=follow_links, onerror=unreadable):
        here = Path(name)
        real = here.resolve() if strange else here
        folders[:] = [folder for folder in folders if real / folder not in strange]
        limits = None if follow_links else root
        for file in files:
            if real / file in strange:
                continue
            found += _opened(Entry((here / file).relative_to(root), here / file), unpack_to, root=limits)
        for linked in [here / folder for folder in folders if (here / folder).is_symlink()]:
            if follow_links and not here.resolve().is_relative_to(linked.resolve()):
                continue
            folders.remove(linked.name)
            text = f"{linked}: is a link to a folder, which is not followed. Give the folder itself"
            text += ", for the link leads back up." if follow_links else ", or set follow_links: true in a scan."
            found.append(Entry(linked.relative_to(root), linked, ReadError(text, code="E_LINK")))
    return sorted(found, key=lambda entry: entry.item)


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path is a link to a place outside a folder."""
    return path.is_symlink() and not path.resolve().is_relative_to(root.resolve())


def _opened(entry: Entry, unpack_to: Path | None, *, root: Path | None) -> list[Entry]:
    """The entry itself, or the members of the archive that it is; one outside ``root`` is not opened."""
    if unpack_to is None or entry.is_hidden or not is_archive(entry.path):
        return [entry]
    if root is not None and leads_out(entry.path, root):
        return [entry]
    try:
        members = unpack(entry.path, unpack_to)
    except ReadError as error:
        return [Entry(entry.item, entry.path, error)]
    return [Entry(entry.item / name, path) for name, path in members]
