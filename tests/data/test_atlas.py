from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medssl.data.atlas import read_atlas
from medssl.data.cohort import Cohort
from medssl.data.loader import batches
from medssl.data.phantom import write_phantoms
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.data.store import ArrayStore
from medssl.errors import ReadError
from medssl.views import RandomCrop

AFFINE = [[0.01, 0.0, 0.0, 0.5], [0.0, 0.02, 0.0, -1.0], [0.0, 0.005, 0.01, 2.0], [0.0, 0.0, 0.0, 1.0]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas")
    write_phantoms(folder / "scans", num_subjects=2, num_labelled=0, shape=(20, 22, 18))
    config = ScanConfig.parse({"modality": "MR", "names": "keep", "workers": 1})
    cohort = scan(folder / "scans", folder / "cohort.csv", config=config).path
    assert len(Cohort.from_csv(cohort)) == 2
    prepare(PrepareConfig.parse({"modality": "MR"}), cohort=cohort, out=folder / "store", workers=1)
    return folder / "store"


def test_a_store_without_a_registration_has_none(store: Path) -> None:
    assert read_atlas(store) == ({}, "")
    assert all(case.atlas_affine is None for case in ArrayStore.open(store).cases)


def test_crops_of_registered_cases_carry_atlas_coordinates_and_others_nan(store: Path) -> None:
    before = ArrayStore.open(store)
    name = before.cases[0].case_id
    (store / "atlas.json").write_text(json.dumps({name: AFFINE}))
    try:
        opened = ArrayStore.open(store)
        assert opened.fingerprint != before.fingerprint
        (batch,) = batches(opened.cases, RandomCrop((8, 8, 8)), batch_size=2, seed=0, steps=1)
        places = dict(zip(batch.case_ids, batch["image_atlas"].numpy(), strict=True))
        affines = dict(zip(batch.case_ids, batch["image_affine"].numpy(), strict=True))
        assert np.isnan(places.pop(opened.cases[1].case_id)).all()
        corners = np.array([[-0.5, -0.5, -0.5, 1.0], [7.5, 7.5, 7.5, 1.0]])
        expected = (np.array(AFFINE) @ affines[name] @ corners.T).T[:, :3]
        np.testing.assert_allclose(places[name], expected, atol=1e-4)
    finally:
        (store / "atlas.json").unlink()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not json", "is no JSON of case ids"),
        ("[1, 2]", "is no JSON of case ids"),
        ('{"a": "b"}', "is no JSON of case ids"),
        (json.dumps({"a": np.eye(3).tolist()}), "case a: no affine of 4 x 4 finite numbers"),
        (json.dumps({"a": np.zeros((4, 4)).tolist()}), "case a: no affine of 4 x 4 finite numbers"),
        (json.dumps({"a": np.diag([1.0, 0, 1, 1]).tolist()}), "case a: an affine that cannot be inverted"),
        (json.dumps({"a": [[float("nan")] * 4] * 4}), "case a: no affine of 4 x 4 finite numbers"),
    ],
)
def test_an_unsound_atlas_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "atlas.json").write_text(text)
    with pytest.raises(ReadError, match=what) as caught:
        read_atlas(tmp_path)
    assert caught.value.code == "E_ATLAS"
