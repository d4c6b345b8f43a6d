"""Rows of strict CSV tables; apart from what reads images, so that a loader does not bring all readers into memory."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from medssl.errors import CaseError, ReadError

COLUMNS = ("case_id", "subject_id", "image", "label", "modality", "split", "reading")

_MANGLED = re.compile(r"^\d+(\.\d+)?E\+\d+$|^\d{1,2}-(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)$")


def read_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str] | None = None
) -> list[tuple[int, dict[str, str]]]:
    """Rows of a strict CSV with their line numbers.

    Args:
        path: UTF-8 text, comma separated, one header line.
        required: Columns that must be there.
        optional: The only further columns allowed; None allows any.

    Raises:
        ReadError: if the file cannot be read.
        CaseError: E_TABLE with the line number.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror}). Give the path of a CSV table.") from error
    except UnicodeDecodeError as error:
        raise table_error(
            path, data[: error.start].count(b"\n") + 1, "is not UTF-8 text; save the table as UTF-8"
        ) from error
    if "\0" in text:
        raise table_error(path, text[: text.index("\0")].count("\n") + 1, "a NUL byte; save the table as UTF-8 text")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = next(reader, [])
        missing = [name for name in required if name not in header]
        if missing:
            hint = "; it seems to be separated by semicolons" if len(header) == 1 and ";" in header[0] else ""
            raise table_error(path, 1, f"no column {', '.join(missing)}{hint}. Columns are {', '.join(header)[:200]!r}")
        unknown = [name for name in header if optional is not None and name not in optional]
        if unknown or len(set(header)) != len(header):
            raise table_error(
                path, 1, f"columns {', '.join(header)!r}; each once, and only {', '.join(optional or header)}"
            )
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise table_error(path, reader.line_num, f"{len(values)} cells; the header has {len(header)}")
            row = dict(zip(header, values, strict=True))
            for name in ("case_id", "subject_id"):
                if _MANGLED.match(row.get(name, "")):
                    raise table_error(
                        path, reader.line_num, f"{name} {row[name]!r} was changed by a spreadsheet; write it as text"
                    )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise table_error(path, reader.line_num, str(error)) from error
    return rows


def table_error(path: Path, line: int, fault: str) -> CaseError:
    """The error for one line of a table."""
    return CaseError(f"{path}: line {line}: {fault}. Correct the table.", code="E_TABLE")
