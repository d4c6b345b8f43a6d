"""A fixed slice of the fuzzing campaign of benchmarks/fuzz_readers.py, and that the campaign sees what it looks for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medssl.errors import ReadError
from medssl.geometry import Geometry
from medssl.io import Source
from medssl.volume import Volume

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COUNT = 400


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fuzz_readers")
    finally:
        sys.path.remove(str(BENCHMARKS))


def read(fuzz: ModuleType, index: int, folder: Path):
    folder.mkdir()
    return fuzz.read_one(fuzz.Job(seed=1, index=index, data=""), folder)


def test_mutated_files_give_a_volume_or_our_own_error(fuzz, tmp_path):
    outcomes = [read(fuzz, index, tmp_path / str(index)) for index in range(COUNT)]
    assert [outcome for outcome in outcomes if outcome.fault or outcome.seconds > fuzz.LIMIT_S] == []
    assert {outcome.kind for outcome in outcomes} == set(fuzz.WEIGHTS)
    assert 0.1 < np.mean([outcome.result == "read" for outcome in outcomes]) < 0.9


def test_seeds_are_read_as_they_are(fuzz, tmp_path):
    read_volume, corpus = fuzz.read_volume, fuzz.fuzz_corpus.corpus()
    for number, seed in enumerate(
        seed for seed in corpus if seed.kind in {"nifti", "metaimage", "nrrd", "raster", "npy"}
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in seed.files.items():
            (folder / name).write_bytes(data)
        volume, _ = read_volume(folder / seed.entry, volume=0 if "four" in seed.name else None, pages="stack")
        assert volume.array.size > 1


def test_an_input_is_always_the_same(fuzz):
    job = fuzz.Job(seed=3, index=5, data="")
    assert fuzz.mutated(job)[:2] == fuzz.mutated(job)[:2]
    assert fuzz.mutated(job)[:2] != fuzz.mutated(fuzz.Job(seed=4, index=5, data=""))[:2]


def _divides(path: Path, **_options: object) -> tuple[Volume, Source]:
    raise ZeroDivisionError


def _tells(path: Path, **_options: object) -> tuple[Volume, Source]:
    raise ReadError("ZZPLANTED^NAME: is damaged.")


def _warns(path: Path, **_options: object) -> tuple[Volume, Source]:
    array = np.ones((1, 2, 2, 2), np.float32)
    warnings = ("W_UID: ZZPLANTED",)
    return Volume(array, Geometry((2, 2, 2), np.eye(4)), "arbitrary"), Source(path, "", "nifti1", warnings=warnings)


def _not_finite(path: Path, **_options: object) -> tuple[Volume, Source]:
    array = np.full((1, 2, 2, 2), np.nan, np.float32)
    return Volume(array, Geometry((2, 2, 2), np.eye(4)), "arbitrary"), Source(path, "", "nifti1")


@pytest.mark.parametrize(
    ("reader", "fault"),
    [(_divides, "ZeroDivisionError"), (_tells, "planted"), (_warns, "planted"), (_not_finite, "NaN")],
)
def test_a_faulty_reader_is_found(fuzz, tmp_path, monkeypatch, reader: Callable[..., object], fault: str):
    index = next(i for i in range(99) if fuzz.mutated(fuzz.Job(1, i, ""))[0].kind == "nifti")
    monkeypatch.setattr(fuzz, "read_volume", reader)
    assert fault in read(fuzz, index, tmp_path / "one").fault
