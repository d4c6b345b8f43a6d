"""Sizes that follow from a fingerprint: crops, batches, networks, presets, steps; each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medssl.augment.build import build_augment
from medssl.augment.images import Images
from medssl.augment.presets import Preset, preset, preset_names
from medssl.blueprint.fingerprint import Fingerprint
from medssl.errors import ConfigError

Triple = tuple[int, int, int]

_STEP = 8  # crops are multiples of it, so that three halvings leave no odd voxel
_LARGEST_AXIS = {3: 128, 2: 512}
_SMALLEST_AXIS = {3: 48, 2: 128}
_MOST_CHANNELS = {3: 320, 2: 512}
_SMALLEST_MAP = 4
_SMALL_CROP = 64**3
_BATCH = {3: 2, 2: 8}
_EPOCHS = (40, 400)
_STEPS = (1000, 250_000)


class Choice(NamedTuple):
    """One value of a recipe, by its dotted key, and why it has this value."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Network:
    """A backbone that may be taken.

    Args:
        backbone: As in a recipe.
        reason: What is good about it.
    """

    backbone: dict[str, Any]
    reason: str


def crop_of(shape: Sequence[int]) -> Triple:
    """The crop that is wished for: the whole median image, within what is sensible.

    Args:
        shape: Median voxels of an image, at the voxel size of the crops; 1 on the last axis for 2D.
    """
    dims = 2 if shape[2] == 1 else 3
    largest = _LARGEST_AXIS[dims]
    sizes = [min(largest, max(_STEP, math.ceil(n / _STEP) * _STEP)) for n in shape[:dims]]
    x, y, z = [*sizes, 1][:3]
    return x, y, z


def smaller_crops(crop: Triple, shape: Sequence[int]) -> Iterator[Triple]:
    """``crop``, and then ever smaller ones: each time the axis is cut that shows most of the image.

    Args:
        crop: To begin with.
        shape: Median voxels of an image.
    """
    dims = 2 if crop[2] == 1 else 3
    sizes = list(crop)
    while True:
        yield sizes[0], sizes[1], sizes[2]
        free = [axis for axis in range(dims) if sizes[axis] > _SMALLEST_AXIS[dims]]
        if not free:
            return
        axis = max(free, key=lambda axis: (sizes[axis] / shape[axis], sizes[axis]))
        sizes[axis] -= _STEP


def networks(crop: Triple) -> list[Network]:
    """U-Nets for a crop, the most accurate first and the cheapest last."""
    dims = 2 if crop[2] == 1 else 3
    halvings = max(2, min(5, math.floor(math.log2(min(crop[:dims]) / _SMALLEST_MAP))))
    depth = f"{halvings} halvings leave {min(crop[:dims]) // 2**halvings} voxels along the shortest edge of the crop"
    found = []
    for width in (32, 16):
        for first, where in (
            (1, "keeps features at full resolution"),
            (2, "starts at half resolution, which is cheap"),
        ):
            strides = [first, *[2] * (halvings if first == 1 else halvings - 1)]
            channels = [min(_MOST_CHANNELS[dims], width * 2**level) for level in range(len(strides))]
            backbone = {"name": "unet", "channels": channels, "strides": strides, "blocks": [1] * len(strides)}
            found.append(Network(backbone, f"{depth}; {width} channels; {where}"))
    return [found[0], found[2], found[1], found[3]]


def batch_of(crop: Triple) -> int:
    """Crops a step: two of a large volume, four of a small one, eight of a picture."""
    dims = 2 if crop[2] == 1 else 3
    return 2 * _BATCH[dims] if dims == 3 and math.prod(crop) <= _SMALL_CROP else _BATCH[dims]


def step_range(cases: int, batch_size: int) -> tuple[int, int]:
    """Fewest steps for which a larger network is worth its time, and most that are of use.

    They are 40 and 400 crops of each case, and at least 1,000 and at most 250,000 steps.
    """
    low, high = (epochs * cases // batch_size for epochs in _EPOCHS)
    return max(_STEPS[0], min(low, _STEPS[1] // 10)), max(2 * _STEPS[0], min(high, _STEPS[1]))


def preset_for(images: Images) -> tuple[str, str]:
    """Name of the gentlest preset that is made for such images, and why it is that one."""
    fitting = [found for found in map(preset, preset_names()) if _suits(found, images)]
    fitting.sort(key=lambda found: (found.region is None, found.modality is None, found.name))
    for found in fitting:
        try:
            build_augment({"preset": found.name}, images=images)
        except ConfigError:
            continue
        return found.name, found.description
    return "none", "no preset is made for such images; list augments that suit them"


def _suits(found: Preset, images: Images) -> bool:
    return (
        bool(found.augments)
        and not found.name.endswith("_strong")
        and images.spatial_dims in found.spatial_dims
        and found.domain == images.domain
        and found.modality in {None, images.modality}
        and found.region in {None, images.region}
    )


def sampling(found: Fingerprint) -> list[Choice]:
    """How often crops are centred on structures, and on which."""
    share = 0.67 if found.share > 1e-3 else 0.85
    ratio = found.volume_ratio
    return [
        Choice(
            "task.foreground_share",
            share,
            f"structures take {100 * found.share:.2g} % of a volume; a crop in three lies anywhere"
            if share < 0.7
            else f"structures take only {100 * found.share:.2g} % of a volume",
        ),
        Choice(
            "task.class_balance",
            "inverse_sqrt" if ratio > 10 else "uniform",
            f"the largest structure has {ratio:.2g} times the volume of the smallest"
            + ("; small ones are drawn more often" if ratio > 10 else "; each is drawn alike"),
        ),
    ]
