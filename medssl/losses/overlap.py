"""Losses that pull the similarity of two crops towards the share of volume that they have in common."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from medssl.errors import CaseError

PosWeight = Literal["overlap", "indicator", "all"]
NegForm = Literal["square", "log", "paper"]

EPS = 1e-6


class OverlapTerms(NamedTuple):
    """The two terms of the prediction loss, scalars."""

    pos: Float[Tensor, ""]
    neg: Float[Tensor, ""]


def rectified_cosine(targets: Float[Tensor, "b t d"], bases: Float[Tensor, "b n d"]) -> Float[Tensor, "b t n"]:
    """Give ``max(0, cos)`` of every target to every base of the same volume, in float32.

    Args:
        targets: Embeddings of the target crops.
        bases: Embeddings of the base crops.

    Returns:
        Similarity in [0, 1]; a zero vector is similar to nothing.
    """
    with torch.autocast(targets.device.type, enabled=False):
        cosine = torch.einsum("btd,bnd->btn", _normalise(targets), _normalise(bases))
        return cosine.clamp(0.0, 1.0)


def overlap_terms(
    similarity: Float[Tensor, "b t n"],
    overlap: Float[Tensor, "b t n"],
    *,
    pos_weight: PosWeight = "overlap",
    neg_form: NegForm = "square",
) -> OverlapTerms:
    """Compare similarities ``s`` with overlaps ``y``: a positive and a negative term, each a mean over volumes.

    For one volume, with the sums over its targets and bases::

        pos = − Σ w log(max(ε, 1 − |y − s|)) / Σ w         w = y        pos_weight "overlap"
                                                           w = 1[y > 0]            "indicator"
                                                           w = 1                   "all"
        neg =   Σ 1[y = 0] f(s) / #{y = 0}                 f = s²       neg_form "square"
                                                           f = − log(max(ε, 1 − s))  "log"
        neg =   0                                                       neg_form "paper"

    ``paper`` goes with ``all``, where the positive term already runs over every pair. A volume whose targets overlap
    all bases has no negatives, and its ``neg`` is 0.

    Args:
        similarity: Rectified cosine of each target to each base, in [0, 1].
        overlap: Share of the target's volume inside each base, in [0, 1]; rows sum to at most 1.
        pos_weight: Weight ``w`` of the positive term.
        neg_form: Penalty ``f`` on pairs without overlap.

    Returns:
        ``pos`` and ``neg``, float32 scalars; they add up to the loss.

    Raises:
        ValueError: if the shapes differ, or a target overlaps no base (as :class:`~medssl.errors.CaseError`).

    Reference: Wu, Zhuang, Chen, VoCo, CVPR 2024, arXiv:2402.17300, section 3.2; Wu et al., Large-Scale 3D Medical Image
    Pre-training with Geometric Context Priors, arXiv:2410.09890, for the logarithm of the negatives.
    Deviations: ``1 − |y − s|`` is clamped to [ε, 1] where the authors' code adds ε; a target without any overlap raises
    where theirs divides by ε.
    """
    if similarity.shape != overlap.shape:
        raise ValueError(
            f"similarity {tuple(similarity.shape)} against overlap {tuple(overlap.shape)}: the shapes must be equal. "
            "Give one overlap for each pair of target and base."
        )
    if bool((overlap.sum(dim=-1) <= 0).any()):
        raise CaseError(
            "a target crop overlaps no base crop; a position label needs at least one. Draw targets inside the grid.",
            code="E_NO_OVERLAP",
        )
    with torch.autocast(similarity.device.type, enabled=False):
        s, y = similarity.float(), overlap.float()
        pos = _positive(s, y, weight=_positive_weight(y, pos_weight))
        return OverlapTerms(pos.mean(), _negative(s, y, neg_form).mean())


def consistency_terms(
    similarity: Float[Tensor, "b t n"], label: Float[Tensor, "b t n"], *, min_label: float
) -> tuple[OverlapTerms, Bool[Tensor, "b t"]]:
    """Compare the student's similarities to another volume's bases with the teacher's.

    The form is that of :func:`overlap_terms` with weight ``y`` and logarithmic negatives. A target that the teacher
    finds similar to none of the other volume's bases says nothing about where it lies and is left out; without that,
    all similarities 0 would be a perfect answer.

    Args:
        similarity: The student's rectified cosine of each target to each base of the other volume, in [0, 1].
        label: The teacher's, used without gradient.
        min_label: A target counts when its largest label is above this.

    Returns:
        The two terms, and which targets counted. Without any both terms are 0, with gradient 0.

    Reference: Wu et al., Large-Scale 3D Medical Image Pre-training with Geometric Context Priors, arXiv:2410.09890
    (the inter-volume loss of the released code).
    Deviations: ``min_label``; targets are averaged one by one, not volume by volume; clamping as in
    :func:`overlap_terms`.
    """
    with torch.autocast(similarity.device.type, enabled=False):
        s, y = similarity.float(), label.detach().float()
        counts = y.amax(dim=-1) > min_label
        # each target that counts is treated as a volume of one target
        s_rows, y_rows = s[counts].unsqueeze(1), y[counts].unsqueeze(1)
        if len(s_rows) == 0:
            zero = s.sum() * 0.0
            return OverlapTerms(zero, zero), counts
        pos = _positive(s_rows, y_rows, weight=y_rows)
        return OverlapTerms(pos.mean(), _negative(s_rows, y_rows, "log").mean()), counts


def base_regulariser(
    bases: Float[Tensor, "b n d"], *, power: Literal[1, 2] = 2, symmetric: bool = True
) -> Float[Tensor, ""]:
    """Push the base crops of a volume apart: mean of ``max(0, cos(b_i, b_j))^power`` over the pairs ``i < j``.

    Over a random subset of the bases its expected value is that over all of them.

    Args:
        bases: Embeddings of the base crops, at least two a volume.
        power: 2 as the released code, 1 as the paper.
        symmetric: Whether both members of a pair get a gradient; if not, only the first does.

    Returns:
        Mean over pairs and volumes, in [0, 1], float32.

    Raises:
        ValueError: if there is only one base.

    Reference: Wu, Zhuang, Chen, VoCo, CVPR 2024, arXiv:2402.17300, section 3.2.
    Deviations: symmetric by default, since otherwise the last base of a volume gets no gradient at all.
    """
    num = bases.shape[1]
    if num < 2:
        raise ValueError(f"{num} base crop a volume: a pair needs two. Give at least two bases.")
    with torch.autocast(bases.device.type, enabled=False):
        unit = _normalise(bases)
        other = unit if symmetric else unit.detach()
        first, second = torch.triu_indices(num, num, offset=1, device=bases.device)
        cosine = (unit @ other.transpose(1, 2))[:, first, second].clamp(0.0, 1.0)
        return cosine.pow(power).mean()


def _normalise(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    return F.normalize(x.float(), dim=-1, eps=EPS)


def _positive_weight(y: Float[Tensor, "b t n"], pos_weight: PosWeight) -> Float[Tensor, "b t n"]:
    if pos_weight == "overlap":
        return y
    return (y > 0).to(y.dtype) if pos_weight == "indicator" else torch.ones_like(y)


def _positive(
    s: Float[Tensor, "b t n"], y: Float[Tensor, "b t n"], *, weight: Float[Tensor, "b t n"]
) -> Float[Tensor, " b"]:
    distance = -torch.log((1.0 - (y - s).abs()).clamp(EPS, 1.0))
    return (weight * distance).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def _negative(s: Float[Tensor, "b t n"], y: Float[Tensor, "b t n"], form: NegForm) -> Float[Tensor, " b"]:
    if form == "paper":
        return s.new_zeros(len(s))
    apart = (y == 0).to(s.dtype)
    penalty = s.square() if form == "square" else -torch.log((1.0 - s).clamp(EPS, 1.0))
    return (apart * penalty).sum(dim=(1, 2)) / apart.sum(dim=(1, 2)).clamp(min=1.0)
