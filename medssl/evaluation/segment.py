"""Segment one volume with a bundle: prepare as in training, run windows, carry the scores to the volume's own grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from medssl.data.prepare import PrepareConfig, prepare_volume
from medssl.data.store import StoredCase
from medssl.errors import CaseError, CheckpointError
from medssl.evaluation.carry import carry
from medssl.evaluation.mirroring import class_swaps
from medssl.evaluation.sliding_window import Network, Settings, mirrored, score_slabs
from medssl.geometry import Geometry
from medssl.nn.bundle import Bundle, Passport
from medssl.tasks.segmentation import Segmenter
from medssl.volume import Volume, respace


@dataclass(frozen=True)
class Segmented:
    """A label map (1, X, Y, Z) with the original label values, and what preparation had to assume or repair."""

    labels: Volume
    warnings: tuple[str, ...]


def load_network(bundle: Bundle, *, settings: Settings) -> Network:
    """The network of a segmentation bundle as a function of windows with three axes.

    A 2D network sees the single slice of each window.

    Args:
        bundle: Of a segmentation model.
        settings: Device, precision and layout in memory.

    Raises:
        CheckpointError: if the bundle holds no segmentation model.
    """
    is_flat = bundle.passport.spatial_dims == 2
    model = Segmenter.from_bundle(bundle).to(settings.device)
    form = torch.contiguous_format
    if settings.channels_last:
        form = torch.channels_last if is_flat else torch.channels_last_3d
        model = model.to(memory_format=form)  # type: ignore[call-overload]
    kind, is_short = torch.device(settings.device).type, settings.precision == "bf16"

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=is_short):
            scores: Tensor = model((x[..., 0] if is_flat else x).contiguous(memory_format=form))
        return scores[..., None] if is_flat else scores

    return run


def segment_volume(volume: Volume, network: Network, *, passport: Passport, settings: Settings) -> Segmented:
    """Label every voxel of a volume on the volume's own grid.

    Args:
        volume: As read from its file, in any orientation and spacing.
        network: From windows of prepared volumes to scores of the passport's label values.
        passport: Says how to prepare, which window to use and what the classes mean.
        settings: How to run the network.

    Raises:
        CaseError: E_CONTRACT if the volume has another number of channels than the network.
    """
    channels, wanted = volume.array.shape[0], passport.image_channels or passport.in_channels
    if channels != wanted:
        raise CaseError(
            f"image: {channels} channels; the bundle was trained on {wanted}. Use a bundle made for such images.",
            code="E_CONTRACT",
        )
    config = PrepareConfig.parse(passport.preparation, source="passport prepare")
    prepared = prepare_volume(volume, config)
    labels = label_map(
        prepared.volume.array,
        network,
        prepared=prepared.volume.geometry,
        source=volume.geometry,
        fill=prepared.fill,
        passport=passport,
        settings=settings,
        body=None if config.body_mask.mode == "none" else prepared.body_mask.array[0] > 0,
    )
    return Segmented(labels, prepared.warnings)


def segment_stored(case: StoredCase, network: Network, *, passport: Passport, settings: Settings) -> Volume:
    """Label map of a stored case on its source grid; arguments as for :func:`segment_volume`."""
    image = _on_grid_of(passport, _stored(case, "image"))
    has_mask = PrepareConfig.parse(passport.preparation, source="passport prepare").body_mask.mode != "none"
    return label_map(
        image.array,
        network,
        prepared=image.geometry,
        source=case.source_geometry,
        fill=case.fill,
        passport=passport,
        settings=settings,
        body=_on_grid_of(passport, _stored(case, "body")).array[0] > 0 if has_mask else None,
    )


def label_map(
    image: Float32[np.ndarray, "c x y z"],
    network: Network,
    *,
    prepared: Geometry,
    source: Geometry,
    fill: float,
    passport: Passport,
    settings: Settings,
    body: Bool[np.ndarray, "x y z"] | None = None,
) -> Volume:
    """Score a prepared image, carry the scores to the source grid and take the best class there.

    Args:
        image: Prepared image.
        network: From windows to scores.
        prepared: Grid of ``image``.
        source: Grid of the label map.
        fill: Value around the image.
        passport: Gives the window and the label values.
        settings: How to run the network.
        body: Mask of the body on ``prepared``, where preparation makes one; windows outside it are left out if the
            settings say so. Crops that miss the body are none that the network was trained on.
    """
    values = passport.label_values
    if values is None or 0 not in values:
        raise CheckpointError(
            f"bundle: its passport names the label values {values}; background 0 must be among them. "
            "Use a bundle that medssl finetune left.",
            code="E_CONTRACT",
        )
    swaps = class_swaps(passport)
    crop = passport.crop_voxels
    slabs = score_slabs(
        mirrored(network, settings.mirror_axes, orientation=prepared.orientation, swaps=swaps),
        image,
        window=(*crop, 1) if len(crop) == 2 else crop,
        num_classes=len(values),
        fill=fill,
        settings=settings,
        body=body if settings.skip_empty else None,
        background=values.index(0),
    )
    classes = carry(slabs, prepared, source, num_classes=len(values), background=values.index(0))
    lookup = np.asarray(values, dtype=np.min_scalar_type(max(values)))
    return Volume(lookup[classes][None], source, "label")


def _stored(case: StoredCase, name: Literal["image", "body"]) -> Volume:
    voxels = case.read(name, (0, 0, 0), case.shape)
    if name == "body":
        return Volume(voxels, case.geometry, "label")
    return Volume(voxels.astype(np.float32, copy=False), case.geometry, "HU" if case.unit == "HU" else "arbitrary")


def _on_grid_of(passport: Passport, volume: Volume) -> Volume:
    """The stored volume on a grid of the voxel size that the network works at."""
    own, spacing = volume.geometry.spacing_mm, passport.spacing_mm
    if spacing is not None and volume.geometry.shape[2] == 1:
        spacing = (*spacing[:2], own[2])
    if spacing is None or np.allclose(own, spacing, rtol=0, atol=1e-4):
        return volume
    return respace(volume, spacing)
