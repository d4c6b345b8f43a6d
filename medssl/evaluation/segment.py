"""Segment one volume with a bundle: prepare as in training, run windows, carry the scores to the volume's own grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from medssl.data.prepare import PrepareConfig, prepare_volume
from medssl.errors import CaseError, CheckpointError
from medssl.evaluation.sliding_window import Network, Settings, mirrored, sliding_window
from medssl.geometry import Geometry
from medssl.nn.bundle import Bundle, Passport
from medssl.tasks.segmentation import Segmenter
from medssl.volume import Volume, resample_argmax


@dataclass(frozen=True)
class Segmented:
    """A label map (1, X, Y, Z) with the original label values, and what preparation had to assume or repair."""

    labels: Volume
    warnings: tuple[str, ...]


def load_network(bundle: Bundle, *, device: str) -> Network:
    """The network of a segmentation bundle as a function of windows with three axes.

    A 2D network sees the single slice of each window.

    Raises:
        CheckpointError: if the bundle holds no segmentation model.
    """
    model = Segmenter.from_bundle(bundle).to(device)
    is_flat = bundle.passport.spatial_dims == 2

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        scores: Tensor = model(x[..., 0] if is_flat else x)
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
    )
    return Segmented(labels, prepared.warnings)


def label_map(
    image: Float32[np.ndarray, "c x y z"],
    network: Network,
    *,
    prepared: Geometry,
    source: Geometry,
    fill: float,
    passport: Passport,
    settings: Settings,
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
    """
    values = passport.label_values
    if values is None or 0 not in values:
        raise CheckpointError(
            f"bundle: its passport names the label values {values}; background 0 must be among them. "
            "Use a bundle that medssl finetune left.",
            code="E_CONTRACT",
        )
    crop = passport.crop_voxels
    scores = sliding_window(
        mirrored(network, settings.mirror_axes, orientation=prepared.orientation),
        image,
        window=(*crop, 1) if len(crop) == 2 else crop,
        num_classes=len(values),
        overlap=settings.overlap,
        batch=settings.batch,
        fill=fill,
        device=settings.device,
    )
    classes = resample_argmax(scores, prepared, source, background=values.index(0))
    return Volume(np.asarray(values, dtype=np.int32)[classes][None], source, "label")
