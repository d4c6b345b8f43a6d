"""The view of sample n is the same to the bit for every number of workers and processes, for any neighbours, after a
resume and in the prefetch thread; with boxes of different shape, a margin, elastic fields and mixing in the list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from medssl.augment.images import Images
from medssl.data.loader import batches
from medssl.data.store import ArrayStore, Entry, IndexRow, StoredCase, write_entry, write_index
from medssl.engine.prefetch import Prefetcher
from medssl.geometry import Geometry
from medssl.methods.mae import MAE
from medssl.methods.mae import Config as MAEConfig
from medssl.nn.backbone import build_backbone
from medssl.tasks.segmentation import Config as TaskConfig
from medssl.tasks.segmentation import Segmentation
from medssl.trainable import Batch, Trainable

IMAGES = Images(domain="zscore", modality="MR", spacing_mm=(1.0, 1.0, 1.5))
MOVES = [
    {"name": "affine", "rotation_deg": [15, 15, 30], "translation_mm": [2, 2, 2], "p": 0.7},
    {"name": "elastic", "amplitude_mm": [0.5, 1.5], "control_mm": 6.0, "p": 0.5},
    {"name": "bias_field", "p": 0.5},
    {"name": "noise", "sigma": [0.0, 0.3], "p": 0.8},
]
STEPS = 3
BATCH = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredCase, ...]:
    """Cases whose voxels, and so the boxes of crops in mm, differ."""
    store = tmp_path_factory.mktemp("store")
    rows = []
    for index in range(5):
        rng = np.random.default_rng(index)
        shape = (20 + index, 22, 18)
        grid = Geometry(shape, np.diag([1.0 + 0.2 * index, 1.0, 1.5 - 0.1 * index, 1.0])).to_dict()
        meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "arbitrary", "fill": 0.0}
        image = rng.normal(size=(1, *shape)).astype(np.float16)
        label = (image > 0.5).astype(np.uint8)
        key = f"{index:024d}"
        write_entry(store, key, Entry(image, label, np.ones_like(label), meta))
        rows.append(IndexRow(f"case_{index}", f"s{index}", "train", "MR", key, True, (1,)))
    write_index(store, rows, prepare={}, unit="arbitrary", modality="MR")
    return ArrayStore.open(store).cases


def mae() -> MAE:
    config = {
        "crop_voxels": [8, 8, 8], "block_voxels": [4, 4, 4], "crop_mm": [12, 12, 12],
        "augment": [*MOVES, {"name": "batch_styles"}],
    }  # fmt: skip
    encoder = build_backbone(tiny.BACKBONE, in_channels=1, spatial_dims=3)
    return MAE(MAEConfig.parse(config), encoder=encoder, seed=0, images=IMAGES)


def segmentation() -> Segmentation:
    config = {"crop_voxels": [8, 8, 8], "crop_mm": [12, 12, 12], "augment": [*MOVES, {"name": "cutmix"}]}
    encoder = build_backbone(tiny.BACKBONE, in_channels=1, spatial_dims=3)
    return Segmentation(TaskConfig.parse(config), encoder=encoder, label_values=(1,), seed=0, images=IMAGES)


@pytest.fixture(scope="module", params=[mae, segmentation])
def trainable(request: pytest.FixtureRequest) -> Trainable:
    made: Trainable = request.param()
    return made


def views(trainable: Any, cases: tuple[StoredCase, ...], *, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """Everything that the steps see, sample after sample."""
    loader = batches(cases, trainable.view_sampler(), **{"batch_size": BATCH, "seed": 3, "steps": steps, **options})
    return joined([trainable.prepare(batch, training=True) for batch in loader])


def joined(prepared: list[Batch]) -> dict[str, Any]:
    names = prepared[0].tensors
    return {name: torch.cat([batch[name] for batch in prepared]) for name in names} | {
        "case_ids": sum((batch.case_ids for batch in prepared), ())
    }


def is_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["case_ids"] == other["case_ids"] and all(
        torch.equal(value, other[name]) for name, value in one.items() if name != "case_ids"
    )


def of(found: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    return {
        name: tuple(value[n] for n in chosen) if name == "case_ids" else value[chosen] for name, value in found.items()
    }


@pytest.fixture(scope="module")
def whole(trainable: Trainable, cases: tuple[StoredCase, ...]) -> dict[str, Any]:
    return views(trainable, cases)


def test_boxes_have_margins_and_extents_and_come_as_stored(trainable: Any, cases: tuple[StoredCase, ...]) -> None:
    assert min(trainable.view_sampler().margin) > 0
    found = list(batches(cases, trainable.view_sampler(), batch_size=BATCH, seed=3, steps=STEPS))
    assert any("image_extent" in batch for batch in found)
    assert {batch["image"].dtype for batch in found} == {torch.float16}


def test_views_are_changed_and_whole(whole: dict[str, Any]) -> None:
    assert whole["image"].shape == (STEPS * BATCH, 1, 8, 8, 8)
    assert torch.isfinite(whole["image"]).all()
    assert len({tuple(image.flatten().tolist()) for image in whole["image"]}) == STEPS * BATCH


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_workers(
    trainable: Trainable, cases: tuple[StoredCase, ...], whole: dict[str, Any], num_workers: int
) -> None:
    assert is_equal(views(trainable, cases, num_workers=num_workers), whole)


def test_any_number_of_processes(trainable: Trainable, cases: tuple[StoredCase, ...], whole: dict[str, Any]) -> None:
    for rank in range(2):
        mine = [step * BATCH + place for step in range(STEPS) for place in (2 * rank, 2 * rank + 1)]
        assert is_equal(views(trainable, cases, rank=rank, world_size=2), of(whole, mine))


@pytest.mark.parametrize("batch_size", [2, 6, 12])
def test_any_neighbours_of_other_groups(
    trainable: Trainable, cases: tuple[StoredCase, ...], whole: dict[str, Any], batch_size: int
) -> None:
    assert is_equal(views(trainable, cases, batch_size=batch_size, steps=STEPS * BATCH // batch_size), whole)


def test_after_a_resume(trainable: Trainable, cases: tuple[StoredCase, ...], whole: dict[str, Any]) -> None:
    assert is_equal(views(trainable, cases, start_step=1), of(whole, list(range(BATCH, STEPS * BATCH))))


@pytest.mark.parametrize("threads", [1, 2])
def test_in_the_prefetch_thread(
    trainable: Trainable, cases: tuple[StoredCase, ...], whole: dict[str, Any], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    loader = batches(cases, trainable.view_sampler(), batch_size=BATCH, seed=3, steps=STEPS)
    feed = Prefetcher(loader, lambda batch: trainable.prepare(batch, training=True), device=torch.device("cpu"))
    try:
        assert is_equal(joined(list(feed)), whole)
    finally:
        feed.close()
        torch.set_num_threads(before)
