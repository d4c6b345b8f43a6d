"""Teachers that follow a student as an exponential moving average."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from medssl.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of ``student`` that shares no storage and takes no gradient."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move ``teacher`` towards ``student``: ``t <- momentum * t + (1 - momentum) * s``.

    Parameters and floating-point buffers follow; buffers of whole numbers (counters) are copied.

    Args:
        teacher: Changed in place.
        student: Same structure as the teacher.
        momentum: Share of the teacher that stays, in [0, 1].

    Raises:
        ConfigError: if the two do not hold the same tensors.
    """
    target, source = teacher.state_dict(), student.state_dict()
    differing = sorted(target.keys() ^ source.keys()) or [n for n in target if target[n].shape != source[n].shape]
    if differing:
        raise ConfigError(
            f"teacher and student differ in {len(differing)} of {len(target)} tensors, first {differing[0]}; "
            "make the teacher with make_teacher(student)."
        )
    for name, value in target.items():
        if value.is_floating_point():
            value.lerp_(source[name].to(value.dtype), 1.0 - momentum)
        else:
            value.copy_(source[name])


def cosine_momentum(start: float, end: float, fraction: float) -> float:
    """Momentum that goes from ``start`` to ``end`` along half a cosine as ``fraction`` goes from 0 to 1.

    ``end - (end - start) * (cos(pi * fraction) + 1) / 2``

    Reference: Grill et al., BYOL, NeurIPS 2020, arXiv:2006.07733, appendix J.
    Deviations: the end need not be 1.
    """
    return end - (end - start) * (math.cos(math.pi * fraction) + 1.0) / 2.0
