"""Linear interpolation by matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medssl.nn.blocks import halve, norm
from medssl.nn.resize import cut, resize_linear


@pytest.mark.parametrize(
    ("shape", "target", "mode"),
    [
        ((5, 7), (9, 3), "bilinear"),
        ((1, 4), (3, 1), "bilinear"),
        ((3, 4, 5), (6, 2, 5), "trilinear"),
        ((2, 2, 2), (7, 5, 3), "trilinear"),
    ],
)
def test_it_is_the_interpolation_of_torch(shape: tuple[int, ...], target: tuple[int, ...], mode: str) -> None:
    x = torch.randn(2, 3, *shape)
    expected = F.interpolate(x, size=target, mode=mode, align_corners=False)
    torch.testing.assert_close(resize_linear(x, target), expected)


def test_the_same_size_is_the_same_tensor() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert resize_linear(x, (3, 4)) is x
    assert cut(x, (3, 4)) is x


def test_cutting_keeps_the_first_voxels() -> None:
    x = torch.arange(24.0).view(1, 1, 4, 6)
    assert torch.equal(cut(x, (2, 6)), x[:, :, :2])


@pytest.mark.parametrize("shape", [(4, 6), (6, 2, 4)])
def test_halving_even_sizes_is_average_pooling(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *shape)
    pool = F.avg_pool2d if len(shape) == 2 else F.avg_pool3d
    torch.testing.assert_close(halve(x), pool(x, 2))


def test_halving_an_odd_size_averages_what_there_is() -> None:
    x = torch.tensor([[[[1.0, 2.0, 4.0], [3.0, 4.0, 8.0], [5.0, 7.0, 9.0]]]])
    expected = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(halve(x), expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_instance_norm_is_that_of_torch_and_gives_its_shift_on_one_voxel(spatial_dims: int) -> None:
    layer = norm("instance", 4)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, *[3] * spatial_dims)
    expected = F.instance_norm(x, weight=layer.weight, bias=layer.bias)
    torch.testing.assert_close(layer(x), expected)
    single = torch.randn(1, 4, *[1] * spatial_dims, requires_grad=True)
    out = layer(single)
    assert torch.equal(out.flatten(), layer.bias)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
