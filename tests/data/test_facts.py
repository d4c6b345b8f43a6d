from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medssl.data.facts import Facts, read_facts, write_facts
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.data.store import ArrayStore
from medssl.errors import CaseError, CheckpointError, ConfigError

WriteNifti = Callable[..., Path]

PLAIN = {"intensity": {"mode": "none"}, "body_mask": {"mode": "none"}, "crop": {"mode": "none"}}


@pytest.fixture
def images(tmp_path: Path, write_nifti: WriteNifti) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", rng.integers(0, 90, (6, 5, 4)).astype(np.int16))
    return tmp_path / "images"


def _table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _scanned(images: Path, table: Path, **options: object) -> Path:
    config = ScanConfig.parse({"table": str(table), "workers": 1, "thumbnails": False, **options})
    return scan(images, images.parent / "cohort", config=config).path


def _prepared(cohort: Path) -> ArrayStore:
    store = prepare(PrepareConfig.parse(PLAIN), cohort=cohort, out=cohort.parent.parent / "store", workers=1).store
    assert store is not None
    return store


def test_named_columns_travel_from_the_table_to_the_cases_of_the_store(tmp_path: Path, images: Path) -> None:
    text = "case_id,subject_id,malignant,age,name\na,s1,yes,61,X\nb,s2, no ,,Y\nc,s3,,40,Z\n"
    cohort = _scanned(images, _table(tmp_path / "t.csv", text), columns=["malignant", "age"])
    with cohort.with_name("facts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"case_id": "a", "malignant": "yes", "age": "61"},
        {"case_id": "b", "malignant": "no", "age": ""},
        {"case_id": "c", "malignant": "", "age": "40"},
    ]
    store = _prepared(cohort)
    assert [dict(case.facts) for case in store.cases] == [
        {"malignant": "yes", "age": "61"}, {"malignant": "no"}, {"age": "40"},
    ]  # fmt: skip
    assert store.fact_columns == ("malignant", "age")


def test_facts_are_part_of_the_fingerprint_and_a_store_without_them_keeps_its_own(tmp_path: Path, images: Path) -> None:
    bare = _scanned(images, _table(tmp_path / "t.csv", "case_id,subject_id,y\na,s1,1\nb,s2,2\nc,s3,3\n"))
    plain = _prepared(bare).fingerprint
    first = _prepared(_scanned(images, tmp_path / "t.csv", columns=["y"])).fingerprint
    _table(tmp_path / "t.csv", "case_id,subject_id,y\na,s1,1\nb,s2,2\nc,s3,4\n")
    second = _prepared(_scanned(images, tmp_path / "t.csv", columns=["y"])).fingerprint
    assert len({plain, first, second}) == 3
    (bare.with_name("facts.csv")).unlink()
    again = _prepared(bare)
    assert again.fingerprint == plain
    assert again.cases[0].facts == {}
    assert not (tmp_path / "store" / "facts.csv").exists()


def test_hashed_names_are_those_of_the_cohort(tmp_path: Path, images: Path) -> None:
    table = _table(
        tmp_path / "t.csv", "case_id,subject_id,image,grade\na,s1,images/a.nii.gz,2\nb,s2,images/b.nii.gz,3\n"
    )
    config = ScanConfig.parse({"columns": ["grade"], "workers": 1, "thumbnails": False})
    cohort = scan(table, tmp_path / "cohort", config=config).path
    assert [case.facts["grade"] for case in _prepared(cohort).cases] == ["2", "3"]


def test_a_damaged_table_in_the_store_is_found(tmp_path: Path, images: Path) -> None:
    cohort = _scanned(images, _table(tmp_path / "t.csv", "case_id,subject_id,y\na,s1,1\n"), columns=["y"])
    store = _prepared(cohort).path
    (store / "facts.csv").write_text("case_id,y\na,2\n")
    with pytest.raises(CheckpointError, match=r"facts\.csv: is missing or not what was written"):
        ArrayStore.open(store)
    (store / "facts.csv").unlink()
    with pytest.raises(CheckpointError, match="Run medssl prepare again"):
        ArrayStore.open(store)
    _prepared(cohort)
    assert ArrayStore.open(store).cases[0].facts == {"y": "1"}


def test_a_users_own_table_beside_a_cohort_is_taken_and_kept_by_a_scan_without_columns(
    tmp_path: Path, images: Path
) -> None:
    cohort = _scanned(images, _table(tmp_path / "t.csv", "case_id,subject_id\na,s1\nb,s2\nc,s3\n"))
    own = _table(cohort.with_name("facts.csv"), "case_id,subject_id,site\nb,s2,north\nz,s9,south\n")
    _scanned(images, tmp_path / "t.csv")
    assert own.read_text().startswith("case_id,subject_id,site")
    assert [dict(case.facts) for case in _prepared(cohort).cases] == [{}, {"site": "north"}, {}]


@pytest.mark.parametrize(
    ("text", "columns", "error", "message"),
    [
        ("case_id,y\na,1\n", ["z"], CaseError, "no column z"),
        ("case_id,y\na,1\na,2\n", ["y"], CaseError, "line 3: case_id a is there twice"),
        ("case_id,y\na,=1+1\n", ["y"], CaseError, "line 2: y is a formula"),
        ("case_id,y\na,1\n", ["split"], ConfigError, "columns split: the cohort has these already"),
    ],
)
def test_impossible_tables_and_columns_are_refused(
    tmp_path: Path, text: str, columns: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_facts(_table(tmp_path / "t.csv", text), columns)


def test_columns_without_a_table_are_refused(images: Path) -> None:
    with pytest.raises(ConfigError, match="there is no table to take them from"):
        scan(images, images.parent / "cohort", config=ScanConfig.parse({"columns": ["y"], "workers": 1}))


def test_rows_without_a_case_are_passed_over_and_what_is_written_is_read_back(tmp_path: Path) -> None:
    facts = read_facts(_table(tmp_path / "t.csv", 'case_id,y\n,9\na,"x, ""y"""\n'))
    assert facts.rows == {"a": {"y": 'x, "y"'}}
    digest = write_facts(tmp_path / "f.csv", facts, case_ids=["a"])
    back = read_facts(tmp_path / "f.csv")
    assert (back.rows, back.digest) == (facts.rows, digest)
    assert write_facts(tmp_path / "f.csv", Facts(), case_ids=["a"]) == ""
    assert read_facts(tmp_path / "f.csv") == Facts()
