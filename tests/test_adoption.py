from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from monai.networks.nets import SegResNet
from torch import Tensor

from medssl.adoption import AdoptConfig, adopt, read_tensors
from medssl.cli import app, run_guarded
from medssl.errors import CheckpointError, ConfigError, ExitCode
from medssl.nn.bundle import load_bundle
from medssl.recipe import finetune

PREPARE = {"modality": "MR", "spacing_mm": [1.0, 1.0, 1.0]}


def state(spatial_dims: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return SegResNet(
        spatial_dims=spatial_dims, init_filters=8, in_channels=1, blocks_down=(1, 1), blocks_up=(1,)
    ).state_dict()


def config(**more: object) -> AdoptConfig:
    return AdoptConfig.parse({"family": "monai_segresnet", "prepare": PREPARE, **more})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save(state(), path)
    return path


def test_a_checkpoint_becomes_a_bundle_that_gives_the_same_features(checkpoint: Path, tmp_path: Path) -> None:
    result = adopt(checkpoint, out=tmp_path / "bundle", config=config(licence="Apache-2.0"))
    assert result.share == 1
    assert result.report.is_full
    bundle = load_bundle(tmp_path / "bundle")
    passport = bundle.passport
    assert passport.kind == "encoder"
    assert passport.backbone == result.backbone
    assert passport.licence == "Apache-2.0"
    assert passport.citations[0].startswith("Myronenko")
    assert passport.spacing_mm == (1.0, 1.0, 1.0)
    assert passport.crop_voxels == (96, 96, 96)
    assert passport.metrics["share_matched"] == 1
    assert len(passport.recipe["adopt"]["checkpoint_sha256"]) == 64
    assert "conv_final.2.conv.weight" in passport.recipe["adopt"]["not_used"]
    network = SegResNet(init_filters=8, in_channels=1, blocks_down=(1, 1), blocks_up=(1,)).eval()
    network.load_state_dict(state())
    x = torch.randn(1, 1, 12, 10, 9)
    with torch.no_grad():
        for mine, theirs in zip(bundle.build_encoder().eval()(x), network.encode(x)[1], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_safetensors_and_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.half() for key, value in state().items()}, path)
    adopt(path, out=tmp_path / "bundle", config=config())
    kernel = load_bundle(tmp_path / "bundle").tensors["encoder.levels.0.0.weight"]
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel, state()["convInit.conv.weight"].half().float())


def test_numbers_and_options_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    beside = {"best": np.float64(0.5), "epoch": np.int64(3), "args": argparse.Namespace(lr=1.0)}
    torch.save({"state_dict": state(), **beside}, path)
    assert {name.partition(".")[0] for name in read_tensors(path)} == {"state_dict"}


class Custom:
    """Stands for a class of another repository."""


def test_a_file_that_needs_pickle_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state(), "trainer": Custom()}, path)
    with pytest.raises(CheckpointError, match=r"holds \S*Custom, which cannot be read without running code") as caught:
        adopt(path, out=tmp_path / "bundle", config=config())
    assert caught.value.code == "E_PICKLE"
    assert "\n" not in caught.value.message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_and_missing_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(path)
    if path.suffix == ".pt":
        torch.save(state(), path)
    else:
        safetensors.torch.save_file(state(), path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(path)


def test_text_is_no_plain_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"no weights here")
    with pytest.raises(CheckpointError, match="is no plain checkpoint") as caught:
        read_tensors(path)
    assert caught.value.code == "E_PICKLE"


def test_too_few_matching_tensors_are_refused_with_a_table(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    weights = state()
    weights["down_layers.1.0.conv.weight"] = torch.zeros(3, 3)
    del weights["down_layers.0.1.norm1.weight"]
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"12 of 14 tensors .* a share of 0\.86; 0\.9 is needed") as caught:
        adopt(path, out=tmp_path / "bundle", config=config())
    assert "levels.1.0.weight (found 3x3, needed 16x8x3x3x3)" in caught.value.message
    result = adopt(path, out=tmp_path / "bundle", config=config(min_share=0.8))
    assert any("2 tensors keep random weights" in sentence for sentence in result.sentences)
    origin = load_bundle(tmp_path / "bundle").passport.recipe["adopt"]
    assert origin["fresh"] == ["levels.0.1.norm1.weight", "levels.1.0.weight"]
    again = adopt(path, out=tmp_path / "again", config=config(min_share=0.8))
    first, second = (load_bundle(found.bundle).tensors for found in (result, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_layer_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    weights = state()
    del weights["convInit.conv.weight"]
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match="lacks the first layer"):
        adopt(path, out=tmp_path / "bundle", config=config())


def test_the_preparation_must_be_known_and_fit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give a preparation recipe"):
        adopt(checkpoint, out=tmp_path / "bundle", config=AdoptConfig.parse({"family": "monai_segresnet"}))
    with pytest.raises(ConfigError, match="3 dimensions and the preparation for 2"):
        adopt(checkpoint, out=tmp_path / "bundle", config=config(prepare={**PREPARE, "spatial_dims": 2}))
    with pytest.raises(ConfigError, match="3 numbers of at least 1"):
        adopt(checkpoint, out=tmp_path / "bundle", config=config(crop_voxels=[32, 32]))


def test_a_folder_that_is_no_bundle_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="is no bundle") as caught:
        adopt(checkpoint, out=tmp_path / "mine", config=config())
    assert caught.value.code == "E_OVERWRITE"
    adopt(checkpoint, out=tmp_path / "bundle", config=config())
    adopt(checkpoint, out=tmp_path / "bundle", config=config(), dry_run=True)


def test_a_run_is_fine_tuned_from_an_adopted_checkpoint(phantoms: Any, checkpoint: Path, tmp_path: Path) -> None:
    result = adopt(checkpoint, out=tmp_path / "bundle", config=config(prepare=tiny.PREPARE))
    recipe = tiny.shorter({**tiny.SEGMENT, "backbone": dict(result.backbone)}, 1)
    tuned = finetune(recipe, store=phantoms.store, out=tmp_path / "tuned", encoder=result.bundle)
    assert load_bundle(tuned.bundle).passport.kind == "segmenter"
    other = adopt(checkpoint, out=tmp_path / "other", config=config())
    with pytest.raises(CheckpointError, match="prepared with another spacing_mm"):
        finetune(recipe, store=phantoms.store, out=tmp_path / "refused", encoder=other.bundle)


def run(*arguments: object) -> int:
    return run_guarded(lambda: app([str(part) for part in arguments], standalone_mode=False))


def test_the_command_says_what_it_found(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text(json.dumps(PREPARE))
    arguments = ["adopt", checkpoint, "--as", "monai_segresnet", "--prepare", recipe, "-o", tmp_path / "bundle"]
    assert run(*arguments, "--dry-run") == 0
    assert not (tmp_path / "bundle").exists()
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "14 of 14 tensors of the encoder were found (100.0%)" in said
    assert 'backbone: {"name": "segresnet", "channels": [8, 16], "blocks": [1, 1]}' in said
    assert "licence: not stated in the file" in said
    assert run("adopt", checkpoint, "--as", "list", "-o", tmp_path / "other") == ExitCode.USAGE
    assert "voco_swin" in capsys.readouterr().err
    assert run("adopt", checkpoint, "--as", "resnet", "-o", tmp_path / "other") == ExitCode.INTEGRITY
