"""Similar cases: the cosine of standardised vectors, own subject left out on demand, a page with pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stores import Image, write_store

from medssl.errors import ConfigError, ReadError
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.neighbours import similar


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    vectors = (100 + rng.normal(size=(12, 5))).astype(np.float32)
    rows = {
        "case_id": [f"c{k:02d}" for k in range(12)],
        "subject_id": [f"s{k // 2}" for k in range(12)],
        "split": "train", "modality": "MR", "plane": None, "slice": None, "windows": 1,
        **dict.fromkeys(("x_mm", "y_mm", "z_mm", "body_lr", "body_ap", "body_si"), 0.0),
    }  # fmt: skip
    vectors[1] = vectors[0] + 0.01
    path = tmp_path / "e.parquet"
    Embeddings(pd.DataFrame(rows), vectors, {"level": "volume"}).write(path)
    return path


def test_the_order_is_that_of_the_cosines_by_loops(embeddings: Path) -> None:
    vectors = Embeddings.read(embeddings).vectors.astype(float)
    mean, spread = vectors.mean(axis=0), vectors.std(axis=0)
    query = (vectors[3] - mean) / spread
    cosines = {}
    for k, row in enumerate(vectors):
        own = (row - mean) / spread
        cosines[f"c{k:02d}"] = float(query @ own / np.sqrt(query @ query) / np.sqrt(own @ own))
    expected = sorted((name for name in cosines if name != "c03"), key=lambda name: -cosines[name])
    found = similar(embeddings, case="c03", top=4).table
    assert found["case_id"].tolist() == expected[:4]
    assert np.allclose(found["cosine"], [cosines[name] for name in expected[:4]])
    assert found["rank"].tolist() == [1, 2, 3, 4]
    assert len(similar(embeddings, case="c03", top=100).table) == 11


def test_other_images_of_the_subject_are_left_out_on_demand(embeddings: Path) -> None:
    assert similar(embeddings, case="c00").table["case_id"].iloc[0] == "c01"
    others = similar(embeddings, case="c00", others_only=True).table
    assert "s0" not in set(others["subject_id"])


def test_the_page_has_pictures_of_what_the_store_holds_and_a_table_beside_it(embeddings: Path, tmp_path: Path) -> None:
    images = [
        Image(f"c{k:02d}", np.random.default_rng(k).normal(size=(1, 8, 8, 8)).astype(np.float32)) for k in range(6)
    ]
    store = write_store(tmp_path / "store", images)
    found = similar(embeddings, case="c00", store=store, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    there = [name for name in found.table["case_id"] if name < "c06"]
    assert page.count("<img") == len(there) + 1
    table = pd.read_csv(tmp_path / "page.csv")
    assert table["case_id"].tolist() == found.table["case_id"].tolist()
    assert np.allclose(table["cosine"], found.table["cosine"])
    similar(embeddings, case="c00", out=tmp_path / "plain.html")
    assert "<img" not in (tmp_path / "plain.html").read_text()


def test_an_unknown_case_and_an_empty_wish_are_refused_and_a_dry_run_writes_nothing(
    embeddings: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        similar(embeddings, case="c99")
    assert caught.value.code == "E_NO_CASE"
    with pytest.raises(ConfigError, match="at least 1"):
        similar(embeddings, case="c00", top=0)
    with pytest.raises(ReadError):
        similar(tmp_path / "none.parquet", case="c00")
    assert similar(embeddings, case="c00", out=tmp_path / "page.html", dry_run=True).written == ()
    assert not (tmp_path / "page.html").exists()
