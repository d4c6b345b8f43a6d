"""Scans of DICOM trees: what becomes a case, what becomes of the rest, and that no identifier gets out."""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from phantoms import REAL_DATA
from pydicom import uid
from pydicom.dataset import Dataset
from verdicts import booked

from medssl.data.cohort import Cohort
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, ScanResult, scan
from medssl.io import read_volume
from medssl.ledger import Outcome

SHAPE = (8, 10, 6)


def _scan(data: Path, out: Path, **options: object) -> ScanResult:
    return scan(data, out, config=ScanConfig.parse({"workers": 1, **options}))


def _warnings(result: ScanResult) -> str:
    return " ".join(entry.reason for entry in result.ledger if entry.outcome is Outcome.WARNED)


def _echoes(count: int) -> list[Dataset]:
    """One series of ``count`` volumes, told apart by their echo."""
    found = []
    for echo in range(count):
        for ds in dicoms.build_series(SHAPE, modality="MR", acquisition=echo + 1, slope=None):
            ds.AcquisitionNumber, ds.EchoNumbers, ds.EchoTime = 1, echo + 1, str(10 * (echo + 1))
            found.append(ds)
    return found


def _contours(files: Iterable[Path], path: Path, *, with_instances: bool = True) -> Path:
    """An RTSTRUCT with a square on the first slice of a series."""
    series = [pydicom.dcmread(file) for file in files]
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid()
    ds.Modality, ds.PatientName, ds.PatientID = "RTSTRUCT", dicoms.CANARIES["PatientName"], "x"
    ds.SeriesInstanceUID, ds.StudyInstanceUID = uid.generate_uid(), series[0].StudyInstanceUID
    named, study, frame = Dataset(), Dataset(), Dataset()
    named.SeriesInstanceUID = series[0].SeriesInstanceUID
    named.ContourImageSequence = pydicom.Sequence()
    for image in series if with_instances else ():
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        named.ContourImageSequence.append(reference)
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = uid.generate_uid(), series[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = pydicom.Sequence([named])
    frame.FrameOfReferenceUID = series[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = pydicom.Sequence([study])
    ds.ReferencedFrameOfReferenceSequence = pydicom.Sequence([frame])
    roi, drawn, listed = Dataset(), Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 1, dicoms.CANARIES["SeriesDescription"]
    first = min(series, key=lambda image: image.ImagePositionPatient[2])
    x, y, z = (float(value) for value in first.ImagePositionPatient)
    corners = [(0.75, 1.2), (2.75, 1.2), (2.75, 4.4), (0.75, 4.4)]
    drawn.ContourGeometricType, drawn.NumberOfContourPoints = "CLOSED_PLANAR", 4
    drawn.ContourData = [f"{value:.3f}" for dx, dy in corners for value in (x + dx, y + dy, z)]
    listed.ReferencedROINumber, listed.ContourSequence = 1, pydicom.Sequence([drawn])
    ds.StructureSetROISequence, ds.ROIContourSequence = pydicom.Sequence([roi]), pydicom.Sequence([listed])
    return dicoms.write(ds, path)


def test_a_tree_of_any_names_becomes_cases_under_hashed_names(tmp_path: Path) -> None:
    data = tmp_path / "d"
    files = dicoms.write_series(data / "DOE/1", series="a")
    dicoms.write_series(data / "DOE/2", series="b", modality="MR", slope=None, origin=(0.0, 0.0, 5.0))
    dicoms.write_series(data / "DOE/3", series="c", patient="another", origin=(1.0, 0.0, 5.0))
    dicoms.write_2d(data / "cr.dcm", modality="CR", ImagerPixelSpacing=[0.2, 0.3])
    for file in files:
        file.rename(file.with_name(file.stem.replace(".", "")))
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), data / "n.nii.gz")
    (data / "notes.txt").write_text("")
    result = _scan(data, tmp_path / "out")
    assert sorted(case.modality for case in result.cohort) == ["CT", "CT", "MR", "XR", "other"]
    by_modality = {case.modality: case for case in result.cohort}
    assert len({case.subject_id for case in result.cohort}) == 3
    assert all(re.fullmatch("case-[0-9a-f]{16}", case.case_id) for case in result.cohort)
    assert booked(result, Outcome.IGNORED) == {"notes.txt": ""}
    volume, source = read_volume(Path(by_modality["MR"].image))
    assert (volume.geometry.shape, source.format) == ((10, 8, 6), "dicom")
    np.testing.assert_array_equal(volume.array[0], dicoms.series_values(SHAPE))
    assert {case.image.endswith(".dicom.json") for case in result.cohort} == {True, False}
    assert Cohort.from_csv(result.path) == result.cohort
    rows = list(csv.DictReader((tmp_path / "out/acquisition.csv").read_text().splitlines()))
    assert sorted(row["modality"] for row in rows) == ["CR", "CT", "CT", "MR"]
    assert {row["case_id"] for row in rows} < {case.case_id for case in result.cohort}
    assert "patient_sex" in rows[0]


def test_several_volumes_of_a_series_become_cases_as_told(tmp_path: Path) -> None:
    dicoms.save(_echoes(3), tmp_path / "d")
    counts = {}
    for volumes in ("auto", "first", "middle", "all", "refuse", "channels"):
        result = _scan(tmp_path / "d", tmp_path / volumes, volumes=volumes)
        counts[volumes] = [case.reading.volume for case in result.cohort]
    assert counts == {
        "auto": [0],
        "first": [0],
        "middle": [1],
        "all": [0],
        "refuse": [],
        "channels": [0],
    }, "the echoes of the phantom hold equal voxels"
    result = _scan(tmp_path / "d", tmp_path / "refuse", volumes="refuse")
    assert list(booked(result).values()) == ["E_SEVERAL"]
    assert "0: echo" in next(iter(result.ledger)).reason


def test_different_volumes_are_cases_of_one_list_and_one_subject(tmp_path: Path) -> None:
    series = _echoes(9)
    for number, ds in enumerate(series):
        dicoms.set_pixels(ds, np.full(SHAPE[:2], number, np.uint16) + np.arange(10, dtype=np.uint16))
    dicoms.save(series, tmp_path / "d")
    every = _scan(tmp_path / "d", tmp_path / "all", volumes="all").cohort
    assert [case.reading.volume for case in every] == list(range(9))
    assert len({case.image for case in every}) == len({case.subject_id for case in every}) == 1
    assert [int(read_volume(Path(case.image), volume=k)[0].array.min()) for k, case in enumerate(every)] == [
        6 * k for k in range(9)
    ]
    middle = _scan(tmp_path / "d", tmp_path / "auto")
    assert [case.reading.volume for case in middle.cohort] == [4]
    assert "W_VOLUMES: number 4 of 9" in _warnings(middle)
    store = prepare(PrepareConfig(modality="MR"), cohort=tmp_path / "all/cohort.csv", out=tmp_path / "store", workers=1)
    assert store.store is not None
    assert len({case.key for case in store.store._rows}) == 9


def test_a_clip_gives_its_middle_frame(tmp_path: Path) -> None:
    dicoms.write_clip(tmp_path / "d/clip", frames=12)
    result = _scan(tmp_path / "d", tmp_path / "out")
    (case,) = result.cohort
    assert (case.modality, case.reading.volume) == ("US", 6)
    assert "W_BURNED_IN: the header does not say" in _warnings(result)


def test_what_cannot_be_a_case_is_booked_once(tmp_path: Path) -> None:
    data = tmp_path / "d"
    files = dicoms.write_series(
        data / "gap", series="gap", origin=(9.0, 9.0, 9.0), mutate=lambda found: found[:2] + found[3:]
    )
    whole = dicoms.write_series(data / "whole", series="whole")
    shutil.copy(whole[0], data / "copy.dcm")
    cut = dicoms.write_2d(data / "cut/x", modality="MR")
    cut.write_bytes(cut.read_bytes()[:-60])
    dicoms.write_series(data / "cut", series="neighbour", origin=(5.0, 5.0, 5.0))
    sr = Dataset()
    sr.SOPClassUID, sr.SOPInstanceUID, sr.Modality = uid.BasicTextSRStorage, uid.generate_uid(), "SR"
    dicoms.write(sr, data / "sr")
    result = _scan(data, tmp_path / "out")
    first = min(str(path.relative_to(data)) for path in files)
    assert booked(result) == {f"{first} and 4 more": "E_MISSING_SLICE", "cut/x": "E_PIXEL_LENGTH"}
    assert "structured report" in {entry.item: entry.reason for entry in result.ledger}["sr"]
    (copy,) = [entry for entry in result.ledger if entry.outcome is Outcome.DUPLICATE]
    assert "copy.dcm" in copy.item + copy.reason
    assert len(result.cohort) == 2
    assert _warnings(result).count("W_BROKEN_NEIGHBOUR") == 1
    filled = _scan(data, tmp_path / "filled", regularise=True)
    assert len(filled.cohort) == 3
    assert [case.reading.regularise for case in filled.cohort] == [True] * 3
    assert (
        prepare(PrepareConfig(modality="CT"), cohort=filled.path, out=tmp_path / "store", workers=1).ledger.count(
            Outcome.REJECTED
        )
        == 0
    )


@pytest.mark.parametrize("with_instances", [True, False])
def test_contours_become_the_label_of_the_series_that_they_name(tmp_path: Path, with_instances: bool) -> None:
    data = tmp_path / "d"
    files = dicoms.write_series(data / "a", series="a")
    dicoms.write_series(data / "b", series="b", origin=(1.0, 1.0, 1.0))
    _contours(files, data / "rt.dcm", with_instances=with_instances)
    result = _scan(data, tmp_path / "out")
    (labelled,) = result.cohort.select(labelled=True)
    assert labelled.label == str(data / "rt.dcm")
    assert len(result.cohort) == 2
    assert json.loads((tmp_path / "out/journal.jsonl").read_text())["label_values"] == [1]
    made = prepare(PrepareConfig(modality="CT"), cohort=result.path, out=tmp_path / "store", workers=1)
    assert made.store is not None
    assert made.store.label_values == (1,)


def test_labels_that_nothing_or_two_belong_to_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "d"
    files = dicoms.write_series(data / "a", series="a")
    for name in ("one", "two"):
        _contours(files, data / name)
    lost = dicoms.write_series(tmp_path / "lost", series="b")
    _contours(lost, data / "orphan")
    result = _scan(data, tmp_path / "out")
    assert booked(result) == {"one": "E_PAIR", "two": "E_PAIR", "orphan": "E_PAIR"}
    assert [case.label for case in result.cohort] == [None]


def test_the_label_of_an_image_that_is_not_taken_is_booked(tmp_path: Path) -> None:
    data = tmp_path / "d"
    _contours(dicoms.write_series(data / "a"), data / "rt")
    dicoms.write_series(data / "b", series="b", origin=(1.0, 1.0, 1.0))
    result = _scan(data, tmp_path / "out", image_glob="b/*")
    assert {entry.item: entry.outcome for entry in result.ledger}["rt"] is Outcome.IGNORED
    assert [case.label for case in result.cohort] == [None]


def test_text_in_the_picture_is_refused_or_accepted_without_a_thumbnail(tmp_path: Path) -> None:
    dicoms.write_2d(tmp_path / "d/yes", modality="US", BurnedInAnnotation="YES", pixels=_noise(1))
    dicoms.write_2d(tmp_path / "d/no", modality="US", BurnedInAnnotation="NO", pixels=_noise(2))
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert list(booked(result).values()) == ["E_BURNED_IN"]
    assert "W_BURNED_IN" not in _warnings(result)
    told = _scan(tmp_path / "d", tmp_path / "told", burned_in="accept")
    assert len(told.cohort) == 2
    assert _warnings(told).count("W_BURNED_IN") == 1
    assert len(list((tmp_path / "told/thumbnails").iterdir())) == 1
    off = _scan(tmp_path / "d", tmp_path / "off", thumbnails=False)
    assert len(off.cohort) == 1
    assert not (tmp_path / "off/thumbnails").exists()


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, SHAPE[:2]).astype(np.uint8)


def test_faces_are_named(tmp_path: Path) -> None:
    def head(found: list[Dataset]) -> None:
        for ds in found:
            ds.BodyPartExamined = "HEAD"

    dicoms.write_series(tmp_path / "d", modality="MR", mutate=head)
    assert "W_FACE" in _warnings(_scan(tmp_path / "d", tmp_path / "out"))


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _planted(files: Sequence[Path]) -> set[bytes]:
    uids = set()
    for file in files:
        ds = pydicom.dcmread(file)
        uids |= {str(ds[name].value) for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")}
        uids.add(str(ds.FrameOfReferenceUID))
    return {text.encode() for text in {*uids, *dicoms.CANARIES.values(), "Zzcanary"}}


def test_no_planted_identifier_gets_into_anything_that_a_scan_or_a_preparation_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def private(found: list[Dataset]) -> None:
        for ds in found:
            block = ds.private_block(0x0029, "ZZCANARY", create=True)
            block.add_new(1, "LO", "Zzcanary private")
            ds.add_new(0x00104000, "LT", "Zzcanary comment")

    data = tmp_path / "d"
    files = dicoms.write_series(data / "a", series="a", mutate=private)
    files += dicoms.write_series(data / "gap", series="gap", mutate=lambda found: found[:2] + found[3:])
    files += dicoms.write_series(data / "odd", series="odd", mutate=lambda found: found[:1] * 2 + found[2:])
    files.append(dicoms.write_2d(data / "us", modality="US"))
    damaged = dicoms.write_2d(data / "bad", modality="MR", mutate=lambda ds: setattr(ds, "Rows", 60000))
    files.append(damaged)
    with zipfile.ZipFile(data / "x.zip", "w") as archive:
        archive.write(files[0], f"{dicoms.CANARIES['PatientName']}/{dicoms.CANARIES['PatientID']}")
    _contours(files[:6], data / "rt")
    result = _scan(data, tmp_path / "out")
    prepare(PrepareConfig(modality="CT"), cohort=result.path, out=tmp_path / "store", workers=1)
    written = {**_bytes_of(tmp_path / "out"), **_bytes_of(tmp_path / "store")}
    written["log"] = caplog.text.encode()
    written = {name: content for name, content in written.items() if not name.startswith("unpacked/")}
    found = {
        (name, text) for name, content in written.items() for text in _planted(files) if text.lower() in content.lower()
    }
    # paths of files are the user's own words; they stay in the tables that find the files again
    assert {name for name, _ in found} <= {"refused.csv"}
    assert {text for _, text in found} <= {b"Zzcanary^Quentin", b"Zzcanary", b"ZZID-774411"}


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL_DATA / "dicom_series").is_dir(), reason="no shared data")
def test_real_series_equal_their_reference_conversions_voxel_for_voxel(tmp_path: Path) -> None:
    data = tmp_path / "d"
    for name in ("ge_anatomical", "generic_non_isotropic", "hyperfine", "torchio_ct", "slice_missing_siemens"):
        shutil.copytree(REAL_DATA / "dicom_series" / name, data / name)
    result = _scan(data, tmp_path / "out", volumes="all")
    reasons = {entry.item: entry for entry in result.ledger}
    for name in (
        "ge_anatomical/ge_anatomical_001_ground_truth.nii.gz",
        "ge_anatomical/ge_anatomical_001_implicit_ground_truth.nii.gz",
        "generic_non_isotropic/generic_anatomical_002_non_isotropic_ground_truth.nii.gz",
        "hyperfine/hyperfine_anatomical_001_ground_truth.nii.gz",
    ):
        assert reasons[name].outcome is Outcome.DUPLICATE
        assert "series-" in reasons[name].reason
    assert "E_MISSING_SLICE" in booked(result).values()
    assert {case.modality for case in result.cohort} >= {"CT", "MR"}


def test_a_preparation_names_no_file_of_a_series(tmp_path: Path) -> None:
    def build(name: str) -> list[Path]:
        return dicoms.write_series(tmp_path / f"DOE_JOHN/{name}", series=name, origin=(float(len(name)), 0.0, 0.0))

    files = {name: build(name) for name in ("gone", "cut", "fine_one")}
    result = _scan(tmp_path / "DOE_JOHN", tmp_path / "out")
    files["gone"][0].unlink()
    files["cut"][0].write_bytes(files["cut"][0].read_bytes()[:-30])
    made = prepare(PrepareConfig(modality="CT"), cohort=result.path, out=tmp_path / "store", workers=1)
    assert sorted(entry.outcome for entry in made.ledger) == [Outcome.ACCEPTED, Outcome.REJECTED, Outcome.REJECTED]
    for entry in made.ledger:
        assert "DOE" not in entry.reason
        assert not any(file.name in entry.reason for several in files.values() for file in several)
        assert entry.outcome is Outcome.ACCEPTED or "one of its files" in entry.reason


def test_a_dicom_file_with_the_suffix_of_a_picture_is_dicom_all_the_same(tmp_path: Path) -> None:
    paths = dicoms.write_series(tmp_path / "export", modality="MR")
    shutil.copy(paths[2], tmp_path / "export" / "copy.dcm.jpg")
    result = scan(tmp_path / "export", tmp_path / "cohort")
    assert len(result.cohort) == 1
    assert len([entry for entry in result.ledger if entry.outcome is Outcome.DUPLICATE]) == 1
