from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.blocks import ResidualBlock, norm, upsample
from medssl.nn.unet import Config, ResidualUNetEncoder


def test_strides_of_the_config_are_relative_and_those_of_the_encoder_cumulative() -> None:
    config = Config(channels=(4, 8, 8, 16), strides=(1, 2, 4, 1), blocks=(1, 2, 1, 1))
    encoder = ResidualUNetEncoder(config, in_channels=1, spatial_dims=2)
    assert encoder.strides == (1, 2, 8, 8)
    shapes = [tuple(level.shape[1:]) for level in encoder(torch.zeros(1, 1, 19, 9))]
    assert shapes == [(4, 19, 9), (8, 10, 5), (8, 3, 2), (16, 3, 2)]


def test_the_default_is_about_one_million_parameters_together_with_its_decoder() -> None:
    encoder = ResidualUNetEncoder(Config(), in_channels=1, spatial_dims=3)
    assert encoder.strides[0] == 2
    assert 0.7e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 1.3e6


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"channels": [8, 16], "strides": [2], "blocks": [1, 1]}, "one number a level"),
        ({"channels": [], "strides": [], "blocks": []}, "one number a level"),
        ({"channels": [0], "strides": [2], "blocks": [1]}, "at least 1"),
        ({"channels": [8], "strides": [2], "blocks": [0]}, "at least 1"),
        ({"channels": [8], "strides": [3], "blocks": [1]}, "strides"),
        ({"norm": "batch"}, "norm"),
    ],
)
def test_an_impossible_config_is_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(mapping)


@pytest.mark.parametrize("name", ["group", "layer"])
def test_one_voxel_at_the_deepest_level_still_carries_information(name: str) -> None:
    config = Config(channels=(16, 32), strides=(2, 4), blocks=(1, 1), norm=name)  # type: ignore[arg-type]
    torch.manual_seed(0)
    encoder = ResidualUNetEncoder(config, in_channels=1, spatial_dims=3)
    deepest = encoder(torch.randn(1, 1, 8, 8, 8))[-1]
    assert deepest.shape[2:] == (1, 1, 1)
    assert deepest.std() > 0.1


def test_groups_hold_sixteen_channels_where_that_divides() -> None:
    assert norm("group", 64).num_groups == 4
    assert norm("group", 24).num_groups == 1
    assert norm("instance", 24).num_groups == 24
    assert norm("layer", 64).num_groups == 1


def test_instance_norm_gives_each_channel_mean_zero_and_variance_one() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    y = norm("instance", 3)(x).detach()
    for sample in y:
        for channel in sample:
            assert abs(float(channel.mean())) < 1e-5
            assert abs(float(channel.var(correction=0)) - 1) < 1e-3


def test_a_residual_block_is_two_convolutions_plus_a_strided_shortcut() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, 5, stride=2)
    x = torch.randn(2, 3, 9, 8)
    state = block.state_dict()
    h = F.conv2d(x, state["convs.0.weight"], stride=2, padding=1)
    h = F.leaky_relu(F.group_norm(h, 1, state["norms.0.weight"], state["norms.0.bias"]), 0.01)
    h = F.conv2d(h, state["convs.1.weight"], padding=1)
    h = F.group_norm(h, 1, state["norms.1.weight"], state["norms.1.bias"])
    expected = F.leaky_relu(h + F.conv2d(x[:, :, ::2, ::2], state["shortcut.weight"]), 0.01)
    torch.testing.assert_close(block(x), expected)


def test_upsampling_repeats_voxels_and_cuts_the_end() -> None:
    x = torch.arange(2.0 * 3 * 2).reshape(1, 1, 2, 3, 2)
    y = upsample(x, factor=3, shape=(5, 9, 4))
    assert y.shape == (1, 1, 5, 9, 4)
    for i in range(5):
        for j in range(9):
            for k in range(4):
                assert y[0, 0, i, j, k] == x[0, 0, i // 3, j // 3, k // 3]
