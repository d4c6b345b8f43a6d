from __future__ import annotations

import contextlib
import itertools
import warnings

import dicoms
import imagecodecs
import numpy as np
import pydicom
import pytest
from phantoms import REAL_DATA, damaged
from pydicom import uid
from verdicts import warned

from medssl.errors import MedSSLError
from medssl.geometry import Geometry
from medssl.io.dicom.segmentation import read_segmentation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from highdicom.seg import Segmentation, SegmentDescription, segread
    from pydicom.sr.coding import Code

SHAPE = (8, 10, 6)  # rows, columns, slices
SPACING = (0.8, 0.5, 2.0)
OBLIQUE = dicoms.rotated(dicoms.AXIAL, (1, 2, 3), 25.0)
LUNG, LIVER, LOCAL = Code("39607008", "SCT", "Zzcanary"), Code("10200004", "SCT", "x"), Code("John", "99X", "x")
REAL = REAL_DATA / "dicom_files" / "dicomdir_seg"


def described(number, kind=LUNG):
    return SegmentDescription(
        segment_number=number,
        segment_label="Zzcanary label",
        segmented_property_category=Code("123037004", "SCT", "Anatomical Structure"),
        segmented_property_type=kind,
        algorithm_type="MANUAL",
    )


def masks(segments=2, *, is_overlapping=False):
    """Slices, rows, columns, segments; no two slices, rows or columns are alike."""
    rows, columns, slices = SHAPE
    drawn = np.random.default_rng(3).random((slices, rows, columns, segments))
    if is_overlapping:
        return (drawn > 0.6).astype(np.uint8)
    return ((drawn > 0.4) & (drawn == drawn.max(axis=-1, keepdims=True))).astype(np.uint8)


def built(
    pixels, kind="BINARY", *, syntax=uid.ExplicitVRLittleEndian, orientation=dicoms.AXIAL, tilt_deg=0.0, **options
):
    """A SEG of the standard series by highdicom."""
    source = dicoms.build_series(SHAPE, spacing=SPACING, orientation=orientation, tilt_deg=tilt_deg)
    for image in source:
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        image.AccessionNumber, image.StudyTime, image.PatientSex = "", "", "O"
        image.StudyID = image.ReferringPhysicianName = ""
    kinds = (LUNG, LIVER, LOCAL)
    numbers = options.pop("numbers", range(1, pixels.shape[-1] + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Segmentation(
            source_images=source,
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=[described(number, what) for number, what in zip(numbers, itertools.cycle(kinds))],
            series_instance_uid=uid.generate_uid(),
            series_number=2,
            sop_instance_uid=uid.generate_uid(),
            instance_number=1,
            manufacturer="x",
            manufacturer_model_name="x",
            software_versions="1",
            device_serial_number="1",
            transfer_syntax_uid=syntax,
            **options,
        )


def saved(dataset, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


def grid(**options):
    return dicoms.series_geometry(SHAPE, spacing=SPACING, **options)


def refusal(path, *, on=None):
    with pytest.raises(MedSSLError) as caught:
        read_segmentation(path, on=on)
    assert str(path) in caught.value.message
    assert "canary" not in caught.value.message.lower()
    return caught.value.code


def change(path, alter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        alter(dataset)
        dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def seg(tmp_path):
    return saved(built(masks()), tmp_path / "a.dcm")


@pytest.mark.parametrize("orientation", [dicoms.AXIAL, dicoms.CORONAL, dicoms.SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("with_image", [True, False])
def test_binary_segments_become_a_label_map_as_highdicom_reads_it(tmp_path, orientation, with_image):
    path = saved(built(masks(), orientation=orientation), tmp_path / "a.dcm")
    decoded = read_segmentation(path, on=grid(orientation=orientation) if with_image else None)
    assert decoded.geometry.max_corner_distance_mm(grid(orientation=orientation)) < 1e-3
    oracle = segread(path).get_volume(combine_segments=True)
    affine = oracle.get_affine("RAS")
    for index in np.ndindex(oracle.spatial_shape):
        found = np.rint(decoded.geometry.to_index((affine @ (*index, 1))[:3])).astype(int)
        assert decoded.array[0][tuple(found)] == oracle.array[index]
    assert decoded.array.dtype == np.uint8
    assert decoded.array.flags.writeable
    assert (decoded.unit, decoded.warnings) == ("label", ())


def test_values_are_the_masks_that_were_stored(seg):
    drawn = masks()
    wanted = (drawn * [1, 2]).sum(axis=-1).transpose(2, 1, 0)
    assert np.array_equal(read_segmentation(seg, on=grid()).array[0], wanted)


def test_overlapping_segments_become_channels(tmp_path):
    drawn = masks(is_overlapping=True)
    path = saved(built(drawn), tmp_path / "a.dcm")
    decoded = read_segmentation(path, on=grid())
    assert np.array_equal(decoded.array, drawn.transpose(3, 2, 1, 0))
    assert warned(decoded) == ["W_OVERLAP"]


def test_facts_are_codes_of_known_schemes_only(tmp_path):
    path = saved(built(masks(3)), tmp_path / "a.dcm")
    assert read_segmentation(path).facts == {"region_1": "SCT 39607008", "region_2": "SCT 10200004"}


def test_fractional_segments_are_cut_at_half_of_the_maximum(tmp_path):
    drawn = np.random.default_rng(5).random((6, 8, 10, 1))
    path = saved(built(drawn, "FRACTIONAL", max_fractional_value=200), tmp_path / "a.dcm")
    decoded = read_segmentation(path, on=grid())
    wanted = np.around(drawn * 200) >= 100
    assert np.array_equal(decoded.array[0].astype(bool), wanted[..., 0].transpose(2, 1, 0))
    assert warned(decoded) == ["W_FRACTIONAL"]


@pytest.mark.parametrize("numbers", [(1, 2), (3, 700)])
def test_label_maps_keep_their_numbers(tmp_path, numbers):
    drawn = (masks() * numbers).sum(axis=-1).astype(np.uint16)
    path = saved(built(drawn[..., None][..., 0], "LABELMAP", numbers=numbers), tmp_path / "a.dcm")
    decoded = read_segmentation(path, on=grid())
    assert np.array_equal(decoded.array[0], drawn.transpose(2, 1, 0))
    assert decoded.array.dtype == (np.uint8 if max(numbers) < 256 else np.uint16)


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.HTJ2KLossless])
@pytest.mark.parametrize("kind", ["FRACTIONAL", "LABELMAP"])
def test_compressed_frames_are_decoded(tmp_path, kind, syntax):
    drawn = masks()
    labels = (drawn * [1, 2]).sum(axis=-1).astype(np.uint8)
    plain = saved(built(drawn.astype(float) if kind == "FRACTIONAL" else labels, kind), tmp_path / "a.dcm")
    path = dicoms.write(pydicom.dcmread(plain), tmp_path / "b.dcm", syntax=syntax)
    assert np.array_equal(read_segmentation(path, on=grid()).array[0], labels.transpose(2, 1, 0))


def test_compressed_frames_of_one_bit_are_decoded(seg):
    drawn = read_segmentation(seg).array

    def alter(dataset):
        frames = masks()[::-1].transpose(3, 0, 1, 2).reshape(-1, 8, 10)  # highdicom begins at the head
        dataset.PixelData = pydicom.encaps.encapsulate(
            [imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k", bitspersample=1) for frame in frames]
        )
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless

    assert np.array_equal(read_segmentation(change(seg, alter)).array, drawn)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_other_uncompressed_syntaxes_give_the_same(seg, tmp_path, syntax):
    plain = read_segmentation(seg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(seg)
        again = dicoms.write(dataset, tmp_path / "b.dcm", syntax=syntax)
    assert np.array_equal(read_segmentation(again).array, plain.array)


def test_a_deflated_file_that_ends_early_is_refused(seg, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = dicoms.write(pydicom.dcmread(seg), tmp_path / "b.dcm", syntax=uid.DeflatedExplicitVRLittleEndian)
    again.write_bytes(again.read_bytes()[:-40])
    assert refusal(again) == "E_TRUNCATED"


def test_a_deflated_bomb_is_refused(seg, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = dicoms.write(pydicom.dcmread(seg), tmp_path / "b.dcm", syntax=uid.DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("medssl.io.dicom.objects._SMALLEST_LIMIT_BYTES", 100)
    monkeypatch.setattr("medssl.io.dicom.objects._MOST_GROWTH", 0)
    assert refusal(again) == "E_BOMB"


def test_slices_without_a_frame_are_empty(tmp_path):
    drawn = masks()
    drawn[[1, 4]] = 0
    path = saved(built(drawn, omit_empty_frames=True), tmp_path / "a.dcm")
    wanted = (drawn * [1, 2]).sum(axis=-1).transpose(2, 1, 0)
    for decoded in (read_segmentation(path), read_segmentation(path, on=grid())):
        assert decoded.geometry.isclose(grid())
        assert np.array_equal(decoded.array[0], wanted)


@pytest.mark.parametrize(("claimed", "slices"), [(2.0, 5), (1.7, 3), (4.0, 3)])
def test_a_claimed_spacing_counts_where_it_divides_the_gaps(tmp_path, claimed, slices):
    drawn = masks()
    drawn[1::2] = 0
    path = saved(built(drawn, omit_empty_frames=True), tmp_path / "a.dcm")

    def alter(dataset):
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = claimed

    decoded = read_segmentation(change(path, alter))
    assert decoded.geometry.shape == (10, 8, slices)
    assert decoded.geometry.spacing_mm[2] == pytest.approx(8 / (slices - 1))


def test_order_of_frames_means_nothing(seg):
    plain = read_segmentation(seg)

    def alter(dataset):
        frames = list(dataset.PerFrameFunctionalGroupsSequence)
        size = SHAPE[0] * SHAPE[1] // 8
        parts = [dataset.PixelData[i * size : (i + 1) * size] for i in range(len(frames))]
        order = np.random.default_rng(0).permutation(len(frames))
        dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence([frames[i] for i in order])
        dataset.PixelData = b"".join(parts[i] for i in order)

    again = read_segmentation(change(seg, alter))
    assert np.array_equal(again.array, plain.array)
    assert again.geometry.isclose(plain.geometry)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    tilted = grid(tilt_deg=15.0)
    path = saved(built(masks(), tilt_deg=15.0), tmp_path / "a.dcm")
    on, own = read_segmentation(path, on=tilted), read_segmentation(path)
    assert own.geometry.isclose(tilted)
    assert np.array_equal(on.array, own.array)


def test_bits_of_frames_that_end_within_a_byte(seg):
    def alter(dataset):
        dataset.Rows, dataset.Columns = 5, 7
        bits = (np.arange(5 * 7 * dataset.NumberOfFrames) % 3 == 0) & (
            np.arange(5 * 7 * dataset.NumberOfFrames) < 5 * 7 * SHAPE[2]
        )
        dataset.PixelData = np.packbits(bits, bitorder="little").tobytes()

    array = read_segmentation(change(seg, alter)).array[0]
    assert np.array_equal(array, (np.arange(5 * 7 * 6) % 3 == 0).reshape(6, 5, 7)[::-1].T)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL", "ILP"])
def test_the_image_may_lie_in_memory_in_another_order(seg, orientation):
    plain = read_segmentation(seg, on=grid())
    turned = read_segmentation(seg, on=grid().reoriented(orientation))
    assert turned.geometry.orientation == orientation
    for index in np.argwhere(plain.array[0] > 0):
        found = np.rint(turned.geometry.to_index(plain.geometry.to_world(index))).astype(int)
        assert turned.array[0][tuple(found)] == plain.array[0][tuple(index)]
    assert np.count_nonzero(turned.array) == np.count_nonzero(plain.array)


def test_an_image_of_more_slices_takes_the_frames_where_they_lie(seg):
    longer = grid().cropped((0, 0, -2), (10, 8, 11))
    assert np.array_equal(read_segmentation(seg, on=longer).array[..., 2:8], read_segmentation(seg).array)


@pytest.mark.parametrize(
    "on",
    [
        Geometry((10, 8, 6), np.diag([0.5, 0.8, 2.0, 1.0])),
        grid().cropped((0, 0, 1), (10, 8, 6)),
        grid().cropped((0, 0, 0), (9, 8, 6)),
        grid().respaced((0.5, 0.8, 1.9)),
        grid(origin=(-12.0, 7.15, 30.0)),
        grid(orientation=dicoms.rotated(dicoms.AXIAL, (0, 0, 1), 45.0)),
        dicoms.series_geometry(SHAPE, spacing=(0.8, 0.53, 2.0)),
        Geometry((10, 8, 6), np.array([[0, 0.5, 2, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1.0]])),
    ],
)
def test_frames_off_the_grid_of_the_image_are_refused(seg, on):
    assert refusal(seg, on=on) == "E_GEOMETRY"


def _without_position(dataset):
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence


def test_frames_without_position_are_refused(seg):
    change(seg, _without_position)
    assert refusal(seg) == "E_NO_GEOMETRY"
    assert refusal(seg, on=grid()) == "E_NO_GEOMETRY"


def test_some_frames_without_position_are_refused(seg):
    def alter(dataset):
        del dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence

    change(seg, alter)
    assert refusal(seg) == "E_NO_GEOMETRY"
    assert refusal(seg, on=grid()) == "E_NO_GEOMETRY"


def test_a_2d_image_without_position_takes_a_frame_of_its_size(seg):
    def alter(dataset):
        _without_position(dataset)
        dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:1]
        dataset.NumberOfFrames = 1
        dataset.PixelData = dataset.PixelData[: SHAPE[0] * SHAPE[1] // 8]

    change(seg, alter)
    decoded = read_segmentation(seg, on=Geometry((10, 8, 1), np.eye(4)))
    assert np.array_equal(decoded.array[0, :, :, 0], masks()[-1, :, :, 0].T)


def test_one_frame_takes_its_thickness(seg):
    def alter(dataset):
        dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:1]
        dataset.NumberOfFrames = 1
        dataset.PixelData = dataset.PixelData[: SHAPE[0] * SHAPE[1] // 8]

    decoded = read_segmentation(change(seg, alter))
    assert decoded.geometry.isclose(grid().cropped((0, 0, 5), (10, 8, 1)))
    assert decoded.geometry.spacing_mm[2] == pytest.approx(2.0)
    assert warned(decoded) == ["W_SINGLE_SLICE"]


def _frame(dataset, index=0):
    return dataset.PerFrameFunctionalGroupsSequence[index]


def _shift(dataset):
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        plane = frame.PlanePositionSequence[0]
        if plane.ImagePositionPatient[2] > 39:
            plane.ImagePositionPatient = [*plane.ImagePositionPatient[:2], 40.9]


def _turn_one(dataset):
    plane = pydicom.Dataset()
    plane.ImageOrientationPatient = list(dicoms.CORONAL)
    _frame(dataset).PlaneOrientationSequence = pydicom.Sequence([plane])


def _set(keyword, value):
    return lambda dataset: setattr(dataset, keyword, value)


def _twice(dataset):
    _frame(dataset, 1).PlanePositionSequence = _frame(dataset).PlanePositionSequence


FAULTS = {
    "uneven": (_shift, "E_NONUNIFORM"),
    "turned": (_turn_one, "E_GEOMETRY"),
    "twice at one place": (_twice, "E_DUP_POSITION"),
    "short": (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2]), "E_PIXEL_LENGTH"),
    "long": (lambda ds: setattr(ds, "PixelData", ds.PixelData + bytes(4)), "E_PIXEL_LENGTH"),
    "no pixels": (lambda ds: delattr(ds, "PixelData"), "E_PIXEL_LENGTH"),
    "frames": (_set("NumberOfFrames", 5), "E_TAG"),
    "no frames": (lambda ds: delattr(ds, "NumberOfFrames"), "E_TAG"),
    "bits": (_set("BitsAllocated", 32), "E_TAG"),
    "samples": (_set("SamplesPerPixel", 3), "E_TAG"),
    "rows": (_set("Rows", 0), "E_SHAPE"),
    "type": (_set("SegmentationType", "SQUARE"), "E_TAG"),
    "no segments": (_set("SegmentSequence", pydicom.Sequence()), "E_TAG"),
    "number": (lambda ds: setattr(ds.SegmentSequence[0], "SegmentNumber", 0), "E_TAG"),
    "number twice": (lambda ds: setattr(ds.SegmentSequence[0], "SegmentNumber", 2), "E_TAG"),
    "unknown segment": (
        lambda ds: setattr(_frame(ds).SegmentIdentificationSequence[0], "ReferencedSegmentNumber", 9),
        "E_TAG",
    ),
    "no segment": (lambda ds: delattr(_frame(ds), "SegmentIdentificationSequence"), "E_TAG"),
    "two coordinates": (
        lambda ds: setattr(_frame(ds).PlanePositionSequence[0], "ImagePositionPatient", [1, 2]),
        "E_TAG",
    ),
    "orientation": (
        lambda ds: setattr(
            ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0], "ImageOrientationPatient", [1, 0, 0] * 2
        ),
        "E_IOP",
    ),
    "spacing": (
        lambda ds: setattr(ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "PixelSpacing", [90, 90]),
        "E_SPACING",
    ),
    "class": (_set("SOPClassUID", uid.CTImageStorage), "E_FORMAT"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_refused(seg, name):
    alter, code = FAULTS[name]
    assert refusal(change(seg, alter)) == code


def test_a_number_that_is_none_is_refused(seg):
    raw = bytearray(seg.read_bytes())
    raw[raw.index(b"\x20\x00\x32\x00DS") + 8] = ord("x")
    seg.write_bytes(raw)
    assert refusal(seg) in {"E_TAG", "E_HEADER"}


def test_huge_channels_are_refused(seg, monkeypatch):
    monkeypatch.setattr("medssl.io.dicom.masks._MOST_BYTES", 400)
    assert refusal(seg) == "E_BOMB"


def test_label_maps_of_unknown_numbers_are_refused(tmp_path):
    drawn = (masks() * [1, 2]).sum(axis=-1).astype(np.uint8)
    path = saved(built(drawn, "LABELMAP", numbers=(1, 2)), tmp_path / "a.dcm")

    def alter(dataset):
        dataset.SegmentSequence = pydicom.Sequence([s for s in dataset.SegmentSequence if s.SegmentNumber != 2])

    assert refusal(change(path, alter)) == "E_LABEL_VALUE"


def test_padding_of_a_label_map_is_background(tmp_path):
    drawn = (masks() * [1, 2]).sum(axis=-1).astype(np.uint8)
    path = saved(built(drawn, "LABELMAP", numbers=(1, 2)), tmp_path / "a.dcm")

    def alter(dataset):
        dataset.SegmentSequence = pydicom.Sequence([s for s in dataset.SegmentSequence if s.SegmentNumber == 1])
        dataset.PixelPaddingValue = 2

    assert np.array_equal(read_segmentation(change(path, alter)).array[0], (drawn == 1).transpose(2, 1, 0))


def test_compressed_frames_that_are_missing_are_refused(tmp_path):
    plain = saved(built(masks().astype(float), "FRACTIONAL"), tmp_path / "a.dcm")
    path = dicoms.write(pydicom.dcmread(plain), tmp_path / "b.dcm", syntax=uid.RLELossless)

    def alter(dataset):
        frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames)))
        dataset.PixelData = pydicom.encaps.encapsulate(frames[:-1])

    assert refusal(change(path, alter)) in {"E_PIXEL_LENGTH", "E_HEADER"}


def test_damage_ends_in_a_refusal(seg):
    for data in damaged(seg.read_bytes(), seed=1):
        seg.write_bytes(data)
        with contextlib.suppress(MedSSLError):
            read_segmentation(seg)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(b"no DICOM at all" * 20)
    assert refusal(path) in {"E_FORMAT", "E_HEADER"}
    assert refusal(tmp_path / "b.dcm") == "E_MISSING"


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no real data here")
def test_real_segmentations_agree_with_highdicom():
    for name in ("binary", "binary_overlap", "true_fractional"):
        path = REAL / f"seg_image_ct_{name}.dcm"
        decoded = read_segmentation(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = segread(path).get_volume(allow_missing_positions=True, rescale_fractional=True)
        values = oracle.array > 0.4999
        affine = oracle.get_affine("RAS")
        last = np.array(oracle.spatial_shape) - 1
        for corner in itertools.product(*((0, n) for n in last)):
            index = decoded.geometry.to_index((affine @ (*corner, 1))[:3])
            assert np.abs(index - np.rint(index)).max() * 1.25 < 1e-3
        flat = (
            decoded.array
            if decoded.array.shape[0] > 1
            else decoded.array == np.arange(1, values.shape[-1] + 1)[:, None, None, None]
        )
        start = np.rint(decoded.geometry.to_index((affine @ (0, 0, 0, 1))[:3])).astype(int)
        found = flat.transpose(3, 2, 1, 0).astype(bool)
        assert np.array_equal(found if start[2] == 0 else found[::-1], values)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no real data here")
def test_a_real_segmentation_lies_on_its_image():
    slices = [pydicom.dcmread(path) for path in sorted((REAL / "77654033" / "CT2").iterdir())][1:]
    affine = np.diag([-0.488281, -0.488281, 1.25, 1.0])
    x, y, z = slices[0].ImagePositionPatient
    affine[:3, 3] = -x, -y, z
    decoded = read_segmentation(REAL / "seg_image_ct_binary.dcm", on=Geometry((16, 16, 3), affine))
    assert np.array_equal(decoded.array, read_segmentation(REAL / "seg_image_ct_binary.dcm").array)
