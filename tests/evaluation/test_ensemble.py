"""Ensembles: the mean of probabilities, and members that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import CheckpointError, ConfigError
from medssl.evaluation.ensemble import load_ensemble, member_folders, open_members, weight_digests
from medssl.evaluation.mirroring import check_mirrors, class_swaps
from medssl.evaluation.segment import load_network
from medssl.evaluation.sliding_window import Settings
from medssl.nn.backbone import build_backbone
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.tasks.segmentation import Config, Segmentation


def bundle(folder: Path, *, seed: int = 0, spatial_dims: int = 3, **changes: Any) -> Path:
    """A bundle with random weights for the labels 0, 1 and 2."""
    torch.manual_seed(seed)
    backbone = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}
    encoder = build_backbone(backbone, in_channels=1, spatial_dims=spatial_dims)
    crop = [8, 8, 8 if spatial_dims == 3 else 1]
    config = Config.parse({"crop_voxels": crop, "augment": {"preset": "none"}})
    task = Segmentation(config, encoder=encoder, label_values=(1, 2), seed=seed)
    fields = {
        "kind": "segmenter",
        "backbone": encoder.config,
        "spatial_dims": spatial_dims,
        "in_channels": 1,
        "decoder": task.decoder_config(),
        "label_values": [0, 1, 2],
        "prepare": {"region": "brain"},
        "unit": "arbitrary",
        "crop_voxels": crop,
        "recipe": {"task": {"name": "segmentation", **config.to_dict()}},
        "method": "segmentation",
        "data_fingerprint": "0",
        **changes,
    }
    save_bundle(folder, task.bundle_modules(), Passport.parse(fields))
    return folder


def test_scores_are_the_mean_of_the_members_probabilities(tmp_path: Path) -> None:
    paths = [bundle(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    settings = Settings()
    x = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    found = load_ensemble(open_members(paths), settings=settings)(x)
    alone = [load_network(load_bundle(path), settings=settings)(x) for path in paths]
    exps = [np.exp(scores.numpy().astype(np.float64)) for scores in alone]
    expected = sum(e / e.sum(axis=1, keepdims=True) for e in exps) / 3
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(load_ensemble(open_members(paths[0]), settings=settings)(x), alone[0])


def test_members_are_found_in_folders_of_bundles_and_of_runs(tmp_path: Path) -> None:
    first, second = bundle(tmp_path / "folds" / "fold_0" / "bundle"), bundle(tmp_path / "folds" / "fold_1" / "bundle")
    (tmp_path / "folds" / "stores").mkdir()
    assert member_folders(tmp_path / "folds") == [first, second]
    assert member_folders(tmp_path / "folds" / "fold_0") == [first]
    assert member_folders(first) == [first]
    assert [member.folder for member in open_members(tmp_path / "folds")] == [first, second]
    other = bundle(tmp_path / "other", seed=1)
    assert len(set(weight_digests(open_members([first, other])))) == 2
    with pytest.raises(CheckpointError, match="at least one"):
        open_members([])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_members(tmp_path / "folds" / "stores")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_values": [0, 2, 1]}, "label values"),
        ({"prepare": {"spacing_mm": [2.0, 2.0, 2.0]}}, "preparation"),
        ({"crop_voxels": [8, 8, 4]}, "crop_voxels"),
        ({"image_channels": 3}, "image channels"),
    ],
)
def test_members_that_differ_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    paths = [bundle(tmp_path / "a"), bundle(tmp_path / "b", **changes)]
    with pytest.raises(CheckpointError, match=f"other {words}") as error:
        open_members(paths)
    assert error.value.code == "E_CONTRACT"


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_bfloat16_and_channels_last_give_nearly_the_same(tmp_path: Path, spatial_dims: int) -> None:
    member = load_bundle(bundle(tmp_path / "a", spatial_dims=spatial_dims))
    x = torch.randn(2, 1, 8, 8, 8 if spatial_dims == 3 else 1, generator=torch.Generator().manual_seed(0))
    plain = load_network(member, settings=Settings())(x)
    torch.testing.assert_close(load_network(member, settings=Settings(channels_last=True))(x), plain)
    short = load_network(member, settings=Settings(precision="bf16"))(x).float()
    assert not torch.equal(short, plain)
    torch.testing.assert_close(short, plain, atol=0.1, rtol=0.1)


MIRROR = {"name": "mirror", "axes": ["LR"], "swap_labels": [[1, 2]]}


@pytest.mark.parametrize(
    ("changes", "axes", "message"),
    [
        ({}, ("SI",), "the head up"),
        ({"prepare": {}}, ("LR",), "nobody said"),
        ({"prepare": {"region": "abdomen"}}, ("LR",), "liver lies on the right"),
        ({"label_names": ["none", "Left lobe", "right_lobe"]}, ("LR",), "Left lobe, right_lobe have a side"),
        ({"spatial_dims": 2, "crop_voxels": [8, 8]}, ("SI",), "single slices"),
        ({}, ("LR",), None),
        ({"prepare": {"region": "tissue"}}, ("LR", "AP"), None),
        ({"prepare": {}, "recipe": {"task": {"augment": [{**MIRROR, "axes": ["SI"]}]}}}, ("SI",), None),
        ({"label_names": ["none", "left", "right"], "recipe": {"task": {"augment": [MIRROR]}}}, ("LR",), None),
    ],
)
def test_mirrors_are_those_that_anatomy_or_training_allow(
    tmp_path: Path, changes: dict[str, Any], axes: tuple[Any, ...], message: str | None
) -> None:
    passport = load_bundle(bundle(tmp_path / "a")).passport
    passport = Passport.parse({**passport.to_dict(), **changes})
    if message is None:
        check_mirrors(passport, axes)
        return
    with pytest.raises(ConfigError, match=message) as error:
        check_mirrors(passport, axes)
    assert error.value.code == "E_MIRROR"


def test_pairs_of_the_training_mirror_become_pairs_of_classes(tmp_path: Path) -> None:
    passport = load_bundle(bundle(tmp_path / "a", label_values=[0, 5, 9])).passport
    mirror = {**MIRROR, "swap_labels": [[5, 9], [9, 77]]}
    recipe = {"task": {"augment": [{"name": "noise"}, mirror]}}
    assert class_swaps(Passport.parse({**passport.to_dict(), "recipe": recipe})) == [(1, 2)]
    assert class_swaps(passport) == []
    assert class_swaps(Passport.parse({**passport.to_dict(), "recipe": {}})) == []
