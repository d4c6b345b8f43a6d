"""Run a network over a whole volume, window by window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from medssl.errors import CaseError, CheckpointError, ConfigError

Axis = Literal["LR", "AP", "SI"]
Network = Callable[[Tensor], Tensor]

_LARGEST_OVERLAP = 0.9
_SMALLEST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Settings:
    """How a network is run over a volume.

    Args:
        overlap: Share by which neighbouring windows overlap, in [0, 0.9].
        mirror_axes: Anatomical axes to mirror at test time; scores of all mirrorings are averaged. Never mirror LR
            where left and right structures have labels of their own.
        batch: Windows in one forward pass.
        device: Where the network is.
    """

    overlap: float = 0.5
    mirror_axes: tuple[Axis, ...] = ()
    batch: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= _LARGEST_OVERLAP:
            raise ConfigError(f"overlap {self.overlap}: a share in [0, {_LARGEST_OVERLAP}] is needed, for example 0.5.")
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch}: at least 1 window a forward pass is needed.")
        unknown = set(self.mirror_axes) - set(get_args(Axis))
        if unknown:
            raise ConfigError(f"mirror_axes: {', '.join(sorted(unknown))}; known are {', '.join(get_args(Axis))}.")


def sliding_window(
    predict: Network,
    image: Float32[np.ndarray, "c x y z"],
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    batch: int = 2,
    fill: float = 0.0,
    device: str = "cpu",
) -> Float32[np.ndarray, "k x y z"]:
    """Average the scores of overlapping windows, weighted by a Gaussian about each window's centre.

    ``scores[v] = Σ_w g(v - centre_w) predict(window w)[v] / Σ_w g(v - centre_w)``, with a standard deviation of an
    eighth of the window and weights of at least 0.001, as in MONAI. Windows are spread evenly, as few as the
    overlap allows. A volume smaller than the window is padded on both sides, as crops in training are.

    Args:
        predict: From windows (b, C, *window) to scores (b, num_classes, *window).
        image: Volume (C, X, Y, Z).
        window: Size of a window in voxels (3,).
        num_classes: Classes that ``predict`` scores.
        overlap: Smallest share of a window that the next one covers again, in [0, 0.9].
        batch: Windows in one call.
        fill: Value of the padding.
        device: Where ``predict`` wants its windows.

    Returns:
        Scores (num_classes, X, Y, Z) on the grid of ``image``.

    Raises:
        CheckpointError: if the scores do not have the shape that is needed.
        CaseError: if a score is not finite.
    """
    Settings(overlap=overlap, batch=batch)
    size = tuple(window)
    if len(size) != 3 or min(size) < 1:
        raise ConfigError(f"window {size}: three sizes of at least 1 voxel are needed.")
    shape = image.shape[1:]
    before = [max(0, -((n - w) // 2)) for n, w in zip(shape, size, strict=True)]
    inside = (slice(None), *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))
    padded = torch.full((image.shape[0], *map(max, shape, size)), fill, dtype=torch.float32)
    padded[inside] = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))

    weight = _gaussian(size)
    scores = torch.zeros((num_classes, *padded.shape[1:]))
    weights = torch.zeros(padded.shape[1:])
    starts = (window_starts(n, w, overlap=overlap) for n, w in zip(padded.shape[1:], size, strict=True))
    boxes = [tuple(slice(a, a + w) for a, w in zip(start, size, strict=True)) for start in itertools.product(*starts)]
    for first in range(0, len(boxes), batch):
        chunk = boxes[first : first + batch]
        windows = torch.stack([padded[(slice(None), *box)] for box in chunk])
        found = predict(windows.to(device)).float().cpu()
        _check(found, (len(chunk), num_classes, *size), windows)
        for box, window_scores in zip(chunk, found, strict=True):
            scores[(slice(None), *box)] += window_scores * weight
            weights[box] += weight
    scores /= weights
    return np.ascontiguousarray(scores[inside].numpy())


def window_starts(size: int, window: int, *, overlap: float) -> list[int]:
    """Spread the fewest windows that cover ``size`` voxels with at least ``overlap`` evenly; give their starts."""
    step = max(1, math.floor(window * (1 - overlap)))
    number = max(0, math.ceil((size - window) / step)) + 1
    return [round(start) for start in np.linspace(0, max(0, size - window), number)]


def mirrored(network: Network, axes: Iterable[Axis], *, orientation: str) -> Network:
    """Average a network's scores over all mirrorings of its windows along anatomical axes.

    Args:
        network: From windows (b, C, x, y, z) to scores (b, K, x, y, z).
        axes: To mirror.
        orientation: Where the array axes point, as ``Geometry.orientation``.
    """
    dims = [next(2 + i for i, letter in enumerate(orientation) if letter in axis) for axis in axes]
    choices = [chosen for count in range(len(dims) + 1) for chosen in itertools.combinations(dims, count)]

    def run(x: Tensor) -> Tensor:
        total = network(x)
        for chosen in choices[1:]:
            total = total + network(x.flip(chosen)).flip(chosen)
        return total / len(choices)

    return run if dims else network


def _gaussian(size: Sequence[int]) -> Float32[Tensor, "x y z"]:
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    return torch.einsum("x,y,z->xyz", *axes).clamp_min(_SMALLEST_WEIGHT)


def _check(found: Tensor, needed: tuple[int, ...], windows: Tensor) -> None:
    if tuple(found.shape) != needed:
        raise CheckpointError(
            f"network: scores of shape {tuple(found.shape)}; {needed} is needed. Use another bundle.",
            code="E_CONTRACT",
        )
    if not torch.isfinite(found).all():
        low, high = (float(value) for value in windows.aminmax())
        raise CaseError(
            f"network: scores that are not finite, from windows with values {low:.4g} to {high:.4g}; numbers are "
            "needed. Compare the scan's intensities with those of the training scans.",
            code="E_NONFINITE",
        )
