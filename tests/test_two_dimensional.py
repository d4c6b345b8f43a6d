"""Pictures from files to an answer: PNG images and masks through every command, in two dimensions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medssl
from medssl.data.scan import ScanConfig
from medssl.evaluation.assess import EvaluateConfig
from medssl.io import read_volume

SPACING_MM = (0.5, 0.5, 1.0)
SIZES = ((40, 48), (36, 44), (52, 40))  # rows, columns
BACKBONE = {"name": "unet", "channels": [4, 8], "strides": [2, 2], "blocks": [1, 1]}
TRAIN = {"steps": 2, "batch_size": 2, "lr": 2e-3, "warmup_steps": 0, "log_every": 1, "precision": "32"}
MAE = {
    "backbone": BACKBONE,
    "method": {"name": "mae", "crop_voxels": [16, 16, 1], "block_voxels": [4, 4, 1], "augment": {"preset": "none"}},
    "train": TRAIN,
    "checks": {"batches": 1, "crops_per_case": 4},
}
SEGMENT = {
    "backbone": BACKBONE,
    "task": {"name": "segmentation", "crop_voxels": [16, 16, 1], "augment": {"preset": "none"}},
    "train": TRAIN,
    "checks": {"batches": 1},
}


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def write_pictures(folder: Path, *, kind: str, count: int = 10) -> None:
    """Pictures of a bright ellipse, left of the middle and above it, and its mask."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        rows, columns = SIZES[number % len(SIZES)]
        y, x = np.mgrid[:rows, :columns]
        mask = ((x - columns * 0.35) / 9) ** 2 + ((y - rows * 0.4) / 6) ** 2 < 1
        grey = np.clip(60 + 120 * mask + rng.normal(0, 12, mask.shape), 1, 255)
        pixels = grey.astype(np.uint8)
        if kind == "deep":
            pixels = (grey * 200).astype(np.uint16)
        elif kind == "colour":
            pixels = np.stack([grey, grey / 2, 255 - grey], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"p{number}_mask.png")


def centroid_mm(mask: Path) -> tuple[float, float]:
    """World position of a drawn structure: columns run to the left, rows to the back, a pixel has 0.5 mm."""
    rows, columns = np.nonzero(np.asarray(Image.open(mask)))
    return -0.5 * float(columns.mean()), -0.5 * float(rows.mean())


@pytest.mark.parametrize("kind", ["grey", "deep", "colour"])
def test_a_folder_of_pictures_becomes_label_maps_and_scores(tmp_path: Path, kind: str) -> None:
    write_pictures(tmp_path / "pictures", kind=kind)
    options = {"modality": "US", "fractions": {"train": 0.5, "val": 0.2, "test": 0.3}, "workers": 1}
    options |= {"assume_spacing_mm": SPACING_MM, "names": "keep"}
    found = medssl.scan(tmp_path / "pictures", tmp_path / "cohort.csv", config=ScanConfig.parse(options))
    assert len(found.cohort) == 10
    assert all(case.label for case in found.cohort)

    store = tmp_path / "store"
    prepare = medssl.PrepareConfig.parse({"modality": "US", "assume_spacing_mm": SPACING_MM})
    prepared = medssl.prepare(prepare, cohort=found.path, out=store, workers=1)
    assert prepared.ledger.exit_code() == 0
    labels = {case.case_id: Path(str(case.label)) for case in found.cohort}
    for stored in medssl.ArrayStore.open(store).cases:
        assert stored.shape[2] == 1
        np.testing.assert_allclose(stored.spacing_mm, SPACING_MM)
        assert stored.channels == (3 if kind == "colour" else 1)
        drawn = stored.read("label", (0, 0, 0), stored.shape)[0]
        world = stored.geometry.to_world(np.argwhere(drawn > 0)).mean(axis=0)
        np.testing.assert_allclose(world[:2], centroid_mm(labels[stored.case_id]), atol=1e-6)

    encoder = medssl.pretrain(MAE, store=store, out=tmp_path / "mae")
    model = medssl.finetune(SEGMENT, store=store, out=tmp_path / "segment", encoder=encoder.bundle)

    test = medssl.Cohort.from_csv(found.path).select(split="test", labelled=True)
    predicted = medssl.predict(model.bundle, [Path(case.image) for case in test], out=tmp_path / "predictions")
    assert predicted.ledger.exit_code() == 0
    for case, output in zip(test, predicted.outputs, strict=True):
        image, _ = read_volume(Path(case.image), assume_spacing_mm=SPACING_MM)
        label, _ = read_volume(output, unit="label")
        assert label.array.shape == (1, *image.geometry.shape)
        assert label.geometry.isclose(image.geometry)
        assert set(np.unique(label.array)) <= {0, 1}

    config = EvaluateConfig(split="test", assume_spacing_mm=SPACING_MM)
    scores = medssl.evaluate(tmp_path / "predictions", found.path, out=tmp_path / "metrics", config=config)
    assert scores.ledger.exit_code() == 0
    assert scores.cases is not None
    assert len(scores.cases) == len(test)
