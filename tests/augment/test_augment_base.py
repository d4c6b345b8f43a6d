from __future__ import annotations

import pytest
import torch

from medssl.augment.base import Pipeline, augment_classes, build_augment, derive_seeds, mix
from medssl.augment.intensity import Brightness, BrightnessConfig, Noise, Window
from medssl.augment.presets import PRESETS
from medssl.augment.spatial import Affine, AffineConfig
from medssl.errors import CaseError, ConfigError

SEEDS = torch.arange(100, 106)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6, 1, 10, 12, 8), (6, 2, 10, 12)])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_in_2d_and_3d_and_keeps_shapes_and_types(name, shape):
    x = images(*shape)
    label = (x[:, :1] > 0.5).to(torch.uint8) * 3
    out, moved = build_augment({"preset": name})(x, SEEDS, label)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert moved is not None
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) <= {0, 3}
    assert torch.equal(out, build_augment({"preset": name})(x, SEEDS)[0])


def test_no_preset_mirrors():
    assert all(entry["name"] != "mirror" for entries in PRESETS.values() for entry in entries)


def test_a_sample_that_no_augment_draws_comes_out_bit_for_bit():
    x, label = images(6, 1, 8, 8, 8), torch.ones(6, 1, 8, 8, 8, dtype=torch.int16)
    configs = [{"name": name, "p": 0.3} for name in sorted(augment_classes()) if name != "window"]
    pipeline = build_augment(configs)
    seeds = torch.arange(300)
    touched = torch.stack([params["on"] for params in pipeline.draw(seeds)]).any(0)
    quiet = seeds[~touched][:3]
    mixed = torch.cat([quiet, seeds[touched][:3]])
    out, moved = pipeline(x, mixed, label)
    assert torch.equal(out[:3], x[:3])
    assert moved is not None
    assert torch.equal(moved[:3], label[:3])
    assert all(not torch.equal(a, b) for a, b in zip(out[3:], x[3:], strict=True))


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
    build_augment({"preset": "mr_strong"})(x, SEEDS)
    assert torch.equal(x, before)


def test_a_pipeline_works_in_float32_without_gradient_under_autocast():
    x = images(6, 1, 8, 8, 8).requires_grad_()
    pipeline = build_augment({"preset": "mr_strong"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = pipeline(x, SEEDS)
        alone = Affine()(x, SEEDS)
    assert out.dtype == alone.dtype == torch.float32
    assert not out.requires_grad
    assert torch.equal(out, pipeline(x, SEEDS)[0])
    assert torch.equal(alone, Affine()(x, SEEDS))


def test_normalise_applies_the_window_and_nothing_random():
    pipeline = build_augment({"preset": "ct_light"})
    hu = images(2, 1, 4, 4, 4) * 2000 - 1000
    torch.testing.assert_close(pipeline.normalise(hu), ((hu + 175) / 425).clamp(0, 1))
    assert build_augment({"preset": "mr_light"}).normalise(hu) is hu


def test_a_float_label_is_refused():
    with pytest.raises(CaseError, match="label map holds whole numbers"):
        Pipeline([Affine()])(images(6, 1, 4, 4, 4), SEEDS, images(6, 1, 4, 4, 4))


def test_a_position_task_refuses_a_mirror_and_takes_the_intensity_part_of_a_preset():
    with pytest.raises(ConfigError, match="mirror in a task that learns positions") as caught:
        build_augment([{"name": "mirror"}], position_task=True)
    assert caught.value.code == "E_MIRROR"
    with pytest.raises(ConfigError, match="affine in a task that learns positions") as moved:
        build_augment([{"name": "noise"}, {"name": "affine"}], position_task=True)
    assert moved.value.code == "E_POSITION_AUGMENT"
    assert len(build_augment({"preset": "mr_light"}).spatial) == 1
    reduced = build_augment({"preset": "mr_light"}, position_task=True)
    assert len(reduced.spatial) == 0
    assert [augment.name for augment in reduced.intensity] == ["noise", "blur", "brightness", "contrast", "gamma"]


def test_the_spacing_reaches_the_augments_that_name_none():
    entries = [{"name": "affine"}, {"name": "blur", "spacing_mm": [2.0, 2.0, 2.0]}, {"name": "noise"}]
    pipeline = build_augment(entries, spacing_mm=(1.0, 1.0, 3.0))
    assert pipeline.spatial[0].config.spacing_mm == (1.0, 1.0, 3.0)
    assert pipeline.intensity[0].config.spacing_mm == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("configs", "reason"),
    [
        ([{"name": "nois"}], "augment 0: there is no 'nois'; did you mean noise"),
        ([{"sigma": [0.0, 1.0]}], "there is no None; known are affine"),
        ([{"name": "noise", "sgima": [0.0, 1.0]}], "augment 0 noise: unknown key sgima. Did you mean sigma"),
        ({"preset": "mr_ligth"}, "preset 'mr_ligth' is unknown; known are none"),
        ({"presets": "mr_light"}, "give a list of augments or the one key preset"),
        ([{"name": "noise"}, {"name": "window"}], "window comes after noise"),
        ([{"name": "affine", "fill": 0.0}, {"name": "affine", "fill": 1.0}], "there is one resampling"),
    ],
)
def test_a_wrong_list_is_refused_with_the_reason(configs, reason):
    with pytest.raises(ConfigError, match=reason):
        build_augment(configs)


def test_a_window_may_follow_a_spatial_augment_and_the_fill_reaches_the_resampling():
    pipeline = Pipeline([Affine(AffineConfig(fill=-1024.0)), Window(), Brightness(BrightnessConfig())])
    assert pipeline.fill == -1024.0


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
