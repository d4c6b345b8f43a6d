"""Find images and labels in a folder or a table, read and check each one, and write the cohort."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medssl import io
from medssl.config import Config, dump_yaml
from medssl.data import pool
from medssl.data.cohort import Case, Cohort, Modality, leak_error, read_rows, read_table, split_leaks, table_error
from medssl.data.discover import Whose, discover
from medssl.data.prepare import matched_label
from medssl.data.store import label_values
from medssl.errors import CaseError, ConfigError, MedSSLError, NoInputError
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.runfolder import Journal, atomic_path, atomic_write, make_folder
from medssl.volume import Volume, reorient

_SUBJECT_COLUMNS = ("subject_id", "subject_group")
_SPLIT_COLUMNS = ("split", "suggested_split")
_NO_SPLIT = "W_NO_SPLIT: other cases have a split and this one has none; it is in no split."

_log = logging.getLogger(__name__)


class ScanConfig(Config):
    """How a folder is looked through.

    Args:
        modality: Of all cases, unless a table says otherwise.
        table: CSV with ``case_id`` and any of ``subject_id`` (or ``subject_group``), ``split`` (or
            ``suggested_split``) and ``modality``; rows with a ``kind`` other than ``image`` are skipped. Looked for
            where it says, else in the scanned folder.
        image_glob: Only paths that match are images.
        label_suffixes: How names of label maps end, before the file type.
        label_values: The values that a label may have beside 0; any by default.
        pseudonymise: Replace case and subject ids by keyed hashes; the key and the names stay in
            ``pseudonyms.json``, readable by its owner only. Paths in the tables of the scan keep the files' own names.
        fractions: Shares of subjects in train, val and test, where no table gives splits.
        seed: Of that split.
        follow_links: Whether links that lead out of the folder are followed.
        xform: Which NIfTI transform to believe where the two disagree; by default such files are refused.
        assume_spacing_mm: Voxel size of files that state none.
        workers: Processes; 0 chooses by the machine.
    """

    modality: Modality = "other"
    table: str | None = None
    image_glob: str | None = None
    label_suffixes: tuple[str, ...] = ("_seg", "-seg", "_dseg", "_label", "-label", "_labels", "_mask", "-mask")
    label_values: tuple[int, ...] | None = None
    pseudonymise: bool = False
    fractions: dict[str, float] = Field({"train": 0.7, "val": 0.1, "test": 0.2})
    seed: int = Field(0, ge=0)
    follow_links: bool = False
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None
    workers: int = Field(0, ge=0)


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

    Layouts: the decathlon's (imagesTr, labelsTr, imagesTs), BIDS-like trees, plain folders with ``images`` and
    ``labels`` or with label maps named like their image, or a CSV with ``case_id,image`` and any of ``label``,
    ``subject_id``, ``modality``, ``split``. A subject is what the table says, else ``sub-XX``, else the outermost
    folder that several but not all images share, else the case; W_SUBJECT tells of the last two.

    Args:
        data: Folder or CSV.
        out: The table to write (``.csv``), or a folder for ``cohort.csv``. Beside it come the same as Parquet,
            ``refused.csv``, ``scan.yaml`` and ``journal.jsonl``.
        config: Rules for names, labels and splits.
        dry_run: Check everything, but write nothing.

    Returns:
        Accepted cases with their splits, and the ledger.

    Raises:
        NoInputError: if there is nothing that looks like an image.
        CaseError: E_TABLE, if a table is not what it should be.
    """
    started = time.monotonic()
    path = out if out.suffix == ".csv" else out / "cohort.csv"
    if not dry_run:
        make_folder(path.parent)
    ledger = Ledger()
    listed = _listed(data, config, ledger)
    if config.table is not None:
        listed = _with_table(listed, _find_table(config.table, data), ledger)
    for one in listed:
        ledger.expect(one.item)
    finished = pool.run(_check, listed, name=lambda one: one.item, workers=config.workers)
    checked: dict[str, _Checked] = {}
    for one, result in track(finished, "scan", total=len(listed)):
        if isinstance(result, MedSSLError):
            ledger.reject(one.item, result)
        else:
            checked[one.item] = result
    good = _without_duplicates([one for one in listed if one.item in checked], checked, ledger)
    good = _without_leaks(good, ledger)
    has_splits = any(one.case.split for one in good)
    for one in good:
        unsplit = (_NO_SPLIT,) if has_splits and one.case.split is None else ()
        ledger.accept(one.item, warnings=one.warnings + checked[one.item].warnings + unsplit)
    ledger.check()
    cohort = Cohort(one.case for one in good)
    warnings = _of_whom(good, cohort)
    for warning in warnings:
        _log.warning(warning)
    if not has_splits:
        cohort = cohort.split_by_subject(config.fractions, seed=config.seed)
    if not dry_run:
        if config.pseudonymise:
            cohort = _pseudonymised(cohort, path.with_name("pseudonyms.json"))
        cohort.to_csv(path)
        cohort.to_parquet(path.with_suffix(".parquet"))
        refused = ledger.to_csv(Outcome.REJECTED, Outcome.DUPLICATE, Outcome.WARNED, Outcome.IGNORED)
        atomic_write(path.with_name("refused.csv"), refused)
        atomic_write(path.with_name("scan.yaml"), dump_yaml(config.to_dict()))
        journal = Journal(path.with_name("journal.jsonl"))
        facts = {**_facts(cohort, [checked[one.item] for one in good]), "warnings": list(warnings)}
        journal.log(command="scan", seconds=round(time.monotonic() - started, 2), **ledger.counts(), **facts)
        journal.close()
    return ScanResult(cohort, ledger, path, warnings)


@dataclass(frozen=True)
class _Listed:
    """One case before its voxels were read; ``item`` is its name in the ledger."""

    item: str
    case: Case
    config: ScanConfig
    warnings: tuple[str, ...] = ()
    whose: Whose = "told"


@dataclass(frozen=True)
class _Checked:
    content: str
    spacing_mm: tuple[float, ...]
    orientation: str
    labels: tuple[int, ...]
    warnings: tuple[str, ...]


def _listed(data: Path, config: ScanConfig, ledger: Ledger) -> list[_Listed]:
    """Cases from a table, or from the names in a folder; what cannot be a case is booked."""
    if data.suffix.lower() == ".csv":
        cases = [_of_modality(case, config) for _, case in read_rows(data)]
        whose: Whose = "told" if any(case.subject_id != case.case_id for case in cases) else "unknown"
        return [_Listed(case.case_id, case, config, whose=whose) for case in cases]
    seen = discover(
        data,
        label_suffixes=config.label_suffixes,
        image_glob=config.image_glob,
        follow_links=config.follow_links,
    )
    for item, error in seen.refused:
        ledger.expect(item)
        ledger.reject(item, error)
    for item, reason in seen.ignored:
        ledger.expect(item)
        ledger.ignore(item, reason)
    if not seen.found and not seen.refused:
        raise NoInputError(
            f"{data}: none of {len(seen.ignored)} files is an image that medssl reads "
            f"({', '.join(io.IMAGE_SUFFIXES)}). Give the folder of the images.",
        )
    return [
        _Listed(
            found.item,
            Case(
                case_id=found.case_id,
                subject_id=found.subject_id,
                image=str(found.image.absolute()),
                label=str(found.label.absolute()) if found.label else None,
                modality=config.modality,
            ),
            config,
            found.warnings,
            found.whose,
        )
        for found in seen.found
    ]


def _of_modality(case: Case, config: ScanConfig) -> Case:
    return case.model_copy(update={"modality": config.modality}) if case.modality == "other" else case


def _find_table(table: str, data: Path) -> Path:
    for path in (Path(table), data / table):
        if path.is_file():
            return path
    raise ConfigError(f"table {table}: no such file, neither here nor in {data}. Give its path.", code="E_NO_TABLE")


def _with_table(listed: list[_Listed], path: Path, ledger: Ledger) -> list[_Listed]:
    """Subjects, splits and modalities from a table; its rows without an image are booked as ignored."""
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for line, row in read_table(path, required=("case_id",)):
        case_id = row["case_id"]
        if not case_id or row.get("kind", "image") != "image":
            continue
        if case_id in rows:
            raise table_error(path, line, f"case_id {case_id} was used in line {rows[case_id][0]}; ids are unique")
        rows[case_id] = line, row
    if listed and rows.keys().isdisjoint(one.case.case_id for one in listed):
        raise CaseError(
            f"{path}: none of its case_ids is that of an image; the first image has {listed[0].case.case_id}, the "
            f"first row {next(iter(rows), 'none')}. Write file names without folder and type.",
            code="E_TABLE",
        )
    merged = []
    for one in listed:
        found = rows.pop(one.case.case_id, None)
        if found is None:
            note = f"W_NOT_IN_TABLE: {path.name} has no row for {one.case.case_id}; its subject is a guess."
            merged.append(replace(one, warnings=(*one.warnings, note)))
            continue
        line, row = found
        given: dict[str, Any] = one.case.to_dict()
        told = _first(row, _SUBJECT_COLUMNS)
        given["subject_id"] = told or given["subject_id"]
        given["split"] = _first(row, _SPLIT_COLUMNS) or given["split"]
        given["modality"] = row.get("modality") or given["modality"]
        try:
            case = Case.parse(given, source=f"case {one.case.case_id}")
        except ConfigError as error:
            raise table_error(path, line, error.message.splitlines()[0]) from error
        merged.append(replace(one, case=case, whose="told" if told else one.whose))
    for case_id, (line, _) in rows.items():
        item = f"{path.name} line {line}: {case_id}"
        ledger.expect(item)
        ledger.ignore(item, "the table names it, and there is no image of that name")
    return merged


def _first(row: dict[str, str], columns: tuple[str, ...]) -> str:
    return next((row[name] for name in columns if row.get(name)), "")


def _check(one: _Listed) -> _Checked:
    """What a worker does with one case: read all of it, and see whether image and label fit."""
    case, config = one.case, one.config
    unit: Literal["HU", "arbitrary"] = "HU" if case.modality == "CT" else "arbitrary"
    read = partial(io.read_volume, xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)
    image, source = read(Path(case.image), unit=unit)
    warnings: list[str] = list(source.warnings)
    if image.array.min() == image.array.max():
        warnings.append("W_CONSTANT: every voxel has the same value.")
    values: list[int] = []
    if case.label is not None:
        label, label_source = read(Path(case.label), unit="label")
        warnings += label_source.warnings
        label = matched_label(image, label, item=one.item)
        values = label_values(label.array)
        if not values:
            warnings.append("W_EMPTY_LABEL: the label map is background only.")
        _check_values(one.item, label.array, values, config.label_values)
    geometry = image.geometry
    return _Checked(_content(image), geometry.spacing_mm, geometry.orientation, tuple(values), tuple(warnings))


def _content(image: Volume) -> str:
    """Hash of voxels and place, whatever the file type and the order of its axes."""
    turned = reorient(image)
    place = np.round(turned.geometry.affine, 3) + 0.0  # -0 becomes 0
    voxels = np.ascontiguousarray(turned.array, dtype=np.float32)
    return hashlib.sha256(repr((voxels.shape, place.tolist())).encode() + voxels.tobytes()).hexdigest()


def _check_values(item: str, label: np.ndarray, found: list[int], allowed: tuple[int, ...] | None) -> None:
    strange = [] if allowed is None else [value for value in found if value not in allowed]
    if strange:
        counts = ", ".join(f"{value} in {int((label == value).sum())} voxels" for value in strange[:5])
        raise CaseError(
            f"{item}: label value {counts}; only {', '.join(map(str, allowed or ()))} are expected. "
            "Correct the label, or label_values.",
            code="E_LABEL_SET",
        )


def _without_duplicates(listed: list[_Listed], checked: dict[str, _Checked], ledger: Ledger) -> list[_Listed]:
    """One of each set of equal images: the labelled one, else the first."""
    first: dict[str, str] = {}
    for one in sorted(listed, key=lambda one: one.case.label is None):
        kept = first.setdefault(checked[one.item].content, one.item)
        if kept != one.item:
            ledger.duplicate(one.item, f"the same voxels as {kept}")
    kept_items = set(first.values())
    return [one for one in listed if one.item in kept_items]


def _without_leaks(listed: list[_Listed], ledger: Ledger) -> list[_Listed]:
    """Cases of subjects that a table puts into one split."""
    leaks = split_leaks(one.case for one in listed)
    for one in listed:
        if one.case.subject_id in leaks:
            ledger.reject(one.item, leak_error(one.case.subject_id, leaks[one.case.subject_id]))
    return [one for one in listed if one.case.subject_id not in leaks]


def _of_whom(listed: list[_Listed], cohort: Cohort) -> tuple[str, ...]:
    """One sentence for the whole cohort if nothing says for sure whose the images are."""
    folders, unknown = (sum(one.whose == how for one in listed) for how in ("folder", "unknown"))
    if not folders + unknown:
        return ()
    subjects = len({case.subject_id for case in cohort})
    return (
        f"W_SUBJECT: whose image it is was guessed for {folders + unknown} of {len(listed)} images ({folders} by their "
        f"folder, {unknown} taken as a subject of their own; {subjects} subjects). A person in two splits spoils every "
        "score: if that may be, give a table with case_id and subject_id.",
    )


def _pseudonymised(cohort: Cohort, path: Path) -> Cohort:
    """Keyed hashes for ids; the key is kept, so that a later scan gives the same."""
    names: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"key": secrets.token_hex(16)}
    key = bytes.fromhex(names["key"])

    def hashed(kind: str, name: str) -> str:
        return f"{kind}-{hmac.digest(key, f'{kind}:{name}'.encode(), 'sha256').hex()[:16]}"

    renamed = [
        case.model_copy(
            update={"case_id": hashed("case", case.case_id), "subject_id": hashed("subject", case.subject_id)}
        )
        for case in cohort
    ]
    pairs = {new.case_id: [old.case_id, old.subject_id] for new, old in zip(renamed, cohort, strict=True)}
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({**names, "cases": {**names.get("cases", {}), **pairs}}, indent=1))
    return Cohort(renamed)


def _facts(cohort: Cohort, checked: list[_Checked]) -> dict[str, Any]:
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
