"""From a file to what a network gets: store, sampler, collate, frame and pipeline together put every voxel where the
affine that is returned says, whatever the orientation, spacing and shape of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from array_cases import ArrayCase, indices, world_case
from phantoms import BALLS_MM, REAL_DATA, balls, grid, noise, ramp
from PIL import Image

from medssl.augment.build import build_augment
from medssl.augment.frame import Frame, follow
from medssl.augment.pipeline import Pipeline
from medssl.data.cohort import Case, Cohort
from medssl.data.loader import batches
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.store import StoredCase
from medssl.views import (
    GridCrops,
    LabelledCrop,
    MultiCrop,
    OverlapPair,
    RandomCrop,
    SliceViews,
)

RAMP = np.array([2.0, -3.0, 5.0])
TURN = {"name": "affine", "rotation_deg": [12, 9, 25], "scale": [0.85, 1.2], "shear": 0.1, "translation_mm": [3, 2, 1]}
MIRROR = {"name": "mirror", "axes": ["LR"], "swap_labels": [[1, 2]], "p": 0.5}
WARP = {"name": "elastic", "amplitude_mm": [1, 4], "control_mm": 16.0}

GRIDS = {
    "lps": grid((25, 30, 21), orientation="LPS", spacing_mm=(1.6, 1.4, 2.2), angle_deg=17.0),
    "pir": grid((22, 33, 40), orientation="PIR", spacing_mm=(1.8, 1.2, 1.5), angle_deg=-20.0, axis=(2.0, 0.3, 1.0)),
    "asl": grid((44, 28, 37), orientation="ASL", spacing_mm=(0.7, 1.9, 1.1), angle_deg=11.0, centre_mm=(-9, 5, 12)),
    "thick": grid((48, 41, 9), orientation="LAS", spacing_mm=(0.9, 0.9, 5.0), angle_deg=8.0),
    "tiny": grid((9, 7, 6), orientation="RAI", spacing_mm=(2.5, 2.0, 2.0), centre_mm=(4, 0, -3)),
}


def store_of(root: Path, pairs: dict[str, tuple[Path, Path | None]], **options: Any) -> tuple[StoredCase, ...]:
    cases = [
        Case(case_id=name, subject_id=name, image=str(image), label=label and str(label), split="train")
        for name, (image, label) in pairs.items()
    ]
    root.mkdir(exist_ok=True)
    Cohort(cases).to_csv(root / "cohort.csv")
    config = PrepareConfig.parse({"intensity": {"mode": "none"}, **options})
    result = prepare(config, cohort=root / "cohort.csv", out=root / "store", workers=1)
    assert result.store is not None
    assert len(result.store.cases) == len(cases)
    return result.store.cases


def written(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredCase, ...]:
    """Files in many orientations whose values say where they are, with the balls as labels."""
    root = tmp_path_factory.mktemp("ramps")
    pairs = {}
    for name, geometry in GRIDS.items():
        image = written(root / f"{name}.nii.gz", ramp(geometry).array[0], geometry.affine)
        pairs[name] = image, written(root / f"{name}_label.nii.gz", balls(geometry).array[0], geometry.affine)
    return store_of(root, pairs)


SAMPLERS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "random": (RandomCrop((16, 13, 10), margin=0.25), "image", (16, 13, 10)),
    "random_mm": (RandomCrop((14, 15, 12), crop_mm=(30, 31, 25), margin=(0.1, 0.2, 0.25)), "image", (14, 15, 12)),
    "coarse": (RandomCrop((7, 8, 6), crop_mm=(34, 38, 33), margin=0.2), "image", (7, 8, 6)),
    "larger": (RandomCrop((50, 45, 42), region={"SI": (0.2, 0.8)}), "image", (50, 45, 42)),
    "labelled": (LabelledCrop((15, 16, 9), (1, 2, 3), margin=0.1), "image", (15, 16, 9)),
    "labelled_mm": (LabelledCrop((12, 12, 12), (1, 2, 3), crop_mm=(29, 29, 29), margin=0.1), "image", (12, 12, 12)),
    "labelled_coarse": (LabelledCrop((9, 9, 9), (1, 2, 3), crop_mm=(40, 40, 40)), "image", (9, 9, 9)),
    "globals": (MultiCrop((12, 11, 10), (6, 7, 5), margin=0.2), "globals", (12, 11, 10)),
    "locals": (MultiCrop((12, 11, 10), (6, 7, 5), margin=0.2), "locals", (6, 7, 5)),
    "views": (OverlapPair((11, 12, 8), crop_mm=(17, 17, 17), min_overlap=0.2, margin=0.1), "views", (11, 12, 8)),
    "views_own": (OverlapPair((11, 12, 8), margin=0.1), "views", (11, 12, 8)),
    "bases": (GridCrops((2, 2, 2), (9, 8, 7)), "bases", (9, 8, 7)),
    "targets": (GridCrops((2, 1, 2), (11, 10, 9), position_mode="crop", cell_mm=(15, 15, 15)), "targets", (11, 10, 9)),
    "targets_own": (GridCrops((1, 2, 2), (9, 8, 7), position_mode="crop"), "targets", (9, 8, 7)),
}


class Seen(NamedTuple):
    """One crop as a network gets it."""

    case: StoredCase
    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    before: np.ndarray
    is_real: np.ndarray
    name: str

    @property
    def world(self) -> np.ndarray:
        """World mm of every voxel, (3, *shape)."""
        shape = self.image.shape[1:]
        found = mapped(self.affine, indices((*shape, 1)[:3]))
        return found[..., 0] if len(shape) == 2 else found

    @property
    def inside(self) -> np.ndarray:
        """Voxels that are made of voxels of the case only; an averaged one is wide, and so are its neighbours."""
        inverse = np.linalg.inv(self.case.affine)
        at = mapped(inverse, self.world)
        step = np.linalg.norm(inverse[:3, :3] @ self.before[:3, :3], axis=1)
        is_averaged = step > (0 if self.name in {"bases", "targets"} else 2 - 1e-6)
        reach, last = (
            np.reshape(values, (3, *[1] * (at.ndim - 1)))
            for values in (np.where(is_averaged, 1.5 * step, 0), np.array(self.case.shape) - 1)
        )
        return self.is_real & ((at >= reach - 1e-6) & (at <= last - reach + 1e-6)).all(axis=0)

    @property
    def in_case(self) -> np.ndarray:
        """Voxels whose place lies between voxels of the case."""
        at = mapped(np.linalg.inv(self.case.affine), self.world)
        last = np.reshape(self.case.shape, (3, *[1] * (at.ndim - 1))) - 1
        return ((at >= 0) & (at <= last)).all(axis=0)

    @property
    def is_mirrored(self) -> bool:
        return bool(np.linalg.det(self.affine[:3, :3]) * np.linalg.det(self.before[:3, :3]) < 0)

    def error(self) -> np.ndarray:
        """How many voxels the values of a ramp are off what the affine says."""
        expected = 100 + np.einsum("w,w...->...", RAMP, self.world)
        return (np.abs(self.image[0] - expected) / np.abs(RAMP @ self.affine[:3, :3]).max())[self.inside]


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (d, ...) through a homogeneous matrix."""
    dims = len(points)
    shift = matrix[:dims, dims].reshape(dims, *[1] * (points.ndim - 1))
    return np.einsum("ba,a...->b...", matrix[:dims, :dims], points) + shift


def seen(
    cases: Any, sampler: Any, name: str, shape: tuple[int, ...], pipeline: Pipeline, *, dims: int = 3, steps: int = 2
) -> Any:
    """What comes out for every crop: the image, its label or None, its affine, and the affine before."""
    for batch in batches(cases, sampler, batch_size=len(cases), seed=3, steps=steps, spatial_dims=dims):
        boxes = batch.tensors[name]
        frame = Frame.of(batch.tensors, name, shape=shape)
        assert frame is not None
        affine = batch.tensors[f"{name}_affine"].reshape(-1, 4, 4)
        num = len(affine) // len(boxes)
        flat = boxes.reshape(len(affine), *boxes.shape[-dims - 1 :])
        seeds = torch.arange(len(affine)) + 100 * int(batch.seeds[0] % 1000)
        label = batch.tensors.get("label")
        view = pipeline(flat, seeds, label, frame=frame)
        assert not view.notes["fallback"].any()
        after = follow(affine, frame, view.frame).numpy()
        for row in range(len(affine)):
            target = None if view.label is None else view.label[row, 0].numpy()
            case = cases_by_id(cases)[batch.case_ids[row // num]]
            own = boxes.shape[-dims:] if frame.extent is None else frame.extent[row].numpy()
            at = mapped(
                view.frame.to_box[row].numpy(), indices((*shape, 1)[:3])[:dims, ..., slice(None) if dims == 3 else 0]
            )
            last = np.reshape(own, (dims, *[1] * dims)) - 1
            face = 2.5 if name == "targets" else -1e-6  # a resized window ends in a repeated voxel
            is_real = ((at >= face) & (at <= last - face)).all(axis=0)
            yield Seen(case, view.image[row].numpy(), target, after[row], affine[row].numpy(), is_real, name)


def cases_by_id(cases: Any) -> dict[str, Any]:
    return {case.case_id: case for case in cases}


@pytest.mark.parametrize("key", SAMPLERS)
def test_values_and_labels_lie_where_the_followed_affine_says(ramps, key):
    sampler, name, shape = SAMPLERS[key]
    pipeline = build_augment([TURN, MIRROR])
    checked = mirrored = 0
    for crop in seen(ramps, sampler, name, shape, pipeline):
        error = crop.error()
        is_resized = crop.name in {"bases", "targets"}  # a triangle filter that ends at the window leans inwards there
        assert error.max(initial=0) < (0.12 if is_resized else 0.01), crop.case.case_id
        checked += error.size
        mirrored += crop.is_mirrored
        if crop.label is not None:
            check_balls(crop)
    assert checked > 100
    assert mirrored > 0


def check_balls(crop: Seen) -> None:
    """Labels are those of the balls, but for a voxel at their border; left and right change names in a mirror."""
    names = {1: 2, 2: 1, 3: 3} if crop.is_mirrored else {1: 1, 2: 2, 3: 3}
    edge = np.linalg.norm(crop.case.spacing_mm) / 2 + np.linalg.norm(crop.before[:3, :3]) / 2 * 0.7
    for value, (centre, radius) in BALLS_MM.items():
        distance = np.linalg.norm(crop.world - np.reshape(centre, (3, 1, 1, 1)), axis=0)
        found = crop.label == names[value]
        assert not (found & crop.inside & (distance > radius + edge)).any()
        assert found[(distance < radius - edge) & crop.inside].all()


def test_an_affine_pipeline_gives_the_pixels_of_simpleitk_on_the_followed_grid(tmp_path):
    """The reference reads the file itself, so that reading, turning to RAS, cropping and moving are all checked."""
    geometry = grid((21, 26, 17), orientation="LIP", spacing_mm=(1.3, 0.8, 2.0), angle_deg=14.0)
    path = written(tmp_path / "noise.nii.gz", noise(geometry).array[0], geometry.affine)
    cases = store_of(tmp_path, {"noise": (path, None)})
    sampler = RandomCrop((10, 12, 9), crop_mm=(14, 15, 11), margin=0.25)
    crops = list(seen(cases, sampler, "image", (10, 12, 9), build_augment([TURN, MIRROR]), steps=6))
    compare_with_simpleitk(path, crops)
    assert any(crop.is_mirrored for crop in crops)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared data is not here")
@pytest.mark.parametrize("folder", ["hippocampus_msd", "open_ms_raw"])
def test_real_scans_move_as_in_simpleitk(folder, tmp_path):
    paths = [path for path in sorted((REAL_DATA / folder).rglob("*.nii.gz")) if "label" not in str(path)][:2]
    for path in paths:
        cases = store_of(tmp_path / path.name, {"real": (path, None)}, body_mask={"mode": "otsu"})
        sampler = RandomCrop((20, 24, 16), crop_mm=(26, 30, 24), margin=0.25)
        compare_with_simpleitk(path, list(seen(cases, sampler, "image", (20, 24, 16), build_augment([TURN, MIRROR]))))


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared data is not here")
def test_a_real_label_moves_as_in_simpleitk_with_sides_swapped_in_a_mirror(tmp_path):
    image = REAL_DATA / "hippocampus_msd" / "imagesTr" / "hippocampus_011.nii.gz"
    label = REAL_DATA / "hippocampus_msd" / "labelsTr" / "hippocampus_011.nii.gz"
    cases = store_of(tmp_path, {"real": (image, label)})
    sampler = LabelledCrop((20, 24, 16), (1, 2), crop_mm=(26, 30, 24), margin=0.25)
    crops = list(seen(cases, sampler, "image", (20, 24, 16), build_augment([TURN, MIRROR]), steps=6))
    compare_with_simpleitk(image, crops)
    for crop in crops:
        expected = in_simpleitk(sitk.ReadImage(str(label)), crop, sitk.sitkNearestNeighbor)
        expected = np.array([0, 2, 1] if crop.is_mirrored else [0, 1, 2])[expected]
        assert (crop.label == expected)[crop.inside].mean() > 0.9999  # but for ties
    assert {crop.is_mirrored for crop in crops} == {True, False}


def compare_with_simpleitk(path: Path, crops: list[Seen]) -> None:
    image = sitk.ReadImage(str(path), sitk.sitkFloat64)
    scale = np.abs(sitk.GetArrayViewFromImage(image)).max()
    checked = 0
    for crop in crops:
        expected = in_simpleitk(image, crop, sitk.sitkLinear)
        error = np.abs(crop.image[0] - expected)[crop.inside]
        assert error.max(initial=0) < 1e-4 * scale
        checked += error.size
    assert checked > 1000


def in_simpleitk(image: sitk.Image, crop: Seen, interpolator: int) -> np.ndarray:
    """The image on the grid of the crop's affine, which SimpleITK is given as a transform of indices."""
    lps = np.diag([-1.0, -1.0, 1.0]) @ crop.affine[:3]
    move = sitk.AffineTransform(3)
    move.SetMatrix(lps[:, :3].ravel().tolist())
    move.SetTranslation(lps[:, 3].tolist())
    grid_of_indices = sitk.Image([int(n) for n in crop.image.shape[1:]], image.GetPixelID())
    return sitk.GetArrayFromImage(sitk.Resample(image, grid_of_indices, move, interpolator)).T


PLANE_NORMALS = {"axial": 2, "coronal": 1, "sagittal": 0}


@pytest.mark.parametrize("options", [{}, {"crop_mm": (25, 22)}, {"crop_mm": (36, 38), "slab_mm": 6.0}])
def test_slices_as_pictures_lie_where_the_followed_affine_says_in_every_plane(ramps, options):
    sampler = SliceViews((14, 11), num_slices=3, margin=0.2, **options)
    checked, planes = 0, set()
    for crop in seen(ramps, sampler, "slices", (14, 11, 1), build_augment([TURN, MIRROR]), dims=2):
        assert crop.error().max(initial=0) < 0.01, crop.case.case_id
        checked += crop.error().size
        normal = np.cross(crop.affine[:3, 0], crop.affine[:3, 1])
        planes.add(int(np.abs(normal).argmax()))
    assert checked > 1000
    assert planes == {0, 1, 2}


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAL"])
def test_planes_and_their_places_are_anatomical_wherever_the_array_axes_point(orientation, tmp_path):
    geometry = grid((20, 26, 18), orientation="RAS", spacing_mm=(1.5, 1.2, 2.0), angle_deg=9.0)
    path = written(tmp_path / "ramp.nii.gz", ramp(geometry).array[0], geometry.affine)
    (case,) = store_of(tmp_path, {"ramp": (path, None)}, orientation=orientation)
    middle = geometry.centre_mm
    for seed in range(12):
        for plane, world in PLANE_NORMALS.items():
            found = SliceViews((8, 8), planes=[plane])([case], np.random.default_rng(seed))
            affine = found["slices_affine"][0]
            assert np.abs(affine[:3, 2]).argmax() == world
            offset = affine @ [3.5, 3.5, 0, 1]
            along = affine[:3, 2] / np.linalg.norm(affine[:3, 2]) * np.sign(affine[world, 2])
            assert found["slices_position_mm"][0] == pytest.approx((offset[:3] - middle) @ along, abs=1e-4)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAI", "PSR"])
@pytest.mark.parametrize("inside_body", [True, False])
def test_a_region_is_anatomical_wherever_the_array_axes_point(orientation, inside_body, tmp_path):
    """The upper part of a chest is at high Z, its right half at high X, in the world."""
    geometry = grid((24, 22, 30), orientation="LIP", spacing_mm=(1.5, 1.2, 2.0), angle_deg=6.0)
    array = np.zeros(geometry.shape, np.float32)
    array[4:20, 3:15, 6:28] = ramp(geometry).array[0, 4:20, 3:15, 6:28] + 500
    path = written(tmp_path / "chest.nii.gz", array, geometry.affine)
    (case,) = store_of(
        tmp_path,
        {"chest": (path, None)},
        orientation=orientation,
        body_mask={"mode": "threshold", "threshold": 50.0},
    )
    start, size = case.body_box
    corners = np.stack([start - 0.5, start + size - 0.5])
    body = np.linalg.norm(size * case.spacing_mm)
    assert body == pytest.approx(np.linalg.norm(np.multiply([16, 12, 22], [1.5, 1.2, 2.0])))
    middle = mapped(case.affine, corners.mean(axis=0))
    for region, world in (("LR", 0), ("AP", 1), ("SI", 2)):
        sampler = RandomCrop((4, 4, 4), inside_body=inside_body, region={region: (0.6, 0.9)})
        for seed in range(15):
            found = sampler([case], np.random.default_rng(seed))
            centre = mapped(found["image_affine"], np.full(3, 1.5))
            column = np.linalg.inv(case.affine)[np.abs(np.linalg.inv(case.affine)[:3, :3]).argmax(axis=0)[world], :3]
            toward = column / np.linalg.norm(column) * np.sign(column[world])
            edge = {"LR": 16 * 1.5, "SI": 12 * 1.2, "AP": 22 * 2.0}[region]
            share = (centre - middle) @ toward / edge + 0.5
            assert 0.5 < share < 1.0
            low, high = found["image_body"]
            assert (low < high).all()
            assert (low + high)[world] / 2 == pytest.approx(share, abs=1e-6)


def test_labels_go_where_an_elastic_field_takes_the_image():
    """Three channels tell which place of the world each voxel shows; its label must be the one of that place."""
    cases = [ball_case(shape, mm) for shape, mm in (((60, 50, 40), (1.1, 1.3, 1.7)), ((36, 72, 18), (1.9, 0.9, 3.8)))]
    pipeline = build_augment([TURN, WARP, MIRROR])
    sampler = LabelledCrop((16, 15, 12), (1,), crop_mm=(22, 21, 20), margin=0.5)
    moved = mirrored = checked = 0
    for crop in seen(cases, sampler, "image", (16, 15, 12), pipeline, steps=4):
        mirrored += crop.is_mirrored
        moved = max(moved, np.linalg.norm(crop.image - crop.world, axis=0).max())
        distance = np.linalg.norm(crop.image - np.reshape(crop.case.centre_mm, (3, 1, 1, 1)), axis=0)
        edge = np.linalg.norm(crop.case.spacing_mm) / 2
        found = crop.label == (2 if crop.is_mirrored else 1)
        assert not (found & (distance > 6 + edge)).any()
        assert found[distance < 6 - edge].all()
        checked += found.sum()
    assert checked > 500
    assert mirrored > 0
    assert 1.5 < moved < 4 * np.sqrt(3)


def ball_case(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Any:
    case = world_case(shape, spacing_mm)
    centre = mapped(case.affine, np.array(shape) * 0.45)
    image = case.arrays["image"]
    ball = np.linalg.norm(image - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= 6
    name = f"case_{shape[0]}"
    made = BallCase({"image": image, "label": ball[None].astype(np.uint8)}, case.spacing_mm, name, oblique=case.affine)
    object.__setattr__(made, "centre_mm", centre)
    return made


class BallCase(ArrayCase):
    """A case that knows where its ball is."""

    centre_mm: np.ndarray


def test_thick_slices_keep_their_planes_in_every_orientation_of_the_file(ramps):
    thick = [case for case in ramps if case.case_id == "thick"]
    sampler = RandomCrop((16, 16, 5), margin=0.2)
    for crop in seen(thick, sampler, "image", (16, 16, 5), build_augment([TURN, WARP]), steps=4):
        to_case = np.linalg.inv(crop.case.affine) @ crop.affine
        np.testing.assert_allclose(to_case[2, :2], 0, atol=1e-9)
        np.testing.assert_allclose(to_case[:2, 2], 0, atol=1e-9)
        assert to_case[2, 2] == pytest.approx(1)


def test_the_margin_of_a_pipeline_is_enough_for_its_moves(ramps):
    """Hardly a voxel is read from beyond the box while the volume goes on there."""
    pipeline = build_augment([{"name": "affine", "rotation_deg": [8, 8, 8], "scale": [0.9, 1.1]}, MIRROR])
    shape, crop_mm = (12, 14, 11), (17.0, 18.0, 16.0)
    spacing = tuple(np.divide(crop_mm, shape))
    large = [case for case in ramps if min(np.multiply(case.shape, case.spacing_mm)) > 30 and case.case_id != "thick"]

    def beyond(margin: Any) -> float:
        sampler = RandomCrop(shape, crop_mm=crop_mm, margin=margin)
        crops = seen(large, sampler, "image", shape, pipeline, steps=12)
        return float(np.mean([(~crop.is_real & crop.in_case).mean() for crop in crops]))

    assert beyond(pipeline.margin(shape, spacing)) < 1e-3
    assert beyond(0.0) > 0.02


@pytest.mark.parametrize("key", SAMPLERS)
def test_every_box_holds_the_margin_of_its_own_crops(ramps, key):
    sampler, name, shape = SAMPLERS[key]
    asked = {"random": 0.25, "random_mm": (0.1, 0.2, 0.25), "coarse": 0.2, "labelled": 0.1, "labelled_mm": 0.1}
    shares = asked | {"globals": 0.2, "locals": 0.2, "views": 0.1, "views_own": 0.1}
    margin = np.ceil(np.multiply(shape, shares.get(key, 0.0)) - 1e-6)
    for case in ramps:
        found = sampler([case], np.random.default_rng(5))
        for to_box in found[f"{name}_to_box"].reshape(-1, 4, 4):
            assert (mapped(to_box, -margin) > -1e-6).all()
            assert (mapped(to_box, np.array(shape) - 1 + margin) < np.array(found[name].shape[-3:]) - 1 + 1e-6).all()


def test_crops_of_a_pair_share_in_the_world_what_they_are_said_to_share(ramps):
    shape = (10, 12, 8)
    sampler = OverlapPair(shape, crop_mm=(14.5, 15, 13), min_overlap=0.2, max_overlap=0.9)
    for batch in batches(ramps, sampler, batch_size=5, seed=1, steps=4):
        for first, second, overlap in zip(
            *batch.tensors["views_affine"].numpy().swapaxes(0, 1), batch.tensors["overlap"].numpy(), strict=True
        ):
            shift = np.linalg.solve(first, second)[:3, 3]
            np.testing.assert_allclose(first[:3, :3], second[:3, :3])
            common = np.clip(1 - np.abs(shift) / shape, 0, None)
            assert common.prod() == pytest.approx(overlap, abs=1e-6)


def test_volumes_of_one_slice_and_pictures_lie_where_they_are_said_to(tmp_path):
    """A coronal slice of a scan, and a picture, whose rows run to the back, as 2D images."""
    geometry = grid((31, 24, 1), orientation="LSA", spacing_mm=(1.2, 0.9, 4.0), angle_deg=12.0)
    flat = written(tmp_path / "flat.nii.gz", ramp(geometry).array[0], geometry.affine)
    columns, rows = np.meshgrid(np.arange(29), np.arange(40))
    Image.fromarray((100 - 2 * columns + 3 * rows).astype(np.uint8)).save(tmp_path / "picture.png")
    cases = store_of(tmp_path, {"flat": (flat, None), "picture": (tmp_path / "picture.png", None)}, spatial_dims=2)
    sampler = RandomCrop((13, 12, 1), margin=0.2)
    checked = {"flat": 0, "picture": 0}
    for crop in seen(cases, sampler, "image", (13, 12, 1), build_augment([TURN, MIRROR]), dims=2, steps=6):
        assert crop.error().max(initial=0) < 0.01, crop.case.case_id
        checked[crop.case.case_id] += crop.error().size
    assert min(checked.values()) > 200
    upper = RandomCrop((5, 5, 1), region={"AP": (0.8, 1.0)})([cases[1]], np.random.default_rng(0))
    assert mapped(upper["image_affine"], np.zeros(3))[1] > -8  # the first rows of the picture


def test_a_crop_inside_the_volume_holds_no_filling(ramps):
    """Coarse voxels at the border of a volume are averaged over tissue only, as ``note_padded`` says."""
    case = ArrayCase({"image": np.full((1, 25, 33, 20), 100, np.int16), "label": np.ones((1, 25, 33, 20), np.uint8)})
    case.arrays["image"][:, ::2] = 101
    sampler = LabelledCrop((8, 8, 8), (1,), crop_mm=(20.1, 33, 18), margin=0.1)
    for seed in range(30):
        found = sampler([case], np.random.default_rng(seed))
        assert found["note_padded"] == 0
        tensors = {key: torch.from_numpy(np.asarray(value))[None] for key, value in found.items()}
        frame = Frame.of(tensors, "image", shape=(8, 8, 8))
        view = build_augment([]).plain(tensors["image"], tensors["label"], frame=frame)
        assert view.image.min() > 99
        assert view.label.min() == 1
