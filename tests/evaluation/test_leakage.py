"""Leaks between two sets: planted copies of every kind are found, and different images are not taken for copies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from phantoms import REAL_DATA
from PIL import Image as Pillow
from scipy import ndimage
from stores import Image, write_store

from medssl.cli import app, run_guarded
from medssl.data.cohort import Case, Cohort
from medssl.data.store import ArrayStore
from medssl.errors import ConfigError, ExitCode, NoInputError, ReadError
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.leakage import LeaksConfig, leaks
from medssl.evaluation.signature import signature, similarities, threshold_of
from medssl.geometry import Geometry
from medssl.io import read_volume, write_volume
from medssl.volume import Volume

RNG_SHAPE = (22, 20, 18)


def body(seed: int, shape: tuple[int, ...] = RNG_SHAPE) -> np.ndarray:
    """A smooth image: what all have in common, and what is one subject's own."""
    rng = np.random.default_rng(seed)
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    common = 4 * np.exp(-2 * (axes**2).sum(axis=0))
    own = ndimage.gaussian_filter(rng.normal(size=shape), 2.0)
    return (common + own / own.std())[None].astype(np.float32)


def flipped(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1, :, ::-1].copy()


def rescaled(image: np.ndarray) -> np.ndarray:
    return (300 * np.exp(0.3 * (image - image.mean()) / image.std()) - 50).astype(np.float32)


def noisy(image: np.ndarray) -> np.ndarray:
    return image + np.random.default_rng(9).normal(scale=0.2 * image.std(), size=image.shape).astype(np.float32)


def re_encoded(image: np.ndarray) -> np.ndarray:
    low, high = image.min(), image.max()
    return np.round((image - low) / (high - low) * 255).astype(np.int16)


def resampled(image: np.ndarray) -> np.ndarray:
    return ndimage.zoom(image, (1, 0.8, 0.8, 1.25), order=1)


COPIES = {"flipped": flipped, "rescaled": rescaled, "noisy": noisy, "re-encoded": re_encoded, "resampled": resampled}


def two_stores(tmp_path: Path) -> tuple[Path, Path]:
    first = [Image(f"a{k}", body(k), f"first{k}") for k in range(12)]
    second = [Image(f"b{k}", body(100 + k), f"second{k}", "test") for k in range(12)]
    second += [Image(name, make(body(k)), f"copy{k}", "test") for k, (name, make) in enumerate(COPIES.items())]
    return write_store(tmp_path / "one", first), write_store(tmp_path / "two", second)


def test_each_planted_copy_is_found_with_its_original_and_nothing_else(tmp_path: Path) -> None:
    first, second = two_stores(tmp_path)
    found = leaks(first, second, out=tmp_path / "out")
    pairs = set(zip(found.table["case_a"], found.table["case_b"], strict=True))
    assert pairs == {(f"a{k}", name) for k, name in enumerate(COPIES)}
    assert set(found.table["evidence"]) == {"picture"}
    assert found.ledger.counts()["rejected"] == len(COPIES)
    assert found.ledger.exit_code() == ExitCode.SOME_REJECTED
    assert "5 of the 17 images" in found.sentences[0]
    written = pd.read_csv(tmp_path / "out" / "leaks.csv")
    assert (written["similarity"] >= written["threshold"]).all()
    near = pd.read_csv(tmp_path / "out" / "nearest.csv")
    assert len(near) == 17
    assert near["similarity"].is_monotonic_decreasing
    refused = pd.read_csv(tmp_path / "out" / "refused.csv")
    assert set(refused["code"]) == {"E_LEAK"}
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == len(COPIES) + 5


def test_the_same_subject_file_and_voxels_are_told_as_such(tmp_path: Path) -> None:
    image = body(0)
    first = write_store(tmp_path / "one", [Image("a", image, "s1", file="x"), Image("b", body(1), "s2", file="y")])
    second = write_store(
        tmp_path / "two",
        [Image("c", image, "s3", file="x"), Image("d", body(2), "s2", file="z"), Image("e", body(3), "s4", file="w")],
    )
    found = leaks(first, second, out=tmp_path / "out", config=LeaksConfig.parse({"shown": 0}))
    told = {(row.case_b, row.evidence) for row in found.table.itertuples()}
    assert {("c", "file"), ("c", "voxels"), ("c", "picture"), ("d", "subject")} == told
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


def test_two_splits_of_one_store_are_two_sets(tmp_path: Path) -> None:
    images = [Image(f"a{k}", body(k), split="train" if k < 6 else "test") for k in range(12)]
    images.append(Image("copy", flipped(body(2)), split="test"))
    store = write_store(tmp_path / "store", images)
    splits = {"split_a": "train", "split_b": "test"}
    found = leaks(store, store, out=tmp_path / "out", config=LeaksConfig.parse(splits))
    assert found.table[["case_a", "case_b"]].to_numpy().tolist() == [["a2", "copy"]]
    for given in ({}, {"split_a": "train", "split_b": "train"}):
        with pytest.raises(ConfigError) as caught:
            leaks(store, store, out=tmp_path / "x", config=LeaksConfig.parse(given))
        assert caught.value.code == "E_SAME_SET"
    with pytest.raises(NoInputError, match="split val"):
        leaks(store, store, out=tmp_path / "x", config=LeaksConfig.parse({**splits, "split_b": "val"}))


def cohort_of(folder: Path, images: dict[str, np.ndarray], *, ending: str = ".nii.gz") -> Path:
    folder.mkdir()
    cases = []
    for name, array in images.items():
        path = folder / f"{name}{ending}"
        write_volume(Volume(array, Geometry(array.shape[1:], np.diag([1.0, 1.5, 2.0, 1.0])), "arbitrary"), path)
        cases.append(Case(case_id=name, subject_id=name, image=str(path)))
    Cohort(cases).to_csv(folder / "cohort.csv")
    return folder / "cohort.csv"


def test_cohorts_are_compared_from_their_files_and_a_broken_one_is_told(tmp_path: Path) -> None:
    first = cohort_of(tmp_path / "one", {f"a{k}": body(k) for k in range(8)})
    second = cohort_of(tmp_path / "two", {"same": body(3), "other": body(50), "broken": body(51)}, ending=".nii")
    (tmp_path / "two" / "broken.nii").write_bytes(b"x")
    found = leaks(first, second, out=tmp_path / "out")
    told = {(row.case_a, row.case_b, row.evidence) for row in found.table.itertuples()}
    assert told == {("a3", "same", "voxels"), ("a3", "same", "picture")}, "the bytes of the files differ"
    codes = {entry.item: entry.code for entry in found.ledger}
    assert codes["b:same"] == "E_LEAK"
    assert codes["b:other"] == ""
    assert codes["b:broken"] not in {"", "E_LEAK"}
    store = write_store(tmp_path / "store", [Image("x", body(3))])
    assert any("prepared" in line for line in leaks(store, second, out=tmp_path / "mixed").sentences)


def embedded(path: Path, vectors: np.ndarray, prefix: str, **about: Any) -> Path:
    rows = {
        "case_id": [f"{prefix}{k}" for k in range(len(vectors))],
        "subject_id": [f"{prefix}{k}" for k in range(len(vectors))],
        "split": "train", "modality": "MR", "plane": None, "slice": None, "windows": 1,
        **dict.fromkeys(("x_mm", "y_mm", "z_mm", "body_lr", "body_ap", "body_si"), 0.0),
    }  # fmt: skip
    Embeddings(pd.DataFrame(rows), vectors.astype(np.float32), {"bundle_digest": "d", **about}).write(path)
    return path


def test_vectors_far_more_alike_than_neighbours_are_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = 10 + rng.normal(size=(30, 16)), 10 + rng.normal(size=(20, 16))
    b[4] = a[7] + 0.01 * rng.normal(size=16)
    first, second = embedded(tmp_path / "a.parquet", a, "a"), embedded(tmp_path / "b.parquet", b, "b")
    found = leaks(first, second, out=tmp_path / "out")
    assert found.table[["case_a", "case_b", "evidence"]].to_numpy().tolist() == [["a7", "b4", "embedding"]]
    assert "no pixels" in " ".join(found.sentences)
    other = embedded(tmp_path / "c.parquet", b, "c", bundle_digest="e")
    store = write_store(tmp_path / "store", [Image("x", body(3))])
    for second in (other, store):
        with pytest.raises(ConfigError) as caught:
            leaks(first, second, out=tmp_path / "x")
        assert caught.value.code == "E_KINDS"
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ReadError, match="is no store"):
        leaks(tmp_path / "text.txt", store, out=tmp_path / "x")


def test_a_dry_run_writes_nothing_and_the_command_ends_with_3_where_there_are_leaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two_stores(tmp_path)

    def medssl(*more: str) -> int:
        line = ["leaks", str(first), str(second), "-o", str(tmp_path / "out"), *more]
        return int(run_guarded(lambda: app(line, standalone_mode=False)))

    assert medssl("--dry-run") == ExitCode.OK
    assert not (tmp_path / "out").exists()
    assert medssl() == ExitCode.SOME_REJECTED
    assert "leaks.csv" in capsys.readouterr().out


def test_a_signature_is_the_same_in_every_orientation_and_under_every_rising_map() -> None:
    image = body(0, (32, 32, 32))
    plain = Volume(image, Geometry((32, 32, 32), np.eye(4)), "arbitrary")
    turned = Volume(
        np.ascontiguousarray(image[:, ::-1].transpose(0, 3, 1, 2)),
        Geometry((32, 32, 32), np.array([[0, -1.0, 0, 31], [0, 0, 1.0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]])),
        "arbitrary",
    )
    assert np.array_equal(signature(plain), signature(turned))
    blocks = image[0].reshape(16, 2, 16, 2, 16, 2).mean(axis=(1, 3, 5))
    order = np.argsort(np.argsort(blocks.ravel())).reshape(blocks.shape)
    assert (
        np.abs(signature(plain) - (order - order.mean())).max() <= 2
    )  # block means that are equal to 1e-6 share a rank
    empty = Volume(np.zeros((1, 8, 8, 1), np.float32), Geometry((8, 8, 1), np.eye(4)), "arbitrary")
    assert signature(empty).shape == (32, 32)
    assert not signature(empty).any()


def test_similarity_is_the_best_correlation_over_flips_without_what_all_share() -> None:
    rng = np.random.default_rng(0)
    first, second = list(rng.normal(size=(2, 4, 4)) + 3), list(rng.normal(size=(3, 4, 4)) + 3)
    flips = [lambda x: x, lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x[::-1, ::-1]]
    template = np.mean([flip(each) for flip in flips for each in (*first, *second)], axis=0)
    between, _, within = similarities(first, second)
    for table, rows, columns in ((between, first, second), (within, second, second)):
        for i, one in enumerate(rows):
            for j, other in enumerate(columns):
                a, b = one - template, other - template
                best = max(float((a * flip(b)).sum()) for flip in flips)
                assert table[i, j] == pytest.approx(best / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_threshold_is_far_beyond_neighbours_and_copies_within_a_set_do_not_move_it() -> None:
    rng = np.random.default_rng(0)
    values = np.tanh(rng.normal(0.3, 0.05, size=(40, 40)))
    names = [f"s{k}" for k in range(40)]
    nearest = np.arctanh(np.where(np.eye(40) > 0, -1, values).max(axis=1))
    expected = math.tanh(np.median(nearest) + 4 * 1.4826 * np.median(np.abs(nearest - np.median(nearest))))
    assert threshold_of([values], [names], spread=4, bounds=(0, 1)) == pytest.approx(expected)
    with_copies = values.copy()
    with_copies[3, 5] = with_copies[5, 3] = 1.0
    assert threshold_of([with_copies], [names], spread=4, bounds=(0, 1)) == pytest.approx(expected, abs=0.02)
    assert threshold_of([values[:4, :4]], [names[:4]], spread=4, bounds=(0.1, 0.9)) == 0.9
    assert threshold_of([values], [["one"] * 40], spread=4, bounds=(0.1, 0.9)) == 0.9


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL_DATA / "hippocampus_msd").exists(), reason="the shared images are not here")
def test_real_volumes_of_different_people_are_no_copies_and_planted_ones_are_found(tmp_path: Path) -> None:
    paths = sorted((REAL_DATA / "hippocampus_msd" / "imagesTr").glob("h*.nii.gz"))[:80]
    images = {path.name[:-7]: read_volume(path)[0].array.astype(np.float32) for path in paths}
    names = list(images)
    first = write_store(tmp_path / "one", [Image(name, images[name]) for name in names[:40]])
    planted = [
        Image(f"{kind}_{k}", np.ascontiguousarray(make(images[names[k]])), f"{kind}{k}")
        for kind, make in COPIES.items()
        for k in range(8)
    ]
    second = write_store(tmp_path / "two", [*(Image(name, images[name]) for name in names[40:]), *planted])
    found = leaks(first, second, out=tmp_path / "out").table
    pairs = {(row.case_a, row.case_b) for row in found.itertuples()}
    wanted = {(names[k], f"{kind}_{k}") for kind in COPIES for k in range(8)}
    assert len(wanted & pairs) >= 0.95 * len(wanted)
    assert pairs <= wanted
    assert len(ArrayStore.open(second).cases) == 80


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL_DATA / "busi_256").exists(), reason="the shared images are not here")
def test_a_picture_saved_as_jpeg_in_another_size_is_found_among_real_ones(tmp_path: Path) -> None:
    folder = REAL_DATA / "busi_256"
    manifest = pd.read_csv(folder / "manifest.csv").drop_duplicates("dup_group")
    paths = [folder / name for name in manifest["path"][::4]][:80]
    cases = [Case(case_id=path.stem, subject_id=path.stem, image=str(path)) for path in paths]
    Cohort(cases[:60]).to_csv(tmp_path / "one.csv")
    copies = []
    for path in paths[:10]:
        copy = tmp_path / f"{path.stem}.jpg"
        Pillow.open(path).convert("L").resize((200, 200)).save(copy, quality=60)
        copies.append(Case(case_id=f"copy_{path.stem}", subject_id=f"copy_{path.stem}", image=str(copy)))
    Cohort([*cases[60:], *copies]).to_csv(tmp_path / "two.csv")
    found = leaks(tmp_path / "one.csv", tmp_path / "two.csv", out=tmp_path / "out").table
    assert {row.case_b for row in found.itertuples()} == {case.case_id for case in copies}
