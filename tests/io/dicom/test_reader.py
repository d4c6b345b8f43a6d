from __future__ import annotations

import hashlib
import json
import stat
import tracemalloc

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicoms import (
    CANARIES,
    CORONAL,
    SAGITTAL,
    build_series,
    rotated,
    save,
    series_geometry,
    series_values,
    write_2d,
    write_clip,
    write_enhanced,
    write_series,
)
from phantoms import REAL_DATA
from pydicom import uid

from medssl.errors import CaseError, GeometryError, MedSSLError
from medssl.geometry import Geometry
from medssl.io import digest, read_volume
from medssl.io.dicom import reader, series_list
from medssl.volume import Volume, reorient

SERIES = REAL_DATA / "dicom_series"
LOSSLESS = (
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)


def refusal(path, **options):
    with pytest.raises(MedSSLError) as caught:
        read_volume(path, **options)
    assert str(path) in caught.value.message
    return caught.value


def echoes(folder, count=2):
    """Series of several echoes of one place."""
    datasets = []
    for echo in range(count):
        for ds in build_series(modality="MR", slope=None, acquisition=echo + 1):
            ds.AcquisitionNumber = 1
            ds.EchoNumbers = echo + 1
            ds.EchoTime = 10 * (echo + 1)
            ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") + 1000 * echo).tobytes()
            datasets.append(ds)
    save(datasets, folder)
    return folder


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), SAGITTAL, CORONAL, rotated(SAGITTAL, (1, 2, 3), 20)])
@pytest.mark.parametrize("tilt_deg", [0.0, 15.0])
def test_a_series_lies_where_its_headers_say(tmp_path, orientation, tilt_deg):
    write_series(tmp_path, orientation=orientation, tilt_deg=tilt_deg)
    volume, source = read_volume(tmp_path)
    assert volume.geometry.isclose(series_geometry(orientation=orientation, tilt_deg=tilt_deg))
    np.testing.assert_array_equal(volume.array[0], series_values().astype(int) - 1024)
    assert volume.unit == "HU"
    assert volume.array.dtype == np.int16
    assert (source.format, source.volumes) == ("dicom", 1)
    assert any(warning.startswith("W_TILT") for warning in source.warnings) == (tilt_deg > 0)
    volume.array[0, 0, 0, 0] = 5  # whoever reads a volume may write to it


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_every_lossless_syntax_gives_the_same_volume(tmp_path, syntax):
    write_series(tmp_path, syntax=syntax)
    volume, _ = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], series_values().astype(int) - 1024)


def test_simpleitk_finds_the_same_values_at_the_same_places(tmp_path):
    orientation = rotated((1, 0, 0, 0, 1, 0), (3, 1, 2), 30)
    write_series(tmp_path, orientation=orientation)
    volume, _ = read_volume(tmp_path)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = sitk.ReadImage(files)
    for ijk in [(0, 0, 0), (9, 3, 5), (4, 7, 2)]:
        x, y, z = image.TransformIndexToPhysicalPoint(ijk)
        np.testing.assert_allclose(volume.geometry.to_world(ijk), [-x, -y, z], atol=1e-3)
        assert volume.array[(0, *ijk)] == image[ijk]


def test_memory_runs_along_columns_first(tmp_path):
    write_series(tmp_path)
    array = read_volume(tmp_path)[0].array
    assert array.transpose(0, 3, 2, 1).flags.c_contiguous


def test_decoding_takes_less_than_twice_the_volume(tmp_path):
    write_series(tmp_path, shape=(256, 256, 40), signed=True)
    tracemalloc.start()
    array = read_volume(tmp_path)[0].array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * array.nbytes


def test_a_large_file_is_read_piece_by_piece(tmp_path, monkeypatch):
    path = write_enhanced(tmp_path / "a.dcm")
    whole, source = read_volume(path)
    monkeypatch.setattr("medssl.io.dicom.decode._IN_MEMORY_BYTES", 0)
    pieces, again = read_volume(path)
    np.testing.assert_array_equal(pieces.array, whole.array)
    assert again.digest == source.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_is_that_of_the_files_in_the_order_of_their_slices(tmp_path):
    paths = write_series(tmp_path)
    by_height = sorted(paths, key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    joined = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in by_height)
    assert read_volume(tmp_path)[1].digest == digest(tmp_path) == hashlib.sha256(joined).hexdigest()
    assert read_volume(paths[0])[1].digest == digest(paths[0]) == hashlib.sha256(paths[0].read_bytes()).hexdigest()


def test_other_files_of_a_folder_are_passed_over(tmp_path):
    write_series(tmp_path / "deep" / "er")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert read_volume(tmp_path)[0].array.shape == (1, 10, 8, 6)


def test_folders_without_images_are_refused(tmp_path):
    assert refusal(tmp_path).code == "E_NOT_REGULAR"
    (tmp_path / "a.dcm").write_bytes(b"")
    assert refusal(tmp_path).code == "E_EMPTY"


class TestSeveral:
    def test_must_be_chosen_from(self, tmp_path):
        error = refusal(echoes(tmp_path))
        assert isinstance(error, CaseError)
        assert error.code == "E_SEVERAL"
        assert "0: echo 1, 1: echo 2" in error.message
        assert refusal(tmp_path, volume=2).code == "E_VOLUME"

    def test_can_be_chosen_by_number(self, tmp_path):
        echoes(tmp_path)
        for number in range(2):
            volume, source = read_volume(tmp_path, volume=number)
            np.testing.assert_array_equal(volume.array[0], series_values() + 1000 * number)
            assert source.volumes == 2
            assert source.digest == digest(tmp_path, volume=number)

    def test_can_be_channels(self, tmp_path):
        volume, source = read_volume(echoes(tmp_path), volume="channels")
        np.testing.assert_array_equal(volume.array, [series_values(), series_values() + 1000])
        assert source.digest == digest(tmp_path) == digest(tmp_path, volume="channels")

    def test_of_different_images_cannot_be_channels(self, tmp_path):
        write_series(tmp_path / "a", series="a")
        write_series(tmp_path / "b", series="b", shape=(4, 6, 3))
        assert "CT 10 x 8 x 6" in refusal(tmp_path).message
        assert refusal(tmp_path, volume="channels").code == "E_SEVERAL"
        assert read_volume(tmp_path, volume=1)[0].array.shape in {(1, 6, 4, 3), (1, 10, 8, 6)}

    def test_frames_of_a_clip_are_pictures(self, tmp_path):
        path = write_clip(tmp_path / "clip.dcm")
        assert "0: frame 1" in refusal(path).message
        volume, source = read_volume(path, volume=3)
        np.testing.assert_array_equal(volume.array[0, :, :, 0].T, pydicom.dcmread(path).pixel_array[3])
        np.testing.assert_allclose(volume.geometry.spacing_mm[:2], (0.2, 0.3))
        assert source.facts["spacing_from"] == "ultrasound region"

    def test_that_are_many_are_not_all_named(self, tmp_path):
        assert "frame 8, ...)" in refusal(write_clip(tmp_path / "clip.dcm", frames=12)).message


class TestLists:
    @pytest.fixture
    def listed(self, tmp_path):
        [item] = reader.stacks(echoes(tmp_path / "data")).items
        path = tmp_path / "out" / "series" / f"case{series_list.SUFFIX}"
        series_list.write_list(item, path)
        return path

    def test_stand_for_their_image(self, listed, tmp_path):
        for number in (0, 1, "channels"):
            volume, source = read_volume(listed, volume=number)
            wanted, direct = read_volume(tmp_path / "data", volume=number)
            np.testing.assert_array_equal(volume.array, wanted.array)
            assert volume.geometry.isclose(wanted.geometry)
            assert (source.digest, source.volumes) == (direct.digest, 2)
            assert digest(listed, volume=number) == source.digest
        assert "0: echo 1, 1: echo 2" in refusal(listed).message
        assert reader.kind(listed) == "image"
        assert len(reader.stacks(listed).items[0].stacks) == 2

    def test_are_private_and_hold_nothing_of_the_patient(self, listed):
        assert stat.S_IMODE(listed.stat().st_mode) == 0o600
        text = listed.read_text()
        assert series_list.is_list(text.encode())
        assert not any(value in text for value in CANARIES.values())
        assert all(name.startswith("/") for name in json.loads(text)["files"])

    def test_move_with_the_files_below_their_folder(self, tmp_path):
        [item] = reader.stacks(echoes(tmp_path / "out" / "unpacked")).items
        series_list.write_list(item, tmp_path / "out" / "series" / "a.dicom.json")
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        assert read_volume(tmp_path / "elsewhere" / "series" / "a.dicom.json", volume=0)[0].array.shape[0] == 1

    def test_of_a_single_file_keep_its_volumes_apart(self, tmp_path):
        path = write_clip(tmp_path / "clip.dcm", frames=4)
        [item] = reader.stacks(path).items
        series_list.write_list(item, tmp_path / "a.dicom.json")
        found, _ = read_volume(tmp_path / "a.dicom.json", volume=2)
        np.testing.assert_array_equal(found.array, read_volume(path, volume=2)[0].array)

    def test_whose_files_changed_are_refused(self, listed, tmp_path):
        files = sorted((tmp_path / "data").iterdir())
        ds = pydicom.dcmread(files[0])
        ds.EchoNumbers = 7
        ds.save_as(files[0])
        codes = {refusal_code(listed, volume=0), refusal_code(listed, volume=1)}
        assert codes & {"E_SERIES_CHANGED", "E_MISSING_SLICE", "E_AMBIGUOUS_STACK", "E_NONUNIFORM"}
        files[0].unlink()
        assert "E_MISSING" in {refusal_code(listed, volume=0), refusal_code(listed, volume=1)}

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content.update(medssl_series_list=2),
            lambda content: content.pop("files"),
            lambda content: content["volumes"][0].update(frames=[]),
            lambda content: content["volumes"][0].update(frames=[[9999, 0, None]]),
            lambda content: content["volumes"][0].update(frames=[[0, -1, None]]),
            lambda content: content["volumes"][0].update(frames=[["x", 0, None]]),
        ],
    )
    def test_that_are_damaged_are_refused(self, listed, damage):
        content = json.loads(listed.read_text())
        damage(content)
        listed.write_text(json.dumps(content, separators=(",", ":")))
        assert refusal(listed, volume=0).code == "E_SERIES_LIST"


def refusal_code(path, **options):
    try:
        read_volume(path, **options)
    except MedSSLError as error:
        return error.code
    return ""


class TestUnits:
    def test_of_a_ct_are_hu_by_themselves(self, tmp_path):
        write_series(tmp_path)
        assert read_volume(tmp_path)[0].unit == read_volume(tmp_path, unit="HU")[0].unit == "HU"
        assert refusal(tmp_path, unit="SUV").code == "E_UNIT"

    def test_of_an_mr_are_never_hu(self, tmp_path):
        write_series(tmp_path, modality="MR", slope=None)
        assert read_volume(tmp_path)[0].unit == "arbitrary"
        assert refusal(tmp_path, unit="HU").code == "E_UNIT"

    def test_of_whole_values_can_be_labels(self, tmp_path):
        write_series(tmp_path, modality="MR", slope=None)
        volume, _ = read_volume(tmp_path, unit="label")
        assert (volume.unit, volume.array.dtype) == ("label", np.uint16)

    def test_of_a_pet_are_suv_where_the_header_says_enough(self, tmp_path):
        def complete(datasets):
            for ds in datasets:
                ds.Units, ds.CorrectedImage, ds.DecayCorrection = "BQML", ["ATTN", "DECY"], "ADMIN"
                ds.PatientWeight = 80
                tracer = pydicom.Dataset()
                tracer.RadionuclideTotalDose = 4e8
                ds.RadiopharmaceuticalInformationSequence = [tracer]

        write_series(tmp_path / "a", modality="PT", slope=2.0, intercept=0.0, mutate=complete)
        volume, source = read_volume(tmp_path / "a", unit="SUV")
        np.testing.assert_allclose(volume.array[0], series_values() * 2.0 * 2e-4, rtol=1e-6)
        assert volume.default_fill == 0
        assert not any(warning.startswith("W_NO_SUV") for warning in source.warnings)
        write_series(tmp_path / "b", modality="PT", slope=2.0, intercept=0.0)
        volume, source = read_volume(tmp_path / "b")
        assert volume.unit == "arbitrary"
        assert any(warning.startswith("W_NO_SUV: ") for warning in source.warnings)

    def test_that_are_signed_and_labelled_unsigned_are_mended_on_demand(self, tmp_path):
        def mislabel(datasets):
            for ds in datasets:
                ds.PixelData = (np.frombuffer(ds.PixelData, "<u2").astype(int) - 200).astype("<i2").tobytes()
                ds.PixelPaddingValue = 65336  # -200

        write_series(tmp_path, intercept=-1000.0, mutate=mislabel)
        assert refusal(tmp_path).code == "E_SIGNEDNESS"
        volume, source = read_volume(tmp_path, fix_signedness=True)
        assert volume.array.min() == -1199  # stored -199; -200 is padding
        assert any(warning.startswith("W_SIGNEDNESS") for warning in source.warnings)

    def test_need_a_slope(self, tmp_path):
        write_series(tmp_path, slope=0.0)
        assert refusal_code(tmp_path) == "E_RESCALE"


class TestPictures:
    @pytest.mark.parametrize("signed", [False, True])
    def test_of_projections_are_turned_to_black_as_low(self, tmp_path, signed):
        stored = (np.arange(80).reshape(8, 10) - (40 if signed else 0)).astype(np.int16 if signed else np.uint16)
        path = write_2d(tmp_path / "a.dcm", pixels=stored, photometric="MONOCHROME1", BitsStored=12, HighBit=11)
        volume, source = read_volume(path)
        np.testing.assert_array_equal(volume.array[0, :, :, 0].T, -1 - stored if signed else 4095 - stored)
        assert any(warning.startswith("W_MONOCHROME1: a picture") for warning in source.warnings)

    def test_padding_of_a_turned_picture_is_found(self, tmp_path):
        stored = np.full((8, 10), 100, np.uint16)
        stored[0, 0] = 4095
        path = write_2d(
            tmp_path / "a.dcm",
            pixels=stored,
            photometric="MONOCHROME1",
            BitsStored=12,
            HighBit=11,
            PixelPaddingValue=4000,
            PixelPaddingRangeLimit=4095,
        )
        volume, _ = read_volume(path)
        assert volume.array[0, 0, 0, 0] in {0, 3995}

    def test_of_quantitative_series_are_not_turned(self, tmp_path):
        def invert(datasets):
            for ds in datasets:
                ds.PhotometricInterpretation = "MONOCHROME1"

        write_series(tmp_path, modality="MR", slope=None, mutate=invert)
        volume, source = read_volume(tmp_path)
        np.testing.assert_array_equal(volume.array[0], series_values())
        assert any("stored values were kept" in warning for warning in source.warnings)

    def test_in_colour_have_three_channels_and_grey_ones_have_one(self, tmp_path):
        colour = np.random.default_rng(0).integers(0, 255, (8, 10, 3)).astype(np.uint8)
        volume, _ = read_volume(write_2d(tmp_path / "a.dcm", pixels=colour, modality="US"))
        np.testing.assert_array_equal(volume.array[..., 0], colour.transpose(2, 1, 0))
        grey, source = read_volume(
            write_2d(tmp_path / "b.dcm", pixels=np.repeat(colour[..., :1], 3, axis=2), modality="US")
        )
        np.testing.assert_array_equal(grey.array[0, ..., 0], colour[..., 0].T)
        assert any(warning.startswith("W_GREY") for warning in source.warnings)


def test_gaps_are_filled_on_demand_only(tmp_path):
    write_series(tmp_path, shape=(8, 10, 7), mutate=lambda datasets: datasets[:3] + datasets[4:])
    with pytest.raises(GeometryError) as caught:
        read_volume(tmp_path)
    assert caught.value.code == "E_MISSING_SLICE"
    volume, source = read_volume(tmp_path, regularise=True)
    assert volume.geometry.isclose(series_geometry((8, 10, 7)))
    np.testing.assert_array_equal(volume.array[0], series_values((8, 10, 7)).astype(int) - 1024)  # counts are linear
    assert any(warning.startswith("W_REGULARISED") for warning in source.warnings)
    assert source.digest == digest(tmp_path, regularise=True)


def test_a_segmentation_is_no_image(tmp_path):
    path = write_2d(tmp_path / "a.dcm", SOPClassUID=uid.SegmentationStorage, modality="SEG")
    assert reader.kind(path) == "seg"
    assert refusal(path).code == "E_NOT_IMAGE"
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_screen_save_is_left_out_with_a_warning(tmp_path):
    write_series(tmp_path)
    [first, *_] = build_series()
    write_2d(
        tmp_path / "screen.dcm",
        modality="CT",
        series="series",
        pixels=np.zeros((30, 20), np.uint8),
        SOPClassUID=uid.SecondaryCaptureImageStorage,
        SeriesInstanceUID=first.SeriesInstanceUID,
    )
    volume, source = read_volume(tmp_path)
    assert volume.array.shape == (1, 10, 8, 6)
    assert any(warning.startswith(("W_SC", "W_LEFT_OUT")) for warning in source.warnings)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path)
    original = reader.assemble

    def grow(headers, **options):
        with headers[0].path.open("ab") as file:
            file.write(b"more")
        return original(headers, **options)

    monkeypatch.setattr(reader, "assemble", grow)
    with pytest.raises(MedSSLError) as caught:
        read_volume(tmp_path)
    assert caught.value.code == "E_CHANGED"


def test_a_codestream_with_another_sign_is_named(tmp_path):
    def mislabel(datasets):
        for ds in datasets:
            ds.PixelData = (np.frombuffer(ds.PixelData, "<u2").astype(int) - 100).astype("<i2").tobytes()
            ds.PixelRepresentation = 1

    paths = write_series(tmp_path, modality="MR", slope=None, mutate=mislabel, syntax=uid.JPEG2000Lossless)
    for path in paths:
        ds = pydicom.dcmread(path)
        ds.PixelRepresentation = 0
        ds.save_as(path)
    volume, source = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], series_values().astype(int) - 100)
    assert any(warning.startswith("W_CODESTREAM") for warning in source.warnings)


def test_a_copied_file_is_left_out_with_a_warning(tmp_path):
    paths = write_series(tmp_path)
    (tmp_path / "copy.dcm").write_bytes(paths[0].read_bytes())
    volume, source = read_volume(tmp_path)
    assert volume.array.shape == (1, 10, 8, 6)
    assert any(warning.startswith("W_DUPLICATE: 1 ") for warning in source.warnings)


def test_nothing_of_the_patient_comes_out(tmp_path):
    write_series(tmp_path)
    volume, source = read_volume(tmp_path)
    text = repr((source, volume.geometry))
    assert not any(value in text for value in CANARIES.values())


def ras(array, affine):
    return reorient(Volume(array, Geometry(array.shape[1:], affine), "arbitrary"))


def reference(name):
    """Volumes of a reference conversion in RAS, one a time point."""
    image = nibabel.load(SERIES / name)
    array = np.asanyarray(image.dataobj)
    array = array[..., None] if array.ndim == 3 else array
    return [ras(array[..., k][None], image.affine) for k in range(array.shape[3])]


D2N = "{0}/{1}_ground_truth.nii.gz"
REFERENCES = [
    ("bits12/dicom/12bitUnsigned.dcm", "bits12/ref_2.nii"),
    ("bits12/dicom/12bitUnsigned_0x0F0F.dcm", "bits12/ref_3.nii"),
    ("bits12/dicom/12bitSigned_0x0F0F.dcm", "bits12/ref_4.nii"),
    ("nih_siemens_epi/ap", "nih_siemens_epi/ref_ap.nii"),
    ("nih_siemens_epi/pa", "nih_siemens_epi/ref_pa.nii"),
    *(
        (f"{family}/{folder}", D2N.format(family, folder.replace("/", "_")))
        for family, folder in [
            ("siemens_generic", "generic/compressed_jpegls/001"),
            ("siemens_generic", "generic/compressed_jpeg/001"),
            ("siemens_generic", "generic/compressed_rle/001"),
            ("siemens_generic", "generic/compressed_j2k/001"),
            ("siemens_generic", "generic/anatomical/001"),
            ("siemens_generic", "siemens/anatomical/001"),
            ("siemens_generic", "failing/slicecount/001"),
            ("ge_anatomical", "ge/anatomical/001"),
            ("ge_anatomical", "ge/anatomical/001_implicit"),
            ("ge_anatomical", "ge/anatomical/001_single_slice"),
            ("siemens_multiframe", "siemens_multiframe/anatomical/001"),
            ("generic_non_isotropic", "generic/anatomical/002_non_isotropic"),
            ("hyperfine", "hyperfine/anatomical/001"),
            ("philips_enhanced_fmri", "philips_enhanced/fmri/001"),
            ("ge_dti", "ge/dti/001"),
            ("ge_dti_002", "ge/dti/002"),
            ("ge_fmri", "ge/fmri/001"),
        ]
    ),
]


@pytest.mark.realdata
@pytest.mark.skipif(not SERIES.exists(), reason="no real data here")
@pytest.mark.parametrize(("folder", "name"), REFERENCES)
def test_a_real_series_equals_its_reference_conversion(folder, name):
    wanted = reference(name)
    _, source = read_volume(SERIES / folder, volume=0)
    assert source.volumes == len(wanted)
    for number, volume in enumerate(wanted):
        found = reorient(read_volume(SERIES / folder, volume=number)[0])
        assert found.geometry.max_corner_distance_mm(volume.geometry) <= 1e-3
        np.testing.assert_allclose(found.array, volume.array, rtol=1e-6, atol=1e-6)


@pytest.mark.realdata
@pytest.mark.skipif(not SERIES.exists(), reason="no real data here")
class TestRealPeculiarities:
    def test_colour_equals_its_reference(self):
        image = nibabel.load(SERIES / "generic_rgb/generic_rgb_001_ground_truth.nii.gz")
        stored = np.asanyarray(image.dataobj)
        wanted = ras(np.stack([stored[channel] for channel in "RGB"]), image.affine) if stored.dtype.names else None
        found = reorient(read_volume(SERIES / "generic_rgb/generic/rgb/001")[0])
        if wanted is None:
            wanted = ras(np.moveaxis(stored, -1, 0)[:3], image.affine)
        assert found.geometry.max_corner_distance_mm(wanted.geometry) <= 1e-3

    def test_each_frame_of_philips_has_its_own_rescale(self):
        """dcm2niix takes Philips' private scale, which differs from the rescale by one factor and its rounding."""
        folder = SERIES / "philips_enh_b0" / "dicom"
        field, _ = read_volume(folder, volume=0)
        [wanted] = reference("philips_enh_b0/ref_e2_fieldmaphz.nii")
        assert reorient(field).geometry.max_corner_distance_mm(wanted.geometry) <= 1e-3
        np.testing.assert_allclose(reorient(field).array, wanted.array, atol=0.01)
        [wanted] = reference("philips_enh_b0/ref_e1.nii")
        magnitude = reorient(read_volume(folder, volume=1)[0])
        factor = float(wanted.array.max()) / float(magnitude.array.max())
        np.testing.assert_allclose(magnitude.array * factor, wanted.array, atol=1e-6 * float(wanted.array.max()))

    def test_a_mosaic_lies_where_its_protocol_says(self):
        """dicom2nifti's own reference is 148 mm off; the protocol's slices go from -59.854 to 88.392 mm."""
        folder = SERIES / "siemens_fmri_mosaic/siemens/fmri/001"
        [wanted, _] = reference("siemens_fmri_mosaic/siemens_fmri_001_ground_truth.nii.gz")
        volume = reorient(read_volume(folder, volume=0)[0])
        np.testing.assert_array_equal(volume.array, wanted.array)
        middle = (np.array(volume.geometry.shape) - 1) / 2
        first, last = (volume.geometry.to_world([middle[0] + 0.5, middle[1] - 0.5, z]) for z in (0, 49))
        assert abs(last[2] - first[2] - (88.39246 + 59.85446)) < 0.01
        assert abs(first[2] + 59.854) < 1.5

    def test_the_first_volume_of_a_philips_dti_equals_its_reference(self):
        """The reference has one right volume, that of the last direction, and three empty ones."""
        folder = SERIES / "philips_enhanced_dti/philips_enhanced/dti/001"
        wanted = reference("philips_enhanced_dti/philips_enhanced_dti_001_ground_truth.nii.gz")[0]
        found = [reorient(read_volume(folder, volume=number)[0]) for number in range(4)]
        assert all(volume.geometry.max_corner_distance_mm(wanted.geometry) <= 1e-3 for volume in found)
        assert any(np.allclose(volume.array, wanted.array, rtol=1e-6) for volume in found)

    @pytest.mark.parametrize(
        ("folder", "code"),
        [
            ("slice_increment_ge/failing/sliceincrement/001", "E_MISSING_SLICE"),
            ("slice_missing_siemens/failing/sliceincrement/002", "E_MISSING_SLICE"),
            ("prostatex_0000/calc_bval_missing_slice", "E_MISSING_SLICE"),
            ("slice_orientation/failing/sliceorientation/001", "E_SEVERAL"),
        ],
    )
    def test_faulty_series_are_refused(self, folder, code):
        assert refusal_code(SERIES / folder) == code

    @pytest.mark.parametrize(
        "folder",
        [
            "prostatex_0000/t2_tra",
            "prostatex_0000/adc",
            "prostatex_0001/adc",
            "hippocrop_study1/dicom",
            "hippocrop_study3/dicom",
            "torchio_ct/dicom",
            "datalad_t1/dicom",
        ],
    )
    def test_series_without_a_reference_lie_where_simpleitk_puts_them(self, folder):
        volume, _ = read_volume(SERIES / folder)
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(SERIES / folder))
        image = sitk.ReadImage(files)
        affine = np.eye(4)
        columns = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        affine[:3, :3], affine[:3, 3] = columns, image.GetOrigin()
        affine[:2] *= -1
        wanted = ras(sitk.GetArrayFromImage(image).T[None], affine)
        found = reorient(volume)
        assert found.geometry.max_corner_distance_mm(wanted.geometry) <= 1e-3
        np.testing.assert_array_equal(found.array, wanted.array)
