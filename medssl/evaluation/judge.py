"""Judge a table of predicted classes, labels or numbers against a table of references, subject by subject."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from medssl.evaluation.answers import AnswersConfig, read_answers
from medssl.evaluation.calibration import Binning, reliability
from medssl.evaluation.compare import compare, read_other
from medssl.evaluation.decisions import confusion, curve
from medssl.evaluation.scorecard import ALL, Options, Task, score, truth_matrix
from medssl.evaluation.subgroups import by_group, groups_of
from medssl.ledger import Ledger, Outcome
from medssl.runfolder import RunFolder, atomic_write


class JudgeConfig(AnswersConfig):
    """How predictions of classes, labels or numbers are judged; besides which table tells the truth.

    Args:
        groups: Columns to measure subgroups by, such as site, scanner, sex or age.
        bands: For columns of numbers in ``groups``, the width of the bands or all of their edges.
        specificities: At which the sensitivity is told.
        sensitivities: At which the specificity is told.
        bins: Of the calibration.
        binning: Bins of equal ``width``, or of equal ``mass`` (number of cases).
        against: Predictions of another model for the same cases, to compare these with.
        bootstrap: Draws of subjects for the intervals.
        seed: Of the draws.
    """

    groups: tuple[str, ...] = ()
    bands: dict[str, float | tuple[float, ...]] = Field(default_factory=dict)
    specificities: tuple[float, ...] = (0.9,)
    sensitivities: tuple[float, ...] = (0.9,)
    bins: int = Field(10, ge=2)
    binning: Binning = "width"
    against: str | None = None
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class JudgeResult:
    """What was measured.

    Args:
        ledger: Every reference and every prediction, by case.
        task: What was predicted; None after a dry run.
        cases: One row a case, the worst first; None after a dry run.
        metrics: As of :func:`medssl.evaluation.scorecard.score`; None after a dry run.
        comparison: As of :func:`medssl.evaluation.compare.compare`, where another model was given.
    """

    ledger: Ledger
    task: Task | None = None
    cases: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None
    comparison: pd.DataFrame | None = None

    def sentences(self) -> list[str]:
        """What the numbers say, one sentence a class, and the worst case."""
        if self.task is None or self.cases is None or self.metrics is None:
            return []
        shown = [_sentence(str(name), part, self.task) for name, part in self.metrics.groupby("class", sort=False)]
        worst = self.cases.iloc[0]
        said = worst["value"] if self.task.kind == "numbers" else worst["decision"]
        text = f"{said:.4g}" if isinstance(said, float) else said
        if self.task.kind == "ordinal":
            shown.append(f"Order of the classes: {' < '.join(self.task.classes)}.")
        if self.comparison is not None:
            shown += [_compared(row) for row in self.comparison.to_dict("records")]
        return [*shown, f"Worst: case {worst['case_id']}, truth {worst['truth']}, predicted {text}."]


def judge(
    predictions: Path,
    references: Path,
    *,
    out: Path,
    config: JudgeConfig,
    dry_run: bool = False,
) -> JudgeResult:
    """Score a table of predictions against a table of references, with intervals over subjects.

    Args:
        predictions: CSV with ``case_id``, and ``p_<name>`` for every class or label, or ``value``; ``decision`` as made
            with the threshold of the model, by default the most probable class, and labels of at least 0.5.
        references: CSV with ``case_id`` and the column of the truth; or a cohort table with ``facts.csv`` beside it.
        out: Folder for ``metrics.csv``, ``cases.csv``, ``reliability.csv``, ``roc.csv``, ``confusion.csv``,
            ``subgroups.csv``, ``comparison.csv``, ``refused.csv`` and the journal. All metrics, also of the groups in
            its columns ``group_<column>``, can be computed from ``cases.csv`` alone, comparisons from it and
            ``other_cases.csv``.
        config: See :class:`JudgeConfig`.
        dry_run: Read and match, but write nothing.

    Raises:
        NoInputError: if no case has both a prediction and a truth.
        CaseError: E_TABLE, if a table cannot be understood, a case has two rows, or a probability is none.
        ConfigError: if the references lack the column, or an option does not fit the task.
    """
    ledger = Ledger()
    task, cases, facts = read_answers(predictions, references, ledger, config=config)
    groups = groups_of(facts, config.groups, case_ids=cases["case_id"].tolist(), bands=config.bands)
    other = None
    if config.against is not None:
        other = read_other(Path(config.against), references, cases=cases, task=task, config=config)
    if dry_run:
        return JudgeResult(ledger)
    options = Options(**{name: getattr(config, name) for name in Options._fields})
    with RunFolder(out) as run:
        run.write_recipe({"command": "evaluate", **config.to_dict()})
        run.journal.log(command="evaluate", kind=task.kind, **ledger.counts())
        metrics = score(cases, task, options)
        for column in groups.columns:
            cases[f"group_{column}"] = cases["case_id"].map(groups[column])
        tables = {"cases": cases, "metrics": metrics, **_curves(cases, task, options)}
        if other is not None:
            tables |= {
                "other_cases": other,
                "comparison": compare(cases, other, task=task, num=config.bootstrap, seed=config.seed),
            }
        result = JudgeResult(ledger, task, cases, metrics, tables.get("comparison"))
        if config.groups:
            tables["subgroups"] = by_group(cases, groups, measure=lambda rows: score(rows, task, options))
        for name, table in tables.items():
            atomic_write(out / f"{name}.csv", table.to_csv(index=False))
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.IGNORED, Outcome.WARNED))
        summary = {"task": task._asdict(), "ledger": ledger.counts(), "sentences": result.sentences()}
        atomic_write(out / "summary.json", json.dumps(summary, indent=2))
    return result


def _curves(cases: pd.DataFrame, task: Task, options: Options) -> dict[str, pd.DataFrame]:
    """Points of the ROC, bins of the calibration, and the confusion, each by class."""
    tables = {}
    if task.kind in {"classes", "ordinal"}:
        code = {name: place for place, name in enumerate(task.classes)}
        counts = confusion(
            cases["decision"].map(code).to_numpy(dtype=np.int64),
            cases["truth"].map(code).to_numpy(dtype=np.int64),
            num_classes=len(code),
        )
        tables["confusion"] = pd.DataFrame(counts, columns=list(code)).assign(truth=list(code))[["truth", *code]]
    if task.kind not in {"classes", "labels"}:
        return tables
    truth = truth_matrix(cases, task)
    points, bins = [], []
    for place, name in enumerate(task.classes):
        chance = cases[f"p_{name}"].to_numpy(dtype=np.float64)
        if not task.positive or name == task.positive:
            found = pd.DataFrame(curve(chance, truth[:, place])._asdict()).rename(columns={"thresholds": "threshold"})
            points.append(found.assign(**{"class": name}))
            rows = reliability(chance, truth[:, place], bins=options.bins, binning=options.binning)
            bins.append(pd.DataFrame(rows).assign(**{"class": name}))
    tables["roc"] = pd.concat(points, ignore_index=True)
    tables["reliability"] = pd.concat(bins, ignore_index=True)
    return tables


def _sentence(name: str, part: pd.DataFrame, task: Task) -> str:
    told = {
        "classes": ("accuracy", "balanced_accuracy", "auroc_macro", "log_loss", "ece"),
        "labels": ("auroc_macro", "average_precision_macro", "exact_match"),
        "ordinal": ("quadratic_kappa", "accuracy", "mae"),
        "numbers": ("mae", "rmse", "r2", "concordance"),
    }[task.kind]
    chosen = told if name == ALL else ("auroc", "average_precision", "sensitivity", "specificity")
    rows = part.set_index("metric")
    shown = [_shown(metric, rows[rows.index == metric].iloc[0]) for metric in chosen if metric in rows.index]
    first = rows.iloc[0]
    head = f"All {first['cases']} cases of {first['subjects']} subjects" if name == ALL else f"Class {name}"
    return f"{head}: {', '.join(shown)}."


def _shown(metric: str, row: pd.Series[Any]) -> str:
    name = {"auroc": "AUROC", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "ece": "ECE"}.get(metric, metric)
    name = name.replace("auroc_", "AUROC ").replace("_", " ")
    if pd.isna(row["value"]):
        return f"{name} not defined ({row['note']})"
    if pd.isna(row["low"]):
        return f"{name} {row['value']:.3f} ({row['note']})"
    return f"{name} {row['value']:.3f} (95 % interval {row['low']:.3f} to {row['high']:.3f})"


def _compared(row: dict[Hashable, Any]) -> str:
    name = row["metric"] if row["class"] == ALL else f"{row['metric']} of {row['class']}"
    if pd.isna(row["difference"]):
        return f"Against the other model: {name} not defined ({row['note']})."
    if pd.isna(row["p"]):
        return f"Against the other model: {name} {row['difference']:+.3f} ({row['note']})."
    return (
        f"Against the other model: {name} {row['difference']:+.3f} (95 % interval {row['low']:+.3f} to "
        f"{row['high']:+.3f}, p {row['p']:.3f}, {row['p_holm']:.3f} after Holm)."
    )
