"""Write a report as one HTML file that opens anywhere, with no link to the outside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader

from medssl import __version__
from medssl.runfolder import atomic_write

NOTICE = "For research use only; not a medical device."


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        heading: A few words.
        text: Paragraphs in plain text.
        table: Rows that share their keys; the keys are the head of the table.
        pictures: Caption to PNG bytes.
    """

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Mapping[str, object]] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def write_report(path: Path, title: str, *, sections: Sequence[Section]) -> Path:
    """Write ``sections`` as one HTML file; every value is escaped.

    Args:
        path: The ``.html`` to write, whole or not at all.
        title: Head of the page.
        sections: In the order of the page.
    """
    environment = Environment(loader=PackageLoader("medssl.report"), autoescape=True, trim_blocks=True)
    environment.filters["png"] = lambda data: base64.b64encode(data).decode()
    environment.filters["cell"] = _cell
    html = environment.get_template("page.html.j2").render(
        title=title, sections=sections, notice=NOTICE, version=__version__
    )
    atomic_write(path, html)
    return path


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
