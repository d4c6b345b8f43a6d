"""Two crops with a drawn share in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from medssl.errors import ConfigError
from medssl.views.base import CaseArrays
from medssl.views.boxes import Box
from medssl.views.crops import CropSampler
from medssl.views.cutting import Cut, notes, read_views
from medssl.views.placing import Region


class OverlapPair(CropSampler):
    """Two crops of one size that have a share of their volume in common, which is drawn evenly and kept exactly.

    First the share ``o``, then the offset: the crops have the share ``r_i`` of each edge in common, ``Π r_i = o``,
    ``log r`` spread at random over the axes, as far as the volume leaves room along each. Only then the place of both
    together. The second crop lies between the voxels of the first, since whole voxels would not give the share.

    Gives ``views`` (2, C, *box) with its fields and notes (see :class:`~medssl.views.base.ViewSampler`) and
    ``overlap`` (), the share. Where the volume is too small to hold both, they reach beyond it (``note_padded``).

    Args:
        crop_voxels: As in :class:`~medssl.views.crops.CropSampler`, and so the other options.
        min_overlap: Smallest share, above 0.
        max_overlap: Largest share, at most 1.
        crop_mm: Edge lengths of the crops.
        margin: Share of the edge read beyond the crops.
        inside_body: Whether the middle between both crops is drawn from the body mask.
        region: Share of the body box that this middle lies in.

    Raises:
        ConfigError: for shares that are not in order, and as :class:`~medssl.views.crops.CropSampler`.
    """

    def __init__(
        self,
        crop_voxels: Sequence[int],
        *,
        min_overlap: float = 0.5,
        max_overlap: float = 1.0,
        crop_mm: Sequence[float] | None = None,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = True,
        region: Region | None = None,
    ) -> None:
        super().__init__(crop_voxels, crop_mm=crop_mm, margin=margin, inside_body=inside_body, region=region)
        self.min_overlap, self.max_overlap = min_overlap, max_overlap
        if not 0 < min_overlap <= max_overlap <= 1:
            raise ConfigError(
                f"min_overlap {min_overlap}, max_overlap {max_overlap}: they must rise from above 0 to at most 1."
            )
        if max(self.crop_voxels) == 1 and min_overlap < 1:
            raise ConfigError("crop_voxels is [1, 1, 1]; two crops cannot overlap in part. Use larger crops.")

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut both crops from ``cases[0]``."""
        case = cases[0]
        size = self.size(case)
        body = self.placing.body(case)
        is_anywhere = self.placing.inside_body and not len(body)
        overlap = float(rng.uniform(self.min_overlap, self.max_overlap))
        offset = self._offset(case, size, overlap, rng)
        is_second_low = rng.random(3) < 0.5
        shifts = np.where([is_second_low, ~is_second_low], offset, 0.0)

        def draw() -> list[Cut]:
            start = self.placing.start(case, size + offset, body, rng)
            places = [Box.at(start + shift, size) for shift in shifts]
            return [Cut(place, self.crop_voxels, self.margin, is_anywhere) for place in places]

        views = read_views(case, [draw])
        return {**views.fields("views"), "overlap": np.asarray(overlap, np.float32), **notes(views)}

    def _offset(
        self, case: CaseArrays, size: Float64[np.ndarray, " 3"], overlap: float, rng: np.random.Generator
    ) -> Float64[np.ndarray, " 3"]:
        """Distance of the crops along each axis, in voxels of the case, that leaves ``overlap`` in common.

        The loss ``-log overlap`` is shared out by random weights; what an axis has no room for goes to the others, and
        what none has room for to all.
        """
        can_move = np.asarray(self.crop_voxels) > 1
        weights = rng.exponential(size=3) * can_move
        room = np.clip((np.asarray(case.shape) - size) / size, 0.0, 1.0)
        most = np.where(can_move, -np.log(np.maximum(1.0 - room, 1e-300)), 0.0)
        loss, left = np.zeros(3), -math.log(overlap)
        for _ in range(3):  # every round fills an axis, or shares out all that is left
            open_axes = weights * (loss < most)
            if open_axes.sum() > 0:
                loss = np.minimum(loss + left * open_axes / open_axes.sum(), most)
                left = -math.log(overlap) - loss.sum()
        if left > 0:
            loss += left * weights / weights.sum() if can_move.any() else 0.0
        offset: Float64[np.ndarray, " 3"] = size * (1.0 - np.exp(-loss))
        return offset
