"""What every fine-tuning task has: an encoder that it was given, and logits for an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from medssl.augment.pipeline import Pipeline
from medssl.nn.backbone import Backbone
from medssl.nn.bundle import Bundle
from medssl.trainable import Trainable
from medssl.views import ViewSampler


class Task(Trainable):
    """A supervised task on top of an encoder.

    Its ``prepare`` augments for training; for held-out checks it does only what is not random.

    Args:
        encoder: Pretrained, or with fresh weights for the from-scratch twin.
    """

    augment: Pipeline

    def __init__(self, *, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    @abstractmethod
    def logits(self, x: Shaped[Tensor, "b c *s"]) -> Tensor:
        """Scores of each class, before softmax, of images as they are stored; without augmentation."""

    @abstractmethod
    def view_sampler(self) -> ViewSampler:
        """What cuts the task's crops from a case."""

    @abstractmethod
    def decoder_config(self) -> dict[str, Any]:
        """What the passport needs beside the encoder's config to build the network again."""

    def take_decoder(self, bundle: Bundle) -> str:  # noqa: ARG002  a task without a decoder takes none
        """Start from the decoder of a pretrained bundle if the configuration asks for it; say what was done."""
        return "none"

    @abstractmethod
    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """Modules that a bundle keeps, by the name that their tensors begin with."""
