"""Files made to mislead: each must come out right, with a warning, or be refused; never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dicoms
import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medssl.data.doctor import doctor
from medssl.data.scan import ScanConfig, scan
from medssl.errors import MedSSLError
from medssl.evaluation.inputs import plan
from medssl.io import read_volume
from medssl.io.dicom import reader, series_list
from medssl.ledger import Ledger, Outcome

VALUES = dicoms.series_values()


def each(change: Callable[[Dataset, int], object]) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> None:
        for k, ds in enumerate(datasets):
            change(ds, k)

    return mutate


def at_last(change: Callable[[Dataset], object]) -> dicoms.Mutate:
    return lambda datasets: change(datasets[-1]) and None


def code_of(path: Path, **options: object) -> str:
    with pytest.raises(MedSSLError) as caught:
        read_volume(path, **options)  # type: ignore[arg-type]
    return caught.value.code


def codes(warnings: tuple[str, ...]) -> set[str]:
    return {warning.split(":")[0] for warning in warnings}


# A slice at an end of the volume that nobody can read


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def without_magic(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"DICM", b"XXXX", 1))


def renamed_rubbish(path: Path) -> None:
    path.unlink()
    path.with_suffix(".dcm").write_bytes(b"rubbish" * 50)


def numbered_rubbish(path: Path) -> None:
    path.unlink()
    path.with_suffix(".77").write_bytes(b"rubbish" * 50)


@pytest.mark.parametrize("damage", [zeroed, without_magic, renamed_rubbish, numbered_rubbish])
def test_an_unreadable_last_slice_is_said_wherever_a_series_goes_in(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(dicoms.write_series(tmp_path / "d")[-1])
    volume, source = read_volume(tmp_path / "d")
    assert volume.geometry.shape[2] == 5
    assert "W_BROKEN_NEIGHBOUR" in codes(source.warnings)
    (item,) = reader.stacks(tmp_path / "d").items
    assert "W_BROKEN_NEIGHBOUR" in codes(item.stacks[0].warnings)
    findings = doctor(tmp_path / "d").findings
    assert any("W_BROKEN_NEIGHBOUR" in codes(finding.warnings) for finding in findings)
    booked = [entry.reason for entry in scan(tmp_path / "d", tmp_path / "out", config=ScanConfig(workers=1)).ledger]
    assert any("W_BROKEN_NEIGHBOUR" in reason for reason in booked)
    (job,) = plan(tmp_path / "d", tmp_path / "p", Ledger(), unpack_to=tmp_path / "room")
    assert "W_BROKEN_NEIGHBOUR" in codes(job.warnings)


def test_other_files_beside_a_series_raise_no_doubt(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "d")
    (tmp_path / "d/notes.txt").write_text("text")
    (tmp_path / "d/elsewhere").mkdir()
    (tmp_path / "d/elsewhere/readme").write_text("text")
    assert read_volume(tmp_path / "d")[1].warnings == ()


def test_what_only_the_whole_series_shows_reaches_scan_and_predict(tmp_path: Path) -> None:
    datasets = []
    for volume in range(2):
        for k, ds in enumerate(dicoms.build_series(modality="MR", slope=None)):
            ds.SOPInstanceUID, ds.InstanceNumber = generate_uid(), 1 + k + 6 * volume
            dicoms.set_pixels(ds, VALUES[:, :, k].T + np.uint16(volume))
            datasets.append(ds)
    dicoms.save(datasets, tmp_path / "d")
    jobs = plan(tmp_path / "d", tmp_path / "p", Ledger(), unpack_to=tmp_path / "room")
    assert [codes(job.warnings) for job in jobs] == [{"W_VOLUME_ORDER"}] * 2
    result = scan(tmp_path / "d", tmp_path / "out", config=ScanConfig(workers=1))
    warned = [entry.reason for entry in result.ledger if entry.outcome is Outcome.WARNED]
    assert len(warned) == 2
    assert all("W_VOLUME_ORDER" in reason for reason in warned)


# Slices that do not belong together


@pytest.mark.parametrize(
    ("keyword", "first", "second"),
    [
        ("EchoTime", "10", "90"),
        ("InversionTime", "100", "2000"),
        ("FlipAngle", "5", "30"),
        ("KVP", "80", "140"),
        ("NominalPercentageOfCardiacPhase", 40.0, 75.0),
    ],
)
def test_settings_that_interleave_are_volumes_of_their_own(
    tmp_path: Path, keyword: str, first: object, second: object
) -> None:
    dicoms.write_series(
        tmp_path, shape=(8, 10, 8), mutate=each(lambda ds, k: setattr(ds, keyword, second if k % 2 else first))
    )
    assert code_of(tmp_path) == "E_SEVERAL"
    values = dicoms.series_values((8, 10, 8)).astype(int) - 1024
    found = [read_volume(tmp_path, volume=k)[0].array[0] for k in (0, 1)]
    for wanted in (values[:, :, 0::2], values[:, :, 1::2]):
        assert any(np.array_equal(array, wanted) for array in found)


def two_echo_times(folder: Path, **scrambled: tuple[object, object]) -> None:
    datasets = []
    for volume in range(2):
        for k, ds in enumerate(dicoms.build_series((8, 10, 8), modality="MR", slope=None)):
            ds.SOPInstanceUID, ds.EchoTime = generate_uid(), "10" if volume == 0 else "90"
            for keyword, pair in scrambled.items():
                setattr(ds, keyword, pair[(volume + k) % 2])
            dicoms.set_pixels(ds, np.full((8, 10), 1000 * volume + k, np.uint16))
            datasets.append(ds)
    dicoms.save(datasets, folder)


def test_echo_times_win_over_trigger_times_that_cross_them(tmp_path: Path) -> None:
    two_echo_times(tmp_path, TriggerTime=("5", "7"))
    for volume in (0, 1):
        array = read_volume(tmp_path, volume=volume)[0].array
        np.testing.assert_array_equal(array[0, 0, 0], 1000 * volume + np.arange(8))


def test_two_telling_fields_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    two_echo_times(tmp_path, TemporalPositionIdentifier=(1, 2))
    assert code_of(tmp_path) == "E_AMBIGUOUS_STACK"


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: setattr(ds, "FrameOfReferenceUID", generate_uid()),
        lambda ds: delattr(ds, "FrameOfReferenceUID"),
        lambda ds: setattr(ds, "Modality", "OT"),
    ],
)
def test_a_last_slice_of_another_frame_or_modality_is_no_localizer(
    tmp_path: Path, change: Callable[[Dataset], None]
) -> None:
    dicoms.write_series(tmp_path, mutate=at_last(change))
    assert code_of(tmp_path) == "E_AMBIGUOUS_STACK"


def test_a_slice_that_lost_its_place_and_type_is_no_screen_save(tmp_path: Path) -> None:
    def strip(ds: Dataset) -> None:
        del ds.ImagePositionPatient, ds.ImageType

    dicoms.write_series(tmp_path, mutate=at_last(strip))
    assert code_of(tmp_path) == "E_NO_GEOMETRY"


@pytest.mark.parametrize("turn", [(1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)])
def test_a_half_that_is_flipped_or_turned_is_not_stacked_on_the_other(tmp_path: Path, turn: tuple[float, ...]) -> None:
    def change(ds: Dataset, k: int) -> None:
        if k >= 3:
            ds.ImageOrientationPatient = list(turn)

    dicoms.write_series(tmp_path, mutate=each(change))
    assert code_of(tmp_path) in {"E_SEVERAL", "E_IOP"}


# Values


def test_one_volume_of_six_codings_and_two_signs_has_one_truth(tmp_path: Path) -> None:
    syntaxes = (
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.RLELossless,
        uid.JPEG2000Lossless,
        uid.DeflatedExplicitVRLittleEndian,
    )
    for k, (ds, syntax) in enumerate(zip(dicoms.build_series(intercept=0.0), syntaxes, strict=True)):
        stored = VALUES[:, :, k].T.astype(np.int16) - (400 if k % 2 else 0)
        dicoms.set_pixels(ds, stored if k % 2 else stored.astype(np.uint16))
        dicoms.write(ds, tmp_path / f"{k}", syntax=syntax)
    volume, _ = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], VALUES.astype(int) - 400 * (np.arange(6) % 2))


def test_twelve_bits_of_either_sign_side_by_side(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, k % 2
        stored = np.full(80, -10 * k if k % 2 else 4000 + k, np.int64)
        ds.PixelData = ((stored & 0xFFF) | 0xA000).astype("<u2").tobytes()  # rubbish above the stored bits

    dicoms.write_series(tmp_path, mutate=each(change), intercept=0.0)
    array = read_volume(tmp_path)[0].array
    np.testing.assert_array_equal(array[0, 3, 3], [4000, -10, 4002, -30, 4004, -50])


@pytest.mark.parametrize("frames", [1, 3])
def test_bytes_in_big_endian_words_change_places(tmp_path: Path, frames: int) -> None:
    pixels = np.arange(frames * 35, dtype=np.uint8).reshape(frames, 5, 7)
    ds = dicoms._base("OT", series="words", instance="words")
    dicoms.set_pixels(ds, pixels if frames > 1 else pixels[0])
    ds.PixelData = np.frombuffer(ds.PixelData, "<u2").byteswap().tobytes()
    ds["PixelData"].VR = "OW"
    path = dicoms.write(ds, tmp_path / "x", syntax=uid.ExplicitVRBigEndian)
    truth = dcmread(path).pixel_array.reshape(pixels.shape)
    np.testing.assert_array_equal(truth, pixels)
    for k in range(frames):
        array = read_volume(path, volume=k)[0].array
        np.testing.assert_array_equal(array[0, :, :, 0].T, pixels[k])


@pytest.mark.parametrize("is_grey", [True, False])
def test_colour_is_neither_hounsfield_nor_rescaled(tmp_path: Path, is_grey: bool) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 10, 3)).astype(np.uint8)
    pixels = np.repeat(pixels[..., :1], 3, axis=-1) if is_grey else pixels
    dicoms.write_series(tmp_path, mutate=each(lambda ds, k: dicoms.set_pixels(ds, pixels[k])))
    volume, _ = read_volume(tmp_path)
    assert (volume.unit, volume.array.dtype) == ("arbitrary", np.uint8)
    np.testing.assert_array_equal(volume.array, pixels.transpose(3, 2, 1, 0)[: 1 if is_grey else 3])


@pytest.mark.parametrize("bits", [12, 16])
def test_padding_that_needs_more_bits_than_tissue_becomes_air(tmp_path: Path, bits: int) -> None:
    def change(ds: Dataset, _k: int) -> None:
        stored = np.frombuffer(ds.PixelData, "<u2").copy()
        stored[:5] = 63536
        ds.PixelData, ds.BitsStored, ds.HighBit = stored.tobytes(), bits, bits - 1
        ds.add_new(0x00280120, "US", 63536)

    dicoms.write_series(tmp_path, mutate=each(change))
    volume, source = read_volume(tmp_path)
    assert "W_PADDING" in codes(source.warnings)
    wanted = VALUES.astype(int) - 1024
    wanted[:5, 0] = -1024
    np.testing.assert_array_equal(volume.array[0], wanted)


@pytest.mark.parametrize(("kind", "dtype"), [("Float", "<f4"), ("Double", "<f8")])
def test_floats_keep_their_values_and_lose_their_padding(tmp_path: Path, kind: str, dtype: str) -> None:
    values = np.linspace(-1, 1, 480).astype(dtype)

    def change(ds: Dataset) -> None:
        stored = values.copy()
        stored[:7] = -9999
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
        name = "FloatPixel" if kind == "Float" else "DoubleFloatPixel"
        setattr(ds, f"{name}Data", stored.tobytes())
        setattr(ds, f"{name}PaddingValue", -9999.0)
        ds.BitsAllocated = stored.itemsize * 8

    path = dicoms.write_enhanced(tmp_path / "x", mutate=change, order=[5, 3, 1, 0, 2, 4])
    volume, _ = read_volume(path)
    wanted = values.reshape(6, 8, 10)[[3, 2, 4, 1, 5, 0]].T.astype(np.float32)
    wanted[:7, 0, 5] = values[7]
    np.testing.assert_array_equal(volume.array[0], wanted)


def test_colour_shared_by_pairs_needs_even_rows(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        ds.PhotometricInterpretation, ds.PixelData = "YBR_FULL_422", bytes(108)

    path = dicoms.write_2d(tmp_path / "x", modality="US", pixels=np.zeros((6, 9, 3), np.uint8), mutate=change)
    assert code_of(path) == "E_PHOTOMETRIC"


def without_rescale(ds: Dataset) -> None:
    del ds.RescaleSlope, ds.RescaleIntercept


@pytest.mark.parametrize("change", [without_rescale, lambda ds: setattr(ds, "RescaleType", "US")])
def test_one_slice_of_another_rescale_refuses_the_volume(tmp_path: Path, change: Callable[[Dataset], None]) -> None:
    dicoms.write_series(tmp_path, mutate=at_last(change))
    assert code_of(tmp_path) == "E_RESCALE"


def test_a_missing_rescale_that_changes_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, mutate=at_last(without_rescale), intercept=0.0)
    volume, source = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], VALUES)
    assert (volume.unit, codes(source.warnings)) == ("arbitrary", {"W_NO_RESCALE"})


def positron_emission(ds: Dataset, k: int) -> None:
    ds.Units, ds.DecayCorrection, ds.CorrectedImage, ds.PatientWeight = "BQML", "START", ["ATTN", "DECY"], "70"
    ds.SeriesDate = ds.AcquisitionDate = "20200101"
    ds.SeriesTime, ds.AcquisitionTime = "100000", f"10{k:02d}30"
    tracer = Dataset()
    tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = "3.7e8", "6586.2"
    tracer.RadiopharmaceuticalStartTime = "090000"
    ds.RadiopharmaceuticalInformationSequence = [tracer]
    ds.RescaleSlope, ds.RescaleIntercept = str(1 + k / 2), "0"


def test_uptake_is_that_of_the_formula_slice_by_slice(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path, modality="PT", mutate=each(positron_emission))
    volume, _ = read_volume(tmp_path)
    factor = 70_000 / (3.7e8 * 2 ** (-3600 / 6586.2))
    assert volume.unit == "SUV"
    np.testing.assert_allclose(volume.array[0], VALUES * (1 + np.arange(6) / 2) * factor, rtol=1e-6)


@pytest.mark.parametrize(("keyword", "value"), [("Units", "CNTS"), ("PatientWeight", "90"), ("SeriesTime", "100500")])
def test_one_slice_of_other_counts_or_weight_takes_the_uptake_away(tmp_path: Path, keyword: str, value: str) -> None:
    def change(datasets: list[Dataset]) -> None:
        each(positron_emission)(datasets)
        setattr(datasets[-1], keyword, value)

    dicoms.write_series(tmp_path, modality="PT", mutate=change)
    volume, source = read_volume(tmp_path)
    assert (volume.unit, codes(source.warnings)) == ("arbitrary", {"W_NO_SUV"})


# Geometry


@pytest.mark.parametrize("tilt_deg", [0.0, 17.0])
@pytest.mark.parametrize("heights", [(0, 2, 4, 8, 10, 12), (0, 1, 3, 6, 7, 9.5), (0, 2, 4, 6, 12, 14, 16)])
def test_regularised_values_are_those_of_their_place(
    tmp_path: Path, heights: tuple[float, ...], tilt_deg: float
) -> None:
    orientation = dicoms.rotated(dicoms.AXIAL, (1, 2, 3), 31)
    row, column = np.reshape(orientation, (2, 3))
    slope, gradient = 0.125, np.array([3.0, -2.0, 5.0])

    def change(ds: Dataset, k: int) -> None:
        step = dicoms.slice_step((0.8, 0.5, 1.0), orientation, tilt_deg)
        position = np.array([10.0, -20.0, 30.0]) + heights[k] * step
        ds.ImagePositionPatient = [dicoms._ds(number) for number in position]
        x, y = np.meshgrid(np.arange(10), np.arange(8))
        places = position + x[..., None] * 0.5 * row + y[..., None] * 0.8 * column
        ds.PixelData = np.rint((places @ gradient + 2000) / slope).astype("<u2").tobytes()
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), "0"

    dicoms.write_series(tmp_path, shape=(8, 10, len(heights)), orientation=orientation, mutate=each(change))
    assert code_of(tmp_path) in {"E_MISSING_SLICE", "E_NONUNIFORM"}
    volume, source = read_volume(tmp_path, regularise=True)
    indices = np.stack(np.meshgrid(*map(np.arange, volume.geometry.shape), indexing="ij"), -1).reshape(-1, 3)
    lps = volume.geometry.to_world(indices) * [-1, -1, 1]
    np.testing.assert_allclose(volume.array.reshape(-1), lps @ gradient + 2000, atol=slope)
    assert "W_REGULARISED" in codes(source.warnings)


def test_parts_of_one_enhanced_volume_in_two_files_are_put_together(tmp_path: Path) -> None:
    dicoms.write_enhanced(tmp_path / "a", order=[5, 1, 3])
    dicoms.write_enhanced(tmp_path / "b", order=[0, 4, 2])
    volume, _ = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], VALUES)


# A series list whose files changed


def shifted(paths: list[Path]) -> None:
    ds = dcmread(paths[-1])
    ds.ImagePositionPatient = [-12, 7, 41]
    ds.save_as(paths[-1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda paths: paths[-1].unlink(), "E_MISSING"),
        (shifted, "E_NONUNIFORM"),
        (lambda paths: paths[2].write_bytes(paths[3].read_bytes()), "E_MISSING_SLICE"),
        (lambda paths: paths[5].write_bytes(paths[4].read_bytes()), "E_SERIES_CHANGED"),
        (lambda paths: paths[5].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "E_FORMAT"),
        (lambda paths: paths[5].write_bytes(paths[5].read_bytes()[:-20]), "E_PIXEL_LENGTH"),
    ],
)
def test_a_list_is_refused_once_its_files_make_another_volume(
    tmp_path: Path, change: Callable[[list[Path]], object], code: str
) -> None:
    paths = dicoms.write_series(tmp_path / "d")
    listed = tmp_path / "series" / "x.dicom.json"
    listed.parent.mkdir()
    series_list.write_list(reader.stacks(tmp_path / "d").items[0], listed)
    assert read_volume(listed)[0].geometry.shape[2] == 6
    change(paths)
    assert code_of(listed) == code
