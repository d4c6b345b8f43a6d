from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from medssl.augment.masking import (
    Blocks,
    BlocksConfig,
    Cutout,
    CutoutConfig,
    Tubes,
    TubesConfig,
    box_mask,
    channel_means,
    draw_boxes,
    noise_in_range,
)
from medssl.augment.pipeline import Pipeline

SEEDS = torch.arange(20, 26)
CPU = torch.device("cpu")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 3 - 1


def spacing(x: torch.Tensor, *mm: float) -> torch.Tensor:
    return torch.tensor([mm] * len(x), dtype=torch.float64)


def hidden_by(augment: Any, x: torch.Tensor, params: Any, mm: torch.Tensor) -> np.ndarray:
    """Where an augment that fills with the mean changes images in which no voxel is the mean."""
    return (augment.apply(x, params, mm) != x)[:, 0].numpy()


@pytest.mark.parametrize("shape", [(13, 9, 7), (13, 9)])
def test_a_mask_is_the_union_of_the_first_boxes_voxel_by_voxel(shape):
    generator = torch.Generator().manual_seed(1)
    rows = [draw_boxes(4, (0.0, 9.0), generator) for _ in range(5)]
    drawn = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    found = box_mask(drawn["edge"], drawn["place"], drawn["count"], shape=shape, device=CPU)
    assert found.shape == (5, 1, *shape)
    for sample in range(5):
        expected = np.zeros(shape, dtype=bool)
        for box in range(int(drawn["count"][sample])):
            corner, size = [], []
            for axis, length in enumerate(shape):
                edge = min(length, max(1, round(float(drawn["edge"][sample, box, axis]))))
                corner.append(int(float(drawn["place"][sample, box, axis]) * (length - edge + 1)))
                size.append(edge)
            for voxel in itertools.product(*map(range, shape)):
                expected[voxel] |= all(c <= v < c + s for v, c, s in zip(voxel, corner, size, strict=True))
        np.testing.assert_array_equal(found[sample, 0], expected)


def test_a_box_of_no_edge_is_empty_and_the_last_place_is_inside():
    edges = torch.tensor([[[0.0, 4.0]], [[0.4, 4.0]], [[99.0, 4.0]]], dtype=torch.float64)
    last = torch.full((3, 1, 3), 1 - 2.0**-53, dtype=torch.float64)
    mask = box_mask(edges, last, torch.ones(3, dtype=torch.int64), shape=(6, 10), device=CPU)[:, 0]
    assert mask.sum(dim=(1, 2)).tolist() == [0, 4, 24]
    assert mask[2, :, 6:].all()


def test_boxes_are_as_many_as_asked_for_each_number_alike_and_lie_anywhere():
    drawn = Cutout(CutoutConfig(num=4)).draw(torch.arange(800))
    assert stats.chisquare(np.bincount(drawn["count"], minlength=5)[1:]).pvalue > 0.01
    assert stats.kstest(drawn["place"].flatten().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(drawn["edge"].flatten().numpy(), "uniform", args=(0.1, 0.2)).pvalue > 0.01


def test_a_cutout_in_mm_has_fewer_voxels_where_they_are_longer():
    x = images(6, 1, 24, 24, 12)
    cutout = Cutout(CutoutConfig(num=1, edge_mm=(8.0, 8.0)))
    hidden = hidden_by(cutout, x, cutout.draw(SEEDS), spacing(x, 1.0, 2.0, 4.0))
    for mask in hidden:
        assert [len(np.unique(found)) for found in np.nonzero(mask)] == [8, 4, 2]
        assert mask.sum() == 64


def test_a_cutout_as_a_share_is_of_each_axis():
    x = images(6, 1, 20, 10)
    cutout = Cutout(CutoutConfig(num=1, edge=(0.5, 0.5)))
    hidden = hidden_by(cutout, x, cutout.draw(SEEDS), spacing(x, 1.0, 1.0))
    assert all([len(np.unique(found)) for found in np.nonzero(mask)] == [10, 5] for mask in hidden)


@pytest.mark.parametrize("fill", ["mean", "min"])
def test_what_is_hidden_becomes_the_mean_or_minimum_of_its_channel(fill):
    x = images(2, 2, 12, 12, 12)
    cutout = Cutout(CutoutConfig(fill=fill))
    out = cutout(x, SEEDS[:2])
    for image, got in zip(x.flatten(0, 1).numpy(), out.flatten(0, 1).numpy(), strict=True):
        value = image.mean() if fill == "mean" else image.min()
        assert (image != got).any()
        np.testing.assert_allclose(got[image != got], value, atol=1e-6)


def test_what_is_hidden_becomes_noise_over_the_range_of_its_channel():
    x = images(2, 2, 24, 24, 24) * torch.tensor([1.0, 50.0]).view(1, 2, 1, 1, 1)
    out = Cutout(CutoutConfig(num=1, edge=(0.8, 0.8), fill="noise"))(x, SEEDS[:2])
    for image, got in zip(x.flatten(0, 1).numpy(), out.flatten(0, 1).numpy(), strict=True):
        noise = got[image != got]
        assert len(noise) > 0.4 * image.size
        assert stats.kstest(noise, "uniform", args=(image.min(), np.ptp(image))).pvalue > 0.01
    samples = out[:, 0] - x[:, 0]
    assert not torch.equal(samples[0], samples[1])


def test_noise_in_the_range_of_a_flat_image_is_that_value():
    flat = torch.full((1, 1, 5, 1), 7.0)
    assert torch.equal(noise_in_range(flat, torch.tensor([4])), flat)


def test_the_mean_of_a_channel_does_not_depend_on_the_batch():
    x = images(4, 2, 40, 40, 40)
    whole = channel_means(x)
    assert whole.shape == (4, 2, 1, 1, 1)
    for place in range(4):
        assert torch.equal(channel_means(x[place : place + 1])[0], whole[place])
    np.testing.assert_allclose(whole.flatten(1), x.numpy().astype(np.float64).mean(axis=(2, 3, 4)), atol=1e-7)


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_the_stated_share_of_blocks_is_hidden_each_whole(share):
    x, mm = images(6, 1, 20, 17, 9), (1.0, 1.0, 2.0)
    blocks = Blocks(BlocksConfig(edge_mm=(6.0, 6.0), share=(share, share)))
    params = blocks.draw(SEEDS)
    hidden = hidden_by(blocks, x, params, spacing(x, *mm))
    for mask, place in zip(hidden, params["place"].tolist(), strict=True):
        cells: dict[tuple[int, ...], list[bool]] = {}
        for voxel in itertools.product(*map(range, mask.shape)):
            edges = [round(6.0 / size) for size in mm]
            cell = tuple((v + int(p * e)) // e for v, p, e in zip(voxel, place, edges, strict=True))
            cells.setdefault(cell, []).append(bool(mask[voxel]))
        whole = [all(found) for found in cells.values()]
        assert whole == [any(found) for found in cells.values()]
        assert sum(whole) == round(share * len(cells))


def test_every_voxel_is_hidden_as_often_as_any_other():
    x = images(1, 1, 12, 10).expand(600, -1, -1, -1)
    blocks = Blocks(BlocksConfig(edge_mm=(3.0, 4.0), share=(0.4, 0.4)))
    often = hidden_by(blocks, x, blocks.draw(torch.arange(600)), spacing(x, 1.0, 1.0)).mean(axis=0)
    np.testing.assert_allclose(often, 0.4, atol=5 * np.sqrt(0.24 / 600))


def test_some_of_an_image_stays_visible_whatever_the_share():
    x = images(6, 1, 12, 12, 12)
    blocks = Blocks(BlocksConfig(edge_mm=(4.0, 4.0), share=(1.0, 1.0)))
    hidden = hidden_by(blocks, x, blocks.draw(SEEDS), spacing(x, 1.0, 1.0, 1.0))
    assert (hidden.sum(axis=(1, 2, 3)) < 12**3).all()
    large = Blocks(BlocksConfig(edge_mm=(4.0, 4.0), share=(1.0, 1.0)))
    single = images(6, 1, 1, 1, 1)
    assert torch.equal(large(single, SEEDS), single)


@pytest.mark.parametrize("axis", ["LR", "AP", "SI"])
def test_a_tube_runs_all_along_its_axis_and_is_made_of_blocks_across_it(axis):
    x = images(6, 1, 16, 14, 12)
    tubes = Tubes(TubesConfig(edge_mm=(4.0, 4.0), share=(0.5, 0.5), axis=axis))
    params = tubes.draw(SEEDS)
    hidden = hidden_by(tubes, x, params, spacing(x, 1.0, 1.0, 1.0))
    along = ["LR", "AP", "SI"].index(axis)
    for mask, place in zip(hidden, params["place"].tolist(), strict=True):
        across = mask.any(axis=along)
        assert (mask == np.expand_dims(across, along)).all()
        first, second = (other for other in range(3) if other != along)
        cells: dict[tuple[int, int], set[bool]] = {}
        for voxel in itertools.product(*map(range, across.shape)):
            cell = ((voxel[0] + int(place[first] * 4)) // 4, (voxel[1] + int(place[second] * 4)) // 4)
            cells.setdefault(cell, set()).add(bool(across[voxel]))
        assert all(len(found) == 1 for found in cells.values())
        assert sum(found == {True} for found in cells.values()) == round(0.5 * len(cells))


def test_in_2d_tubes_are_blocks_unless_they_run_in_the_plane():
    x = images(6, 1, 16, 14)
    options = {"edge_mm": (4.0, 4.0), "share": (0.5, 0.5)}
    tubes, blocks = Tubes(TubesConfig(**options)), Blocks(BlocksConfig(**options))
    params = tubes.draw(SEEDS)
    assert torch.equal(tubes.apply(x, params), blocks.apply(x, params))
    stripes = Tubes(TubesConfig(**options, axis="AP"))
    for mask in hidden_by(stripes, x, params, spacing(x, 1.0, 1.0)):
        assert (mask == mask.any(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("augment", [Cutout(), Blocks(BlocksConfig(edge_mm=(3.0, 3.0))), Tubes()])
def test_a_label_map_is_not_hidden(augment):
    x = images(6, 1, 12, 12, 12)
    label = (x > 0).to(torch.uint8)
    view = Pipeline([augment])(x, SEEDS, label)
    assert not torch.equal(view.image, x)
    assert torch.equal(view.label, label)
