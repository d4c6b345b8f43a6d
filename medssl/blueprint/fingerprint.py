"""What the labelled cases of a store are: sizes, voxels, values, and how much there is of each structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from medssl.data.splits import Split
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import ConfigError, NoInputError
from medssl.views import median_mm

MOST_READ = 100
"""Training cases whose label maps are read in full, spread evenly over all."""

_MOST_VALUES = 20_000
_HU_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Structure:
    """One label value among the training cases.

    Args:
        value: In the label maps.
        cases: Labelled training cases that have it.
        volume_ml: Median over the cases that were read and have it.
        share: Median share of the volume's voxels, likewise.
    """

    value: int
    cases: int
    volume_ml: float
    share: float


@dataclass(frozen=True)
class Fingerprint:
    """The labelled cases of a store.

    Args:
        cases: Labelled training cases.
        subjects: Their subjects.
        read: Training cases whose arrays were read.
        empty: Labelled training cases without any structure.
        shape: Median voxels along each axis.
        spacing_mm: Median voxel size.
        spacing_ratio: Largest through smallest voxel size along the axis where they differ most.
        is_metric: Whether every case states its voxel size.
        structures: Every label value of the store, ascending.
        absent: Structures that no labelled case of a split has, for splits with labelled cases.
        hu_range: 0.5th and 99.5th percentile inside the structures; None where values are not HU.
    """

    cases: int
    subjects: int
    read: int
    empty: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    spacing_ratio: float
    is_metric: bool
    structures: tuple[Structure, ...]
    absent: dict[str, tuple[int, ...]]
    hu_range: tuple[float, float] | None

    @property
    def volume_ratio(self) -> float:
        """Volume of the largest structure through that of the smallest."""
        volumes = [structure.volume_ml for structure in self.structures]
        return max(volumes) / min(volumes)

    @property
    def share(self) -> float:
        """Share of the voxels of a volume that the median structures take together."""
        return sum(structure.share for structure in self.structures)


def fingerprint(store: ArrayStore, *, ignore_value: int | None = None) -> Fingerprint:
    """Look at the labelled cases of ``store``.

    Args:
        store: Opened.
        ignore_value: Label value that is no structure.

    Raises:
        ConfigError: E_LABEL_SET, if all label maps are empty, or no training case has one of the structures.
        NoInputError: if no training case is labelled.
    """
    cases = store.select(split="train", labelled=True)
    if not cases:
        raise NoInputError(f"{store.path}: no labelled case in the split train. Scan and prepare again with labels.")
    values = [value for value in store.label_values if value != ignore_value]
    if not values:
        raise ConfigError(
            f"{store.path}: the label maps of all {len(cases)} training cases are empty. Correct the labels, then scan "
            "and prepare again.",
            code="E_LABEL_SET",
        )
    has = {value: sum(value in _values(case) for case in cases) for value in values}
    if unseen := [value for value, count in has.items() if not count]:
        raise ConfigError(
            f"{store.path}: no case in the split train has the label values {unseen}, so that nothing can learn them. "
            "Move a subject that has them to train, or take them out of the label maps.",
            code="E_LABEL_SET",
        )
    chosen = cases[:: -(-len(cases) // MOST_READ)]
    volumes, shares, hu = _contents(chosen, values, wants_hu=store.unit == "HU")
    spacings = np.array([case.spacing_mm for case in cases])
    x, y, z = median_mm(list(spacings))
    shape = np.median([case.shape for case in cases], axis=0).round().astype(int)
    return Fingerprint(
        cases=len(cases),
        subjects=len({case.subject_id for case in cases}),
        read=len(chosen),
        empty=sum(not set(_values(case)) & set(values) for case in cases),
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        spacing_mm=(x, y, z),
        spacing_ratio=float((spacings.max(axis=0) / spacings.min(axis=0)).max()),
        is_metric=all(case.is_metric for case in cases),
        structures=tuple(
            Structure(value, has[value], float(np.median(volumes[value])), float(np.median(shares[value])))
            for value in values
        ),
        absent=_absent(store, values),
        hu_range=None if hu is None else (round(float(hu[0])), round(float(hu[1]))),
    )


def _contents(
    cases: Sequence[StoredCase], values: Sequence[int], *, wants_hu: bool
) -> tuple[dict[int, list[float]], dict[int, list[float]], np.ndarray | None]:
    """Volume in ml and share of each structure in each case that has it, and percentiles of HU inside them."""
    volumes: dict[int, list[float]] = {value: [] for value in values}
    shares: dict[int, list[float]] = {value: [] for value in values}
    inside: list[np.ndarray] = []
    for case in cases:
        label = case.read("label", (0, 0, 0), case.shape)[0]
        voxel_ml = float(np.prod(case.spacing_mm)) / 1000
        found, counts = np.unique(label, return_counts=True)
        for value, count in zip(found.tolist(), counts.tolist(), strict=True):
            if value in volumes:
                volumes[value].append(count * voxel_ml)
                shares[value].append(count / label.size)
        if wants_hu:
            image = case.read("image", (0, 0, 0), case.shape)[0][np.isin(label, values)]
            inside.append(image[:: max(1, len(image) // _MOST_VALUES)].astype(np.float32))
    for value in values:  # a structure of few cases may be in none that was read
        volumes[value] = volumes[value] or [0.001]
        shares[value] = shares[value] or [0.0]
    every = np.concatenate(inside) if inside else np.empty(0)
    return volumes, shares, np.percentile(every, _HU_PERCENTILES) if len(every) else None


def _values(case: StoredCase) -> Sequence[int]:
    found: Sequence[int] = case.meta["label_values"]
    return found


def _absent(store: ArrayStore, values: Sequence[int]) -> dict[str, tuple[int, ...]]:
    absent = {}
    for split in get_args(Split):
        cases = store.select(split=split, labelled=True)
        seen = {value for case in cases for value in _values(case)}
        if cases and (missing := tuple(value for value in values if value not in seen)):
            absent[str(split)] = missing
    return absent
