"""Cleaning by components: rules on hand-made maps, chosen on validation alone, and bound to their weights."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medssl.errors import CheckpointError, NoInputError
from medssl.evaluation import postprocess as module
from medssl.evaluation.components import NAME, Rule, clean, read_rules, rules_path, write_rules
from medssl.evaluation.postprocess import PostprocessConfig, postprocess
from medssl.geometry import Geometry
from medssl.volume import Volume

GRID = Geometry((12, 10, 8), np.diag((10.0, 10.0, 10.0, 1.0)))  # a voxel is 1 ml


def volume(labels: np.ndarray) -> Volume:
    return Volume(labels[None], Geometry(labels.shape, GRID.affine), "label")


def flooded(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Components of voxels that share a corner, by a loop."""
    left = {tuple(int(i) for i in voxel) for voxel in np.argwhere(mask)}
    found = []
    while left:
        queue, part = deque([left.pop()]), set()
        while queue:
            voxel = queue.popleft()
            part.add(voxel)
            near = {other for other in left if max(abs(a - b) for a, b in zip(voxel, other, strict=True)) <= 1}
            left -= near
            queue.extend(near)
        found.append(part)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_components_equal_those_of_a_loop(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 8, 7)) < 0.06
    parts = flooded(mask)
    kept = clean(volume(mask.astype(np.uint8)), {1: Rule(min_ml=2.0)}).array[0]
    expected = set().union(*(part for part in parts if len(part) >= 2))
    assert {tuple(int(i) for i in voxel) for voxel in np.argwhere(kept)} == expected
    largest = clean(volume(mask.astype(np.uint8)), {1: Rule(largest=True)}).array[0]
    assert int(largest.sum()) == max(map(len, parts))


def test_holes_are_filled_with_background_alone_and_other_structures_stay() -> None:
    labels = np.zeros((9, 9, 9), np.uint16)
    labels[1:8, 1:8, 1:8] = 300
    labels[3, 3, 3], labels[5, 5, 5] = 0, 7
    result = clean(volume(labels), {300: Rule(fill_holes=True), 8: Rule(largest=True)}).array[0]
    assert result[3, 3, 3] == 300
    assert result[5, 5, 5] == 7
    assert result.dtype == labels.dtype
    assert labels[3, 3, 3] == 0
    ring = np.zeros((5, 5, 1), np.uint8)
    ring[1:4, 1:4] = 1
    ring[2, 2] = 0
    assert clean(volume(ring), {1: Rule(fill_holes=True)}).array[0, 2, 2, 0] == 1


def test_without_rules_the_map_is_the_same() -> None:
    labels = volume(np.ones((2, 2, 2), np.uint8))
    assert clean(labels, {}) is labels


def test_rules_are_read_for_their_own_weights_only(tmp_path: Path) -> None:
    path = rules_path([tmp_path, tmp_path / "other"])
    assert path == rules_path(tmp_path) == tmp_path / NAME
    assert read_rules(path, weights=["a"]) == {}
    write_rules(path, {3: Rule(largest=True)}, weights=["b", "a"])
    assert read_rules(path, weights=["a", "b"]) == {3: Rule(largest=True)}
    with pytest.raises(CheckpointError, match="other weights"):
        read_rules(path, weights=["a"])
    for broken in ("{", "[]", '{"weights": [], "rules": {"x": {}}}', '{"weights": [], "rules": {"1": {"y": 1}}}'):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match="no rules of medssl"):
            read_rules(path, weights=[])


def stand_in(monkeypatch: pytest.MonkeyPatch, cases: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Put cases (subject, prediction, reference) in the place of a store and a network."""
    stored = [SimpleNamespace(subject_id=s, source_label=lambda r=r: r, labels=volume(p)) for s, p, r in cases]
    store = SimpleNamespace(select=lambda *, split, labelled: stored if (split, labelled) == ("val", True) else [])
    member = SimpleNamespace(passport=SimpleNamespace(label_values=(0, 1, 2)))
    monkeypatch.setattr(module, "ArrayStore", SimpleNamespace(open=lambda _: store))
    monkeypatch.setattr(module, "open_members", lambda _: [member])
    monkeypatch.setattr(module, "load_ensemble", lambda *_, **__: None)
    monkeypatch.setattr(module, "weight_digests", lambda _: ["w"])
    monkeypatch.setattr(module, "segment_stored", lambda case, *_, **__: case.labels)


def case(*, speck: bool, pair: bool) -> tuple[np.ndarray, np.ndarray]:
    """Structure 1 with a false speck, and structure 2 in two true parts."""
    reference = np.zeros((12, 10, 8), np.uint8)
    reference[1:4, 1:4, 1:4] = 1
    reference[6:9, 1:4, 1:4] = 2
    if pair:
        reference[6:9, 6:9, 5:7] = 2
    prediction = reference.copy()
    if speck:
        prediction[10, 8, 7] = 1
    return prediction, reference


def test_rules_that_help_are_kept_and_those_that_harm_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [(f"s{i}", *case(speck=i % 4 != 0, pair=True)) for i in range(12)])
    dry = postprocess(tmp_path, store=tmp_path, dry_run=True)
    assert not dry.path.exists()
    config = PostprocessConfig(min_ml=(3.0,), bootstrap=200)
    result = postprocess(tmp_path, store=tmp_path, config=config)
    assert set(result.rules) == {1}
    assert read_rules(tmp_path / NAME, weights=["w"]) == result.rules
    table = result.table.set_index(["label", "rule"])
    expected = np.mean([1 - 2 * 27 / 55 if i % 4 else 0 for i in range(12)])
    assert table.loc[(1, "largest"), "gain"] == pytest.approx(expected)
    assert table.loc[(2, "largest"), "gain"] == pytest.approx(2 * 27 / (27 + 45) - 1)
    assert table["kept"].sum() == 1
    assert (tmp_path / "postprocess.csv").read_text().startswith("label,rule,gain,low,high,cases,subjects,kept")
    first, second = result.sentences()
    assert first.endswith("; kept.")
    assert second.endswith("; nothing is kept.")


def test_a_gain_that_may_be_chance_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [("one", *case(speck=True, pair=False))])
    assert postprocess(tmp_path, store=tmp_path).rules == {}


def test_an_invented_structure_that_goes_is_a_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = np.zeros((12, 10, 8), np.uint8)
    speck = empty.copy()
    speck[0, 0, 0] = 1
    stand_in(monkeypatch, [(f"s{i}", speck, empty) for i in range(5)])
    rules: Any = postprocess(tmp_path, store=tmp_path, config=PostprocessConfig(min_ml=(2.0,), bootstrap=100)).rules
    assert rules == {1: Rule(min_ml=2.0)}


def test_rules_are_chosen_nowhere_but_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [])
    with pytest.raises(NoInputError, match="split val"):
        postprocess(tmp_path, store=tmp_path)
