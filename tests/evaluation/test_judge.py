"""Judging tables of answers: what is read, refused, measured, and that every number comes from the table beside it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medssl.cli import app
from medssl.errors import CaseError, ConfigError, ExitCode, NoInputError
from medssl.evaluation.delong import auroc_interval, compare_aurocs
from medssl.evaluation.judge import JudgeConfig, JudgeResult, judge
from medssl.evaluation.scorecard import Options, Task, score
from medssl.evaluation.statistics import cluster_bootstrap, holm, paired_permutation_test
from medssl.ledger import Outcome

NUM = 40


def case_ids(num: int = NUM) -> list[str]:
    return [f"c{index:03d}" for index in range(num)]


def write(path: Path, columns: dict[str, Any]) -> Path:
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def binary(folder: Path, *, num: int = NUM, **extra: Any) -> tuple[Path, Path, pd.DataFrame]:
    """Predictions and references of two classes, two cases a subject; and both in one table."""
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(num) < 0.45, "malignant", "benign")
    chance = 1 / (1 + np.exp(-(2.0 * (truth == "malignant") - 1 + rng.normal(size=num))))
    ids, subjects = case_ids(num), [f"s{index // 2}" for index in range(num)]
    predictions = write(
        folder / "predictions.csv", {"case_id": ids, "p_benign": 1 - chance, "p_malignant": chance, **extra}
    )
    references = write(folder / "references.csv", {"case_id": ids, "subject_id": subjects, "finding": truth})
    table = pd.DataFrame({"case_id": ids, "subject_id": subjects, "truth": truth, "chance": chance})
    return predictions, references, table


def run(predictions: Path, references: Path, out: Path, *, column: str = "finding", **options: Any) -> JudgeResult:
    config = JudgeConfig.parse({"column": column, "bootstrap": 100, **options})
    return judge(predictions, references, out=out, config=config)


def rows(result: JudgeResult) -> pd.DataFrame:
    assert result.metrics is not None
    return result.metrics.set_index(["metric", "class"])


def test_two_classes_have_one_positive_and_the_numbers_of_their_definitions(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    result = run(predictions, references, tmp_path / "out")
    found = rows(result)
    positive, called = (table["truth"] == "malignant").to_numpy(), (table["chance"] >= 0.5).to_numpy()
    chance, subjects = table["chance"].to_numpy(), table["subject_id"].tolist()
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(chance[positive], chance[~positive])]
    assert found.loc[("auroc", "malignant"), "value"] == pytest.approx(np.mean(pairs))
    interval = auroc_interval(chance, positive, clusters=subjects)
    assert found.loc[("auroc", "malignant"), "high"] == pytest.approx(interval.high)
    loss = -np.log(np.where(positive, chance, 1 - chance))
    assert tuple(found.loc[("log_loss", "all"), ["value", "low", "high"]]) == pytest.approx(
        tuple(cluster_bootstrap(loss, subjects, num=100))
    )
    assert found.loc[("brier", "all"), "value"] == pytest.approx(np.mean((chance - positive) ** 2))
    assert found.loc[("sensitivity", "malignant"), "value"] == pytest.approx(called[positive].mean())
    assert found.loc[("specificity", "malignant"), "value"] == pytest.approx((~called)[~positive].mean())
    assert found.loc[("ppv", "malignant"), "value"] == pytest.approx(positive[called].mean())
    assert found.loc[("npv", "malignant"), "value"] == pytest.approx((~positive)[~called].mean())
    assert found.loc[("sensitivity", "malignant"), "cases"] == positive.sum()
    assert found.loc[("auroc", "malignant"), "subjects"] == NUM // 2
    assert ("auroc", "benign") not in found.index
    assert result.cases is not None
    assert result.cases["loss"].tolist() == sorted(loss, reverse=True)
    assert result.cases["case_id"].iloc[0] == table["case_id"][np.argmax(loss)]


def test_every_metric_comes_from_the_table_of_cases_beside_it(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    write(tmp_path / "sites.csv", {"case_id": table["case_id"], "site": ["north", "south"] * (NUM // 2)})
    out = tmp_path / "out"
    run(predictions, references, out, groups=["site"], subjects=str(tmp_path / "sites.csv"))
    cases = pd.read_csv(out / "cases.csv", dtype={"decision": str}, keep_default_na=False)
    task = Task("classes", ("benign", "malignant"), "malignant")
    again = score(cases, task, Options(bootstrap=100))
    written = pd.read_csv(out / "metrics.csv")
    pd.testing.assert_frame_equal(written, pd.read_csv(csv(again, tmp_path)), check_exact=False, rtol=1e-12)
    groups = pd.read_csv(out / "subgroups.csv")
    assert groups.groupby("group")["group_cases"].first().to_dict() == {"north": 20, "south": 20}
    north = cases[cases["case_id"].isin(case_ids()[::2])]
    one = groups[(groups["group"] == "north") & (groups["metric"] == "brier")]
    expected = np.mean((north["p_malignant"] - (north["truth"] == "malignant")) ** 2)
    assert one["value"].item() == pytest.approx(expected)
    roc = pd.read_csv(out / "roc.csv")
    assert set(roc["class"]) == {"malignant"}
    area = np.trapezoid(roc["sensitivity"], 1 - roc["specificity"])
    assert area == pytest.approx(written.loc[written["metric"] == "auroc", "value"].item())
    bins = pd.read_csv(out / "reliability.csv")
    error = (bins["cases"] * (bins["probability"] - bins["frequency"]).abs()).sum() / NUM
    ece = written[(written["metric"] == "ece") & (written["class"] == "malignant")]
    assert error == pytest.approx(ece["value"].item())
    confusion = pd.read_csv(out / "confusion.csv", index_col="truth")
    assert confusion.to_numpy().sum() == NUM
    summary = json.loads((out / "summary.json").read_text())
    assert summary["task"]["positive"] == "malignant"
    assert "E_" not in (out / "refused.csv").read_text()


def csv(table: pd.DataFrame, folder: Path) -> Path:
    path = folder / "again.csv"
    table.to_csv(path, index=False)
    return path


def test_the_decisions_of_the_model_count_where_they_are_given(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path, decision=["malignant"] * NUM)
    found = rows(run(predictions, references, tmp_path / "out"))
    assert found.loc[("sensitivity", "malignant"), "value"] == 1.0
    assert found.loc[("sensitivity", "malignant"), "interval"] == "exact"
    assert found.loc[("sensitivity", "malignant"), "low"] < 0.9
    assert found.loc[("npv", "malignant"), "note"] == "every case was decided so"
    assert math.isnan(found.loc[("npv", "malignant"), "value"])


def test_one_class_only_is_said_and_left_empty(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    table = pd.read_csv(references)
    table["finding"] = "benign"
    table.to_csv(references, index=False)
    result = run(predictions, references, tmp_path / "out")
    found = rows(result)
    for metric, note in (
        ("auroc", "one class only"),
        ("average_precision", "one class only"),
        ("sensitivity", "no case of this class"),
    ):
        assert math.isnan(found.loc[(metric, "malignant"), "value"])
        assert found.loc[(metric, "malignant"), "note"] == note
        assert found.loc[(metric, "malignant"), "interval"] == ""
    assert ",,," in (tmp_path / "out" / "metrics.csv").read_text()
    assert "AUROC not defined (one class only)" in " ".join(result.sentences())
    turned = rows(run(predictions, references, tmp_path / "other", positive="benign"))
    assert turned.loc[("specificity", "benign"), "note"] == "no case of another class"


def test_a_positive_class_from_one_subject_has_no_interval_and_says_so(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    table = pd.read_csv(references)
    table["finding"] = ["malignant"] * 2 + ["benign"] * (NUM - 2)
    table.to_csv(references, index=False)
    result = run(predictions, references, tmp_path / "out")
    found = rows(result)
    assert found.loc[("auroc", "malignant"), "note"] == "a class comes from one subject, so no interval"
    assert found.loc[("sensitivity", "malignant"), "note"] == "one subject, so no interval"
    assert "not defined on" in found.loc[("average_precision", "malignant"), "note"]
    assert "(a class comes from one subject, so no interval)" in " ".join(result.sentences())


def test_what_no_draw_moves_has_no_interval(tmp_path: Path) -> None:
    truth = ["a", "b"] * 20
    right = [float(name == "b") for name in truth]
    ids = {"case_id": case_ids()}
    predictions = write(tmp_path / "p.csv", {**ids, "p_a": [1 - p for p in right], "p_b": right})
    references = write(tmp_path / "r.csv", {**ids, "finding": truth})
    found = rows(run(predictions, references, tmp_path / "out"))
    assert found.loc[("balanced_accuracy", "all"), "value"] == 1.0
    assert found.loc[("balanced_accuracy", "all"), "note"] == "the same in every draw, so no interval"
    assert found.loc[("auroc", "b"), "low"] < 1.0


def three_classes(folder: Path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    truth = rng.choice(3, p=[0.5, 0.3, 0.2], size=60)
    logits = rng.normal(size=(60, 3)) + 1.5 * np.eye(3)[truth]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    columns = {f"p_{index}": chances[:, index] for index in range(3)}
    predictions = write(folder / "p.csv", {"case_id": case_ids(60), **columns})
    references = write(folder / "r.csv", {"case_id": case_ids(60), "grade": truth.astype(float)})
    return predictions, references, chances, truth


def test_many_classes_are_averaged_each_against_the_rest(tmp_path: Path) -> None:
    predictions, references, chances, truth = three_classes(tmp_path)
    found = rows(run(predictions, references, tmp_path / "out", column="grade"))  # 1.0 means the class 1
    areas = [
        np.mean([(a > b) + 0.5 * (a == b) for a in chances[truth == k, k] for b in chances[truth != k, k]])
        for k in range(3)
    ]
    assert found.loc[("auroc_macro", "all"), "value"] == pytest.approx(np.mean(areas))
    weights = np.bincount(truth) / 60
    assert found.loc[("auroc_weighted", "all"), "value"] == pytest.approx(np.dot(areas, weights))
    assert [found.loc[("auroc", str(k)), "value"] for k in range(3)] == pytest.approx(areas)
    recalls = [np.mean(chances[truth == k].argmax(axis=1) == k) for k in range(3)]
    assert found.loc[("balanced_accuracy", "all"), "value"] == pytest.approx(np.mean(recalls))
    brier = np.mean([sum((chances[i, k] - (truth[i] == k)) ** 2 for k in range(3)) for i in range(60)])
    assert found.loc[("brier", "all"), "value"] == pytest.approx(brier)


def test_labels_are_judged_one_by_one_and_together(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(5)}
    predictions = write(
        tmp_path / "p.csv", {**ids, "p_mass": [0.9, 0.8, 0.2, 0.4, 0.3], "p_cyst": [0.7, 0.1, 0.6, 0.2, 0.9]}
    )
    truth = ["mass;cyst", "mass", "cyst", "none", ""]
    references = write(tmp_path / "r.csv", {**ids, "finding": truth})
    result = run(predictions, references, tmp_path / "out")
    assert result.task == Task("labels", ("mass", "cyst"))
    found = rows(result)
    assert found.loc[("exact_match", "all"), "value"] == 1.0
    assert found.loc[("auroc", "mass"), "value"] == 1.0
    assert found.loc[("brier", "all"), "value"] == pytest.approx(
        np.mean([0.1**2, 0.2**2, 0.2**2, 0.4**2, 0.3**2, 0.1**2, 0.4**2, 0.2**2])
    )
    assert result.ledger.count(Outcome.IGNORED) == 1  # an empty cell is not stated
    cases = pd.read_csv(tmp_path / "out" / "cases.csv", keep_default_na=False).set_index("case_id")
    assert cases.loc["c000", "decision"] == "mass;cyst"
    assert cases.loc["c003", "decision"] == "none"
    assert "Worst: case c000" not in result.sentences()[-1]


def test_labels_that_never_occur_leave_no_average(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(4)}
    predictions = write(tmp_path / "p.csv", {**ids, "p_mass": [0.9, 0.1, 0.2, 0.4], "decision": ["mass", "", "", ""]})
    references = write(tmp_path / "r.csv", {**ids, "finding": ["none"] * 4})
    found = rows(run(predictions, references, tmp_path / "out"))
    assert found.loc[("auroc_macro", "all"), "note"] == "one class only"
    assert found.loc[("ppv", "mass"), "value"] == 0.0


def test_numbers_have_errors_and_agreement(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(60, 10, size=NUM)
    value = truth + rng.normal(2, 5, size=NUM)
    ids = {"case_id": case_ids()}
    predictions = write(
        tmp_path / "p.csv", {**ids, "subject_id": ["a", "b", "", "d"] * 10, "value": value, "decision": ""}
    )
    references = write(tmp_path / "r.csv", {**ids, "age": truth})
    result = run(predictions, references, tmp_path / "out", column="age")
    found = rows(result)
    assert found.loc[("mae", "all"), "value"] == pytest.approx(np.mean(np.abs(value - truth)))
    assert found.loc[("bias", "all"), "value"] == pytest.approx(np.mean(value - truth))
    assert found.loc[("rmse", "all"), "value"] == pytest.approx(math.sqrt(np.mean((value - truth) ** 2)))
    assert found.loc[("mae", "all"), "subjects"] == 13  # a case without a subject is its own
    assert result.cases is not None
    assert result.cases["loss"].iloc[0] == pytest.approx(np.abs(value - truth).max())
    assert not (tmp_path / "out" / "roc.csv").exists()
    assert result.sentences()[0].startswith("All 40 cases of 13 subjects: MAE")


@pytest.mark.parametrize(
    ("names", "options", "levels"),
    [
        (("1", "2", "4"), {}, (1, 2, 4)),
        (("a", "b", "c"), {}, (0, 1, 2)),
        (("low", "mid", "high"), {"classes": ["low", "mid", "high"]}, (0, 1, 2)),
    ],
)
def test_ordered_classes_have_a_weighted_kappa_and_an_error_in_their_numbers(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, Any], levels: tuple[float, ...]
) -> None:
    truth, decided = [0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 2, 0]
    value = [levels[place] + 0.25 for place in decided]
    ids = {"case_id": case_ids(6)}
    predictions = write(tmp_path / "p.csv", {**ids, "value": value, "decision": [names[k] for k in decided]})
    references = write(tmp_path / "r.csv", {**ids, "grade": [names[k] for k in truth]})
    result = run(predictions, references, tmp_path / "out", column="grade", **options)
    assert result.task == Task("ordinal", names)
    found = rows(result)
    seen = np.mean([(a - b) ** 2 for a, b in zip(truth, decided, strict=True)])
    chance = np.mean([(a - b) ** 2 for a in truth for b in decided])
    assert found.loc[("quadratic_kappa", "all"), "value"] == pytest.approx(1 - seen / chance)
    errors = [abs(v - levels[k]) for v, k in zip(value, truth, strict=True)]
    assert found.loc[("mae", "all"), "value"] == pytest.approx(np.mean(errors))
    assert found.loc[("accuracy", "all"), "value"] == pytest.approx(4 / 6)


def test_truths_come_from_the_facts_beside_a_cohort_and_the_split_must_be_complete(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    splits = ["test"] * 30 + ["train"] * 10
    cohort = write(
        tmp_path / "cohort.csv",
        {"case_id": table["case_id"], "subject_id": table["subject_id"], "image": "x.nii", "split": splits},
    )
    write(tmp_path / "facts.csv", {"case_id": table["case_id"], "finding": table["truth"]})
    references.unlink()
    short = write(tmp_path / "short.csv", pd.read_csv(predictions).iloc[1:].to_dict("list"))
    result = run(short, cohort, tmp_path / "out", split="test")
    assert result.ledger.count(Outcome.ACCEPTED) == 29
    assert result.ledger.count(Outcome.REJECTED) == 1
    assert "E_NO_PREDICTION" in (tmp_path / "out" / "refused.csv").read_text()
    assert run(short, cohort, tmp_path / "all").ledger.count(Outcome.IGNORED) == 1
    assert rows(result).loc[("accuracy", "all"), "subjects"] == 15


def test_two_models_are_compared_case_by_case(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    rng = np.random.default_rng(5)
    worse = np.clip(table["chance"] + rng.normal(0, 0.3, size=NUM), 0.01, 0.99)
    other = write(
        tmp_path / "other.csv",
        {"case_id": table["case_id"][::-1], "p_benign": (1 - worse)[::-1], "p_malignant": worse[::-1]},
    )
    result = run(predictions, references, tmp_path / "out", against=str(other))
    found = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("metric")
    positive, subjects = (table["truth"] == "malignant").to_numpy(), table["subject_id"].tolist()
    losses = [-np.log(np.where(positive, p, 1 - p)) for p in (table["chance"].to_numpy(), worse.to_numpy())]
    assert found.loc["loss", "difference"] == pytest.approx(np.mean(losses[0] - losses[1]))
    assert found.loc["loss", "p"] == pytest.approx(
        paired_permutation_test(losses[0], losses[1], subjects, num=500), abs=0.05
    )
    delong = compare_aurocs(table["chance"].to_numpy(), worse.to_numpy(), truth=positive, clusters=subjects)
    assert found.loc["auroc", "p"] == pytest.approx(delong.p)
    assert found.loc["auroc", "class"] == "malignant"
    assert sorted(found["p_holm"]) == pytest.approx(sorted(holm(found["p"].tolist())))
    assert any(line.startswith("Against the other model: auroc of malignant +") for line in result.sentences())
    again = pd.read_csv(tmp_path / "out" / "other_cases.csv")
    assert again["loss"].mean() == pytest.approx(losses[1].mean())


def test_a_comparison_of_labels_says_what_is_not_defined(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(4), "subject_id": ["a"] * 4}
    one = write(tmp_path / "p.csv", {**ids, "p_x": [0.9, 0.1, 0.2, 0.4], "p_y": [0.9, 0.2, 0.1, 0.3]})
    two = write(tmp_path / "q.csv", {**ids, "p_x": [0.9, 0.1, 0.2, 0.4], "p_y": [0.9, 0.2, 0.8, 0.3]})
    references = write(tmp_path / "r.csv", {**ids, "finding": ["x", "none", "none", "x"]})
    result = run(one, references, tmp_path / "out", against=str(two))
    assert result.comparison is not None
    notes = result.comparison["note"].tolist()
    assert notes[:2] == ["one subject, so no interval"] * 2
    assert notes[2:] == ["no variance: a class comes from one subject, or both areas are certain", "one class only"]
    assert "+nan (one class only)" not in " ".join(result.sentences())


def test_two_models_of_numbers_are_compared_by_their_errors(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(4)}
    one = write(tmp_path / "p.csv", {**ids, "value": [1.0, 2.0, 3.0, 4.0]})
    two = write(tmp_path / "q.csv", {**ids, "value": [1.5, 2.5, 3.5, 4.5]})
    references = write(tmp_path / "r.csv", {**ids, "age": [1.0, 2.0, 3.0, 4.0]})
    result = run(one, references, tmp_path / "out", column="age", against=str(two))
    assert result.comparison is not None
    (row,) = result.comparison.to_dict("records")
    assert (row["metric"], row["difference"], row["p"]) == ("loss", -0.5, 2 / 16)  # 2 of 16 swaps are as large


def test_models_of_other_tasks_or_other_cases_are_not_compared(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    short = write(tmp_path / "short.csv", pd.read_csv(predictions).iloc[2:].to_dict("list"))
    with pytest.raises(CaseError, match="2 of 40 cases are not predicted, first c000"):
        run(predictions, references, tmp_path / "out", against=str(short))
    ids = table["case_id"]
    other = write(tmp_path / "other.csv", {"case_id": ids, "p_malignant": 0.5, "p_benign": 0.5, "p_cyst": 0.0})
    with pytest.raises(CaseError, match="Compare models of one task"):
        run(predictions, references, tmp_path / "out", against=str(other))
    assert not (tmp_path / "out").exists()


def test_every_row_without_a_partner_or_with_an_unknown_truth_is_booked(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    table = pd.read_csv(references).astype(str)
    table.loc[0, "finding"] = "odd"
    table.loc[1, "finding"] = ""
    table.iloc[:-1].to_csv(references, index=False)
    result = run(predictions, references, tmp_path / "out")
    codes = {entry.item: entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED}
    assert codes == {"c000": "E_LABEL_SET", "c039": "E_NO_LABEL"}
    assert result.ledger.count(Outcome.IGNORED) == 1
    assert result.ledger.count(Outcome.ACCEPTED) == NUM - 3


def test_a_truth_that_is_no_number_is_booked(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(4)}
    predictions = write(tmp_path / "p.csv", {**ids, "value": [1.0, 2.0, 3.0, 4.0]})
    references = write(tmp_path / "r.csv", {**ids, "age": ["1", "old", "inf", "5"]})
    result = run(predictions, references, tmp_path / "out", column="age")
    assert result.ledger.count(Outcome.REJECTED) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"case_id": ["a", "a"], "p_x": [0.1, 0.2], "p_y": [0.9, 0.8]}, "case a has two rows"),
        ({"case_id": ["a", "b"], "p_x": [0.1, 0.3], "p_y": [0.9, math.nan]}, "p_y is ''; a probability from 0 to 1"),
        ({"case_id": ["a", "b"], "p_x": [0.1, 1.3], "p_y": [0.9, -0.3]}, "p_x is '1.3'"),
        ({"case_id": ["a"], "value": ["many"]}, "value is 'many'; a number"),
        ({"case_id": ["a"], "score": [1]}, "columns p_<class> for probabilities, or value"),
        ({"case_id": ["a"], "value": [1], "p_x": [1]}, "and not both"),
        ({"case_id": ["a"], "p_x": [0.1], "p_y": [0.9], "decision": ["z"]}, "decision 'z'; x, y are known"),
    ],
)
def test_predictions_that_cannot_be_understood_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    predictions = write(tmp_path / "p.csv", columns)
    references = write(tmp_path / "r.csv", {"case_id": ["a", "b"], "finding": ["x", "y"]})
    with pytest.raises(CaseError, match=message) as error:
        run(predictions, references, tmp_path / "out")
    assert error.value.code == "E_TABLE"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"p_x": [0.4], "p_y": [0.4]}, {"kind": "classes"}, CaseError, "probabilities sum to 0.8000"),
        ({"p_x": [1.0]}, {"kind": "classes"}, CaseError, "one class, x"),
        ({"value": [1.0]}, {"kind": "ordinal"}, CaseError, "no column decision"),
        ({"value": [1.0]}, {"kind": "labels"}, ConfigError, "kind labels with the columns value"),
        ({"p_x": [0.4], "p_y": [0.6]}, {"positive": "z"}, ConfigError, "positive: z, and the predictions have x, y"),
        ({"p_x": [0.4], "p_y": [0.6]}, {"classes": ["x", "y"]}, ConfigError, "classes: given for kind classes"),
        ({"p_x": [0.4], "p_y": [0.6]}, {"column": "odd"}, ConfigError, "no column odd; it has finding"),
        ({"p_x": [0.4], "p_y": [0.6]}, {"groups": ["site"]}, ConfigError, "no column site"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    predictions = write(tmp_path / "p.csv", {"case_id": ["a"], **columns})
    references = write(tmp_path / "r.csv", {"case_id": ["a"], "finding": ["x"]})
    with pytest.raises(error, match=message):
        run(predictions, references, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.csv", {"case_id": ["a"], "value": [1.0]})
    references = write(tmp_path / "r.csv", {"case_id": ["b"], "age": [1.0]})
    with pytest.raises(NoInputError, match="1 predictions, 1 references with age, and no case in both"):
        run(predictions, references, tmp_path / "out", column="age")
    (tmp_path / "empty.csv").write_text("case_id,value\n")
    with pytest.raises(NoInputError, match="no prediction in the table"):
        run(tmp_path / "empty.csv", references, tmp_path / "out", column="age")


def test_the_command_takes_a_table_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    given = [str(predictions), str(references), "-o", str(tmp_path / "out"), "--set", "column=finding"]
    given += ["--set", "bootstrap=100"]
    dry = CliRunner().invoke(app, ["evaluate", *given, "--dry-run"])
    assert dry.exit_code == ExitCode.OK
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["evaluate", *given])
    assert done.exit_code == ExitCode.OK
    assert "Class malignant: AUROC" in done.output
    assert (tmp_path / "out" / "metrics.csv").is_file()


def test_grades_written_as_other_numbers_are_the_same_and_a_text_among_numbers_is_none(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(6)}
    predictions = write(tmp_path / "p.csv", {**ids, "value": [0, 1, 2, 2, 1, 0], "decision": list("012210")})
    truth = ["0.0", "1.0", "2.0", "1.0", "NA", "nan"]
    references = write(tmp_path / "r.csv", {**ids, "grade": truth})
    result = run(predictions, references, tmp_path / "out", column="grade")
    assert result.task == Task("ordinal", ("0", "1", "2"))
    assert rows(result).loc[("accuracy", "all"), "value"] == pytest.approx(3 / 4)
    assert result.ledger.count(Outcome.REJECTED) == 2


def test_the_order_of_grades_that_are_words_is_said(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(6)}
    words = ["low", "mid", "high"] * 2
    predictions = write(tmp_path / "p.csv", {**ids, "value": [0, 1, 2] * 2, "decision": words})
    references = write(tmp_path / "r.csv", {**ids, "grade": words})
    result = run(predictions, references, tmp_path / "out", column="grade")
    assert any("high < low < mid" in line for line in result.sentences())


def test_probabilities_that_miss_one_are_not_taken_for_labels_where_each_truth_is_one_class(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    table = pd.read_csv(predictions)
    table.loc[3, "p_benign"] = 0.99
    table.to_csv(predictions, index=False)
    with pytest.raises(ConfigError, match="kind=labels"):
        run(predictions, references, tmp_path / "out")
    assert run(predictions, references, tmp_path / "out", kind="labels").task == Task("labels", ("benign", "malignant"))


def test_a_class_with_the_name_of_all_classes_is_refused(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(2)}
    predictions = write(tmp_path / "p.csv", {**ids, "p_all": [0.2, 0.9], "p_aml": [0.8, 0.1]})
    references = write(tmp_path / "r.csv", {**ids, "finding": ["aml", "all"]})
    with pytest.raises(CaseError, match="stands for all classes"):
        run(predictions, references, tmp_path / "out")


def test_a_class_may_hold_the_sign_between_labels(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path)
    for path in (predictions, references):
        path.write_text(path.read_text().replace("benign", "benign;cyst"))
    result = run(predictions, references, tmp_path / "out", positive="benign;cyst", against=str(predictions))
    assert result.comparison is not None
    assert result.comparison["p"].tolist() == [1.0, 1.0, 1.0]


def test_numbers_that_agree_in_every_case_have_no_interval(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(7)}
    predictions = write(tmp_path / "p.csv", {**ids, "value": [0.3] * 7})
    references = write(tmp_path / "r.csv", {**ids, "dose": [0.2] * 7})
    found = rows(run(predictions, references, tmp_path / "out", column="dose"))
    for metric in ("mae", "bias", "rmse"):
        assert found.loc[(metric, "all"), "note"] == "the same in every draw, so no interval"
        assert math.isnan(found.loc[(metric, "all"), "low"])
    assert found.loc[("r2", "all"), "note"] == "every truth is the same"


def test_a_score_that_tells_nothing_has_an_area_without_interval(tmp_path: Path) -> None:
    ids = {"case_id": case_ids(8), "subject_id": [f"s{place // 2}" for place in range(8)]}
    predictions = write(tmp_path / "p.csv", {**ids, "p_a": [0.7] * 8, "p_b": [0.3] * 8})
    references = write(tmp_path / "r.csv", {**ids, "finding": ["a", "b"] * 4})
    found = rows(run(predictions, references, tmp_path / "out"))
    assert found.loc[("auroc", "b"), "note"] == "no variance, so no interval"
    assert found.loc[("accuracy", "all"), "note"] == "the same in every draw, so no interval"
    assert found.loc[("sensitivity", "b"), "interval"] == "exact"


def test_a_subject_that_the_references_leave_empty_is_that_of_the_predictions(tmp_path: Path) -> None:
    predictions, references, _ = binary(tmp_path, subject_id=["s1", "s2", "s3", "s4"] * (NUM // 4))
    table = pd.read_csv(references)
    table["subject_id"] = ""
    table.to_csv(references, index=False)
    assert rows(run(predictions, references, tmp_path / "out")).loc[("accuracy", "all"), "subjects"] == 4


def test_subgroups_come_from_the_groups_in_the_table_of_cases(tmp_path: Path) -> None:
    predictions, references, table = binary(tmp_path)
    sites = write(tmp_path / "sites.csv", {"case_id": table["case_id"], "site": ["north", "south"] * (NUM // 2)})
    out = tmp_path / "out"
    run(predictions, references, out, groups=["site"], subjects=str(sites))
    cases, groups = pd.read_csv(out / "cases.csv"), pd.read_csv(out / "subgroups.csv")
    for site, own in cases.groupby("group_site"):
        value = groups.loc[(groups["group"] == site) & (groups["metric"] == "log_loss"), "value"].item()
        assert value == pytest.approx(own["loss"].mean())
