"""Augments: parameters are drawn on the CPU, one generator a sample, and applied to the whole batch on its device.

A draw is a pure function of the sample's seed, the augment's name and its place in the list. It depends on nothing
else: not on the batch, the device, the worker or the point of resumption.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from medssl.augment.frame import Frame
from medssl.augment.images import EVERY_DOMAIN, Domain
from medssl.augment.resample import resample
from medssl.config import Config
from medssl.errors import ConfigError

_MASK = (1 << 64) - 1
_ALIGNMENT = 64  # bytes; where the allocator puts a tensor

Params = dict[str, Tensor]
Draws = dict[str, Tensor | float]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]} is above the upper bound {bounds[1]}; swap them")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)]
NonNegativeRange = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ordered)
]
Share = Annotated[float, Field(ge=0, le=1)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ordered)]


class AugmentConfig(Config):
    """What every augment can be given: ``p``, the probability that it touches a sample."""

    p: float = Field(default=1.0, ge=0.0, le=1.0)


class MixingConfig(AugmentConfig):
    """What every mixing augment can be given: ``group``, how many consecutive samples mix with one another."""

    group: int = Field(default=2, ge=2)


C = TypeVar("C", bound=AugmentConfig)
M = TypeVar("M", bound=MixingConfig)


class Augment(nn.Module, ABC, Generic[C]):
    """One random change of a batch; a sample that is not drawn comes out bit for bit.

    Args:
        config: Options; None takes the defaults.
        salt: Place in a pipeline, so that two augments of the same name draw independently.

    Attributes:
        takes: What values must mean for it to make sense.
        modalities: For which images it is; empty for all.
        spatial_dims: In how many dimensions it works.
        colour: Whether it needs red, green and blue.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AugmentConfig]]
    takes: ClassVar[frozenset[Domain]] = EVERY_DOMAIN
    modalities: ClassVar[frozenset[str]] = frozenset()
    spatial_dims: ClassVar[frozenset[int]] = frozenset({2, 3})
    colour: ClassVar[bool] = False

    def __init__(self, config: C | None = None, *, salt: int = 0) -> None:
        super().__init__()
        self.config: C = config if config is not None else self.config_class()  # type: ignore[assignment]
        self.salt = zlib.crc32(f"{self.name} {salt}".encode())

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the parameters of one sample: numbers, and tensors of the same shape for every sample."""

    @abstractmethod
    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b k *s"]:
        """Change all samples of ``x``; ``params`` has one row a sample, ``spacing_mm`` is its voxel size."""

    def draw(self, seeds: Int64[Tensor, " b"]) -> Params:
        """Draw for each sample on the CPU; ``params["on"]`` says which samples are touched."""
        generator = torch.Generator()
        rows: list[Draws] = []
        for seed in seeds.tolist():
            generator.manual_seed(mix(seed, self.salt))
            on = float(torch.rand((), generator=generator)) < self.config.p
            rows.append({"on": on, **self.sample(generator)})
        return {key: _column([row[key] for row in rows]) for key in rows[0]}

    def apply(  # type: ignore[override]
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b k *s"]:
        """Change the samples that ``params["on"]`` names and leave the others as they are.

        On the CPU one after the other: what rounding makes of sums, products and transforms depends on how many are
        done at once and where they lie in memory, and a view must not depend on its neighbours even in its last bit.
        """
        spacing = Frame.whole(x, (1.0, 1.0, 1.0)).spacing_mm if spacing_mm is None else spacing_mm
        if len(x) == 1:
            return self.change(x, params, spacing) if bool(params["on"]) else x
        chosen = params["on"].nonzero()[:, 0]
        if len(chosen) == 0:
            return x
        if x.device.type == "cpu":
            rows = [slice(index, index + 1) for index in range(len(x))]
            return torch.cat([self.apply(aligned(x[row]), rows_of(params, row), spacing[row]) for row in rows])
        if len(chosen) == len(x):
            return self.change(x, params, spacing)
        out = x.clone()
        out[chosen.to(x.device, non_blocking=True)] = self.change(
            x[chosen.to(x.device, non_blocking=True)], rows_of(params, chosen), spacing[chosen]
        )
        return out

    def apply_label(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Move the label with the image; intensity changes leave it as it is."""
        return y

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """The part that is not random and that prediction needs too; nothing for most augments."""
        return x

    def gives(self, domain: Domain) -> Domain:
        """What values mean afterwards."""
        return domain

    def channels_out(self, channels: int) -> int:
        """Number of channels afterwards."""
        return channels

    def bounds(self, params: Params) -> tuple[Float32[Tensor, " b"], Float32[Tensor, " b"]] | None:
        """Low and high of each sample where the whole change is a clipped map of them to [0, 1], else None."""
        return None

    def fixed(self) -> tuple[object, ...] | None:
        """What identifies the part that is not random; None where there is none."""
        return None

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b c *s"], seeds: Int64[Tensor, " b"], spacing_mm: Float64[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b k *s"]:
        """Draw and apply."""
        with torch.autocast(x.device.type, enabled=False):
            return self.apply(x, self.draw(seeds), spacing_mm)


class Spatial(Augment[C]):
    """An augment that moves voxels: an affine map about the centre of the crop, or a smooth displacement.

    ``fill`` is the value outside the box; None extends its border.
    """

    fill: float | None = None

    def matrix(self, params: Params, spacing_mm: Float64[Tensor, "b d"]) -> Float64[Tensor, "b n n"]:
        """Homogeneous map of content, input to output, in mm from the centre of the crop; identity where not drawn."""
        return torch.eye(spacing_mm.shape[1] + 1, dtype=torch.float64).repeat(len(spacing_mm), 1, 1)

    def displacement(
        self,
        params: Params,
        shape: Sequence[int],
        spacing_mm: Float64[Tensor, "b d"],
    ) -> Float32[Tensor, "b d *k"] | None:
        """What is added, in mm, to the place that each output voxel is read from, at knots spread evenly over the crop.

        The first and last knot of an axis lie at its first and last voxel; between knots it is linear. None moves
        nothing; 0 where not drawn.
        """
        return None

    def relabel(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Exchange label values that the move makes wrong."""
        return y

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float32[Tensor, "b c *s"]:
        """Resample linearly."""
        frame = Frame.whole(x, (1.0, 1.0, 1.0))
        frame = Frame(frame.to_box, frame.shape, spacing_mm)
        to_box, moved = compose([(self, params)], frame)
        return resample(x, to_box, shape=frame.shape, displacement=moved, fill=self.fill)[0]

    def apply_label(
        self, y: Shaped[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"] | None = None
    ) -> Shaped[Tensor, "b c *s"]:
        """Resample by nearest neighbour, then exchange values."""
        frame = Frame.whole(y, (1.0, 1.0, 1.0))
        frame = frame if spacing_mm is None else Frame(frame.to_box, frame.shape, spacing_mm)
        to_box, moved = compose([(self, params)], frame)
        blank = torch.zeros_like(y[:, :1], dtype=torch.float32)
        label = resample(blank, to_box, shape=frame.shape, displacement=moved, fill=self.fill, label=y)[1]
        assert label is not None  # noqa: S101  a label was given
        return self.relabel(label, params)


class Mixing(Augment[M]):
    """An augment that mixes a sample with others of its group: ``group`` consecutive samples of the batch.

    The group, and so the view, is the same for every batch size and world size of which ``group`` is a divisor.

    Attributes:
        moves_labels: Whether :meth:`apply_label` gives the label map of the mixed image; without it, label maps are
            refused.
    """

    moves_labels: ClassVar[bool] = False

    def apply(  # type: ignore[override]
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c *s"]:
        """Change the samples that ``params["on"]`` names; all are there to be mixed with.

        Raises:
            ConfigError: E_GROUP, if the batch is not made of whole groups.
        """
        if len(x) % self.config.group:
            raise ConfigError(
                f"augment {self.name}: {len(x)} images, and groups of {self.config.group} mix; a multiple is needed. "
                "Change train.batch_size or group.",
                code="E_GROUP",
            )
        if not params["on"].any():
            return x
        spacing = Frame.whole(x, (1.0, 1.0, 1.0)).spacing_mm if spacing_mm is None else spacing_mm
        if x.device.type == "cpu" and len(x) > self.config.group:
            starts = range(0, len(x), self.config.group)
            rows = [slice(start, start + self.config.group) for start in starts]
            return torch.cat([self.apply(aligned(x[row]), rows_of(params, row), spacing[row]) for row in rows])
        is_on = wide(params["on"], x, dtype=torch.bool)
        mixed: Tensor = self.change(x, params, spacing)
        return torch.where(is_on, mixed, x)


def compose(
    spatial: Sequence[tuple[Spatial[Any], Params]], frame: Frame
) -> tuple[Float64[Tensor, "b n n"], Float32[Tensor, "b d *k"] | None]:
    """One map for a list of moves: crop voxel index to the box voxel index that it is read from.

    ``place = to_box · (centre + inv(M_k … M_1) · (voxel − centre) + Σ u(voxel))``, all in mm but the ends.

    Args:
        spatial: Augments with their draws, in order.
        frame: Where the crops lie in the boxes.

    Returns:
        The affine part, and the displacement in box voxels at knots spread evenly over the crop, if there is any.
    """
    dims = len(frame.shape)
    moved = torch.eye(dims + 1, dtype=torch.float64).repeat(len(frame.to_box), 1, 1)
    shifts = []
    for augment, params in spatial:
        moved = augment.matrix(params, frame.spacing_mm) @ moved
        shift = augment.displacement(params, frame.shape, frame.spacing_mm)
        shifts += [] if shift is None else [shift.double()]
    spacing = frame.spacing_mm
    crop = torch.from_numpy(_about_centre(np.linalg.inv(moved.numpy()), spacing.numpy(), frame.shape))
    if not shifts:
        return frame.to_box @ crop, None
    if len({shift.shape for shift in shifts}) > 1:
        raise ConfigError("augment: two displacements with different knots; there is one resampling. Take one out.")
    in_voxels = torch.stack(shifts).sum(dim=0) / spacing.reshape(*spacing.shape, *[1] * dims)
    in_box = torch.einsum("bij,bj...->bi...", frame.to_box[:, :dims, :dims], in_voxels)
    return frame.to_box @ crop, in_box.float()


def _about_centre(
    inverse: Float64[np.ndarray, "b n n"], spacing_mm: Float64[np.ndarray, "b d"], shape: Sequence[int]
) -> Float64[np.ndarray, "b n n"]:
    """A map in mm about the centre of crops of ``shape``, as one of voxel indices."""
    dims = len(shape)
    centre = (np.asarray(shape, np.float64) - 1) / 2
    crop = inverse.copy()
    linear = inverse[:, :dims, :dims] * spacing_mm[:, None] / spacing_mm[:, :, None]
    crop[:, :dims, :dims] = linear
    crop[:, :dims, dims] = inverse[:, :dims, dims] / spacing_mm + centre - linear @ centre
    return crop


def derive_seeds(seeds: Int64[Tensor, " b"], num: int) -> Int64[Tensor, "b num"]:
    """Give each of ``num`` crops or views of a sample a seed of its own, a pure function of the sample's."""
    rows = [[mix(seed, index + 1) >> 1 for index in range(num)] for seed in seeds.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(seeds), num)


def _column(values: Sequence[Tensor | float]) -> Tensor:
    """One parameter of all samples; numbers in float32, flags as they are."""
    if isinstance(values[0], Tensor):
        return torch.stack([torch.as_tensor(value) for value in values])
    return torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else torch.float32)


def rows_of(params: Params, chosen: Tensor | slice) -> Params:
    """The draws of some of the samples."""
    return {key: value[chosen] for key, value in params.items()}


def aligned(x: Tensor) -> Tensor:
    """The same values where a fresh tensor would lie."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """One number, evenly drawn; a plain one, for arithmetic of single numbers is slow in torch."""
    return bounds[0] + float(torch.rand((), generator=generator)) * (bounds[1] - bounds[0])


def wide(values: Shaped[Tensor, " b"], x: Shaped[Tensor, "b c *s"], *, dtype: torch.dtype | None = None) -> Tensor:
    """One value a sample, on the device of ``x`` and ready to broadcast over it."""
    return values.to(x.device, dtype or x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def extremes(x: Float[Tensor, "b c *s"]) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each sample and channel, ready to broadcast."""
    axes = tuple(range(2, x.ndim))
    return x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)  # aminmax takes twenty times as long


def mix(seed: int, salt: int) -> int:
    """Scramble two numbers into one of 64 bits: the generator keeps the low 32 bits of what it is given.

    Reference: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
    """
    value = 0
    for number in (seed, salt):
        value = finalise(value + number + 0x9E3779B97F4A7C15)
    return value


def finalise(number: int) -> int:
    """The finaliser of SplitMix64, of the low 64 bits."""
    value = number & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
