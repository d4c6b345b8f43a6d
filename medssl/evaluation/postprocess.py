"""Choose how label maps are cleaned, on the validation split alone.

A rule is kept for a structure only where it raises the mean Dice of the validation cases and the interval of the gain,
subjects drawn with replacement, does not reach below 0. A structure that is in neither map counts with a Dice of 1, so
that what was invented and is removed is a gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Integer
from pydantic import Field

from medssl.config import Config
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import NoInputError
from medssl.evaluation.components import Rule, clean, rules_path, write_rules
from medssl.evaluation.ensemble import load_ensemble, open_members, weight_digests
from medssl.evaluation.segment import segment_stored
from medssl.evaluation.sliding_window import Settings
from medssl.evaluation.statistics import cluster_bootstrap
from medssl.progress import track
from medssl.runfolder import atomic_write
from medssl.volume import Volume

TABLE = "postprocess.csv"


class PostprocessConfig(Config):
    """What is tried.

    Args:
        min_ml: Volumes below which components are removed, each tried by itself.
        overlap: Share by which neighbouring windows overlap.
        bootstrap: Draws of subjects.
        seed: Of the draws.
    """

    min_ml: tuple[float, ...] = (0.01, 0.1, 1.0)
    overlap: float = Field(0.5, ge=0, le=0.9)
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)

    @property
    def candidates(self) -> dict[str, Rule]:
        """Rules by name."""
        return {
            "largest": Rule(largest=True),
            "fill_holes": Rule(fill_holes=True),
            "largest, fill_holes": Rule(largest=True, fill_holes=True),
            **{f"min_ml {size:g}": Rule(min_ml=size) for size in self.min_ml},
        }


@dataclass(frozen=True)
class PostprocessResult:
    """Rules that were kept, by label value; the table of all that were tried; and where both lie."""

    rules: Mapping[int, Rule]
    table: pd.DataFrame
    path: Path

    def sentences(self) -> list[str]:
        """One for each structure."""
        found = []
        for value, part in self.table.groupby("label", sort=False):
            kept = part[part["kept"]]
            best = part.sort_values("gain", ascending=False, kind="stable").iloc[0]
            said = f"{best['rule']} gained {best['gain']:+.4f} ({best['low']:.4f} to {best['high']:.4f})"
            found.append(
                f"Label {value}: {said} in mean validation Dice; {'kept' if len(kept) else 'nothing is kept'}."
            )
        return found


def postprocess(
    bundle: Path | Sequence[Path], *, store: Path, config: PostprocessConfig | None = None, dry_run: bool = False
) -> PostprocessResult:
    """Choose the rules of a bundle or an ensemble, and leave them beside its weights for ``predict``.

    Args:
        bundle: As for ``predict``.
        store: What ``prepare`` wrote; its labelled cases of the split val are used, and no others.
        config: What is tried.
        dry_run: Check everything, but run and write nothing.

    Returns:
        The rules; ``postprocess.json`` and ``postprocess.csv`` lie in the folder of the bundle or ensemble.

    Raises:
        NoInputError: if there is no labelled validation case.
        CheckpointError: if the bundle is damaged or no segmentation model.
    """
    options = config or PostprocessConfig()
    members = open_members(bundle)
    cases = ArrayStore.open(store).select(split="val", labelled=True)
    if not cases:
        raise NoInputError(
            f"{store}: no labelled case in the split val, and rules are chosen nowhere else. Give it some, or do "
            "without rules."
        )
    settings = Settings(options.overlap)
    network = load_ensemble(members, settings=settings)
    path = rules_path(bundle)
    if dry_run:
        return PostprocessResult({}, pd.DataFrame(), path)
    passport = members[0].passport
    values = [value for value in passport.label_values or () if value != 0]
    gains: list[dict[str, Any]] = []
    for case in track(cases, "postprocess"):
        labels = segment_stored(case, network, passport=passport, settings=settings)
        gains += _gains(case, labels, values, options.candidates)
    table = _judge(pd.DataFrame(gains), options)
    rules = {int(row["label"]): options.candidates[row["rule"]] for _, row in table[table["kept"]].iterrows()}
    atomic_write(path.with_name(TABLE), table.to_csv(index=False))
    write_rules(path, rules, weights=weight_digests(members))
    return PostprocessResult(rules, table, path)


def _gains(
    case: StoredCase, labels: Volume, values: Sequence[int], candidates: Mapping[str, Rule]
) -> list[dict[str, Any]]:
    """Change of the Dice of each structure by each candidate."""
    reference = case.source_label()
    rows = []
    for value in values:
        before = _dice(labels.array[0], reference, value)
        for name, rule in candidates.items():
            after = _dice(clean(labels, {value: rule}).array[0], reference, value)
            rows.append({"label": value, "rule": name, "subject_id": case.subject_id, "gain": after - before})
    return rows


def _dice(labels: Integer[np.ndarray, "x y z"], reference: Integer[np.ndarray, "x y z"], value: int) -> float:
    found, drawn = labels == value, reference == value
    total = int(found.sum()) + int(drawn.sum())
    return 2 * int((found & drawn).sum()) / total if total else 1.0


def _judge(gains: pd.DataFrame, options: PostprocessConfig) -> pd.DataFrame:
    """Mean gain with its interval for each structure and candidate, and which one is kept."""
    rows: list[dict[str, Any]] = []
    for (label, rule), part in gains.groupby(["label", "rule"], sort=False):
        subjects = part["subject_id"].tolist()
        mean, low, high = cluster_bootstrap(part["gain"].to_numpy(), subjects, num=options.bootstrap, seed=options.seed)
        counts = {"cases": len(part), "subjects": len(set(subjects))}
        rows.append({"label": label, "rule": rule, "gain": mean, "low": low, "high": high, **counts, "kept": False})
    table = pd.DataFrame(rows)
    good = table[(table["gain"] > 0) & (table["low"] >= 0)]
    table.loc[good.groupby("label")["gain"].idxmax(), "kept"] = True
    return table
