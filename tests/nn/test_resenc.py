"""The residual encoder of nnU-Net beside the authors' forward pass, retyped with torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.backbone import build_backbone
from medssl.nn.resenc import Config, ResEncEncoder

SMALL = {"channels": (4, 8, 8), "strides": (1, 2, 2), "blocks": (1, 2, 1)}


def encoder(spatial_dims: int, **options: object) -> ResEncEncoder:
    torch.manual_seed(0)
    net = ResEncEncoder(Config.parse({**SMALL, **options}), in_channels=2, spatial_dims=spatial_dims)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def conv_norm(state: dict[str, Tensor], name: str, x: Tensor, *, stride: int = 1) -> Tensor:
    """``ConvDropoutNormReLU`` of dynamic-network-architectures 0.4, without dropout and rectifier."""
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    kernel = state[f"{name}.conv.weight"]
    h = convolve(x, kernel, state.get(f"{name}.conv.bias"), stride=stride, padding=kernel.shape[-1] // 2)
    return F.instance_norm(h, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"], eps=1e-5)


def authors_forward(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """``ResidualEncoder`` with ``BasicBlockD``: the skip is average pooling, then a 1x1 convolution if it must."""
    pool = F.avg_pool3d if x.ndim == 5 else F.avg_pool2d
    x = F.leaky_relu(conv_norm(state, "stem", x), 0.01)
    pyramid = []
    for stage, (stride, count) in enumerate(zip(SMALL["strides"], SMALL["blocks"], strict=True)):
        for block in range(count):
            name, step = f"stages.{stage}.{block}", stride if block == 0 else 1
            residual = pool(x, step, step) if step > 1 else x
            if f"{name}.shortcut.conv.weight" in state:
                residual = conv_norm(state, f"{name}.shortcut", residual)
            h = F.leaky_relu(conv_norm(state, f"{name}.conv1", x, stride=step), 0.01)
            x = F.leaky_relu(conv_norm(state, f"{name}.conv2", h) + residual, 0.01)
        pyramid.append(x)
    return pyramid


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_features_are_those_of_the_published_network(spatial_dims: int, bias: bool) -> None:
    net = encoder(spatial_dims, bias=bias)
    x = torch.randn(2, 2, *[8] * spatial_dims)
    for mine, theirs in zip(net(x), authors_forward(net.state_dict(), x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_the_default_is_the_large_preset() -> None:
    config = Config()
    assert config.channels == (32, 64, 128, 256, 320, 320)
    assert config.blocks == (1, 3, 4, 6, 6, 6)
    with torch.device("meta"):
        net = build_backbone({"name": "resenc"}, in_channels=1, spatial_dims=3)
    assert net.strides == (1, 2, 4, 8, 16, 32)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 90


def test_a_stem_may_have_its_own_width_and_other_norms() -> None:
    net = encoder(3, stem_channels=6, norm="group")
    assert net.get_parameter("stem.conv.weight").shape[0] == 6
    assert "stages.0.0.shortcut.conv.weight" in net.state_dict()
    with torch.no_grad():
        assert all(level.isfinite().all() for level in net(torch.randn(1, 2, 1, 1, 1)))


@pytest.mark.parametrize(
    "options", [{"blocks": [1, 1]}, {"channels": []}, {"channels": [4, 0, 4]}, {"blocks": [1, 0, 1]}]
)
def test_an_impossible_shape_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"stage|at least 1"):
        Config.parse({**SMALL, **options})
