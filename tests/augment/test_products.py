from __future__ import annotations

import pytest
import torch
from second_device import SecondDevice

from medssl.augment.products import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_product_is_exact_where_the_device_rounds_factors_to_eleven_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 9, 9, dtype=dtype, generator=generator).mT for _ in range(2))
    exact = torch.stack(
        [
            torch.stack([sum(x[i, k] * y[k] for k in range(9)) for i in range(9)])
            for x, y in zip(a.cdouble(), b.cdouble(), strict=True)
        ]
    )
    with SecondDevice() as device:
        there = device.put(a), device.put(b)
        found, rounded = device.take(product(*there)), device.take(there[0] @ there[1])
    assert (rounded - exact).abs().max() > 5e-4
    assert (found - exact).abs().max() < 2e-5
    torch.testing.assert_close(product(a, b), a @ b, rtol=0, atol=0)
