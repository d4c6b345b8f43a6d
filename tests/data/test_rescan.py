"""Scans into a folder that an earlier scan has used, was killed in, or is using."""

from __future__ import annotations

import os
from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pytest

from medssl.data import listing, scan, series
from medssl.data.scan import ScanConfig, ScanResult
from medssl.errors import LockedError, MedSSLError
from medssl.ledger import Outcome
from medssl.runfolder import RunFolder


def _scan(data: Path, out: Path, **options: object) -> ScanResult:
    return scan.scan(data, out, config=ScanConfig.parse({"workers": 1, **options}))


def _series(folder: Path, number: int) -> list[Path]:
    return dicoms.write_series(folder, series=str(number), patient=str(number), origin=(float(number), 0.0, 0.0))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_first_scan_that_was_killed_is_continued_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _series(tmp_path / "d", 0)
    with monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(scan, "examine_all", killed)
        with pytest.raises(KeyboardInterrupt):
            _scan(tmp_path / "d", tmp_path / "out")
    monkeypatch.setattr(series, "_look", lambda *_, **__: pytest.fail("a file was opened again"))
    assert len(_scan(tmp_path / "d", tmp_path / "out").cohort) == 1


def test_a_file_that_grew_while_it_was_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _series(tmp_path / "d", 0)
    content = whole[0].read_bytes()
    whole[0].write_bytes(content[:-20])
    real = series._look

    def slow(path: Path, *, key: bytes) -> series.Looked:
        found = real(path, key=key)
        if path == whole[0]:
            path.write_bytes(content)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(series, "_look", slow)
        first = _scan(tmp_path / "d", tmp_path / "out")
    assert "E_PIXEL_LENGTH" in {entry.code for entry in first.ledger}
    assert _scan(tmp_path / "d", tmp_path / "out").ledger.counts()["rejected"] == 0


def test_two_scans_do_not_write_one_folder_at_once(tmp_path: Path) -> None:
    _series(tmp_path / "d", 0)
    with RunFolder(tmp_path / "out"):
        with pytest.raises(LockedError):
            _scan(tmp_path / "d", tmp_path / "out")
        config = ScanConfig(workers=1)
        assert len(scan.scan(tmp_path / "d", tmp_path / "out", config=config, dry_run=True).cohort) == 1
        assert _names(tmp_path / "out") == {".lock"}


def test_what_belongs_to_cases_that_are_gone_goes_too(tmp_path: Path) -> None:
    files = [_series(tmp_path / "d" / str(number), number) for number in range(2)]
    _scan(tmp_path / "d", tmp_path / "out")
    assert len(_names(tmp_path / "out/thumbnails")) == len(_names(tmp_path / "out/series")) == 2
    first = {case.case_id: case.split for case in _scan(tmp_path / "d", tmp_path / "out").cohort}
    for file in files[0]:
        file.unlink()
    left = _scan(tmp_path / "d", tmp_path / "out").cohort
    assert {case.case_id for case in left} < set(first)
    assert _names(tmp_path / "out/thumbnails") == {f"{case.case_id}.png" for case in left}
    assert _names(tmp_path / "out/series") == {Path(case.image).name for case in left}
    _scan(tmp_path / "d", tmp_path / "out/other.csv")
    _series(tmp_path / "e", 2)
    _scan(tmp_path / "e", tmp_path / "out")
    assert len(_names(tmp_path / "out/series")) == 2, "the other table needs its list"


def test_renamed_files_keep_the_names_of_their_case(tmp_path: Path) -> None:
    files = _series(tmp_path / "d/before", 0)
    first = _scan(tmp_path / "d", tmp_path / "out")
    for number, file in enumerate(files):
        file.rename(tmp_path / "d" / f"{number:03d}.dcm")
    second = _scan(tmp_path / "d", tmp_path / "out")
    assert [(case.case_id, case.subject_id, case.split) for case in second.cohort] == [
        (case.case_id, case.subject_id, case.split) for case in first.cohort
    ]


def test_the_files_of_a_scan_are_no_part_of_the_next(tmp_path: Path) -> None:
    _series(tmp_path / "d/a", 0)
    counts = [_scan(tmp_path / "d", tmp_path / "d").ledger.counts() for _ in range(2)]
    assert counts[0] == counts[1]
    assert counts[0]["ignored"] == 0


def _four_dimensional(path: Path, volumes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(volumes).integers(0, 99, (5, 6, 7, volumes)).astype(np.int16)
    nib.save(nib.Nifti1Image(values.squeeze(), np.eye(4)), path)
    return path


def test_volumes_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _four_dimensional(tmp_path / "d/a.nii.gz", 3)
    first = _scan(tmp_path / "d", tmp_path / "out", volumes="all")
    assert [case.reading.volume for case in first.cohort] == [0, 1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_count_volumes", lambda _: pytest.fail("counted again"))
        assert _scan(tmp_path / "d", tmp_path / "out", volumes="all").cohort == first.cohort
    _four_dimensional(path, 2)
    assert len(_scan(tmp_path / "d", tmp_path / "out", volumes="all").cohort) == 2


def test_a_volume_and_a_file_of_one_name_are_refused(tmp_path: Path) -> None:
    _four_dimensional(tmp_path / "d/a.nii.gz", 2)
    _four_dimensional(tmp_path / "d/a-001.nii.gz", 1)
    result = _scan(tmp_path / "d", tmp_path / "out", volumes="all", names="keep")
    assert [case.case_id for case in result.cohort] == ["a-000"]
    refused = {entry.item: entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED}
    assert refused == {"a-001.nii.gz": "E_NAME_CLASH", "a.nii.gz-001": "E_NAME_CLASH"}


def test_the_label_of_images_of_near_equal_names_is_booked(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "A.nii.gz", "a_seg.nii.gz"):
        _four_dimensional(tmp_path / "d" / name, 1)
    try:
        result = _scan(tmp_path / "d", tmp_path / "out")
    except MedSSLError as error:
        pytest.fail(error.message)
    assert {entry.item: entry.outcome for entry in result.ledger}["a_seg.nii.gz"] is Outcome.IGNORED
    assert result.ledger.counts()["seen"] == 3


@pytest.mark.parametrize("kind", ["dangling", "outside", "pipe", "folder"])
def test_odd_things_named_as_archives_cost_only_themselves(tmp_path: Path, kind: str) -> None:
    _series(tmp_path / "d/a", 0)
    path = tmp_path / "d/x.zip"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "d/nowhere.zip")
    else:
        (tmp_path / "out.zip").write_bytes(b"PK")
        path.symlink_to(tmp_path / "out.zip")
    result = _scan(tmp_path / "d", tmp_path / "out")
    assert len(result.cohort) == 1
    codes = {"dangling": ["E_MISSING"], "outside": ["E_LINK"], "pipe": ["E_NOT_REGULAR"], "folder": []}[kind]
    assert [entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED] == codes
