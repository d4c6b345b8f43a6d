from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import os
import random
import struct
import zlib

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import REAL_DATA, balls, centroid_mm, grid, grids, noise, ramp, voxel_positions_mm
from verdicts import warned

from medssl.errors import CaseError, EnvironmentFaultError, GeometryError, MedSSLError, ReadError
from medssl.geometry import Geometry
from medssl.io import Source, digest, is_image, read_volume, stem, write_volume
from medssl.volume import Volume

GEOMETRY_FIELDS = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def nifti(array, affine, *, kind=nibabel.Nifti1Image, **fields):
    """Bytes as nibabel writes them, with header fields overwritten."""
    image = kind(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    data = bytearray(image.to_bytes())
    patch(data, **fields)
    return bytes(data)


def patch(data, *, endian="<", **fields):
    is_one = int.from_bytes(data[:4], "little" if endian == "<" else "big") == 348
    dtype = (nibabel.nifti1 if is_one else nibabel.nifti2).header_dtype.newbyteorder(endian)
    header = np.frombuffer(data, dtype=dtype, count=1).copy()
    for name, value in fields.items():
        header[name][0] = value
    data[: dtype.itemsize] = header.tobytes()


def saved(folder, data, name="a.nii"):
    path = folder / name
    path.write_bytes(data)
    return path


def code_of(path, **options):
    with pytest.raises(MedSSLError) as caught:
        read_volume(path, **options)
    assert path.stem in caught.value.message
    assert "Traceback" not in caught.value.message
    return caught.value.code


SMALL = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
AFFINE = grid((3, 4, 5), spacing_mm=(1, 2, 3), angle_deg=20).affine


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids(sheared=False, far=False), st.sampled_from((nibabel.Nifti1Image, nibabel.Nifti2Image)))
def test_voxels_and_corners_equal_those_of_nibabel(tmp_path_factory, geometry, kind):
    array = noise(geometry).array[0]
    path = saved(tmp_path_factory.mktemp("n"), nifti(array, geometry.affine, kind=kind))
    volume, source = read_volume(path)
    expected = nibabel.load(path)
    assert np.array_equal(volume.array[0], np.asarray(expected.dataobj))
    assert volume.geometry.isclose(Geometry(expected.shape, expected.affine))
    assert volume.geometry.isclose(geometry)
    assert source.format in {"nifti1", "nifti2"}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometry=grids(sheared=True, far=False))
def test_every_format_gives_the_same_world(tmp_path_factory, name, geometry):
    path = tmp_path_factory.mktemp("w") / name
    volume = ramp(geometry)
    write_volume(volume, path)
    back, source = read_volume(path)
    assert np.array_equal(back.array, volume.array)
    assert back.geometry.isclose(geometry, atol_mm=1e-3 if "nii" in name else 1e-6)
    assert source.warnings == ()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
def test_landmarks_are_at_their_place_in_mm(tmp_path, name):
    geometry = grid((90, 90, 80), orientation="PIL", angle_deg=20, spacing_mm=(0.8, 0.8, 0.9))
    write_volume(balls(geometry), tmp_path / name)
    back, _ = read_volume(tmp_path / name, unit="label")
    for label in (1, 2, 3):
        assert np.allclose(centroid_mm(back, label), centroid_mm(balls(geometry), label), atol=1e-3)
    assert np.linalg.norm(centroid_mm(back, 1) - (-22.0, 3.0, 5.0)) < 0.05


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_result_has_the_geometry_bytes_of_its_source_and_nothing_else(tmp_path, kind, name):
    data = bytearray(nifti(SMALL, AFFINE, kind=kind, descrip=b"MARIE CURIE", aux_file=b"curie.dcm"))
    patch(data, qform_code=3, sform_code=4, pixdim=[1, 1, 2, 3, 7, 8, 9, 10], intent_name=b"SECRET")
    volume, source = read_volume(saved(tmp_path, bytes(data)))
    label = Volume((volume.array > 9).astype(np.int32), volume.geometry, "label")
    write_volume(label, tmp_path / name.replace("a", "b"), like=source)
    written = (tmp_path / name.replace("a", "b")).read_bytes()
    written = gzip.decompress(written) if name.endswith("gz") else written
    dtype = (nibabel.nifti1 if kind is nibabel.Nifti1Image else nibabel.nifti2).header_dtype
    old, new = (np.frombuffer(raw, dtype=dtype, count=1)[0] for raw in (bytes(data), written))
    for field in GEOMETRY_FIELDS:
        assert old[field].tobytes() == new[field].tobytes(), field
    assert b"CURIE" not in written
    assert b"curie" not in written
    assert b"SECRET" not in written
    back, _ = read_volume(tmp_path / name.replace("a", "b"), unit="label")
    assert back.array.dtype == np.uint8
    assert np.array_equal(back.array, label.array)


def test_like_keeps_byte_order_units_and_a_source_without_transform(tmp_path):
    little = nifti(SMALL, AFFINE)
    big = nibabel.Nifti1Image.from_bytes(little)
    swapped = nibabel.Nifti1Image(SMALL, AFFINE, big.header.as_byteswapped(">")).to_bytes()
    cases = {
        "big": (swapped, ">"),
        "micro": (nifti(SMALL, AFFINE * np.array([1000, 1000, 1000, 1])[:, None], xyzt_units=3), "<"),
        "bare": (nifti(SMALL, AFFINE, qform_code=0, sform_code=0), "<"),
    }
    for name, (data, endian) in cases.items():
        volume, source = read_volume(saved(tmp_path, data, f"{name}.nii"))
        write_volume(volume, tmp_path / f"{name}_out.nii", like=source)
        dtype = nibabel.nifti1.header_dtype.newbyteorder(endian)
        old, new = (
            np.frombuffer(raw, dtype=dtype, count=1)[0] for raw in (data, (tmp_path / f"{name}_out.nii").read_bytes())
        )
        assert all(old[field].tobytes() == new[field].tobytes() for field in GEOMETRY_FIELDS), name
        back, _ = read_volume(tmp_path / f"{name}_out.nii")
        assert np.array_equal(back.array, volume.array)
        assert back.geometry.isclose(volume.geometry)


def test_like_refuses_a_volume_on_another_grid(tmp_path):
    volume, source = read_volume(saved(tmp_path, nifti(SMALL, AFFINE)))
    for geometry in (volume.geometry.cropped((0, 0, 0), (3, 4, 4)), volume.geometry.cropped((1, 0, 0), (3, 4, 5))):
        with pytest.raises(GeometryError) as caught:
            write_volume(noise(geometry), tmp_path / "b.nii", like=source)
        assert caught.value.code == "E_GEOMETRY"
    assert not (tmp_path / "b.nii").exists()


@pytest.mark.parametrize(("largest", "dtype"), [(254, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "i4")])
def test_labels_take_the_smallest_type_that_holds_them(tmp_path, largest, dtype):
    array = np.zeros((1, 3, 3, 3), dtype=np.int64)
    array[0, 1, 1, 1] = largest
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        write_volume(Volume(array, grid((3, 3, 3)), "label"), tmp_path / name)
        back, _ = read_volume(tmp_path / name, unit="label")
        assert back.array.dtype == np.dtype(dtype)
        assert np.array_equal(back.array, array)


def test_images_keep_their_type_where_files_have_it(tmp_path):
    for dtype, expected in (
        ("u1", "u1"),
        ("i2", "i2"),
        ("u2", "u2"),
        ("i4", "i4"),
        ("f2", "f4"),
        ("f8", "f4"),
        ("?", "u1"),
    ):
        array = np.ones((1, 3, 3, 3), dtype=dtype)
        for name in ("a.nii", "a.mha", "a.nrrd"):
            write_volume(Volume(array, grid((3, 3, 3)), "arbitrary"), tmp_path / name)
            assert read_volume(tmp_path / name)[0].array.dtype == np.dtype(expected)
    with pytest.raises(CaseError, match="int64"):
        write_volume(Volume(np.ones((1, 3, 3, 3), dtype=np.int64), grid((3, 3, 3)), "HU"), tmp_path / "b.nii")
    with pytest.raises(CaseError, match="channels"):
        write_volume(noise(grid((3, 3, 3)), channels=2), tmp_path / "b.nii")
    with pytest.raises(ReadError, match=r"\.nrrd"):
        write_volume(noise(grid((3, 3, 3))), tmp_path / "b.png")


def test_a_volume_of_more_than_32767_voxels_along_an_axis_becomes_nifti_2(tmp_path):
    volume = Volume(np.zeros((1, 40000, 1, 1), dtype=np.uint8), grid((40000, 1, 1)), "label")
    write_volume(volume, tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz", unit="label")[1].format == "nifti2"


def test_written_files_have_no_date_and_are_the_same_each_time(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(noise(grid((3, 3, 3))), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_volume(noise(grid((3, 3, 3))), tmp_path / "a.nii")
    old = (tmp_path / "a.nii").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(EnvironmentFaultError):
        write_volume(noise(grid((3, 3, 3)), seed=1), tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes() == old


# ---- damage: B.1 of the hazard catalogue


def test_a_cut_gzip_file_is_refused_wherever_it_is_cut(tmp_path):
    data = gzip.compress(nifti(noise(grid((9, 9, 9))).array[0], AFFINE), mtime=0)
    for length in [
        1,
        2,
        5,
        9,
        12,
        300,
        *random.Random(0).sample(range(20, len(data)), 40),
        len(data) - 8,
        len(data) - 1,
    ]:
        assert code_of(saved(tmp_path, data[:length], "a.nii.gz")) in {"E_TRUNCATED", "E_FORMAT", "E_CRC"}
    assert code_of(saved(tmp_path, data[:-8], "a.nii.gz")) == "E_TRUNCATED"
    assert code_of(saved(tmp_path, data[: len(data) // 2], "a.nii.gz")) == "E_TRUNCATED"


def test_a_flipped_bit_never_changes_a_voxel_in_silence(tmp_path):
    volume = noise(grid((9, 9, 9)))
    data = gzip.compress(nifti(volume.array[0], AFFINE), mtime=0)
    rng = random.Random(0)
    refused, seen = 0, set()
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = saved(tmp_path, bytes(damaged), "a.nii.gz")
        try:
            back, _ = read_volume(path)
        except ReadError as error:
            seen.add(error.code)
            refused += 1
            continue
        assert np.array_equal(back.array, volume.array)  # spare bits of the gzip header and before the checksum
    assert refused > 280
    assert seen <= {"E_CRC", "E_TRUNCATED", "E_FORMAT", "E_SIZE_LIE", "E_HEADER"}


def test_a_wrong_checksum_or_length_is_seen(tmp_path):
    data = gzip.compress(nifti(SMALL, AFFINE), mtime=0)
    for place in (-8, -1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        assert code_of(saved(tmp_path, bytes(damaged), "a.nii.gz")) == "E_CRC"


def test_bytes_behind_the_end_are_refused_unless_zero(tmp_path):
    plain = nifti(SMALL, AFFINE)
    packed = gzip.compress(plain, mtime=0)
    for data, name in ((plain, "a.nii"), (packed, "a.nii.gz"), (gzip.compress(plain + bytes(3)), "b.nii.gz")):
        padded = data if name.startswith("b") else data + bytes(512)
        volume, source = read_volume(saved(tmp_path, padded, name))
        assert np.array_equal(volume.array[0], SMALL)
        assert warned(source) == ["W_TRAILING"]
        assert code_of(saved(tmp_path, data + b"junk", name)) == "E_TRAILING"
    assert code_of(saved(tmp_path, packed + packed, "a.nii.gz")) == "E_TRAILING"


def test_the_first_bytes_decide_and_a_wrong_name_is_said(tmp_path):
    plain = nifti(SMALL, AFFINE)
    for data, name in ((plain, "a.nii.gz"), (gzip.compress(plain), "a.nii"), (plain, "a.mha"), (plain, "noname")):
        volume, source = read_volume(saved(tmp_path, data, name))
        assert np.array_equal(volume.array[0], SMALL)
        assert warned(source) == ["W_EXTENSION"]


def test_a_cut_plain_file_is_refused(tmp_path):
    data = nifti(SMALL, AFFINE)
    for length in (100, 347, 360, len(data) - 1):
        assert code_of(saved(tmp_path, data[:length])) == "E_TRUNCATED"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere")
    assert code_of(tmp_path / "pipe.nii") == "E_NOT_REGULAR"
    assert code_of(tmp_path / "folder.nii") == "E_NOT_REGULAR"
    assert code_of(tmp_path / "dangling.nii") == "E_MISSING"
    assert code_of(saved(tmp_path, b"", "empty.nii")) == "E_EMPTY"
    assert code_of(saved(tmp_path, b"hello", "text.nii")) == "E_FORMAT"


@pytest.mark.parametrize(("error", "code"), [(PermissionError(13, "no"), "E_PERMISSION"), (OSError(5, "io"), "E_READ")])
def test_faults_of_the_disk_are_told_apart(tmp_path, monkeypatch, error, code):
    path = saved(tmp_path, nifti(SMALL, AFFINE))

    def fail(*_):
        raise error

    monkeypatch.setattr("pathlib.Path.open", fail)
    assert code_of(path) == code


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    dim = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    assert code_of(saved(tmp_path, nifti(SMALL, AFFINE, dim=dim))) == "E_SIZE_LIE"
    assert code_of(saved(tmp_path, gzip.compress(nifti(SMALL, AFFINE, dim=dim)), "a.nii.gz")) == "E_SIZE_LIE"


def test_a_gzip_bomb_is_stopped_by_the_declared_size(tmp_path):
    data = gzip.compress(nifti(SMALL, AFFINE) + bytes(30_000_000))
    assert code_of(saved(tmp_path, data, "a.nii.gz")) == "E_SIZE_LIE"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"dim": [3, 3, -4, 5, 1, 1, 1, 1]}, "E_HEADER"),
        ({"dim": [3, 3, 0, 5, 1, 1, 1, 1]}, "E_HEADER"),
        ({"dim": [0, 3, 4, 5, 1, 1, 1, 1]}, "E_HEADER"),
        ({"dim": [9, 3, 4, 5, 1, 1, 1, 1]}, "E_HEADER"),
        ({"dim": [4, 3, 2, 2, 5, 1, 1, 1]}, "E_NDIM"),
        ({"dim": [5, 3, 2, 2, 5, 2, 1, 1]}, "E_NDIM"),
        ({"dim": [6, 3, 2, 2, 1, 1, 5, 1]}, "E_NDIM"),
        ({"vox_offset": 0}, "E_HEADER"),
        ({"vox_offset": np.nan}, "E_HEADER"),
        ({"vox_offset": 1e12}, "E_HEADER"),
        ({"vox_offset": 1e9}, "E_SIZE_LIE"),
        ({"vox_offset": 352.5}, "E_HEADER"),
        ({"bitpix": 8}, "E_HEADER"),
        ({"datatype": 128}, "E_HEADER"),
        ({"datatype": 1792}, "E_DTYPE"),
        ({"datatype": 32}, "E_DTYPE"),
        ({"datatype": 1536}, "E_DTYPE"),
        ({"datatype": 999}, "E_DTYPE"),
        ({"pixdim": [1, 0, 2, 3, 1, 1, 1, 1]}, "E_SPACING"),
        ({"pixdim": [1, 1, np.nan, 3, 1, 1, 1, 1]}, "E_SPACING"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "E_AFFINE"),
        ({"srow_x": [0, 0, 0, 0], "qform_code": 0}, "E_AFFINE"),
        ({"srow_x": [np.nan, 0, 0, 0], "qform_code": 0}, "E_AFFINE"),
        ({"sform_code": 0, "quatern_b": 0.9, "quatern_c": 0.9}, "E_AFFINE"),
        ({"sform_code": 0, "pixdim": [1, 1e-4, 2, 3, 1, 1, 1, 1]}, "E_SPACING"),
        ({"sform_code": 0, "pixdim": [1, 1e4, 2, 3, 1, 1, 1, 1]}, "E_SPACING"),
        ({"srow_x": [1, 0, 0, 90]}, "E_XFORM_CONFLICT"),
        ({"qform_code": 0, "pixdim": [1, 1, 2, 3.2, 1, 1, 1, 1]}, "E_XFORM_CONFLICT"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "E_HEADER"),
        ({"magic": b""}, "E_FORMAT"),
        ({"magic": b"ni1"}, "E_PAIR"),
    ],
)
def test_an_impossible_header_is_refused_with_its_code(tmp_path, fields, code):
    assert code_of(saved(tmp_path, nifti(SMALL, AFFINE, **fields))) == code


def test_a_negative_pixdim_is_taken_as_positive_and_said(tmp_path):
    path = saved(tmp_path, nifti(SMALL, AFFINE, pixdim=[1, -1, 2, 3, 1, 1, 1, 1]))
    volume, source = read_volume(path)
    assert warned(source) == ["W_PIXDIM"]
    assert volume.geometry.isclose(Geometry((3, 4, 5), AFFINE))


def test_a_qfac_of_zero_means_one(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    header = bytearray(image.to_bytes())
    struct.pack_into("<f", header, 76, 0.0)  # pixdim[0]
    volume, _ = read_volume(saved(tmp_path, bytes(header)))
    assert np.array_equal(volume.geometry.affine, np.diag([1, 2, 3, 1]))


def test_a_missing_spacing_can_be_assumed_and_is_said(tmp_path):
    data = nifti(SMALL, np.eye(4), pixdim=[1, 0, 2, 0, 1, 1, 1, 1], sform_code=0)
    volume, source = read_volume(saved(tmp_path, data), assume_spacing_mm=(0.5, 9.0, 4.0))
    assert volume.geometry.spacing_mm == pytest.approx((0.5, 2.0, 4.0))
    assert warned(source) == ["W_SPACING_ASSUMED"]


def test_disagreeing_transforms_are_resolved_only_on_demand(tmp_path):
    path = saved(tmp_path, nifti(SMALL, AFFINE, qoffset_x=500.0))
    assert code_of(path) == "E_XFORM_CONFLICT"
    sform, _ = read_volume(path, xform="sform")
    qform, _ = read_volume(path, xform="qform")
    assert np.allclose(sform.geometry.affine, AFFINE, atol=1e-5)
    assert qform.geometry.origin_mm[0] == pytest.approx(500)
    write_volume(qform, tmp_path / "b.nii", like=read_volume(path, xform="qform")[1])
    only_sform = saved(tmp_path, nifti(SMALL, AFFINE, qform_code=0))
    assert np.allclose(read_volume(only_sform, xform="qform")[0].geometry.affine, AFFINE, atol=1e-5)


def test_a_broken_qform_beside_a_chosen_sform_is_kept_as_it_is(tmp_path):
    data = nifti(SMALL, AFFINE, quatern_b=0.9, quatern_c=0.9)
    assert code_of(saved(tmp_path, data)) == "E_AFFINE"
    volume, source = read_volume(tmp_path / "a.nii", xform="sform")
    write_volume(volume, tmp_path / "b.nii", like=source)
    assert (tmp_path / "b.nii").read_bytes()[252:328] == data[252:328]


def test_a_file_without_transform_is_read_with_a_warning(tmp_path):
    path = saved(tmp_path, nifti(SMALL, AFFINE, qform_code=0, sform_code=0))
    volume, source = read_volume(path)
    assert warned(source) == ["W_NO_XFORM"]
    assert np.allclose(volume.geometry.affine, nibabel.load(path).affine)


@pytest.mark.parametrize("shear", [1e-5, 1e-3, 0.05])
def test_shear_is_kept(tmp_path, shear):
    geometry = grid((40, 40, 30), shear=shear, angle_deg=12)
    write_volume(noise(geometry), tmp_path / "a.nii")
    back, source = read_volume(tmp_path / "a.nii")
    assert back.geometry.isclose(geometry)
    assert back.geometry.shear_deg == pytest.approx(np.degrees(np.arctan(shear)), abs=2e-4)
    assert source.warnings == ()


@pytest.mark.parametrize(("unit", "factor"), [(1, 0.001), (3, 1000)])
def test_metres_and_micrometres_become_mm(tmp_path, unit, factor):
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    volume, source = read_volume(saved(tmp_path, nifti(SMALL, affine, xyzt_units=unit)))
    assert np.allclose(volume.geometry.affine, AFFINE, atol=1e-4)
    assert warned(source) == ["W_UNITS"]


def test_a_grid_far_from_the_origin_is_said(tmp_path):
    affine = AFFINE.copy()
    affine[0, 3] = 1.9e6
    assert warned(read_volume(saved(tmp_path, nifti(SMALL, affine)))[1]) == ["W_ORIGIN"]


def test_scaling_follows_one_rule(tmp_path):
    def read(slope, inter):
        volume, source = read_volume(saved(tmp_path, nifti(SMALL, AFFINE, scl_slope=slope, scl_inter=inter)))
        return volume.array[0], warned(source)

    for slope, inter in ((0, 5), (np.nan, 5), (np.inf, 5), (-np.inf, 0)):
        array, said = read(slope, inter)
        assert np.array_equal(array, SMALL)
        assert said == ["W_SCALING"]
    for slope, inter in ((0, 0), (1, 0), (np.nan, np.nan), (np.nan, 0)):
        array, said = read(slope, inter)
        assert array.dtype == np.int16
        assert said == []
    array, _ = read(1, -1024)
    assert array.dtype == np.int16
    assert np.array_equal(array, SMALL - 1024)
    array, _ = read(1000, 7)
    assert array.dtype == np.int32
    assert np.array_equal(array, SMALL.astype(np.int32) * 1000 + 7)
    array, _ = read(0.5, 0.25)
    assert array.dtype == np.float32
    assert np.array_equal(array, SMALL * np.float32(0.5) + np.float32(0.25))
    array, _ = read(1e9, 0)
    assert array.dtype == np.float32


def test_trailing_ones_and_missing_dimensions_become_three(tmp_path):
    for dim, shape in (
        ([4, 3, 4, 5, 1, 1, 1, 1], (3, 4, 5)),
        ([7, 3, 4, 5, 1, 1, 1, 1], (3, 4, 5)),
        ([2, 3, 20, 0, 0, 0, 0, 0], (3, 20, 1)),
        ([1, 60, 0, 0, 0, 0, 0, 0], (60, 1, 1)),
    ):
        volume, _ = read_volume(saved(tmp_path, nifti(SMALL, AFFINE, dim=dim)))
        assert volume.geometry.shape == shape
        assert np.array_equal(volume.array[0], SMALL.reshape(shape, order="F") if len(shape) else SMALL)
    pixdim = [1, 1, 2, 0, 0, 0, 0, 0]
    path = saved(tmp_path, nifti(SMALL, AFFINE, dim=[2, 3, 20, 0, 0, 0, 0, 0], pixdim=pixdim, sform_code=0))
    volume, source = read_volume(path)
    write_volume(volume, tmp_path / "b.nii", like=source)
    assert read_volume(tmp_path / "b.nii")[0].geometry.isclose(volume.geometry)


def test_a_big_endian_twin_is_bit_equal(tmp_path):
    little = nibabel.Nifti1Image.from_bytes(nifti(SMALL, AFFINE))
    big = nibabel.Nifti1Image(SMALL, AFFINE, little.header.as_byteswapped(">")).to_bytes()
    assert big[:4] == b"\0\0\1\x5c"
    one, _ = read_volume(saved(tmp_path, little.to_bytes(), "l.nii"))
    two, _ = read_volume(saved(tmp_path, big, "b.nii"))
    assert np.array_equal(one.array, two.array)
    assert one.array.dtype == two.array.dtype
    assert np.array_equal(one.geometry.affine, two.geometry.affine)


@pytest.mark.parametrize("size", [-16, 0, 7, 1 << 30, 33])
def test_a_broken_extension_is_refused(tmp_path, size):
    data = bytearray(nifti(SMALL, AFFINE, vox_offset=384))
    voxels = bytes(data[352:])
    extension = b"\1\0\0\0" + struct.pack("<ii", size, 6) + bytes(24)
    assert code_of(saved(tmp_path, bytes(data[:348]) + extension + voxels)) == "E_HEADER"


@pytest.mark.parametrize("endian", ["<", ">"])
def test_a_good_extension_is_passed_over_and_never_copied(tmp_path, endian):
    image = nibabel.Nifti1Image.from_bytes(nifti(SMALL, AFFINE))
    image = nibabel.Nifti1Image(SMALL, AFFINE, image.header.as_byteswapped(endian))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"MARIE CURIE 1867-11-07"))
    volume, source = read_volume(saved(tmp_path, image.to_bytes()))
    assert np.array_equal(volume.array[0], SMALL)
    write_volume(volume, tmp_path / "b.nii", like=source)
    assert b"CURIE" not in (tmp_path / "b.nii").read_bytes()


def test_a_pair_is_read_by_either_name_and_its_digest_covers_both(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(SMALL, AFFINE), tmp_path / "a.hdr")
    header, voxels = ((tmp_path / name).read_bytes() for name in ("a.hdr", "a.img"))
    for name in ("a.hdr", "a.img"):
        volume, source = read_volume(tmp_path / name)
        assert np.array_equal(volume.array[0], SMALL)
        assert source.digest == digest(tmp_path / name) == hashlib.sha256(header + voxels).hexdigest()
    (tmp_path / "a.img").unlink()
    assert code_of(tmp_path / "a.hdr") == "E_PAIR"


def test_an_analyze_file_is_refused(tmp_path):
    nibabel.save(nibabel.AnalyzeImage(SMALL, np.eye(4)), tmp_path / "a.hdr")
    assert code_of(tmp_path / "a.hdr") == "E_FORMAT"


def test_compressed_data_of_another_kind_are_refused(tmp_path):
    assert code_of(saved(tmp_path, gzip.compress(b"hello"), "a.nii.gz")) == "E_FORMAT"


# ---- several volumes, vectors and colour

SERIES = np.arange(3 * 4 * 5 * 6, dtype=np.int16).reshape(3, 4, 5, 6)


def series(array=SERIES, *, endian="<", **fields):
    image = nibabel.Nifti1Image(array, AFFINE)
    image = nibabel.Nifti1Image(array, AFFINE, image.header.as_byteswapped(endian))
    data = bytearray(image.to_bytes())
    patch(data, endian=endian, **fields)
    return bytes(data)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_one_volume_of_a_series_is_taken_by_its_number(tmp_path, name, endian):
    data = series(endian=endian)
    path = saved(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)
    assert code_of(path) == "E_NDIM"
    with pytest.raises(CaseError, match="volume"):
        read_volume(path)
    for number in range(6):
        volume, source = read_volume(path, volume=number)
        assert np.array_equal(volume.array[0], SERIES[..., number])
        assert volume.geometry.isclose(Geometry((3, 4, 5), AFFINE))
        assert source.volumes == 6
        assert volume.array.flags.writeable
    for number in (6, -1):
        assert code_of(path, volume=number) == "E_VOLUME"
    channels, _ = read_volume(path, volume="channels")
    assert np.array_equal(channels.array, np.moveaxis(SERIES, -1, 0))


def test_a_file_of_one_volume_has_number_0_only(tmp_path):
    path = saved(tmp_path, nifti(SMALL, AFFINE))
    assert np.array_equal(read_volume(path, volume=0)[0].array[0], SMALL)
    assert read_volume(path, volume="channels")[0].array.shape == (1, 3, 4, 5)
    assert code_of(path, volume=1) == "E_VOLUME"


def test_a_cut_series_is_refused_whichever_volume_is_asked_for(tmp_path):
    for data, name in ((series(), "a.nii"), (gzip.compress(series()), "a.nii.gz")):
        path = saved(tmp_path, data[:-20], name)
        assert code_of(path, volume=0) == "E_TRUNCATED"


def test_a_result_on_one_volume_of_a_series_has_three_dimensions(tmp_path):
    volume, source = read_volume(saved(tmp_path, series()), volume=3)
    write_volume(volume, tmp_path / "b.nii", like=source)
    assert nibabel.load(tmp_path / "b.nii").shape == (3, 4, 5)
    back, _ = read_volume(tmp_path / "b.nii")
    assert np.array_equal(back.array[0], SERIES[..., 3])
    assert back.geometry.isclose(volume.geometry)


def test_a_vector_at_each_voxel_becomes_channels(tmp_path):
    array = SERIES[:, :, :, None, :]
    path = saved(tmp_path, series(array, intent_code=1007))
    for option in (None, 0, "channels"):
        volume, source = read_volume(path, volume=option)
        assert np.array_equal(volume.array, np.moveaxis(SERIES, -1, 0))
        assert source.volumes == 1
    assert code_of(path, volume=1) == "E_VOLUME"


def coloured(array):
    kinds = [(name, "u1") for name in "RGBA"[: array.shape[-1]]]
    return series(np.ascontiguousarray(array).view(kinds)[..., 0])


def test_colour_becomes_channels_and_grey_colour_one(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3)).astype(np.uint8)
    for data, name in ((coloured(colours), "a.nii"), (gzip.compress(coloured(colours)), "a.nii.gz")):
        volume, source = read_volume(saved(tmp_path, data, name))
        assert np.array_equal(volume.array, np.moveaxis(colours, -1, 0))
        assert source.warnings == ()
    assert code_of(tmp_path / "a.nii", unit="label") == "E_NDIM"
    grey = np.repeat(colours[..., :1], 3, axis=-1)
    assert np.array_equal(read_volume(saved(tmp_path, coloured(grey)))[0].array[0], grey[..., 0])
    two = np.stack([colours, 255 - colours], axis=3)
    path = saved(tmp_path, coloured(two))
    assert np.array_equal(read_volume(path, volume=1)[0].array, np.moveaxis(255 - colours, -1, 0))
    assert code_of(path, volume="channels") == "E_NDIM"


def test_alpha_is_laid_on_black(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 4)).astype(np.uint8)
    volume, source = read_volume(saved(tmp_path, coloured(colours)))
    expected = np.moveaxis(np.rint(colours[..., :3] * (colours[..., 3:] / 255)), -1, 0)
    assert np.abs(volume.array - expected).max() <= 1
    assert warned(source) == ["W_ALPHA"]
    colours[..., 3] = 255
    volume, source = read_volume(saved(tmp_path, coloured(colours)))
    assert np.array_equal(volume.array, np.moveaxis(colours[..., :3], -1, 0))
    assert source.warnings == ()


@pytest.mark.parametrize("feed", [1, 7, 64])
def test_the_stream_may_be_fed_in_any_portions(tmp_path, monkeypatch, feed):
    monkeypatch.setattr("medssl.io.integrity._FEED_BYTES", feed)
    data = gzip.compress(series(), mtime=0)
    path = saved(tmp_path, data + bytes(3 * feed), "a.nii.gz")
    volume, source = read_volume(path, volume=2)
    assert np.array_equal(volume.array[0], SERIES[..., 2])
    assert source.warnings == (f"W_TRAILING: {3 * feed} zero bytes after the image were ignored.",)
    for cut in range(1, 20):
        assert code_of(saved(tmp_path, data[:-cut], "a.nii.gz"), volume=2) == "E_TRUNCATED"
    assert code_of(saved(tmp_path, data + b"x", "a.nii.gz"), volume=2) == "E_TRAILING"
    damaged = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    assert code_of(saved(tmp_path, damaged, "a.nii.gz"), volume=2) == "E_CRC"


def test_a_long_extension_of_a_compressed_file_is_passed_over(tmp_path):
    image = nibabel.Nifti1Image(SMALL, AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"CURIE" * 40_000))
    volume, _ = read_volume(saved(tmp_path, gzip.compress(image.to_bytes()), "a.nii.gz"))
    assert np.array_equal(volume.array[0], SMALL)


def test_a_gzipped_header_of_a_pair_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(SMALL, AFFINE), tmp_path / "a.hdr")
    (tmp_path / "a.hdr").write_bytes(gzip.compress((tmp_path / "a.hdr").read_bytes()))
    assert code_of(tmp_path / "a.hdr") == "E_FORMAT"


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_the_types_of_nibabel_hold_the_values_of_nibabel(tmp_path, kind):
    array = np.random.default_rng(0).integers(0, 100, (3, 4, 5)).astype(kind)
    for slope, inter in ((1, 0), (0.37, -3.5), (3, -7)):
        path = saved(tmp_path, nifti(array, AFFINE, scl_slope=slope, scl_inter=inter))
        volume, _ = read_volume(path)
        expected = nibabel.load(path).get_fdata()
        assert np.allclose(volume.array[0], expected, rtol=1e-6, atol=1e-6)
        assert volume.array.flags.writeable
        assert volume.array.dtype.isnative


def test_scaling_beyond_float32_is_refused(tmp_path):
    array = np.full((3, 4, 5), 1e30, dtype=np.float64)
    assert code_of(saved(tmp_path, nifti(array, AFFINE, scl_slope=1e30))) == "E_RANGE"
    array[...] = np.nan
    assert code_of(saved(tmp_path, nifti(array, AFFINE, scl_slope=0.5))) == "E_NONFINITE"


# ---- values


def test_nonfinite_voxels_are_counted_and_filled_or_refused(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5) + 7
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    volume, source = read_volume(saved(tmp_path, nifti(array, AFFINE)))
    assert np.array_equal(volume.array[0, 0, 0], [10, 10, 10, 10, 11])
    assert source.warnings[0].startswith("W_NONFINITE: 3 voxels")
    assert code_of(tmp_path / "a.nii", unit="label") == "E_NONFINITE"
    array[1] = np.nan
    assert code_of(saved(tmp_path, nifti(array, AFFINE))) == "E_NONFINITE"


@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [
        (0.5, "f4", "E_LABEL_VALUE"),
        (1.002, "f4", "E_LABEL_VALUE"),
        (-1, "i2", "E_LABEL_VALUE"),
        (2**25, "f4", "E_RANGE"),
        (2**40, "i8", "E_RANGE"),
    ],
)
def test_a_label_that_is_no_label_is_refused(tmp_path, value, dtype, code):
    array = np.zeros((3, 4, 5), dtype=dtype)
    array[1, 1, 1] = value
    assert code_of(saved(tmp_path, nifti_of(array)), unit="label") == code


def nifti_of(array):
    image = nibabel.Nifti1Image(array, AFFINE, dtype=array.dtype)
    return image.to_bytes()


def test_channels_of_0_and_1_are_overlapping_classes(tmp_path):
    array = np.random.default_rng(0).integers(0, 2, (3, 4, 5, 1, 2)).astype(np.float32)
    volume, _ = read_volume(saved(tmp_path, series(array)), unit="label")
    assert volume.array.dtype == np.uint8
    assert np.array_equal(volume.array, np.moveaxis(array[:, :, :, 0], -1, 0))
    array[0, 0, 0, 0, 0] = 2
    assert code_of(saved(tmp_path, series(array)), unit="label") == "E_NDIM"


def test_labels_within_a_thousandth_of_a_whole_number_are_cast(tmp_path):
    array = np.zeros((3, 4, 5), dtype=np.float32)
    array[1, 1, 1:4] = 0.9999, 3.0005, 1e-8
    volume, _ = read_volume(saved(tmp_path, nifti(array, AFFINE)), unit="label")
    assert volume.array.dtype == np.uint8
    assert volume.array[0, 1, 1].tolist() == [0, 1, 3, 0, 0]


def test_wide_types_are_narrowed_without_loss_or_refused(tmp_path):
    volume, _ = read_volume(saved(tmp_path, nifti_of(np.full((2, 2, 2), -(2**31), dtype=np.int64))))
    assert volume.array.dtype == np.int32
    assert (volume.array == -(2**31)).all()
    assert code_of(saved(tmp_path, nifti_of(np.full((2, 2, 2), 2**40, dtype=np.int64)))) == "E_RANGE"
    assert code_of(saved(tmp_path, nifti_of(np.full((2, 2, 2), 1e39)))) == "E_RANGE"
    volume, _ = read_volume(saved(tmp_path, nifti_of(np.full((2, 2, 2), 1e30))))
    assert volume.array.dtype == np.float32


# ---- names


def test_names_of_images_are_known_by_their_suffix(tmp_path):
    for name in ("a.nii", "a.NII.GZ", "a.b.nii.gz", "a.mha", "a.nhdr", "a.PNG", "a.jpeg", "a.npy"):
        assert is_image(tmp_path / name)
    for name in ("a.raw", "a.txt", "nii.gz.txt", ".nii.gz", "a.csv", "a.img"):
        assert not is_image(tmp_path / name)
    assert stem(tmp_path / "a.b.nii.gz") == "a.b"
    assert stem(tmp_path / "A.NRRD") == "A"
    assert stem(tmp_path / "a.txt") == "a"


def test_the_digest_is_that_of_the_file(tmp_path):
    path = saved(tmp_path, nifti(SMALL, AFFINE))
    assert digest(path) == read_volume(path)[1].digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_source_of_another_format_gives_a_new_header(tmp_path):
    geometry = grid((3, 4, 5), angle_deg=20)
    write_volume(noise(geometry), tmp_path / "a.nii", like=Source(tmp_path / "x.mha", "", "metaimage"))
    image = nibabel.load(tmp_path / "a.nii")
    assert np.allclose(image.affine, geometry.affine, atol=1e-5)
    assert np.allclose(image.get_qform(), geometry.affine, atol=1e-4)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)


def test_mutated_files_end_in_one_error_type(tmp_path):
    rng = random.Random(0)
    for data, name in ((nifti(SMALL, AFFINE), "a.nii"), (nifti(SMALL, AFFINE, kind=nibabel.Nifti2Image), "b.nii")):
        for _ in range(400):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(350)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            with contextlib.suppress(MedSSLError):
                read_volume(saved(tmp_path, bytes(damaged), name))


# ---- real files

REAL_FILES = sorted((REAL_DATA / "nifti_geometry").glob("*/*.nii*"))
LABEL_WORDS = ("seg", "labels", "artery")
REFUSED = {
    "functional.nii": "E_NDIM",
    "pcasl.nii.gz": "E_NDIM",
    "dmri.nii.gz": "E_NDIM",
    "venc.nii.gz": "E_NDIM",
    "resampled_anat_moved.nii": "E_NONFINITE",
    "mtr.nii.gz": "E_NONFINITE",
}


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_FILES, reason="the shared folder of real images is not here")
def test_real_files_read_as_nibabel_does_or_are_refused_with_their_code(tmp_path):
    with (REAL_DATA / "nifti_geometry" / "manifest.csv").open(newline="") as file:
        known = {hashed for row in csv.DictReader(file) for key, hashed in row.items() if key == "sha256"}
    refused = {}
    for path in REAL_FILES:
        try:
            volume, source = read_volume(
                path, unit="label" if any(w in path.name for w in LABEL_WORDS) else "arbitrary"
            )
        except MedSSLError as error:
            refused[path.name] = error.code
            continue
        image = nibabel.load(path)
        assert source.digest in known
        assert volume.geometry.isclose(Geometry(image.shape, image.affine))
        expected = np.asarray(image.dataobj)
        if expected.dtype.names:
            assert np.array_equal(volume.array, np.stack([expected[name] for name in "RGB"]))
            continue
        assert np.allclose(volume.array[0], expected, atol=1e-4)
        write_volume(volume, tmp_path / "out.nii", like=source)
        written = (tmp_path / "out.nii").read_bytes()
        original = path.read_bytes()
        original = zlib.decompress(original, 31) if path.name.endswith("gz") else original
        dtype = nibabel.nifti1.header_dtype
        old, new = (np.frombuffer(raw, dtype=dtype, count=1)[0] for raw in (original, written))
        assert all(old[field].tobytes() == new[field].tobytes() for field in GEOMETRY_FIELDS)
        back, _ = read_volume(tmp_path / "out.nii", unit=volume.unit)
        assert np.array_equal(back.array, volume.array)
        assert np.array_equal(
            voxel_positions_mm(back.geometry)[-1, -1, -1], voxel_positions_mm(volume.geometry)[-1, -1, -1]
        )
    assert refused == REFUSED


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_FILES, reason="the shared folder of real images is not here")
def test_real_series_read_volume_by_volume_as_nibabel_does(tmp_path):
    found = [path for path in REAL_FILES if REFUSED.get(path.name) == "E_NDIM"]
    assert len(found) == 4
    for path in found:
        image = nibabel.load(path)
        data = np.asarray(image.dataobj)
        for number in (0, data.shape[3] - 1):
            volume, source = read_volume(path, volume=number)
            assert source.volumes == data.shape[3]
            assert volume.geometry.isclose(Geometry(image.shape[:3], image.affine))
            assert np.allclose(volume.array[0], data[..., number], atol=1e-3)
        channels, _ = read_volume(path, volume="channels")
        assert np.allclose(channels.array, np.moveaxis(data, -1, 0), atol=1e-3)
        write_volume(volume, tmp_path / "out.nii", like=source)
        assert nibabel.load(tmp_path / "out.nii").shape == image.shape[:3]
