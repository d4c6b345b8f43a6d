"""A second scan of an unchanged tree opens nothing; a changed file, and only that, is read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import dicoms
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medssl.data import examine, incremental, series
from medssl.data.incremental import Cache, Looked, fingerprint
from medssl.data.scan import ScanConfig, ScanResult, scan
from medssl.errors import CaseError, ReadError, StoppedError
from medssl.io.dicom.header import read_header
from medssl.ledger import Entry

KEY = bytes(16)


def _scan(tree: Path, **options: object) -> ScanResult:
    return scan(tree / "d", tree / "out", config=ScanConfig.parse({"workers": 1, **options}))


def _entries(result: ScanResult) -> list[Entry]:
    return sorted(result.ledger, key=lambda entry: entry.item)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Series, a refused series, an equal copy, a picture, a pair with its label, and other files."""
    data = tmp_path / "d"
    files = dicoms.write_series(data / "a", series="a")
    dicoms.write_series(data / "gap", series="gap", mutate=lambda found: found[:2] + found[3:])
    (data / "copy.dcm").write_bytes(files[0].read_bytes())
    dicoms.write_2d(data / "dx", modality="DX")
    (data / "cut").write_bytes(files[1].read_bytes()[:-50])
    (data / "notes.txt").write_text("notes")
    image = np.random.default_rng(0).integers(0, 99, (6, 7, 8)).astype(np.int16)
    for name in ("x", "y"):
        nib.save(nib.Nifti1Image(image + len(name) + ord(name), np.eye(4)), data / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image((image > 50).astype(np.uint8), np.eye(4)), data / "x_seg.nii.gz")
    nib.save(nib.Nifti1Image((image[:4] > 50).astype(np.uint8), np.eye(4)), data / "y_seg.nii.gz")
    return tmp_path


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that were examined and of the files whose start was read."""
    seen: list[str] = []
    real_examine, real_look, real_equal = examine.examine, series._look, incremental.equal_pixels

    def examined(task: examine.Task) -> examine.Checked:
        seen.append(task.item)
        return real_examine(task)

    def look(path: Path, *, key: bytes) -> Looked:
        seen.append(path.name)
        return real_look(path, key=key)

    def equal(*headers: Any) -> bool:
        seen.append("pair")
        return real_equal(*headers)

    monkeypatch.setattr(examine, "examine", examined)
    monkeypatch.setattr(series, "_look", look)
    monkeypatch.setattr(incremental, "equal_pixels", equal)
    return seen


def test_a_second_scan_opens_no_image(tree: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = _scan(tree)
    assert len(looked) > 15
    looked.clear()
    before = (tree / "out/scan_cache.jsonl").read_text()
    opened: list[str] = []
    real_open = os.open
    real_io_open = Path.open

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return real_open(path, *args, **kwargs)

    def watched_path(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return real_io_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(Path, "open", watched_path)
    second = _scan(tree)
    assert looked == []
    assert [path for path in opened if path.startswith(str(tree / "d"))] == []
    assert (second.cohort, _entries(second)) == (first.cohort, _entries(first))
    assert sorted((tree / "out/scan_cache.jsonl").read_text().splitlines()) == sorted(before.splitlines())


def test_only_what_changed_is_looked_at_again(tree: Path, looked: list[str]) -> None:
    _scan(tree)
    looked.clear()
    path = tree / "d/x_seg.nii.gz"
    os.utime(path, ns=(0, 1))
    _scan(tree)
    assert looked == ["x_seg.nii.gz", "x.nii.gz"]
    looked.clear()
    dicoms.write_2d(tree / "d/new", modality="DX", pixels=np.arange(80, dtype=np.uint16).reshape(8, 10))
    _scan(tree)
    assert sorted(looked)[0] == "new"
    assert len(looked) == 2
    looked.clear()
    _scan(tree, label_values=[1])
    assert {"x.nii.gz", "y.nii.gz"} <= set(looked)
    assert "dx" not in looked
    looked.clear()
    next(iter((tree / "out/thumbnails").iterdir())).unlink()
    _scan(tree, label_values=[1])
    assert len(looked) == 1


def test_a_cache_of_another_key_or_version_is_forgotten(
    tree: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _scan(tree)
    count = len(looked)
    looked.clear()
    (tree / "out/pseudonyms.json").unlink()
    _scan(tree)
    assert len(looked) == count
    looked.clear()
    monkeypatch.setattr(incremental, "__version__", "0")
    _scan(tree)
    assert len(looked) == count


@pytest.mark.parametrize(
    "text", ["", "{", "[]\n", '{"file": 1}\n', "\x00\xff", '{"case": "x"}\n{"file": "y", "header": 3}\n']
)
def test_a_damaged_cache_costs_time_only(tree: Path, text: str) -> None:
    first = _scan(tree)
    path = tree / "out/scan_cache.jsonl"
    head = path.read_text().splitlines()[0]
    for content in (text, f"{head}\n{text}"):
        path.write_text(content)
        assert _entries(_scan(tree)) == _entries(first)


def test_lines_that_say_nonsense_are_not_believed(tree: Path) -> None:
    first = _scan(tree)
    path = tree / "out/scan_cache.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        for name in ("header", "result", "same"):
            if line.get(name) is not None:
                line[name] = {"odd": [1]}
        if line.get("error"):
            line["error"] = ["NoSuchError", 1, 2]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _entries(_scan(tree)) == _entries(first)


def test_a_scan_that_was_killed_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    file = dicoms.write_2d(tmp_path / "dx")
    header = read_header(file, key=KEY)
    cache = Cache(path, key=KEY).__enter__()
    cache.keep_looks([(file, Looked(header=header))])
    cache.keep_check("fine", {"a": 1})
    cache.keep_check("bad", CaseError("x: y.", code="E_SHAPE"))
    cache.keep_check("passing", ReadError("x: y.", code="E_PERMISSION"))
    cache.__exit__(KeyboardInterrupt)
    with path.open("a") as text:
        text.write('{"file": "cut')
    with Cache(path, key=KEY) as cache:
        assert cache.looked(file) == Looked(header=header)
        assert cache.checked("fine") == {"a": 1}
        known = cache.checked("bad")
        assert isinstance(known, CaseError)
        assert (known.code, known.message) == ("E_SHAPE", "x: y.")
        assert cache.checked("passing") is None
        os.utime(file, ns=(1, 1))
        assert cache.looked(file) is None
    assert len(path.read_text().splitlines()) == 4
    with Cache(path, key=bytes(17)) as cache:
        assert cache.checked("fine") is None


def test_without_a_path_nothing_is_kept(tmp_path: Path) -> None:
    with Cache(None, key=KEY) as cache:
        cache.keep_check("x", {"a": 1})
        cache.keep_looks([(tmp_path, Looked())])
        assert cache.checked("y") is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_needs_more_than_a_message_comes_back(tmp_path: Path) -> None:
    with Cache(tmp_path / "c", key=KEY) as cache:
        cache.keep_check("x", StoppedError("x: y.", code="E_OTHER"))
    with Cache(tmp_path / "c", key=KEY) as cache:
        assert isinstance(cache.checked("x"), StoppedError)


def test_a_fingerprint_changes_with_the_voxels_behind_a_detached_header(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    header = tmp_path / "a.mhd"
    sitk.WriteImage(image, str(header))
    before = fingerprint([header], {})
    os.utime(tmp_path / "a.raw", ns=(1, 1))
    assert fingerprint([header], {}) != before
    folder = fingerprint([tmp_path], {})
    (tmp_path / "more").write_text("")
    assert fingerprint([tmp_path], {}) != folder
    assert fingerprint([tmp_path / "none"], {}) != fingerprint([tmp_path / "none"], {"a": 1})


def test_headers_are_read_in_several_processes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _scan(tree)
    (tree / "out/scan_cache.jsonl").unlink()
    monkeypatch.setattr(series, "_PARALLEL_FROM", 3)
    monkeypatch.setattr(series, "_CHUNK_FILES", 5)
    assert _entries(_scan(tree, workers=2)) == _entries(expected)
