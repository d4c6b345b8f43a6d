from __future__ import annotations

from pathlib import Path

import dicoms
import numpy as np
import pytest

from medssl.data.cohort import Case, Cohort
from medssl.data.reading import Reading
from medssl.data.scan import ScanConfig, scan
from medssl.errors import CaseError, NoInputError
from medssl.evaluation.inputs import Job, plan
from medssl.evaluation.matching import match
from medssl.ledger import Ledger, Outcome


def _plan(inputs: Path | list[Path], out: Path) -> tuple[list[Job], Ledger]:
    ledger = Ledger()
    jobs = plan(inputs, out, ledger, unpack_to=out.with_name("room"))
    for job in jobs:
        ledger.accept(job.item)
    ledger.check()
    return jobs, ledger


def _clip(path: Path, frames: int) -> Path:
    return dicoms.write_clip(path, frames=frames)


def test_dicom_files_become_one_job_a_volume_named_by_their_series(tmp_path: Path) -> None:
    data, out = tmp_path / "d", tmp_path / "out"
    files = dicoms.write_series(data / "a", series="a")
    _clip(data / "clip", 3)
    (data / "notes").write_text("text")
    (data / "b.nii").write_bytes(b"")
    (data / "copy").write_bytes(files[0].read_bytes())
    jobs, ledger = _plan(data, out)
    assert [job.reading.volume for job in jobs] == [None, None, 0, 1, 2]
    whole, *frames = jobs[1:]
    assert whole.series is not None
    assert whole.target == out / f"{whole.series.name}.nii.gz"
    assert whole.path == out / "series" / f"{whole.series.name}.dicom.json"
    assert [frame.target.name[-11:] for frame in frames] == ["-000.nii.gz", "-001.nii.gz", "-002.nii.gz"]
    outcomes = {entry.item: entry.outcome for entry in ledger}
    assert outcomes["notes"] is Outcome.IGNORED
    assert outcomes["copy"] is Outcome.DUPLICATE or Outcome.DUPLICATE in outcomes.values()
    assert not out.exists()


def test_one_dicom_file_is_enough(tmp_path: Path) -> None:
    path = dicoms.write_enhanced(tmp_path / "x")
    (job,), _ = _plan(path, tmp_path / "out")
    assert job.series is not None
    assert len(job.series.stacks[0].frames) == 6


def test_what_dicom_refuses_is_booked(tmp_path: Path) -> None:
    data = tmp_path / "d"
    dicoms.write_series(data / "a", mutate=lambda found: found[:2] + found[3:])
    dicoms.write_series(data / "b", series="b")
    (data / "cut.dcm").write_bytes(b"")
    jobs, ledger = _plan(data, tmp_path / "out")
    assert len(jobs) == 1
    assert sorted(entry.code for entry in ledger if entry.outcome is Outcome.REJECTED) == ["E_EMPTY", "E_MISSING_SLICE"]


def test_a_table_gives_jobs_named_by_case_that_are_read_as_it_says(tmp_path: Path) -> None:
    cases = [
        Case(case_id="a", subject_id="s", image=str(tmp_path / "x.nii"), reading=Reading(volume=2)),
        Case(case_id="b", subject_id="s", image=str(tmp_path / "x.nii"), reading=Reading(volume=1)),
    ]
    Cohort(cases).to_csv(tmp_path / "c.csv")
    jobs, _ = _plan(tmp_path / "c.csv", tmp_path / "out")
    assert [(job.item, job.target.name, job.reading.volume) for job in jobs] == [
        ("a", "a.nii.gz", 2),
        ("b", "b.nii.gz", 1),
    ]


def test_a_series_list_of_a_scan_is_a_scan(tmp_path: Path) -> None:
    _clip(tmp_path / "d/clip", 3)
    scan(tmp_path / "d", tmp_path / "out", config=ScanConfig(workers=1))
    (path,) = (tmp_path / "out/series").iterdir()
    jobs, _ = _plan(path, tmp_path / "labels")
    assert [job.reading.volume for job in jobs] == [0, 1, 2]
    assert all(job.path == path for job in jobs)
    path.write_text("{")
    with pytest.raises(NoInputError):
        _plan(path, tmp_path / "labels")


def test_predictions_from_a_table_are_matched_by_case_and_others_by_image(tmp_path: Path) -> None:
    cases = [
        Case(case_id=f"case-{name}", subject_id=name, image=str(tmp_path / f"{name}.nii"), label=str(tmp_path / "l"))
        for name in "ab"
    ]
    Cohort(cases).to_csv(tmp_path / "c.csv")
    folder = tmp_path / "p"
    folder.mkdir()
    for name in ("case-a", "b"):
        (folder / f"{name}.nii.gz").write_bytes(b"")
    pairs = match(folder, tmp_path / "c.csv", Ledger())
    assert [(pair.case_id, pair.prediction.name) for pair in pairs] == [
        ("case-a", "case-a.nii.gz"),
        ("case-b", "b.nii.gz"),
    ]


def test_a_name_that_is_one_case_and_the_image_of_another_is_refused(tmp_path: Path) -> None:
    cases = [
        Case(case_id="a", subject_id="a", image=str(tmp_path / "b.nii"), label=str(tmp_path / "l")),
        Case(case_id="b", subject_id="b", image=str(tmp_path / "a.nii"), label=str(tmp_path / "l")),
    ]
    Cohort(cases).to_csv(tmp_path / "c.csv")
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.nii.gz").write_bytes(b"")
    with pytest.raises(CaseError) as error:
        match(tmp_path / "p", tmp_path / "c.csv", Ledger())
    assert error.value.code == "E_NAME_CLASH"


def test_pixels_do_not_matter_for_a_plan(tmp_path: Path) -> None:
    dicoms.write_2d(tmp_path / "d/x", modality="DX", pixels=np.zeros((4, 5), np.uint16))
    jobs, _ = _plan(tmp_path / "d", tmp_path / "out")
    assert len(jobs) == 1
