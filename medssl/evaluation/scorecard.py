"""Every measure of one table of cases: what it is, its interval over subjects, and why it is empty where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int64

from medssl.evaluation import decisions
from medssl.evaluation.calibration import Binning, brier_terms, calibration_error, log_loss_terms
from medssl.evaluation.delong import auroc_interval
from medssl.evaluation.statistics import Estimate, bootstrap, cluster_bootstrap, cluster_proportion
from medssl.tasks.targets import SEPARATOR

COLUMNS = ("metric", "class", "value", "low", "high", "cases", "subjects", "interval", "note")
ALL = "all"

_ONE_SUBJECT = "one subject, so no interval"
_SAME = "the same in every draw, so no interval"
_NOTHING = Estimate(math.nan, math.nan, math.nan)

Kind = Literal["classes", "labels", "ordinal", "numbers"]
_Measure = Callable[["_Draw"], float]


class _Draw:
    """Some of the cases, with repeats, and the ROC curve of each class among them, made once.

    Args:
        rows: Their row numbers.
    """

    def __init__(self, rows: Int64[np.ndarray, " n"]) -> None:
        self.rows = rows
        self._curves: dict[str, decisions.Curve] = {}

    def curve(self, name: str, chance: Float64[np.ndarray, " m"], truth: Bool[np.ndarray, " m"]) -> decisions.Curve:
        """Curve of the class ``name``, from the probabilities and truths of all cases."""
        if name not in self._curves:
            self._curves[name] = decisions.curve(chance[self.rows], truth[self.rows])
        return self._curves[name]


class Task(NamedTuple):
    """What is decided of each case.

    Args:
        kind: One of several classes, any of several labels, one of ordered classes, or a number.
        classes: Names of classes or labels, in order; empty for numbers.
        positive: The class that is looked for, where there are two.
    """

    kind: Kind
    classes: tuple[str, ...] = ()
    positive: str = ""


class Options(NamedTuple):
    """How measures are taken.

    Args:
        bootstrap: Draws of subjects.
        seed: Of the draws.
        bins: Of the calibration error.
        binning: Of the calibration error.
        specificities: At which the sensitivity is told.
        sensitivities: At which the specificity is told.
    """

    bootstrap: int = 2000
    seed: int = 0
    bins: int = 10
    binning: Binning = "width"
    specificities: tuple[float, ...] = (0.9,)
    sensitivities: tuple[float, ...] = (0.9,)


def score(cases: pd.DataFrame, task: Task, options: Options | None = None) -> pd.DataFrame:
    """Measures of a table of cases, one row each.

    Args:
        cases: ``case_id, subject_id, truth, decision`` as text, several labels joined by ``;``; ``p_<name>`` for every
            class or label, in [0, 1]; or ``value``, with numbers as truth.
        task: What was decided.
        options: How.

    Returns:
        Columns :data:`COLUMNS`. Numbers that the cases do not define are missing, and ``note`` says why. ``interval``
        names the method: ``bootstrap`` (subjects drawn, percentiles widened), ``DeLong`` (Obuchowski's variance, on the
        logit scale) or ``exact`` (every case alike).
    """
    card = _Card(cases["subject_id"].astype(str).tolist(), options or Options())
    if task.kind == "classes":
        _score_classes(card, cases, task)
    elif task.kind == "labels":
        _score_labels(card, cases, task)
    else:
        _score_numbers(card, cases, task)
    return card.table()


def label_matrix(texts: Sequence[str], labels: Sequence[str]) -> Bool[np.ndarray, "n k"]:
    """Which of the labels stand in each text, joined by ``;``."""
    found = [{part.strip() for part in text.split(SEPARATOR)} for text in texts]
    return np.array([[label in parts for label in labels] for parts in found], dtype=bool).reshape(-1, len(labels))


def truth_matrix(cases: pd.DataFrame, task: Task) -> Bool[np.ndarray, "n k"]:
    """Which classes or labels hold, in the order of the task."""
    if task.kind == "labels":
        return label_matrix(cases["truth"].tolist(), task.classes)
    return np.asarray(
        cases["truth"].to_numpy(dtype=object)[:, None] == np.array(task.classes, dtype=object), dtype=bool
    )


def probability_matrix(cases: pd.DataFrame, task: Task) -> Float64[np.ndarray, "n k"]:
    """Columns ``p_<name>`` in the order of the task."""
    return cases[[f"p_{name}" for name in task.classes]].to_numpy(dtype=np.float64)


class _Card:
    """Rows as they are measured; those that need a joint bootstrap wait for one."""

    def __init__(self, subjects: Sequence[str], options: Options) -> None:
        self.options = options
        self._subjects = np.asarray(subjects)
        self._rows: list[dict[str, Any]] = []
        self._waiting: list[tuple[int, _Measure, str]] = []

    def mean(self, metric: str, values: Float64[np.ndarray, " n"], name: str = ALL) -> None:
        """Book the mean over cases."""
        found = cluster_bootstrap(values, self._subjects.tolist(), num=self.options.bootstrap, seed=self.options.seed)
        self._book(metric, name, Estimate(*found), "bootstrap")

    def share(
        self, metric: str, hits: Bool[np.ndarray, " n"], among: Bool[np.ndarray, " n"], name: str, *, absent: str
    ) -> None:
        """Book the share of hits among some of the cases."""
        subjects = self._subjects[among].tolist()
        num_subjects = len(set(subjects))
        if not subjects:
            self._rows.append(_row(metric, name, _NOTHING, cases=0, subjects=0, interval="", note=absent))
            return
        found = cluster_proportion(hits[among], subjects, num=self.options.bootstrap, seed=self.options.seed)
        how = "exact" if found.mean in {0.0, 1.0} else "bootstrap"
        self._rows.append(
            _row(metric, name, Estimate(*found), cases=len(subjects), subjects=num_subjects, interval=how)
        )

    def area(self, scores: Float64[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], name: str) -> None:
        """Book the area under the ROC curve."""
        found = auroc_interval(scores, truth, clusters=self._subjects.tolist())
        note = "one class only" if math.isnan(found.mean) else ""
        if not note and math.isnan(found.low):
            kinds = min(len(set(self._subjects[chosen].tolist())) for chosen in (truth, ~truth))
            note = "no variance, so no interval" if kinds > 1 else "a class comes from one subject, so no interval"
        self._book("auroc", name, Estimate(*found), "DeLong", note)

    def drawn(self, metric: str, measure: _Measure, name: str = ALL, *, absent: str = "one class only") -> None:
        """Book a row now, and its numbers when the table is asked for."""
        self._waiting.append((len(self._rows), measure, absent))
        self._book(metric, name, _NOTHING, "")

    def table(self) -> pd.DataFrame:
        """All rows, after one bootstrap for those that wait."""

        def all_of_them(rows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
            draw = _Draw(rows)
            return np.array([measure(draw) for _, measure, _ in self._waiting])

        estimates = bootstrap(all_of_them, self._subjects.tolist(), num=self.options.bootstrap, seed=self.options.seed)
        for (place, _, absent), drawn in zip(self._waiting, estimates, strict=True):
            note = absent if math.isnan(drawn.value) else ""
            if not note and drawn.undefined > 0:
                note = f"not defined on {100 * drawn.undefined:.1f} % of draws"
            booked = self._rows[place]
            counts = {"cases": booked["cases"], "subjects": booked["subjects"]}
            self._rows[place] = _row(
                booked["metric"], booked["class"], drawn, **counts, interval="bootstrap", note=note
            )
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def _book(self, metric: str, name: str, found: Estimate, interval: str, note: str = "") -> None:
        counts = {"cases": len(self._subjects), "subjects": len(set(self._subjects.tolist()))}
        self._rows.append(_row(metric, name, found, **counts, interval=interval, note=note))


def _row(
    metric: str, name: str, found: Estimate, *, cases: int, subjects: int, interval: str, note: str = ""
) -> dict[str, Any]:
    if math.isclose(found.low, found.high, rel_tol=1e-9, abs_tol=1e-12):
        found, note = _NOTHING._replace(value=found.value), _SAME
    known = not math.isnan(found.low)
    if not known and not note:
        note = _ONE_SUBJECT
    values = (metric, name, found.value, found.low, found.high, cases, subjects, interval if known else "", note)
    return dict(zip(COLUMNS, values, strict=True))


def _score_classes(card: _Card, cases: pd.DataFrame, task: Task) -> None:
    names, options = task.classes, card.options
    code = {name: index for index, name in enumerate(names)}
    truth = cases["truth"].map(code).to_numpy(dtype=np.int64)
    decided = cases["decision"].map(code).to_numpy(dtype=np.int64)
    chances = probability_matrix(cases, task)
    card.mean("log_loss", log_loss_terms(chances, truth))
    card.mean("brier", brier_terms(chances, truth))
    right = decided == truth
    card.share("accuracy", right, np.ones(len(truth), dtype=bool), ALL, absent="")
    card.drawn(
        "balanced_accuracy",
        lambda draw: decisions.balanced_accuracy(
            decisions.confusion(decided[draw.rows], truth[draw.rows], num_classes=len(names))
        ),
    )
    top = chances.max(axis=1)
    hit = chances.argmax(axis=1) == truth
    card.drawn(
        "ece",
        lambda draw: calibration_error(top[draw.rows], hit[draw.rows], bins=options.bins, binning=options.binning),
    )
    one_hot = truth[:, None] == np.arange(len(names))
    chosen = decided[:, None] == np.arange(len(names))
    if len(names) > 2:
        _score_averages(card, chances, one_hot, chosen, names=names)
    for name in names if len(names) > 2 else (task.positive,):
        place = code[name]
        _score_one(card, chances[:, place], one_hot[:, place], chosen[:, place], name)


def _score_labels(card: _Card, cases: pd.DataFrame, task: Task) -> None:
    truth = label_matrix(cases["truth"].tolist(), task.classes)
    decided = label_matrix(cases["decision"].tolist(), task.classes)
    chances = probability_matrix(cases, task)
    card.mean("log_loss", label_losses(chances, truth))
    card.mean("brier", ((chances - truth) ** 2).mean(axis=1))
    card.share("exact_match", (decided == truth).all(axis=1), np.ones(len(truth), dtype=bool), ALL, absent="")
    _score_averages(card, chances, truth, decided, names=task.classes)
    for place, name in enumerate(task.classes):
        _score_one(card, chances[:, place], truth[:, place], decided[:, place], name)


def label_losses(chances: Float64[np.ndarray, "n k"], truth: Bool[np.ndarray, "n k"]) -> Float64[np.ndarray, " n"]:
    """Log loss of each case, averaged over its labels."""
    columns = [
        log_loss_terms(np.stack([1 - chances[:, place], chances[:, place]], axis=1), truth[:, place].astype(np.int64))
        for place in range(truth.shape[1])
    ]
    return np.asarray(np.mean(columns, axis=0), dtype=np.float64)


def _score_averages(
    card: _Card,
    chances: Float64[np.ndarray, "n k"],
    truth: Bool[np.ndarray, "n k"],
    decided: Bool[np.ndarray, "n k"],
    *,
    names: Sequence[str],
) -> None:
    """Means over classes that occur, each against the rest: plain (macro) and by number of cases (weighted)."""
    there = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))

    def average(one: Callable[[int, _Draw], float], *, weighted: bool) -> _Measure:
        def measure(draw: _Draw) -> float:
            if len(there) == 0:
                return math.nan
            values = np.array([one(int(place), draw) for place in there])
            weights = truth[draw.rows][:, there].sum(axis=0) if weighted else np.ones(len(there))
            return float((values * weights).sum() / weights.sum()) if weights.sum() else math.nan

        return measure

    def area(place: int, draw: _Draw) -> float:
        return decisions.auroc(draw.curve(names[place], chances[:, place], truth[:, place]))

    def precision(place: int, draw: _Draw) -> float:
        return decisions.average_precision(draw.curve(names[place], chances[:, place], truth[:, place]))

    def harmonic(place: int, draw: _Draw) -> float:
        return decisions.f1(decided[draw.rows, place], truth[draw.rows, place])

    for metric, one in (("auroc", area), ("average_precision", precision), ("f1", harmonic)):
        card.drawn(f"{metric}_macro", average(one, weighted=False))
        card.drawn(f"{metric}_weighted", average(one, weighted=True))


def _score_one(
    card: _Card,
    chance: Float64[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    decided: Bool[np.ndarray, " n"],
    name: str,
) -> None:
    """One class against the rest."""
    options = card.options

    def at(measure: Callable[[decisions.Curve], float]) -> _Measure:
        return lambda draw: measure(draw.curve(name, chance, truth))

    card.area(chance, truth, name)
    card.drawn("average_precision", at(decisions.average_precision), name)
    card.share("prevalence", truth, np.ones(len(truth), dtype=bool), name, absent="")
    card.share("sensitivity", decided, truth, name, absent="no case of this class")
    card.share("specificity", ~decided, ~truth, name, absent="no case of another class")
    card.share("ppv", truth, decided, name, absent="no case was decided so")
    card.share("npv", ~truth, ~decided, name, absent="every case was decided so")
    card.drawn(
        "f1", lambda draw: decisions.f1(decided[draw.rows], truth[draw.rows]), name, absent="neither true nor decided"
    )
    for share in options.specificities:
        card.drawn(
            f"sensitivity_at_specificity_{share:g}",
            at(lambda found, share=share: decisions.sensitivity_at(found, specificity=share)),  # type: ignore[misc]
            name,
        )
    for share in options.sensitivities:
        card.drawn(
            f"specificity_at_sensitivity_{share:g}",
            at(lambda found, share=share: decisions.specificity_at(found, sensitivity=share)),  # type: ignore[misc]
            name,
        )
    card.drawn(
        "ece",
        lambda draw: calibration_error(chance[draw.rows], truth[draw.rows], bins=options.bins, binning=options.binning),
        name,
    )


def _score_numbers(card: _Card, cases: pd.DataFrame, task: Task) -> None:
    predicted = cases["value"].to_numpy(dtype=np.float64)
    if task.kind == "ordinal":
        code = {name: index for index, name in enumerate(task.classes)}
        levels = levels_of(task.classes)
        truth_code = cases["truth"].map(code).to_numpy(dtype=np.int64)
        decided_code = cases["decision"].map(code).to_numpy(dtype=np.int64)
        truth = np.array([levels[index] for index in truth_code])

        def counts(draw: _Draw) -> Int64[np.ndarray, "k k"]:
            return decisions.confusion(decided_code[draw.rows], truth_code[draw.rows], num_classes=len(levels))

        card.drawn("quadratic_kappa", lambda draw: decisions.quadratic_kappa(counts(draw)))
        card.share("accuracy", decided_code == truth_code, np.ones(len(truth), dtype=bool), ALL, absent="")
        card.drawn("balanced_accuracy", lambda draw: decisions.balanced_accuracy(counts(draw)))
    else:
        truth = cases["truth"].to_numpy(dtype=np.float64)
    card.mean("mae", np.abs(predicted - truth))
    card.mean("bias", predicted - truth)
    card.drawn("rmse", lambda draw: decisions.rmse(predicted[draw.rows], truth[draw.rows]))
    card.drawn(
        "r2", lambda draw: decisions.r_squared(predicted[draw.rows], truth[draw.rows]), absent="every truth is the same"
    )
    card.drawn(
        "concordance",
        lambda draw: decisions.concordance(predicted[draw.rows], truth[draw.rows]),
        absent="all truths and values are the same",
    )


def levels_of(classes: Sequence[str]) -> list[float]:
    """Number of each ordered class: its name where all names are numbers, else its place from 0."""
    try:
        return [float(name) for name in classes]
    except ValueError:
        return [float(place) for place in range(len(classes))]
