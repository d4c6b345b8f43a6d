"""What a training step costs on this machine: seconds and bytes, measured at two sizes and drawn out as a line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medssl.data.loader import fixed_batches
from medssl.data.store import StoredCase
from medssl.engine.bf16 import guard_convolutions
from medssl.engine.device import resolve_precision, use_channels_last
from medssl.tasks.base import Task
from medssl.trainable import Batch

_BYTES_A_PARAMETER = 20  # weights, gradients, two moments of AdamW, and their running average, in float32
_TEMPORARIES = 1.5  # gradients of activations and the backend's work space, over what is kept for the backward pass
_MOST_TIMED = 5
_ENOUGH_SECONDS = 4.0
_BASE_BYTES = 600 << 20  # Python, torch and its libraries


@dataclass(frozen=True)
class Cost:
    """One training step.

    Args:
        voxels: Of the whole batch.
        seconds: Cutting and augmenting the batch, forward and backward pass.
        kept_bytes: Tensors kept for the backward pass.
        parameters: Of network and decoder.
    """

    voxels: int
    seconds: float
    kept_bytes: int
    parameters: int


@dataclass(frozen=True)
class CostModel:
    """Straight lines through two measured steps.

    Args:
        small: The smaller step.
        large: The larger step.
    """

    small: Cost
    large: Cost

    def seconds(self, voxels: int) -> float:
        """Expected duration of a step on a batch of so many voxels; never less than in proportion to the large one."""
        line = self._line(self.small.seconds, self.large.seconds, voxels)
        return max(line, self.large.seconds * min(1.0, voxels / self.large.voxels))

    def gib(self, voxels: int) -> float:
        """Expected memory of training on batches of so many voxels, the process itself included."""
        kept = max(self._line(self.small.kept_bytes, self.large.kept_bytes, voxels), 0.0)
        return (_BASE_BYTES + _BYTES_A_PARAMETER * self.large.parameters + _TEMPORARIES * kept) / 2**30

    def _line(self, low: float, high: float, voxels: int) -> float:
        if self.large.voxels == self.small.voxels:
            return high * voxels / self.large.voxels
        slope = (high - low) / (self.large.voxels - self.small.voxels)
        return high + max(slope, 0.0) * (voxels - self.large.voxels)


def measure_step(task: Task[Any], cases: Sequence[StoredCase], *, batch_size: int, seed: int) -> Cost:
    """Take up to six steps of ``task`` on crops of real cases, in the precision of training.

    The first, which compiles kernels and fills caches, is not counted, and of the others the quickest is: whatever else
    a machine does makes a step slower and never quicker.

    Args:
        task: Its parameters get gradients and stay as they are otherwise.
        cases: Labelled cases.
        batch_size: Crops a step.
        seed: Of the crops.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task.to(device).train()
    use_channels_last(task)
    if device == "cpu":
        guard_convolutions(task)
    sampler, spatial_dims = task.view_sampler(), task.encoder.spatial_dims
    timed: list[float] = []
    kept = voxels = 0
    began = time.perf_counter()
    while len(timed) < 2 or (len(timed) <= _MOST_TIMED and time.perf_counter() - began < _ENOUGH_SECONDS):
        started = time.perf_counter()
        batch = fixed_batches(cases, sampler, count=1, batch_size=batch_size, seed=seed, spatial_dims=spatial_dims)[
            0
        ].to(device)
        with torch.no_grad():
            batch = task.prepare(batch, training=True)
        kept = _step(task, batch, device=device)
        timed.append(time.perf_counter() - started)
        voxels = batch["image"][:, 0].numel()
    return Cost(voxels, min(timed[1:]), kept, sum(parameter.numel() for parameter in task.parameters()))


def _step(task: Task[Any], batch: Batch, *, device: str) -> int:
    """Forward and backward pass; give the bytes that were kept between them."""
    own = {parameter.data_ptr() for parameter in task.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_bf16 = resolve_precision("auto", device=device) == "bf16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=is_bf16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = task(batch)
        losses.total.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    for parameter in task.parameters():
        parameter.grad = None
    return sum(kept.values())
