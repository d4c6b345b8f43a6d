from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from verdicts import booked

from medssl.data.cohort import Cohort
from medssl.data.identify import safe_id
from medssl.data.scan import ScanConfig, ScanResult, scan
from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, ExitCode, NoInputError, ReadError
from medssl.ledger import Outcome
from medssl.runfolder import read_journal

MakeCase = Callable[..., tuple[Path, Path]]
WriteNifti = Callable[..., Path]
SHAPE = (8, 9, 10)


def _scan(data: Path, out: Path, **options: object) -> ScanResult:
    return scan(data, out, config=ScanConfig.parse({"workers": 1, "names": "keep", **options}))


def _image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, SHAPE).astype(np.int16)


def _label(value: int = 1) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:4, 2:4, 2:4] = value
    return label


def test_the_decathlon_layout_is_understood(tmp_path: Path, make_case: MakeCase, write_nifti: WriteNifti) -> None:
    data = tmp_path / "Task99"
    for name in ("t_01", "t_02"):
        make_case(data, name)
    write_nifti(data / "imagesTr/t_03_0000.nii.gz", _image(3))
    write_nifti(data / "imagesTr/t_03_0001.nii.gz", _image(4))
    write_nifti(data / "labelsTr/t_03.nii.gz", _label())
    write_nifti(data / "imagesTr/t_04.nii.gz", _image(5))
    write_nifti(data / "imagesTs/t_05.nii.gz", _image(6))
    (data / "imagesTr/._t_01.nii.gz").write_bytes(b"resource fork")
    (data / "dataset.json").write_text("{}")
    result = _scan(data, tmp_path / "out/cohort.csv", modality="MR")
    assert [(c.case_id, c.label is not None) for c in result.cohort] == [
        ("t_01", True),
        ("t_02", True),
        ("t_03", True),
        ("t_04", False),
        ("t_05", False),
    ]
    outcomes = {entry.item: entry.outcome for entry in result.ledger}
    assert outcomes["imagesTr/t_04.nii.gz"] is Outcome.WARNED
    assert outcomes["imagesTr/t_03_0001.nii.gz"] is Outcome.IGNORED
    assert outcomes["imagesTr/._t_01.nii.gz"] is Outcome.IGNORED
    assert outcomes["dataset.json"] is Outcome.IGNORED
    assert result.ledger.exit_code() is ExitCode.OK
    assert Cohort.from_csv(result.path) == result.cohort
    assert {c.modality for c in result.cohort} == {"MR"}
    assert {c.split for c in result.cohort} <= {"train", "val", "test"}
    assert {path.name for path in result.path.parent.iterdir()} == {
        "acquisition.csv",
        "cohort.csv",
        "cohort.parquet",
        "journal.jsonl",
        "pseudonyms.json",
        "refused.csv",
        "report.html",
        "scan.yaml",
        "scan_cache.jsonl",
        "thumbnails",
    }
    line = read_journal(result.path.parent / "journal.jsonl")[0]
    assert (line["labelled"], line["subjects"], line["label_values"]) == (3, 5, [1, 2])


def test_a_bids_like_tree_is_understood(tmp_path: Path, write_nifti: WriteNifti) -> None:
    data = tmp_path / "bids"
    for number in ("01", "02"):
        for session in ("a", "b"):
            folder = data / f"sub-{number}/ses-{session}/anat"
            write_nifti(folder / f"sub-{number}_ses-{session}_T1w.nii.gz", _image(ord(session) + 10 * int(number)))
    derived = data / "derivatives/manual"
    write_nifti(derived / "sub-01/ses-a/anat/sub-01_ses-a_T1w_label-lesion_seg.nii.gz", _label())
    write_nifti(derived / "sub-01/ses-b/anat/sub-01_ses-b_dseg.nii.gz", _label())
    write_nifti(derived / "sub-02/ses-a/anat/sub-02_ses-a_T1w_desc-smooth.nii.gz", _image(9))
    write_nifti(data / "sub-02/ses-a/anat/sub-02_ses-a_T1w_mask.nii.gz", _label())
    (data / "dataset_description.json").write_text("{}")
    result = _scan(data, tmp_path / "out")
    assert [(c.case_id, c.subject_id, c.label is not None) for c in result.cohort] == [
        ("sub-01_ses-a_T1w", "sub-01", True),
        ("sub-01_ses-b_T1w", "sub-01", True),
        ("sub-02_ses-a_T1w", "sub-02", True),
        ("sub-02_ses-b_T1w", "sub-02", False),
    ]
    assert result.path == tmp_path / "out/cohort.csv"
    assert len({c.split for c in result.cohort if c.subject_id == "sub-01"}) == 1


def test_plain_folders_are_understood(tmp_path: Path, write_nifti: WriteNifti) -> None:
    flat = tmp_path / "flat"
    write_nifti(flat / "a.nii.gz", _image(1))
    write_nifti(flat / "a_seg.nii.gz", _label())
    write_nifti(flat / "b.nii", _image(2))
    assert [(c.case_id, c.label is not None) for c in _scan(flat, tmp_path / "o1").cohort] == [
        ("a", True),
        ("b", False),
    ]
    paired = tmp_path / "paired"
    write_nifti(paired / "images/x/scan.nii.gz", _image(1))
    write_nifti(paired / "images/y/scan.nii.gz", _image(2))
    write_nifti(paired / "labels/y/scan.nii.gz", _label())
    write_nifti(paired / "notes/other.nii.gz", _image(3))
    result = _scan(paired, tmp_path / "o2", image_glob="scan.nii.gz")
    assert [(c.case_id, c.label is not None) for c in result.cohort] == [("x_scan", False), ("y_scan", True)]
    assert {e.item: e.reason for e in result.ledger}["notes/other.nii.gz"] == "does not match scan.nii.gz"


def test_a_table_of_cases_is_understood(tmp_path: Path, write_nifti: WriteNifti) -> None:
    write_nifti(tmp_path / "i/a.nii.gz", _image(1))
    write_nifti(tmp_path / "i/b.nii.gz", _image(2))
    write_nifti(tmp_path / "l/a.nii.gz", _label())
    (tmp_path / "cases.csv").write_text(
        "case_id,image,label,subject_id,modality\n"
        "p,i/a.nii.gz,l/a.nii.gz,s1,MR\nq,i/b.nii.gz,,s1,\nr,i/none.nii.gz,,s2,\n"
    )
    result = _scan(tmp_path / "cases.csv", tmp_path / "out", modality="CT")
    assert [(c.case_id, c.subject_id, c.modality) for c in result.cohort] == [("p", "s1", "MR"), ("q", "s1", "CT")]
    assert list(booked(result)) == ["r"]
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED


def test_a_manifest_gives_subjects_splits_and_modality(tmp_path: Path, make_case: MakeCase) -> None:
    data = tmp_path / "data"
    for name in ("a", "b", "c"):
        make_case(data, name)
    (data / "manifest.csv").write_text(
        "path,kind,case_id,subject_group,suggested_split,modality\n"
        "dataset.json,index,,,,\n"
        "x,image,a,s1,train,MR\nx,label,a,s1,train,MR\nx,image,b,s1,train,MR\nx,image,gone,s9,test,MR\n"
    )
    result = _scan(data, tmp_path / "out", table="manifest.csv")
    assert [(c.case_id, c.subject_id, c.split, c.modality) for c in result.cohort] == [
        ("a", "s1", "train", "MR"),
        ("b", "s1", "train", "MR"),
        ("c", "c", None, "other"),
    ]
    reasons = {entry.item: entry for entry in result.ledger}
    assert reasons["manifest.csv line 6: gone"].outcome is Outcome.IGNORED
    assert "W_NOT_IN_TABLE" in reasons["imagesTr/c.nii.gz"].reason
    assert "W_NO_SPLIT" in reasons["imagesTr/c.nii.gz"].reason


def test_a_wrong_table_is_refused(tmp_path: Path, make_case: MakeCase) -> None:
    make_case(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"table none\.csv: no such file"):
        _scan(tmp_path, tmp_path / "out", table="none.csv")
    (tmp_path / "m.csv").write_text("case_id,split\na,trian\n")
    with pytest.raises(CaseError, match="line 2: case a: split"):
        _scan(tmp_path, tmp_path / "out", table="m.csv")
    (tmp_path / "m.csv").write_text("case_id,split\na,train\na,val\n")
    with pytest.raises(CaseError, match="line 3: case_id a was used in line 2"):
        _scan(tmp_path, tmp_path / "out", table="m.csv")


def test_bad_files_are_named_and_the_others_go_on(tmp_path: Path, make_case: MakeCase, write_nifti: WriteNifti) -> None:
    data = tmp_path / "data"
    names = ("cut", "flip", "cutlabel", "grid", "shape", "nan", "time", "zero", "negative", "half", "empty", "const")
    for name in (*names, "good"):
        make_case(data, name)

    def image(name: str) -> Path:
        return data / f"imagesTr/{name}.nii.gz"

    def label(name: str) -> Path:
        return data / f"labelsTr/{name}.nii.gz"

    image("cut").write_bytes(image("cut").read_bytes()[:-200])
    raw = bytearray(image("flip").read_bytes())
    raw[len(raw) // 2] ^= 16
    image("flip").write_bytes(raw)
    label("cutlabel").write_bytes(label("cutlabel").read_bytes()[:90])
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    shape = (12, 14, 10)
    moved = affine.copy()
    moved[2, 3] = 1.0
    write_nifti(label("grid"), np.ones(shape, np.uint8), moved)
    write_nifti(label("shape"), np.ones((12, 14, 9), np.uint8), affine)
    holes = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    holes[:, :, :5] = np.nan
    write_nifti(image("nan"), holes, affine)
    write_nifti(image("time"), np.ones((*shape, 3), np.int16), affine)
    for name, spacing in (("zero", 0.0), ("negative", -2.0)):
        header = nib.load(image(name)).header.copy()
        array = np.asarray(nib.load(image(name)).dataobj)
        content = nib.Nifti1Image(array, None, header)
        content.header["pixdim"][3] = spacing
        content.header["sform_code"] = content.header["qform_code"] = 0
        nib.save(content, data / f"{name}.nii")
        patched = bytearray((data / f"{name}.nii").read_bytes())
        patched[76 + 12 : 76 + 16] = np.float32(spacing).tobytes()
        (data / f"{name}.nii").unlink()
        image(name).unlink()
        label(name).unlink()
        (data / f"imagesTr/{name}.nii").write_bytes(patched)
    write_nifti(label("half"), np.full(shape, 0.5, np.float32), affine)
    write_nifti(label("empty"), np.zeros(shape, np.uint8), affine)
    write_nifti(image("const"), np.full(shape, 7, np.int16), affine)
    result = scan(data, tmp_path / "out/cohort.csv", config=ScanConfig(workers=2, names="keep"))
    codes = booked(result)
    assert codes == {
        "imagesTr/cut.nii.gz": "E_TRUNCATED",
        "imagesTr/flip.nii.gz": "E_CRC",
        "imagesTr/cutlabel.nii.gz": "E_TRUNCATED",
        "imagesTr/grid.nii.gz": "E_GEOMETRY",
        "imagesTr/shape.nii.gz": "E_SHAPE",
        "imagesTr/nan.nii.gz": "E_NONFINITE",
        "imagesTr/time.nii.gz": "E_NDIM",
        "imagesTr/zero.nii": "E_SPACING",
        "imagesTr/half.nii.gz": "E_LABEL_VALUE",
    }
    warned = {entry.item: entry.reason for entry in result.ledger if entry.outcome is Outcome.WARNED}
    assert warned["imagesTr/empty.nii.gz"].startswith("W_EMPTY_LABEL")
    assert "W_CONSTANT" in warned["imagesTr/const.nii.gz"]
    assert "imagesTr/negative.nii" in warned
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED
    assert {c.case_id for c in result.cohort} == {"empty", "const", "negative", "good"}
    table = (tmp_path / "out/refused.csv").read_text()
    assert all(f"{item},rejected,{code}," in table for item, code in codes.items())
    assert all(entry.reason.rstrip().endswith((".", "source")) for entry in result.ledger if entry.code)


def test_a_subject_in_two_splits_is_refused_and_the_others_go_on(tmp_path: Path, make_case: MakeCase) -> None:
    data = tmp_path / "data"
    for name in ("a", "b", "c"):
        make_case(data, name)
    (data / "m.csv").write_text("case_id,subject_id,split\na,s1,train\nb,s1,test\nc,s2,train\n")
    result = _scan(data, tmp_path / "out", table="m.csv")
    assert booked(result) == {"imagesTr/a.nii.gz": "E_LEAK", "imagesTr/b.nii.gz": "E_LEAK"}
    assert [c.case_id for c in result.cohort] == ["c"]
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED


def test_one_of_two_equal_files_is_kept_the_labelled_one(tmp_path: Path, make_case: MakeCase) -> None:
    image, _ = make_case(tmp_path / "data", "b")
    shutil.copy(image, image.with_name("a.nii.gz"))
    result = _scan(tmp_path / "data", tmp_path / "out")
    assert [c.case_id for c in result.cohort] == ["b"]
    (copy,) = [entry for entry in result.ledger if entry.outcome is Outcome.DUPLICATE]
    assert (copy.item, copy.reason) == ("imagesTr/a.nii.gz", "the same voxels as imagesTr/b.nii.gz")


def test_labels_without_or_with_several_images_are_refused(tmp_path: Path, write_nifti: WriteNifti) -> None:
    for number, name in enumerate(("a", "p/c", "q/c")):
        write_nifti(tmp_path / f"d/{name}.nii.gz", _image(number))
    for name in ("a_seg", "a_mask", "b_seg", "r/c_seg"):
        write_nifti(tmp_path / f"d/{name}.nii.gz", _label())
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert booked(result) == dict.fromkeys(
        ("a_mask.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz", "r/c_seg.nii.gz"), "E_PAIR"
    )
    assert {c.case_id: c.label is not None for c in result.cohort} == {"a": False, "p_c": False, "q_c": False}


def test_a_brain_mask_beside_a_segmentation_is_not_taken_for_the_label(tmp_path: Path, write_nifti: WriteNifti) -> None:
    write_nifti(tmp_path / "d/sub-01/anat/sub-01_T1w.nii.gz", _image(1))
    derived = tmp_path / "d/derivatives/fp/sub-01/anat"
    write_nifti(derived / "sub-01_desc-brain_mask.nii.gz", _label())
    write_nifti(derived / "sub-01_dseg.nii.gz", _label(2))
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert list(booked(result).values()) == ["E_PAIR", "E_PAIR"]
    assert [c.label for c in result.cohort] == [None]


def test_four_digits_number_cases_where_nnunet_has_no_folder(tmp_path: Path, write_nifti: WriteNifti) -> None:
    for number in range(3):
        write_nifti(tmp_path / f"d/scan_{number:04d}.nii.gz", _image(number))
    write_nifti(tmp_path / "d/scan_0002_seg.nii.gz", _label())
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert {c.case_id: c.label is not None for c in result.cohort} == {
        "scan_0000": False,
        "scan_0001": False,
        "scan_0002": True,
    }


def test_the_same_voxels_in_another_file_are_a_duplicate(tmp_path: Path, write_nifti: WriteNifti) -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    first = write_nifti(tmp_path / "d/a.nii.gz", _image(1), affine)
    image = nib.load(first)
    nib.save(image, tmp_path / "d/b.nii")
    nib.save(image.as_reoriented(np.array([[1, 1], [0, -1], [2, 1]])), tmp_path / "d/c.nii.gz")
    write_nifti(tmp_path / "d/e.nii.gz", _image(1), np.diag([1.0, 1.0, 3.0, 1.0]))
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert [c.case_id for c in result.cohort] == ["a", "e"]
    assert {e.reason for e in result.ledger if e.outcome is Outcome.DUPLICATE} == {"the same voxels as a.nii.gz"}


def test_folders_that_cannot_be_entered_are_booked(
    tmp_path: Path, write_nifti: WriteNifti, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "d"
    write_nifti(data / "a.nii.gz", _image(1))
    write_nifti(tmp_path / "far/b.nii.gz", _image(2))
    (data / "more").symlink_to(tmp_path / "far")
    (data / ".hidden").symlink_to(tmp_path / "far")
    (data / "sub").mkdir()
    (data / "sub/loop").symlink_to(data)
    (data / "shut").mkdir()
    scandir = os.scandir

    def forbid(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    result = _scan(data, tmp_path / "out")
    assert booked(result) == {"more": "E_LINK", "sub/loop": "E_LINK", "shut": "E_PERMISSION"}
    followed = _scan(data, tmp_path / "out", follow_links=True)
    assert booked(followed) == {"sub/loop": "E_LINK", "shut": "E_PERMISSION"}
    assert [c.case_id for c in followed.cohort] == ["a", "b"]


def test_a_table_that_names_no_image_is_refused(tmp_path: Path, make_case: MakeCase) -> None:
    make_case(tmp_path, "a")
    (tmp_path / "m.csv").write_text("case_id,subject_id\na.nii.gz,s1\n")
    with pytest.raises(CaseError, match=r"the first image has a, the first row a\.nii\.gz") as error:
        _scan(tmp_path, tmp_path / "out", table="m.csv")
    assert error.value.code == "E_TABLE"


def test_one_warning_for_the_whole_scan_says_that_subjects_are_a_guess(
    tmp_path: Path, make_case: MakeCase, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        make_case(tmp_path / "d", name)
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert result.ledger.count(Outcome.ACCEPTED) == 2
    (warning,) = result.warnings
    assert warning.startswith("W_SUBJECT: whose image it is was guessed for 2 of 2 images (0 by their folder, 2 taken")
    assert [record.getMessage() for record in caplog.records] == [warning]
    assert read_journal(tmp_path / "out/journal.jsonl")[0]["warnings"] == [warning]
    (tmp_path / "m.csv").write_text("case_id,subject_id\na,s1\nb,s1\n")
    assert _scan(tmp_path / "d", tmp_path / "out", table=str(tmp_path / "m.csv")).warnings == ()


def test_images_that_share_a_folder_are_of_one_subject(tmp_path: Path, write_nifti: WriteNifti) -> None:
    names = ("all/P1/t0", "all/P1/t1", "all/P2/images/t0", "all/P2/late/t1", "all/P3/t0", "all/train/x", "all/train/y")
    for number, name in enumerate(names):
        write_nifti(tmp_path / f"d/{name}.nii.gz", _image(number))
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert [c.subject_id for c in result.cohort] == ["P1", "P1", "P2", "P2", "all_P3_t0", "x", "y"]
    assert "(4 by their folder, 3 taken as a subject of their own; 5 subjects)" in result.warnings[0]


def test_an_output_in_the_place_of_a_file_is_found_before_the_work(
    tmp_path: Path, make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case(tmp_path / "d", "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("medssl.pool.run", lambda *_, **__: pytest.fail("the work began"))
    for out in ("file", "file/cohort.csv"):
        with pytest.raises(EnvironmentFaultError):
            _scan(tmp_path / "d", tmp_path / out)


def test_names_that_differ_only_by_case_are_refused(tmp_path: Path, write_nifti: WriteNifti) -> None:
    for number, name in enumerate(("Pat1", "pat1", "pat2")):
        write_nifti(tmp_path / f"d/{name}.nii.gz", _image(number))
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert set(booked(result).values()) == {"E_NAME_CLASH"}
    assert [c.case_id for c in result.cohort] == ["pat2"]


def test_strange_names_get_safe_ids_or_are_refused(tmp_path: Path, write_nifti: WriteNifti) -> None:
    data = tmp_path / "d"
    for number, name in enumerate(("a b", "a_b", "=cmd", "größe", "…")):
        write_nifti(data / f"{name}.nii.gz", _image(number))
    write_nifti(data / "z.nii.gz", _image(9)).rename(data / os.fsdecode(b"\xff.nii.gz"))
    write_nifti(data / "z.nii.gz", _image(10)).rename(data / "new\nline.nii.gz")
    result = _scan(data, tmp_path / "out")
    assert len({c.case_id for c in result.cohort}) == 5
    assert all(c.case_id.replace("-", "").replace("_", "").isalnum() for c in result.cohort)
    assert sorted(booked(result).values()) == ["E_NAME", "E_NAME"]
    assert Cohort.from_csv(result.path) == result.cohort


@pytest.mark.parametrize(
    ("name", "expected"), [("abc_1.2-x", "abc_1.2-x"), ("../x", "x-"), ("", "case-"), ("..", "case-"), ("a b", "a_b-")]
)
def test_a_safe_id_has_only_safe_characters(name: str, expected: str) -> None:
    assert safe_id(name).startswith(expected)


def test_a_link_out_of_the_folder_is_followed_only_if_told_so(tmp_path: Path, write_nifti: WriteNifti) -> None:
    outside = write_nifti(tmp_path / "other/a.nii.gz", _image(0))
    write_nifti(tmp_path / "d/b.nii.gz", _image(1))
    (tmp_path / "d/a.nii.gz").symlink_to(outside)
    assert booked(_scan(tmp_path / "d", tmp_path / "out")) == {"a.nii.gz": "E_LINK"}
    assert len(_scan(tmp_path / "d", tmp_path / "out", follow_links=True).cohort) == 2


def test_label_values_that_are_not_expected_are_counted(tmp_path: Path, make_case: MakeCase) -> None:
    make_case(tmp_path / "d", "a")
    result = _scan(tmp_path / "d", tmp_path / "out", label_values=[1])
    (entry,) = [entry for entry in result.ledger if entry.outcome is Outcome.REJECTED]
    assert entry.code == "E_LABEL_SET"
    assert "label value 2 in 36 voxels; only 1 are expected" in entry.reason
    assert result.ledger.exit_code() is ExitCode.NO_INPUT
    assert len(Cohort.from_csv(result.path)) == 0


def test_files_that_are_no_images_are_ignored_and_empty_dicom_is_refused(tmp_path: Path, make_case: MakeCase) -> None:
    make_case(tmp_path / "d", "a")
    (tmp_path / "d/x.dcm").write_bytes(b"")
    (tmp_path / "d/notes.txt").write_text("")
    (tmp_path / "d/readme").write_text("a text that is longer than the head of a file which is looked at " * 4)
    result = _scan(tmp_path / "d", tmp_path / "out")
    reasons = {entry.item: entry.reason for entry in result.ledger}
    assert booked(result) == {"x.dcm": "E_EMPTY"}
    assert reasons["notes.txt"] == reasons["readme"] == "not an image file"


def test_a_folder_without_images_or_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/notes.txt").write_text("")
    with pytest.raises(NoInputError, match="none of 1 files is an image"):
        _scan(tmp_path / "d", tmp_path / "out")
    with pytest.raises(ReadError, match="is no folder"):
        _scan(tmp_path / "nowhere", tmp_path / "out")


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path, make_case: MakeCase) -> None:
    make_case(tmp_path / "d", "a")
    result = scan(tmp_path / "d", tmp_path / "out/cohort.csv", config=ScanConfig(workers=1), dry_run=True)
    assert len(result.cohort) == 1
    assert not (tmp_path / "out").exists()


def test_names_are_hashed_unless_told_otherwise(tmp_path: Path, make_case: MakeCase) -> None:
    for name in ("DOE_JOHN", "ROE_JANE"):
        make_case(tmp_path / "d", name)
    first = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig(workers=1))
    again = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig(workers=1))
    other = scan(tmp_path / "d", tmp_path / "elsewhere", config=ScanConfig(workers=1))
    shared = ScanConfig(workers=1, key_file=str(tmp_path / "out/pseudonyms.json"))
    alike = scan(tmp_path / "d", tmp_path / "alike", config=shared)
    assert first.cohort == again.cohort
    assert {c.case_id for c in first.cohort}.isdisjoint(c.case_id for c in other.cohort)
    assert [c.case_id for c in first.cohort] == [c.case_id for c in alike.cohort]
    assert all(re.fullmatch("case-[0-9a-f]{16}", c.case_id) for c in first.cohort)
    assert all(re.fullmatch("subject-[0-9a-f]{16}", c.subject_id) for c in first.cohort)
    names = tmp_path / "out/pseudonyms.json"
    assert (
        stat.S_IMODE(names.stat().st_mode) == stat.S_IMODE((tmp_path / "out/scan_cache.jsonl").stat().st_mode) == 0o600
    )
    assert sorted(json.loads(names.read_text())["cases"].values()) == [["DOE_JOHN"] * 2, ["ROE_JANE"] * 2]
    for artefact in ("journal.jsonl", "report.html", "acquisition.csv", "scan.yaml"):
        assert "DOE" not in (tmp_path / "out" / artefact).read_text()
    assert [split.split for split in first.cohort] == [
        split.split for split in _scan(tmp_path / "d", tmp_path / "k").cohort
    ]


def test_names_from_a_table_are_kept_and_hold_for_all_cases_of_a_subject(
    tmp_path: Path, write_nifti: WriteNifti
) -> None:
    for number, name in enumerate(("P1/a", "P1/b", "P2/a", "P2/b")):
        write_nifti(tmp_path / f"d/{name}.nii.gz", _image(number))
    (tmp_path / "m.csv").write_text("case_id,subject_id\nP1_a,P1\n")
    config = ScanConfig(workers=1, table=str(tmp_path / "m.csv"))
    cases = scan(tmp_path / "d", tmp_path / "out", config=config).cohort
    assert cases[0].case_id == "P1_a"
    assert [case.subject_id for case in cases[:2]] == ["P1", "P1"]
    assert all(case.case_id.startswith("case-") for case in cases[1:])
    assert len({case.subject_id for case in cases[2:]}) == 1
    assert cases[2].subject_id.startswith("subject-")


def test_names_in_a_table_of_cases_are_kept(tmp_path: Path, write_nifti: WriteNifti) -> None:
    write_nifti(tmp_path / "i/a.nii.gz", _image(1))
    (tmp_path / "cases.csv").write_text("case_id,image,subject_id\np,i/a.nii.gz,anna\n")
    (case,) = scan(tmp_path / "cases.csv", tmp_path / "out", config=ScanConfig(workers=1)).cohort
    assert (case.case_id, case.subject_id) == ("p", "anna")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"key": "zz"}', '{"key": "00"}'])
def test_a_key_that_cannot_be_used_is_refused(tmp_path: Path, make_case: MakeCase, content: str | None) -> None:
    make_case(tmp_path / "d", "a")
    if content is not None:
        (tmp_path / "key.json").write_text(content)
    with pytest.raises(ConfigError, match="key") as error:
        _scan(tmp_path / "d", tmp_path / "out", key_file=str(tmp_path / "key.json"))
    assert error.value.code == "E_KEY"


def test_one_subject_for_everything_is_said(tmp_path: Path, write_nifti: WriteNifti) -> None:
    for number in range(3):
        write_nifti(tmp_path / f"d/sub-01/sub-01_run-{number}_T1w.nii.gz", _image(number))
    assert _scan(tmp_path / "d", tmp_path / "out").warnings[0].startswith("W_ONE_SUBJECT: all 3 images")
