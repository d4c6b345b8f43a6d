from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from medssl.errors import ConfigError
from medssl.nn.swin import Config, SwinEncoder


@pytest.mark.parametrize("use_v2", [True, False])
def test_the_encoder_loads_swinunetr_weights_by_name_and_gives_the_same_features(use_v2: bool) -> None:
    torch.manual_seed(0)
    oracle = SwinTransformer(
        in_chans=1,
        embed_dim=12,
        window_size=(4, 4, 4),
        patch_size=(2, 2, 2),
        depths=(1, 1, 1, 1),
        num_heads=(3, 6, 12, 24),
        spatial_dims=3,
        use_v2=use_v2,
    ).eval()
    config = Config(embed=12, depths=(1, 1, 1, 1), use_v2=use_v2)
    encoder = SwinEncoder(config, in_channels=1, spatial_dims=3).eval()
    encoder.swin.load_state_dict(oracle.state_dict(), strict=True)
    x = torch.randn(1, 1, 33, 34, 35)
    with torch.no_grad():
        for mine, reference in zip(encoder(x), oracle(x), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def test_one_voxel_at_the_deepest_level_trains_where_torchs_instance_norm_refuses() -> None:
    encoder = SwinEncoder(Config(embed=12, depths=(1, 1, 1, 1)), in_channels=1, spatial_dims=3).train()
    pyramid = encoder(torch.randn(1, 1, 16, 16, 16))
    assert pyramid[-1].shape == (1, 192, 1, 1, 1)
    assert pyramid[-1].isfinite().all()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"depths": [2, 2]}, "4 of each"),
        ({"depths": [2, 2, 0, 2]}, "at least 1"),
        ({"embed": 16}, "do not divide into 3 heads"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_an_impossible_config_is_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(mapping)
