from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SegResNet

from medssl.errors import ConfigError
from medssl.nn.segresnet import Config, SegResNetEncoder


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_encoder_equals_monai_on_the_same_weights(spatial_dims: int) -> None:
    torch.manual_seed(0)
    oracle = SegResNet(
        spatial_dims=spatial_dims, init_filters=8, in_channels=2, blocks_down=(1, 2, 1), blocks_up=(1, 1)
    ).eval()
    encoder = SegResNetEncoder(
        Config(channels=(8, 16, 32), blocks=(1, 2, 1)), in_channels=2, spatial_dims=spatial_dims
    ).eval()
    theirs = [value for key, value in oracle.state_dict().items() if key.startswith(("convInit", "down_layers"))]
    ours = encoder.state_dict()
    assert [value.shape for value in theirs] == [value.shape for value in ours.values()]
    encoder.load_state_dict(dict(zip(ours, theirs, strict=True)))
    x = torch.randn(2, 2, *(11, 8, 6)[:spatial_dims])
    with torch.no_grad():
        for mine, reference in zip(encoder(x), oracle.encode(x)[1], strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"channels": [16], "blocks": [1, 1]}, "one number a level"),
        ({"channels": [12], "blocks": [1]}, "multiples of 8"),
        ({"channels": [16], "blocks": [0]}, "at least 1"),
    ],
)
def test_an_impossible_config_is_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(mapping)
