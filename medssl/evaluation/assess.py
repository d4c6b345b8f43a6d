"""Compare label maps with their references: per case and structure, with intervals over subjects, worst cases first."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from medssl.config import Config
from medssl.data.cohort import Cohort, read_table
from medssl.errors import CaseError, EnvironmentFaultError, GeometryError, MedSSLError, NoInputError, ReadError
from medssl.evaluation.metrics import Presence, Scores, score_labels
from medssl.evaluation.statistics import cluster_bootstrap
from medssl.io import is_image, read_volume, stem
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write

METRICS = ("dice", "nsd", "hd95_mm", "hd_mm", "assd_mm", "volume_error_ml")
ALL_STRUCTURES = "all"

_GRID_TOLERANCE_MM = 0.1

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
    """

    label_values: tuple[int, ...] | None = None
    nsd_tolerance_mm: float = Field(1.0, ge=0)
    subjects: str | None = None
    split: Literal["train", "val", "test"] | None = None
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)
    worst: int = Field(10, ge=0)


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
        """What the numbers say, one sentence a structure and one for the worst result."""
        if self.cases is None or self.summary is None:
            return []
        found = [_sentence(str(label), part) for label, part in self.summary.groupby("label", sort=False)]
        scored = self.cases[self.cases["presence"] != Presence.NEITHER.value]
        if len(scored):
            row = scored.iloc[0]
            found.append(f"Worst: case {row['case_id']}, label {row['label']}, Dice {row['dice']:.3f}.")
        return found


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
        CaseError: E_NAME_CLASH, if two files of one folder differ only in upper case, accents or suffix.
    """
    config = config or EvaluateConfig()
    ledger = Ledger()
    pairs = _match(predictions, labels, config, ledger)
    if dry_run:
        for pair in pairs:
            ledger.accept(pair.case_id)
        ledger.check()
        return EvaluateResult(ledger)
    with RunFolder(out) as run:
        run.write_recipe({"command": "evaluate", **config.to_dict()})
        scored: list[_Pair] = []
        rows: list[dict[str, Any]] = []
        for pair in track(pairs, "evaluate"):
            try:
                scores, warnings = _score(pair, config)
            except EnvironmentFaultError:
                raise
            except MedSSLError as error:
                _log.warning("%s: %s: %s", pair.case_id, error.code, error.message)
                ledger.reject(pair.case_id, error)
                continue
            ledger.accept(pair.case_id, warnings=warnings)
            scored.append(pair)
            rows += [
                {"case_id": pair.case_id, "subject_id": pair.subject_id, "label": value, **found.to_dict()}
                for value, found in scores.items()
            ]
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
            if len(scored):
                subjects = scored["subject_id"].tolist()
                interval = cluster_bootstrap(scored[metric].to_numpy(), subjects, num=bootstrap, seed=seed)
            mean, low, high = interval
            rows.append({"label": label, "metric": metric, "mean": mean, "low": low, "high": high, **numbers})
    return pd.DataFrame(rows)


class _Pair(NamedTuple):
    case_id: str
    subject_id: str
    prediction: Path
    reference: Path


class _Reference(NamedTuple):
    case_id: str
    subject_id: str
    name: str
    path: Path
    split: str | None


def _match(predictions: Path, labels: Path, config: EvaluateConfig, ledger: Ledger) -> list[_Pair]:
    """Announce every reference and every prediction by case, and book what has no partner."""
    found = _by_name(predictions)
    references = _references(labels, config)
    pairs = []
    for reference in references:
        ledger.expect(reference.case_id)
        prediction = found.pop(_folded(reference.name), None)
        if config.split is not None and reference.split != config.split:
            ledger.ignore(reference.case_id, f"not in split {config.split}")
        elif prediction is not None:
            pairs.append(_Pair(reference.case_id, reference.subject_id, prediction, reference.path))
        elif config.split is None:
            ledger.ignore(reference.case_id, "no prediction")
        else:
            message = (
                f"{reference.case_id}: no prediction named {reference.name}; every case of split {config.split} needs "
                "one, or the failures would be left out of the mean. Predict it, or see why it was refused."
            )
            ledger.reject(reference.case_id, CaseError(message, code="E_NO_PREDICTION"))
    known = {reference.case_id for reference in references}
    for path in found.values():
        name = stem(path)
        item = f"prediction {name}" if name in known else name
        ledger.expect(item)
        message = f"{name}: a prediction without a reference of that name. Give its label map, or take it away."
        ledger.reject(item, ReadError(message, code="E_NO_LABEL"))
    if not pairs:
        raise NoInputError(
            f"{predictions}: {len(found)} predictions and {len(references)} references, none with the same name. "
            "Names without suffix must be equal."
        )
    return pairs


def _references(labels: Path, config: EvaluateConfig) -> list[_Reference]:
    if labels.suffix.lower() == ".csv":
        cases = Cohort.from_csv(labels).select(labelled=True)
        return [
            _Reference(case.case_id, case.subject_id, stem(Path(case.image)), Path(str(case.label)), case.split)
            for case in cases
        ]
    people = _subjects(Path(config.subjects)) if config.subjects else {}
    references = []
    for path in _by_name(labels).values():
        name = stem(path)
        person = people.get(name, {"subject_id": name})
        references.append(_Reference(name, person["subject_id"], name, path, person.get("split")))
    lost = [reference.case_id for reference in references if people and reference.case_id not in people]
    if lost:
        raise CaseError(
            f"{config.subjects}: {len(lost)} of {len(references)} references are not in the table, first {lost[0]}; "
            "the subject of every case is needed. Add them.",
            code="E_TABLE",
        )
    return references


def _subjects(path: Path) -> dict[str, dict[str, str]]:
    """Row of each case in a table of subjects."""
    rows: dict[str, dict[str, str]] = {}
    for line, row in read_table(path, required=("case_id", "subject_id")):
        if row["case_id"] in rows or not row["subject_id"]:
            raise CaseError(
                f"{path}: line {line}: case_id is used twice or subject_id is empty. Correct the table.", code="E_TABLE"
            )
        rows[row["case_id"]] = row
    return rows


def _by_name(folder: Path) -> dict[str, Path]:
    """Images of a folder by their folded name.

    Raises:
        ReadError: if there is no such folder.
        CaseError: E_NAME_CLASH, if two names differ only in upper case, accents or suffix.
    """
    if not folder.is_dir():
        raise ReadError(f"{folder}: is not a folder of label maps. Correct the path.")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_image(path) and not path.name.startswith("."):
            found[_folded(stem(path))].append(path)
    for paths in found.values():
        if len(paths) > 1:
            raise CaseError(
                f"{folder}: {' and '.join(path.name for path in paths)} stand for one case; one file is needed. "
                "Rename or remove the others.",
                code="E_NAME_CLASH",
            )
    return {name: paths[0] for name, paths in found.items()}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _score(pair: _Pair, config: EvaluateConfig) -> tuple[dict[int, Scores], tuple[str, ...]]:
    """Scores of every structure asked for, or of those in this pair."""
    reference, reference_source = read_volume(pair.reference, unit="label")
    prediction, prediction_source = read_volume(pair.prediction, unit="label")
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
    in_reference = _values(reference.array)
    values = config.label_values or sorted(in_reference | _values(prediction.array))
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
    warnings = [*reference_source.warnings, *prediction_source.warnings]
    if not in_reference:
        warnings.append("W_EMPTY_LABEL: the reference holds background only.")
    return scores, tuple(warnings)


def _values(labels: np.ndarray[Any, Any]) -> set[int]:
    return {int(value) for value in np.unique(labels) if value != 0}


def _tables(
    scored: Sequence[_Pair], rows: Sequence[Mapping[str, Any]], config: EvaluateConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Case rows, every structure in every case and the worst first, and their summary."""
    cases = pd.DataFrame(rows)
    everyone = pd.DataFrame([(pair.case_id, pair.subject_id) for pair in scored], columns=["case_id", "subject_id"])
    full = everyone.merge(pd.DataFrame({"label": sorted(cases["label"].unique())}), how="cross")
    cases = full.merge(cases, how="left", on=["case_id", "subject_id", "label"])
    # a structure of other cases that is in neither map of this one
    neither = Scores(Presence.NEITHER, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0).to_dict()
    cases = cases.fillna(neither).sort_values(["dice", "hd95_mm"], ascending=[True, False], kind="stable")
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


def _sentence(label: str, part: pd.DataFrame) -> str:
    rows = part.set_index("metric")
    first = rows.iloc[0]
    name = "All structures" if label == ALL_STRUCTURES else f"Label {label}"
    if first["cases"] == 0:
        return f"{name}: in no reference and no prediction of {first['neither']} cases."

    def shown(metric: str, digits: int) -> str:
        row = rows.loc[metric]
        if np.isnan(row["low"]):
            return f"{row['mean']:.{digits}f}"
        return f"{row['mean']:.{digits}f} (95 % interval {row['low']:.{digits}f} to {row['high']:.{digits}f})"

    return (
        f"{name}: Dice {shown('dice', 3)}, surface Dice {shown('nsd', 3)}, HD95 {shown('hd95_mm', 2)} mm over "
        f"{first['cases']} cases of {first['subjects']} subjects; {first['missed']} missed, {first['invented']} "
        f"invented, {first['neither']} rightly empty."
    )
