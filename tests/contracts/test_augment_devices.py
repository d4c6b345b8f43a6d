"""On a device every augment works with tensors of the device alone, and never makes the CPU wait for it.

Run on a pretended device, so that a mixture of tensors is found before the first GPU is.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import test_augment_contract as augments
import test_method_contract as methods
import torch
from second_device import DEVICE, SecondDevice

from medssl.augment import fields
from medssl.augment.images import ONLY_HU
from medssl.nn.backbone import build_backbone
from medssl.tasks.segmentation import Config, Segmentation
from medssl.trainable import Batch

SEEDS = torch.arange(8) * 7919 + 3
OFTEN = {"p": 0.5}


@pytest.fixture(autouse=True)
def _first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought to a device once, and waited for then, is there; and autocast knows the device."""
    with SecondDevice():
        fields.normal_field(SEEDS[:1], (1, 4), DEVICE)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.fixture(params=sorted(augments.CLASSES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def image_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = augments.images(name, len(SEEDS), shape)
    return x * 3000 - 1000 if augments.CLASSES[name].takes == ONLY_HU else x


def options_of(name: str, *, often: bool) -> dict[str, Any]:
    return OFTEN if often and name not in augments.RULES else {}


@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("shape", augments.SHAPES)
def test_an_augment_stays_on_the_device_and_nobody_waits(name, shape, often):
    if len(shape) not in augments.CLASSES[name].spatial_dims:
        return
    augment, x = augments.make(name, **options_of(name, often=often)), image_for(name, shape)
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


def test_flat_images_are_the_same_on_the_device(name):
    shape = augments.SHAPES[0] if 3 in augments.CLASSES[name].spatial_dims else augments.SHAPES[1]
    augment, x = augments.make(name), torch.full_like(image_for(name, shape), 0.25)
    params = augment.draw(SEEDS)
    with SecondDevice() as device:
        found = device.take(augment.apply(device.put(x), params))
    torch.testing.assert_close(found, augment.apply(x, params), rtol=0, atol=1e-4)


def on_both(trainable: Any, batch: Batch, *, training: bool) -> tuple[Batch, dict[str, torch.Tensor], SecondDevice]:
    """What :meth:`prepare` makes on the CPU and on the device."""
    here = trainable.prepare(batch, training=training)
    with SecondDevice() as device:
        there = trainable.prepare(batch.to(DEVICE), training=training)
        found = {key: device.take(there[key]) for key in here.tensors if key in {"image", "target", "mask", "targets"}}
    return here, found, device


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_prepares_on_the_device_and_waits_once_to_see_that_no_view_failed(name, training):
    lines = [{"name": "noise", "p": 0.5}, {"name": "gamma", "p": 0.5}, {"name": "blur", "p": 0.5}]
    method = methods.build(name, augment=lines)
    here, found, device = on_both(method, methods.batch(method), training=training)
    assert found
    for key, values in found.items():
        torch.testing.assert_close(values, here[key], rtol=0, atol=1e-4)
    views = len([key for key in here.tensors if key in {"image", "targets", "bases"}])
    assert sum(device.waits.values()) == (views if training else 0)
    assert all(place.startswith("pipeline.py") for place in device.waits)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segmentation_prepares_on_the_device(spatial_dims):
    moves = [{"name": "affine", "p": 0.5}, {"name": "noise"}, {"name": "cutmix"}]
    config = Config.parse({"crop_voxels": [8, 8, 8 if spatial_dims == 3 else 1], "augment": moves})
    backbone = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}
    encoder = build_backbone(backbone, in_channels=1, spatial_dims=spatial_dims)
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
        for mixed in (lambda: x + torch.ones(4), lambda: x[torch.tensor([0, 2])], lambda: torch.cat([x, torch.ones(3, 4)])):
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
