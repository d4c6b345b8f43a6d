"""What a run starts from and what it leaves: weights that fit the data, and the passport."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, cast

import numpy as np
import torch

from medssl.augment.build import build_augment
from medssl.augment.images import Domain, Images
from medssl.augment.pipeline import Pipeline
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import CheckpointError, ConfigError
from medssl.methods.base import Method
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import Bundle, Passport
from medssl.registry import configure
from medssl.tasks.base import Task
from medssl.views import CaseArrays, ViewSampler, median_mm

_log = logging.getLogger(__name__)

SpatialDims = Literal[2, 3]

_MOST_OUTSIDE = 0.9
_MUCH_OUTSIDE = 0.3
_MUCH_FINER = 2.0


def load_encoder(network: Backbone, bundle: Bundle, store: ArrayStore, *, adapt_stem: bool = False) -> dict[str, Any]:
    """Copy a bundle's weights into ``network``, all or none; give what identifies them, and what was fitted.

    Args:
        network: Changed in place.
        bundle: Of an encoder of the same form.
        store: Whose images the network is going to see.
        adapt_stem: Fit the first layer to another number of channels rather than refuse.

    Raises:
        CheckpointError: ``E_CONTRACT`` if the bundle has another architecture or number of channels, or its images
            were prepared in another way.
    """
    folder, passport = bundle.folder, bundle.passport
    bundle.require_form(network, adapt_stem=adapt_stem)
    free = {"region", "channels"} if adapt_stem else {"region"}
    voxels = {key: value for key, value in passport.prepare.items() if key not in free}
    changed = [key for key, value in voxels.items() if store.prepare_config.get(key) != value]
    if changed:
        raise CheckpointError(
            f"{folder}: its images were prepared with another {', '.join(changed)} than those of {store.path}. "
            "Prepare the labelled images with the configuration that the encoder was pretrained with.",
            code="E_CONTRACT",
        )
    report = bundle.load_encoder(network, adapt_stem=adapt_stem)
    return {
        "encoder": passport.method,
        "encoder_digest": hashlib.sha256((folder / "digests.json").read_bytes()).hexdigest(),
        "encoder_data": passport.data_fingerprint,
        "encoder_tensors": f"{len(report.matched)} of {len(network.state_dict())} matched",
        **({"encoder_adapted": list(report.adapted)} if report.adapted else {}),
    }


def window_warnings(bundle: Bundle, augment: Pipeline) -> list[str]:
    """What is to be said if the encoder learned under another HU window than it will be trained under now."""
    recipe, mine = bundle.passport.recipe, augment.fixed
    if not mine or not recipe.keys() & {"method", "task"}:
        return []
    config = (
        configure("methods", recipe["method"], Method)  # type: ignore[type-abstract]
        if "method" in recipe
        else configure("tasks", recipe["task"], Task)  # type: ignore[type-abstract]
    )[1]
    theirs = build_augment(cast("Any", config).augment).fixed
    if theirs == mine:
        return []
    sentence = (
        f"the encoder was pretrained under {_in_words(theirs)} and is fine-tuned under {_in_words(mine)}; "
        "give both the same"
    )
    _log.warning("%s: %s.", bundle.folder, sentence)
    return [sentence]


def images_of(store: ArrayStore, cases: Sequence[StoredCase]) -> Images:
    """What is known of the images of ``cases``, for augmentation to be checked against.

    Raises:
        ConfigError: if they are not all of one number of channels, and all volumes or all images of one slice; or if
            their axes are not in the order by which augments know left and right, front and back, head and foot.
    """
    spatial_dims = spatial_dims_of(cases)
    orientation = str(store.prepare_config.get("orientation", "RAS"))
    if spatial_dims == 3 and not all(
        letter in pair for letter, pair in zip(orientation, ("RL", "AP", "SI"), strict=True)
    ):
        raise ConfigError(
            f"{store.path}: the array axes of its volumes point to {orientation}, and training needs left-right, "
            "front-back and head-foot in this order. Prepare it anew with orientation RAS."
        )
    mode = store.prepare_config.get("intensity", {}).get("mode")
    domains: dict[str | None, Domain] = {"hu": "HU", "robust_zscore": "zscore"}
    modalities = {case.modality for case in cases}
    x, y, z = median_mm([case.spacing_mm for case in cases])
    return Images(
        domain=domains.get(mode, "raw"),
        modality=modalities.pop() if len(modalities) == 1 else store.modality,
        region=store.prepare_config.get("region"),
        spacing_mm=(x, y, z),
        spatial_dims=spatial_dims,
        channels=_channels(cases),
    )


def fresh_encoder(
    backbone: Mapping[str, Any], images: Images, *, augment: Sequence[Mapping[str, Any]] | Mapping[str, Any], seed: int
) -> Backbone:
    """Build the backbone for the images as ``augment`` gives them, its weights drawn from ``seed``."""
    channels = build_augment(augment).channels_out(images.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(backbone, in_channels=channels, spatial_dims=images.spatial_dims)


def spatial_dims_of(cases: Sequence[StoredCase]) -> SpatialDims:
    """2 for images of one slice, 3 for volumes; a mixture is refused."""
    flat = {case.shape[2] == 1 for case in cases}
    if len(flat) > 1:
        raise ConfigError(
            "the store mixes images of one slice with volumes; one kind is needed. Prepare it anew with spatial_dims 2 "
            "or 3, which leaves the others out."
        )
    return 2 if flat.pop() else 3


def crop_warnings(sampler: ViewSampler, cases: Sequence[CaseArrays]) -> list[str]:
    """What is to be said of crops that do not suit the volumes, for the median case.

    Raises:
        ConfigError: E_CROP, if nine tenths of a crop or more would lie outside the volume.
    """
    crop = getattr(sampler, "crop_voxels", None)
    voxel_mm = getattr(sampler, "voxel_mm", None)
    if crop is None or voxel_mm is None:
        return []
    sizes_mm = np.array([voxel_mm(case) for case in cases])
    volumes_mm = np.array([np.multiply(case.shape, case.spacing_mm) for case in cases])
    finer = np.median([np.divide(case.spacing_mm, size) for case, size in zip(cases, sizes_mm, strict=True)], axis=0)
    inside = float(np.median(np.minimum(1.0, volumes_mm / (sizes_mm * crop)).prod(axis=1)))
    volume, crop_mm = (np.round(np.median(mm, axis=0), 1).tolist() for mm in (volumes_mm, sizes_mm * crop))
    if inside <= 1 - _MOST_OUTSIDE:
        raise ConfigError(
            f"crops of {crop_mm} mm in volumes of {volume} mm: {1 - inside:.0%} of a crop would be filling. Make "
            "crop_voxels or crop_mm smaller.",
            code="E_CROP",
        )
    said = []
    if inside < 1 - _MUCH_OUTSIDE:
        said.append(f"crops of {crop_mm} mm in volumes of {volume} mm: {1 - inside:.0%} of a crop is filling")
    if finer.max() > _MUCH_FINER:
        said.append(
            f"crops have {finer.max():.1f} times as many voxels along one axis as the stored volumes, which are "
            "stretched; smaller crops cost less and show the same"
        )
    for sentence in said:
        _log.warning("%s.", sentence)
    return said


def _channels(cases: Sequence[StoredCase]) -> int:
    channels = Counter(case.channels for case in cases)
    if len(channels) > 1:
        few = min(channels, key=lambda number: channels[number])
        first = next(case.case_id for case in cases if case.channels == few)
        counts = " and ".join(f"{count} of {number}" for number, count in sorted(channels.items()))
        raise ConfigError(
            f"the store mixes images of several numbers of channels: {counts} (such as {first}); one number is needed. "
            f"Prepare it anew with channels: {max(channels, key=lambda number: channels[number])}, which leaves the "
            "others out.",
            code="E_CHANNELS",
        )
    return next(iter(channels))


def _in_words(fixed: tuple[tuple[object, ...], ...]) -> str:
    """For example: window (-1000.0, 500.0)."""
    return " and ".join(f"{name} {tuple(values)}" for name, *values in fixed) or "no window"


def make_passport(
    store: ArrayStore,
    encoder: Backbone,
    *,
    kind: Literal["encoder", "segmenter", "classifier"],
    recipe: Mapping[str, Any],
    method: str,
    images: Images,
    crop_voxels: Sequence[int],
    crop_mm: Sequence[float] | None,
    metrics: Mapping[str, float],
    citations: Sequence[str],
    licence: str,
    decoder: Mapping[str, Any] | None = None,
    label_values: Sequence[int] | None = None,
    target: Mapping[str, Any] | None = None,
) -> Passport:
    """Write down what the weights are and what an image must look like for them."""
    prepare = store.prepare_config
    return Passport.parse(
        {
            "kind": kind,
            "backbone": encoder.config,
            "spatial_dims": encoder.spatial_dims,
            "in_channels": encoder.in_channels,
            "image_channels": images.channels,
            "decoder": decoder,
            "label_values": None if label_values is None else list(label_values),
            "target": None if target is None else dict(target),
            "prepare": prepare,
            "unit": store.unit,
            "orientation": prepare["orientation"],
            "spacing_mm": prepare["spacing_mm"] if crop_mm is None else images.crop_spacing_mm(crop_voxels, crop_mm),
            "crop_voxels": list(crop_voxels[: encoder.spatial_dims]),
            "recipe": dict(recipe),
            "method": method,
            "data_fingerprint": store.fingerprint,
            "metrics": {name: value if value == value else None for name, value in metrics.items()},  # noqa: PLR0124  NaN
            "licence": licence,
            "versions": {name: version(name) for name in ("medssl", "torch", "monai")},
            "citations": list(citations),
        },
        source="passport",
    )
