"""Cases that look alike to an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import ConfigError
from medssl.evaluation.embeddings import Embeddings, unit_vectors
from medssl.ledger import csv_text
from medssl.report.page import Section, write_report
from medssl.report.thumbnails import render
from medssl.runfolder import atomic_write
from medssl.volume import Volume

COLUMNS = ("rank", "case_id", "subject_id", "split", "cosine")


@dataclass(frozen=True)
class SimilarResult:
    """The most similar cases.

    Args:
        table: ``rank, case_id, subject_id, split, cosine``, the most similar first.
        written: Files that were written.
    """

    table: pd.DataFrame
    written: tuple[Path, ...] = ()


def similar(
    embeddings: Path,
    *,
    case: str,
    top: int = 10,
    others_only: bool = False,
    store: Path | None = None,
    out: Path | None = None,
    dry_run: bool = False,
) -> SimilarResult:
    """Find the cases whose vectors have the largest cosine with that of one case.

    Each feature is brought to mean 0 and spread 1 over all cases first, so that what all have in common does not count.

    Args:
        embeddings: What ``embed`` wrote; a case with several vectors is their mean.
        case: Case id.
        top: How many are wanted.
        others_only: Leave out other images of the same subject.
        store: The store that was embedded, for pictures.
        out: The ``.html`` page; a CSV with the same numbers lies beside it. None writes nothing.
        dry_run: Find, and write nothing.

    Raises:
        ConfigError: E_NO_CASE, if there is no such case; or if ``top`` is below 1.
        ReadError: if the table or the store cannot be read.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; at least 1 is needed.")
    found = Embeddings.read(embeddings).by_case()
    cases = found.table["case_id"].astype(str).tolist()
    if case not in cases:
        raise ConfigError(
            f"case {case}: not among the {len(cases)} embedded cases. Take an id of the store's index.csv.",
            code="E_NO_CASE",
        )
    table = _nearest(found, cases.index(case), top, others_only=others_only)
    if out is None or dry_run:
        return SimilarResult(table)
    numbers = out.with_suffix(".csv")
    atomic_write(numbers, csv_text(COLUMNS, table.itertuples(index=False)))
    stored = {} if store is None else {item.case_id: item for item in ArrayStore.open(store).cases}
    atlas = {name: picture(stored[name]) for name in (case, *table["case_id"]) if name in stored}
    own = {f"{case}": atlas[case]} if case in atlas else {}
    shown = {
        f"{row['rank']}. {row['case_id']}, cosine {row['cosine']:.3f}": atlas[row["case_id"]]
        for row in table.to_dict("records")
        if row["case_id"] in atlas
    }
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    sections = [
        Section("The case", text=[f"Case {case}, of {len(cases)} embedded cases."], pictures=own),
        Section("Most similar", text=[f"The numbers are those of {numbers.name}."], table=rows, pictures=shown),
    ]
    return SimilarResult(table, (write_report(out, f"Cases similar to {case}", sections=sections), numbers))


def picture(case: StoredCase, *, size: int = 128) -> bytes:
    """The middle planes of a stored image, as PNG."""
    image = case.read("image", (0, 0, 0), case.shape)
    return render(Volume(image, case.geometry, "HU" if case.unit == "HU" else "arbitrary"), size=size)


def _nearest(found: Embeddings, place: int, top: int, *, others_only: bool) -> pd.DataFrame:
    unit = unit_vectors(found.vectors)[0]
    cosine = unit @ unit[place]
    is_kept = np.arange(len(unit)) != place
    if others_only:
        is_kept &= (found.table["subject_id"] != found.table["subject_id"].iloc[place]).to_numpy()
    order = [number for number in np.argsort(-cosine, kind="stable").tolist() if is_kept[number]][:top]
    table = found.table.loc[order, ["case_id", "subject_id", "split"]].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(order) + 1))
    return table.assign(split=table["split"].fillna(""), cosine=cosine[order])
