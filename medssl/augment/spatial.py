"""Augments that move voxels: an affine map and a smooth displacement, both in mm, and mirrors by anatomical axis.

Arrays are RAS+: (X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from medssl.augment.base import AugmentConfig, Draws, NonNegativeRange, Params, PositiveRange, Spatial
from medssl.errors import ConfigError

_AXES = {"LR": 0, "AP": 1, "SI": 2}
_KNOT_VOXELS = 4
_CONTROL_POINTS = 16
_NO_FOLD = 2.48
_THICK_RATIO = 3.0


class AffineConfig(AugmentConfig):
    """Options of :class:`Affine`; all are largest amounts, drawn evenly on both sides of none.

    ``rotation_deg`` about the X, Y and Z axis; ``scale`` drawn evenly in its logarithm, above 1 enlarges; ``shear`` as
    a tangent; ``translation_mm`` along each axis; ``thick_ratio``: from which ratio of the longest to the shortest edge
    of a voxel on the slices stay whole; ``fill`` outside the box, None extends its border.
    """

    rotation_deg: tuple[float, float, float] = (10.0, 10.0, 10.0)
    scale: PositiveRange = (0.9, 1.1)
    shear: float = Field(default=0.0, ge=0.0, lt=1.0)
    translation_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    thick_ratio: float = Field(default=_THICK_RATIO, ge=1.0)
    fill: float | None = None


class Affine(Spatial[AffineConfig]):
    """Scale, shear, rotate and translate the content about the centre of the crop, in mm.

    ``p' = Rz Ry Rx · H · s · p + t`` with ``p`` in mm from the centre. In 2D only what stays in the plane is used:
    the rotation about Z and the shear of X by Y. Where slices are thick (one edge of a voxel at least ``thick_ratio``
    times the shortest), the map stays in the plane of the slices too: a tilted or stretched stack of thick slices
    shows steps that no scanner makes. Each sample goes by its own voxel size.
    """

    name: ClassVar[str] = "affine"
    config_class = AffineConfig

    def __init__(self, config: AffineConfig | None = None, *, salt: int = 0) -> None:
        super().__init__(config, salt=salt)
        self.fill = self.config.fill

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw angles (radian), the scale, three shears (XY, XZ, YZ) and a translation in mm."""
        even = [2 * share - 1 for share in torch.rand(9, generator=generator, dtype=torch.float64).tolist()]
        low, high = (math.log(bound) for bound in self.config.scale)
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        limits = zip(even, [math.radians(angle) for angle in self.config.rotation_deg], strict=False)
        moves = zip(even[6:], self.config.translation_mm, strict=True)
        drawn = {
            "angle": [part * limit for part, limit in limits],
            "shear": [part * self.config.shear for part in even[3:6]],
            "shift_mm": [part * limit for part, limit in moves],
            "scale": math.exp(low + share * (high - low)),
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in drawn.items()}

    def matrix(self, params: Params, spacing_mm: Float64[Tensor, "b d"]) -> Float64[Tensor, "b n n"]:
        """The map in mm; see the class for its order."""
        dims = spacing_mm.shape[1]
        on = params["on"].double()[:, None]
        is_across = thick_axes(spacing_mm, self.config.thick_ratio)
        free = (~_crossing(is_across)).double()
        if dims == 2:
            free = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(free)
        angle, shear = params["angle"] * on * free, params["shear"] * on * free.flip(1)
        sheared = torch.eye(3, dtype=torch.float64).repeat(len(on), 1, 1)
        sheared[:, 0, 1], sheared[:, 0, 2], sheared[:, 1, 2] = shear.unbind(1)
        scale = torch.where(params["on"][:, None] & ~is_across, params["scale"][:, None], 1.0)
        turned = _rotation(angle[:, 2], 2) @ _rotation(angle[:, 1], 1) @ _rotation(angle[:, 0], 0)
        linear = turned @ sheared * scale[:, None, :]
        shift = params["shift_mm"] * on
        return _homogeneous(linear[:, :dims, :dims], shift[:, :dims])


class ElasticConfig(AugmentConfig):
    """Options of :class:`Elastic`.

    ``amplitude_mm`` bounds the shift of a control point along each axis, drawn evenly in it, of an amplitude that is
    itself drawn; ``control_mm`` is the distance of control points; ``thick_ratio`` as in :class:`AffineConfig`.
    """

    amplitude_mm: NonNegativeRange = (0.0, 6.0)
    control_mm: float = Field(default=32.0, gt=0.0)
    thick_ratio: float = Field(default=_THICK_RATIO, ge=1.0)
    fill: float | None = None

    @model_validator(mode="after")
    def _keeps_order(self) -> ElasticConfig:
        high = self.amplitude_mm[1]
        if high * _NO_FOLD > self.control_mm:
            raise ValueError(
                f"amplitude_mm up to {high:g} with control points {self.control_mm:g} mm apart can fold tissue; "
                f"at most {self.control_mm / _NO_FOLD:.3g} keeps it in one piece"
            )
        return self


class Elastic(Spatial[ElasticConfig]):
    """Bend the content smoothly: shifts of control points, spread by cubic B-splines, in mm.

    Control points lie ``control_mm`` apart about the centre of the crop, whatever the voxel size; a crop wider than 13
    control points has them further apart. Between knots of four voxels the displacement is linear. Where slices are
    thick nothing moves across them.

    Reference: Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999, eq. 1; bound on the
    amplitude: Choi, Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, Graphical Models 2000,
    theorem 1 (2.48 in 3D).
    Deviations: the spline is sampled at knots of four voxels and linear in between.
    """

    name: ClassVar[str] = "elastic"
    config_class = ElasticConfig

    def __init__(self, config: ElasticConfig | None = None, *, salt: int = 0) -> None:
        super().__init__(config, salt=salt)
        self.fill = self.config.fill

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the amplitude and the shift of each control point, in shares of it."""
        low, high = self.config.amplitude_mm
        size = [3, *[_CONTROL_POINTS] * 3]
        return {
            "amplitude_mm": low + torch.rand((), generator=generator) * (high - low),
            "share": 2 * torch.rand(size, generator=generator) - 1,
        }

    def displacement(
        self, params: Params, shape: Sequence[int], spacing_mm: Float64[Tensor, "b d"]
    ) -> Float32[Tensor, "b d *k"] | None:
        """Shifts in mm at knots of about four voxels."""
        dims = len(shape)
        if not params["on"].any():
            return None
        control = params["share"] if dims == 3 else params["share"][:, :2, :, :, 0]
        for axis, length in enumerate(shape):
            knots = max(2, math.ceil((length - 1) / _KNOT_VOXELS) + 1) if length > 1 else 1
            places = torch.linspace(-0.5, 0.5, knots) if knots > 1 else torch.zeros(1)
            extent_mm = spacing_mm[:, axis, None] * (length - 1)
            step_mm = torch.clamp(extent_mm / (_CONTROL_POINTS - 3), min=self.config.control_mm)
            weights = cubic_weights(places * extent_mm / step_mm + (_CONTROL_POINTS - 1) / 2, _CONTROL_POINTS)
            control = torch.einsum("bkp,b...p->b...k", weights, control.movedim(axis + 2, -1)).movedim(-1, axis + 2)
        free = ~thick_axes(spacing_mm, self.config.thick_ratio)[:, :dims]
        strength = params["amplitude_mm"][:, None] * (params["on"][:, None] & free)
        return control * strength.reshape(*strength.shape, *[1] * dims)


class MirrorConfig(AugmentConfig):
    """Options of :class:`Mirror`; ``swap_labels`` pairs the label values of left and right structures."""

    axes: tuple[Literal["LR", "AP", "SI"], ...] = Field(default=("LR",), min_length=1)
    swap_labels: tuple[tuple[int, int], ...] = ()


class Mirror(Spatial[MirrorConfig]):
    """Mirror along anatomical axes, with all non-empty sets of ``axes`` equally likely.

    Where left and right change places, paired label values change too, so that a left organ is not called right. In
    2D, LR is along the columns and AP along the rows, whatever the picture shows.
    """

    name: ClassVar[str] = "mirror"
    config_class = MirrorConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the sign of each axis."""
        signs = torch.ones(3, dtype=torch.float64)
        chosen = int(torch.randint(1, 2 ** len(self.config.axes), (), generator=generator))
        for bit, axis in enumerate(self.config.axes):
            if chosen >> bit & 1:
                signs[_AXES[axis]] = -1.0
        return {"signs": signs}

    def matrix(self, params: Params, spacing_mm: Float64[Tensor, "b d"]) -> Float64[Tensor, "b n n"]:
        """A diagonal of signs.

        Raises:
            ConfigError: if a 2D image is to be mirrored along the axis that it lacks.
        """
        dims = spacing_mm.shape[1]
        if dims == 2 and "SI" in self.config.axes:
            raise ConfigError("augment mirror: axis SI in 2D, where images have LR and AP only. Remove SI.")
        signs = torch.where(params["on"][:, None], params["signs"], 1.0)[:, :dims]
        return _homogeneous(torch.diag_embed(signs), torch.zeros_like(signs))

    def relabel(self, y: Shaped[Tensor, "b c *s"], params: Params) -> Shaped[Tensor, "b c *s"]:
        """Swap the paired values of the samples whose left and right changed places."""
        chosen = (params["on"] & (params["signs"][:, 0] < 0)).nonzero()[:, 0].to(y.device, non_blocking=True)
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


def thick_axes(spacing_mm: Float64[Tensor, "b d"], ratio: float) -> Bool[Tensor, "b 3"]:
    """Across which axes slices are thick: voxels at least ``ratio`` times as long as the shortest edge; none in 2D."""
    if spacing_mm.shape[1] == 2:
        return torch.zeros(len(spacing_mm), 3, dtype=torch.bool)
    return spacing_mm >= ratio * spacing_mm.amin(dim=1, keepdim=True)


def cubic_weights(places: Float64[Tensor, "b k"], count: int) -> Float32[Tensor, "b k p"]:
    """Weights of ``count`` coefficients of a uniform cubic B-spline at ``places``, in units of their distance.

    ``B(t) = 2/3 - t² + |t|³/2`` for ``|t| < 1``, ``(2 - |t|)³ / 6`` for ``|t| < 2``, else 0.
    """
    t = (places[..., None] - torch.arange(count)).abs()
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp(min=0) ** 3 / 6
    return torch.where(t < 1, near, far).float()


def _crossing(is_across: Bool[Tensor, "b 3"]) -> Bool[Tensor, "b 3"]:
    """Which rotations leave the plane of thick slices: about X turns Y and Z, and so on."""
    x, y, z = is_across.unbind(1)
    return torch.stack([y | z, z | x, x | y], dim=1)


def _rotation(angle: Float64[Tensor, " b"], axis: int) -> Float64[Tensor, "b 3 3"]:
    """Right-handed rotation about one axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix, cosine, sine = np.zeros((len(angle), 3, 3)), np.cos(angle.numpy()), np.sin(angle.numpy())
    matrix[:, axis, axis] = 1.0
    matrix[:, first, first] = matrix[:, second, second] = cosine
    matrix[:, first, second], matrix[:, second, first] = -sine, sine
    return torch.from_numpy(matrix)


def _homogeneous(linear: Float64[Tensor, "b d d"], shift: Float64[Tensor, "b d"]) -> Float64[Tensor, "b n n"]:
    dims = shift.shape[1]
    matrix = torch.eye(dims + 1, dtype=torch.float64).repeat(len(shift), 1, 1)
    matrix[:, :dims, :dims] = linear
    matrix[:, :dims, dims] = shift
    return matrix
