from __future__ import annotations

import pytest
import torch
from torch import nn

from medssl.nn.heads import Projector, ReconstructionHead, pool_pyramid


def test_pooling_is_the_mean_over_space_of_every_level_finest_first() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 2, 1, 2, generator=generator)]
    pooled = pool_pyramid(levels)
    assert pooled.shape == (2, 5)
    for sample in range(2):
        expected = [
            float(level[sample, c].flatten().double().mean()) for level in levels for c in range(level.shape[1])
        ]
        assert pooled[sample].tolist() == pytest.approx(expected, abs=1e-6)


def test_pooling_is_float32_whatever_the_features() -> None:
    feature = torch.full((1, 2, 30, 30, 30), 1.0, dtype=torch.bfloat16)
    pooled = pool_pyramid([feature])
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_projector_has_the_asked_layers_and_ends_in_a_bare_linear(layers: int) -> None:
    projector = Projector(6, 8, 4, layers=layers)
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert [linear.out_features for linear in linears] == [8] * (layers - 1) + [4]
    assert isinstance(list(projector.modules())[-1], nn.Linear)
    assert projector(torch.zeros(3, 6)).shape == (3, 4)


def test_a_projector_with_layer_norm_treats_each_sample_alone() -> None:
    torch.manual_seed(0)
    projector, h = Projector(6, 8, 4), torch.randn(5, 6)
    torch.testing.assert_close(projector(h)[2:3], projector(h[2:3]))


def test_a_projector_with_batch_norm_uses_the_statistics_of_the_batch_in_evaluation_too() -> None:
    torch.manual_seed(0)
    projector, h = Projector(6, 8, 4, norm="batch").eval(), torch.randn(5, 6)
    assert not list(projector.buffers())
    state, expected = projector.state_dict(), h
    weights = [state[key] for key in state if key.endswith("weight")]
    biases = [state[key] for key in state if key.endswith("bias")]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        expected = expected @ weight.T + bias
        if i < 2:
            expected = (expected - expected.mean(0)) / (expected.var(0, correction=0) + 1e-5).sqrt()
            expected = expected.clamp(min=0)
    torch.testing.assert_close(projector(h), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_reconstruction_head_puts_each_block_where_its_feature_stands(spatial_dims: int) -> None:
    torch.manual_seed(0)
    head = ReconstructionHead(5, 2, stride=2, spatial_dims=spatial_dims)
    grid, shape = (3, 2, 4)[:spatial_dims], (5, 4, 8)[:spatial_dims]
    feature = torch.randn(2, 5, *grid)
    voxels = head(feature, shape)
    assert voxels.shape == (2, 2, *shape)
    kernel = head.predict.weight.reshape(2, *[2] * spatial_dims, 5)
    bias = head.predict.bias
    assert bias is not None
    for index in torch.cartesian_prod(*[torch.arange(size) for size in shape]).tolist():
        for channel in range(2):
            weight = kernel[(channel, *(i % 2 for i in index))]
            value = feature[(0, slice(None), *(i // 2 for i in index))] @ weight
            offset = bias.reshape(2, *[2] * spatial_dims)[(channel, *(i % 2 for i in index))]
            torch.testing.assert_close(voxels[(0, channel, *index)], value + offset, atol=1e-5, rtol=1e-5)
