"""The page of a probe: what was read, from how few labels, and what should not be readable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.report.figures import label_curve
from medssl.report.page import Section, write_report

_MAIN = ("balanced_accuracy", "r2")


def write_page(
    path: Path,
    target: str,
    tables: Mapping[str, pd.DataFrame],
    *,
    sentences: Sequence[str],
    about: Mapping[str, Any],
) -> Path:
    """Write the report; every number in it stands in one of the tables, each a CSV beside it.

    Args:
        path: The ``.html``.
        target: The column that was read.
        tables: ``metrics``, ``few_shot``, ``shortcuts`` and ``health``.
        sentences: What was found, in words.
        about: Of the embeddings.
    """
    metric = next(name for name in _MAIN if (tables["metrics"]["metric"] == name).any())
    few = tables["few_shot"]
    few = few[few["metric"] == metric].dropna(subset=["value"])
    spread = few.groupby(["reader", "shots"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for reader, shots, mean, low, high in spread.itertuples(index=False):
        curves.setdefault(str(reader), []).append((int(shots), float(mean), float(low), float(high)))
    named = metric.replace("_", " ")
    pictures = {}
    if curves:
        caption = f"{named} from few labelled subjects; bars from lowest to highest seed"
        pictures[caption] = label_curve(curves, ylabel=named)
    origin = "fresh weights" if about.get("scratch") else f"a bundle trained by {about.get('method')}"
    sections = [
        Section("In words", text=[*sentences, f"Embeddings: {about.get('level')} level, of {origin}."]),
        Section("Readers", text=[_HOW], table=_rows(tables["metrics"])),
        Section(
            "Few labelled subjects",
            text=[_FEW.format(metric=named.capitalize())],
            table=_rows(spread),
            pictures=pictures,
        ),
        Section("Shortcuts", text=[_SHORT], table=_rows(tables["shortcuts"])),
        Section("Health of the embedding", text=[_HEALTH], table=_rows(tables["health"])),
    ]
    return write_report(path, f"What the embedding knows of {target}", sections=sections)


def _rows(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows of a table, with an empty cell where a number is not defined."""
    return [
        {str(key): "" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]


_HOW = (
    "metrics.csv, made of predictions.csv. Intervals are 95 %, subjects drawn with replacement. AUROC is of each class "
    "against the others, mean over classes. majority and mean read nothing: they are chance."
)
_FEW = (
    "few_shot.csv, made of few_shot_predictions.csv. {metric} from so many labelled subjects of each class (in all, "
    "for numbers), the smaller sets within the larger, over several draws; numbers that a class does not have are left "
    "out."
)
_SHORT = (
    "shortcuts.csv, made of shortcut_predictions.csv. Balanced accuracy of a linear reader fitted on other subjects. "
    "tied is Cramér's V between column and target."
)
_HEALTH = (
    "health.csv, of the mean vector of each case. RankMe can be compared only between embeddings of the same number of "
    "dimensions and cases."
)
