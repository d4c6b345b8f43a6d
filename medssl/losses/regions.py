"""Regions: unions of label values that a network answers one by one, such as a whole tumour and its core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.losses.segmentation import IGNORED, Blend, Terms
from medssl.losses.terms import boundary_loss


class Regions(nn.Module):
    """Named unions of label values, in the order in which they are written into a label map.

    Larger regions are written first, so that a core is written over the whole that it lies in; regions with as many
    values go by name. Each writes the one value that no later region has.

    Args:
        names: Of the regions, in that order.
        members: Whether a region holds a class; class 0 is background and in none.
        writes: Number of the class that each region writes.
    """

    def __init__(self, names: Sequence[str], members: Sequence[Sequence[bool]], writes: Sequence[int]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.writes = tuple(writes)
        self.register_buffer("members", torch.tensor(members, dtype=torch.bool), persistent=False)
        self.members: Bool[Tensor, "r k"]

    @classmethod
    def of(cls, regions: Mapping[str, Sequence[int]], label_values: Sequence[int]) -> Self:
        """Order regions and find what each writes.

        Args:
            regions: Label values of each.
            label_values: All values, background first.

        Raises:
            ConfigError: E_LABEL_SET, if a region holds an unknown value or none, a value is in no region, or it is not
                clear which value a region writes.
        """
        known = set(label_values) - {0}
        ordered = sorted(regions.items(), key=lambda item: (-len(set(item[1])), item[0]))
        writes = []
        for place, (name, values) in enumerate(ordered):
            if unknown := sorted(set(values) - known):
                raise _fault(f"region {name} holds {unknown}; the label values are {sorted(known)}. Correct it.")
            own = set(values).difference(*(later for _, later in ordered[place + 1 :]))
            if len(own) != 1:
                raise _fault(
                    f"region {name} has {sorted(own)} to itself after smaller regions are taken from it; exactly one "
                    "value is needed, which it writes. Add or correct a region."
                )
            writes.append(label_values.index(own.pop()))
        if left := sorted(known.difference(*regions.values())):
            raise _fault(f"label values {left} are in no region. Add them to one.")
        members = [[value in values for value in label_values] for _, values in ordered]
        return cls([name for name, _ in ordered], members, writes)

    def class_scores(self, logits: Float[Tensor, "b r *s"]) -> Float[Tensor, "b k *s"]:
        """Scores of the classes whose best one is what writing the regions in order gives.

        A region is there where its score is above 0. With ``l`` the scores in order::

            class that region i writes:  min(l_i, − l_j for every later j)
            background:                  min(− l_j for every j)

        so that exactly one class has a score above 0, but for ties.
        """
        free = -logits[:, -1]
        scores: dict[int, Tensor] = {self.writes[-1]: logits[:, -1]}
        for place in reversed(range(len(self.names) - 1)):
            scores[self.writes[place]] = torch.minimum(logits[:, place], free)
            free = torch.minimum(free, -logits[:, place])
        return torch.stack([free, *(scores[k] for k in range(1, len(scores) + 1))], dim=1)

    def known(self, known: Bool[Tensor, "b k"] | None) -> Bool[Tensor, "b r"] | None:
        """Which regions are annotated in a sample: those of which every class is."""
        if known is None:
            return None
        return ~((~known).unsqueeze(1) & self.members).any(dim=2)

    def masks(self, target: Integer[Tensor, "b 1 *s"]) -> Bool[Tensor, "b r *s"]:
        """Where each region is; nowhere among ignored voxels."""
        return self.members[:, target[:, 0].clamp(min=0).long()].movedim(0, 1) & (target != IGNORED)


def region_terms(
    logits: Float[Tensor, "b r *s"],
    target: Integer[Tensor, "b 1 *s"],
    blend: Blend,
    *,
    regions: Regions,
    known: Bool[Tensor, "b k"] | None = None,
    distance: Float[Tensor, "b r *s"] | None = None,
) -> Terms:
    """Loss of regions that may lie in each other: overlap and binary cross-entropy of each, in float32.

    Args:
        logits: Score of each region, before its sigmoid.
        target: Class index of each voxel, or :data:`~medssl.losses.segmentation.IGNORED`.
        blend: Which terms; there is no background here.
        regions: What they are.
        known: Which classes are annotated in a sample; a region counts where all of its are. None takes all.
        distance: Signed distances to the border of each region, for the boundary term.

    Returns:
        Total and terms; all are 0 with gradient 0 where every voxel is ignored.

    Reference: Isensee et al., nnU-Net for brain tumor segmentation, BrainLes 2020, arXiv:2011.00848, section 2.1
        (region-based training).
    Deviations: overlap and cross-entropy are averaged over the regions.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float()
        share = (target != IGNORED).to(scores.dtype)
        g = regions.masks(target).to(scores.dtype)
        p = scores.sigmoid()
        weight = scores.new_ones(scores.shape[:2])
        if (counted := regions.known(known)) is not None:
            weight = weight * counted
        per_voxel = F.binary_cross_entropy_with_logits(scores, g, reduction="none")
        every = share * weight.reshape(*weight.shape, *(1,) * (scores.ndim - 2))
        voxel = blend.voxel_of(per_voxel.flatten(0, 1), every.flatten(0, 1))
        count = weight.sum().clamp(min=1.0)
        overlap = (blend.overlap_of(p, g, share) * weight).sum() / count
        boundary = None
        if distance is not None:
            boundary = (boundary_loss(p, distance.float(), share) * weight).sum() / count
        return blend.add(overlap, voxel, boundary)


def _fault(text: str) -> ConfigError:
    return ConfigError(f"segmentation: {text}", code="E_LABEL_SET")
