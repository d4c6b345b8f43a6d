"""What is known of a file that was read, and the names that image files go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.geometry import Geometry
from medssl.volume import Unit

IMAGE_SUFFIXES = (
    ".nii.gz",
    ".nii",
    ".hdr",
    ".mha",
    ".mhd",
    ".nrrd",
    ".nhdr",
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".npy",
)

_WITHOUT_SPACING = ("W_NO_SPACING", "W_SPACING_MISSING")


@dataclass(frozen=True)
class Source:
    """Where a volume came from; enough to write a result on the same grid with the same header.

    Args:
        path: The file or folder as it was given.
        digest: sha256 of the file's bytes, in hex; of header and data one after the other where they are two files; of
            the sha256 digests of the files of a DICOM volume, in the order of its slices, where they are several.
        format: ``dicom``, ``nifti1``, ``nifti2``, ``metaimage``, ``nrrd``, ``npy``, ``png``, ``jpeg``, ``tiff`` or
            ``bmp``.
        warnings: What was assumed or repaired, as ``W_CODE: sentence``.
        nifti_header: The 348 or 540 header bytes of a NIfTI file, else None.
        facts: Harmless header fields of a DICOM image, those of :data:`medssl.io.dicom.model.FACTS`.
        volumes: How many volumes the file or folder holds; one of them was read.
    """

    path: Path
    digest: str
    format: str
    warnings: tuple[str, ...] = ()
    nifti_header: bytes | None = None
    facts: Mapping[str, str | float] = field(default_factory=dict)
    volumes: int = 1

    @property
    def has_spacing(self) -> bool:
        """Whether the file, or else the caller, said how large a voxel is in mm."""
        return not any(warning.startswith(_WITHOUT_SPACING) for warning in self.warnings)


@dataclass(frozen=True)
class Decoded:
    """What a reader makes of the bytes of a file, before the rules for voxel values.

    Args:
        array: Voxels (C, X, Y, Z) in the stored type and native byte order.
        geometry: Grid in world mm, RAS+.
        format: As in :class:`Source`.
        warnings: As in :class:`Source`.
        nifti_header: As in :class:`Source`.
        data: Bytes of the second file of a pair.
        unit: What the voxel values are, where the file says so itself; None leaves it to the caller.
        facts: As in :class:`Source`.
        volumes: As in :class:`Source`.
        digest: As in :class:`Source`, where the reader has made it; None leaves it to the caller, who has the bytes.
    """

    array: np.ndarray[Any, Any]
    geometry: Geometry
    format: str
    warnings: tuple[str, ...] = ()
    nifti_header: bytes | None = None
    data: bytes = b""
    unit: Unit | None = None
    facts: Mapping[str, str | float] = field(default_factory=dict)
    volumes: int = 1
    digest: str | None = None


def is_image(path: Path) -> bool:
    """Whether the name ends as that of an image; the content decides later."""
    return suffix(path) is not None


def suffix(path: Path) -> str | None:
    """The image suffix of a name in lower case, ``.nii.gz`` in one piece; None for other files."""
    name = path.name.lower()
    return next((known for known in IMAGE_SUFFIXES if name.endswith(known) and name != known), None)


def stem(path: Path) -> str:
    """Name without folder and image suffix: ``a/b.nii.gz`` gives ``b``."""
    known = suffix(path)
    return path.name[: -len(known)] if known else path.stem
