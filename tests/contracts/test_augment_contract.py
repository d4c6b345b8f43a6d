"""What every augment must hold; a new one is tested as soon as its file is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medssl.augment.base import Augment, Mixing
from medssl.augment.build import augment_classes
from medssl.augment.images import ONLY_HU
from medssl.augment.pipeline import Pipeline

CLASSES = augment_classes()

# options that leave an image in [0, 1] as it is
ZERO_STRENGTH: dict[str, dict[str, Any]] = {
    "acoustic_shadow": {"strength": [0.0, 0.0]},
    "affine": {"rotation_deg": [0.0, 0.0, 0.0], "scale": [1.0, 1.0]},
    "batch_styles": {"p": 0.0},
    "bias_field": {"coefficient": 0.0},
    "blocks": {"share": [0.0, 0.0]},
    "blur": {"sigma_mm": [0.0, 0.0]},
    "brightness": {"shift": [0.0, 0.0]},
    "collimation": {"share": [0.0, 0.0]},
    "colour_jitter": {"brightness": [1.0, 1.0], "contrast": [1.0, 1.0], "saturation": [1.0, 1.0], "hue": [0.0, 0.0]},
    "contrast": {"factor": [1.0, 1.0]},
    "cutmix": {"share": [0.0, 0.0]},
    "cutout": {"edge": [0.0, 0.0]},
    "depth_attenuation": {"rate": [0.0, 0.0]},
    "elastic": {"amplitude_mm": [0.0, 0.0]},
    "exposure": {"stops": [0.0, 0.0]},
    "fourier_mix": {"weight": [0.0, 0.0]},
    "gamma": {"gamma": [1.0, 1.0]},
    "ghosting": {"intensity": [0.0, 0.0]},
    "greyscale": {"p": 0.0},
    "grid_lines": {"amplitude": [0.0, 0.0]},
    "histogram_warp": {"strength": 0.0},
    "hu_noise": {"dose": [1.0, 1.0]},
    "hu_scale": {"percent": [0.0, 0.0]},
    "hu_shift": {"shift_hu": [0.0, 0.0]},
    "illumination": {"amount": 0.0, "vignette": [0.0, 0.0]},
    "in_painting": {"edge": [0.0, 0.0]},
    "invert": {"p": 0.0},
    "kernel_sharpness": {"amount": [0.0, 0.0]},
    "local_shuffle": {"share": [0.0, 0.0]},
    "low_resolution": {"zoom": [1.0, 1.0]},
    "mirror": {"p": 0.0},
    "mixup": {"p": 0.0},
    "motion": {"rotation_deg": [0.0, 0.0, 0.0], "translation_mm": [0.0, 0.0, 0.0]},
    "multi_window": {"windows": [[0.0, 1.0]]},
    "noise": {"sigma": [0.0, 0.0]},
    "nonlinear": {"strength": 0.0},
    "out_painting": {"edge": [1.0, 1.0]},
    "rescale": {"low": 0.0, "high": 1.0},
    "rician_noise": {"sigma": [0.0, 0.0]},
    "ringing": {"cut": [0.0, 0.0]},
    "scatter": {"fraction": [0.0, 0.0]},
    "speckle": {"amount": [0.0, 0.0]},
    "spikes": {"intensity": [0.0, 0.0]},
    "stain_jitter": {"scale": [1.0, 1.0], "shift": [0.0, 0.0]},
    "streaks": {"amplitude_hu": [0.0, 0.0]},
    "thick_slices": {"thickness_mm": [0.5, 1.0]},
    "time_gain": {"factor": [1.0, 1.0]},
    "tubes": {"share": [0.0, 0.0]},
    "window": {"low_hu": 0.0, "high_hu": 1.0},
}
# what is applied to every sample or to none
RULES = {"multi_window", "rescale", "window"}
# what changes the number of channels, which no zero strength undoes
CHANGES_CHANNELS = {"multi_window"}
# options without which a draw has nothing to vary
VARIED: dict[str, dict[str, Any]] = {"window": {"jitter_hu": 5.0}, "multi_window": {"jitter_hu": 5.0}}
# with these defaults nothing of a draw is random but whether it happens
ONLY_WHETHER = {"greyscale", "invert", "mirror", "rescale"}
# what covers or reverses part of an image on purpose, where a sum of values says nothing of sides
MAY_HIDE = {"blocks", "cutout", "in_painting", "invert", "out_painting", "tubes"}
SEEDS = torch.tensor([3, 1_000_003, 2**61, 5])
SHAPES = [(11, 8, 6), (11, 8), (7, 5, 1)]


def images(name: str, batch: int = 4, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    cls = CLASSES[name]
    channels = 3 if cls.colour else 1 if name in CHANGES_CHANNELS else 2
    size = shape or (SHAPES[0] if 3 in cls.spatial_dims else SHAPES[1])
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def make(name: str, **options: Any) -> Augment[Any]:
    cls = CLASSES[name]
    return cls(cls.config_class.parse(options))


@pytest.fixture(params=sorted(CLASSES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_strength_is_the_identity(name, shape):
    if len(shape) not in CLASSES[name].spatial_dims or name in CHANGES_CHANNELS:
        return
    x = images(name, shape=shape)
    torch.testing.assert_close(make(name, **ZERO_STRENGTH[name])(x, SEEDS), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_finite_images_stay_finite_flat_ones_too_and_keep_their_shape(name, shape):
    if len(shape) not in CLASSES[name].spatial_dims:
        return
    for x in (images(name, shape=shape), torch.full_like(images(name, shape=shape), 0.25)):
        out = make(name)(x, SEEDS)
        assert torch.isfinite(out).all()
        assert out.dtype == torch.float32
        assert out.shape[2:] == x.shape[2:]
        assert out.shape[1] == make(name).channels_out(x.shape[1])


def test_a_draw_is_made_on_the_cpu_with_one_row_a_sample(name):
    params = make(name).draw(SEEDS)
    assert params["on"].dtype == torch.bool
    for value in params.values():
        assert value.device.type == "cpu"
        assert len(value) == len(SEEDS)


def test_a_draw_depends_on_the_seed_alone_and_not_on_neighbours_order_or_global_state(name):
    augment = make(name, **({} if name in RULES else {"p": 0.5}))
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
    params = make(name, **VARIED.get(name, {})).draw(torch.arange(64))
    assert any(value.unique(dim=0).shape[0] > 1 for value in params.values()) or name in ONLY_WHETHER


def test_a_view_depends_on_its_own_seed_and_image_or_those_of_its_group(name):
    augment, x = make(name), images(name)
    whole = augment(x, SEEDS)
    size = augment.config.group if isinstance(augment, Mixing) else 1
    for place in range(0, len(SEEDS), size):
        rows = slice(place, place + size)
        alone = augment(x[rows], SEEDS[rows])
        torch.testing.assert_close(alone, whole[rows], rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - RULES))
def test_an_undrawn_sample_is_untouched_and_the_input_is_never_changed(name):
    augment, x = make(name, p=0.5), images(name, 40)
    before, seeds = x.clone(), torch.arange(40)
    params = augment.draw(seeds)
    out = augment.apply(x, params)
    assert 0 < params["on"].sum() < 40
    assert torch.equal(out[~params["on"]], x[~params["on"]])
    assert torch.equal(x, before)
    augment(x, seeds)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_label_stays_a_label(name, dtype):
    augment = make(name)
    label = (images(name)[:, :1] * 4).to(dtype) * 50
    moved = augment.apply_label(label, augment.draw(SEEDS))
    assert moved.dtype == dtype
    assert moved.shape == label.shape
    assert set(moved.unique().tolist()) <= set(label.unique().tolist())


@pytest.mark.parametrize("name", sorted(name for name, cls in CLASSES.items() if not issubclass(cls, Mixing)))
def test_left_stays_left_unless_a_mirror_is_asked_for(name):
    shape = (16, 16, 16) if 3 in CLASSES[name].spatial_dims else (16, 16)
    x = torch.zeros_like(images(name, shape=shape))
    x[:, :, 2:6, 5:11] = 1.0  # low X: the patient's left in RAS+ arrays
    label = x[:, :1].to(torch.uint8)
    if CLASSES[name].takes == ONLY_HU:
        x = x * 3000 - 1000
    view = Pipeline([make(name)])(x, SEEDS, label)
    image = view.image - view.image.flatten(1).amin(dim=1).view(-1, *[1] * (x.ndim - 1))
    is_mirror = name == "mirror"
    for index, sample in enumerate((*image[:, 0], *view.label[:, 0].float())):
        left, right = sample[:8].sum(), sample[8:].sum()
        if name in MAY_HIDE and index < len(SEEDS):
            continue
        assert (right > left) if is_mirror else (left > right)


def test_every_augment_has_a_zero_strength_here():
    assert set(ZERO_STRENGTH) | CHANGES_CHANNELS == set(CLASSES) | CHANGES_CHANNELS
    assert all(cls.__doc__ for cls in CLASSES.values())


@pytest.mark.gpu
def test_a_view_is_the_same_on_the_gpu(name):
    augment, x = make(name), images(name)
    on_gpu, on_cpu = augment(x.cuda(), SEEDS).cpu(), augment(x, SEEDS)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-4)
