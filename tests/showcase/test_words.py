"""Numbers and draws as captions say them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.augment.base import Augment, Params
from medssl.augment.build import build_augment
from medssl.augment.images import Images
from medssl.showcase.words import drawn_in_words, fixed_in_words, number, told_options, value_in_words

MR = Images(modality="MR", region="brain")
US = Images(modality="US", spatial_dims=2)


def made(options: dict[str, Any], images: Images = MR) -> Augment[Any]:
    pipeline = build_augment([options], images=images)
    return next(iter([*pipeline.spatial, *pipeline.intensity]))


def said(augment: Augment[Any], params: Params, dims: int = 3) -> str:
    params = {"on": torch.tensor([True]), **params}
    return drawn_in_words(augment, params, shape=(32,) * dims, spacing_mm=torch.ones(1, dims, dtype=torch.float64))


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-160.0, 2, "-160"), (250.0, 2, "250"), (0.0361, 2, "0.036"), (1.0, 3, "1"), (0.0, 2, "0"), (1e-9, 2, "0"),
     (-1234.5, 2, "-1234"), (12.34, 2, "12"), (0.867, 3, "0.867"), (100000.0, 4, "100000")],
)  # fmt: skip
def test_numbers_have_no_exponent(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_options_are_written_without_brackets_and_without_what_says_nothing() -> None:
    assert value_in_words((0.5, (1, 2.25), None, True)) == "0.5 1 2.25 none True"
    assert value_in_words([]) == "none"
    assert told_options(made({"name": "elastic", "p": 0.5})).keys() == {"p", "amplitude_mm", "control_mm"}
    changed = told_options(made({"name": "affine", "thick_ratio": 5.0, "fill": 0.0}))
    assert (changed["thick_ratio"], changed["fill"]) == (5.0, 0.0)


def test_windows_are_bounds_in_words() -> None:
    assert fixed_in_words([("window", -175.0, 250.0), ("rescale", 0.0, 1.0)]) == "window -175 to 250 and rescale 0 to 1"
    assert fixed_in_words([("multi_window", (-160.0, 240.0), (-1000.0, 400.0))]) == (
        "multi_window -160 to 240, -1000 to 400"
    )


def affine(angles: tuple[float, float, float], scale: float, shear: float, shift: tuple[float, ...]) -> Params:
    return {
        "angle": torch.deg2rad(torch.tensor([angles], dtype=torch.float64)),
        "scale": torch.tensor([scale], dtype=torch.float64),
        "shear": torch.full((1, 3), shear, dtype=torch.float64),
        "shift_mm": torch.tensor([shift], dtype=torch.float64),
    }


def test_affine_tells_angles_scale_shear_and_shift_as_they_were_drawn() -> None:
    it = made({"name": "affine"})
    assert said(it, affine((8.0, -3.0, 12.0), 0.93, 0.0, (0.0, 0.0, 0.0))) == (
        "turned 8° about LR, -3° about AP, 12° about SI, scale 0.93"
    )
    assert said(it, affine((0.0, 0.0, 5.0), 1.0, 0.1, (2.0, 0.0, -1.5))) == (
        "turned 5° about SI, shear up to 0.1, shifted 2 0 -1.5 mm"
    )
    assert said(it, affine((0.0, 0.0, 0.0), 1.0, 0.0, (0.0, 0.0, 0.0))) == "nothing moved"


def test_affine_tells_only_what_is_applied() -> None:
    drawn = {"on": torch.tensor([True]), **affine((8.0, 8.0, 8.0), 0.9, 0.0, (0.0, 0.0, 0.0))}
    thick = torch.tensor([[1.0, 1.0, 5.0]], dtype=torch.float64)
    told = drawn_in_words(made({"name": "affine"}), drawn, shape=(32, 32, 8), spacing_mm=thick)
    assert told == "turned 8° about SI, scale 0.9 0.9 1"
    flat = made({"name": "affine"}, US)
    assert said(flat, affine((8.0, 8.0, -6.0), 1.2, 0.0, (0.0, 0.0, 0.0)), dims=2) == "turned -6°, scale 1.2"


def test_motion_tells_the_farthest_pose_other_than_the_one_of_the_image() -> None:
    angle = torch.deg2rad(torch.tensor([[[1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, -2.0, 0.0]]]))
    shift = torch.tensor([[[0.0, 3.0, 4.0], [30.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    drawn = {"time": torch.tensor([[0.3, 0.7]]), "pose_angle": angle, "pose_shift_mm": shift}
    assert said(made({"name": "motion"}), drawn) == "2 moves, up to 2° and 5 mm"


def test_elastic_tells_the_longest_shift() -> None:
    drawn = {"amplitude_mm": torch.tensor([3.0]), "share": torch.zeros(1, 3, 16, 16, 16)}
    drawn["share"][:, 0] = 1.0
    assert said(made({"name": "elastic"}), drawn) == "bent by up to 3 mm"
    off = {**drawn, "on": torch.tensor([False])}
    assert said(made({"name": "elastic"}), off) == "nothing bent"


def test_fields_tell_between_which_factors_brightness_lies() -> None:
    linear = torch.zeros(1, 4, 4, 4)
    linear[0, 1, 0, 0] = math.log(2)
    assert said(made({"name": "bias_field"}), {"coefficients": linear}) == "brightness × 0.5 to 2"
    even = {"log_gain": torch.full((1, 6), math.log(1.2))}
    assert said(made({"name": "time_gain"}, US), even, dims=2) == "brightness × 1.2 to 1.2"


def test_other_augments_tell_the_options_that_were_drawn() -> None:
    window = made({"name": "window"}, Images(domain="HU", modality="CT"))
    assert said(window, {"low_hu": torch.tensor([-160.0]), "high_hu": torch.tensor([240.0])}) == (
        "low_hu -160, high_hu 240"
    )
    signs = {"signs": torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64)}
    assert said(made({"name": "mirror", "axes": ["LR"]}), signs) == "along LR and SI"
