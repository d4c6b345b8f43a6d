"""Which scans a prediction is asked for, and where each label map goes; no voxel is read."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medssl.data.archive import is_archive
from medssl.data.cohort import Cohort, Modality
from medssl.data.discover import is_label
from medssl.data.listing import book
from medssl.data.reading import Reading
from medssl.data.series import doubts, find_series, item_name
from medssl.data.walk import Entry, walk
from medssl.errors import CaseError, ConfigError, NoInputError, ReadError
from medssl.io import is_image, stem
from medssl.io.dicom.model import Item
from medssl.io.dicom.series_list import SUFFIX, read_list
from medssl.ledger import Ledger

_SUFFIX = ".nii.gz"
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One scan to segment.

    Args:
        item: Its name in the ledger.
        path: Where it lies; the series list that has yet to be written, for DICOM files.
        target: Label map to write.
        reading: Choices by which it is read.
        series: The DICOM item that it is a volume of.
        warnings: What is said against it before it is read, as ``W_CODE: sentence``.
        modality: Of the table, where one is given.
    """

    item: str
    path: Path
    target: Path
    reading: Reading = field(default_factory=Reading)
    series: Item | None = None
    warnings: tuple[str, ...] = ()
    modality: Modality = "other"


def plan(inputs: Path | Sequence[Path], out: Path, ledger: Ledger, *, unpack_to: Path) -> list[Job]:
    """Announce all inputs and book those that no label map can be made of; the rest is the work.

    Args:
        inputs: Scans, folders of scans, archives, series lists, or tables that ``medssl scan`` wrote.
        out: Folder for the label maps: named like their file, by case id for a table, by series for DICOM.
        ledger: Where all are booked.
        unpack_to: Folder to unpack archives into.

    Raises:
        NoInputError: if there is no scan.
        ConfigError: E_OVERWRITE, if a label map would take the place of a scan.
        CaseError: E_TABLE, if a table is not what it should be.
    """
    given = [inputs] if isinstance(inputs, Path) else list(inputs)
    jobs, seen = _jobs(given, out, ledger, unpack_to)
    if not jobs:
        raise NoInputError(
            f"{', '.join(map(str, given)) or 'inputs'}: no image found; DICOM, NIfTI, MHA, NRRD, PNG, JPEG or TIFF "
            "files are needed. Give a scan, a folder of scans, or the table of a scan."
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


def _jobs(given: Sequence[Path], out: Path, ledger: Ledger, unpack_to: Path) -> tuple[list[Job], set[Path]]:
    """One job a scan, each announced; and the files that are scans."""
    jobs: list[Job] = []
    loose: list[Entry] = []
    seen: set[Path] = set()
    tables = [path for path in given if path.suffix.lower() == ".csv" and path.is_file()]
    entries = [entry for path in given if path not in tables for entry in _entries(path, out, unpack_to)]
    for entry in entries:
        item, path = entry.item.as_posix(), entry.path
        if entry.fault is not None or not path.exists():
            missing = ReadError(f"{item}: there is no such file. Correct the path, or the link.")
            ledger.expect(item)
            ledger.reject(item, entry.fault or missing)
        elif path.resolve() in seen:
            ledger.expect(item)
            ledger.duplicate(item, "given twice")
        elif path.name.endswith(SUFFIX):
            seen.add(path.resolve())
            jobs += _of_list(entry, out, ledger)
        elif path not in given and is_image(path) and is_label(entry.item):
            ledger.expect(item)
            ledger.ignore(item, "a label by its name, not a scan; give the file itself to segment it all the same")
        elif is_image(path):
            seen.add(path.resolve())
            jobs.append(_announced(Job(item, path, out / f"{stem(entry.item)}{_SUFFIX}"), ledger))
        else:
            seen.add(path.resolve())
            loose.append(entry)
    for table in tables:
        jobs += _of_table(table, out, ledger)
    return jobs + _of_dicom(loose, out, ledger), seen


def _of_table(table: Path, out: Path, ledger: Ledger) -> list[Job]:
    cases = Cohort.from_csv(table)
    jobs = [
        Job(case.case_id, Path(case.image), out / f"{case.case_id}{_SUFFIX}", case.reading, modality=case.modality)
        for case in cases
    ]
    return [_announced(job, ledger) for job in jobs]


def _of_list(entry: Entry, out: Path, ledger: Ledger) -> list[Job]:
    """Volumes of a series list that an earlier scan wrote."""
    item = entry.item.as_posix()
    try:
        count = len(read_list(entry.path))
    except ReadError as error:
        ledger.expect(item)
        ledger.reject(item, error)
        return []
    name = entry.path.name.removesuffix(SUFFIX)
    jobs = []
    for number in range(count):
        target = _target(out, name, number, count)
        job = Job(item + _ending(number, count), entry.path, target, _number(number, count))
        jobs.append(_announced(job, ledger))
    return jobs


def _of_dicom(entries: Sequence[Entry], out: Path, ledger: Ledger) -> list[Job]:
    """Every volume of the DICOM files among some files; what is none is booked."""
    found = find_series(entries, key=b"")
    found.ignored += [(str(entry.item), "not an image by its name") for entry in found.others]
    book(found, ledger)
    for path in set(found.labels.values()):
        ledger.expect(found.items_of[path])
        ledger.ignore(found.items_of[path], "a label, not a scan")
    jobs = []
    for series in found.items:
        place, count = item_name(series, found.items_of), len(series.stacks)
        path = out / "series" / f"{series.name}{SUFFIX}"
        for number in range(count):
            target = _target(out, series.name, number, count)
            reading, said = _number(number, count), doubts(series.stacks[number])
            job = Job(place + _ending(number, count), path, target, reading, series, said)
            jobs.append(_announced(job, ledger))
    return jobs


def _announced(job: Job, ledger: Ledger) -> Job:
    ledger.expect(job.item)
    return job


def _target(out: Path, name: str, number: int, count: int) -> Path:
    return out / f"{name}{_ending(number, count)}{_SUFFIX}"


def _ending(number: int, count: int) -> str:
    return "" if count == 1 else f"-{number:03d}"


def _number(number: int, count: int) -> Reading:
    return Reading(volume=None if count == 1 else number)


def _entries(path: Path, out: Path, unpack_to: Path) -> Iterator[Entry]:
    """Every file, through folders and archives but not into the output folder or hidden places."""
    if not path.is_dir() and not (path.is_file() and is_archive(path)):
        yield Entry(Path(path.name), path)
        return
    for entry in walk(path, unpack_to=unpack_to):
        is_member = entry.path.is_relative_to(unpack_to)
        if not entry.is_hidden and (is_member or not entry.path.resolve().is_relative_to(out.resolve())):
            yield entry


def _folded(job: Job) -> str:
    return unicodedata.normalize("NFC", job.target.name).casefold()
