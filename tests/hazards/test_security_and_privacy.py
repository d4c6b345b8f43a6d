"""Rows of the hazard catalogue on hostile names and archives (B.9) and on identifiers (B.10)."""

from __future__ import annotations

import csv
import functools
import io
import multiprocessing
import subprocess
import sys
import tarfile
import traceback
import zipfile
from pathlib import Path

import dicoms
import nibabel
import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from typer.testing import CliRunner
from verdicts import booked

from medssl import MedSSLError, Volume, read_volume, scan, write_volume
from medssl.data.scan import ScanConfig, ScanResult
from medssl.geometry import Geometry


def put(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 99, (6, 7, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def scanned(data: Path, **options: object) -> ScanResult:
    return scan(data, data.parent / "out", config=ScanConfig.parse({"workers": 1, **options}))


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "name", ["../../escaped.nii.gz", "absolute/escaped.nii.gz", "a/../../../escaped.nii.gz", "..\\x.nii.gz"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_x04_an_archive_writes_nowhere_else(tmp_path: Path, name: str, kind: str) -> None:
    good = put(tmp_path / "d/good.nii.gz").read_bytes()
    name = name.replace("absolute", str(tmp_path))
    if kind == "zip":
        zipped(tmp_path / "d/x.zip", {name: good})
    else:
        with tarfile.open(tmp_path / "d/x.tar", "w") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(good)
            archive.addfile(member, io.BytesIO(good))
    result = scanned(tmp_path / "d")
    assert booked(result) == {f"x.{kind}": "E_ARCHIVE"}
    assert len(result.cohort) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out"]


def test_x06_links_out_of_the_folder_are_named(tmp_path: Path) -> None:
    outside = put(tmp_path / "elsewhere/a.nii.gz")
    put(tmp_path / "d/b.nii.gz", 1)
    (tmp_path / "d/a.nii.gz").symlink_to(outside)
    (tmp_path / "d/folder").symlink_to(outside.parent)
    assert booked(scanned(tmp_path / "d")) == {"a.nii.gz": "E_LINK", "folder": "E_LINK"}


def test_x07_an_output_that_is_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "a.nii").symlink_to(tmp_path / "precious")
    write_volume(Volume(np.zeros((1, 2, 2, 2), np.uint8), Geometry((2, 2, 2), np.eye(4)), "label"), tmp_path / "a.nii")
    assert (tmp_path / "precious").read_text() == "keep me"
    assert not (tmp_path / "a.nii").is_symlink()
    put(tmp_path / "d/a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cohort.csv").symlink_to(tmp_path / "precious")
    scanned(tmp_path / "d")
    assert (tmp_path / "precious").read_text() == "keep me"


@pytest.mark.parametrize("name", ["con", "a b", "-rf", "$(touch ran)", ";rm", "x" * 200, "ä/ö"])
def test_x08_any_name_becomes_a_safe_id_of_one_case(tmp_path: Path, name: str) -> None:
    put(tmp_path / f"d/{name}.nii.gz")
    put(tmp_path / "d/other.nii.gz", 1)
    result = scanned(tmp_path / "d", names="keep")
    assert len({case.case_id for case in result.cohort}) == len(result.cohort) == 2
    for case in result.cohort:
        assert case.case_id.isascii()
        assert case.case_id.strip(".") == case.case_id
        assert not set(case.case_id) & set("/\\$;() ")


@pytest.mark.parametrize("name", ["new\nline", "\x1b[31mred", "\u202efdp", "\x07bell"])
def test_x14_control_characters_reach_neither_table_nor_terminal(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from medssl.cli import app, run_guarded

    put(tmp_path / f"d/{name}.nii.gz")
    put(tmp_path / "d/good.nii.gz", 1)
    shown = CliRunner().invoke(app, ["scan", str(tmp_path / "d"), "-o", str(tmp_path / "out"), "--set", "workers=1"])
    assert shown.exit_code == 3
    for text in (shown.output, *(path.read_text() for path in (tmp_path / "out").glob("*.csv"))):
        assert all(character.isprintable() or character == "\n" for character in text)
    rows = list(csv.reader((tmp_path / "out/refused.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert rows[1][2] == "E_NAME"
    bad = tmp_path / f"d/{name}.mha"
    bad.write_bytes(b"ObjectType = Image\n")
    for command in (["doctor", bad], ["convert", bad, "-o", tmp_path / "x.nii"], ["scan", bad, "-o", tmp_path / "y"]):
        capsys.readouterr()
        assert run_guarded(functools.partial(app, [str(word) for word in command], standalone_mode=False)) == 4
        assert all(character.isprintable() or character == "\n" for text in capsys.readouterr() for character in text)


def test_x15_nothing_in_a_report_or_table_is_run(tmp_path: Path) -> None:
    def described(found: list[Dataset]) -> None:
        for ds in found:
            ds.SeriesDescription = ds.ProtocolName = "<script>alert(1)</script>"
            ds.Manufacturer = "=CMD()"

    put(tmp_path / "d/<img src=x onerror=alert(2)>.nii.gz")
    put(tmp_path / "d/=cmd|' /C calc'!A0.nii.gz", 1)
    put(tmp_path / "d/@SUM(A1).nii.gz", 2).write_bytes(b"junk")
    dicoms.write_series(tmp_path / "d/<script>alert(3)<", mutate=described)
    result = scanned(tmp_path / "d", names="keep")
    assert len(result.cohort) == 3
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    for table in (tmp_path / "out").glob("*.csv"):
        for row in csv.reader(table.read_text().splitlines()):
            assert not any(cell.startswith(("=", "+", "@", "\t")) for cell in row), (table.name, row)


# ---- B.10


TEXT_TAGS = {
    "RescaleSlope": "DS",
    "PixelSpacing": "DS",
    "ImagePositionPatient": "DS",
    "SliceThickness": "DS",
    "ImageType": "CS",
    "PhotometricInterpretation": "CS",
    "BodyPartExamined": "CS",
    "Modality": "CS",
    "NumberOfFrames": "IS",
    "InstanceNumber": "IS",
    "KVP": "DS",
    "EchoTime": "DS",
    "PatientSex": "CS",
    "PatientAge": "AS",
    "ConvolutionKernel": "SH",
    "BurnedInAnnotation": "CS",
    "Manufacturer": "LO",
    "SoftwareVersions": "LO",
    "AcquisitionNumber": "IS",
}


@pytest.mark.parametrize("keyword", TEXT_TAGS)
def test_h05_a_name_in_the_wrong_place_is_shown_nowhere(tmp_path: Path, keyword: str) -> None:
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    def named(found: list[Dataset]) -> None:
        for ds in found:
            tag = Tag(keyword)
            ds[tag] = RawDataElement(tag, TEXT_TAGS[keyword], 8, b"ZZCANARY", 0, False, True)

    dicoms.write_series(tmp_path / "d", modality="MR", mutate=named)
    try:
        told = repr(read_volume(tmp_path / "d")[1])
    except MedSSLError as error:
        told = "".join(traceback.format_exception(error))
    assert "ZZCANARY" not in told.upper()
    result = scanned(tmp_path / "d")
    assert not any("ZZCANARY" in f"{entry.reason}{entry.item}".upper() for entry in result.ledger)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"ZZCANARY" not in path.read_bytes().upper(), path.name


def test_h06_neither_a_command_nor_its_decoder_leaves_a_core(tmp_path: Path) -> None:
    dicoms.write_2d(tmp_path / "a.dcm", syntax=uid.RLELossless)
    read_volume(tmp_path / "a.dcm")
    children = [child.pid for child in multiprocessing.active_children()]
    assert any("Max core file size        0 " in Path(f"/proc/{pid}/limits").read_text() for pid in children)
    code = (
        "from medssl import cli; cli.run_guarded = lambda *a, **k: print(open('/proc/self/limits').read()); cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Max core file size        0 " in shown


def test_h07_a_face_is_said_only_where_the_header_says_head(tmp_path: Path) -> None:
    for part, expected in (("HEAD", True), ("BRAIN", True), ("ABDOMEN", False), (None, False)):
        folder = tmp_path / str(part)

        def of(found: list[Dataset], part: str | None = part) -> None:
            for ds in found:
                if part is not None:
                    ds.BodyPartExamined = part

        dicoms.write_series(folder / "d", mutate=of)
        said = " ".join(entry.reason for entry in scanned(folder / "d").ledger)
        assert ("W_FACE" in said) is expected


def test_h09_no_picture_is_drawn_where_none_is_wanted_or_text_is_burned_in(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 10)).astype(np.uint8)
    dicoms.write_2d(tmp_path / "d/a", modality="US", BurnedInAnnotation="YES", pixels=noise)
    put(tmp_path / "d/b.nii.gz")
    scanned(tmp_path / "d", burned_in="accept", thumbnails=False)
    assert not (tmp_path / "out/thumbnails").exists()
    scanned(tmp_path / "d", burned_in="accept")
    assert len(list((tmp_path / "out/thumbnails").iterdir())) == 1
