"""Probes of embeddings: no subject on both sides, chance beside every number, every number from its table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from medssl.errors import ConfigError, ReadError
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.probing import ProbeConfig, ProbeResult, probe
from medssl.evaluation.shortcuts import is_named_shortcut, tie

QUICK = {"bootstrap": 100, "seeds": [0, 1], "shots": [1, 2, 50]}


def table_of(
    path: Path, labels: np.ndarray, *, strength: float = 3.0, scans: int = 1, splits: Any = None, seed: int = 0
) -> Path:
    """Embeddings whose first numbers tell the class of a subject; ``scans`` cases a subject."""
    rng = np.random.default_rng(seed)
    repeated = np.repeat(labels, scans)
    vectors = rng.normal(size=(len(repeated), 8)).astype(np.float32) + 5
    vectors[np.arange(len(repeated)), repeated % 8] += strength
    subjects = [f"s{k:02d}" for k in range(len(labels)) for _ in range(scans)]
    rows = {
        "case_id": [f"c{k:03d}" for k in range(len(repeated))],
        "subject_id": subjects,
        "split": splits or [None] * len(repeated),
        "modality": "MR", "plane": None, "slice": None, "windows": 1,
        **dict.fromkeys(("x_mm", "y_mm", "z_mm", "body_lr", "body_ap", "body_si"), 0.5),
    }  # fmt: skip
    Embeddings(pd.DataFrame(rows), vectors, {"level": "volume", "method": "mae"}).write(path)
    return path


def facts_of(path: Path, embeddings: Path, **columns: Any) -> Path:
    cases = Embeddings.read(embeddings).table["case_id"]
    pd.DataFrame({"case_id": cases, **columns}).to_csv(path, index=False)
    return path


def run(tmp_path: Path, embeddings: Path, facts: Path, target: str, **given: Any) -> ProbeResult:
    return probe(
        embeddings, facts=facts, target=target, out=tmp_path / "out", config=ProbeConfig.parse({**QUICK, **given})
    )


def value(result: ProbeResult, reader: str, metric: str) -> float:
    rows = result.metrics
    return float(rows[(rows["reader"] == reader) & (rows["metric"] == metric)]["value"].iloc[0])


def test_what_is_there_is_read_and_what_is_not_stays_at_chance(tmp_path: Path) -> None:
    labels = np.arange(30) % 3
    embeddings = table_of(tmp_path / "e.parquet", labels, strength=8.0)
    names = np.array(["a", "b", "c"])
    rng = np.random.default_rng(1)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=names[labels], coin=rng.permutation(labels))
    found = run(tmp_path, embeddings, facts, "kind")
    assert value(found, "linear", "accuracy") == value(found, "knn", "balanced_accuracy") == 1.0
    assert value(found, "linear", "auroc") == 1.0
    assert value(found, "majority", "balanced_accuracy") == pytest.approx(1 / 3)
    assert value(found, "majority", "auroc") == pytest.approx(0.5, abs=0.1)
    row = found.metrics.set_index(["reader", "metric"]).loc[("linear", "accuracy")]
    assert row["low"] == pytest.approx(0.025 ** (1 / 30)), "30 right of 30 do not prove that all are"
    assert value(run(tmp_path, embeddings, facts, "coin"), "linear", "balanced_accuracy") < 0.7


def test_no_subject_is_both_fitted_on_and_scored(tmp_path: Path) -> None:
    # the labels have nothing to do with the vectors but through the subject: every scan of a subject is nearly the same
    rng = np.random.default_rng(3)
    labels, own = rng.permutation(np.arange(24) % 2), rng.normal(size=(24, 8))
    embeddings = table_of(tmp_path / "e.parquet", labels, strength=0.0, scans=4)
    given = Embeddings.read(embeddings)
    vectors = np.repeat(own, 4, axis=0) + 0.01 * rng.normal(size=(96, 8))
    Embeddings(given.table, vectors.astype(np.float32), given.about).write(embeddings)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=np.repeat(labels, 4))
    found = run(tmp_path, embeddings, facts, "kind", neighbours=3)
    assert value(found, "knn", "accuracy") < 0.75, "a neighbour of the same subject would give 1"
    parts = pd.read_csv(tmp_path / "out" / "predictions.csv").groupby("subject_id")["part"].nunique()
    assert (parts == 1).all()


def test_with_both_splits_only_the_test_split_is_scored(tmp_path: Path) -> None:
    labels = np.arange(24) % 2
    splits = ["train"] * 14 + ["val"] * 2 + ["test"] * 8
    embeddings = table_of(tmp_path / "e.parquet", labels, splits=splits)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=labels)
    run(tmp_path, embeddings, facts, "kind")
    out = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert sorted(out["case_id"].unique()) == [f"c{k:03d}" for k in range(16, 24)]
    run(tmp_path, embeddings, facts, "kind", scheme="folds")
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["case_id"].nunique() == 24
    facts = facts_of(tmp_path / "g.csv", embeddings, kind=[0] * 14 + [1] * 10)
    with pytest.raises(ConfigError, match="scheme split"):
        run(tmp_path, embeddings, facts, "kind", scheme="split")


def test_numbers_are_read_by_ridge_beside_the_mean(tmp_path: Path) -> None:
    embeddings = table_of(tmp_path / "e.parquet", np.zeros(60, int))
    vectors = Embeddings.read(embeddings).vectors
    age = 40 + 10 * (vectors[:, 1] - 5) - 4 * (vectors[:, 2] - 5)
    facts = facts_of(tmp_path / "f.csv", embeddings, age=age)
    found = run(tmp_path, embeddings, facts, "age", ridge=1e-3, shots=[1, 10])
    assert value(found, "ridge", "r2") > 0.99
    assert value(found, "mean", "r2") <= 0.0
    few = pd.read_csv(tmp_path / "out" / "few_shot.csv")
    assert sorted(few["shots"].unique()) == [10], "two values are the least to draw a line through"
    told = pd.read_csv(tmp_path / "out" / "predictions.csv")
    own = told[told["reader"] == "ridge"]
    error = ((own["truth"] - own["value"]) ** 2).sum() / ((own["truth"] - own["truth"].mean()) ** 2).sum()
    assert value(found, "ridge", "r2") == pytest.approx(1 - error)
    assert value(found, "ridge", "mae") == pytest.approx((own["truth"] - own["value"]).abs().mean())


def test_every_number_comes_from_the_table_beside_it(tmp_path: Path) -> None:
    labels = np.arange(40) % 2
    embeddings = table_of(tmp_path / "e.parquet", labels, strength=1.5)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=labels, scanner=labels)
    found = run(tmp_path, embeddings, facts, "kind")
    out = tmp_path / "out"
    told = pd.read_csv(out / "predictions.csv")
    for reader, own in told.groupby("reader"):
        assert value(found, reader, "accuracy") == pytest.approx((own["truth"] == own["decision"]).mean())
        recalls = [(part["truth"] == part["decision"]).mean() for _, part in own.groupby("truth")]
        assert value(found, reader, "balanced_accuracy") == pytest.approx(np.mean(recalls))
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a in own.loc[own["truth"] == 1, "p_1"]
            for b in own.loc[own["truth"] == 0, "p_1"]
        ]
        assert value(found, reader, "auroc") == pytest.approx(np.mean(pairs))
    few = pd.read_csv(out / "few_shot.csv")
    drawn = pd.read_csv(out / "few_shot_predictions.csv")
    for keys, own in drawn.groupby(["reader", "shots", "seed"]):
        row = few[(few[["reader", "shots", "seed"]] == list(keys)).all(axis=1) & (few["metric"] == "accuracy")]
        assert row["value"].iloc[0] == pytest.approx((own["truth"] == own["decision"]).mean())
    assert sorted(few["shots"].unique()) == [1, 2], "a class has no 50 subjects"
    short = pd.read_csv(out / "shortcuts.csv").iloc[0]
    own = pd.read_csv(out / "shortcut_predictions.csv")
    recalls = [(part["truth"] == part["decision"]).mean() for _, part in own.groupby("truth")]
    assert short["value"] == pytest.approx(np.mean(recalls))
    assert "Shortcuts" in (out / "report.html").read_text()


def test_few_subjects_are_drawn_within_more_and_evenly(tmp_path: Path) -> None:
    labels = np.arange(40) % 2
    embeddings = table_of(tmp_path / "e.parquet", labels, scans=2)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=np.repeat(labels, 2))
    run(tmp_path, embeddings, facts, "kind", shots=[1, 3, 8])
    few = pd.read_csv(tmp_path / "out" / "few_shot.csv")
    assert {int(row.shots): int(row.fitted) for row in few.itertuples()} == {1: 4, 3: 12, 8: 32}


def test_a_scanner_that_can_be_told_is_an_alarm_and_one_that_cannot_is_none(tmp_path: Path) -> None:
    labels = np.arange(60) % 2
    embeddings = table_of(tmp_path / "e.parquet", labels, strength=6.0)
    rng = np.random.default_rng(0)
    facts = facts_of(
        tmp_path / "f.csv", embeddings, kind=labels, scanner=np.where(labels, "x", "y"),
        site=rng.permutation(labels), vendor="one", note=labels,
    )  # fmt: skip
    told = run(tmp_path, embeddings, facts, "kind").sentences
    table = pd.read_csv(tmp_path / "out" / "shortcuts.csv").set_index("column")
    assert table["alarm"].to_dict() == {"scanner": True, "site": False, "vendor": False}
    assert table.loc["vendor", "note"] == "one value only"
    assert table.loc["scanner", "tied"] == pytest.approx(1.0)
    assert "The target goes with it" in next(line for line in told if line.startswith("shortcut"))
    run(tmp_path, embeddings, facts, "kind", shortcuts=["note"])
    assert pd.read_csv(tmp_path / "out" / "shortcuts.csv")["column"].tolist() == ["note"]
    with pytest.raises(ConfigError, match="no such column"):
        run(tmp_path, embeddings, facts, "kind", shortcuts=["nothing"])


def test_what_is_not_defined_is_said(tmp_path: Path) -> None:
    labels = np.arange(24) % 2
    splits = ["train"] * 14 + ["test"] * 10
    embeddings = table_of(tmp_path / "e.parquet", labels, splits=splits)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=[*labels[:14], *[1] * 10])
    found = run(tmp_path, embeddings, facts, "kind", scheme="split")
    assert math.isnan(value(found, "linear", "auroc"))
    written = pd.read_csv(tmp_path / "out" / "metrics.csv").set_index(["reader", "metric"])
    assert written.loc[("linear", "auroc"), "note"] == "one value only"
    assert "nan" not in (tmp_path / "out" / "metrics.csv").read_text().lower()
    assert "nan" not in "".join(found.sentences)
    assert "<td>nan</td>" not in (tmp_path / "out" / "report.html").read_text()


def test_one_test_subject_has_no_interval(tmp_path: Path) -> None:
    splits = ["train"] * 20 + ["test"] * 4
    embeddings = table_of(tmp_path / "e.parquet", np.array([0, 1, 0, 1, 0, 1]), scans=4, splits=splits)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=[0, 1] * 12)
    found = run(tmp_path, embeddings, facts, "kind", scheme="split")
    assert set(found.metrics["note"]) == {"one subject only"}
    assert found.metrics["low"].isna().all()


def test_cases_without_the_column_are_counted_and_bad_columns_refused(tmp_path: Path) -> None:
    labels = np.arange(20) % 2
    embeddings = table_of(tmp_path / "e.parquet", labels)
    texts = [str(label) for label in labels]
    texts[3] = texts[7] = ""
    facts = facts_of(
        tmp_path / "f.csv", embeddings, kind=texts, same="a", word=[*"abcdefghij"] * 2, lone=["a"] + [""] * 18 + ["b"]
    )
    assert "2 embedded cases state no kind and were left out." in run(tmp_path, embeddings, facts, "kind").sentences
    for target, code, given in (
        ("kin", "E_TARGET", {}),
        ("same", "E_ONE_CLASS", {}),
        ("word", "E_CONFIG", {"kind": "numbers"}),
    ):
        with pytest.raises(ConfigError) as caught:
            run(tmp_path, embeddings, facts, target, **given)
        assert caught.value.code == code
    with pytest.raises(ReadError, match="no such table"):
        run(tmp_path, embeddings, tmp_path / "none.csv", "kind")
    found = Embeddings.read(embeddings)
    Embeddings(found.table.assign(subject_id="one"), found.vectors, found.about).write(embeddings)
    with pytest.raises(ConfigError, match="one subject"):
        run(tmp_path, embeddings, facts, "kind")


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    embeddings = table_of(tmp_path / "e.parquet", np.arange(12) % 2)
    facts = facts_of(tmp_path / "f.csv", embeddings, kind=np.arange(12) % 2)
    result = probe(embeddings, facts=facts, target="kind", out=tmp_path / "out", dry_run=True)
    assert "12 cases" in result.sentences[0]
    assert not (tmp_path / "out").exists()


def test_a_site_is_known_by_its_name() -> None:
    assert all(
        map(is_named_shortcut, ("site", "Scanner", "scanner_model", "Acquisition Site", "hospital", "center_id"))
    )
    assert not any(map(is_named_shortcut, ("age", "website_visits", "malignant", "opposite")))


def test_the_tie_of_two_columns_is_cramers_v() -> None:
    rng = np.random.default_rng(0)
    columns, values = rng.integers(0, 3, 200), rng.integers(0, 2, 200)
    counts = np.array([[((columns == c) & (values == v)).sum() for v in range(2)] for c in range(3)])
    chi2 = chi2_contingency(counts, correction=False).statistic
    pairs = [(f"c{c}", float(v)) for c, v in zip(columns, values, strict=True)]
    assert tie(pairs) == pytest.approx(math.sqrt(chi2 / 200 / min(1, 2)))
    assert math.isnan(tie([("a", 0.0), ("a", 1.0)]))
    assert math.isnan(tie([]))
