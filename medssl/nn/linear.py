"""A decoder that can only weigh what the features already say: the linear probe of voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from medssl.nn.blocks import conv, norm
from medssl.nn.decoder import Decoder
from medssl.nn.resize import cut, resize_linear

_KIND = "linear"


class LinearDecoder(nn.Module):
    """Norm and one linear map over the features of all levels, each interpolated to the image's grid.

    ``logits = bias + sum over levels of resize(weight_level * norm(feature_level))``, which is the linear map of the
    concatenated, interpolated features: a 1x1 convolution and interpolation may change places.

    Args:
        channels: Channels of the pyramid, finest first.
        strides: Cumulative strides of the pyramid, finest first.
        spatial_dims: 2 or 3.
        out_channels: Channels of the result.

    Reference: Alain, Bengio, Understanding intermediate layers using linear classifier probes, ICLR 2017 workshop,
    arXiv:1610.01644.
    Deviations: all levels are read at once, and normalised per sample.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], spatial_dims: int, out_channels: int) -> None:
        super().__init__()
        self._config = {
            "channels": list(channels),
            "strides": list(strides),
            "spatial_dims": spatial_dims,
            "out_channels": out_channels,
        }
        self._strides = tuple(strides)
        self.norms = nn.ModuleList(norm("layer", width) for width in channels)
        self.heads = nn.ModuleList(
            conv(spatial_dims, width, out_channels, kernel=1, bias=level == 0) for level, width in enumerate(channels)
        )

    @property
    def config(self) -> dict[str, Any]:
        """What :func:`build_decoder` builds this decoder from, as plain data."""
        return {"kind": _KIND, **self._config}

    @property
    def output_strides(self) -> tuple[int, ...]:
        """Stride of the one result, which has the image's size."""
        return (1,)

    def forward(self, features: Sequence[Tensor], image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Scores of each class at the size of ``image``, in a list of one as the other decoder gives them."""
        shape = image.shape[2:]
        total: Tensor | None = None
        for feature, normalise, head, stride in zip(features, self.norms, self.heads, self._strides, strict=True):
            covered = [size * stride for size in feature.shape[2:]]
            scores = cut(resize_linear(head(normalise(feature)), covered), shape)
            total = scores if total is None else total + scores
        return [] if total is None else [total]


def build_decoder(config: Mapping[str, Any]) -> Decoder | LinearDecoder:
    """Build the decoder whose ``config`` a bundle's passport keeps, with fresh weights.

    Args:
        config: ``Decoder.config`` or ``LinearDecoder.config``.

    Raises:
        ConfigError: if channels, strides and width do not fit together.
    """
    options = {key: value for key, value in config.items() if key != "kind"}
    return LinearDecoder(**options) if config.get("kind") == _KIND else Decoder(**options)
