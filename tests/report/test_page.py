"""The report is one file, opens anywhere, and shows values as text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medssl.report.page import NOTICE, Section, write_report

PNG = b"\x89PNG\r\n\x1a\nnot quite a picture"


class Reader(HTMLParser):
    """Collects text, table cells and where anything would be loaded from."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_a_page_holds_its_text_table_and_pictures_and_loads_nothing(tmp_path: Path) -> None:
    sections = [
        Section("Findings", ["First sentence.", "Second."], pictures={"A curve": PNG}),
        Section("Scores", table=[{"arm": "voco", "dice": 0.87654, "n": 3}, {"arm": "scratch", "dice": 0.5, "n": 12}]),
    ]
    path = write_report(tmp_path / "sub" / "report.html", "A study", sections=sections)
    assert path == tmp_path / "sub" / "report.html"
    page = read(path)
    text = " ".join(page.text)
    for piece in (
        "A study",
        "Findings",
        "First sentence.",
        "A curve",
        "Scores",
        "voco",
        "0.877",
        "0.500",
        "12",
        NOTICE,
    ):
        assert piece in text
    for name in ("arm", "dice"):
        assert name in text
    assert page.links == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert "script" not in page.tags
    assert not re.search(r"https?://|url\(|@import", path.read_text())


@pytest.mark.parametrize("value", ["<script>alert(1)</script>", 'x" onerror="y', "{{ 7 * 7 }}", "a & b"])
def test_every_value_is_shown_as_text(tmp_path: Path, value: str) -> None:
    section = Section(value, [value], table=[{value: value}], pictures={value: PNG})
    page = read(write_report(tmp_path / "r.html", value, sections=[section]))
    assert "script" not in page.tags
    assert sum(value in text for text in page.text) >= 5
    assert page.links == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


def test_a_page_without_sections_still_says_what_it_is_not(tmp_path: Path) -> None:
    assert NOTICE in " ".join(read(write_report(tmp_path / "r.html", "Empty", sections=[])).text)
