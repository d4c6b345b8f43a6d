"""From scans to an answer, through the functions that the commands call: phantoms, for a minute at most."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tiny

import medssl
from medssl import quickstart
from medssl.config import load_yaml
from medssl.data.phantom import write_phantoms
from medssl.data.scan import ScanConfig
from medssl.errors import CheckpointError
from medssl.evaluation.assess import EvaluateConfig
from medssl.io import write_volume

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_a_folder_of_scans_becomes_label_maps_scores_and_an_answer(tmp_path: Path) -> None:
    scans = write_phantoms(
        tmp_path / "scans", num_subjects=12, num_labelled=10, shape=(24, 28, 20), spacing_mm=(2, 2, 3)
    )
    found = medssl.scan(scans, tmp_path / "cohort.csv", config=ScanConfig.parse(tiny.SCAN))
    assert found.ledger.counts()["accepted"] == 12

    store = tmp_path / "store"
    medssl.prepare(medssl.PrepareConfig.parse(tiny.PREPARE), cohort=found.path, out=store, workers=1)
    opened = medssl.ArrayStore.open(store)
    np.testing.assert_allclose([case.spacing_mm for case in opened.cases], 1.5)

    encoder = medssl.pretrain(tiny.VOCO, store=store, out=tmp_path / "voco")
    model = medssl.finetune(
        tiny.shorter(tiny.SEGMENT, 60), store=store, out=tmp_path / "segment", encoder=encoder.bundle
    )
    test = medssl.Cohort.from_csv(found.path).select(split="test", labelled=True)
    predicted = medssl.predict(model.bundle, [Path(case.image) for case in test], out=tmp_path / "predictions")
    assert predicted.ledger.exit_code() == 0
    for case, output in zip(test, predicted.outputs, strict=True):
        source, written = nibabel.load(case.image), nibabel.load(output)
        assert written.shape == source.shape
        np.testing.assert_array_equal(written.affine, source.affine)
        assert set(np.unique(written.dataobj)) <= {0, 1, 2}

    scores = medssl.evaluate(
        tmp_path / "predictions", found.path, out=tmp_path / "metrics", config=EvaluateConfig(split="test")
    )
    assert scores.ledger.exit_code() == 0
    assert scores.cases is not None
    assert len(scores.cases) == len(test) * 2
    assert scores.cases["dice"].max() > 0.3, "the large organ is found in part after 60 steps"

    arms = {"scratch": {}, "voco": {"bundle": str(encoder.bundle)}}
    plan = {"finetune": tiny.shorter(tiny.SEGMENT, 2), "arms": arms, "budgets": [2, "all"], "seeds": [0, 1]}
    answer = medssl.study(plan, store=store, out=tmp_path / "study")
    assert len(answer.summary) == 4
    assert answer.report.exists()
    assert any("labelled subjects voco is" in sentence for sentence in answer.sentences)


def test_a_bundle_for_another_channel_count_is_refused_from_start_to_end(
    model_bundle: Path, encoder_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    geometry = medssl.Geometry((16, 16, 16), np.diag([2.0, 2.0, 2.0, 1.0]))
    for name in ("a", "b"):
        image = medssl.Volume(rng.normal(100, 10, (2, 16, 16, 16)).astype(np.float32), geometry, "arbitrary")
        write_volume(image, tmp_path / "scans" / f"{name}.mha")
        label = (image.array[:1] > 100).astype(np.uint8)
        write_volume(medssl.Volume(label, geometry, "label"), tmp_path / "scans" / f"{name}_seg.mha")
    config = ScanConfig.parse({**tiny.SCAN, "fractions": {"train": 1.0}})
    found = medssl.scan(tmp_path / "scans", tmp_path / "cohort.csv", config=config)
    medssl.prepare(medssl.PrepareConfig.parse(tiny.PREPARE), cohort=found.path, out=tmp_path / "store", workers=1)
    with pytest.raises(CheckpointError, match="1 channels, found 2") as caught:
        medssl.finetune(tiny.SEGMENT, store=tmp_path / "store", out=tmp_path / "o", encoder=encoder_bundle)
    assert caught.value.code == "E_CONTRACT"
    result = medssl.predict(model_bundle, tmp_path / "scans" / "a.mha", out=tmp_path / "p")
    assert [(entry.code, entry.outcome.value) for entry in result.ledger] == [("E_CONTRACT", "rejected")]


def test_the_demo_runs_from_scans_to_a_page_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = lambda folder, **options: write_phantoms(
        folder, **{**options, "num_subjects": 12, "num_labelled": 12}, shape=(20, 24, 20), spacing_mm=(2, 2, 3)
    )
    monkeypatch.setattr(quickstart, "write_phantoms", small)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setitem(quickstart.STUDY, "budgets", [2])
    places = quickstart.demo(tmp_path / "demo", steps_share=0.01)
    assert all(path.exists() for path in places.values())
    page = places["report"].read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "the numbers say nothing about patients" in page
    before = {name: path.read_bytes() for name, path in places.items() if path.is_file()}
    bundles = [(places[name] / "digests.json").read_bytes() for name in ("encoder", "model")]
    again = quickstart.demo(tmp_path / "demo", steps_share=0.01)
    assert again == places
    assert [(places[name] / "digests.json").read_bytes() for name in ("encoder", "model")] == bundles
    assert {name: path.read_bytes() for name, path in places.items() if path.is_file()} == before


def _run_script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(PIPELINES / name), run_name="__main__")


def test_pretrain_then_segment_runs_as_it_is_written(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    smoke = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=1", "checks.batches=1"]
    overrides = [word for override in smoke for word in ("--set", override)]
    _run_script(
        "pretrain_then_segment.py",
        phantoms.scans,
        tmp_path / "o",
        "--method",
        "mae",
        *overrides,
        monkeypatch=monkeypatch,
    )
    said = capsys.readouterr().out
    assert "12 accepted" in said
    assert re.search(r"Dice", said)
    assert (tmp_path / "o" / "metrics" / "summary.csv").exists()


def test_label_savings_plans_the_study_that_it_promises(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = medssl.study
    plans: list[dict[str, Any]] = []

    def shorter(plan: dict[str, Any], *, store: Path, out: Path) -> Any:
        plans.append(plan)
        return study({**plan, "arms": {"scratch": {}}, "finetune": tiny.shorter(tiny.SEGMENT, 1)}, store=store, out=out)

    monkeypatch.setattr(medssl, "study", shorter, raising=False)
    _run_script(
        "label_savings.py", phantoms.store, tmp_path / "o", "--budgets", 2, "--seeds", 2, monkeypatch=monkeypatch
    )
    assert (plans[0]["budgets"], plans[0]["seeds"]) == ([2, "all"], [0, 1])
    assert set(plans[0]["arms"]) == {"scratch", "mae", "voco"}
    for arm in plans[0]["arms"].values():
        assert all(load_yaml(Path(recipe)) for recipe in arm.values())
    assert "report:" in capsys.readouterr().out
    assert json.dumps(plans[0])
