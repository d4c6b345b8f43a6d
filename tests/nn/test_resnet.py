from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn

from medssl.errors import ConfigError
from medssl.nn.resnet import Config, FrozenBatchNorm, ResNetEncoder


def oracle(spatial_dims: int, block: str, stem_stride: int) -> ResNet:
    torch.manual_seed(0)
    network = ResNet(
        block, [1, 2, 1, 1], [8, 16, 32, 64], spatial_dims=spatial_dims, n_input_channels=2, conv1_t_stride=stem_stride
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def levels(network: ResNet, x: torch.Tensor) -> list[torch.Tensor]:
    """The forward pass of He et al., table 1, by MONAI's own layers."""
    h = network.act(network.bn1(network.conv1(x)))
    pyramid = [h.clone()]
    h = network.maxpool(h)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        h = stage(h)
        pyramid.append(h.clone())
    return pyramid


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("block", "stem_stride"), [("basic", 2), ("bottleneck", 1)])
def test_the_encoder_equals_monai_on_the_same_weights(spatial_dims: int, block: str, stem_stride: int) -> None:
    theirs = oracle(spatial_dims, block, stem_stride)
    config = Config(
        blocks=(1, 2, 1, 1),
        bottleneck=block == "bottleneck",
        width=8,
        stem_stride=stem_stride,
        shortcut_bias=True,
        norm="frozen_batch",
    )
    encoder = ResNetEncoder(config, in_channels=2, spatial_dims=spatial_dims).train()
    state = {
        key.replace("bn", "norm"): value
        for key, value in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    encoder.load_state_dict(state, strict=True)
    x = torch.randn(2, 2, *(45, 38, 33)[:spatial_dims])
    with torch.no_grad():
        for mine, reference in zip(encoder(x), levels(theirs, x), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_frozen_statistics_stay_and_scales_learn() -> None:
    layer = FrozenBatchNorm(3).train()
    before = layer.running_mean.clone()
    layer(torch.randn(4, 3, 5, 5) + 7).sum().backward()
    assert torch.equal(layer.running_mean, before)
    assert layer.weight.grad is not None


def test_fresh_weights_with_frozen_statistics_keep_the_scale_of_features() -> None:
    encoder = ResNetEncoder(
        Config(norm="frozen_batch", blocks=(3, 4, 6, 3), width=8), in_channels=1, spatial_dims=2
    ).eval()
    with torch.no_grad():
        assert max(level.std().item() for level in encoder(torch.randn(1, 1, 64, 64))) < 20


@pytest.mark.parametrize("blocks", [[2, 2], [2, 2, 0, 2]])
def test_an_impossible_config_is_refused(blocks: list[int]) -> None:
    with pytest.raises(ConfigError, match="4 numbers of at least 1"):
        Config.parse({"blocks": blocks})
