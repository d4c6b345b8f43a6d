"""Planted identifiers through every command: none of a header gets out, and names of files only where they must."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import canaries
import dicoms
import numpy as np
import pydicom
import pytest
import tiny
from PIL import Image

from medssl.cli import app, run_guarded

SHAPE = (28, 24, 20)  # rows, columns, slices
KEY = bytes(range(16))
# the local files that find the user's own files again; none of them goes into a store, a run or a report
NAMES_PATHS = {
    "cohort/cohort.csv",
    "cohort/cohort.parquet",
    "cohort/refused.csv",
    "cohort/pseudonyms.json",
    "cohort/scan_cache.jsonl",
}
OWNER_ONLY = ("pseudonyms.json", "scan_cache.jsonl", ".dicom.json")
COPIES = ("cohort/unpacked/",)


@dataclass(frozen=True)
class Said:
    """What a command ended in and said."""

    code: int
    text: str


Run = Callable[..., Said]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    def command(*arguments: object) -> Said:
        caplog.clear()
        with caplog.at_level("INFO"):
            code = run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
        said = "".join(capfd.readouterr()) + caplog.text
        assert not [word for word in canaries.HEADER if word in said.lower().encode()], said
        return Said(int(code), said)

    return command


def _series(folder: Path, patient: int, **options: object) -> list[Path]:
    """Files of a patient: noise with a bright block where the labels are."""
    datasets = dicoms.build_series(
        SHAPE, modality="MR", slope=None, spacing=(1.5, 1.5, 1.5), origin=(patient, 2.0, 3.0), **options
    )
    canaries.plant(datasets, patient)
    for ds, plane in zip(datasets, _voxels(patient).T, strict=True):
        dicoms.set_pixels(ds, plane.astype(np.uint16))
    return dicoms.save(datasets, folder)


def _voxels(seed: int) -> np.ndarray:
    voxels = np.random.default_rng(seed).integers(20, 60, (SHAPE[1], SHAPE[0], SHAPE[2])).astype(np.int16)
    voxels[6:15, 7:17, 8:11] += 100
    return voxels


def _drawn() -> np.ndarray:
    return (_voxels(0) > 80).astype(np.uint8)


def _segments(series: list[Path], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from highdicom.seg import Segmentation, SegmentDescription
        from pydicom.sr.coding import Code

        images = [pydicom.dcmread(file) for file in series]
        images.sort(key=lambda image: image.ImagePositionPatient[2])
        for image in images:
            for keyword in ("PatientAge", "PatientSex", "StudyDate", "StudyTime"):
                image[keyword].value = ""
        described = SegmentDescription(
            segment_number=1,
            segment_label="ZzCan segment",
            segmented_property_category=Code("123037004", "SCT", "ZzCan"),
            segmented_property_type=Code("ZZCAN", "99ZZCAN", "ZzCan meaning"),
            algorithm_type="MANUAL",
            tracking_id="ZzCan tracking",
            tracking_uid=f"{canaries.ROOT}.9",
        )
        made = Segmentation(
            source_images=images,
            pixel_array=np.ascontiguousarray(_drawn().T),
            segmentation_type="BINARY",
            segment_descriptions=[described],
            series_instance_uid=f"{canaries.ROOT}.10",
            series_number=2,
            sop_instance_uid=f"{canaries.ROOT}.11",
            instance_number=1,
            manufacturer="ZzCan",
            manufacturer_model_name="ZzCan",
            software_versions="ZzCan",
            device_serial_number="ZzCan",
            series_description="ZzCan",
        )
        made.save_as(path, enforce_file_format=True)
    return path


def _write_export(data: Path) -> None:
    """Six DICOM patients with labels, two NIfTI ones, a picture beside them and an archive."""
    for patient in range(5):
        folder = data / f"Pathcan^Doe{patient}" / "Pathcan19"
        files = _series(folder / "series", patient)
        if patient < 2:
            _segments(files, folder / "Pathcan_seg.dcm")
        else:
            canaries.write_contours(files, folder / "Pathcan_rt", patient=patient)
    packed = data.parent / "packed"
    files = _series(packed, 5)
    files.append(canaries.write_contours(files, packed / "rt", patient=5))
    with zipfile.ZipFile(data / "Pathcan.zip", "w") as archive:
        archive.comment = b"ZzCan comment"
        for file in files:
            archive.write(file, f"Pathcan^Zip/{file.name}")
    affine = np.diag([-1.5, -1.5, 1.5, 1.0])
    for number in (6, 7):
        name = data / "nifti" / f"Pathcan_{number}"
        canaries.write_nifti(name.with_suffix(".nii.gz"), _voxels(number), affine, patient=number)
        canaries.write_nifti(name.with_name(f"{name.name}_seg.nii.gz"), _drawn(), affine, patient=number)
    canaries.write_png(data.parent / "Pathcan_pictures" / "Pathcan.png", _voxels(8)[:, :, 0].astype(np.uint8))
    (data / "Pathcan.txt").write_text("ZzCan")


def _write_faulty(data: Path) -> None:
    """Files that are refused, each for a reason of its own, with identifiers where the fault is and elsewhere."""

    def one(name: str, **tags: object) -> Path:
        def change(ds: pydicom.Dataset) -> None:
            number = 100 + len(list(data.rglob("*")))
            canaries.plant([ds], number)
            dicoms.set_pixels(ds, np.full((8, 10), number, np.uint16) + np.arange(10, dtype=np.uint16))
            for keyword, value in tags.items():
                setattr(ds, keyword, value)

        return dicoms.write_2d(data / f"Pathcan_{name}", modality="MR", mutate=change)

    for size in (60, 700, 1500):
        path = one(f"cut{size}")
        path.write_bytes(path.read_bytes()[: -size if size == 60 else size])
    for keyword in (
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
        "SliceThickness",
        "NumberOfFrames",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "InstanceNumber",
        "AcquisitionNumber",
        "EchoTime",
        "PhotometricInterpretation",
        "Modality",
        "SOPClassUID",
        "SpecificCharacterSet",
        "BurnedInAnnotation",
        "MagneticFieldStrength",
        "WindowCenter",
        "PresentationLUTShape",
        "FrameIncrementPointer",
    ):
        text = "ZZCAN_CODE" if keyword in {"Modality", "PhotometricInterpretation"} else "ZzCan\\1"
        present = {
            "PixelSpacing": [1, 1],
            "ImagePositionPatient": [1, 2, 3],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        }
        tags = (
            {}
            if keyword in {"PhotometricInterpretation", "Modality", "SOPClassUID"}
            else {keyword: present.get(keyword, "ISO_IR 100" if keyword == "SpecificCharacterSet" else "1")}
        )
        if keyword == "FrameIncrementPointer":
            tags = {keyword: 0x00181063}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = one(keyword, **tags)
        canaries.with_value(path, keyword, text.encode())
    syntax = one("syntax")
    data_ = syntax.read_bytes()
    syntax.write_bytes(
        data_.replace(b"1.2.840.10008.1.2.1\0", f"{canaries.ROOT[:17]}.0\0".encode().ljust(20, b"\0"), 1)
    )
    gap = _series(data / "Pathcan_gap", 60)
    gap[7].unlink()
    mixed = _series(data / "Pathcan_mixed", 61)
    for file in mixed[:5]:
        canaries.with_value(file, "PatientID", b"ZzCanOther")
    echoes = _series(data / "Pathcan_two", 62, acquisition=1)
    for file in echoes[:10]:
        canaries.with_value(file, "SOPInstanceUID", b"1.2.826.0.1.3680043.10.774411.4.62.0")
    canaries.write_contours(_series(data.parent / "lost", 63), data / "Pathcan_orphan", patient=63)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    whole = canaries.write_nifti(data / "Pathcan_whole.nii.gz", _voxels(70), affine, patient=70)
    canaries.write_nifti(data / "Pathcan_whole_seg.nii.gz", _drawn()[1:], affine, patient=70)
    plain = canaries.write_nifti(data.parent / "plain.nii", _voxels(71), affine, patient=71).read_bytes()
    (data / "Pathcan_cut.nii.gz").write_bytes(whole.read_bytes()[:-900])
    (data / "Pathcan_short.nii").write_bytes(plain[:9000])
    (data / "Pathcan_type.nii").write_bytes(plain[:70] + b"\x77\x77" + plain[72:])
    (data / "Pathcan_odd.mha").write_text(
        "ObjectType = Image\nComment = ZzCan\nZzCanKey = ZzCan\nNDims = 3\nDimSize = 4 4 4\nElementType = ZzCan\n"
        "ElementSpacing = 1 1 ZzCan\nElementDataFile = LOCAL\n"
    )
    (data / "Pathcan_lost.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = Pathcan.raw\n"
    )
    (data / "Pathcan_strange.nrrd").write_text(
        "NRRD0005\n# ZzCan\ntype: ZzCan\ndimension: 3\nsizes: 4 4 ZzCan\nencoding: ZzCan\nspace: ZzCan\n"
        "ZzCan key:=ZzCan\nZzCan field: ZzCan\n\n"
    )
    (data / "Pathcan_array.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{'descr': 'ZzCan', }".ljust(117) + b"\n")
    picture = canaries.write_png(data / "Pathcan_chopped.png", _voxels(72)[:, :, 0].astype(np.uint8))
    picture.write_bytes(picture.read_bytes()[:-200])
    Image.fromarray(_voxels(73)[:, :, 0].astype(np.uint8)).save(data / "Pathcan.tif", description="ZzCan tiff")
    (data / "Pathcan_bad.zip").write_bytes(b"PK\x03\x04ZzCan")
    with zipfile.ZipFile(data / "Pathcan_out.zip", "w") as archive:
        archive.writestr("../ZzCan", "ZzCan")


def _check(root: Path, *, may_name: set[str]) -> None:
    """No header's word is anywhere, and a path's word only in the files named."""
    assert canaries.hits(root, canaries.HEADER, leave_out=COPIES) == set()
    named = {name for name, _ in canaries.hits(root, [canaries.PATH], leave_out=COPIES)}
    lists = {name for name in named if name.startswith("cohort/series/") or name.endswith("/members.json")}
    assert named - lists <= may_name
    for path in root.rglob("*"):
        if path.name.endswith(OWNER_ONLY) or path.parent.name == "unpacked":
            assert path.stat().st_mode & 0o077 == 0, path


def test_no_identifier_gets_into_anything_that_a_whole_run_writes(tmp_path: Path, run: Run) -> None:
    data, root = tmp_path / "Pathcan_export", tmp_path / "root"
    root.mkdir()
    data.mkdir()
    _write_export(data)
    (tmp_path / "key.json").write_text(json.dumps({"key": KEY.hex()}))
    recipes = {"prepare": tiny.PREPARE, "mae": tiny.shorter(tiny.MAE, 2), "segment": tiny.shorter(tiny.SEGMENT, 2)}
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))

    options = ("workers=1", f"key_file={tmp_path / 'key.json'}", "fractions={train: 0.5, val: 0.2, test: 0.3}")
    sets = [part for option in options for part in ("--set", option)]
    scan = ("scan", data, "-o", root / "cohort", "--modality", "MR", *sets)
    said = run(*scan)
    assert said.code == 0, said.text
    cohort = root / "cohort" / "cohort.csv"
    assert cohort.read_text().count("case-") == 8
    assert run(*scan).code == 0
    prepare = ("prepare", tmp_path / "prepare.yaml", "--cohort", cohort, "-o", root / "store", "--workers", 1)
    assert run(*prepare).code == 0
    store = ("--store", root / "store")
    assert run("pretrain", tmp_path / "mae.yaml", *store, "-o", root / "mae").code == 0
    encoder = ("--encoder", root / "mae" / "bundle")
    said = run("finetune", tmp_path / "segment.yaml", *store, *encoder, "-o", root / "segment")
    assert said.code == 0, said.text
    predict = ("predict", root / "segment" / "bundle")
    assert run(*predict, cohort, "-o", root / "predictions").code == 0
    said = run("evaluate", root / "predictions", cohort, "-o", root / "metrics")
    assert said.code == 0, said.text
    assert len(list((root / "predictions").glob("case-*.nii.gz"))) == 8
    _check(root, may_name=NAMES_PATHS)

    pictures = tmp_path / "Pathcan_pictures"
    assert run("scan", pictures, "-o", root / "flat" / "cohort", "--modality", "MR", *sets).code == 0
    cohort = root / "flat" / "cohort" / "cohort.csv"
    prepare = ("prepare", tmp_path / "prepare.yaml", "--cohort", cohort, "-o", root / "flat" / "store", "--workers", 1)
    assert run(*prepare).code == 0
    _check(root / "flat", may_name=NAMES_PATHS)

    first = data / "Pathcan^Doe0" / "Pathcan19"
    direct = tmp_path / "direct"
    assert run(*predict, first / "series", "-o", direct / "predictions").code == 0
    assert run("convert", first / "series", "-o", direct / "a.nii.gz").code == 0
    assert run("convert", first / "series", "-o", direct / "a.nrrd").code == 0
    assert (
        run("convert", first / "Pathcan_seg.dcm", "--label", "--on", first / "series", "-o", direct / "s.mha").code == 0
    )
    assert run("convert", data / "nifti" / "Pathcan_6.nii.gz", "-o", direct / "b.nii").code == 0
    assert run("convert", pictures / "Pathcan.png", "-o", direct / "c.nii.gz").code == 0
    assert canaries.hits(direct, canaries.HEADER) == set()
    named = [name for name, _ in canaries.hits(direct, [canaries.PATH])]
    assert [name.endswith(".dicom.json") for name in named] == [True], "the list of the files that were read"
    for path in (data, data / "Pathcan.zip", pictures / "Pathcan.png", first / "Pathcan_seg.dcm"):
        for more in ((), ("--json",)):
            assert run("doctor", path, *more).code == 0


def test_no_identifier_gets_into_a_refusal(tmp_path: Path, run: Run) -> None:
    data, root = tmp_path / "Pathcan_export", tmp_path / "root"
    _write_faulty(data)
    said = run("scan", data, "-o", root / "cohort", "--set", "workers=1", "--modality", "MR")
    assert said.code in {3, 4}, said.text
    _check(root, may_name=NAMES_PATHS)
    refused = (root / "cohort" / "refused.csv").read_text()
    assert refused.count("\nPathcan") > 20
    run("doctor", data)
    for path in data.iterdir():
        run("doctor", path)
        run("doctor", path, "--label")
        run("convert", path, "-o", tmp_path / "out" / "x.nii.gz")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
