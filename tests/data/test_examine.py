from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from phantoms import ORIENTATIONS, grid, noise

from medssl.data import examine as module
from medssl.data.cohort import Case
from medssl.data.examine import Checked, Task, examine
from medssl.data.tables import acquisition_table, refused_table
from medssl.errors import CaseError, ReadError
from medssl.io import write_volume
from medssl.ledger import Ledger
from medssl.volume import Volume, reorient

WriteNifti = Callable[..., Path]


def _task(image: Path, **options: object) -> Task:
    fields = {"case_id": "a", "subject_id": "a", "image": str(image), **options}
    return Task("a", Case.parse(fields), (image,))


def test_numbers_are_those_of_the_voxels(tmp_path: Path, write_nifti: WriteNifti) -> None:
    image = np.arange(-50, 950, dtype=np.int16).reshape(10, 10, 10)
    path = write_nifti(tmp_path / "a.nii.gz", image, np.diag([1.0, 2.0, 3.0, 1.0]))
    found = examine(_task(path, modality="CT"))
    assert (found.minimum, found.maximum, found.unit) == (-50, 949, "HU")
    assert (found.low, found.high) == tuple(np.percentile(image, [1, 99]))
    assert (found.shape, found.spacing_mm, found.orientation) == ((10, 10, 10), (1.0, 2.0, 3.0), "RAS")
    assert (found.labels, dict(found.facts), found.warnings, found.has_spacing) == ((), {}, (), True)
    assert Checked.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_percentiles_of_a_large_volume_come_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(1, 60, 60, 60)).astype(np.float32)
    monkeypatch.setattr(module, "_SAMPLE_VOXELS", 20_000)
    sample = module._sample(array)
    assert 5_000 < sample.size <= 20_000
    assert np.abs(np.percentile(sample, [1, 99]) - np.percentile(array, [1, 99])).max() < 0.2


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_content_is_the_same_for_every_order_of_axes_and_in_memory(orientation: str) -> None:
    volume = noise(grid((5, 4, 3), spacing_mm=(1.0, 2.0, 3.0), angle_deg=20.0), channels=2)
    turned = reorient(volume, orientation)
    expected = module._content(volume)
    assert module._content(turned) == expected
    memory = np.asfortranarray(turned.array)
    assert module._content(Volume(memory, turned.geometry, turned.unit)) == expected
    changed = volume.array.copy()
    changed[1, 4, 3, 2] += 1
    assert module._content(Volume(changed, volume.geometry, volume.unit)) != expected
    moved = grid((5, 4, 3), spacing_mm=(1.0, 2.0, 3.0), angle_deg=20.0, centre_mm=(0.0, 0.0, 0.1))
    assert module._content(Volume(volume.array, moved, volume.unit)) != expected


def test_memory_stays_below_three_volumes(tmp_path: Path) -> None:
    volume = noise(grid((160, 160, 60)))
    path = tmp_path / "a.nii.gz"
    write_volume(Volume((volume.array * 100).astype(np.int16), volume.geometry, "arbitrary"), path)
    size = volume.array.size * 2
    examine(_task(path))  # imports and caches
    tracemalloc.start()
    examine(_task(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * size


def test_the_table_of_refusals_names_a_remedy_and_runs_nothing_in_a_spreadsheet() -> None:
    ledger = Ledger()
    for item in ("good", "=cmd", "dup", "warned", "other"):
        ledger.expect(item)
    ledger.accept("good")
    ledger.reject("=cmd", ReadError("x: is cut.", code="E_TRUNCATED"))
    ledger.duplicate("dup", "the same")
    ledger.accept("warned", warnings=("W_CONSTANT: all equal.",))
    ledger.ignore("other", "not an image file")
    header, *rows = refused_table(ledger).splitlines()
    assert header == "path,outcome,code,reason,remedy"
    assert [row.split(",")[0] for row in rows] == ["'=cmd", "dup", "warned", "other"]
    assert len(rows[0].split(",", 4)[4]) > 10


def test_the_table_of_acquisition_has_a_row_for_each_case_that_tells() -> None:
    header, row = acquisition_table({"a": {"modality": "CT", "kvp": 120.0}, "b": {}}).splitlines()
    assert row.split(",")[header.split(",").index("kvp")] == "120.0"
    assert row.startswith("a,CT,")


def test_label_values_are_counted_in_a_refusal(tmp_path: Path, write_nifti: WriteNifti) -> None:
    image = write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9, (4, 4, 4)).astype(np.int16))
    label = write_nifti(tmp_path / "l.nii.gz", np.full((4, 4, 4), 3, np.uint8))
    task = Task("a", _task(image, label=str(label)).case, (image, label), label_values=(1, 2))
    with pytest.raises(CaseError, match="label value 3 in 64 voxels; only 1, 2 are expected"):
        examine(task)
