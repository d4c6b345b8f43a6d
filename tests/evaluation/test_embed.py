"""Embedding a store: the right voxels, the mean of the pyramid, the same every time, one bad case alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from stores import PREPARE, Image, write_store

from medssl.cli import app, run_guarded
from medssl.data.store import ArrayStore, entry_folder
from medssl.errors import CheckpointError, ConfigError, NoInputError, ReadError
from medssl.evaluation.embed import EmbedConfig, embed, places
from medssl.evaluation.embeddings import Embeddings, unit_vectors
from medssl.nn.backbone import build_backbone
from medssl.nn.bundle import Passport, load_bundle, save_bundle

BACKBONE = {"name": "unet", "channels": [4, 8], "strides": [1, 2], "blocks": [1, 1]}


def encoder_bundle_of(folder: Path, *, spatial_dims: int = 3, **changes: Any) -> Path:
    """Random weights; windows of 6 voxels, and no recipe unless one is given."""
    torch.manual_seed(0)
    encoder = build_backbone(BACKBONE, in_channels=changes.get("in_channels", 1), spatial_dims=spatial_dims)
    fields = {
        "kind": "encoder", "backbone": encoder.config, "spatial_dims": spatial_dims, "in_channels": 1,
        "prepare": PREPARE, "unit": "arbitrary", "crop_voxels": [6] * spatial_dims, "recipe": {}, "method": "none",
        "data_fingerprint": "0", **changes,
    }  # fmt: skip
    save_bundle(folder, {"encoder": encoder}, Passport.parse(fields))
    return folder


def volumes(count: int = 3, shape: tuple[int, ...] = (14, 13, 12)) -> list[Image]:
    rng = np.random.default_rng(0)
    splits = itertools.cycle(("train", "test"))
    return [
        Image(f"case_{k}", rng.normal(size=(1, *shape)).astype(np.float32), f"s_{k}", next(splits))
        for k in range(count)
    ]


def config(**given: Any) -> EmbedConfig:
    return EmbedConfig.parse({"device": "cpu", **given})


def by_hand(encoder: torch.nn.Module, crop: np.ndarray) -> np.ndarray:
    """Mean over space of every level, in float64."""
    with torch.no_grad():
        levels = encoder(torch.from_numpy(np.ascontiguousarray(crop, np.float32))[None])
    return np.concatenate([level[0].double().flatten(1).mean(dim=1).numpy() for level in levels])


def test_a_patch_is_the_pooled_pyramid_of_the_voxels_at_its_place(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes()), encoder_bundle_of(tmp_path / "bundle")
    result = embed(bundle, store=store, out=tmp_path / "e.parquet", config=config(level="patch", crops=5))
    found, encoder = Embeddings.read(result.path), load_bundle(bundle).build_encoder().eval()
    assert found.vectors.shape == (result.rows, result.dimensions) == (15, 12)
    cases = {case.case_id: case for case in ArrayStore.open(store).cases}
    for row, vector in zip(found.table.to_dict("records"), found.vectors, strict=True):
        case = cases[row["case_id"]]
        world = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
        centre = (world - (-7.0, 11.0, 3.0)) / (1.0, 1.5, 2.0)
        start = np.rint(centre + 0.5 - 3).astype(int)
        assert np.allclose(start, centre + 0.5 - 3)
        assert np.allclose(vector, by_hand(encoder, case.read("image", start.tolist(), (6, 6, 6))), atol=1e-5)
        body = (centre + 0.5 - 1) / np.subtract(case.shape, 2)
        assert np.allclose([row["body_lr"], row["body_ap"], row["body_si"]], body)
    assert set(found.table["split"]) == {"train", "test"}


def test_a_volume_is_the_mean_of_its_patches_at_the_middle_of_the_body(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes()), encoder_bundle_of(tmp_path / "bundle")
    for crops in (5, 64):
        tables = {}
        for level in ("patch", "volume"):
            out = tmp_path / f"{level}.parquet"
            embed(bundle, store=store, out=out, config=config(level=level, crops=crops, batch=3))
            tables[level] = Embeddings.read(out)
        merged = tables["patch"].by_case()
        assert np.allclose(merged.vectors, tables["volume"].vectors, atol=1e-5)
        assert tables["volume"].table["windows"].tolist() == [min(crops, 2 * 2 * 2)] * 3
        assert np.allclose(tables["volume"].table[["body_lr", "body_ap", "body_si"]], 0.5)


def test_slices_follow_each_other_along_the_plane_that_was_asked_for(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes(1)), encoder_bundle_of(tmp_path / "bundle")
    for plane, column, count in (("axial", "z_mm", 10), ("sagittal", "x_mm", 12)):
        out = tmp_path / f"{plane}.parquet"
        embed(bundle, store=store, out=out, config=config(level="slice", plane=plane, every=2))
        table = Embeddings.read(out).table
        assert table["slice"].tolist() == list(range(1, 1 + count, 2))
        assert set(table["plane"]) == {plane}
        step = {"z_mm": 2.0, "x_mm": 1.0}[column]
        offset = {"z_mm": 3.0, "x_mm": -7.0}[column]
        assert np.allclose(table[column], offset + step * table["slice"])


def test_the_same_call_writes_the_same_bytes_and_says_where_they_come_from(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes()), encoder_bundle_of(tmp_path / "bundle")
    for name in ("a", "b"):
        embed(bundle, store=store, out=tmp_path / f"{name}.parquet", config=config())
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    plain = pq.read_table(tmp_path / "a.parquet")
    about = json.loads(plain.schema.metadata[b"medssl"])
    assert about["data_fingerprint"] == ArrayStore.open(store).fingerprint
    assert len(about["bundle_digest"]) == 64
    assert str(plain.schema.field("vector").type) == "list<element: float>"
    assert str(tmp_path) not in json.dumps(about)


def test_fresh_weights_are_another_network_and_the_same_for_a_seed(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes()), encoder_bundle_of(tmp_path / "bundle")
    found = {}
    for name, given in {"own": {}, "a": {"scratch": True, "seed": 4}, "b": {"scratch": True, "seed": 4}}.items():
        embed(bundle, store=store, out=tmp_path / "e.parquet", config=config(**given))
        found[name] = Embeddings.read(tmp_path / "e.parquet").vectors
    assert np.array_equal(found["a"], found["b"])
    assert not np.allclose(found["own"], found["a"], atol=1e-3)


def test_what_training_did_to_every_image_is_done_here_too(tmp_path: Path, phantoms: Any, model_bundle: Path) -> None:
    embed(model_bundle, store=phantoms.store, out=tmp_path / "e.parquet", config=config(split="val"))
    found = Embeddings.read(tmp_path / "e.parquet")
    assert found.about["bundle_kind"] == "segmenter"
    assert set(found.table["split"]) == {"val"}
    assert np.isfinite(found.vectors).all()


def test_the_windows_of_training_come_before_the_encoder(tmp_path: Path) -> None:
    image = Image("a", np.random.default_rng(0).uniform(-1200, 1200, (1, 6, 6, 6)).astype(np.float32))
    store = write_store(tmp_path / "store", [image])
    augment = [{"name": "multi_window", "windows": [[-1000.0, 0.0], [0.0, 400.0]], "p": 1.0}]
    method = {"name": "mae", "crop_voxels": [6, 6, 6], "block_voxels": [3, 3, 3], "augment": augment}
    bundle = encoder_bundle_of(
        tmp_path / "bundle", in_channels=2, image_channels=1, recipe={"method": method}, method="mae"
    )
    embed(bundle, store=store, out=tmp_path / "e.parquet", config=config())
    windowed = np.concatenate([np.clip((image.array + 1000) / 1000, 0, 1), np.clip(image.array / 400, 0, 1)])
    encoder = load_bundle(bundle).build_encoder().eval()
    assert np.allclose(Embeddings.read(tmp_path / "e.parquet").vectors[0], by_hand(encoder, windowed), atol=1e-5)


def test_pictures_go_through_a_flat_encoder(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [Image(f"p{k}", rng.normal(size=(1, 9, 8, 1)).astype(np.float32)) for k in range(2)]
    store = write_store(tmp_path / "store", images)
    bundle = encoder_bundle_of(tmp_path / "bundle", spatial_dims=2)
    embed(bundle, store=store, out=tmp_path / "e.parquet", config=config())
    found, encoder = Embeddings.read(tmp_path / "e.parquet"), load_bundle(bundle).build_encoder().eval()
    crops = [images[0].array[:, x : x + 6, 1:7, 0] for x in (1, 2)]
    assert np.allclose(found.vectors[0], np.mean([by_hand(encoder, crop) for crop in crops], axis=0), atol=1e-5)
    with pytest.raises(ConfigError, match="2D"):
        embed(bundle, store=store, out=tmp_path / "e.parquet", config=config(level="slice", plane="coronal"))
    embed(bundle, store=store, out=tmp_path / "s.parquet", config=config(level="slice"))
    assert Embeddings.read(tmp_path / "s.parquet").table["slice"].tolist() == [0, 0]


def test_another_voxel_size_is_met_in_mm_and_refused_where_none_is_known(tmp_path: Path) -> None:
    known, unknown = volumes(2)
    store = write_store(tmp_path / "store", [known, unknown._replace(warnings=["W_NO_SPACING: none."])])
    bundle = encoder_bundle_of(tmp_path / "bundle", spacing_mm=[2.0, 1.5, 2.0])
    result = embed(bundle, store=store, out=tmp_path / "e.parquet", config=config(crops=1))
    assert [entry.code for entry in result.ledger] == ["", "E_SPACING_UNKNOWN"]
    encoder = load_bundle(bundle).build_encoder().eval()
    start = np.floor(np.array([1, 1, 1]) + (np.array([12, 11, 10]) - (12, 6, 6)) * (1 / 2, 1 / 3, 1 / 5) + 0.5).astype(
        int
    )
    wide = known.array[:, start[0] : start[0] + 12, start[1] : start[1] + 6, start[2] : start[2] + 6]
    halved = wide.reshape(1, 6, 2, 6, 6).mean(axis=2)
    starts_at = Embeddings.read(result.path)
    assert starts_at.table["windows"].tolist() == [1]
    assert np.allclose(starts_at.vectors[0], by_hand(encoder, halved), atol=1e-5)
    same = encoder_bundle_of(tmp_path / "same", spacing_mm=[1.0, 1.5, 2.0])
    assert embed(same, store=store, out=tmp_path / "f.parquet", config=config()).ledger.counts()["accepted"] == 2
    table = Embeddings.read(tmp_path / "f.parquet").table
    assert table["x_mm"].isna().tolist() == [False, True]


def test_one_bad_case_is_told_and_the_others_are_embedded(tmp_path: Path) -> None:
    two = Image("two", np.zeros((2, 8, 8, 8), np.float32))
    broken = Image("broken", np.full((1, 8, 8, 8), np.inf, np.float32))
    store = write_store(tmp_path / "store", [*volumes(2), two, broken])
    damaged = ArrayStore.open(store).cases[0]
    (damaged.folder / "image.b2nd").write_bytes(b"x")
    result = embed(encoder_bundle_of(tmp_path / "bundle"), store=store, out=tmp_path / "e.parquet", config=config())
    assert [entry.code for entry in result.ledger] == ["E_DIGEST", "", "E_CONTRACT", "E_CASE"]
    assert Embeddings.read(result.path).table["case_id"].tolist() == ["case_1"]
    assert entry_folder(store, damaged.folder.name) == damaged.folder


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, bundle = write_store(tmp_path / "store", volumes()), encoder_bundle_of(tmp_path / "bundle")
    out = tmp_path / "out" / "e.parquet"
    other = write_store(tmp_path / "other", volumes(), prepare={**PREPARE, "modality": "CT"})
    with pytest.raises(CheckpointError, match="another modality"):
        embed(bundle, store=other, out=out, config=config())
    with pytest.raises(NoInputError, match="split val"):
        embed(bundle, store=store, out=out, config=config(split="val"))
    flat = write_store(tmp_path / "two", [Image("two", np.zeros((2, 8, 8, 8), np.float32))])
    with pytest.raises(NoInputError, match="none of 1"):
        embed(bundle, store=flat, out=out, config=config())
    assert embed(bundle, store=store, out=out, config=config(), dry_run=True).ledger.counts()["accepted"] == 3
    assert not out.parent.exists()


def test_a_file_that_embed_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot be read"):
        Embeddings.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("x")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "plain.parquet")
    for name in ("text", "plain"):
        with pytest.raises(ReadError) as caught:
            Embeddings.read(tmp_path / f"{name}.parquet")
        assert caught.value.code == "E_FORMAT"


def test_windows_cover_the_box_where_they_may_and_lie_in_it_where_they_are_few() -> None:
    low, length, size = np.array([3.0, 0.0, 2.0]), np.array([20.0, 7.0, 31.0]), np.array([8.0, 8.0, 10.0])
    every = places(low, length, size, most=12)
    assert len(every) == 3 * 1 * 4
    covered = np.zeros((40, 40, 40), bool)
    for x, y, z in (every + 1).astype(int):  # one voxel more, as the second axis begins before 0
        covered[x : x + 8, y : y + 8, z : z + 10] = True
    assert covered[4:24, 1:8, 3:34].all()
    few = places(low, length, size, most=7)
    assert len(few) == len(np.unique(few, axis=0)) == 7
    assert (few[:, [0, 2]] >= low[[0, 2]]).all()
    assert (few[:, [0, 2]] + size[[0, 2]] <= (low + length)[[0, 2]]).all()


def test_unit_vectors_forget_what_all_have_in_common() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(30, 6))
    shifted = np.hstack([1e4 + 3 * spread, np.full((30, 1), 7.0)])
    unit, other = unit_vectors(shifted[:20], others=[shifted[20:]])
    assert np.allclose(np.linalg.norm(np.vstack([unit, other]), axis=1), 1)
    scaled = (spread - spread.mean(axis=0)) / spread.std(axis=0)
    expected = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    assert np.allclose(np.vstack([unit, other])[:, :6], expected, atol=1e-6)


def test_from_a_bundle_to_an_answer_in_three_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, bundle = write_store(tmp_path / "store", volumes(8)), encoder_bundle_of(tmp_path / "bundle")
    table, facts = tmp_path / "e.parquet", tmp_path / "facts.csv"
    facts.write_text("case_id,kind\n" + "".join(f"case_{k},{'ab'[k // 2 % 2]}\n" for k in range(8)))

    def medssl(*words: object) -> int:
        return int(run_guarded(lambda: app([str(word) for word in words], standalone_mode=False)))

    assert medssl("embed", bundle, "--store", store, "-o", table, "--set", "device=cpu") == 0
    assert "8 vectors of 12 numbers" in capsys.readouterr().out
    assert medssl("probe", table, "--facts", facts, "--target", "kind", "-o", tmp_path / "probe") == 0
    assert "kind, linear: balanced accuracy" in capsys.readouterr().out
    assert medssl("similar", table, "--case", "case_3", "--top", 2, "-o", tmp_path / "s.html") == 0
    said = capsys.readouterr().out
    assert said.count("case_") == 2
    assert str(tmp_path / "s.html") in said
    assert medssl("similar", table, "--case", "x") == 2
    assert medssl("embed", bundle, "--store", store, "-o", table, "--level", "voxel") == 2
