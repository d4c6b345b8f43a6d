from __future__ import annotations

import pytest
import torch

from medssl.augment.base import Augment, AugmentConfig, derive_seeds, mix
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame, follow
from medssl.augment.intensity import Brightness, BrightnessConfig, Noise, Rescale, Window, WindowConfig
from medssl.augment.pipeline import Pipeline
from medssl.augment.spatial import Affine, Elastic, Mirror
from medssl.errors import CaseError

SEEDS = torch.arange(100, 106)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


STRONG = [
    {"name": "affine", "p": 0.8},
    {"name": "elastic", "p": 0.3},
    {"name": "bias_field", "p": 0.3},
    {"name": "noise", "p": 0.3},
    {"name": "blur", "p": 0.3},
    {"name": "contrast", "p": 0.3},
    {"name": "low_resolution", "p": 0.3},
    {"name": "gamma", "p": 0.3},
]


def test_a_sample_that_no_augment_draws_comes_out_bit_for_bit():
    x, label = images(6, 1, 8, 8, 8), torch.ones(6, 1, 8, 8, 8, dtype=torch.int16)
    pipeline = build_augment([{**entry, "p": 0.3} for entry in STRONG])
    seeds = torch.arange(300)
    touched = torch.stack([params["on"] for params in pipeline.draw(seeds)]).any(0)
    quiet = seeds[~touched][:3]
    mixed = torch.cat([quiet, seeds[touched][:3]])
    view = pipeline(x, mixed, label)
    assert torch.equal(view.image[:3], x[:3])
    assert view.label is not None
    assert torch.equal(view.label[:3], label[:3])
    assert all(not torch.equal(a, b) for a, b in zip(view.image[3:], x[3:], strict=True))


def test_the_probability_is_that_of_each_sample():
    on = Noise(Noise.config_class(p=0.2)).draw(torch.arange(2000))["on"]
    assert on.float().mean() == pytest.approx(0.2, abs=0.03)


def test_two_augments_of_one_name_draw_independently():
    pipeline = build_augment([{"name": "brightness"}, {"name": "brightness"}])
    first, second = (params["shift"] for params in pipeline.draw(torch.arange(500)))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15


def test_a_pipeline_does_not_change_its_input():
    x = images(6, 1, 8, 8, 8)
    before = x.clone()
    build_augment(STRONG)(x, SEEDS)
    assert torch.equal(x, before)


def test_a_pipeline_works_in_float32_without_gradient_under_autocast():
    x = images(6, 1, 8, 8, 8).requires_grad_()
    pipeline = build_augment(STRONG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pipeline(x, SEEDS).image
        alone = Affine()(x, SEEDS)
    assert out.dtype == alone.dtype == torch.float32
    assert not out.requires_grad
    assert torch.equal(out, pipeline(x, SEEDS).image)
    assert torch.equal(alone, Affine()(x, SEEDS))


def test_normalise_applies_the_window_and_nothing_random():
    pipeline = Pipeline([Affine(), Window(WindowConfig(jitter_hu=20.0)), Noise()])
    hu = images(2, 1, 4, 4, 4) * 2000 - 1000
    torch.testing.assert_close(pipeline.normalise(hu), ((hu + 175) / 425).clamp(0, 1))
    assert torch.equal(build_augment(STRONG).normalise(hu), hu)
    assert pipeline.fixed == (("window", -175.0, 250.0),)
    assert Pipeline([Rescale()]).fixed == (("rescale", 0.0, 255.0),)


def test_a_float_label_is_refused():
    with pytest.raises(CaseError, match="label map holds whole numbers"):
        Pipeline([Affine()])(images(6, 1, 4, 4, 4), SEEDS, images(6, 1, 4, 4, 4))


def test_seeds_of_crops_are_a_pure_function_of_the_samples_and_all_differ():
    seeds = torch.tensor([0, 1, 2**62])
    derived = derive_seeds(seeds, 50)
    assert derived.shape == (3, 50)
    assert derived.unique().numel() == 150
    assert (derived >= 0).all()
    assert torch.equal(derived[1:, :7], derive_seeds(seeds[1:], 7))


def test_mixing_differs_in_the_low_32_bits_that_the_generator_keeps():
    low = {mix(seed << 32, salt) & 0xFFFFFFFF for seed in range(50) for salt in range(4)}
    assert len(low) == 200


class _Broken(Augment[AugmentConfig]):
    """Gives NaN, or one value, where it is drawn."""

    name = "broken"
    config_class = AugmentConfig
    value = float("nan")

    def sample(self, generator):
        return {}

    def change(self, x, params, spacing_mm):
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_view_that_is_not_finite_or_blank_is_replaced_by_the_plain_crop_and_counted(value):
    x = (images(40, 1, 12, 10, 9) * 400 - 175).to(torch.int16)
    label = (x > 0).to(torch.uint8)
    broken = _Broken(AugmentConfig(p=0.4))
    broken.value = value
    pipeline = Pipeline([Affine(), Window(), broken])
    seeds = torch.arange(40)
    on = broken.draw(seeds)["on"]
    view = pipeline(x, seeds, label)
    assert torch.equal(view.notes["fallback"], on.float())
    assert not view.notes["blank"].any()
    assert torch.equal(view.image[on], ((x[on].float() + 175) / 425).clamp(0, 1))
    assert torch.equal(view.label[on], label[on])
    assert torch.equal(view.frame.to_box[on], torch.eye(4, dtype=torch.float64).repeat(int(on.sum()), 1, 1))
    without = Pipeline([Affine(), Window()])(x, seeds, label)
    assert torch.equal(view.image[~on], without.image[~on])
    assert not torch.equal(without.image[on], view.image[on])


def test_a_crop_of_one_value_is_no_fault_of_the_augmentation():
    view = Pipeline([Affine(), Noise(Noise.config_class(sigma=(0.0, 0.0)))])(torch.ones(2, 1, 6, 6, 6), SEEDS[:2])
    assert view.notes["fallback"].tolist() == [0.0, 0.0]
    assert view.notes["blank"].tolist() == [1.0, 1.0]
    assert torch.equal(view.image, torch.ones(2, 1, 6, 6, 6))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float16, torch.float32])
def test_boxes_are_taken_as_they_are_stored(dtype):
    x = (images(4, 1, 10, 10, 10) * 200).round()
    pipeline = Pipeline([Affine(), Elastic(), Brightness(BrightnessConfig(shift=(1.0, 2.0)))])
    expected = pipeline(x, SEEDS[:4]).image
    torch.testing.assert_close(pipeline(x.to(dtype), SEEDS[:4]).image, expected, rtol=0, atol=1e-4)


def test_a_window_in_the_resampling_equals_one_after_it():
    x = (images(4, 1, 14, 12, 10) * 2000 - 1000).to(torch.int16)
    affine, window = Affine(), Window(WindowConfig(jitter_hu=30.0))
    together = Pipeline([affine, window])(x, SEEDS[:4]).image
    apart = window(Pipeline([affine])(x, SEEDS[:4]).image, SEEDS[:4])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_a_frame_takes_the_crop_from_its_box_and_follows_the_affine():
    x = images(2, 1, 12, 10, 8)
    to_box = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    to_box[:, :3, 3] = torch.tensor([[2.0, 1.0, 0.0], [4.0, 3.0, 2.0]])
    tensors = {
        "image": x,
        "image_to_box": to_box,
        "image_spacing_mm": torch.tensor([[1.0, 1.0, 2.0]] * 2, dtype=torch.float64),
    }
    frame = Frame.of(tensors, "image", shape=(6, 6, 6))
    view = Pipeline([])(x, SEEDS[:2], frame=frame)
    assert torch.equal(view.image[0], x[0, :, 2:8, 1:7, 0:6])
    assert torch.equal(view.image[1], x[1, :, 4:10, 3:9, 2:8])
    assert torch.equal(Pipeline([Affine()]).normalise(x, frame=frame), view.image)
    affine = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    assert torch.equal(follow(affine, frame, view.frame), affine)
    mirrored = Pipeline([Mirror()])(x, SEEDS[:2], frame=frame)
    assert torch.equal(mirrored.image, view.image.flip(2))
    assert follow(affine, frame, mirrored.frame)[0, :3, 3].tolist() == [5.0, 0.0, 0.0]
    assert Frame.of({"image": x}, "image", shape=(6, 6, 6)) is None


def test_frames_of_several_crops_a_sample_and_of_pictures_lose_what_they_do_not_need():
    boxes = torch.zeros(2, 3, 1, 8, 8)
    to_box = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    spacing = torch.ones(2, 3, 3, dtype=torch.float64)
    tensors = {
        "views": boxes,
        "views_to_box": to_box,
        "views_spacing_mm": spacing,
        "views_extent": torch.tensor([[8, 8, 1], [7, 6, 1]]),
    }
    frame = Frame.of(tensors, "views", shape=(4, 4, 1))
    assert frame.to_box.shape == (6, 3, 3)
    assert frame.spacing_mm.shape == (6, 2)
    assert frame.extent.tolist() == [[8, 8]] * 3 + [[7, 6]] * 3
    assert frame.shape == (4, 4)
