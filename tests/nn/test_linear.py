"""The linear decoder: a linear map of interpolated features, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medssl.nn.decoder import Decoder
from medssl.nn.linear import LinearDecoder, build_decoder


@pytest.mark.parametrize(("shape", "mode"), [((8, 12), "bilinear"), ((8, 4, 12), "trilinear")])
def test_it_is_one_linear_map_of_the_concatenated_interpolated_features(shape: tuple[int, ...], mode: str) -> None:
    torch.manual_seed(0)
    dims = len(shape)
    decoder = LinearDecoder([3, 5], [2, 4], dims, 4)
    features = [torch.randn(2, width, *[n // s for n in shape]) for width, s in ((3, 2), (5, 4))]
    normal = [F.group_norm(f, 1) for f in features]
    wide = torch.cat([F.interpolate(f, size=shape, mode=mode, align_corners=False) for f in normal], dim=1)
    weight = torch.cat([head.weight.flatten(1) for head in decoder.heads], dim=1)
    expected = torch.einsum("kc,bc...->bk...", weight, wide) + decoder.heads[0].bias.view(-1, *[1] * dims)
    (logits,) = decoder(features, torch.zeros(2, 1, *shape))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert decoder.output_strides == (1,)


def test_an_odd_image_gets_scores_of_its_own_size() -> None:
    decoder = LinearDecoder([3], [4], 2, 2)
    (logits,) = decoder([torch.randn(1, 3, 2, 3)], torch.zeros(1, 1, 7, 9))
    assert logits.shape == (1, 2, 7, 9)


def test_the_config_of_either_decoder_builds_it_again() -> None:
    for decoder in (LinearDecoder([3, 5], [2, 4], 3, 4), Decoder([3, 5], [2, 4], 3, 4)):
        again = build_decoder(decoder.config)
        assert type(again) is type(decoder)
        again.load_state_dict(decoder.state_dict(), strict=True)
        assert again.config == decoder.config
