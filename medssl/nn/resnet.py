"""ResNet encoder in 2D and 3D, the form in which most weights of natural images are published."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import conv, norm

STAGES = 4
_EXPANSION = 4
_STEM_KERNEL = 7


class Config(BaseConfig):
    """Shape of the encoder; ResNet-18 is ``[2, 2, 2, 2]``, -34 ``[3, 4, 6, 3]``, -50 that with bottlenecks."""

    blocks: tuple[int, ...] = Field((2, 2, 2, 2), description="residual blocks of each stage")
    bottleneck: bool = Field(False, description="blocks of 1x1, 3x3 and 1x1 convolutions with four times the channels")
    width: int = Field(64, ge=1, description="channels of the stem; each stage after the first doubles them")
    stem_stride: Literal[1, 2] = 2
    shortcut_bias: bool = Field(False, description="as MONAI's networks have it")
    norm: Literal["group", "frozen_batch"] = Field(
        "group", description="frozen_batch: batch norm with the statistics of published weights, never updated"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.blocks) != STAGES or min(self.blocks) < 1:
            raise ValueError(f"blocks are {list(self.blocks)}; {STAGES} numbers of at least 1 are needed")
        return self


class ResNetEncoder(Backbone):
    """Stem at stride 2 and four stages at strides 4 to 32, equal to torchvision's and MONAI's on the same weights.

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, table 1; the
    stride of a bottleneck is on its 3x3 convolution, as in torchvision.
    Deviations: group norm, or batch norm whose statistics are never updated, so that a sample does not depend on its
    neighbours; with the latter the last scale of every block starts at 0 (Goyal et al. 2017, arXiv:1706.02677, 5.1).
    The maximum over 3 voxels is taken axis by axis, which has a fixed order of sums on CUDA.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        widths = [config.width * 2**stage * (_EXPANSION if config.bottleneck else 1) for stage in range(STAGES)]
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=[config.width, *widths],
            strides=[config.stem_stride * 2**level for level in range(STAGES + 1)],
        )
        self.conv1 = conv(spatial_dims, in_channels, config.width, kernel=_STEM_KERNEL, stride=config.stem_stride)
        self.norm1 = _norm(config, config.width)
        previous = config.width
        for stage, (width, count) in enumerate(zip(widths, config.blocks, strict=True)):
            blocks = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(_Block(config, spatial_dims, previous, width, stride=stride))
                previous = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""
        pyramid = [F.relu(self.norm1(self.conv1(x)))]
        h = max_pool(pyramid[0], size=3)
        for stage in self._stages():
            h = stage(h)
            pyramid.append(h)
        return pyramid

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Stem, then one group a stage."""
        return [parameters_of(self.conv1, self.norm1), *[parameters_of(stage) for stage in self._stages()]]

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{stage}") for stage in range(1, STAGES + 1)]


class FrozenBatchNorm(nn.Module):
    """Batch norm whose mean and variance are constants; scale and shift are trained.

    Args:
        channels: Channels of the features.
        eps: Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """``weight * (x - mean) / sqrt(var + eps) + bias``."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * scale.view(shape) + shift.view(shape)


def max_pool(x: Float[Tensor, "b c *s"], *, size: Literal[2, 3]) -> Float[Tensor, "b c *t"]:
    """Maximum over 2 or 3 voxels at stride 2 along each axis, ``ceil(n / 2)`` voxels; 3 are centred.

    Torch's own adds gradients in no fixed order on CUDA where windows overlap or the image is 3D.
    """
    for axis in range(2, x.ndim):
        count = -(-x.shape[axis] // 2)
        padding = [0] * (2 * (x.ndim - axis))
        padding[-2:] = (1, 1) if size > 2 else (0, x.shape[axis] % 2)
        padded = F.pad(x, padding, value=-torch.inf)
        first, *others = [_every_other(padded, axis, start, count) for start in range(size)]
        for other in others:
            first = torch.maximum(first, other)
        x = first
    return x


class _Block(nn.Module):
    """``relu(norm(conv(...)) + shortcut)``, basic or bottleneck."""

    def __init__(self, config: Config, spatial_dims: int, source: int, target: int, *, stride: int) -> None:
        super().__init__()
        inner = target // _EXPANSION if config.bottleneck else target
        kernels = (1, 3, 1) if config.bottleneck else (3, 3)
        widths = [source, *[inner] * (len(kernels) - 1), target]
        self._depth = len(kernels)
        for i, kernel in enumerate(kernels):
            step = stride if i == int(config.bottleneck) else 1
            layer = conv(spatial_dims, widths[i], widths[i + 1], kernel=kernel, stride=step)
            setattr(self, f"conv{i + 1}", layer)
            setattr(self, f"norm{i + 1}", _norm(config, widths[i + 1], last=i == len(kernels) - 1))
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or source != target:
            shortcut = conv(spatial_dims, source, target, kernel=1, stride=stride, bias=config.shortcut_bias)
            self.downsample = nn.Sequential(shortcut, _norm(config, target))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i in range(1, self._depth + 1):
            h = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(h))
            h = F.relu(h) if i < self._depth else h
        return F.relu(h + self.downsample(x))


def _norm(config: Config, channels: int, *, last: bool = False) -> nn.Module:
    if config.norm == "group":
        return norm("group", channels)
    frozen = FrozenBatchNorm(channels)
    if last:
        nn.init.zeros_(frozen.weight)
    return frozen


def _every_other(x: Tensor, axis: int, first: int, count: int) -> Tensor:
    place = [slice(None)] * x.ndim
    place[axis] = slice(first, first + 2 * count - 1, 2)
    return x[tuple(place)]
