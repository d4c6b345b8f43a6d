"""What a run of the loop is told, and the optimiser, learning rate and weight average that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from medssl.config import Config
from medssl.trainable import ParamGroup

_POLY_POWER = 0.9


class TrainConfig(Config):
    """How long, how fast and on what to train; the same for pretraining and fine-tuning.

    Args:
        steps: Optimiser steps of the whole run.
        batch_size: Samples of one micro batch on one device.
        accumulate: Micro batches whose gradients are averaged into one optimiser step.
        optimizer: AdamW, or SGD with Nesterov momentum.
        lr: Peak learning rate.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        momentum: Of SGD.
        betas: Of AdamW.
        schedule: Half a cosine, ``(1 - t) ** 0.9``, or flat, after the warm-up.
        warmup_steps: Steps of linear warm-up.
        final_lr_share: Share of ``lr`` that the schedule ends at, in [0, 1].
        clip_norm: Largest gradient norm; None leaves gradients as they are.
        precision: Autocast type; ``auto`` takes bf16 where the hardware has it, and 32 elsewhere.
        compile: Compile the trainable's child modules with ``torch.compile``.
        channels_last: Keep convolution kernels in channels-last memory.
        average_weights: Decay of an exponential moving average of the weights, in [0, 1), which is what is checked and
            exported; 0 keeps none.
        checkpoint_every: Steps between two checkpoints; the last step is always saved.
        keep_checkpoints: Generations of checkpoints that stay on the disk.
        check_every: Steps between two runs of the held-out checks; the start and the last step are always checked.
        log_every: Steps between two lines of the journal.
        num_workers: Processes that load data; 0 loads in the training process.
        prefetch: Load and augment the next batches, in a thread, while a step is taken; the bits are the same without.
        devices: Devices, and so processes, to train on.
        strategy: Lightning Fabric's name of the way to use several devices.
        tensorboard: Also write TensorBoard files.
        stop_on_collapse: End the run when a check finds collapsed features; a warning otherwise.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 4
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    compile: bool = False
    channels_last: bool = False
    average_weights: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 3
    check_every: PositiveInt = 500
    log_every: PositiveInt = 50
    num_workers: int = Field(default=0, ge=0)
    keep_mib: int | None = Field(default=None, ge=0)
    prefetch: bool = True
    devices: PositiveInt = 1
    strategy: str = "auto"
    tensorboard: bool = False
    stop_on_collapse: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; give it at most steps, as with "
                "--set train.warmup_steps=0"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; give two numbers in [0, 1)")
        return self


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of ``step`` (counted from 0): a pure function, so that nothing about it need be saved.

    In the warm-up ``lr * (step + 1) / warmup_steps``; after it, with ``t`` running from 0 at its end to 1 at
    ``steps``, ``lr * (f + (1 - f) * shape(t))`` where ``f`` is ``final_lr_share``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    t = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    shape = 0.5 * (1.0 + math.cos(math.pi * t)) if config.schedule == "cosine" else max(0.0, 1.0 - t) ** _POLY_POWER
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * shape)


def build_optimizer(groups: Sequence[ParamGroup], config: TrainConfig, *, fused: bool = True) -> Optimizer:
    """AdamW or SGD over ``groups``, each with its share of learning rate and weight decay.

    Args:
        groups: Parameters, each once.
        config: Names the optimiser and its numbers.
        fused: One kernel for the whole step, which can also skip a step on the device when ``found_inf`` is set;
            off for fp16, whose gradient scaler does the skipping.

    Raises:
        ValueError: if there is nothing to train, or a parameter is in two groups.
    """
    settings: list[dict[str, Any]] = [
        {
            "params": group.params,
            "name": group.name,
            "lr_scale": group.lr_scale,
            "weight_decay": config.weight_decay * group.weight_decay_scale,
        }
        for group in groups
        if group.params
    ]
    if not settings:
        raise ValueError("param_groups() is empty; a trainable needs at least one parameter that requires a gradient.")
    if config.optimizer == "adamw":
        return AdamW(settings, lr=config.lr, betas=config.betas, fused=fused)
    optimizer = SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    if config.momentum > 0:
        # zeros give the same first step, and spare torch's fused kernel its uninitialised first buffer on a skip
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class WeightAverage:
    """Exponential moving average of a module's parameters, for export.

    ``average <- d * average + (1 - d) * weight`` with ``d = min(decay, (1 + n) / (10 + n))`` at the ``n``-th
    update, so that the random start is forgotten early. Buffers are not averaged.

    Args:
        module: What to follow, on its device; the average starts as a copy of it.
        decay: In (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self._names = [name for name, _ in module.named_parameters()]
        self._followed = [parameter.detach() for parameter in module.parameters()]
        self._average = [parameter.clone() for parameter in self._followed]

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move the average one step; ``count`` is the number of updates before this one."""
        decay = min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(self._average, self._followed, 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """State that the module loads strictly: averaged parameters, and its present buffers."""
        return {**self._module.state_dict(), **dict(zip(self._names, self._average, strict=True))}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the module's place for a while; the module has its own weights back after, bit for bit."""
        own = [parameter.clone() for parameter in self._followed]
        torch._foreach_copy_(self._followed, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._followed, own)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for name, value in zip(self._names, self._average, strict=True):
            value.copy_(state[name])
