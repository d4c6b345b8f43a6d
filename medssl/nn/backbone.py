"""The contract of every encoder: an image goes in, a feature pyramid with declared channels and strides comes out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from medssl import registry
from medssl.config import Config
from medssl.errors import ConfigError


class Backbone(nn.Module, ABC):
    """An encoder in 2D or 3D that returns every level of its feature pyramid, finest first.

    Level ``i`` has ``channels[i]`` channels and ``ceil(n / strides[i])`` voxels along an axis of ``n`` voxels, for
    every ``n >= 1``. No operation depends on the order of threads, so that the same input gives the same output.

    Args:
        config: The file's ``Config``.
        in_channels: Channels of the image.
        spatial_dims: 2 or 3.
        channels: Channels of each level, finest first.
        strides: Voxels of the image a voxel of each level, the same along every axis; never falling.

    Attributes:
        resizable: Keys of the configuration in which a bundle may differ: they shape only tables that can be fitted.

    Raises:
        ConfigError: if ``spatial_dims`` or ``in_channels`` is impossible.
    """

    resizable: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        config: Config,
        *,
        in_channels: int,
        spatial_dims: int,
        channels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        if spatial_dims not in {2, 3} or in_channels < 1:
            raise ConfigError(
                f"backbone: {spatial_dims} spatial dimensions and {in_channels} channels; 2 or 3 dimensions and at "
                "least one channel are needed."
            )
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self._config = config

    @property
    def config(self) -> dict[str, Any]:
        """Name and configuration that :func:`build_backbone` rebuilds this encoder from."""
        return {"name": type(self).__module__.rpartition(".")[2], **self._config.to_dict()}

    @abstractmethod
    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""

    @abstractmethod
    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Every parameter once, in groups from shallow to deep, for layer-wise learning rates."""

    def neck_parameters(self) -> list[nn.Parameter]:
        """Those that only carry features to another level, and are trained with the decoder; none by default."""
        return []

    def position_tables(self) -> tuple[str, ...]:
        """Names of learned tables of positions, (1, channels, *tokens), which other sizes may be fitted to."""
        return ()

    def level_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Spatial shape of each level for an image of spatial ``shape``, finest first."""
        return [tuple(math.ceil(size / stride) for size in shape) for stride in self.strides]


def build_backbone(mapping: Mapping[str, Any], *, in_channels: int, spatial_dims: int) -> Backbone:
    """Build the encoder that ``mapping["name"]`` names, with fresh weights.

    Args:
        mapping: ``name`` of a file in ``medssl/nn`` and the keys of that file's ``Config``.
        in_channels: Channels of the image.
        spatial_dims: 2 or 3.

    Raises:
        ConfigError: if the name is unknown or a value is wrong.
    """
    cls, config = registry.configure("nn", mapping, Backbone)  # type: ignore[type-abstract]
    return cls(config, in_channels=in_channels, spatial_dims=spatial_dims)  # type: ignore[call-arg]


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """All parameters of ``modules``, in order."""
    return [parameter for module in modules for parameter in module.parameters()]
