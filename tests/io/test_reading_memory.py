"""No reader takes three times the room of what it hands out."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image

from medssl.io import read_volume

SHAPE = (160, 160, 100)


def values(dtype):
    return np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)


def nii(dtype, *, slope=1.0, packed=True):
    image = nibabel.Nifti1Image(values(dtype), np.eye(4))
    data = bytearray(image.to_bytes())
    data[112:116] = np.float32(slope).tobytes()
    return gzip.compress(bytes(data), 1) if packed else bytes(data)


def mha():
    packed = zlib.compress(values("<i2").tobytes(), 1)
    return (
        b"ObjectType = Image\nNDims = 3\nCompressedData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
        b"ElementSpacing = 1 1 1\nDimSize = 160 160 100\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + packed
    )


def nrrd():
    return (
        b"NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 160 160 100\nendian: big\nencoding: raw\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n" + values(">i2").tobytes()
    )


def npy(folder):
    np.save(folder / "a.npy", values(np.float32))
    return (folder / "a.npy").read_bytes()


def tiff(folder):
    pages = [Image.fromarray(page) for page in values(np.uint8).T]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    return (folder / "a.tif").read_bytes()


CASES = {
    "i2.nii.gz": (lambda _: nii("<i2"), {}),
    "i2.nii": (lambda _: nii("<i2", packed=False), {}),
    "big.nii.gz": (lambda _: nii(">i2"), {}),
    "scaled.nii.gz": (lambda _: nii("u1", slope=0.5), {}),
    "whole.nii.gz": (lambda _: nii("u1", slope=300), {}),
    "f4.nii.gz": (lambda _: nii("<f4"), {}),
    "label.nii.gz": (lambda _: nii("u1"), {"unit": "label"}),
    "a.mha": (lambda _: mha(), {}),
    "a.nrrd": (lambda _: nrrd(), {}),
    "a.npy": (npy, {}),
    "a.tif": (tiff, {"pages": "stack"}),
}


@pytest.mark.parametrize("name", CASES)
def test_reading_takes_less_than_three_times_the_volume(tmp_path, name):
    make, options = CASES[name]
    path = tmp_path / name
    path.write_bytes(make(tmp_path))
    read_volume(path, **options)  # what is imported and cached on the way counts for no volume
    tracemalloc.start()
    try:
        volume, _ = read_volume(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * volume.array.nbytes, f"{peak / volume.array.nbytes:.2f} times the volume"


def test_one_volume_of_a_series_takes_the_room_of_one(tmp_path):
    series = np.random.default_rng(0).integers(0, 100, (64, 64, 30, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(series, np.eye(4)), tmp_path / "a.nii.gz")
    size = (tmp_path / "a.nii.gz").stat().st_size
    read_volume(tmp_path / "a.nii.gz", volume=5)
    tracemalloc.start()
    try:
        volume, _ = read_volume(tmp_path / "a.nii.gz", volume=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(volume.array[0], series[..., 5])
    assert peak < size + 3 * volume.array.nbytes
