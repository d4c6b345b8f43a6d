"""What the doctor says of a file or folder, as values, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medssl import explain
from medssl.errors import ExitCode, code_of
from medssl.geometry import Geometry
from medssl.report.words import grid_in_words

Kind = Literal["image", "label", "refused", "ignored", "unread"]

_MOST_LISTED = 16
_MOST_IN_FULL = 6
_MOST_SHORT = 40
_MOST_NAMED = 3
_COPY = "a copy of "


@dataclass(frozen=True)
class Values:
    """What the voxels hold.

    Args:
        dtype: As read.
        unit: ``HU``, ``SUV``, ``arbitrary`` or ``label``.
        channels: Values a voxel.
        minimum: Smallest.
        maximum: Largest.
        percentiles: 1st, 50th and 99th.
        labels: Label values without the background, of a label map.
    """

    dtype: str
    unit: str
    channels: int
    minimum: float
    maximum: float
    percentiles: tuple[float, ...]
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One image, label map or other thing, and what is known of it.

    Args:
        name: Path as given, or the series of a folder.
        kind: What it is to medssl; ``unread`` where there were too many to look at.
        format: As in :class:`medssl.io.Source`.
        files: How many files it takes.
        order: How its slices were put in order.
        volumes: What each of its volumes is.
        geometry: Grid of the first volume, or of the one that was chosen.
        values: Of that volume; None where only headers were read.
        facts: Harmless header fields.
        warnings: ``W_CODE: sentence`` strings.
        code: Of a refusal.
        reason: Why it is refused or ignored.
    """

    name: str
    kind: Kind
    format: str = ""
    files: int = 1
    order: str = ""
    volumes: tuple[str, ...] = ()
    geometry: Geometry | None = None
    values: Values | None = None
    facts: Mapping[str, str | float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    code: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was found at a path.

    Args:
        path: As given.
        findings: Images first, then what was refused, then what was ignored or not looked at.
    """

    path: Path
    findings: tuple[Finding, ...]

    def of(self, *kinds: Kind) -> tuple[Finding, ...]:
        """Findings of these kinds."""
        return tuple(finding for finding in self.findings if finding.kind in kinds)

    def exit_code(self) -> ExitCode:
        """0 when all is well, 3 when some images were refused, 4 when none can be read."""
        if not self.of("image", "label"):
            return ExitCode.NO_INPUT
        return ExitCode.SOME_REJECTED if self.of("refused") else ExitCode.OK

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {"path": str(self.path), "findings": [_as_dict(finding) for finding in self.findings]}

    def text(self, *, in_full: bool = False) -> str:
        """All of it, to be read by people.

        Args:
            in_full: Tell all of every image, however many there are; else many images take one line each.
        """
        usable, refused = self.of("image", "label"), self.of("refused")
        in_full = in_full or len(usable) + len(refused) <= _MOST_IN_FULL
        if in_full:
            blocks = ["\n".join(_lines(finding)) for finding in (*usable, *refused)]
        else:
            blocks = [*_short_blocks(usable, refused, base=self.path), *_codes_block((*usable, *refused))]
        if len(self.findings) != 1:
            blocks.insert(0, self._counts())
        blocks += _left_blocks(self.of("ignored", "unread"), most=_MOST_LISTED if in_full else _MOST_NAMED)
        if not in_full:
            blocks.append("More of one: `medssl doctor` with its path. All of all: `--all`.")
        return "\n\n".join(blocks)

    def _counts(self) -> str:
        parts = [
            f"{len(self.of('image', 'label'))} to read",
            f"{len(self.of('refused'))} refused",
            f"{len(self.of('ignored'))} ignored",
        ]
        unread = len(self.of("unread"))
        return f"{self.path}: {', '.join(parts + [f'{unread} not looked at'] * bool(unread))}"


def _as_dict(finding: Finding) -> dict[str, Any]:
    """Only what is known."""
    result: dict[str, Any] = {
        "name": finding.name,
        "kind": finding.kind,
        "format": finding.format,
        "files": finding.files,
        "order": finding.order,
        "volumes": list(finding.volumes),
        "facts": dict(finding.facts),
        "warnings": list(finding.warnings),
        "code": finding.code,
        "reason": finding.reason,
    }
    if finding.code:
        result |= {"meaning": explain.meaning(finding.code), "remedy": explain.remedy(finding.code)}
    if finding.geometry is not None:
        geometry = finding.geometry
        result["geometry"] = {
            "words": grid_in_words(geometry),
            **geometry.to_dict(),
            "spacing_mm": list(geometry.spacing_mm),
            "orientation": geometry.orientation,
            "extent_mm": _extent(geometry),
        }
    if finding.values is not None:
        result["values"] = {name: _plain(value) for name, value in vars(finding.values).items()}
    return {name: value for name, value in result.items() if value not in ("", [], {})}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _extent(geometry: Geometry) -> list[float]:
    return [n * mm for n, mm in zip(geometry.shape, geometry.spacing_mm, strict=True)]


def _lines(finding: Finding) -> list[str]:
    """A finding as text: its name, then indented lines."""
    lines = [finding.name]
    if finding.format:
        files = f", {finding.files} files" if finding.files > 1 else ""
        volumes = f", {len(finding.volumes)} volumes" if finding.volumes else ""
        lines.append(f"  {finding.format}{files}{volumes}")
    if finding.volumes:
        lines.append(f"  choose one with --volume: {_volumes_in_words(finding.volumes)}")
        lines += [] if finding.format == "dicom" else ["  a scan refuses it unless --volumes says which to take"]
    lines += [f"  {finding.order}"] if finding.order else []
    lines += _geometry_lines(finding.geometry) if finding.geometry is not None else []
    lines += _value_lines(finding.values) if finding.values is not None else []
    if finding.facts:
        lines.append("  header: " + ", ".join(f"{name} {_value(value)}" for name, value in finding.facts.items()))
    for warning in finding.warnings:
        lines += [f"  {warning}", *_explained(code_of(warning), indent="      ")]
    if finding.kind == "image" and finding.values is not None and not finding.warnings:
        lines.append("  no warnings")
    if finding.code:
        lines += [f"  refused: {finding.code}", f"  {finding.reason}", *_explained(finding.code, indent="  ")]
    elif finding.reason:
        lines.append(f"  {finding.reason}")
    return lines


def _geometry_lines(geometry: Geometry) -> list[str]:
    if _has_no_place(geometry):
        return [f"  {grid_in_words(geometry)}", "  no position in the patient is known"]
    extent = " x ".join(f"{mm:.4g}" for mm in _extent(geometry))
    origin = ", ".join(f"{mm:.2f}" for mm in np.round(geometry.origin_mm, 2) + 0.0)  # -0 becomes 0
    lines = [f"  {grid_in_words(geometry)}"]
    lines.append(f"  covers {extent} mm; array axes point to {geometry.orientation}; first voxel at ({origin}) mm RAS+")
    lines.append("  voxel index to mm (RAS+):")
    rounded = geometry.affine[:3].round(4) + 0.0
    lines += ["    " + " ".join(f"{value:10.4f}" for value in row) for row in rounded.tolist()]
    return lines


def _value_lines(values: Values) -> list[str]:
    unit = "of no fixed unit" if values.unit == "arbitrary" else f"in {values.unit}"
    if values.unit == "label":
        return [f"  label map of {values.dtype}: values {', '.join(map(str, values.labels)) or 'none but background'}"]
    low, middle, high = values.percentiles
    channels = f"{values.channels} channels, " if values.channels > 1 else ""
    return [
        f"  values {unit} ({channels}{values.dtype}): {values.minimum:.6g} to {values.maximum:.6g}, "
        f"1 % below {low:.6g}, half below {middle:.6g}, 1 % above {high:.6g}"
    ]


def _explained(code: str, *, indent: str) -> list[str]:
    found = explain.explain(code)
    if found is None:
        return []
    lines = [f"{indent}what it means: {found.meaning}"]
    return lines if found.remedy == explain.NOTHING else [*lines, f"{indent}what to do: {found.remedy}"]


def _short_blocks(usable: Sequence[Finding], refused: Sequence[Finding], *, base: Path) -> list[str]:
    """One line a finding, below a heading; names are those inside ``base``."""
    blocks = []
    for heading, findings in (("to read:", usable), ("refused:", refused)):
        lines = [f"  {_inside(finding.name, base)}: {_in_short(finding)}" for finding in findings[:_MOST_SHORT]]
        lines += [f"  and {len(findings) - _MOST_SHORT} more"] if len(findings) > _MOST_SHORT else []
        blocks += ["\n".join([heading, *lines])] if lines else []
    return blocks


def _in_short(finding: Finding) -> str:
    if finding.kind == "refused":
        _, _, reason = finding.reason.rpartition(f"{finding.name}: ")
        return f"{finding.code}: {reason}"
    parts = [str(finding.facts.get("modality", "") or finding.format)]
    parts += [grid_in_words(finding.geometry)] if finding.geometry is not None else [finding.reason]
    parts += [f"{len(finding.volumes)} volumes"] if finding.volumes else []
    parts += dict.fromkeys(code_of(warning) for warning in finding.warnings)
    return "; ".join(part for part in parts if part)


def _codes_block(findings: Sequence[Finding]) -> list[str]:
    """What the codes of the short lines mean and ask for, each once."""
    found = Counter(code for finding in findings for code in {finding.code, *map(code_of, finding.warnings)} if code)
    lines = []
    for code, count in sorted(found.items()):
        remedy = "" if explain.remedy(code) == explain.NOTHING else f" {explain.remedy(code)}"
        lines.append(f"  {count} x {code}: {explain.meaning(code)}{remedy}")
    return ["\n".join(["what the codes mean:", *lines])] if lines else []


def _left_blocks(left: Sequence[Finding], *, most: int) -> list[str]:
    """Files that were ignored or not looked at by reason, a few names each."""
    groups: dict[str, list[str]] = {}
    for finding in left:
        reason = finding.reason.replace(f"{finding.name}: ", "").rstrip(".")
        name = finding.name
        if reason.startswith(_COPY):
            name, reason = f"{name}, of {reason.removeprefix(_COPY)}", "the same DICOM image as another file"
        groups.setdefault(f"{finding.kind}, {reason}".replace("unread, ", ""), []).append(name)
    blocks = []
    for reason, names in groups.items():
        more = [f"  and {len(names) - most} more"] if len(names) > most else []
        blocks.append("\n".join([f"{reason}:", *(f"  {name}" for name in names[:most]), *more]))
    return blocks


def _volumes_in_words(volumes: Sequence[str]) -> str:
    """Number and name of each, or the numbers alone where there are no names."""
    if all(what == f"volume {k}" for k, what in enumerate(volumes)):
        return f"0 to {len(volumes) - 1}"
    listed = "; ".join(f"{k}: {what}" for k, what in enumerate(volumes[:_MOST_LISTED]))
    return listed + f"; and {len(volumes) - _MOST_LISTED} more" * (len(volumes) > _MOST_LISTED)


def _has_no_place(geometry: Geometry) -> bool:
    """Whether it is a picture on the grid that stands for a missing position."""
    dx, dy, dz = geometry.spacing_mm
    placeless = np.diag([-dx, -dy, dz, 1.0])
    return geometry.shape[2] == 1 and bool(np.allclose(geometry.affine, placeless, rtol=0, atol=1e-9))


def _inside(name: str, base: Path) -> str:
    return name.removeprefix(f"{base}/")


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
