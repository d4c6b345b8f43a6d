"""Along which axes a bundle's images may be mirrored at test time, and which classes then change places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medssl.augment.anatomy import REGIONS
from medssl.errors import ConfigError
from medssl.evaluation.sliding_window import Axis
from medssl.nn.bundle import Passport

_SIDES = ("left", "right")


def check_mirrors(passport: Passport, axes: Sequence[Axis]) -> None:
    """Allow axes along which a mirrored image could have been made, or that the network was trained with.

    Raises:
        ConfigError: E_MIRROR, for an axis along which the anatomy is not symmetric, where nobody said what the images
            show, or for LR where structures have a side and the recipe does not say which change places.
    """
    trained = {axis for entry in _mirrors(passport) for axis in entry.get("axes", ("LR",))}
    region = passport.prepare.get("region")
    for axis in axes:
        if axis == "SI" and passport.spatial_dims == 2:
            raise ConfigError(
                "mirror_axes: SI, and the network sees single slices, which have LR and AP. Leave SI out.",
                code="E_MIRROR",
            )
        if axis not in trained and region is None:
            raise ConfigError(
                f"mirror_axes: {axis}, and nobody said which part of the body the images show; most may not be "
                "mirrored. Leave it out, or set region in the preparation.",
                code="E_MIRROR",
            )
        if axis not in trained and axis not in REGIONS[str(region)].mirrors:
            raise ConfigError(
                f"mirror_axes: {axis} on images of the {region}. {REGIONS[str(region)].reason(axis)} Leave it out.",
                code="E_MIRROR",
            )
        sided = [name for name in passport.label_names or () if any(side in name.lower() for side in _SIDES)]
        if axis == "LR" and sided and not class_swaps(passport):
            raise ConfigError(
                f"mirror_axes: LR, and the structures {', '.join(sided)} have a side. Leave LR out, or train with "
                "mirror and its swap_labels.",
                code="E_MIRROR",
            )


def class_swaps(passport: Passport) -> list[tuple[int, int]]:
    """Classes that change places with left and right, as the mirror of the training recipe says."""
    values = passport.label_values or ()
    pairs = {tuple(pair) for entry in _mirrors(passport) for pair in entry.get("swap_labels", ())}
    return sorted((values.index(a), values.index(b)) for a, b in pairs if a in values and b in values)


def _mirrors(passport: Passport) -> Iterator[Mapping[str, Any]]:
    """Options of each mirror among the augments of the training recipe."""
    task = passport.recipe.get("task")
    augment = task.get("augment") if isinstance(task, Mapping) else None
    if isinstance(augment, list):
        yield from (entry for entry in augment if isinstance(entry, Mapping) and entry.get("name") == "mirror")
