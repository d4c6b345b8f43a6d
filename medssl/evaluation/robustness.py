"""Corrupted test images in five severities, and test images from other sites: does a model hold where data differ?"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Shaped
from pydantic import Field

from medssl.augment.base import Augment
from medssl.augment.build import augment_classes
from medssl.config import Config
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import ConfigError
from medssl.evaluation.findings import mean_of_runs
from medssl.evaluation.predict import score_stored
from medssl.evaluation.subgroups import NOT_STATED
from medssl.selection import labelled_subjects

Options = Mapping[str, Any]

SEVERITIES = (1, 2, 3, 4, 5)


def _range(name: str, values: Sequence[float], **fixed: Any) -> tuple[Options, ...]:
    return tuple({name: [value, value], **fixed} for value in values)


_ANY_IMAGE: Mapping[str, tuple[str, tuple[Options, ...]]] = {
    "blur": ("blur", _range("sigma_mm", (0.5, 1.0, 1.5, 2.0, 3.0))),
    "low_resolution": ("low_resolution", _range("zoom", (0.8, 0.65, 0.5, 0.4, 0.3))),
    "thick_slices": ("thick_slices", _range("thickness_mm", (2.0, 3.0, 4.0, 6.0, 8.0))),
}
_NOT_HU: Mapping[str, tuple[str, tuple[Options, ...]]] = {
    "noise": ("noise", _range("sigma", (0.1, 0.2, 0.3, 0.5, 0.8))),
    "contrast": ("contrast", _range("factor", (0.85, 0.7, 0.55, 0.45, 0.35))),
}
_MR: Mapping[str, tuple[str, tuple[Options, ...]]] = {
    "bias_field": ("bias_field", tuple({"coefficient": value} for value in (0.1, 0.2, 0.3, 0.45, 0.6))),
    "ghosting": ("ghosting", _range("intensity", (0.2, 0.35, 0.5, 0.65, 0.8), num_ghosts=[3, 3])),
    "motion": (
        "motion",
        tuple({"rotation_deg": [a] * 3, "translation_mm": [a] * 3, "num_moves": 2} for a in (1.0, 2.0, 3.0, 4.5, 6.0)),
    ),
}
_HU: Mapping[str, tuple[str, tuple[Options, ...]]] = {
    "noise": ("noise", _range("sigma", (10.0, 20.0, 40.0, 80.0, 120.0))),
    "shift": ("hu_shift", _range("shift_hu", (10.0, 20.0, 30.0, 50.0, 80.0))),
    "streaks": ("streaks", _range("amplitude_hu", (50.0, 100.0, 200.0, 400.0, 800.0))),
}


class RobustnessConfig(Config):
    """Which corruptions finished models are tried on.

    Args:
        corruptions: Names; all that suit the images if left out. For every image ``blur`` (standard deviation 0.5 to 3
            mm), ``low_resolution`` (0.8 to 0.3 of the voxels along each axis) and, for volumes, ``thick_slices`` (2 to
            8 mm); of MR and others ``noise`` (0.1 to 0.8 of
            the image's standard deviation) and ``contrast`` (0.85 to 0.35); of MR
            ``bias_field`` (coefficients to 0.1 up to 0.6), ``ghosting`` (0.2 to 0.8 of every third line lost) and
            ``motion`` (up to 1 to 6 degrees and mm); of CT ``noise`` (10 to 120 HU), ``shift`` (10 to 80 HU) and
            ``streaks`` (50 to 800 HU).
        severities: Of 1 to 5.
        budgets: Numbers of labelled subjects whose models are tried; the largest of the study if left out.

    Reference: Hendrycks, Dietterich, Benchmarking neural network robustness to common corruptions and perturbations,
        ICLR 2019, arXiv:1903.12261 (five severities, means over corruptions).
    Deviations: corruptions and strengths are those of medical images, and no error is divided by a baseline's.
    """

    corruptions: tuple[str, ...] | None = None
    severities: tuple[int, ...] = SEVERITIES
    budgets: tuple[int, ...] = Field(())

    def for_case(self, case: StoredCase) -> dict[str, list[tuple[int, Augment[Any]]]]:
        """Severities and what they do to an image like ``case``, by corruption.

        Raises:
            ConfigError: for a corruption that is unknown or does not suit, or a severity that is not 1 to 5.
        """
        known = _suiting(case)
        unknown = [name for name in self.corruptions or () if name not in known]
        if unknown or not set(self.severities) <= set(SEVERITIES) or not self.severities:
            raise ConfigError(
                f"robustness: {', '.join(unknown) or list(self.severities)} cannot be tried on these images; "
                f"corruptions are {', '.join(known)}, and severities 1 to 5."
            )
        classes = augment_classes()
        made: dict[str, list[tuple[int, Augment[Any]]]] = {}
        for name in self.corruptions or tuple(known):
            augment, options = known[name]
            cls = classes[augment]
            made[name] = [
                (level, cls(cls.config_class.parse(options[level - 1], source=f"corruption {name}")))
                for level in self.severities
            ]
        return made


class CorruptedCase(StoredCase):
    """A stored case whose image was changed; label, body and grids are those of the case.

    The change is drawn from the case id and the name of the corruption, so that it is the same for every model, and
    equal in kind for every severity.

    Args:
        case: The case.
        augment: What changes it.
        name: Of the corruption.
    """

    def __init__(self, case: StoredCase, augment: Augment[Any], name: str) -> None:
        self.__dict__.update(copy.copy(case.__dict__))
        image = case.read("image", (0, 0, 0), case.shape).astype(np.float32)
        self._arrays = {"image": _change(image, case, augment, seed=zlib.crc32(f"{name} {case.case_id}".encode()))}


def score_corrupted(
    bundle: Path,
    cases: Sequence[StoredCase],
    config: RobustnessConfig,
    *,
    nsd_tolerance_mm: float,
    device: str = "cpu",
) -> pd.DataFrame:
    """Score a model on every corruption and severity of the test images.

    Args:
        bundle: What ``finetune`` left.
        cases: Labelled cases.
        config: Corruptions.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        device: See :func:`medssl.evaluation.predict.predict`.

    Returns:
        ``corruption, severity`` and the columns of :func:`medssl.evaluation.predict.score_stored`.
    """
    tables = []
    for name, levels in config.for_case(cases[0]).items():
        for severity, augment in levels:
            corrupted = [CorruptedCase(case, augment, name) for case in cases]
            table = score_stored(bundle, corrupted, nsd_tolerance_mm=nsd_tolerance_mm, device=device)
            table.insert(0, "severity", severity)
            table.insert(0, "corruption", name)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def summarise_corruptions(corrupted: pd.DataFrame, *, clean: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Mean Dice of each arm, budget, corruption and severity, and what is lost against the clean images.

    Args:
        corrupted: Tables of :func:`score_corrupted` with ``arm, budget, seed``.
        clean: The same models on the clean images.
        arms: Their order.

    Returns:
        ``arm, budget, corruption, severity, dice, low, high, drop``; corruption "all" is the mean over corruptions, and
        severity 0 the clean images.
    """
    pairs = clean[["case_id", "label"]].drop_duplicates()
    corrupted = corrupted.merge(pairs, on=["case_id", "label"])  # what the study counts, and nothing else
    rows = []
    for arm in arms:
        for budget in sorted(corrupted["budget"].unique()):
            mine = corrupted[(corrupted["arm"] == arm) & (corrupted["budget"] == budget)]
            plain = mean_of_runs(clean[(clean["arm"] == arm) & (clean["budget"] == budget)])
            parts = {("all", level): part for level, part in mine.groupby("severity")}
            parts |= dict(iter(mine.groupby(["corruption", "severity"])))
            entries = {("all", 0): plain} | {key: mean_of_runs(part) for key, part in parts.items()}
            rows += [
                {
                    "arm": arm, "budget": budget, "corruption": name, "severity": level, "dice": found.mean,
                    "low": found.low, "high": found.high, "drop": plain.mean - found.mean,
                }
                for (name, level), found in entries.items()
            ]  # fmt: skip
    return pd.DataFrame(rows)


def summarise_sites(results: pd.DataFrame, store: ArrayStore, *, column: str, arms: Sequence[str]) -> pd.DataFrame:
    """Mean test Dice of each arm and budget at each site, and whether models have seen the site.

    Args:
        results: One row a case, structure and run.
        store: Whose facts name the site.
        column: Of the facts.
        arms: Their order.

    Returns:
        ``arm, budget, site, seen, subjects, dice, low, high``; ``seen`` is the share of seeds in whose labelled cases
        the site occurs.
    """
    sites = {case.case_id: case.facts.get(column, NOT_STATED) or NOT_STATED for case in store.cases}
    results = results.assign(site=results["case_id"].map(sites))
    rows = []
    for arm in arms:
        for (number, site), part in results[results["arm"] == arm].groupby(["budget", "site"]):
            budget, seeds = int(str(number)), [int(seed) for seed in part["seed"].unique()]
            found = mean_of_runs(part)
            rows.append(
                {
                    "arm": arm, "budget": budget, "site": site,
                    "seen": float(np.mean([site in _trained_on(store, sites, budget, seed) for seed in seeds])),
                    "subjects": part["subject_id"].nunique(), "dice": found.mean, "low": found.low, "high": found.high,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _trained_on(store: ArrayStore, sites: Mapping[str, str], budget: int, seed: int) -> set[str]:
    chosen = set(labelled_subjects(store, draw=seed)[:budget])
    return {sites[case.case_id] for case in store.select(split="train", labelled=True) if case.subject_id in chosen}


def _suiting(case: StoredCase) -> dict[str, tuple[str, tuple[Options, ...]]]:
    known = {**_ANY_IMAGE, **(_HU if case.unit == "HU" else _NOT_HU), **(_MR if case.modality == "MR" else {})}
    classes = augment_classes()
    dims = 2 if case.shape[2] == 1 else 3
    return {name: entry for name, entry in known.items() if dims in classes[entry[0]].spatial_dims}


def _change(
    image: Float32[np.ndarray, "c x y z"], case: StoredCase, augment: Augment[Any], *, seed: int
) -> Shaped[np.ndarray, "c x y z"]:
    dims = 2 if case.shape[2] == 1 else 3
    scale = 1.0 if case.unit == "HU" else float(image.std()) or 1.0  # strengths are shares of the spread
    x = torch.from_numpy(image / scale)[None]
    spacing = torch.tensor([case.spacing_mm[:dims]], dtype=torch.float64)
    changed: torch.Tensor = augment(x[..., 0] if dims == 2 else x, torch.tensor([seed]), spacing)
    result: np.ndarray = (changed[..., None] if dims == 2 else changed)[0].numpy()
    return result * np.float32(scale)
