"""Everything that medssl knows of a file or folder: what it is, where it lies, what is wrong, what to do."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medssl import io
from medssl.data.archive import is_archive
from medssl.data.convert import read_first
from medssl.data.diagnosis import Diagnosis, Finding, Kind, Values
from medssl.data.reading import Reading, label_values_of
from medssl.data.walk import walk
from medssl.errors import MedSSLError, ReadError
from medssl.io import integrity
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.elements import is_dicom
from medssl.io.dicom.header import read_header
from medssl.io.dicom.model import Header, Item, Stack
from medssl.io.dicom.reader import may_be_dicom, named_alike
from medssl.io.dicom.series_list import SUFFIX, write_list
from medssl.volume import Volume

_KINDS: tuple[Kind, ...] = ("image", "label", "refused", "ignored", "unread")
_HEAD_BYTES = 160
_MOST_READ = 24
_PERCENTILES = (1, 50, 99)
_MOST_SAMPLED = 4_000_000
_PLAIN = Reading()


def doctor(path: Path, *, label: bool = False, on: Path | None = None, reading: Reading = _PLAIN) -> Diagnosis:
    """Look at one file or folder as a scan would, and tell all; nothing is written.

    Args:
        path: File of any format, or a folder with any mix of files.
        label: Whether it is a label map.
        on: Image that the label map must lie on; needed for contours.
        reading: How files are read, such as which of several volumes.

    Raises:
        ReadError: E_MISSING, if there is nothing at ``path``.
    """
    if not path.exists():
        raise ReadError(f"{path}: there is no such file or folder. Correct the path.", code="E_MISSING")
    if path.is_dir() or is_archive(path):
        with tempfile.TemporaryDirectory(prefix="medssl-doctor-") as name:
            findings = _folder(path, reading, unpack_to=Path(name))
    elif label or not _holds_dicom(path):
        findings = [_file(path, reading, label=label, on=on)]
    else:
        findings = _dicom([path], reading)
    return Diagnosis(path, tuple(sorted(findings, key=lambda finding: _KINDS.index(finding.kind))))


def _folder(root: Path, reading: Reading, *, unpack_to: Path) -> list[Finding]:
    """Every file below a folder or in an archive, DICOM files by their content, others by name."""
    findings: list[Finding] = []
    dicom: list[Path] = []
    images: list[Path] = []
    strangers: list[Path] = []
    entries = walk(root, unpack_to=unpack_to)
    for entry in entries:
        if entry.is_hidden:
            findings.append(_ignored(entry.path, "hidden file"))
        elif entry.fault is not None:
            findings.append(_refused(str(entry.path), entry.fault))
        elif _holds_dicom(entry.path):
            dicom.append(entry.path)
        elif io.is_image(entry.path):
            images.append(entry.path)
        else:
            strangers.append(entry.path)
            findings.append(_stranger(entry.path))
    findings += [_file(path, reading, label=False, on=None) for path in images[:_MOST_READ]]
    findings += [
        Finding(
            str(path), "unread", reason=f"not looked at; the first {_MOST_READ} images were, and a scan looks at all"
        )
        for path in images[_MOST_READ:]
    ]
    if dicom:
        findings += _dicom(dicom, reading, strangers=strangers, is_folder=True)
    base = root if root.is_dir() else root.parent
    unpacked = [(entry.path, base / entry.item) for entry in entries if entry.path.is_relative_to(unpack_to)]
    shown = {str(path.parent): str(name.parent) for path, name in unpacked}
    shown |= {str(path): str(name) for path, name in unpacked}
    return [_renamed(finding, shown, unpack_to) for finding in findings] if shown else findings


def _renamed(finding: Finding, shown: Mapping[str, str], folder: Path) -> Finding:
    """The finding with members of an archive called by their place in it, not by where they were unpacked."""

    def member(match: re.Match[str]) -> str:
        return shown.get(match[0], match[0])

    unpacked = re.compile(re.escape(str(folder)) + r"/[\w./-]*[\w]")
    return replace(finding, name=unpacked.sub(member, finding.name), reason=unpacked.sub(member, finding.reason))


def _file(path: Path, reading: Reading, *, label: bool, on: Path | None) -> Finding:
    """One file that is read as a whole."""
    try:
        volume, source = read_first(path, label=label, on=on, reading=reading)
    except MedSSLError as error:
        return _refused(str(path), error)
    return Finding(
        name=str(path),
        kind="label" if label else "image",
        format=source.format,
        volumes=tuple(f"volume {k}" for k in range(source.volumes)) if source.volumes > 1 else (),
        geometry=volume.geometry,
        values=_values(volume),
        facts=source.facts,
        warnings=source.warnings,
    )


def _dicom(
    paths: Sequence[Path], reading: Reading, *, strangers: Sequence[Path] = (), is_folder: bool = False
) -> list[Finding]:
    """What a set of DICOM files amounts to; ``strangers`` lie beside them and are no DICOM."""
    findings: list[Finding] = []
    broken = named_alike(strangers, paths)
    headers: list[Header] = []
    for path in paths:
        try:
            headers.append(read_header(path))
        except MedSSLError as error:
            is_other = error.code == "E_NOT_IMAGE" and is_folder
            if not is_other:
                broken.append(path)
            findings.append(_ignored(path, error.message) if is_other else _refused(str(path), error))
    assembly = assemble(headers, regularise=reading.regularise, broken=broken)
    for files, fault in assembly.refused:
        findings.append(replace(_refused(_common(files), fault), files=len(files), format="dicom"))
    for copy, original in assembly.duplicates:
        findings.append(_ignored(copy, f"a copy of {original}"))
    for path, reason in assembly.notes:
        findings.append(_ignored(path, reason))
    for header in assembly.labels:
        what = "a segmentation" if header.kind == "seg" else "a set of contours"
        reason = f"{what}, which lies on an image; read it with --label --on IMAGE"
        findings.append(Finding(str(header.path), "label", format="dicom", facts=header.facts, reason=reason))
    said = {header.path: header.warnings for header in headers}
    with tempfile.TemporaryDirectory(prefix="medssl-doctor-") as name:
        for place, item in enumerate(assembly.items):
            listed = Path(name) / "series" / f"{item.name}{SUFFIX}" if place < _MOST_READ else None
            warnings = [warning for path in item.paths for warning in said[path]]
            findings.append(_item(item, reading, listed=listed, warnings=warnings))
    return findings


def _item(item: Item, reading: Reading, *, listed: Path | None, warnings: Sequence[str]) -> Finding:
    """One DICOM item; its voxels are read where ``listed`` says where a series list may be put."""
    place = reading.volume if isinstance(reading.volume, int) else 0
    stack = item.stacks[min(place, len(item.stacks) - 1)]
    name = _common(item.paths)
    finding = Finding(
        name=name if len(item.paths) == 1 else f"{name}, series {item.name}",
        kind="image",
        format="dicom",
        files=len(item.paths),
        order=_order(stack),
        volumes=tuple(one.what or f"volume {k}" for k, one in enumerate(item.stacks)) if len(item.stacks) > 1 else (),
        geometry=stack.geometry,
        facts=item.facts,
        warnings=tuple(dict.fromkeys((*warnings, *stack.warnings))),
    )
    if listed is None:
        return finding
    try:
        write_list(item, listed)
        volume, source = read_first(listed, reading=reading)
    except MedSSLError as error:
        refused = _refused(finding.name, error)
        return replace(
            finding, kind="refused", code=refused.code, reason=error.message.replace(str(listed), finding.name)
        )
    return replace(
        finding,
        geometry=volume.geometry,
        values=_values(volume),
        facts={**finding.facts, **source.facts},
        warnings=tuple(dict.fromkeys((*finding.warnings, *source.warnings))),
    )


def _order(stack: Stack) -> str:
    count = len(stack.frames)
    if count == 1:
        return "one picture, nothing to sort"
    across, along, step = stack.geometry.affine[:3, :3].T
    normal = np.cross(across, along)
    distance = abs(float(normal @ step)) / float(np.linalg.norm(normal))
    text = f"{count} slices, sorted by their position along the normal of the slices, {distance:.4g} mm apart"
    if stack.gaps:
        text += f"; {len(stack.gaps)} more {'is' if len(stack.gaps) == 1 else 'are'} interpolated"
    return text


def _values(volume: Volume) -> Values:
    array = volume.array
    step = max(1, array.size // _MOST_SAMPLED)
    sample = array.ravel(order="K")[::step].astype(np.float64)
    return Values(
        dtype=str(array.dtype),
        unit=volume.unit,
        channels=array.shape[0],
        minimum=float(array.min()),
        maximum=float(array.max()),
        percentiles=tuple(float(value) for value in np.percentile(sample, _PERCENTILES)),
        labels=label_values_of(volume) if volume.unit == "label" else (),
    )


def _refused(name: str, error: MedSSLError) -> Finding:
    return Finding(name, "refused", code=error.code, reason=error.message)


def _stranger(path: Path) -> Finding:
    """A file that a scan would leave out, or refuse where it is named like DICOM and holds nothing."""
    try:
        head = integrity.read_bytes(path, most=_HEAD_BYTES)
        content = integrity.detect(head, path=path)
    except MedSSLError as error:
        if error.code == "E_EMPTY" and may_be_dicom(path):
            return _refused(str(path), error)
        return _ignored(path, "no image, neither by its name nor by its content")
    if content == "series list":
        return _ignored(path, "a list that a scan wrote")
    return _ignored(path, f"{content} by its content, but not by its name; a scan takes it once it ends like one")


def _ignored(path: Path, reason: str) -> Finding:
    return Finding(str(path), "ignored", reason=reason)


def _common(paths: Sequence[Path]) -> str:
    """The file itself, or the folder of several."""
    if len(paths) == 1:
        return str(paths[0])
    parents = {path.parent for path in paths}
    return str(parents.pop()) if len(parents) == 1 else f"{min(parents)} and {len(parents) - 1} more folders"


def _holds_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.is_file() and is_dicom(file.read(_HEAD_BYTES))
    except OSError:
        return False
