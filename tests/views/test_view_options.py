"""What a newcomer writes for sizes in mm and for a part of the body, in every recipe that takes them."""

from __future__ import annotations

from typing import Any

import pytest

from medssl.config import Config
from medssl.errors import ConfigError
from medssl.methods.base import Method
from medssl.registry import configure
from medssl.tasks.base import Task

PLACES: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", "crop_voxels": [16, 16, 16]},
    "voco": {"name": "voco", "position_mode": "crop", "crop_voxels": [16, 16, 16]},
    "segmentation": {"name": "segmentation", "crop_voxels": [16, 16, 16]},
}
IN_MM = "give three numbers in mm above 0, such as [64, 64, 64]"


def configured(name: str, **options: Any) -> Any:
    config: Config
    if name == "segmentation":
        _, config = configure("tasks", {**PLACES[name], **options}, Task)  # type: ignore[type-abstract]
    else:
        _, config = configure("methods", {**PLACES[name], **options}, Method)  # type: ignore[type-abstract]
    return config


@pytest.mark.parametrize(("name", "option"), [("mae", "crop_mm"), ("segmentation", "crop_mm"), ("voco", "cell_mm")])
@pytest.mark.parametrize("value", [64, "64", [64, 64], [64, 64, 0], [64, 64, True], [64, "64", 64]])
def test_a_size_that_is_not_three_numbers_is_refused_with_an_example(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(name, **{option: value})
    assert f"{option}: {IN_MM}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "option"), [("mae", "crop_mm"), ("segmentation", "crop_mm"), ("voco", "cell_mm")])
def test_a_size_of_whole_numbers_reads_as_mm_and_comes_back(name: str, option: str) -> None:
    config = configured(name, **{option: [64, 48.5, 32]})
    assert getattr(config, option) == (64.0, 48.5, 32.0)
    assert type(config).parse(config.to_dict()) == config
    assert getattr(configured(name, **{option: None}), option) is None


@pytest.mark.parametrize(
    ("region", "sentence"),
    [
        ("brain", "region: write {SI: [0.3, 0.7]}; the part of the body belongs in the preparation (found 'brain')."),
        ([0.3, 0.7], "region: write {SI: [0.3, 0.7]}; the part of the body belongs in the preparation."),
        ({"SI": [0.7, 0.3]}, "region: the bounds of SI are swapped; write {SI: [0.3, 0.7]}."),
        ({"SI": 0.5}, "region: SI needs two shares of the body, from 0 to 1; write {SI: [0.3, 0.7]}."),
        ({"AP": [30, 70]}, "region: AP needs two shares of the body, from 0 to 1; write {AP: [0.3, 0.7]}."),
        ({"head": [0.3, 0.7]}, "region: there is no axis head; axes are LR, AP, SI, as in {SI: [0.3, 0.7]}."),
    ],
)
def test_a_region_that_is_none_is_refused_with_what_to_write(region: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured("mae", region=region)
    assert str(caught.value) == f"methods mae: {sentence}"


def test_a_region_reads_as_shares_and_comes_back() -> None:
    config = configured("mae", region={"SI": [0, 0.7], "LR": [0.5, 0.5]})
    assert config.region == {"SI": (0.0, 0.7), "LR": (0.5, 0.5)}
    assert type(config).parse(config.to_dict()) == config
    assert configured("mae", region=None).region is None
