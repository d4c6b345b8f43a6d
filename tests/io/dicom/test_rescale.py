from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import ReadError
from medssl.io.dicom.rescale import Scale, checked_scale, rescaled, signed_if_wrapped


def stack(*frames, dtype=np.uint16):
    return np.array(frames, dtype=dtype).reshape(1, len(frames), 1, -1)


def test_values_as_stored_are_not_touched():
    array = stack([1, 2], [3, 4])
    assert rescaled(array, [Scale(), Scale()], is_hu=False) == (array, ())


@pytest.mark.parametrize(
    ("dtype", "values", "scale", "wanted"),
    [
        (np.uint16, [0, 4000], (1, -1024), np.int16),
        (np.int16, [-2000, 3000], (1, 0), np.int16),
        (np.uint16, [0, 65535], (1, -1024), np.int32),
        (np.uint16, [30000, 60000], (2, -60000), np.int32),
        (np.uint16, [30000, 45000], (2, -60000), np.int16),
        (np.int16, [-100, 300], (-3, 5), np.int16),
        (np.uint8, [0, 255], (1, -1024), np.int16),
        (np.uint8, [0, 255], (1000, 0), np.int32),
        (np.int32, [-5, 70000], (1, 1), np.int32),
        (np.int32, [-5, 700], (1, 1), np.int16),
        (np.uint16, [0, 4000], (0.5, 0), np.float32),
        (np.uint16, [0, 4000], (1, 0.25), np.float32),
        (np.uint16, [0, 65535], (1e6, 0), np.float32),
        (np.float64, [0.5, 4], (2, 1), np.float32),
    ],
)
def test_the_smallest_sound_type_holds_the_result(dtype, values, scale, wanted):
    found, said = rescaled(stack(values, dtype=dtype), [Scale(*map(float, scale))], is_hu=False)
    assert found.dtype == wanted
    np.testing.assert_allclose(found.ravel(), np.array(values, np.float64) * scale[0] + scale[1], rtol=1e-7)
    assert said == ()


@given(st.data())
def test_whole_scales_are_exact_frame_by_frame(data):
    dtype = data.draw(st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.uint32]))
    limits = np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(max(limits.min, -(2**20)), min(limits.max, 2**20)), min_size=4, max_size=4))
    scales = [
        Scale(
            float(data.draw(st.integers(1, 9)) * data.draw(st.sampled_from([1, -1]))),
            float(data.draw(st.integers(-5000, 5000))),
        )
        for _ in range(2)
    ]
    wanted = [
        v * int(s.slope) + int(s.intercept) for v, s in zip(values, [scales[0]] * 2 + [scales[1]] * 2, strict=True)
    ]
    found, _ = rescaled(stack(values[:2], values[2:], dtype=dtype), scales, is_hu=False)
    assert found.ravel().tolist() == wanted


def test_frames_of_several_slopes_come_out_in_one_type():
    found, _ = rescaled(stack([10, 20], [10, 20]), [Scale(1.0, 0.0), Scale(1.9, 0.5)], is_hu=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0, :, 0], [[10, 20], [19.5, 38.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_padding_below_air_becomes_air(dtype):
    array = stack([-2000, 0, 100], [-2000, -2000, 50], dtype=dtype)
    found, [warning] = rescaled(array, [Scale(1, -24, (-2000, -2000))] * 2, is_hu=True)
    assert found[0, :, 0].tolist() == [[-1024, -24, 76], [-1024, -1024, 26]]
    assert warning == "W_PADDING: 50.0% of the voxels are padding and were set to -1024."


def test_padding_of_unsigned_values_may_need_a_sign():
    found, _ = rescaled(stack([0, 50, 65535]), [Scale(1, 0, (65535, 65535))], is_hu=True)
    assert found.ravel().tolist() == [0, 50, -1024]


def test_padding_that_may_be_tissue_is_left():
    array = stack([-1000, 0, 100], dtype=np.int16)
    found, said = rescaled(array, [Scale(1, 0, (0, 0))], is_hu=True)
    assert found.ravel().tolist() == [-1000, 0, 100]
    assert said == ()


def test_padding_outside_other_images_takes_their_lowest_value():
    found, [warning] = rescaled(stack([5, 9, 4095, 4090]), [Scale(2, 0, (4090, 4095))], is_hu=False)
    assert found.ravel().tolist() == [10, 18, 10, 10]
    assert "set to 10" in warning
    zeros, said = rescaled(stack([0, 9, 5]), [Scale(1, 0, (0, 0))], is_hu=False)
    assert zeros.ravel().tolist() == [0, 9, 5]  # a floor already
    assert said == ()


def test_nothing_but_padding_is_left_as_it_is():
    found, said = rescaled(stack([7, 7]), [Scale(1, 0, (7, 7))], is_hu=True)
    assert found.ravel().tolist() == [7, 7]
    assert said == ()


@pytest.mark.parametrize(("slope", "intercept"), [(0, 1), (np.nan, 0), (1, np.inf)])
def test_a_slope_of_zero_is_refused(slope, intercept):
    with pytest.raises(ReadError) as caught:
        checked_scale(slope, intercept, None, path=Path("a.dcm"))
    assert caught.value.code == "E_RESCALE"
    assert checked_scale(2, 1, (3, 4), path=Path("a.dcm")) == Scale(2, 1, (3, 4))


def test_signed_values_under_an_unsigned_label_are_found():
    array = stack([0, 3000, 65536 - 1000]).copy()
    with pytest.raises(ReadError, match="fix_signedness") as caught:
        signed_if_wrapped(array, [Scale()], fix=False, path=Path("a.dcm"))
    assert caught.value.code == "E_SIGNEDNESS"
    fixed, [warning] = signed_if_wrapped(array, [Scale()], fix=True, path=Path("a.dcm"))
    assert fixed.ravel().tolist() == [0, 3000, -1000]
    assert warning.startswith("W_SIGNEDNESS")


@pytest.mark.parametrize("values", [[0, 3000, 4000], [0, 30000, 65000]])
def test_unsigned_values_are_left(values):
    array = stack(values)
    assert signed_if_wrapped(array, [Scale()], fix=True, path=Path("a.dcm")) == (array, ())
    signed = array.astype(np.int32)
    assert signed_if_wrapped(signed, [Scale()], fix=True, path=Path("a.dcm"))[0] is signed
