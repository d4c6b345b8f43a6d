"""On a device every augment works with tensors of the device alone, and never makes the CPU wait for it.

Run on a pretended device, so that a mixture of tensors is found before the first GPU is.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from second_device import DEVICE, SecondDevice

from medssl import registry
from medssl.augment import fields
from medssl.augment.base import Augment
from medssl.augment.build import augment_classes
from medssl.augment.images import ONLY_HU
from medssl.methods.base import Method
from medssl.nn.backbone import build_backbone
from medssl.tasks.segmentation import Config, Segmentation
from medssl.trainable import Batch

CLASSES = augment_classes()
SHAPES = [(11, 8, 6), (11, 8), (7, 5, 1)]
SEEDS = torch.arange(8) * 7919 + 3
# whose pieces have another size in each sample: cells of a grid, and crops that are cut out and turned over
SAMPLE_BY_SAMPLE = {"blocks", "local_shuffle", "mirror", "tubes"}
LINES = [{"name": "noise", "p": 0.5}, {"name": "gamma", "p": 0.5}, {"name": "blur", "p": 0.5}]
BACKBONE = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"crop_voxels": [16, 16, 16], "block_voxels": [4, 4, 4]},
    "voco": {"crop_voxels": [8, 8, 8], "grid": [2, 2, 2], "projector_channels": [64, 32]},
}


@pytest.fixture(autouse=True)
def _first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought to a device once, and waited for then, is there; and autocast knows the device."""
    with SecondDevice():
        fields.normal_field(SEEDS[:1], (1, 4), DEVICE)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.fixture(params=sorted(CLASSES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, **options: Any) -> Augment[Any]:
    cls = CLASSES[name]
    return cls(cls.config_class.parse(options))


def image_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    cls = CLASSES[name]
    channels = 3 if cls.colour else 1
    x = torch.rand(len(SEEDS), channels, *shape, generator=torch.Generator().manual_seed(0))
    return x * 3000 - 1000 if cls.takes == ONLY_HU else x


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_augment_gives_the_same_on_the_device_and_nobody_waits(name, shape, p):
    is_rule = make(name).fixed() is not None
    if len(shape) not in CLASSES[name].spatial_dims or (is_rule and p < 1):
        return
    augment, x = make(name, p=p), image_for(name, shape)
    params = augment.draw(SEEDS)
    label = (x[:, :1] > x.mean()).to(torch.uint8)
    with SecondDevice() as device:
        there, label_there = device.put(x), device.put(label)
        moved = augment.apply_label(label_there, params)
        device.take(augment.normalise(there))
        found, found_label = device.take(augment.apply(there, params)), device.take(moved)
    assert not device.waits
    assert all(size <= x.shape[0] * x.shape[1] for size in device.doubles.values())  # a number a channel may be double
    expected = augment.apply(x, params)
    scale = 1000 if augment.takes == ONLY_HU and augment.gives("HU") == "HU" else 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    # a place midway between two voxels goes either way
    assert (found_label != augment.apply_label(label, params)).float().mean() <= 0.01


def test_a_larger_batch_asks_no_more_of_the_launching_cpu(name):
    augment, x = make(name), image_for(name, SHAPES[3 not in CLASSES[name].spatial_dims])
    launches = []
    for times in (1, 2):
        params = augment.draw(torch.arange(len(SEEDS) * times))
        with SecondDevice() as device:
            augment.apply(device.put(x.repeat(times, *[1] * (x.ndim - 1))), params)
        launches.append(device.launches)
    assert (launches[1] > 1.5 * launches[0]) == (name in SAMPLE_BY_SAMPLE), launches


def test_flat_images_are_the_same_on_the_device(name):
    augment, x = make(name), torch.full_like(image_for(name, SHAPES[3 not in CLASSES[name].spatial_dims]), 0.25)
    params = augment.draw(SEEDS)
    with SecondDevice() as device:
        found = device.take(augment.apply(device.put(x), params))
    torch.testing.assert_close(found, augment.apply(x, params), rtol=0, atol=1e-4)


def batch_of(name: str) -> Batch:
    """Four samples as a loader gives them."""
    generator, numbers = torch.Generator().manual_seed(1), SEEDS[:4]
    if name == "voco":
        images = {
            key: torch.rand(4, count, 1, 8, 8, 8, generator=generator) for key, count in [("targets", 4), ("bases", 8)]
        }
        return Batch({**images, "overlap": torch.full((4, 4, 8), 1 / 8)}, numbers, tuple("abcd"))
    to_box = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    to_box[:, :3, 3] = torch.tensor([1.0, 2.0, 0.25])
    tensors = {
        "image": torch.randint(-500, 500, (4, 1, 20, 20, 20), dtype=torch.int16, generator=generator),
        "image_to_box": to_box,
        "image_spacing_mm": torch.ones(4, 3, dtype=torch.float64),
        "image_extent": torch.tensor([[20, 19, 18]] * 4),
    }
    return Batch(tensors, numbers, tuple("abcd"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", registry.names("methods", Method))
def test_a_method_prepares_on_the_device_and_waits_once_to_see_that_no_view_failed(name, training):
    options = {"name": name, **SMALL.get(name, {"crop_voxels": [16, 16, 16]}), "augment": LINES}
    cls, config = registry.configure("methods", options, Method)
    method = cls(config, encoder=build_backbone(BACKBONE, in_channels=1, spatial_dims=3), seed=0)
    batch = batch_of(name)
    here = method.prepare(batch, training=training)
    with SecondDevice() as device:
        there = method.prepare(batch.to(DEVICE), training=training)
        found = {key: device.take(there[key]) for key, value in here.tensors.items()}
    scale = batch.tensors["image"].max() if "image" in batch else 1.0
    for key, values in found.items():
        torch.testing.assert_close(values, here[key], rtol=0, atol=1e-4 * float(scale))
    views = len(found.keys() & {"image", "targets", "bases"})
    assert sum(device.waits.values()) == (views if training else 0)
    assert all(place.startswith("pipeline.py") for place in device.waits)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segmentation_prepares_on_the_device(spatial_dims):
    moves = [{"name": "affine", "p": 0.5}, {"name": "noise"}, {"name": "cutmix"}]
    config = Config.parse({"crop_voxels": [8, 8, 8 if spatial_dims == 3 else 1], "augment": moves})
    encoder = build_backbone(BACKBONE, in_channels=1, spatial_dims=spatial_dims)
    task = Segmentation(config, encoder=encoder, label_values=(3, 7), seed=0)
    image = torch.rand(4, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 3, 7])[(image * 3).long()].to(torch.int16)
    batch = Batch({"image": image, "label": label}, SEEDS[:4], ("a", "b", "c", "d"))
    here = task.prepare(batch, training=True)
    with SecondDevice() as device:
        task._values = device.put(task._values)
        there = task.prepare(batch.to(DEVICE), training=True)
        image, target = device.take(there["image"]), device.take(there["target"])
    torch.testing.assert_close(image, here["image"], rtol=0, atol=1e-4)
    assert (target != here["target"]).float().mean() <= 0.01
    assert set(device.waits.values()) == {1}
    assert len(device.waits) == 2  # one look at views, one at label values


def test_the_pretended_device_refuses_a_mixture_and_counts_waits():
    with SecondDevice() as device:
        x = device.put(torch.rand(3, 4))
        for mixed in (
            lambda: x + torch.ones(4),
            lambda: x[torch.tensor([0, 2])],
            lambda: torch.cat([x, torch.ones(3, 4)]),
        ):
            with pytest.raises(RuntimeError, match="operands on the CPU and on the device"):
                mixed()
        with pytest.raises(RuntimeError, match="waits for its copy"):
            x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)
        assert not device.waits
        x[0] += torch.tensor(1.0)
        x[x > 0.5] = 2.0
        torch.ones(3).to(x.device, non_blocking=True)
        assert not device.waits
        for waiting in (lambda: bool((x > 0).any()), lambda: x[x > 0.5], lambda: torch.ones(3).to(x.device), x.cpu):
            before = sum(device.waits.values())
            waiting()
            assert sum(device.waits.values()) == before + 1
        x.double()
        assert list(device.doubles.values()) == [12]
