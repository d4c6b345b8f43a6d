"""Compare label maps with their references: per case and structure, with intervals over subjects, worst cases first."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from medssl import pool
from medssl.config import Config
from medssl.data.reading import nameless, one_channel, read_image, read_label, turned_onto
from medssl.errors import CaseError, EnvironmentFaultError, GeometryError, MedSSLError, NoInputError
from medssl.evaluation.lesions import Lesion, Rule, find_lesions, lesion_sentences, lesion_tables
from medssl.evaluation.matching import NO_PREDICTION, Pair, match
from medssl.evaluation.metrics import Presence, Scores, score_labels
from medssl.evaluation.subgroups import by_group, groups_of, read_facts
from medssl.evaluation.summary import group_sentences, sentence, summarise
from medssl.io import is_image, read_volume
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write
from medssl.volume import Volume

_GRID_TOLERANCE_MM = 0.1
_IN_MM = ("nsd", "nsd_area", "hd95_mm", "hd_mm", "assd_mm", "volume_ml", "reference_ml", "volume_error_ml")
_UNSCORED = "W_LABEL_SET"
_NO_MM = "W_NO_MM"

_log = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """How predictions are compared with references.

    Args:
        label_values: Structures to score; by default every value above 0 in any reference. Another value in a
            reference then refuses the case.
        nsd_tolerance_mm: Surfaces no farther apart than this agree.
        nsd_area: Also the surface Dice that weighs surface elements by area, as DeepMind does; twice the time.
        subjects: CSV with ``case_id``, ``subject_id`` and, if wanted, ``split``; without it every case is a subject.
            Not needed where the references are given as a cohort table.
        split: Score only this split, and refuse its cases that have no prediction instead of leaving them out.
        bootstrap: Draws of subjects for the intervals.
        seed: Of the draws.
        worst: Number of worst results to name in the summary.
        xform: Which NIfTI transform to believe where the two disagree; by default such files are refused.
        assume_spacing_mm: Voxel size of files that state none; without it their results in mm are left out.
        lesions: Count the lesions of every structure, each connected component one.
        lesion_labels: Count them of these structures only.
        lesion_rule: ``iou`` matches them one to one; by ``any`` one shared voxel finds a lesion.
        lesion_min_iou: Smallest intersection over union of a match.
        lesion_scores: Folder of maps that say how sure the model is of each voxel, named as the predictions, for FROC
            and AP of one structure.
        groups: Columns to measure subgroups by, such as site, scanner, sex or age: of ``facts``, ``subjects``, the
            cohort, and of ``facts.csv`` and ``acquisition.csv`` beside it.
        bands: For columns of numbers in ``groups``, the width of the bands or all of their edges; default quartiles.
        facts: Another CSV with ``case_id`` and columns for ``groups``.
    """

    label_values: tuple[int, ...] | None = None
    nsd_tolerance_mm: float = Field(1.0, ge=0)
    nsd_area: bool = True
    subjects: str | None = None
    split: Literal["train", "val", "test"] | None = None
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)
    worst: int = Field(10, ge=0)
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None
    lesions: bool = False
    lesion_labels: tuple[int, ...] = ()
    lesion_rule: Rule = "iou"
    lesion_min_iou: float = Field(0.1, gt=0, le=1)
    lesion_scores: str | None = None
    groups: tuple[str, ...] = ()
    bands: dict[str, float | tuple[float, ...]] = Field(default_factory=dict)
    facts: str | None = None

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        if self.lesion_scores is not None and (self.lesions or len(self.lesion_labels) != 1):
            raise ValueError("lesion_scores are of one structure; name it alone in lesion_labels, without lesions")
        return self


@dataclass(frozen=True)
class EvaluateResult:
    """What was measured.

    Args:
        ledger: Every reference and every prediction, by case.
        cases: One row a case and structure, the worst first; None after a dry run.
        summary: One row a structure and metric, and for all structures together; None after a dry run.
        further: Tables of what else was asked for, by name: ``lesions``, ``lesion_cases``, ``lesion_summary``, ``froc``
            and ``subgroups``.
    """

    ledger: Ledger
    cases: pd.DataFrame | None = None
    summary: pd.DataFrame | None = None
    further: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """What the numbers say, one sentence a structure, one for the worst result, and what they leave out."""
        if self.cases is None or self.summary is None:
            return []
        found = [sentence(str(label), part) for label, part in self.summary.groupby("label", sort=False)]
        scored = self.cases[self.cases["presence"] != Presence.NEITHER.value]
        if len(scored):
            row = scored.iloc[0]
            found.append(f"Worst: case {row['case_id']}, label {row['label']}, Dice {row['dice']:.3f}.")
        if "lesion_summary" in self.further:
            found += lesion_sentences(self.further["lesion_summary"])
        if "subgroups" in self.further:
            found += group_sentences(self.further["subgroups"])
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
        out: Folder for ``cases.csv``, ``summary.csv``, ``summary.json``, ``refused.csv`` and the journal; with lesions
            also ``lesions.csv``, ``lesion_cases.csv``, ``lesion_summary.csv`` and, with scores, ``froc.csv``; with
            groups ``subgroups.csv``, and the group of each case as columns of ``cases.csv``.
        config: See :class:`EvaluateConfig`.
        dry_run: Match files, but read and write nothing.

    Raises:
        NoInputError: if no case has both a prediction and a reference.
        CaseError: E_NAME_CLASH, if two files of one folder differ only in upper case, accents or suffix, or if one
            prediction is named as the images of two cases.
        ConfigError: if a column of ``groups`` is in no table.
    """
    config = config or EvaluateConfig()
    ledger = Ledger()
    pairs = match(predictions, labels, ledger, subjects=config.subjects, split=config.split)
    groups = _groups(labels, config, case_ids=[pair.case_id for pair in pairs])
    if dry_run:
        for pair in pairs:
            ledger.accept(pair.case_id)
        ledger.check()
        return EvaluateResult(ledger)
    with RunFolder(out) as run:
        run.write_recipe({"command": "evaluate", **config.to_dict()})
        scored: list[Pair] = []
        rows: list[dict[str, Any]] = []
        lesions: list[dict[str, Any]] = []
        for pair in track(pairs, "evaluate"):
            found = pool.attempt(partial(_score, config=config), pair, pair.case_id)
            if isinstance(found, EnvironmentFaultError):
                raise found
            if isinstance(found, MedSSLError):
                _log.warning("%s: %s: %s", pair.case_id, found.code, found.message)
                ledger.reject(pair.case_id, found)
                continue
            ledger.accept(pair.case_id, warnings=found.warnings)
            scored.append(pair)
            names = {"case_id": pair.case_id, "subject_id": pair.subject_id}
            rows += [{**names, "label": value, **columns} for value, columns in found.columns.items()]
            lesions += [{**names, "label": value, **row._asdict()} for value, part in found.lesions for row in part]
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.IGNORED, Outcome.WARNED))
        ledger.check()
        run.journal.log(command="evaluate", **ledger.counts())
        if not rows:
            raise NoInputError(
                f"{predictions}: {len(pairs)} cases, {len(scored)} readable, and no structure in any; see "
                f"{out / 'refused.csv'}, or name the structures in label_values."
            )
        cases = _cases(scored, rows, config)
        summary = summarise(cases, bootstrap=config.bootstrap, seed=config.seed)
        further = {**_lesion_tables(cases, lesions, config), **_subgroups(cases, groups, config)}
        for column in groups.columns:
            cases[f"group_{column}"] = cases["case_id"].map(groups[column])
        result = EvaluateResult(ledger, cases, summary, further)
        _write(out, result, config)
    return result


class _Found(NamedTuple):
    """What one pair gave: table columns and lesions by label value, and what to warn of."""

    columns: dict[int, dict[str, float | str]]
    lesions: list[tuple[int, list[Lesion]]]
    warnings: tuple[str, ...]


def _score(pair: Pair, *, config: EvaluateConfig) -> _Found:
    """Scores of every structure asked for, or of those in this pair."""
    reference, said, has_spacing = _read_reference(pair, config)
    reading = pair.reading.completed(xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)
    prediction, prediction_source = read_volume(
        pair.prediction, unit="label", xform=reading.xform, assume_spacing_mm=reading.assume_spacing_mm
    )
    prediction = turned_onto(prediction, reference.geometry)
    _check_grid(prediction, reference, item=f"{pair.case_id}: prediction")
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
        with_area=config.nsd_area,
    )
    lesions = _lesions(pair, prediction, reference, config=config, values=values)
    warnings = [*said, *prediction_source.warnings]
    if not in_reference:
        warnings.append("W_EMPTY_LABEL: the reference holds background only.")
    unscored = sorted(in_prediction - set(values))
    if unscored:
        warnings.append(f"{_UNSCORED}: the prediction holds the label values {unscored}, which were not asked for.")
    columns = {value: found.to_dict() for value, found in scores.items()}
    if not has_spacing:
        warnings.append(f"{_NO_MM}: no voxel size is known, so nothing was measured in mm; see assume_spacing_mm.")
        columns = {
            value: {name: np.nan if name in _IN_MM else cell for name, cell in row.items()}
            for value, row in columns.items()
        }
        lesions = [
            (value, [row._replace(reference_ml=np.nan, predicted_ml=np.nan) for row in part]) for value, part in lesions
        ]
    return _Found(columns, lesions, tuple(warnings))


def _lesions(
    pair: Pair, prediction: Volume, reference: Volume, *, config: EvaluateConfig, values: Sequence[int]
) -> list[tuple[int, list[Lesion]]]:
    """Lesions of the structures that were asked for."""
    chosen = values if config.lesions else config.lesion_labels
    scores = None
    if config.lesion_scores is not None:
        path = Path(config.lesion_scores) / pair.prediction.name
        volume, _ = read_volume(path, xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)
        turned = turned_onto(volume, reference.geometry)
        _check_grid(turned, reference, item=f"{pair.case_id}: score map")
        scores = turned.array[0]
    return [
        (
            value,
            find_lesions(
                prediction.array[0] == value,
                reference.array[0] == value,
                geometry=reference.geometry,
                rule=config.lesion_rule,
                min_iou=config.lesion_min_iou,
                scores=scores,
            ),
        )
        for value in chosen
    ]


def _check_grid(volume: Volume, reference: Volume, *, item: str) -> None:
    if volume.array.shape != reference.array.shape:
        raise CaseError(
            f"{item} of shape {volume.geometry.shape}, reference {reference.geometry.shape}; "
            "one grid is needed. Predict on the image that the reference was drawn on.",
            code="E_SHAPE",
        )
    distance = reference.geometry.max_corner_distance_mm(volume.geometry)
    if distance > _GRID_TOLERANCE_MM:
        raise GeometryError(
            f"{item} lies {distance:.2f} mm off its reference at a corner; {_GRID_TOLERANCE_MM} mm "
            "is allowed. Predict on the image that the reference was drawn on."
        )


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


def _cases(scored: Sequence[Pair], rows: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> pd.DataFrame:
    """A row for every structure in every case, the worst first."""
    cases = pd.DataFrame(rows)
    everyone = pd.DataFrame([(pair.case_id, pair.subject_id) for pair in scored], columns=["case_id", "subject_id"])
    full = everyone.merge(pd.DataFrame({"label": sorted(cases["label"].unique())}), how="cross")
    cases = full.merge(cases, how="left", on=["case_id", "subject_id", "label"])
    # a structure of other cases that is in neither map of this one
    area = 1.0 if config.nsd_area else None
    neither = Scores(Presence.NEITHER, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, area).to_dict()
    cases.loc[cases["presence"].isna(), list(neither)] = list(neither.values())
    return cases.sort_values(["dice", "hd95_mm"], ascending=[True, False], kind="stable").reset_index(drop=True)


def _lesion_tables(
    cases: pd.DataFrame, lesions: Sequence[Mapping[str, Any]], config: EvaluateConfig
) -> dict[str, pd.DataFrame]:
    if not config.lesions and not config.lesion_labels:
        return {}
    names = ["case_id", "subject_id", "label"]
    table = pd.DataFrame(lesions, columns=[*names, *Lesion._fields])
    searched = cases[names]
    if not config.lesions:
        people = cases[names[:2]].drop_duplicates()
        searched = people.merge(pd.DataFrame({"label": config.lesion_labels}), how="cross")
    return lesion_tables(table, searched, num=config.bootstrap, seed=config.seed)


def _groups(labels: Path, config: EvaluateConfig, *, case_ids: Sequence[str]) -> pd.DataFrame:
    """Group of each case in each column asked for."""
    if not config.groups:
        return pd.DataFrame()
    paths = [Path(path) for path in (config.facts, config.subjects) if path is not None]
    if labels.suffix.lower() == ".csv":
        beside = [labels.with_name(name) for name in ("facts.csv", "acquisition.csv")]
        paths += [labels, *(path for path in beside if path.is_file())]
    return groups_of(read_facts(paths), config.groups, case_ids=case_ids, bands=config.bands)


def _subgroups(cases: pd.DataFrame, groups: pd.DataFrame, config: EvaluateConfig) -> dict[str, pd.DataFrame]:
    if groups.empty:
        return {}
    measure = partial(summarise, bootstrap=config.bootstrap, seed=config.seed)
    return {"subgroups": by_group(cases, groups, measure=measure)}


def _write(out: Path, result: EvaluateResult, config: EvaluateConfig) -> None:
    if result.cases is None or result.summary is None:
        return
    atomic_write(out / "cases.csv", result.cases.to_csv(index=False))
    atomic_write(out / "summary.csv", result.summary.to_csv(index=False))
    for name, table in result.further.items():
        atomic_write(out / f"{name}.csv", table.to_csv(index=False))
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
