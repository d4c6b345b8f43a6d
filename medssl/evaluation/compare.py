"""Two models on the same cases: differences with intervals over subjects, p values, and Holm's correction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.errors import CaseError
from medssl.evaluation.answers import AnswersConfig, read_answers
from medssl.evaluation.delong import compare_aurocs
from medssl.evaluation.scorecard import ALL, Task, label_matrix, probability_matrix, truth_matrix
from medssl.evaluation.statistics import cluster_bootstrap, holm, paired_permutation_test
from medssl.ledger import Ledger

COLUMNS = ("metric", "class", "difference", "low", "high", "p", "p_holm", "cases", "subjects", "test", "note")


def read_other(
    predictions: Path, references: Path, *, cases: pd.DataFrame, task: Task, config: AnswersConfig
) -> pd.DataFrame:
    """Answers of another model for the same cases, in the same order.

    Args:
        predictions: Its table.
        references: The same references.
        cases: Those of the first model.
        task: What the first model predicts.
        config: As for the first model.

    Raises:
        CaseError: E_TABLE, if it predicts something else, or leaves out a case.
    """
    found, table, _ = read_answers(predictions, references, Ledger(), config=config)
    if found != task:
        raise CaseError(
            f"{predictions}: predicts {found.kind} {', '.join(found.classes)}; the first model {task.kind} "
            f"{', '.join(task.classes)}. Compare models of one task.",
            code="E_TABLE",
        )
    missing = sorted(set(cases["case_id"]) - set(table["case_id"]))
    if missing:
        raise CaseError(
            f"{predictions}: {len(missing)} of {len(cases)} cases are not predicted, first {missing[0]}; pairs are "
            "needed. Predict the same cases with both models.",
            code="E_TABLE",
        )
    return table.set_index("case_id").loc[cases["case_id"]].reset_index()


def compare(first: pd.DataFrame, second: pd.DataFrame, *, task: Task, num: int = 2000, seed: int = 0) -> pd.DataFrame:
    """First model less the second, in what both are judged by.

    Args:
        first: One row a case, as of :func:`medssl.evaluation.answers.read_answers`.
        second: The same cases in the same order, of another model.
        task: What both predict.
        num: Draws of subjects for the intervals; five times as many swaps for the p values.
        seed: Of draws and swaps.

    Returns:
        Columns :data:`COLUMNS`: the loss (log loss, or distance from the truth) and right decisions by permutation of
        whole subjects, the AUROC of each class by DeLong. ``p_holm`` is corrected for all rows.
    """
    subjects = first["subject_id"].astype(str).tolist()
    rows = [_mean_row("loss", first["loss"], second["loss"], subjects, num=num, seed=seed)]
    if task.kind != "numbers":
        right, other = _right(first, task), _right(second, task)
        rows.append(_mean_row("accuracy", right, other, subjects, num=num, seed=seed))
    if task.kind in {"classes", "labels"}:
        rows += _area_rows(first, second, task, subjects)
    known = [row for row in rows if not math.isnan(row["p"])]
    for row, p in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = p
    counts = {"cases": len(first), "subjects": len(set(subjects))}
    return pd.DataFrame([{"p_holm": math.nan, "note": "", **row, **counts} for row in rows], columns=list(COLUMNS))


def _right(table: pd.DataFrame, task: Task) -> pd.Series[float]:
    if task.kind != "labels":
        return (table["decision"] == table["truth"]).astype(float)
    matrices = [label_matrix(table[name].tolist(), task.classes) for name in ("decision", "truth")]
    return pd.Series((matrices[0] == matrices[1]).all(axis=1).astype(float))


def _mean_row(
    metric: str, first: pd.Series[float], second: pd.Series[float], subjects: list[str], *, num: int, seed: int
) -> dict[str, Any]:
    one, two = first.to_numpy(dtype=np.float64), second.to_numpy(dtype=np.float64)
    found = cluster_bootstrap(one - two, subjects, num=num, seed=seed)
    ends = {"difference": found.mean, "low": found.low, "high": found.high}
    p = math.nan if math.isnan(found.low) else paired_permutation_test(one, two, subjects, num=5 * num, seed=seed)
    note = "one subject, so no interval" if math.isnan(p) else ""
    return {"metric": metric, "class": ALL, **ends, "p": p, "test": "permutation", "note": note}


def _area_rows(first: pd.DataFrame, second: pd.DataFrame, task: Task, subjects: list[str]) -> list[dict[str, Any]]:
    truth = truth_matrix(first, task)
    chances = [probability_matrix(table, task) for table in (first, second)]
    rows = []
    for place, name in enumerate(task.classes):
        if task.positive and name != task.positive:
            continue
        one, two = (table[:, place] for table in chances)
        found = compare_aurocs(one, two, truth=truth[:, place], clusters=subjects)
        note = "one class only" if math.isnan(found.difference) else ""
        if not note and math.isnan(found.p):
            note = "no variance: a class comes from one subject, or both areas are certain"
        rows.append({"metric": "auroc", "class": name, **found._asdict(), "test": "DeLong", "note": note})
    return rows
