"""Powers of intensities, the same on every device to the last digits."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from medssl.augment.resample import compiled
from medssl.augment.threads import share

_STRIDE = 1 << 14


def power(
    x: Float[Tensor, "b c *s"],
    exponent: Float32[Tensor, " b"],
    *,
    low: Float[Tensor, "b c *ones"],
    high: Float[Tensor, "b c *ones"],
) -> Float[Tensor, "b c *s"]:
    """Give ``low + range * ((x - low) / range) ** exponent``; a constant channel stays as it is.

    Args:
        x: Images.
        exponent: Above 0, for each sample, on the CPU.
        low: Least value of each sample and channel.
        high: Greatest value.
    """
    kernels = compiled()
    if x.device.type != "cpu" or kernels is None:
        span = torch.where(high > low, high - low, 1.0)
        wide = exponent.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
        return ((x - low) / span).clamp_(0, 1).pow_(wide).mul_(span).add_(low)
    rows = x.detach().contiguous().numpy().reshape(x.shape[0] * x.shape[1], -1)
    out = torch.empty(x.shape)
    target = out.numpy().reshape(rows.shape)
    least, greatest = low.numpy().reshape(-1), high.numpy().reshape(-1)
    width = np.where(greatest > least, greatest - least, np.float32(1.0))
    powers = exponent.numpy().astype(np.float32).repeat(x.shape[1])

    def work(start: int, stop: int) -> None:
        kernels.power_blocks(rows, least, width, powers, target, start, stop)

    share(work, len(rows) * -(-rows.shape[1] // _STRIDE), voxels=rows.size)
    return out
