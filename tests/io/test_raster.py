from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import REAL_DATA
from PIL import Image
from verdicts import warned

from medssl.errors import MedSSLError
from medssl.io import read_volume

GREY = np.random.default_rng(0).integers(0, 255, (7, 9)).astype(np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 255, (7, 9, 3)).astype(np.uint8)


def picture(array, kind="PNG", *, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    if mode is not None:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *, depth=8, colour=0, body=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def saved(folder, data, name="a.png"):
    path = folder / name
    path.write_bytes(data)
    return path


def read(folder, data, name="a.png", **options):
    volume, source = read_volume(saved(folder, data, name), **options)
    return volume, warned(source)


def code_of(folder, data, name="a.png", **options):
    with pytest.raises(MedSSLError) as caught:
        read(folder, data, name, **options)
    assert name in caught.value.message
    return caught.value.code


@pytest.mark.parametrize(("kind", "name"), [("PNG", "a.png"), ("TIFF", "a.tif"), ("BMP", "a.bmp")])
def test_grey_of_8_bits_stays_as_columns_by_rows(tmp_path, kind, name):
    volume, said = read(tmp_path, picture(GREY, kind), name)
    assert volume.array.dtype == np.uint8
    assert volume.array.shape == (1, 9, 7, 1)
    assert said == ["W_NO_SPACING"]
    for row in range(7):
        for column in range(9):
            assert volume.array[0, column, row, 0] == GREY[row, column]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_the_grid_is_that_of_simpleitk_in_2d(tmp_path, name):
    volume, _ = read(tmp_path, picture(GREY, "PNG" if name == "a.png" else "TIFF"), name)
    image = sitk.GetImageFromArray(GREY)
    corner = image.TransformIndexToPhysicalPoint((8, 6))
    assert np.allclose(volume.geometry.corners_mm()[-1], (-corner[0], -corner[1], 0))
    assert image.GetPixel(8, 6) == volume.array[0, 8, 6, 0]
    assert volume.geometry.orientation == "LPS"


def test_a_given_spacing_is_used_and_said(tmp_path):
    volume, said = read(tmp_path, picture(GREY), assume_spacing_mm=(0.2, 0.3, 1.0))
    assert volume.geometry.spacing_mm == pytest.approx((0.2, 0.3, 1.0))
    assert said == ["W_SPACING_ASSUMED"]


@pytest.mark.parametrize(("kind", "name"), [("PNG", "a.png"), ("TIFF", "a.tiff")])
def test_grey_of_16_bits_keeps_all_of_them(tmp_path, kind, name):
    deep = GREY.astype(np.uint16) * 257 + 3
    volume, _ = read(tmp_path, picture(deep, kind), name)
    assert volume.array.dtype == np.uint16
    assert np.array_equal(volume.array[0, :, :, 0].T, deep)


def test_floats_of_a_tiff_stay(tmp_path):
    values = GREY.astype(np.float32) / 7
    volume, _ = read(tmp_path, picture(values, "TIFF"), "a.tif")
    assert np.array_equal(volume.array[0, :, :, 0].T, values)


def test_colour_becomes_three_channels_and_grey_colour_one(tmp_path):
    volume, _ = read(tmp_path, picture(COLOUR))
    assert np.array_equal(volume.array[..., 0].transpose(2, 1, 0), COLOUR)
    volume, _ = read(tmp_path, picture(GREY, mode="RGB"))
    assert volume.array.shape == (1, 9, 7, 1)
    assert np.array_equal(volume.array[0, :, :, 0].T, GREY)


def test_transparency_is_laid_on_black(tmp_path):
    alpha = np.full((7, 9, 1), 51, dtype=np.uint8)
    volume, said = read(tmp_path, picture(np.concatenate([COLOUR, alpha], axis=2)))
    assert said == ["W_ALPHA", "W_NO_SPACING"] or said == ["W_NO_SPACING", "W_ALPHA"]
    expected = COLOUR.transpose(2, 1, 0) * 0.2
    assert np.abs(volume.array[..., 0] - expected).max() <= 1
    grey_alpha = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(np.zeros_like(GREY))))
    assert (read(tmp_path, picture(grey_alpha))[0].array == 0).all()
    keyed, said = read(tmp_path, picture(np.full((7, 9), 5, np.uint8), transparency=5))
    assert "W_ALPHA" in said
    assert (keyed.array == 0).all()


def test_palettes_are_colours_for_images_and_numbers_for_labels(tmp_path):
    numbers = (GREY % 3).astype(np.uint8)
    image = Image.fromarray(numbers, mode=None).convert("L")
    image = Image.frombytes("P", (9, 7), numbers.tobytes())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    data = picture(image)
    label, _ = read(tmp_path, data, unit="label")
    assert np.array_equal(label.array[0, :, :, 0].T, numbers)
    colours, _ = read(tmp_path, data)
    assert np.array_equal(colours.array[0, :, :, 0].T, np.where(numbers == 1, 255, 0))


def test_one_bit_is_0_and_255_for_images_and_0_and_1_for_labels(tmp_path):
    data = picture(Image.fromarray(GREY > 99))
    assert np.array_equal(read(tmp_path, data)[0].array[0, :, :, 0].T, np.where(GREY > 99, 255, 0))
    assert np.array_equal(read(tmp_path, data, unit="label")[0].array[0, :, :, 0].T, GREY > 99)


def test_colour_models_of_print_are_converted_aloud(tmp_path):
    volume, said = read(tmp_path, picture(COLOUR, "JPEG", mode="CMYK"), "a.jpg")
    assert volume.array.shape[0] == 3
    assert "W_COLOUR" in said


def test_a_coloured_label_is_refused(tmp_path):
    assert code_of(tmp_path, picture(COLOUR), unit="label") == "E_NDIM"


def test_exif_turns_a_picture_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, name in (("PNG", "a.png"), ("TIFF", "a.tif")):
        volume, said = read(tmp_path, picture(GREY, kind, exif=exif), name)
        assert np.array_equal(volume.array[0, :, :, 0].T, np.rot90(GREY, -1))
        assert "W_EXIF" in said


def test_the_content_decides_over_the_name(tmp_path):
    volume, said = read(tmp_path, picture(COLOUR, "JPEG"), "a.png")
    assert "W_EXTENSION" in said
    assert volume.array.shape == (3, 9, 7, 1)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    assert code_of(tmp_path, png(20000, 20000)) == "E_BOMB"
    assert code_of(tmp_path, png(9000, 9000)) == "E_BOMB"


def test_cut_and_damaged_pngs_are_refused_with_the_true_reason(tmp_path):
    data = picture(GREY)
    for length in (9, 20, 40, len(data) - 12, len(data) - 1):
        assert code_of(tmp_path, data[:length]) == "E_TRUNCATED"
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(33, len(data) - 12)] ^= 1 << rng.randrange(8)
        assert code_of(tmp_path, bytes(damaged)) in {"E_CRC", "E_TRUNCATED"}
    header = data[8:33]
    assert code_of(tmp_path, data[:33] + header + data[33:]) == "E_HEADER"
    assert code_of(tmp_path, data[:8] + data[33:]) == "E_HEADER"
    assert code_of(tmp_path, data + b"junk") == "E_TRAILING"
    assert code_of(tmp_path, png(9, 7, body=bytes(5))) in {"E_TRUNCATED", "E_CRC"}


def test_a_jpeg_is_no_label_map(tmp_path):
    drawn = (np.indices((64, 64)).sum(0) > 64).astype(np.uint8) * 255
    assert code_of(tmp_path, picture(drawn, "JPEG", quality=75), "a.jpg", unit="label") == "E_LABEL_VALUE"


def test_a_cut_jpeg_is_refused(tmp_path):
    data = picture(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8)), "JPEG")
    assert code_of(tmp_path, data[: len(data) // 2], "a.jpg") == "E_TRUNCATED"
    assert code_of(tmp_path, b"\xff\xd8\xff" + b"x" * 50, "a.jpg") in {"E_FORMAT", "E_CRC"}


def test_deep_colour_and_several_frames_are_refused(tmp_path):
    assert code_of(tmp_path, png(1, 1, depth=16, colour=2, body=bytes(7))) == "E_DTYPE"
    assert code_of(tmp_path, tiff_pages(GREY, GREY), "a.tif") == "E_NDIM"


def tiff_pages(*arrays, **options):
    frames = [Image.fromarray(array) for array in arrays]
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def tiff(body, *tags):
    """A little-endian TIFF of one strip, written by hand: 9 columns, 7 rows."""
    entries = [(256, 4, 1, 9), (257, 4, 1, 7), *tags, (273, 4, 1, 8), (278, 4, 1, 7), (279, 4, 1, len(body))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_of_a_tiff_become_slices_on_demand(tmp_path, dtype):
    stack = np.random.default_rng(0).integers(0, 255, (5, 7, 9)).astype(dtype) * dtype(1 if dtype is np.uint8 else 200)
    data = tiff_pages(*stack)
    assert code_of(tmp_path, data, "a.tif") == "E_NDIM"
    volume, said = read(tmp_path, data, "a.tif", pages="stack")
    assert volume.array.dtype == dtype
    assert np.array_equal(volume.array[0].transpose(2, 1, 0), stack)
    assert volume.geometry.spacing_mm == (1, 1, 1)
    assert said == ["W_PAGES", "W_NO_SPACING"]
    volume, said = read(tmp_path, data, "a.tif", pages="stack", assume_spacing_mm=(0.2, 0.3, 2.0))
    assert volume.geometry.spacing_mm == pytest.approx((0.2, 0.3, 2.0))
    assert said == ["W_PAGES", "W_SPACING_ASSUMED"]
    by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.tif")))
    assert np.array_equal(by_itk, stack)


def test_pages_in_colour_keep_their_channels(tmp_path):
    volume, _ = read(tmp_path, tiff_pages(COLOUR, 255 - COLOUR), "a.tif", pages="stack")
    assert volume.array.shape == (3, 9, 7, 2)
    assert np.array_equal(volume.array[..., 1].transpose(2, 1, 0), 255 - COLOUR)


def test_pages_as_a_label_map(tmp_path):
    stack = np.random.default_rng(0).integers(0, 3, (4, 7, 9)).astype(np.uint8)
    volume, _ = read(tmp_path, tiff_pages(*stack), "a.tif", pages="stack", unit="label")
    assert np.array_equal(volume.array[0].transpose(2, 1, 0), stack)


def test_pages_that_differ_are_refused(tmp_path):
    for other in (GREY[:6], GREY.astype(np.uint16), COLOUR):
        assert code_of(tmp_path, tiff_pages(GREY, other), "a.tif", pages="stack") == "E_MIXED_SHAPE"


def test_a_picture_of_one_page_is_one_slice_with_pages_too(tmp_path):
    for data, name in ((picture(GREY), "a.png"), (picture(GREY, "TIFF"), "a.tif")):
        volume, said = read(tmp_path, data, name, pages="stack")
        assert volume.array.shape == (1, 9, 7, 1)
        assert said == ["W_NO_SPACING"]


def test_an_animation_is_refused_even_with_pages(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "PNG", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    assert code_of(tmp_path, buffer.getvalue(), pages="stack") == "E_NDIM"


def test_more_pages_than_a_stack_can_have_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("medssl.io.raster._MOST_PAGES", 3)
    assert code_of(tmp_path, tiff_pages(*[GREY] * 5), "a.tif", pages="stack") == "E_BOMB"


def test_unsigned_32_bits_of_a_tiff_do_not_become_negative(tmp_path):
    values = (GREY.astype(np.uint32) << 24) + 5
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.tif"))
    volume, _ = read_volume(tmp_path / "a.tif")
    assert np.array_equal(volume.array[0, :, :, 0].T, values)
    signed = GREY.astype(np.int16) - 100
    sitk.WriteImage(sitk.GetImageFromArray(signed), str(tmp_path / "a.tif"))
    assert np.array_equal(read_volume(tmp_path / "a.tif")[0].array[0, :, :, 0].T, signed)


def test_a_tiff_whose_zero_is_white_is_turned_to_black(tmp_path):
    for depth, dtype in ((8, np.uint8), (16, np.uint16)):
        body = GREY.astype(dtype)
        data = tiff(body.tobytes(), (258, 3, 1, depth), (259, 3, 1, 1), (262, 3, 1, 0))
        volume, _ = read(tmp_path, data, "a.tif")
        assert np.array_equal(volume.array[0, :, :, 0].T, np.iinfo(dtype).max - body)
        data = tiff(body.tobytes(), (258, 3, 1, depth), (259, 3, 1, 1), (262, 3, 1, 1))
        assert np.array_equal(read(tmp_path, data, "a.tif")[0].array[0, :, :, 0].T, body)


def test_a_tiff_of_deep_colour_is_refused(tmp_path):
    image = sitk.GetImageFromArray(COLOUR.astype(np.uint16) * 257, isVector=True)
    sitk.WriteImage(image, str(tmp_path / "a.tif"))
    assert code_of(tmp_path, (tmp_path / "a.tif").read_bytes(), "a.tif") == "E_DTYPE"


def test_mutated_pictures_end_in_one_error_type(tmp_path):
    rng = random.Random(0)
    for kind, name in (("PNG", "a.png"), ("JPEG", "a.jpg"), ("TIFF", "a.tif"), ("BMP", "a.bmp")):
        data = picture(GREY, kind)
        refused = 0
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            try:
                read_volume(saved(tmp_path, bytes(damaged), name), pages="stack")
            except MedSSLError:
                refused += 1
        assert refused > 0


def test_one_pixel_is_a_picture(tmp_path):
    assert read(tmp_path, picture(np.array([[7]], dtype=np.uint8)))[0].array.tolist() == [[[[7]]]]


BUSI = sorted((REAL_DATA / "busi_256").rglob("*.png"))[:40]


@pytest.mark.realdata
@pytest.mark.skipif(not BUSI, reason="the shared folder of real images is not here")
def test_real_pictures_read_as_pillow_does():
    for path in BUSI:
        volume, _ = read_volume(path)
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert (volume.array[..., 0].transpose(2, 1, 0) == expected).all()
