"""The page of a cohort: what was found, how it looks, and what was refused and why; no path and no name is on it."""

from __future__ import annotations

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from medssl import __version__, explain
from medssl.errors import code_of
from medssl.ledger import Ledger, Outcome
from medssl.report.figures import cohort_grids, cohort_intensities
from medssl.report.page import NOTICE
from medssl.report.words import slice_axis, slices_in_words
from medssl.runfolder import atomic_write

_MOST_THUMBNAILS = 500
_MOST_KINDS = 8
_MOST_LINES = 12
_ROUNDED_MM = 2
_BACKTICKS = re.compile("`([^`]*)`")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CaseSummary:
    """What the page says of one case.

    Args:
        case_id: Its pseudonym.
        subject_id: Likewise.
        modality: As in the cohort.
        split: ``train``, ``val``, ``test``, or None.
        shape: Voxels along the array axes (X, Y, Z); Z = 1 for a 2D image.
        spacing_mm: Along the same axes.
        orientation: Where the axes point, such as ``LPS``.
        unit: Of the values.
        low: Value below which 1 % of the voxels lie.
        high: Value above which 1 % of the voxels lie.
        minimum: Smallest value.
        maximum: Largest value.
        has_label: Whether there is a label map.
        label_values: Values of the label map, without the background.
        warnings: ``W_CODE: sentence`` strings; only their codes get onto the page.
        thumbnail: PNG, or None where it must not be shown.
        has_spacing: Whether the voxel size is known, and not assumed.
    """

    case_id: str
    subject_id: str
    modality: str
    split: str | None
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    unit: str
    low: float
    high: float
    minimum: float
    maximum: float
    has_label: bool = False
    label_values: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    thumbnail: bytes | None = None
    has_spacing: bool = True

    @property
    def is_flat(self) -> bool:
        """Whether it is a 2D image."""
        return self.shape[2] == 1

    @property
    def grid(self) -> str:
        """Numbers of voxels."""
        return " × ".join(map(str, self.shape[:2] if self.is_flat else self.shape))

    @property
    def slices(self) -> str:
        """Plane and order of its slices in words."""
        if self.is_flat:
            return "2D image"
        return slices_in_words(self.orientation, axis=slice_axis(self.spacing_mm))


def write_cohort_report(
    path: Path, *, cases: Sequence[CaseSummary], ledger: Ledger, warnings: Sequence[str] = ()
) -> Path:
    """Write the page of a cohort as one HTML file without a link to the outside.

    Args:
        path: The ``.html`` to write, whole or not at all.
        cases: The accepted ones, in the order of the table.
        ledger: What became of every input, in the order of ``refused.csv``.
        warnings: ``W_CODE: sentence`` strings that concern the cohort as a whole.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    environment = Environment(
        loader=PackageLoader("medssl.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"png": _base64, "words": _words, "remedy": _remedy, "meaning": explain.meaning}
    shown = [case for case in cases if case.thumbnail is not None][:_MOST_THUMBNAILS]
    html = environment.get_template("cohort.html.j2").render(
        tiles=_tiles(cases, ledger),
        warnings=list(warnings),
        splits=[split or "no split" for split in _splits(cases)],
        rows=_split_rows(cases),
        kinds=[
            ("Slices", _kinds(case.slices for case in cases)),
            ("Grid", _kinds(case.grid for case in cases)),
            ("Voxel size, mm", _kinds(_spacing(case) for case in cases)),
            ("Unit of the values", _kinds(case.unit for case in cases)),
        ],
        labels=_label_rows(cases),
        grids=cohort_grids([(case.modality, case.shape, case.spacing_mm, case.has_spacing) for case in cases]),
        intensities=cohort_intensities([(case.modality, case.unit, case.low, case.high) for case in cases]),
        cards=_cards(shown),
        left_out=len(cases) - len(shown),
        case_warnings=_code_rows((code, 0) for case in cases for code in dict.fromkeys(map(code_of, case.warnings))),
        refused=_code_rows(_lines(ledger, Outcome.REJECTED)),
        outcomes=[(str(outcome), ledger.count(outcome)) for outcome in Outcome],
        notice=NOTICE,
        version=__version__,
    )
    atomic_write(path, html)
    return path


def _tiles(cases: Sequence[CaseSummary], ledger: Ledger) -> list[tuple[str, str]]:
    labelled = sum(case.has_label for case in cases)
    tiles = [
        (f"{len(cases):,}", "image" if len(cases) == 1 else "images"),
        (f"{len({case.subject_id for case in cases}):,}", "subjects"),
        (f"{labelled:,}", "with a label map"),
        (f"{sum(bool(case.warnings) for case in cases):,}", "with a warning"),
        (f"{ledger.count(Outcome.REJECTED):,}", "refused"),
    ]
    duplicates = ledger.count(Outcome.DUPLICATE)
    return [*tiles, (f"{duplicates:,}", "duplicates left out")] if duplicates else tiles


def _splits(cases: Sequence[CaseSummary]) -> tuple[str | None, ...]:
    """Columns of the table of counts; those without a split have one only where there are any."""
    return _SPLITS if all(case.split for case in cases) else (*_SPLITS, None)


def _split_rows(cases: Sequence[CaseSummary]) -> list[dict[str, Any]]:
    """Counts a modality and split, with totals where there are several."""
    modalities = sorted({case.modality for case in cases})
    rows = []
    for name in [*modalities, "all"] if len(modalities) > 1 else modalities:
        members = [case for case in cases if name in {case.modality, "all"}]
        cells = []
        for split in _splits(cases):
            here = [case for case in members if case.split == split]
            cells.append((len(here), len({case.subject_id for case in here}), sum(case.has_label for case in here)))
        total = (len(members), len({case.subject_id for case in members}), sum(case.has_label for case in members))
        rows.append({"name": name, "cells": cells, "total": total})
    return rows


def _label_rows(cases: Sequence[CaseSummary]) -> list[tuple[int, int]]:
    """Label value and the number of cases that have it."""
    counts = Counter(value for case in cases for value in case.label_values)
    return sorted(counts.items())


def _kinds(values: Iterable[str]) -> list[tuple[str, int, float]]:
    """The commonest values with their counts and shares; the rest is one row."""
    counts = Counter(values)
    total = counts.total()
    rows = [(value, count, count / total) for value, count in counts.most_common(_MOST_KINDS)]
    rest = total - sum(count for _, count, _ in rows)
    kinds = len(counts) - len(rows)
    return [*rows, (f"{kinds} other{'s' if kinds > 1 else ''}", rest, rest / total)] if rest else rows


def _spacing(case: CaseSummary) -> str:
    if not case.has_spacing:
        return "unknown"
    return " × ".join(f"{round(mm, _ROUNDED_MM):g}" for mm in case.spacing_mm[: 2 if case.is_flat else 3])


def _cards(cases: Sequence[CaseSummary]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Volumes and 2D images apart, since their pictures are of different width."""
    groups = [("Volumes", [case for case in cases if not case.is_flat])]
    groups += [("2D images", [case for case in cases if case.is_flat])]
    return [(name, [_card(case) for case in members]) for name, members in groups if members]


def _card(case: CaseSummary) -> dict[str, Any]:
    return {
        "case": case,
        "grid": case.grid,
        "spacing": _spacing(case),
        "range": f"{_number(case.low)} to {_number(case.high)}" + (f" {case.unit}" if case.unit != "arbitrary" else ""),
        "codes": sorted({code_of(warning) for warning in case.warnings}),
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _lines(ledger: Ledger, wanted: Outcome) -> Iterable[tuple[str, int]]:
    """Code and line in refused.csv of each entry; the file has one line a booked warning, and a head."""
    return [(entry.code, line) for line, entry in enumerate(ledger.noted(), start=2) if entry.outcome is wanted]


def _code_rows(found: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """One row a code, the commonest first, with meaning, remedy and lines."""
    lines: dict[str, list[int]] = defaultdict(list)
    for code, line in found:
        lines[code].append(line)
    ordered = sorted(lines.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [
        {
            "code": code,
            "count": len(numbers),
            "meaning": explain.meaning(code),
            "remedy": explain.remedy(code),
            "lines": _ranges(numbers),
        }
        for code, numbers in ordered
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """2, 5-9 for 2, 5, 6, 7, 8, 9; long lists are cut."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(low) if low == high else f"{low}–{high}" for low, high in spans[:_MOST_LINES]]
    return ", ".join(texts) + (", …" if len(spans) > _MOST_LINES else "")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _words(text: str) -> Markup:
    """Text with what stands in backticks set as code."""
    return Markup(_BACKTICKS.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704  escaped before


def _remedy(warning: str) -> str:
    return explain.remedy(code_of(warning))
