from __future__ import annotations

import contextlib
import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from verdicts import warned

from medssl.errors import MedSSLError
from medssl.io import read_volume

SMALL = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def npy(array, *, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def saved(folder, data, name="a.npy"):
    path = folder / name
    path.write_bytes(data)
    return path


def code_of(path, **options):
    with pytest.raises(MedSSLError) as caught:
        read_volume(path, **options)
    assert path.name in caught.value.message
    return caught.value.code


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays.arrays(
        st.sampled_from([np.dtype(kind) for kind in ("u1", "<i2", ">i2", ">u2", "<i4", "<f4", ">f4", "<f8", "?")]),
        arrays.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements={"min_value": 0, "max_value": 100},
    ),
    st.booleans(),
    st.sampled_from(((1, 0), (2, 0), (3, 0))),
)
def test_arrays_read_as_numpy_does(tmp_path_factory, array, is_fortran, version):
    stored = np.asfortranarray(array) if is_fortran else array
    path = saved(tmp_path_factory.mktemp("n"), npy(stored, version=version))
    volume, source = read_volume(path)
    expected = np.load(path, allow_pickle=False)
    expected = expected[..., None] if expected.ndim == 2 else expected
    expected = expected[None] if expected.ndim == 3 else expected
    assert np.array_equal(volume.array, expected.astype(np.float32) if expected.dtype.kind == "f" else expected)
    assert volume.array.dtype.isnative
    assert volume.array.flags.writeable
    assert source.format == "npy"


def test_an_array_has_no_size_and_no_orientation_and_that_is_said(tmp_path):
    path = saved(tmp_path, npy(SMALL))
    volume, source = read_volume(path)
    assert warned(source) == ["W_NO_XFORM", "W_NO_SPACING"]
    assert not source.has_spacing
    assert volume.geometry.orientation == "LPS"
    assert volume.geometry.spacing_mm == (1, 1, 1)
    volume, source = read_volume(path, assume_spacing_mm=(0.5, 0.5, 2.0))
    assert volume.geometry.spacing_mm == (0.5, 0.5, 2)
    assert source.has_spacing


def test_labels_follow_the_rules_of_all_formats(tmp_path):
    volume, _ = read_volume(saved(tmp_path, npy(SMALL.astype(np.float64))), unit="label")
    assert volume.array.dtype == np.uint8
    assert code_of(saved(tmp_path, npy(SMALL - 1)), unit="label") == "E_LABEL_VALUE"
    volume, _ = read_volume(saved(tmp_path, npy(SMALL > 7)), unit="label")
    assert volume.array.dtype == np.uint8
    assert volume.array.sum() == 52


def test_half_floats_become_floats(tmp_path):
    volume, _ = read_volume(saved(tmp_path, npy(SMALL.astype(np.float16))))
    assert volume.array.dtype == np.float32


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([[{}, 1]], dtype=object), "E_DTYPE"),
        (SMALL.astype(np.complex64), "E_DTYPE"),
        (SMALL.astype(np.longdouble), "E_DTYPE"),
        (SMALL.astype("S4"), "E_DTYPE"),
        (SMALL.astype("U4"), "E_DTYPE"),
        (SMALL.view("M8[s]") if SMALL.itemsize == 8 else SMALL.astype(np.int64).view("M8[s]"), "E_DTYPE"),
        (np.zeros((2, 2), dtype=[("a", "u1"), ("b", "u1")]), "E_DTYPE"),
        (np.zeros(5, dtype=np.uint8), "E_NDIM"),
        (np.zeros((), dtype=np.uint8), "E_NDIM"),
        (np.zeros((2, 2, 2, 2, 2), dtype=np.uint8), "E_NDIM"),
        (np.zeros((2, 0, 2), dtype=np.uint8), "E_NDIM"),
        (np.full((2, 2, 2), 2**40), "E_RANGE"),
        (np.full((2, 2, 2), np.nan), "E_NONFINITE"),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_its_code(tmp_path, array, code):
    assert code_of(saved(tmp_path, npy(array))) == code


def header(text, *, version=1, length=None):
    body = text.encode()
    size = "<H" if version == 1 else "<I"
    length = struct.pack(size, len(body) if length is None else length)
    return b"\x93NUMPY" + bytes((version, 0)) + length + body


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    huge = "{'descr': '<i2', 'fortran_order': False, 'shape': (99999, 99999, 99999), }\n"
    assert code_of(saved(tmp_path, header(huge) + bytes(60))) == "E_SIZE_LIE"


def test_damaged_files_are_refused_with_the_true_reason(tmp_path):
    data = npy(SMALL)
    good = "{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4, 5), }\n"
    for damaged, code in (
        (data[:-1], "E_TRUNCATED"),
        (data[:100], "E_TRUNCATED"),
        (data[:8], "E_TRUNCATED"),
        (data[:7], "E_TRUNCATED"),
        (data + b"x", "E_TRAILING"),
        (data[:6] + b"\x09" + data[7:], "E_HEADER"),
        (header(good, version=2, length=2**31), "E_HEADER"),
        (header("(" * 5000), "E_DTYPE"),
        (header("{'descr': '<i2', 'fortran_order': False}"), "E_HEADER"),
        (header("{'descr': '<i2', 'fortran_order': 0, 'shape': (3, 4, 5)}"), "E_HEADER"),
        (header(good.replace("'<i2'", "__import__('os').system('touch ran')")), "E_DTYPE"),
        (header(good.replace("<i2", "<i3") + " " * 9) + bytes(180), "E_HEADER"),
    ):
        assert code_of(saved(tmp_path, damaged)) == code
    volume, source = read_volume(saved(tmp_path, data + bytes(4)))
    assert np.array_equal(volume.array[0], SMALL)
    assert any(warning.startswith("W_TRAILING") for warning in source.warnings)


def test_mutated_files_end_in_one_error_type(tmp_path):
    rng = random.Random(0)
    data = npy(SMALL)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(130)] = rng.randrange(256)
        with contextlib.suppress(MedSSLError):
            read_volume(saved(tmp_path, bytes(damaged)))
