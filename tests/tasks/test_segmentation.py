"""The segmentation task: loss, class indices, the four fine-tuning modes, and the bundle it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.losses.segmentation import dice_ce, label_terms
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.registry import configure, names
from medssl.tasks.base import Task
from medssl.tasks.segmentation import Config, Segmentation, Segmenter
from medssl.trainable import Batch, Losses, Progress

BACKBONE = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}
PLAIN: dict[str, Any] = {"crop_voxels": [8, 8, 8], "augment": {"preset": "none"}}
VALUES = (3, 7)


def encoder(spatial_dims: int = 3, *, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone({**BACKBONE, **options}, in_channels=1, spatial_dims=spatial_dims)


def task(*, spatial_dims: int = 3, seed: int = 0, **options: Any) -> Segmentation:
    config = Config.parse({**PLAIN, **options})
    return Segmentation(config, encoder=encoder(spatial_dims), label_values=VALUES, seed=seed)


def batch(*, spatial_dims: int = 3, num: int = 2, values: tuple[int, ...] = (0, *VALUES)) -> Batch:
    generator = torch.Generator().manual_seed(5)
    shape = (num, 1, *(8,) * spatial_dims)
    index = torch.randint(len(values), shape, generator=generator)
    label = torch.tensor(values, dtype=torch.uint8)[index]
    image = index.float() + 0.1 * torch.randn(shape, generator=generator)
    return Batch({"image": image, "label": label}, torch.arange(num), tuple(f"case{i}" for i in range(num)))


def losses_of(model: Segmentation, data: Batch) -> Losses:
    return model(model.prepare(data, training=model.training))


def test_the_registry_finds_the_task_and_its_config() -> None:
    assert "segmentation" in names("tasks", Task)
    cls, config = configure("tasks", {"name": "segmentation", **PLAIN}, Task)
    assert cls is Segmentation
    assert config.mode == "full"


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_loss_is_dice_and_cross_entropy_of_class_indices(spatial_dims: int) -> None:
    model = task(spatial_dims=spatial_dims, dice_weight=0.5, ce_weight=2.0)
    data = batch(spatial_dims=spatial_dims)
    losses = losses_of(model, data)
    target = torch.zeros_like(data["label"], dtype=torch.long)
    target[data["label"] == 3] = 1
    target[data["label"] == 7] = 2
    expected = dice_ce(model.logits(data["image"]), target, weights=(0.5, 2.0))
    torch.testing.assert_close(losses.total, expected.total)
    assert set(losses.scalars()) == {"loss", "dice_loss", "cross_entropy", "crop_dice"}


def test_crop_dice_is_that_of_the_hard_labels_by_hand() -> None:
    model = task()
    data = batch()
    predicted = torch.tensor((0, *VALUES))[model.logits(data["image"]).argmax(dim=1)]
    found = []
    for value in VALUES:
        p, r = predicted == value, data["label"][:, 0] == value
        found.append(2 * (p & r).sum() / (p.sum() + r.sum()))
    torch.testing.assert_close(losses_of(model, data).monitors["crop_dice"], torch.stack(found).mean())


def test_crop_dice_of_crops_without_structures_is_one() -> None:
    model = task()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()  # equal scores: argmax takes class 0, background
    losses = losses_of(model, batch(values=(0,)))
    assert losses.monitors["crop_dice"].item() == 1.0


def test_loss_falls_on_one_repeated_batch_and_every_parameter_has_a_gradient() -> None:
    model = task(deep_supervision=True)
    optimiser = torch.optim.Adam([p for g in model.param_groups() for p in g.params], lr=1e-2)
    data = batch()
    history = []
    for _ in range(15):
        optimiser.zero_grad()
        losses = losses_of(model, data)
        losses.total.backward()
        optimiser.step()
        history.append(losses.total.item())
    assert history[-1] < 0.7 * history[0]
    assert all(p.grad is not None for p in model.parameters())


def test_augmentation_moves_image_and_label_while_training_only() -> None:
    model = task(augment=[{"name": "mirror", "p": 1.0, "axes": ["LR", "AP", "SI"]}, {"name": "noise", "sigma": [1, 1]}])
    data = batch()
    model.eval()
    plain = losses_of(model, data).total.item()
    assert losses_of(model, data).total.item() == plain
    model.train()
    assert losses_of(model, data).total.item() != plain
    assert losses_of(model, data).total.item() == losses_of(model, data).total.item()  # a function of the seeds


def test_a_window_is_applied_in_training_and_at_use() -> None:
    window = [{"name": "window", "low_hu": -100.0, "high_hu": 100.0}]
    windowed, plain = task(augment=window), task()
    hu = 300 * torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = plain.logits(((hu + 100) / 200).clamp(0, 1))
    torch.testing.assert_close(windowed.logits(hu), expected)
    data = Batch({"image": hu, "label": torch.zeros_like(hu, dtype=torch.uint8)}, torch.arange(1), ("a",))
    torch.testing.assert_close(losses_of(windowed.train(), data).total, losses_of(windowed.eval(), data).total)


def test_a_label_value_without_a_class_is_refused_by_case() -> None:
    with pytest.raises(CaseError, match=r"case case0: label values \[9\] beside \(0, 3, 7\)") as error:
        losses_of(task(), batch(values=(0, 3, 9)))
    assert error.value.code == "E_LABEL_SET"


@pytest.mark.parametrize("values", [(), (0,), (-1, 2)])
def test_a_task_needs_structures(values: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one positive value"):
        Segmentation(Config.parse(PLAIN), encoder=encoder(), label_values=values, seed=0)


def test_unknown_keys_and_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="crop_voxel"):
        Config.parse({**PLAIN, "crop_voxel": 3})
    with pytest.raises(ConfigError, match="mode"):
        Config.parse({**PLAIN, "mode": "half"})


def test_the_decoder_begins_the_same_whatever_the_encoder() -> None:
    one, two = task(seed=3), Segmentation(Config.parse(PLAIN), encoder=encoder(seed=9), label_values=VALUES, seed=3)
    state = torch.random.get_rng_state()
    for a, b in zip(one.decoder.parameters(), two.decoder.parameters(), strict=True):
        assert torch.equal(a, b)
    other = task(seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(one.decoder.parameters(), other.decoder.parameters(), strict=True))
    torch.random.set_rng_state(state)
    Segmentation(Config.parse(PLAIN), encoder=one.encoder, label_values=VALUES, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def group_scales(model: Segmentation) -> dict[int, float]:
    """Learning-rate factor of every parameter; fails if one is in two groups."""
    scales: dict[int, float] = {}
    for group in model.param_groups():
        for parameter in group.params:
            assert id(parameter) not in scales
            scales[id(parameter)] = group.lr_scale
    return scales


def test_full_mode_trains_all_with_the_encoder_scaled() -> None:
    model = task(encoder_lr_scale=0.1)
    scales = group_scales(model)
    assert len(scales) == len(list(model.parameters()))
    assert {scales[id(p)] for p in model.encoder.parameters()} == {0.1}
    assert {scales[id(p)] for p in model.decoder.parameters()} == {1.0}


def test_layer_decay_slows_shallow_layers() -> None:
    model = task(mode="layer_decay", layer_decay=0.5)
    scales = group_scales(model)
    layers = model.encoder.layer_groups()
    for index, params in enumerate(layers):
        assert {scales[id(p)] for p in params} == {0.5 ** (len(layers) - index)}
    assert {scales[id(p)] for p in model.decoder.parameters()} == {1.0}
    assert len(scales) == len(list(model.parameters()))


def steps(model: Segmentation, numbers: range, *, total: int) -> list[bool]:
    """Take optimiser steps; say after each whether the encoder moved."""
    optimiser = torch.optim.AdamW([p for g in model.param_groups() for p in g.params], lr=1e-2)
    moved = []
    for number in numbers:
        before = [p.clone() for p in model.encoder.parameters()]
        model.train()
        model.before_step(Progress(number, total))
        optimiser.zero_grad()
        losses_of(model, batch()).total.backward()
        optimiser.step()
        model.after_step(Progress(number + 1, total))
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.encoder.parameters(), strict=True)))
    return moved


def test_frozen_mode_leaves_the_encoder_alone_and_in_eval() -> None:
    model = task(mode="frozen")
    assert set(group_scales(model)) == {id(p) for p in model.decoder.parameters()}
    assert steps(model, range(2), total=2) == [False, False]
    assert not model.train().encoder.training
    assert model.decoder.training


def test_warm_up_holds_the_encoder_for_its_share_and_then_trains_it() -> None:
    model = task(mode="warmup_then_full", warmup_share=0.5)
    assert len(group_scales(model)) == len(list(model.parameters()))
    assert steps(model, range(6), total=6) == [False, False, False, True, True, True]
    assert model.encoder.training


def test_warm_up_is_a_function_of_the_step_so_that_a_resumed_run_agrees() -> None:
    model = task(mode="warmup_then_full", warmup_share=0.5)
    assert steps(model, range(4, 6), total=6) == [True, True]
    assert steps(model, range(1), total=6) == [False]


def test_view_sampler_cuts_labelled_crops_of_the_structures() -> None:
    sampler = task(foreground_share=0.4).view_sampler()
    assert sampler.crop_voxels == (8, 8, 8)
    assert tuple(sampler.label_values) == VALUES
    assert sampler.foreground_share == 0.4


def passport(model: Segmentation, **changes: Any) -> Passport:
    fields: dict[str, Any] = {
        "kind": "segmenter",
        "backbone": model.encoder.config,
        "spatial_dims": model.encoder.spatial_dims,
        "in_channels": 1,
        "decoder": model.decoder_config(),
        "label_values": list(model.label_values),
        "prepare": {},
        "unit": "arbitrary",
        "crop_voxels": [8, 8, 8],
        "recipe": {"task": {"name": "segmentation", **model.config.to_dict()}},
        "method": "segmentation",
        "data_fingerprint": "0",
        **changes,
    }
    return Passport.parse(fields)


@pytest.mark.parametrize(
    "options",
    [
        {"deep_supervision": True, "decoder": {"width": [6]}},
        {"augment": [{"name": "window", "low_hu": -100.0, "high_hu": 100.0}]},
    ],
)
def test_a_bundle_gives_the_same_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    model = task(**options).eval()
    save_bundle(tmp_path / "bundle", model.bundle_modules(), passport(model))
    segmenter = Segmenter.from_bundle(load_bundle(tmp_path / "bundle"))
    assert not segmenter.training
    x = 50 * torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(segmenter(x), model.logits(x))


@pytest.mark.parametrize("changes", [{"kind": "encoder", "decoder": None}, {"recipe": {}}])
def test_a_bundle_without_a_segmentation_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = task()
    save_bundle(tmp_path / "bundle", model.bundle_modules(), passport(model, **changes))
    with pytest.raises(CheckpointError, match="one that medssl finetune left is needed") as error:
        Segmenter.from_bundle(load_bundle(tmp_path / "bundle"))
    assert error.value.code == "E_CONTRACT"


@pytest.mark.parametrize("asked", [False, True])
def test_a_pretrained_decoder_is_taken_only_when_asked_for(tmp_path: Path, asked: bool) -> None:
    giver, taker = task(seed=1), task(seed=2, decoder={"pretrained": asked})
    save_bundle(tmp_path / "bundle", giver.bundle_modules(), passport(giver))
    taker.take_decoder(load_bundle(tmp_path / "bundle"))
    steps = zip(giver.decoder.steps.parameters(), taker.decoder.steps.parameters(), strict=True)
    same = [torch.equal(a, b) for a, b in steps]
    assert all(same) if asked else not all(same)
    heads = zip(giver.decoder.heads.parameters(), taker.decoder.heads.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in heads)


@pytest.mark.parametrize(("decoder", "found"), [(None, "has none"), ({"width": [8, 8, 8]}, "another")])
def test_a_decoder_that_is_asked_for_and_does_not_fit_is_refused(tmp_path: Path, decoder: object, found: str) -> None:
    giver = task(seed=1)
    save_bundle(tmp_path / "bundle", giver.bundle_modules(), passport(giver))
    bundle = load_bundle(tmp_path / "bundle")
    theirs = None if decoder is None else {**(bundle.passport.decoder or {}), "width": [1, 1, 1]}
    bundle = replace(bundle, passport=bundle.passport.model_copy(update={"decoder": theirs}))
    with pytest.raises(CheckpointError, match=found.removeprefix("has ")):
        task(decoder={"pretrained": True}).take_decoder(bundle)


def test_an_ignored_value_is_no_class_and_takes_part_in_nothing() -> None:
    model = task(ignore_value=7)
    assert model.label_values == (0, 3)
    data = batch()
    losses = losses_of(model, data)
    target = torch.zeros_like(data["label"], dtype=torch.long)
    target[data["label"] == 3] = 1
    target[data["label"] == 7] = 255
    expected = dice_ce(model.logits(data["image"]), target, ignore_value=255)
    torch.testing.assert_close(losses.total, expected.total)
    best = model.logits(data["image"]).argmax(dim=1)[target[:, 0] != 255]
    true = target[:, 0][target[:, 0] != 255]
    dice = 2 * ((best == 1) & (true == 1)).sum() / ((best == 1).sum() + (true == 1).sum())
    torch.testing.assert_close(losses.monitors["crop_dice"], dice)
    assert tuple(model.view_sampler().label_values) == (3,)


def test_a_map_with_nothing_but_ignored_voxels_gives_no_gradient() -> None:
    model = task(ignore_value=7)
    losses = losses_of(model, batch(values=(7,)))
    losses.total.backward()
    assert losses.total.item() == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_a_value_that_is_neither_a_class_nor_ignored_is_refused() -> None:
    with pytest.raises(CaseError, match=r"label values \[9\]"):
        losses_of(task(ignore_value=7), batch(values=(0, 3, 7, 9)))


@pytest.mark.parametrize("options", [{"ignore_value": 3, "regions": {"a": [3, 7]}}, {"regions": {"a": [3]}}])
def test_regions_must_fit_the_label_values(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        task(**options)
    assert error.value.code == "E_LABEL_SET"


REGIONS = {"whole": [3, 7], "core": [7]}


def test_regions_have_an_output_each_and_come_back_as_label_values(tmp_path: Path) -> None:
    model = task(regions=REGIONS, deep_supervision=True).eval()
    assert model.decoder_config()["out_channels"] == 2
    data = batch()
    losses = losses_of(model, data)
    losses.total.backward()
    assert set(losses.parts) == {"dice_loss", "cross_entropy"}
    raw = model.decoder(model.encoder(data["image"]), data["image"])[0]
    expected = torch.zeros_like(data["label"][:, 0])
    expected[raw[:, 0] > 0] = 3
    expected[raw[:, 1] > 0] = 7
    scores = model.logits(data["image"])
    assert torch.equal(torch.tensor((0, *VALUES), dtype=torch.uint8)[scores.argmax(dim=1)], expected)
    save_bundle(tmp_path / "bundle", model.bundle_modules(), passport(model))
    segmenter = Segmenter.from_bundle(load_bundle(tmp_path / "bundle"))
    assert torch.equal(segmenter(data["image"]), scores)


def test_regions_are_learned_on_one_repeated_batch() -> None:
    model = task(regions=REGIONS)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(15):
        optimiser.zero_grad()
        losses = losses_of(model, batch())
        losses.total.backward()
        optimiser.step()
        history.append(losses.total.item())
    assert history[-1] < 0.7 * history[0]


def test_cases_annotated_in_part_have_the_marginal_loss() -> None:
    model = task(annotated="drawn")
    assert model.view_sampler().annotated == "drawn"
    data = batch(values=(0, 3))
    drawn = torch.tensor([[True, False], [True, True]])
    data = data.with_tensors({**data.tensors, "annotated": drawn})
    losses = losses_of(model, data)
    target = (data["label"] == 3).long()
    known = torch.cat((torch.ones(2, 1, dtype=torch.bool), drawn), dim=1)
    blend = model.config.loss.blend(overlap_weight=1, voxel_weight=1, include_background=False, fraction=0)
    expected = label_terms(model.logits(data["image"]), target, blend, known=known)
    torch.testing.assert_close(losses.total, expected.total)


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_the_boundary_term_grows_with_the_run(regions: dict[str, list[int]] | None) -> None:
    model = task(loss={"name": "dice_ce_boundary", "boundary_weight": 0.5}, regions=regions)
    data = model.prepare(batch(), training=False)
    assert data["distance"].shape == (2, 3 if regions is None else 2, 8, 8, 8)
    totals = []
    for step in (0, 4, 8):
        model.before_step(Progress(step, 8))
        losses = model(data)
        totals.append(losses.total)
        assert "boundary_loss" in losses.parts
    first, half, last = totals
    torch.testing.assert_close(last - first, 0.5 * losses.parts["boundary_loss"])
    torch.testing.assert_close(half - first, 0.25 * losses.parts["boundary_loss"])


def test_the_view_sampler_balances_structures_as_asked() -> None:
    assert task(class_balance="inverse_sqrt").view_sampler().class_balance == "inverse_sqrt"
