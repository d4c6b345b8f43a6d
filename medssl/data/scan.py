"""Find images and labels in a folder or a table, read and check each one, and write the cohort."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medssl import io
from medssl.config import Config, dump_yaml
from medssl.data import listing
from medssl.data.cohort import Case, Cohort, Modality, leak_error, split_leaks
from medssl.data.discover import LABEL_SUFFIXES, Rules, discover
from medssl.data.examine import Checked, Task, examine_all
from medssl.data.facts import NAME as FACTS
from medssl.data.facts import keep_facts
from medssl.data.identify import load_key, renamed, write_names
from medssl.data.incremental import Cache
from medssl.data.listing import Listed
from medssl.data.reading import Reading
from medssl.data.series import Volumes
from medssl.data.tables import acquisition_table, refused_table
from medssl.errors import ConfigError, MedSSLError, NoInputError
from medssl.io.dicom.series_list import SUFFIX, write_list
from medssl.ledger import Ledger
from medssl.report.cohort import CaseSummary, write_cohort_report
from medssl.runfolder import RunFolder, atomic_write, remove

_NO_SPLIT = "W_NO_SPLIT: other cases have a split and this one has none; it is in no split."
_OWN_FOLDERS = ("series", "thumbnails", "unpacked")
_OWN_FILES = (
    "refused.csv",
    "acquisition.csv",
    FACTS,
    "report.html",
    "scan.yaml",
    "journal.jsonl",
    "pseudonyms.json",
    "scan_cache.jsonl",
    ".lock",
)
_FEW_CASES = 3

_log = logging.getLogger(__name__)


class ScanConfig(Config):
    """How a folder is looked through.

    Args:
        modality: Of all cases, unless a table or a DICOM header says otherwise.
        table: CSV with ``case_id`` and any of ``subject_id`` (or ``subject_group``), ``split`` (or
            ``suggested_split``) and ``modality``; rows with a ``kind`` other than ``image`` are skipped. Looked for
            where it says, else in the scanned folder.
        columns: Columns of the table, or of the CSV of cases, that are kept as facts of each case: a diagnosis to
            learn, an age, a site. They go to ``facts.csv`` beside the cohort, and from there into the store.
        image_glob: Only paths that match are images.
        label_suffixes: How names of label maps end, before the file type.
        label_values: The values that a label may have beside 0; any by default.
        label_grid: What becomes of a label on another grid than its image: refused (``same``), resampled onto it
            (``resample``), or believed to lie on it where the voxels are as many (``trust``).
        volumes: Which of several volumes in one file or DICOM series become cases. ``auto`` takes all of a DICOM series
            up to 8 and the middle one of more, and refuses other files; ``channels`` makes one image of the volumes
            of a file.
        names: ``hash`` replaces case and subject ids that the user has not given, in a table, by keyed hashes; ``keep``
            takes them from names of files. The key and the names stay in ``pseudonyms.json``, readable by its owner
            only. Paths in the tables of the scan keep the files' own names.
        key_file: ``pseudonyms.json`` of another scan, to give equal names the same hashes.
        fractions: Shares of subjects in train, val and test, where no table gives splits.
        seed: Of that split.
        follow_links: Whether links that lead out of the folder are followed.
        xform: Which NIfTI transform to believe where the two disagree; by default such files are refused.
        assume_spacing_mm: Voxel size of files that state none.
        regularise: Fill missing slices and uneven slice distances of DICOM series by interpolation.
        fix_signedness: Take DICOM values that are signed but labelled unsigned as what they are.
        pages: ``stack`` makes slices of the pages of a TIFF.
        burned_in: ``accept`` takes images whose header says that text is burned in.
        thumbnails: Whether pictures are drawn for the report.
        workers: Processes; 0 chooses by the machine.
    """

    modality: Modality = "other"
    table: str | None = None
    columns: tuple[str, ...] = ()
    image_glob: str | None = None
    label_suffixes: tuple[str, ...] = LABEL_SUFFIXES
    label_values: tuple[int, ...] | None = None
    label_grid: Literal["same", "resample", "trust"] = "same"
    volumes: Volumes = "auto"
    names: Literal["hash", "keep"] = "hash"
    key_file: str | None = None
    fractions: dict[str, float] = Field({"train": 0.7, "val": 0.1, "test": 0.2})
    seed: int = Field(0, ge=0)
    follow_links: bool = False
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None
    regularise: bool = False
    fix_signedness: bool = False
    pages: Literal["refuse", "stack"] = "refuse"
    burned_in: Literal["refuse", "accept"] = "refuse"
    thumbnails: bool = True
    workers: int = Field(0, ge=0)

    @property
    def reading(self) -> Reading:
        """Choices for every case."""
        return Reading(
            volume="channels" if self.volumes == "channels" else None,
            regularise=self.regularise,
            fix_signedness=self.fix_signedness,
            pages=self.pages,
            label_grid=self.label_grid,
            xform=self.xform,
            assume_spacing_mm=self.assume_spacing_mm,
        )


_DEFAULT = ScanConfig()


@dataclass(frozen=True)
class ScanResult:
    """What a scan found.

    Args:
        cohort: The accepted cases.
        ledger: What became of every input.
        path: The table that was written, or would be, in a dry run.
        warnings: ``W_CODE: sentence`` strings that concern the cohort as a whole.
    """

    cohort: Cohort
    ledger: Ledger
    path: Path
    warnings: tuple[str, ...] = ()


def scan(data: Path, out: Path, *, config: ScanConfig = _DEFAULT, dry_run: bool = False) -> ScanResult:
    """Make a cohort of the images in a folder.

    Layouts: DICOM files under any names, the decathlon's (imagesTr, labelsTr, imagesTs), BIDS-like trees, plain folders
    with ``images`` and ``labels`` or with label maps named like their image, archives of these, or a CSV with
    ``case_id,image`` and any of ``label``, ``subject_id``, ``modality``, ``split``, ``reading``. A subject is what the
    table says, else that of the DICOM header, else ``sub-XX``, else the outermost folder that several but not all
    images share, else the case; W_SUBJECT tells of the last two.

    A second scan into the same folder opens only files that have changed; pictures and lists of cases that are gone
    are removed.

    Args:
        data: Folder, archive or CSV.
        out: The table to write (``.csv``), or a folder for ``cohort.csv``. Beside it come the same as Parquet,
            ``refused.csv``, ``acquisition.csv``, ``facts.csv``, ``report.html``, ``scan.yaml``, ``journal.jsonl``,
            ``pseudonyms.json``, ``scan_cache.jsonl``, and the folders ``series``, ``thumbnails`` and ``unpacked``.
        config: Rules for names, labels and splits.
        dry_run: Check everything, but write nothing.

    Returns:
        Accepted cases with their splits, and the ledger.

    Raises:
        NoInputError: if there is nothing that looks like an image.
        ConfigError: if a table or a key is not there.
        CaseError: E_TABLE, if a table is not what it should be.
        LockedError: if another scan writes to this folder now.
    """
    started = time.monotonic()
    path = out if out.suffix == ".csv" else out / "cohort.csv"
    names = path.with_name("pseudonyms.json")
    ledger = Ledger()
    cached = None if dry_run else path.with_name("scan_cache.jsonl")
    with _workshop(path.parent, dry_run=dry_run) as (shop, run):
        key = load_key(names, key_file=None if config.key_file is None else Path(config.key_file))
        if run is not None and not names.exists():
            write_names(names, (), key=key)  # a scan that is killed goes on under the same key
        with Cache(cached, key=key) as cache:
            listed = _listed(data, shop, config=config, key=key, cache=cache, ledger=ledger, table=path)
            for one in listed:
                ledger.expect(one.item)
            ids = {one.item: _renamed(one, config, key=key) for one in _with_kept_subjects(listed)}
            pictures = shop / "thumbnails" if config.thumbnails and not dry_run else None
            tasks = [_task(one, ids[one.item], config, pictures) for one in listed]
            checked: dict[str, Checked] = {}
            for item, result in examine_all(tasks, cache=cache, workers=config.workers).items():
                if isinstance(result, MedSSLError):
                    ledger.reject(item, result)
                else:
                    checked[item] = result
            good = _without_duplicates([one for one in listed if one.item in checked], checked, ledger)
            good = _without_leaks(good, ledger)
            has_splits = any(one.case.split for one in good)
            for one in good:
                unsplit = (_NO_SPLIT,) if has_splits and one.case.split is None else ()
                checked[one.item] = replace(
                    checked[one.item], warnings=one.warnings + checked[one.item].warnings + unsplit
                )
                ledger.accept(one.item, warnings=checked[one.item].warnings)
            ledger.check()
            cohort = Cohort(one.case for one in good)
            warnings = _of_whom(good, cohort)
            if not has_splits:
                cohort = cohort.split_by_subject(config.fractions, seed=config.seed)
            pairs = _under_new_names(good, cohort, ids)
            cohort = Cohort(_settled(new, shop, path.parent) for _, new in pairs)
            found = [checked[one.item] for one in good]
            if run is not None:
                write_names(names, pairs, key=key)
                cohort.to_csv(path)
                cohort.to_parquet(path.with_suffix(".parquet"))
                keep_facts(
                    path, config.columns, {case.case_id: one.facts for case, one in zip(cohort, good, strict=True)}
                )
                atomic_write(path.with_name("refused.csv"), refused_table(ledger))
                acquired = {case.case_id: one.facts for case, one in zip(cohort, found, strict=True)}
                atomic_write(path.with_name("acquisition.csv"), acquisition_table(acquired))
                atomic_write(path.with_name("scan.yaml"), dump_yaml(config.to_dict()))
                summaries = [_summary(case, one, pictures) for case, one in zip(cohort, found, strict=True)]
                write_cohort_report(path.with_name("report.html"), cases=summaries, ledger=ledger, warnings=warnings)
                shown = {task.thumbnail for task in tasks if task.item in checked and checked[task.item].may_be_shown}
                _remove_outdated(path, cohort, shown)
                told = {**ledger.counts(), **_facts(cohort, found), "warnings": list(warnings)}
                run.journal.log(command="scan", seconds=round(time.monotonic() - started, 2), **told)
    return ScanResult(cohort, ledger, path, warnings)


@contextmanager
def _workshop(out: Path, *, dry_run: bool) -> Iterator[tuple[Path, RunFolder | None]]:
    """Where series lists and unpacked archives go: beside the table, which is locked, or nowhere that stays."""
    if not dry_run:
        with RunFolder(out) as run:
            yield out, run
        return
    with tempfile.TemporaryDirectory(prefix="medssl-") as folder:
        yield Path(folder), None


def _listed(
    data: Path, shop: Path, *, config: ScanConfig, key: bytes, cache: Cache, ledger: Ledger, table: Path
) -> list[Listed]:
    """Cases from a table, or from a folder; what cannot be a case is booked, series lists are written."""
    if config.columns and config.table is None and data.suffix.lower() != ".csv":
        raise ConfigError(f"columns {', '.join(config.columns)}: there is no table to take them from. Give a table.")
    mine = (table.name, table.with_suffix(".parquet").name, *_OWN_FILES, *_OWN_FOLDERS)
    if data.suffix.lower() == ".csv":
        columns = config.columns if config.table is None else ()
        listed = listing.of_table(data, modality=config.modality, reading=config.reading, columns=columns)
    else:
        rules = Rules(
            label_suffixes=config.label_suffixes,
            image_glob=config.image_glob,
            follow_links=config.follow_links,
            volumes=config.volumes,
            regularise=config.regularise,
            workers=config.workers,
        )
        own = [table.parent / name for name in mine]
        seen = discover(data, rules=rules, key=key, unpack_to=shop / "unpacked", leave_out=own, cache=cache)
        listing.book(seen, ledger)
        if not seen.found and not seen.refused:
            raise NoInputError(
                f"{data}: none of {len(seen.ignored)} files is an image that medssl reads "
                f"(DICOM, {', '.join(io.IMAGE_SUFFIXES)}). Give the folder of the images.",
            )
        folder = shop / "series"
        listed = listing.of_folder(seen.found, modality=config.modality, reading=config.reading, series=folder)
        for path, item in {Path(one.case.image): one.series for one in listed}.items():
            if item is not None:
                write_list(item, path)
    if config.table is not None:
        given = listing.find_table(config.table, data)
        listed = listing.with_table(listed, given, ledger, columns=config.columns)
    listed = listing.expanded(listed, config.volumes, cache=cache, workers=config.workers)
    return listing.without_twins(listed, ledger)


def _with_kept_subjects(listed: Sequence[Listed]) -> list[Listed]:
    """A name that the user gave to a subject once holds for all its cases, or it would be two subjects."""
    given = {one.case.subject_id for one in listed if one.keeps_subject}
    return [replace(one, keeps_subject=one.case.subject_id in given) for one in listed]


def _renamed(one: Listed, config: ScanConfig, *, key: bytes) -> Case:
    if config.names == "keep":
        return one.case
    return renamed(one.case, key=key, keeps_case=one.keeps_case, keeps_subject=one.keeps_subject)


def _under_new_names(good: Sequence[Listed], cohort: Cohort, ids: Mapping[str, Case]) -> list[tuple[Case, Case]]:
    """Each case under its own and its new name, both with the split that it was dealt."""
    both = zip(good, cohort, strict=True)
    return [(old, ids[one.item].model_copy(update={"split": old.split})) for one, old in both]


def _task(one: Listed, new: Case, config: ScanConfig, pictures: Path | None) -> Task:
    picture = None if pictures is None else pictures / f"{new.case_id}.png"
    image = (Path(one.case.image),) if one.series is None else one.series.paths
    label = (Path(one.case.label),) if one.case.label else ()
    return Task(one.item, one.case, image + label, config.label_values, config.burned_in, picture)


def _without_duplicates(listed: Sequence[Listed], checked: Mapping[str, Checked], ledger: Ledger) -> list[Listed]:
    """One of each set of equal images: the labelled one, else the first."""
    first: dict[str, str] = {}
    for one in sorted(listed, key=lambda one: one.case.label is None):
        kept = first.setdefault(checked[one.item].content, one.item)
        if kept != one.item:
            ledger.duplicate(one.item, f"the same voxels as {kept}")
    kept_items = set(first.values())
    return [one for one in listed if one.item in kept_items]


def _without_leaks(listed: Sequence[Listed], ledger: Ledger) -> list[Listed]:
    """Cases of subjects that a table puts into one split."""
    leaks = split_leaks(one.case for one in listed)
    for one in listed:
        if one.case.subject_id in leaks:
            ledger.reject(one.item, leak_error(one.case.subject_id, leaks[one.case.subject_id]))
    return [one for one in listed if one.case.subject_id not in leaks]


def _of_whom(listed: Sequence[Listed], cohort: Cohort) -> tuple[str, ...]:
    """Warn if nothing says for sure whose the images are, or if all are of one subject; give the sentences."""
    found = []
    folders, unknown = (sum(one.whose == how for one in listed) for how in ("folder", "unknown"))
    subjects = len({case.subject_id for case in cohort})
    if folders + unknown:
        found.append(
            f"W_SUBJECT: whose image it is was guessed for {folders + unknown} of {len(listed)} images ({folders} by "
            f"their folder, {unknown} taken as a subject of their own; {subjects} subjects). A person in two splits "
            "spoils every score: if that may be, give a table with case_id and subject_id."
        )
    if subjects == 1 and len(cohort) >= _FEW_CASES:
        found.append(
            f"W_ONE_SUBJECT: all {len(cohort)} images count as one subject's, so no split can be made. If the export "
            "gave all patients one number, give a table with case_id and subject_id."
        )
    for warning in found:
        _log.warning(warning)
    return tuple(found)


def _settled(case: Case, shop: Path, out: Path) -> Case:
    """The case with the paths that it would have if this were no dry run."""
    paths = {"image": case.image, "label": case.label}
    return case.model_copy(
        update={name: path and path.replace(str(shop.absolute()), str(out.absolute())) for name, path in paths.items()}
    )


def _remove_outdated(table: Path, cohort: Cohort, shown: Collection[Path | None]) -> None:
    """Take away pictures of cases that are gone; and, if no other table lies here that may need them, their lists."""
    for picture in table.with_name("thumbnails").glob("*.png"):
        if picture not in shown:
            remove(picture)
    if {other.name for other in table.parent.glob("*.csv")} <= {table.name, *_OWN_FILES}:
        lists = {Path(case.image).name for case in cohort}
        for path in table.with_name("series").glob(f"*{SUFFIX}"):
            if path.name not in lists:
                remove(path)


def _summary(case: Case, found: Checked, pictures: Path | None) -> CaseSummary:
    picture = None if pictures is None else pictures / f"{case.case_id}.png"
    return CaseSummary(
        case_id=case.case_id,
        subject_id=case.subject_id,
        modality=case.modality,
        split=case.split,
        shape=found.shape,
        spacing_mm=found.spacing_mm,
        orientation=found.orientation,
        unit=found.unit,
        low=found.low,
        high=found.high,
        minimum=found.minimum,
        maximum=found.maximum,
        has_label=case.label is not None,
        label_values=found.labels,
        warnings=found.warnings,
        thumbnail=picture.read_bytes() if picture is not None and found.may_be_shown else None,
        has_spacing=found.has_spacing,
    )


def _facts(cohort: Cohort, checked: Sequence[Checked]) -> dict[str, Any]:
    """What the journal tells of the cohort."""
    spacings = np.array([one.spacing_mm for one in checked]).reshape(-1, 3)
    return {
        "subjects": len({case.subject_id for case in cohort}),
        "labelled": len(cohort.select(labelled=True)),
        "splits": {split: len(cohort.select(split=split)) for split in ("train", "val", "test")},
        "orientations": sorted({one.orientation for one in checked}),
        "spacing_mm_least": spacings.min(axis=0, initial=np.inf).tolist() if len(spacings) else [],
        "spacing_mm_most": spacings.max(axis=0, initial=0).tolist() if len(spacings) else [],
        "label_values": sorted({value for one in checked for value in one.labels}),
    }
