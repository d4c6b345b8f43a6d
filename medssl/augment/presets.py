"""Named lists of augments for a modality and a part of the body, with a reason for every value.

A preset is a file in ``medssl/augment/library``. None mirrors but where the anatomy has no sides; ask for ``mirror`` by
name where it may.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files

from pydantic import JsonValue

from medssl.augment.images import Domain
from medssl.config import Config, parse_yaml
from medssl.errors import ConfigError

_LIBRARY = files("medssl.augment") / "library"


class Preset(Config):
    """What a name in a recipe stands for.

    Args:
        name: As in ``{preset: ct_chest}``.
        description: One sentence: what it is for and what it leaves out.
        modality: Of the images that it is for; None for any.
        region: Part of the body, one of ``medssl.augment.anatomy.REGIONS``; None for any.
        spatial_dims: 2 for images of one slice, 3 for volumes.
        domain: What stored values must mean; None for any.
        augments: As they would be written in a recipe.
        reasons: Of each augment, option by option: why this value.
    """

    name: str
    description: str
    modality: str | None
    region: str | None
    spatial_dims: tuple[int, ...]
    domain: Domain | None
    augments: tuple[dict[str, JsonValue], ...]
    reasons: tuple[dict[str, str], ...]


@cache
def preset_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in _LIBRARY.iterdir() if entry.name[-5:] == ".yaml"))


@cache
def preset(name: str) -> Preset:
    """What ``name`` stands for.

    Raises:
        ConfigError: E_UNKNOWN_NAME, for an unknown name.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(preset_names())}."
        raise ConfigError(f"augment: there is no preset {name!r}; {hint}", code="E_UNKNOWN_NAME")
    source = f"preset {name}"
    content = parse_yaml((_LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"), source=source)
    listed = [dict(entry) for entry in content.pop("augments")]
    reasons = [entry.pop("reasons", {}) for entry in listed]
    return Preset.parse({"name": name, **content, "augments": listed, "reasons": reasons}, source=source)
