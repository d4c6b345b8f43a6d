from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from medssl.data import loader
from medssl.data.loader import batches, fixed_batches
from medssl.data.store import ArrayStore, Entry, IndexRow, StoredCase, write_entry, write_index
from medssl.errors import CaseError, CheckpointError, ConfigError, EnvironmentFaultError, NoInputError
from medssl.geometry import Geometry
from medssl.trainable import Batch
from medssl.views import LabelledCrop, RandomCrop


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredCase, ...]:
    store = tmp_path_factory.mktemp("store")
    rows = []
    for index in range(5):
        rng = np.random.default_rng(index)
        shape = (12 + index, 14, 10)
        grid = Geometry(shape, np.eye(4)).to_dict()
        meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "arbitrary", "fill": 0.0}
        label = np.zeros((1, *shape), np.uint8)
        label[0, 2:5, 2:5, 2:5] = 1
        image = rng.normal(size=(1, *shape)).astype(np.float16)
        key = f"{index:024d}"
        write_entry(store, key, Entry(image, label, np.ones_like(label), meta))
        rows.append(IndexRow(f"case_{index}", f"s{index}", "train", "MR", key, True, (1,)))
    write_index(store, rows, prepare={}, unit="arbitrary", modality="MR")
    return ArrayStore.open(store).cases


SAMPLER = LabelledCrop((6, 6, 4), (1,))


class Pairs:
    """Two cases a sample."""

    cases_per_sample = 2

    def __call__(self, cases: Sequence[StoredCase], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"cases": np.array([int(case.case_id[-1]) for case in cases]), "draw": rng.random(2)}


class Broken(RandomCrop):
    def __call__(self, cases: Sequence[StoredCase], rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise KeyError("a name")


def _list(cases: Sequence[StoredCase], sampler: object = SAMPLER, **options: int) -> list[Batch]:
    return list(batches(cases, sampler, **{"batch_size": 4, "seed": 3, "steps": 6, **options}))


def _equal(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.case_ids == b.case_ids
        and torch.equal(a.seeds, b.seeds)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a.tensors)
        for a, b in zip(one, other, strict=True)
    )


def test_a_batch_has_named_tensors_with_the_batch_first(cases: tuple[StoredCase, ...]) -> None:
    batch = _list(cases, steps=1)[0]
    assert batch["image"].shape == (4, 1, 6, 6, 4)
    assert batch["image"].dtype == torch.float16
    assert batch["label"].dtype == torch.uint8
    assert len(batch) == 4
    assert batch.seeds.dtype == torch.int64
    assert (batch.seeds >= 0).all()


def test_every_epoch_is_a_new_permutation_of_the_cases(cases: tuple[StoredCase, ...]) -> None:
    drawn = [case_id for batch in _list(cases, batch_size=5) for case_id in batch.case_ids]
    epochs = [drawn[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [case.case_id for case in cases] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    seeds = torch.cat([batch.seeds for batch in _list(cases)])
    assert len(seeds.unique()) == 24


def test_the_view_of_a_sample_is_drawn_from_its_number_alone(cases: tuple[StoredCase, ...]) -> None:
    batch = _list(cases, steps=3)[2]
    by_id = {case.case_id: case for case in cases}
    for place, case_id in enumerate(batch.case_ids):
        rng = np.random.Generator(np.random.Philox(key=[3, 2 * 4 + place]))
        expected = SAMPLER([by_id[case_id]], rng)
        np.testing.assert_array_equal(batch["image"][place].numpy(), expected["image"])
        np.testing.assert_array_equal(batch["label"][place].numpy(), expected["label"])


def test_a_resumed_run_goes_on_where_it_stood(cases: tuple[StoredCase, ...]) -> None:
    whole = _list(cases)
    for step in (1, 4, 6):
        assert _equal(_list(cases, start_step=step), whole[step:])


def test_two_ranks_see_together_what_one_sees(cases: tuple[StoredCase, ...]) -> None:
    whole = _list(cases)
    shares = [_list(cases, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch.case_ids == shares[0][step].case_ids + shares[1][step].case_ids
        assert torch.equal(batch["image"], torch.cat([share[step]["image"] for share in shares]))
        assert torch.equal(batch.seeds, torch.cat([share[step].seeds for share in shares]))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(cases: tuple[StoredCase, ...], num_workers: int) -> None:
    assert _equal(_list(cases, start_step=1, num_workers=num_workers), _list(cases)[1:])


def test_workers_may_be_started_from_a_thread(cases: tuple[StoredCase, ...]) -> None:
    with ThreadPoolExecutor(1) as threads:
        assert _equal(threads.submit(_list, cases, steps=1, num_workers=1).result(), _list(cases, steps=1))


def test_another_seed_gives_other_samples(cases: tuple[StoredCase, ...]) -> None:
    assert not _equal(_list(cases), _list(cases, seed=4))


def test_a_sample_of_two_cases_has_two_different_ones(cases: tuple[StoredCase, ...]) -> None:
    drawn = torch.cat([batch["cases"] for batch in _list(cases, Pairs(), steps=20)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert len({tuple(pair) for pair in drawn.tolist()}) > 10
    first = [f"case_{n}" for n in drawn[:5, 0].tolist()]
    assert sorted(first) == [case.case_id for case in cases]


def test_2d_drops_the_slice_axis_of_images_and_of_nothing_else(cases: tuple[StoredCase, ...]) -> None:
    batch = _list(cases, RandomCrop((6, 6, 1)), spatial_dims=2, steps=1)[0]
    assert batch["image"].shape == (4, 1, 6, 6)
    assert batch["crop_box_mm"].shape == (4, 2, 3)
    with pytest.raises(ConfigError, match="4 slices; spatial_dims 2 needs 1"):
        _list(cases, spatial_dims=2, steps=1)


class Boxes:
    """Boxes of another size for every sample, two views of each, and numbers for the journal."""

    cases_per_sample = 1

    def __call__(self, cases: Sequence[StoredCase], rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = tuple(int(n) for n in rng.integers(2, 6, 3))
        image = cases[0].read("image", (0, 0, 0), size)
        return {
            "image": image,
            "image_to_box": np.eye(4),
            "label": cases[0].read("label", (0, 0, 0), size),
            "views": np.stack([image, -image]),
            "views_to_box": np.stack([np.eye(4)] * 2),
            "size": np.array(size),
            "note_padded": np.float32(size[0] / 10),
        }


def test_boxes_of_different_shape_are_padded_behind_and_their_extent_is_told(cases: tuple[StoredCase, ...]) -> None:
    for batch in _list(cases, Boxes(), steps=3):
        largest = tuple(batch["size"].amax(dim=0).tolist())
        assert batch["image"].shape == (4, 1, *largest)
        assert batch["views"].shape == (4, 2, 1, *largest)
        assert batch["image"].dtype == torch.float16
        assert batch["label"].dtype == torch.uint8
        assert torch.equal(batch["image_extent"], batch["size"])
        assert torch.equal(batch["views_extent"], batch["size"])
        assert "label_extent" not in batch
        by_id = {case.case_id: case for case in cases}
        for place, (case_id, (x, y, z)) in enumerate(zip(batch.case_ids, batch["size"].tolist(), strict=True)):
            own = torch.from_numpy(by_id[case_id].read("image", (0, 0, 0), (x, y, z)))
            assert torch.equal(batch["image"][place, :, :x, :y, :z], own)
            assert torch.equal(batch["views"][place, 1, :, :x, :y, :z], -own)
            assert not batch["image"][place, :, x:].any()
            assert not batch["label"][place, :, :, y:].any()


def test_ct_is_padded_with_air(tmp_path: Path) -> None:
    grid = Geometry((8, 8, 8), np.eye(4)).to_dict()
    meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "HU", "fill": -1024.0}
    array = np.full((1, 8, 8, 8), 40, np.int16)
    write_entry(tmp_path, "d" * 24, Entry(array, array.astype(np.uint8), array.astype(np.uint8), meta))
    row = IndexRow("a", "a", None, "CT", "d" * 24, True, (40,))
    write_index(tmp_path, [row], prepare={}, unit="HU", modality="CT")
    batch = _list(ArrayStore.open(tmp_path).cases, Boxes(), steps=1)[0]
    assert batch["image"].dtype == torch.int16
    assert set(batch["image"].unique().tolist()) == {40, -1024}
    assert set(batch["label"].unique().tolist()) == {40, 0}


def test_boxes_of_one_shape_have_no_extent_and_notes_are_numbers_apart(cases: tuple[StoredCase, ...]) -> None:
    batch = _list(cases, Boxes(), batch_size=1, steps=1)[0]
    assert "image_extent" not in batch
    assert "note_padded" not in batch
    assert batch.notes["padded"].dtype == torch.float32
    assert batch.notes["padded"].tolist() == pytest.approx([float(batch["size"][0, 0]) / 10])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generator(cases: tuple[StoredCase, ...], num_workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _list(cases, steps=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_fixed_batches_are_always_the_same_and_use_each_case_equally(cases: tuple[StoredCase, ...]) -> None:
    one = fixed_batches(cases, SAMPLER, count=3, batch_size=5, seed=0)
    assert _equal(one, fixed_batches(cases, SAMPLER, count=3, batch_size=5, seed=0))
    drawn = [case_id for batch in one for case_id in batch.case_ids]
    assert {case_id: drawn.count(case_id) for case_id in drawn} == {f"case_{i}": 3 for i in range(5)}
    flat = fixed_batches(cases, RandomCrop((6, 6, 1)), count=1, batch_size=2, seed=0, spatial_dims=2)
    assert flat[0]["image"].shape == (2, 1, 6, 6)
    pairs = fixed_batches(cases, Pairs(), count=1, batch_size=2, seed=0)[0]
    assert pairs["cases"].tolist() == [[0, 1], [1, 2]]


def test_too_few_cases_and_uneven_shares_are_refused(cases: tuple[StoredCase, ...]) -> None:
    with pytest.raises(NoInputError, match="0 cases; a sample is cut from 1"):
        _list([])
    with pytest.raises(NoInputError, match="1 cases; a sample is cut from 2"):
        fixed_batches(cases[:1], Pairs(), count=1, batch_size=1, seed=0)
    with pytest.raises(ConfigError, match="set a multiple of 3"):
        _list(cases, world_size=3)


def test_an_unexpected_error_names_the_case_and_not_its_content(cases: tuple[StoredCase, ...]) -> None:
    with pytest.raises(CaseError, match=r"case case_\d: KeyError in test_loader\.py:\d+") as caught:
        _list(cases, Broken((2, 2, 2)), num_workers=0)
    assert caught.value.code == "E_SAMPLE"
    assert "a name" not in caught.value.message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_entry_stops_the_run_with_its_own_error(tmp_path: Path, num_workers: int) -> None:
    grid = Geometry((8, 8, 8), np.eye(4)).to_dict()
    meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "arbitrary", "fill": 0.0}
    array = np.ones((1, 8, 8, 8), np.float16)
    folder = write_entry(tmp_path, "d" * 24, Entry(array, None, array.astype(np.uint8), meta))
    row = IndexRow("bad", "bad", None, "MR", "d" * 24, False, ())
    write_index(tmp_path, [row], prepare={}, unit="arbitrary", modality="MR")
    (folder / "image.b2nd").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="Run medssl prepare again"):
        _list(ArrayStore.open(tmp_path).cases, RandomCrop((2, 2, 2)), num_workers=num_workers)


class _Dying:
    """Stands in for torch's loader: the first one loses its worker after two steps."""

    made: ClassVar[list[_Dying]] = []
    faults = 1

    def __init__(self, dataset: object, *, sampler: range, **options: object) -> None:
        self.dataset, self.steps = dataset, sampler
        _Dying.made.append(self)

    def __iter__(self) -> object:
        for count, step in enumerate(self.steps):
            if count == 2 and len(_Dying.made) <= _Dying.faults:
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            yield self.dataset[step]


@pytest.mark.parametrize("faults", [1, 9])
def test_lost_workers_are_started_anew_once_at_the_same_step(
    cases: tuple[StoredCase, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, faults: int
) -> None:
    monkeypatch.setattr(loader, "DataLoader", _Dying)
    monkeypatch.setattr(_Dying, "made", [])
    monkeypatch.setattr(_Dying, "faults", faults)
    with caplog.at_level(logging.WARNING):
        if faults == 1:
            assert _equal(_list(cases, num_workers=1), _list(cases))
        else:
            with pytest.raises(EnvironmentFaultError, match="died or hung at step 4, twice"):
                _list(cases, num_workers=1)
    assert "died or hung at step 2; starting them anew" in caplog.text


def test_a_killed_worker_is_noticed_and_replaced(
    cases: tuple[StoredCase, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_WORKER_TIMEOUT_S", 8)
    made = batches(cases, SAMPLER, batch_size=2, seed=3, steps=40, num_workers=1)
    first = next(made)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        rest = list(made)
    assert "starting them anew" in caplog.text
    assert _equal([first, *rest], _list(cases, batch_size=2, steps=40))
