"""What a study writes at its end: tables, curves and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from medssl.config import dump_yaml
from medssl.report.figures import label_curve
from medssl.report.page import Section, write_report
from medssl.runfolder import atomic_write

if TYPE_CHECKING:
    from medssl.evaluation.study import StudyConfig


@dataclass(frozen=True)
class StudyTables:
    """The tables of a study.

    Args:
        results: One row a case, structure and run.
        summary: One row an arm and budget.
        comparisons: Each arm against the reference.
        corrupted: One row a corruption, severity, case, structure and run, if any were tried.
        severities: One row an arm, budget, corruption and severity, likewise.
        sites: One row an arm, budget and site, if a column was named.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    corrupted: pd.DataFrame | None = None
    severities: pd.DataFrame | None = None
    sites: pd.DataFrame | None = None


def write_study(out: Path, plan: StudyConfig, tables: StudyTables, sentences: Sequence[str]) -> Path:
    """Write every table as CSV, the curves as PNG, and the page that shows them.

    Args:
        out: Folder of the study.
        plan: What was asked for.
        tables: What was found.
        sentences: What may be said.
    """
    for name, table in vars(tables).items():
        if table is not None:
            atomic_write(out / f"{name}.csv", table.to_csv(index=False))
    curves: dict[str, list[tuple[int, float, float, float]]] = {arm: [] for arm in plan.arms}
    for row in tables.summary.to_dict("records"):
        curves[row["arm"]].append((row["labelled_subjects"], row["dice"], row["low"], row["high"]))
    picture = label_curve(curves, title="Test Dice, mean over structures")
    atomic_write(out / "label_curve.png", picture)
    how = (
        f"{len(plan.seeds)} seeds; a seed draws the label subset, the weights of new layers and the order of data. "
        "Intervals are 95 % and take seeds and test subjects as drawn at random; they and p are of paired differences "
        "wherever two arms are compared. p_subjects swaps the arms subject by subject, for the seeds at hand. No p is "
        "corrected for the number of comparisons. The cases of each budget and seed stand in splits/."
    )
    sections = [
        Section("Findings", [*sentences, how], pictures={"Dice against labelled subjects": picture}),
        Section("Scores", table=_rows(tables.summary)),
        Section("Comparisons", table=_rows(tables.comparisons)),
        *_robustness(out, plan, tables),
        Section("Recipe", dump_yaml(plan.to_dict()).splitlines()),
    ]
    return write_report(out / "report.html", "Does pretraining help? A label-savings study", sections=sections)


def _robustness(out: Path, plan: StudyConfig, tables: StudyTables) -> list[Section]:
    sections = []
    if tables.severities is not None:
        largest = tables.severities[tables.severities["budget"] == tables.severities["budget"].max()]
        curves: dict[str, list[tuple[int, float, float, float]]] = {arm: [] for arm in plan.arms}
        for row in largest[largest["corruption"] == "all"].sort_values("severity").to_dict("records"):
            curves[row["arm"]].append((row["severity"], row["dice"], row["low"], row["high"]))
        picture = label_curve(curves, xlabel="severity", title="Test Dice, mean over corruptions", log=False)
        atomic_write(out / "severity_curve.png", picture)
        text = (
            "Test images were corrupted after preparation and before prediction, the same way for every model; labels "
            "are those of the clean images. Severity 0 is the clean image; drop is the Dice lost against it. "
            "Strengths of each corruption and severity stand in medssl.evaluation.robustness.RobustnessConfig."
        )
        sections.append(
            Section("Corrupted images", [text], table=_rows(tables.severities), pictures={"Dice by severity": picture})
        )
    if tables.sites is not None:
        text = f"Test scores by {plan.site}; seen is the share of seeds in whose labelled training cases it occurs."
        sections.append(Section("Sites", [text], table=_rows(tables.sites)))
    return sections


def _rows(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
