"""A column of facts beside embeddings, the readers that are fitted on one part of it, and their scores on another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Int64
from pydantic import Field

from medssl.config import Config
from medssl.data.facts import Facts
from medssl.engine.probe import knn_shares, linear_probabilities, ridge_values
from medssl.errors import ConfigError
from medssl.evaluation.decisions import auroc, balanced_accuracy, confusion, curve, r_squared
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.statistics import Estimate, bootstrap, cluster_proportion

Kind = Literal["classes", "numbers"]
Scheme = Literal["split", "folds"]
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classes": ("accuracy", "balanced_accuracy", "auroc"),
    "numbers": ("r2", "mae"),
}
_MOST_CLASSES = 6


class ReaderConfig(Config):
    """How readers are fitted and scored.

    Args:
        folds: Of subjects.
        neighbours: That vote.
        l2: Penalty of the linear reader.
        ridge: Penalty of the reader of numbers, as a share of the number of cases.
        bootstrap: Draws of each interval.
        seed: Of the draws.
    """

    folds: int = Field(5, ge=2)
    neighbours: int = Field(20, ge=1)
    l2: float = Field(1e-2, gt=0)
    ridge: float = Field(1.0, gt=0)
    bootstrap: int = Field(1000, ge=100)
    seed: int = Field(0, ge=0)


class Column(NamedTuple):
    """One column of facts, with the cases that state it.

    Args:
        vectors: One a case.
        table: Case, subject and split of each.
        kind: What its values are.
        truth: Number of each case's class, or its value.
        classes: Their names, sorted; none for numbers.
    """

    vectors: Float32[np.ndarray, "n d"]
    table: pd.DataFrame
    kind: Kind
    truth: Float64[np.ndarray, " n"]
    classes: tuple[str, ...]

    @property
    def readers(self) -> tuple[str, ...]:
        """What reads it; the first looks at no vector and gets what chance gets."""
        return ("majority", "knn", "linear") if self.kind == "classes" else ("mean", "ridge")

    @property
    def subjects(self) -> list[str]:
        """Of each case."""
        return [str(name) for name in self.table["subject_id"]]


def column_of(found: Embeddings, facts: Facts, column: str, kind: Literal["auto", "classes", "numbers"]) -> Column:
    """The cases that state a column.

    Args:
        found: One vector a case.
        facts: Has the column.
        column: Its name.
        kind: ``auto`` takes numbers where every value is one and there are more than six.

    Raises:
        ConfigError: if there is no such column (E_TARGET), all its values are equal (E_ONE_CLASS), numbers were asked
            for and one is not, or fewer than two subjects state it.
    """
    if column not in facts.columns:
        raise ConfigError(
            f"target {column}: no such column; the table has {', '.join(facts.columns) or 'none'}. Name one of these.",
            code="E_TARGET",
        )
    values = [facts.of(str(case)).get(column, "") for case in found.table["case_id"]]
    stated = np.array([value != "" for value in values])
    texts = [value for value in values if value]
    numbers = pd.to_numeric(pd.Series(texts, dtype=str), errors="coerce").to_numpy(float)
    is_numeric = len(texts) > 0 and bool(np.isfinite(numbers).all())
    if kind == "numbers" and not is_numeric:
        strange = next((text for text, number in zip(texts, numbers, strict=True) if not math.isfinite(number)), "none")
        raise ConfigError(f"target {column}: a value is {strange!r}; numbers are needed. Correct it, or read classes.")
    if len(set(texts)) < 2:
        raise ConfigError(
            f"target {column}: {len(texts)} of {len(values)} embedded cases state it, with {len(set(texts))} different "
            "values; at least two values are needed. Check the case ids of the table, or choose another column.",
            code="E_ONE_CLASS",
        )
    told = kind if kind != "auto" else "numbers" if is_numeric and len(set(texts)) > _MOST_CLASSES else "classes"
    classes = tuple(sorted(set(texts))) if told == "classes" else ()
    truth = np.array([classes.index(text) for text in texts], float) if classes else numbers
    table = found.table[stated].reset_index(drop=True)
    if table["subject_id"].nunique() < 2:
        raise ConfigError(f"target {column}: cases of one subject state it; two subjects are needed. Embed more.")
    return Column(found.vectors[stated], table, told, truth, classes)


def parts_of(
    task: Column, scheme: Literal["split", "folds"], folds: int
) -> list[tuple[str, Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]]:
    """Name, rows to fit on and rows to score, of each part."""
    if scheme == "split":
        splits = task.table["split"].to_numpy()
        return [("test", np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test"))]
    fold = _folds(task, folds)
    return [(f"fold {k}", np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(int(fold.max()) + 1)]


def _folds(task: Column, count: int) -> Int64[np.ndarray, " n"]:
    """Fold of each case: subjects, sorted by their first class and a hash, are dealt out in turn."""
    first = dict(zip(task.subjects[::-1], task.truth[::-1], strict=True))
    ordered = sorted(first, key=lambda name: (first[name] if task.classes else 0.0, place_of(name)))
    dealt = {subject: place % min(count, len(ordered)) for place, subject in enumerate(ordered)}
    return np.array([dealt[subject] for subject in task.subjects], dtype=np.int64)


def place_of(text: str) -> str:
    """A key to sort names by that nobody has chosen."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(
    task: Column, reader: str, fit: Int64[np.ndarray, " a"], score: Int64[np.ndarray, " b"], config: ReaderConfig
) -> Float64[np.ndarray, "b k"]:
    """Probability of each class, or the number, of the rows to score."""
    x, x_test = task.vectors[fit], task.vectors[score]
    if task.kind == "numbers":
        y = task.truth[fit][:, None]
        return ridge_values(x, y, x_test, l2=config.ridge) if reader == "ridge" else np.full((len(score), 1), y.mean())
    y = task.truth[fit].astype(np.int64)
    if reader == "majority":
        shares = np.bincount(y, minlength=len(task.classes)) / len(y)
        return np.tile(shares, (len(score), 1))
    known, shares = (
        knn_shares(x, y, x_test, num_neighbours=config.neighbours, standardise=True)
        if reader == "knn"
        else linear_probabilities(x, y, x_test, l2=config.l2)
    )
    full = np.zeros((len(score), len(task.classes)))
    full[:, known] = shares
    return full


def as_table(
    task: Column, rows: Int64[np.ndarray, " b"], scores: Float64[np.ndarray, "b k"], **heads: str | int
) -> pd.DataFrame:
    """What a reader said of some cases, with its name and the like in front."""
    table = task.table.loc[rows, ["case_id", "subject_id"]].reset_index(drop=True)
    if task.kind == "numbers":
        told = table.assign(truth=task.truth[rows], value=scores[:, 0])
    else:
        names = np.array(task.classes)
        shares = {f"p_{name}": scores[:, place] for place, name in enumerate(task.classes)}
        told = table.assign(truth=names[task.truth[rows].astype(int)], **shares, decision=names[scores.argmax(axis=1)])
    for place, (name, value) in enumerate(heads.items()):
        told.insert(place, name, value)
    return told


def scores_of(table: pd.DataFrame, task: Column) -> Float64[np.ndarray, " m"]:
    """The metrics of one reader's rows; NaN where they are not defined."""
    return _measure(table, task)(np.arange(len(table)))


def intervals(table: pd.DataFrame, task: Column, config: ReaderConfig) -> list[Estimate]:
    """The same metrics with intervals, subjects drawn with replacement."""
    subjects = [str(name) for name in table["subject_id"]]
    found = bootstrap(_measure(table, task), subjects, num=config.bootstrap, seed=config.seed)
    if task.kind == "classes" and found[0].value in {0.0, 1.0}:  # no draw of equal cases differs from another
        right = (table["truth"] == table["decision"]).to_numpy(bool)
        found[0] = Estimate(*cluster_proportion(right, subjects, num=config.bootstrap, seed=config.seed))
    return found


def _measure(table: pd.DataFrame, task: Column) -> Callable[[Int64[np.ndarray, " n"]], Float64[np.ndarray, " m"]]:
    """From row numbers to metrics."""
    if task.kind == "numbers":
        truth, value = table["truth"].to_numpy(float), table["value"].to_numpy(float)
        return lambda rows: np.array(
            [r_squared(value[rows], truth[rows]), float(np.abs(value[rows] - truth[rows]).mean())]
        )
    places = {name: place for place, name in enumerate(task.classes)}
    true, decided = (table[name].map(places).to_numpy(np.int64) for name in ("truth", "decision"))
    shares = table[[f"p_{name}" for name in task.classes]].to_numpy(float)
    return lambda rows: _class_scores(true[rows], decided[rows], shares[rows])


def _class_scores(
    truth: Int64[np.ndarray, " n"], decided: Int64[np.ndarray, " n"], shares: Float64[np.ndarray, "n k"]
) -> Float64[np.ndarray, " 3"]:
    """Accuracy, balanced accuracy, and AUROC of each class against the others, mean over those that occur."""
    count = shares.shape[1]
    wanted = [1] if count == 2 else range(count)
    areas = [area for k in wanted if not math.isnan(area := auroc(curve(shares[:, k], truth == k)))]
    balanced = balanced_accuracy(confusion(decided, truth, num_classes=count))
    return np.array([float((truth == decided).mean()), balanced, float(np.mean(areas)) if areas else math.nan])
