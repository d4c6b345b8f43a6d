"""There and back: a label map through any prepared grid, a file, and onto the source's own grid.

Agreement is asked for to half a voxel of the coarser of the two grids, everywhere.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl.data.prepare import PrepareConfig, prepare_volume
from medssl.evaluation.segment import segment_volume
from medssl.evaluation.sliding_window import Settings
from medssl.geometry import Geometry
from medssl.io import read_volume, write_volume
from medssl.nn.bundle import Passport
from medssl.volume import Volume, resample_argmax

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (0.4, 0.9, 2.0), (3.0, 0.5, 0.5)]


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    """Oblique, flipped, permuted, anisotropic, sheared, far from the origin, one slice thick: any of it together."""
    shape = [draw(st.integers(5, 15)) for _ in range(3)]
    if draw(st.booleans()) and draw(st.booleans()):
        shape[draw(st.integers(0, 2))] = 1
    spacing = draw(st.sampled_from(SPACINGS))
    angles = [draw(st.sampled_from([0.0, 5.0, 20.0, 33.0, 45.0])) for _ in range(3)]
    rotation = np.eye(3)
    for axis, degrees in enumerate(angles):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.eye(3)
        one, two = [other for other in range(3) if other != axis]
        turn[one, one], turn[two, two], turn[one, two], turn[two, one] = c, c, -s, s
        rotation = rotation @ turn
    shear = np.eye(3)
    if draw(st.booleans()):
        row, column = draw(st.sampled_from([(0, 1), (0, 2), (1, 2)]))
        shear[row, column] = draw(st.sampled_from([1e-5, 0.01, 0.05, -0.05]))
    signs = np.diag([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    permutation = np.eye(3)[:, draw(st.permutations(range(3)))]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ shear @ permutation @ signs @ np.diag(spacing)
    affine[:3, 3] = draw(st.sampled_from([0.0, -500.0, 123.4]))
    return Geometry((shape[0], shape[1], shape[2]), affine.astype(np.float32).astype(np.float64))


def structures(geometry: Geometry, seed: int, *, coarsest_mm: float) -> np.ndarray:
    """A ball of the value 3 in a shell of the value 200, in mm, reaching the border; a surface cuts a random voxel.

    Radius and thickness are several voxels of the coarser grid: sharper bends no such grid can hold to half a voxel.
    """
    rng = np.random.default_rng(seed)
    through = geometry.to_world(rng.uniform(0, np.array(geometry.shape) - 1))
    away = rng.normal(size=3)
    radius, thickness = 8 * coarsest_mm, 4 * coarsest_mm
    centre = through - radius * away / np.linalg.norm(away)
    ijk = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm(geometry.to_world(ijk) - centre, axis=-1)
    return np.select([distance < radius, distance < radius + thickness], [3, 200], default=0).astype(np.uint8)


def oracle_scores(labels: np.ndarray, source: Geometry, prepared: Geometry, values: np.ndarray) -> np.ndarray:
    """What a perfect network would say: one-hot scores of the source voxel nearest to each prepared one, by formula."""
    ijk = np.stack(np.meshgrid(*(np.arange(n) for n in prepared.shape), indexing="ij"), axis=-1)
    nearest = np.rint(source.to_index(prepared.to_world(ijk))).astype(int).clip(0, np.array(source.shape) - 1)
    carried = labels[nearest[..., 0], nearest[..., 1], nearest[..., 2]]
    return (carried == values[:, None, None, None]).astype(np.float32)


def assert_within_half_a_voxel(found: np.ndarray, original: np.ndarray, source: Geometry, prepared: Geometry) -> None:
    """Where the labels differ, a voxel of the value found is half a voxel of the coarser grid away, or less.

    The axes of the two grids are parallel where there is no shear: each axis then has its own tolerance. With shear
    it is half of the largest spacing.
    """
    is_sheared = source.shear_deg > 0.1
    step = np.abs(source.index_map(prepared)[:3, :3]).max(axis=0)  # a step of the source in voxels of the prepared grid
    coarsest = max(*source.spacing_mm, *prepared.spacing_mm)
    for index in np.argwhere(found != original):
        others = np.argwhere(original == found[tuple(index)])
        gap = np.maximum(np.abs(others - index) - 0.5, 0)  # from the centre of the voxel to the nearest face
        if is_sheared:
            offset = np.linalg.norm(gap * source.spacing_mm, axis=1).min(initial=np.inf) / coarsest
        else:
            offset = (gap * np.minimum(1, step)).max(axis=1).min(initial=np.inf)
        assert offset <= 0.5 + 0.02, (index.tolist(), offset, original[tuple(index)], found[tuple(index)])


def nifti_bytes(path: Path) -> tuple[bytes, tuple[int, ...]]:
    """Geometry fields of a NIfTI-1 header as they lie in the file, read by nibabel alone, and the shape."""
    header = nibabel.load(path).header
    fields = ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y")
    fields += ("qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")
    return b"".join(header[name].tobytes() for name in fields), tuple(header.get_data_shape())


@settings(max_examples=220, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    geometry=grids(),
    seed=st.integers(0, 2**16),
    spacing=st.sampled_from([None, (1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (0.8, 0.8, 3.0), (2.2, 0.9, 1.3)]),
    orientation=st.sampled_from(["RAS", "LPS", "SAR"]),
    form=st.sampled_from(["sform", "qform", "both"]),
)
def test_a_label_comes_back_within_half_a_voxel_on_the_sources_own_grid(
    geometry: Geometry, seed: int, spacing: tuple[float, float, float] | None, orientation: str, form: str
) -> None:
    labels = structures(geometry, seed, coarsest_mm=max(*geometry.spacing_mm, *(spacing or ())))
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "scan.nii.gz", Path(folder) / "label.nii.gz"
        image = nibabel.Nifti1Image((labels % 7).astype(np.int16), None)
        image.header.set_zooms(geometry.spacing_mm)
        is_sheared = geometry.shear_deg > 1e-3
        if form in {"sform", "both"} or is_sheared:
            image.set_sform(geometry.affine, code=1)
        if form in {"qform", "both"} and not is_sheared:
            image.set_qform(geometry.affine, code=1)
        nibabel.save(image, path)

        volume, source = read_volume(path)
        mapping = {"orientation": orientation, "spacing_mm": spacing and list(spacing)}
        off = {"intensity": {"mode": "none"}, "body_mask": {"mode": "none"}, "crop": {"mode": "none"}}
        prepared = prepare_volume(volume, PrepareConfig.parse({**mapping, **off})).volume
        values = np.array((0, 3, 200))
        scores = oracle_scores(labels, volume.geometry, prepared.geometry, values)
        classes = resample_argmax(scores, prepared.geometry, volume.geometry)
        write_volume(Volume(values[classes][None], volume.geometry, "label"), out, like=source)

        found, _ = read_volume(out, unit="label")
        assert found.geometry.shape == geometry.shape
        assert np.array_equal(found.geometry.affine, volume.geometry.affine)
        np.testing.assert_allclose(volume.geometry.affine, geometry.affine, atol=1e-3)
        assert nifti_bytes(out) == nifti_bytes(path)
        assert found.array.dtype == np.uint8
    assert_within_half_a_voxel(found.array[0], labels, volume.geometry, prepared.geometry)


def passport(**prepare: object) -> Passport:
    fields = {
        "kind": "segmenter",
        "backbone": {},
        "spatial_dims": 3,
        "in_channels": 1,
        "decoder": {},
        "label_values": [0, 70],
        "unit": "arbitrary",
        "crop_voxels": [8, 8, 8],
        "recipe": {},
        "method": "oracle",
        "data_fingerprint": "0",
        "prepare": prepare,
    }
    return Passport.parse(fields)


@pytest.mark.parametrize("case", list(itertools.product(range(3), [None, [1.2, 1.2, 1.2]], [(), ("LR", "SI")])))
def test_windows_scores_and_mirrors_leave_a_ball_where_it_is(case: tuple[int, list[float] | None, tuple]) -> None:
    """A ball in mm with a closed-form centre and volume goes through the whole path of prediction."""
    seed, spacing, mirror_axes = case
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag((1.0, 0.8, 1.4))
    affine[:3, 3] = rng.uniform(-100, 100, size=3)
    geometry = Geometry((30, 34, 24), affine)
    ijk = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij"), axis=-1)
    points = geometry.to_world(ijk)
    centre, radius = geometry.to_world((13.3, 17.9, 11.2)), 9.0
    # the edge falls from 1 to 0 over 2 mm, so that interpolation keeps its half-way surface
    image = np.clip((radius - np.linalg.norm(points - centre, axis=-1)) / 2 + 0.5, 0, 1).astype(np.float32)

    plan = passport(
        spacing_mm=spacing,
        orientation="LAS",
        intensity={"mode": "none"},
        body_mask={"mode": "threshold", "threshold": 0.05},
        crop={"mode": "foreground", "margin_mm": 3.0},
    )
    oracle = lambda x: torch.cat((0.5 - x, x - 0.5), dim=1)
    settings_ = Settings(overlap=0.25, mirror_axes=mirror_axes)
    found = segment_volume(Volume(image[None], geometry, "arbitrary"), oracle, passport=plan, settings=settings_)

    inside = found.labels.array[0] == 70
    assert set(np.unique(found.labels.array)) == {0, 70}
    assert np.array_equal(found.labels.geometry.affine, affine)
    np.testing.assert_allclose(points[inside].mean(axis=0), centre, atol=0.05)
    volume_mm3 = inside.sum() * abs(np.linalg.det(affine[:3, :3]))
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    truth = np.linalg.norm(points - centre, axis=-1) < radius
    assert 2 * (truth & inside).sum() / (truth.sum() + inside.sum()) >= 0.98
