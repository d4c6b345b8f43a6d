"""Convert: the volume that is written is the one that was read, voxel for voxel and corner for corner."""

from __future__ import annotations

import zipfile
from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medssl.cli import app, run_guarded
from medssl.data.convert import convert, read_first
from medssl.data.reading import Reading
from medssl.errors import CaseError, ConfigError, ReadError
from medssl.geometry import Geometry


def run(*arguments: object) -> int:
    return int(run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False)))


@pytest.mark.parametrize("tilt_deg", [0.0, 15.0])
def test_a_series_becomes_a_nifti_file_on_its_own_grid(tmp_path: Path, tilt_deg: float) -> None:
    dicoms.write_series(tmp_path / "ct", tilt_deg=tilt_deg)
    assert convert(tmp_path / "ct", tmp_path / "ct.nii.gz") == [tmp_path / "ct.nii.gz"]
    written = nib.load(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), dicoms.series_values().astype(int) - 1024)
    expected = dicoms.series_geometry(tilt_deg=tilt_deg)
    assert Geometry(written.shape, written.affine).isclose(expected)
    assert not any(canary.encode() in (tmp_path / "ct.nii.gz").read_bytes() for canary in dicoms.CANARIES.values())


def test_other_formats_by_the_ending(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "ct")
    for name in ("a.mha", "a.nrrd", "a.nii"):
        convert(tmp_path / "ct", tmp_path / name)
        image = sitk.ReadImage(str(tmp_path / name))
        assert image.GetSpacing() == pytest.approx((0.5, 0.8, 2.0))
        assert sitk.GetArrayFromImage(image).max() == 479 - 1024
    with pytest.raises(ReadError) as caught:
        convert(tmp_path / "ct", tmp_path / "a.png")
    assert caught.value.code == "E_FORMAT"


def test_all_volumes_go_to_a_folder(tmp_path: Path) -> None:
    path = dicoms.write_enhanced(tmp_path / "a", volumes=3)
    targets = convert(path, tmp_path / "out")
    assert [target.name for target in targets] == ["volume_000.nii.gz", "volume_001.nii.gz", "volume_002.nii.gz"]
    for number, target in enumerate(targets):
        values = np.asarray(nib.load(target).dataobj)
        np.testing.assert_array_equal(values, (dicoms.series_values().astype(int) + number) * (1 + number))


def test_one_of_several_volumes_must_be_chosen_for_one_file(tmp_path: Path) -> None:
    path = dicoms.write_enhanced(tmp_path / "a", volumes=2)
    with pytest.raises(CaseError) as caught:
        convert(path, tmp_path / "a.nii.gz")
    assert caught.value.code == "E_SEVERAL"
    convert(path, tmp_path / "a.nii.gz", reading=Reading(volume=1))
    assert np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj).max() == 480 * 2
    assert convert(path, tmp_path / "one", reading=Reading(volume=1)) == [tmp_path / "one" / "volume_000.nii.gz"]


def test_volumes_of_a_nifti_series_keep_its_grid(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 2.0, 5], [-1, 0, 0, 6], [0, 1.5, 0, 7], [0, 0, 0, 1]])
    array = np.arange(4 * 5 * 6 * 2, dtype=np.int16).reshape(4, 5, 6, 2)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    for number, target in enumerate(convert(tmp_path / "a.nii.gz", tmp_path / "out")):
        written = nib.load(target)
        np.testing.assert_array_equal(np.asarray(written.dataobj), array[..., number])
        np.testing.assert_allclose(written.affine, affine, atol=1e-6)


def test_colours_go_to_mha_and_an_archive_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(tmp_path / "a.png")
    assert convert(tmp_path / "a.png", tmp_path / "out") == [tmp_path / "out" / "volume_000.mha"]
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "volume_000.mha"))).size == 60
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    with pytest.raises(ReadError, match="is an archive"):
        convert(tmp_path / "a.zip", tmp_path / "b.nii.gz")


def test_a_label_map_keeps_whole_numbers(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4))
    array[1] = 3
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    assert run("convert", tmp_path / "a.nii.gz", "-o", tmp_path / "b.nii.gz", "--label") == 0
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.uint8
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4)), tmp_path / "image.nii.gz")
    given = ("--label", "--on", tmp_path / "image.nii.gz")
    assert run("convert", tmp_path / "a.nii.gz", "-o", tmp_path / "c.nii.gz", *given) == 0


def test_nothing_is_overwritten_by_its_own_copy_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    before = (tmp_path / "a.nii.gz").read_bytes()
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    assert caught.value.code == "E_OVERWRITE"
    assert (tmp_path / "a.nii.gz").read_bytes() == before
    assert convert(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", dry_run=True) == [tmp_path / "b.nii.gz"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dicoms.write_series(tmp_path / "ct", mutate=lambda slices: slices[:2] + slices[3:])
    assert run("convert", tmp_path / "ct", "-o", tmp_path / "a.nii.gz") == 4
    assert "E_MISSING_SLICE" in capsys.readouterr().err
    assert not (tmp_path / "a.nii.gz").exists()
    assert run("convert", tmp_path / "ct", "-o", tmp_path / "a.nii.gz", "--regularise") == 0
    assert f"wrote {tmp_path / 'a.nii.gz'}" in capsys.readouterr().out
    assert nib.load(tmp_path / "a.nii.gz").shape == (10, 8, 6)


def test_other_faults_are_not_taken_for_several_volumes(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ReadError):
        read_first(tmp_path / "a.nii.gz")
