"""Stores written straight from arrays, without a scan and a preparation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medssl.data.splits import Split
from medssl.data.store import Entry, IndexRow, write_entry, write_index
from medssl.geometry import Geometry

PREPARE: dict[str, Any] = {"modality": "MR", "orientation": "RAS", "spacing_mm": None}


class Image(NamedTuple):
    """One case of a store."""

    case_id: str
    array: np.ndarray
    subject_id: str = ""
    split: Split | None = "train"
    spacing_mm: tuple[float, float, float] = (1.0, 1.5, 2.0)
    warnings: Sequence[str] = ()
    file: str = ""


def write_store(path: Path, images: Sequence[Image], *, prepare: Mapping[str, Any] = PREPARE) -> Path:
    """A store of these images, whose bodies leave out one voxel at each end of each axis."""
    rows = []
    for image in images:
        shape = image.array.shape[1:]
        affine = np.diag([*image.spacing_mm, 1.0])
        affine[:3, 3] = (-7.0, 11.0, 3.0)
        grid = Geometry(shape, affine).to_dict()
        body = np.zeros((1, *shape), np.uint8)
        body[(0, *(slice(1, n - 1) if n > 4 else slice(None) for n in shape))] = 1
        meta = {
            "source_geometry": grid, "prepared_geometry": grid, "unit": "arbitrary", "fill": 0.0,
            "warnings": list(image.warnings), "image_digest": image.file or image.case_id,
        }  # fmt: skip
        key = hashlib.sha256(f"{path} {image.case_id}".encode()).hexdigest()[:24]
        write_entry(path, key, Entry(image.array, None, body, meta))
        subject = image.subject_id or image.case_id
        rows.append(IndexRow(image.case_id, subject, image.split, "MR", key, False, ()))
    write_index(path, rows, prepare=prepare, unit="arbitrary", modality="MR")
    return path
