"""Every code that medssl can print has a meaning and a remedy, and the page of codes is made of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medssl import explain

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"\b[EW]_[A-Z][A-Z0-9_]*\b")
STAND_INS = {"W_CODE"}


def codes_of(folder: Path) -> dict[str, str]:
    """Code to a file that names it."""
    files = [path for path in sorted(folder.rglob("*.py")) if path.name != "explain.py"]
    return {code: path.name for path in files for code in CODE.findall(path.read_text())}


def test_every_code_in_the_package_is_explained() -> None:
    used = codes_of(ROOT / "medssl")
    unknown = {code: file for code, file in used.items() if code not in STAND_INS and explain.explain(code) is None}
    assert unknown == {}, "add these to medssl/explain.py"


def test_no_entry_is_left_of_a_code_that_is_gone() -> None:
    assert sorted(set(explain._explanations()) - set(codes_of(ROOT / "medssl"))) == []


def test_every_entry_of_the_table_is_read() -> None:
    written = re.findall(r"^([EW]_\S+)  ", explain._TABLE, flags=re.MULTILINE)
    assert len(written) == len(set(written))
    assert sorted(written) == sorted(explain._explanations())
    assert all(CODE.fullmatch(code) for code in written)


@pytest.mark.parametrize("code", sorted(explain._explanations()))
def test_meaning_and_remedy_are_sentences(code: str) -> None:
    for text in (explain.meaning(code), explain.remedy(code)):
        assert text.endswith(".")
        assert "  " not in text
        assert "->" not in text
        assert 10 < len(text) < 260 or text == "Nothing to do."


def test_an_unknown_code_has_no_words() -> None:
    assert explain.explain("E_NO_SUCH_THING") is None
    assert (explain.meaning("E_NO_SUCH_THING"), explain.remedy("")) == ("", "")


def test_the_page_of_codes_is_made_of_the_table() -> None:
    page = ROOT / "docs" / "codes.md"
    assert page.read_text() == explain.markdown(), "make docs/codes.md anew with medssl.explain.markdown()"
    assert len(re.findall(r"^\| `[EW]_", page.read_text(), flags=re.MULTILINE)) == len(explain._explanations())
