"""Groups of cases by site, scanner, sex or age, and the same measure taken in each of them.

Groups come from a table of facts with ``case_id``. A text column gives one group a value. A column of numbers with more
than six different values is cut in bands, by default at the quartiles of the cases at hand; the edges are in the name
of the group, as in ``[18, 45)``, and the last band holds its upper edge. What is not stated is a group of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from medssl.data.rows import read_table
from medssl.errors import CaseError, ConfigError

NOT_STATED = "not stated"
FEW_SUBJECTS = 5

_MOST_VALUES = 6
_NO_VALUE = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown"})

Bands = Mapping[str, float | tuple[float, ...]]


def read_facts(paths: Sequence[Path]) -> pd.DataFrame:
    """Text columns of one or more tables, one row a case, ``case_id`` as index; of equal columns the first counts.

    Raises:
        ReadError: if a file cannot be read.
        CaseError: E_TABLE, if a line cannot be understood or a case has two rows in one table.
    """
    tables = []
    for path in paths:
        rows: dict[str, dict[str, str]] = {}
        for line, row in read_table(path, required=("case_id",)):
            if row["case_id"] in rows:
                raise CaseError(
                    f"{path}: line {line}: case {row['case_id']} has two rows; one is needed. Correct the table.",
                    code="E_TABLE",
                )
            rows[row["case_id"]] = row
        tables.append(pd.DataFrame.from_dict(rows, orient="index", dtype=str).drop(columns="case_id", errors="ignore"))
    facts = pd.concat(tables, axis=1) if tables else pd.DataFrame()
    return facts.loc[:, ~facts.columns.duplicated()].rename_axis("case_id")


def groups_of(
    facts: pd.DataFrame, columns: Sequence[str], *, case_ids: Sequence[str], bands: Bands | None = None
) -> pd.DataFrame:
    """Name of the group of each case in each column.

    Args:
        facts: Text columns by ``case_id``, as of :func:`read_facts`.
        columns: Those to group by.
        case_ids: Cases to group; one without a row is "not stated".
        bands: For columns of numbers, the width of the bands or all of their edges.

    Returns:
        One row for each of ``case_ids`` (index), and one column of names for each of ``columns``.

    Raises:
        ConfigError: if a column is not there, bands do not rise, or a width is not above 0.
        CaseError: E_TABLE, if a column that bands are given for holds a text.
    """
    missing = [name for name in (*columns, *(bands or {})) if name not in facts.columns]
    if missing:
        raise ConfigError(
            f"groups: no column {', '.join(missing)} in the table of facts; it has "
            f"{', '.join(facts.columns) or 'none'}. Name one of these, or scan with `--columns`."
        )
    own = facts.reindex(list(dict.fromkeys(case_ids)))
    return pd.DataFrame({name: _names(own[name], (bands or {}).get(name)) for name in columns}, index=own.index)


def by_group(
    table: pd.DataFrame, groups: pd.DataFrame, *, measure: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """What ``measure`` gives for the cases of each group.

    Args:
        table: Rows with ``case_id`` and ``subject_id``.
        groups: As of :func:`groups_of`.
        measure: Takes the rows of one group.

    Returns:
        Rows of ``measure`` after ``column, group, group_cases, group_subjects, few``; ``few`` marks groups of less than
        five subjects.
    """
    parts = []
    for column in groups.columns:
        own = table["case_id"].map(groups[column])
        for group in sorted(own.unique(), key=_order):
            rows = table[own == group]
            subjects = rows["subject_id"].nunique()
            part = measure(rows)
            heads = {
                "column": column,
                "group": group,
                "group_cases": rows["case_id"].nunique(),
                "group_subjects": subjects,
                "few": "few" if subjects < FEW_SUBJECTS else "",
            }
            for place, (name, value) in enumerate(heads.items()):
                part.insert(place, name, value)
            parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _names(values: pd.Series[str], bands: float | tuple[float, ...] | None) -> pd.Series[str]:
    text = values.fillna("").str.strip()
    text = text.mask(text.str.casefold().isin(_NO_VALUE), NOT_STATED)
    stated = text[text != NOT_STATED]
    numbers = pd.to_numeric(stated, errors="coerce").astype(float)
    strange = stated[~np.isfinite(numbers)]
    if len(strange):
        if bands is None:
            return text
        raise CaseError(
            f"groups: {values.name} of case {strange.index[0]} is {strange.iloc[0]!r}; bands need numbers. "
            "Correct the table, or take the column out of bands.",
            code="E_TABLE",
        )
    if bands is None and numbers.nunique() <= _MOST_VALUES:
        return text
    edges = _edges(numbers, bands, str(values.name))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, -1, len(edges) - 1)
    place[numbers == edges[-1]] = len(edges) - 2
    told = _told(edges)
    labels = [f"[{low}, {high})" for low, high in pairwise(told)]
    labels[-1] = labels[-1].replace(")", "]")
    outside = {-1: f"below {told[0]}", len(edges) - 1: f"above {told[-1]}"}
    names = [outside.get(index) or labels[index] for index in place.tolist()]
    return text.where(text == NOT_STATED, pd.Series(names, index=stated.index).reindex(text.index))


def _edges(numbers: pd.Series[float], bands: float | tuple[float, ...] | None, name: str) -> list[float]:
    """Rising edges, at least two."""
    if isinstance(bands, tuple):
        if len(bands) < 2 or any(high <= low for low, high in pairwise(bands)):
            raise ConfigError(f"bands.{name}: {list(bands)}; two or more rising edges are needed. Correct them.")
        return list(bands)
    if bands is not None:
        if bands <= 0:
            raise ConfigError(f"bands.{name}: a width of {bands:g}; it must be above 0. Correct it.")
        if numbers.empty:
            return [0.0, bands]
        first, last = math.floor(numbers.min() / bands), math.floor(numbers.max() / bands)
        return [bands * step for step in range(first, last + 2)]
    edges = np.unique(np.quantile(numbers, (0, 0.25, 0.5, 0.75, 1)))
    return [float(edge) for edge in edges]


def _told(edges: Sequence[float]) -> list[str]:
    """Edges as text, with more than six digits where they would look equal."""
    short = [f"{edge:g}" for edge in edges]
    return short if len(set(short)) == len(short) else [f"{edge:.15g}" for edge in edges]


def _order(group: str) -> tuple[int, float, str]:
    """Bands by their edge, then names; what is not stated comes last."""
    if group == NOT_STATED:
        return (2, 0.0, group)
    for prefix, rank in (("[", 0.0), ("below ", -1.0), ("above ", 1.0)):
        if group.startswith(prefix):
            try:
                number = float(group.removeprefix(prefix).split(",")[0])
            except ValueError:
                break
            return (0, number if rank == 0 else math.copysign(math.inf, rank), group)
    return (1, 0.0, group)
