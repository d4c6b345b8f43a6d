"""References as a cohort says that they are read: DICOM labels, chosen volumes, labels on other grids."""

from __future__ import annotations

from pathlib import Path

import canaries
import dicoms
import nibabel as nib
import numpy as np
import pytest

from medssl.data.cohort import Case, Cohort
from medssl.data.reading import Reading
from medssl.data.scan import ScanConfig, scan
from medssl.evaluation.assess import EvaluateResult, evaluate
from medssl.evaluation.matching import match
from medssl.geometry import Geometry
from medssl.io import read_volume, write_volume
from medssl.ledger import Ledger, Outcome
from medssl.volume import Volume

SHAPE = (18, 16, 12)


def _drawn(geometry: Geometry) -> np.ndarray:
    label = np.zeros(geometry.shape, np.uint8)
    label[3:9, 4:12, 5:8] = 1
    return label


def _nifti(path: Path, array: np.ndarray, geometry: Geometry, *, shift_mm: float = 0.0) -> Path:
    affine = geometry.affine.copy()
    affine[0, 3] += shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def _scored(folder: Path, case: Case) -> EvaluateResult:
    Cohort([case]).to_csv(folder / "c.csv")
    return evaluate(folder / "predictions", folder / "c.csv", out=folder / "out")


def _dice(result: EvaluateResult) -> float:
    assert result.cases is not None, list(result.ledger)
    (dice,) = result.cases["dice"]
    return float(dice)


def test_contours_are_scored_on_the_grid_of_their_image(tmp_path: Path) -> None:
    files = dicoms.write_series(tmp_path / "d/ct", shape=(24, 26, 20), spacing=(1.0, 1.0, 2.0))
    canaries.write_contours(files, tmp_path / "d/rt", patient=0)
    found = scan(tmp_path / "d", tmp_path / "scan", config=ScanConfig(workers=1))
    (case,) = found.cohort
    image, _ = read_volume(Path(case.image))
    drawn = np.zeros(image.geometry.shape, np.uint8)
    drawn[6:15, 7:17, 8:11] = 1
    for name in (case.case_id, Path(case.image).name.removesuffix(".dicom.json")):
        _nifti(tmp_path / name / f"{name}.nii.gz", drawn, image.geometry)
        result = evaluate(tmp_path / name, found.path, out=tmp_path / f"{name}-out")
        assert _dice(result) == 1.0
    (tmp_path / "d/rt").write_bytes((tmp_path / "d/rt").read_bytes()[:-300])
    with pytest.raises(Exception, match="0 readable"):
        evaluate(tmp_path / case.case_id, found.path, out=tmp_path / "bad")
    assert str(tmp_path / "d") not in (tmp_path / "bad/refused.csv").read_text()


@pytest.mark.parametrize("choice", ["same", "resample", "trust"])
def test_a_label_on_another_grid_is_scored_as_it_was_trained_on(tmp_path: Path, choice: str) -> None:
    geometry = dicoms.series_geometry(SHAPE, spacing=(1.0, 1.0, 1.0))
    image = _nifti(tmp_path / "a.nii.gz", _drawn(geometry).astype(np.int16), geometry)
    label = _nifti(tmp_path / "b.nii.gz", _drawn(geometry), geometry, shift_mm=1.0)
    _nifti(tmp_path / "predictions/x.nii.gz", _drawn(geometry), geometry)
    case = Case(case_id="x", subject_id="x", image=str(image), label=str(label))
    case = case.model_copy(update={"reading": Reading.parse({"label_grid": choice})})
    if choice == "same":
        with pytest.raises(Exception, match="0 readable"):
            _scored(tmp_path, case)
    else:
        assert _dice(_scored(tmp_path, case)) == (1.0 if choice == "trust" else pytest.approx(5 / 6))


def test_a_reference_in_another_order_of_axes_is_the_same_reference(tmp_path: Path) -> None:
    geometry = dicoms.series_geometry(SHAPE, spacing=(1.0, 1.0, 1.0))
    image = _nifti(tmp_path / "a.nii.gz", _drawn(geometry).astype(np.int16), geometry)
    label = _nifti(tmp_path / "b.nii.gz", _drawn(geometry), geometry)
    turned = nib.as_closest_canonical(nib.load(label))
    assert turned.shape == geometry.shape
    nib.save(turned, label)
    write_volume(Volume(_drawn(geometry)[None], geometry, "label"), tmp_path / "predictions/x.nii.gz")
    assert _dice(_scored(tmp_path, Case(case_id="x", subject_id="x", image=str(image), label=str(label)))) == 1.0


def test_predictions_of_series_lists_are_found_by_their_name(tmp_path: Path) -> None:
    cases = [
        Case(
            case_id=f"case-{volume}",
            subject_id="a",
            image=str(tmp_path / "abc.dicom.json"),
            label=str(tmp_path / f"{volume}"),
            reading=Reading(volume=volume),
        )
        for volume in range(2)
    ]
    Cohort(cases).to_csv(tmp_path / "c.csv")
    (tmp_path / "p").mkdir()
    for volume in range(2):
        (tmp_path / "p" / f"abc-{volume:03d}.nii.gz").write_bytes(b"")
    pairs = match(tmp_path / "p", tmp_path / "c.csv", Ledger())
    assert [(pair.case_id, pair.prediction.name, pair.reading.volume) for pair in pairs] == [
        ("case-0", "abc-000.nii.gz", 0),
        ("case-1", "abc-001.nii.gz", 1),
    ]


def test_predictions_of_unlabelled_cases_are_left_out_and_said(tmp_path: Path) -> None:
    cases = [
        Case(case_id="a", subject_id="a", image=str(tmp_path / "x.nii.gz"), label=str(tmp_path / "l")),
        Case(case_id="b", subject_id="b", image=str(tmp_path / "y.nii.gz")),
    ]
    Cohort(cases).to_csv(tmp_path / "c.csv")
    (tmp_path / "p").mkdir()
    for name in ("a", "y"):
        (tmp_path / "p" / f"{name}.nii.gz").write_bytes(b"")
    ledger = Ledger()
    assert [pair.case_id for pair in match(tmp_path / "p", tmp_path / "c.csv", ledger)] == ["a"]
    assert [(entry.item, entry.outcome) for entry in ledger] == [("b", Outcome.IGNORED)]
