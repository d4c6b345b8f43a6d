from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medssl.engine.optim import TrainConfig, WeightAverage, build_optimizer, learning_rate, set_learning_rate
from medssl.errors import ConfigError
from medssl.trainable import ParamGroup, split_decay


def test_the_cosine_schedule_warms_up_linearly_and_falls_to_its_share() -> None:
    config = TrainConfig(steps=110, lr=2.0, warmup_steps=10, schedule="cosine", final_lr_share=0.1)
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(110, config) == pytest.approx(0.2)


def test_the_poly_schedule_is_a_power_of_what_is_left() -> None:
    config = TrainConfig(steps=100, lr=1.0, schedule="poly")
    assert learning_rate(25, config) == pytest.approx(0.75**0.9)
    assert learning_rate(100, config) == 0.0


def test_the_constant_schedule_stays() -> None:
    config = TrainConfig(steps=100, lr=0.3, schedule="constant", warmup_steps=2, final_lr_share=0.5)
    assert learning_rate(0, config) == pytest.approx(0.15)
    assert {learning_rate(step, config) for step in range(2, 101)} == {0.3}


def test_a_run_that_is_all_warm_up_has_a_learning_rate_everywhere() -> None:
    config = TrainConfig(steps=4, lr=1.0, warmup_steps=4)
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"warmup_steps": 20, "steps": 10}, "warmup_steps is 20 of 10"),
        ({"betas": [0.9, 1.5]}, "betas"),
        ({"lr": 0}, "lr"),
        ({"learning_rate": 0.1}, "unknown key"),
        ({"strategy": 3}, "strategy"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(mapping: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig.parse(mapping)


def test_groups_keep_their_shares_of_learning_rate_and_weight_decay() -> None:
    net = nn.Linear(3, 2)
    groups = [*split_decay("net", list(net.parameters()), lr_scale=0.5), ParamGroup("empty", [])]
    optimizer = build_optimizer(groups, TrainConfig(lr=0.1, weight_decay=0.2))
    set_learning_rate(optimizer, 0.04)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [group["name"] for group in optimizer.param_groups] == ["net/decay", "net/no_decay"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimiser_follows_the_textbook(name: str) -> None:
    config = TrainConfig(optimizer=name, lr=0.1, weight_decay=0.3, momentum=0.9, betas=(0.8, 0.9))
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer([ParamGroup("all", [parameter])], config)
    x = parameter.detach().clone().double()
    m, v = torch.zeros(2, dtype=torch.double), torch.zeros(2, dtype=torch.double)
    for t, grad in enumerate(torch.tensor([[1.0, 2.0], [-0.5, 0.1], [0.3, 0.3]]), start=1):
        parameter.grad = grad.clone()
        optimizer.step()
        g = grad.double()
        if name == "adamw":
            x = x - 0.1 * 0.3 * x
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            x = x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        else:
            g = g + 0.3 * x
            m = 0.9 * m + g
            x = x - 0.1 * (g + 0.9 * m)
    assert torch.allclose(parameter.detach().double(), x, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_flagged_step_leaves_parameters_and_moments_alone(name: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([ParamGroup("all", [parameter])], TrainConfig(optimizer=name))
    parameter.grad = torch.full((3,), math.nan)
    vars(optimizer)["found_inf"] = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert all(torch.isfinite(value).all() for value in optimizer.state[parameter].values())
    parameter.grad = torch.ones(3)
    vars(optimizer)["found_inf"] = torch.tensor(0.0)
    optimizer.step()
    assert torch.isfinite(parameter).all()
    assert (parameter < 1).all()


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        build_optimizer([], TrainConfig())


def test_the_weight_average_follows_its_recursion_and_comes_back_from_its_state() -> None:
    net = nn.BatchNorm1d(2)
    average = WeightAverage(net, 0.3)
    expected = net.weight.detach().clone()
    for count in range(5):
        with torch.no_grad():
            net.weight.add_(1.0 + count)
        net(torch.randn(4, 2, generator=torch.Generator().manual_seed(count)))
        average.update(count)
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    state = average.state_dict()
    assert torch.allclose(state["weight"], expected)
    assert torch.equal(state["running_mean"], net.running_mean)
    assert state["num_batches_tracked"] == 5
    other = WeightAverage(nn.BatchNorm1d(2), 0.3)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["weight"], state["weight"])
    nn.BatchNorm1d(2).load_state_dict(state)
