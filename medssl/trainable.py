"""All that the training loop knows of a method or a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

_GEOMETRY = ("_to_box", "_spacing_mm", "_extent", "_affine")


@dataclass(frozen=True)
class Batch:
    """Named tensors of ``b`` samples, with the seed and the case of each.

    Args:
        tensors: Every tensor has the batch as its first axis.
        seeds: One number a sample, a pure function of (run seed, global sample number); augmentations draw from it.
        case_ids: Where each sample comes from, for error messages.
        notes: Numbers only to look at, one a sample, whose means go to the journal.
    """

    tensors: Mapping[str, Tensor]
    seeds: Int64[Tensor, " b"]
    case_ids: tuple[str, ...]
    notes: Mapping[str, Shaped[Tensor, " b"]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.case_ids)

    def with_tensors(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Tensor] | None = None) -> Batch:
        """The same samples with other tensors, and with further notes."""
        return Batch(tensors, self.seeds, self.case_ids, {**self.notes, **(notes or {})})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``, every tensor in its own type.

        Seeds, notes and geometry (``*_to_box``, ``*_spacing_mm``, ``*_extent``, ``*_affine``) stay on the CPU, where
        all draws are made.
        """
        return self.with_tensors(
            {
                name: tensor if name.endswith(_GEOMETRY) else tensor.to(device, non_blocking=True)
                for name, tensor in self.tensors.items()
            }
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a CUDA device runs beside the computation."""
        return self.with_tensors({name: tensor.pin_memory() for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Losses:
    """What a forward pass returns: the loss to descend, its named terms, and numbers only to look at.

    Args:
        total: Scalar with gradient.
        parts: The terms that ``total`` is made of, scalars.
        monitors: Scalars without gradient, such as a correlation or an accuracy.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    monitors: Mapping[str, Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Everything as plain numbers, for the journal."""
        named = {"loss": self.total, **self.parts, **self.monitors}
        return {name: float(value.detach()) for name, value in named.items()}


@dataclass(frozen=True)
class Progress:
    """Where the run stands: ``step`` of ``total_steps`` (the step about to be taken, or just taken)."""

    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(1, self.total_steps)


@dataclass
class ParamGroup:
    """Parameters that share a learning-rate factor and a weight-decay factor.

    Args:
        name: For the journal.
        params: Trainable parameters.
        lr_scale: Factor on the scheduled learning rate.
        weight_decay_scale: Factor on the weight decay; 0 for biases and norms.
    """

    name: str
    params: list[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0


class Trainable(nn.Module, ABC):
    """What the loop trains: a pretraining method or a fine-tuning task.

    Attributes:
        chance_monitor: Which of ``Losses.scalars()`` :meth:`chance_level` speaks of.
        unused_parameters: Whether parameters of :meth:`param_groups` get no gradient in some steps.
    """

    chance_monitor: ClassVar[str] = "loss"
    unused_parameters: bool = False

    def prepare(self, batch: Batch, *, training: bool) -> Batch:  # noqa: ARG002  by default nothing is augmented
        """Augment a batch on its device, without gradients; what :meth:`forward` is given.

        The loop calls it ahead of the step, from another thread and perhaps on another CUDA stream. It must be a pure
        function of its two arguments: it reads no weight, no mode and no global random number, and leaves the tensors
        of ``batch`` as they are.

        Args:
            batch: As it comes from the loader.
            training: False asks for only what is not random, such as a HU window.
        """
        return batch

    @abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """Losses of one batch that :meth:`prepare` has made."""

    def param_groups(self) -> list[ParamGroup]:
        """Trainable parameters, each once; by default matrices with weight decay, vectors without."""
        return split_decay("all", [p for p in self.parameters() if p.requires_grad])

    def before_step(self, progress: Progress) -> None:
        """Called before each optimiser step; schedules of the method's own go here."""

    def after_step(self, progress: Progress) -> None:
        """Called after each optimiser step; teachers follow here."""

    def chance_level(self) -> float | None:
        """``chance_monitor`` of a network that has learned nothing, or None where there is no such constant."""
        return None


def split_decay(name: str, params: list[nn.Parameter], *, lr_scale: float = 1.0) -> list[ParamGroup]:
    """Groups with weight decay for matrices and kernels, and without it for biases, norms and tokens."""
    groups = [
        ParamGroup(f"{name}/decay", [p for p in params if p.ndim > 1], lr_scale, 1.0),
        ParamGroup(f"{name}/no_decay", [p for p in params if p.ndim <= 1], lr_scale, 0.0),
    ]
    return [group for group in groups if group.params]
