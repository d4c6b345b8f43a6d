"""Single crops: anywhere in the body, or more often on a structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from medssl.errors import CaseError
from medssl.views.base import CaseArrays
from medssl.views.boxes import Box, triple
from medssl.views.cutting import Cut, Views, notes, read_views
from medssl.views.placing import Placing, Region, margin_voxels, positive, size_in_voxels


class CropSampler:
    """Crops of one size.

    Args:
        crop_voxels: Size of the crop; 1 on the last axis for 2D images.
        crop_mm: Edge lengths of the crop, so that it shows as much of every patient; None takes the voxels of the
            case as they are. An axis of one voxel is one slice of the case, whatever is said here.
        margin: Share of the crop's edge that is read beyond it on each side, so that a rotation finds tissue there;
            one number, or one for each axis.
        inside_body: Whether centres are drawn from the body mask, where the case has one.
        region: Share of the body box that centres lie in, for example ``{"SI": (0.3, 0.7)}``; axes are ``LR``, ``AP``
            and ``SI``, and grow to the right, to the front and to the head.

    Raises:
        ConfigError: for sizes, margins or a region that cannot be.
    """

    cases_per_sample = 1

    def __init__(
        self,
        crop_voxels: Sequence[int],
        *,
        crop_mm: Sequence[float] | None = None,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = False,
        region: Region | None = None,
    ) -> None:
        self.crop_voxels = triple("crop_voxels", crop_voxels)
        self.crop_mm = positive("crop_mm", crop_mm)
        self.margin = margin_voxels(margin, self.crop_voxels)
        self.placing = Placing(inside_body, dict(region or {}))

    def voxel_mm(self, case: CaseArrays) -> Float64[np.ndarray, " 3"]:
        """Edge lengths of a voxel of the crops of ``case``.

        Raises:
            CaseError: E_SPACING_UNKNOWN, if ``crop_mm`` meets a case whose voxel size is not known.
        """
        size: Float64[np.ndarray, " 3"] = self.size(case) * case.spacing_mm / np.asarray(self.crop_voxels)
        return size

    def size(self, case: CaseArrays) -> Float64[np.ndarray, " 3"]:
        """Edge lengths of the crop in voxels of ``case``."""
        return size_in_voxels(case, self.crop_voxels, self.crop_mm)

    def cut(
        self, case: CaseArrays, centres: Shaped[np.ndarray, "n 3"], rng: np.random.Generator, *, is_anywhere: bool
    ) -> Views:
        """One crop centred on one of ``centres``, or anywhere in the region if there are none."""
        size = self.size(case)

        def draw() -> list[Cut]:
            place = Box.at(self.placing.start(case, size, centres, rng), size)
            return [Cut(place, self.crop_voxels, self.margin, is_anywhere)]

        return read_views(case, [draw])


class RandomCrop(CropSampler):
    """One crop at a random place.

    Gives ``image`` (C, *box) with its fields and notes (see :class:`~medssl.views.base.ViewSampler`), ``crop_box_mm``
    (2, 3) within the prepared volume, and ``position`` (3,), the centre of the crop as a share of the volume, in
    [0, 1]. A volume smaller than the crop is filled evenly on both sides.

    Args:
        crop_voxels: As in :class:`CropSampler`, and so the others.
        crop_mm: Edge lengths of the crop.
        margin: Share of the edge read beyond the crop.
        inside_body: Whether the centre is drawn from the body mask.
        region: Share of the body box that the centre lies in.
    """

    def __init__(
        self,
        crop_voxels: Sequence[int],
        *,
        crop_mm: Sequence[float] | None = None,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = True,
        region: Region | None = None,
    ) -> None:
        super().__init__(crop_voxels, crop_mm=crop_mm, margin=margin, inside_body=inside_body, region=region)

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut one crop from ``cases[0]``."""
        case = cases[0]
        body = self.placing.body(case)
        views = self.cut(case, body, rng, is_anywhere=self.placing.inside_body and not len(body))
        place = views.cuts[0].place
        centre = (np.asarray(place.start) + np.asarray(place.size) / 2) / np.asarray(case.shape)
        return {
            **views.single("image"),
            "crop_box_mm": place.scaled(case.spacing_mm).to_array(),
            "position": np.clip(centre, 0, 1).astype(np.float32),
            **notes(views),
        }


class LabelledCrop(CropSampler):
    """One crop of image and label, more often on a structure than chance would have it.

    Gives ``image`` (C, *box) with its fields and notes (see :class:`~medssl.views.base.ViewSampler`), and ``label``
    (1, *box) on the same box. A centre that is too near the border is moved inwards, with the drawn voxel still in
    the crop.

    Args:
        crop_voxels: As in :class:`CropSampler`, and so the others.
        label_values: Values of the structures; 0 is background and never drawn.
        foreground_share: Probability that the crop is centred on a voxel of a structure, drawn from those that the case
            has in the region; otherwise the place is random.
        class_balance: ``uniform`` draws these evenly; ``inverse_sqrt`` in proportion to 1 / √(voxels of the structure
            in the case), for which each case is read in full once.
        annotated: Fact of a case that lists the values drawn in it, as in ``1;2``. Given, the crop comes with
            ``annotated`` (len(label_values),), whether each was; without an entry all were.
        crop_mm: Edge lengths of the crop.
        margin: Share of the edge read beyond the crop.
        inside_body: Whether the centre of a crop that is on no structure is drawn from the body mask.
        region: Share of the body box that the centre lies in.
    """

    def __init__(
        self,
        crop_voxels: Sequence[int],
        label_values: Sequence[int],
        *,
        foreground_share: float = 0.67,
        class_balance: Literal["uniform", "inverse_sqrt"] = "uniform",
        annotated: str | None = None,
        crop_mm: Sequence[float] | None = None,
        margin: float | Sequence[float] = 0.0,
        inside_body: bool = False,
        region: Region | None = None,
    ) -> None:
        super().__init__(crop_voxels, crop_mm=crop_mm, margin=margin, inside_body=inside_body, region=region)
        self.label_values = tuple(value for value in label_values if value != 0)
        self.foreground_share = foreground_share
        self.class_balance = class_balance
        self.annotated = annotated
        self._voxels: dict[str, Float64[np.ndarray, " v"]] = {}

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut one crop from ``cases[0]``.

        Raises:
            CaseError: if the case has no label, or E_LABEL_SET if what was drawn in it is not a list of values.
        """
        case = cases[0]
        if not case.has("label"):
            raise CaseError(f"case {case.case_id}: has no label, and this task needs one. Select labelled cases.")
        on_structure = rng.random() < self.foreground_share
        centres = self._structure(case, rng) if on_structure else self.placing.body(case)
        is_anywhere = (on_structure or self.placing.inside_body) and not len(centres)
        views = self.cut(case, centres, rng, is_anywhere=is_anywhere)
        made = {**views.single("image"), "label": views.cuts[0].read(case, "label"), **notes(views)}
        return made if self.annotated is None else {**made, "annotated": self._annotated(case, self.annotated)}

    def _structure(self, case: CaseArrays, rng: np.random.Generator) -> Shaped[np.ndarray, "n 3"]:
        """Sampled voxels of one of the structures that the case has in the region."""
        all_found = [self.placing.within(case, case.foreground_voxels(value)) for value in self.label_values]
        present = [place for place, found in enumerate(all_found) if len(found)]
        if not present:
            return np.empty((0, 3), np.int32)
        if self.class_balance == "uniform":
            return all_found[present[rng.integers(len(present))]]
        weights = 1 / np.sqrt(self._sizes(case)[present])
        return all_found[present[rng.choice(len(present), p=weights / weights.sum())]]

    def _sizes(self, case: CaseArrays) -> Float64[np.ndarray, " v"]:
        """Voxels of each structure in the case."""
        if case.case_id not in self._voxels:
            found, counts = np.unique(case.read("label", (0, 0, 0), case.shape), return_counts=True)
            of_value = dict(zip(found.tolist(), counts.tolist(), strict=True))
            self._voxels[case.case_id] = np.array([float(of_value.get(value, 1)) for value in self.label_values])
        return self._voxels[case.case_id]

    def _annotated(self, case: CaseArrays, fact: str) -> Bool[np.ndarray, " v"]:
        """Whether each structure was drawn in the case."""
        text = cast("Mapping[str, str]", getattr(case, "facts", {})).get(fact, "")
        parts = [part.strip() for part in text.split(";") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise CaseError(
                f"case {case.case_id}: the fact {fact} is not a list of label values such as 1;2. Correct the table "
                "and prepare again.",
                code="E_LABEL_SET",
            )
        return np.array([not parts or str(value) in parts for value in self.label_values])
