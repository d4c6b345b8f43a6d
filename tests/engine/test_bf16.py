from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medssl.engine.bf16 import guard_convolutions


@pytest.mark.parametrize(("shape", "kernel"), [((2, 4, 4), 3), ((2, 2, 2), 3), ((3, 4, 4), 5), ((1, 4, 4), 2)])
def test_the_kernel_gradient_of_a_thin_input_is_right_in_bf16(shape, kernel):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv3d(16, 16, kernel, padding=kernel // 2, bias=False)
    guard_convolutions(conv)
    x = torch.randn(4, 16, *shape, generator=generator)
    exact = conv.weight.detach().double().requires_grad_()
    output = F.conv3d(x.double(), exact, padding=kernel // 2)
    direction = torch.randn(output.shape, generator=generator)
    output.backward(direction.double())
    for _ in range(5):
        rubbish = [torch.full((1 << power,), float("nan")) for power in (12, 16, 18, 20)]
        del rubbish  # freed memory full of NaN, which a kernel that reads what nobody wrote would find
        conv.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x)
        y.backward(direction.to(y.dtype))
        torch.testing.assert_close(
            conv.weight.grad.double(), exact.grad, rtol=0.02, atol=0.02 * float(exact.grad.abs().max())
        )


def test_a_guarded_network_keeps_names_weights_and_bf16_elsewhere():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    before = copy.deepcopy(net)
    guard_convolutions(net)
    assert net.state_dict().keys() == before.state_dict().keys()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(torch.ones(1, 1, 8, 8)).dtype == torch.bfloat16
        assert net(torch.ones(1, 1, 2, 8)).dtype == torch.float32
    x = torch.ones(1, 1, 2, 8)
    torch.testing.assert_close(net(x), before(x))
