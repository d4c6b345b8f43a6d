"""Parts of preparation: the body against the air, the box around it, and the scale of values."""

from __future__ import annotations

from typing import Literal

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own documentation's name
from jaxtyping import Bool, Float32, Integer
from pydantic import Field, model_validator
from scipy import ndimage, special

from medssl.config import Config

_NO_BACKGROUND = 0.3  # heads and trunks in air stay below 0.25, crops of solid tissue above 0.37 (real data)
_SMALL_PART = 0.1
_OTSU_BINS = 256
_MUCH_CLIPPED = 0.02


class IntensityConfig(Config):
    """How voxel values are brought to one scale.

    Args:
        mode: ``robust_zscore`` (MR, US, XR): minus the median, over the distance of two percentiles inside the body,
            so that a normal distribution gets variance 1; ``hu`` (CT): rounded HU, kept raw; ``none``: kept as read.
        percentiles: The two percentiles, in (0, 100).
        clip: Largest magnitude after ``robust_zscore``.
    """

    mode: Literal["robust_zscore", "hu", "none"] = "robust_zscore"
    percentiles: tuple[float, float] = (5.0, 95.0)
    clip: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> IntensityConfig:
        low, high = self.percentiles
        if not 0 < low < high < 100:
            raise ValueError("percentiles must ascend inside (0, 100)")
        return self


class BodyMaskConfig(Config):
    """How the body is told from the air around it.

    Args:
        mode: ``otsu`` (MR), ``threshold`` (CT), ``none`` for crops that are full of tissue.
        threshold: Values above it are body, in the image's own unit; only for ``threshold``.
    """

    mode: Literal["otsu", "threshold", "none"] = "none"
    threshold: float = -500.0


class CropConfig(Config):
    """Whether to cut the air off; labelled voxels are never cut.

    Args:
        mode: ``foreground`` keeps the bounding box of the body, ``none`` keeps all.
        margin_mm: Kept around the body.
    """

    mode: Literal["foreground", "none"] = "none"
    margin_mm: float = Field(5.0, ge=0)


def body_mask(
    voxels: Float32[np.ndarray, "x y z"], config: BodyMaskConfig
) -> tuple[Bool[np.ndarray, "x y z"], list[str]]:
    """Body against air: threshold, small parts off, holes of each slice filled."""
    everything = np.ones(voxels.shape, bool)
    if config.mode == "none":
        return everything, []
    if config.mode == "threshold":
        mask = voxels > config.threshold
    else:
        bright = np.percentile(voxels, 99)
        capped = np.minimum(voxels, bright)
        image = sitk.GetImageFromArray(capped)
        mask = sitk.GetArrayFromImage(sitk.OtsuThreshold(image, 0, 1, _OTSU_BINS)) > 0
        floor = float(capped.min())
        inside, outside = _mean(capped[mask]) - floor, _mean(capped[~mask]) - floor
        if inside <= 0 or outside > _NO_BACKGROUND * inside:
            note = "W_NO_BACKGROUND: no dark air around the body was found; the whole volume is taken as body."
            return everything, [note]
    if not mask.any():
        note = f"W_NO_BODY: no voxel is above {config.threshold:g}; the whole volume is taken as body."
        return everything, [note]
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    mask = (sizes >= _SMALL_PART * sizes.max())[parts]
    mask = np.stack([ndimage.binary_fill_holes(mask[:, :, z]) for z in range(mask.shape[2])], axis=2)
    return mask, []


def foreground_box(
    mask: Bool[np.ndarray, "x y z"], spacing_mm: tuple[float, float, float], config: CropConfig
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Start and shape of the bounding box of the mask with its margin, inside the volume."""
    if config.mode == "none":
        return (0, 0, 0), (mask.shape[0], mask.shape[1], mask.shape[2])
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    margins = [int(np.ceil(config.margin_mm / size - 1e-6)) for size in spacing_mm]
    low = [max(0, piece.start - margin) for piece, margin in zip(box, margins, strict=True)]
    high = [min(n, piece.stop + margin) for piece, margin, n in zip(box, margins, mask.shape, strict=True)]
    return (low[0], low[1], low[2]), (high[0] - low[0], high[1] - low[1], high[2] - low[2])


def cuts_label(label: Integer[np.ndarray, "1 x y z"], start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a labelled voxel lies outside the box."""
    x, y, z = (slice(a, a + n) for a, n in zip(start, shape, strict=True))
    return bool(np.count_nonzero(label) != np.count_nonzero(label[:, x, y, z]))


def scale_intensity(
    array: Float32[np.ndarray, "c x y z"], body: Bool[np.ndarray, "x y z"], config: IntensityConfig
) -> tuple[Float32[np.ndarray, "c x y z"], list[dict[str, float]], list[str]]:
    """Scaled image, centre and scale of each channel (z = (x - centre) / scale), and warnings."""
    notes: list[str] = []
    if config.mode != "robust_zscore":
        constant = [index for index, voxels in enumerate(array) if voxels.min() == voxels.max()]
        notes += [f"W_CONSTANT: channel {index} has one value only." for index in constant]
    if config.mode == "hu":
        limits = np.iinfo(np.int16)
        return np.clip(np.rint(array), limits.min, limits.max), [{"centre": 0.0, "scale": 1.0}] * len(array), notes
    if config.mode == "none":
        return array, [{"centre": 0.0, "scale": 1.0}] * len(array), notes
    low, high = config.percentiles
    sigmas = float(special.ndtri(high / 100) - special.ndtri(low / 100))
    result = np.empty_like(array)
    channels: list[dict[str, float]] = []
    for index, voxels in enumerate(array):
        p_low, centre, p_high = (float(p) for p in np.percentile(voxels[body], (low, 50, high)))
        scale = (p_high - p_low) / sigmas
        if scale <= 0:  # most voxels are equal: the spread of all of them, or 1 for a constant image
            scale = float(voxels[body].std(dtype=np.float64))
        if scale <= 0:
            notes.append(f"W_CONSTANT: channel {index} has one value only; it becomes 0.")
            scale = 1.0
        scaled = (voxels - centre) / scale
        clipped = float(np.mean(np.abs(scaled[body]) > config.clip))
        if clipped > _MUCH_CLIPPED:
            notes.append(
                f"W_CLIPPED: {clipped:.0%} of channel {index} lie beyond {config.clip:g} spreads of the rest and "
                "become one value. Tell the body from a dark ground with body_mask, or take intensity mode none."
            )
        result[index] = np.clip(scaled, -config.clip, config.clip)
        channels.append({"centre": centre, "scale": scale})
    return result, channels, notes


def _mean(values: Float32[np.ndarray, " n"]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else 0.0
