from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medssl.augment.frame import Frame, follow
from medssl.augment.pipeline import Pipeline
from medssl.augment.resample import resample
from medssl.augment.spatial import Affine, AffineConfig, Elastic, ElasticConfig, Mirror, MirrorConfig, thick_axes
from medssl.errors import ConfigError

SPACING = (0.9, 1.5, 2.5)
SHAPE = (14, 12, 9)


def volume(shape=SHAPE, seed=0, batch=1) -> torch.Tensor:
    smooth = np.random.default_rng(seed).normal(size=(batch, 1, *shape))
    return torch.from_numpy(ndimage.gaussian_filter(smooth, (0, 0, *[1.0] * len(shape)))).float()


def spacing(x: torch.Tensor, mm=SPACING) -> torch.Tensor:
    return torch.tensor([mm[: x.ndim - 2]] * len(x), dtype=torch.float64)


def drawn(*, angle_deg=(0, 0, 0), shear=(0, 0, 0), shift_mm=(0, 0, 0), scale=1.0) -> dict[str, torch.Tensor]:
    """Parameters as :meth:`Affine.sample` would give them, chosen by hand."""
    return {
        "on": torch.tensor([True]),
        "angle": torch.tensor([[math.radians(a) for a in angle_deg]], dtype=torch.float64),
        "shear": torch.tensor([shear], dtype=torch.float64),
        "shift_mm": torch.tensor([shift_mm], dtype=torch.float64),
        "scale": torch.tensor([scale], dtype=torch.float64),
    }


GENERIC = {"angle_deg": (11, -7, 23), "shear": (0.1, -0.05, 0.08), "shift_mm": (1.1, -0.7, 2.2), "scale": 1.13}


def forward_mm(angle_deg, shear, shift_mm, scale) -> tuple[np.ndarray, np.ndarray]:
    """The map of the docstring, retyped: p' = Rz Ry Rx H s p + t."""
    a, b, c = (math.radians(angle) for angle in angle_deg)
    rx = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    ry = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    rz = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    h = np.array([[1, shear[0], shear[1]], [0, 1, shear[2]], [0, 0, 1]])
    return rz @ ry @ rx @ h * scale, np.array(shift_mm)


def by_scipy(array: np.ndarray, linear: np.ndarray, shift: np.ndarray, spacing, order=1) -> np.ndarray:
    """Resample with ``scipy.ndimage.affine_transform``: output voxel -> mm -> inverse map -> mm -> input voxel."""
    to_mm = np.diag(spacing)
    inverse = np.linalg.inv(to_mm) @ np.linalg.inv(linear) @ to_mm
    centre = (np.array(array.shape) - 1) / 2
    offset = centre - inverse @ (centre + np.linalg.inv(to_mm) @ shift)
    return ndimage.affine_transform(array, inverse, offset, order=order, mode="nearest")


def by_itk(array: np.ndarray, linear: np.ndarray, shift: np.ndarray, spacing, fill: float) -> np.ndarray:
    """Resample with SimpleITK, which works in mm by itself."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0).astype(np.float64))
    image.SetSpacing(spacing)
    transform = sitk.AffineTransform(3)
    transform.SetCenter([(n - 1) / 2 * s for n, s in zip(array.shape, spacing, strict=True)])
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation(shift.tolist())
    moved = sitk.Resample(image, image, transform.GetInverse(), sitk.sitkLinear, fill)
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def test_an_affine_equals_scipy_in_mm_with_anisotropic_spacing():
    x = volume()
    found = Affine().apply(x, drawn(**GENERIC), spacing(x))
    expected = by_scipy(x[0, 0].numpy(), *forward_mm(**GENERIC), SPACING)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)


def test_an_affine_equals_simpleitk_in_mm_with_anisotropic_spacing():
    x = volume(seed=1)
    affine = Affine(AffineConfig(fill=0.0))
    found = affine.apply(x, drawn(**GENERIC), spacing(x))[0, 0].numpy()
    inside = by_itk(np.ones(SHAPE), *forward_mm(**GENERIC), SPACING, 0.0) > 0.5
    inside &= affine.apply(torch.ones_like(x), drawn(**GENERIC), spacing(x))[0, 0].numpy() > 0.9999
    expected = by_itk(x[0, 0].numpy(), *forward_mm(**GENERIC), SPACING, 0.0)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-5)


def test_a_label_moves_by_nearest_neighbour_with_its_image():
    label = (torch.arange(math.prod(SHAPE)) % 251).reshape(1, 1, *SHAPE).to(torch.int16)
    found = Affine().apply_label(label, drawn(**GENERIC), spacing(label))
    expected = by_scipy(label[0, 0].numpy(), *forward_mm(**GENERIC), SPACING, order=0)
    assert found.dtype == torch.int16
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)


def test_a_2d_affine_equals_scipy_and_stays_in_the_plane():
    x = volume((15, 11))
    params = drawn(**GENERIC)
    found = Affine().apply(x, params, spacing(x))
    linear, shift = forward_mm((0, 0, 23), (0.1, 0, 0), GENERIC["shift_mm"], GENERIC["scale"])
    expected = by_scipy(x[0, 0].numpy(), linear[:2, :2], shift[:2], SPACING[:2])
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)


def test_a_quarter_turn_about_z_brings_anterior_to_where_left_is():
    x = torch.zeros(1, 1, 5, 5, 5)
    x[0, 0, 2, 4, 2] = 1  # +Y, anterior
    found = Affine().apply(x, drawn(angle_deg=(0, 0, 90)))
    assert found[0, 0, 0, 2, 2] == pytest.approx(1, abs=1e-5)  # -X, left


def test_a_translation_is_in_mm():
    x = volume()
    found = Affine().apply(x, drawn(shift_mm=(2.0, 3.0, -2.5)), spacing(x, (1.0, 1.5, 2.5)))
    np.testing.assert_allclose(found[0, 0, 2:, 2:, :-1], x[0, 0, :-2, :-2, 1:], atol=1e-5)


def test_a_scale_above_one_enlarges():
    x = torch.zeros(1, 1, 21, 21, 21)
    x[..., 8:13, 8:13, 8:13] = 1
    assert Affine().apply(x, drawn(scale=2.0)).sum() == pytest.approx(8 * 125, rel=0.2)


@pytest.mark.parametrize(("fill", "corner"), [(None, 5.0), (-3.0, -3.0)])
def test_outside_the_crop_the_border_is_extended_or_filled(fill, corner):
    x = torch.full((1, 1, 8, 8, 8), 5.0)
    affine = Affine(AffineConfig(fill=fill))
    assert affine.apply(x, drawn(shift_mm=(4, 0, 0)))[0, 0, 0, 4, 4] == pytest.approx(corner, abs=1e-6)
    label = affine.apply_label(torch.full((1, 1, 8, 8, 8), 3, dtype=torch.uint8), drawn(shift_mm=(4, 0, 0)))
    assert label[0, 0, 0, 4, 4] == (3 if fill is None else 0)


def test_draws_stay_within_their_bounds_and_reach_both_sides():
    config = AffineConfig(rotation_deg=(5.0, 10.0, 20.0), scale=(0.5, 2.0), shear=0.3, translation_mm=(1.0, 2.0, 3.0))
    params = Affine(config).draw(torch.arange(300))
    degrees = torch.rad2deg(params["angle"]).abs()
    assert (degrees <= torch.tensor([5.0, 10, 20])).all()
    assert (degrees.amax(0) > torch.tensor([4.5, 9, 18])).all()
    assert params["scale"].min() == pytest.approx(0.5, abs=0.03)
    assert params["scale"].max() == pytest.approx(2.0, abs=0.1)
    assert params["scale"].log().mean().abs() < 0.1
    assert (params["shear"].abs() <= 0.3).all()
    assert (params["shift_mm"].abs() <= torch.tensor([1.0, 2, 3])).all()
    assert params["shift_mm"].min() < -2.5


def test_one_slice_volumes_are_resampled_in_their_plane():
    x = volume((15, 11))[..., None]
    found = Affine().apply(x, drawn(angle_deg=(0, 0, 30)))
    np.testing.assert_allclose(found[..., 0], Affine().apply(x[..., 0], drawn(angle_deg=(0, 0, 30))), atol=1e-5)


@pytest.mark.parametrize(("axis", "dim"), [("LR", 2), ("AP", 3), ("SI", 4)])
def test_a_mirror_moves_voxels_along_its_anatomical_axis_bit_for_bit(axis, dim):
    x = volume()
    mirror = Mirror(MirrorConfig(axes=(axis,)))
    assert torch.equal(mirror(x, torch.tensor([7])), x.flip(dim))
    label = (x > 0).to(torch.uint8)
    assert torch.equal(mirror.apply_label(label, mirror.draw(torch.tensor([7]))), label.flip(dim))


def test_a_mirror_swaps_lateral_labels_only_where_left_and_right_change_places():
    label = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    label[:, :, 0], label[:, :, 3], label[:, :, 1] = 1, 2, 5
    seeds = torch.tensor([0])
    lateral = Mirror(MirrorConfig(axes=("LR",), swap_labels=((1, 2),)))
    found = lateral.apply_label(label, lateral.draw(seeds))
    assert found[0, 0, :, 0, 0].tolist() == [1, 0, 5, 2]
    upright = Mirror(MirrorConfig(axes=("SI",), swap_labels=((1, 2),)))
    assert torch.equal(upright.apply_label(label, upright.draw(seeds)), label)


def test_a_mirror_with_three_axes_draws_all_seven_sets_equally_often():
    signs = Mirror(MirrorConfig(axes=("LR", "AP", "SI"))).draw(torch.arange(700))["signs"]
    sets, counts = signs.unique(dim=0, return_counts=True)
    assert len(sets) == 7
    assert [1.0, 1.0, 1.0] not in sets.tolist()
    assert counts.min() > 60


def test_a_mirror_in_2d_refuses_the_axis_that_is_not_there():
    with pytest.raises(ConfigError, match="axis SI in 2D"):
        Mirror(MirrorConfig(axes=("SI",)))(volume((6, 6)), torch.tensor([0]))
    assert torch.equal(Mirror()(volume((6, 6)), torch.tensor([0])), volume((6, 6)).flip(2))


def test_spatial_augments_are_composed_into_one_resampling_of_image_and_label(monkeypatch):
    calls = []
    monkeypatch.setattr("medssl.augment.pipeline.resample", lambda *a, **k: calls.append(1) or resample(*a, **k))
    x = volume()
    affine, mirror = Affine(), Mirror(MirrorConfig(axes=("LR",)))
    params = [drawn(**GENERIC), mirror.draw(torch.tensor([0])), drawn(angle_deg=(0, 4, 0))]
    view = Pipeline([affine, mirror, affine], spacing_mm=SPACING).apply_to(x, params, label=(x > 0).long())
    assert len(calls) == 1
    first, second = forward_mm(**GENERIC), forward_mm((0, 4, 0), (0, 0, 0), (0, 0, 0), 1.0)
    flip = np.diag([-1, 1, 1])
    expected = by_scipy(x[0, 0].numpy(), second[0] @ flip @ first[0], second[0] @ flip @ first[1], SPACING)
    np.testing.assert_allclose(view.image[0, 0].numpy(), expected, atol=2e-5)
    assert view.label is not None
    assert view.label.dtype == torch.int64


def test_a_batch_mixes_samples_that_stay_mirror_and_turn():
    x = volume(batch=3)
    mirror = Mirror(MirrorConfig(axes=("LR", "SI")))
    both = {"on": torch.tensor([False, True, False]), "signs": torch.tensor([[-1.0, 1, -1]] * 3).double()}
    turn = {key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in drawn(angle_deg=(0, 0, 20)).items()}
    turn["on"] = torch.tensor([False, False, True])
    view = Pipeline([mirror, Affine()]).apply_to(x, [both, turn], label=(x > 0).to(torch.uint8))
    assert torch.equal(view.image[0], x[0])
    assert torch.equal(view.image[1], x[1].flip(1, 3))
    assert torch.equal(view.image[2:], Affine().apply(x[2:], drawn(angle_deg=(0, 0, 20))))
    assert torch.equal(view.label[1], (x[1] > 0).to(torch.uint8).flip(1, 3))


def test_each_sample_goes_by_its_own_voxel_size():
    x = volume(batch=2)
    sizes = torch.tensor([SPACING, (1.0, 1.0, 1.0)], dtype=torch.float64)
    both = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in drawn(**GENERIC).items()}
    found = Affine().apply(x, both, sizes)
    for row in range(2):
        alone = Affine().apply(x[row : row + 1], drawn(**GENERIC), sizes[row : row + 1])
        assert torch.equal(found[row], alone[0])
    assert not torch.allclose(found[1], Affine().apply(x[1:], drawn(**GENERIC), sizes[:1])[0])


def test_thick_slices_are_neither_tilted_nor_stretched():
    mm = torch.tensor([[0.8, 0.8, 5.0], [0.8, 0.8, 2.0], [1.0, 4.0, 1.0]], dtype=torch.float64)
    assert thick_axes(mm, 3.0).tolist() == [[False, False, True], [False] * 3, [False, True, False]]
    params = {key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in drawn(**GENERIC).items()}
    matrix = Affine().matrix(params, mm)[:, :3, :3]
    across = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.equal(matrix[0] @ across, across)
    assert torch.equal(matrix[0].T @ across, across)
    assert matrix[0, 0, 1] != 0  # the turn about Z stays
    assert not torch.equal(matrix[1] @ across, across)
    assert torch.equal(matrix[2][1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def world_phantom(box_affine: np.ndarray, shape, points_mm: np.ndarray, sigma_mm: float) -> np.ndarray:
    """A sum of Gaussian balls at world places, sampled on the grid of an affine."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    world = index @ box_affine[:3, :3].T + box_affine[:3, 3]
    return sum(np.exp(-((world - point) ** 2).sum(-1) / (2 * sigma_mm**2)) for point in points_mm)


@settings(max_examples=40, deadline=None)
@example(angles=(0.0, 0.0, 0.0), mm=(1.0, 0.609375, 2.0), seed=6992045, zoom=1.0)
@given(
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    mm=st.tuples(st.floats(0.6, 1.4), st.floats(0.6, 1.4), st.floats(0.6, 2.0)),
    seed=st.integers(0, 2**32),
    zoom=st.sampled_from([1.0, 1.25]),
)
def test_world_places_of_landmarks_follow_the_returned_affine(angles, mm, seed, zoom):
    turned, _ = forward_mm(angles, (0, 0, 0), (0, 0, 0), 1.0)
    box_shape, crop_shape, margin = (40, 40, 36), (24, 24, 20), 8
    box_affine = np.eye(4)
    box_affine[:3, :3] = turned @ np.diag(mm)
    box_affine[:3, 3] = (11.0, -70.0, 35.0)
    to_box = torch.diag(torch.tensor([zoom, zoom, zoom, 1.0], dtype=torch.float64))
    to_box[:3, 3] = torch.tensor([margin + (1 - zoom) * (n - 1) / 2 for n in crop_shape])
    frame = Frame(to_box[None], crop_shape, torch.tensor([[zoom * v for v in mm]], dtype=torch.float64))
    config = AffineConfig(rotation_deg=(12, 12, 12), scale=(0.9, 1.1), shear=0.05, translation_mm=(1, 1, 1))
    pipeline = Pipeline([Affine(config), Mirror(MirrorConfig(p=0.5))])
    crop_affine = torch.from_numpy(box_affine) @ to_box
    seeds = torch.tensor([seed])
    target_index = (np.array(crop_shape) - 1) / 2 + np.array([3.2, -2.7, 1.9])
    # the landmark lies where the pipeline of this seed will read a voxel near the middle of the crop
    moved = pipeline(torch.zeros(1, 1, *box_shape), seeds, frame=frame).frame
    affine = follow(crop_affine[None], frame, moved)[0].numpy()
    point = affine[:3, :3] @ target_index + affine[:3, 3]
    sigma = 2.0 * max(mm)
    x = torch.from_numpy(world_phantom(box_affine, box_shape, point[None], sigma)).float()[None, None]
    image = pipeline(x, seeds, frame=frame).image[0, 0].double().numpy()
    weight = np.clip(image - 0.3, 0.0, None)  # fades out, so that no voxel enters at full weight
    found = np.array([(weight * grid).sum() for grid in np.indices(crop_shape)]) / weight.sum()
    assert np.abs(found - target_index).max() < 0.1


def by_bspline(control: np.ndarray, places: list[np.ndarray]) -> np.ndarray:
    """The tensor product of cubic B-splines, retyped with loops; places in units of the control grid."""

    def basis(t: float) -> float:
        t = abs(t)
        if t < 1:
            return 2 / 3 - t * t + t**3 / 2
        return (2 - t) ** 3 / 6 if t < 2 else 0.0

    out = np.zeros([len(p) for p in places])
    for index in np.ndindex(*out.shape):
        at = [places[axis][i] for axis, i in enumerate(index)]
        low = [math.floor(a) - 1 for a in at]
        for offset in np.ndindex(*[4] * len(at)):
            node = [a + b for a, b in zip(low, offset, strict=True)]
            weight = math.prod(basis(a - n) for a, n in zip(at, node, strict=True))
            out[index] += weight * control[tuple(node)]
    return out


def test_a_displacement_is_the_cubic_spline_of_its_control_points_in_mm():
    shape, mm, control_mm = (13, 9, 5), (2.0, 1.5, 1.0), 6.0
    elastic = Elastic(ElasticConfig(amplitude_mm=(2.0, 2.0), control_mm=control_mm))
    params = elastic.draw(torch.tensor([5]))
    found = elastic.displacement(params, shape, torch.tensor([mm], dtype=torch.float64))
    assert found.shape == (1, 3, 4, 3, 2)
    places = []
    for length, size in zip(shape, mm, strict=True):
        knots = max(2, math.ceil((length - 1) / 4) + 1)
        places.append(np.linspace(-0.5, 0.5, knots) * (length - 1) * size / control_mm + 7.5)
    for axis in range(3):
        expected = 2.0 * by_bspline(params["share"][0, axis].numpy(), places)
        np.testing.assert_allclose(found[0, axis].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 20, 16), (24, 20)])
def test_bent_content_stays_in_one_piece_and_in_order(shape):
    config = ElasticConfig(amplitude_mm=(12.0, 12.0), control_mm=30.0)
    elastic = Elastic(config)
    seeds = torch.arange(6)
    mm = torch.full((6, len(shape)), 2.0, dtype=torch.float64)
    ramps = torch.stack([torch.from_numpy(grid).float() for grid in np.indices(shape)]).repeat(
        6, *[1] * (len(shape) + 1)
    )
    places = elastic.apply(ramps, elastic.draw(seeds), mm)
    inner = (slice(None), slice(None), *[slice(6, -6)] * len(shape))
    axes = tuple(range(2, 2 + len(shape)))
    jacobian = np.stack(np.gradient(places[inner].numpy(), axis=axes), axis=-1)  # b, d, *s, d
    determinant = np.linalg.det(np.moveaxis(jacobian, 1, -2))
    assert determinant.min() > 0
    assert (places - ramps).abs().max() > 1.0


def test_an_amplitude_that_folds_tissue_is_refused():
    with pytest.raises(ValueError, match=r"can fold tissue; at most 12\.9"):
        ElasticConfig(amplitude_mm=(0.0, 15.0), control_mm=32.0)


def test_a_displacement_moves_nothing_across_thick_slices_nor_where_it_is_not_drawn():
    elastic = Elastic(ElasticConfig(amplitude_mm=(5.0, 5.0), p=0.5))
    params = elastic.draw(torch.arange(8))
    found = elastic.displacement(params, (12, 12, 8), torch.tensor([[1.0, 1.0, 5.0]] * 8, dtype=torch.float64))
    assert torch.equal(found[:, 2], torch.zeros_like(found[:, 2]))
    assert torch.equal(found[~params["on"]], torch.zeros_like(found[~params["on"]]))
    assert (found[params["on"]][:, :2].abs().amax(dim=(2, 3, 4)) > 0.5).all()
    assert (found.abs() <= 5.0).all()


def test_two_displacements_add_up_and_come_before_the_affine_map():
    x = volume((20, 18, 16))
    elastic = Elastic(ElasticConfig(amplitude_mm=(4.0, 4.0)))
    seeds = torch.tensor([3])
    params = elastic.draw(seeds)
    turn = drawn(angle_deg=(0, 0, 15), shift_mm=(1.0, 0, 0))
    found = Pipeline([Affine(), elastic]).apply_to(x, [turn, params]).image
    mm = spacing(x, (1.0, 1.0, 1.0))
    shift = torch.nn.functional.interpolate(
        elastic.displacement(params, x.shape[2:], mm), size=x.shape[2:], mode="trilinear", align_corners=True
    )[0].numpy()
    linear, offset = forward_mm((0, 0, 15), (0, 0, 0), (1.0, 0, 0), 1.0)
    centre = (np.array(x.shape[2:]) - 1) / 2
    index = np.moveaxis(np.indices(x.shape[2:]), 0, -1) - centre
    places = (index - offset) @ np.linalg.inv(linear).T + np.moveaxis(shift, 0, -1) + centre
    expected = ndimage.map_coordinates(x[0, 0].numpy(), np.moveaxis(places, -1, 0), order=1, mode="nearest")
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-4)
    twice = Pipeline([elastic, elastic]).apply_to(x, [params, params]).image
    places = np.indices(x.shape[2:]) + 2 * shift
    expected = ndimage.map_coordinates(x[0, 0].numpy(), places, order=1, mode="nearest")
    np.testing.assert_allclose(twice[0, 0].numpy(), expected, atol=2e-4)


def test_the_margin_is_what_the_moves_reach_beyond_the_crop():
    still = Pipeline([])
    assert still.margin((20, 20, 20), (1, 1, 1)) == (0.0, 0.0, 0.0)
    turn = Pipeline([Affine(AffineConfig(rotation_deg=(0, 0, 10), scale=(1, 1)))])
    x, y, z = turn.margin((40, 40, 40), (1, 1, 1))
    bound = 39 / 2 * (math.cos(math.radians(10)) + math.sin(math.radians(10)) - 1) / 40
    assert x == pytest.approx(bound, rel=0.05)
    assert y == pytest.approx(bound, rel=0.05)
    assert z == 0.0
    assert math.copysign(1, z) == 1  # not -0.0, which is written as such
    assert turn.margin((40, 40, 1), (1, 1, 1))[2] == 0.0
    shift = Pipeline([Affine(AffineConfig(rotation_deg=(0, 0, 0), scale=(1, 1), translation_mm=(100, 0, 0)))])
    assert shift.margin((20, 20, 20), (1, 1, 1)) == (0.18, 0.0, 0.0)
    bend = Pipeline([Elastic(ElasticConfig(amplitude_mm=(4, 4)))])
    assert 0.05 < min(bend.margin((40, 40, 40), (1, 1, 1))) <= 0.1


def test_a_box_with_a_margin_gives_real_tissue_where_a_crop_has_only_its_border():
    world = volume((40, 40, 40))
    crop = world[:, :, 8:32, 8:32, 8:32]
    to_box = torch.eye(4, dtype=torch.float64)
    to_box[:3, 3] = 8.0
    frame = Frame(to_box[None], (24, 24, 24), torch.ones(1, 3, dtype=torch.float64))
    params = drawn(angle_deg=(0, 0, 25))
    found = Pipeline([Affine()]).apply_to(world, [params], frame=frame).image
    linear, shift = forward_mm((0, 0, 25), (0, 0, 0), (0, 0, 0), 1.0)
    expected = by_scipy(world[0, 0].numpy(), linear, shift, (1, 1, 1))  # both turn about the common centre
    np.testing.assert_allclose(found[0, 0].numpy(), expected[8:32, 8:32, 8:32], atol=2e-5)
    from_border = Affine().apply(crop, params)
    assert (found - from_border).abs()[0, 0, 0, 0].max() > 0.01
