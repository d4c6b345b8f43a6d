"""What the scores of a study's runs say: means, paired comparisons, and the sentences that the numbers carry."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from medssl.errors import NoInputError
from medssl.evaluation.metrics import Presence
from medssl.evaluation.statistics import CrossedMean, crossed_mean, paired_permutation_test

if TYPE_CHECKING:
    from medssl.evaluation.study import StudyConfig


def without_true_negatives(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Leave out each structure of a case that no run found and that is not there, for every arm the same.

    Args:
        results: One row a case, structure and run.

    Returns:
        The other rows, and a sentence that counts what was left out, if anything was.

    Raises:
        NoInputError: if nothing is left.
    """
    pair = ["case_id", "label"]
    is_neither = results["presence"] == Presence.NEITHER.value
    is_empty = is_neither.groupby([results[name] for name in pair]).transform("all")
    kept = results[~is_empty]
    if kept.empty:
        raise NoInputError(
            "study: no structure in any case that is scored. Check the labels of the splits val and test."
        )
    lost, total = len(results[is_empty][pair].drop_duplicates()), len(results[pair].drop_duplicates())
    if not lost:
        return kept, []
    return kept, [
        f"{lost} of {total} structures of cases are in no reference and no prediction; the means leave them out."
    ]


def _grid(results: pd.DataFrame, arm: str, budget: int) -> pd.DataFrame:
    """Dice of one arm at one budget, mean over structures: one row a seed, one column a test case."""
    return _pivot(results[(results["arm"] == arm) & (results["budget"] == budget)])


def _p_subjects(difference: pd.DataFrame) -> float:
    """P of a permutation test that swaps the arms subject by subject, for the seeds at hand."""
    means = difference.mean(axis=0)
    return paired_permutation_test(means.to_numpy(), np.zeros(len(means)), _subjects(difference))


def mean_of_runs(rows: pd.DataFrame) -> CrossedMean:
    """Mean Dice over seeds and subjects of one arm under one condition, with its interval.

    Args:
        rows: ``seed, subject_id, case_id, dice``, one row a structure.
    """
    return _mean(_pivot(rows))


def _pivot(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a seed, one column a test case: Dice, mean over structures."""
    return rows.pivot_table(index="seed", columns=["subject_id", "case_id"], values="dice", aggfunc="mean").sort_index(
        axis=1
    )


def _subjects(grid: pd.DataFrame) -> list[str]:
    return [str(subject) for subject in grid.columns.get_level_values("subject_id")]


def _mean(grid: pd.DataFrame) -> CrossedMean:
    return crossed_mean(grid.to_numpy(), _subjects(grid))


def summarise_arms(results: pd.DataFrame, plan: StudyConfig) -> pd.DataFrame:
    """One row an arm and budget: means over test cases and seeds, and the interval of the mean Dice."""
    rows = []
    for arm in plan.arms:
        for budget in sorted(results["budget"].unique()):
            interval = _mean(_grid(results, arm, budget))
            part = results[(results["arm"] == arm) & (results["budget"] == budget)]
            rows.append(
                {
                    "arm": arm, "labelled_subjects": budget, "dice": interval.mean, "low": interval.low,
                    "high": interval.high,
                    **{f"dice_{label}": dice for label, dice in part.groupby("label")["dice"].mean().items()},
                    "nsd": part["nsd"].mean(), "hd95_mm": part["hd95_mm"].mean(),
                    "missed": int((part["presence"] == "missed").sum()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def compare_arms(results: pd.DataFrame, plan: StudyConfig) -> pd.DataFrame:
    """Each pretrained arm against the reference at the same budget, paired by seed and case."""
    rows = []
    for arm in plan.arms:
        for budget in sorted(results["budget"].unique()) if arm != plan.reference else ():
            difference = _grid(results, arm, budget) - _grid(results, plan.reference, budget)
            interval = _mean(difference)
            rows.append(
                {
                    "arm": arm, "labelled_subjects": budget, "dice_gain": interval.mean, "low": interval.low,
                    "high": interval.high, "p": interval.p, "p_subjects": _p_subjects(difference),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def findings(results: pd.DataFrame, comparisons: pd.DataFrame, plan: StudyConfig) -> list[str]:
    """What the numbers allow to be said, and nothing more."""
    found = []
    for row in comparisons.to_dict("records"):
        verdict = "better than" if row["low"] > 0 else "worse than" if row["high"] < 0 else "not distinguishable from"
        found.append(
            f"With {row['labelled_subjects']} labelled subjects {row['arm']} is {verdict} {plan.reference}: Dice "
            f"{row['dice_gain']:+.4f} (95 % interval {row['low']:+.4f} to {row['high']:+.4f}, p = {row['p']:.3f})."
        )
    budgets = sorted(int(budget) for budget in results["budget"].unique())
    for arm in plan.arms:
        for few in budgets if arm != plan.reference else ():
            larger = [more for more in budgets if more > few]
            against = {more: _mean(_grid(results, arm, few) - _grid(results, plan.reference, more)) for more in larger}
            equal = list(itertools.takewhile(lambda more: against[more].low > -plan.margin, larger))  # noqa: B023
            if equal:
                interval = against[equal[-1]]
                found.append(
                    f"{arm} with {few} labelled subjects equals {plan.reference} with {equal[-1]}: Dice "
                    f"{interval.mean:+.4f} (95 % interval from {interval.low:+.4f}; at most {plan.margin:g} below "
                    "counts as equal)."
                )
    return found
