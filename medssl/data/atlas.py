"""Registrations that were made elsewhere: ``atlas.json`` in a store says where each case lies in an atlas.

``{"case_0001": [[sx, 0, 0, tx], ..., [0, 0, 0, 1]], ...}``: for any of the cases the affine from world mm (RAS+) to
atlas coordinates, in whatever unit the atlas has. Cases that it does not name are not registered.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from medssl.errors import ReadError

NAME = "atlas.json"


def read_atlas(store: Path) -> tuple[dict[str, Float64[np.ndarray, "4 4"]], str]:
    """Give the affines by case id and the digest of the file; nothing and an empty text where there is none.

    Raises:
        ReadError: E_ATLAS, if it is no such file, or a matrix is not an invertible affine.
    """
    path = store / NAME
    if not path.exists():
        return {}, ""
    data = path.read_bytes()
    try:
        affines = {str(case): np.array(rows, dtype=np.float64) for case, rows in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise _fault(path, "is no JSON of case ids and matrices of 4 x 4 numbers") from error
    for case, affine in affines.items():
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise _fault(path, f"case {case}: no affine of 4 x 4 finite numbers with 0 0 0 1 as its last row")
        if abs(np.linalg.det(affine[:3, :3])) < np.finfo(np.float64).tiny:
            raise _fault(path, f"case {case}: an affine that cannot be inverted")
    return affines, hashlib.sha256(data).hexdigest()


def _fault(path: Path, what: str) -> ReadError:
    return ReadError(f"{path}: {what}. Write it anew, or remove it to train without an atlas.", code="E_ATLAS")
