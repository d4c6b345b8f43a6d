"""Where a voxel lies in the patient: as a share of the body box, or in an atlas.

Axes are ``LR``, ``AP`` and ``SI``; coordinates grow to the right, to the front and to the head, wherever the axes of
the array point.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Shaped

from medssl.errors import CaseError
from medssl.views.base import CaseArrays

AXES = {"LR": 0, "AP": 1, "SI": 2}


def anatomical_axes(case: CaseArrays) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The array axes nearest to LR, AP and SI, and which of them run the other way: to the left, back or foot."""
    return _nearest_axes(np.ascontiguousarray(case.affine[:3, :3], dtype=np.float64).tobytes())


@lru_cache(maxsize=4096)
def _nearest_axes(linear: bytes) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """For the bytes of a matrix, as every crop of a case asks for the same."""
    matrix = np.frombuffer(linear).reshape(3, 3)
    directions = matrix / np.linalg.norm(matrix, axis=0)
    orders = itertools.permutations(range(3))
    x, y, z = max(orders, key=lambda order: float(np.abs(directions[range(3), order]).sum()))
    return (x, y, z), (bool(directions[0, x] < 0), bool(directions[1, y] < 0), bool(directions[2, z] < 0))


def body_coordinates(case: CaseArrays, ijk: Shaped[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "*n 3"]:
    """Share of the body box along LR, AP and SI: 0 at its left, back and lower face, 1 at the other; beyond outside it.

    Args:
        case: Whose body box is meant.
        ijk: Voxel indices, whole or not; the centre of voxel ``i`` is ``i``.
    """
    start, size = case.body_box
    axes, is_reversed = anatomical_axes(case)
    shares: Float64[np.ndarray, "*n 3"] = ((np.asarray(ijk, np.float64) + 0.5 - start) / size)[..., axes]
    return np.where(is_reversed, 1 - shares, shares)


def atlas_coordinates(case: CaseArrays, ijk: Shaped[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "*n 3"]:
    """Coordinates in the atlas that the case is registered to, through ``atlas_affine``.

    Args:
        case: A registered case.
        ijk: Voxel indices, whole or not.

    Raises:
        CaseError: E_NO_ATLAS, if the case is not registered.
    """
    if case.atlas_affine is None:
        raise CaseError(
            f"case {case.case_id}: is registered to no atlas. Use body coordinates instead.", code="E_NO_ATLAS"
        )
    affine = case.atlas_affine @ case.affine
    places: Float64[np.ndarray, "*n 3"] = np.asarray(ijk, np.float64) @ affine[:3, :3].T + affine[:3, 3]
    return places
