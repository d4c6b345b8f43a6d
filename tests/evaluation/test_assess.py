"""The evaluate command: matching, refusing, counting empties, and intervals over subjects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, ExitCode, NoInputError, ReadError
from medssl.evaluation import assess as module
from medssl.evaluation.assess import EvaluateConfig, evaluate
from medssl.evaluation.statistics import cluster_bootstrap
from medssl.evaluation.summary import summarise
from medssl.io import read_volume
from medssl.ledger import Outcome

SPACING = (1.0, 2.0, 3.0)


def save(path: Path, labels: np.ndarray, *, shift_mm: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag((*SPACING, 1.0))
    affine[0, 3] = shift_mm
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), affine), path)
    return path


def box(start: int, stop: int, *, value: int = 1) -> np.ndarray:
    labels = np.zeros((20, 8, 6), dtype=np.uint8)
    labels[start:stop, 2:6, 2:5] = value
    return labels


def folders(tmp_path: Path, pairs: dict[str, tuple[np.ndarray | None, np.ndarray | None]]) -> tuple[Path, Path]:
    """Predictions and references by name; None leaves a file out."""
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    predictions.mkdir()
    labels.mkdir()
    for name, (prediction, reference) in pairs.items():
        if prediction is not None:
            save(predictions / f"{name}.nii.gz", prediction)
        if reference is not None:
            save(labels / f"{name}.nii.gz", reference)
    return predictions, labels


def test_scores_are_per_case_and_structure_in_mm_with_the_worst_first(tmp_path: Path) -> None:
    pairs = {
        "a": (box(2, 8), box(2, 8)),
        "b": (box(5, 11), box(2, 8)),
        "c": (box(3, 9) + box(12, 16, value=2), box(2, 8) + box(12, 16, value=2)),
    }
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out")
    cases = result.cases
    assert cases is not None
    one = cases[cases["label"] == 1].set_index("case_id")
    assert one["dice"].to_dict() == pytest.approx({"a": 1.0, "b": 0.5, "c": 10 / 12})
    assert one["hd_mm"].to_dict() == pytest.approx({"a": 0.0, "b": 3.0, "c": 1.0})  # 1 mm voxels along x
    assert one["reference_ml"]["a"] == pytest.approx(6 * 4 * 3 * 6 / 1000)
    assert cases["case_id"].iloc[0] == "b"
    assert list(cases["dice"]) == sorted(cases["dice"])
    two = cases[cases["label"] == 2].set_index("case_id")["presence"].to_dict()
    assert two == {"a": "neither", "b": "neither", "c": "both"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "cases.csv"), cases, check_dtype=False)


def test_summary_leaves_true_negatives_out_and_counts_the_missed_with_the_worst_value(tmp_path: Path) -> None:
    empty = np.zeros((20, 8, 6), dtype=np.uint8)
    pairs = {
        "good": (box(2, 8), box(2, 8)),
        "missed": (empty, box(2, 8)),
        "invented": (box(2, 4), empty),
        "rightly": (empty, empty),
    }
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out")
    assert result.summary is not None
    row = result.summary.set_index("metric").loc["dice"]
    assert row["mean"] == pytest.approx(1 / 3)
    assert (row["cases"], row["missed"], row["invented"], row["neither"]) == (3, 1, 1, 1)
    diagonal = float(np.sqrt(19**2 + (7 * 2) ** 2 + (5 * 3) ** 2))
    assert result.summary.set_index("metric").loc["hd95_mm"]["mean"] == pytest.approx(2 * diagonal / 3)
    assert "1 missed, 1 invented, 1 rightly empty" in result.sentences()[0]
    assert result.sentences()[-1].startswith("Worst: case invented") or "case missed" in result.sentences()[-1]
    warned = [entry for entry in result.ledger if entry.outcome is Outcome.WARNED]
    assert {entry.item for entry in warned} == {"invented", "rightly"}
    assert {entry.code for entry in warned} == {"W_EMPTY_LABEL"}


def test_intervals_are_over_subjects_of_the_table(tmp_path: Path) -> None:
    pairs = {f"c{i}": (box(2 + i % 3, 8), box(2, 8)) for i in range(6)}
    predictions, labels = folders(tmp_path, pairs)
    table = tmp_path / "subjects.csv"
    table.write_text("case_id,subject_id\n" + "".join(f"c{i},s{i // 2}\n" for i in range(6)))
    config = EvaluateConfig(subjects=str(table), bootstrap=500, seed=3)
    result = evaluate(predictions, labels, out=tmp_path / "out", config=config)
    assert result.cases is not None
    assert result.summary is not None
    dice = [2 * (6 - i % 3) / (12 - i % 3) for i in range(6)]
    expected = cluster_bootstrap(dice, [f"s{i // 2}" for i in range(6)], num=500, seed=3)
    row = result.summary.set_index("metric").loc["dice"]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(expected)
    assert row["subjects"] == 3


def test_all_structures_together_weigh_each_case_once() -> None:
    numbers = dict.fromkeys(("nsd", "hd95_mm", "hd_mm", "assd_mm", "volume_error_ml"), 0.0)
    rows = [
        {"case_id": "a", "subject_id": "a", "label": 1, "presence": "both", "dice": 0.8, **numbers},
        {"case_id": "a", "subject_id": "a", "label": 2, "presence": "neither", "dice": 1.0, **numbers},
        {"case_id": "b", "subject_id": "b", "label": 1, "presence": "both", "dice": 0.6, **numbers},
        {"case_id": "b", "subject_id": "b", "label": 2, "presence": "missed", "dice": 0.0, **numbers},
    ]
    summary = summarise(pd.DataFrame(rows), bootstrap=200)
    means = summary[summary["metric"] == "dice"].set_index("label")["mean"].to_dict()
    assert means == pytest.approx({"1": 0.7, "2": 0.0, "all": (0.8 + 0.3) / 2})


def test_a_structure_in_no_map_has_no_mean(tmp_path: Path) -> None:
    config = EvaluateConfig(label_values=(1, 9))
    predictions, labels = folders(tmp_path, {"a": (box(2, 8), box(2, 8))})
    result = evaluate(predictions, labels, out=tmp_path / "out", config=config)
    assert result.summary is not None
    nine = result.summary[result.summary["label"] == "9"]
    assert nine["mean"].isna().all()
    assert "Label 9: in no reference and no prediction of 1 cases." in result.sentences()
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["mean"] for row in content["summary"] if row["label"] == "9"] == [None] * 8
    assert nine["note"].eq("in neither map of any case").all()
    assert [row["label"] for row in content["worst"]] == [1]


def test_maps_without_any_structure_ask_for_label_values(tmp_path: Path) -> None:
    empty = np.zeros((20, 8, 6), dtype=np.uint8)
    predictions, labels = folders(tmp_path, {"a": (empty, empty)})
    with pytest.raises(NoInputError, match="1 cases, 1 readable, and no structure in any"):
        evaluate(predictions, labels, out=tmp_path / "out")
    result = evaluate(predictions, labels, out=tmp_path / "out", config=EvaluateConfig(label_values=(1,)))
    assert result.cases is not None
    assert list(result.cases["presence"]) == ["neither"]


def test_one_subject_has_a_mean_without_an_interval(tmp_path: Path) -> None:
    result = evaluate(*folders(tmp_path, {"a": (box(2, 8), box(2, 8))}), out=tmp_path / "out")
    assert "Dice 1.000, surface Dice 1.000, HD95 0.00 mm over 1 cases of 1 subjects" in result.sentences()[0]


def test_references_without_a_prediction_are_counted_in_a_sentence(tmp_path: Path) -> None:
    pairs = {"a": (box(2, 8), box(2, 8)), "b": (None, box(2, 8)), "c": (None, box(2, 8))}
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out")
    assert "2 references have no prediction and are in no number above." in result.sentences()


def test_predicted_values_that_were_not_asked_for_are_counted_in_a_sentence(tmp_path: Path) -> None:
    pairs = {"a": (box(2, 8) + box(12, 16, value=3), box(2, 8)), "b": (box(2, 8), box(2, 8))}
    config = EvaluateConfig(label_values=(1,))
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out", config=config)
    assert [(entry.item, entry.code) for entry in result.ledger] == [("a", "W_LABEL_SET"), ("b", "")]
    assert result.sentences()[-1].startswith("1 predictions hold label values that were not asked for")


def test_pictures_without_a_voxel_size_are_compared_by_overlap_alone(tmp_path: Path) -> None:
    for folder, rows in (("predictions", (1, 5)), ("labels", (1, 7))):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            pixels = np.zeros((12, 10), np.uint8)
            pixels[rows[0] : rows[1], 2:8] = 1
            pixels[9:11, 2:8] = 2 * (name == "b")
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    options = {"predictions": tmp_path / "predictions", "labels": tmp_path / "labels", "out": tmp_path / "out"}
    result = evaluate(**options)
    assert result.cases is not None
    assert result.summary is not None
    row = result.cases[result.cases["label"] == 1].iloc[0]
    assert row["dice"] == pytest.approx(2 * 24 / (24 + 36))
    assert row[["nsd", "hd95_mm", "hd_mm", "assd_mm", "volume_error_ml"]].isna().all()
    without_mm = result.summary[~result.summary["metric"].isin(("dice", "volume_error_percent"))]
    assert without_mm["mean"].isna().all()
    assert without_mm["note"].eq("not defined for any case").all()
    assert "surface Dice not measured, HD95 not measured over 2 cases" in result.sentences()[0]
    assert result.sentences()[-1].startswith("2 cases state no voxel size")
    measured = evaluate(**options, config=EvaluateConfig(assume_spacing_mm=(0.5, 0.5, 1.0)))
    assert measured.cases is not None
    assert measured.cases[measured.cases["label"] == 1].iloc[0]["hd_mm"] == pytest.approx(1.0)


def test_one_of_two_transforms_may_be_chosen(tmp_path: Path) -> None:
    for folder in ("predictions", "labels"):
        (tmp_path / folder).mkdir()
        image = nibabel.Nifti1Image(box(2, 8), np.eye(4))
        moved = np.eye(4)
        moved[0, 3] = 5
        image.set_sform(np.eye(4), 1)
        image.set_qform(moved, 1)
        nibabel.save(image, tmp_path / folder / "a.nii.gz")
    options = {"predictions": tmp_path / "predictions", "labels": tmp_path / "labels", "out": tmp_path / "out"}
    with pytest.raises(NoInputError):
        evaluate(**options)
    assert evaluate(**options, config=EvaluateConfig(xform="sform")).ledger.counts()["rejected"] == 0


@pytest.mark.parametrize(("fault", "code"), [(MemoryError, "E_MEMORY"), (ZeroDivisionError, "E_UNEXPECTED")])
def test_whatever_happens_to_one_case_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception], code: str
) -> None:
    def fail_on_b(path: Path, **options: Any) -> Any:
        if path.name == "b.nii.gz":
            raise fault
        return read_volume(path, **options)

    monkeypatch.setattr(module, "read_volume", fail_on_b)
    pairs = {name: (box(2, 8), box(2, 8)) for name in "abc"}
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out")
    assert [(entry.item, entry.code) for entry in result.ledger] == [("a", ""), ("b", code), ("c", "")]


def test_a_prediction_named_as_the_images_of_two_cases_is_refused(tmp_path: Path) -> None:
    rows = ["case_id,subject_id,image,label"]
    for index, person in enumerate(("P1", "P2")):
        save(tmp_path / "raw" / person / "label.nii.gz", box(2 + index, 8))
        rows.append(f"{person}_t1,{person},raw/{person}/t1.nii.gz,raw/{person}/label.nii.gz")
    (tmp_path / "cohort.csv").write_text("\n".join(rows) + "\n")
    save(tmp_path / "predictions" / "t1.nii.gz", box(3, 8))
    with pytest.raises(CaseError, match="2 cases have an image of this name") as error:
        evaluate(tmp_path / "predictions", tmp_path / "cohort.csv", out=tmp_path / "out")
    assert error.value.code == "E_NAME_CLASH"


def test_bad_pairs_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"good": (box(2, 8), box(2, 8)), "shape": (box(2, 8), box(2, 8)[:, :7])})
    for name in ("near", "off"):
        save(labels / f"{name}.nii.gz", box(2, 8))
    save(predictions / "near.nii.gz", box(2, 8), shift_mm=0.05)
    save(predictions / "off.nii.gz", box(2, 8), shift_mm=0.5)
    whole = save(labels / "cut.nii.gz", np.random.default_rng(0).integers(0, 2, (20, 8, 6))).read_bytes()
    (labels / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    save(predictions / "cut.nii.gz", box(2, 8))
    save(predictions / "extra.nii.gz", box(2, 8))
    save(labels / "waiting.nii.gz", box(2, 8))
    result = evaluate(predictions, labels, out=tmp_path / "out")
    booked = {entry.item: (entry.outcome, entry.code) for entry in result.ledger}
    assert booked["good"] == booked["near"] == (Outcome.ACCEPTED, "")
    assert booked["shape"] == (Outcome.REJECTED, "E_SHAPE")
    assert booked["off"] == (Outcome.REJECTED, "E_GEOMETRY")
    assert booked["extra"] == (Outcome.REJECTED, "E_NO_LABEL")
    assert booked["waiting"][0] is Outcome.IGNORED
    assert booked["cut"][0] is Outcome.REJECTED
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED
    refused = pd.read_csv(tmp_path / "out" / "refused.csv")
    assert set(refused["item"]) == {"shape", "off", "extra", "waiting", "cut"}


def test_a_reference_value_without_a_structure_is_refused(tmp_path: Path) -> None:
    pairs = {"a": (box(2, 8), box(2, 8)), "b": (box(2, 8), box(2, 8, value=4))}
    config = EvaluateConfig(label_values=(1,))
    result = evaluate(*folders(tmp_path, pairs), out=tmp_path / "out", config=config)
    (refused,) = [entry for entry in result.ledger if entry.outcome is Outcome.REJECTED]
    assert (refused.item, refused.code) == ("b", "E_LABEL_SET")


def test_a_cohort_names_references_subjects_and_the_split_that_must_be_complete(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    rows = ["case_id,subject_id,image,label,split"]
    for index, split in enumerate(("train", "test", "test", "test")):
        save(tmp_path / "raw" / f"lab{index}.nii.gz", box(2, 8))
        rows.append(
            f"case-{index},s{index // 2},raw/scan{index}.nii.gz,raw/lab{index}.nii.gz,{split if index else 'train'}"
        )
    rows[2] = rows[2].replace("s0", "s9")
    (tmp_path / "cohort.csv").write_text("\n".join(rows) + "\n")
    for index in (0, 1, 2):
        save(predictions / f"scan{index}.nii.gz", box(2, 8))
    config = EvaluateConfig(split="test")
    result = evaluate(predictions, tmp_path / "cohort.csv", out=tmp_path / "out", config=config)
    booked = {entry.item: (entry.outcome, entry.code) for entry in result.ledger}
    assert booked["case-0"] == (Outcome.IGNORED, "")
    assert booked["case-1"][0] is Outcome.ACCEPTED
    assert booked["case-3"] == (Outcome.REJECTED, "E_NO_PREDICTION")
    assert result.cases is not None
    assert set(zip(result.cases["case_id"], result.cases["subject_id"], strict=True)) == {
        ("case-1", "s9"),
        ("case-2", "s1"),
    }


def test_a_table_of_subjects_must_be_whole(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"a": (box(2, 8), box(2, 8)), "b": (box(2, 8), box(2, 8))})
    table = tmp_path / "subjects.csv"
    for text, message in (
        ("case_id,subject_id\na,s1\n", "1 of 2 references are not in the table, first b"),
        ("case_id,subject_id\na,s1\na,s2\nb,s1\n", "line 3"),
        ("case_id,subject_id\na,\nb,s1\n", "line 2"),
    ):
        table.write_text(text)
        with pytest.raises(CaseError, match=message) as error:
            evaluate(predictions, labels, out=tmp_path / "out", config=EvaluateConfig(subjects=str(table)))
        assert error.value.code == "E_TABLE"
    assert not (tmp_path / "out").exists()


def test_names_that_differ_in_case_or_suffix_only_are_refused(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"a": (box(2, 8), box(2, 8))})
    save(predictions / "A.nii", box(2, 8))
    with pytest.raises(CaseError, match="stand for one case") as error:
        evaluate(predictions, labels, out=tmp_path / "out")
    assert error.value.code == "E_NAME_CLASH"


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"a": (box(2, 8), None), "b": (None, box(2, 8))})
    with pytest.raises(NoInputError, match="none with the same name"):
        evaluate(predictions, labels, out=tmp_path / "out")
    with pytest.raises(ReadError, match="is not a folder"):
        evaluate(tmp_path / "nowhere", labels, out=tmp_path / "out")
    save(predictions / "b.nii.gz", box(2, 8), shift_mm=50)
    with pytest.raises(NoInputError, match=r"refused\.csv"):
        evaluate(predictions, labels, out=tmp_path / "out")


def test_a_dry_run_matches_and_writes_nothing(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"a": (box(2, 8), box(2, 8))})
    result = evaluate(predictions, labels, out=tmp_path / "out", dry_run=True)
    assert result.ledger.count(Outcome.ACCEPTED) == 1
    assert result.cases is None
    assert result.sentences() == []
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise EnvironmentFaultError("no space left", code="E_DISK_FULL")

    predictions, labels = folders(tmp_path, {"a": (box(2, 8), box(2, 8))})
    monkeypatch.setattr(module, "read_volume", full)
    with pytest.raises(EnvironmentFaultError):
        evaluate(predictions, labels, out=tmp_path / "out")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="nsd_tolerance_mm"):
        EvaluateConfig.parse({"nsd_tolerance": 2.0})


def test_every_number_of_the_summary_can_be_computed_from_cases_csv(tmp_path: Path) -> None:
    empty = np.zeros((20, 8, 6), dtype=np.uint8)
    pairs = {
        "a": (box(2, 8), box(2, 8) + box(12, 16, value=2)),
        "b": (box(5, 11) + box(12, 15, value=2), box(2, 8) + box(12, 16, value=2)),
        "c": (box(3, 9), empty),
    }
    evaluate(*folders(tmp_path, pairs), out=tmp_path / "out", config=EvaluateConfig(bootstrap=100))
    cases = pd.read_csv(tmp_path / "out" / "cases.csv")
    pd.testing.assert_frame_equal(
        summarise(cases, bootstrap=100),
        pd.read_csv(tmp_path / "out" / "summary.csv", keep_default_na=False, na_values={"mean": [""]}),
        check_dtype=False,
    )
    one = cases[cases["label"] == 1].set_index("case_id")
    assert one["volume_error_percent"].to_dict() == pytest.approx({"a": 0, "b": 0, "c": np.nan}, nan_ok=True)
    summary = summarise(cases, bootstrap=100).set_index(["label", "metric"])
    assert summary.loc[("1", "volume_error_percent"), "note"] == "not defined for 1 cases"
    assert summary.loc[("1", "volume_error_percent"), "cases"] == 2
    assert summary.loc[("2", "volume_error_percent"), "mean"] == pytest.approx((-100 - 25) / 2)


def test_the_area_weighted_surface_dice_may_be_left_out(tmp_path: Path) -> None:
    predictions, labels = folders(
        tmp_path, {"a": (box(2, 8), box(3, 8)), "b": (box(2, 8, value=2), box(2, 8, value=2))}
    )
    both = evaluate(predictions, labels, out=tmp_path / "both")
    voxels = evaluate(predictions, labels, out=tmp_path / "voxels", config=EvaluateConfig(nsd_area=False))
    assert both.cases is not None
    assert voxels.cases is not None
    assert voxels.summary is not None
    assert set(both.cases.columns) - set(voxels.cases.columns) == {"nsd_area"}
    assert "nsd_area" not in set(voxels.summary["metric"])


def test_lesions_are_counted_by_case_and_pooled(tmp_path: Path) -> None:
    empty = np.zeros((20, 8, 6), dtype=np.uint8)
    pairs = {
        "a": (box(2, 6) + box(10, 12), box(2, 6) + box(15, 18)),
        "b": (box(2, 6), box(2, 6)),
        "c": (empty, empty),
        "d": (box(2, 6, value=2), box(2, 6, value=2)),
    }
    folder = folders(tmp_path, pairs)
    result = evaluate(*folder, out=tmp_path / "out", config=EvaluateConfig(lesion_labels=(1,), bootstrap=100))
    lesions = pd.read_csv(tmp_path / "out" / "lesions.csv")
    assert lesions[["case_id", "label", "kind"]].to_numpy().tolist() == [
        ["a", 1, "found"], ["a", 1, "missed"], ["a", 1, "invented"], ["b", 1, "found"],
    ]  # fmt: skip
    assert lesions["reference_ml"].tolist() == pytest.approx([0.288, 0.216, 0, 0.288])
    counts = pd.read_csv(tmp_path / "out" / "lesion_cases.csv")
    assert counts["case_id"].tolist() == ["a", "b", "c", "d"]
    pooled = pd.read_csv(tmp_path / "out" / "lesion_summary.csv").set_index("metric")
    assert pooled["value"]["sensitivity"] == pytest.approx(2 / 3)
    assert any(
        line.startswith("Lesions of label 1: 2 of 3 found, 1 invented in 4 cases") for line in result.sentences()
    )
    assert not (tmp_path / "out" / "froc.csv").exists()
    every = evaluate(*folder, out=tmp_path / "every", config=EvaluateConfig(lesions=True, bootstrap=100))
    assert set(every.further["lesion_cases"]["label"]) == {1, 2}


def test_scores_of_lesions_give_curves_and_must_lie_on_the_grid(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {name: (box(2, 6) + box(10, 12), box(2, 6)) for name in "abc"})
    certainty = np.linspace(1, 0, 20)[:, None, None] * np.ones((20, 8, 6))
    for name, array in (("a", certainty), ("b", certainty[:, :7])):
        (tmp_path / "scores").mkdir(exist_ok=True)
        image = nibabel.Nifti1Image(array.astype(np.float32), np.diag((*SPACING, 1.0)))
        nibabel.save(image, tmp_path / "scores" / f"{name}.nii.gz")
    config = EvaluateConfig(lesion_labels=(1,), lesion_scores=str(tmp_path / "scores"), bootstrap=100)
    result = evaluate(predictions, labels, out=tmp_path / "out", config=config)
    assert {entry.item: entry.code for entry in result.ledger} == {"a": "", "b": "E_SHAPE", "c": "E_MISSING"}
    curve = pd.read_csv(tmp_path / "out" / "froc.csv")
    assert curve["score"].tolist() == pytest.approx([certainty[2, 0, 0], certainty[10, 0, 0]])
    assert curve["fp_per_case"].tolist() == [0, 1]
    pooled = result.further["lesion_summary"].set_index("metric")
    assert pooled["value"]["ap"] == 1
    for options in ({"lesions": True}, {}, {"lesion_labels": [1, 2]}):
        with pytest.raises(ConfigError, match="lesion_scores are of one structure"):
            EvaluateConfig.parse({"lesion_scores": "scores", **options})


def test_lesions_without_a_voxel_size_are_counted_but_not_measured(tmp_path: Path) -> None:
    for folder in ("predictions", "labels"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / folder / "a.png")
    config = EvaluateConfig(lesions=True, bootstrap=100)
    result = evaluate(tmp_path / "predictions", tmp_path / "labels", out=tmp_path / "out", config=config)
    (row,) = result.further["lesions"].to_dict("records")
    assert row["kind"] == "found"
    assert np.isnan(row["reference_ml"])
    assert np.isnan(row["predicted_ml"])


def test_subgroups_of_a_cohort_come_from_the_tables_beside_it(tmp_path: Path) -> None:
    rows, facts = ["case_id,subject_id,image,label"], ["case_id,site,age"]
    for index in range(12):
        save(tmp_path / "raw" / f"lab{index}.nii.gz", box(2, 8))
        save(tmp_path / "predictions" / f"scan{index}.nii.gz", box(2 if index < 6 else 5, 8))
        rows.append(f"case-{index},s{index},raw/scan{index}.nii.gz,raw/lab{index}.nii.gz")
        facts.append(f"case-{index},{'A' if index < 6 else 'B'},{30 + index}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "facts.csv").write_text("\n".join(facts[:-1]) + "\n")
    (tmp_path / "acquisition.csv").write_text("case_id,manufacturer\ncase-0,ge\n")
    config = EvaluateConfig(groups=("site", "age", "manufacturer"), bands={"age": 5.0}, bootstrap=100)
    result = evaluate(tmp_path / "predictions", tmp_path / "cohort.csv", out=tmp_path / "out", config=config)
    table = pd.read_csv(tmp_path / "out" / "subgroups.csv")
    dice = table[table["metric"] == "dice"].set_index(["column", "group"])
    assert dice["mean"]["site"].to_dict() == pytest.approx({"A": 1.0, "B": 2 / 3, "not stated": 2 / 3})
    assert dice["few"]["site"].isna().to_dict() == {"A": True, "B": True, "not stated": False}
    assert list(dice["mean"]["age"].index) == ["[30, 35)", "[35, 40)", "[40, 45]", "not stated"]
    assert dice["cases"]["manufacturer"].to_dict() == {"ge": 1, "not stated": 11}
    cases = pd.read_csv(tmp_path / "out" / "cases.csv")
    again = cases[cases["group_site"] == "B"]
    pd.testing.assert_frame_equal(
        summarise(again, bootstrap=100),
        result.further["subgroups"].query("column == 'site' and group == 'B'").iloc[:, 5:].reset_index(drop=True),
    )
    said = [line for line in result.sentences() if line.startswith("By site")]
    assert said == [
        "By site, mean Dice of label 1 runs from 0.667 (B, 5 subjects) to 1.000 (A, 6 subjects); see subgroups.csv."
    ]


def test_subgroups_of_a_folder_need_a_table_with_the_column(tmp_path: Path) -> None:
    folder = folders(tmp_path, {name: (box(2, 8), box(2, 8)) for name in "ab"})
    with pytest.raises(ConfigError, match="no column site"):
        evaluate(*folder, out=tmp_path / "out", config=EvaluateConfig(groups=("site",)))
    assert not (tmp_path / "out").exists()
    (tmp_path / "sites.csv").write_text("case_id,site\na,A\nb,A\n")
    config = EvaluateConfig(groups=("site",), facts=str(tmp_path / "sites.csv"))
    result = evaluate(*folder, out=tmp_path / "out", config=config)
    assert result.further["subgroups"]["group"].unique().tolist() == ["A"]
    assert not [line for line in result.sentences() if line.startswith("By site")]
