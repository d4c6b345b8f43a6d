from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from medssl.augment.anatomy import REGIONS, Axis, share_anatomy
from medssl.data.prepare import Region

PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "views.md"
AXES: tuple[Axis, ...] = get_args(Axis)


@pytest.mark.parametrize("name", REGIONS)
def test_each_axis_has_a_reason_in_sentences(name):
    for axis in AXES:
        assert re.fullmatch(r"[A-Z].{10,}\.", REGIONS[name].reason(axis))


@pytest.mark.parametrize("name", ["whole_body", "chest", "cardiac", "abdomen"])
def test_organs_of_one_side_are_not_mirrored(name):
    assert not REGIONS[name].mirrors


def test_only_what_has_no_upright_is_turned_over():
    assert {name for name, part in REGIONS.items() if part.mirrors - {"LR"}} == {"skin", "tissue"}
    assert all("SI" not in part.mirrors for part in REGIONS.values())


def test_parts_lie_within_known_parts_and_never_within_themselves():
    for name, part in REGIONS.items():
        assert part.within is None or part.within in REGIONS
        seen, above = {name}, part.within
        while above is not None:
            assert above not in seen
            seen.add(above)
            above = REGIONS[above].within


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("brain", "brain", True),
        ("brain", "head_neck", True),
        ("head_neck", "brain", True),
        ("cardiac", "whole_body", True),
        ("brain", "eye", False),
        ("chest", "abdomen", False),
        ("tissue", "whole_body", False),
    ],
)
def test_two_parts_go_together_if_one_holds_the_other(first, second, together):
    assert share_anatomy(first, second) is together


def test_a_store_can_declare_every_part_and_no_other():
    assert sorted(get_args(Region)) == sorted(REGIONS)


def test_the_page_tells_of_every_part_what_may_be_mirrored_and_why():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE))
    wanted = {
        name: f"{part.shows} | {', '.join(axis for axis in AXES if axis in part.mirrors) or 'none'} | {part.left_right}"
        for name, part in REGIONS.items()
    }
    assert {name: rows.get(name) for name in wanted} == wanted
