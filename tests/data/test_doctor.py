"""The doctor: words, numbers and refusals of files and folders of every kind."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pytest
from phantoms import REAL_DATA, grid
from PIL import Image
from pydicom.uid import JPEG2000Lossless

from medssl import cli, explain
from medssl.cli import app, run_guarded
from medssl.data import doctor as module
from medssl.data.doctor import doctor
from medssl.data.reading import Reading
from medssl.errors import ExitCode, ReadError
from medssl.io import write_volume
from medssl.volume import Volume


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def run(*arguments: object) -> int:
    return int(run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False)))


def test_a_series_is_told_in_words_and_numbers(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, shape=(8, 10, 6), spacing=(0.8, 0.5, 2.0), modality="CT")
    found = doctor(tmp_path)
    (finding,) = found.of("image")
    assert (finding.format, finding.files, finding.volumes) == ("dicom", 6, ())
    assert finding.geometry is not None
    assert finding.geometry.isclose(dicoms.series_geometry((8, 10, 6), spacing=(0.8, 0.5, 2.0)))
    assert finding.values is not None
    assert (finding.values.unit, finding.values.minimum, finding.values.maximum) == ("HU", -1024.0, 479 - 1024.0)
    assert found.exit_code() == ExitCode.OK
    text = found.text()
    for words in (
        "6 slices, sorted by their position along the normal of the slices, 2 mm apart",
        "axial slices from feet to head, 10 x 8 x 6 voxels of 0.5 x 0.8 x 2 mm",
        "covers 5 x 6.4 x 12 mm; array axes point to LPS; first voxel at (12.00, -7.00, 30.00) mm",
        "values in HU (int16): -1024 to -545",
        "modality CT",
    ):
        assert words in text
    assert not any(value in text for value in dicoms.CANARIES.values())


def test_percentiles_are_those_of_the_voxels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(30, 20, 10)).astype(np.float32)
    finding = doctor(nifti(tmp_path / "a.nii.gz", array)).findings[0]
    assert finding.values is not None
    np.testing.assert_allclose(finding.values.percentiles, np.percentile(array, (1, 50, 99)), rtol=1e-6)
    assert (finding.values.minimum, finding.values.maximum) == (array.min(), array.max())
    assert finding.format == "nifti1"


def test_a_tilted_gantry_is_named_with_its_angle(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, tilt_deg=12.0)
    text = doctor(tmp_path).text()
    assert "tilted by 12.0 degrees" in text
    assert "2 mm apart" in text  # along the normal, not along the tilted stack
    assert "W_TILT" in text
    assert f"what it means: {explain.meaning('W_TILT')}" in text


def test_a_missing_slice_is_refused_with_meaning_and_remedy(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, mutate=lambda slices: slices[:2] + slices[3:])
    found = doctor(tmp_path)
    (finding,) = found.findings
    assert (finding.kind, finding.code, finding.files) == ("refused", "E_MISSING_SLICE", 5)
    assert found.exit_code() == ExitCode.NO_INPUT
    text = found.text()
    assert explain.meaning("E_MISSING_SLICE") in text
    assert explain.remedy("E_MISSING_SLICE") in text
    mended = doctor(tmp_path, reading=Reading(regularise=True))
    assert mended.of("image")[0].order.endswith("1 more is interpolated")
    assert mended.exit_code() == ExitCode.OK


def test_several_volumes_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    path = dicoms.write_enhanced(tmp_path / "a", volumes=3)
    first = doctor(path).findings[0]
    assert len(first.volumes) == 3
    third = doctor(path, reading=Reading(volume=2)).findings[0]
    assert first.values is not None
    assert third.values is not None
    assert first.values.maximum == 479.0
    assert third.values.maximum == (479 + 2) * 3
    assert "3 volumes" in doctor(path).text()
    assert f"2: {first.volumes[2]}" in doctor(path).text()


def test_a_time_series_of_nifti_shows_its_first_volume(tmp_path: Path) -> None:
    array = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
    finding = doctor(nifti(tmp_path / "a.nii.gz", array)).findings[0]
    assert finding.volumes == ("volume 0", "volume 1", "volume 2")
    assert finding.values is not None
    assert finding.values.maximum == array[..., 0].max()


def test_a_long_clip_lists_its_first_frames_only(tmp_path: Path) -> None:
    text = doctor(dicoms.write_clip(tmp_path / "clip", frames=20)).text()
    assert "20 volumes" in text
    assert "and 4 more" in text
    assert "one picture, nothing to sort" in text


def test_a_mixed_folder_tells_images_refusals_and_the_rest_apart(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "ct")
    nifti(tmp_path / "good.nii.gz", np.zeros((4, 4, 4), np.int16))
    whole = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:-10])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    found = doctor(tmp_path)
    assert [len(found.of(kind)) for kind in ("image", "label", "refused", "ignored")] == [2, 0, 1, 2]
    assert found.of("refused")[0].code == "E_TRUNCATED"
    assert found.exit_code() == ExitCode.SOME_REJECTED
    text = found.text()
    assert text.startswith(f"{tmp_path}: 2 to read, 1 refused, 2 ignored")
    assert "ignored, hidden file:\n" in text
    assert "notes.txt" in text


def test_segmentations_and_other_objects_beside_a_series(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "ct")
    report = dicoms.write_2d(tmp_path / "sr", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    found = doctor(tmp_path)
    assert [finding.name for finding in found.of("ignored")] == [str(report)]
    assert doctor(report).of("refused")[0].code == "E_NOT_IMAGE"


def test_a_segmentation_beside_its_series_is_named_as_a_label(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "ct")
    path = dicoms.write_2d(
        tmp_path / "seg", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", Modality="SEG", SegmentationType="BINARY"
    )
    (label,) = doctor(tmp_path).of("label")
    assert label.name == str(path)
    assert "--label --on IMAGE" in doctor(tmp_path).text()


def test_a_copy_of_a_slice_is_named(tmp_path: Path) -> None:
    paths = dicoms.write_series(tmp_path)
    (tmp_path / "copy").write_bytes(paths[0].read_bytes())
    ignored = doctor(tmp_path).of("ignored")
    assert [finding.reason.split(" of ")[0] for finding in ignored] == ["a copy"]


def test_an_archive_is_looked_into_and_its_members_keep_their_names(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "ct", mutate=lambda slices: slices[:2] + slices[3:])
    nifti(tmp_path / "b.nii.gz", np.zeros((4, 4, 4), np.int16))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "ct").iterdir()):
            archive.write(path, f"ct/{path.name}")
        archive.write(tmp_path / "b.nii.gz", "b.nii.gz")
        archive.writestr("readme.txt", "hello")
    found = doctor(tmp_path / "all.zip")
    assert [len(found.of(kind)) for kind in ("image", "refused", "ignored")] == [1, 1, 1]
    text = found.text()
    assert "b.nii.gz" in found.of("image")[0].name
    assert "readme.txt" in found.of("ignored")[0].name
    assert "medssl-doctor-" not in text


def test_a_label_map_has_its_values_listed(tmp_path: Path) -> None:
    array = np.zeros((6, 6, 6), np.uint8)
    array[1:3], array[4] = 1, 7
    path = nifti(tmp_path / "a_seg.nii.gz", array)
    found = doctor(path, label=True)
    assert found.findings[0].kind == "label"
    assert "label map of uint8: values 1, 7" in found.text()
    empty = doctor(nifti(tmp_path / "b_seg.nii.gz", array * 0), label=True)
    assert "none but background" in empty.text()
    wrong = doctor(nifti(tmp_path / "c_seg.nii.gz", array + 0.5), label=True)
    assert wrong.findings[0].code == "E_LABEL_VALUE"


def test_a_label_map_is_held_against_its_image(tmp_path: Path) -> None:
    label = nifti(tmp_path / "a_seg.nii.gz", np.ones((6, 6, 6), np.uint8))
    image = nifti(tmp_path / "a.nii.gz", np.zeros((6, 6, 6), np.int16))
    turned = nifti(
        tmp_path / "turned.nii.gz",
        np.zeros((6, 6, 6), np.int16),
        np.array([[-1.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    larger = nifti(tmp_path / "larger.nii.gz", np.zeros((6, 6, 7), np.int16))
    moved = nifti(tmp_path / "moved.nii.gz", np.zeros((6, 6, 6), np.int16), np.eye(4) + np.eye(4, k=3))
    for on in (image, turned):
        assert doctor(label, label=True, on=on).exit_code() == ExitCode.OK
    assert doctor(label, label=True, on=larger).findings[0].code == "E_SHAPE"
    assert doctor(label, label=True, on=moved).findings[0].code == "E_GEOMETRY"


def test_warnings_are_explained_and_a_remedy_only_where_there_is_one(tmp_path: Path) -> None:
    volume = Volume(np.ones((1, 6, 6, 6), np.int16), grid((6, 6, 6)), "arbitrary")
    write_volume(volume, tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "a.nii")
    text = doctor(tmp_path / "a.nii").text()
    assert "W_EXTENSION" in text
    assert f"what to do: {explain.remedy('W_EXTENSION')}" in text
    assert explain.NOTHING not in text


def test_many_images_take_a_line_each_and_each_code_is_explained_once(tmp_path: Path) -> None:
    for number in range(50):
        dicoms.write_2d(tmp_path / str(number), series=f"s{number}", modality="CR", PixelSpacing=None)
    (tmp_path / "cut.nii.gz").write_bytes(b"\x1f\x8b")
    found = doctor(tmp_path)
    lines = found.text().splitlines()
    assert lines[0] == f"{tmp_path}: 50 to read, 1 refused, 0 ignored"
    assert len(lines) < 70
    assert "  and 10 more" in lines
    codes = {warning.partition(":")[0] for finding in found.findings for warning in finding.warnings}
    assert codes
    for code in codes | {"E_TRUNCATED"}:
        assert found.text().count(explain.meaning(code)) == 1
    assert len(found.text(in_full=True).splitlines()) > 200
    assert run("doctor", tmp_path, "--all") == 3


def test_a_file_that_its_name_hides_is_told_by_its_content(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), np.int16)).rename(tmp_path / "a copy")
    (tmp_path / "b.dcm").touch()
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "x.json").write_text('{"medssl_series_list":1}')
    found = doctor(tmp_path)
    assert [(Path(finding.name).name, finding.code) for finding in found.of("refused")] == [("b.dcm", "E_EMPTY")]
    reasons = {Path(finding.name).name: finding.reason for finding in found.of("ignored")}
    assert reasons["a copy"].startswith("nifti by its content, but not by its name")
    assert reasons["x.json"] == "a list that a scan wrote"
    assert reasons["Thumbs.db"].startswith("no image")


def test_a_picture_without_a_place_has_no_matrix(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    text = doctor(tmp_path / "a.png").text()
    assert "no position in the patient is known" in text
    assert "voxel index to mm" not in text


def test_many_images_are_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_READ", 2)
    for number in range(4):
        nifti(tmp_path / f"{number}.nii", np.full((3, 3, 3), number, np.int16))
        dicoms.write_series(tmp_path / str(number), series=f"s{number}")
    found = doctor(tmp_path)
    read = [finding for finding in found.of("image") if finding.values is not None]
    assert len(read) == 4
    assert len(found.of("image")) == 6
    assert all(finding.geometry is not None for finding in found.of("image"))
    assert len(found.of("unread")) == 2
    assert found.of("ignored") == ()
    assert "2 not looked at" in found.text().splitlines()[0]
    assert "not looked at; the first 2 images were, and a scan looks at all:" in found.text()


def test_pixels_that_cannot_be_read_refuse_the_item_by_its_own_name(tmp_path: Path) -> None:
    paths = dicoms.write_series(tmp_path / "a", syntax=JPEG2000Lossless)
    data = paths[0].read_bytes()
    start = data.index(b"\xff\x4f\xff\x51")  # the head of the code stream
    paths[0].write_bytes(data[: start + 4] + b"\xff" * 40 + data[start + 44 :])
    dicoms.write_series(tmp_path / "b", series="other")
    found = doctor(tmp_path)
    assert [finding.code for finding in found.of("refused")] == ["E_CODEC_DATA"]
    assert str(tmp_path / "a") in found.of("refused")[0].reason
    assert "medssl-doctor-" not in found.text()


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no such file or folder") as caught:
        doctor(tmp_path / "nothing")
    assert caught.value.code == "E_MISSING"
    (tmp_path / "empty").mkdir()
    assert doctor(tmp_path / "empty").exit_code() == ExitCode.NO_INPUT


def test_the_command_prints_text_or_json_and_ends_with_the_right_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    assert run("doctor", path) == 0
    assert "axial slices from feet to head" in capsys.readouterr().out
    assert run("doctor", path, "--json") == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["geometry"]["shape"] == [2, 3, 4]
    assert finding["geometry"]["extent_mm"] == [2.0, 3.0, 4.0]
    assert finding["values"]["maximum"] == 23.0
    assert "code" not in finding
    path.write_bytes(path.read_bytes()[:-9])
    assert run("doctor", path, "--json") == 4
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["remedy"] == explain.remedy(finding["code"])
    assert run("doctor", tmp_path / "gone") == 4
    assert "E_MISSING" in capsys.readouterr().err


def test_options_of_reading_reach_the_reader() -> None:
    given = cli._reading("3", ["pages=stack"], regularise=True, xform="qform", assume_spacing_mm=(1.0, 2.0, 3.0))
    assert given == Reading(volume=3, pages="stack", regularise=True, xform="qform", assume_spacing_mm=(1.0, 2.0, 3.0))
    assert cli._reading("channels", None).volume == "channels"
    assert cli._reading(None, None) == Reading()
    assert run("doctor", ".", "--volume", "some") == 2


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real data here")
@pytest.mark.parametrize("family", ["prostatex_0000/t2_tra", "siemens_fmri_mosaic", "slice_missing_siemens/failing"])
def test_real_series_have_a_diagnosis(family: str) -> None:
    found = doctor(REAL_DATA / "dicom_series" / family)
    assert found.findings
    is_cut = "missing" in family
    assert bool(found.of("refused")) == is_cut
    assert "medssl-doctor-" not in found.text()
