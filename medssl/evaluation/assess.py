"""Compare label maps with their references: per case and structure, with intervals over subjects, worst cases first."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from medssl import pool
from medssl.config import Config
from medssl.data.reading import nameless, one_channel, read_image, read_label, turned_onto
from medssl.errors import CaseError, EnvironmentFaultError, GeometryError, MedSSLError, NoInputError
from medssl.evaluation.matching import NO_PREDICTION, Pair, match
from medssl.evaluation.metrics import Presence, Scores, score_labels
from medssl.evaluation.statistics import cluster_bootstrap
from medssl.io import is_image, read_volume
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write
from medssl.volume import Volume

METRICS = ("dice", "nsd", "hd95_mm", "hd_mm", "assd_mm", "volume_error_ml")
ALL_STRUCTURES = "all"

_GRID_TOLERANCE_MM = 0.1
_IN_MM = ("nsd", "hd95_mm", "hd_mm", "assd_mm", "volume_ml", "reference_ml", "volume_error_ml")
_UNSCORED = "W_LABEL_SET"
_NO_MM = "W_NO_MM"

_log = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """How predictions are compared with references.

    Args:
        label_values: Structures to score; by default every value above 0 in any reference. Another value in a
            reference then refuses the case.
        nsd_tolerance_mm: Surfaces no farther apart than this agree.
        subjects: CSV with ``case_id``, ``subject_id`` and, if wanted, ``split``; without it every case is a subject.
            Not needed where the references are given as a cohort table.
        split: Score only this split, and refuse its cases that have no prediction instead of leaving them out.
        bootstrap: Draws of subjects for the intervals.
        seed: Of the draws.
        worst: Number of worst results to name in the summary.
        xform: Which NIfTI transform to believe where the two disagree; by default such files are refused.
        assume_spacing_mm: Voxel size of files that state none; without it their results in mm are left out.
    """

    label_values: tuple[int, ...] | None = None
    nsd_tolerance_mm: float = Field(1.0, ge=0)
    subjects: str | None = None
    split: Literal["train", "val", "test"] | None = None
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)
    worst: int = Field(10, ge=0)
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class EvaluateResult:
    """What was measured.

    Args:
        ledger: Every reference and every prediction, by case.
        cases: One row a case and structure, the worst first; None after a dry run.
        summary: One row a structure and metric, and for all structures together; None after a dry run.
    """

    ledger: Ledger
    cases: pd.DataFrame | None = None
    summary: pd.DataFrame | None = None

    def sentences(self) -> list[str]:
        """What the numbers say, one sentence a structure, one for the worst result, and what they leave out."""
        if self.cases is None or self.summary is None:
            return []
        found = [_sentence(str(label), part) for label, part in self.summary.groupby("label", sort=False)]
        scored = self.cases[self.cases["presence"] != Presence.NEITHER.value]
        if len(scored):
            row = scored.iloc[0]
            found.append(f"Worst: case {row['case_id']}, label {row['label']}, Dice {row['dice']:.3f}.")
        return found + _left_out(self.ledger)


def evaluate(
    predictions: Path,
    labels: Path,
    *,
    out: Path,
    config: EvaluateConfig | None = None,
    dry_run: bool = False,
) -> EvaluateResult:
    """Score label maps against references on the references' own grids.

    A structure in neither map is a true negative: it is counted, and left out of the means. A structure in one of
    them has the worst value of every metric, and is in the means.

    Args:
        predictions: Folder of label maps, named as the references are (or as the images of a cohort).
        labels: Folder of references, or a cohort table, which also says whose they are.
        out: Folder for ``cases.csv``, ``summary.csv``, ``summary.json``, ``refused.csv`` and the journal.
        config: See :class:`EvaluateConfig`.
        dry_run: Match files, but read and write nothing.

    Raises:
        NoInputError: if no case has both a prediction and a reference.
        CaseError: E_NAME_CLASH, if two files of one folder differ only in upper case, accents or suffix, or if one
            prediction is named as the images of two cases.
    """
    config = config or EvaluateConfig()
    ledger = Ledger()
    pairs = match(predictions, labels, ledger, subjects=config.subjects, split=config.split)
    if dry_run:
        for pair in pairs:
            ledger.accept(pair.case_id)
        ledger.check()
        return EvaluateResult(ledger)
    with RunFolder(out) as run:
        run.write_recipe({"command": "evaluate", **config.to_dict()})
        scored: list[Pair] = []
        rows: list[dict[str, Any]] = []
        for pair in track(pairs, "evaluate"):
            found = pool.attempt(partial(_score, config=config), pair, pair.case_id)
            if isinstance(found, EnvironmentFaultError):
                raise found
            if isinstance(found, MedSSLError):
                _log.warning("%s: %s: %s", pair.case_id, found.code, found.message)
                ledger.reject(pair.case_id, found)
                continue
            scores, warnings = found
            ledger.accept(pair.case_id, warnings=warnings)
            scored.append(pair)
            names = {"case_id": pair.case_id, "subject_id": pair.subject_id}
            rows += [{**names, "label": value, **columns} for value, columns in scores.items()]
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.IGNORED, Outcome.WARNED))
        ledger.check()
        run.journal.log(command="evaluate", **ledger.counts())
        if not rows:
            raise NoInputError(
                f"{predictions}: {len(pairs)} cases, {len(scored)} readable, and no structure in any; see "
                f"{out / 'refused.csv'}, or name the structures in label_values."
            )
        result = EvaluateResult(ledger, *_tables(scored, rows, config))
        _write(out, result, config)
    return result


def summarise(cases: pd.DataFrame, *, bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean of every metric with a 95 % interval over subjects, for each structure and for all together.

    Args:
        cases: One row a case and structure: ``case_id, subject_id, label, presence`` and the metrics.
        bootstrap: Draws of subjects.
        seed: Of the draws.

    Returns:
        Columns ``label, metric, mean, low, high, cases, subjects, missed, invented, neither``. For all structures
        together a case counts with the mean over its structures, and the counts are of structures.
    """
    seen = cases[cases["presence"] != Presence.NEITHER.value]
    together = seen.groupby(["case_id", "subject_id"], as_index=False)[list(METRICS)].mean()
    parts = [(str(label), seen[seen["label"] == label], part) for label, part in cases.groupby("label")]
    if len(parts) > 1:
        parts.append((ALL_STRUCTURES, together, cases))
    rows = []
    for label, scored, part in parts:
        counts = part["presence"].value_counts()
        numbers = {
            "cases": len(scored),
            "subjects": scored["subject_id"].nunique(),
            **{name.value: int(counts.get(name.value, 0)) for name in Presence if name is not Presence.BOTH},
        }
        for metric in METRICS:
            interval = (np.nan,) * 3
            known = scored[scored[metric].notna()]
            if len(known):
                subjects = known["subject_id"].tolist()
                interval = cluster_bootstrap(known[metric].to_numpy(), subjects, num=bootstrap, seed=seed)
            mean, low, high = interval
            rows.append({"label": label, "metric": metric, "mean": mean, "low": low, "high": high, **numbers})
    return pd.DataFrame(rows)


def _score(pair: Pair, *, config: EvaluateConfig) -> tuple[dict[int, dict[str, float | str]], tuple[str, ...]]:
    """Table columns of every structure asked for, or of those in this pair, and what to warn of."""
    reference, said, has_spacing = _read_reference(pair, config)
    reading = pair.reading.completed(xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)
    prediction, prediction_source = read_volume(
        pair.prediction, unit="label", xform=reading.xform, assume_spacing_mm=reading.assume_spacing_mm
    )
    prediction = turned_onto(prediction, reference.geometry)
    if prediction.array.shape != reference.array.shape:
        raise CaseError(
            f"{pair.case_id}: prediction of shape {prediction.geometry.shape}, reference {reference.geometry.shape}; "
            "one grid is needed. Predict on the image that the reference was drawn on.",
            code="E_SHAPE",
        )
    distance = reference.geometry.max_corner_distance_mm(prediction.geometry)
    if distance > _GRID_TOLERANCE_MM:
        raise GeometryError(
            f"{pair.case_id}: prediction lies {distance:.2f} mm off its reference at a corner; {_GRID_TOLERANCE_MM} mm "
            "is allowed. Predict on the image that the reference was drawn on."
        )
    in_reference, in_prediction = _values(reference.array), _values(prediction.array)
    values = config.label_values or sorted(in_reference | in_prediction)
    unknown = in_reference - set(values)
    if unknown:
        raise CaseError(
            f"{pair.case_id}: reference holds the label values {sorted(unknown)} beside {list(values)}. "
            "Correct it, or name them in label_values.",
            code="E_LABEL_SET",
        )
    scores = score_labels(
        prediction.array[0],
        reference.array[0],
        geometry=reference.geometry,
        label_values=values,
        nsd_tolerance_mm=config.nsd_tolerance_mm,
    )
    warnings = [*said, *prediction_source.warnings]
    if not in_reference:
        warnings.append("W_EMPTY_LABEL: the reference holds background only.")
    unscored = sorted(in_prediction - set(values))
    if unscored:
        warnings.append(f"{_UNSCORED}: the prediction holds the label values {unscored}, which were not asked for.")
    columns = {value: found.to_dict() for value, found in scores.items()}
    if not has_spacing:
        warnings.append(f"{_NO_MM}: no voxel size is known, so nothing was measured in mm; see assume_spacing_mm.")
        columns = {value: {**row, **dict.fromkeys(_IN_MM, np.nan)} for value, row in columns.items()}
    return columns, tuple(warnings)


def _read_reference(pair: Pair, config: EvaluateConfig) -> tuple[Volume, tuple[str, ...], bool]:
    """The reference as a preparation reads it, what to warn of, and whether its voxel size is known."""
    reading = pair.reading.completed(xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)
    if pair.image is None or (reading.label_grid == "same" and is_image(pair.reference)):
        with nameless(str(pair.reference), f"{pair.case_id}: reference") if pair.image else nullcontext():
            volume, source = read_volume(
                pair.reference,
                unit="label",
                xform=reading.xform,
                assume_spacing_mm=reading.assume_spacing_mm,
                volume="channels" if reading.volume == "channels" else None,
                pages=reading.pages,
            )
        return one_channel(volume, item=pair.case_id), source.warnings, source.has_spacing
    with nameless(str(pair.image), f"{pair.case_id}: image"):
        image, source = read_image(pair.image, reading)
    with nameless(str(pair.reference), f"{pair.case_id}: reference"):
        volume, said = read_label(pair.reference, reading, image=image, item=pair.case_id)
    return one_channel(volume, item=pair.case_id), said, source.has_spacing


def _values(labels: np.ndarray[Any, Any]) -> set[int]:
    return {int(value) for value in np.unique(labels) if value != 0}


def _tables(
    scored: Sequence[Pair], rows: Sequence[Mapping[str, Any]], config: EvaluateConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Case rows, every structure in every case and the worst first, and their summary."""
    cases = pd.DataFrame(rows)
    everyone = pd.DataFrame([(pair.case_id, pair.subject_id) for pair in scored], columns=["case_id", "subject_id"])
    full = everyone.merge(pd.DataFrame({"label": sorted(cases["label"].unique())}), how="cross")
    cases = full.merge(cases, how="left", on=["case_id", "subject_id", "label"])
    # a structure of other cases that is in neither map of this one
    neither = Scores(Presence.NEITHER, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0).to_dict()
    cases.loc[cases["presence"].isna(), list(neither)] = list(neither.values())
    cases = cases.sort_values(["dice", "hd95_mm"], ascending=[True, False], kind="stable")
    return cases.reset_index(drop=True), summarise(cases, bootstrap=config.bootstrap, seed=config.seed)


def _write(out: Path, result: EvaluateResult, config: EvaluateConfig) -> None:
    if result.cases is None or result.summary is None:
        return
    atomic_write(out / "cases.csv", result.cases.to_csv(index=False))
    atomic_write(out / "summary.csv", result.summary.to_csv(index=False))
    scored = result.cases[result.cases["presence"] != Presence.NEITHER.value].head(config.worst)
    content = {
        "ledger": result.ledger.counts(),
        "nsd_tolerance_mm": config.nsd_tolerance_mm,
        "summary": json.loads(result.summary.to_json(orient="records")),
        "worst": json.loads(scored.to_json(orient="records")),
    }
    atomic_write(out / "summary.json", json.dumps(content, indent=2))


def _left_out(ledger: Ledger) -> list[str]:
    """What the numbers do not tell, one sentence each."""
    booked = list(ledger)
    missing = sum(entry.reason == NO_PREDICTION or entry.code == "E_NO_PREDICTION" for entry in booked)
    unscored = sum(f"{_UNSCORED}:" in entry.reason for entry in booked)
    no_mm = sum(f"{_NO_MM}:" in entry.reason for entry in booked)
    found = {
        f"{missing} references have no prediction and are in no number above.": missing,
        f"{unscored} predictions hold label values that were not asked for; see refused.csv.": unscored,
        f"{no_mm} cases state no voxel size; surface and volume metrics leave them out.": no_mm,
    }
    return [sentence for sentence, count in found.items() if count]


def _sentence(label: str, part: pd.DataFrame) -> str:
    rows = part.set_index("metric")
    first = rows.iloc[0]
    name = "All structures" if label == ALL_STRUCTURES else f"Label {label}"
    if first["cases"] == 0:
        return f"{name}: in no reference and no prediction of {first['neither']} cases."

    def shown(metric: str, digits: int, unit: str = "") -> str:
        row = rows.loc[metric]
        if np.isnan(row["mean"]):
            return "not measured"
        if np.isnan(row["low"]):
            return f"{row['mean']:.{digits}f}{unit}"
        return f"{row['mean']:.{digits}f}{unit} (95 % interval {row['low']:.{digits}f} to {row['high']:.{digits}f})"

    return (
        f"{name}: Dice {shown('dice', 3)}, surface Dice {shown('nsd', 3)}, HD95 {shown('hd95_mm', 2, ' mm')} over "
        f"{first['cases']} cases of {first['subjects']} subjects; {first['missed']} missed, {first['invented']} "
        f"invented, {first['neither']} rightly empty."
    )
