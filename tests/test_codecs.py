from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from medssl import codecs
from medssl.errors import ReadError

ROWS, COLUMNS = 24, 17
RLE = "1.2.840.10008.1.2.5"
J2K = "1.2.840.10008.1.2.4.90"


def picture(dtype=np.uint16, channels=1, seed=0):
    low, high = (-2000, 2000) if np.dtype(dtype).kind == "i" else (0, 200 if dtype == np.uint8 else 4000)
    shape = (ROWS, COLUMNS) if channels == 1 else (ROWS, COLUMNS, channels)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def spec(syntax, **options):
    return codecs.Spec(syntax, ROWS, COLUMNS, **options)


def outcome(data, spec):
    try:
        return codecs.decode([data], spec, names=["scan.dcm"])[0].shape, None
    except ReadError as error:
        return None, error


ENCODERS = {
    "1.2.840.10008.1.2.4.57": imagecodecs.ljpeg_encode,
    "1.2.840.10008.1.2.4.70": imagecodecs.ljpeg_encode,
    "1.2.840.10008.1.2.4.80": imagecodecs.jpegls_encode,
    J2K: lambda p: imagecodecs.jpeg2k_encode(p, level=0, codecformat="j2k"),
    "1.2.840.10008.1.2.4.201": imagecodecs.htj2k_encode,
}


@pytest.fixture(autouse=True)
def _no_child_left():
    yield
    codecs.dismiss()


@pytest.mark.parametrize("syntax", ENCODERS)
@pytest.mark.parametrize("in_place", [True, False])
def test_lossless_data_come_back_bit_for_bit(syntax, in_place, monkeypatch):
    if in_place:
        monkeypatch.setattr(codecs._CHILD, "owner", -1)
    pictures = [picture(seed=seed) for seed in range(3)]
    found = codecs.decode([bytes(ENCODERS[syntax](p)) for p in pictures], spec(syntax), names=["a", "b", "c"])
    for wanted, got in zip(pictures, found, strict=True):
        np.testing.assert_array_equal(got, wanted)
    found[0][0, 0] = 7  # whoever gets a picture may write to it


def test_a_codestream_keeps_its_sign():
    wanted = picture(np.int16)
    data = bytes(ENCODERS[J2K](wanted))
    [got] = codecs.decode([data], spec(J2K), names=["a"])
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, wanted)
    assert codecs.precision(data) == (16, True)
    assert codecs.precision(b"no codestream") is None


@pytest.mark.parametrize(("photometric", "is_close"), [("YBR_FULL_422", True), ("RGB", False)])
def test_a_jpeg_without_marks_is_taken_for_what_the_header_says(photometric, is_close):
    smooth = np.stack(np.meshgrid(*[np.linspace(0, 250, ROWS)] * 2, indexing="ij"), -1)[:, :COLUMNS]
    colour = np.dstack([smooth, smooth[..., :1] / 2]).astype(np.uint8)
    data = imagecodecs.jpeg8_encode(colour, level=100, subsampling="444")
    assert data[6:10] == b"JFIF"
    size = int.from_bytes(data[4:6], "big")
    data = data[:2] + data[4 + size :]  # without the mark that says YBR
    syntax = "1.2.840.10008.1.2.4.50"
    [got] = codecs.decode([data], spec(syntax, samples=3, bits_allocated=8, photometric=photometric), names=["a"])
    assert (np.abs(got.astype(int) - colour).max() < 12) == is_close
    assert codecs.gives_rgb(syntax)
    assert not codecs.gives_rgb(RLE)


def test_run_lengths_of_colour_are_planes():
    def segment(plane):
        out = b"".join(bytes([0, value]) for value in plane.ravel().tolist())
        return out + b"\0" * (len(out) % 2)

    colour = picture(np.uint8, channels=3)
    segments = [segment(colour[..., channel]) for channel in range(3)]
    offsets = np.cumsum([64, *(len(s) for s in segments)])[:3]
    head = np.array([3, *offsets, *[0] * 12], "<u4").tobytes()
    [got] = codecs.decode([head + b"".join(segments)], spec(RLE, samples=3, bits_allocated=8), names=["a"])
    np.testing.assert_array_equal(got, colour)
    with pytest.raises(ReadError, match="3 run-length segments; 2 are needed") as caught:
        codecs.decode([head + b"".join(segments)], spec(RLE), names=["a"])
    assert caught.value.code == "E_CODEC_DATA"


def test_an_unknown_syntax_is_named():
    with pytest.raises(ReadError, match=r"^scan\.dcm: no decoder for transfer syntax that is none of") as caught:
        codecs.decode([b""], spec("1.2.3"), names=["scan.dcm"])
    assert caught.value.code == "E_CODEC"
    with pytest.raises(ReadError, match=r"transfer syntax 1\.2\.840\.10008\.1\.2\.4\.110"):
        codecs.decode([b""], spec("1.2.840.10008.1.2.4.110"), names=["scan.dcm"])


@pytest.mark.parametrize("syntax", [RLE, *ENCODERS])
@pytest.mark.parametrize("in_place", [True, False])
def test_damaged_data_are_refused_by_name(syntax, in_place, monkeypatch):
    if in_place:
        monkeypatch.setattr(codecs._CHILD, "owner", -1)
    good = bytes(ENCODERS.get(syntax, lambda p: p.tobytes())(picture()))
    for data in (b"", good[: len(good) // 3], b"\xff" * 90, good[:60] + bytes(30) + good[90:200]):
        shape, refusal = outcome(data, spec(syntax))  # some codes have no checksum: what decodes has the right size
        assert shape == (ROWS, COLUMNS) or refusal.code in {"E_CODEC_DATA", "E_READER_LIMIT"}
        assert refusal is None or refusal.message.startswith("scan.dcm: ")


def test_a_picture_of_another_size_is_refused_before_it_is_decoded():
    data = bytes(ENCODERS[J2K](np.zeros((64, 64), np.uint16)))
    with pytest.raises(ReadError, match=r"\(64, 64, 1\)") as caught:
        codecs.decode([data], spec(J2K), names=["a"])
    assert caught.value.code == "E_CODEC_DATA"


def test_a_crash_costs_its_own_file_and_names_it():
    assert codecs.decode([bytes(ENCODERS[J2K](picture()))], spec(J2K), names=["a"])
    process = codecs._CHILD._process
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(ReadError) as caught:  # a child that is gone for every picture
        _with_child_that_dies(lambda: codecs.decode([b"x", b"y"], spec(J2K), names=["first", "second"]))
    assert caught.value.code == "E_READER_CRASH"
    assert caught.value.message.startswith("first: its data crash the decoder")
    assert codecs.decode([bytes(ENCODERS[J2K](picture()))], spec(J2K), names=["a"])


def _with_child_that_dies(function):
    original = codecs._CHILD._start

    def start():
        pipe, process = original()
        process.kill()
        process.join()
        return pipe, process

    codecs._CHILD._start = start
    try:
        return function()
    finally:
        codecs._CHILD._start = original


def test_a_crash_among_several_is_found(monkeypatch):
    """The child dies once, in the middle of a batch: all pictures still come back."""
    pictures = [picture(seed=seed) for seed in range(4)]
    data = [bytes(ENCODERS[J2K](p)) for p in pictures]
    original, left = codecs._CHILD._start, [1]

    def start():
        pipe, process = original()
        if left:
            left.pop()
            process.kill()
            process.join()
        return pipe, process

    monkeypatch.setattr(codecs._CHILD, "_start", start)
    found = codecs.decode(data, spec(J2K), names="abcd")
    np.testing.assert_array_equal(np.stack(found), np.stack(pictures))


def test_a_decoder_that_hangs_is_ended(monkeypatch):
    codecs.decode([bytes(ENCODERS[J2K](picture()))], spec(J2K), names=["a"])
    monkeypatch.setattr(codecs, "_LIMIT_S", 0.3)
    os.kill(codecs._CHILD._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ReadError, match="takes longer") as caught:
        codecs.decode([bytes(ENCODERS[J2K](picture()))], spec(J2K), names=["a"])
    assert caught.value.code == "E_READER_LIMIT"
    assert time.monotonic() - begin < 5


def test_the_child_may_not_take_more_than_2_gib(monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(codecs, "_decode", exhausted)
    monkeypatch.setattr(codecs._CHILD, "owner", -1)
    with pytest.raises(ReadError, match="2 GiB") as caught:
        codecs.decode([b"x"], spec(J2K), names=["a"])
    assert caught.value.code == "E_READER_LIMIT"


def _in_worker(data):
    [found] = codecs.decode([data], spec(J2K), names=["a"])
    return found, codecs._CHILD._process is None


def test_a_worker_process_decodes_in_place():
    wanted = picture()
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found, in_place = pool.submit(_in_worker, bytes(ENCODERS[J2K](wanted))).result()
    assert in_place
    np.testing.assert_array_equal(found, wanted)


def test_a_script_without_a_guard_is_run_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import imagecodecs, numpy\n"
        "from medssl import codecs\n"
        "print('once')\n"
        "data = imagecodecs.jpegls_encode(numpy.arange(12, dtype=numpy.uint16).reshape(3, 4))\n"
        "[found] = codecs.decode([data], codecs.Spec('1.2.840.10008.1.2.4.80', 3, 4), names=['a'])\n"
        "print(int(found.sum()))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["once", "66"]
    assert not done.stderr


def test_the_child_ends_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import imagecodecs, numpy, os, signal\n"
        "from medssl import codecs\n"
        "data = imagecodecs.jpegls_encode(numpy.arange(12, dtype=numpy.uint16).reshape(3, 4))\n"
        "codecs.decode([data], codecs.Spec('1.2.840.10008.1.2.4.80', 3, 4), names=['a'])\n"
        "print(codecs._CHILD._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    child, deadline = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < deadline and _is_running(child):
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
