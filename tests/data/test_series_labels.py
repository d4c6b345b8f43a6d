"""Label maps in other formats beside DICOM images: which image they are of, and in which order of axes they lie."""

from __future__ import annotations

from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pytest

from medssl.data.cohort import Case
from medssl.data.reading import Reading, read_image, read_label
from medssl.data.scan import ScanConfig, ScanResult, scan
from medssl.errors import GeometryError
from medssl.geometry import Geometry
from medssl.ledger import Outcome

ORIGIN = (-12.0, 7.0, 30.0)


def _scan(data: Path, out: Path, **options: object) -> ScanResult:
    return scan(data, out, config=ScanConfig.parse({"workers": 1, "names": "keep", **options}))


def _drawn(geometry: Geometry) -> np.ndarray:
    label = np.zeros(geometry.shape, np.uint8)
    label[1:4, 2:4, 1] = 1
    return label


def _label(path: Path, *, origin: tuple[float, float, float] = ORIGIN, orientation: str | None = None) -> Path:
    """A label of the standard series, its axes as other programs store them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    geometry = dicoms.series_geometry(origin=origin)
    image = nib.Nifti1Image(_drawn(geometry), geometry.affine)
    if orientation is not None:
        start, end = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(orientation))
        image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "P1/ct_seg.nii.gz",
        "P1/ct/ct_seg.nii.gz",
        "P1/ct/tumour_mask.nii.gz",
        "P1/labels/tumour.nii.gz",
        "P1_seg.nii.gz",
        "labels/P1.nii.gz",
    ],
)
def test_a_label_is_of_the_series_in_the_folder_of_its_name_or_place(tmp_path: Path, name: str) -> None:
    data = tmp_path / "d"
    dicoms.write_series(data / "P1/ct", series="1")
    dicoms.write_series(data / "P2/ct", series="2", origin=(1.0, 2.0, 3.0))
    path = _label(data / name, orientation="LAS")
    result = _scan(data, tmp_path / "out")
    (labelled,) = result.cohort.select(labelled=True)
    assert labelled.label == str(path)
    assert len(result.cohort) == 2
    image, _ = read_image(Path(labelled.image), labelled.reading)
    label, warnings = read_label(path, labelled.reading, image=image, item="x")
    np.testing.assert_array_equal(label.array[0], _drawn(image.geometry))
    assert label.geometry is image.geometry
    assert warnings == ()


def test_a_label_that_may_be_of_two_series_or_of_none_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d"
    for number in range(2):
        dicoms.write_series(data / f"{number}/ct", series=str(number), origin=(float(number), 0.0, 0.0))
    for name in ("ct_seg.nii.gz", "other_seg.nii.gz"):
        _label(data / name)
    result = _scan(data, tmp_path / "out")
    assert [case.label for case in result.cohort] == [None, None]
    assert {entry.item: entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED} == {
        "ct_seg.nii.gz": "E_PAIR",
        "other_seg.nii.gz": "E_PAIR",
    }


def test_two_labels_of_one_series_are_refused_and_one_of_a_series_left_out_is_ignored(tmp_path: Path) -> None:
    data = tmp_path / "d"
    dicoms.write_series(data / "ct", series="1")
    for name in ("ct_seg.nii.gz", "ct_mask.nii.gz"):
        _label(data / name)
    result = _scan(data, tmp_path / "out")
    assert [entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED] == ["E_PAIR", "E_PAIR"]
    (data / "ct_mask.nii.gz").unlink()
    dicoms.write_series(data / "b", series="2", origin=(1.0, 2.0, 3.0))
    left = _scan(data, tmp_path / "left", image_glob="b/*")
    assert {entry.item: entry.outcome for entry in left.ledger}["ct_seg.nii.gz"] is Outcome.IGNORED


def test_a_label_of_another_place_is_refused_resampled_or_trusted(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "d/ct")
    near, far = (ORIGIN[0] + 0.5, *ORIGIN[1:]), (ORIGIN[0] + 500, *ORIGIN[1:])
    image, _ = read_image(tmp_path / "d/ct", Reading())
    moved = _label(tmp_path / "near.nii.gz", origin=near, orientation="LAS")
    lost = _label(tmp_path / "far.nii.gz", origin=far)
    for path in (moved, lost):
        with pytest.raises(GeometryError, match="off its image"):
            read_label(path, Reading(), image=image, item="x")
    resampled, said = read_label(moved, Reading(label_grid="resample"), image=image, item="x")
    np.testing.assert_array_equal(resampled.array[0, 2:5], _drawn(image.geometry)[1:4])
    assert said[0].startswith("W_LABEL_RESAMPLED")
    with pytest.raises(GeometryError, match="no labelled voxel of its label lies inside the image"):
        read_label(lost, Reading(label_grid="resample"), image=image, item="x")
    trusted, said = read_label(lost, Reading(label_grid="trust"), image=image, item="x")
    np.testing.assert_array_equal(trusted.array[0], _drawn(image.geometry))
    assert said[0].startswith("W_LABEL_TRUSTED")
    assert Case(case_id="x", subject_id="x", image="x", reading=Reading(label_grid="trust")).reading.to_text()
