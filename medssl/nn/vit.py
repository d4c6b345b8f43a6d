"""Plain vision transformer as a feature pyramid: tokens of four depths, carried to finer levels as UNETR does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.errors import ConfigError
from medssl.nn.backbone import Backbone, parameters_of
from medssl.nn.blocks import norm
from medssl.nn.resize import cut, resize_linear

_INIT_STD = 0.02
_MAX_PERIOD = 10000.0


class Config(BaseConfig):
    """Shape of the transformer; the default is the ViT-B/16 of UNETR for crops of 96 voxels."""

    patch: Literal[2, 4, 8, 16, 32] = Field(16, description="voxels of a token along each axis")
    embed: int = Field(768, ge=1)
    depth: int = Field(12, ge=1)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    position: Literal["learned", "sincos"] = "learned"
    grid: int | tuple[int, ...] = Field(
        6, description="tokens of the learned table along each axis; it is resized to those of the image at hand"
    )
    class_token: bool = Field(False, description="as weights of DINO have one; it is in no level of the pyramid")
    layer_scale: float | None = Field(None, gt=0, description="first value of the factor on each residual branch")
    qkv_bias: bool = False
    norm_eps: float = Field(1e-5, gt=0)
    neck: int = Field(16, ge=1, description="channels of a level at full resolution; each coarser level doubles them")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.embed % self.heads:
            raise ValueError(f"{self.embed} channels do not divide into {self.heads} heads")
        if self.depth < self.levels:
            raise ValueError(f"depth {self.depth}; patches of {self.patch} voxels give {self.levels} levels")
        if min(self.grid if isinstance(self.grid, tuple) else (self.grid,)) < 1:
            raise ValueError("grid must be at least 1")
        return self

    @property
    def levels(self) -> int:
        """Levels of the pyramid, at strides 2 to ``patch``."""
        return int(math.log2(self.patch))


class ViTEncoder(Backbone):
    """Vision transformer with a pyramid at strides 2, 4, ... up to the patch size.

    The coarsest level is the tokens of the last block, normalised. Finer ones are the tokens of earlier blocks, at
    equal distances, doubled in size by transposed convolutions. These are the neck: layers of the decoder in UNETR,
    which are trained even where the encoder is frozen.

    Reference: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, section 3.1; Hatamizadeh et al., UNETR, WACV 2022,
    arXiv:2103.10504, section 3.1 (tokens of blocks 3, 6, 9 and 12 at strides 2, 4, 8 and 16); Oquab et al., DINOv2,
    arXiv:2304.07193 (``layer_scale``); Chen et al., MoCo v3, arXiv:2104.02057, section 4.3 (``sincos``).
    Deviations: a step of the neck is a transposed convolution and a norm, without UNETR's further convolutions, since
    the decoder convolves each level; the level at full resolution is the decoder's. An image whose size is no
    multiple of a patch is padded with zeros at the end of an axis, and the levels are cut to its size.
    """

    resizable = frozenset({"grid"})

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        levels = config.levels
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=[config.neck * 2 ** (level + 1) for level in range(levels - 1)] + [config.embed],
            strides=[2 ** (level + 1) for level in range(levels)],
        )
        self.patch = config.patch
        embedding = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.patch_embed = embedding(in_channels, config.embed, config.patch, stride=config.patch)
        self.position: nn.Parameter | None = None
        if config.position == "learned":
            grid = [config.grid] * spatial_dims if isinstance(config.grid, int) else list(config.grid)
            if len(grid) != spatial_dims:
                raise ConfigError(
                    f"vit: grid has {len(grid)} numbers for {spatial_dims} spatial dimensions. Give one number an axis."
                )
            self.position = nn.Parameter(torch.empty(1, config.embed, *grid))
            nn.init.trunc_normal_(self.position, std=_INIT_STD)
        elif config.embed % (2 * spatial_dims):
            raise ConfigError(
                f"vit: {config.embed} channels cannot hold a sine and a cosine of each of {spatial_dims} axes. Make "
                f"embed a multiple of {2 * spatial_dims}."
            )
        self.class_token: nn.Parameter | None = None
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, config.embed))
            nn.init.trunc_normal_(self.class_token, std=_INIT_STD)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed, eps=config.norm_eps)
        self.neck = nn.ModuleList(
            _Steps(spatial_dims, config.embed, self.channels[level], steps=levels - 1 - level)
            for level in range(levels - 1)
        )
        self._taps = [config.depth * (level + 1) // levels - 1 for level in range(levels)]

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first."""
        shapes = self.level_shapes(x.shape[2:])
        grid = shapes[-1]
        tokens = self._embed(x)
        extra = 0
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(len(x), -1, -1).to(tokens.dtype), tokens), dim=1)
            extra = 1
        tapped = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in self._taps:
                tapped.append(tokens)
        tapped[-1] = self.norm(tokens)
        # a copy, since a view of one token is laid out in a way that torch's convolutions crash on in the backward pass
        maps = [_clone(h[:, extra:].transpose(1, 2).unflatten(2, grid)) for h in tapped]
        finer = [steps(h) for steps, h in zip(self.neck, maps[:-1], strict=True)]
        return [cut(h, shape) for h, shape in zip([*finer, maps[-1]], shapes, strict=True)]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Embedding with positions, then one group a block, with the part of the neck that takes its tokens."""
        tables = [table for table in (self.position, self.class_token) if table is not None]
        groups = [[*parameters_of(self.patch_embed), *tables], *[parameters_of(block) for block in self.blocks]]
        for tap, steps in zip(self._taps, self.neck, strict=False):
            groups[tap + 1] += parameters_of(steps)
        groups[-1] += parameters_of(self.norm)
        return groups

    def neck_parameters(self) -> list[nn.Parameter]:
        """Those of the transposed convolutions and their norms."""
        return parameters_of(self.neck)

    def position_tables(self) -> tuple[str, ...]:
        """``position``, where it is learned."""
        return ("position",) if self.position is not None else ()

    def _embed(self, x: Tensor) -> Float[Tensor, "b n d"]:
        missing = [-size % self.patch for size in x.shape[2:]]
        if any(missing):
            x = F.pad(x, [side for end in reversed(missing) for side in (0, end)])
        h = self.patch_embed(x)
        grid = h.shape[2:]
        if self.position is not None:
            table = resize_linear(self.position, grid)
        else:
            table = sincos_table(h.shape[1], grid, device=h.device)
        tokens: Tensor = (h + table.to(h.dtype)).flatten(2).transpose(1, 2)
        return tokens


def sincos_table(
    channels: int, grid: Sequence[int], *, device: torch.device | str | None = None
) -> Float[Tensor, "1 d *g"]:
    """Fixed positions: sines, then cosines, of each axis in turn, first axis first.

    ``sin(n / 10000^(k / K))`` and its cosine for token ``n`` of an axis and ``k = 0 .. K - 1``, ``K = channels / (2 *
    axes)``.

    Args:
        channels: Channels, a multiple of twice the number of axes.
        grid: Tokens along each axis.
        device: Where the table is wanted.
    """
    count = channels // (2 * len(grid))
    frequencies = _MAX_PERIOD ** -(torch.arange(count, dtype=torch.float64, device=device) / count)
    parts = []
    for axis, size in enumerate(grid):
        angles = torch.outer(frequencies, torch.arange(size, dtype=torch.float64, device=device))
        shape = [2 * count, *[size if i == axis else 1 for i in range(len(grid))]]
        parts.append(torch.cat((angles.sin(), angles.cos())).view(shape).expand(-1, *grid))
    return torch.cat(parts)[None].float()


class _Block(nn.Module):
    """Attention and a perceptron of two layers, each on normalised tokens and added to them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.embed
        self.heads = config.heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.norm_eps) for _ in range(2))
        self.qkv, self.proj = _linear(width, 3 * width, bias=config.qkv_bias), _linear(width, width)
        hidden = round(width * config.mlp_ratio)
        self.fc1, self.fc2 = _linear(width, hidden), _linear(hidden, width)
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if config.layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), config.layer_scale)) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (h if self.scale1 is None else h * self.scale1)
        h = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (h if self.scale2 is None else h * self.scale2)


class _Steps(nn.Sequential):
    """Doubles the size ``steps`` times; channels fall to ``target`` in the first step, where that is cheap."""

    def __init__(self, spatial_dims: int, source: int, target: int, *, steps: int) -> None:
        up = nn.ConvTranspose3d if spatial_dims == 3 else nn.ConvTranspose2d
        layers: list[nn.Module] = []
        for step in range(steps):
            layer = up(source if step == 0 else target, target, 2, stride=2, bias=False)
            layers += [layer, norm("layer", target), nn.LeakyReLU(0.01, inplace=True)]
        super().__init__(*layers)


def _clone(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _linear(source: int, target: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(source, target, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=_INIT_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
