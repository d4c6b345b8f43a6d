"""Augments: parameters are drawn on the CPU, one generator a sample, and applied to the whole batch on its device.

A draw is a pure function of the sample's seed, the augment's name and its place in the list. It depends on nothing
else: not on the batch, the device, the worker or the point of resumption.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from medssl.augment.presets import preset
from medssl.augment.warp import warp
from medssl.config import Config
from medssl.errors import CaseError, ConfigError

_MASK = (1 << 64) - 1

Params = dict[str, Tensor]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]} is above the upper bound {bounds[1]}; swap them")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)]
NonNegativeRange = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ordered)
]
Spacing = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class AugmentConfig(Config):
    """What every augment can be given: ``p``, the probability that it touches a sample."""

    p: float = Field(default=1.0, ge=0.0, le=1.0)


C = TypeVar("C", bound=AugmentConfig)


class Augment(nn.Module, ABC, Generic[C]):
    """One random change of a batch; a sample that is not drawn comes out bit for bit.

    Args:
        config: Options; None takes the defaults.
        salt: Place in a pipeline, so that two augments of the same name draw independently.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AugmentConfig]]

    def __init__(self, config: C | None = None, *, salt: int = 0) -> None:
        super().__init__()
        self.config: C = config if config is not None else self.config_class()  # type: ignore[assignment]
        self.salt = zlib.crc32(f"{self.name} {salt}".encode())

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Params:
        """Draw the parameters of one sample; every tensor has the same shape for every sample."""

    @abstractmethod
    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Change all samples of ``x``; ``params`` has one row a sample."""

    def draw(self, seeds: Int64[Tensor, " b"]) -> Params:
        """Draw for each sample on the CPU; ``params["on"]`` says which samples are touched."""
        generator = torch.Generator()
        rows: list[Params] = []
        for seed in seeds.tolist():
            generator.manual_seed(mix(seed, self.salt))
            on = torch.rand((), generator=generator) < self.config.p
            rows.append({"on": on, **self.sample(generator)})
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def apply(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:  # type: ignore[override]
        """Change the samples that ``params["on"]`` names and leave the others as they are."""
        chosen = params["on"].nonzero()[:, 0]
        if len(chosen) == 0:
            return x
        if len(chosen) == len(x):
            return self.change(x, params)
        out = x.clone()
        out[chosen] = self.change(x[chosen], {key: value[chosen] for key, value in params.items()})
        return out

    def apply_label(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:  # noqa: ARG002
        """Move the label with the image; intensity changes leave it as it is."""
        return y

    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The part that is not random and that prediction needs too; nothing for most augments."""
        return x

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "b c *s"], seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c *s"]:
        """Draw and apply."""
        with torch.autocast(x.device.type, enabled=False):
            return self.apply(x, self.draw(seeds))


class Spatial(Augment[C]):
    """An augment that moves voxels: an affine map about the centre of the crop.

    ``fill`` is the value outside the crop; None extends the border.
    """

    fill: float | None = None

    @abstractmethod
    def matrix(self, params: Params, spatial_dims: int) -> Float64[Tensor, "b n n"]:
        """Homogeneous map from input to output, in voxels from the centre of the crop; identity where not drawn."""

    def relabel(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:  # noqa: ARG002
        """Exchange label values that the move makes wrong."""
        return y

    def change(self, x: Float[Tensor, "b c *s"], params: Params) -> Float[Tensor, "b c *s"]:
        """Resample linearly."""
        return warp([x], self.matrix(params, x.ndim - 2), fill=self.fill)[0]

    def apply_label(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Resample by nearest neighbour, then exchange values."""
        return self.relabel(warp([y], self.matrix(params, y.ndim - 2), fill=self.fill)[0], params)


class Pipeline(nn.Module):
    """Augments in order: all spatial ones as a single affine map and a single resampling, then the intensity ones.

    Args:
        augments: Spatial augments are moved to the front, with their order kept.

    Raises:
        ConfigError: if two spatial augments ask for different fills, or a window comes after another intensity augment.
    """

    def __init__(self, augments: Sequence[Augment[Any]]) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(augment for augment in augments if isinstance(augment, Spatial))
        self.intensity = nn.ModuleList(augment for augment in augments if not isinstance(augment, Spatial))
        fills = {augment.fill for augment in self._spatial() if augment.fill is not None}
        if len(fills) > 1:
            raise ConfigError(
                f"augment: the spatial augments fill with {sorted(fills)}; there is one resampling. Pick one."
            )
        self.fill = fills.pop() if fills else None
        names = [augment.name for augment in self._intensity()]
        if "window" in names[1:]:
            raise ConfigError(f"augment: window comes after {names[0]}, which then works on raw HU. Put window first.")

    def draw(self, seeds: Int64[Tensor, " b"]) -> list[Params]:
        """Draw for all augments, the spatial ones first."""
        return [augment.draw(seeds) for augment in (*self._spatial(), *self._intensity())]

    def apply_to(
        self, x: Float[Tensor, "b c *s"], params: Sequence[Params], *, label: Shaped[Tensor, "b k *s"] | None = None
    ) -> tuple[Float[Tensor, "b c *s"], Shaped[Tensor, "b k *s"] | None]:
        """Apply what :meth:`draw` gave to the images and their labels.

        Raises:
            CaseError: if the label is not of a whole-number type.
        """
        if label is not None and label.is_floating_point():
            raise CaseError(f"label of type {label.dtype}: a label map holds whole numbers. Convert it first.")
        spatial = list(zip(self._spatial(), params, strict=False))
        if spatial:
            matrix = torch.eye(x.ndim - 1, dtype=torch.float64).expand(len(x), -1, -1)
            for augment, drawn in spatial:
                matrix = augment.matrix(drawn, x.ndim - 2) @ matrix
            x, *moved = warp([x] if label is None else [x, label], matrix, fill=self.fill)
            for augment, drawn in spatial:
                moved = [augment.relabel(y, drawn) for y in moved]
            label = moved[0] if moved else None
        for intensity, drawn in zip(self._intensity(), params[len(spatial) :], strict=True):
            x = intensity.apply(x, drawn)
        return x, label

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b c *s"], seeds: Int64[Tensor, " b"], label: Shaped[Tensor, "b k *s"] | None = None
    ) -> tuple[Float[Tensor, "b c *s"], Shaped[Tensor, "b k *s"] | None]:
        """Augment ``x``, and ``label`` with it, from one seed a sample; always in float32, also under autocast.

        Args:
            x: Images.
            seeds: One number a sample; see :func:`derive_seeds` for several crops a sample.
            label: Label maps on the same grid, whole numbers.

        Returns:
            Images and labels of the same shapes; the label is None if none was given.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.apply_to(x, self.draw(seeds), label=label)

    @torch.no_grad()
    def normalise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """Apply only what is not random, such as a HU window: for prediction and held-out checks."""
        for augment in self._intensity():
            x = augment.normalise(x)
        return x

    @property
    def window_hu(self) -> tuple[float, float] | None:
        """Bounds of the window that brings HU to [0, 1] first; None without one."""
        windows = [augment.config for augment in self._intensity() if augment.name == "window"]
        return (windows[0].low_hu, windows[0].high_hu) if windows else None

    def _spatial(self) -> list[Spatial[Any]]:
        return [augment for augment in self.spatial if isinstance(augment, Spatial)]

    def _intensity(self) -> list[Augment[Any]]:
        return [augment for augment in self.intensity if isinstance(augment, Augment)]


def build_augment(
    configs: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    position_task: bool = False,
    spacing_mm: Sequence[float] | None = None,
) -> Pipeline:
    """Build the pipeline that a recipe asks for.

    Args:
        configs: ``[{name: noise, sigma: [0, 0.1], p: 0.2}, ...]`` or ``{preset: mr_light}``.
        position_task: Whether the labels are places in the body. Spatial augments are then refused, and a preset
            gives only its intensity augments, for a moved crop is no longer where its label says.
        spacing_mm: Voxel size of the crops, for augments that are given in mm and name no spacing of their own.

    Raises:
        ConfigError: for an unknown name or preset, a wrong value, or a spatial augment in a position task.
    """
    known = augment_classes()
    if isinstance(configs, Mapping):
        if set(configs) != {"preset"}:
            raise ConfigError(f"augment: keys {sorted(configs)}; give a list of augments or the one key preset.")
        listed = preset(str(configs["preset"]))
        if position_task:
            listed = tuple(entry for entry in listed if not issubclass(known[entry["name"]], Spatial))
        return build_augment(listed, position_task=position_task, spacing_mm=spacing_mm)
    augments = []
    for place, mapping in enumerate(configs):
        options = dict(mapping)
        name = options.pop("name", None)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise ConfigError(f"augment {place}: there is no {name!r}; {hint}", code="E_UNKNOWN_NAME")
        if name == "mirror" and position_task:
            raise ConfigError(
                f"augment {place}: mirror in a task that learns positions; a mirrored left side is no right side. "
                "Remove it.",
                code="E_MIRROR",
            )
        cls = known[name]
        if issubclass(cls, Spatial) and position_task:
            raise ConfigError(
                f"augment {place}: {name} in a task that learns positions; a moved crop is not where its label says. "
                "Remove it.",
                code="E_POSITION_AUGMENT",
            )
        if spacing_mm is not None and "spacing_mm" in cls.config_class.model_fields:
            options.setdefault("spacing_mm", [float(value) for value in spacing_mm])
        augments.append(cls(cls.config_class.parse(options, source=f"augment {place} {name}"), salt=place))
    return Pipeline(augments)


def augment_classes() -> dict[str, type[Augment[Any]]]:
    """Every augment that a file of ``medssl.augment`` defines, by name."""
    package = importlib.import_module("medssl.augment")
    modules = [
        importlib.import_module(f"medssl.augment.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {cls.name: cls for cls in found if issubclass(cls, Augment) and "name" in vars(cls)}


def derive_seeds(seeds: Int64[Tensor, " b"], num: int) -> Int64[Tensor, "b num"]:
    """Give each of ``num`` crops or views of a sample a seed of its own, a pure function of the sample's."""
    rows = [[mix(seed, index + 1) >> 1 for index in range(num)] for seed in seeds.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(seeds), num)


def mix(seed: int, salt: int) -> int:
    """Scramble two numbers into one of 64 bits: the generator keeps the low 32 bits of what it is given.

    Reference: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
    """
    value = 0
    for number in (seed, salt):
        value = (value + number + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value
