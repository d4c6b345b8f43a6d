"""What a gallery is asked for, from a name to a whole recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from medssl.augment.images import Images
from medssl.augment.presets import preset
from medssl.errors import ConfigError
from medssl.showcase.plan import read_plan
from medssl.views import GridCrops, LabelledCrop, RandomCrop


def test_a_name_is_a_preset_and_overrides_go_on_top() -> None:
    plan = read_plan("mr_light", ["without=[noise]"])
    assert plan.augment == {"preset": "mr_light", "without": ["noise"]}
    assert (plan.title, plan.crop_voxels, plan.needs_label) == ("mr_light", None, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- {name: noise}\n- preset: mr_light\n", [{"name": "noise"}, {"preset": "mr_light"}]),
        ("# mine\n- {name: noise}\n", [{"name": "noise"}]),
        ("augment:\n  - {name: noise}\n", [{"name": "noise"}]),
        ("preset: mr_light\n", {"preset": "mr_light"}),
        ("name: noise\np: 0.5\n", {"name": "noise", "p": 0.5}),
    ],
)
def test_a_file_holds_augments_as_a_recipe_lists_them(tmp_path: Path, text: str, expected: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert read_plan(path).augment == expected
    assert read_plan(str(path)).title == "mine.yaml"


def test_recipes_give_their_crops() -> None:
    mae = {**tiny.MAE, "method": {**tiny.MAE["method"], "region": {"SI": [0.2, 0.8]}, "crop_mm": [30, 30, 30]}}
    plan = read_plan(mae)
    assert plan.crop_voxels == (16, 16, 16)
    assert plan.crop_mm == (30.0, 30.0, 30.0)
    assert plan.region == {"SI": (0.2, 0.8)}
    assert plan.foreground_share is None
    task = read_plan(tiny.SEGMENT, ["task.foreground_share=0.5"])
    assert (task.needs_label, task.foreground_share, task.inside_body) == (True, 0.5, False)
    assert read_plan(tiny.VOCO).position_task
    assert not read_plan(tiny.SEGMENT).position_task


def test_an_override_of_a_preset_that_cannot_be_is_told_with_what_can() -> None:
    with pytest.raises(ConfigError, match=r"mr_light: --set p on a preset, of which only without can be set") as caught:
        read_plan("mr_light", ["p=2"])
    assert "[{preset: mr_light, without: [noise]}, {name: noise, p: 0.5}]" in str(caught.value)


def test_a_recipe_gives_the_sampler_of_its_method_or_task() -> None:
    images = Images(modality="MR", region="brain")
    mae = {**tiny.MAE, "method": {**tiny.MAE["method"], "region": {"SI": [0.2, 0.8]}, "crop_mm": [30, 30, 30]}}
    learner = read_plan(mae).learner
    assert learner is not None
    crops = learner.sampler(images, ())
    assert isinstance(crops, RandomCrop)
    assert (crops.crop_mm, crops.placing.region) == ((30.0, 30.0, 30.0), {"SI": (0.2, 0.8)})
    segment = read_plan({"task": tiny.SEGMENT["task"]}, crop_voxels=(32, 16, 16)).learner
    assert segment is not None
    labelled = segment.sampler(images, (0, 1, 2))
    assert isinstance(labelled, LabelledCrop)
    assert (labelled.crop_voxels, labelled.label_values) == ((32, 16, 16), (1, 2))
    voco = read_plan(tiny.VOCO).learner
    assert voco is not None
    assert isinstance(voco.sampler(images, ()), GridCrops)
    assert read_plan("mr_light", crop_voxels=(8, 8, 8)).learner is None


def test_a_reason_is_told_only_for_the_value_that_it_was_given_for() -> None:
    one = preset("mr_light")
    written = dict(one.augments[0])
    name = str(written.pop("name"))
    plan = read_plan([{"name": "noise"}, {"preset": "mr_light"}])
    assert plan.reasons(name, {**written, "shear": 0.0}) == one.reasons[0]
    assert plan.reasons(name, {**written, "p": 0.123}) == {}
    assert read_plan([{"name": "noise"}]).reasons("noise", {"p": 1.0}) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modality": "MR", "orientation": "RAS"}, "neither augments nor a recipe"),
        ({"augment": 3}, "neither augments nor a recipe"),
        ({"augment": ["noise"]}, "neither augments nor a recipe"),
        ({"method": "mae"}, "a mapping with a name is needed"),
        ({"method": {"name": "mea"}}, "did you mean mae"),
        ({"task": {"name": "segmentation", "crop_voxel": [1, 2, 3]}}, "crop_voxels"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_plan(path)


def test_a_file_that_is_no_yaml_or_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("- {name: noise")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_plan(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")
