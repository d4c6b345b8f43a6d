"""The page of a gallery: what augments and samplers make of some cases, as one HTML file without a link."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from medssl import __version__
from medssl.report.page import NOTICE
from medssl.runfolder import atomic_write


@dataclass(frozen=True)
class Picture:
    """A picture with what is said below it: a caption, and smaller text."""

    png: bytes
    caption: str
    text: str = ""


@dataclass(frozen=True)
class Single:
    """One augment by itself.

    Args:
        name: Of the augment.
        options: Option, value, and why, if somebody wrote down why.
        others: The other options in one line.
        rows: For each case its pictures; those of the first are shown large.
    """

    name: str
    options: Sequence[tuple[str, str, str]]
    others: str
    rows: Sequence[tuple[str, Sequence[Picture]]]


@dataclass(frozen=True)
class Sampler:
    """Crops of one way to cut views, and a map with their places.

    Args:
        heading: A few words.
        notes: What it told of the sample.
        whole: The map.
        crops: Framed in the colour of their frame on the map.
    """

    heading: str
    notes: str
    whole: Picture
    crops: Sequence[Picture]


@dataclass(frozen=True)
class Page:
    """All that is on the page.

    Args:
        title: What is shown.
        facts: Name and value of what a reader must know of the images.
        warnings: Sentences for the top of the page.
        views: For each case the crop without anything random, and views as training would see them.
        singles: Each augment by itself.
        sampler: How views are cut.
        is_recipe: Whether that is how the recipe cuts them.
        others: Other ways, which stay folded.
        mapped: Case that ``sampler`` and ``others`` are shown for.
        shares: What goes wrong, and how often.
        draws: Of how many.
        timings: Augment, milliseconds a sample, and share moved out of the range of HU.
        is_flat: Whether the images are pictures, which have one plane only.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    views: Sequence[tuple[str, Sequence[Picture]]]
    singles: Sequence[Single]
    sampler: Sampler
    is_recipe: bool
    others: Sequence[Sampler]
    mapped: str
    shares: Mapping[str, float]
    draws: int
    timings: Sequence[tuple[str, float, float | None]]
    is_flat: bool


def write_gallery(path: Path, page: Page) -> Path:
    """Write the page; every value is escaped.

    Args:
        path: The ``.html`` to write, whole or not at all.
        page: Its content.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    environment = Environment(
        loader=PackageLoader("medssl.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"png": lambda data: base64.b64encode(data).decode(), "percent": _percent}
    html = environment.get_template("gallery.html.j2").render(page=page, notice=NOTICE, version=__version__)
    atomic_write(path, html)
    return path


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{100 * share:.2g} %"
