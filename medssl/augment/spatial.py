"""Augments that move voxels: an affine map in mm, and mirrors by anatomical axis. Arrays are RAS+: (X, Y, Z)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float64, Shaped
from pydantic import Field
from torch import Tensor

from medssl.augment.base import AugmentConfig, Params, PositiveRange, Spacing, Spatial
from medssl.errors import ConfigError

_AXES = {"LR": 0, "AP": 1, "SI": 2}


class AffineConfig(AugmentConfig):
    """Options of :class:`Affine`; all are largest amounts, drawn evenly on both sides of none.

    ``rotation_deg`` about the X, Y and Z axis; ``scale`` drawn evenly in its logarithm, above 1 enlarges; ``shear`` as
    a tangent; ``translation_mm`` along each axis; ``fill`` outside the crop, None extends the border.
    """

    rotation_deg: tuple[float, float, float] = (10.0, 10.0, 10.0)
    scale: PositiveRange = (0.9, 1.1)
    shear: float = Field(default=0.0, ge=0.0, lt=1.0)
    translation_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    spacing_mm: Spacing = (1.0, 1.0, 1.0)
    fill: float | None = None


class Affine(Spatial[AffineConfig]):
    """Scale, shear, rotate and translate the content about the centre of the crop, in mm.

    ``p' = Rz Ry Rx · H · s · p + t`` with ``p`` in mm from the centre. In 2D only what stays in the plane is used:
    the rotation about Z and the shear of X by Y.
    """

    name: ClassVar[str] = "affine"
    config_class = AffineConfig

    def __init__(self, config: AffineConfig | None = None, *, salt: int = 0) -> None:
        super().__init__(config, salt=salt)
        self.fill = self.config.fill

    def sample(self, generator: torch.Generator) -> Params:
        """Draw angles (radian), the scale, three shears (XY, XZ, YZ) and a translation in mm."""
        even = 2 * torch.rand(9, generator=generator, dtype=torch.float64) - 1
        low, high = (math.log(bound) for bound in self.config.scale)
        share = torch.rand((), generator=generator, dtype=torch.float64)
        return {
            "angle": torch.deg2rad(even[:3] * torch.tensor(self.config.rotation_deg, dtype=torch.float64)),
            "shear": even[3:6] * self.config.shear,
            "shift_mm": even[6:] * torch.tensor(self.config.translation_mm, dtype=torch.float64),
            "scale": torch.exp(low + share * (high - low)),
        }

    def matrix(self, params: Params, spatial_dims: int) -> Float64[Tensor, "b n n"]:
        """The map in voxels; see the class for its order."""
        on = params["on"].double()
        angle, shear = params["angle"] * on[:, None], params["shear"] * on[:, None]
        if spatial_dims == 2:
            angle = angle * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
            shear = shear * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        sheared = torch.eye(3, dtype=torch.float64).repeat(len(on), 1, 1)
        sheared[:, 0, 1], sheared[:, 0, 2], sheared[:, 1, 2] = shear.unbind(1)
        scale = torch.where(params["on"], params["scale"], 1.0)
        turned = _rotation(angle[:, 2], 2) @ _rotation(angle[:, 1], 1) @ _rotation(angle[:, 0], 0)
        spacing = torch.tensor(self.config.spacing_mm, dtype=torch.float64)
        linear = (turned @ sheared * scale[:, None, None]) * spacing / spacing[:, None]
        shift = params["shift_mm"] * on[:, None] / spacing
        return _homogeneous(linear[:, :spatial_dims, :spatial_dims], shift[:, :spatial_dims])


class MirrorConfig(AugmentConfig):
    """Options of :class:`Mirror`; ``swap_labels`` pairs the label values of left and right structures."""

    axes: tuple[Literal["LR", "AP", "SI"], ...] = Field(default=("LR",), min_length=1)
    swap_labels: tuple[tuple[int, int], ...] = ()


class Mirror(Spatial[MirrorConfig]):
    """Mirror along anatomical axes, with all non-empty sets of ``axes`` equally likely.

    Where left and right change places, paired label values change too, so that a left organ is not called right.
    """

    name: ClassVar[str] = "mirror"
    config_class = MirrorConfig

    def sample(self, generator: torch.Generator) -> Params:
        """Draw the sign of each axis."""
        signs = torch.ones(3, dtype=torch.float64)
        chosen = int(torch.randint(1, 2 ** len(self.config.axes), (), generator=generator))
        for bit, axis in enumerate(self.config.axes):
            if chosen >> bit & 1:
                signs[_AXES[axis]] = -1.0
        return {"signs": signs}

    def matrix(self, params: Params, spatial_dims: int) -> Float64[Tensor, "b n n"]:
        """A diagonal of signs.

        Raises:
            ConfigError: if a 2D image is to be mirrored along the axis that it lacks.
        """
        if spatial_dims == 2 and "SI" in self.config.axes:
            raise ConfigError("augment mirror: axis SI in 2D, where images have LR and AP only. Remove SI.")
        signs = torch.where(params["on"][:, None], params["signs"], 1.0)[:, :spatial_dims]
        return _homogeneous(torch.diag_embed(signs), torch.zeros_like(signs))

    def relabel(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Swap the paired values of the samples whose left and right changed places."""
        chosen = (params["on"] & (params["signs"][:, 0] < 0)).nonzero()[:, 0]
        if not self.config.swap_labels or len(chosen) == 0:
            return y
        old = y[chosen]
        new = old.clone()
        for left, right in self.config.swap_labels:
            new[old == left] = right
            new[old == right] = left
        out = y.clone()
        out[chosen] = new
        return out


def _rotation(angle: Float64[Tensor, " b"], axis: int) -> Float64[Tensor, "b 3 3"]:
    """Right-handed rotation about one axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(angle), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, first, second], matrix[:, second, first] = -angle.sin(), angle.sin()
    return matrix


def _homogeneous(linear: Float64[Tensor, "b d d"], shift: Float64[Tensor, "b d"]) -> Float64[Tensor, "b n n"]:
    dims = shift.shape[1]
    matrix = torch.eye(dims + 1, dtype=torch.float64).repeat(len(shift), 1, 1)
    matrix[:, :dims, :dims] = linear
    matrix[:, :dims, dims] = shift
    return matrix
