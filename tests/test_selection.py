"""Which cases a run trains on: budgets of a column, classes shown more often, and what the journal is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from medssl.data.facts import Facts
from medssl.data.store import ArrayStore, Entry, IndexRow, write_entry, write_index
from medssl.errors import ConfigError, NoInputError
from medssl.geometry import Geometry
from medssl.selection import held_out_cases, labelled_subjects, pretraining_cases, taught
from medssl.tasks.classification import Config

GRID = Geometry((4, 4, 1), np.eye(4)).to_dict()
VALUES = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "", "f": "x", "g": "y"}


@pytest.fixture
def store(tmp_path: Path) -> ArrayStore:
    """Five training cases, of which e has no value, and two to validate on; a and b are of one subject."""
    meta = {"source_geometry": GRID, "prepared_geometry": GRID, "unit": "arbitrary", "fill": 0.0, "warnings": []}
    rows = []
    for number, name in enumerate(VALUES):
        image = np.full((1, 4, 4, 1), number, np.float32)
        constant = {**meta, "warnings": ["W_CONSTANT: one value"]} if name == "e" else meta
        write_entry(tmp_path, name * 24, Entry(image, None, np.ones((1, 4, 4, 1), np.uint8), constant))
        split = "train" if number < 5 else "val"
        subject = "s1" if name in "ab" else f"s_{name}"
        rows.append(IndexRow(name, subject, split, "US", name * 24, False, ()))
    facts = Facts(("y", "z"), {name: {"y": value} for name, value in VALUES.items() if value})
    write_index(tmp_path, rows, prepare={}, unit="arbitrary", modality="US", facts=facts)
    return ArrayStore.open(tmp_path)


def config(**options: object) -> Config:
    return Config.parse({"target": "y", "kind": "binary", "crop_voxels": [4, 4, 1], **options})


def test_a_budget_of_a_column_takes_subjects_in_the_order_of_their_hashes(store: ArrayStore) -> None:
    order = sorted("abcd", key=lambda name: hashlib.sha256(f"label2:{name}".encode()).hexdigest())
    subjects = list(dict.fromkeys("s1" if name in "ab" else f"s_{name}" for name in order))
    assert labelled_subjects(store, draw=2, column="y") == subjects
    assert labelled_subjects(store) == []


def test_cases_without_a_value_are_left_out_and_counted(store: ArrayStore) -> None:
    found = taught(store, config(), num_labelled=None, draw=0, held_out="val")
    assert [case.case_id for case in found.cases] == list("abcd")
    assert [case.case_id for case in found.held_out] == list("fg")
    assert found.notes == {
        "target": "y", "without_target": 1, "held_out_without_target": 0, "classes": {"x": 3, "y": 1},
    }  # fmt: skip
    assert found.members == list(found.cases)


def test_sampling_shows_a_rare_class_as_often_as_the_most_frequent_one(store: ArrayStore) -> None:
    found = taught(store, config(balance="sampling"), num_labelled=None, draw=0, held_out="val")
    assert [case.case_id for case in found.cases] == ["a", "b", "c", "d", "d", "d"]
    assert [case.case_id for case in found.members] == list("abcd")
    labels = config(kind="multilabel", balance="sampling")
    shown = taught(store, labels, num_labelled=None, draw=0, held_out="val").cases
    assert sum(case.case_id == "d" for case in shown) == 3


def test_a_bag_is_all_images_of_a_subject_also_those_without_a_value_of_their_own(store: ArrayStore) -> None:
    found = taught(store, config(level="bag"), num_labelled=None, draw=0, held_out="val")
    assert [case.case_id for case in found.cases] == ["a", "c", "d"]
    assert [case.case_id for case in found.bags["a"]] == ["a", "b"]
    assert len(found.members) == 4


def test_more_subjects_than_there_are_and_no_label_at_all_are_refused(store: ArrayStore) -> None:
    with pytest.raises(ConfigError, match="num_labelled is 9"):
        taught(store, config(), num_labelled=9, draw=0, held_out="val")
    with pytest.raises(NoInputError, match="no case with a value of z"):
        taught(store, config(target="z"), num_labelled=None, draw=0, held_out="val")


def test_pretraining_leaves_out_constant_images_and_subjects_of_other_splits(store: ArrayStore) -> None:
    cases, constant = pretraining_cases(store, ("train",))
    assert [case.case_id for case in cases] == list("abcd")
    assert constant == 1
    assert held_out_cases(store, split="train", trained_on=cases[:1])[0].case_id == "c"
    with pytest.raises(NoInputError, match="no case in the splits test"):
        pretraining_cases(store, ("test",))
