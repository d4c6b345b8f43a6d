"""Masked autoencoder: hide most of the crop in blocks, and rebuild what was hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.config import Config as BaseConfig
from medssl.errors import ConfigError
from medssl.losses.reconstruction import masked_mse, normalise_blocks, visible_mean
from medssl.methods.base import AugmentOption, Method, draw_subsets, spatial_size, weight_seed
from medssl.nn.backbone import Backbone
from medssl.nn.decoder import Decoder
from medssl.trainable import Batch, Losses
from medssl.views import EdgesMm, RandomCrop, RegionOption

_FULL_RESOLUTION_WIDTH = 8
_AUGMENT: AugmentOption = {"preset": "none"}


class Config(BaseConfig):
    """Options of the masked autoencoder.

    Args:
        crop_voxels: Size of a crop, a multiple of ``block_voxels`` along each axis; 1 on the last axis for 2D.
        crop_mm: Edge lengths of a crop; None takes the voxels of the store as they are.
        region: Share of the body along an axis from which crop centres are drawn, such as ``{SI: [0.3, 0.7]}``; 0 is
            left, back or foot.
        block_voxels: Size of what is hidden at once; 1 on the last axis for 2D.
        mask_ratio: Share of the blocks that is hidden; rounded to whole blocks, the same number in every crop.
        inside_body: Draw crop centres from the body mask.
        learned_token: Fill hidden voxels with a learned value a channel in place of 0, the mean of a z-scored image.
        normalise_target: Rebuild blocks of mean 0 and variance 1, so that local contrast counts.
        decoder_width: Channels of the decoder, finest first; by default half of the encoder's, 8 at full resolution.
            With those of the segmentation decoder, fine-tuning can start from this one.
        augment: ``{preset: ...}`` or a list of augments.
    """

    crop_voxels: tuple[int, int, int] = (64, 64, 64)
    crop_mm: EdgesMm = None
    region: RegionOption = None
    block_voxels: tuple[int, int, int] = (8, 8, 8)
    mask_ratio: float = Field(0.75, gt=0.0, lt=1.0)
    inside_body: bool = True
    learned_token: bool = False
    normalise_target: bool = False
    decoder_width: tuple[int, ...] | None = None
    augment: AugmentOption = Field(_AUGMENT)

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        sizes = list(zip(self.crop_voxels, self.block_voxels, strict=True))
        if any(edge < 1 or length < edge or length % edge for length, edge in sizes):
            raise ValueError(
                f"crop_voxels {list(self.crop_voxels)} is not a multiple of block_voxels {list(self.block_voxels)}"
            )
        blocks = math.prod(length // edge for length, edge in sizes)
        if not 0 < num_masked(blocks, self.mask_ratio) < blocks:
            raise ValueError(f"mask_ratio {self.mask_ratio} of {blocks} blocks hides none or all; use smaller blocks")
        return self


class MAE(Method):
    """Rebuild hidden blocks from the visible ones; the reference that every other method is held against.

    ``loss = mean over hidden voxels of (decoder(encoder(x with hidden voxels filled)) − x)²``. The decoder's
    full-resolution stage sees the filled image, never the whole one.

    Losses: ``loss``, in squared units of the image. Monitor ``mean_predictor_ratio``: that loss over the loss of
    filling the hidden voxels with the mean of the crop's visible ones (with 0 where the target is normalised); a
    network that has learned nothing has 1. A constant encoder cannot do better than the mean, whatever share of the
    blocks is flat.

    Reference: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377, section 3;
    Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR 2025, arXiv:2410.23132 (3D CNN).
    Deviations: a convolutional encoder sees the whole crop with the hidden voxels filled, where the paper's drops
    hidden tokens; blocks are those of the image, whatever the encoder's stride.
    """

    chance_monitor = "mean_predictor_ratio"
    citations = ("He et al., CVPR 2022, arXiv:2111.06377", "Wald et al., CVPR 2025, arXiv:2410.23132")

    def __init__(self, config: Config, *, encoder: Backbone, seed: int, images: Images | None = None) -> None:
        super().__init__(config, encoder=encoder, seed=seed, images=images)
        self.config = config
        self.crop = spatial_size("crop_voxels", config.crop_voxels, spatial_dims=encoder.spatial_dims)
        self.block = spatial_size("block_voxels", config.block_voxels, spatial_dims=encoder.spatial_dims)
        with weight_seed(seed):
            self.decoder = Decoder(
                encoder.channels,
                encoder.strides,
                encoder.spatial_dims,
                encoder.in_channels,
                width=config.decoder_width or light_width(encoder),
                skip_image_channels=encoder.in_channels,
            )
        self.token = nn.Parameter(torch.zeros(encoder.in_channels)) if config.learned_token else None

    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """Encoder and decoder; a task with a decoder of the same form goes on with both."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def decoder_config(self) -> dict[str, Any]:
        """Arguments that build the decoder again."""
        return self.decoder.config

    def view_sampler(self) -> RandomCrop:
        """One crop a sample, in a box that rotations find real tissue in."""
        config = self.config
        spacing_mm = self.images.crop_spacing_mm(config.crop_voxels, config.crop_mm)
        return RandomCrop(
            config.crop_voxels,
            crop_mm=config.crop_mm,
            margin=self.augment.margin(config.crop_voxels, spacing_mm),
            inside_body=config.inside_body,
            region=config.region,
        )

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        """Augment the crops, and draw from the samples' seeds what is hidden of each.

        Raises:
            ConfigError: if crops are not those of the view sampler.
        """
        frame = Frame.of(batch.tensors, "image", shape=self.config.crop_voxels)
        view = self.vary(batch["image"], batch.seeds, frame=frame, training=training)
        if tuple(view.image.shape[2:]) != self.crop:
            raise ConfigError(f"crop of {list(view.image.shape[2:])} voxels; crop_voxels says {list(self.crop)}.")
        device = view.image.device
        mask = block_mask(batch.seeds, self.crop, self.block, ratio=self.config.mask_ratio, device=device)
        return batch.with_tensors({"image": view.image, "mask": mask}, view.notes)

    def forward(self, batch: Batch) -> Losses:
        """Hide, rebuild, compare."""
        image, mask = batch["image"], batch["mask"]
        prediction = self.reconstruct(image, mask)
        target, guess = image, visible_mean(image, mask)
        if self.config.normalise_target:
            target, guess = normalise_blocks(image, self.block), torch.zeros_like(guess)
        loss = masked_mse(prediction, target, mask)
        with torch.no_grad():
            baseline = masked_mse(guess.expand_as(target), target, mask)
            ratio = loss.detach() / baseline.clamp(min=torch.finfo(torch.float32).tiny)
        return Losses(loss, {"reconstruction": loss}, {"mean_predictor_ratio": ratio})

    def reconstruct(self, image: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b 1 *s"]) -> Float[Tensor, "b c *s"]:
        """What the network makes of ``image`` without looking at the voxels where ``mask`` is true."""
        fill = image.new_zeros(1) if self.token is None else self.token.view(1, -1, *(1 for _ in self.crop))
        seen = torch.where(mask, fill.to(image.dtype), image)
        return cast("Tensor", self.decoder(self.encoder(seen), seen)[0])

    def chance_level(self) -> float:
        """1, for a loss no better than the mean's."""
        return 1.0


def num_masked(blocks: int, ratio: float) -> int:
    """Number of hidden blocks out of ``blocks``."""
    return round(blocks * ratio)


def block_mask(
    seeds: Int64[Tensor, " b"],
    shape: Sequence[int],
    block: Sequence[int],
    *,
    ratio: float,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, "b 1 *s"]:
    """Hide the same number of blocks in each sample, chosen from its seed alone.

    Args:
        seeds: One a sample.
        shape: Spatial shape in voxels, multiples of ``block``.
        block: Block size in voxels.
        ratio: Share of the blocks to hide.
        device: Where the mask is wanted; only one number a block goes there.

    Returns:
        True where a voxel is hidden.
    """
    grid = [length // edge for length, edge in zip(shape, block, strict=True)]
    count = math.prod(grid)
    hidden = draw_subsets(seeds, count, size=num_masked(count, ratio))
    mask = torch.zeros(len(seeds), count, dtype=torch.bool).scatter_(1, hidden, True).view(-1, 1, *grid)
    mask = mask.to(device, non_blocking=True)
    for axis, edge in enumerate(block, start=2):
        mask = mask.repeat_interleave(edge, dim=axis)
    return mask


def light_width(encoder: Backbone) -> tuple[int, ...]:
    """Decoder widths of half the encoder's channels, so that the work is the encoder's."""
    full = (_FULL_RESOLUTION_WIDTH,) if encoder.strides[0] > 1 else ()
    return (*full, *(max(_FULL_RESOLUTION_WIDTH, channels // 2) for channels in encoder.channels[:-1]))
