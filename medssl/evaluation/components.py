"""Clean a label map by connected components, structure by structure, and keep the rules with the weights.

``postprocess.json`` lies in the folder of the bundle, or of the ensemble, that it was chosen for, and names the digests
of those weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pydantic import Field
from scipy import ndimage

from medssl.config import Config
from medssl.errors import CheckpointError, ConfigError
from medssl.runfolder import atomic_write
from medssl.volume import Volume

NAME = "postprocess.json"
_TOUCHING = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner are one component


class Rule(Config):
    """What is done to one structure, in this order.

    Args:
        largest: Keep the largest component alone.
        min_ml: Remove components below this volume.
        fill_holes: Fill background that the structure encloses.
    """

    largest: bool = False
    min_ml: float = Field(0.0, ge=0)
    fill_holes: bool = False


Rules = Mapping[int, Rule]


def clean(labels: Volume, rules: Rules) -> Volume:
    """A label map after its rules; voxels that are removed become background, and only background is filled.

    Args:
        labels: Label map (1, X, Y, Z) on any grid.
        rules: By label value; structures without one stay as they are.
    """
    if not rules:
        return labels
    voxel_ml = abs(float(np.linalg.det(labels.geometry.affine[:3, :3]))) / 1000
    result = labels.array[0].copy()
    for value, rule in sorted(rules.items()):
        mask = result == value
        if not mask.any():
            continue
        kept = _kept(mask, rule, voxel_ml=voxel_ml)
        result[mask & ~kept] = 0
        if rule.fill_holes:
            result[_filled(kept) & (result == 0)] = value
    return Volume(result[None], labels.geometry, labels.unit)


def rules_path(bundle: Path | Sequence[Path]) -> Path:
    """Where the rules of a bundle or an ensemble lie: in its folder; of several bundles, in that of the first."""
    return (bundle if isinstance(bundle, Path) else bundle[0]) / NAME


def write_rules(path: Path, rules: Rules, *, weights: Iterable[str]) -> None:
    """Write the rules for the bundles whose ``digests.json`` have these digests."""
    content = {
        "weights": sorted(weights),
        "rules": {str(value): rule.to_dict() for value, rule in rules.items()},
    }
    atomic_write(path, json.dumps(content, indent=2))


def read_rules(path: Path, *, weights: Iterable[str]) -> dict[int, Rule]:
    """Read the rules; none where there is no such file.

    Raises:
        CheckpointError: if the file is damaged, or was chosen for other weights.
    """
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        rules = {int(value): Rule.parse(rule, source=str(path)) for value, rule in content["rules"].items()}
        chosen_for = content["weights"]
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: holds no rules of medssl. Remove it, or run medssl postprocess again.", code="E_DIGEST"
        ) from error
    if chosen_for != sorted(weights):
        raise CheckpointError(
            f"{path}: was chosen for other weights than these. Remove it, or run medssl postprocess again.",
            code="E_DIGEST",
        )
    return rules


def _kept(mask: Bool[np.ndarray, "x y z"], rule: Rule, *, voxel_ml: float) -> Bool[np.ndarray, "x y z"]:
    if not rule.largest and rule.min_ml == 0:
        return mask
    components, _ = ndimage.label(mask, structure=_TOUCHING)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    good = sizes * voxel_ml >= rule.min_ml
    good[0] = False
    if rule.largest:
        good &= np.arange(len(sizes)) == sizes.argmax()
    kept: Bool[np.ndarray, "x y z"] = good[components]
    return kept


def _filled(mask: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """The mask and what it encloses; of a picture, within the picture."""
    if mask.shape[2] == 1:
        filled: Bool[np.ndarray, "x y z"] = ndimage.binary_fill_holes(mask[..., 0])[..., None]
        return filled
    enclosed: Bool[np.ndarray, "x y z"] = ndimage.binary_fill_holes(mask)
    return enclosed
