"""Recipes that train in a second: the same networks and methods as the real ones, with less of everything."""

from __future__ import annotations

from typing import Any

BACKBONE: dict[str, Any] = {"name": "unet", "channels": [4, 8], "strides": [2, 2], "blocks": [1, 1]}

# the backbones whose defaults are too large for a test; those that are not named here are tested as they are
SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "genesis": {"width": 4, "levels": 3},
    "resnet": {"width": 8, "blocks": [1, 2, 1, 1]},
    "resenc": {"channels": [8, 16, 16], "strides": [1, 2, 2], "blocks": [1, 2, 1]},
    "vit": {"patch": 8, "embed": 24, "depth": 4, "heads": 2, "grid": 2, "neck": 4, "layer_scale": 0.5},
}

SCAN: dict[str, Any] = {
    "modality": "MR",
    "names": "keep",
    "fractions": {"train": 0.5, "val": 0.2, "test": 0.3},
    "workers": 1,
}

PREPARE: dict[str, Any] = {"modality": "MR", "spacing_mm": [1.5, 1.5, 1.5]}

VOCO: dict[str, Any] = {
    "backbone": BACKBONE,
    "method": {"name": "voco", "grid": [2, 2, 2], "crop_voxels": [8, 8, 8], "num_targets": 2},
    "train": {"steps": 20, "batch_size": 2, "lr": 2e-3, "warmup_steps": 2, "log_every": 5, "precision": "32"},
    "checks": {"batches": 1, "crops_per_case": 4},
}

MAE: dict[str, Any] = {
    **VOCO,
    "method": {"name": "mae", "crop_voxels": [16, 16, 16], "block_voxels": [4, 4, 4], "augment": {"preset": "none"}},
}

SEGMENT: dict[str, Any] = {
    "backbone": BACKBONE,
    "task": {"name": "segmentation", "crop_voxels": [16, 16, 16], "augment": {"preset": "mr_light"}},
    "train": {"steps": 20, "batch_size": 2, "lr": 4e-3, "warmup_steps": 2, "log_every": 5, "precision": "32"},
    "checks": {"batches": 1},
}


def shorter(recipe: dict[str, Any], steps: int, **train: Any) -> dict[str, Any]:
    """The recipe with so many steps."""
    return {**recipe, "train": {**recipe["train"], "steps": steps, "warmup_steps": 0, "log_every": 1, **train}}
