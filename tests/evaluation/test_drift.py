"""Distances by loops, a planted shift that is found, and no shift that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medssl.errors import ConfigError, NoInputError
from medssl.evaluation.drift import DriftConfig, drift, neighbour_distance
from medssl.evaluation.embeddings import Embeddings


def table(vectors: np.ndarray, *, splits: list[str], start: int = 0) -> pd.DataFrame:
    count = len(vectors)
    return pd.DataFrame(
        {
            "case_id": [f"c{start + i}" for i in range(count)],
            "subject_id": [f"s{start + i // 2}" for i in range(count)],
            "split": splits, "modality": "MR", "plane": None, "slice": None, "windows": 1,
            **dict.fromkeys(("x_mm", "y_mm", "z_mm", "body_lr", "body_ap", "body_si"), 0.0),
        }
    )  # fmt: skip


def write(path: Path, vectors: np.ndarray, *, splits: list[str], start: int = 0, bundle: str = "b") -> Path:
    about = {"bundle_digest": bundle, "level": "volume"}
    Embeddings(table(vectors, splits=splits, start=start), vectors.astype(np.float32), about).write(path)
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(80, 8))
    return write(tmp_path / "reference.parquet", vectors, splits=["train"] * 60 + ["test"] * 20)


def test_the_distance_is_that_of_the_paper_by_loops() -> None:
    rng = np.random.default_rng(1)
    training, vectors = rng.normal(2, 3, (12, 5)), rng.normal(size=(4, 5))
    training[:, 3] = 7.0
    excluded = np.zeros((4, 12), bool)
    excluded[0, :10] = True
    found = neighbour_distance(vectors, training, k=3, excluded=excluded)
    for i, vector in enumerate(vectors):
        distances = []
        for j, known in enumerate(training):
            if excluded[i, j]:
                continue
            scaled = []
            for each in (vector, known):
                z = [(each[f] - training[:, f].mean()) / training[:, f].std() for f in (0, 1, 2, 4)]
                scaled.append(np.array(z) / np.sqrt(sum(value**2 for value in z)))
            distances.append(np.sqrt(sum((scaled[0] - scaled[1]) ** 2)))
        assert found[i] == pytest.approx(sorted(distances)[min(3, len(distances)) - 1])


def test_a_planted_shift_is_found_and_every_number_stands_in_the_tables(reference: Path, tmp_path: Path) -> None:
    shifted = np.random.default_rng(2).normal(size=(30, 8)) + np.array([6.0] + [0.0] * 7)
    new = write(tmp_path / "new.parquet", shifted, splits=["test"] * 30, start=500)
    result = drift(reference, new, out=tmp_path / "out", config=DriftConfig(neighbours=40, draws=200))
    assert "lie farther from the training cases than held-out" in result.sentences[0]
    distances, metrics = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("distances", "metrics"))
    far, near = (distances.loc[distances["set"] == name, "distance"].to_numpy() for name in ("new", "held out"))
    pairs = (far[:, None] > near[None]).mean() + 0.5 * (far[:, None] == near[None]).mean()
    assert metrics["value"][0] == pytest.approx(pairs)
    assert metrics["value"][2] == pytest.approx(np.quantile(near, 0.95))
    assert metrics["value"][1] == pytest.approx((far > np.quantile(near, 0.95)).mean())
    assert distances["distance"].is_monotonic_decreasing
    assert (tmp_path / "out" / "report.html").exists()


def test_images_of_the_same_kind_cannot_be_told_and_a_dry_run_writes_nothing(reference: Path, tmp_path: Path) -> None:
    same = np.random.default_rng(3).normal(size=(30, 8))
    new = write(tmp_path / "new.parquet", same, splits=["test"] * 30, start=500)
    result = drift(reference, new, out=tmp_path / "out", config=DriftConfig(draws=200), dry_run=True)
    assert "cannot be told" in result.sentences[0]
    assert not (tmp_path / "out").exists()


def test_copies_of_training_cases_lie_closer(reference: Path, tmp_path: Path) -> None:
    known = Embeddings.read(reference).vectors[:30]
    new = write(tmp_path / "new.parquet", known, splits=["test"] * 30, start=500)
    result = drift(reference, new, out=tmp_path / "out", config=DriftConfig(neighbours=1, draws=200), dry_run=True)
    assert "lie closer" in result.sentences[0]


def test_two_encoders_and_too_few_cases_are_refused(reference: Path, tmp_path: Path) -> None:
    vectors = np.zeros((30, 8))
    other = write(tmp_path / "other.parquet", vectors, splits=["test"] * 30, bundle="another")
    with pytest.raises(ConfigError, match="another bundle digest") as caught:
        drift(reference, other, out=tmp_path / "out")
    assert caught.value.code == "E_CONTRACT"
    few = write(tmp_path / "few.parquet", vectors[:2], splits=["test"] * 2)
    with pytest.raises(NoInputError, match="2 cases of new"):
        drift(reference, few, out=tmp_path / "out")
