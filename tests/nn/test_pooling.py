"""Pooling against closed formulas and the papers' equations, written with loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medssl.nn.pooling import GatedAttention, GeM, PooledHead


@pytest.fixture
def pyramid() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 4, 6, 5, generator=generator), torch.randn(3, 8, 3, 2, generator=generator)]


def head(**options: Any) -> PooledHead:
    torch.manual_seed(1)
    return PooledHead([4, 8], 3, **options).eval()


def test_gem_is_a_mean_for_power_one_and_nearly_a_maximum_for_a_large_one(pyramid: list[torch.Tensor]) -> None:
    x = pyramid[0]
    assert torch.allclose(GeM(1.0)(x), x.mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(GeM(200.0)(x), x.amax(dim=(2, 3)), atol=0.02)
    cubic = (x.double() ** 3).mean(dim=(2, 3)) ** (1 / 3)
    assert torch.allclose(GeM(3.0)(x).double(), cubic, atol=1e-6)


def test_gated_attention_follows_equations_7_and_9() -> None:
    torch.manual_seed(0)
    attention = GatedAttention(4, hidden=3)
    bags = torch.randn(2, 5, 4)
    members = torch.tensor([[True] * 5, [True, False, True, False, False]])
    value, gate = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (attention.value, attention.gate)
    )
    w = attention.score.weight.detach().numpy()[0]
    for b in range(2):
        scores = {}
        for n in range(5):
            h = bags[b, n].numpy()
            if members[b, n]:
                left = np.tanh(value[0] @ h + value[1])
                scores[n] = w @ (left * (1 / (1 + np.exp(-(gate[0] @ h + gate[1])))))
        total = sum(np.exp(score) for score in scores.values())
        expected = sum(np.exp(score) / total * bags[b, n].numpy() for n, score in scores.items())
        assert np.allclose(attention(bags, members)[b].detach(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [("mean", lambda x: x.mean(dim=(2, 3))), ("max", lambda x: x.amax(dim=(2, 3)))],
)
def test_the_coarsest_level_is_pooled(pool: Any, expected: Any, pyramid: list[torch.Tensor]) -> None:
    assert torch.allclose(head(pool=pool).embed(pyramid), expected(pyramid[1]), atol=1e-6)


def test_all_levels_are_pooled_by_their_mean(pyramid: list[torch.Tensor]) -> None:
    expected = torch.cat([level.mean(dim=(2, 3)) for level in pyramid], dim=1)
    assert torch.allclose(head(levels="all").embed(pyramid), expected, atol=1e-6)


@pytest.mark.parametrize("pool", ["gem", "attention"])
def test_learned_pooling_lies_between_the_smallest_and_the_largest_feature(
    pool: Any, pyramid: list[torch.Tensor]
) -> None:
    found = head(pool=pool).embed(pyramid)
    low, high = pyramid[1].flatten(2).amin(dim=2), pyramid[1].flatten(2).amax(dim=2)
    assert found.shape == (3, 8)
    assert ((found >= low - 1e-5) & (found <= high + 1e-5)).all()


@pytest.mark.parametrize("bag_pool", ["attention", "mean", "max"])
def test_a_bag_does_not_depend_on_what_fills_it_up_or_on_the_order(bag_pool: Any) -> None:
    model = head(bag_pool=bag_pool)
    bag = torch.randn(1, 3, 8)
    filled = torch.cat((bag, torch.randn(1, 2, 8)), dim=1)
    members = torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(model.of_bags(filled, members), model.of_bags(bag), atol=1e-6)
    assert torch.allclose(model.of_bags(bag.flip(1)), model.of_bags(bag), atol=1e-6)
    assert torch.allclose(model.of_bags(bag[:, :1]), bag[:, 0], atol=1e-6)


def test_grades_are_never_more_likely_the_higher_they_are() -> None:
    torch.manual_seed(2)
    model = PooledHead([8], 4, is_ordinal=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    scores = model(torch.randn(50, 8))
    assert scores.shape == (50, 4)
    assert (scores.diff(dim=1) <= 0).all()


def test_the_config_builds_the_same_head_again(pyramid: list[torch.Tensor]) -> None:
    model = head(pool="gem", is_normed=True, dropout=0.3)
    again = PooledHead(**model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(again.embed(pyramid)), model(model.embed(pyramid)))
