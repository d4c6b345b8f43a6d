"""Large and small crops of one volume: the small ones show a part of what the large ones show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float64, Shaped

from medssl.errors import ConfigError
from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, Triple, triple, union_fraction
from medssl.views.cutting import Cut, notes, read_views
from medssl.views.placing import Placing, Region, margin_voxels, positive, size_in_voxels

_TRIES = 16

_Edges = Float64[np.ndarray, " 3"]


class MultiCrop:
    """Global crops, each of a large share of the volume, and local crops, each of a small share.

    A crop shows a share ``v`` of the reference, ``v`` drawn evenly, with edges ``reference_i * v^(1/d) * a_i`` along
    its ``d`` axes of more than one voxel; the ``a_i`` have a product of 1, and no edge is longer than the reference.
    All crops of a kind have the same voxels, so that their voxel sizes differ.

    Gives ``globals`` (G, C, *box) and, if there are any, ``locals`` (L, C, *box), with their fields and notes (see
    :class:`~medssl.views.base.ViewSampler`); ``locals_overlap`` (L,), the share of each local crop that lies in any
    global one; and ``note_moved``, the share of local crops that had to be moved into a global one.

    Args:
        global_voxels: Voxels of every global crop.
        local_voxels: Voxels of every local crop.
        num_global: Global crops a sample.
        num_local: Local crops a sample.
        global_share: Smallest and largest share of a global crop, in (0, 1].
        local_share: The same for a local crop; none may be larger than the smallest global one.
        min_overlap: At least this share of every local crop lies in the union of the global ones.
        aspect: Largest ratio by which one edge is stretched against the others before they are brought to volume.
        crop_mm: Edge lengths of the reference; None takes the whole volume.
        margin: Share of the crop's edge that is read beyond it on each side, one number or one for each axis.
        inside_body: Whether centres are drawn from the body mask, where the case has one.
        region: Share of the body box that centres lie in, as in :class:`~medssl.views.crops.CropSampler`.

    Raises:
        ConfigError: for numbers, shares or sizes that cannot be.

    Reference: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, SwAV, NeurIPS 2020, arXiv:2006.09882, section 3.3.
    Deviations: shares are of a volume in 3D; a local crop must overlap the global ones, since two crops of a body may
    otherwise show nothing in common; edges are limited together, so that the share is always as drawn.
    """

    cases_per_sample = 1

    def __init__(
        self,
        global_voxels: Sequence[int],
        local_voxels: Sequence[int],
        *,
        num_global: int = 2,
        num_local: int = 6,
        global_share: tuple[float, float] = (0.4, 1.0),
        local_share: tuple[float, float] = (0.05, 0.4),
        min_overlap: float = 0.5,
        aspect: float = 4 / 3,
        crop_mm: Sequence[float] | None = None,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = True,
        region: Region | None = None,
    ) -> None:
        self.global_voxels = triple("global_voxels", global_voxels)
        self.local_voxels = triple("local_voxels", local_voxels)
        self.num_global, self.num_local = num_global, num_local
        self.global_share, self.local_share = global_share, local_share
        self.min_overlap, self.aspect = min_overlap, aspect
        self.crop_mm = positive("crop_mm", crop_mm)
        self.global_margin = margin_voxels(margin, self.global_voxels)
        self.local_margin = margin_voxels(margin, self.local_voxels)
        self.placing = Placing(inside_body, dict(region or {}))
        if num_global < 1 or num_local < 0 or not 0 <= min_overlap <= 1 or aspect < 1:
            raise ConfigError(
                f"num_global {num_global}, num_local {num_local}, min_overlap {min_overlap}, aspect {aspect}: "
                "they need at least 1, at least 0, 0 to 1, and at least 1."
            )
        shares = (*local_share[:2], *global_share[:2])
        if not 0 < shares[0] <= shares[1] <= shares[2] <= shares[3] <= 1:
            raise ConfigError(
                f"local_share {list(local_share)}, global_share {list(global_share)}: they must rise from above 0 to "
                "at most 1, the local ones first. Lower local_share."
            )

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut the crops from ``cases[0]``.

        Raises:
            CaseError: E_SPACING_UNKNOWN, if ``crop_mm`` is used with a case whose voxel size is not known.
        """
        case = cases[0]
        body = self.placing.body(case)
        sizes = [self._edges(case, self.global_voxels, self.global_share, rng) for _ in range(self.num_global)]
        large = read_views(case, [partial(self._draw_global, case, size, body, rng) for size in sizes])
        if not self.num_local:
            return {**large.fields("globals"), **notes(large)}
        places = np.stack([cut.place.to_array() for cut in large.cuts])
        hosts = [places[rng.integers(self.num_global)] for _ in range(self.num_local)]
        sizes = [self._local_edges(case, host, rng) for host in hosts]
        draws = [
            partial(self._draw_local, case, size, body, rng, places=places, host=host)
            for size, host in zip(sizes, hosts, strict=True)
        ]
        small = read_views(case, draws)
        overlaps = [union_fraction(cut.place.to_array(), places) for cut in small.cuts]
        return {
            **large.fields("globals"),
            **small.fields("locals"),
            "locals_overlap": np.asarray(overlaps, np.float32),
            **notes(large, small),
            "note_moved": np.asarray(np.mean([cut.is_moved for cut in small.cuts]), np.float32),
        }

    def _draw_global(
        self, case: CaseArrays, size: _Edges, body: Shaped[np.ndarray, "n 3"], rng: np.random.Generator
    ) -> list[Cut]:
        place = Box.at(self.placing.start(case, size, body, rng), size)
        return [Cut(place, self.global_voxels, self.global_margin, self._is_anywhere(body))]

    def _draw_local(
        self,
        case: CaseArrays,
        size: _Edges,
        body: Shaped[np.ndarray, "n 3"],
        rng: np.random.Generator,
        *,
        places: Float64[np.ndarray, "g 2 3"],
        host: Float64[np.ndarray, "2 3"],
    ) -> list[Cut]:
        """The first of some random places that overlaps the global crops enough, or the last, moved into ``host``."""
        is_moved = False
        for _ in range(_TRIES):
            start = self.placing.start(case, size, body, rng)
            if union_fraction(np.stack([start, size]), places) >= self.min_overlap:
                break
        else:
            first, last = host[0], host[0] + host[1] - size
            start = np.clip(start, np.minimum(first, np.ceil(last)), np.maximum(first, np.floor(last)))
            is_moved = True
        return [Cut(Box.at(start, size), self.local_voxels, self.local_margin, self._is_anywhere(body), is_moved)]

    def _edges(self, case: CaseArrays, voxels: Triple, share: tuple[float, float], rng: np.random.Generator) -> _Edges:
        """Edges of a crop of a random share and aspect, in voxels of the case."""
        reference = self._reference(case, voxels)
        free = np.asarray(voxels) > 1
        mean = math.log(rng.uniform(*share)) / max(1, free.sum())
        stretch = rng.uniform(-1.0, 1.0, 3) * math.log(self.aspect) * free
        stretch -= stretch[free].mean() * free if free.any() else 0.0
        room = np.divide(-mean, stretch, out=np.full(3, np.inf), where=stretch > 0)
        edges: _Edges = reference * np.where(free, np.exp(mean + min(1.0, room.min()) * stretch), 1.0)
        return edges

    def _local_edges(self, case: CaseArrays, host: Float64[np.ndarray, "2 3"], rng: np.random.Generator) -> _Edges:
        """Edges of a local crop; those of ``host``, made smaller, where the drawn ones could not overlap it enough."""
        size = self._edges(case, self.local_voxels, self.local_share, rng)
        if np.prod(np.minimum(1.0, host[1] / size)) >= self.min_overlap:
            return size
        free = np.asarray(self.local_voxels) > 1
        shrink = (np.prod(size[free]) / np.prod(host[1, free])) ** (1 / free.sum())
        smaller: _Edges = np.where(free, host[1] * min(1.0, shrink), size)
        return smaller

    def _reference(self, case: CaseArrays, voxels: Triple) -> _Edges:
        """Edges, in voxels of the case, of what shares are taken of."""
        if self.crop_mm is not None:
            return size_in_voxels(case, voxels, self.crop_mm)
        return np.where(np.asarray(voxels) == 1, 1.0, np.asarray(case.shape, np.float64))

    def _is_anywhere(self, body: Shaped[np.ndarray, "n 3"]) -> bool:
        return self.placing.inside_body and not len(body)
