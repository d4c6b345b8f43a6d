"""Augments that redraw the scale of intensities: a monotone warp, and an inversion."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor

from medssl.augment.base import Augment, AugmentConfig, Draws, Params, Share, extremes
from medssl.augment.images import NOT_HU


class HistogramWarpConfig(AugmentConfig):
    """Options of :class:`HistogramWarp`.

    ``strength`` 1 lets knots meet, and whole ranges of intensity become flat; up to 0.5 every slope is at least half.
    """

    num_knots: int = Field(default=10, ge=3)
    strength: Share = 0.5


class HistogramWarp(Augment[HistogramWarpConfig]):
    """Map intensities by a rising line through knots, spread evenly over the range of each sample and channel.

    From the lowest knot upwards, each is drawn evenly between the last drawn and the next that is not yet drawn; both
    ends stay. ``strength`` is the share of the way from the even knots to the drawn ones.

    Reference: MONAI's RandHistogramShift.
    Deviations: the range is that of each channel, not of the whole image; ``strength``, which MONAI has at 1.
    """

    name: ClassVar[str] = "histogram_warp"
    config_class = HistogramWarpConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw where the knots go, as shares of the range."""
        count = self.config.num_knots
        even = torch.linspace(0, 1, count)
        moved = even.clone()
        shares = torch.rand(count, generator=generator)
        for place in range(1, count - 1):
            moved[place] = torch.lerp(moved[place - 1], moved[place + 1], shares[place])
        return {"knots": torch.lerp(even, moved, self.config.strength)}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Interpolate linearly between knots; a constant channel stays as it is."""
        low, high = extremes(x)
        span = torch.where(high > low, high - low, 1.0)
        knots = params["knots"].to(x.device, x.dtype, non_blocking=True)
        last = knots.shape[1] - 1
        place = ((x - low) / span).mul_(last).clamp_(0, last).flatten(1)
        below = place.floor().clamp_(max=last - 1)
        start, rise = knots[:, :-1], knots.diff(dim=1)
        index = below.long()
        share = start.gather(1, index) + rise.gather(1, index) * place.sub_(below)
        return share.reshape(x.shape).mul_(span).add_(low)


class InvertConfig(AugmentConfig):
    """Options of :class:`Invert`: only ``p``."""

    p: float = Field(default=0.5, ge=0.0, le=1.0)


class Invert(Augment[InvertConfig]):
    """Turn bright into dark and back, within the range of each sample and channel."""

    name: ClassVar[str] = "invert"
    config_class = InvertConfig
    takes = NOT_HU

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + high - x``."""
        low, high = extremes(x)
        return low + high - x
