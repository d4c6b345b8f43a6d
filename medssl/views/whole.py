"""Whole images at one size, and bags of them: the images of a subject, or the slices of a volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64

from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, Triple, triple
from medssl.views.cutting import Cut, Views, notes
from medssl.views.placing import positive, require_mm

Fit = Literal["stretch", "pad"]

_Instance = tuple[CaseArrays, Cut]


class WholeImage:
    """The whole image, or every image of a bag, brought to one number of voxels.

    Gives ``image`` (C, *box) with its fields and notes (see :class:`~medssl.views.base.ViewSampler`), or, of a bag,
    ``image`` (n, C, *box) with its fields stacked likewise, and ``members`` (n,), which is false where a bag of fewer
    than ``n`` images was filled up. Of a larger bag ``n`` images are drawn without repetition.

    Args:
        crop_voxels: Voxels that every image is brought to.
        fit: ``stretch`` brings each axis to its number of voxels; ``pad`` keeps the ratio of edges in mm and fills
            what is missing.
        crop_mm: Edge lengths of what is shown, around the middle of the image; None shows all of it.
        is_sliced: A bag of the axial slices of ``cases[0]``; ``crop_voxels`` then ends in 1.
        bags: For each case id all cases of its bag.
        instances: Images of a bag that are drawn.

    Raises:
        ConfigError: for sizes that cannot be.
    """

    cases_per_sample = 1

    def __init__(
        self,
        crop_voxels: Sequence[int],
        *,
        fit: Fit = "stretch",
        crop_mm: Sequence[float] | None = None,
        is_sliced: bool = False,
        bags: Mapping[str, Sequence[CaseArrays]] | None = None,
        instances: int = 8,
    ) -> None:
        self.crop_voxels = triple("crop_voxels", crop_voxels)
        self.fit: Fit = fit
        self.crop_mm = positive("crop_mm", crop_mm)
        self.is_sliced = is_sliced
        self.bags = bags
        self.instances = instances

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut ``cases[0]``, or images of its bag."""
        found = self._instances(cases[0])
        if self.bags is None and not self.is_sliced:
            view = _read(found)[0]
            return {**view.single("image"), **notes(view)}
        count = min(len(found), self.instances)
        chosen = np.sort(rng.choice(len(found), count, replace=False))
        drawn = [found[int(chosen[n % count])] for n in range(self.instances)]
        members = np.arange(self.instances) < count
        return {**stacked(_read(drawn)), "members": members}

    def every(self, case: CaseArrays, *, most: int) -> dict[str, np.ndarray]:
        """Every image of the bag of ``case``, or ``most`` of them, evenly spread; for prediction."""
        found = self._instances(case)
        if len(found) > most:
            found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, most).round().astype(int))]
        return stacked(_read(found))

    def _instances(self, case: CaseArrays) -> list[_Instance]:
        members = [case] if self.bags is None else self.bags[case.case_id]
        if not self.is_sliced:
            return [(member, self._cut(member)) for member in members]
        return [(member, self._cut(member, z)) for member in members for z in range(member.shape[2])]

    def _cut(self, case: CaseArrays, z: int | None = None) -> Cut:
        """How the crop lies over the image, around its middle, or over one of its slices."""
        shape = np.asarray(case.shape, np.float64)
        size = self._size(case, shape)
        start = (shape - size) / 2
        if z is not None:
            start[2], size[2] = float(z), 1.0
        return Cut(Box.at(start, size), self.crop_voxels)

    def _size(self, case: CaseArrays, shape: Float64[np.ndarray, " 3"]) -> Float64[np.ndarray, " 3"]:
        """Edge lengths of what is shown, in voxels of the case."""
        spacing = np.asarray(case.spacing_mm)
        flat = np.asarray(self.crop_voxels) == 1
        if self.crop_mm is not None:
            require_mm(case, "crop_mm")
            return np.where(flat, shape, np.asarray(self.crop_mm) / spacing)
        if self.fit == "stretch":
            return shape
        coarsest = float((shape * spacing / self.crop_voxels)[~flat].max()) if not flat.all() else 1.0
        return np.where(flat, shape, coarsest * np.asarray(self.crop_voxels) / spacing)


def stacked(views: Sequence[Views]) -> dict[str, np.ndarray]:
    """The fields of single crops of several cases, one behind the other, with the notes of all."""
    fields = [view.single("image") for view in views]
    shared = [name for name in fields[0] if all(name in one for one in fields)]
    return {**{name: np.stack([one[name] for one in fields]) for name in shared}, **notes(*views)}


def _read(found: Sequence[_Instance]) -> list[Views]:
    """One crop of each, in boxes of one shape."""
    shape = np.max([cut.box_shape for _, cut in found], axis=0)
    views = []
    for case, cut in found:
        box = cut.read(case, "image", shape)
        views.append(Views(case, (cut,), box[None], (cut.is_constant(box),)))
    return views


def middle_crops(
    case: CaseArrays, crop_voxels: Triple, size: Float64[np.ndarray, " 3"], *, most: int
) -> dict[str, np.ndarray]:
    """Crops side by side over the box of the body, at most ``most``, evenly spread; for prediction.

    Args:
        case: The case.
        crop_voxels: Voxels of each crop.
        size: Its edges in voxels of the case.
        most: Limit.
    """
    start, extent = case.body_box
    axes = []
    for first, length, edge in zip(start, extent, size, strict=True):
        count = max(1, int(np.ceil(length / edge - 1e-6)))
        room = max(0.0, length - edge)
        offset = first + (length - edge) / 2 if count == 1 else first
        axes.append(np.floor(offset + np.linspace(0.0, room, count)) if count > 1 else np.array([np.floor(offset)]))
    starts = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    if len(starts) > most:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, most).round().astype(int))]
    return stacked(_read([(case, Cut(Box.at(one, size), crop_voxels)) for one in starts]))
