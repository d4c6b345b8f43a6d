from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from medssl.data.store import (
    ArrayStore,
    Entry,
    IndexRow,
    StoredCase,
    entry_folder,
    label_values,
    verify_entry,
    write_entry,
    write_index,
)
from medssl.errors import CheckpointError, ReadError
from medssl.geometry import Geometry
from medssl.views import CaseArrays

SHAPE = (70, 40, 36)
GEOMETRY = Geometry(SHAPE, np.diag([1.0, 2.0, 3.0, 1.0]))


def _entry(seed: int = 0, *, labelled: bool = True, unit: str = "arbitrary") -> Entry:
    rng = np.random.default_rng(seed)
    if unit == "HU":
        image = rng.integers(-1000, 2000, (1, *SHAPE)).astype(np.int16)
    else:
        image = rng.normal(size=(2, *SHAPE)).astype(np.float16)
    label = np.zeros((1, *SHAPE), np.int16)
    label[0, 10:30, 10:30, 10:30] = 1
    label[0, 40:43, 10:13, 10:12] = 300
    body = np.zeros((1, *SHAPE), np.uint8)
    body[0, 5:60, 5:35, 5:30] = 1
    grid = GEOMETRY.to_dict()
    meta = {
        "source_geometry": grid,
        "prepared_geometry": grid,
        "unit": unit,
        "fill": -1024.0 if unit == "HU" else 0.0,
        "warnings": [],
    }
    return Entry(image, label if labelled else None, body, meta)


def _store(path: Path, *, unit: str = "arbitrary") -> tuple[ArrayStore, Entry]:
    entry = _entry(unit=unit)
    write_entry(path, "a" * 24, entry)
    write_entry(path, "b" * 24, _entry(1, labelled=False, unit=unit))
    rows = [
        IndexRow("case_a", "subject_1", "train", "MR", "a" * 24, True, (1, 300)),
        IndexRow("case_b", "subject_2", "test", "MR", "b" * 24, False, ()),
    ]
    write_index(path, rows, prepare={"modality": "MR"}, unit=unit, modality="MR")
    return ArrayStore.open(path), entry


def _padded(array: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...], fill: float) -> np.ndarray:
    """The box voxel by voxel axis, by numpy's own padding."""
    pad = 100
    wide = np.pad(array, [(0, 0), (pad, pad), (pad, pad), (pad, pad)], constant_values=fill)
    x, y, z = (slice(a + pad, a + pad + n) for a, n in zip(start, shape, strict=True))
    return wide[:, x, y, z]


@pytest.mark.parametrize(
    ("start", "shape"),
    [
        ((0, 0, 0), SHAPE),
        ((3, 5, 7), (20, 20, 20)),
        ((60, 30, 30), (20, 20, 20)),
        ((-5, -6, -7), (80, 60, 60)),
        ((-30, 0, 0), (10, 10, 10)),
        ((70, 0, 0), (10, 10, 10)),
    ],
)
def test_a_box_reads_as_the_array_padded_with_the_fill(
    tmp_path: Path, start: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    store, entry = _store(tmp_path)
    case = store.cases[0]
    image = case.read("image", start, shape)
    assert image.dtype == np.float16
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, _padded(entry.image, start, shape, 0))
    label = case.read("label", start, shape)
    assert label.dtype == np.int16
    np.testing.assert_array_equal(label, _padded(entry.label, start, shape, 0))
    np.testing.assert_array_equal(case.read("body", start, shape), _padded(entry.body, start, shape, 0))


def test_ct_is_filled_with_air(tmp_path: Path) -> None:
    store, entry = _store(tmp_path, unit="HU")
    box = store.cases[0].read("image", (-2, 0, 0), (4, 3, 3))
    assert box.dtype == np.int16
    np.testing.assert_array_equal(box, _padded(entry.image, (-2, 0, 0), (4, 3, 3), -1024))
    assert store.cases[0].fill == -1024
    assert store.unit == "HU"


def test_the_index_tells_what_each_case_is(tmp_path: Path) -> None:
    store, _ = _store(tmp_path)
    case = store.cases[0]
    assert (case.case_id, case.subject_id, case.split, case.labelled) == ("case_a", "subject_1", "train", True)
    assert case.shape == SHAPE
    assert case.spacing_mm == (1.0, 2.0, 3.0)
    assert case.channels == 2
    assert case.unit == "arbitrary"
    assert case.geometry.isclose(GEOMETRY)
    assert case.source_geometry.isclose(GEOMETRY)
    assert store.label_values == (1, 300)
    assert store.modality == "MR"
    assert store.prepare_config == {"modality": "MR"}
    assert [c.case_id for c in store.select(split="test")] == ["case_b"]
    assert [c.case_id for c in store.select(labelled=True)] == ["case_a"]
    assert "case_a" in repr(case)
    assert (tmp_path / "index.csv").read_text().splitlines()[1] == f"case_a,subject_1,train,MR,{'a' * 24},true,1 300"


def test_a_case_knows_where_it_lies_and_where_its_body_is(tmp_path: Path) -> None:
    store, _ = _store(tmp_path)
    case = store.cases[0]
    np.testing.assert_array_equal(case.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    np.testing.assert_array_equal(case.body_box, [[5, 5, 5], [55, 30, 25]])
    assert case.body_box.dtype == np.float64
    assert case.atlas_affine is None
    assert case.is_metric
    assert not case.is_constant
    assert isinstance(case, CaseArrays)


def test_an_empty_body_mask_has_the_whole_grid_as_its_box(tmp_path: Path) -> None:
    entry = _entry()
    folder = write_entry(tmp_path, "e" * 24, entry._replace(body=np.zeros_like(entry.body)))
    assert json.loads((folder / "case.json").read_text())["body_box"] == [[0, 0, 0], list(SHAPE)]


@pytest.mark.parametrize("code", ["W_NO_SPACING", "W_SPACING_MISSING", "W_NO_MM"])
def test_a_case_whose_file_had_no_voxel_size_is_not_metric(tmp_path: Path, code: str) -> None:
    entry = _entry(labelled=False)
    meta = {**entry.meta, "warnings": ["W_SHEAR: some.", f"{code}: 1 mm was assumed."]}
    write_entry(tmp_path, "f" * 24, entry._replace(meta=meta))
    row = IndexRow("f", "f", None, "US", "f" * 24, False, ())
    write_index(tmp_path, [row], prepare={}, unit="arbitrary", modality="US")
    assert not ArrayStore.open(tmp_path).cases[0].is_metric


def test_foreground_samples_lie_on_their_label_and_are_all_of_a_small_one(tmp_path: Path) -> None:
    store, entry = _store(tmp_path)
    case = store.cases[0]
    large, small, body = (case.foreground_voxels(value) for value in (1, 300, -1))
    assert large.shape == (2000, 3)
    assert len(np.unique(large, axis=0)) == 2000
    assert (entry.label[0][tuple(large.T)] == 1).all()
    assert {tuple(v) for v in small.tolist()} == {tuple(v) for v in np.argwhere(entry.label[0] == 300).tolist()}
    assert (entry.body[0][tuple(body.T)] == 1).all()
    assert case.foreground_voxels(77).shape == (0, 3)


def test_a_case_without_label_says_so(tmp_path: Path) -> None:
    store, _ = _store(tmp_path)
    case = store.cases[1]
    assert case.has("image")
    assert case.has("body")
    assert not case.has("label")
    with pytest.raises(KeyError, match="case_b has no label"):
        case.read("label", (0, 0, 0), (2, 2, 2))


@pytest.mark.parametrize(
    "name", ["image.b2nd", "label.b2nd", "body.b2nd", "foreground.npz", "case.json", "digests.json"]
)
def test_one_flipped_bit_in_any_file_is_found_at_first_touch(tmp_path: Path, name: str) -> None:
    _store(tmp_path)
    file = entry_folder(tmp_path, "a" * 24) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    case = ArrayStore.open(tmp_path).cases[0]
    with pytest.raises(CheckpointError, match="Run medssl prepare again") as caught:
        case.read("image", (0, 0, 0), (2, 2, 2))
    assert caught.value.code == "E_DIGEST"


def test_a_cut_or_missing_file_is_found(tmp_path: Path) -> None:
    _store(tmp_path)
    folder = entry_folder(tmp_path, "a" * 24)
    (folder / "image.b2nd").write_bytes((folder / "image.b2nd").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"image\.b2nd"):
        verify_entry(folder)
    (folder / "digests.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"digests\.json"):
        verify_entry(folder)
    with pytest.raises(CheckpointError):
        verify_entry(tmp_path / "nowhere")


def test_a_damaged_index_or_another_version_is_refused(tmp_path: Path) -> None:
    store, _ = _store(tmp_path)
    content = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(content).replace("subject_2", "subject_1"))
    with pytest.raises(CheckpointError, match="Run medssl prepare again"):
        ArrayStore.open(tmp_path)
    (tmp_path / "store.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="Run medssl prepare again"):
        ArrayStore.open(tmp_path)
    with pytest.raises(ReadError, match=r"no store\.json"):
        ArrayStore.open(tmp_path / "nowhere")
    assert len(store.fingerprint) == 64


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.data.store.STORE_VERSION", 99)
    write_index(tmp_path, [], prepare={}, unit="HU", modality="CT")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="store version 99; this medssl needs 4"):
        ArrayStore.open(tmp_path)


def test_the_first_of_two_writers_wins_and_nothing_else_is_left(tmp_path: Path) -> None:
    first = write_entry(tmp_path, "k" * 24, _entry(0))
    before = (first / "image.b2nd").read_bytes()
    write_entry(tmp_path, "k" * 24, _entry(1))
    assert (first / "image.b2nd").read_bytes() == before
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["k" * 24]


def test_equal_entries_have_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_entry(tmp_path / name, "k" * 24, _entry(0)) for name in "ab")
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_opened_case_reads_the_same_in_another_process(tmp_path: Path, method: str) -> None:
    store, _ = _store(tmp_path)
    box = ("image", (0, 0, 0), (3, 1, 1))
    here = store.cases[0].read(*box)
    with multiprocessing.get_context(method).Pool(1) as workers:
        np.testing.assert_array_equal(workers.apply_async(StoredCase.read, (store.cases[0], *box)).get(30), here)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store.cases[0])).read(*box), here)


def test_a_2d_image_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    grid = Geometry((300, 200, 1), np.eye(4)).to_dict()
    image = np.arange(60000, dtype=np.float32).reshape(1, 300, 200, 1)
    meta = {"source_geometry": grid, "prepared_geometry": grid, "unit": "arbitrary", "fill": 0.0}
    write_entry(tmp_path, "c" * 24, Entry(image, None, np.ones(image.shape, np.uint8), meta))
    write_index(
        tmp_path, [IndexRow("c", "c", None, "XR", "c" * 24, False, ())], prepare={}, unit="arbitrary", modality="XR"
    )
    case = ArrayStore.open(tmp_path).cases[0]
    np.testing.assert_array_equal(case.read("image", (10, 20, 0), (50, 60, 1)), image[:, 10:60, 20:80])


def test_label_values_leave_background_out() -> None:
    assert label_values(np.array([[[[0, 3, 3, -1]]]])) == [-1, 3]
