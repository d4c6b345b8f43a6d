"""Run a network over a whole volume, window by window, and hand out scores slab by slab as they are finished.

Scores of k classes take k volumes of memory. Windows are therefore taken in order along one axis, and only the planes
that windows still to come may touch are held: a window's length of them, whatever the length of the volume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from medssl.errors import CaseError, CheckpointError, ConfigError

Axis = Literal["LR", "AP", "SI"]
Layout = Literal["even", "monai"]
Precision = Literal["fp32", "bf16"]
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
        layout: ``even`` spreads the windows; ``monai`` places them as MONAI does, step by step with the last one
            pushed back into the volume.
        skip_empty: Leave out windows without a single voxel of the body; what no window sees is background. Where
            preparation makes no body mask, none is left out.
        precision: ``bf16`` runs convolutions and products in bfloat16.
        channels_last: Lay out windows and weights with the channels last.
    """

    overlap: float = 0.5
    mirror_axes: tuple[Axis, ...] = ()
    batch: int = 2
    device: str = "cpu"
    layout: Layout = "even"
    skip_empty: bool = True
    precision: Precision = "fp32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= _LARGEST_OVERLAP:
            raise ConfigError(f"overlap {self.overlap}: a share in [0, {_LARGEST_OVERLAP}] is needed, for example 0.5.")
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch}: at least 1 window a forward pass is needed.")
        unknown = set(self.mirror_axes) - set(get_args(Axis))
        if unknown:
            raise ConfigError(f"mirror_axes: {', '.join(sorted(unknown))}; known are {', '.join(get_args(Axis))}.")


class Slab(NamedTuple):
    """Finished scores of neighbouring planes of a volume.

    Args:
        scores: (n, k, u, v): planes first, then classes, then the other two axes in their order. A view, which the
            next slab overwrites.
        start: Index of the first plane. But for the first slab it is the last plane of the slab before, so that one
            can interpolate between them.
        axis: Axis of the volume that the planes lie across.
    """

    scores: Float32[Tensor, "n k u v"]
    start: int
    axis: int


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
    layout: Layout = "even",
) -> Float32[np.ndarray, "k x y z"]:
    """Average the scores of overlapping windows; all scores at once, for volumes with few classes.

    Args:
        predict: As for :func:`score_slabs`, and so the others.
        image: Volume (C, X, Y, Z).
        window: Size of a window in voxels (3,).
        num_classes: Classes that ``predict`` scores.
        overlap: Smallest share of a window that the next one covers again.
        batch: Windows in one call.
        fill: Value of the padding.
        device: Where ``predict`` wants its windows.
        layout: Where windows lie.

    Returns:
        Scores (num_classes, X, Y, Z) on the grid of ``image``.
    """
    settings = Settings(overlap=overlap, batch=batch, device=device, layout=layout)
    result = np.empty((num_classes, *image.shape[1:]), dtype=np.float32)
    for slab in score_slabs(predict, image, window=window, num_classes=num_classes, fill=fill, settings=settings):
        planes = np.moveaxis(result, 1 + slab.axis, 0)
        planes[slab.start : slab.start + len(slab.scores)] = slab.scores.numpy()
    return result


def score_slabs(
    predict: Network,
    image: Float32[np.ndarray, "c x y z"],
    *,
    window: Sequence[int],
    num_classes: int,
    fill: float = 0.0,
    settings: Settings,
    body: Bool[np.ndarray, "x y z"] | None = None,
    background: int = 0,
) -> Iterator[Slab]:
    """Average the scores of overlapping windows, weighted by a Gaussian about each window's centre.

    ``scores[v] = Σ_w g(v - centre_w) predict(window w)[v] / Σ_w g(v - centre_w)``, with a standard deviation of an
    eighth of the window and weights of at least 0.001, as in MONAI. A volume smaller than the window is padded on both
    sides, as crops in training are.

    Args:
        predict: From windows (b, C, *window) to scores (b, num_classes, *window).
        image: Volume (C, X, Y, Z).
        window: Size of a window in voxels (3,).
        num_classes: Classes that ``predict`` scores.
        fill: Value of the padding.
        settings: Overlap, layout, batch and device; the rest is the caller's to heed.
        body: Windows without a voxel of it are left out; None takes all.
        background: Class that voxels without a window get, with a score of 1 to 0.

    Yields:
        The planes of the volume in order, along the axis that needs the least memory.

    Raises:
        CheckpointError: if the scores do not have the shape that is needed.
        CaseError: if a score is not finite.
    """
    size = tuple(window)
    if len(size) != 3 or min(size) < 1:
        raise ConfigError(f"window {size}: three sizes of at least 1 voxel are needed.")
    shape = image.shape[1:]
    before = [_padding(n, w, settings.layout) for n, w in zip(shape, size, strict=True)]
    full = tuple(map(max, shape, size))
    inside = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
    padded = torch.full((image.shape[0], *full), fill, dtype=torch.float32)
    padded[(slice(None), *inside)] = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))

    starts = [_starts(n, w, settings) for n, w in zip(full, size, strict=True)]
    axis = min(range(3), key=lambda a: size[a] / full[a])
    others = [a for a in range(3) if a != axis]
    rows = _rows(starts, size, axis=axis)
    if body is not None:
        seen = np.zeros(full, dtype=bool)
        seen[inside] = body
        rows = [[box for box in row if seen[box].any()] for row in rows]
    scored = _scored(predict, padded, [*itertools.chain(*rows)], num_classes=num_classes, settings=settings)

    weight = _gaussian(size).movedim(axis, 0)
    held = torch.zeros((1 + size[axis], num_classes, *(full[a] for a in others)))
    weights = torch.zeros((len(held), *held.shape[2:]))
    for row, (start, stop) in zip(rows, itertools.pairwise([*starts[axis], full[axis]]), strict=True):
        for box in row:
            u, v = (box[a] for a in others)
            held[1:, :, u, v].addcmul_(next(scored).movedim(1 + axis, 0), weight[:, None])
            weights[1:, u, v] += weight
        done = 1 + stop - start
        _normalise(held[1:done], weights[1:done], background=background)
        first = max(start - 1, inside[axis].start)
        planes = held[1 + first - start : 1 + min(stop, inside[axis].stop) - start]
        yield Slab(planes[:, :, *(inside[a] for a in others)], first - inside[axis].start, axis)
        for array in (held, weights):
            _drop(array, stop - start)


def window_starts(size: int, window: int, *, overlap: float) -> list[int]:
    """Spread the fewest windows that cover ``size`` voxels with at least ``overlap`` evenly; give their starts."""
    step = max(1, math.floor(window * (1 - overlap)))
    number = max(0, math.ceil((size - window) / step)) + 1
    return [round(start) for start in np.linspace(0, max(0, size - window), number)]


def mirrored(
    network: Network, axes: Iterable[Axis], *, orientation: str, swaps: Sequence[tuple[int, int]] = ()
) -> Network:
    """Average a network's scores over all mirrorings of its windows along anatomical axes.

    Args:
        network: From windows (b, C, x, y, z) to scores (b, K, x, y, z).
        axes: To mirror.
        orientation: Where the array axes point, as ``Geometry.orientation``.
        swaps: Pairs of classes that change places where left and right do.
    """
    dims = {axis: next(2 + i for i, letter in enumerate(orientation) if letter in axis) for axis in axes}
    choices = [chosen for count in range(len(dims) + 1) for chosen in itertools.combinations(dims, count)]

    def run(x: Tensor) -> Tensor:
        total = network(x)
        for chosen in choices[1:]:
            along = [dims[axis] for axis in chosen]
            scores = network(x.flip(along)).flip(along)
            total = total + (_swapped(scores, swaps) if "LR" in chosen else scores)
        return total / len(choices)

    return run if dims else network


def _swapped(scores: Float32[Tensor, "b k *s"], swaps: Sequence[tuple[int, int]]) -> Float32[Tensor, "b k *s"]:
    order = list(range(scores.shape[1]))
    for left, right in swaps:
        order[left], order[right] = right, left
    return scores[:, order]


def _starts(size: int, window: int, settings: Settings) -> list[int]:
    if settings.layout == "even":
        return window_starts(size, window, overlap=settings.overlap)
    step = window if size == window else max(1, int(window * (1 - settings.overlap)))
    number = max(0, math.ceil((size - window) / step)) + 1
    return [min(i * step, size - window) for i in range(number)]


def _padding(size: int, window: int, layout: Layout) -> int:
    """Voxels before a volume that is smaller than the window; of an odd number the larger half, in MONAI the other."""
    missing = max(0, window - size)
    return missing // 2 if layout == "monai" else -(-missing // 2)


def _rows(starts: Sequence[Sequence[int]], size: Sequence[int], *, axis: int) -> list[list[tuple[slice, ...]]]:
    """Boxes of all windows, one list for each start along ``axis``."""
    choices = [[slice(a, a + w) for a in found] for found, w in zip(starts, size, strict=True)]
    return [[*itertools.product(*choices[:axis], [own], *choices[axis + 1 :])] for own in choices[axis]]


def _scored(
    predict: Network,
    padded: Float32[Tensor, "c x y z"],
    boxes: Sequence[tuple[slice, ...]],
    *,
    num_classes: int,
    settings: Settings,
) -> Iterator[Float32[Tensor, "k x y z"]]:
    """Scores of each window, in order."""
    for first in range(0, len(boxes), settings.batch):
        windows = torch.stack([padded[(slice(None), *box)] for box in boxes[first : first + settings.batch]])
        yield from _checked(predict(windows.to(settings.device)), windows, num_classes=num_classes)


def _normalise(scores: Float32[Tensor, "n k u v"], weights: Float32[Tensor, "n u v"], *, background: int) -> None:
    """Divide sums by their weights, in place; what has no weight is background."""
    empty = weights == 0
    if empty.any():
        scores[:, background].masked_fill_(empty, 1.0)
        weights = weights.masked_fill(empty, 1.0)
    scores /= weights[:, None]


def _drop(array: Tensor, count: int) -> None:
    """Move planes to the front by ``count``, one at a time so that no second copy is held; zeros come behind."""
    for plane in range(len(array) - count):
        array[plane] = array[plane + count]
    array[len(array) - count :] = 0


def _gaussian(size: Sequence[int]) -> Float32[Tensor, "x y z"]:
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    return torch.einsum("x,y,z->xyz", *axes).clamp_min(_SMALLEST_WEIGHT)


def _checked(found: Tensor, windows: Float32[Tensor, "b c x y z"], *, num_classes: int) -> Float32[Tensor, "b k x y z"]:
    """Scores on the CPU; nobody holds those of one batch while the network makes the next."""
    needed = (len(windows), num_classes, *windows.shape[2:])
    if tuple(found.shape) != needed:
        raise CheckpointError(
            f"network: scores of shape {tuple(found.shape)}; {needed} is needed. Use another bundle.",
            code="E_CONTRACT",
        )
    scores = found.float().cpu()
    if not all(map(math.isfinite, scores.aminmax())):
        low, high = (float(value) for value in windows.aminmax())
        raise CaseError(
            f"network: scores that are not finite, from windows with values {low:.4g} to {high:.4g}; numbers are "
            "needed. Compare the scan's intensities with those of the training scans.",
            code="E_NONFINITE",
        )
    return scores
