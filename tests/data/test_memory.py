from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from medssl.data import memory
from medssl.data.memory import free_mib, keep_decoded
from medssl.data.store import ArrayStore, Entry, IndexRow, StoredCase, entry_folder, write_entry, write_index
from medssl.geometry import Geometry


@pytest.fixture
def cases(tmp_path: Path) -> tuple[StoredCase, ...]:
    """Two cases of 2 MiB of image and 1 MiB of body each."""
    rows = []
    for index, key in enumerate(("a" * 24, "b" * 24)):
        image = np.random.default_rng(index).integers(-1000, 1000, (1, 128, 128, 64), dtype=np.int16)
        grid = Geometry((128, 128, 64), np.eye(4)).to_dict()
        meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "HU", "fill": -1024.0, "warnings": []}
        write_entry(tmp_path, key, Entry(image, None, np.ones((1, 128, 128, 64), np.uint8), meta))
        rows.append(IndexRow(f"case_{index}", f"subject_{index}", "train", "CT", key, False, ()))
        assert entry_folder(tmp_path, key).exists()
    write_index(tmp_path, rows, prepare={}, unit="HU", modality="CT")
    return ArrayStore.open(tmp_path).cases


def test_kept_arrays_give_the_same_crops_and_stop_where_the_room_ends(cases: tuple[StoredCase, ...]) -> None:
    box = ((-3, 5, 7), (20, 16, 12))
    plain = [case.read("image", *box) for case in cases]
    for case in cases:
        case._arrays.clear()
    keep_decoded(cases, limit_mib=3)
    for case, expected in zip(cases, plain, strict=True):
        found = case.read("image", *box)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="read-only"):
        cases[0].read("image", (1, 1, 1), (4, 4, 4))[:] = 0
    assert [isinstance(case._arrays["image"], np.ndarray) for case in cases] == [True, False]


def test_nothing_is_kept_without_room_or_in_another_process(cases: tuple[StoredCase, ...]) -> None:
    keep_decoded(cases, limit_mib=0)
    cases[0].read("image", (0, 0, 0), (4, 4, 4))
    assert not isinstance(cases[0]._arrays["image"], np.ndarray)
    keep_decoded(cases)
    assert pickle.loads(pickle.dumps(cases[1])).room is None


def test_the_free_memory_is_what_the_system_says_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert free_mib() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  3145728 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    assert free_mib() == 3072
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "missing")
    assert free_mib() == 0
