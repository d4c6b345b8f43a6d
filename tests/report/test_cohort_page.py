"""The page of a cohort: counts, words and pictures are those of the cases, and no name or path is on it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from phantoms import grid
from PIL import Image

from medssl import explain
from medssl.data.tables import refused_table
from medssl.errors import CaseError, GeometryError, ReadError
from medssl.ledger import Ledger
from medssl.report import cohort
from medssl.report.cohort import CaseSummary, write_cohort_report
from medssl.report.thumbnails import render
from medssl.volume import Volume

SECRET = "DOE^JANE"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def thumbnail(value: int = 1) -> bytes:
    array = np.zeros((1, 24, 24, 24), np.int16)
    array[:, 4:20, 4:20, 4:20] = value
    return render(Volume(array, grid((24, 24, 24)), "arbitrary"), size=96)


def case(number: int, **changes: object) -> CaseSummary:
    plain = CaseSummary(
        case_id=f"case-{number:016x}",
        subject_id=f"subject-{number // 2:016x}",
        modality="MR",
        split="train",
        shape=(24, 24, 24),
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        unit="arbitrary",
        low=1.0,
        high=900.0 + number,
        minimum=0.0,
        maximum=1000.0,
        thumbnail=thumbnail(),
    )
    return replace(plain, **changes)


CASES = [
    case(0, has_label=True, label_values=(1, 2), warnings=("W_TILT: 12 degrees.", "W_TILT: again.")),
    case(1, has_label=True, label_values=(2,)),
    case(2, modality="CT", unit="HU", split="test", shape=(512, 512, 40), spacing_mm=(0.7, 0.7, 5.0), low=-1000.0),
    case(3, modality="US", split="val", shape=(640, 480, 1), has_spacing=False, warnings=("W_NO_SPACING: none.",)),
    case(4, modality="MR", split=None, orientation="PIR", shape=(160, 256, 256), high=3e6, thumbnail=None),
]


def books() -> Ledger:
    ledger = Ledger()
    items = [f"/data/{SECRET}/{number}.nii.gz" for number in range(12)]
    for item in items:
        ledger.expect(item)
    for item in items[:3]:
        ledger.accept(item)
    for item in items[3:5]:
        ledger.accept(item, warnings=("W_TILT: a sentence.",))
    ledger.reject(items[5], GeometryError(f"{items[5]}: slice 12 is missing at 30 mm.", code="E_MISSING_SLICE"))
    ledger.reject(items[6], GeometryError(f"{items[6]}: slice 4 is missing.", code="E_MISSING_SLICE"))
    ledger.duplicate(items[7], f"the same voxels as {items[0]}")
    ledger.reject(items[8], ReadError(f"{items[8]}: damaged.", code="E_CRC"))
    ledger.ignore(items[9], f"not an image: {SECRET}")
    ledger.reject(items[10], GeometryError(f"{items[10]}: slice 9 is missing.", code="E_MISSING_SLICE"))
    ledger.reject(items[11], CaseError(f"{items[11]}: strange.", code="E_NEVER_HEARD_OF"))
    return ledger


class Page(HTMLParser):
    """Text, rows of tables and sources of pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: list[bytes] = []
        self.references: list[str] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self._cell = True
        if tag == "img":
            kind, _, data = str(given["src"]).partition(";base64,")
            assert kind == "data:image/png"
            self.pictures.append(base64.b64decode(data))
        self.references += [value or "" for name, value in attrs if name in {"href", "src", "action", "srcset"}]

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(tmp_path: Path, cases: list[CaseSummary], **more: object) -> tuple[Page, str]:
    given = {"ledger": books(), "warnings": ("W_SUBJECT: guessed for 5 of 5 images.",), **more}
    path = write_cohort_report(tmp_path / "report.html", cases=cases, **given)
    html = path.read_text()
    return Page(html), html


def test_counts_and_splits(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, CASES)
    for words in ("5 images", "3 subjects", "2 with a label map", "2 with a warning", "5 refused", "1 duplicates"):
        assert words in page.text
    rows = {row[0]: [" ".join(cell.split()) for cell in row[1:]] for row in page.rows if row}
    assert rows["MR"][0].startswith("2")
    assert "1 subject, 2 labelled" in rows["MR"][0]
    assert rows["MR"][3].startswith("1")  # no split
    assert rows["CT"][:4] == ["–", "–", rows["CT"][2], "–"]
    assert rows["all"][4].startswith("5")
    assert "3 subjects, 2 labelled" in rows["all"][4]
    assert "1 in 1 case, 2 in 2 cases" in page.text


def test_geometry_in_words(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, CASES)
    rows = {row[0]: row[1] for row in page.rows if len(row) >= 2}
    assert rows["axial slices from feet to head"] == "3"
    assert rows["sagittal slices from left to right"] == "1"
    assert rows["2D image"] == "1"
    assert rows["640 × 480"] == "1"
    assert rows["0.7 × 0.7 × 5"] == "1"
    assert rows["unknown"] == "1"
    assert rows["HU"] == "1"


def test_refusals_have_meaning_remedy_and_lines_but_no_reason_of_the_file(tmp_path: Path) -> None:
    page, html = page_of(tmp_path, CASES)
    rows = {row[0]: row[1:] for row in page.rows if row and row[0].startswith("E_")}
    count, meaning, remedy, lines = rows["E_MISSING_SLICE"]
    assert (count, lines) == ("3", "4–5, 9")  # line 1 is the head, 2 and 3 are warnings
    assert meaning == explain.meaning("E_MISSING_SLICE")
    assert remedy == explain.remedy("E_MISSING_SLICE").replace("`", "")
    assert rows["E_CRC"][3] == "7"
    assert rows["E_NEVER_HEARD_OF"] == ["1", "", "", "10"]
    assert SECRET not in html
    assert "/data/" not in html


def test_the_lines_are_those_of_the_table_that_a_scan_writes() -> None:
    ledger = books()
    table = refused_table(ledger).splitlines()
    for code, line in cohort._lines(ledger, cohort.Outcome.REJECTED):
        assert code in table[line - 1]


def test_warnings_are_counted_once_a_case(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, CASES)
    rows = {row[0]: row[1:] for row in page.rows if row and row[0].startswith("W_")}
    assert rows["W_TILT"][0] == rows["W_NO_SPACING"][0] == "1"
    assert rows["W_TILT"][1] == explain.meaning("W_TILT")
    assert "W_SUBJECT: guessed for 5 of 5 images." in page.text
    assert explain.remedy("W_SUBJECT").partition(" (")[0] in page.text


def test_every_thumbnail_is_there_and_nothing_leads_outside(tmp_path: Path) -> None:
    page, html = page_of(tmp_path, CASES)
    drawn = [picture for picture in page.pictures if picture == thumbnail()]
    assert len(drawn) == 4
    assert len(page.pictures) == 4 + 2  # and the plots
    assert "1 more image is not shown" in page.text
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?://|<script|@import|url\(", html)
    for name in ("case-0000000000000002", "512 × 512 × 40 of 0.7 × 0.7 × 5 mm", "labels 1, 2"):
        assert name in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    page, html = page_of(tmp_path, [case(0, case_id=nasty, modality=nasty)], warnings=(f"W_SUBJECT: {nasty} `x`",))
    assert nasty not in html
    assert nasty in page.text


def test_thumbnails_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "_MOST_THUMBNAILS", 3)
    page, _ = page_of(tmp_path, [case(number) for number in range(5)])
    assert sum(picture == thumbnail() for picture in page.pictures) == 3
    assert "2 more images are not shown" in page.text


def test_rare_kinds_are_one_row_and_long_lists_are_cut(tmp_path: Path) -> None:
    odd = [case(number, shape=(10 + number, 10, 10)) for number in range(12)]
    rows = {row[0]: row[1] for row in page_of(tmp_path, odd)[0].rows if len(row) >= 2}
    assert rows["4 others"] == "4"
    assert cohort._ranges([*range(2, 60, 2)]) == "2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, …"


def test_an_empty_cohort_still_has_a_page(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, [], warnings=())
    assert "0 images" in page.text
    assert page.pictures == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_renders_the_page(tmp_path: Path) -> None:
    page_of(tmp_path, CASES)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    options += ("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,3400")
    shot = tmp_path / "page.png"
    subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(io.BytesIO(shot.read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == 1280
    dark_rows = (pixels.sum(axis=2) < 30).sum(axis=1) > 100
    assert dark_rows.sum() > 90, "the black panels of the thumbnails"
    blue = (np.abs(pixels - (0, 114, 178)).max(axis=2) < 12).sum()
    assert blue > 500, "the accent of the tiles and plots"
    assert (pixels.min(axis=2) > 250).mean() > 0.5, "mostly paper"
