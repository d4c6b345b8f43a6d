"""Plans: what the labelled cases are, what a step costs, and a recipe that fits both."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from medssl import cli
from medssl.augment.images import Images
from medssl.blueprint import fit as fitting
from medssl.blueprint.choose import batch_of, crop_of, networks, preset_for, sampling, smaller_crops, step_range
from medssl.blueprint.fingerprint import fingerprint
from medssl.blueprint.fit import PlanConfig
from medssl.blueprint.measure import Cost, CostModel, measure_step
from medssl.blueprint.plan import plan
from medssl.config import load_yaml
from medssl.data.prepare import PrepareConfig
from medssl.data.store import ArrayStore, Entry, IndexRow, write_entry, write_index
from medssl.errors import CheckpointError, ConfigError, EnvironmentFaultError, NoInputError
from medssl.geometry import Geometry
from medssl.nn.backbone import build_backbone
from medssl.recipe import finetune
from medssl.tasks.segmentation import Config, Segmentation


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def make_store(
    folder: Path,
    cases: Mapping[str, tuple[str, np.ndarray | None]],
    *,
    spacings: Sequence[Sequence[float]] = ((1.0, 1.0, 1.0),),
    unit: str = "arbitrary",
    **prepare: Any,
) -> Path:
    """Cases by id, each with its split and label; images are ten times the label."""
    rows = []
    for number, (name, (split, label)) in enumerate(cases.items()):
        shape = (12, 10, 8) if label is None else label.shape
        spacing = spacings[number % len(spacings)]
        grid = Geometry(shape, np.diag([*spacing, 1.0]))
        image = np.zeros((1, *shape), np.float32) if label is None else 10 * label[None].astype(np.float32)
        meta = {
            "source_geometry": grid.to_dict(),
            "prepared_geometry": grid.to_dict(),
            "unit": unit,
            "fill": 0.0,
        }
        given = None if label is None else label[None].astype(np.uint8)
        write_entry(folder, name, Entry(image, given, np.ones((1, *shape), np.uint8), meta, given))
        values = () if label is None else tuple(int(value) for value in np.unique(label) if value)
        rows.append(IndexRow(name, f"s{name}", split, "MR", name, label is not None, values))
    config = PrepareConfig.parse({"modality": "MR", **prepare}).to_dict()
    write_index(folder, rows, prepare=config, unit=unit, modality="MR")
    return folder


def label_of(**voxels: int) -> np.ndarray:
    """A label map with so many voxels of each value, as in ``v1=8``."""
    flat = np.zeros(960, np.uint8)
    start = 0
    for name, count in voxels.items():
        flat[start : start + count] = int(name[1:])
        start += count
    return flat.reshape(12, 10, 8)


def test_a_fingerprint_counts_what_is_there(tmp_path: Path) -> None:
    store = make_store(
        tmp_path,
        {
            "a": ("train", label_of(v1=40, v2=4)),
            "b": ("train", label_of(v1=60, v9=100)),
            "c": ("train", label_of()),
            "d": ("train", None),
            "e": ("val", label_of(v1=9)),
        },
        spacings=((1.0, 1.0, 2.0), (1.0, 1.0, 3.0)),
        unit="HU",
    )
    found = fingerprint(ArrayStore.open(store), ignore_value=9)
    assert (found.cases, found.subjects, found.read, found.empty) == (3, 3, 3, 1)
    assert found.shape == (12, 10, 8)
    assert found.spacing_mm == (1.0, 1.0, 2.0)
    assert found.spacing_ratio == 1.5
    one, two = found.structures
    assert (one.value, one.cases, two.value, two.cases) == (1, 2, 2, 1)
    assert one.volume_ml == pytest.approx((40 * 0.002 + 60 * 0.003) / 2)
    assert two.share == pytest.approx(4 / 960)
    assert found.volume_ratio == pytest.approx(0.13 / 0.008)
    assert found.absent == {"val": (2,)}
    assert found.hu_range == (10, 20)


def test_cases_that_cannot_be_learned_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label maps of all 1 training cases are empty") as error:
        fingerprint(ArrayStore.open(make_store(tmp_path / "a", {"a": ("train", label_of())})))
    assert error.value.code == "E_LABEL_SET"
    store = make_store(tmp_path / "b", {"a": ("train", label_of(v1=3)), "b": ("test", label_of(v1=2, v7=1))})
    with pytest.raises(ConfigError, match=r"no case in the split train has the label values \[7\]"):
        fingerprint(ArrayStore.open(store))
    with pytest.raises(NoInputError, match="no labelled case"):
        fingerprint(ArrayStore.open(make_store(tmp_path / "c", {"a": ("train", None)})))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((35, 50, 36), (40, 56, 40)),
        ((512, 512, 90), (128, 128, 96)),
        ((3, 40, 1), (8, 40, 1)),
        ((900, 333, 1), (512, 336, 1)),
    ],
)
def test_a_crop_is_the_whole_image_within_limits(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert crop_of(shape) == expected


def test_crops_shrink_along_the_axis_that_shows_most_of_the_image() -> None:
    crops = list(smaller_crops((128, 128, 96), (512, 512, 90)))
    assert crops[:3] == [(128, 128, 96), (128, 128, 88), (128, 128, 80)]
    assert crops[-1] == (48, 48, 48)
    assert list(smaller_crops((64, 64, 1), (64, 64, 1))) == [(64, 64, 1)]


@pytest.mark.parametrize(
    ("crop", "halvings"), [((40, 56, 40), 3), ((128, 128, 96), 4), ((256, 256, 1), 5), ((8, 8, 8), 2)]
)
def test_networks_halve_down_to_four_voxels(crop: tuple[int, int, int], halvings: int) -> None:
    found = networks(crop)
    assert [(n.backbone["channels"][0], n.backbone["strides"][0]) for n in found] == [
        (32, 1),
        (16, 1),
        (32, 2),
        (16, 2),
    ]
    for network in found:
        dims = 2 if crop[2] == 1 else 3
        assert math.prod(network.backbone["strides"]) == 2**halvings
        encoder = build_backbone(network.backbone, in_channels=1, spatial_dims=dims)
        assert max(encoder.channels) <= (512 if dims == 2 else 320)


def test_batches_and_steps_suit_crops_and_cases() -> None:
    assert [batch_of(crop) for crop in ((96, 96, 96), (64, 64, 64), (256, 256, 1))] == [2, 4, 8]
    assert step_range(140, 4) == (1400, 14000)
    assert step_range(3, 2) == (1000, 2000)
    assert step_range(10**6, 2) == (25_000, 250_000)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (Images("HU", "CT", "abdomen"), "ct_abdomen"),
        (Images("HU", "CT", None), "ct_light"),
        (Images("zscore", "MR", "brain"), "mr_brain"),
        (Images("zscore", "MR", None), "mr_light"),
        (Images("raw", "other", None), "none"),
    ],
)
def test_the_preset_is_the_gentlest_that_is_made_for_such_images(images: Images, expected: str) -> None:
    assert preset_for(images)[0] == expected


def test_small_structures_are_drawn_more_often(tmp_path: Path) -> None:
    even = fingerprint(ArrayStore.open(make_store(tmp_path / "a", {"a": ("train", label_of(v1=40, v2=30))})))
    odd = fingerprint(ArrayStore.open(make_store(tmp_path / "b", {"a": ("train", label_of(v1=400, v2=3))})))
    assert [choice.value for choice in sampling(even)] == [0.67, "uniform"]
    assert [choice.value for choice in sampling(odd)] == [0.67, "inverse_sqrt"]


def test_costs_are_lines_through_two_measured_steps() -> None:
    small, large = Cost(100, 1.0, 1 << 30, 0), Cost(300, 2.0, 3 << 30, 1 << 20)
    model = CostModel(small, large)
    assert model.seconds(500) == pytest.approx(3.0)
    assert model.seconds(15) == pytest.approx(0.575)  # the line's; never below the proportion
    base = model.gib(0)
    assert base == pytest.approx((600 + 20) / 1024)
    assert model.gib(500) - base == pytest.approx(1.5 * 5)
    assert CostModel(large, large).seconds(600) == 4.0
    noisy = CostModel(Cost(100, 5.0, 1, 0), large)
    assert noisy.seconds(600) == 2.0  # a larger step is never quicker


def test_a_measured_step_keeps_more_for_more_voxels_and_leaves_no_gradient(phantoms: Any) -> None:
    cases = ArrayStore.open(phantoms.store).select(split="train", labelled=True)
    found = []
    for edge in (16, 32):
        torch.manual_seed(0)
        encoder = build_backbone(tiny.BACKBONE, in_channels=1, spatial_dims=3)
        config = Config.parse({"crop_voxels": [edge] * 3, "augment": {"preset": "none"}})
        task = Segmentation(config, encoder=encoder, label_values=(1, 2), seed=0)
        found.append(measure_step(task, cases, batch_size=2, seed=0))
        assert all(parameter.grad is None for parameter in task.parameters())
        assert found[-1].parameters == sum(parameter.numel() for parameter in task.parameters())
    small, large = found
    assert (small.voxels, large.voxels) == (2 * 16**3, 2 * 32**3)
    assert 6 < large.kept_bytes / small.kept_bytes <= 8.5
    assert large.kept_bytes > 4 * large.voxels  # the image alone
    assert large.seconds > 0


def priced(seconds_a_voxel: float, bytes_a_voxel: float) -> Any:
    """In place of a measurement: a cost in proportion to voxels and first channels, twice at full resolution."""

    def measure(task: Segmentation, cases: object, *, batch_size: int, seed: int) -> Cost:
        voxels = batch_size * math.prod(task.config.crop_voxels)
        price = task.encoder.channels[0] / 16 * (2 if task.encoder.strides[0] == 1 else 1)
        return Cost(voxels, seconds_a_voxel * voxels * price, int(bytes_a_voxel * voxels * price), 1000)

    return measure


def reasons(text: str) -> int:
    return sum(line.strip().startswith("#") for line in text.splitlines())


@pytest.mark.parametrize(("seconds", "expected"), [(1e-9, (32, 1)), (2e-5, (16, 2))])
def test_the_most_accurate_network_that_gets_enough_steps_is_taken(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(fitting, "measure_step", priced(seconds, 4))
    made = plan(phantoms.store, out=tmp_path / "r.yaml", config=PlanConfig(minutes=10, memory_gib=4))
    backbone = made.recipe["backbone"]
    assert (backbone["channels"][0], backbone["strides"][0]) == expected
    recipe = load_yaml(made.path)
    assert recipe == made.recipe
    assert reasons(made.path.read_text()) > 15
    assert {"Does:", "Needs:", "Gives:"} <= set(made.path.read_text().split())
    is_capped = recipe["train"]["steps"] == step_range(4, recipe["train"]["batch_size"])[1]
    assert is_capped == (seconds < 1e-6)


def test_memory_makes_crops_smaller_and_at_last_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.zeros((96, 96, 96), np.uint8)
    label[:40, :40, :40] = 1
    store = make_store(tmp_path / "store", {"a": ("train", label), "b": ("val", label)})
    monkeypatch.setattr(fitting, "measure_step", priced(1e-9, 1000))
    crops = []
    for gib in (20.0, 2.0):
        made = plan(store, out=tmp_path / "r.yaml", config=PlanConfig(memory_gib=gib), dry_run=True)
        crops.append(made.recipe["task"]["crop_voxels"])
        assert not made.path.exists()
    assert crops[0] == [96, 96, 96]
    assert math.prod(crops[1]) < 96**3
    with pytest.raises(EnvironmentFaultError, match=r"needs more than the 0\.5 GiB") as error:
        plan(store, out=tmp_path / "r.yaml", config=PlanConfig(memory_gib=0.5))
    assert error.value.code == "E_MEMORY"
    assert not (tmp_path / "r.yaml").exists()


def test_a_slow_machine_gets_smaller_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.ones((96, 96, 96), np.uint8)
    store = make_store(tmp_path / "store", {"a": ("train", label)})
    monkeypatch.setattr(fitting, "measure_step", priced(1e-6, 4))
    made = plan(store, out=tmp_path / "r.yaml", config=PlanConfig(minutes=10, memory_gib=4))
    crop = made.recipe["task"]["crop_voxels"]
    assert 48**3 < math.prod(crop) < 96**3
    assert made.recipe["train"]["steps"] >= 1000
    assert any("no labelled case in the split val" in remark for remark in made.remarks)


def test_what_is_given_is_kept_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {f"c{i}": ("train", label_of(v1=500, v9=20)) for i in range(11)}
    store = make_store(
        tmp_path / "store",
        {
            **cases,
            "rare": ("train", label_of(v1=9, v2=3)),
            "empty": ("train", label_of()),
            "v": ("val", label_of(v1=3)),
        },
        spacings=((1.0, 1.0, 4.0), (1.0, 1.0, 5.0)),
        region="brain",
        spacing_mm=None,
    )
    monkeypatch.setattr(fitting, "measure_step", priced(1e-9, 4))
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    config = PlanConfig.parse(
        {"ignore_value": 9, "backbone": tiny.BACKBONE, "crop_voxels": [16, 16, 8], "batch_size": 3, "memory_gib": 4}
    )
    made = plan(store, out=tmp_path / "r.yaml", config=config)
    task, train = made.recipe["task"], made.recipe["train"]
    assert made.recipe["backbone"] == tiny.BACKBONE
    assert (task["crop_voxels"], task["ignore_value"], train["batch_size"]) == ([16, 16, 8], 9, 3)
    assert task["crop_mm"] == [16.0, 16.0, 32.0]
    said = " ".join(made.remarks)
    for words in (
        "machine was busy",
        "split val has the values [2]",
        "1 of 13",
        "value 2 is in 1 of 13",
        "far from cubes",
    ):
        assert words in said
    assert "brain" in task["augment"]["preset"]
    dry = finetune(made.path, store=store, out=tmp_path / "run", dry_run=True)
    assert dry.step == 0


def test_a_bundle_brings_its_backbone_and_the_planned_recipe_trains(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "planned.yaml"
    command = ["plan", str(phantoms.store), "-o", str(out), "--encoder", str(encoder_bundle), "--minutes", "0.05"]
    code = cli.run_guarded(lambda: cli.app([*command, "--memory-gib", "3"], standalone_mode=False))
    assert code == 0
    printed = capsys.readouterr().out
    assert "task.crop_voxels" in printed
    recipe = load_yaml(out)
    assert recipe["backbone"]["channels"] == tiny.BACKBONE["channels"]
    assert recipe["task"]["mode"] == "warmup_then_full"
    overrides = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=1", "checks.batches=1"]
    result = finetune(out, store=phantoms.store, out=tmp_path / "run", encoder=encoder_bundle, overrides=overrides)
    assert result.step == 1


def test_a_bundle_for_other_images_is_refused_before_anything_is_written(encoder_bundle: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {"a": ("train", label_of(v1=50))}, spacing_mm=[3.0, 3.0, 3.0])
    with pytest.raises(CheckpointError, match="spacing_mm"):
        plan(store, out=tmp_path / "r.yaml", encoder=encoder_bundle, config=PlanConfig(memory_gib=4))
    assert not (tmp_path / "r.yaml").exists()
