from __future__ import annotations

import importlib
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import REAL_DATA
from scipy import interpolate, ndimage

from medssl.augment import resample as module
from medssl.augment.resample import compiled, resample
from medssl.errors import GeometryError

TYPES = [torch.int16, torch.uint8, torch.int32, torch.float16, torch.float32]


@pytest.fixture(params=["kernel", "grid_sample"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations on the CPU."""
    if request.param == "grid_sample":
        monkeypatch.setattr(module, "compiled", lambda: None)
    return str(request.param)


def boxes(shape, *, batch=2, channels=2, seed=0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=(batch, channels, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 0, *[0.7] * len(shape)))
    return torch.from_numpy(smooth / np.abs(smooth).max()).float()


def labels(shape, *, batch=2, channels=1, seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 100, (batch, channels, *shape))).to(torch.uint8)


def maps(box, shape, *, batch=2, seed=0, strength=0.15) -> torch.Tensor:
    """Affine maps about the centres, each with another turn, shear, scale and shift."""
    rng = np.random.default_rng(seed)
    dims = len(shape)
    out = np.tile(np.eye(dims + 1), (batch, 1, 1))
    for row in out:
        row[:dims, :dims] += strength * rng.normal(size=(dims, dims))
        centre = (np.array(box) - 1) / 2 + rng.uniform(-1, 1, dims)
        row[:dims, dims] = centre - row[:dims, :dims] @ ((np.array(shape) - 1) / 2)
    return torch.from_numpy(out)


def places(to_box: np.ndarray, shape, displacement=None) -> np.ndarray:
    """Box coordinates of every output voxel (d, *shape), in float64."""
    dims = len(shape)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")).astype(float)
    at = np.tensordot(to_box[:dims, :dims], index, axes=1) + to_box[:dims, dims].reshape(-1, *[1] * dims)
    if displacement is not None:
        first = tuple(slice(0, 1 if n == 1 else None) for n in shape)  # an axis of one voxel lies at the first knot
        knots = displacement[(slice(None), *first)]
        padded = np.pad(knots, [(0, 0), *[(0, 1 if n == 1 else 0) for n in shape]], mode="edge")
        axes = [np.linspace(0, max(n - 1, 1), k) for n, k in zip(shape, padded.shape[1:], strict=True)]
        points = np.moveaxis(index, 0, -1)
        at += np.stack([interpolate.RegularGridInterpolator(axes, part)(points) for part in padded])
    return at


def by_scipy(x, to_box, shape, *, displacement=None, extent=None, fill=None, label=None):
    """The oracle: scipy in float64; nearest neighbour by the formula. Gives the places too."""
    out, moved, at_all = [], [], []
    for sample in range(len(x)):
        moves = None if displacement is None else displacement[sample].double().numpy()
        at = places(to_box[sample].numpy(), shape, moves)
        counts = x.shape[2:] if extent is None else extent[sample].tolist()
        inner = tuple(slice(0, n) for n in counts)
        mode = {"mode": "nearest"} if fill is None else {"mode": "grid-constant", "cval": fill}
        rows = [ndimage.map_coordinates(c[inner].double().numpy(), at, order=1, **mode) for c in x[sample]]
        out.append(np.stack(rows))
        at_all.append(at)
        if label is not None:
            nearest = np.floor(at + 0.5).astype(int)
            top = np.array(counts).reshape(-1, *[1] * len(shape)) - 1
            kept = np.clip(nearest, 0, top)
            inside = (nearest == kept).all(0) | (fill is None)
            moved.append(np.stack([np.where(inside, c.numpy()[tuple(kept)], 0) for c in label[sample]]))
    return np.stack(out), np.stack(moved) if moved else None, np.stack(at_all)


def same_labels(found: torch.Tensor, wanted: np.ndarray, at: np.ndarray) -> None:
    """Equal but where a place lies within rounding of the middle between two voxels."""
    tie = (np.abs(at + 0.5 - np.round(at + 0.5)) < 2e-5).any(1, keepdims=True)
    assert tie.mean() < 0.01
    np.testing.assert_array_equal(np.where(tie, 0, found.numpy()), np.where(tie, 0, wanted))


CASES = [
    pytest.param((13, 12, 17), (11, 9, 16), id="3D"),
    pytest.param((9, 10, 8), (12, 13, 35), id="3D beyond the box"),
    pytest.param((17, 14), (15, 21), id="2D"),
    pytest.param((12, 11, 1), (9, 10, 1), id="one slice"),
    pytest.param((1, 12, 11), (1, 9, 10), id="one sagittal slice"),
    pytest.param((9, 1, 7), (6, 5, 1), id="thin axes that differ"),
    pytest.param((1, 1, 1), (3, 2, 1), id="one voxel"),
    pytest.param((6, 1), (5, 1), id="one column"),
    pytest.param((3, 2, 2), (1, 1, 1), id="to one voxel"),
]


@pytest.mark.parametrize("fill", [None, -0.7])
@pytest.mark.parametrize(("box", "shape"), CASES)
def test_images_and_labels_are_those_of_scipy(way, box, shape, fill):
    x, y, to_box = boxes(box), labels(box, channels=2), maps(box, shape)
    out, moved = resample(x, to_box, shape=shape, fill=fill, label=y)
    wanted, wanted_labels, at = by_scipy(x, to_box, shape, fill=fill, label=y)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=2e-5)
    same_labels(moved, wanted_labels, at)
    assert out.dtype == torch.float32
    assert moved.dtype == torch.uint8


@pytest.mark.parametrize("fill", [None, 0.4])
@pytest.mark.parametrize(
    ("box", "shape", "knots"),
    [
        ((13, 12, 17), (11, 9, 16), (3, 4, 5)),
        ((13, 12, 17), (9, 9, 9), (2, 9, 2)),
        ((17, 14), (15, 12), (4, 2)),
        ((12, 11, 1), (9, 10, 1), (3, 4, 1)),
        ((1, 12, 11), (1, 9, 10), (2, 3, 4)),
    ],
)
def test_a_displacement_is_linear_between_knots_from_corner_to_corner(way, box, shape, knots, fill):
    x, y, to_box = boxes(box), labels(box), maps(box, shape)
    moves = 1.5 * torch.randn(2, len(shape), *knots, generator=torch.Generator().manual_seed(1))
    out, moved = resample(x, to_box, shape=shape, displacement=moves, fill=fill, label=y)
    wanted, wanted_labels, at = by_scipy(x, to_box, shape, displacement=moves, fill=fill, label=y)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=3e-5)
    same_labels(moved, wanted_labels, at)


def test_the_knots_at_the_corners_move_the_corner_voxels(way):
    ramp = torch.arange(20.0).expand(1, 1, 20)[..., None].expand(1, 1, 20, 4)
    moves = torch.zeros(1, 2, 3, 2)
    moves[:, 0] = torch.tensor([3.0, 1.0, -2.0])[:, None]
    out, _ = resample(ramp, torch.eye(3, dtype=torch.float64)[None], shape=(20, 4), displacement=moves)
    assert out[0, 0, [0, 19], 0].tolist() == pytest.approx([3.0, 17.0])
    wanted = [9 + 3 - 2 * 18 / 19, 10 + 1 - 3 * 1 / 19]  # knots at 0, 9.5 and 19
    assert out[0, 0, 9:11, 0].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("fill", [None, -0.3])
def test_voxels_behind_the_extent_do_not_exist(way, fill):
    box, shape = (13, 12, 17), (11, 9, 16)
    extent = torch.tensor([[13, 7, 10], [8, 12, 1]])
    x, y, to_box = boxes(box), labels(box), maps(box, shape)
    wanted, wanted_labels, at = by_scipy(x, to_box, shape, extent=extent, fill=fill, label=y)
    for sample, (a, b, c) in enumerate(extent.tolist()):
        x[sample, :, a:], x[sample, :, :, b:], x[sample, :, :, :, c:] = 100.0, 100.0, 100.0
        y[sample, :, a:], y[sample, :, :, b:], y[sample, :, :, :, c:] = 255, 255, 255
    out, moved = resample(x, to_box, shape=shape, extent=extent, fill=fill, label=y)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=4e-4 if way == "grid_sample" else 2e-5)
    same_labels(moved, wanted_labels, at)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_stored_type_gives_what_its_float32_gives(way, dtype):
    box, shape = (13, 12, 17), (11, 9, 16)
    x, to_box = (100 * boxes(box) + 100).to(dtype), maps(box, shape)
    before = x.clone()
    out, _ = resample(x, to_box, shape=shape, fill=3.0)
    torch.testing.assert_close(out, resample(x.float(), to_box, shape=shape, fill=3.0)[0], rtol=1e-6, atol=1e-4)
    assert torch.equal(x, before)


def test_int16_keeps_its_sign_and_its_whole_range(way):
    x = torch.tensor([-32768, 32767, -1, 0], dtype=torch.int16)[None, None, None]
    to_box = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    out, _ = resample(x, to_box, shape=(1, 7))
    wanted = [-32768.0, -0.5, 32767.0, 16383.0, -1.0, -0.5, 0.0]
    assert out.flatten().tolist() == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64],
)
@pytest.mark.parametrize("by_index", [True, False])
def test_every_label_type_keeps_its_values(way, dtype, by_index):
    box, shape = (7, 6, 5), (6, 9, 5)
    y = labels(box).to(torch.int64)
    top = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    y = y.where(y % 2 == 0, top) if dtype != torch.bool else y % 2
    y = y.numpy().astype(str(dtype).removeprefix("torch."))
    to_box = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    if not by_index:
        to_box = maps(box, shape)
    x = boxes(box)
    given = torch.from_numpy(y)
    _, moved = resample(x, to_box, shape=shape, label=given, fill=0.0)
    _, wanted, at = by_scipy(x, to_box, shape, label=torch.from_numpy(y.astype(np.int64)), fill=0.0)
    assert moved.dtype == dtype
    if by_index:
        np.testing.assert_array_equal(moved.numpy().astype(np.int64), wanted)
    else:
        same_labels(torch.from_numpy(moved.numpy().astype(np.int64)), wanted, at)


def test_a_window_follows_the_interpolation_with_the_bounds_of_each_sample(way):
    box, shape = (13, 12, 17), (11, 9, 16)
    x, to_box = (500 * boxes(box)).to(torch.int16), maps(box, shape)
    to_box[1] = torch.eye(4, dtype=torch.float64)
    low, high = torch.tensor([-100.0, -20.0]), torch.tensor([60.0, 200.0])
    plain, _ = resample(x, to_box, shape=shape)
    out, _ = resample(x, to_box, shape=shape, window=(low, high))
    wide = (slice(None), *[None] * 4)
    torch.testing.assert_close(out, ((plain - low[wide]) / (high - low)[wide]).clamp(0, 1), rtol=0, atol=1e-6)
    assert out.min() == 0
    assert out.max() == 1


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_mirrors_and_whole_shifts_keep_values_bit_for_bit(way, signs, dtype):
    box, shape, start = (11, 9, 8), (6, 5, 4), (3, 2, 4)
    x, y = (1000 * boxes(box)).to(dtype), labels(box)
    to_box = torch.diag(torch.tensor([*signs, 1], dtype=torch.float64))[None].repeat(2, 1, 1)
    for axis, sign in enumerate(signs):
        to_box[:, axis, 3] = start[axis] if sign > 0 else start[axis] + shape[axis] - 1
    to_box = to_box * (1 + 1e-15)
    out, moved = resample(x, to_box, shape=shape, label=y)
    inner = (..., *[slice(first, first + num) for first, num in zip(start, shape, strict=True)])
    axes = [axis + 2 for axis, sign in enumerate(signs) if sign < 0]
    assert torch.equal(out, x[inner].float().flip(axes))
    assert torch.equal(moved, y[inner].flip(axes))


@pytest.mark.parametrize("fill", [None, -7.0])
def test_a_whole_shift_beyond_the_box_extends_the_border_or_fills(fill):
    x, y = (1000 * boxes((5, 6, 4))).round(), labels((5, 6, 4)) + 1
    to_box = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    to_box[0, :3, 3] = torch.tensor([-2.0, 3.0, 1.0])
    to_box[1] = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    to_box[1, :3, 3] = torch.tensor([2.0, -30.0, 6.0])
    out, moved = resample(x, to_box, shape=(6, 6, 6), fill=fill, label=y)
    wanted, wanted_labels, _ = by_scipy(x, to_box, (6, 6, 6), fill=fill, label=y)
    np.testing.assert_array_equal(out.numpy(), wanted.astype(np.float32))
    np.testing.assert_array_equal(moved.numpy(), wanted_labels)


def test_a_crop_by_index_knows_the_extent():
    x = torch.arange(6.0).reshape(1, 1, 6, 1).repeat(2, 1, 1, 1)
    out, _ = resample(
        x, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1), shape=(6, 1), extent=torch.tensor([[6, 1], [4, 1]])
    )
    assert out[1].flatten().tolist() == [0, 1, 2, 3, 3, 3]


def test_nothing_to_do_gives_what_was_given():
    x, y = boxes((5, 4, 3)), labels((5, 4, 3))
    identity = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    out, moved = resample(x, identity, shape=(5, 4, 3), label=y, displacement=torch.zeros(2, 3, 2, 2, 2))
    assert out is x
    assert moved is y


def test_a_sample_depends_neither_on_its_neighbours_nor_on_whether_they_move_by_index(way):
    box, shape = (9, 8, 10), (7, 6, 11)
    x, y, to_box = boxes(box, batch=4), labels(box, batch=4), maps(box, shape, batch=4)
    to_box[1] = torch.eye(4, dtype=torch.float64)
    moves = torch.randn(4, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    moves[1] = 0
    window = (torch.tensor([-1.0, -0.5, 0.0, 0.1]), torch.tensor([0.3, 0.5, 0.9, 1.0]))
    extent = torch.tensor([[9, 8, 10], [5, 8, 9], [9, 8, 4], [2, 2, 2]])
    whole, moved = resample(x, to_box, shape=shape, label=y, displacement=moves, window=window, extent=extent)
    for n in range(4):
        one = slice(n, n + 1)
        alone, lone = resample(
            x[one], to_box[one], shape=shape, label=y[one], displacement=moves[one],
            window=(window[0][one], window[1][one]), extent=extent[one],
        )  # fmt: skip
        assert torch.equal(alone, whole[one])
        assert torch.equal(lone, moved[one])


def test_arrays_that_are_not_contiguous_are_read_right(way):
    box, shape = (9, 8, 10), (7, 6, 11)
    x, y, to_box = boxes(box), labels(box), maps(box, shape)
    turned, turned_label = (t.transpose(2, 4).contiguous().transpose(2, 4) for t in (x, y))
    out, moved = resample(turned, to_box, shape=shape, label=turned_label)
    wanted, wanted_label = resample(x, to_box, shape=shape, label=y)
    assert torch.equal(out, wanted)
    assert torch.equal(moved, wanted_label)


def test_threads_change_no_bit():
    box, shape = (40, 40, 40), (64, 48, 48)
    x, y, to_box = boxes(box, channels=1), labels(box), maps(box, shape)
    given = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(resample(x, to_box, shape=shape, label=y, fill=0.0))
    finally:
        torch.set_num_threads(given)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_nan_stays_where_it_is_and_is_not_lost(way):
    x = torch.zeros(1, 1, 12, 12, 12)
    x[0, 0, 6, 6, 6] = torch.nan
    to_box = maps((12, 12, 12), (12, 12, 12), batch=1, strength=0.05)
    window = (torch.tensor([0.0]), torch.tensor([1.0]))
    out, _ = resample(x, to_box, shape=(12, 12, 12), window=window)
    lost = out.isnan()
    near = np.abs(places(to_box[0].numpy(), (12, 12, 12)) - 6).max(0) < 1
    assert 1 <= near.sum() <= lost.sum()
    assert bool((lost[0, 0] | ~torch.from_numpy(near)).all())
    assert lost.sum() < 40


def test_far_outside_and_nan_at_the_border_give_the_fill(way):
    x = torch.full((1, 1, 4, 4, 4), torch.nan)
    to_box = torch.eye(4, dtype=torch.float64)[None] * 0.9
    to_box[0, :3, 3] = torch.tensor([1e9, -3e12, 50.0])
    out, moved = resample(x, to_box, shape=(3, 3, 3), fill=2.0, label=torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8))
    assert bool((out == 2).all())
    assert bool((moved == 0).all())
    constant = torch.full((1, 1, 4, 4, 4), 5.0)
    assert bool((resample(constant, to_box, shape=(3, 3, 3))[0] == 5).all())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dims=st.sampled_from([2, 3]),
    fill=st.sampled_from([None, 0.0, 0.5]),
    bent=st.booleans(),
    data=st.data(),
)
def test_both_ways_agree_to_a_tenthousandth(seed, dims, fill, bent, data):
    box = tuple(data.draw(st.integers(1, 40)) for _ in range(dims))
    shape = tuple(data.draw(st.integers(1, 40)) for _ in range(dims))
    x, y, to_box = boxes(box, seed=seed), labels(box, seed=seed), maps(box, shape, seed=seed, strength=0.3)
    knots = tuple(1 if n == 1 else data.draw(st.integers(2, 6)) for n in shape)
    moves = torch.randn(2, dims, *knots, generator=torch.Generator().manual_seed(seed)) if bent else None
    kernel, moved = resample(x, to_box, shape=shape, displacement=moves, fill=fill, label=y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compiled", lambda: None)
        other, other_label = resample(x, to_box, shape=shape, displacement=moves, fill=fill, label=y)
    torch.testing.assert_close(kernel, other, rtol=0, atol=1e-4)
    assert (moved != other_label).float().mean() < 0.02  # ties


def test_a_box_too_large_to_count_in_32_bits_goes_the_other_way(monkeypatch):
    x, to_box = boxes((9, 8, 10)), maps((9, 8, 10), (5, 5, 5))
    wanted, _ = resample(x, to_box, shape=(5, 5, 5))
    monkeypatch.setattr(module, "_MOST_VOXELS", 100)
    monkeypatch.setattr(module, "_on_cpu", None)
    torch.testing.assert_close(resample(x, to_box, shape=(5, 5, 5))[0], wanted, rtol=0, atol=2e-5)


def test_without_numba_there_are_no_kernels(monkeypatch):
    def missing(name):
        raise ImportError(name)

    compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", missing)
        assert compiled() is None
    compiled.cache_clear()
    assert compiled() is not None


def test_without_a_folder_to_write_to_kernels_are_compiled_each_time(monkeypatch):
    jit = importlib.import_module("medssl.augment.jit")
    asked = []

    def njit(**options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(jit.numba, "njit", njit)
    assert jit.compile_loop(contract=True)(abs) is abs
    assert [options.get("cache", False) for options in asked] == [True, False]


def test_importing_the_function_does_not_load_numba():
    code = "import sys, medssl.augment.resample, medssl.augment.fields; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label": labels((5, 4, 4))}, r"label of \(5, 4, 4\) voxels for an image of \(5, 4, 3\)"),
        ({"extent": torch.tensor([[5, 4, 3], [5, 4, 4]])}, "an extent outside 1 to"),
        ({"extent": torch.tensor([[5, 4, 3], [0, 4, 3]])}, "an extent outside 1 to"),
        ({"displacement": torch.full((2, 3, 2, 2, 2), torch.nan)}, "not finite"),
    ],
)
def test_what_would_read_beyond_the_box_is_refused(options, match):
    with pytest.raises(GeometryError, match=match):
        resample(boxes((5, 4, 3)), maps((5, 4, 3), (5, 4, 3)), shape=(5, 4, 3), **options)


def test_a_map_that_is_not_finite_is_refused():
    to_box = torch.full((2, 4, 4), math.inf, dtype=torch.float64)
    with pytest.raises(GeometryError, match="not finite"):
        resample(boxes((5, 4, 3)), to_box, shape=(5, 4, 3))


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the shared folder of real images is not here")
def test_a_real_scan_and_its_label_move_as_in_simpleitk(way):
    name = sorted((REAL_DATA / "hippocampus_msd" / "labelsTr").glob("*.nii.gz"))[0].name
    image, label = (
        np.asarray(nib.load(REAL_DATA / "hippocampus_msd" / folder / name).dataobj)
        for folder in ("imagesTr", "labelsTr")
    )
    image, label = image.astype(np.float32), label.astype(np.uint8)
    low, high = float(image.min()), float(image.max())
    to_box = maps(image.shape, image.shape, batch=1, strength=0.08)
    out, moved = resample(
        torch.from_numpy(image)[None, None], to_box, shape=image.shape,
        label=torch.from_numpy(label)[None, None], fill=low, window=(torch.tensor([low]), torch.tensor([high])),
    )  # fmt: skip
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(to_box[0, :3, :3].flatten().tolist())
    transform.SetTranslation(to_box[0, :3, 3].tolist())
    found = []
    for array, method in ((image, sitk.sitkLinear), (label, sitk.sitkNearestNeighbor)):
        grid = sitk.GetImageFromArray(array.transpose())
        found.append(sitk.GetArrayFromImage(sitk.Resample(grid, grid, transform, method, -1.0)).transpose())
    at = places(to_box[0].numpy(), image.shape)
    top = np.array(image.shape).reshape(3, 1, 1, 1) - 1
    inside = ((at >= 0) & (at <= top)).all(0)  # SimpleITK has its own rule for the outer half voxel
    assert inside.mean() > 0.5
    wanted = (found[0] - low) / (high - low)
    np.testing.assert_allclose(out[0, 0].numpy()[inside], wanted[inside], rtol=0, atol=1e-4)
    assert (moved[0, 0].numpy() != found[1])[inside].mean() < 1e-4  # ties
    assert set(moved.unique().tolist()) == {0, 1, 2}


@pytest.mark.gpu
def test_the_gpu_gives_the_crop_of_the_cpu():
    box, shape = (60, 50, 40), (48, 40, 33)
    x, y, to_box = boxes(box), labels(box), maps(box, shape)
    moves = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"shape": shape, "displacement": moves, "fill": 0.1, "extent": torch.tensor([[60, 50, 40], [30, 50, 21]])}
    out, moved = resample(x, to_box, label=y, **options)
    other, other_label = resample(x.cuda(), to_box, label=y.cuda(), **options)
    torch.testing.assert_close(other.cpu(), out, rtol=0, atol=1e-4)
    assert (moved != other_label.cpu()).float().mean() < 1e-4
