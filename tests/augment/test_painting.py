from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from medssl.augment.masking import box_mask
from medssl.augment.painting import (
    InPainting,
    InPaintingConfig,
    LocalShuffle,
    LocalShuffleConfig,
    Nonlinear,
    NonlinearConfig,
    OutPainting,
    OutPaintingConfig,
)

SEEDS = torch.arange(30, 34)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 3 - 1


def windows(shape: tuple[int, ...], edge: list[float], place: list[float]) -> list[tuple[slice, ...]]:
    """The windows of one sample, found by walking along each axis."""
    cuts: list[list[slice]] = []
    for length, share, where in zip(shape, edge, place, strict=False):
        size = max(1, round(share * length))
        first = int(where * min(size, length - size + 1))
        cuts.append([slice(at, at + size) for at in range(first, length - size + 1, size)])
    return list(itertools.product(*cuts))


@pytest.mark.parametrize("shape", [(22, 17, 13), (22, 17), (9, 6, 1)])
def test_a_shuffle_keeps_the_values_of_every_window_and_all_that_is_outside(shape):
    x = images(4, 1, *shape)
    shuffle = LocalShuffle(LocalShuffleConfig(edge=(0.15, 0.35), share=(1.0, 1.0)))
    params = shuffle.draw(SEEDS)
    out = shuffle.apply(x, params)
    for image, got, edge, place in zip(
        x[:, 0].numpy(), out[:, 0].numpy(), params["edge"].tolist(), params["place"].tolist(), strict=True
    ):
        outside = np.ones(shape, dtype=bool)
        for window in windows(shape, edge, place):
            np.testing.assert_array_equal(np.sort(got[window], axis=None), np.sort(image[window], axis=None))
            outside[window] = False
        np.testing.assert_array_equal(got[outside], image[outside])
        assert (got != image).mean() > 0.3


def test_the_channels_of_a_voxel_move_together():
    x = torch.arange(4 * 12 * 12.0).reshape(4, 1, 12, 12).repeat(1, 2, 1, 1)
    x[:, 1] *= -1
    out = LocalShuffle(LocalShuffleConfig(edge=(0.3, 0.3), share=(1.0, 1.0)))(x, SEEDS)
    assert not torch.equal(out, x)
    assert torch.equal(out[:, 0], -out[:, 1])


def test_the_stated_share_of_windows_is_shuffled():
    x = torch.arange(40.0**3).reshape(1, 1, 40, 40, 40)
    shuffle = LocalShuffle(LocalShuffleConfig(edge=(0.1, 0.1), share=(0.3, 0.3)))
    params = shuffle.draw(SEEDS[:1])
    changed = (shuffle.apply(x, params) != x)[0, 0].numpy()
    every = windows(changed.shape, params["edge"][0].tolist(), params["place"][0].tolist())
    moved = sum(bool(changed[window].any()) for window in every)
    assert stats.binomtest(moved, len(every), 0.3).pvalue > 0.01


def test_a_voxel_comes_from_anywhere_in_its_window_alike():
    x = torch.arange(8.0).reshape(2, 2, 2).expand(2000, 1, 2, 2, 2)
    whole = LocalShuffle(LocalShuffleConfig(edge=(1.0, 1.0), share=(1.0, 1.0)))
    out = whole(x, torch.arange(2000)).flatten(1).long().numpy()
    for voxel in out.T:
        assert stats.chisquare(np.bincount(voxel, minlength=8)).pvalue > 0.001


def test_windows_of_one_sample_take_many_orders():
    x = torch.arange(8.0).reshape(2, 2, 2).repeat(20, 20, 20)[None, None]
    shuffle = LocalShuffle(LocalShuffleConfig(edge=(0.05, 0.05), share=(1.0, 1.0)))
    params = shuffle.draw(SEEDS[:1]) | {"place": torch.zeros(1, 3, dtype=torch.float64)}
    out = shuffle.apply(x, params)
    orders = out.reshape(20, 2, 20, 2, 20, 2).permute(0, 2, 4, 1, 3, 5).reshape(8000, 8)
    assert 50 < len(orders.unique(dim=0)) <= 64


@pytest.mark.parametrize("is_falling", [False, True])
def test_a_curve_equals_that_of_the_paper_by_its_bernstein_polynomials(is_falling):
    x = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0], x[:, :, 0, 1] = 0.0, 1.0
    nonlinear = Nonlinear(NonlinearConfig(reverse=float(is_falling), most_off=1.0))
    params = nonlinear.draw(SEEDS)
    assert (params["is_reversed"] == is_falling).all()
    found = nonlinear.apply(x, params)
    t = np.linspace(0, 1, 100_000)
    for image, got, inner in zip(x.numpy(), found.numpy(), params["points"].numpy(), strict=True):
        points = [(0.0, 0.0), tuple(inner[0]), tuple(inner[1]), (1.0, 1.0)]
        v, w = np.zeros_like(t), np.zeros_like(t)
        for i, (across, up) in enumerate(points):
            weight = math.comb(3, i) * t**i * (1 - t) ** (3 - i)
            v, w = v + weight * across, w + weight * up
        expected = np.interp(image, np.sort(v), 1 - np.sort(w) if is_falling else np.sort(w))
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_a_curve_keeps_the_order_and_the_range_of_intensities_and_leaves_a_flat_channel():
    x = images(200, 2, 300, 1)
    x[:, 1] = 4.0
    ordered = x.sort(dim=2).values
    out = Nonlinear()(ordered, torch.arange(200))
    assert (out[:, 0].diff(dim=1) >= -1e-6).all()
    torch.testing.assert_close(out[:, 0, [0, -1]], ordered[:, 0, [0, -1]], rtol=0, atol=1e-6)
    assert torch.equal(out[:, 1], x[:, 1])
    falling = Nonlinear(NonlinearConfig(reverse=1.0))(ordered, torch.arange(200))
    assert (falling[:, 0].diff(dim=1) <= 1e-6).all()
    torch.testing.assert_close(falling[:, 0, [0, -1]], ordered[:, 0, [-1, 0]], rtol=0, atol=1e-6)
    assert torch.equal(falling[:, 1], x[:, 1])


def test_curves_fall_as_often_as_asked_and_points_lie_anywhere_in_the_square_if_asked_for():
    params = Nonlinear(NonlinearConfig(reverse=0.3, most_off=1.0)).draw(torch.arange(1000))
    assert stats.binomtest(int(params["is_reversed"].sum()), 1000, 0.3).pvalue > 0.01
    assert stats.kstest(params["points"].flatten().numpy(), "uniform").pvalue > 0.01
    gentle = Nonlinear(NonlinearConfig(strength=0.2, most_off=1.0)).draw(torch.arange(100))["points"]
    line = torch.tensor([1 / 3, 2 / 3]).view(1, 2, 1)
    assert ((gentle - line).abs() <= 0.2 * 2 / 3).all()


def test_points_lie_within_reach_of_the_diagonal_on_both_sides():
    across, up = Nonlinear().draw(torch.arange(1000))["points"].unbind(dim=2)
    assert ((up - across).abs() <= 0.4 + 1e-9).all()
    assert (up - across).min() < -0.35
    assert (up - across).max() > 0.35
    assert ((up >= 0) & (up <= 1)).all()
    assert stats.kstest(across.flatten().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_no_curve_makes_nearly_all_white_or_black_as_some_of_the_papers_square_do(reverse):
    x = torch.linspace(0, 1, 401).view(1, 1, 401, 1).expand(3000, 1, 401, 1)
    near, anywhere = (
        Nonlinear(NonlinearConfig(reverse=reverse, **options))(x, torch.arange(3000))[:, 0, :, 0]
        for options in ({}, {"most_off": 1.0})
    )
    assert (near[:, 300] - near[:, 100]).abs().min() > 0.25
    assert (anywhere[:, 300] - anywhere[:, 100]).abs().min() < 0.15
    assert ((near[:, 200] - 0.5).abs() < 0.3).all()
    assert ((anywhere[:, 200] - 0.5).abs() > 0.4).any()


@pytest.mark.parametrize("shape", [(15, 14, 13), (15, 14)])
def test_painting_inside_replaces_boxes_and_painting_outside_all_but_boxes(shape):
    x = images(4, 2, *shape)
    inside = InPainting(InPaintingConfig(num=3, edge=(0.2, 0.5)))
    outside = OutPainting(OutPaintingConfig(num=3, edge=(0.2, 0.5)))
    params = inside.draw(SEEDS)
    edges = params["edge"][..., : len(shape)] * torch.tensor(shape)
    boxes = box_mask(edges, params["place"], params["count"], shape=shape, device=x.device).expand_as(x)
    assert 0 < boxes.float().mean() < 1
    assert torch.equal(inside.apply(x, params) != x, boxes)
    assert torch.equal(outside.apply(x, params) != x, ~boxes)


def test_paint_is_even_noise_over_the_range_of_the_channel():
    x = images(1, 2, 40, 40, 40) * torch.tensor([1.0, -30.0]).view(1, 2, 1, 1, 1)
    out = OutPainting(OutPaintingConfig(num=1))(x, SEEDS[:1])
    for image, got in zip(x[0].numpy(), out[0].numpy(), strict=True):
        paint = got[got != image]
        assert 1 - (4 / 7 + 0.02) ** 3 <= len(paint) / image.size <= 1 - (3 / 7 - 0.02) ** 3
        assert stats.kstest(paint[::4], "uniform", args=(image.min(), np.ptp(image))).pvalue > 0.01
