"""How a task adapts the encoder that it was given: which parameters move, at which rate, and what a bundle keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL_BACKBONES
from torch import Tensor

from medssl.errors import CheckpointError, ConfigError
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.nn.linear import LinearDecoder
from medssl.tasks.segmentation import Config, Segmentation, Segmenter
from medssl.trainable import Batch, Progress

UNET: dict[str, Any] = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}
VIT: dict[str, Any] = {"name": "vit", **SMALL_BACKBONES["vit"]}
PLAIN: dict[str, Any] = {"crop_voxels": [8, 8, 8], "augment": {"preset": "none"}}
MODES = ("full", "frozen", "linear", "warmup_then_full", "layer_decay", "lora", "bitfit")

every_mode = pytest.mark.parametrize("mode", MODES)
either_backbone = pytest.mark.parametrize("backbone", [UNET, VIT], ids=["unet", "vit"])


def fresh(backbone: dict[str, Any], *, in_channels: int = 1, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(backbone, in_channels=in_channels, spatial_dims=3)


def task(backbone: dict[str, Any], *, seed: int = 0, **options: Any) -> Segmentation:
    config = Config.parse({**PLAIN, **options})
    return Segmentation(config, encoder=fresh(backbone), label_values=(1, 2), seed=seed)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    label = torch.randint(3, (2, 1, 8, 8, 8), generator=generator).to(torch.uint8)
    image = label.float() + 0.1 * torch.randn(label.shape, generator=generator)
    return Batch({"image": image, "label": label}, torch.arange(2), ("a", "b"))


def train(model: Segmentation, *, numbers: range, total: int = 10) -> None:
    groups = [{"params": g.params, "lr": 0.01 * g.lr_scale} for g in model.param_groups()]
    optimiser = torch.optim.AdamW(groups)
    data = batch()
    for number in numbers:
        model.train()
        model.before_step(Progress(number, total))
        optimiser.zero_grad()
        model(model.prepare(data, training=True)).total.backward()
        optimiser.step()
        model.after_step(Progress(number + 1, total))


def moved(model: Segmentation, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.encoder.named_parameters() if not torch.equal(value, before[name])}


def parameters(model: Segmentation) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.encoder.named_parameters()}


@every_mode
@either_backbone
def test_each_mode_moves_what_it_says(mode: str, backbone: dict[str, Any]) -> None:
    model = task(backbone, mode=mode, warmup_share=0.5)
    before = parameters(model)
    decoder = [p.detach().clone() for p in model.decoder.parameters()]
    train(model, numbers=range(2))
    names = {name for name in before if "norm_cross" not in name}
    neck = {name for name in names if name.startswith("neck")}
    expected = {
        "full": names,
        "layer_decay": names,
        "frozen": neck,
        "warmup_then_full": neck,
        "linear": set(),
        "lora": neck | {name for name in names if name.endswith((".a", ".b"))},
        "bitfit": neck | {name for name in names if before[name].ndim == 1},
    }[mode]
    assert moved(model, before) == expected
    assert all(not torch.equal(a, b) for a, b in zip(decoder, model.decoder.parameters(), strict=True))
    if mode == "warmup_then_full":
        before = parameters(model)
        train(model, numbers=range(5, 6))
        assert moved(model, before) == names


@every_mode
@either_backbone
def test_every_trained_parameter_is_in_one_group(mode: str, backbone: dict[str, Any]) -> None:
    model = task(backbone, mode=mode)
    grouped = [id(p) for group in model.param_groups() for p in group.params]
    assert len(grouped) == len(set(grouped))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(grouped) == trained
    assert model.unused_parameters == (mode == "warmup_then_full")


def test_the_neck_learns_at_the_rate_of_new_layers() -> None:
    neck_ids = {}
    for mode in ("full", "layer_decay", "lora"):
        model = task(VIT, mode=mode, encoder_lr_scale=0.1)
        scales = {id(p): group.lr_scale for group in model.param_groups() for p in group.params}
        neck = model.encoder.neck_parameters()
        neck_ids[mode] = {scales[id(p)] for p in neck}
        rest = {scales[id(p)] for p in model.encoder.parameters() if id(p) in scales} - {1.0}
        assert max(rest) <= 0.1
    assert neck_ids == {"full": {1.0}, "layer_decay": {1.0}, "lora": {1.0}}


@pytest.mark.parametrize("mode", ["frozen", "linear"])
def test_features_of_a_frozen_encoder_keep_no_graph(mode: str) -> None:
    model = task(UNET, mode=mode).train()
    assert not any(level.requires_grad for level in model.features(torch.randn(1, 1, 8, 8, 8)))
    assert not model.encoder.training


def test_linear_mode_has_one_linear_map_and_a_bundle_of_it_gives_the_same_logits(tmp_path: Path) -> None:
    model = task(UNET, mode="linear")
    assert isinstance(model.decoder, LinearDecoder)
    assert same_logits(model, tmp_path)


@pytest.mark.parametrize("options", [{"deep_supervision": True}, {"decoder": {"pretrained": True}}])
def test_linear_mode_with_the_options_of_a_decoder_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one linear map"):
        task(UNET, mode="linear", **options)


@either_backbone
def test_a_bundle_of_a_low_rank_run_holds_plain_weights(tmp_path: Path, backbone: dict[str, Any]) -> None:
    model = task(backbone, mode="lora", lora={"rank": 2, "alpha": 4.0})
    train(model, numbers=range(3))
    assert same_logits(model, tmp_path)
    tensors = load_bundle(tmp_path / "bundle").tensors
    assert {name.removeprefix("encoder.") for name in tensors if name.startswith("encoder.")} == set(
        fresh(backbone).state_dict()
    )


def test_a_low_rank_run_goes_on_from_its_state() -> None:
    model, again = task(UNET, mode="lora"), task(UNET, mode="lora", seed=7)
    train(model, numbers=range(2))
    again.load_state_dict(model.state_dict(), strict=True)
    x = batch()["image"]
    assert torch.equal(model.eval().logits(x), again.eval().logits(x))


def test_the_seed_of_a_task_draws_its_low_rank_additions() -> None:
    a, b, c = (task(UNET, mode="lora", seed=seed).encoder.state_dict() for seed in (0, 0, 1))
    names = [name for name in a if name.endswith(".a")]
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert not any(torch.equal(a[name], c[name]) for name in names)


def test_a_mode_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode"):
        Config.parse({**PLAIN, "mode": "decoder_only"})


def passport(model: Segmentation) -> Passport:
    return Passport.parse(
        {
            "kind": "segmenter",
            "backbone": model.encoder.config,
            "spatial_dims": 3,
            "in_channels": model.encoder.in_channels,
            "decoder": model.decoder_config(),
            "label_values": list(model.label_values),
            "prepare": {"orientation": "RAS"},
            "unit": "arbitrary",
            "crop_voxels": [8, 8, 8],
            "recipe": {"task": {"name": "segmentation", **model.config.to_dict()}},
            "method": "segmentation",
            "data_fingerprint": "0",
        }
    )


def same_logits(model: Segmentation, tmp_path: Path) -> bool:
    save_bundle(tmp_path / "bundle", model.bundle_modules(), passport(model))
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        found = Segmenter.from_bundle(load_bundle(tmp_path / "bundle"))(x)
        return torch.allclose(found, model.eval().logits(x), atol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = task(VIT)
    save_bundle(tmp_path / "bundle", model.bundle_modules(), passport(model))
    return tmp_path / "bundle"


def test_a_bundle_is_loaded_into_a_network_of_the_same_form(saved: Path) -> None:
    network = fresh(VIT, seed=3)
    report = load_bundle(saved).load_encoder(network)
    assert report.adapted == ()
    assert set(report.matched) == set(network.state_dict())
    theirs = fresh(VIT).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in network.state_dict().items())


def test_positions_of_another_grid_are_interpolated_and_reported(saved: Path) -> None:
    network = fresh({**VIT, "grid": [3, 2, 4]}, seed=3)
    report = load_bundle(saved).load_encoder(network)
    assert report.adapted == ("position",)
    expected = torch.nn.functional.interpolate(
        fresh(VIT).state_dict()["position"], size=(3, 2, 4), mode="trilinear", align_corners=False
    )
    torch.testing.assert_close(network.state_dict()["position"], expected)
    assert "adapted     1  position" in report.describe()


def test_other_channels_are_refused_unless_the_stem_may_be_adapted(saved: Path) -> None:
    bundle, network = load_bundle(saved), fresh(VIT, in_channels=3, seed=3)
    with pytest.raises(CheckpointError, match=r"1 channels, found 3.*adapt_stem: true") as caught:
        bundle.load_encoder(network)
    assert caught.value.code == "E_CONTRACT"
    report = bundle.load_encoder(network, adapt_stem=True)
    assert report.adapted == ("patch_embed.weight",)
    x = torch.randn(1, 1, 16, 16, 16)
    one = fresh(VIT)
    for a, b in zip(one(x), network(x.expand(-1, 3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "found"), [({**VIT, "depth": 6}, "depth 4 against 6"), (UNET, "name vit against unet")]
)
def test_another_architecture_is_refused(saved: Path, backbone: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        load_bundle(saved).load_encoder(fresh(backbone))


def test_a_backbone_of_another_dimension_or_version_is_refused(saved: Path) -> None:
    bundle = load_bundle(saved)
    flat = build_backbone(VIT, in_channels=1, spatial_dims=2)
    with pytest.raises(CheckpointError, match="spatial_dims"):
        bundle.load_encoder(flat)
    bundle.passport.backbone["name"] = "vitt"
    with pytest.raises(CheckpointError, match="cannot be built"):
        bundle.load_encoder(flat)
