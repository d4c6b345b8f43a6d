from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medssl.data.phantom import write_phantoms
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), num_subjects=6, num_labelled=4)


def test_the_folder_is_a_decathlon_folder(folder: Path) -> None:
    assert len(list((folder / "imagesTr").iterdir())) == len(list((folder / "labelsTr").iterdir())) == 4
    assert len(list((folder / "imagesTs").iterdir())) == 2
    assert (folder / "dataset.json").exists()


def test_the_same_seed_writes_the_same_files_and_another_does_not(folder: Path, tmp_path: Path) -> None:
    again = write_phantoms(tmp_path / "a", num_subjects=6, num_labelled=4)
    other = write_phantoms(tmp_path / "b", num_subjects=1, num_labelled=1, seed=1)
    for path in folder.rglob("*.nii.gz"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()
    name = "imagesTr/phantom_000.nii.gz"
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_the_large_organ_is_at_the_right_and_high_on_every_grid(folder: Path) -> None:
    orientations = set()
    for path in sorted((folder / "labelsTr").iterdir()):
        file = nib.load(path)
        label = np.asarray(file.dataobj)
        orientations.add("".join(nib.aff2axcodes(file.affine)))
        centres = [nib.affines.apply_affine(file.affine, ndimage.center_of_mass(label == v)) for v in (1, 2)]
        assert centres[0][0] > 3
        assert centres[1][0] < -3
        assert centres[0][2] > centres[1][2]
        assert (label == 1).sum() > (label == 2).sum() > 300
        assert np.abs(file.affine[:3, :3]).min() > 1e-4  # oblique
    assert orientations == {"RAS", "LPS"}


def test_values_come_in_three_regimes(folder: Path) -> None:
    images = [nib.load(path) for path in sorted((folder / "imagesTr").iterdir())]
    kinds = [(image.get_data_dtype(), float(np.asarray(image.dataobj).max())) for image in images]
    assert kinds[0][0] == np.uint8
    assert 1e3 < kinds[1][1] < 1e4
    assert 3e5 < kinds[2][1] < 5e6


def test_phantoms_pass_scan_and_prepare_with_organs_told_apart(folder: Path, tmp_path: Path) -> None:
    found = scan(folder, tmp_path / "cohort.csv", config=ScanConfig(workers=1, modality="MR"))
    assert (len(found.cohort), len(found.cohort.select(labelled=True))) == (6, 4)
    config = PrepareConfig.parse({"modality": "MR", "body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground"}})
    result = prepare(config, cohort=found.path, out=tmp_path / "store", workers=1)
    assert result.ledger.counts()["accepted"] == 6
    assert result.store is not None
    for case in result.store.select(labelled=True):
        image, label = (case.read(name, (0, 0, 0), case.shape) for name in ("image", "label"))
        bright, dark = (float(image[label == value].mean()) for value in (1, 2))
        assert bright - dark > 1
        assert case.read("body", (0, 0, 0), case.shape)[label > 0].mean() > 0.99
