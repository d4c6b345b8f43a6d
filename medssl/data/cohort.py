"""The cohort: which images there are, whose they are, and in which split; always split by subject."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import Field

from medssl.config import Config
from medssl.data.reading import Reading
from medssl.data.rows import COLUMNS, read_table, table_error
from medssl.data.splits import Split
from medssl.errors import CaseError, ConfigError
from medssl.runfolder import atomic_path, atomic_write

Modality = Literal["CT", "MR", "PT", "US", "XR", "other"]


_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
_FORMULA = ("=", "+", "-", "@")


class Case(Config):
    """One sample on disk, under a pseudonym.

    Args:
        case_id: Unique in its cohort; letters, digits and ``. _ -``.
        subject_id: Whose image it is; all images of a subject share a split.
        image: Path of the image: a file, a folder of DICOM files, or a series list.
        label: Path of its label map, if there is one.
        modality: Decides nothing by itself; preparation refuses another one than its own.
        split: Where it belongs, if that is decided.
        reading: Choices by which image and label are read.
    """

    case_id: str = Field(pattern=_ID)
    subject_id: str = Field(pattern=_ID)
    image: str = Field(min_length=1)
    label: str | None = Field(None, min_length=1)
    modality: Modality = "other"
    split: Split | None = None
    reading: Reading = Reading()


class Cohort(Sequence[Case]):
    """An immutable sequence of cases.

    Args:
        cases: In any order; it is kept.

    Raises:
        CaseError: if a case id occurs twice (E_DUPLICATE_ID), or a subject in two splits (E_LEAK).
    """

    def __init__(self, cases: Iterable[Case]) -> None:
        self._cases = tuple(cases)
        seen: set[str] = set()
        for case in self._cases:
            if case.case_id in seen:
                raise CaseError(
                    f"case {case.case_id}: occurs twice; ids are unique. Rename one.", code="E_DUPLICATE_ID"
                )
            seen.add(case.case_id)
        leaks = split_leaks(self._cases)
        if leaks:
            subject, splits = next(iter(leaks.items()))
            raise leak_error(subject, splits, also=len(leaks) - 1)

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> Cohort: ...

    def __getitem__(self, index: int | slice) -> Case | Cohort:
        return Cohort(self._cases[index]) if isinstance(index, slice) else self._cases[index]

    def __len__(self) -> int:
        return len(self._cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cohort) and self._cases == other._cases

    def __hash__(self) -> int:
        return hash(self._cases)

    @classmethod
    def from_csv(cls, path: Path) -> Cohort:
        """Read a table of cases; paths in it are relative to its own folder.

        Columns: ``case_id``, ``image``, and any of ``subject_id`` (else the case id), ``label``, ``modality``,
        ``split`` and ``reading`` (JSON, such as ``{"volume": 3}``). UTF-8 with commas; a byte-order mark and CRLF are
        fine.

        Raises:
            ReadError: if the file cannot be read.
            CaseError: E_TABLE with the line number, E_LEAK, E_DUPLICATE_ID.
        """
        return cls(case for _, case in read_rows(path))

    def to_csv(self, path: Path) -> None:
        """Write the table that :meth:`from_csv` reads; paths below its folder become relative."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self._rows(path.parent))
        atomic_write(path, text.getvalue())

    def to_parquet(self, path: Path) -> None:
        """Write the same table as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = zip(*self._rows(path.parent), strict=True) if self._cases else [()] * len(COLUMNS)
        table = pa.table(
            dict(zip(COLUMNS, map(list, columns), strict=True)),
            schema=pa.schema([(name, pa.string()) for name in COLUMNS]),
        )
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    def select(self, *, split: Split | None = None, labelled: bool | None = None) -> Cohort:
        """Cases of one split, or with or without a label."""
        return Cohort(
            case
            for case in self._cases
            if (split is None or case.split == split) and (labelled is None or (case.label is not None) == labelled)
        )

    def split_by_subject(self, fractions: Mapping[str, float] | None = None, *, seed: int = 0) -> Cohort:
        """Give every case a split, all cases of a subject the same.

        Subjects are sorted by ``sha256(f"{seed}:{subject_id}")`` and dealt out in the order test, val, train, so that
        neither the order of files nor an added case of a known subject moves a subject. Each split with a fraction
        gets at least one subject while there are enough.

        Args:
            fractions: Share of subjects of ``train``, ``val`` and ``test``, summing to 1; .7, .1, .2 by default.
            seed: Chooses the order.
        """
        shares = dict(fractions) if fractions is not None else {"train": 0.7, "val": 0.1, "test": 0.2}
        if not set(shares) <= {"train", "val", "test"} or min(shares.values(), default=-1) < 0:
            raise ConfigError(f"split fractions {shares}: shares of train, val and test, none below 0, are needed.")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise ConfigError(f"split fractions {shares}: sum to {sum(shares.values()):g}; 1 is needed.")
        subjects = sorted({case.subject_id for case in self._cases}, key=lambda s: _order(seed, s))
        chosen = _deal(subjects, shares)
        return Cohort(case.model_copy(update={"split": chosen[case.subject_id]}) for case in self._cases)

    def _rows(self, folder: Path) -> list[tuple[str, ...]]:
        return [
            (
                case.case_id,
                case.subject_id,
                _relative(case.image, folder),
                _relative(case.label, folder) if case.label else "",
                case.modality,
                case.split or "",
                case.reading.to_text(),
            )
            for case in self._cases
        ]


def read_rows(path: Path, *, also: Sequence[str] = ()) -> list[tuple[int, Case]]:
    """Cases of a table with their line numbers, paths made absolute; no rule between rows is checked yet.

    Args:
        path: The table.
        also: Columns that it has beside those of a case; they are not read.

    Raises:
        ReadError: if the file cannot be read.
        CaseError: E_TABLE with the line number.
    """
    cases: list[tuple[int, Case]] = []
    seen: dict[str, int] = {}
    for line, row in read_table(path, required=("case_id", "image"), optional=(*COLUMNS, *also)):
        case_id = row["case_id"]
        if case_id in seen:
            raise table_error(path, line, f"case_id {case_id} was used in line {seen[case_id]}; ids are unique")
        seen[case_id] = line
        given: dict[str, Any] = {name: value for name, value in row.items() if value and name not in also}
        given.setdefault("subject_id", case_id)
        for name in ("image", "label"):
            if name in given:
                given[name] = os.path.abspath(path.parent / given[name])  # noqa: PTH100  links stay links
        try:
            if "reading" in given:
                given["reading"] = json.loads(given["reading"])
        except ValueError as error:
            raise table_error(path, line, 'reading is no JSON, such as {"volume": 3}') from error
        try:
            cases.append((line, Case.parse(given, source=f"case {case_id}")))
        except ConfigError as error:
            raise table_error(path, line, error.message.splitlines()[0]) from error
    return cases


def split_leaks(cases: Iterable[Case]) -> dict[str, list[str]]:
    """Subjects that occur in more than one split, with those splits."""
    splits: dict[str, set[str]] = {}
    for case in cases:
        if case.split is not None:
            splits.setdefault(case.subject_id, set()).add(case.split)
    return {subject: sorted(found) for subject, found in splits.items() if len(found) > 1}


def leak_error(subject: str, splits: Sequence[str], *, also: int = 0) -> CaseError:
    """The error for a subject in two splits; ``also`` counts further such subjects."""
    more = f" (and {also} more subjects)" if also else ""
    return CaseError(
        f"subject {subject}{more}: is in the splits {' and '.join(splits)}; a subject belongs to one, or the test is "
        "no test. Correct the split column.",
        code="E_LEAK",
    )


def _order(seed: int, subject: str) -> str:
    return hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest()


def _deal(subjects: Sequence[str], shares: Mapping[str, float]) -> dict[str, Split]:
    count = len(subjects)
    wanted = [name for name in ("test", "val", "train") if shares.get(name, 0) > 0]
    least = 1 if count >= len(wanted) else 0
    chosen: dict[str, Split] = {}
    start = 0
    for name in wanted:
        size = count - start if name == wanted[-1] else max(least, round(count * shares[name]))
        for subject in subjects[start : start + size]:
            chosen[subject] = name  # type: ignore[assignment]
        start += size
    return chosen


def _relative(target: str, folder: Path) -> str:
    base = os.path.abspath(folder)  # noqa: PTH100  links stay links
    absolute = os.path.abspath(target)  # noqa: PTH100
    path = os.path.relpath(absolute, base) if absolute.startswith(base + os.sep) else absolute
    return f"./{path}" if path.startswith(_FORMULA) else path
