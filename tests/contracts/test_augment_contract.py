"""What every augment must hold; a new one is tested as soon as its file is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medssl.augment.base import Augment, Pipeline, augment_classes

CLASSES = augment_classes()

# options that leave an image in [0, 1] as it is
ZERO_STRENGTH: dict[str, dict[str, Any]] = {
    "affine": {"rotation_deg": [0.0, 0.0, 0.0], "scale": [1.0, 1.0], "spacing_mm": [1.0, 1.3, 2.7]},
    "bias_field": {"coefficient": 0.0},
    "blur": {"sigma_mm": [0.0, 0.0]},
    "brightness": {"shift": [0.0, 0.0]},
    "contrast": {"factor": [1.0, 1.0]},
    "gamma": {"gamma": [1.0, 1.0]},
    "low_resolution": {"zoom": [1.0, 1.0]},
    "mirror": {"p": 0.0},
    "noise": {"sigma": [0.0, 0.0]},
    "window": {"low_hu": 0.0, "high_hu": 1.0},
}
SEEDS = torch.tensor([3, 1_000_003, 2**61, 5])


def images(batch: int = 4, shape: tuple[int, ...] = (11, 8, 6)) -> torch.Tensor:
    return torch.rand(batch, 2, *shape, generator=torch.Generator().manual_seed(0))


def make(name: str, **options: Any) -> Augment[Any]:
    cls = CLASSES[name]
    return cls(cls.config_class.parse(options))


@pytest.fixture(params=sorted(CLASSES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("shape", [(11, 8, 6), (11, 8), (7, 5, 1)])
def test_zero_strength_is_the_identity(name, shape):
    x = images(shape=shape)
    torch.testing.assert_close(make(name, **ZERO_STRENGTH[name])(x, SEEDS), x, rtol=0, atol=1e-6)


def test_a_draw_is_made_on_the_cpu_with_one_row_a_sample(name):
    params = make(name).draw(SEEDS)
    assert params["on"].dtype == torch.bool
    for value in params.values():
        assert value.device.type == "cpu"
        assert len(value) == len(SEEDS)


def test_a_draw_depends_on_the_seed_alone_and_not_on_neighbours_order_or_global_state(name):
    augment = make(name, **({} if name == "window" else {"p": 0.5}))
    whole = augment.draw(SEEDS)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for place in range(len(SEEDS)):
        alone = augment.draw(SEEDS[place : place + 1])
        assert all(torch.equal(alone[key][0], whole[key][place]) for key in whole)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = augment.draw(SEEDS[order])
    assert all(torch.equal(shuffled[key], whole[key][order]) for key in whole)
    assert torch.equal(state, torch.get_rng_state())


def test_different_seeds_give_different_draws(name):
    params = make(name, **({"jitter_hu": 5.0} if name == "window" else {})).draw(torch.arange(64))
    assert any(value.unique(dim=0).shape[0] > 1 for value in params.values()) or name == "mirror"


def test_a_view_does_not_depend_on_its_neighbours(name):
    augment, x = make(name), images()
    whole = augment(x, SEEDS)
    for place in range(len(SEEDS)):
        alone = augment(x[place : place + 1], SEEDS[place : place + 1])
        torch.testing.assert_close(alone[0], whole[place], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"window"}))  # a window is for every sample or for none
def test_an_undrawn_sample_is_untouched_and_the_input_is_never_changed(name):
    augment, x = make(name, p=0.5), images(40)
    before, seeds = x.clone(), torch.arange(40)
    params = augment.draw(seeds)
    out = augment.apply(x, params)
    assert 0 < params["on"].sum() < 40
    assert torch.equal(out[~params["on"]], x[~params["on"]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_label_stays_a_label(name, dtype):
    augment = make(name)
    label = (images()[:, :1] * 4).to(dtype) * 50
    moved = augment.apply_label(label, augment.draw(SEEDS))
    assert moved.dtype == dtype
    assert moved.shape == label.shape
    assert set(moved.unique().tolist()) <= set(label.unique().tolist())


def test_left_stays_left_unless_a_mirror_is_asked_for(name):
    x = torch.zeros(4, 1, 16, 16, 16)
    x[:, :, 2:6, 5:11, 5:11] = 1.0  # low X: the patient's left in RAS+ arrays
    label = x.to(torch.uint8)
    out, moved = Pipeline([make(name)])(x, SEEDS, label)
    out = out - out.amin(dim=(1, 2, 3, 4), keepdim=True)
    is_mirror = name == "mirror"
    for sample in (*out[:, 0], *moved[:, 0].float()):
        left, right = sample[:8].sum(), sample[8:].sum()
        assert (right > left) if is_mirror else (left > right)


def test_every_augment_has_a_zero_strength_here():
    assert set(ZERO_STRENGTH) == set(CLASSES)
    assert all(cls.__doc__ for cls in CLASSES.values())


@pytest.mark.gpu
def test_a_view_is_the_same_on_the_gpu(name):
    augment, x = make(name), images()
    torch.testing.assert_close(augment(x.cuda(), SEEDS).cpu(), augment(x, SEEDS), rtol=0, atol=1e-4)
