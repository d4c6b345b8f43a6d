from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from medssl.augment.anatomy import REGIONS
from medssl.augment.build import augment_classes, build_augment
from medssl.augment.images import Images
from medssl.augment.presets import preset, preset_names
from medssl.data.cohort import Modality
from medssl.errors import ConfigError

SEEDS = torch.arange(100, 106)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "views.md"
ASKED_FOR = {
    "ct_abdomen", "ct_chest", "ct_head", "ct_light", "fundus", "histology", "microscopy", "mr_brain", "mr_cardiac",
    "mr_light", "mr_prostate", "mr_strong", "none", "oct", "us", "xray_chest",
}  # fmt: skip
COLOUR = {"fundus", "histology"}
BEFORE = {
    "mr_light": [
        {"name": "affine", "p": 0.5, "rotation_deg": [10.0, 10.0, 15.0], "scale": [0.85, 1.18]},
        {"name": "noise", "p": 0.2, "sigma": [0.0, 0.1]},
        {"name": "blur", "p": 0.2, "sigma_mm": [0.4, 1.0]},
        {"name": "brightness", "p": 0.2, "shift": [-0.2, 0.2]},
        {"name": "contrast", "p": 0.2, "factor": [0.8, 1.25]},
        {"name": "gamma", "p": 0.3, "gamma": [0.75, 1.33]},
    ],
    "ct_light": [
        {"name": "affine", "p": 0.5, "rotation_deg": [10.0, 10.0, 15.0], "scale": [0.85, 1.18]},
        {"name": "window", "low_hu": -175.0, "high_hu": 250.0, "jitter_hu": 20.0},
        {"name": "noise", "p": 0.2, "sigma": [0.0, 0.05]},
        {"name": "blur", "p": 0.2, "sigma_mm": [0.4, 1.0]},
        {"name": "gamma", "p": 0.2, "gamma": [0.8, 1.25]},
    ],
    "none": [],
}


def kind(name: str, spatial_dims: int) -> Images:
    """The images that a preset is for."""
    wanted = preset(name)
    given: dict[str, Any] = {
        "domain": wanted.domain or "zscore",
        "modality": wanted.modality or "other",
        "region": wanted.region,
        "spatial_dims": spatial_dims,
        "channels": 3 if name in COLOUR else 1,
    }
    return Images(**given)


def batch(images: Images, count: int = 6) -> torch.Tensor:
    shape = (24, 20, 12)[: images.spatial_dims]
    x = torch.randn(count, images.channels, *shape, generator=torch.Generator().manual_seed(0))
    return {"HU": x * 300, "raw": (x * 50 + 128).clamp(0, 255), "zscore": x, "unit": x}[images.domain]


CASES = [(name, dims) for name in preset_names() for dims in preset(name).spatial_dims]


def test_every_preset_that_was_asked_for_is_there():
    assert set(preset_names()) == ASKED_FOR


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_every_preset_runs_on_images_of_its_kind(name, dims):
    images = kind(name, dims)
    x = batch(images)
    label = (x[:, :1] > 0).to(torch.uint8) * 3
    pipeline = build_augment({"preset": name}, images=images)
    view = pipeline(x, SEEDS, label)
    assert view.image.shape == x.shape
    assert view.image.dtype == torch.float32
    assert torch.isfinite(view.image).all()
    assert view.label is not None
    assert set(view.label.unique().tolist()) <= {0, 3}
    assert view.notes["fallback"].sum() == 0
    assert torch.equal(view.image, pipeline(x, SEEDS).image)
    assert pipeline.channels_out(images.channels) == images.channels


@pytest.mark.parametrize("name", sorted(ASKED_FOR - {"none"}))
def test_every_augment_of_a_preset_gives_a_view_of_its_own(name):
    images = kind(name, max(preset(name).spatial_dims))
    drawn = build_augment({"preset": name}, images=images).draw(torch.arange(200))
    assert len(drawn) == len(preset(name).augments)
    assert all(params["on"].any() for params in drawn)


@pytest.mark.parametrize(("name", "dims"), [case for case in CASES if preset(case[0]).domain in {"HU", "raw"}])
def test_what_a_network_gets_of_hu_and_colours_lies_in_0_to_1_apart_from_noise(name, dims):
    images = kind(name, dims)
    plain = build_augment({"preset": name}, images=images).normalise(batch(images))
    assert 0 <= plain.min() < 0.2
    assert 0.8 < plain.max() <= 1


@pytest.mark.parametrize("name", preset_names())
def test_every_option_has_a_reason_in_a_sentence_and_is_one_of_the_augment(name):
    known = augment_classes()
    for options, reasons in zip(preset(name).augments, preset(name).reasons, strict=True):
        written = [key for key in options if key != "name"]
        assert list(reasons) == written, options["name"]
        assert set(written) <= known[str(options["name"])].config_class.model_fields.keys()
        assert all(re.fullmatch(r"[A-Z0-9].{9,}\.", reason) for reason in reasons.values())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_for(name):
    found = preset(name)
    assert re.fullmatch(r"[A-Za-z].{10,}\.", found.description)
    assert found.modality is None or found.modality in get_args(Modality)
    assert found.region is None or found.region in REGIONS
    assert set(found.spatial_dims) <= {2, 3}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_mirrors_only_where_nothing_has_a_side(name):
    for options in preset(name).augments:
        if options["name"] == "mirror":
            assert preset(name).region == "tissue"
            assert set(options["axes"]) <= REGIONS["tissue"].mirrors


@pytest.mark.parametrize("name", preset_names())
def test_in_a_task_that_learns_positions_a_preset_moves_nothing(name):
    images = kind(name, max(preset(name).spatial_dims))
    whole = build_augment({"preset": name}, images=images)
    reduced = build_augment({"preset": name}, images=images, position_task=True)
    assert len(reduced.spatial) == 0
    assert [augment.name for augment in reduced.intensity] == [augment.name for augment in whole.intensity]


@pytest.mark.parametrize("name", sorted(BEFORE))
def test_a_preset_of_earlier_versions_has_its_values_of_then(name):
    assert list(preset(name).augments) == BEFORE[name]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'mr_ligth'; did you mean mr_light") as caught:
        preset("mr_ligth")
    assert caught.value.code == "E_UNKNOWN_NAME"
    with pytest.raises(ConfigError, match="known are ct_abdomen, ct_chest"):
        preset("3")


def test_the_page_lists_every_preset_with_its_own_sentence():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE))
    for name in preset_names():
        found = preset(name)
        stored = {"HU": "HU", "zscore": "z-score", "raw": "raw", "unit": "unit", None: "any"}[found.domain]
        where = f"{found.modality or 'any'} | {found.region or 'any'} | {stored}"
        assert rows.get(name) == f"{where} | {found.description}"


def test_the_page_names_every_augment():
    page = PAGE.read_text()
    assert [name for name in augment_classes() if f"`{name}`" not in page] == []
