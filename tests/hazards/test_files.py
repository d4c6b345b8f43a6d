"""Rows of the hazard catalogue on single files (B.1 to B.3, B.5, B.9), through the functions that users call."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import dicoms
import nibabel
import numpy as np
import pydicom
import pytest
from phantoms import grid
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from medssl import MedSSLError, Volume, doctor, evaluate, read_volume, scan, write_volume
from medssl.data.scan import ScanConfig, ScanResult
from medssl.ledger import Outcome

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 3 4 5\nspace: RAS\nspace directions: (1,0,0) (0,2,0) (0,0,3)\n"
META = b"ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementSpacing = 1 2 3\nElementType = MET_SHORT\n"


def code_of(path: Path, **options: object) -> str:
    """Code of the refusal, which must name the file; ``""`` where it is read."""
    try:
        read_volume(path, **options)  # type: ignore[arg-type]
    except MedSSLError as error:
        return error.code if str(path) in error.message else f"{error.code}, and no file is named: {error.message}"
    return ""


def warned(path: Path, **options: object) -> set[str]:
    _, source = read_volume(path, **options)  # type: ignore[arg-type]
    return {said.partition(":")[0] for said in source.warnings}


def scanned(data: Path, **options: object) -> ScanResult:
    config = ScanConfig.parse({"workers": 1, "names": "keep", "thumbnails": False, **options})
    return scan(data, data.parent / f"{data.name}-out", config=config)


def outcomes(result: ScanResult) -> dict[str, tuple[Outcome, str]]:
    return {entry.item: (entry.outcome, entry.code) for entry in result.ledger}


def nifti(**fields: object) -> bytes:
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.set_xyzt_units("mm")
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    data = bytearray(image.to_bytes())
    header = np.frombuffer(data, nibabel.nifti1.header_dtype, count=1).copy()
    for name, value in fields.items():
        header[name][0] = value
    data[:348] = header.tobytes()
    return bytes(data)


def saved(folder: Path, data: bytes, name: str = "a.nii") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# ---- B.1 NIfTI


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.png", "a.dcm"])
def test_n10_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/zero")
    assert code_of(path) == "E_NOT_REGULAR"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert code_of(path) == "E_MISSING"
    path.unlink()
    os.mkfifo(path)
    assert code_of(path) == "E_NOT_REGULAR"
    path.unlink()
    path.mkdir()
    assert code_of(path) == "E_NOT_REGULAR"
    path.rmdir()
    path.touch()
    assert code_of(path) == "E_EMPTY"


def test_n10_a_file_of_another_owner_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, nifti())
    path.chmod(0)
    expected = "" if os.geteuid() == 0 else "E_PERMISSION"
    assert code_of(path) == expected


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf, -np.inf])
def test_n15_a_slope_that_is_none_scales_nothing_and_is_said(tmp_path: Path, slope: float) -> None:
    data = nifti(scl_slope=slope, scl_inter=5)
    for path in (saved(tmp_path, data), saved(tmp_path, gzip.compress(data), "b.nii.gz")):
        assert np.array_equal(read_volume(path)[0].array[0], VOXELS)
        assert warned(path) == {"W_SCALING"}


@pytest.mark.parametrize("code", [1792, 32, 1536, 2048, 1, 0])
def test_n23_types_that_are_no_real_numbers_are_refused(tmp_path: Path, code: int) -> None:
    assert code_of(saved(tmp_path, nifti(datatype=code))) == "E_DTYPE"


def test_n25_n26_what_a_header_says_beside_the_grid_is_dropped(tmp_path: Path) -> None:
    image = nibabel.Nifti2Image(VOXELS, AFFINE)
    image.header["descrip"] = b"Zzcanary"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Zzcanary"))
    volume, source = read_volume(saved(tmp_path, image.to_bytes()))
    assert (np.array_equal(volume.array[0], VOXELS), source.format) == (True, "nifti2")
    write_volume(volume, tmp_path / "b.nii", like=source)
    assert b"Zzcanary" not in (tmp_path / "b.nii").read_bytes() + repr(source).encode()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_n27_voxels_that_are_no_numbers_are_counted_or_refused(tmp_path: Path, value: float) -> None:
    array = np.random.default_rng(0).normal(size=(10, 10, 10)).astype(np.float32)
    array[:2, :5, :5] = value
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    volume, source = read_volume(tmp_path / "a.nii.gz")
    assert np.isfinite(volume.array).all()
    assert any(said.startswith("W_NONFINITE: 50 voxels") for said in source.warnings)
    assert code_of(tmp_path / "a.nii.gz", unit="label") in {"E_NONFINITE", "E_LABEL_VALUE"}
    array[:2] = value
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / "b.nii.gz")
    assert code_of(tmp_path / "b.nii.gz") == "E_NONFINITE"


@pytest.mark.parametrize("orientation", ["LPS", "LAS", "LIP", "RPI"])
@pytest.mark.parametrize("angle", [0.0, 0.01, 0.1, 0.5, 2.0])
def test_n17_the_rounding_of_a_quaternion_is_no_conflict(tmp_path: Path, orientation: str, angle: float) -> None:
    for axis in ((1.0, 2.0, 3.0), (-2.0, 0.3, 0.1), (0.2, -1.0, 0.7)):
        geometry = grid((512, 1, 300), spacing_mm=(0.8, 0.8, 1), orientation=orientation, axis=axis, angle_deg=angle)
        image = nibabel.Nifti1Image(np.zeros(geometry.shape, np.uint8), geometry.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(geometry.affine, 1)
        image.set_qform(geometry.affine, 1)
        nibabel.save(image, tmp_path / "a.nii")
        write_volume(Volume(np.zeros((1, *geometry.shape), np.uint8), geometry, "label"), tmp_path / "b.nii")
        for name in "ab":
            assert read_volume(tmp_path / f"{name}.nii")[0].geometry.isclose(geometry, atol_mm=1e-3)
        image.header["qoffset_x"] += 0.2
        nibabel.save(image, tmp_path / "c.nii")
        assert code_of(tmp_path / "c.nii") == "E_XFORM_CONFLICT"


# ---- B.2 MetaImage and NRRD


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "file:///etc/passwd", "LIST", "a%d.raw 1 2 1", "sub/a.raw"]
)
def test_m01_m02_a_header_reads_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    saved(tmp_path, VOXELS.tobytes(), "secret")
    saved(tmp_path / "d/sub", VOXELS.tobytes(), "a.raw")
    meta = META + f"ElementDataFile = {name}\n".encode()
    nrrd = NRRD + f"endian: little\nencoding: raw\ndata file: {name}\n".encode()
    assert code_of(saved(tmp_path / "d", meta, "a.mhd")) == "E_PATH"
    assert code_of(saved(tmp_path / "d", nrrd, "a.nhdr")) == "E_PATH"


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.nii.gz"])
def test_m12_a_bomb_stops_at_the_size_that_the_header_declares(tmp_path: Path, name: str) -> None:
    zeros = bytes(200 << 20)
    if name == "a.mha":
        data = META + b"CompressedData = True\nElementDataFile = LOCAL\n" + zlib.compress(zeros)
    elif name == "a.nrrd":
        data = NRRD + b"endian: little\nencoding: gzip\n\n" + gzip.compress(zeros)
    else:
        data = gzip.compress(nifti() + zeros)
    path = saved(tmp_path, data, name)
    tracemalloc.start()
    assert code_of(path) == "E_SIZE_LIE"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


# ---- B.3 DICOM files


def test_d01_a_slice_that_was_cut_refuses_the_series_by_its_name(tmp_path: Path) -> None:
    path = dicoms.write_series(tmp_path / "d")[3]
    path.write_bytes(path.read_bytes()[:-41])
    with pytest.raises(MedSSLError, match=r"119 bytes, and the header asks for 160") as caught:
        read_volume(tmp_path / "d")
    assert caught.value.code == "E_PIXEL_LENGTH"
    assert str(path) in caught.value.message
    assert outcomes(scanned(tmp_path / "d"))[path.name] == (Outcome.REJECTED, "E_PIXEL_LENGTH")


@pytest.mark.parametrize("times", [2, 3])
def test_d02_more_pixels_than_the_header_says_are_refused_but_for_a_pad_byte(tmp_path: Path, times: int) -> None:
    def more(ds: Dataset) -> None:
        ds.PixelData = ds.PixelData * times

    assert code_of(dicoms.write_2d(tmp_path / "a.dcm", mutate=more)) == "E_PIXEL_LENGTH"
    odd = dicoms.write_2d(tmp_path / "b.dcm", pixels=np.arange(15, dtype=np.uint8).reshape(3, 5))
    assert np.array_equal(read_volume(odd)[0].array[0, :, :, 0].T, np.arange(15).reshape(3, 5))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ExplVR_LitEndNoMeta.dcm", "E_NOT_IMAGE"),  # a radiotherapy plan
        ("ExplVR_BigEndNoMeta.dcm", "E_NOT_IMAGE"),  # the same in big endian
        ("no_meta.dcm", "E_FORMAT"),  # begins in the middle of a preamble
        ("meta_missing_tsyntax.dcm", "E_HEADER"),  # has no rows
    ],
)
def test_d03_shipped_files_without_meta_information_are_known(name: str, code: str) -> None:
    assert doctor(Path(str(get_testdata_file(name)))).findings[0].code == code


def test_d03_a_slice_without_preamble_and_meta_is_one_of_its_series(tmp_path: Path) -> None:
    paths = dicoms.write_series(tmp_path / "d")
    for path in paths[::2]:
        raw = path.read_bytes()
        length = struct.unpack_from("<I", raw, 140)[0]
        path.write_bytes(raw[144 + length :])  # preamble, DICM and group 2 are gone
    volume, source = read_volume(tmp_path / "d")
    assert np.array_equal(volume.array[0], dicoms.series_values().astype(int) - 1024)
    assert any(said.startswith("W_NO_META") for said in source.warnings)


OTHER_OBJECTS = {
    "dicomdir": uid.MediaStorageDirectoryStorage,
    "sr": uid.BasicTextSRStorage,
    "ko": uid.KeyObjectSelectionDocumentStorage,
    "pr": uid.GrayscaleSoftcopyPresentationStateStorage,
    "pdf": uid.EncapsulatedPDFStorage,
    "plan": uid.RTPlanStorage,
    "waveform": uid.TwelveLeadECGWaveformStorage,
    "registration": uid.SpatialRegistrationStorage,
}


def test_d04_what_lies_beside_the_slices_is_ignored_with_its_reason(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "d/series")
    for name, sop_class in OTHER_OBJECTS.items():
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, uid.generate_uid(), "OT"
        dicoms.write(ds, tmp_path / "d/series" / name)
    saved(tmp_path / "d/series", b"\0\0\0\1Bud1", ".DS_Store")
    saved(tmp_path / "d/series", b"a note", "notes.txt")
    result = scanned(tmp_path / "d")
    booked = outcomes(result)
    assert len(result.cohort) == 1
    for name in (*OTHER_OBJECTS, ".DS_Store", "notes.txt"):
        assert booked[f"series/{name}"][0] is Outcome.IGNORED
    reasons = {entry.item: entry.reason for entry in result.ledger}
    assert all(reasons[f"series/{name}"] for name in OTHER_OBJECTS)
    assert read_volume(tmp_path / "d")[0].geometry.isclose(dicoms.series_geometry())


def test_d07_a_syntax_without_decoder_is_found_by_the_scan_and_named(tmp_path: Path) -> None:
    for name in "ab":
        path = dicoms.write_2d(tmp_path / f"d/{name}", modality="CR", syntax=uid.RLELossless)
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.9\0"))
    result = scanned(tmp_path / "d")
    assert {code for _, code in outcomes(result).values()} == {"E_CODEC"}
    assert all("1.2.840.10008.1.2.9" in entry.reason for entry in result.ledger)
    assert len(list(result.ledger)) == 2


@pytest.mark.parametrize("signed", [False, True])
def test_d08_projections_are_turned_and_quantities_are_not(tmp_path: Path, signed: bool) -> None:
    stored = (np.arange(80).reshape(8, 10) * 3 - (90 if signed else 0)).astype(np.int16 if signed else np.uint16)
    for modality in ("CR", "DX", "MG"):
        path = dicoms.write_2d(tmp_path / modality, modality=modality, pixels=stored, photometric="MONOCHROME1")
        assert np.array_equal(
            read_volume(path)[0].array[0, :, :, 0].T, -1 - stored if signed else 65535 - stored.astype(int)
        )
        assert "W_MONOCHROME1" in warned(path)
    for modality in ("CT", "MR"):
        dicoms.write_series(
            tmp_path / f"s{modality}",
            modality=modality,
            slope=None,
            mutate=lambda found: [setattr(ds, "PhotometricInterpretation", "MONOCHROME1") for ds in found] and None,
        )
        volume, source = read_volume(tmp_path / f"s{modality}")
        assert np.array_equal(volume.array[0], dicoms.series_values())
        assert any("MONOCHROME1" in said for said in source.warnings)


def test_d09_each_slice_has_its_own_slope_and_none_is_rounded(tmp_path: Path) -> None:
    def slopes(found: list[Dataset]) -> None:
        for k, ds in enumerate(found):
            ds.RescaleSlope, ds.RescaleIntercept = f"{1 + k / 10:g}", "0.5"

    dicoms.write_series(tmp_path / "d", modality="PT", mutate=slopes)
    volume, _ = read_volume(tmp_path / "d")
    assert volume.array.dtype == np.float32
    expected = dicoms.series_values() * (1 + np.arange(6) / 10) + 0.5
    assert np.allclose(volume.array[0], expected, rtol=1e-6)
    dicoms.write_series(tmp_path / "ct", slope=None)
    volume, source = read_volume(tmp_path / "ct")
    assert volume.unit == "arbitrary"
    assert any(said.startswith("W_NO_RESCALE") for said in source.warnings)


def test_d11_padding_becomes_air(tmp_path: Path) -> None:
    def pad(found: list[Dataset]) -> None:
        for ds in found:
            array = np.frombuffer(ds.PixelData, "<i2").reshape(8, 10).copy()
            array[0] = -2000
            ds.PixelData = array.tobytes()
            ds.PixelPaddingValue = -2000

    dicoms.write_series(tmp_path / "d", signed=True, mutate=pad)
    volume, source = read_volume(tmp_path / "d")
    assert (volume.array[0, :, 0] == -1024).all()
    assert np.array_equal(volume.array[0, :, 1:], dicoms.series_values().astype(int)[:, 1:] - 1024)
    assert any(said.startswith("W_PADDING") for said in source.warnings)


def test_d12_overlay_bits_above_twelve_do_not_count(tmp_path: Path) -> None:
    def overlay(found: list[Dataset]) -> None:
        for ds in found:
            ds.BitsStored, ds.HighBit = 12, 11
            ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") | 0x7000).tobytes()

    dicoms.write_series(tmp_path / "d", mutate=overlay)
    assert np.array_equal(read_volume(tmp_path / "d")[0].array[0], dicoms.series_values().astype(int) - 1024)


def test_d13_a_photometric_that_is_no_colour_of_ours_is_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 10, 3)).astype(np.uint8)
    path = dicoms.write_2d(tmp_path / "a", modality="US", pixels=pixels, photometric="YBR_PARTIAL_420")
    assert code_of(path) == "E_PHOTOMETRIC"
    planes = dicoms.write_2d(
        tmp_path / "b",
        modality="US",
        pixels=pixels,
        PlanarConfiguration=1,
        PixelData=pixels.transpose(2, 0, 1).tobytes(),
    )
    assert np.array_equal(read_volume(planes)[0].array[..., 0], pixels.transpose(2, 1, 0))


@pytest.mark.parametrize("modality", ["US", "XA", "RF"])
def test_d15_a_clip_is_no_volume_and_offers_its_frames(tmp_path: Path, modality: str) -> None:
    path = dicoms.write_clip(tmp_path / "clip", modality=modality, spacing_cm=None)
    with pytest.raises(MedSSLError, match="0: frame 1") as caught:
        read_volume(path)
    assert caught.value.code == "E_SEVERAL"
    assert read_volume(path, volume=2)[0].geometry.shape == (10, 8, 1)


def test_d16_sequences_nested_too_deep_are_refused(tmp_path: Path) -> None:
    path = dicoms.write_2d(tmp_path / "a.dcm")
    sequence, item = struct.pack("<HH2sHI", 0x0029, 0x1010, b"SQ", 0, 0xFFFFFFFF), b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    pixels = path.read_bytes().index(struct.pack("<HH", 0x7FE0, 0x0010))
    raw = path.read_bytes()
    path.write_bytes(raw[:pixels] + (sequence + item) * 50_000 + raw[pixels:])
    assert code_of(path) == "E_HEADER"
    assert doctor(path).findings[0].code == "E_HEADER"


def test_d17_a_deflated_bomb_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = dicoms.write_2d(tmp_path / "a.dcm", syntax=uid.DeflatedExplicitVRLittleEndian)
    raw = path.read_bytes()
    begin = 144 + struct.unpack_from("<I", raw, 140)[0]
    path.write_bytes(raw[:begin] + zlib.compress(bytes(600 << 20), wbits=-15))
    tracemalloc.start()
    assert code_of(path) == "E_BOMB"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 << 20


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_d19_a_size_that_the_file_cannot_hold_takes_no_memory(tmp_path: Path, syntax: str) -> None:
    path = dicoms.write_2d(tmp_path / "a.dcm", syntax=syntax)
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 65535
    ds.NumberOfFrames = 1_000_000
    ds.save_as(path)
    tracemalloc.start()
    assert code_of(path) == "E_SIZE_LIE"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def with_raw(path: Path, tag: int, vr: bytes, value: bytes) -> Path:
    """The file with one element more before its pixels, or the same one with another value."""
    raw = path.read_bytes()
    start = raw.find(struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr, 132)
    element = struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value
    length = struct.unpack_from("<H", raw, start + 6)[0]
    path.write_bytes(raw[:start] + element + raw[start + 8 + length :])
    return path


@pytest.mark.parametrize("charset", [b"ISO_IR 999 ", b"\\ISO 2022 IR 87", b"\xff\xfe", b"GARBAGE\\\\"])
def test_d22_an_unknown_character_set_and_broken_names_change_nothing(tmp_path: Path, charset: bytes) -> None:
    def named(found: list[Dataset]) -> None:
        for ds in found:
            ds.SpecificCharacterSet = "ISO_IR 100"

    charset += b" " * (len(charset) % 2)
    for path in dicoms.write_series(tmp_path / "d", mutate=named):
        with_raw(path, 0x00080005, b"CS", charset)
        with_raw(path, 0x00100010, b"PN", b"\x1b$B\xff\xfe^\x00=\x80")
    volume, source = read_volume(tmp_path / "d")
    assert np.array_equal(volume.array[0], dicoms.series_values().astype(int) - 1024)
    assert "\x1b" not in repr(source)


@pytest.mark.parametrize("value", [b"../../../../tmp/x ", b"/etc/passwd ", b"1.2." + b"9" * 4092, b"C:\\x"])
def test_d23_an_identifier_never_becomes_a_path(tmp_path: Path, value: bytes) -> None:
    value += b" " * (len(value) % 2)
    for path in dicoms.write_series(tmp_path / "d"):
        for tag in (0x0020000D, 0x0020000E):
            with_raw(path, tag, b"UI", value)
    result = scanned(tmp_path / "d")
    assert len(result.cohort) == 1
    assert "W_UID" in next(iter(result.ledger)).reason
    written = {path.name for path in (tmp_path / "d-out").rglob("*")}
    assert not any(word in name for name in written for word in ("passwd", "9999", "..x", "C:"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d-out"]
    assert all(value.strip() not in path.read_bytes() for path in (tmp_path / "d-out").rglob("*") if path.is_file())


def test_d24_the_index_of_a_disc_is_not_followed(tmp_path: Path) -> None:
    outside = dicoms.write_series(tmp_path / "secret")
    record, index = Dataset(), Dataset()
    record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["SECRET", outside[0].name.upper()]
    record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 0, 0xFFFF
    record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    index.SOPClassUID, index.SOPInstanceUID = uid.MediaStorageDirectoryStorage, uid.generate_uid()
    index.DirectoryRecordSequence = [record]
    dicoms.write_series(tmp_path / "d/DICOM", series="b")
    raw = dicoms.write(index, tmp_path / "d/DICOMDIR").read_bytes()
    (tmp_path / "d/DICOMDIR").write_bytes(raw.replace(b"SECRET\\", b"../sec\\"))
    result = scanned(tmp_path / "d")
    assert len(result.cohort) == 1
    assert outcomes(result)["DICOMDIR"][0] is Outcome.IGNORED
    assert not any("secret" in entry.item + entry.reason for entry in result.ledger)


@pytest.mark.parametrize("start", [b"MZ", b"\x7fELF"])
def test_d26_a_program_in_the_preamble_is_said(tmp_path: Path, start: bytes) -> None:
    paths = dicoms.write_series(tmp_path / "d")
    paths[2].write_bytes(start + paths[2].read_bytes()[len(start) :])
    assert "W_PREAMBLE" in warned(tmp_path / "d")


@pytest.mark.parametrize(
    "names",
    [
        ("MR_small.dcm", "MR_small_bigendian.dcm"),
        ("MR_small.dcm", "MR_small_implicit.dcm"),
        ("MR_small.dcm", "MR_small_expb.dcm"),
        ("MR_small.dcm", "MR_small_RLE.dcm"),
        ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
        ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"),
        ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm"),
    ],
)
def test_d27_shipped_twins_are_bit_equal(names: tuple[str, str]) -> None:
    paths = [Path(str(get_testdata_file(name))) for name in names]
    (one, _), (other, _) = (read_volume(path) for path in paths)
    assert np.array_equal(one.array, other.array)
    assert one.geometry.isclose(other.geometry)


SHIPPED = sorted(path for path in Path(str(get_testdata_file("CT_small.dcm"))).parent.glob("*.dcm"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_d28_every_shipped_odd_file_is_read_or_refused_by_name(path: Path) -> None:
    for options in ({}, {"unit": "label"}, {"volume": 0}):
        code_of(path, **options)
    assert doctor(path).findings


# ---- B.5 pictures


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 12_000)])
def test_p01_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((size[0] // 8 + 1) * size[1]))
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path = saved(tmp_path, png, "a.png")
    tracemalloc.start()
    assert code_of(path) == "E_BOMB"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_p02_a_cut_picture_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50)).astype(np.uint8)).save(path, kind)
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        assert code_of(path) in {"E_TRUNCATED", "E_CRC", "E_FORMAT", "E_HEADER", "E_SIZE_LIE"}


def test_p04_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65535, (6, 9)).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        volume, _ = read_volume(tmp_path / name)
        assert volume.array.dtype == np.uint16
        assert np.array_equal(volume.array[0, :, :, 0].T, pixels)


def test_p06_text_of_a_picture_goes_nowhere(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("Patient", "Zzcanary")
    exif[0x010E] = "Zzcanary"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8))
    (tmp_path / "d").mkdir()
    picture.save(tmp_path / "d/a.png", pnginfo=info, exif=exif)
    volume, source = read_volume(tmp_path / "d/a.png")
    write_volume(volume, tmp_path / "b.nii.gz", like=source)
    config = ScanConfig.parse({"workers": 1})
    scan(tmp_path / "d", tmp_path / "out", config=config)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "d"]
    assert len(written) > 5
    assert not any(b"Zzcanary" in path.read_bytes() for path in written)
    assert "Zzcanary" not in repr(source)


def test_p07_a_picture_has_no_size_in_mm_and_that_is_known(tmp_path: Path) -> None:
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / "a.png")
    _, source = read_volume(tmp_path / "a.png")
    assert not source.has_spacing
    assert any(said.startswith("W_NO_SPACING") for said in source.warnings)


def test_p07_pictures_have_no_scores_in_mm(tmp_path: Path) -> None:
    for folder, rows in (("p", slice(2, 6)), ("l", slice(3, 7))):
        mask = np.zeros((9, 10), np.uint8)
        mask[rows, 2:7] = 1
        (tmp_path / folder).mkdir()
        Image.fromarray(mask).save(tmp_path / folder / "a.png")
    found = evaluate(tmp_path / "p", tmp_path / "l", out=tmp_path / "out").cases
    assert found is not None
    assert found["dice"].tolist() == pytest.approx([0.75])
    assert found[["hd95_mm", "hd_mm", "assd_mm", "nsd", "volume_error_ml"]].isna().all(axis=None)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_p08_a_picture_of_one_row_is_a_volume(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_volume(tmp_path / "a.png")[0].array[0, :, :, 0].T, pixels)


def test_p09_one_picture_under_two_names_is_in_one_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "d").mkdir()
    for name in ("a", "b", "c", "d"):
        Image.fromarray(rng.integers(0, 255, (20, 30)).astype(np.uint8)).save(tmp_path / f"d/{name}.png")
    Image.open(tmp_path / "d/a.png").save(tmp_path / "d/again.png", compress_level=1)
    table = "case_id,subject_id,split\na,s1,train\nb,s2,train\nc,s3,val\nd,s4,test\nagain,s5,test\n"
    (tmp_path / "m.csv").write_text(table)
    result = scanned(tmp_path / "d", table=str(tmp_path / "m.csv"))
    assert outcomes(result)["again.png"][0] is Outcome.DUPLICATE
    assert sorted(case.case_id for case in result.cohort) == ["a", "b", "c", "d"]


# ---- B.9 X10


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_x10_no_pickle_is_loaded(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    array = np.array([[Bomb()]], dtype=object)
    if name == "a.npy":
        np.save(tmp_path / name, array, allow_pickle=True)
    else:
        np.savez(tmp_path / name, array=array, allow_pickle=True)
    assert code_of(tmp_path / name) in {"E_DTYPE", "E_FORMAT"}
    assert not (tmp_path / "ran").exists()
