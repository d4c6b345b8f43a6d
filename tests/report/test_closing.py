"""What a command says at its end: a few lines a code, however many inputs there are."""

from __future__ import annotations

import pytest

from medssl import explain
from medssl.errors import CaseError, ReadError
from medssl.ledger import Ledger
from medssl.report.closing import closing_lines


def test_nothing_is_said_when_all_is_well() -> None:
    ledger = Ledger()
    ledger.accept("a.nii.gz")
    ledger.ignore("b.txt", "not an image file")
    assert closing_lines(ledger) == []


def test_many_refusals_of_one_kind_take_a_few_lines_and_the_commonest_comes_first() -> None:
    ledger = Ledger()
    ledger.reject("x.nii", CaseError("case x.nii: wrong. Mend it.", code="E_CASE"))
    for number in range(1000):
        name = f"scans/{number}.nii"
        ledger.reject(name, ReadError(f"a: b/{name}: is empty. Copy it again.", code="E_EMPTY"))
    assert closing_lines(ledger) == [
        "rejected, 1000 x E_EMPTY:",
        *(f"  scans/{n}.nii: a: b/scans/{n}.nii: is empty. Copy it again." for n in range(3)),
        "  and 997 more",
        "rejected, 1 x E_CASE:",
        "  x.nii: wrong. Mend it.",
    ]


@pytest.mark.parametrize(
    ("item", "reason", "told"),
    [
        ("b/c.dcm", "/data/b/c.dcm: is empty. Copy it.", "is empty. Copy it."),
        ("b/1 and 3 more", "/data/b/1 and 3 more of its series: one slice is missing.", "one slice is missing."),
        ("b/c.dcm", "it has no name. Do that.", "it has no name. Do that."),
        ("b/c.dcm", "as b/c.dcm", "as b/c.dcm"),
    ],
)
def test_the_name_of_an_input_is_said_once(item: str, reason: str, told: str) -> None:
    ledger = Ledger()
    ledger.reject(item, ReadError(reason, code="E_READ"))
    assert closing_lines(ledger)[1] == f"  {item}: {told}"


def test_each_warning_of_an_input_is_counted_and_explained() -> None:
    ledger = Ledger()
    both = ("W_SINGLE_SLICE: one slice, 3 mm thick.", "W_SPLIT: by place.")
    ledger.accept("a", warnings=both)
    ledger.accept("b", warnings=both[:1])
    assert closing_lines(ledger) == [
        f"accepted, 2 x W_SINGLE_SLICE: {explain.meaning('W_SINGLE_SLICE')}",
        f"accepted with W_SPLIT: a: {explain.meaning('W_SPLIT')}",
    ]


def test_duplicates_are_counted() -> None:
    ledger = Ledger()
    for number in range(5):
        ledger.duplicate(f"{number}", "the same voxels as a")
    lines = closing_lines(ledger)
    assert lines[:2] == ["duplicate, 5 left out:", "  0: the same voxels as a"]
    assert lines[-1] == "  and 2 more"
