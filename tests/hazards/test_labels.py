"""Rows of the hazard catalogue on labels, names and tables (B.6), through the functions that users call."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
from verdicts import booked

from medssl import Cohort, MedSSLError, Volume, read_volume, scan, write_volume
from medssl.data.scan import ScanConfig, ScanResult
from medssl.geometry import Geometry

SHAPE = (12, 10, 8)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def put(path: Path, array: np.ndarray, shift_mm: float = 0.0) -> Path:
    affine = AFFINE.copy()
    affine[0, 3] = shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 99, SHAPE).astype(np.int16)


def label(value: float = 1, dtype: str = "u1") -> np.ndarray:
    found = np.zeros(SHAPE, dtype)
    found[2:5, 3:6, 2:4] = value
    return found


def scanned(data: Path, **options: object) -> ScanResult:
    config = ScanConfig.parse({"workers": 1, "names": "keep", "thumbnails": False, **options})
    return scan(data, data.parent / "out", config=config)


def reasons(result: ScanResult) -> str:
    return " ".join(entry.reason for entry in result.ledger)


def pair(data: Path, array: np.ndarray, shift_mm: float = 0.0) -> Path:
    put(data / "imagesTr/a.nii.gz", image())
    return put(data / "labelsTr/a.nii.gz", array, shift_mm)


def test_l01_a_label_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    pair(tmp_path / "d", label()[:-1])
    result = scanned(tmp_path / "d")
    assert list(booked(result).values()) == ["E_SHAPE"]
    assert "(1, 11, 10, 8)" in reasons(result)
    assert "(1, 12, 10, 8)" in reasons(result)


@pytest.mark.parametrize(("shift_mm", "code"), [(0.05, ""), (0.5, "E_GEOMETRY"), (100.0, "E_GEOMETRY")])
def test_l02_a_label_elsewhere_is_refused_or_trusted_on_demand(tmp_path: Path, shift_mm: float, code: str) -> None:
    pair(tmp_path / "d", label(), shift_mm)
    result = scanned(tmp_path / "d")
    assert list(booked(result).values()) == ([code] if code else [])
    if code:
        assert f"{shift_mm:.2f} mm" in reasons(result)
        trusted = scanned(tmp_path / "d", label_grid="trust")
        assert (len(trusted.cohort), trusted.cohort[0].reading.label_grid) == (1, "trust")
        assert "W_LABEL_TRUSTED" in reasons(trusted)


@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [
        (0.9999, "f4", ""),
        (1e-8, "f8", ""),
        (1.0009, "f4", ""),
        (0.9, "f4", "E_LABEL_VALUE"),
        (0.5, "f8", "E_LABEL_VALUE"),
        (-1, "i2", "E_LABEL_VALUE"),
        (-2.0, "f4", "E_LABEL_VALUE"),
        (np.nan, "f4", "E_NONFINITE"),
    ],
)
def test_l03_a_label_is_a_whole_number_from_0_on(tmp_path: Path, value: float, dtype: str, code: str) -> None:
    path = put(tmp_path / "a.nii.gz", label(value, dtype))
    if code:
        with pytest.raises(MedSSLError) as caught:
            read_volume(path, unit="label")
        assert caught.value.code == code
    else:
        assert set(np.unique(read_volume(path, unit="label")[0].array)) <= {0, 1}


def test_l04_a_value_outside_the_declared_set_is_counted(tmp_path: Path) -> None:
    pair(tmp_path / "d", label(7))
    assert booked(scanned(tmp_path / "d")) == {}
    result = scanned(tmp_path / "d", label_values=[1, 2])
    assert list(booked(result).values()) == ["E_LABEL_SET"]
    assert "7 in 18 voxels" in reasons(result)


def test_l05_an_empty_label_is_said(tmp_path: Path) -> None:
    pair(tmp_path / "d", label(0))
    assert "W_EMPTY_LABEL" in reasons(scanned(tmp_path / "d"))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(254, "u1"), (255, "u1"), (256, "u2"), (257, "u2"), (65535, "u2"), (65536, "i4"), (65537, "i4")],
)
def test_l06_large_numbers_do_not_wrap(tmp_path: Path, name: str, largest: int, dtype: str) -> None:
    array = label(largest, "i8")[None]
    write_volume(Volume(array, Geometry(SHAPE, AFFINE), "label"), tmp_path / name)
    back, _ = read_volume(tmp_path / name, unit="label")
    assert back.array.dtype == np.dtype(dtype)
    assert np.array_equal(back.array, array)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_l08_a_label_that_was_cut_never_becomes_background(tmp_path: Path, share: float) -> None:
    path = pair(tmp_path / "d", np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert list(booked(scanned(tmp_path / "d")).values()) == ["E_TRUNCATED"]


@pytest.mark.parametrize(
    "names",
    [
        ("Case", "case"),
        (unicodedata.normalize("NFC", "größe"), unicodedata.normalize("NFD", "größe")),
        ("case", "case "),
        ("straße", "STRASSE"),
    ],
)
def test_l09_names_that_are_nearly_equal_are_refused_before_anything_is_written(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for seed, name in enumerate((*names, "other")):
        put(tmp_path / f"d/{name}.nii.gz", image(seed))
    result = scanned(tmp_path / "d")
    assert list(booked(result).values()) == ["E_NAME_CLASH"] * 2
    assert [case.case_id for case in result.cohort] == ["other"]


def test_l09_a_missing_and_an_extra_label_are_booked(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset.json").write_text("{}")
    pair(tmp_path / "d", label())
    put(tmp_path / "d/imagesTr/b.nii.gz", image(1))
    put(tmp_path / "d/labelsTr/c.nii.gz", label())
    result = scanned(tmp_path / "d")
    assert booked(result) == {"labelsTr/c.nii.gz": "E_PAIR"}
    assert "W_NO_LABEL" in reasons(result)
    assert [(case.case_id, case.label is None) for case in result.cohort] == [("a", False), ("b", True)]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (b"\xef\xbb\xbfcase_id,image\r\na,i.nii.gz\r\n", None),
        (b"case_id;image\na;i.nii.gz\n", 1),
        (b"case_id,image\na,i.nii.gz\0\n", 2),
        (b"case_id,image\na,i.nii.gz\na,i.nii.gz\n", 3),
        (b"case_id,image\n1E+05,i.nii.gz\n", 2),
        (b"case_id,image,subject_id\na,i.nii.gz,3-Mar\n", 2),
        (b"case_id,image,subject_id\na,i.nii.gz,2019-08-07 00:00:00\n", 2),
        (b"case_id,image\na,i.nii.gz,x\n", 2),
        (b"case_id,image\n../x,i.nii.gz\n", 2),
        (b"case_id,image\n\xff,i.nii.gz\n", 2),
    ],
)
def test_l10_a_table_is_strict_and_names_the_line(tmp_path: Path, table: bytes, line: int | None) -> None:
    put(tmp_path / "i.nii.gz", image())
    path = tmp_path / "t.csv"
    path.write_bytes(table)
    if line is None:
        assert [case.case_id for case in scan(path, tmp_path / "out", config=ScanConfig(workers=1)).cohort] == ["a"]
        return
    with pytest.raises(MedSSLError, match=f"line {line}: ") as caught:
        Cohort.from_csv(path)
    assert caught.value.code == "E_TABLE"


def test_l12_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        put(tmp_path / f"d/{name}.nii.gz", image(seed))
    (tmp_path / "m.csv").write_text("case_id,subject_id,split\na,s,train\nb,s,test\nc,t,test\n")
    result = scanned(tmp_path / "d", table=str(tmp_path / "m.csv"))
    assert booked(result) == {"a.nii.gz": "E_LEAK", "b.nii.gz": "E_LEAK"}
