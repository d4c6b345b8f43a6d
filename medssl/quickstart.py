"""The whole path in minutes on generated phantoms: what ``medssl demo`` and ``make demo`` run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from medssl.config import Config
from medssl.data.phantom import write_phantoms
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.evaluation.assess import EvaluateConfig, evaluate
from medssl.evaluation.predict import predict
from medssl.evaluation.study import study
from medssl.io import read_volume, stem
from medssl.recipe import finetune, pretrain
from medssl.report.figures import overlay, training_curve
from medssl.report.page import Section, write_report
from medssl.runfolder import read_journal
from medssl.volume import reorient

_BACKBONE: dict[str, Any] = {"name": "unet", "channels": [8, 16, 32, 64], "strides": [2, 2, 2, 2]}
_CROP = [32, 32, 32]

_SCAN: dict[str, Any] = {"modality": "MR", "names": "keep"}  # phantoms have no names to hide
PREPARE: dict[str, Any] = {"modality": "MR", "spacing_mm": [1.5, 1.5, 1.5]}
VOCO: dict[str, Any] = {
    "backbone": _BACKBONE,
    "method": {"name": "voco", "grid": [2, 2, 2], "crop_voxels": [16, 16, 16], "num_targets": 4},
    "train": {"steps": 150, "batch_size": 4, "lr": 2e-3, "warmup_steps": 10, "check_every": 150, "log_every": 10},
}
SEGMENT: dict[str, Any] = {
    "backbone": _BACKBONE,
    "task": {"name": "segmentation", "crop_voxels": _CROP, "augment": {"preset": "mr_light"}},
    "train": {"steps": 150, "batch_size": 4, "lr": 4e-3, "warmup_steps": 10, "check_every": 150, "log_every": 10},
}
STUDY: dict[str, Any] = {
    "finetune": {**SEGMENT, "train": {**SEGMENT["train"], "steps": 40}},
    "budgets": [2, "all"],
    "seeds": [0, 1, 2],
}


class DemoConfig(Config):
    """What ``medssl demo`` can be told.

    Args:
        seed: Of the phantoms and of every run.
        steps_share: Share of the training steps, for a quicker look.
    """

    seed: int = Field(0, ge=0)
    steps_share: float = Field(1.0, gt=0, le=1)


def demo(out: Path, *, seed: int = 0, steps_share: float = 1.0, dry_run: bool = False) -> dict[str, Path]:
    """Scan, prepare, pretrain, fine-tune, predict, evaluate, study and report on phantoms.

    Args:
        out: Folder for everything that is made; an earlier demo there goes on where it stood.
        seed: Of the phantoms and of every run.
        steps_share: Share of the training steps, for a quicker look.
        dry_run: Say where everything would lie, and write nothing.

    Returns:
        What was written, by name.
    """
    names = {
        "scans": "scans", "cohort": "cohort.csv", "store": "store", "encoder": "voco/bundle", "model": "segment/bundle",
        "predictions": "predictions", "metrics": "metrics", "study": "study/report.html", "report": "report.html",
    }  # fmt: skip
    places = {name: out / place for name, place in names.items()}
    if dry_run:
        return places
    data = write_phantoms(out / "scans", num_subjects=24, num_labelled=16, seed=seed)
    cohort = scan(data, out / "cohort.csv", config=ScanConfig.parse({**_SCAN, "seed": seed})).path
    store = out / "store"
    prepare(PrepareConfig.parse(PREPARE), cohort=cohort, out=store)
    voco = pretrain(_shortened(VOCO, steps_share), store=store, out=out / "voco", overrides=[f"seed={seed}"])
    model = finetune(
        _shortened(SEGMENT, steps_share),
        store=store,
        out=out / "segment",
        encoder=voco.bundle,
        overrides=[f"seed={seed}"],
    )
    images, labels = _copy_test_cases(cohort, out)
    predict(model.bundle, images, out=out / "predictions")
    scores = evaluate(out / "predictions", labels, out=out / "metrics", config=EvaluateConfig())
    plan = {**STUDY, "finetune": _shortened(STUDY["finetune"], steps_share)}
    arms = {"scratch": {}, "voco": {"bundle": str(voco.bundle.resolve())}}
    findings = study({**plan, "arms": arms}, store=store, out=out / "study")
    sections = [
        Section("What was run", ["Phantoms, made for this demo; the numbers say nothing about patients."]),
        Section(
            "Pretraining", pictures={"VoCo: loss against the step": _curve(out / "voco", voco.metrics.get("chance"))}
        ),
        Section(
            "Segmentation of test cases", scores.sentences(), pictures=_pictures(images, labels, out / "predictions")
        ),
        Section("Does pretraining help?", findings.sentences),
    ]
    write_report(places["report"], "medssl demo", sections=sections)
    return places


def _shortened(recipe: dict[str, Any], share: float) -> dict[str, Any]:
    steps = max(1, round(recipe["train"]["steps"] * share))
    return {
        **recipe,
        "train": {**recipe["train"], "steps": steps, "warmup_steps": min(10, steps), "check_every": steps},
    }


def _copy_test_cases(cohort: Path, out: Path) -> tuple[Path, Path]:
    """Put the test images and their labels into folders, as a user would hand them over."""
    from medssl.data.cohort import Cohort

    folders = out / "test_images", out / "test_labels"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for case in Cohort.from_csv(cohort).select(split="test", labelled=True):
        for source, folder in zip((case.image, case.label), folders, strict=True):
            shutil.copy(str(source), folder / Path(str(source)).name)
    return folders


def _curve(run: Path, chance: float | None) -> bytes:
    lines = [
        line for line in read_journal(run / "journal.jsonl") if "step" in line and isinstance(line.get("loss"), float)
    ]
    return training_curve({"loss": [(line["step"], line["loss"]) for line in lines]}, ylabel="VoCo loss", chance=chance)


def _pictures(images: Path, labels: Path, predictions: Path, *, most: int = 3) -> dict[str, bytes]:
    pictures = {}
    for path in sorted(images.iterdir())[:most]:
        image, _ = read_volume(path)
        maps = {
            "reference": read_volume(labels / path.name, unit="label")[0],
            "prediction": read_volume(predictions / path.name, unit="label")[0],
        }
        shown = reorient(image)
        arrays = {name: np.asarray(reorient(volume).array[0]) for name, volume in maps.items()}
        pictures[stem(path)] = overlay(shown.array[0], arrays, spacing_mm=shown.geometry.spacing_mm)
    return pictures
