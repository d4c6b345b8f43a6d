from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from medssl.augment.build import augment_classes, build_augment
from medssl.augment.images import Images
from medssl.augment.presets import preset
from medssl.errors import ConfigError

CT = Images(domain="HU", modality="CT", region="abdomen")
MR = Images(domain="zscore", modality="MR", region="brain")
US = Images(domain="zscore", modality="US", spatial_dims=2)
SECTION = Images(domain="raw", modality="other", region="tissue", spatial_dims=2, channels=3)
WINDOW = {"name": "window", "low_hu": -175.0, "high_hu": 250.0}


def names(configs: Any, **options: Any) -> list[str]:
    pipeline = build_augment(configs, **options)
    return [augment.name for augment in (*pipeline.spatial, *pipeline.intensity)]


def refusal(configs: Any, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_augment(configs, **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_preset_may_be_listed_between_augments_and_in_several():
    assert names([{"preset": "none"}, {"name": "noise"}]) == ["noise"]
    assert names({"preset": ["none", "mr_light"]}) == names({"preset": "mr_light"})
    assert names([{"name": "gamma"}, {"preset": "mr_light"}])[:2] == ["affine", "gamma"]


def test_augments_of_a_preset_can_be_left_out_by_name():
    whole = names({"preset": "mr_light"})
    assert names({"preset": "mr_light", "without": ["noise", "gamma"]}) == [
        name for name in whole if name not in {"noise", "gamma"}
    ]
    assert names({"preset": "mr_light", "without": "noise"}) == [name for name in whole if name != "noise"]


def test_building_leaves_a_preset_as_it_is():
    before = preset("ct_light").to_dict()
    build_augment({"preset": "ct_light"}, images=CT, position_task=True)
    assert preset("ct_light").to_dict() == before


def test_the_voxel_size_of_the_images_is_that_of_crops_without_their_own():
    assert build_augment([], images=replace(MR, spacing_mm=(1.0, 1.0, 3.0))).spacing_mm == (1.0, 1.0, 3.0)
    assert build_augment([]).spacing_mm == (1.0, 1.0, 1.0)


def test_two_augments_of_one_name_draw_independently():
    first, second = build_augment([{"name": "brightness"}, {"name": "brightness"}]).draw(torch.arange(500))
    assert abs(torch.corrcoef(torch.stack([first["shift"], second["shift"]]))[0, 1]) < 0.15


def test_every_class_is_found_under_its_name():
    found = augment_classes()
    assert {"affine", "noise", "window", "mirror"} <= found.keys()
    assert all(cls.name == name for name, cls in found.items())


@pytest.mark.parametrize(
    ("configs", "code", "reason"),
    [
        ([{"name": "nois"}], "E_UNKNOWN_NAME", "augment 0: there is no 'nois'; did you mean noise"),
        ([{"name": "3"}], "E_UNKNOWN_NAME", "known are acoustic_shadow, affine"),
        ([{"sigma": [0.0, 1.0]}], "E_CONFIG", "augment 0: keys sigma; either name"),
        ([{}], "E_CONFIG", "augment 0: keys none; either name"),
        ([{"name": "noise", "preset": "none"}], "E_CONFIG", "either name with the options of an augment, or preset"),
        ([{"name": "noise", "sgima": [0.0, 1.0]}], "E_CONFIG", "augment 0 noise: unknown key sgima. Did you mean sig"),
        ({"preset": "mr_ligth"}, "E_UNKNOWN_NAME", "no preset 'mr_ligth'; did you mean mr_light"),
        ({"presets": "mr_light"}, "E_CONFIG", "keys presets; either name"),
        ({"preset": "mr_light", "p": 1}, "E_CONFIG", "unknown key p; beside preset there may be without"),
        ({"preset": "mr_light", "without": ["nois"]}, "E_UNKNOWN_NAME", "without nois, which is not in mr_light"),
        ({"preset": "none", "without": ["noise"]}, "E_UNKNOWN_NAME", "not in none; there are none"),
        ({"preset": ["us", "us"]}, "E_PRESET_CONFLICT", "preset us: listed twice"),
        ({"preset": ["mr_light", "mr_strong"]}, "E_PRESET_CONFLICT", "each has affine, blur, brightness, contrast"),
        ({"preset": ["ct_chest", "mr_brain"]}, "E_PRESET_CONFLICT", "one is for CT, the other for MR"),
        ({"preset": ["ct_chest", "mr_light"]}, "E_PRESET_CONFLICT", "are signed HU, the other z-scores"),
        ({"preset": ["ct_chest", "ct_abdomen"]}, "E_PRESET_CONFLICT", "for the chest and the abdomen"),
        ({"preset": ["ct_chest", "ct_light"]}, "E_PRESET_CONFLICT", "each has affine, gamma, window"),
        ([{"name": "gamma"}, WINDOW], "E_UNIT", "augment window: needs values that are signed HU; at its place"),
        ([WINDOW, WINDOW], "E_UNIT", "at its place they are in [0, 1]. Take it out"),
        ([WINDOW, {"name": "hu_noise"}], "E_UNIT", "augment hu_noise: needs values that are signed HU"),
        ([{"name": "hu_noise"}, {"name": "gamma"}], "E_DOMAIN", "augment gamma: needs"),
        ([{"name": "affine", "fill": 0.0}, {"name": "affine", "fill": 1.0}], "E_CONFIG", "there is one resampling"),
    ],
)
def test_what_is_wrong_by_itself_is_refused_without_images(configs, code, reason):
    error = refusal(configs)
    assert error.code == code
    assert reason in error.message


def test_two_presets_go_together_once_their_common_augments_are_left_out_of_one():
    both = [{"preset": "mr_light"}, {"preset": "mr_brain", "without": ["affine", "blur", "contrast", "gamma"]}]
    assert names(both, images=MR).count("affine") == 1


@pytest.mark.parametrize(
    ("configs", "images", "code", "reason"),
    [
        # units
        ([], CT, "E_UNIT", "raw HU, from -1024 up to thousands; a window to [0, 1] is needed"),
        ([{"name": "hu_noise"}], CT, "E_UNIT", "a window to [0, 1] is needed"),
        ([WINDOW], MR, "E_UNIT", "augment window: needs values that are signed HU; at its place they are z-scores"),
        ([{"name": "multi_window"}], MR, "E_UNIT", "augment multi_window: needs values that are signed HU"),
        ({"preset": "ct_light"}, replace(CT, domain="zscore"), "E_UNIT", "preset ct_light: for values that are signed"),
        ({"preset": "mr_light"}, CT, "E_UNIT", "for values that are z-scores, and these are signed HU"),
        # what makes no sense for such values
        ([{"name": "gamma"}], CT, "E_DOMAIN", "at its place they are signed HU. Put it behind a window"),
        ([{"name": "rescale"}], CT, "E_DOMAIN", "augment rescale: needs"),
        ([{"name": "stain_jitter"}], SECTION, "E_DOMAIN", "in [0, 1]; at its place they are what the files held. Move"),
        ({"preset": "mr_light"}, replace(MR, domain="raw"), "E_DOMAIN", "these are what the files held. Take another"),
        # modality
        ({"preset": "mr_brain"}, US, "E_MODALITY", "preset mr_brain: for MR, and the images are US"),
        ({"preset": "us"}, replace(US, modality="other"), "E_MODALITY", "modality of the images is not known. Set"),
        (
            [{"name": "bias_field"}],
            replace(MR, modality="other"),
            "E_MODALITY",
            "augment bias_field: for MR, and the m",
        ),
        ([WINDOW, {"name": "bias_field"}], CT, "E_MODALITY", "augment bias_field: for MR, and the images are CT"),
        ([{"name": "speckle"}], MR, "E_MODALITY", "augment speckle: for US, and the images are MR"),
        ([WINDOW, {"name": "invert"}], replace(CT, modality="other"), "E_MODALITY", "invert: on CT, where dense is br"),
        # region
        ({"preset": "ct_chest"}, CT, "E_REGION", "preset ct_chest: for the chest, and the images show the abdomen"),
        # anatomy
        (
            [WINDOW, {"name": "mirror"}],
            CT,
            "E_MIRROR",
            "along LR on images of the abdomen. The liver lies on the right",
        ),
        ([{"name": "mirror", "axes": ["SI"]}], MR, "E_MIRROR", "along SI on images of the brain. Images are made and"),
        ([{"name": "mirror", "axes": ["LR", "AP"]}], MR, "E_MIRROR", "along AP on images of the brain"),
        ([{"name": "mirror"}], replace(MR, region=None), "E_MIRROR", "nobody said which part of the body"),
        # dimensions and channels
        ([{"name": "thick_slices"}], US, "E_SPATIAL_DIMS", "works in 3 dimensions, and the images have 2"),
        ({"preset": "us"}, replace(US, spatial_dims=3), "E_SPATIAL_DIMS", "preset us: for images of 2 dimensions"),
        ([{"name": "mirror", "axes": ["SI"]}], SECTION, "E_SPATIAL_DIMS", "along SI in images of one slice"),
        (
            {"preset": "histology"},
            replace(SECTION, channels=1),
            "E_CHANNELS",
            "have 1 channel. Leave it out with {preset: histology, without: [stain_jitter]}.",
        ),
        (
            [{"name": "rescale"}, {"name": "greyscale"}],
            replace(SECTION, channels=1),
            "E_CHANNELS",
            "1 channel. Take it",
        ),
        ([{"name": "rescale"}, {"name": "greyscale"}], replace(SECTION, channels=4), "E_CHANNELS", "have 4 channels"),
    ],
)
def test_what_does_not_suit_the_images_is_refused_and_nothing_is_compared_without_them(configs, images, code, reason):
    error = refusal(configs, images=images)
    assert error.code == code
    assert reason in error.message
    build_augment(configs)


@pytest.mark.parametrize(
    ("configs", "images"),
    [
        ([{"name": "hu_noise"}, WINDOW, {"name": "gamma"}], CT),
        ([{"name": "multi_window"}], CT),
        ({"preset": "ct_light"}, replace(CT, modality="other")),
        ({"preset": "ct_abdomen"}, replace(CT, region="whole_body")),
        ({"preset": "ct_head"}, replace(CT, region="head_neck")),
        ({"preset": "ct_chest"}, replace(CT, region=None)),
        ({"preset": "mr_light"}, US),
        ([{"name": "mirror"}], MR),
        ([{"name": "mirror", "axes": ["LR", "AP"]}], SECTION),
        ({"preset": "histology"}, replace(SECTION, region=None)),
        ({"preset": "oct"}, Images(spatial_dims=2, region="eye")),
    ],
)
def test_what_suits_is_built(configs, images):
    build_augment(configs, images=images)


def test_for_images_of_one_slice_a_preset_leaves_out_what_needs_volumes():
    flat, deep = (names({"preset": "ct_chest"}, images=replace(CT, region="chest", spatial_dims=n)) for n in (2, 3))
    assert [name for name in deep if name != "thick_slices"] == flat
    assert flat != deep


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("mirror", "E_MIRROR", "a mirrored left side is no right side"),
        ("affine", "E_POSITION_AUGMENT", "a moved crop is not where its label says"),
        ("elastic", "E_POSITION_AUGMENT", "a moved crop is not where its label says"),
        ("cutmix", "E_POSITION_AUGMENT", "a mixed crop shows two places"),
        ("mixup", "E_POSITION_AUGMENT", "a mixed crop shows two places"),
    ],
)
def test_a_task_that_learns_positions_refuses_what_moves_content(name, code, reason):
    error = refusal([{"name": "noise"}, {"name": name}], position_task=True)
    assert error.code == code
    assert reason in error.message


def test_a_task_that_learns_positions_takes_styles_of_others_and_the_rest_of_a_preset():
    assert names([{"name": "batch_styles"}, {"name": "fourier_mix"}], position_task=True)
    reduced = names({"preset": "mr_light"}, position_task=True)
    assert reduced == ["noise", "blur", "brightness", "contrast", "gamma"]
