"""Keep bfloat16 convolutions on the CPU away from shapes for which the backend returns garbage.

Measured with torch 2.13 (oneDNN) on a CPU with ``avx512_bf16``: where the first spatial axis of the input is shorter
than the kernel, the gradient of the kernel is partly read from memory that nobody wrote: NaN, or finite and wrong by
any factor. Forward pass, input gradient and float32 are right. The deepest level of a network on small crops is such
a place. ``benchmarks/bf16_small_convolutions.py`` shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def guard_convolutions(module: nn.Module) -> None:
    """Let every plain convolution in ``module`` run such inputs in float32; names and weights stay as they are."""
    for child in module.modules():
        if type(child) is nn.Conv2d:
            child.__class__ = _GuardedConv2d
        elif type(child) is nn.Conv3d:
            child.__class__ = _GuardedConv3d


class _GuardedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        if _is_unsafe(input, self.kernel_size):
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


class _GuardedConv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        if _is_unsafe(input, self.kernel_size):
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


def _is_unsafe(x: Tensor, kernel_size: tuple[int, ...]) -> bool:
    return x.device.type == "cpu" and x.shape[2] < kernel_size[0] and torch.is_autocast_enabled("cpu")
