"""From the text of a column to what a loss takes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medssl.errors import CaseError, ConfigError
from medssl.tasks.targets import read_targets


def read(texts: dict[str, str], kind: Any, *, train: int | None = None, **options: Any) -> Any:
    return read_targets(texts, train=list(texts)[:train], column="y", kind=kind, **options)


def test_classes_are_those_of_training_numbers_by_size() -> None:
    found = read({"a": "10", "b": "9", "c": "1", "d": "9"}, "multiclass")
    assert found.classes == ("1", "9", "10")
    assert {case: int(value[0]) for case, value in found.values.items()} == {"a": 2, "b": 1, "c": 0, "d": 1}
    assert found.counts == (1, 2, 1)
    assert found.outputs == 3


def test_given_classes_keep_their_order_and_the_second_is_positive() -> None:
    found = read({"a": "ill", "b": "well"}, "binary", classes=("well", "ill"))
    assert found.values["a"].tolist() == [1.0]


def test_labels_are_split_and_none_is_no_label() -> None:
    found = read({"a": "x;y", "b": "none", "c": " y ; y"}, "multilabel")
    assert found.classes == ("x", "y")
    assert [found.values[case].tolist() for case in "abc"] == [[1, 1], [0, 0], [0, 1]]
    assert found.counts == (1, 2)


def test_numbers_are_standardised_by_the_training_cases_alone() -> None:
    found = read({"a": "1", "b": "3", "c": "5e0"}, "regression", train=2)
    assert (found.mean, found.spread) == (2.0, 1.0)
    assert np.isclose(found.values["c"][0], 3.0)


def test_grades_have_one_cut_less() -> None:
    assert read({"a": "1", "b": "2", "c": "3"}, "ordinal").outputs == 2


@pytest.mark.parametrize(
    ("texts", "kind", "options", "error", "message"),
    [
        ({"a": "x", "b": "x"}, "binary", {}, ConfigError, "have the class x only"),
        ({"a": "x", "b": "x"}, "multiclass", {"classes": ("x", "y")}, ConfigError, "of those that the recipe names"),
        ({"a": "x", "b": "y", "c": "z"}, "binary", {}, ConfigError, "3 classes"),
        ({"a": "x", "b": "y", "c": "z"}, "multiclass", {"train": 2}, CaseError, "case c: y is 'z', which is not among"),
        ({"a": "x", "b": "y"}, "binary", {"classes": ("x", "z")}, CaseError, "not given in the recipe"),
        ({"a": "x", "b": "x"}, "binary", {"classes": ("x", "x")}, ConfigError, "one is named twice"),
        ({"a": "x", "b": "x"}, "multilabel", {}, ConfigError, "same labels"),
        ({"a": "1", "b": "old"}, "regression", {}, CaseError, "case b: y is 'old'; regression needs a number"),
        ({"a": "1", "b": "inf"}, "regression", {}, CaseError, "needs a number"),
        ({"a": "2", "b": "2"}, "regression", {}, ConfigError, "have the value 2"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    texts: dict[str, str], kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read(texts, kind, **options)
    assert caught.value.code == "E_TARGET"  # type: ignore[attr-defined]
