import json
import re
import struct

import nibabel
import numpy as np
import pydicom
import pytest
from dicoms import CANARIES, build_series, save, write, write_2d, write_clip, write_enhanced
from phantoms import REAL_DATA
from pydicom import uid
from pydicom.dataset import Dataset
from verdicts import warned

from medssl.errors import ReadError
from medssl.io.dicom.header import from_dict, read_header, to_dict, token
from medssl.io.dicom.model import FACTS

SERIES = REAL_DATA / "dicom_series"
FILES = REAL_DATA / "dicom_files"
real = [pytest.mark.realdata, pytest.mark.skipif(not SERIES.exists(), reason="no real data here")]


def item(**tags):
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def slice_with(tmp_path, *, drop=(), private=(), syntax=uid.ExplicitVRLittleEndian, modality="CT", **tags):
    ds = build_series((8, 10, 1), modality=modality)[0]
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    for keyword in drop:
        delattr(ds, keyword)
    for tag, vr, value in private:
        ds.add_new(tag, vr, value)
    return write(ds, tmp_path / "a.dcm", syntax=syntax)


def patched(path, tag, value):
    """Replace the bytes of a short explicit element, whatever they say."""
    data = path.read_bytes()
    start = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 132)
    length = struct.unpack_from("<H", data, start + 6)[0]
    padded = value + b" " * (len(value) % 2)
    path.write_bytes(data[: start + 6] + struct.pack("<H", len(padded)) + padded + data[start + 8 + length :])
    return path


def refusal(path):
    with pytest.raises(ReadError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return caught.value.code


def test_single_slice_gives_one_frame_with_its_place_and_scale(tmp_path):
    path = slice_with(tmp_path, PixelPaddingValue=60_000, SpacingBetweenSlices="2.5")
    header = read_header(path)
    (frame,) = header.frames
    assert (header.kind, header.modality, header.size) == ("image", "CT", path.stat().st_size)
    assert (frame.rows, frame.columns) == (8, 10)
    assert frame.position_mm == (-12.0, 7.0, 30.0)
    assert frame.orientation == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert frame.spacing_mm == (0.8, 0.5)
    assert (frame.slope, frame.intercept, frame.rescale_type, frame.has_rescale) == (1.0, -1024.0, "HU", True)
    assert (frame.thickness_mm, frame.between_mm, frame.number) == (2.0, 2.5, 1)
    assert header.pixels.length == 160
    assert header.pixels.padding == (60_000, 60_000)
    assert path.read_bytes()[header.pixels.offset :][:160] == pydicom.dcmread(path).PixelData
    assert header.facts["spacing_from"] == "patient"
    assert header.warnings == ()


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
)
def test_coding_changes_nothing_but_where_the_pixels_are(tmp_path, syntax):
    plain = read_header(slice_with(tmp_path, PixelPaddingValue=60_000))
    path = slice_with(tmp_path, syntax=syntax, PixelPaddingValue=60_000)
    other = read_header(path)
    assert other.frames == plain.frames
    assert other.facts == plain.facts
    assert other.size == path.stat().st_size
    assert (other.pixels.transfer_syntax, other.pixels.length, other.pixels.padding) == (syntax, 160, (60_000, 60_000))


def test_padding_has_the_sign_of_the_pixels(tmp_path):
    path = slice_with(tmp_path, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1, PixelRepresentation=1)
    assert read_header(path).pixels.padding == (-2000, -1)
    path.write_bytes(path.read_bytes().replace(b"\x28\0\x20\1SS", b"\x28\0\x20\1US"))
    assert read_header(path).pixels.padding == (-2000, -1)
    assert read_header(slice_with(tmp_path, PixelPaddingRangeLimit=5)).pixels.padding is None


def test_identifiers_are_keyed_hashes_and_nothing_else_of_the_patient_is_kept(tmp_path):
    path = slice_with(
        tmp_path, PatientAge="093Y", PatientSex="F", Manufacturer="Quentin Works", PatientComments="Zzcanary"
    )
    ds = pydicom.dcmread(path)
    text = json.dumps(to_dict(read_header(path, key=b"k")))
    for secret in (
        *CANARIES.values(),
        ds.SeriesInstanceUID,
        ds.SOPInstanceUID,
        ds.StudyInstanceUID,
        "Quentin",
        "canary",
    ):
        assert secret not in text
    header = read_header(path, key=b"k")
    assert header.series == token(ds.SeriesInstanceUID, key=b"k") != token(ds.SeriesInstanceUID, key=b"l")
    assert re.fullmatch("[0-9a-f]{16}", header.patient)
    assert header.frames[0].patient == header.patient
    assert header.facts["patient_age_years"] == 90.0
    assert header.facts["manufacturer"] == "other"
    assert token("", key=b"") == ""
    assert set(header.facts) <= set(FACTS)


def test_patient_without_id_is_known_by_the_study(tmp_path):
    path = slice_with(tmp_path, PatientID="")
    assert read_header(path).patient == token(pydicom.dcmread(path).StudyInstanceUID, key=b"")
    other = read_header(slice_with(tmp_path, IssuerOfPatientID="here"))
    assert other.patient != read_header(slice_with(tmp_path, IssuerOfPatientID="there")).patient


def test_facts_are_checked_before_they_are_kept(tmp_path):
    tags = {
        "Manufacturer": "Philips Medical Systems",
        "BodyPartExamined": "HEAD",
        "PatientAge": "006M",
        "BurnedInAnnotation": "YES",
        "LossyImageCompression": "01",
        "ContrastBolusAgent": "something",
        "KVP": "120",
        "ImageLaterality": "L",
        "PatientPosition": "HFS",
        "ScanningSequence": ["SE", "IR"],
        "MagneticFieldStrength": "3",
    }
    facts = read_header(slice_with(tmp_path, **tags)).facts
    assert (
        facts.items()
        >= {
            "manufacturer": "philips",
            "body_part": "HEAD",
            "patient_age_years": 0.5,
            "burned_in": "yes",
            "lossy": "yes",
            "contrast": "yes",
            "kvp": 120.0,
            "laterality": "L",
            "patient_position": "HFS",
            "scanning_sequence": "SE\\IR",
            "field_strength_T": 3.0,
            "slice_thickness_mm": 2.0,
            "modality": "CT",
        }.items()
    )
    path = patched(slice_with(tmp_path, **tags), 0x00180015, b"J. Doe's knee")
    path = patched(patched(path, 0x00180087, b"3,0"), 0x00080008, b"DERIVED \\J. Doe")
    facts = read_header(path).facts
    assert facts["body_part"] == "OTHER"
    assert "field_strength_T" not in facts
    assert re.fullmatch(r"DERIVED\\OTHER-[0-9a-f]{4}", str(facts["image_type"]))


NOT_IMAGES = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    uid.BasicTextSRStorage: "structured report",
    uid.KeyObjectSelectionDocumentStorage: "key object",
    uid.GrayscaleSoftcopyPresentationStateStorage: "presentation state",
    uid.EncapsulatedPDFStorage: "PDF",
    uid.RTPlanStorage: "plan",
    uid.RTDoseStorage: "dose",
    uid.MRSpectroscopyStorage: "spectroscopy",
    uid.VLWholeSlideMicroscopyImageStorage: "whole slide",
    "1.2.3.4": "without a picture",
}


@pytest.mark.parametrize("sop_class", NOT_IMAGES)
def test_objects_without_image_are_named(tmp_path, sop_class):
    ds = item(SOPClassUID=sop_class, SOPInstanceUID="1.2.3", Modality="OT")
    path = write(ds, tmp_path / "a.dcm")
    with pytest.raises(ReadError, match=NOT_IMAGES[sop_class]) as caught:
        read_header(path)
    assert caught.value.code == "E_NOT_IMAGE"


def truncated(path, count):
    path.write_bytes(path.read_bytes()[:-count])
    return path


def doubled(path):
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData * 2
    ds.save_as(path)
    return path


def without_pixels(path):
    ds = pydicom.dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    return path


def junk_behind_pixels(path):
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData + b"abcd"
    ds.save_as(path)
    return path


def saying_nothing(path):
    path.write_bytes(bytes(128) + b"DICM" + struct.pack("<HH2sH", 0x0010, 0x0040, b"CS", 2) + b"F ")
    return path


REFUSED = {
    "cut off inside the pixels": (lambda d: truncated(slice_with(d), 31), "E_PIXEL_LENGTH"),
    "twice the pixels": (lambda d: doubled(slice_with(d)), "E_PIXEL_LENGTH"),
    "junk behind the pixels": (lambda d: junk_behind_pixels(slice_with(d)), "E_PIXEL_LENGTH"),
    "no pixels": (lambda d: without_pixels(slice_with(d)), "E_PIXEL_LENGTH"),
    "deflated with twice the pixels": (
        lambda d: doubled(slice_with(d, syntax=uid.DeflatedExplicitVRLittleEndian)),
        "E_PIXEL_LENGTH",
    ),
    "huge picture": (
        lambda d: slice_with(d, Rows=65_535, Columns=65_535, NumberOfFrames="1000000"),
        "E_SIZE_LIE",
    ),
    "huge compressed picture": (
        lambda d: patched(write_2d(d / "a.dcm", NumberOfFrames="1", syntax=uid.RLELossless), 0x00280008, b"99999999"),
        "E_SIZE_LIE",
    ),
    "no rows": (lambda d: slice_with(d, Rows=0), "E_HEADER"),
    "twelve bits packed": (lambda d: slice_with(d, BitsAllocated=12), "E_TAG"),
    "more bits stored than allocated": (lambda d: slice_with(d, BitsStored=17), "E_TAG"),
    "high bit too low": (lambda d: slice_with(d, HighBit=3), "E_TAG"),
    "two samples": (lambda d: slice_with(d, SamplesPerPixel=2), "E_TAG"),
    "no frames": (lambda d: slice_with(d, NumberOfFrames="0"), "E_TAG"),
    "half a frame": (lambda d: patched(slice_with(d, NumberOfFrames="1"), 0x00280008, b"0.5"), "E_TAG"),
    "decimal comma": (lambda d: patched(slice_with(d), 0x00280030, b"0,5\\0,5"), "E_TAG"),
    "decimal comma in the thickness": (lambda d: patched(slice_with(d), 0x00180050, b"2,0"), "E_TAG"),
    "spacing below 0": (lambda d: slice_with(d, PixelSpacing=["-1", "1"]), "E_TAG"),
    "one spacing": (lambda d: slice_with(d, PixelSpacing="1"), "E_TAG"),
    "position of two numbers": (lambda d: slice_with(d, ImagePositionPatient=["1", "2"]), "E_TAG"),
    "position not finite": (lambda d: patched(slice_with(d), 0x00200032, b"1\\nan\\2"), "E_TAG"),
    "slope 0": (lambda d: slice_with(d, RescaleSlope="0"), "E_RESCALE"),
    "slope not finite": (lambda d: patched(slice_with(d), 0x00281053, b"inf"), "E_RESCALE"),
    "slope alone": (lambda d: slice_with(d, drop=["RescaleIntercept"]), "E_RESCALE"),
    "nothing said": (lambda d: saying_nothing(d / "a.dcm"), "E_HEADER"),
    "pieces where none may be": (
        lambda d: patched(write_2d(d / "a.dcm", syntax=uid.RLELossless), 0x00020010, b"1.2.840.10008.1.2.1\0"),
        "E_HEADER",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_cannot_be_true_are_refused(tmp_path, name):
    make, code = REFUSED[name]
    assert refusal(make(tmp_path)) == code


def test_zeros_behind_the_pixels_are_ignored_with_a_warning(tmp_path):
    path = slice_with(tmp_path)
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData + bytes(20)
    ds.save_as(path)
    header = read_header(path)
    assert warned(header) == ["W_TRAILING"]
    assert header.pixels.length == 160


def test_one_pad_byte_is_fine(tmp_path):
    header = read_header(write_2d(tmp_path / "a.dcm", pixels=np.zeros((3, 3), dtype=np.uint8)))
    assert header.pixels.length == 10
    assert header.warnings == ()


def test_long_decimal_strings_and_odd_identifiers_are_read_with_a_warning(tmp_path):
    path = patched(slice_with(tmp_path), 0x00280030, b"0.80000000000000000001\\0.50000000000000000001")
    path = patched(path, 0x0020000E, b"../../etc/passwd")
    header = read_header(path)
    assert warned(header) == ["W_UID", "W_DS_LENGTH"]
    assert header.frames[0].spacing_mm == pytest.approx((0.8, 0.5))
    assert "passwd" not in json.dumps(to_dict(header))


def test_empty_and_missing_values_are_none(tmp_path):
    header = read_header(slice_with(tmp_path, SliceThickness="", InstanceNumber="", drop=["ImagePositionPatient"]))
    frame = header.frames[0]
    assert (frame.thickness_mm, frame.number, frame.position_mm) == (None, None, None)
    assert read_header(patched(slice_with(tmp_path), 0x00200013, b"one")).frames[0].number is None
    assert not read_header(slice_with(tmp_path, drop=["RescaleSlope", "RescaleIntercept"])).frames[0].has_rescale


def test_a_table_of_values_is_named(tmp_path):
    assert warned(read_header(slice_with(tmp_path, ModalityLUTSequence=[item(CodeValue="1")]))) == ["W_MODALITY_LUT"]


def region(**tags):
    plain = {
        "PhysicalUnitsXDirection": 3,
        "PhysicalUnitsYDirection": 3,
        "PhysicalDeltaX": 0.03,
        "PhysicalDeltaY": -0.02,
    }
    return item(RegionSpatialFormat=1, **(plain | tags))


@pytest.mark.parametrize(
    ("tags", "spacing", "origin", "warning"),
    [
        ({"PixelSpacing": [0.3, 0.4]}, (0.3, 0.4), "patient", []),
        ({"PixelSpacing": [0.3, 0.4], "ImagerPixelSpacing": [0.5, 0.6]}, (0.3, 0.4), "patient", []),
        ({"PixelSpacing": [0.3, 0.4], "ImagerPixelSpacing": [0.3, 0.4]}, (0.3, 0.4), "imager", ["W_IMAGER_SPACING"]),
        ({"ImagerPixelSpacing": [0.5, 0.6]}, (0.5, 0.6), "imager", ["W_IMAGER_SPACING"]),
        (
            {"ImagerPixelSpacing": [0.5, 0.6], "EstimatedRadiographicMagnificationFactor": 2},
            (0.25, 0.3),
            "magnification",
            ["W_IMAGER_SPACING"],
        ),
        ({"NominalScannedPixelSpacing": [0.1, 0.2]}, (0.1, 0.2), "scanner", []),
        ({"PixelSpacing": [0, 0]}, None, None, []),
        ({}, None, None, []),
        ({"SequenceOfUltrasoundRegions": [region()]}, (0.2, 0.3), "ultrasound region", ["W_US_SPACING"]),
        ({"SequenceOfUltrasoundRegions": [region(), region()]}, (0.2, 0.3), "ultrasound region", ["W_US_SPACING"]),
        ({"SequenceOfUltrasoundRegions": [region(), region(PhysicalDeltaX=0.04)]}, None, None, []),
        ({"SequenceOfUltrasoundRegions": [region(), region(PhysicalUnitsXDirection=4)]}, None, None, []),
    ],
)
def test_spacing_comes_from_the_best_element(tmp_path, tags, spacing, origin, warning):
    header = read_header(write_2d(tmp_path / "a.dcm", **tags))
    assert header.frames[0].spacing_mm == (None if spacing is None else pytest.approx(spacing))
    assert header.facts.get("spacing_from") == origin
    assert warned(header) == warning


def test_clip_frames_have_spacing_but_no_place(tmp_path):
    header = read_header(write_clip(tmp_path / "a.dcm", frames=5))
    assert [frame.traits["frame"] for frame in header.frames] == [1, 2, 3, 4, 5]
    assert {frame.position_mm for frame in header.frames} == {None}
    assert {frame.spacing_mm for frame in header.frames} == {(0.3, 0.2)}
    assert [frame.index for frame in header.frames] == [0, 1, 2, 3, 4]


def test_enhanced_frames_follow_their_functional_groups(tmp_path):
    path = write_enhanced(tmp_path / "a.dcm", volumes=2, order=[3, 0, 7, 11])
    header = read_header(path)
    dataset = pydicom.dcmread(path)
    for frame, group in zip(header.frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        assert list(frame.position_mm) == group.PlanePositionSequence[0].ImagePositionPatient
        assert frame.slope == group.PixelValueTransformationSequence[0].RescaleSlope
        assert frame.traits["time_point"] == group.FrameContentSequence[0].TemporalPositionIndex
        assert frame.traits["stack"] == "1"
    assert {frame.orientation for frame in header.frames} == {(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}
    assert {frame.spacing_mm for frame in header.frames} == {(0.8, 0.5)}
    assert header.facts["spacing_from"] == "patient"


def test_enhanced_traits_tell_volumes_apart(tmp_path):
    def change(group, k, volume):
        direction = item(DiffusionGradientOrientation=[1.0, 0.0, 0.0])
        group.MRDiffusionSequence = [
            item(DiffusionBValue=500.0 * volume, DiffusionGradientDirectionSequence=[direction])
        ]
        group.MREchoSequence = [item(EffectiveEchoTime=10.0 + volume)]
        group.CardiacSynchronizationSequence = [item(NominalCardiacTriggerDelayTime=5.0 * volume)]
        group.MRImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "M"])]
        group.FrameContentSequence[0].StackID = "a's"

    def dimensions(ds):
        pointers = (0x00209056, 0x00209057, 0x00209128)
        ds.DimensionIndexSequence = [item(DimensionIndexPointer=pointer) for pointer in pointers]

    frames = read_header(write_enhanced(tmp_path / "a.dcm", volumes=2, frame=change, mutate=dimensions)).frames
    assert frames[-1].traits == {
        "acquisition": 1.0,
        "image_type": "ORIGINAL\\PRIMARY\\M",
        "time_point": 2.0,
        "b_value": 500.0,
        "direction": "1.000,0.000,0.000",
        "echo_time_ms": 11.0,
        "trigger_ms": 5.0,
        "stack": "OTHER",
        "dimension_3": 2,
    }


def test_a_missing_functional_group_is_refused(tmp_path):
    path = write_enhanced(tmp_path / "a.dcm", mutate=lambda ds: ds.PerFrameFunctionalGroupsSequence.pop())
    assert refusal(path) == "E_HEADER"


def test_enhanced_file_of_one_frame_has_its_place(tmp_path):
    header = read_header(write_enhanced(tmp_path / "a.dcm", order=[2]))
    assert [frame.position_mm[2] for frame in header.frames] == [34.0]


NM = {"ImagePositionPatient": ["1", "2", "3"], "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"]}


def legacy(tmp_path, **tags):
    return read_header(
        write_clip(
            tmp_path / "a.dcm", frames=4, modality="NM", spacing_cm=None, mutate=lambda ds: ds.update(item(**tags))
        )
    )


def test_nuclear_medicine_slices_follow_their_vectors(tmp_path):
    header = legacy(
        tmp_path,
        DetectorInformationSequence=[item(**NM)],
        FrameIncrementPointer=[0x00540080, 0x00540070],
        SliceVector=[1, 2, 1, 2],
        TimeSlotVector=[1, 1, 2, 2],
        SpacingBetweenSlices="-4",
    )
    assert [frame.position_mm for frame in header.frames] == [(1, 2, 3), (1, 2, -1), (1, 2, 3), (1, 2, -1)]
    assert [frame.traits["time_slot"] for frame in header.frames] == [1, 1, 2, 2]
    assert header.warnings == ()


def test_frame_offsets_place_frames(tmp_path):
    header = legacy(tmp_path, **NM, FrameIncrementPointer=0x3004000C, GridFrameOffsetVector=["0", "2", "4", "7"])
    assert [frame.position_mm[2] for frame in header.frames] == [3, 5, 7, 10]


def test_frames_with_one_position_follow_the_normal_with_a_warning(tmp_path):
    header = legacy(tmp_path, **NM, SpacingBetweenSlices="2")
    assert [frame.position_mm[2] for frame in header.frames] == [3, 5, 7, 9]
    assert warned(header) == ["W_FRAME_POSITIONS"]
    assert {frame.position_mm for frame in legacy(tmp_path, **NM).frames} == {None}


def test_frames_of_a_vector_that_does_not_count_them_are_refused(tmp_path):
    with pytest.raises(ReadError, match="SliceVector"):
        legacy(tmp_path, **NM, FrameIncrementPointer=0x00540080, SliceVector=[1, 2], SpacingBetweenSlices="2")


@pytest.mark.parametrize(
    ("maker", "private", "b_value", "direction"),
    [
        ("SIEMENS", [(0x0019100C, "IS", "800"), (0x0019100E, "FD", [0.0, 1.0, 0.0])], 800, "0.000,1.000,0.000"),
        (
            "Philips",
            [(0x20011003, "FL", 600.0), *((0x200510B0 + i, "FL", [0.5, 0.0, -0.5][i]) for i in range(3))],
            600,
            "0.500,0.000,-0.500",
        ),
        ("GE MEDICAL", [(0x00431039, "IS", ["1000000700", "8"])], 700, None),
        ("GE MEDICAL", [(0x001910BB + i, "DS", ["0", "1", "0"][i]) for i in range(3)], None, "0.000,1.000,0.000"),
        ("SIEMENS", [(0x0019100C, "LO", "many")], None, None),
        ("other", [(0x0019100C, "IS", "800")], None, None),
    ],
)
def test_diffusion_of_the_makers_is_read(tmp_path, maker, private, b_value, direction):
    traits = read_header(slice_with(tmp_path, modality="MR", Manufacturer=maker, private=private)).frames[0].traits
    assert traits.get("b_value") == b_value
    assert traits.get("direction") == direction


def test_standard_diffusion_goes_before_that_of_the_maker(tmp_path):
    path = slice_with(
        tmp_path,
        modality="MR",
        Manufacturer="SIEMENS",
        DiffusionBValue=50.0,
        DiffusionGradientOrientation=[0.0, 0.0, 1.0],
        EchoNumbers=["1", "2"],
        private=[(0x0019100C, "IS", "800")],
    )
    traits = read_header(path).frames[0].traits
    assert (traits["b_value"], traits["direction"], traits["echo"]) == (50, "0.000,0.000,1.000", "1.000,2.000")


PROTOCOL = """### ASCCONV BEGIN object=MrProtDataImpl ###
sSliceArray.asSlice[0].sPosition.dTra\t = \t{first}
sSliceArray.asSlice[1].sPosition.dTra\t = \t{second}
sSliceArray.lSize\t = \t{count}
sSliceArray.ucImageNumbTra\t = \t{turned}
### ASCCONV END ###"""


def mosaic(tmp_path, *, count=3, first=-4.0, second=-1.0, turned="0x0", protocol=True, drop=(), **tags):
    text = PROTOCOL.format(first=first, second=second, count=count, turned=turned).encode() + b" "
    private = [(0x00291020, "OB", text[: len(text) // 2 * 2])] if protocol else []
    plain = {
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"],
        "SpacingBetweenSlices": "3",
        "Manufacturer": "SIEMENS",
    }
    return slice_with(tmp_path, modality="MR", private=private, drop=drop, **(plain | tags))


@pytest.mark.parametrize(
    ("tags", "step"), [({}, 3), ({"turned": "0x1"}, -3), ({"first": 5.0}, -3), ({"first": 5.0, "turned": "0x1"}, 3)]
)
def test_mosaic_tiles_lie_where_the_protocol_counts_them(tmp_path, tags, step):
    frames = read_header(mosaic(tmp_path, **tags)).frames
    assert [frame.tile for frame in frames] == [0, 1, 2]
    assert {(frame.rows, frame.columns) for frame in frames} == {(4, 5)}
    expected = [(-12 + 0.5 * 2.5, 7 + 0.8 * 2, 30 + step * tile) for tile in range(3)]
    assert [frame.position_mm for frame in frames] == [pytest.approx(place) for place in expected]


MOSAICS = {
    "no protocol": ({"protocol": False}, "E_NO_GEOMETRY"),
    "one place": ({"first": 1.0, "second": 1.0}, "E_NO_GEOMETRY"),
    "no step": ({"drop": ["SpacingBetweenSlices"]}, "E_NO_GEOMETRY"),
    "no position": ({"drop": ["ImagePositionPatient"]}, "E_NO_GEOMETRY"),
    "no tile": ({"count": 0}, "E_NO_GEOMETRY"),
    "tiles that do not divide it": ({"count": 9}, "E_TAG"),
    "too many tiles": ({"count": 4_000_000_000}, "E_TAG"),
}


@pytest.mark.parametrize("name", MOSAICS)
def test_mosaics_without_certain_geometry_are_refused(tmp_path, name):
    tags, code = MOSAICS[name]
    assert refusal(mosaic(tmp_path, **tags)) == code


def test_damaged_header_of_a_maker_is_refused(tmp_path):
    ds = pydicom.dcmread(mosaic(tmp_path))
    ds.add_new(0x00291010, "OB", b"SV10\4\3\2\1" + b"\xff" * 40)
    assert refusal(write(ds, tmp_path / "b.dcm")) == "E_HEADER"


def labels(sop_class, **tags):
    ds = build_series((8, 10, 1), modality="SEG" if sop_class != uid.RTStructureSetStorage else "RTSTRUCT")[0]
    ds.SOPClassUID = sop_class
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def test_labels_refer_to_their_images(tmp_path):
    instance = item(ReferencedSOPInstanceUID="1.2.3")
    series = item(SeriesInstanceUID="1.2.4", ReferencedInstanceSequence=[instance])
    seg = read_header(
        write(labels(uid.SegmentationStorage, ReferencedSeriesSequence=[series]), tmp_path / "a.dcm"), key=b"k"
    )
    assert (seg.kind, seg.frames) == ("seg", ())
    assert seg.references == {token("1.2.3", key=b"k"), token("1.2.4", key=b"k")}
    assert seg.pixels.length == 160
    study = item(RTReferencedSeriesSequence=[item(SeriesInstanceUID="1.2.4", ContourImageSequence=[instance])])
    ds = labels(uid.RTStructureSetStorage, ReferencedFrameOfReferenceSequence=[item(RTReferencedStudySequence=[study])])
    del ds.PixelData, ds.Rows, ds.Columns
    contours = read_header(write(ds, tmp_path / "b.dcm"), key=b"k")
    assert (contours.kind, contours.pixels, contours.references) == ("rtstruct", None, seg.references)


def test_headers_survive_json(tmp_path):
    paths = [
        *save(build_series((8, 10, 2)), tmp_path / "series"),
        write_enhanced(tmp_path / "e.dcm"),
        write_clip(tmp_path / "c.dcm"),
        write(labels(uid.SegmentationStorage), tmp_path / "s.dcm"),
        slice_with(tmp_path, PixelPaddingValue=7),
    ]
    for path in paths:
        header = read_header(path, key=b"k")
        assert from_dict(json.loads(json.dumps(to_dict(header)))) == header


class TestRealFiles:
    pytestmark = real

    def test_enhanced_positions_are_those_that_nibabel_or_pydicom_finds(self):
        for path in sorted(SERIES.glob("*enh*/**/*.dcm")):
            header, dataset = read_header(path), pydicom.dcmread(path, stop_before_pixels=True)
            groups = dataset.PerFrameFunctionalGroupsSequence
            assert [list(frame.position_mm) for frame in header.frames] == [
                [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient] for group in groups
            ]

    @pytest.mark.parametrize("family", ["siemens_fmri_mosaic", "bits12", "nih_siemens_epi"])
    def test_tiles_lie_at_the_places_of_the_scan_protocol(self, family):
        """The protocol gives the centre of each slice as it was planned, which is not what tiles are placed by."""
        for path in sorted((SERIES / family).rglob("*.dcm")):
            frames = read_header(path).frames
            text = pydicom.dcmread(path)[0x00291020].value.decode("latin-1")
            found = re.findall(r"asSlice\[(\d+)\]\.sPosition\.d(Sag|Cor|Tra)\s*=\s*(\S+)", text)
            planned = np.zeros((len(frames), 3))
            for number, axis, value in found:
                if int(number) < len(frames):
                    planned[int(number), ("Sag", "Cor", "Tra").index(axis)] = float(value)
            if re.search(r"ucImageNumb\w+\s*=\s*0x1", text):
                planned = planned[::-1]
            for frame, centre in zip(frames, planned, strict=True):
                row, column = np.reshape(frame.orientation, (2, 3))
                middle = np.array(frame.position_mm)
                middle += row * frame.spacing_mm[1] * frame.columns / 2 + column * frame.spacing_mm[0] * frame.rows / 2
                assert np.linalg.norm(middle - centre) < 0.02

    def test_mosaic_corner_is_that_of_the_reference_conversion(self):
        for name in ("ap", "pa"):
            reference = sorted((SERIES / "nih_siemens_epi").rglob(f"*{name}*.nii*"))
            if not reference:
                continue
            image = nibabel.load(reference[0])
            corners = image.affine @ np.array([[0, 0, 0, 1], [0, image.shape[1] - 1, 0, 1]]).T
            position = read_header(next((SERIES / "nih_siemens_epi" / name).glob("*.dcm"))).frames[0].position_mm
            distance = np.linalg.norm(corners[:3].T - np.array(position) * [-1, -1, 1], axis=1)
            assert distance.min() < 1e-3

    def test_every_image_is_read_and_every_other_object_named(self):
        outcomes = {}
        for path in sorted(FILES.rglob("*")):
            if path.is_file() and path.suffix not in {".csv", ".md"}:
                try:
                    outcomes[path.name] = read_header(path).kind
                except ReadError as error:
                    outcomes[path.name] = error.code
        assert outcomes.pop("MR_truncated.dcm") == "E_PIXEL_LENGTH"
        for name in ("DICOMDIR", "test-SR.dcm", "badVR.dcm", "no-pixel-data.dcm"):
            assert outcomes.pop(name) == "E_NOT_IMAGE"
        for name in ("no_meta_group_length.dcm", "priv_SQ.dcm"):  # both are cut off
            assert outcomes.pop(name) == "E_HEADER"
        assert set(outcomes.values()) == {"image", "seg", "rtstruct"}


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_an_overlay_is_a_fact(tmp_path, syntax):
    assert "overlay" not in read_header(slice_with(tmp_path, syntax=syntax)).facts
    path = slice_with(tmp_path, syntax=syntax, private=[(0x60000010, "US", 8), (0x60000011, "US", 8)])
    assert read_header(path).facts["overlay"] == "yes"
