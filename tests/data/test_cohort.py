from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from medssl.data.cohort import Case, Cohort, read_rows
from medssl.errors import CaseError, ConfigError, ReadError


def _cohort(count: int, *, per_subject: int = 2) -> Cohort:
    return Cohort(
        Case(case_id=f"c{i}", subject_id=f"s{i // per_subject}", image=f"/data/c{i}.nii.gz") for i in range(count)
    )


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    inside, outside = tmp_path / "scans" / "a, b\n.nii.gz", tmp_path.parent / "elsewhere" / "é.nii.gz"
    cohort = Cohort(
        [
            Case(case_id="a", subject_id="s", image=str(inside), label=str(outside), modality="MR", split="train"),
            Case(case_id="b", subject_id="t", image=str(outside)),
            Case(case_id="c", subject_id="t", image=str(tmp_path / "=1+1.nii")),
        ]
    )
    cohort.to_csv(tmp_path / "cohort.csv")
    assert Cohort.from_csv(tmp_path / "cohort.csv") == cohort
    text = (tmp_path / "cohort.csv").read_text()
    assert '"scans/a, b\n.nii.gz"' in text
    assert ",./=1+1.nii," in text
    assert str(outside) in text
    assert hash(cohort) == hash(Cohort.from_csv(tmp_path / "cohort.csv"))


def test_a_moved_folder_still_finds_its_images(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Cohort([Case(case_id="a", subject_id="a", image=str(tmp_path / "one/img/a.nii"))]).to_csv(tmp_path / "one/c.csv")
    (tmp_path / "one").rename(tmp_path / "two")
    assert Cohort.from_csv(tmp_path / "two/c.csv")[0].image == str(tmp_path / "two/img/a.nii")


def test_a_table_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"case_id,image\na,b\nc,\xff\n")
    with pytest.raises(CaseError, match="line 3: is not UTF-8"):
        Cohort.from_csv(tmp_path / "c.csv")


def test_parquet_holds_the_same_table(tmp_path: Path) -> None:
    cohort = _cohort(5).split_by_subject()
    cohort.to_csv(tmp_path / "c.csv")
    cohort.to_parquet(tmp_path / "c.parquet")
    csv = pd.read_csv(tmp_path / "c.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "c.parquet").astype(object), csv.astype(object))
    Cohort([]).to_parquet(tmp_path / "empty.parquet")
    assert pd.read_parquet(tmp_path / "empty.parquet").empty


def test_only_an_id_and_an_image_are_needed(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfcase_id,image\r\np1,a.nii\r\n\r\np2,b.nii\r\n")
    cohort = Cohort.from_csv(tmp_path / "c.csv")
    assert [(c.case_id, c.subject_id, c.split, c.label, c.modality) for c in cohort] == [
        ("p1", "p1", None, None, "other"),
        ("p2", "p2", None, None, "other"),
    ]
    assert [line for line, _ in read_rows(tmp_path / "c.csv")] == [2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id;image\na;b\n", "line 1: no column case_id, image; it seems to be separated by semicolons"),
        ("image\nb\n", "line 1: no column case_id"),
        ("", "line 1: no column"),
        ("case_id,image,subjct_id\na,b,c\n", "line 1: columns"),
        ("case_id,image,image\na,b,c\n", "line 1: columns"),
        ("case_id,image\na,b\na,c\n", "line 3: case_id a was used in line 2"),
        ("case_id,image\na,b,c\n", "line 2: 3 cells; the header has 2"),
        ("case_id,image\na,b\0\n", "line 2: a NUL byte"),
        ("case_id,image\n1E+05,b\n", "line 2: case_id '1E.05' was changed by a spreadsheet"),
        ("case_id,image,subject_id\na,b,3-Mar\n", "line 2: subject_id '3-Mar' was changed by a spreadsheet"),
        ("case_id,image,split\na,b,training\n", "line 2: case a: split"),
        ("case_id,image\n../x,b\n", "line 2: case ../x: case_id"),
        ("case_id,image\na,\n", "line 2: case a: image is missing"),
        ('case_id,image\na,"b\n', "line 2: unexpected end of data"),
    ],
)
def test_a_faulty_table_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(CaseError, match=message) as caught:
        Cohort.from_csv(tmp_path / "c.csv")
    assert caught.value.code == "E_TABLE"


def test_a_missing_table_is_a_read_error(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot be read"):
        Cohort.from_csv(tmp_path / "none.csv")


def test_a_subject_in_two_splits_is_refused() -> None:
    cases = [Case(case_id=f"{s}{i}", subject_id=s, image="x", split=i) for s in "ab" for i in ("train", "test")]
    with pytest.raises(
        CaseError, match=r"subject a \(and 1 more subjects\): is in the splits test and train"
    ) as caught:
        Cohort(cases)
    assert caught.value.code == "E_LEAK"


def test_an_id_is_unique() -> None:
    with pytest.raises(CaseError, match="case a: occurs twice"):
        Cohort([Case(case_id="a", subject_id=s, image="x") for s in "ab"])


def test_subjects_are_dealt_out_in_the_order_of_their_hash() -> None:
    cohort = _cohort(40).split_by_subject({"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    order = sorted((f"s{i}" for i in range(20)), key=lambda s: hashlib.sha256(f"3:{s}".encode()).hexdigest())
    expected = {s: "test" if i < 4 else "val" if i < 6 else "train" for i, s in enumerate(order)}
    assert {case.subject_id: case.split for case in cohort} == expected
    assert all(case.split == expected[case.subject_id] for case in cohort)


def test_neither_the_order_of_files_nor_a_second_scan_of_a_subject_moves_it() -> None:
    cohort = _cohort(30)
    more = Cohort([*reversed(list(cohort)), Case(case_id="new", subject_id="s3", image="x")])
    one, other = cohort.split_by_subject(), more.split_by_subject()
    assert {c.case_id: c.split for c in one} == {c.case_id: c.split for c in other if c.case_id != "new"}


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (6, (4, 1, 1))])
def test_each_split_gets_a_subject_while_there_are_enough(count: int, sizes: tuple[int, int, int]) -> None:
    cohort = _cohort(count, per_subject=1).split_by_subject()
    assert tuple(len(cohort.select(split=s)) for s in ("train", "val", "test")) == sizes


def test_a_split_may_be_left_out() -> None:
    cohort = _cohort(10, per_subject=1).split_by_subject({"train": 0.5, "test": 0.5})
    assert [len(cohort.select(split=s)) for s in ("train", "val", "test")] == [5, 0, 5]


@pytest.mark.parametrize("fractions", [{"train": 0.5}, {"train": 1.5, "val": -0.5}, {"training": 1.0}, {}])
def test_wrong_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="split fractions"):
        _cohort(4).split_by_subject(fractions)


def test_selection_and_slices_are_cohorts() -> None:
    cohort = Cohort(
        [
            Case(case_id="a", subject_id="a", image="x", label="y", split="train"),
            Case(case_id="b", subject_id="b", image="x", split="train"),
            Case(case_id="c", subject_id="c", image="x", split="test"),
        ]
    )
    assert [c.case_id for c in cohort.select(split="train", labelled=False)] == ["b"]
    assert [c.case_id for c in cohort.select(labelled=True)] == ["a"]
    assert isinstance(cohort[:2], Cohort)
    assert cohort[-1].case_id == "c"
    assert cohort != "cohort"
