"""What a user's own table says of each case beside its name: targets such as a diagnosis, and groups such as the site.

``facts.csv`` lies beside the cohort and in the store, with ``case_id`` and the columns that were named at the scan. An
empty cell is not stated; it is never a value.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medssl.data.rows import COLUMNS, read_table, table_error
from medssl.errors import ConfigError
from medssl.ledger import printable
from medssl.runfolder import atomic_write, remove

NAME = "facts.csv"

_FORMULA = ("=", "@")


class Facts(NamedTuple):
    """A table of facts.

    Args:
        columns: Every column but ``case_id``, in order.
        rows: For each case id, what is stated.
        digest: SHA-256 of the file; empty where there is none.
    """

    columns: tuple[str, ...] = ()
    rows: Mapping[str, Mapping[str, str]] = {}
    digest: str = ""

    def of(self, case_id: str) -> dict[str, str]:
        """What is stated of a case, by column."""
        return dict(self.rows.get(case_id, {}))


def read_facts(path: Path, columns: Sequence[str] | None = None) -> Facts:
    """Read a table with ``case_id`` and further columns; nothing where there is no such file and no column is named.

    Args:
        path: The table.
        columns: Those that are wanted; None takes all that are not the cohort's own.

    Raises:
        ConfigError: if a wanted column has a name that the cohort's own table uses.
        ReadError: if the file cannot be read.
        CaseError: E_TABLE with the line number, for a missing column, a case named twice, or a formula.
    """
    if columns is None and not path.exists():
        return Facts()
    taken = sorted(set(columns or ()) & set(COLUMNS))
    if taken:
        raise ConfigError(
            f"columns {', '.join(taken)}: the cohort has these already. Name the table's other columns, such as a "
            "diagnosis, age or site."
        )
    rows: dict[str, dict[str, str]] = {}
    found: Sequence[str] = list(dict.fromkeys(columns or ()))
    for line, row in read_table(path, required=("case_id", *found)):
        wanted = found if columns is not None else [name for name in row if name not in COLUMNS]
        cells = {name: printable(row[name].strip()) for name in wanted}
        if not row["case_id"]:
            continue
        if row["case_id"] in rows:
            raise table_error(path, line, f"case_id {row['case_id']} is there twice; each case has one row")
        formula = next((name for name, value in cells.items() if value.startswith(_FORMULA)), None)
        if formula is not None:
            raise table_error(path, line, f"{formula} is a formula; write its value")
        rows[row["case_id"]] = {name: value for name, value in cells.items() if value}
        found = wanted
    return Facts(tuple(found), rows, hashlib.sha256(path.read_bytes()).hexdigest())


def facts_of(cohort: Path) -> Facts:
    """The facts beside a cohort's table; none where there are none."""
    return read_facts(cohort.with_name(NAME))


def keep_facts(cohort: Path, columns: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> None:
    """Write ``facts.csv`` beside a cohort if columns were asked for.

    Where none were, a table that lies there stays: it may be the user's own.
    """
    if columns:
        write_facts(cohort.with_name(NAME), Facts(tuple(columns), rows), case_ids=rows)


def write_facts(path: Path, facts: Facts, *, case_ids: Iterable[str]) -> str:
    """Write the rows of the given cases, or take an older table away where there are no columns; give the digest."""
    if not facts.columns:
        remove(path)
        return ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case_id", *facts.columns))
    for case_id in case_ids:
        known = facts.of(case_id)
        writer.writerow((case_id, *(known.get(name, "") for name in facts.columns)))
    atomic_write(path, text.getvalue())
    return hashlib.sha256(text.getvalue().encode()).hexdigest()
