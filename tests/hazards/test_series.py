"""Rows of the hazard catalogue on DICOM series and their geometry (B.4), through the functions that users call."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import dicoms
import numpy as np
import pytest
from faulty_series import FAULTS
from pydicom.dataset import Dataset

from medssl import MedSSLError, doctor, read_volume, scan
from medssl.data.scan import ScanConfig
from medssl.ledger import Outcome


def code_of(path: Path, **options: object) -> str:
    try:
        read_volume(path, **options)  # type: ignore[arg-type]
    except MedSSLError as error:
        return "a name is told" if any(name in error.message for name in dicoms.CANARIES.values()) else error.code
    return ""


@pytest.mark.parametrize("name", FAULTS)
def test_every_faulty_series_ends_for_its_reader_as_required(name: str, tmp_path: Path) -> None:
    outcome = FAULTS[name].outcome
    FAULTS[name].build(tmp_path)
    count = sum(outcome.stacks)
    refused = set(outcome.refused.split())
    code = code_of(tmp_path, volume=max(0, count - 1))
    if refused - {"E_NOT_IMAGE"} and code:
        assert code in refused
        return
    assert (code, refused - {"E_NOT_IMAGE"}) == ("", set()) or count > 0
    if count > 1:
        assert code_of(tmp_path) == "E_SEVERAL"
        assert code_of(tmp_path, volume=count) == "E_VOLUME"
    volume, source = read_volume(tmp_path, volume=count - 1)
    assert source.volumes == count
    if outcome.geometry is not None:
        assert volume.geometry.max_corner_distance_mm(outcome.geometry) <= outcome.within_mm
    for code in filter(None, (outcome.warning, outcome.note)):
        assert any(said.startswith(code) for said in source.warnings)


@pytest.mark.parametrize("name", ["one slice missing", "distances of 2 and 5 mm", "two patients in one series"])
def test_g01_g03_g21_the_doctor_and_the_scan_refuse_as_the_reader_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    FAULTS[name].build(tmp_path / "d")
    code = FAULTS[name].outcome.refused
    assert {finding.code for finding in doctor(tmp_path / "d").findings} == {code}
    dicoms.write_series(tmp_path / "d/good", series="good", patient="other", origin=(0.0, 0.0, 0.0))
    result = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig.parse({"workers": 1}))
    assert {entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED} == {code}
    assert len(result.cohort) == 1
    assert result.ledger.counts()["seen"] == sum(result.ledger.count(outcome) for outcome in Outcome)


def test_g01_g03_regularising_keeps_every_slice_at_its_true_place(tmp_path: Path) -> None:
    """Stored values count by 80 a slice, and so are linear along the normal wherever a slice lies."""

    def uneven(found: list[Dataset]) -> list[Dataset]:
        heights = [0.0, 2, 4, 6, 11, 16]
        for ds, height in zip(found, heights, strict=True):
            ds.ImagePositionPatient = [-12.0, 7.0, 30.0 + height]
            dicoms.set_pixels(ds, np.full((8, 10), int(1000 + 10 * height), np.uint16))
        return found

    dicoms.write_series(tmp_path, mutate=uneven)
    assert code_of(tmp_path) == "E_NONUNIFORM"
    volume, source = read_volume(tmp_path, regularise=True)
    z = volume.geometry.origin_mm[2] + np.arange(volume.geometry.shape[2]) * volume.geometry.spacing_mm[2]
    inside = z <= 46 + 1e-6
    assert inside.sum() >= 8
    assert np.allclose(volume.array[0, 0, 0, inside], 1000 + 10 * (z[inside] - 30) - 1024, atol=1)
    assert any(said.startswith("W_REGULARISED") for said in source.warnings)


@pytest.mark.parametrize("angle", [5.0, 15.0, 30.0, -20.0])
def test_g04_a_tilted_ball_is_round_and_in_its_place(tmp_path: Path, angle: float) -> None:
    shape, centre = (60, 64, 30), np.array([-4.0, 3.0, 15.0])
    geometry = dicoms.series_geometry(shape, spacing=(1.0, 1.0, 1.5), origin=(-32.0, -30.0, -8.0), tilt_deg=angle)
    ijk = np.stack(np.indices(geometry.shape), axis=-1)
    world = ijk @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
    ball = np.linalg.norm(world - centre, axis=-1) <= 10

    def paint(found: list[Dataset]) -> None:
        for k, ds in enumerate(found):
            dicoms.set_pixels(ds, ball[:, :, k].T.astype(np.uint16) * 100)

    dicoms.write_series(
        tmp_path, shape=shape, spacing=(1.0, 1.0, 1.5), origin=(-32.0, -30.0, -8.0), tilt_deg=angle, mutate=paint
    )
    volume, source = read_volume(tmp_path)
    inside = np.argwhere(volume.array[0] > -1000)
    places = inside @ volume.geometry.affine[:3, :3].T + volume.geometry.affine[:3, 3]
    assert np.abs(places.mean(axis=0) - centre).max() < 0.1
    assert np.linalg.norm(places - centre, axis=1).max() <= 10 + 1e-6
    assert any(f"{abs(angle):.2f} degrees" in said for said in source.warnings if said.startswith("W_TILT"))


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("angle", [1, 44, 45, 46, 89])
def test_g05_oblique_from_1_to_89_degrees_about_each_axis(tmp_path: Path, axis: tuple[int, ...], angle: int) -> None:
    orientation = dicoms.rotated(dicoms.AXIAL, axis, angle)
    dicoms.write_series(tmp_path, orientation=orientation)
    volume, _ = read_volume(tmp_path)
    assert volume.geometry.isclose(dicoms.series_geometry(orientation=orientation), atol_mm=1e-3)
    assert np.allclose(volume.geometry.spacing_mm, (0.5, 0.8, 2.0), atol=1e-6)


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFS", "FFP", "HFDL", "HFDR", "FFDL", "FFDR", ""])
def test_g18_how_the_patient_lay_moves_no_voxel(tmp_path: Path, position: str) -> None:
    def lying(found: list[Dataset]) -> None:
        for ds in found:
            ds.PatientPosition = position

    dicoms.write_series(tmp_path, mutate=lying)
    assert read_volume(tmp_path)[0].geometry.isclose(dicoms.series_geometry())


def test_g08_two_series_of_a_folder_are_two_cases_and_never_one_volume(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "d", series="a")
    dicoms.write_series(tmp_path / "d", series="b", origin=(-12.0, 7.0, 42.0))  # goes on where the first ends
    assert code_of(tmp_path / "d") == "E_SEVERAL"
    result = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig.parse({"workers": 1}))
    assert sorted(read_volume(Path(case.image))[0].geometry.shape for case in result.cohort) == [(10, 8, 6)] * 2


def test_g23_many_slices_take_no_more_than_one_and_a_half_volumes(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, shape=(192, 192, 160), modality="MR", slope=None)
    read_volume(tmp_path)  # imports
    tracemalloc.start()
    volume, _ = read_volume(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.5 * volume.array.nbytes


@pytest.mark.slow
def test_g23_a_folder_of_20000_files_is_looked_through(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "d", shape=(16, 16, 4000), spacing=(0.8, 0.5, 0.5), modality="MR", slope=None)
    for number in range(16_000):
        (tmp_path / f"d/note{number}").write_bytes(b"no image " * 30)
    started = time.monotonic()
    result = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig.parse({"workers": 2}))
    assert time.monotonic() - started < 120
    (case,) = result.cohort
    assert read_volume(Path(case.image))[0].geometry.shape == (16, 16, 4000)
    assert result.ledger.count(Outcome.IGNORED) == 16_000
