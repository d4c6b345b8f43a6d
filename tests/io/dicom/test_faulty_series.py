"""Every faulty series comes to its outcome: a named refusal, or images at the right place in the right order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import dicoms
import numpy as np
import pydicom
import pytest
from faulty_series import FAULTS, Outcome

from medssl.errors import ReadError
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.header import read_header
from medssl.io.dicom.model import Assembly, Frame, Header, Item, Stack


def _read(folder: Path) -> tuple[Assembly, list[ReadError], list[Header]]:
    headers, errors = [], []
    for path in sorted(folder.iterdir()):
        try:
            headers.append(read_header(path))
        except ReadError as error:
            errors.append(error)
    return assemble(headers), errors, headers


def _stacks(items: tuple[Item, ...]) -> list[Stack]:
    return [stack for item in items for stack in item.stacks]


def _first_value(frame: Frame) -> int:
    pixels = pydicom.dcmread(frame.path).pixel_array
    return int(pixels.reshape(-1, frame.rows, frame.columns)[frame.index, 0, 0])


def _in_order(stack: Stack) -> bool:
    """Whether the stored values count on from slice to slice, as the generator writes them."""
    return bool((np.diff([_first_value(frame) for frame in stack.frames]) > 0).all())


def _check(outcome: Outcome, found: Assembly, errors: list[ReadError]) -> None:
    codes = {error.code for _, error in found.refused} | {error.code for error in errors}
    assert codes == set(outcome.refused.split())
    assert sorted(len(item.stacks) for item in found.items) == sorted(outcome.stacks)
    assert len(found.duplicates) == outcome.duplicates
    assert {note.split(":")[0] for _, note in found.notes} == ({outcome.note} if outcome.note else set())
    for stack in _stacks(found.items):
        if outcome.geometry is not None:
            assert stack.geometry.max_corner_distance_mm(outcome.geometry) <= outcome.within_mm
        if outcome.warning is not None:
            assert outcome.warning in {warning.split(":")[0] for warning in stack.warnings}


@pytest.mark.parametrize("name", FAULTS)
def test_series_comes_to_its_required_outcome(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    fault.build(tmp_path)
    found, errors, headers = _read(tmp_path)
    _check(fault.outcome, found, errors)
    assert all(_in_order(stack) for stack in _stacks(found.items) if fault.outcome.stacks == (1,))
    in_columns = Counter({path for item in found.items for path in item.paths})
    in_columns.update({path for paths, _ in found.refused for path in paths})
    in_columns.update({path for path, _ in found.duplicates} | {path for path, _ in found.notes})
    assert set(in_columns) == {header.path for header in headers}
    said = [error.message for _, error in found.refused] + [error.message for error in errors]
    said += [note for _, note in found.notes] + [w for stack in _stacks(found.items) for w in stack.warnings]
    text = " ".join(said).replace(str(tmp_path), "")
    assert not any(canary in text for canary in dicoms.CANARIES.values())


def test_there_are_more_than_forty_kinds() -> None:
    assert len(FAULTS) >= 40
