"""Numbers, options and draws as a caption says them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from medssl.augment.base import Augment, Params, Spatial
from medssl.augment.mr import BiasField, Motion
from medssl.augment.spatial import Affine, Elastic, Mirror
from medssl.augment.ultrasound import TimeGain

_AXES = ("LR", "AP", "SI")
_MOST_DECIMALS = 6
_MOST_NUMBERS = 3
_COARSE = 24
_BRIGHTEST = 1000.0
_MOVED_DEG, _MOVED_MM, _SHEARED, _SCALED = 0.5, 0.005, 0.0005, 0.0005
_SELDOM_CHANGED = "thick_ratio"


def number(value: float, digits: int = 2) -> str:
    """A number of so many digits and no exponent: -160, 0.036."""
    if value == 0:
        return "0"
    decimals = min(max(0, digits - 1 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def value_in_words(value: object) -> str:
    """An option as it is written, without brackets."""
    if isinstance(value, list | tuple):
        return " ".join(value_in_words(item) for item in value) or "none"
    return number(value, 4) if isinstance(value, float) else "none" if value is None else str(value)


def told_options(augment: Augment[Any]) -> Mapping[str, Any]:
    """The options of an augment, without those that say nothing unless they are changed."""
    default = augment.config_class().to_dict()
    return {
        key: value
        for key, value in augment.config.to_dict().items()
        if not ((value is None or key == _SELDOM_CHANGED) and value == default[key])
    }


def fixed_in_words(fixed: Sequence[Sequence[object]]) -> str:
    """What is not random in a pipeline, as in: window -175 to 250."""
    return " and ".join(f"{name} {_span(values)}" for name, *values in fixed)


def drawn_in_words(
    augment: Augment[Any], params: Params, *, shape: Sequence[int], spacing_mm: Float64[Tensor, "1 d"]
) -> str:
    """How strong one draw is.

    Args:
        augment: What was drawn for.
        params: Of one sample.
        shape: Voxels of the crop.
        spacing_mm: Of its voxels.
    """
    if isinstance(augment, Affine):
        return _affine(augment, params, spacing_mm)
    if isinstance(augment, Mirror):
        signs = params["signs"][0].tolist()
        return "along " + " and ".join(axis for axis, sign in zip(_AXES, signs, strict=True) if sign < 0)
    if isinstance(augment, Elastic):
        shift = augment.displacement(params, shape, spacing_mm)
        return "nothing bent" if shift is None else f"bent by up to {number(float(shift.norm(dim=1).max()))} mm"
    if isinstance(augment, Motion):
        return _motion(params)
    if isinstance(augment, BiasField | TimeGain):
        low, high = _gain(augment, params, spacing_mm)
        return f"brightness × {number(low)} to {number(high)}"
    drawn = {name: params[name][0] for name in augment.config.to_dict() if name in params}
    return ", ".join(f"{name} {_amount(value)}" for name, value in drawn.items())


def _affine(augment: Spatial[Any], params: Params, spacing_mm: Float64[Tensor, "1 d"]) -> str:
    """Angles, shear, scale and shift of the map as it is applied, of which ``linear = rotation · shear · scale``."""
    dims = spacing_mm.shape[1]
    matrix = augment.matrix(params, spacing_mm)[0]
    turned, upper = torch.linalg.qr(matrix[:dims, :dims])
    signs = torch.sign(torch.diagonal(upper))
    turned, upper = turned * signs, upper * signs[:, None]
    angles = [float(torch.rad2deg(angle)) for angle in _angles(turned)]
    told = [
        f"{number(angle)}°" + (f" about {axis}" if dims == 3 else "")
        for axis, angle in zip(_AXES if dims == 3 else ("SI",), angles, strict=True)
        if abs(angle) >= _MOVED_DEG
    ]
    parts = [f"turned {', '.join(told)}"] if told else []
    scale = torch.diagonal(upper)
    if bool(((scale - 1).abs() >= _SCALED).any()):
        is_even = float(scale.max() - scale.min()) < _SCALED
        parts.append("scale " + " ".join(number(float(one), 3) for one in (scale[:1] if is_even else scale)))
    shear = float((upper / scale).triu(1).abs().max())
    parts += [f"shear up to {number(shear)}"] if shear >= _SHEARED else []
    shift = matrix[:dims, dims]
    if float(shift.abs().max()) >= _MOVED_MM:
        parts.append(f"shifted {' '.join(number(float(one)) for one in shift)} mm")
    return ", ".join(parts) or "nothing moved"


def _angles(turned: Float64[Tensor, "d d"]) -> list[Tensor]:
    """About X, Y and Z of ``Rz Ry Rx``; in 2D about Z alone."""
    about_z = torch.atan2(turned[1, 0], turned[0, 0])
    if len(turned) == 2:
        return [about_z]
    return [torch.atan2(turned[2, 1], turned[2, 2]), -torch.asin(turned[2, 0].clamp(-1, 1)), about_z]


def _motion(params: Params) -> str:
    """The farthest pose; the one in the middle of the scan is that of the image."""
    middle = int((params["time"][0] <= 0.5).sum())
    others = [place for place in range(params["pose_angle"].shape[1]) if place != middle]
    angle = float(torch.rad2deg(params["pose_angle"][0, others]).abs().max())
    shift = float(params["pose_shift_mm"][0, others].norm(dim=1).max())
    count = params["time"].shape[1]
    return f"{count} move{'s' if count > 1 else ''}, up to {number(angle)}° and {number(shift)} mm"


def _gain(augment: Augment[Any], params: Params, spacing_mm: Float64[Tensor, "1 d"]) -> tuple[float, float]:
    """Least and greatest factor on a coarse crop of ones, between a darkest corner that stays and one far brighter."""
    x = torch.ones(1, 1, *[_COARSE] * spacing_mm.shape[1])
    x.view(-1)[0], x.view(-1)[-1] = 0, _BRIGHTEST
    factor = augment.change(x, params, spacing_mm).view(-1)[1:-1]
    return float(factor.min()), float(factor.max())


def _amount(value: Tensor) -> str:
    """One number, a few, or how far many go."""
    if value.numel() > _MOST_NUMBERS:
        return f"up to {number(float(value.double().abs().max()))}"
    return " ".join(number(one) for one in value.double().flatten().tolist())


def _span(values: Sequence[object]) -> str:
    """Bounds as in: -175 to 250."""
    pairs = [_span(value) for value in values if isinstance(value, list | tuple)]
    return ", ".join(pairs) if pairs else " to ".join(map(value_in_words, values))
