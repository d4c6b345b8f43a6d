"""The page of a gallery: whole, escaped, and without a link to the outside."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from medssl.report.gallery import Page, Picture, Sampler, Single, write_gallery
from medssl.report.page import NOTICE

PNG = b"\x89PNG\r\n\x1a\nnot quite a picture"
PICTURE = Picture(PNG, "caption <b>", "small text")
PAGE = Page(
    title="ct_<chest>",
    facts=[("crop", "64 × 64 × 64 voxels")],
    warnings=["3.0% of the views are <blank>."],
    singles=[
        Single(
            "gamma",
            [("p", "0.3", "A third & more.")],
            "retain none",
            [("case-1", [PICTURE, PICTURE]), ("case-2", [PICTURE])],
        )
    ],
    views=[("case-1", [PICTURE])],
    sampler=Sampler("Random crops", "padded 3%", PICTURE, [PICTURE]),
    is_recipe=True,
    others=[Sampler("Slices", "", PICTURE, [])],
    mapped="case-1",
    shares={"of the views are blank": 0.03125, "of the crops lie outside": 0.0},
    draws=64,
    timings=[("cutting alone", 1.25, 0.0), ("gamma", 3.0, 0.002)],
    is_flat=False,
)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources, self.tags, self.places, self.ids = "", [], [], [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "srcset", "data", "action"}]
        self.places += [value or "" for name, value in attrs if name == "href"]
        self.ids += [f"#{value}" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Page, tmp_path: Path) -> Reader:
    path = write_gallery(tmp_path / "page.html", page)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_the_page_says_everything_and_loads_nothing(tmp_path: Path) -> None:
    page = read(PAGE, tmp_path)
    for text in (
        "ct_<chest>",
        "<blank>",
        "A third & more.",
        "retain none",
        "caption <b>",
        "small text",
        "Slices",
        "0.2 %",
    ):
        assert text in page.text
    assert "3.1 %" in page.text
    assert NOTICE in page.text
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert len(page.sources) == page.tags.count("img") == 7
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.places == ["#views", "#cut", "#costs", "#alone", "#augment-1"]
    assert set(page.places) <= set(page.ids)


def test_the_recipes_own_way_to_cut_comes_first_and_the_others_are_folded(tmp_path: Path) -> None:
    page = read(PAGE, tmp_path)
    assert page.text.index("this recipe") < page.text.index("Other ways to cut, which this recipe does not use")
    assert page.text.index("Other ways") < page.text.index("Slices")
    assert page.tags.count("details") == 1
    without = read(replace(PAGE, is_recipe=False, others=[]), tmp_path)
    assert "this recipe" not in without.text
    assert "details" not in without.tags


def test_it_is_said_on_top_and_in_the_legend_where_left_is(tmp_path: Path) -> None:
    text = read(PAGE, tmp_path).text
    assert text.count("L is the patient's left and stands at the left edge") == 2
    assert text.index("L is the patient's left") < text.index("As training sees them")
    assert "patient's left" not in read(replace(PAGE, is_flat=True), tmp_path).text


def test_a_page_without_augments_or_warnings_has_no_empty_parts(tmp_path: Path) -> None:
    page = read(replace(PAGE, singles=[], warnings=[], timings=[("cutting alone", 1.0, None)], is_flat=True), tmp_path)
    assert "Each augment by itself" not in page.text
    assert "out of HU" not in page.text
    assert "nothing says where left is" in page.text
