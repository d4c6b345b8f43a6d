"""What the doctor says of a file or folder, as values, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medssl import explain
from medssl.errors import ExitCode
from medssl.geometry import Geometry
from medssl.report.words import grid_in_words

Kind = Literal["image", "label", "refused", "ignored"]

_MOST_LISTED = 16


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
        kind: What it is to medssl.
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
        findings: Images first, then what was refused, then what was ignored.
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

    def text(self) -> str:
        """All of it, to be read by people."""
        usable, refused, ignored = self.of("image", "label"), self.of("refused"), self.of("ignored")
        blocks = ["\n".join(_lines(finding)) for finding in (*usable, *refused)]
        if len(self.findings) > 1:
            counts = f"{len(usable)} to read, {len(refused)} refused, {len(ignored)} ignored"
            blocks.insert(0, f"{self.path}: {counts}")
        blocks += _ignored_blocks(ignored)
        return "\n\n".join(blocks)


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
        listed = "; ".join(f"{k}: {what}" for k, what in enumerate(finding.volumes[:_MOST_LISTED]))
        more = f"; and {len(finding.volumes) - _MOST_LISTED} more" * (len(finding.volumes) > _MOST_LISTED)
        lines.append(f"  choose one with --volume: {listed}{more}")
    lines += [f"  {finding.order}"] if finding.order else []
    lines += _geometry_lines(finding.geometry) if finding.geometry is not None else []
    lines += _value_lines(finding.values) if finding.values is not None else []
    if finding.facts:
        lines.append("  header: " + ", ".join(f"{name} {value}" for name, value in finding.facts.items()))
    for warning in finding.warnings:
        lines += [f"  {warning}", *_explained(warning.partition(":")[0], indent="      ")]
    if finding.kind == "image" and finding.values is not None and not finding.warnings:
        lines.append("  no warnings")
    if finding.code:
        lines += [f"  refused: {finding.code}", f"  {finding.reason}", *_explained(finding.code, indent="  ")]
    elif finding.reason:
        lines.append(f"  {finding.reason}")
    return lines


def _geometry_lines(geometry: Geometry) -> list[str]:
    extent = " x ".join(f"{mm:.4g}" for mm in _extent(geometry))
    origin = ", ".join(f"{mm:.2f}" for mm in geometry.origin_mm)
    lines = [f"  {grid_in_words(geometry)}"]
    lines.append(f"  covers {extent} mm; array axes point to {geometry.orientation}; first voxel at ({origin}) mm RAS+")
    lines.append("  voxel index to mm (RAS+):")
    rounded = geometry.affine[:3].round(4) + 0.0  # -0 becomes 0
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


def _ignored_blocks(ignored: Sequence[Finding]) -> list[str]:
    """Ignored files by reason, a few names each."""
    groups: dict[str, list[str]] = {}
    for finding in ignored:
        groups.setdefault(finding.reason.replace(f"{finding.name}: ", ""), []).append(finding.name)
    blocks = []
    for reason, names in groups.items():
        more = [f"  and {len(names) - _MOST_LISTED} more"] if len(names) > _MOST_LISTED else []
        blocks.append("\n".join([f"ignored, {reason}:", *(f"  {name}" for name in names[:_MOST_LISTED]), *more]))
    return blocks
