"""Low-rank additions: nothing changes at first, and nothing is left of them in a bundle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.ema import make_teacher, update_ema
from medssl.nn.lora import LoRAConfig, LowRank, add_lora, plain_state


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def perturbed(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith((".a", ".b")):
                parameter.normal_()
    return net


def test_nothing_changes_at_first_and_only_additions_are_trained() -> None:
    net, x = network(), torch.randn(2, 2, 4, 4, 4)
    before = net(x)
    assert add_lora(net, LoRAConfig(), seed=0) == ["0.weight", "3.weight"]
    assert torch.equal(net(x), before)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.parametrizations.weight.0.{half}" for layer in (0, 3) for half in "ab"}
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_a_convolution_gets_a_convolution_of_few_channels_and_a_1x1_one() -> None:
    layer = nn.Conv3d(2, 6, 3, padding=1)
    add_lora(layer, LoRAConfig(rank=3, alpha=6.0), seed=0)
    perturbed(layer)
    low_rank = layer.parametrizations.weight[0]
    x = torch.randn(1, 2, 5, 5, 5)
    narrow = F.conv3d(x, low_rank.a.view(3, 2, 3, 3, 3), padding=1)
    added = F.conv3d(narrow, low_rank.b.view(6, 3, 1, 1, 1)) * 6.0 / 3
    plain = F.conv3d(x, layer.parametrizations.weight.original, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain + added, atol=1e-4, rtol=1e-4)


def test_a_linear_layer_gets_equation_3() -> None:
    layer = nn.Linear(7, 4)
    add_lora(layer, LoRAConfig(rank=2, alpha=8.0), seed=0)
    perturbed(layer)
    low_rank, x = layer.parametrizations.weight[0], torch.randn(3, 7)
    expected = x @ layer.parametrizations.weight.original.T + 4.0 * (x @ low_rank.a.T) @ low_rank.b.T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_the_plain_state_has_the_names_and_the_function_of_the_network() -> None:
    net, fresh, x = network(), network(), torch.randn(2, 2, 4, 4, 4)
    add_lora(net, LoRAConfig(rank=2), seed=0)
    perturbed(net)
    state = plain_state(net)
    assert set(state) == set(fresh.state_dict())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), net(x))
    assert "0.parametrizations.weight.original" in net.state_dict()
    untouched = network()
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in plain_state(untouched).items())


def test_the_rank_is_at_most_the_smaller_side_and_the_addition_stays_in_full_precision() -> None:
    low_rank = LowRank(torch.zeros(3, 2), rank=8, alpha=8.0)
    assert low_rank.a.shape == (2, 2)
    with torch.no_grad():
        low_rank.b.normal_()
    exact = low_rank(torch.zeros(3, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low_rank(torch.zeros(3, 2)), exact)


@pytest.mark.parametrize(("targets", "names"), [("linear", ["3.weight"]), ("conv", ["0.weight"])])
def test_targets_choose_the_layers(targets: str, names: list[str]) -> None:
    assert add_lora(network(), LoRAConfig.parse({"targets": targets}), seed=0) == names


def test_skipped_parameters_are_left_alone() -> None:
    net = network()
    skip = list(net[3].parameters())
    assert add_lora(net, LoRAConfig(), seed=0, skip=skip) == ["0.weight"]
    assert all(parameter.requires_grad for parameter in skip)


def test_the_seed_draws_the_additions_and_no_global_number_is_used() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    nets = [copy.deepcopy(network()) for _ in range(3)]
    torch.manual_seed(5)
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        add_lora(net, LoRAConfig(), seed=seed)
    assert torch.equal(torch.rand(3), expected)
    first, same, other = (net.state_dict()["0.parametrizations.weight.0.a"] for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer of the kind 'conv'"):
        add_lora(nn.Linear(2, 2), LoRAConfig(targets="conv"), seed=0)


def test_a_teacher_can_follow_a_network_with_additions() -> None:
    net = network()
    add_lora(net, LoRAConfig(), seed=0)
    teacher = make_teacher(net)
    perturbed(net)
    update_ema(teacher, net, 0.0)
    x = torch.randn(1, 2, 4, 4, 4)
    torch.testing.assert_close(teacher(x), net(x))
