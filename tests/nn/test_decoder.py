from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.decoder import Decoder


def pyramid(channels: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [[math.ceil(size / stride) for size in shape] for stride in strides]
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize(
    ("channels", "strides"),
    [((5, 7, 9), (1, 2, 4)), ((16, 32), (2, 4)), ((6, 8), (4, 16)), ((6, 8, 8), (2, 4, 4)), ((8,), (2,)), ((8,), (1,))],
)
@pytest.mark.parametrize("shape", [(16, 12), (13, 9, 7), (3, 2, 1)])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_results_have_the_declared_sizes_for_any_pyramid(
    channels: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...], deep_supervision: bool
) -> None:
    decoder = Decoder(channels, strides, len(shape), 3, deep_supervision=deep_supervision, skip_image_channels=2)
    results = decoder(pyramid(channels, strides, shape), torch.zeros(2, 2, *shape))
    assert results[0].shape == (2, 3, *shape)
    assert len(results) == len(decoder.output_strides)
    assert len(results) == (max(1, len(channels) - 1 + (strides[0] > 1)) if deep_supervision else 1)
    for result, stride in zip(results, decoder.output_strides, strict=True):
        assert tuple(result.shape[2:]) == tuple(math.ceil(size / stride) for size in shape)


def test_the_full_resolution_step_is_one_convolution_over_features_and_image() -> None:
    torch.manual_seed(0)
    decoder = Decoder((6,), (2,), 3, 2, width=(4,), skip_image_channels=3)
    feature, image = torch.randn(2, 6, 3, 4, 2), torch.randn(2, 3, 5, 8, 4)
    state = decoder.state_dict()
    h = F.conv3d(feature, state["steps.0.narrow.0.weight"])
    h = F.leaky_relu(F.group_norm(h, 1, state["steps.0.narrow.1.weight"], state["steps.0.narrow.1.bias"]), 0.01)
    for axis in (2, 3, 4):
        h = h.repeat_interleave(2, dim=axis)
    h = torch.cat((h[:, :, :5], image), dim=1)
    kernel = torch.cat((state["steps.0.mix.weight"], state["steps.0.mix_image.weight"]), dim=1)
    h = F.leaky_relu(F.conv3d(h, kernel, state["steps.0.mix.bias"], padding=1), 0.01)
    expected = F.conv3d(h, state["heads.0.weight"], state["heads.0.bias"])
    torch.testing.assert_close(decoder([feature], image)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_image_reaches_the_result_only_where_it_is_asked_for() -> None:
    features = pyramid((4, 8), (2, 4), (8, 8))
    for skip in (0, 1):
        decoder = Decoder((4, 8), (2, 4), 2, 2, skip_image_channels=skip)
        image = torch.zeros(2, 1, 8, 8, requires_grad=True)
        gradient = torch.autograd.grad(decoder(features, image)[0].sum(), image, allow_unused=True)[0]
        assert (gradient is not None) == bool(skip)


def test_every_skip_reaches_the_result_and_every_parameter_gets_a_gradient() -> None:
    features = [level.requires_grad_() for level in pyramid((5, 7, 9), (1, 2, 4), (8, 12))]
    decoder = Decoder((5, 7, 9), (1, 2, 4), 2, 2, deep_supervision=True)
    sum(result.square().sum() for result in decoder(features, torch.zeros(2, 1, 8, 12))).backward()  # type: ignore[union-attr]
    assert all(level.grad is not None and level.grad.abs().sum() > 0 for level in features)
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_the_config_as_json_builds_the_same_decoder() -> None:
    decoder = Decoder(
        (4, 8), (2, 4), 3, 2, width=(6, 5), deep_supervision=True, skip_image_channels=1, norm_name="layer"
    )
    again = Decoder(**json.loads(json.dumps(decoder.config)))
    again.load_state_dict(decoder.state_dict(), strict=True)
    assert again.config == decoder.config


def test_mixed_precision_and_channels_last_give_about_the_same_result() -> None:
    torch.manual_seed(0)
    features, image = pyramid((8, 16), (2, 4), (12, 8, 12)), torch.randn(2, 1, 12, 8, 12)
    decoder = Decoder((8, 16), (2, 4), 3, 2, skip_image_channels=1)
    exact = decoder(features, image)[0]
    decoder = decoder.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder([level.bfloat16() for level in features], image)[0]
    assert (rough.float() - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("channels", "strides", "width", "message"),
    [
        ((4, 8), (2,), None, "2 channels, 1 strides"),
        ((4, 8), (2, 4), (8,), "takes 2 widths"),
        ((4, 8), (2, 3), None, "multiple of the one before"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    channels: tuple[int, ...], strides: tuple[int, ...], width: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(channels, strides, 3, 2, width=width)
