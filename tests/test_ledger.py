from __future__ import annotations

import csv
import io

import pytest

from medssl.errors import ReadError
from medssl.ledger import Ledger, Outcome


def _booked() -> Ledger:
    ledger = Ledger()
    for item in "abcde":
        ledger.expect(item)
    ledger.accept("a")
    ledger.accept("b", warnings=("W_UNITS: micrometres converted.", "W_X: y"))
    ledger.reject("c", ReadError("c: cut. Copy it again.", code="E_TRUNCATED"))
    ledger.duplicate("d", "same bytes as a")
    ledger.ignore("e", "not an image")
    return ledger


def test_all_inputs_are_counted_once():
    ledger = _booked()
    ledger.check()
    assert ledger.counts() == {
        "seen": 5, "accepted": 1, "accepted with warning": 1, "rejected": 1, "duplicate": 1, "ignored": 1,
    }  # fmt: skip
    assert ledger.summary().startswith("5 seen: 1 accepted")


def test_a_lost_input_and_one_booked_twice_break_the_law():
    ledger = _booked()
    ledger.expect("f")
    with pytest.raises(RuntimeError, match="'f': 1"):
        ledger.check()
    ledger.accept("f")
    ledger.accept("f")
    with pytest.raises(RuntimeError, match="booked too often"):
        ledger.check()


def test_exit_code_tells_good_partial_and_empty():
    ledger = _booked()
    assert ledger.exit_code() == 3
    empty = Ledger()
    assert empty.exit_code() == 4
    good = Ledger()
    good.expect("a")
    good.accept("a")
    assert good.exit_code() == 0


def test_the_table_holds_code_and_reason_and_cannot_run_in_a_spreadsheet():
    ledger = _booked()
    ledger.expect("=cmd\x1b[0m")
    ledger.ignore("=cmd\x1b[0m", "odd")
    rows = list(csv.DictReader(io.StringIO(ledger.to_csv())))
    assert {"item": "c", "outcome": "rejected", "code": "E_TRUNCATED", "reason": "c: cut. Copy it again."} in rows
    assert rows[-1]["item"] == "'=cmd\\x1b[0m"
    assert len(list(csv.DictReader(io.StringIO(ledger.to_csv(Outcome.REJECTED))))) == 1
