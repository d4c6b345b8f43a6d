"""Random fields that are the same to the bit on every device, and smooth fields from small grids.

Number ``n`` of a sample is a pure function of the sample's seed and of ``n``: a hash of both, and for normal numbers a
table of quantiles. Nothing is drawn in sequence, so nothing has to cross from the CPU to the device.

Reference: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from medssl.augment.base import finalise
from medssl.augment.resample import compiled
from medssl.augment.threads import share
from medssl.errors import ConfigError

_LEVELS = 1 << 16
_NORMAL, _UNIFORM = 1, 2  # streams of a seed


def normal_field(
    seeds: Int64[Tensor, " b"], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float32[Tensor, "b c *s"]:
    """Give standard normal numbers, 65536 different ones, the greatest 4.17.

    Args:
        seeds: One number a sample, on the CPU.
        shape: Channels and voxels of a sample.
        device: Where to compute.
    """
    device = torch.device(device)
    if device.type == "cpu" and compiled() is not None:
        return add_normal(torch.zeros((len(seeds), *shape)), seeds, torch.ones(len(seeds)))
    lanes = _lanes(_bases(seeds, _NORMAL), shape, 4, device)
    return _quantiles(device)[lanes].reshape(len(seeds), *shape)


def add_normal(
    x: Float32[Tensor, "b c *s"], seeds: Int64[Tensor, " b"], sigma: Float32[Tensor, " b"]
) -> Float32[Tensor, "b c *s"]:
    """Give ``x + sigma * normal_field``, on the CPU in one pass.

    Args:
        x: Images.
        seeds: One number a sample, on the CPU.
        sigma: Standard deviation for each sample.
    """
    kernels = compiled()
    if x.device.type != "cpu" or kernels is None:
        wide = sigma.to(x.device, torch.float32, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
        return x + wide * normal_field(seeds, x.shape[1:], x.device)
    bases, table = _bases(seeds, _NORMAL).numpy().view(np.uint64), _quantiles(x.device).numpy()
    rows, strength = x.detach().contiguous().numpy().reshape(len(x), -1), sigma.float().contiguous().numpy()
    out = torch.empty(x.shape)
    target = out.numpy().reshape(rows.shape)

    def work(start: int, stop: int) -> None:
        kernels.add_normal_blocks(rows, bases, strength, table, target, start, stop)

    share(work, len(rows) * -(-rows.shape[1] // 1024), voxels=rows.size)
    return out


def uniform_field(
    seeds: Int64[Tensor, " b"], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float32[Tensor, "b c *s"]:
    """Give numbers in [0, 1), evenly, in steps of 2^-24; independent of the normal numbers of the same seed.

    Args:
        seeds: One number a sample, on the CPU.
        shape: Channels and voxels of a sample.
        device: Where to compute.
    """
    device, kernels = torch.device(device), compiled()
    bases = _bases(seeds, _UNIFORM)
    if device.type != "cpu" or kernels is None:
        return ((_lanes(bases, shape, 2, device) >> 8).float() * 2.0**-24).reshape(len(seeds), *shape)
    out = torch.empty((len(seeds), *shape))
    target, state = out.view(len(seeds), -1).numpy(), bases.numpy().view(np.uint64)

    def work(start: int, stop: int) -> None:
        kernels.uniform_blocks(state, target, start, stop)

    share(work, len(target) * -(-target.shape[1] // 512), voxels=target.size)
    return out


def smooth_field(coefficients: Float32[Tensor, "b c *knots"], shape: Sequence[int]) -> Float32[Tensor, "b c *s"]:
    """Spread a small grid over a crop as a uniform cubic B-spline, whose first and last span end at the corners.

    ``f(u) = sum_k c_k B3(u - k + 3)`` along each axis, with ``u`` from 0 at the first to ``K - 3`` at the last voxel
    and ``B3`` the cubic B-spline on [0, 4] with unit knots. The field stays within the range of its coefficients.

    Args:
        coefficients: At least four along each axis.
        shape: Voxels of the crop.

    Raises:
        ConfigError: if an axis has fewer than four coefficients.
    """
    if min(coefficients.shape[2:]) < 4:
        raise ConfigError(
            f"smooth field: a grid of {tuple(coefficients.shape[2:])}; a cubic spline needs 4 along each axis. "
            "Give a finer grid."
        )
    field = coefficients
    for axis, num in reversed(list(enumerate(shape, start=2))):
        weights, first = _spline(num, field.shape[axis])
        if _multiplies(field.device):
            dense = torch.zeros(num, field.shape[axis], dtype=torch.float64)
            dense.scatter_(1, first[:, None] + torch.arange(4), weights)
            rows = field.reshape(len(field), -1, field.shape[axis], math.prod(field.shape[axis + 1 :]))
            operator = dense.to(field.dtype).expand(rows.shape[1], -1, -1)
            # sample by sample: the bits of a product of matrices depend on how many there are
            spread = torch.stack([torch.bmm(operator, sample) for sample in rows])
            field = spread.reshape(*field.shape[:axis], num, *field.shape[axis + 1 :])
            continue
        taps = weights.to(field.device, field.dtype, non_blocking=True).reshape(num, *[1] * (field.ndim - 1 - axis), 4)
        index = first.to(field.device, non_blocking=True)
        parts = [taps[..., tap] * field.index_select(axis, index + tap) for tap in range(4)]
        field = (parts[0] + parts[1]) + (parts[2] + parts[3])
    return field.contiguous()


def _multiplies(device: torch.device) -> bool:
    """Whether a product of matrices is safe: other devices may round its factors to 10 bits."""
    return device.type == "cpu"


def _spline(num: int, knots: int) -> tuple[Float64[Tensor, "n 4"], Int64[Tensor, " n"]]:
    """Weights of the four coefficients that each voxel sees, and the first of them."""
    place = torch.arange(num, dtype=torch.float64) * (knots - 3) / max(num - 1, 1)
    first = place.long().clamp(max=knots - 4)
    t = place - first
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return torch.stack(weights, dim=1) / 6, first


def _lanes(
    bases: Int64[Tensor, " b"], shape: Sequence[int], per_hash: int, device: torch.device
) -> Int64[Tensor, "b n"]:
    """What the kernels give, in torch: the parts of one 64-bit hash after another."""
    num, bits = int(np.prod(shape)), 64 // per_hash
    count = torch.arange(1, -(-num // per_hash) + 1, device=device)
    value = _hash(bases.to(device, non_blocking=True)[:, None] + count * _signed(0x9E3779B97F4A7C15))
    shifts = torch.arange(per_hash, device=device) * bits
    return (value[..., None] >> shifts & (1 << bits) - 1).flatten(1)[:, :num]


def _bases(seeds: Int64[Tensor, " b"], stream: int) -> Int64[Tensor, " b"]:
    """Scrambled seeds, different for each stream; as plain numbers, for each call of torch costs more than all."""
    scrambled = [finalise(finalise(seed + 0x9E3779B97F4A7C15) + stream) for seed in seeds.tolist()]
    return torch.tensor([_signed(number) for number in scrambled], dtype=torch.int64)


def _hash(value: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """The finaliser of SplitMix64 in signed numbers, which wrap as unsigned ones do."""
    value = (value ^ _right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _right(value, 31)


def _right(value: Int64[Tensor, "*n"], bits: int) -> Int64[Tensor, "*n"]:
    """Shift without the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


@functools.cache
def _quantiles(device: torch.device) -> Float32[Tensor, " n"]:
    """``Phi^-1((i + 0.5) / 65536)``; made on the CPU, so that every device has the same bits."""
    middle = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    quantiles: Tensor = torch.special.ndtri(middle)
    return quantiles.float().to(device)
