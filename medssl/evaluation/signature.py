"""A small picture of a whole image in ranks, by which copies are found that were flipped, rescaled or stored anew.

Ranks do not change under any rising map of intensities, averaging over blocks hides noise and codecs, and a share of
the field of view is the same in any resolution. Flips are tried one by one when two signatures are compared. A crop or
a turn by any angle is not seen; embeddings may see them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64
from scipy.stats import rankdata
from torch.nn import functional as F

from medssl.volume import Volume, reoriented_view

_SIDES = {2: 32, 3: 16}
_FLOOR = 1e-12
_MAD_TO_SIGMA = 1.4826


def signature(volume: Volume) -> Float32[np.ndarray, "*side"]:
    """Ranks of block means on a fixed grid, axes to right, front and head, mean 0; 16 blocks an axis, 32 in 2D.

    An image of one value gives zeros. Channels are averaged.
    """
    array = reoriented_view(volume).array
    image = torch.from_numpy(np.ascontiguousarray(array)).float().mean(dim=0)
    if image.shape[2] == 1:
        blocks = F.adaptive_avg_pool2d(image[None, :, :, 0], _SIDES[2])[0]
    else:
        blocks = F.adaptive_avg_pool3d(image[None], _SIDES[3])[0]
    ranks = rankdata(blocks.numpy().ravel().round(6)).reshape(blocks.shape)
    centred: Float32[np.ndarray, "*side"] = (ranks - ranks.mean()).astype(np.float32)
    return centred


def similarities(
    first: Sequence[Float32[np.ndarray, "*side"]], second: Sequence[Float32[np.ndarray, "*side"]]
) -> tuple[Float64[np.ndarray, "n m"], Float64[np.ndarray, "n n"], Float64[np.ndarray, "m m"]]:
    """Correlation of signatures of one shape, the best over all flips: between two sets, and within each.

    What all images have in common, their mean over both sets and all flips, is taken away first, so that two different
    heads are not alike only for being heads.

    Args:
        first: Of the first set.
        second: Of the second.
    """
    joined = np.stack([*first, *second]).astype(np.float64)
    flips = [axes for count in range(joined.ndim) for axes in itertools.combinations(range(1, joined.ndim), count)]
    template = np.mean([np.flip(joined, axes).mean(axis=0) for axes in flips], axis=0)
    own = joined - template if len(joined) > 2 else joined
    unit = own / np.maximum(np.linalg.norm(own.reshape(len(own), -1), axis=1).reshape(-1, *[1] * template.ndim), _FLOOR)
    flat = unit.reshape(len(unit), -1)
    best = np.full((len(flat), len(flat)), -1.0)
    for axes in flips:
        np.maximum(best, flat @ np.flip(unit, axes).reshape(len(unit), -1).T, out=best)
    count = len(first)
    return best[:count, count:], best[:count, :count], best[count:, count:]


def threshold_of(
    within: Sequence[Float64[np.ndarray, "n n"]],
    subjects: Sequence[Sequence[str]],
    *,
    spread: float,
    bounds: tuple[float, float],
) -> float:
    """Similarity from which two images are called copies: far beyond what neighbours of different subjects have.

    The nearest neighbour of another subject in its own set is taken of every image. On Fisher's scale, ``atanh``, the
    threshold is their median plus ``spread`` times their deviation, told by the median absolute deviation, which copies
    within a set do not move; kept within ``bounds``. Fewer than eight neighbours give the upper bound.

    Args:
        within: Similarities within each set.
        subjects: Of the images of each set.
        spread: How many deviations.
        bounds: Lowest and highest threshold.
    """
    nearest: list[float] = []
    for values, names in zip(within, subjects, strict=True):
        others = np.asarray(names)[:, None] != np.asarray(names)[None]
        nearest += [float(row[other].max()) for row, other in zip(values, others, strict=True) if other.any()]
    if len(nearest) < 8:
        return bounds[1]
    scale = np.arctanh(np.clip(nearest, -1 + 1e-9, 1 - 1e-9))
    middle = float(np.median(scale))
    deviation = _MAD_TO_SIGMA * float(np.median(np.abs(scale - middle)))
    return float(np.clip(math.tanh(middle + spread * deviation), *bounds))
