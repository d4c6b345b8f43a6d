from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from medssl.engine.record import Window, means
from medssl.runfolder import Journal, read_journal


def _scalars(value: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(value), "twice": torch.tensor(2 * value)}


def _values(window: Window) -> dict[str, float]:
    return {name: value for name, value in means(window.totals()).items() if name in {"loss", "twice", "new"}}


def test_means_run_over_finite_values_and_are_nan_without_any() -> None:
    window = Window()
    window.add([_scalars(1.0), _scalars(math.nan)], waited=0.0)
    window.add([_scalars(4.0), {"new": torch.tensor(math.inf)}], waited=0.0)
    found = _values(window)
    assert (found["loss"], found["twice"]) == (2.5, 5.0)
    assert math.isnan(found["new"])


def test_asking_and_saving_in_between_does_not_change_a_bit() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    straight, other = Window(), Window()
    for number, value in enumerate(values):
        straight.add([_scalars(value)], waited=0.0)
        other.add([_scalars(value)], waited=0.0)
        if number % 7 == 0:
            saved = json.loads(json.dumps(other.totals()))
            other = Window()
            other.restore(saved)
    assert _values(other) == _values(straight)


def test_times_go_on_after_a_resume() -> None:
    window = Window()
    window.restore({"step_seconds": (10.0, 4.0), "stall_percent": (300.0, 10.0)})
    window.add([_scalars(1.0)], waited=2.0)
    totals = window.totals()
    assert totals["step_seconds"] == (pytest.approx(10.0, abs=1.0), 5.0)
    assert totals["stall_percent"] == (500.0, totals["step_seconds"][0])


def test_of_what_a_resumed_run_wrote_twice_the_later_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step, value in ((4, 0.1), (6, 0.2), (6, 0.3), (8, 0.4)):
        journal.log(step, loss=value)
    journal.log(6, **{"held_out/loss": 1.0})
    journal.log(6, alarm="a")
    journal.log(6, alarm="b")
    journal.log(6, alarm="a")
    journal.log(note="c")
    journal.log(note="c")
    journal.close()
    assert read_journal(tmp_path / "journal.jsonl") == [
        {"step": 4, "loss": 0.1},
        {"step": 6, "loss": 0.3},
        {"step": 8, "loss": 0.4},
        {"step": 6, "held_out/loss": 1.0},
        {"step": 6, "alarm": "b"},
        {"step": 6, "alarm": "a"},
        {"note": "c"},
        {"note": "c"},
    ]
