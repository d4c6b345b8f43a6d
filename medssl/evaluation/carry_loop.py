"""The compiled loop of :mod:`medssl.evaluation.carry`; import it only where it runs, for Numba is slow to load."""

from __future__ import annotations

from typing import Any

import numpy as np

from medssl.augment.jit import compile_loop

Array = np.ndarray[Any, Any]


@compile_loop(contract=True)
def best_classes(  # noqa: PLR0917  compiled loops take no keywords
    scores: Array, steps: tuple[Array, ...], shares: tuple[Array, ...], labels: Array, start: int, stop: int
) -> None:  # pragma: no cover  compiled
    """Interpolate linearly between planes, rows and voxels; keep the best class, of equal ones the first.

    Args:
        scores: (n, k, u, v), float32 and contiguous.
        steps: For each axis and target voxel, the voxel before it and the one behind it; six arrays.
        shares: For each axis and target voxel, its distance from the voxel before it, in voxels; three arrays.
        labels: (a, b, c); filled from plane ``start`` up to ``stop``.
        start: First plane.
        stop: Plane behind the last.
    """
    low, high, low_u, high_u, low_v, high_v = steps
    share, share_u, share_v = shares
    classes, width, length = scores.shape[1], scores.shape[3], len(low_v)
    row = np.empty(width, np.float32)
    best = np.empty(length, np.float32)
    chosen = np.empty(length, np.uint16)
    one = np.float32(1)
    for i in range(start, stop):
        for j in range(len(low_u)):
            behind, beyond = share[i], share_u[j]
            w00, w01 = (one - behind) * (one - beyond), (one - behind) * beyond
            w10, w11 = behind * (one - beyond), behind * beyond
            for c in range(classes):
                a, b = scores[low[i], c, low_u[j]], scores[low[i], c, high_u[j]]
                d, e = scores[high[i], c, low_u[j]], scores[high[i], c, high_u[j]]
                if behind == 0 and beyond == 0:
                    row[:] = a
                else:
                    for z in range(width):
                        row[z] = w00 * a[z] + w01 * b[z] + w10 * d[z] + w11 * e[z]
                for k in range(length):
                    before = row[low_v[k]]
                    value = before + share_v[k] * (row[high_v[k]] - before)
                    if c == 0 or value > best[k]:
                        best[k] = value
                        chosen[k] = c
            for k in range(length):
                labels[i, j, k] = chosen[k]
