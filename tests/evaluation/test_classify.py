"""A column of a table, learned and predicted: pictures, volumes, bags and slices, from the scan to the table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.data.store import ArrayStore
from medssl.errors import CaseError, CheckpointError, ConfigError, NoInputError
from medssl.evaluation.classify import PreparedCase
from medssl.evaluation.predict import predict
from medssl.nn.bundle import load_bundle
from medssl.recipe import finetune
from medssl.runfolder import read_journal
from medssl.tasks.classification import Classifier, Config
from medssl.tasks.segmentation import Segmenter
from medssl.verdict import Verdict

PLAIN = {"intensity": {"mode": "robust_zscore"}, "body_mask": {"mode": "none"}, "crop": {"mode": "none"}}
SUBJECTS = 20
GRADES = "abc"


def _split(number: int) -> str:
    return "train" if number < 10 else "val" if number < 15 else "test"


def _picture(number: int, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise, with a bright block where the number is odd."""
    image = rng.integers(0, 60, shape)
    if number % 2:
        image[(slice(4, 12), slice(5, 11))] += 150
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and volumes of 20 subjects, two of each; only odd subjects have the block."""
    root = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    rows = ["case_id,subject_id,image,split,ill,grade,finding,age"]
    flat, solid = [*rows], [*rows]
    for number in range(SUBJECTS):
        for copy in "xy":
            name = f"s{number:02d}{copy}"
            Image.fromarray(_picture(number, rng, (18, 16))).save(root / f"{name}.png")
            volume = _picture(number, rng, (14, 16, 6)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 2.0, 1.0])), root / f"{name}.nii.gz")
            ill = "" if number == 8 else ("no", "yes")[number % 2]
            told = f"{_split(number)},{ill},{number % 3},{('none', 'p', 'p;q')[number % 3]},{40 + 20 * (number % 2)}"
            flat.append(f"{name},s{number:02d},{root}/{name}.png,{told}")
            solid.append(f"{name},s{number:02d},{root}/{name}.nii.gz,{told}")
    columns = ["ill", "grade", "finding", "age"]
    for kind, lines in (("flat", flat), ("solid", solid)):
        (root / f"{kind}.csv").write_text("\n".join(lines) + "\n")
        config = ScanConfig.parse({"columns": columns, "workers": 1, "thumbnails": False})
        cohort = scan(root / f"{kind}.csv", root / kind, config=config).path
        prepare(PrepareConfig.parse(PLAIN), cohort=cohort, out=root / f"{kind}_store", workers=1)
    return root


def recipe(steps: int = 30, *, dims: int = 2, **task: Any) -> dict[str, Any]:
    crop = [16, 16, 1] if dims == 2 else [12, 12, 6]
    return {
        "backbone": {"name": "unet", "channels": [4, 8], "strides": [2, 2], "blocks": [1, 1]},
        "task": {"name": "classification", "target": "ill", "kind": "binary", "crop_voxels": crop,
                 "augment": {"preset": "none"}, **task},
        "train": {"steps": steps, "batch_size": 6, "lr": 1e-2, "warmup_steps": 0, "log_every": 10, "precision": "32"},
        "checks": {"batches": 1},
    }  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_pictures_are_learned_and_the_table_says_what_the_network_says(home: Path, tmp_path: Path) -> None:
    done = finetune(recipe(), store=home / "flat_store", out=tmp_path / "run")
    result = predict(done.bundle, home / "flat" / "cohort.csv", out=tmp_path / "pred")
    assert result.outputs == (tmp_path / "pred" / "predictions.csv",)
    rows = {row["case_id"]: row for row in table(result.outputs[0])}
    assert list(rows["s00x"]) == ["case_id", "subject_id", "p_no", "p_yes", "decision"]
    assert len(rows) == 2 * SUBJECTS
    store = ArrayStore.open(home / "flat_store")
    right = [rows[case.case_id]["decision"] == case.facts["ill"] for case in store.select(split="test")]
    assert np.mean(right) >= 0.9
    bundle = load_bundle(done.bundle)
    network, verdict = Classifier.from_bundle(bundle), Verdict.parse(bundle.passport.target or {})
    assert (verdict.chosen_on, verdict.chosen_cases) == ("val", 10)
    for case in store.cases:
        p = verdict.probabilities(network.scores([case])[None])[0]
        assert float(rows[case.case_id]["p_yes"]) == pytest.approx(p[1], abs=1e-6)
        assert rows[case.case_id]["subject_id"] == case.subject_id
    lines = read_journal(tmp_path / "run" / "journal.jsonl")
    assert next(line for line in lines if "without_target" in line)["without_target"] == 2
    assert any("held_out/accuracy" in line for line in lines)
    assert finetune(recipe(), store=home / "flat_store", out=tmp_path / "run").bundle == done.bundle
    with pytest.raises(CheckpointError, match="a bundle of kind classifier"):
        Segmenter.from_bundle(bundle)
    twice = predict([done.bundle, done.bundle], home / "flat" / "cohort.csv", out=tmp_path / "twice")
    assert table(twice.outputs[0]) == list(rows.values())


@pytest.mark.parametrize(
    ("kind", "task", "column"),
    [
        ("flat", {"kind": "multilabel", "target": "finding", "balance": "weights", "focal_gamma": 1.0}, "p_q"),
        ("flat", {"kind": "multilabel", "target": "finding", "balance": "logits"}, "p_p"),
        ("flat", {"kind": "ordinal", "target": "grade", "balance": "weights"}, "value"),
        ("flat", {"kind": "regression", "target": "age", "head": {"levels": "all"}}, "value"),
        ("flat", {"kind": "multiclass", "target": "grade", "balance": "sampling", "mode": "linear"}, "p_2"),
        ("flat", {"level": "bag", "instances": 3, "balance": "logits", "mode": "frozen"}, "p_yes"),
        ("solid", {"dims": 3, "fit": "pad", "head": {"pool": "gem"}, "balance": "weights"}, "p_yes"),
        ("solid", {"dims": 3, "view": "crops", "crop_mm": [8, 8, 8], "head": {"pool": "attention"}}, "p_yes"),
        ("solid", {"level": "slices", "instances": 3, "head": {"bag_pool": "mean"}}, "p_yes"),
    ],
)  # fmt: skip
def test_every_kind_and_level_goes_from_the_store_to_the_table(
    home: Path, tmp_path: Path, kind: str, task: dict[str, Any], column: str
) -> None:
    plan = recipe(3, **task)
    done = finetune(plan, store=home / f"{kind}_store", out=tmp_path / "run")
    result = predict(done.bundle, home / kind / "cohort.csv", out=tmp_path / "pred")
    rows = table(result.outputs[0])
    in_bags = task.get("level") == "bag"
    assert len(rows) == SUBJECTS * (1 if in_bags else 2)
    assert all(np.isfinite(float(row[column])) for row in rows)
    bundle = load_bundle(done.bundle)
    network, verdict = Classifier.from_bundle(bundle), Verdict.parse(bundle.passport.target or {})
    cases = ArrayStore.open(home / f"{kind}_store").cases
    members = [case for case in cases if case.subject_id == rows[0]["subject_id"]] if in_bags else [cases[0]]
    expected = verdict.row(verdict.probabilities(network.scores(members)[None])[0])
    assert float(rows[0][column]) == pytest.approx(expected[column], abs=1e-5)
    assert rows[0]["decision"] == expected["decision"]


def test_without_validation_cases_nothing_is_chosen_and_that_is_said(home: Path, tmp_path: Path) -> None:
    plan = {**recipe(2), "checks": {"split": "train", "batches": 1}}
    done = finetune(plan, store=home / "flat_store", out=tmp_path / "run")
    assert any("not chosen on validation" in alarm for alarm in done.alarms)
    verdict = Verdict.parse(load_bundle(done.bundle).passport.target or {})
    assert (verdict.temperature, verdict.thresholds, verdict.chosen_on) == (1.0, (0.5,), None)


def test_a_scan_that_cannot_be_used_is_refused_and_the_others_go_on(home: Path, tmp_path: Path) -> None:
    done = finetune(recipe(1, level="bag"), store=home / "flat_store", out=tmp_path / "run")
    scans = tmp_path / "scans"
    scans.mkdir()
    Image.fromarray(np.arange(243, dtype=np.uint8).reshape(9, 9, 3)).save(scans / "c.png")
    Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9)).save(scans / "g.png")
    plan = predict(done.bundle, scans, out=tmp_path / "pred", dry_run=True)
    assert plan.outputs == (tmp_path / "pred" / "predictions.csv",)
    result = predict(done.bundle, scans, out=tmp_path / "pred")
    assert [row["case_id"] for row in table(result.outputs[0])] == ["g"]
    assert "E_CONTRACT" in (tmp_path / "pred" / "refused.csv").read_text()


def test_classifiers_of_different_questions_do_not_judge_together(home: Path, tmp_path: Path) -> None:
    first = finetune(recipe(1), store=home / "flat_store", out=tmp_path / "a").bundle
    other = finetune(recipe(1, target="grade", kind="multiclass"), store=home / "flat_store", out=tmp_path / "b").bundle
    with pytest.raises(CheckpointError, match="other column, kind, classes than"):
        predict([first, other], home / "flat" / "cohort.csv", out=tmp_path / "pred")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "height"}, ConfigError, "no column height of facts; it has ill, grade, finding, age"),
        ({"target": "finding", "kind": "regression"}, CaseError, "regression needs a number"),
        ({"target": "grade"}, ConfigError, "3 classes"),
        ({"augment": [{"name": "cutmix"}]}, ConfigError, "mixes images of several cases"),
        ({"mode": "linear", "head": {"pool": "gem"}}, ConfigError, "learns no pooling"),
        ({"view": "crops", "level": "bag"}, ConfigError, "view crops is for level image"),
        ({"level": "slices", "crop_voxels": [8, 8, 8]}, ConfigError, "end in 1"),
        ({"kind": "regression", "balance": "weights"}, ConfigError, "none to balance"),
        ({"kind": "ordinal", "balance": "logits"}, ConfigError, "without an order"),
        ({"kind": "ordinal", "focal_gamma": 1.0}, ConfigError, "focal_gamma"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_training(
    home: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(recipe(1, **changes), store=home / "flat_store", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_without_facts_or_without_values_is_refused(home: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort.csv"
    cohort.write_text((home / "flat" / "cohort.csv").read_text())
    prepare(PrepareConfig.parse(PLAIN), cohort=cohort, out=tmp_path / "store", workers=1)
    with pytest.raises(ConfigError, match=r"it has none\. Scan with --columns ill"):
        finetune(recipe(1), store=tmp_path / "store", out=tmp_path / "run")
    (tmp_path / "facts.csv").write_text("case_id,ill\ns19x,yes\n")
    prepare(PrepareConfig.parse(PLAIN), cohort=cohort, out=tmp_path / "store", workers=1)
    with pytest.raises(NoInputError, match="no case with a value of ill"):
        finetune(recipe(1), store=tmp_path / "store", out=tmp_path / "run")
    facts = "case_id,ill\n" + "".join(f"s{n:02d}{copy},{copy}\n" for n in range(10) for copy in "xy")
    (tmp_path / "facts.csv").write_text(facts)
    prepare(PrepareConfig.parse(PLAIN), cohort=cohort, out=tmp_path / "store", workers=1)
    with pytest.raises(CaseError, match="subject s00: its images have ill x and y"):
        finetune(recipe(1, level="bag"), store=tmp_path / "store", out=tmp_path / "run")


def test_a_prepared_scan_reads_as_a_case_of_the_store(home: Path) -> None:
    from medssl.data.prepare import prepare_volume
    from medssl.geometry import Geometry
    from medssl.volume import Volume

    config = PrepareConfig.parse(PLAIN)
    array = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype(np.float32)
    prepared = prepare_volume(Volume(array, Geometry((6, 5, 4), np.eye(4)), "arbitrary"), config)
    case = PreparedCase("a", prepared.volume.array.astype(config.dtype), prepared, True)
    box = case.read("image", (-1, 3, 0), (3, 4, 4))
    assert np.array_equal(box[:, 1:, :2], case.array[:, :2, 3:5])
    assert (box[:, 0] == np.float16(case.fill)).all()
    assert (case.read("image", (9, 0, 0), (2, 2, 2)) == np.float16(case.fill)).all()
    assert case.foreground_voxels(-1).shape == (0, 3)
    with pytest.raises(KeyError, match="a has no label"):
        case.read("label", (0, 0, 0), (1, 1, 1))


def test_logits_of_the_task_are_those_of_its_classifier(home: Path) -> None:
    from medssl.nn.backbone import build_backbone
    from medssl.tasks.classification import Classification
    from medssl.tasks.targets import read_targets

    plan = recipe(1, crop_voxels=[16, 18, 1])
    options = {key: value for key, value in plan["task"].items() if key != "name"}
    targets = read_targets({"a": "0", "b": "1"}, train=["a", "b"], column="ill", kind="binary")
    encoder = build_backbone(plan["backbone"], in_channels=1, spatial_dims=2)
    task = Classification(Config.parse(options), encoder=encoder, targets=targets, seed=0).eval()
    case = ArrayStore.open(home / "flat_store").cases[0]
    x = torch.from_numpy(case.read("image", (0, 0, 0), case.shape).copy())[None, ..., 0]
    with torch.no_grad():
        found = task.logits(x.float())[0].numpy()
    assert np.allclose(found, task.classifier().scores([case]), atol=1e-5)
