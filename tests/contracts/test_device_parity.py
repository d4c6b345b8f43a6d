"""CPU and device share every draw, and the pixels to 1e-4: of resampling, random fields, whole pipelines and
losses.

Run on a pretended device, which takes the way of a device with true values; what single augments do there is in
``test_augment_devices.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from second_device import DEVICE, SecondDevice

from medssl.augment import fields
from medssl.augment import resample as module
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.resample import resample
from medssl.losses.reconstruction import masked_mse
from medssl.losses.segmentation import dice_ce
from medssl.tasks.segmentation import _mean_hard_dice

SEEDS = torch.tensor([3, 1_000_003, 2**61, 5])
MOVES = [
    {"name": "affine", "rotation_deg": [20, 20, 40], "p": 0.7},
    {"name": "elastic", "amplitude_mm": [0, 2], "p": 0.5},
]
LISTS: dict[str, list[dict[str, Any]]] = {
    "HU": [*MOVES, {"name": "hu_noise"}, {"name": "streaks"}, {"name": "window", "jitter_hu": 20}, {"name": "gamma"}],
    "window first": [*MOVES, {"name": "window", "jitter_hu": 20}, {"name": "noise"}, {"name": "cutmix"}],
    "MR": [
        *MOVES,
        {"name": "mirror", "swap_labels": [[0, 1]]},
        {"name": "bias_field"},
        {"name": "motion"},
        {"name": "rician_noise"},
        {"name": "batch_styles"},
    ],
    "by index": [{"name": "window"}],
}


def boxes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.rand(4, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x if dtype.is_floating_point else x * 200).to(dtype)


def maps(dims: int) -> torch.Tensor:
    """A turn with zoom, a mirror, a whole shift beyond the box, and a part of a voxel."""
    to_box = torch.eye(dims + 1, dtype=torch.float64).repeat(4, 1, 1)
    to_box[0, :2, :2] = torch.tensor([[0.8, -0.55], [0.5, 0.9]], dtype=torch.float64)
    to_box[1, 0, 0], to_box[1, 0, dims] = -1, 8
    to_box[2, :dims, dims] = -2
    to_box[3, :dims, dims] = 0.3
    return to_box


@pytest.mark.parametrize("fill", [None, -3.0])
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(11, 9), (10, 9, 7), (9, 8, 1)])
def test_resampling_is_the_same_on_the_device_and_nobody_waits(shape, dtype, fill, monkeypatch):
    dims, x = len(shape), boxes(shape, dtype)
    monkeypatch.setattr(module, "_VOXELS_AT_ONCE", 500)  # some samples at once
    crop = tuple(max(1, n - 2) for n in shape)
    options: dict[str, Any] = {
        "shape": crop,
        "fill": fill,
        "extent": torch.tensor(shape).repeat(4, 1) - torch.tensor([0, 1] + [0] * (dims - 2)),
        "window": (torch.tensor([0.0, 20.0, 1.0, 5.0]), torch.tensor([1.0, 150.0, 90.0, 70.0])),
    }
    moved = torch.randn(4, dims, *[1 if n == 1 else 3 for n in crop], generator=torch.Generator().manual_seed(1))
    moved[1:] = 0
    label = (boxes(shape, torch.float32)[:, :1] * 300).to(torch.int32)
    for displacement in (None, moved):
        image, target = resample(x, maps(dims), label=label, displacement=displacement, **options)
        with SecondDevice() as device:
            there = resample(device.put(x), maps(dims), label=device.put(label), displacement=displacement, **options)
            found, found_label = (device.take(value) for value in there)
        assert not device.waits
        torch.testing.assert_close(found, image, rtol=0, atol=1e-4)
        assert (found_label != target).float().mean() <= 0.002


@pytest.mark.parametrize("shape", [(1, 5), (2, 6, 7, 5)])
def test_fields_are_the_same_to_the_bit(shape):
    with SecondDevice() as device:
        normal, even = (device.take(make(SEEDS, shape, DEVICE)) for make in (fields.normal_field, fields.uniform_field))
    assert torch.equal(normal, fields.normal_field(SEEDS, shape))
    assert torch.equal(even, fields.uniform_field(SEEDS, shape))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", LISTS)
def test_a_pipeline_gives_the_same_views_on_the_device_and_looks_once(name, dims):
    is_mr = name == "MR"
    images = Images(domain="zscore", modality="MR", region="brain") if is_mr else Images(domain="HU", modality="CT")
    augment = build_augment(LISTS[name], images=images)
    generator, size = torch.Generator().manual_seed(2), (14, 13, 12)[:dims]
    x = torch.rand(4, 1, *size, generator=generator)
    x = x if is_mr else (x * 1500 - 1000).round().to(torch.int16)
    label = (torch.rand(4, 1, *size, generator=generator) > 0.5).to(torch.int16)
    to_box = torch.eye(dims + 1, dtype=torch.float64).repeat(4, 1, 1)
    to_box[:, :dims, dims] = torch.tensor([[1.0], [2.0], [3.0], [0.5 if name != "by index" else 1.0]])
    frame = Frame(to_box, tuple(n - 3 for n in size), torch.full((4, dims), 1.5, dtype=torch.float64))
    params = augment.draw(SEEDS)
    here = augment.apply_to(x, params, label=label, frame=frame)
    with SecondDevice():
        fields.normal_field(SEEDS[:1], (1, 4), DEVICE)  # brings the table to the device
    with SecondDevice() as device:
        there = augment.apply_to(device.put(x), params, label=device.put(label), frame=frame)
        image, target = device.take(there.image), device.take(there.label)
        notes = {key: device.take(value) if value.device == DEVICE else value for key, value in there.notes.items()}
    torch.testing.assert_close(image, here.image, rtol=0, atol=1e-4)
    assert (target != here.label).float().mean() <= 0.002
    torch.testing.assert_close(there.frame.to_box, here.frame.to_box, rtol=0, atol=0)
    for key, note in notes.items():
        torch.testing.assert_close(note, here.notes[key], rtol=0, atol=1e-3)
    assert list(device.waits.values()) == [1]


def test_a_failed_view_becomes_the_plain_crop_on_the_device_too():
    augment = build_augment([{"name": "affine"}, {"name": "brightness"}, {"name": "cutmix"}])
    x = torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    label = (x > 0.5).to(torch.uint8)
    params = augment.draw(SEEDS)
    params[1]["shift"][2] = torch.nan
    here = augment.apply_to(x, params, label=label)
    with SecondDevice() as device:
        there = augment.apply_to(device.put(x), params, label=device.put(label))
        image, target = device.take(there.image), device.take(there.label)
    assert here.notes["fallback"].tolist() == [0.0, 0.0, 1.0, 1.0]  # its partner took a box of it
    assert torch.equal(there.notes["fallback"], here.notes["fallback"])
    torch.testing.assert_close(image, here.image, rtol=0, atol=1e-4)
    assert (target != here.label).float().mean() <= 0.002


def test_a_loss_is_the_same_on_the_device_and_the_step_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 6, 6, 6, generator=generator)
    target = torch.randint(3, (2, 1, 6, 6, 6), generator=generator)
    mask = target > 1

    def losses(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        hard = _mean_hard_dice(logits.argmax(dim=1, keepdim=True), target, num_classes=3)
        return [hard, masked_mse(logits, logits + 1, mask), *dice_ce(logits, target)]

    with SecondDevice() as device:
        found = [device.take(value) for value in losses(*(device.put(value) for value in (logits, target, mask)))]
    assert not device.waits
    torch.testing.assert_close(found, losses(logits, target, mask), rtol=0, atol=1e-6)
