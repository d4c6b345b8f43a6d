"""The cases of a scan before a voxel is read: from a table of cases, or from what a folder holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medssl import pool
from medssl.data.cohort import Case, Modality, read_rows
from medssl.data.discover import Discovery, Found, Whose
from medssl.data.facts import Facts, read_facts
from medssl.data.incremental import Cache, fingerprint
from medssl.data.reading import Reading, read_image
from medssl.data.rows import read_table, table_error
from medssl.data.series import Series, Volumes
from medssl.errors import CaseError, ConfigError, MedSSLError
from medssl.io.dicom.model import Item
from medssl.ledger import Ledger

_SUBJECT_COLUMNS = ("subject_id", "subject_group")
_SPLIT_COLUMNS = ("split", "suggested_split")


@dataclass(frozen=True)
class Listed:
    """One case before its voxels were read.

    Args:
        item: Its name in the ledger.
        case: Under the names that files, tables or headers give.
        warnings: ``W_CODE: sentence`` strings.
        whose: How its subject is known.
        keeps_case: Whether the user gave the case its name.
        keeps_subject: Likewise for the subject.
        series: The DICOM item that it is a volume of.
        facts: What the table says of it in the columns that were asked for.
    """

    item: str
    case: Case
    warnings: tuple[str, ...] = ()
    whose: Whose = "told"
    keeps_case: bool = False
    keeps_subject: bool = False
    series: Item | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def of_table(table: Path, *, modality: Modality, reading: Reading, columns: Sequence[str] = ()) -> list[Listed]:
    """Cases of a CSV; what it does not say is as for the whole scan.

    Args:
        table: The CSV.
        modality: Of those that do not state it.
        reading: Choices for all.
        columns: Those that are facts.

    Raises:
        ReadError: if the file cannot be read.
        CaseError: E_TABLE with the line number.
    """
    cases = []
    facts = read_facts(table, columns) if columns else Facts()
    for _, case in read_rows(table, also=columns):
        own = case.reading.model_dump(exclude_defaults=True)
        given = {"reading": reading.model_copy(update=own), "modality": case.modality}
        if case.modality == "other":
            given["modality"] = modality
        cases.append(case.model_copy(update=given))
    whose: Whose = "told" if any(case.subject_id != case.case_id for case in cases) else "unknown"
    return [
        Listed(case.case_id, case, (), whose, keeps_case=True, keeps_subject=True, facts=facts.of(case.case_id))
        for case in cases
    ]


def of_folder(found: Sequence[Found], *, modality: Modality, reading: Reading, series: Path) -> list[Listed]:
    """Cases of what a folder holds.

    Args:
        found: Images.
        modality: Of those that do not state it.
        reading: Choices for all.
        series: Folder in which the series lists are to be.
    """
    return [
        Listed(
            one.item,
            Case(
                case_id=one.case_id,
                subject_id=one.subject_id,
                image=str((one.image if one.series is None else series / one.image).absolute()),
                label=str(one.label.absolute()) if one.label else None,
                modality=one.modality or modality,
                reading=_reading(one, reading),
            ),
            one.warnings,
            one.whose,
            series=one.series,
        )
        for one in found
    ]


def book(seen: Discovery | Series, ledger: Ledger) -> None:
    """Book what cannot be a case."""
    for item, error in seen.refused:
        ledger.expect(item)
        ledger.reject(item, error)
    for item, reason in seen.ignored:
        ledger.expect(item)
        ledger.ignore(item, reason)
    for item, other in seen.duplicates:
        ledger.expect(item)
        ledger.duplicate(item, f"the same DICOM image as {other}")


def find_table(table: str, data: Path) -> Path:
    """The table where it says, else in the scanned folder.

    Raises:
        ConfigError: E_NO_TABLE.
    """
    for path in (Path(table), data / table):
        if path.is_file():
            return path
    raise ConfigError(f"table {table}: no such file, neither here nor in {data}. Give its path.", code="E_NO_TABLE")


def with_table(listed: Sequence[Listed], path: Path, ledger: Ledger, *, columns: Sequence[str] = ()) -> list[Listed]:
    """Subjects, splits, modalities and facts from a table; its rows without an image are booked as ignored.

    Args:
        listed: Cases of a folder.
        path: The table.
        ledger: Where rows without an image are booked.
        columns: Those that are facts.

    Raises:
        CaseError: E_TABLE, if it names no image at all, one twice, or something impossible.
    """
    facts = read_facts(path, columns) if columns else Facts()
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
        names_subject = bool(told) or case.subject_id == case.case_id
        whose: Whose = "told" if told else one.whose
        merged.append(
            replace(
                one,
                case=case,
                whose=whose,
                keeps_case=True,
                keeps_subject=names_subject,
                facts=facts.of(one.case.case_id),
            )
        )
    for case_id, (line, _) in rows.items():
        item = f"{path.name} line {line}: {case_id}"
        ledger.expect(item)
        ledger.ignore(item, "the table names it, and there is no image of that name")
    return merged


def expanded(listed: Sequence[Listed], volumes: Volumes, *, cache: Cache, workers: int) -> list[Listed]:
    """The cases, with as many for a file of several volumes as ``volumes`` asks for; DICOM has its own already.

    Args:
        listed: One a file.
        volumes: ``first``, ``middle`` or ``all``; anything else changes nothing.
        cache: How many volumes files hold that have not changed.
        workers: Processes; 0 chooses by the machine.
    """
    if volumes not in {"first", "middle", "all"}:
        return list(listed)
    counts = _volume_counts(listed, cache, workers=workers)
    result: list[Listed] = []
    for one in listed:
        count = counts.get(one.item, 1)
        if count == 1:
            result.append(one)
            continue
        numbers = {"first": [0], "middle": [count // 2], "all": list(range(count))}[volumes]
        left_out = () if len(numbers) > 1 else (f"W_VOLUMES: number {numbers[0]} of {count} volumes is taken.",)
        for number in numbers:
            reading = one.case.reading.model_copy(update={"volume": number})
            name = f"-{number:03d}" if len(numbers) > 1 else ""
            update = {"case_id": one.case.case_id + name, "reading": reading}
            case = one.case.model_copy(update=update)
            result.append(replace(one, item=one.item + name, case=case, warnings=one.warnings + left_out))
    return result


def without_twins(listed: Sequence[Listed], ledger: Ledger) -> list[Listed]:
    """The cases whose id is theirs alone; the others are booked as refused."""
    counts = Counter(one.case.case_id for one in listed)
    for one in listed:
        if counts[one.case.case_id] > 1:
            ledger.expect(one.item)
            text = f"{one.item}: {counts[one.case.case_id]} images would be the case {one.case.case_id}; ids are "
            ledger.reject(one.item, CaseError(f"{text}unique. Rename one file.", code="E_NAME_CLASH"))
    return [one for one in listed if counts[one.case.case_id] == 1]


def _volume_counts(listed: Sequence[Listed], cache: Cache, *, workers: int) -> dict[str, int]:
    """How many volumes each file holds that may hold several."""
    plain = [one for one in listed if one.series is None and one.case.reading.volume is None]
    marks = {one.item: fingerprint([Path(one.case.image)], {"volumes of": one.case.reading.to_text()}) for one in plain}
    counts: dict[str, int] = {}
    for item, mark in marks.items():
        known = cache.checked(mark)
        if known is not None and not isinstance(known, MedSSLError) and isinstance(known.get("volumes"), int):
            counts[item] = known["volumes"]
    new = [one for one in plain if one.item not in counts]
    for one, answer in pool.run(_count_volumes, new, name=lambda one: one.item, workers=workers):
        counts[one.item] = 1 if isinstance(answer, MedSSLError) else answer  # the examination names the fault
        cache.keep_check(marks[one.item], answer if isinstance(answer, MedSSLError) else {"volumes": answer})
    return counts


def _count_volumes(one: Listed) -> int:
    first = one.case.reading.model_copy(update={"volume": 0})
    return read_image(Path(one.case.image), first)[1].volumes


def _reading(found: Found, reading: Reading) -> Reading:
    return reading if found.series is None else reading.model_copy(update={"volume": found.volume})


def _first(row: dict[str, str], columns: tuple[str, ...]) -> str:
    return next((row[name] for name in columns if row.get(name)), "")
