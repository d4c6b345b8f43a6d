"""Which network, crop and batch fit a budget of time and memory, by measured steps on real crops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field, JsonValue

from medssl.augment.images import Images
from medssl.blueprint.choose import Network, Triple, batch_of, networks, smaller_crops, step_range
from medssl.blueprint.measure import CostModel, measure_step
from medssl.config import Config
from medssl.data.memory import free_mib
from medssl.data.store import ArrayStore
from medssl.errors import EnvironmentFaultError
from medssl.handover import fresh_encoder, load_encoder
from medssl.nn.bundle import Bundle
from medssl.tasks.segmentation import Config as TaskConfig
from medssl.tasks.segmentation import Segmentation

_USED_OF_BUDGET = 0.9  # the rest is for checks, checkpoints and a machine that is busy
_USED_OF_MEMORY = 0.7
_MOST_MEASURED = 64**3


class PlanConfig(Config):
    """What a plan may spend, and what is given.

    Args:
        minutes: Of training.
        memory_gib: For training, the process itself included; None takes 70 % of what is free now.
        ignore_value: Label value that is no structure, as in the recipe.
        backbone: As in a recipe; None chooses a U-Net. A bundle brings its own.
        crop_voxels: Size of the crops; None chooses.
        batch_size: Crops a step; None chooses.
        seed: Of the recipe, and of the crops that are measured.
    """

    minutes: float = Field(60.0, gt=0)
    memory_gib: float | None = Field(None, gt=0)
    ignore_value: int | None = Field(None, ge=1)
    backbone: dict[str, JsonValue] | None = None
    crop_voxels: tuple[int, int, int] | None = None
    batch_size: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Fit:
    """Network, crop and batch that fit the budget.

    Args:
        network: Of the candidates.
        crop: In voxels.
        batch_size: Crops a step.
        cost: Measured for the network.
    """

    network: Network
    crop: Triple
    batch_size: int
    cost: CostModel

    @property
    def seconds(self) -> float:
        """Expected duration of a step."""
        return self.cost.seconds(self.batch_size * math.prod(self.crop))

    @property
    def gib(self) -> float:
        """Expected memory of training."""
        return self.cost.gib(self.batch_size * math.prod(self.crop))


class Planner:
    """Builds tasks of any size on the store's labelled training cases, and measures them.

    Args:
        store: Opened.
        images: What is known of its images.
        given: Budget and what is given.
        bundle: Of a pretrained encoder.
        spacing_mm: Voxel size of the crops; None takes the store's.
        template: Options of the task but for its crops.
    """

    def __init__(
        self,
        store: ArrayStore,
        *,
        images: Images,
        given: PlanConfig,
        bundle: Bundle | None,
        spacing_mm: tuple[float, float, float] | None,
        template: Mapping[str, Any],
    ) -> None:
        self.store, self.images = store, images
        self.cases = store.select(split="train", labelled=True)
        self.given, self.bundle, self.spacing_mm, self.template = given, bundle, spacing_mm, template
        self.memory_gib = given.memory_gib or _USED_OF_MEMORY * _free_gib()

    def crop_mm(self, crop: Triple) -> list[float] | None:
        """Edge lengths of a crop at the chosen voxel size."""
        if self.spacing_mm is None:
            return None
        return [round(n * size, 4) for n, size in zip(crop, self.spacing_mm, strict=True)]

    def task(self, network: Network, crop: Triple) -> Segmentation:
        """The task with fresh weights, or those of the bundle."""
        options = {**self.template, "crop_voxels": list(crop), "crop_mm": self.crop_mm(crop)}
        config = TaskConfig.parse(options, source="plan")
        encoder = fresh_encoder(network.backbone, self.images, augment=self.template["augment"], seed=self.given.seed)
        if self.bundle is not None:
            load_encoder(encoder, self.bundle, self.store)
        return Segmentation(
            config,
            encoder=encoder,
            label_values=self.store.label_values,
            seed=self.given.seed,
            images=self.images,
        )

    def fit(self, wish: Triple, shape: Sequence[int]) -> Fit:
        """The first network that gets enough steps, with the largest crop that fits the memory.

        Where none gets enough, the cheapest is taken, with a smaller crop.

        Args:
            wish: Largest crop.
            shape: Median voxels of an image.

        Raises:
            EnvironmentFaultError: E_MEMORY, if not even the smallest crop fits.
        """
        candidates = self._candidates(wish)
        best: Fit | None = None
        for network in candidates:
            best = self._within_memory(network, wish, shape) or best
            if best is None or best.network is not network:
                continue
            fewest, _ = step_range(len(self.cases), best.batch_size)
            if steps_within(best, self.given.minutes) >= fewest:
                return best
        if best is None:
            raise EnvironmentFaultError(
                f"{self.store.path}: training on the smallest crop needs more than the {self.memory_gib:.2g} GiB that "
                "it may take. Raise --memory-gib, or give a smaller backbone.",
                code="E_MEMORY",
            )
        return best if self.given.crop_voxels else self._within_time(best, shape)

    def _candidates(self, wish: Triple) -> list[Network]:
        if self.bundle is not None:
            return [Network(dict(self.bundle.passport.backbone), "the backbone of the bundle")]
        if self.given.backbone is not None:
            return [Network(dict(self.given.backbone), "as asked for")]
        return networks(wish)

    def _within_memory(self, network: Network, wish: Triple, shape: Sequence[int]) -> Fit | None:
        cost = self._cost(network, wish)
        sizes = [wish] if self.given.crop_voxels else list(smaller_crops(wish, shape))
        for crop in sizes:
            batch_size = self.given.batch_size or batch_of(crop)
            if cost.gib(batch_size * math.prod(crop)) <= self.memory_gib:
                return Fit(network, crop, batch_size, cost)
        return None

    def _within_time(self, fit: Fit, shape: Sequence[int]) -> Fit:
        """The same network with the largest crop that gets enough steps, or the smallest there is."""
        smaller = fit
        for crop in smaller_crops(fit.crop, shape):
            smaller = replace(fit, crop=crop, batch_size=self.given.batch_size or batch_of(crop))
            fewest, _ = step_range(len(self.cases), smaller.batch_size)
            if steps_within(smaller, self.given.minutes) >= fewest:
                break
        return smaller

    def _cost(self, network: Network, wish: Triple) -> CostModel:
        """Measure a quarter and all of the crop, or of the largest crop that is quick to measure."""
        scale = min(1.0, (_MOST_MEASURED / math.prod(wish)) ** (1 / 3 if wish[2] > 1 else 1 / 2))
        sizes = [self._scaled(wish, share) for share in (0.6 * scale, scale)]
        small, large = (
            measure_step(self.task(network, crop), self.cases, batch_size=2, seed=self.given.seed) for crop in sizes
        )
        return CostModel(small, large)

    @staticmethod
    def _scaled(crop: Triple, share: float) -> Triple:
        x, y, z = (n if n == 1 else max(8, round(n * share / 8) * 8) for n in crop)
        return x, y, z


def steps_within(fit: Fit, minutes: float) -> int:
    """Steps that the budget has time for."""
    return max(1, int(_USED_OF_BUDGET * 60 * minutes / fit.seconds))


def _free_gib() -> float:
    """Memory that is free where training would run."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 2**30
    return (free_mib() or 4096) / 1024
