"""The predict command: on the scan's own grid, one bad scan alone, resumable, and honest in its ledger."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import dicoms
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from medssl.cli import app, run_guarded
from medssl.config import load_yaml
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.errors import CheckpointError, ConfigError, EnvironmentFaultError, ExitCode, NoInputError
from medssl.evaluation import predict as module
from medssl.evaluation.components import NAME, Rule, write_rules
from medssl.evaluation.ensemble import open_members, weight_digests
from medssl.evaluation.predict import predict, score_stored
from medssl.ledger import Outcome
from medssl.nn.backbone import build_backbone
from medssl.nn.bundle import Passport, save_bundle
from medssl.runfolder import read_journal
from medssl.tasks.segmentation import Config, Segmentation

PLAIN = {
    "intensity": {"mode": "none"},
    "body_mask": {"mode": "none"},
    "crop": {"mode": "none"},
}
AFFINE = np.array([[0.0, -1.5, 0.0, 40.0], [1.0, 0.0, 0.0, -30.0], [0.0, 0.0, 2.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


def bundle(folder: Path, *, spatial_dims: int = 3, in_channels: int = 1, **changes: Any) -> Path:
    """A bundle with random weights for labels 0, 5 and 300."""
    torch.manual_seed(0)
    encoder = build_backbone(
        {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
        in_channels=in_channels,
        spatial_dims=spatial_dims,
    )
    crop = [8, 8, 8] if spatial_dims == 3 else [8, 8, 1]
    config = Config.parse({"crop_voxels": crop, "augment": {"preset": "none"}})
    task = Segmentation(config, encoder=encoder, label_values=(5, 300), seed=0)
    fields = {
        "kind": "segmenter",
        "backbone": encoder.config,
        "spatial_dims": spatial_dims,
        "in_channels": in_channels,
        "decoder": task.decoder_config(),
        "label_values": list(task.label_values),
        "prepare": PLAIN,
        "unit": "arbitrary",
        "crop_voxels": crop,
        "recipe": {"task": {"name": "segmentation", **config.to_dict()}},
        "method": "segmentation",
        "data_fingerprint": "0",
        **changes,
    }
    save_bundle(folder, task.bundle_modules(), Passport.parse(fields))
    return folder


def save_scan(path: Path, *, seed: int = 0, shape: tuple[int, ...] = (10, 9, 8), affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.random.default_rng(seed).normal(size=shape).astype(np.float32), affine)
    image.header["descrip"] = b"DOE^JANE 1970-01-01"
    image.set_qform(affine, code=1)
    nibabel.save(image, path)
    return path


def threshold(x: torch.Tensor) -> torch.Tensor:
    """An oracle: class 2 above 1, class 1 above 0."""
    return torch.cat((-x, 0.5 - (x - 0.5).abs(), x - 1), dim=1)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put the oracle in the network's place; the list counts its calls."""
    calls: list[int] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return threshold(x)

    monkeypatch.setattr(module, "load_ensemble", lambda *_, **__: run)
    return calls


def test_each_scan_gets_the_original_label_values_on_its_own_grid(tmp_path: Path, oracle: list[int]) -> None:
    scans = tmp_path / "scans"
    save_scan(scans / "a.nii.gz", seed=1)
    save_scan(scans / "deep" / "b.nii", seed=2, affine=np.diag((-1.0, 1.0, 3.0, 1.0)))
    (scans / "notes.txt").write_text("x")
    (scans / ".hidden.nii").write_bytes(b"x")
    result = predict(bundle(tmp_path / "bundle"), scans, out=tmp_path / "out", overlap=0.25)
    assert result.ledger.counts() == {
        "seen": 3, "accepted": 2, "accepted with warning": 0, "rejected": 0, "duplicate": 0, "ignored": 1,
    }  # fmt: skip
    assert result.outputs == (tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "b.nii.gz")
    for path, output in zip((scans / "a.nii.gz", scans / "deep" / "b.nii"), result.outputs, strict=True):
        scan, labels = nibabel.load(path), nibabel.load(output)
        values = np.asarray(scan.dataobj)
        expected = np.where(values > 0, 5, 0)
        expected[(values - 1) > 0.5 - np.abs(values - 0.5)] = 300
        assert np.array_equal(np.asarray(labels.dataobj), expected)
        for name in ("srow_x", "srow_y", "srow_z", "pixdim", "quatern_b", "qoffset_x", "qform_code", "sform_code"):
            assert labels.header[name].tobytes() == scan.header[name].tobytes()
        assert labels.get_data_dtype() == np.uint16
        assert b"DOE" not in gzip.decompress(output.read_bytes())


def test_tables_recipe_and_journal_are_left_without_names_of_patients(tmp_path: Path, oracle: list[int]) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    predict(bundle(tmp_path / "bundle"), scan, out=tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table["item"]) == ["a.nii.gz"]
    counts = dict(part.split(":") for part in table["voxels"][0].split())
    assert set(counts) == {"0", "5", "300"}
    assert sum(map(int, counts.values())) == 10 * 9 * 8
    recipe = load_yaml(tmp_path / "out" / "recipe.yaml")
    assert recipe["overlap"] == 0.5
    assert recipe["device"] == "cpu" or torch.cuda.is_available()
    lines = read_journal(tmp_path / "out" / "journal.jsonl")
    assert [line.get("event", line.get("command")) for line in lines] == ["predicted", "predict"]
    assert not (tmp_path / "out" / ".lock").exists()
    for path in (tmp_path / "out").iterdir():
        assert b"DOE" not in path.read_bytes()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_real_bundle_labels_every_voxel(tmp_path: Path, spatial_dims: int) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    model = bundle(tmp_path / "bundle", spatial_dims=spatial_dims, prepare={**PLAIN, "region": "tissue"})
    result = predict(model, [scan], out=tmp_path / "out", mirror_axes=("AP",), device="cpu", batch=3)
    labels = np.asarray(nibabel.load(result.outputs[0]).dataobj)
    assert labels.shape == (10, 9, 8)
    assert set(np.unique(labels)) <= {0, 5, 300}


def test_a_2d_network_sees_slices_as_they_are(tmp_path: Path) -> None:
    """Slices predicted alone equal the volume predicted at once."""
    model = bundle(tmp_path / "bundle", spatial_dims=2)
    whole = save_scan(tmp_path / "whole.nii.gz", affine=np.eye(4))
    voxels = np.asarray(nibabel.load(whole).dataobj)
    predict(model, whole, out=tmp_path / "out", device="cpu")
    labels = np.asarray(nibabel.load(tmp_path / "out" / "whole.nii.gz").dataobj)
    for z in (0, 5):
        nibabel.save(nibabel.Nifti1Image(voxels[:, :, z : z + 1], np.eye(4)), tmp_path / f"s{z}.nii.gz")
        predict(model, tmp_path / f"s{z}.nii.gz", out=tmp_path / "out", device="cpu")
        one = np.asarray(nibabel.load(tmp_path / "out" / f"s{z}.nii.gz").dataobj)
        assert np.array_equal(one.reshape(10, 9), labels[:, :, z])


def test_a_bad_scan_is_refused_and_the_others_go_on(tmp_path: Path, oracle: list[int]) -> None:
    scans = tmp_path / "scans"
    save_scan(scans / "good.nii.gz")
    whole = save_scan(scans / "cut.nii.gz", seed=3).read_bytes()
    (scans / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    save_scan(scans / "moving.nii.gz", shape=(6, 6, 6, 3))
    result = predict(bundle(tmp_path / "bundle"), scans, out=tmp_path / "out")
    assert [path.name for path in result.outputs] == ["good.nii.gz"]
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED
    refused = pd.read_csv(tmp_path / "out" / "refused.csv").set_index("item")
    assert set(refused.index) == {"cut.nii.gz", "moving.nii.gz"}
    assert refused["code"].str.startswith("E_").all()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["good.nii.gz"]


def test_images_of_another_channel_count_are_refused(tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    result = predict(bundle(tmp_path / "bundle", in_channels=2), scan, out=tmp_path / "out")
    (entry,) = result.ledger
    assert entry.code == "E_CONTRACT"
    assert "1 channels; the bundle was trained on 2" in entry.reason
    assert result.ledger.exit_code() is ExitCode.NO_INPUT


def test_finished_scans_are_skipped_and_damaged_ones_made_again(tmp_path: Path, oracle: list[int]) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for name in ("a", "b", "c"):
        save_scan(scans / f"{name}.nii.gz", seed=ord(name))
    model = bundle(tmp_path / "bundle")
    predict(model, scans, out=out)
    first = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    windows = len(oracle)

    (out / "b.nii.gz").write_bytes(b"damaged")
    (out / "c.nii.gz").unlink()
    result = predict(model, scans, out=out)
    assert len(oracle) == windows + 2 * windows // 3
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == first
    assert result.ledger.count(Outcome.ACCEPTED) == 3
    assert len(pd.read_csv(out / "predictions.csv")) == 3

    predict(model, scans, out=out)
    assert len(oracle) == windows + 2 * windows // 3
    save_scan(scans / "a.nii.gz", seed=99)
    predict(model, scans, out=out)
    assert (out / "a.nii.gz").read_bytes() != first["a.nii.gz"]
    count = len(oracle)
    predict(model, scans, out=out, overlap=0.0)
    assert len(oracle) > count  # other settings, other results


def test_a_dry_run_names_the_outputs_and_writes_nothing(tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    result = predict(bundle(tmp_path / "bundle"), scan, out=tmp_path / "out", dry_run=True)
    assert result.outputs == (tmp_path / "out" / "a.nii.gz",)
    assert result.ledger.count(Outcome.ACCEPTED) == 1
    assert not (tmp_path / "out").exists()


def test_names_that_would_be_written_to_one_file_are_refused_before_anything_is_written(
    tmp_path: Path, oracle: list[int]
) -> None:
    scans = tmp_path / "scans"
    for name in ("x/scan.nii.gz", "y/SCAN.nii", "other.nii.gz"):
        save_scan(scans / name)
    result = predict(bundle(tmp_path / "bundle"), scans, out=tmp_path / "out")
    assert [entry.code for entry in result.ledger if entry.outcome is Outcome.REJECTED] == ["E_NAME_CLASH"] * 2
    assert [path.name for path in result.outputs] == ["other.nii.gz"]


def test_missing_repeated_and_overwritten_inputs_are_booked_or_refused(tmp_path: Path, oracle: list[int]) -> None:
    scan = save_scan(tmp_path / "scans" / "a.nii.gz")
    model = bundle(tmp_path / "bundle")
    result = predict(model, [scan, scan, tmp_path / "gone.nii"], out=tmp_path / "out", dry_run=True)
    outcomes = [entry.outcome for entry in result.ledger]
    assert sorted(outcomes) == sorted([Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.REJECTED])
    with pytest.raises(NoInputError, match="no image found"):
        predict(model, tmp_path / "bundle", out=tmp_path / "out")
    before = scan.read_bytes()
    with pytest.raises(ConfigError, match="would overwrite 1 of the scans") as error:
        predict(model, scan, out=scan.parent)
    assert error.value.code == "E_OVERWRITE"
    assert scan.read_bytes() == before


def test_the_output_folder_inside_the_input_folder_is_not_an_input(tmp_path: Path, oracle: list[int]) -> None:
    save_scan(tmp_path / "scans" / "a.nii.gz")
    model = bundle(tmp_path / "bundle")
    for _ in range(2):
        result = predict(model, tmp_path / "scans", out=tmp_path / "scans" / "out")
        assert result.ledger.counts()["seen"] == 1


def test_a_file_without_spacing_needs_one_said_where_the_bundle_works_in_mm(tmp_path: Path, oracle: list[int]) -> None:
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, size=(9, 12), dtype=np.uint8)).save(path)
    model = bundle(tmp_path / "bundle", prepare={**PLAIN, "spacing_mm": [1.0, 1.0, 1.0]})
    (entry,) = predict(model, path, out=tmp_path / "out").ledger
    assert entry.code == "E_NO_SPACING"
    result = predict(model, path, out=tmp_path / "out", assume_spacing_mm=(0.5, 0.5, 1.0))
    assert result.ledger.counts()["rejected"] == 0
    assert nibabel.load(result.outputs[0]).shape[:2] == (12, 9)
    free = bundle(tmp_path / "free")
    (entry,) = predict(free, path, out=tmp_path / "out2").ledger
    assert entry.outcome is Outcome.WARNED


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, MemoryError])
def test_short_memory_tries_single_windows_and_then_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    model = bundle(tmp_path / "bundle")
    limit = [1]

    def run(x: torch.Tensor) -> torch.Tensor:
        if len(x) > limit[0]:
            raise fault("full")
        return threshold(x)

    monkeypatch.setattr(module, "load_ensemble", lambda *_, **__: run)
    assert len(predict(model, scan, out=tmp_path / "out", batch=4).outputs) == 1
    limit[0] = 0
    (entry,) = predict(model, scan, out=tmp_path / "other", batch=4).ledger
    assert (entry.code, entry.outcome) == ("E_MEMORY", Outcome.REJECTED)
    assert "out of memory" in entry.reason
    assert not list((tmp_path / "other").glob("*.nii.gz"))


@pytest.mark.parametrize(("fault", "code"), [(MemoryError, "E_MEMORY"), (ZeroDivisionError, "E_UNEXPECTED")])
def test_whatever_happens_to_one_scan_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: list[int], fault: type[Exception], code: str
) -> None:
    segment = module.segment_volume

    def fail_on_the_large(volume: Any, *arguments: Any, **options: Any) -> Any:
        if volume.geometry.shape[0] > 10:
            raise fault
        return segment(volume, *arguments, **options)

    monkeypatch.setattr(module, "segment_volume", fail_on_the_large)
    save_scan(tmp_path / "scans" / "a.nii.gz", shape=(12, 9, 8))
    save_scan(tmp_path / "scans" / "b.nii.gz")
    result = predict(bundle(tmp_path / "bundle"), tmp_path / "scans", out=tmp_path / "out")
    assert [(entry.item, entry.code) for entry in result.ledger] == [("a.nii.gz", code), ("b.nii.gz", "")]
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED


def test_links_pipes_and_names_that_are_too_long_are_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: list[int]
) -> None:
    scans = tmp_path / "scans"
    save_scan(scans / "a.nii.gz")
    save_scan(tmp_path / "far" / "b.nii.gz")
    save_scan(scans / f"{'n' * 250}.nii")
    (scans / "more").symlink_to(tmp_path / "far")
    (scans / "dangling.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    os.mkfifo(scans / "pipe.nii.gz")
    (scans / "shut").mkdir()
    scandir = os.scandir

    def forbid(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    result = predict(bundle(tmp_path / "bundle"), scans, out=tmp_path / "out")
    assert {entry.item[:20]: entry.code for entry in result.ledger} == {
        "a.nii.gz": "",
        "more": "E_LINK",
        "dangling.nii.gz": "E_READ",
        "pipe.nii.gz": "E_NOT_REGULAR",
        "shut": "E_PERMISSION",
        "n" * 20: "E_NAME",
    }


def test_a_map_of_an_earlier_bundle_goes_when_its_scan_is_refused_now(tmp_path: Path, oracle: list[int]) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for name in ("a", "b"):
        save_scan(scans / f"{name}.nii.gz", seed=ord(name))
    predict(bundle(tmp_path / "one"), scans, out=out)
    (out / "b.nii.gz").write_bytes(b"drawn by hand")
    for name in ("a", "b"):
        (scans / f"{name}.nii.gz").write_bytes((scans / f"{name}.nii.gz").read_bytes()[:300])
    save_scan(scans / "c.nii.gz")
    two = bundle(tmp_path / "two", prepare={**PLAIN, "spacing_mm": [2.0, 2.0, 2.0]})
    result = predict(two, scans, out=out)
    assert result.ledger.counts()["rejected"] == 2
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["b.nii.gz", "c.nii.gz"]
    assert (out / "b.nii.gz").read_bytes() == b"drawn by hand"


def test_an_empty_label_map_is_made_again(tmp_path: Path, oracle: list[int]) -> None:
    scan, model = save_scan(tmp_path / "a.nii.gz"), bundle(tmp_path / "bundle")
    predict(model, scan, out=tmp_path / "out")
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"")
    result = predict(model, scan, out=tmp_path / "out")
    assert result.ledger.counts()["accepted"] == 1
    assert (tmp_path / "out" / "a.nii.gz").stat().st_size > 0


def test_an_mha_without_spacing_needs_one_said(tmp_path: Path, oracle: list[int]) -> None:
    lines = (
        "ObjectType = Image",
        "NDims = 3",
        "DimSize = 10 9 8",
        "ElementType = MET_FLOAT",
        "ElementDataFile = LOCAL",
    )
    voxels = np.random.default_rng(0).normal(size=(8, 9, 10)).astype("<f4").tobytes()
    (tmp_path / "a.mha").write_bytes("".join(f"{line}\n" for line in lines).encode() + voxels)
    model = bundle(tmp_path / "bundle", prepare={**PLAIN, "spacing_mm": [2.0, 2.0, 2.0]})
    (entry,) = predict(model, tmp_path / "a.mha", out=tmp_path / "out").ledger
    assert entry.code == "E_NO_SPACING"
    result = predict(model, tmp_path / "a.mha", out=tmp_path / "out", assume_spacing_mm=(1.0, 1.0, 2.0))
    assert result.ledger.counts()["rejected"] == 0


def test_the_command_line_takes_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: list[int]
) -> None:
    given: dict[str, Any] = {}

    def note(*_: Any, **options: Any) -> Any:
        given.update(options)
        return predict(*_, **options)

    monkeypatch.setattr(module, "predict", note)
    scan = save_scan(tmp_path / "a.nii.gz")
    model = bundle(tmp_path / "bundle", prepare={**PLAIN, "region": "tissue"})
    words = ["predict", model, scan, "-o", tmp_path / "out", "--xform", "qform", "--assume-spacing", "1", "1", "2.5"]
    words += ["--set", "batch=3", "--set", "mirror_axes=[AP]", "--overlap", "0.25"]
    assert run_guarded(lambda: app([str(word) for word in words], standalone_mode=False)) == 0
    assert given == {
        "out": tmp_path / "out", "device": "auto", "dry_run": False, "overlap": 0.25, "batch": 3,
        "mirror_axes": ("AP",), "xform": "qform", "assume_spacing_mm": (1.0, 1.0, 2.5), "layout": "even",
        "skip_empty": True, "precision": "fp32", "channels_last": False, "postprocess": True,
    }  # fmt: skip
    assert run_guarded(lambda: app([*map(str, words), "--set", "overlap=2"], standalone_mode=False)) == 2


def test_a_full_disk_ends_the_command_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: list[int]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise EnvironmentFaultError("no space left", code="E_DISK_FULL")

    scan = save_scan(tmp_path / "a.nii.gz")
    monkeypatch.setattr(module, "write_volume", full)
    with pytest.raises(EnvironmentFaultError, match="no space"):
        predict(bundle(tmp_path / "bundle"), scan, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_damaged_bundle_an_encoder_and_an_unknown_device_are_refused(tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    model = bundle(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="device quantum"):
        predict(model, scan, out=tmp_path / "out", device="quantum")
    weights = model / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError) as error:
        predict(model, scan, out=tmp_path / "out")
    assert error.value.exit_code is ExitCode.INTEGRITY
    encoder = bundle(tmp_path / "encoder", kind="encoder", decoder=None, label_values=None)
    with pytest.raises(CheckpointError, match="medssl finetune"):
        predict(encoder, scan, out=tmp_path / "out")
    without = bundle(tmp_path / "without", label_values=[1, 2, 3])
    with pytest.raises(CheckpointError, match="background 0"):
        score_stored(without, stored_cases(tmp_path), nsd_tolerance_mm=1.0)


def stored_cases(folder: Path, *, spacing: list[float] | None = None) -> Any:
    """Two labelled cases, one of them of a subject with two scans."""
    rows = ["case_id,subject_id,image,label"]
    for index, name in enumerate(("one", "two")):
        scan = save_scan(folder / "raw" / f"{name}.nii.gz", seed=index)
        values = np.asarray(nibabel.load(scan).dataobj)
        label = np.zeros(values.shape, np.uint16)
        label[values > 0] = 5
        label[(values - 1) > 0.5 - np.abs(values - 0.5)] = 300
        nibabel.save(nibabel.Nifti1Image(label, AFFINE), folder / "raw" / f"{name}_label.nii.gz")
        rows.append(f"{name},s1,raw/{name}.nii.gz,raw/{name}_label.nii.gz")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    config = PrepareConfig.parse({**PLAIN, "spacing_mm": spacing})
    result = prepare(config, cohort=folder / "cohort.csv", out=folder / "store", workers=1)
    return result.store.select(labelled=True)


def test_stored_cases_are_scored_on_their_source_grids(tmp_path: Path, oracle: list[int]) -> None:
    cases = stored_cases(tmp_path)
    table = score_stored(bundle(tmp_path / "bundle"), cases, nsd_tolerance_mm=1.0)
    assert list(table.columns[:4]) == ["case_id", "subject_id", "label", "presence"]
    assert list(zip(table["case_id"], table["label"], strict=True)) == [
        ("one", 5), ("one", 300), ("two", 5), ("two", 300),
    ]  # fmt: skip
    assert (table["dice"] == 1).all()
    assert (table["hd95_mm"] == 0).all()
    voxel_ml = 1.5 * 1.0 * 2.0 / 1000
    values = np.asarray(nibabel.load(tmp_path / "raw" / "one_label.nii.gz").dataobj)
    assert table["reference_ml"][0] == pytest.approx((values == 5).sum() * voxel_ml)
    assert json.loads(table.to_json(orient="records"))[0]["presence"] == "both"


def test_a_dicom_folder_gets_label_maps_on_the_grid_of_its_series_and_is_skipped_when_done(
    tmp_path: Path, oracle: list[int]
) -> None:
    def centred(found: list[Any]) -> None:
        for ds in found:
            ds.RescaleIntercept, ds.RescaleSlope = "-240", "0.01"

    dicoms.write_series(tmp_path / "d/a", series="a", modality="MR", mutate=centred)
    dicoms.write_series(tmp_path / "d/b", series="b", modality="MR", spacing=(1.5, 1.5, 3.0), origin=(9.0, 9.0, 9.0))
    model, out = bundle(tmp_path / "bundle"), tmp_path / "out"
    first = predict(model, tmp_path / "d", out=out, overlap=0.25)
    assert first.ledger.count(Outcome.ACCEPTED) + first.ledger.count(Outcome.WARNED) == 2
    grids = [dicoms.series_geometry(), dicoms.series_geometry(spacing=(1.5, 1.5, 3.0), origin=(9.0, 9.0, 9.0))]
    written = [nibabel.load(path) for path in first.outputs]
    for expected in grids:
        assert any(np.allclose(image.affine, expected.affine, atol=1e-4) for image in written)
    calls = len(oracle)
    again = predict(model, tmp_path / "d", out=out, overlap=0.25)
    assert len(oracle) == calls
    assert again.outputs == first.outputs
    for path in out.rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes().lower()


def test_a_table_of_a_scan_gets_label_maps_named_by_case(tmp_path: Path, oracle: list[int]) -> None:
    save_scan(tmp_path / "d/a.nii.gz", seed=1)
    save_scan(tmp_path / "d/time.nii.gz", seed=2, shape=(10, 9, 8, 2))
    found = scan(tmp_path / "d", tmp_path / "cohort", config=ScanConfig(workers=1, volumes="all"))
    result = predict(bundle(tmp_path / "bundle"), found.path, out=tmp_path / "out")
    assert {path.name for path in result.outputs} == {f"{case.case_id}.nii.gz" for case in found.cohort}
    by_volume = {case.reading.volume: tmp_path / "out" / f"{case.case_id}.nii.gz" for case in found.cohort}
    values = np.asarray(nibabel.load(tmp_path / "d/time.nii.gz").dataobj)
    for number in (0, 1):
        labels = np.asarray(nibabel.load(by_volume[number]).dataobj)
        np.testing.assert_array_equal(labels > 0, values[..., number] > 0)
    calls = len(oracle)
    predict(bundle(tmp_path / "bundle"), found.path, out=tmp_path / "out")
    assert len(oracle) == calls


@pytest.mark.parametrize("is_inside", [False, True])
def test_an_archive_is_opened_and_read_and_nothing_of_it_stays(
    tmp_path: Path, oracle: list[int], is_inside: bool
) -> None:
    files = dicoms.write_series(tmp_path / "raw", modality="MR", slope=None)
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d/x.zip", "w") as archive:
        for file in files:
            archive.write(file, f"Doe/{file.name}")
        archive.write(save_scan(tmp_path / "b.nii.gz"), "Doe/b.nii.gz")
        archive.writestr("Doe/cut.nii.gz", b"\x1f\x8b")
    scans, out, model = tmp_path / "d" if is_inside else tmp_path / "d/x.zip", tmp_path / "out", bundle(tmp_path / "m")
    dry = predict(model, scans, out=out, dry_run=True)
    assert not out.exists()
    first = predict(model, scans, out=out)
    assert len(first.outputs) == len(dry.outputs) - 1 == 2
    assert "b.nii.gz" in {path.name for path in first.outputs}
    (refused,) = [entry for entry in first.ledger if entry.outcome is Outcome.REJECTED]
    assert refused.reason.startswith("x.zip/Doe/cut.nii.gz: ")
    assert not list(out.glob(".tmp-*"))
    runs = len(oracle)
    assert predict(model, scans, out=out).outputs == first.outputs
    assert len(oracle) == runs


def test_images_of_another_modality_and_labels_are_not_segmented(tmp_path: Path, oracle: list[int]) -> None:
    dicoms.write_series(tmp_path / "d/ct", series="ct", modality="CT")
    dicoms.write_series(tmp_path / "d/mr", series="mr", modality="MR")
    save_scan(tmp_path / "d/a.nii.gz")
    save_scan(tmp_path / "d/a_label.nii.gz")
    model = bundle(tmp_path / "bundle", prepare={**PLAIN, "modality": "MR"})
    result = predict(model, tmp_path / "d", out=tmp_path / "out")
    refused = [entry for entry in result.ledger if entry.outcome is Outcome.REJECTED]
    assert [(entry.code, "an image of CT" in entry.reason) for entry in refused] == [("E_MODALITY", True)]
    assert [entry.item for entry in result.ledger if entry.outcome is Outcome.IGNORED] == ["a_label.nii.gz"]
    assert len(result.outputs) == 2
    assert len(predict(model, tmp_path / "d/a_label.nii.gz", out=tmp_path / "one").outputs) == 1


MASKED = {**PLAIN, "body_mask": {"mode": "threshold", "threshold": 0.0}}


def test_windows_outside_the_body_are_left_out_of_scans_and_stored_cases(tmp_path: Path, oracle: list[int]) -> None:
    values = np.full((40, 8, 8), -5.0, np.float32)
    values[30:38] = np.random.default_rng(0).uniform(0.1, 3, (8, 8, 8))
    (tmp_path / "raw").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "raw" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image((values > 0).astype(np.uint16) * 5, np.eye(4)), tmp_path / "raw" / "l.nii.gz")
    model = bundle(tmp_path / "bundle", prepare=MASKED)
    windows, maps = [], []
    for skip in (True, False):
        oracle.clear()
        result = predict(model, tmp_path / "raw" / "a.nii.gz", out=tmp_path / "out", skip_empty=skip)
        windows.append(sum(oracle))
        maps.append(np.asarray(nibabel.load(result.outputs[0]).dataobj))
    assert windows == [3, 9]  # they begin at 0, 4, ..., 32, and the body, 30 to 37, is seen from 24, 28 and 32
    assert np.array_equal(*maps)
    (tmp_path / "cohort.csv").write_text("case_id,subject_id,image,label\none,s1,raw/a.nii.gz,raw/l.nii.gz\n")
    config = PrepareConfig.parse({**MASKED, "spacing_mm": [2.0, 1.0, 1.0]})
    store = prepare(config, cohort=tmp_path / "cohort.csv", out=tmp_path / "store", workers=1).store
    assert store is not None
    oracle.clear()
    assert len(score_stored(model, store.cases, nsd_tolerance_mm=1.0)) == 2
    assert sum(oracle) == 2  # of 20 planes, the body is in 15 to 18: windows at 8 and 12


def test_several_bundles_are_an_ensemble_and_its_rules_are_applied(tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "a.nii.gz")
    models = [bundle(tmp_path / "both" / name) for name in "ab"]
    words = ["predict", *models, scan, "-o", tmp_path / "out", "--device", "cpu"]
    assert run_guarded(lambda: app([str(word) for word in words], standalone_mode=False)) == 0
    plain = np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    alone = np.asarray(nibabel.load(predict(models[0], scan, out=tmp_path / "one", device="cpu").outputs[0]).dataobj)
    assert (plain == alone).mean() > 0.9  # twins; but a mean of probabilities is not one of scores
    value = int(np.unique(plain[plain > 0])[0])
    rules = {value: Rule(min_ml=1000.0)}
    write_rules(tmp_path / "both" / NAME, rules, weights=weight_digests(open_members(tmp_path / "both")))
    predict(tmp_path / "both", scan, out=tmp_path / "out", device="cpu")
    cleaned = np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert np.array_equal(cleaned, np.where(plain == value, 0, plain))
    predict(tmp_path / "both", scan, out=tmp_path / "out", device="cpu", postprocess=False)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj), plain)
    (tmp_path / "both" / NAME).rename(models[0] / NAME)
    with pytest.raises(CheckpointError, match="other weights"):
        predict(models[0], scan, out=tmp_path / "one", device="cpu")
