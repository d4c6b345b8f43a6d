"""Whole images and bags: what is read, how large a voxel is, and which images a bag gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from array_cases import ArrayCase

from medssl.augment.frame import Frame
from medssl.augment.resample import resample
from medssl.errors import CaseError
from medssl.views.whole import WholeImage, middle_crops


def ramp(shape: tuple[int, int, int], *, name: str = "a", spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)) -> ArrayCase:
    """A case that is its own voxel index along X, Y and Z, in three channels."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    return ArrayCase({"image": index, "body": np.ones((1, *shape), np.uint8)}, spacing_mm=spacing_mm, case_id=name)  # type: ignore[arg-type]


def seen(view: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(view[name]))[None] for name in view if "note" not in name}
    frame = Frame.of(tensors, "image", shape=shape)
    assert frame is not None
    image = tensors["image"]
    boxes = image.flatten(0, 1) if image.ndim == 6 else image
    return resample(boxes, frame.to_box, shape=frame.shape, extent=frame.extent)[0].numpy()


def test_an_image_of_that_size_comes_as_it_is() -> None:
    case = ramp((6, 5, 4))
    view = WholeImage((6, 5, 4))([case], np.random.default_rng(0))
    assert np.array_equal(seen(view, (6, 5, 4))[0], case.arrays["image"])


def test_stretching_puts_the_centres_of_voxels_where_they_belong() -> None:
    view = WholeImage((4, 10, 3))([ramp((8, 5, 12))], np.random.default_rng(0))
    found = seen(view, (4, 10, 3))[0]
    for axis, (count, length) in enumerate(zip((4, 10, 3), (8, 5, 12), strict=True)):
        expected = (np.arange(count) + 0.5) * length / count - 0.5
        line = np.moveaxis(found[axis], axis, 0)
        inside = (expected >= 0) & (expected <= length - 1)
        middle = line[:, line.shape[1] // 2, line.shape[2] // 2]
        assert np.allclose(middle[inside], expected[inside], atol=1e-4)


def test_padding_keeps_the_ratio_of_edges_in_mm() -> None:
    case = ramp((20, 10, 5), spacing_mm=(1.0, 1.0, 2.0))
    view = WholeImage((10, 10, 10), fit="pad")([case], np.random.default_rng(0))
    assert np.allclose(view["image_spacing_mm"], 2.0)
    flat = WholeImage((10, 10, 1), fit="pad")([ramp((20, 10, 1))], np.random.default_rng(0))
    assert np.allclose(flat["image_spacing_mm"][:2], 2.0)


def test_a_size_in_mm_is_shown_around_the_middle_and_needs_a_size_in_mm() -> None:
    sampler = WholeImage((4, 4, 4), crop_mm=(8.0, 8.0, 8.0))
    case = ramp((12, 12, 12))
    view = sampler([case], np.random.default_rng(0))
    middle = view["image_affine"] @ np.array([1.5, 1.5, 1.5, 1.0])
    assert np.allclose(middle[:3], 5.5)
    with pytest.raises(CaseError, match="crop_mm"):
        sampler([ArrayCase(case.arrays, is_metric=False)], np.random.default_rng(0))


def test_slices_of_a_volume_are_a_bag_in_order() -> None:
    sampler = WholeImage((6, 5, 1), is_sliced=True, instances=3)
    view = sampler([ramp((6, 5, 9))], np.random.default_rng(1))
    places = view["image_affine"][:, 2, 3]
    assert view["members"].all()
    assert len(set(places)) == 3
    assert sorted(places) == list(places)
    every = sampler.every(ramp((6, 5, 9)), most=64)
    assert np.allclose(every["image_affine"][:, 2, 3], np.arange(9))
    assert np.allclose(sampler.every(ramp((6, 5, 9)), most=3)["image_affine"][:, 2, 3], [0, 4, 8])


def test_a_bag_holds_each_image_once_and_is_filled_up_where_it_is_small() -> None:
    members = [ramp((6 + n, 5, 4), name=f"m{n}") for n in range(3)]
    bags = {"m0": members, "lone": members[:1]}
    view = WholeImage((6, 5, 4), bags=bags, instances=5)([members[0]], np.random.default_rng(0))
    assert view["image"].shape[0] == 5
    assert view["members"].tolist() == [True, True, True, False, False]
    assert len({float(one) for one in view["image_spacing_mm"][:3, 0]}) == 3
    few = WholeImage((6, 5, 4), bags=bags, instances=2)([members[0]], np.random.default_rng(0))
    assert few["members"].tolist() == [True, True]


def test_crops_for_prediction_cover_the_body_and_stay_few() -> None:
    case = ramp((20, 9, 4))
    found = middle_crops(case, (8, 8, 8), np.array([8.0, 8.0, 8.0]), most=64)
    starts = found["image_affine"][:, :3, 3]
    assert sorted({int(one) for one in starts[:, 0]}) == [0, 6, 12]
    assert sorted({int(one) for one in starts[:, 1]}) == [0, 1]
    assert {int(one) for one in starts[:, 2]} == {-2}
    assert len(middle_crops(case, (8, 8, 8), np.array([8.0, 8.0, 8.0]), most=2)["image"]) == 2
