"""Files written by nibabel, so that the tests of medssl.data do not lean on medssl.io alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

WriteNifti = Callable[..., Path]


@pytest.fixture
def write_nifti() -> WriteNifti:
    def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def make_case(write_nifti: WriteNifti) -> Callable[..., tuple[Path, Path]]:
    """An image of noise with a bright labelled cube, and its label map, in the decathlon's folders."""

    def make(root: Path, name: str, *, shape: Sequence[int] = (12, 14, 10), seed: int = 0) -> tuple[Path, Path]:
        rng = np.random.default_rng([seed, *name.encode()])
        image = rng.integers(20, 60, shape).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        label[3:6, 4:8, 2:5] = 1
        label[6:9, 4:8, 2:5] = 2
        image[label > 0] += 100
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        return (
            write_nifti(root / "imagesTr" / f"{name}.nii.gz", image, affine),
            write_nifti(root / "labelsTr" / f"{name}.nii.gz", label, affine),
        )

    return make
