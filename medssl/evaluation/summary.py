"""Means of the scores of cases with intervals over subjects, and what they say in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from medssl.evaluation.metrics import Presence
from medssl.evaluation.statistics import cluster_bootstrap

METRICS = (
    "dice", "nsd", "nsd_area", "hd95_mm", "hd_mm", "assd_mm", "volume_error_ml", "volume_error_percent",
)  # fmt: skip
ALL_STRUCTURES = "all"


def summarise(cases: pd.DataFrame, *, bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean of every metric with a 95 % interval over subjects, for each structure and for all together.

    Args:
        cases: One row a case and structure: ``case_id, subject_id, label, presence`` and those of :data:`METRICS` that
            were measured.
        bootstrap: Draws of subjects.
        seed: Of the draws.

    Returns:
        Columns ``label, metric, mean, low, high, cases, subjects, missed, invented, neither, note``. ``cases`` and
        ``subjects`` are those in the mean; ``note`` says what is not, and why a number is empty. For all structures
        together a case counts with the mean over its structures, and the counts are of structures.
    """
    metrics = [name for name in METRICS if name in cases.columns]
    seen = cases[cases["presence"] != Presence.NEITHER.value]
    together = seen.groupby(["case_id", "subject_id"], as_index=False)[metrics].mean()
    parts = [(str(label), seen[seen["label"] == label], part) for label, part in cases.groupby("label")]
    if len(parts) > 1:
        parts.append((ALL_STRUCTURES, together, cases))
    rows = []
    for label, scored, part in parts:
        counts = part["presence"].value_counts()
        presence = {name.value: int(counts.get(name.value, 0)) for name in Presence if name is not Presence.BOTH}
        for metric in metrics:
            interval = (np.nan,) * 3
            known = scored[scored[metric].notna()]
            subjects = known["subject_id"].tolist()
            if len(known):
                interval = cluster_bootstrap(known[metric].to_numpy(), subjects, num=bootstrap, seed=seed)
            mean, low, high = interval
            rows.append(
                {
                    "label": label, "metric": metric, "mean": mean, "low": low, "high": high,
                    "cases": len(known), "subjects": len(set(subjects)), **presence,
                    "note": _note(num_scored=len(scored), num_known=len(known), num_subjects=len(set(subjects))),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def sentence(label: str, part: pd.DataFrame) -> str:
    """What the rows of one structure say.

    Args:
        label: The structure, or :data:`ALL_STRUCTURES`.
        part: Its rows of what :func:`summarise` gave.
    """
    rows = {str(row["metric"]): row for _, row in part.iterrows()}
    first = rows["dice"]
    name = "All structures" if label == ALL_STRUCTURES else f"Label {label}"
    if first["cases"] == 0:
        return f"{name}: in no reference and no prediction of {first['neither']} cases."
    return (
        f"{name}: Dice {_shown(rows['dice'], 3)}, surface Dice {_shown(rows['nsd'], 3)}, HD95 "
        f"{_shown(rows['hd95_mm'], 2, ' mm')} over {first['cases']} cases of {first['subjects']} subjects; "
        f"{first['missed']} missed, {first['invented']} invented, {first['neither']} rightly empty."
    )


def group_sentences(subgroups: pd.DataFrame) -> list[str]:
    """The groups with the lowest and the highest Dice of each column.

    Args:
        subgroups: What :func:`medssl.evaluation.subgroups.by_group` gave for :func:`summarise`.
    """
    found = []
    dice = subgroups[(subgroups["metric"] == "dice") & subgroups["mean"].notna()]
    for column, part in dice.groupby("column", sort=False):
        labels = part["label"].unique()
        label = ALL_STRUCTURES if ALL_STRUCTURES in labels else labels[0]
        rows = part[part["label"] == label].sort_values("mean", kind="stable")
        if len(rows) > 1:
            low, high = (_group(rows.iloc[place]) for place in (0, -1))
            name = "all structures" if label == ALL_STRUCTURES else f"label {label}"
            found.append(f"By {column}, mean Dice of {name} runs from {low} to {high}; see subgroups.csv.")
    return found


def _group(row: pd.Series[Any]) -> str:
    few = ", too few to tell" if row["few"] else ""
    return f"{row['mean']:.3f} ({row['group']}, {row['group_subjects']} subjects{few})"


def _note(*, num_scored: int, num_known: int, num_subjects: int) -> str:
    if not num_scored:
        return "in neither map of any case"
    if not num_known:
        return "not defined for any case"
    notes = [f"not defined for {num_scored - num_known} cases"] if num_known < num_scored else []
    return "; ".join([*notes, *(["one subject: no interval"] if num_subjects < 2 else [])])


def _shown(row: pd.Series[Any], digits: int, unit: str = "") -> str:
    if np.isnan(row["mean"]):
        return "not measured"
    if np.isnan(row["low"]):
        return f"{row['mean']:.{digits}f}{unit}"
    return f"{row['mean']:.{digits}f}{unit} (95 % interval {row['low']:.{digits}f} to {row['high']:.{digits}f})"
