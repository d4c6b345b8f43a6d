"""Cross-validation: subjects dealt whole, each scored once by a model that did not see it, and an ensemble left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.cli import app, run_guarded
from medssl.config import dump_yaml
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.store import ArrayStore
from medssl.errors import ConfigError, NoInputError
from medssl.evaluation import folds as module
from medssl.evaluation.ensemble import open_members
from medssl.evaluation.folds import crossval, deal
from medssl.evaluation.predict import predict

RECIPE = tiny.shorter(tiny.SEGMENT, 2)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    structures=st.lists(st.sets(st.integers(0, 3), max_size=4), min_size=4, max_size=30),
    folds=st.integers(2, 5),
    seed=st.integers(0, 3),
)
def test_every_subject_is_in_one_fold_and_no_fold_lacks_a_structure(
    structures: list[set[int]], folds: int, seed: int
) -> None:
    held = {f"s{i}": values for i, values in enumerate(structures)}
    number = Counter(value for values in structures for value in values if value)
    try:
        found = deal(held, folds, seed=seed)
    except ConfigError:
        assert len(held) < folds or number
        return
    assert set(found) == set(held)
    assert set(found.values()) == set(range(folds))
    for fold in range(folds):
        for value in number:
            assert any(value in held[subject] for subject, of in found.items() if of == fold)
    assert found == deal(dict(reversed(held.items())), folds, seed=seed)


def test_folds_are_even_and_rare_structures_spread() -> None:
    held = {f"s{i}": ({1, 2} if i < 5 else {1}) for i in range(23)}
    found = deal(held, 5)
    assert sorted(Counter(found.values()).values()) == [4, 4, 5, 5, 5]
    assert sorted(found[f"s{i}"] for i in range(5)) == [0, 1, 2, 3, 4]
    assert deal(held, 5, seed=1) != found


@pytest.mark.parametrize(
    ("held", "folds", "message"),
    [
        ({"a": {1}, "b": {1}}, 3, "with 2 labelled subjects"),
        ({"a": {1}, "b": {1}}, 1, "from 2 to"),
        ({"a": {1}, "b": {1, 2}, "c": {1, 2}}, 3, "2 in 2.*Take 2 folds at most"),
        ({"a": {1}, "b": {1, 2}, "c": {1}}, 2, "one subject alone .2 in 1."),
    ],
)
def test_a_fold_without_a_structure_is_refused(held: dict[str, set[int]], folds: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        deal(held, folds)
    assert error.value.code == "E_FOLD"


def make_store(folder: Path, *, subjects: int = 6, labelled: bool = True) -> Path:
    """Small MR-like cases: two of the first subject, one each of val and test, and one without a label."""
    rows = ["case_id,subject_id,split,image,label"]
    for i in range(subjects + 3):
        rng = np.random.default_rng(i)
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:10, 4 + i % 3 : 10, 4:10], label[11:14, 11:14, 4:12] = 1, 2
        image = rng.normal(size=label.shape).astype(np.float32) + 3 * label
        for name, array in (("image", image), ("label", label)):
            path = folder / "raw" / f"c{i}_{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        split = {subjects: "val", subjects + 1: "test"}.get(i, "train")
        has_label = labelled and i != subjects + 2
        rows.append(f"c{i},s{max(i, 1)},{split},raw/c{i}_image.nii.gz,{f'raw/c{i}_label.nii.gz' if has_label else ''}")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    prepare(PrepareConfig(modality="MR"), cohort=folder / "cohort.csv", out=folder / "store", workers=1)
    return folder / "store"


def test_each_subject_is_scored_once_unseen_and_an_ensemble_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = make_store(tmp_path), tmp_path / "cv"
    trained: list[set[str]] = []
    finetune = module.finetune

    def watched(*args: Any, store: Path, **options: Any) -> Any:
        opened = ArrayStore.open(store)
        seen, unseen = (
            {case.subject_id for case in opened.select(split=split, labelled=True)} for split in ("train", "test")
        )
        assert not seen & unseen
        assert "s6" not in seen | unseen
        assert "s7" not in seen | unseen
        assert [case.subject_id for case in opened.select(split="val")] == ["s6"]
        trained.append(seen)
        return finetune(*args, store=store, **options)

    monkeypatch.setattr(module, "finetune", watched)
    result = crossval(RECIPE, store=store, out=out, folds=2)
    assert len(trained) == 2
    assert trained[0] | trained[1] == {"s1", "s2", "s3", "s4", "s5"}
    assert sorted(result.cases["case_id"].unique()) == [f"c{i}" for i in range(6)]
    assert not result.cases.duplicated(["case_id", "label"]).any()
    dealt = pd.read_csv(out / "folds.csv").set_index("subject_id")["fold"]
    assert (result.cases["fold"] == result.cases["subject_id"].map(dealt)).all()
    seen_in_any = result.summary.query("label == '1' and metric == 'dice'").iloc[0]
    part = result.cases[(result.cases["label"] == 1) & (result.cases["presence"] != "neither")]
    assert seen_in_any["mean"] == pytest.approx(part["dice"].mean())
    assert len(result.sentences()) == 3
    assert len(open_members(out)) == 2
    maps = predict(out, tmp_path / "raw" / "c7_image.nii.gz", out=tmp_path / "maps", device="cpu")
    assert len(maps.outputs) == 1

    monkeypatch.setattr(module, "finetune", finetune)
    monkeypatch.setattr(module, "score_stored", lambda *_, **__: pytest.fail("scored again"))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(RECIPE))
    words = ["crossval", tmp_path / "recipe.yaml", "--store", store, "-o", out, "--folds", "2"]
    assert run_guarded(lambda: app([str(word) for word in words], standalone_mode=False)) == 0
    assert "All structures: Dice" in capsys.readouterr().out
    words[2:2] = ["--dry-run"]
    assert run_guarded(lambda: app([str(word) for word in words], standalone_mode=False)) == 0
    assert "would write" in capsys.readouterr().out


def test_what_cannot_be_cross_validated_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", subjects=3)
    with pytest.raises(ConfigError, match="task classification"):
        crossval({**RECIPE, "task": {"name": "classification"}}, store=store, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="with 2 labelled subjects"):
        crossval(RECIPE, store=store, out=tmp_path / "out", folds=3)
    with pytest.raises(NoInputError, match="no labelled case"):
        crossval(RECIPE, store=make_store(tmp_path / "b", subjects=2, labelled=False), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
