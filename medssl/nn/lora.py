"""Low-rank adaptation: train a small addition to each weight, and leave no trace of it in a bundle."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medssl.config import Config
from medssl.errors import ConfigError

Targets = Literal["all", "linear", "conv"]

_LAYERS: dict[Targets, tuple[type[nn.Module], ...]] = {
    "all": (nn.Linear, nn.Conv2d, nn.Conv3d),
    "linear": (nn.Linear,),
    "conv": (nn.Conv2d, nn.Conv3d),
}


class LoRAConfig(Config):
    """Low-rank additions to the weights of the encoder.

    Args:
        rank: Of each addition; at most the smaller side of the weight.
        alpha: The addition counts ``alpha / rank``.
        targets: Which layers get one.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: Targets = "all"


class LowRank(nn.Module):
    """``weight + alpha / rank * B A``, with ``A`` random and ``B`` zero at first, so that nothing changes yet.

    The kernel of a convolution is taken as a matrix of output channels by all the rest: ``A`` is then a convolution
    of the same size with ``rank`` output channels, and ``B`` a 1x1 convolution after it.

    Args:
        weight: Of a linear or convolutional layer, output channels first; it is not trained.
        rank: At most the smaller side of the weight counts.
        alpha: See :class:`LoRAConfig`.

    Reference: Hu et al., LoRA, ICLR 2022, arXiv:2106.09685, section 4.1, eq. 3.
    Deviations: the sum of weights is formed before the layer is applied, which gives the same output; convolutions
    get an addition too, where the paper adapts attention alone.
    """

    def __init__(self, weight: Float[Tensor, "k c *s"], *, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        kept = min(rank, rows, columns)
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(kept, columns))
        self.b = nn.Parameter(weight.new_zeros(rows, kept))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "k c *s"]) -> Float[Tensor, "k c *s"]:
        """The weight that the layer uses; summed in full precision, as it is when the two are merged."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.b @ self.a).view_as(weight)


def add_lora(module: nn.Module, config: LoRAConfig, *, seed: int, skip: Collection[nn.Parameter] = ()) -> list[str]:
    """Freeze ``module`` and give its weights low-rank additions that are trained in their place.

    Args:
        module: Changed in place; gives the same output as before.
        config: Rank, alpha and layers.
        seed: Of the additions' random halves.
        skip: Parameters that are left as they are, trainable or not.

    Returns:
        Names of the weights with an addition.

    Raises:
        ConfigError: if no layer is of the kind that ``targets`` names.
    """
    left = {id(parameter) for parameter in skip}
    for parameter in module.parameters():
        if id(parameter) not in left:
            parameter.requires_grad_(False)
    chosen = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _LAYERS[config.targets]) and id(layer.weight) not in left
    }
    if not chosen:
        raise ConfigError(
            f"lora: the encoder has no layer of the kind {config.targets!r}. Set lora.targets to all.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in chosen.values():
            weight = cast("Tensor", layer.weight).detach()
            low_rank = LowRank(weight, rank=config.rank, alpha=config.alpha)
            parametrize.register_parametrization(layer, "weight", low_rank)
    return [f"{name}.weight" for name in chosen]


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with every low-rank addition merged into its weight, under the layer's own names."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for name, part in module.named_modules():
        if parametrize.is_parametrized(part):
            prefix = f"{name}." if name else ""
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}parametrizations.")}
            state[f"{prefix}weight"] = cast("Tensor", part.weight).detach()
    return state
