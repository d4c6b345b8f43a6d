"""Products of matrices that are as exact on every device."""

from __future__ import annotations

import torch
from jaxtyping import Complex64, Float32
from torch import Tensor


def product(
    a: Float32[Tensor, "*b m k"] | Complex64[Tensor, "*b m k"],
    b: Float32[Tensor, "*b k n"] | Complex64[Tensor, "*b k n"],
) -> Float32[Tensor, "*b m n"] | Complex64[Tensor, "*b m n"]:
    """Give ``a @ b`` to about 1e-6 of the factors, also where the device rounds them to 11 bits (TF32).

    TF32 may be on by an environment variable, as in NVIDIA's containers, and a switch here would also change a training
    step in another thread. So each factor is split in two, and the parts are multiplied apart.
    """
    if a.device.type == "cpu":
        return a @ b
    high_a, high_b = _rounded(a), _rounded(b)
    out: Tensor = high_a @ high_b
    return out.add_((a - high_a) @ high_b).add_(a @ (b - high_b))


def _rounded(x: Tensor) -> Tensor:
    """To 8 bits, which TF32 holds."""
    if x.is_complex():
        return torch.view_as_complex(torch.view_as_real(x).bfloat16().float())
    return x.bfloat16().float()
