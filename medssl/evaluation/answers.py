"""Two tables of answers, predicted and true, brought together case by case."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from medssl.config import Config
from medssl.data.rows import read_table, table_error
from medssl.errors import CaseError, ConfigError, NoInputError, ReadError
from medssl.evaluation.calibration import log_loss_terms
from medssl.evaluation.scorecard import (
    ALL,
    Task,
    label_losses,
    label_matrix,
    levels_of,
    probability_matrix,
)
from medssl.evaluation.subgroups import read_facts
from medssl.ledger import Ledger
from medssl.tasks.targets import NO_LABEL, SEPARATOR

_FACTS = "facts.csv"
_SUM_TOLERANCE = 1e-3


class AnswersConfig(Config):
    """Where the truth of each case stands, and what kind of answer it is.

    Args:
        column: Column of the references that holds the truth: a class, labels joined by ``;`` (``none`` for no
            label), or a number. A case with an empty cell is left out, and counted.
        kind: What was predicted; by default told from the columns of the predictions.
        classes: Ordered classes of an ordinal task, the lowest first; by default sorted, as numbers where they are.
        positive: The class that is looked for, where there are two; by default that of the second column.
        subjects: Further table with ``case_id`` and any of ``subject_id``, ``split`` and columns to group by.
        split: Judge only this split, and refuse its cases that have no prediction instead of leaving them out.
    """

    column: str = Field(min_length=1)
    kind: Literal["classes", "labels", "ordinal", "numbers"] | None = None
    classes: tuple[str, ...] | None = None
    positive: str | None = None
    subjects: str | None = None
    split: Literal["train", "val", "test"] | None = None


def read_answers(
    predictions: Path, references: Path, ledger: Ledger, *, config: AnswersConfig
) -> tuple[Task, pd.DataFrame, pd.DataFrame]:
    """Bring the tables together and book every case.

    Args:
        predictions: CSV with ``case_id``, and ``p_<name>`` columns or ``value``, and perhaps ``decision``.
        references: CSV with ``case_id`` and the column of the truth, here or in ``facts.csv`` beside it.
        ledger: Where all cases are booked.
        config: See :class:`AnswersConfig`.

    Returns:
        The task; one row a case, the worst first, as :func:`medssl.evaluation.scorecard.score` takes it, with ``loss``;
        and all columns of the references as text, by case.

    Raises:
        NoInputError: if no case has both a prediction and a truth.
        CaseError: E_TABLE, if a table cannot be understood.
        ConfigError: if the references lack the column, or an option does not fit the task.
    """
    predicted = _predictions(predictions)
    facts = _facts(references, config)
    task, truths = _task(predicted, facts, config, source=predictions)
    chosen = _match(predicted, facts, truths, ledger, task=task, config=config)
    if not chosen:
        raise NoInputError(
            f"{predictions}: {len(predicted)} predictions, {len(truths)} references with {config.column}, and no case "
            f"in both{f' of split {config.split}' if config.split else ''}. Give tables with the same case_id."
        )
    return task, _cases(predicted.loc[chosen], facts, truths, task), facts


def _predictions(path: Path) -> pd.DataFrame:
    """Rows by case: text columns ``subject_id`` and ``decision`` where given, numbers in ``p_...`` and ``value``."""
    rows: dict[str, dict[str, Any]] = {}
    for line, row in read_table(path, required=("case_id",)):
        if row["case_id"] in rows:
            raise table_error(path, line, f"case {row['case_id']} has two rows; one is needed")
        known: dict[str, Any] = {name: row[name] for name in ("subject_id", "decision") if name in row}
        for name in row:
            if name.startswith("p_") or name == "value":
                known[name] = _number(row[name], name, path, line)
        rows[row["case_id"]] = known
    if not rows:
        raise NoInputError(f"{path}: no prediction in the table. Give the predictions.csv of medssl predict.")
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("case_id")
    names = [name for name in table.columns if name.startswith("p_")]
    if bool(names) == ("value" in table.columns):
        raise table_error(
            path, 1, "columns p_<class> for probabilities, or value for numbers, are needed, and not both"
        )
    return table


def _number(text: str, name: str, path: Path, line: int) -> float:
    number = _as_number(text)
    if not math.isfinite(number) or (name.startswith("p_") and not 0 <= number <= 1):
        need = "a probability from 0 to 1" if name.startswith("p_") else "a number"
        raise table_error(path, line, f"{name} is {text!r}; {need} is needed")
    return number


def _facts(references: Path, config: AnswersConfig) -> pd.DataFrame:
    """Everything that is known of the reference cases, as text."""
    beside = references.parent / _FACTS
    paths = [references, *([beside] if beside.is_file() and beside != references else [])]
    facts = read_facts([*paths, *([Path(config.subjects)] if config.subjects else [])])
    if config.column not in facts.columns:
        raise ConfigError(
            f"{references}: no column {config.column}; it has {', '.join(facts.columns)}. Name one by "
            "`--set column=...`, or scan with `--columns`."
        )
    return facts.fillna("")


def _task(
    predicted: pd.DataFrame, facts: pd.DataFrame, config: AnswersConfig, *, source: Path
) -> tuple[Task, dict[str, str]]:
    """What was predicted, and the truth of each case that has one."""
    names = tuple(name.removeprefix("p_") for name in predicted.columns if name.startswith("p_"))
    texts = facts[config.column].str.strip()
    truths = {str(case): str(text) for case, text in texts.items() if text}
    kind = config.kind or _guess(predicted, names, set(truths.values()), source=source)
    if (kind in {"classes", "labels"}) != bool(names):
        raise ConfigError(
            f"{source}: kind {kind} with the columns {', '.join(predicted.columns)}; classes and labels need p_<name>, "
            "ordinal and numbers need value. Leave kind out, or give the other table."
        )
    _check_options(config, kind, names)
    if kind == "numbers":
        return Task(kind), truths
    if kind == "ordinal":
        if "decision" not in predicted.columns:
            raise table_error(source, 1, "no column decision; an ordinal task needs the decided class")
        names = config.classes or _grades({*truths.values(), *predicted["decision"]})
    truths = {case: _as_class(text, names) for case, text in truths.items()}
    if kind == "classes" and len(names) < 2:
        raise table_error(source, 1, f"one class, {names[0]}; an exclusive task has p_<class> for every class")
    if kind != "ordinal" and ALL in names:
        raise table_error(source, 1, f"class {ALL}; in metrics.csv that name stands for all classes. Give it another")
    positive = config.positive or (names[1] if len(names) == 2 else "")
    if kind == "classes":
        sums = predicted[[f"p_{name}" for name in names]].sum(axis=1)
        if (abs(sums - 1) > _SUM_TOLERANCE).any():
            place = int(np.argmax(abs(sums - 1)))
            raise table_error(source, place + 2, f"probabilities sum to {sums.iloc[place]:.4f}; 1 is needed")
    return Task(kind, names, positive if kind == "classes" else ""), truths


def _check_options(config: AnswersConfig, kind: str, names: Sequence[str]) -> None:
    if config.classes is not None and kind != "ordinal":
        raise ConfigError(f"classes: given for kind {kind}; it orders the classes of an ordinal task. Leave it out.")
    if config.positive is not None and (kind != "classes" or len(names) != 2 or config.positive not in names):
        raise ConfigError(
            f"positive: {config.positive}, and the predictions have {', '.join(names) or 'numbers'}; it names one of "
            "two classes. Correct it, or leave it out."
        )


def _guess(
    predicted: pd.DataFrame, names: Sequence[str], truths: Collection[str], *, source: Path
) -> Literal["classes", "labels", "ordinal", "numbers"]:
    if not names:
        return "ordinal" if "decision" in predicted.columns and (predicted["decision"] != "").all() else "numbers"
    sums = predicted[[f"p_{name}" for name in names]].sum(axis=1)
    if len(names) == 1:
        return "labels"
    if (abs(sums - 1) <= _SUM_TOLERANCE).all():
        return "classes"
    if all(_as_class(text, names) in names for text in truths):
        raise ConfigError(
            f"{source}: the probabilities of case {abs(sums - 1).idxmax()} do not sum to 1, and each truth is one "
            "class. Set `--set kind=classes` and correct them, or `--set kind=labels` if several may hold at once."
        )
    return "labels"


def _grades(texts: Collection[str]) -> tuple[str, ...]:
    """Ordered classes: numbers by size, each once and in its shortest form; else all texts, sorted."""
    numbers = {float(text) for text in texts if math.isfinite(_as_number(text))}
    return tuple(f"{number:.15g}" for number in sorted(numbers)) if numbers else tuple(sorted(texts))


def _match(
    predicted: pd.DataFrame,
    facts: pd.DataFrame,
    truths: Mapping[str, str],
    ledger: Ledger,
    *,
    task: Task,
    config: AnswersConfig,
) -> list[str]:
    """Cases with a prediction and a truth, after every case was booked."""
    splits = facts["split"] if "split" in facts.columns else pd.Series("", index=facts.index)
    chosen = []
    for case in map(str, facts.index):
        ledger.expect(case)
        if config.split is not None and splits[case] != config.split:
            ledger.ignore(case, f"not in split {config.split}")
        elif case not in truths:
            ledger.ignore(case, f"{config.column} is not stated")
        elif (fault := _fault(case, truths[case], task, config.column)) is not None:
            ledger.reject(case, fault)
        elif case in predicted.index:
            ledger.accept(case)
            chosen.append(case)
        elif config.split is None:
            ledger.ignore(case, "no prediction")
        else:
            message = (
                f"{case}: no prediction; every case of split {config.split} needs one, or the failures would be left "
                "out. Predict it, or see why it was refused."
            )
            ledger.reject(case, CaseError(message, code="E_NO_PREDICTION"))
    for case in map(str, predicted.index.difference(facts.index)):
        ledger.expect(case)
        message = f"{case}: a prediction without a reference. Add its line to the references, or take it away."
        ledger.reject(case, ReadError(message, code="E_NO_LABEL"))
    ledger.check()
    return chosen


def _fault(case: str, truth: str, task: Task, column: str) -> CaseError | None:
    """Why a truth cannot be compared with these predictions."""
    if task.kind == "numbers":
        known = math.isfinite(_as_number(truth))
        needed = "a number"
    else:
        known = _parts(truth, task) <= set(task.classes)
        needed = f"one of {', '.join(task.classes)}"
    if known:
        return None
    return CaseError(f"{case}: {column} is {truth!r}; {needed} is needed. Correct the table.", code="E_LABEL_SET")


def _cases(predicted: pd.DataFrame, facts: pd.DataFrame, truths: Mapping[str, str], task: Task) -> pd.DataFrame:
    """One row a case with its truth, decision and loss, the worst first."""
    ids = predicted.index.astype(str)
    subjects = ids.to_numpy(dtype=object)
    for people in (predicted, facts.reindex(ids)):  # the references know better
        if "subject_id" in people.columns:
            own = people["subject_id"].to_numpy(dtype=object)
            subjects = np.where(own == "", subjects, own)
    table = pd.DataFrame({"case_id": ids, "subject_id": subjects, "truth": [truths[case] for case in ids]})
    table["decision"] = _decisions(predicted, task)
    numbers = [name for name in predicted.columns if name == "value" or name.startswith("p_")]
    table[numbers] = predicted[numbers].to_numpy(dtype=np.float64)
    table["loss"] = _losses(table, task)
    return table.sort_values(["loss", "case_id"], ascending=[False, True], kind="stable").reset_index(drop=True)


def _decisions(predicted: pd.DataFrame, task: Task) -> list[str]:
    given = predicted["decision"].tolist() if "decision" in predicted.columns else [""] * len(predicted)
    if task.kind == "numbers":
        return [""] * len(predicted)
    if "decision" not in predicted.columns or (task.kind == "classes" and not any(given)):
        chances = probability_matrix(predicted, task)
        if task.kind == "classes":
            return [task.classes[place] for place in chances.argmax(axis=1)]
        return [SEPARATOR.join(np.asarray(task.classes)[row >= 0.5]) or NO_LABEL for row in chances]
    decided = [_as_class(text, task.classes) for text in given]
    if task.kind == "labels":
        decided = [text or NO_LABEL for text in decided]
    for case, text in zip(predicted.index, decided, strict=True):
        if not _parts(text, task) <= set(task.classes):
            raise CaseError(
                f"{case}: decision {text!r}; {', '.join(task.classes)} are known. Correct the table of predictions.",
                code="E_TABLE",
            )
    return decided


def _parts(text: str, task: Task) -> set[str]:
    """Names in a cell: one class, or any number of labels."""
    if task.kind != "labels":
        return {text}
    return set() if text == NO_LABEL else {part.strip() for part in text.split(SEPARATOR)} - {""}


def _losses(table: pd.DataFrame, task: Task) -> np.ndarray[Any, Any]:
    """Log loss, or distance from the truth."""
    if task.kind == "classes":
        truth = table["truth"].map({name: place for place, name in enumerate(task.classes)})
        return log_loss_terms(probability_matrix(table, task), truth.to_numpy(dtype=np.int64))
    if task.kind == "labels":
        return label_losses(probability_matrix(table, task), label_matrix(table["truth"].tolist(), task.classes))
    truth = table["truth"]
    if task.kind == "ordinal":
        truth = truth.map(dict(zip(task.classes, levels_of(task.classes), strict=True)))
    return np.asarray(np.abs(table["value"].to_numpy() - truth.to_numpy(dtype=np.float64)))


def _as_class(text: str, names: Sequence[str]) -> str:
    """The name that a text means: itself, or the same number written otherwise, as 1.0 for 1."""
    if text in names:
        return text
    try:
        number = float(text)
        return next((name for name in names if float(name) == number), text)
    except ValueError:
        return text


def _as_number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
