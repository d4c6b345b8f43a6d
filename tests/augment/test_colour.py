from __future__ import annotations

import colorsys
import csv
import math

import numpy as np
import pytest
import torch
from phantoms import REAL_DATA
from PIL import Image, ImageEnhance

from medssl.augment.colour import (
    ColourJitter,
    ColourJitterConfig,
    Greyscale,
    GreyscaleConfig,
    Illumination,
    IlluminationConfig,
    StainJitter,
    StainJitterConfig,
)
from medssl.errors import ConfigError

SEEDS = torch.tensor([31, 32])
STILL = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
NUCLEI = REAL_DATA / "dsb2018_nuclei"


def pictures(batch: int = 2, *shape: int) -> torch.Tensor:
    """Whole grey levels of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, *(shape or (12, 9))), generator=generator) / 255


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(2, 1, 0).numpy())


def from_pillow(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 1, 0) / 255


@pytest.mark.parametrize(
    ("option", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.5])
def test_each_factor_equals_pillows_enhancement_but_for_its_rounding(option, enhance, factor):
    x = pictures()
    found = ColourJitter(ColourJitterConfig(**{**STILL, option: (factor, factor)}))(x, SEEDS)
    for image, out in zip(x, found, strict=True):
        expected = from_pillow(enhance(as_pillow(image)).enhance(factor))
        torch.testing.assert_close(out, expected, rtol=0, atol=2.01 / 255)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.07, 0.5])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2)])
def test_the_hue_turns_as_in_colorsys(turn, shape):
    x = pictures(2, *shape)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 0.5  # black and grey have no hue
    found = ColourJitter(ColourJitterConfig(**{**STILL, "hue": (turn, turn)}))(x, SEEDS)
    voxels, got = x.movedim(1, -1).reshape(-1, 3), found.movedim(1, -1).reshape(-1, 3)
    for voxel, out in zip(voxels.tolist(), got.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*voxel)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(out, expected, atol=3e-6)


def test_the_four_changes_follow_one_another_and_each_is_clipped():
    x = pictures(1, 5, 4)
    jitter = ColourJitter(
        ColourJitterConfig(brightness=(1.4, 1.4), contrast=(1.5, 1.5), saturation=(0.5, 0.5), hue=(0.1, 0.1))
    )
    pixels = [[min(1.0, 1.4 * value) for value in pixel] for pixel in x[0].flatten(1).T.tolist()]
    mean = sum(0.2989 * r + 0.587 * g + 0.114 * b for r, g, b in pixels) / len(pixels)
    found = jitter(x, SEEDS[:1])[0].flatten(1).T
    for pixel, out in zip(pixels, found.tolist(), strict=True):
        stretched = [min(1.0, max(0.0, mean + 1.5 * (value - mean))) for value in pixel]
        grey = 0.2989 * stretched[0] + 0.587 * stretched[1] + 0.114 * stretched[2]
        hue, saturation, value = colorsys.rgb_to_hsv(*[(grey + value) / 2 for value in stretched])
        np.testing.assert_allclose(out, colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value), atol=1e-5)


def test_nothing_leaves_zero_to_one():
    x = pictures(40)
    for augment in (
        ColourJitter(ColourJitterConfig(brightness=(0, 3), contrast=(0, 3), saturation=(0, 3), hue=(-0.5, 0.5))),
        StainJitter(StainJitterConfig(scale=(0.3, 3), shift=(-1, 1))),
        Illumination(IlluminationConfig(amount=2.0, vignette=(0, 1))),
        Greyscale(GreyscaleConfig(p=1.0)),
    ):
        found = augment(x, torch.arange(40))
        assert found.min() >= 0
        assert found.max() <= 1


def stained(pixel: list[float], scale: list[float], shift: list[float]) -> list[float]:
    """Ruifrok and Johnston's deconvolution with the change of Tellez et al., for one pixel."""
    basis = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    unmix = np.linalg.inv(basis)
    density = [-math.log(value) for value in pixel]
    amounts = [sum(density[c] * unmix[c, stain] for c in range(3)) for stain in range(3)]
    changed = [scale[stain] * amounts[stain] + shift[stain] for stain in range(3)]
    return [min(1.0, math.exp(-sum(changed[stain] * basis[stain, c] for stain in range(3)))) for c in range(3)]


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2)])
def test_a_stain_jitter_is_a_change_of_amounts_after_deconvolution(shape):
    x = pictures(2, *shape).clamp_min(1 / 255)
    jitter = StainJitter(StainJitterConfig(scale=(0.7, 1.3), shift=(-0.2, 0.2)))
    params = jitter.draw(SEEDS)
    found = jitter.apply(x, params)
    for image, out, scale, shift in zip(x, found, params["scale"].tolist(), params["shift"].tolist(), strict=True):
        for pixel, got in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
            np.testing.assert_allclose(got, stained(pixel, scale, shift), atol=1e-5)


def test_a_scale_leaves_unstained_glass_white_and_moves_a_pure_stain_along_its_own_line():
    pure = torch.exp(-0.8 * torch.tensor([0.65, 0.70, 0.29])).reshape(1, 3, 1, 1)
    x = torch.cat([torch.ones(1, 3, 1, 1), pure, torch.zeros(1, 3, 1, 1)], dim=2)
    found = StainJitter(StainJitterConfig(scale=(1.5, 1.5), shift=(0, 0)))(x, SEEDS[:1])
    torch.testing.assert_close(found[:, :, 0], torch.ones(1, 3, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, :, 1], pure[:, :, 0] ** 1.5, rtol=0, atol=1e-6)
    assert torch.equal(found[:, :, 2], torch.zeros(1, 3, 1))


@pytest.mark.realdata
@pytest.mark.skipif(not NUCLEI.is_dir(), reason="no shared folder of real images")
def test_a_stained_tissue_keeps_its_structure_under_the_default_jitter():
    with (NUCLEI / "manifest.csv").open() as file:
        stained_paths = [NUCLEI / row["path"] for row in csv.DictReader(file) if row["image_type"] == "stained_colour"]
    assert len(stained_paths) > 6
    for place, path in enumerate(stained_paths[:6]):
        with Image.open(path) as picture:
            x = from_pillow(picture.convert("RGB"))[None]
        found = StainJitter()(x, torch.tensor([place]))
        assert (found - x).abs().mean() < 0.1
        assert not torch.equal(found, x)
        assert np.corrcoef(found.flatten().numpy(), x.flatten().numpy())[0, 1] > 0.97


def test_a_greyscale_equals_pillows():
    x = pictures()
    found = Greyscale(GreyscaleConfig(p=1.0))(x, SEEDS)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])
    for image, out in zip(x, found, strict=True):
        expected = np.array(as_pillow(image).convert("L")).T / 255
        np.testing.assert_allclose(out[0], expected, atol=1.01 / 255)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2), (6, 4, 1)])
def test_a_vignette_falls_with_the_square_of_the_distance_to_the_farthest_corner(shape):
    x = torch.full((2, 3, *shape), 0.8)
    light = Illumination(IlluminationConfig(amount=0.0, vignette=(0.2, 0.6)))
    params = light.draw(SEEDS)
    found = light.apply(x, params)
    for out, centre, lost in zip(found, params["centre"].tolist(), params["vignette"].tolist(), strict=True):
        farthest = sum(max(middle, 1 - middle) ** 2 for middle in centre[: len(shape)])
        for place in np.ndindex(*shape):
            square = sum(((i + 0.5) / n - c) ** 2 for i, n, c in zip(place, shape, centre, strict=False))
            expected = 0.8 * (1 - lost * square / farthest)
            np.testing.assert_allclose(out[(slice(None), *place)], expected, atol=1e-6)


def test_an_uneven_light_is_smooth_bounded_and_the_same_for_all_channels():
    x = torch.full((8, 3, 32, 32), 0.5)
    found = Illumination(IlluminationConfig(amount=0.3, vignette=(0, 0)))(x, torch.arange(8))
    ratio = (found / x).log()
    assert torch.equal(ratio[:, 0], ratio[:, 2])
    assert ratio.abs().max() <= 0.3 + 1e-5
    assert ratio.std() > 0.03
    assert ratio.diff(dim=2).abs().max() < 0.1


def test_an_even_share_of_samples_and_black_surrounds():
    assert 0.1 < Greyscale().draw(torch.arange(500))["on"].float().mean() < 0.3
    assert torch.equal(Illumination()(torch.zeros(2, 3, 4, 4), SEEDS), torch.zeros(2, 3, 4, 4))


def test_colour_augments_want_colours_between_zero_and_one():
    for cls in (ColourJitter, StainJitter, Greyscale):
        assert cls.colour
        assert cls.takes == {"unit"}
    assert not Illumination.colour


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (ColourJitterConfig, {"hue": [-0.6, 0.1]}, "half a turn"),
        (ColourJitterConfig, {"brightness": [-0.1, 1.0]}, "greater than or equal to 0"),
        (StainJitterConfig, {"scale": [0.0, 1.0]}, "greater than 0"),
        (IlluminationConfig, {"vignette": [0.0, 1.5]}, "less than or equal to 1"),
    ],
)
def test_impossible_options_are_refused(config, options, reason):
    with pytest.raises(ConfigError, match=reason):
        config.parse(options)
