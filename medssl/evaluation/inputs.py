"""Which scans a prediction is asked for, and where each label map goes; no voxel is read."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.data.walk import walk
from medssl.errors import CaseError, ConfigError, NoInputError, ReadError
from medssl.io import is_image, stem
from medssl.ledger import Ledger

_SUFFIX = ".nii.gz"
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One scan to segment.

    Args:
        item: Its name in the ledger.
        path: Where it lies.
        target: Label map to write.
    """

    item: str
    path: Path
    target: Path


def plan(inputs: Path | Sequence[Path], out: Path, ledger: Ledger) -> list[Job]:
    """Announce all inputs and book those that no label map can be made of; the rest is the work.

    Raises:
        NoInputError: if there is no scan.
        ConfigError: E_OVERWRITE, if a label map would take the place of a scan.
    """
    given = [inputs] if isinstance(inputs, Path) else list(inputs)
    jobs: list[Job] = []
    seen: set[Path] = set()
    for item, path, fault in _files(given, out):
        ledger.expect(item)
        if fault is not None:
            ledger.reject(item, fault)
        elif not is_image(path) and path.exists():
            ledger.ignore(item, "not an image by its name")
        elif not path.exists():
            ledger.reject(item, ReadError(f"{item}: there is no such file. Correct the path, or the link."))
        elif path.resolve() in seen:
            ledger.duplicate(item, "given twice")
        else:
            seen.add(path.resolve())
            jobs.append(Job(item, path, out / f"{stem(path)}{_SUFFIX}"))
    if not jobs:
        raise NoInputError(
            f"{', '.join(map(str, given)) or 'inputs'}: no image found; NIfTI, MHA, NRRD, PNG, JPEG or TIFF files are "
            "needed. Give a scan or a folder of scans."
        )
    overwritten = seen & {job.target.resolve() for job in jobs}
    if overwritten:
        raise ConfigError(
            f"{out}: label maps would overwrite {len(overwritten)} of the scans. Choose another output folder.",
            code="E_OVERWRITE",
        )
    clashes = Counter(_folded(job) for job in jobs)
    good = []
    for job in jobs:
        if clashes[_folded(job)] > 1:
            message = (
                f"{job.item}: {clashes[_folded(job)]} scans would be written to {job.target.name}, upper case and "
                "accents apart; one is needed. Rename them, or predict them into folders of their own."
            )
            ledger.reject(job.item, CaseError(message, code="E_NAME_CLASH"))
        elif len(job.target.name.encode()) > _LONGEST_NAME:
            message = f"{job.item}: with {_SUFFIX} the name exceeds {_LONGEST_NAME} bytes. Shorten it."
            ledger.reject(job.item, CaseError(message, code="E_NAME"))
        else:
            good.append(job)
    return good


def _files(given: Iterable[Path], out: Path) -> Iterator[tuple[str, Path, ReadError | None]]:
    """Name and path of every file, through folders but not into the output folder or hidden places."""
    for path in given:
        if not path.is_dir():
            yield path.name, path, None
            continue
        for relative, fault in walk(path):
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if not is_hidden and not (path / relative).resolve().is_relative_to(out.resolve()):
                yield relative.as_posix(), path / relative, fault


def _folded(job: Job) -> str:
    return unicodedata.normalize("NFC", job.target.name).casefold()
