"""What whole images are to be told apart by: the column of a table, as numbers that a loss takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from medssl.errors import CaseError, ConfigError

Kind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression"]

NO_LABEL = "none"
"""What a multi-label column says of an image that has none of the labels; an empty cell is not stated."""

SEPARATOR = ";"


@dataclass(frozen=True)
class Targets:
    """Targets of cases.

    Args:
        column: Where they come from.
        kind: What they are.
        classes: Names in the order of the outputs; of a binary target the second is the positive one. Empty for
            numbers.
        values: For each case: the index of its class; 0 or 1 for each label; or a number, standardised.
        mean: Of the numbers of the training cases; 0 for classes.
        spread: Their standard deviation; 1 for classes.
        counts: How many training cases have each class or label.
        trained: Number of training cases.
    """

    column: str
    kind: Kind
    classes: tuple[str, ...]
    values: Mapping[str, Float32[np.ndarray, " k"]]
    mean: float = 0.0
    spread: float = 1.0
    counts: tuple[int, ...] = ()
    trained: int = 0

    @property
    def outputs(self) -> int:
        """Scores that a network gives."""
        return {"regression": 1, "ordinal": len(self.classes) - 1}.get(self.kind, len(self.classes))


def read_targets(
    texts: Mapping[str, str],
    *,
    train: Collection[str],
    column: str,
    kind: Kind,
    classes: Sequence[str] | None = None,
) -> Targets:
    """Make targets of what a column says.

    Args:
        texts: What it says of each case, training and held-out.
        train: The training cases; classes, mean and spread are taken from these alone.
        column: Its name.
        kind: What it holds.
        classes: Names in the order of the outputs; by default those of the training cases, sorted, numbers by size.

    Raises:
        ConfigError: E_TARGET, for too few or too many classes, or a single one in training.
        CaseError: E_TARGET, for a case whose value is no number, or a class that is not known.
    """
    if kind == "regression":
        return _numbers(texts, train=train, column=column)
    stated = {case_id: _labels(text) if kind == "multilabel" else (text,) for case_id, text in texts.items()}
    seen = Counter(name for case_id in train for name in stated[case_id])
    names = tuple(classes) if classes is not None else tuple(sorted(seen, key=_order))
    told = "given in the recipe" if classes is not None else "among the training cases"
    _check_known({case_id: stated[case_id] for case_id in train}, names, column=column, told=told)
    _check_classes(names, seen, column=column, kind=kind, trained=len(train), is_given=classes is not None)
    _check_known(stated, names, column=column, told=told)
    values = {}
    for case_id, labels in stated.items():
        if kind == "multilabel":
            values[case_id] = np.array([name in labels for name in names], np.float32)
        else:
            values[case_id] = np.array([names.index(labels[0])], np.float32)
    return Targets(column, kind, names, values, counts=tuple(seen[name] for name in names), trained=len(train))


def _labels(text: str) -> tuple[str, ...]:
    """The labels of one cell."""
    if text == NO_LABEL:
        return ()
    return tuple(dict.fromkeys(name for part in text.split(SEPARATOR) if (name := part.strip())))


def _check_known(stated: Mapping[str, Sequence[str]], names: Sequence[str], *, column: str, told: str) -> None:
    for case_id, labels in stated.items():
        unknown = [name for name in labels if name not in names]
        if unknown:
            raise CaseError(
                f"case {case_id}: {column} is {unknown[0]!r}, which is not {told} ({', '.join(names)}). Correct the "
                "table, name all classes in the recipe, or split anew.",
                code="E_TARGET",
            )


def _check_classes(
    names: Sequence[str], seen: Counter[str], *, column: str, kind: Kind, trained: int, is_given: bool
) -> None:
    if len(set(names)) != len(names):
        raise ConfigError(f"classes {', '.join(names)}: one is named twice. Name each once.", code="E_TARGET")
    if kind == "binary" and len(names) > 2:
        raise ConfigError(
            f"{column}: {len(names)} classes ({', '.join(names[:6])}); a binary target has 2. Set kind: multiclass, "
            "or correct the table.",
            code="E_TARGET",
        )
    present = sum(seen[name] > 0 for name in names)
    if kind == "multilabel":
        varied = [name for name in names if 0 < seen[name] < trained]
        if not varied:
            raise ConfigError(
                f"{column}: every training case has the same labels ({', '.join(names) or 'none'}); there is nothing "
                "to tell apart. Give cases with and without a label.",
                code="E_TARGET",
            )
    elif present < 2 or (kind == "binary" and len(names) != 2):
        only = f"the class {next(iter(seen), 'none')} only"
        raise ConfigError(
            f"{column}: the {trained} training cases have {only}; at least two classes are needed"
            f"{', of those that the recipe names' if is_given else ''}. Give cases of another class, or split anew.",
            code="E_TARGET",
        )


def _numbers(texts: Mapping[str, str], *, train: Collection[str], column: str) -> Targets:
    found = {case_id: number(text, case_id=case_id, column=column) for case_id, text in texts.items()}
    trained = np.array([found[case_id] for case_id in train], np.float64)
    mean, spread = float(trained.mean()), float(trained.std())
    if spread == 0:
        raise ConfigError(
            f"{column}: all {len(trained)} training cases have the value {mean:g}; there is nothing to learn. Give "
            "cases of other values.",
            code="E_TARGET",
        )
    values = {case_id: np.array([(value - mean) / spread], np.float32) for case_id, value in found.items()}
    return Targets(column, "regression", (), values, mean, spread, (), len(train))


def number(text: str, *, case_id: str, column: str) -> float:
    """The number that a cell holds.

    Raises:
        CaseError: E_TARGET, if it is none, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CaseError(
            f"case {case_id}: {column} is {text!r}; regression needs a number. Correct the table, or leave it empty.",
            code="E_TARGET",
        )
    return value


def _order(name: str) -> tuple[int, float, str]:
    """Numbers by size, then words by letter."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
