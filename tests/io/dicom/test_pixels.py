from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicoms import write_2d, write_clip
from phantoms import REAL_DATA
from pydicom import uid
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import apply_color_lut, convert_color_space

from medssl.errors import ReadError
from medssl.io.dicom import pixels
from medssl.io.dicom.header import read_header

FILES = REAL_DATA / "dicom_files"
SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
    uid.HTJ2KLossless,
)


def frames(path):
    return pixels.read_frames(path, read_header(path).pixels)


def by_pydicom(path):
    """Stored values, colour as RGB of 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        array = ds.pixel_array
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            array = apply_color_lut(array, ds)
            array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    return array if int(ds.get("NumberOfFrames", 1)) > 1 else array[None]


def refusal(path, **changes):
    with pytest.raises(ReadError) as caught:
        pixels.read_frames(path, replace(read_header(path).pixels, **changes))
    assert str(path) in caught.value.message
    return caught.value.code


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_transfer_syntax_gives_the_values_that_were_stored(tmp_path, syntax):
    values = np.random.default_rng(0).integers(0, 4000, (9, 12)).astype(np.uint16)
    path = write_2d(tmp_path / "a.dcm", pixels=values, syntax=syntax)
    [found] = frames(path)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_the_stored_ones_do_not_count(tmp_path, signed):
    low = -2048 if signed else 0
    values = np.random.default_rng(1).integers(low, low + 4096, (8, 10))
    overlay = np.random.default_rng(2).integers(0, 16, (8, 10)) << 12
    stored = ((values & 0xFFF) | overlay).astype(np.uint16)
    path = write_2d(
        tmp_path / "a.dcm", pixels=stored, BitsStored=12, HighBit=11, PixelRepresentation=int(signed), modality="MR"
    )
    [found] = frames(path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == (np.int16 if signed else np.uint16)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_below_the_stored_ones_do_not_count(tmp_path, signed):
    values = np.random.default_rng(1).integers(-100 if signed else 0, 100, (8, 10))
    stored = ((values.astype(np.uint16) << 4) | 0x5).astype(np.uint16)
    path = write_2d(
        tmp_path / "a.dcm", pixels=stored, BitsStored=12, HighBit=15, PixelRepresentation=int(signed), modality="MR"
    )
    [found] = frames(path)
    np.testing.assert_array_equal(found, values)


def test_single_bits_of_several_frames_are_told_apart(tmp_path):
    values = np.random.default_rng(3).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    path = write_clip(tmp_path / "a.dcm", shape=(5, 7), frames=3)
    kind = replace(read_header(path).pixels, bits_allocated=1, bits_stored=1, high_bit=0)
    packed = np.packbits(values.ravel(), bitorder="little").tobytes()
    data = b"x" * kind.offset + packed
    kind = replace(kind, length=len(packed))
    for index in range(3):
        np.testing.assert_array_equal(pixels.native(data, kind, index, path=path), values[index])


@pytest.mark.parametrize("planar", [0, 1])
def test_planes_and_pixels_are_the_same_colour(tmp_path, planar):
    colour = np.random.default_rng(4).integers(0, 255, (6, 8, 3)).astype(np.uint8)

    def mutate(ds):
        ds.PlanarConfiguration = planar
        ds.PixelData = (colour.transpose(2, 0, 1) if planar else colour).tobytes()

    [found] = frames(write_2d(tmp_path / "a.dcm", pixels=colour, modality="US", mutate=mutate))
    np.testing.assert_array_equal(found, colour)


def test_ybr_becomes_rgb_as_pydicom_converts_it(tmp_path):
    ybr = np.random.default_rng(5).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    [found] = frames(write_2d(tmp_path / "a.dcm", pixels=ybr, photometric="YBR_FULL", modality="US"))
    np.testing.assert_array_equal(found, convert_color_space(ybr, "YBR_FULL", "RGB"))


def test_colour_of_more_bits_keeps_the_highest_eight(tmp_path):
    colour = np.random.default_rng(6).integers(0, 65535, (6, 8, 3)).astype(np.uint16)

    def mutate(ds):
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelData = colour.tobytes()

    [found] = frames(write_2d(tmp_path / "a.dcm", pixels=colour.astype(np.uint8), modality="US", mutate=mutate))
    np.testing.assert_array_equal(found, colour >> 8)


def palette(tmp_path, *, bits=16, first=0, entries=256, width=2, **changes):
    table = (np.arange(entries) * 7 % 251).astype("<u2" if width == 2 else "u1")
    table = table * 257 if bits == 16 else table

    def mutate(ds):
        ds.PhotometricInterpretation = "PALETTE COLOR"
        for shift, colour in enumerate(("Red", "Green", "Blue")):
            setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [entries, first, bits])
            setattr(ds, f"{colour}PaletteColorLookupTableData", np.roll(table, shift).astype(table.dtype).tobytes())
        for keyword, value in changes.items():
            setattr(ds, keyword, value)

    values = np.random.default_rng(7).integers(0, 256, (6, 8)).astype(np.uint8)
    return write_2d(tmp_path / "a.dcm", pixels=values, modality="US", mutate=mutate)


@pytest.mark.parametrize("options", [{}, {"bits": 8, "width": 1}, {"first": 20}, {"first": 20, "entries": 100}])
def test_palettes_give_the_colours_that_pydicom_finds(tmp_path, options):
    path = palette(tmp_path, **options)
    np.testing.assert_array_equal(frames(path), by_pydicom(path))


def test_entries_of_eight_bits_may_fill_words_of_sixteen(tmp_path):
    narrow = frames(palette(tmp_path, bits=8, width=1))
    np.testing.assert_array_equal(frames(palette(tmp_path, bits=8, width=2)), narrow)


@pytest.mark.parametrize(
    "changes",
    [
        {"RedPaletteColorLookupTableData": b""},
        {"GreenPaletteColorLookupTableData": b"\0\0"},
        {"BluePaletteColorLookupTableDescriptor": [256, 0, 12]},
    ],
)
def test_a_broken_palette_is_refused(tmp_path, changes):
    path = palette(tmp_path, **changes)
    with pytest.raises(ReadError, match="table") as caught:
        frames(path)
    assert caught.value.code == "E_PHOTOMETRIC"


def test_kinds_of_pixels_that_are_not_known_are_refused(tmp_path):
    path = write_2d(tmp_path / "a.dcm")
    assert refusal(path, photometric="YBR_PARTIAL_422") == "E_PHOTOMETRIC"
    assert refusal(path, photometric="RGB") == "E_PHOTOMETRIC"
    assert refusal(path, samples=4, photometric="CMYK") == "E_PHOTOMETRIC"
    assert refusal(path, bits_allocated=24) == "E_TAG"
    assert refusal(path, rows=5000) == "E_PIXEL_LENGTH"
    colour = write_2d(tmp_path / "b.dcm", pixels=np.zeros((6, 8, 3), np.uint8))
    assert refusal(colour, photometric="YBR_FULL", bits_allocated=16, rows=3) == "E_PHOTOMETRIC"


class TestFragments:
    @pytest.fixture
    def clip(self, tmp_path):
        return write_clip(tmp_path / "clip.dcm", frames=4, shape=(16, 20), syntax=uid.JPEG2000Lossless)

    def rewritten(self, clip, mutate):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(clip)
            pieces = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=4))
            mutate(ds, pieces)
            ds["PixelData"].is_undefined_length = True
            ds.save_as(clip)
        return clip

    @pytest.mark.parametrize("table", [True, False])
    @pytest.mark.parametrize("fragments", [1, 2, 3])
    def test_frames_over_several_fragments_are_put_together(self, clip, table, fragments):
        wanted = frames(clip)

        def mutate(ds, pieces):
            ds.PixelData = encapsulate(pieces, fragments_per_frame=fragments, has_bot=table)

        np.testing.assert_array_equal(frames(self.rewritten(clip, mutate)), wanted)

    def test_the_extended_table_tells_frames_apart(self, clip):
        wanted = frames(clip)

        def mutate(ds, pieces):
            halves = [half for p in pieces for half in (p[: len(p) // 4 * 2], p[len(p) // 4 * 2 :])]
            ds.PixelData = encapsulate(halves, has_bot=False)
            _, table, lengths = encapsulate_extended(halves)
            offsets = np.frombuffer(table, "<u8")[::2]
            ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = offsets.tobytes(), lengths

        np.testing.assert_array_equal(frames(self.rewritten(clip, mutate)), wanted)

    def test_fragments_that_make_no_frames_are_refused(self, clip):
        def mutate(ds, pieces):
            ds.PixelData = encapsulate([pieces[0], b"ab", b"cd", b"ef", b"gh"], has_bot=False)

        assert refusal(self.rewritten(clip, mutate)) == "E_CODEC_DATA"

    def test_pixels_without_an_end_are_refused(self, clip):
        data = clip.read_bytes()
        kind = read_header(clip).pixels
        for cut in (8, 20, len(data) - kind.offset - 4):
            with pytest.raises(ReadError) as caught:
                pixels.compressed(data[: len(data) - cut], kind, path=clip)
            assert caught.value.code == "E_PIXEL_LENGTH"
        strange = data[: kind.offset] + b"\1\2\3\4" + data[kind.offset + 4 :]
        with pytest.raises(ReadError) as caught:
            pixels.compressed(strange, kind, path=clip)
        assert caught.value.code == "E_HEADER"

    def test_frames_can_be_chosen(self, clip):
        kind = read_header(clip).pixels
        found = pixels.read_frames(clip, kind, indices=[2, 0])
        wanted = frames(clip)
        np.testing.assert_array_equal(found, [wanted[2], wanted[0]])


def test_a_header_that_denies_a_sign_of_the_codestream_loses(tmp_path):
    values = np.random.default_rng(8).integers(-100, 100, (9, 12)).astype(np.int16)
    path = write_2d(tmp_path / "a.dcm", pixels=values, syntax=uid.JPEG2000Lossless, modality="MR")
    kind = replace(read_header(path).pixels, is_signed=False)
    [found] = pixels.read_frames(path, kind)
    np.testing.assert_array_equal(found, values)
    [piece] = pixels.compressed(path.read_bytes(), kind, path=path)
    assert pixels.differs(piece, found, kind)
    assert not pixels.differs(piece, found, replace(kind, is_signed=True))
    assert not pixels.differs(b"other data", found, kind)


def test_the_shipped_file_with_a_wrong_sign_reads_as_pydicom_reads_it():
    path = Path(pydicom.data.get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False))
    [found] = frames(path)
    np.testing.assert_array_equal(found, by_pydicom(path)[0])
    assert found.min() == -2000


def by_itk(path, header):
    """Stored values by ITK, which applies the rescale."""
    frame = header.frames[0]
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float64)
    return np.rint((values - frame.intercept) / frame.slope).astype(np.int64)


LOSSY_12_BITS = ("JPEGProcess2_4", "JPGExtended")
NOT_FOR_PYDICOM = ("JPEGProcess10_12", "JPEGProcess6_8", "JPEG-lossy", "MR_truncated")


@pytest.mark.realdata
@pytest.mark.skipif(not FILES.exists(), reason="no real data here")
def test_real_files_hold_the_values_that_pydicom_finds():
    compared = 0
    for path in sorted(file for file in FILES.rglob("*") if file.is_file() and file.suffix not in {".md", ".csv"}):
        try:
            header = read_header(path)
        except ReadError:  # what is refused, and why, is the matter of the header's tests
            continue
        if header.kind != "image" or any(name in path.name for name in NOT_FOR_PYDICOM):
            continue
        found = np.stack(pixels.read_frames(path, header.pixels))
        try:
            wanted = by_pydicom(path)
        except RuntimeError:  # the only plugin of pydicom for this coding is under the GPL and not installed
            wanted = by_itk(path, header)
        tolerance = int(any(name in path.name for name in LOSSY_12_BITS))  # another inverse cosine transform
        assert found.shape == wanted.shape, path
        assert np.abs(found.astype(np.int64) - wanted).max() <= tolerance, path
        compared += 1
    assert compared >= 80


@pytest.mark.realdata
@pytest.mark.skipif(not FILES.exists(), reason="no real data here")
def test_one_slice_in_every_lossless_syntax_is_one_slice():
    folder = FILES / "ct_all_syntaxes"
    plain = frames(folder / "CTImage.dcm")
    for name in ("BigEndian", "Deflated", "LosslessOnly", "JPEGLSLossless", "JPEGProcess14", "RLE", "LittleEndian"):
        for path in folder.glob(f"*{name}*"):
            np.testing.assert_array_equal(frames(path), plain, err_msg=path.name)
