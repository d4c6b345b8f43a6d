"""What every pretraining method has in common: an encoder that outlives it, views, and teachers that follow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float32, Int64, Shaped
from pydantic import JsonValue
from torch import Tensor, nn

from medssl.augment.base import derive_seeds
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import View
from medssl.config import Config
from medssl.errors import ConfigError
from medssl.nn.backbone import Backbone
from medssl.nn.ema import update_ema
from medssl.nn.heads import pool_pyramid
from medssl.trainable import Progress, Trainable
from medssl.views import ViewSampler

AugmentOption = dict[str, JsonValue] | list[dict[str, JsonValue]]


class Method(Trainable):
    """A way to train an encoder without labels.

    A file in ``medssl/methods`` defines one method and its ``Config``, which names at least ``crop_voxels`` and
    ``augment``. Its ``prepare`` augments for training; for held-out checks it does only what is not random, such as a
    HU window, so that a held-out loss is comparable from check to check.

    Args:
        config: The file's ``Config``.
        encoder: The backbone to train; of the rest only what ``bundle_modules`` names outlives pretraining.
        seed: Of the first weights of the method's own heads.
        images: What is known of the images, which the augments are checked against; None checks nothing.
    """

    citations: ClassVar[tuple[str, ...]]
    position_task: ClassVar[bool] = False

    def __init__(
        self,
        config: Config,
        *,
        encoder: Backbone,
        seed: int,  # noqa: ARG002  for the subclass's heads
        images: Images | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.images = images or Images()
        self.augment = build_augment(config.to_dict()["augment"], position_task=self.position_task, images=images)

    @abstractmethod
    def view_sampler(self) -> ViewSampler:
        """What cuts the named arrays of one sample from a case."""

    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """What outlives pretraining: the encoder, and a decoder where the method trains one that a task can take."""
        return {"encoder": self.encoder}

    def decoder_config(self) -> dict[str, Any] | None:
        """Arguments that build the decoder of :meth:`bundle_modules` again; None if there is none."""
        return None

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of student and teacher; teachers hold no gradient and stay in eval mode."""
        return []

    def momentum(self, progress: Progress) -> float:  # noqa: ARG002
        """Share of the teacher that is kept at ``progress``; a pure function of it, so that a run can resume."""
        return 1.0

    def after_step(self, progress: Progress) -> None:
        """Let every teacher follow its student."""
        momentum = self.momentum(progress)
        for student, teacher in self.momentum_pairs():
            update_ema(teacher, student, momentum)

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all but the teachers."""
        super().train(mode)
        for _, teacher in self.momentum_pairs():
            teacher.eval()
        return self

    def vary(
        self, x: Shaped[Tensor, "b c *s"], seeds: Int64[Tensor, " b"], *, frame: Frame | None, training: bool
    ) -> View:
        """Crops of the boxes ``x``, augmented for training and otherwise with the fixed part alone."""
        view: View = self.augment(x, seeds, frame=frame) if training else self.augment.plain(x, frame=frame)
        return view

    def embed(self, x: Shaped[Tensor, "b c *s"]) -> Float32[Tensor, "b d"]:
        """Mean of every level of the encoder's pyramid, concatenated: what probes see of a crop as it is stored."""
        return pool_pyramid(self.encoder(self.augment.normalise(x)))


def draw_subsets(seeds: Int64[Tensor, " b"], count: int, *, size: int) -> Int64[Tensor, "b k"]:
    """Choose ``size`` of ``count`` things for each sample, from its seed alone; all subsets are equally likely."""
    own = derive_seeds(seeds, 1)[:, 0].tolist()
    return torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size] for seed in own])


@contextmanager
def weight_seed(seed: int) -> Iterator[None]:
    """Draw first weights from ``seed`` and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def spatial_size(name: str, voxels: Sequence[int], *, spatial_dims: int) -> tuple[int, ...]:
    """Drop the last axis of a size in 2D, where it must be 1.

    Raises:
        ConfigError: if a 2D encoder is asked to take more than one slice.
    """
    if spatial_dims == 2 and voxels[2] != 1:
        raise ConfigError(f"{name} is {list(voxels)}, and the encoder is 2D; the last number must be 1.")
    return tuple(voxels[:spatial_dims])
