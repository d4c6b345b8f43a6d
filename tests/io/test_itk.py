from __future__ import annotations

import contextlib
import gzip
import hashlib
import random
import struct
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import REAL_DATA, grid, grids, noise
from verdicts import warned

from medssl.errors import MedSSLError
from medssl.io import digest, is_image, read_volume, write_volume

VOXELS = np.arange(60, dtype="<i2")
RAW = VOXELS.tobytes()
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "1 2 3",
    "DimSize": "3 4 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "3 4 5",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(10,20,30)",
}


def meta(payload=RAW, **fields):
    merged = META | fields
    merged = {key: value for key, value in merged.items() if key != "ElementDataFile"} | {
        "ElementDataFile": merged["ElementDataFile"]
    }
    lines = "".join(f"{key} = {value}\n" for key, value in merged.items() if value is not None)
    return lines.encode() + payload


def nrrd(payload=RAW, **fields):
    merged = NRRD | {key.replace("_", " "): value for key, value in fields.items()}
    lines = "".join(f"{key}: {value}\n" for key, value in merged.items() if value is not None)
    return b"NRRD0004\n# a comment\nkey:=MARIE CURIE\n" + lines.encode() + b"\n" + payload


def saved(folder, data, name):
    path = folder / name
    path.write_bytes(data)
    return path


def code_of(path, **options):
    with pytest.raises(MedSSLError) as caught:
        read_volume(path, **options)
    assert path.stem in caught.value.message or caught.value.code in {"E_PAIR", "E_EMPTY"}
    return caught.value.code


def by_simpleitk(path):
    """Voxels (C, X, Y, Z) and the world positions (RAS mm) of the first and the last voxel."""
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    array = array.transpose(0, *range(array.ndim - 1, 0, -1))
    missing = 3 - image.GetDimension()
    ends = ([0] * image.GetDimension(), [int(n) - 1 for n in image.GetSize()])
    corners = [list(image.TransformIndexToPhysicalPoint(end)) + [0.0] * missing for end in ends]
    return array[..., None] if missing else array, np.array(corners) * (-1, -1, 1)


def assert_equals_simpleitk(path):
    volume, source = read_volume(path)
    array, corners = by_simpleitk(path)
    assert np.array_equal(volume.array, array)
    assert np.abs(volume.geometry.corners_mm()[[0, -1]] - corners).max() < 1e-6
    return volume, source


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.mhd", "a.nhdr"])
@pytest.mark.parametrize("compressed", [True, False])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometry=grids(far=False), channels=st.sampled_from((1, 3, 4)))
def test_files_of_simpleitk_are_read_as_simpleitk_does(tmp_path_factory, name, compressed, geometry, channels):
    lps = np.diag([-1, -1, 1])
    array = noise(geometry, channels=channels).array
    image = sitk.GetImageFromArray(array.T if channels > 1 else array[0].T, isVector=channels > 1)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin((lps @ geometry.origin_mm).tolist())
    image.SetDirection((lps @ geometry.affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    path = tmp_path_factory.mktemp("s") / name
    sitk.WriteImage(image, str(path), compressed)
    volume, source = assert_equals_simpleitk(path)
    assert np.array_equal(volume.array, array)
    assert volume.geometry.isclose(geometry, atol_mm=1e-6)
    assert source.warnings == ()
    assert source.digest == digest(path)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometry=grids(sheared=True), channels=st.sampled_from((1, 2)))
def test_what_is_written_is_read_back_by_simpleitk_and_by_us(tmp_path_factory, name, geometry, channels):
    path = tmp_path_factory.mktemp("w") / name
    volume = noise(geometry, channels=channels)
    write_volume(volume, path)
    back, _ = assert_equals_simpleitk(path)
    assert np.array_equal(back.array, volume.array)
    assert back.geometry.isclose(geometry, atol_mm=1e-6)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@pytest.mark.parametrize("kind", [sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkUInt16, sitk.sitkInt16, sitk.sitkUInt32])
def test_integers_keep_their_type(tmp_path, name, kind):
    image = sitk.GetImageFromArray(np.arange(24).reshape(2, 3, 4).astype(np.uint8))
    image = sitk.Cast(image, kind)
    sitk.WriteImage(image, str(tmp_path / name))
    volume, _ = assert_equals_simpleitk(tmp_path / name)
    assert volume.array.dtype == sitk.GetArrayFromImage(image).dtype


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd"])
def test_a_flat_image_becomes_one_slice(tmp_path, name):
    image = sitk.GetImageFromArray(np.arange(12, dtype=np.int16).reshape(3, 4))
    image.SetSpacing((0.5, 2.0))
    image.SetOrigin((7.0, 8.0))
    sitk.WriteImage(image, str(tmp_path / name))
    volume, _ = assert_equals_simpleitk(tmp_path / name)
    assert volume.array.shape == (1, 4, 3, 1)
    assert volume.geometry.spacing_mm == (0.5, 2.0, 1.0)


def test_a_slice_in_space_gets_the_normal_of_its_plane(tmp_path):
    fields = {"dimension": 2, "sizes": "6 10", "space_directions": "(0,1,0) (0,0,2)", "kinds": "domain domain"}
    volume, _ = read_volume(saved(tmp_path, nrrd(**fields), "a.nrrd"))
    assert np.allclose(volume.geometry.affine[:3, :3] @ [0, 0, 1], (-1, 0, 0))
    assert np.allclose(volume.geometry.origin_mm, (-10, -20, 30))


def test_byte_orders_text_and_gzip_hold_the_same_voxels(tmp_path):
    raw, packed, big = RAW, zlib.compress(RAW), VOXELS.astype(">i2").tobytes()
    text = "".join(f"{value} " for value in VOXELS).encode()
    for data, name in (
        (meta(), "a.mha"),
        (meta(big, BinaryDataByteOrderMSB="True"), "b.mha"),
        (meta(big, BinaryDataByteOrderMSB=None, ElementByteOrderMSB="True"), "c.mha"),
        (meta(packed, CompressedData="True", CompressedDataSize=len(packed)), "d.mha"),
        (meta(text, BinaryData="False"), "e.mha"),
        (nrrd(), "a.nrrd"),
        (nrrd(big, endian="big"), "b.nrrd"),
        (nrrd(gzip.compress(raw), encoding="gzip"), "c.nrrd"),
        (nrrd(text, encoding="ascii"), "d.nrrd"),
        (nrrd().replace(b"\n", b"\r\n", 13).replace(b"\r\r", b"\r"), "e.nrrd"),
    ):
        volume, _ = assert_equals_simpleitk(saved(tmp_path, data, name))
        assert np.array_equal(volume.array[0], VOXELS.reshape((3, 4, 5), order="F"))
        assert np.allclose(volume.geometry.affine, [[-1, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("space", "signs"), [("RAS", (1, 1, 1)), ("LPS", (-1, -1, 1)), ("left-anterior-superior", (-1, 1, 1))]
)
def test_the_space_of_an_nrrd_decides_the_signs(tmp_path, space, signs):
    path = saved(tmp_path, nrrd(space=space), "a.nrrd")
    volume, source = assert_equals_simpleitk(path)
    assert np.allclose(np.diag(volume.geometry.affine)[:3], np.array(signs) * (1, 2, 3))
    assert source.warnings == ()


def test_a_list_axis_at_either_end_becomes_the_channels(tmp_path):
    voxels = np.arange(120, dtype="<i2")
    first = nrrd(
        voxels.tobytes(), dimension=4, sizes="2 3 4 5", kinds="vector domain domain domain",
        space_directions="none (1,0,0) (0,2,0) (0,0,3)",
    )  # fmt: skip
    last = nrrd(
        voxels.tobytes(), dimension=4, sizes="3 4 5 2", kinds="domain domain domain list",
        space_directions="(1,0,0) (0,2,0) (0,0,3) none",
    )  # fmt: skip
    one, _ = read_volume(saved(tmp_path, first, "a.nrrd"))
    two, _ = read_volume(saved(tmp_path, last, "b.nrrd"))
    for x in range(3):
        for y in range(4):
            for z in range(5):
                for c in range(2):
                    assert one.array[c, x, y, z] == c + 2 * (x + 3 * (y + 4 * z))
                    assert two.array[c, x, y, z] == x + 3 * (y + 4 * (z + 5 * c))
    no_kinds = first.replace(b"kinds: vector domain domain domain\n", b"")
    assert np.array_equal(read_volume(saved(tmp_path, no_kinds, "c.nrrd"))[0].array, one.array)
    assert code_of(tmp_path / "a.nrrd", unit="label") == "E_NDIM"


def test_a_fourth_axis_of_a_metaimage_holds_volumes(tmp_path):
    fields = {"NDims": "4", "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "Offset": "10 20 30 0"}
    fields |= {"ElementSpacing": "1 2 3 1", "DimSize": "3 4 5 2"}
    voxels = np.arange(120, dtype="<i2")
    image = voxels.reshape((3, 4, 5, 2), order="F")
    packed = zlib.compress(voxels.tobytes())
    text = "".join(f"{value} " for value in voxels).encode()
    for data in (
        meta(voxels.tobytes(), **fields),
        meta(voxels.astype(">i2").tobytes(), **fields, BinaryDataByteOrderMSB="True"),
        meta(packed, **fields, CompressedData="True", CompressedDataSize=len(packed)),
        meta(text, **fields, BinaryData="False"),
    ):
        path = saved(tmp_path, data, "a.mha")
        assert code_of(path) == "E_NDIM"
        assert code_of(path, volume=2) == "E_VOLUME"
        for number in (0, 1):
            volume, source = read_volume(path, volume=number)
            assert np.array_equal(volume.array[0], image[..., number])
            assert np.allclose(volume.geometry.origin_mm, (-10, -20, 30))
            assert volume.geometry.spacing_mm == (1, 2, 3)
            assert source.volumes == 2
        channels, _ = read_volume(path, volume="channels")
        assert np.array_equal(channels.array, np.moveaxis(image, -1, 0))
    by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(saved(tmp_path, meta(voxels.tobytes(), **fields), "b.mha"))))
    assert np.array_equal(by_itk.T, image)


def test_channels_and_volumes_of_a_metaimage_come_one_volume_at_a_time(tmp_path):
    fields = {"NDims": "4", "TransformMatrix": None, "Offset": None, "ElementSpacing": "1 1 1 1"}
    fields |= {"DimSize": "3 2 5 2", "ElementNumberOfChannels": "2"}
    path = saved(tmp_path, meta(np.arange(120, dtype="<i2").tobytes(), **fields), "a.mha")
    image = np.arange(120).reshape((2, 3, 2, 5, 2), order="F")
    assert np.array_equal(read_volume(path, volume=1)[0].array, image[..., 1])
    assert code_of(path, volume="channels") == "E_NDIM"


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_time_axis_of_an_nrrd_holds_volumes(tmp_path, encoding):
    voxels = np.arange(120, dtype="<i2")
    payload = gzip.compress(voxels.tobytes()) if encoding == "gzip" else voxels.tobytes()
    steps = "(1,0,0) (0,2,0) (0,0,3)"
    first = nrrd(
        payload, dimension=4, sizes="2 3 4 5", kinds="time domain domain domain", space_directions=f"none {steps}",
        encoding=encoding,
    )  # fmt: skip
    last = nrrd(
        payload, dimension=4, sizes="3 4 5 2", kinds="domain domain domain time", space_directions=f"{steps} none",
        encoding=encoding,
    )  # fmt: skip
    plain = nrrd(
        payload, dimension=4, sizes="3 4 5 2", kinds=None, space_directions=None, spacings="1 2 3 1", encoding=encoding
    )  # fmt: skip
    inner = np.moveaxis(voxels.reshape((2, 3, 4, 5), order="F"), 0, -1)
    outer = voxels.reshape((3, 4, 5, 2), order="F")
    for data, image in ((first, inner), (last, outer), (plain, outer)):
        path = saved(tmp_path, data, "a.nrrd")
        assert code_of(path) == "E_NDIM"
        assert code_of(path, volume=2) == "E_VOLUME"
        for number in (0, 1):
            volume, source = read_volume(path, volume=number)
            assert np.array_equal(volume.array[0], image[..., number])
            assert volume.geometry.spacing_mm == (1, 2, 3)
            assert source.volumes == 2
            assert volume.array.base is None or volume.array.base.nbytes <= volume.array.nbytes
        assert np.array_equal(read_volume(path, volume="channels")[0].array, np.moveaxis(image, -1, 0))


def test_of_a_list_axis_one_may_be_chosen(tmp_path):
    data = nrrd(
        np.arange(120, dtype="<i2").tobytes(), dimension=4, sizes="2 3 4 5", kinds="list domain domain domain",
        space_directions="none (1,0,0) (0,2,0) (0,0,3)",
    )  # fmt: skip
    path = saved(tmp_path, data, "a.nrrd")
    both, _ = read_volume(path)
    assert both.array.shape == (2, 3, 4, 5)
    assert np.array_equal(read_volume(path, volume=1)[0].array, both.array[1:])


def test_four_spatial_axes_and_channels_are_refused(tmp_path):
    fields = {"dimension": 5, "sizes": "2 3 4 5 2", "kinds": "vector domain domain domain domain"}
    data = nrrd(bytes(480), **fields, space_directions=None, spacings="nan 1 2 3 1")
    assert code_of(saved(tmp_path, data, "a.nrrd")) == "E_NDIM"


def test_arrays_may_be_changed_by_whoever_reads_them(tmp_path):
    for data, name in ((meta(), "a.mha"), (nrrd(), "a.nrrd"), (nrrd(gzip.compress(RAW), encoding="gzip"), "b.nrrd")):
        volume, _ = read_volume(saved(tmp_path, data, name))
        volume.array[...] = 7
        assert (read_volume(tmp_path / name)[0].array[0].ravel(order="F") == VOXELS).all()


def test_spacings_are_those_of_the_spatial_axes(tmp_path):
    fields = {"dimension": 4, "space": None, "space_directions": None, "space_origin": None}
    voxels = np.arange(120, dtype="<i2").tobytes()
    first = nrrd(voxels, sizes="2 3 4 5", kinds="vector domain domain domain", spacings="nan 1 2 3", **fields)
    last = nrrd(voxels, sizes="3 4 5 2", kinds="domain domain domain list", spacings="1 2 3 nan", **fields)
    for data in (first, last):
        volume, _ = read_volume(saved(tmp_path, data, "a.nrrd"))
        assert volume.geometry.spacing_mm == (1, 2, 3)
        assert volume.array.shape == (2, 3, 4, 5)


def test_an_element_size_stands_for_a_missing_spacing_as_in_simpleitk(tmp_path):
    path = saved(tmp_path, meta(ElementSpacing=None, ElementSize="1 2 3"), "a.mha")
    volume, source = assert_equals_simpleitk(path)
    assert volume.geometry.spacing_mm == (1, 2, 3)
    assert source.warnings == ()


@pytest.mark.parametrize("fault", [ValueError, OverflowError, IndexError, KeyError, TypeError, struct.error])
def test_damage_that_no_reader_foresaw_refuses_the_file(tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        raise fault("odd")

    monkeypatch.setattr("medssl.io.metaimage.data_file", fail)
    monkeypatch.setattr("medssl.io.metaimage.read", fail)
    path = saved(tmp_path, meta(), "a.mhd")
    assert code_of(path) == "E_HEADER"
    with pytest.raises(MedSSLError, match="impossible values"):
        digest(path)


def test_what_a_header_leaves_out_is_assumed_aloud(tmp_path):
    bare = saved(tmp_path, meta(ElementSpacing=None, TransformMatrix=None, Offset=None), "a.mha")
    assert warned(assert_equals_simpleitk(bare)[1]) == ["W_SPACING_MISSING", "W_NO_XFORM"]
    volume, source = read_volume(bare, assume_spacing_mm=(2.0, 3.0, 4.0))
    assert volume.geometry.spacing_mm == (2, 3, 4)
    assert warned(source) == ["W_SPACING_ASSUMED", "W_NO_XFORM"]
    spaced = nrrd(space=None, space_directions=None, space_origin=None, spacings="1 2 3")
    volume, source = assert_equals_simpleitk(saved(tmp_path, spaced, "a.nrrd"))
    assert warned(source) == ["W_NO_SPACE"]
    bare = nrrd(space=None, space_directions=None, space_origin=None, kinds=None)
    assert warned(read_volume(saved(tmp_path, bare, "b.nrrd"))[1]) == ["W_NO_SPACE", "W_SPACING_MISSING"]


def test_a_zero_spacing_can_be_replaced(tmp_path):
    path = saved(tmp_path, meta(ElementSpacing="1 0 3"), "a.mha")
    assert code_of(path) == "E_SPACING"
    assert read_volume(path, assume_spacing_mm=(1, 2, 3))[0].geometry.spacing_mm == (1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"DimSize": "3 4 500"}, "E_TRUNCATED"),
        ({"DimSize": "30000 40000 500"}, "E_SIZE_LIE"),
        ({"DimSize": "3 4 4"}, "E_TRAILING"),
        ({"DimSize": "3 4 0"}, "E_HEADER"),
        ({"DimSize": "3 4 -5"}, "E_HEADER"),
        ({"DimSize": "3 4"}, "E_HEADER"),
        ({"DimSize": "a b c"}, "E_HEADER"),
        ({"DimSize": None}, "E_HEADER"),
        ({"NDims": "1", "DimSize": "60", "ElementSpacing": "1", "Offset": "0", "TransformMatrix": "1"}, "E_NDIM"),
        ({"NDims": "4", "DimSize": "3 2 2 5"}, "E_HEADER"),
        ({"NDims": "5", "DimSize": "3 2 2 5 2"}, "E_NDIM"),
        ({"ElementType": "MET_BANANA"}, "E_DTYPE"),
        ({"ElementSpacing": "1 -2 3"}, "E_SPACING"),
        ({"ElementSpacing": "1 nan 3"}, "E_SPACING"),
        ({"ElementSpacing": "1 2 300"}, "E_SPACING"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "E_AFFINE"),
        ({"TransformMatrix": "2 0 0 0 1 0 0 0 1"}, "E_AFFINE"),
        ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "E_AFFINE"),
        ({"Offset": "0 0"}, "E_HEADER"),
        ({"Offset": "0 inf 0"}, "E_AFFINE"),
        ({"ElementNumberOfChannels": "0"}, "E_HEADER"),
        ({"ElementNumberOfChannels": "nan"}, "E_HEADER"),
        ({"ElementNumberOfChannels": "1e400"}, "E_HEADER"),
        ({"ElementNumberOfChannels": "1.5"}, "E_HEADER"),
        ({"NDims": "nan"}, "E_HEADER"),
        ({"NDims": "inf"}, "E_HEADER"),
        ({"NDims": "3.5"}, "E_HEADER"),
        ({"NDims": "-1"}, "E_HEADER"),
        ({"HeaderSize": "-1"}, "E_ENCODING"),
        ({"DistanceUnits": "cm"}, "E_UNITS"),
        ({"ElementDataFile": "../secret.raw"}, "E_PATH"),
        ({"ElementDataFile": "/etc/passwd"}, "E_PATH"),
        ({"ElementDataFile": "http://host/a.raw"}, "E_PATH"),
        ({"ElementDataFile": "LIST"}, "E_PATH"),
        ({"ElementDataFile": "a%03d.raw"}, "E_PATH"),
        ({"ElementDataFile": ".."}, "E_PATH"),
        ({"ElementDataFile": ""}, "E_PATH"),
        ({"ElementDataFile": "lost.raw"}, "E_PAIR"),
    ],
)
def test_an_impossible_metaimage_is_refused_with_its_code(tmp_path, fields, code):
    assert code_of(saved(tmp_path, meta(**fields), "a.mha")) == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"sizes": "3 4 500"}, "E_TRUNCATED"),
        ({"sizes": "30000 40000 500"}, "E_SIZE_LIE"),
        ({"sizes": "3 4 4"}, "E_TRAILING"),
        ({"sizes": "3 4"}, "E_HEADER"),
        ({"dimension": None}, "E_HEADER"),
        ({"dimension": "nan"}, "E_HEADER"),
        ({"dimension": "3.5"}, "E_HEADER"),
        ({"space_origin": ""}, "E_HEADER"),
        ({"kinds": "time domain domain", "space_directions": None, "spacings": "1 1 1"}, "E_NDIM"),
        ({"type": "block"}, "E_DTYPE"),
        ({"encoding": "hex"}, "E_ENCODING"),
        ({"encoding": "bzip2"}, "E_ENCODING"),
        ({"byte_skip": "-1"}, "E_ENCODING"),
        ({"line_skip": "2"}, "E_ENCODING"),
        ({"space": "scanner-xyz"}, "E_SPACE"),
        ({"space_units": '"um" "um" "um"'}, "E_UNITS"),
        ({"space_directions": "(1,0,0) (0,2,0) none"}, "E_SPACE_DIRS"),
        ({"kinds": "domain domain list"}, "E_SPACE_DIRS"),
        ({"kinds": "domain domain"}, "E_HEADER"),
        ({"space_directions": "(1,0,0) (0,2,0)"}, "E_HEADER"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,x)"}, "E_HEADER"),
        ({"space_directions": "(1,0,0) (0,2,0) up"}, "E_HEADER"),
        ({"space_directions": "(1,0,0,0) (0,2,0,0) (0,0,3,0)"}, "E_NDIM"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,0)"}, "E_SPACING"),
        ({"space_directions": "(1,0,0) (2,0,0) (0,0,3)"}, "E_AFFINE"),
        ({"space_directions": "(1,0,0) (0,nan,0) (0,0,3)"}, "E_SPACING"),
        ({"space_origin": "none"}, "E_HEADER"),
        ({"kinds": "list domain vector", "space_directions": None, "spacings": "1 1 1"}, "E_NDIM"),
        ({"data_file": "../a.raw"}, "E_PATH"),
        ({"data_file": "LIST"}, "E_PATH"),
        ({"data_file": "a.raw"}, "E_PAIR"),
    ],
)
def test_an_impossible_nrrd_is_refused_with_its_code(tmp_path, fields, code):
    assert code_of(saved(tmp_path, nrrd(**fields), "a.nrrd")) == code


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    saved(tmp_path, RAW, "secret.raw")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.raw").symlink_to(tmp_path / "secret.raw")
    assert code_of(saved(folder, meta(b"", ElementDataFile="a.raw"), "a.mhd")) == "E_PATH"
    assert code_of(saved(folder, nrrd(b"", data_file="a.raw"), "a.nhdr")) == "E_PATH"


def test_a_header_and_its_voxels_share_one_digest(tmp_path):
    saved(tmp_path, RAW, "v.raw")
    for data, name in (
        (meta(b"", ElementDataFile="v.raw"), "a.mhd"),
        (nrrd(b"", data_file="v.raw"), "a.nhdr"),
        (nrrd(b"", data_file=None, datafile="v.raw").rstrip(b"\n"), "b.nhdr"),
    ):
        path = saved(tmp_path, data, name)
        _, source = read_volume(path)
        assert source.digest == digest(path) == hashlib.sha256(data + RAW).hexdigest()
    assert digest(tmp_path / "v.raw") == hashlib.sha256(RAW).hexdigest()
    assert code_of(saved(tmp_path, b"", "v.raw").with_name("a.mhd")) == "E_EMPTY"


def test_a_flipped_bit_in_compressed_voxels_never_passes_in_silence(tmp_path):
    volume = noise(grid((9, 9, 9)))
    rng = random.Random(0)
    for name in ("a.mha", "a.nrrd"):
        write_volume(volume, tmp_path / name)
        data = (tmp_path / name).read_bytes()
        begin = data.index(b"LOCAL\n") + 6 if name == "a.mha" else data.index(b"\n\n") + 2
        refused = 0
        for _ in range(200):
            damaged = bytearray(data)
            damaged[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
            try:
                back, _ = read_volume(saved(tmp_path, bytes(damaged), name))
            except MedSSLError:
                refused += 1
                continue
            assert np.array_equal(back.array, volume.array)
        assert refused > 180


def test_cut_files_are_refused_with_the_true_reason(tmp_path):
    for data, name in (
        (meta(), "a.mha"),
        (meta(zlib.compress(RAW), CompressedData="True"), "b.mha"),
        (nrrd(), "a.nrrd"),
        (nrrd(gzip.compress(RAW), encoding="gzip"), "b.nrrd"),
        (nrrd(b"1 2 3", encoding="text"), "c.nrrd"),
    ):
        for cut in (1, 9, 20):
            assert code_of(saved(tmp_path, data[:-cut] if name != "c.nrrd" else data, name)) == "E_TRUNCATED"
    assert code_of(saved(tmp_path, meta(b"1 " * 61, BinaryData="False"), "a.mha")) == "E_TRAILING"
    assert code_of(saved(tmp_path, meta(b"x " * 60, BinaryData="False"), "a.mha")) == "E_HEADER"
    assert code_of(saved(tmp_path, meta(b"1e9 " * 60, BinaryData="False"), "a.mha")) == "E_HEADER"
    assert code_of(saved(tmp_path, meta()[:60], "a.mha")) == "E_HEADER"
    assert code_of(saved(tmp_path, b"ObjectType = Image\nComment = " + b"x" * (1 << 21), "a.mha")) == "E_HEADER"


def test_names_in_comments_are_never_copied(tmp_path):
    volume, source = read_volume(saved(tmp_path, meta(Comment="MARIE CURIE"), "a.mha"))
    assert not any("CURIE" in warning for warning in source.warnings)
    for name in ("b.mha", "b.nrrd", "b.nii"):
        write_volume(volume, tmp_path / name, like=source)
        assert b"CURIE" not in (tmp_path / name).read_bytes()


def test_mutated_files_end_in_one_error_type(tmp_path):
    rng = random.Random(0)
    for data, name in ((meta(), "a.mha"), (nrrd(), "a.nrrd")):
        for _ in range(400):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(data) - 100)] = rng.randrange(256)
            with contextlib.suppress(MedSSLError):
                read_volume(saved(tmp_path, bytes(damaged), name))


REAL_FILES = sorted(path for path in (REAL_DATA / "nrrd_mha").glob("*/*") if is_image(path))


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_FILES, reason="the shared folder of real images is not here")
def test_real_files_read_as_simpleitk_does(tmp_path):
    assert len(REAL_FILES) == 9
    for path in REAL_FILES:
        volume, _ = assert_equals_simpleitk(path)
        for name in ("a.nii.gz", "a.nrrd"):
            write_volume(volume, tmp_path / name)
            back, _ = read_volume(tmp_path / name)
            assert np.array_equal(back.array, volume.array)
            assert back.geometry.isclose(volume.geometry)
        if any(word in path.name for word in ("label", "mask")):
            assert read_volume(path, unit="label")[0].array.dtype == np.uint8
