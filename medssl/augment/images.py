"""What is known of the images that an augmentation is for; physics decides with it what may be done to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Domain = Literal["HU", "zscore", "raw", "unit"]
"""What values mean: signed HU; a robust z-score; what a file held; [0, 1] after a window or a rescaling."""

EVERY_DOMAIN: frozenset[Domain] = frozenset(get_args(Domain))
NOT_HU: frozenset[Domain] = EVERY_DOMAIN - {"HU"}
ONLY_HU: frozenset[Domain] = frozenset({"HU"})
ONLY_UNIT: frozenset[Domain] = frozenset({"unit"})

HU_RANGE = (-1024.0, 3071.0)
"""What a scanner stores in 12 bits; augments that change HU end in it."""


@dataclass(frozen=True)
class Images:
    """Prepared images as they lie in a store.

    Args:
        domain: What their values mean.
        modality: CT, MR, PT, US, XR or other.
        region: Part of the body, one of ``medssl.augment.anatomy.REGIONS``; None where nobody said.
        spacing_mm: Voxel size, or the median where it differs; for crops that do not bring their own.
        spatial_dims: 2 for images of one slice.
        channels: Of each image.
    """

    domain: Domain = "zscore"
    modality: str = "other"
    region: str | None = None
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spatial_dims: Literal[2, 3] = 3
    channels: int = 1

    def crop_spacing_mm(
        self, crop_voxels: Sequence[int], crop_mm: Sequence[float] | None
    ) -> tuple[float, float, float]:
        """Voxel size of crops of so many voxels and mm; an axis of one voxel is one slice, and ``None`` keeps all."""
        if crop_mm is None:
            return self.spacing_mm
        sizes = zip(crop_voxels, crop_mm, self.spacing_mm, strict=True)
        x, y, z = (own if voxels == 1 else length / voxels for voxels, length, own in sizes)
        return x, y, z
