"""What embeddings know of a column of facts, read by the simplest readers there are, beside what chance gets.

Every subject is either fitted on or scored, never both. With a train and a test split each reader is fitted on the
former and scored on the latter; else every case is scored by a reader fitted on the other folds of subjects. A case
with several vectors is their mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from pydantic import Field

from medssl.data.facts import NAME as FACTS
from medssl.data.facts import Facts, read_facts
from medssl.engine.monitor import embedding_health
from medssl.engine.probe import uniformity
from medssl.errors import ConfigError, ReadError
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.probe_page import write_page
from medssl.evaluation.readings import (
    METRICS,
    Column,
    ReaderConfig,
    Scheme,
    as_table,
    column_of,
    intervals,
    parts_of,
    place_of,
    read,
    scores_of,
)
from medssl.evaluation.shortcuts import CHANCE_MARGIN, Shortcut, is_named_shortcut, tie
from medssl.evaluation.statistics import Estimate
from medssl.runfolder import RunFolder, atomic_write


class ProbeConfig(ReaderConfig):
    """How embeddings are read, with the options of :class:`~medssl.evaluation.readings.ReaderConfig`.

    Args:
        kind: ``numbers`` if every value is one and there are more than six, unless this says otherwise.
        scheme: ``split`` fits on train and scores test; ``folds`` scores every case; ``auto`` takes the former where
            both splits have two classes, or numbers.
        shots: Labelled subjects of each class (in all, for numbers) of the few-shot table; each contains the smaller.
        seeds: Of the few-shot draws.
        shortcuts: Columns that should not be readable; by default those named like a site or a scanner.
    """

    kind: Literal["auto", "classes", "numbers"] = "auto"
    scheme: Literal["auto", "split", "folds"] = "auto"
    shots: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5, 10)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 3, 4)
    shortcuts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ProbeResult:
    """What the readers found.

    Args:
        sentences: In words.
        metrics: ``reader, metric, value, low, high, cases, subjects, note``.
        report: The page.
    """

    sentences: tuple[str, ...]
    metrics: pd.DataFrame
    report: Path


def probe(
    embeddings: Path,
    *,
    facts: Path,
    target: str,
    out: Path,
    config: ProbeConfig | None = None,
    dry_run: bool = False,
) -> ProbeResult:
    """Read a column of facts from frozen embeddings.

    Args:
        embeddings: What ``embed`` wrote.
        facts: Table with ``case_id`` and the column, or a store that has one.
        target: The column.
        out: Gets ``metrics.csv``, ``predictions.csv``, ``few_shot.csv``, ``few_shot_predictions.csv``,
            ``shortcuts.csv``, ``shortcut_predictions.csv``, ``health.csv`` and ``report.html``.
        config: How they are read.
        dry_run: Check everything, and write nothing.

    Raises:
        ConfigError: if there is no such column (E_TARGET), its values are no numbers though numbers were asked for, or
            all are equal (E_ONE_CLASS); or fewer than two subjects state it.
        ReadError: if a file cannot be read.
    """
    chosen = config or ProbeConfig.parse({})
    found, known = Embeddings.read(embeddings).by_case(), _facts(facts)
    task = column_of(found, known, target, chosen.kind)
    scheme = _scheme(task, chosen)
    if dry_run:
        return ProbeResult((f"would read {target} of {len(task.table)} cases",), pd.DataFrame(), out / "report.html")
    predictions = _predictions(task, scheme, chosen)
    metrics = _metrics(predictions, task, chosen)
    few_predictions = _few_shot(task, scheme, chosen)
    few = _few_shot_scores(few_predictions, task)
    shortcuts, shortcut_predictions = _shortcuts(found, known, task, target, chosen)
    health = _health(found)
    left = len(found.table) - len(task.table)
    sentences = (
        *_told(metrics, task, target, scheme, left),
        *(line for item in shortcuts for line in item.sentences()),
    )
    tables = {
        "metrics": metrics,
        "predictions": predictions,
        "few_shot": few,
        "few_shot_predictions": few_predictions,
        "shortcuts": pd.DataFrame([item.row() for item in shortcuts], columns=Shortcut.COLUMNS),
        "shortcut_predictions": shortcut_predictions,
        "health": health,
    }
    with RunFolder(out) as run:
        run.write_recipe({**chosen.to_dict(), "target": target, "embeddings_digest": _digest(embeddings)})
        for name, table in tables.items():
            atomic_write(out / f"{name}.csv", table.to_csv(index=False))
        report = write_page(out / "report.html", target, tables, sentences=sentences, about=found.about)
        run.journal.log(command="probe", target=target, cases=len(task.table), findings=list(sentences))
    return ProbeResult(sentences, metrics, report)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(path: Path) -> Facts:
    table = path / FACTS if path.is_dir() else path
    if not table.is_file():
        raise ReadError(f"{table}: there is no such table. Give a CSV with case_id and the column to be read.")
    return read_facts(table)


def _scheme(task: Column, config: ProbeConfig) -> Scheme:
    splits = task.table["split"].to_numpy()
    values = [len(set(task.truth[splits == name])) for name in ("train", "test")]
    if config.scheme == "auto":
        return "split" if min(values) > 1 else "folds"
    if config.scheme == "split" and (values[0] < 2 or values[1] < 1):
        raise ConfigError(
            f"scheme split: {values[0]} and {values[1]} different values in train and test; at least 2 and 1 are "
            "needed. Use folds.",
            code="E_ONE_CLASS",
        )
    return config.scheme


def _predictions(task: Column, scheme: Scheme, config: ProbeConfig) -> pd.DataFrame:
    parts = parts_of(task, scheme, config.folds)
    return pd.concat(
        [
            as_table(task, rows, read(task, reader, fit, rows, config), reader=reader, part=name)
            for reader in task.readers
            for name, fit, rows in parts
        ],
        ignore_index=True,
    )


def _metrics(predictions: pd.DataFrame, task: Column, config: ProbeConfig) -> pd.DataFrame:
    rows = []
    for reader in task.readers:
        own = predictions[predictions["reader"] == reader].reset_index(drop=True)
        subjects = [str(name) for name in own["subject_id"]]
        for name, estimate in zip(METRICS[task.kind], intervals(own, task, config), strict=True):
            rows.append(
                {
                    "reader": reader,
                    "metric": name,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "cases": len(own),
                    "subjects": len(set(subjects)),
                    "note": _note(estimate, len(set(subjects))),
                }
            )
    return pd.DataFrame(rows)


def _note(estimate: Estimate, subjects: int) -> str:
    """Why a value or its interval is not to be taken as it stands."""
    if math.isnan(estimate.value):
        return "one value only"
    if subjects < 2:
        return "one subject only"
    return "equal in every draw" if estimate.low == estimate.high else ""


def _few_shot(task: Column, scheme: Scheme, config: ProbeConfig) -> pd.DataFrame:
    """Predictions of readers that saw a few subjects; nested, as every draw is an order of the subjects to fit on."""
    parts = parts_of(task, scheme, config.folds)
    told = []
    for seed in config.seeds:
        name, fit, rows = parts[seed % len(parts)]
        for shots in config.shots:
            few = _drawn(task, fit, shots, seed)
            if few is None:
                continue
            heads: dict[str, str | int] = {"shots": shots, "seed": seed, "fitted": len(few), "part": name}
            for reader in task.readers[1:]:
                scores = read(task, reader, few, rows, config)
                told.append(as_table(task, rows, scores, reader=reader, **heads))
    return pd.concat(told, ignore_index=True) if told else pd.DataFrame()


def _drawn(task: Column, fit: Int64[np.ndarray, " a"], shots: int, seed: int) -> Int64[np.ndarray, " k"] | None:
    """All cases of the first ``shots`` subjects of each class; None if a class has fewer."""
    subjects = np.array(task.subjects)
    chosen: set[str] = set()
    for value in range(max(1, len(task.classes))):
        own = fit[task.truth[fit] == value] if task.classes else fit
        ordered = sorted(set(subjects[own].tolist()), key=lambda subject: place_of(f"{seed}:{subject}"))
        if len(ordered) < shots or (shots < 2 and not task.classes):  # no line goes through one number
            return None
        chosen |= set(ordered[:shots])
    return fit[np.isin(subjects[fit], sorted(chosen))]


def _few_shot_scores(predictions: pd.DataFrame, task: Column) -> pd.DataFrame:
    rows = []
    keys = ["reader", "shots", "seed"]
    for names, own in predictions.groupby(keys, sort=False) if len(predictions) else ():
        heads = dict(zip(keys, names, strict=True))
        scores = zip(METRICS[task.kind], scores_of(own, task).tolist(), strict=True)
        rows += [
            {**heads, "fitted": own["fitted"].iloc[0], "cases": len(own), "metric": name, "value": value}
            for name, value in scores
        ]
    return pd.DataFrame(rows, columns=[*keys, "fitted", "cases", "metric", "value"])


def _shortcuts(
    found: Embeddings, facts: Facts, task: Column, target: str, config: ProbeConfig
) -> tuple[list[Shortcut], pd.DataFrame]:
    columns = config.shortcuts
    if columns is None:
        columns = tuple(name for name in facts.columns if is_named_shortcut(name) and name != target)
    told, tables = [], []
    for column in columns:
        try:
            own = column_of(found, facts, column, "classes")
        except ConfigError as error:
            if error.code != "E_ONE_CLASS":
                raise
            told.append(Shortcut(column, note="one value only"))
            continue
        parts = parts_of(own, "folds", config.folds)
        table = pd.concat(
            [as_table(own, rows, read(own, "linear", fit, rows, config), column=column) for _, fit, rows in parts],
            ignore_index=True,
        )
        estimate = intervals(table, own, config)[1]
        stated = {str(case): facts.of(str(case)).get(column, "") for case in task.table["case_id"]}
        pairs = [(value, truth) for value, truth in zip(stated.values(), task.truth, strict=True) if value]
        tied = tie(pairs) if task.classes else math.nan
        told.append(
            Shortcut(
                column, classes=len(own.classes), cases=len(table), subjects=own.table["subject_id"].nunique(),
                chance=1 / len(own.classes), value=estimate.value, low=estimate.low, high=estimate.high, tied=tied,
                alarm=bool(estimate.low > 1 / len(own.classes) + CHANCE_MARGIN),
            )
        )  # fmt: skip
        tables.append(table)
    columns_kept = ["column", "case_id", "subject_id", "truth", "decision"]
    joined = pd.concat(tables, ignore_index=True)[columns_kept] if tables else pd.DataFrame(columns=columns_kept)
    return told, joined


def _health(found: Embeddings) -> pd.DataFrame:
    count, size = found.vectors.shape
    numbers: dict[str, float] = {"cases": count, "dimensions": size}
    if count > 1:
        numbers |= embedding_health(torch.from_numpy(found.vectors))
        numbers["uniformity"] = uniformity(found.vectors)
    notes = {"rank_me": f"wants at least {10 * size} cases" if count < 10 * size else ""}
    rows = [{"measure": name, "value": value, "note": notes.get(name, "")} for name, value in numbers.items()]
    return pd.DataFrame(rows, dtype=object)


def _told(metrics: pd.DataFrame, task: Column, target: str, scheme: str, left: int) -> Iterator[str]:
    metric = "balanced_accuracy" if task.kind == "classes" else "r2"
    rows = {row["reader"]: row for row in metrics.to_dict("records") if row["metric"] == metric}
    baseline, *others = task.readers
    chance = f"{baseline} {rows[baseline]['value']:.3f}"
    how = "on the test split" if scheme == "split" else "each subject scored by readers fitted on others"
    for reader in others:
        row = rows[reader]
        if math.isnan(row["value"]):
            yield f"{target}, {reader}: {metric.replace('_', ' ')} is not defined, as {row['note']} is scored."
            continue
        ends = "no interval" if math.isnan(row["low"]) else f"95 % {row['low']:.3f} to {row['high']:.3f}"
        yield (
            f"{target}, {reader}: {metric.replace('_', ' ')} {row['value']:.3f} ({ends}), {chance}; "
            f"{row['cases']} cases of {row['subjects']} subjects, {how}."
        )
    if left:
        yield f"{left} embedded cases state no {target} and were left out."
