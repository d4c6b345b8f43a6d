"""Named lists of augments, as they would be written in a recipe.

No preset mirrors: left and right are different places. Ask for ``mirror`` by name where the anatomy allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssl.errors import ConfigError

_AFFINE = {"name": "affine", "p": 0.5, "rotation_deg": [10.0, 10.0, 15.0], "scale": [0.85, 1.18]}

_MR_LIGHT: tuple[Mapping[str, Any], ...] = (
    _AFFINE,
    {"name": "noise", "p": 0.2, "sigma": [0.0, 0.1]},
    {"name": "blur", "p": 0.2, "sigma_mm": [0.4, 1.0]},
    {"name": "brightness", "p": 0.2, "shift": [-0.2, 0.2]},
    {"name": "contrast", "p": 0.2, "factor": [0.8, 1.25]},
    {"name": "gamma", "p": 0.3, "gamma": [0.75, 1.33]},
)

_MR_STRONG: tuple[Mapping[str, Any], ...] = (
    {**_AFFINE, "p": 0.8, "rotation_deg": [20.0, 20.0, 30.0], "scale": [0.7, 1.43], "shear": 0.1},
    {"name": "bias_field", "p": 0.3, "coefficient": 0.3},
    {"name": "noise", "p": 0.3, "sigma": [0.0, 0.25]},
    {"name": "blur", "p": 0.3, "sigma_mm": [0.4, 1.5]},
    {"name": "brightness", "p": 0.4, "shift": [-0.5, 0.5]},
    {"name": "contrast", "p": 0.4, "factor": [0.65, 1.5]},
    {"name": "low_resolution", "p": 0.25, "zoom": [0.5, 1.0]},
    {"name": "gamma", "p": 0.5, "gamma": [0.6, 1.67]},
)

_CT_LIGHT: tuple[Mapping[str, Any], ...] = (
    _AFFINE,
    {"name": "window", "low_hu": -175.0, "high_hu": 250.0, "jitter_hu": 20.0},
    {"name": "noise", "p": 0.2, "sigma": [0.0, 0.05]},
    {"name": "blur", "p": 0.2, "sigma_mm": [0.4, 1.0]},
    {"name": "gamma", "p": 0.2, "gamma": [0.8, 1.25]},
)

PRESETS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "none": (),
    "mr_light": _MR_LIGHT,
    "mr_strong": _MR_STRONG,
    "ct_light": _CT_LIGHT,
}


def preset(name: str) -> tuple[Mapping[str, Any], ...]:
    """The list of augments that ``name`` stands for.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"augment preset {name!r} is unknown; known are {', '.join(PRESETS)}.", code="E_UNKNOWN_NAME")
    return PRESETS[name]
