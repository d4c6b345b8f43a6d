"""From the headers of any set of DICOM files to images whose geometry is proven, and a reason for every other file.

Series are split by frame of reference, modality, orientation, matrix and pixel spacing, then into volumes. Nothing is
sorted by name or number, and no distance is averaged: what does not prove to be one even grid is refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medssl.errors import CaseError, GeometryError, MedSSLError, code_of
from medssl.io.dicom.groups import Group, files_in_words, grouped, unmixed, without_lone
from medssl.io.dicom.model import Assembly, Frame, Header, Item, Stack
from medssl.io.dicom.proof import single
from medssl.io.dicom.repeats import SamePixels, distinct, equal_pixels
from medssl.io.dicom.split import volumes

_VOLUMETRIC = ("CT", "MR", "PT")
_ONE_GRID_MM = 0.05


@dataclass
class _Result:
    items: list[Item] = field(default_factory=list)
    refused: list[tuple[tuple[Path, ...], MedSSLError]] = field(default_factory=list)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    notes: list[tuple[Path, str]] = field(default_factory=list)

    def refuse(self, paths: Iterable[Path], error: MedSSLError) -> None:
        self.refused.append((tuple(sorted(set(paths))), error))


def assemble(
    headers: Sequence[Header],
    *,
    regularise: bool = False,
    same_pixels: SamePixels | None = None,
    broken: Sequence[Path] = (),
) -> Assembly:
    """Sort files into images, refusals, duplicates, labels and left-overs.

    Args:
        headers: In any order; the result does not depend on it.
        regularise: Put series with gaps or uneven distances on a regular grid instead of refusing them.
        same_pixels: Whether two files, whose headers say the same, hold equal pixels; by default they are
            compared. Asked only about repeated SOP instances and repeated places.
        broken: Files that could not be read; images of several files in the same folder carry W_BROKEN_NEIGHBOUR, as
            their first or last slices may be among them.

    Returns:
        Every file in at least one column. Refusals carry E_PATIENT_MIX, E_DUP_SOP, E_NO_GEOMETRY, E_MIXED_SPACING,
        E_MIXED_SHAPE, E_IOP, E_SPACING, E_DUP_POSITION, E_MISSING_SLICE, E_NONUNIFORM or E_AMBIGUOUS_STACK.
    """
    same = same_pixels or equal_pixels
    result = _Result()
    ordered = sorted(headers, key=lambda header: str(header.path))
    series: dict[tuple[str, str], list[Header]] = {}
    for header in ordered:
        if header.kind == "image":
            key = (header.series, "" if header.series else header.patient)
            series.setdefault(key, []).append(header)
    for members in series.values():
        _series(members, result, same=same, regularise=regularise)
    _say_broken(result.items, broken)
    return Assembly(
        items=tuple(_named(result.items)),
        refused=tuple(result.refused),
        duplicates=tuple(result.duplicates),
        labels=tuple(header for header in ordered if header.kind != "image"),
        notes=tuple(result.notes),
    )


def _series(members: Sequence[Header], result: _Result, *, same: SamePixels, regularise: bool) -> None:
    """One series, from its headers; everything that goes wrong stays within it."""
    where = files_in_words([header.path for header in members])
    if len({header.patient for header in members}) > 1:
        result.refuse(
            (header.path for header in members),
            CaseError(
                f"{where}: one series holds files of {len({h.patient for h in members})} patients; one is needed. "
                "Export the patients apart.",
                code="E_PATIENT_MIX",
            ),
        )
        return
    kept, copies, clash = distinct(members, same=same)
    if clash is not None:
        result.refuse(
            (header.path for header in members),
            CaseError(
                f"{where}: {clash[0].name} and {clash[1].name} have one SOP instance UID and different content; each "
                "instance may be there once. Keep the right one.",
                code="E_DUP_SOP",
            ),
        )
        return
    result.duplicates.extend(copies)
    by_path = {header.path: header for header in kept}
    placed = [header for header in kept if _is_placed(header)]
    loose = [header for header in kept if not _is_placed(header)]
    if not placed:
        _flat(loose, result)
    elif _may_leave_out(loose, placed, result):
        groups, mixed = unmixed(grouped(placed))
        for paths, error in mixed:
            result.refuse(paths, error)
        groups, notes = without_lone(groups)
        result.notes.extend(notes)
        before = len(result.items)
        for group in groups:
            _volume(group, by_path, result, same=same, regularise=regularise)
        _say_split(result.items, before)


def _is_placed(header: Header) -> bool:
    return all(frame.position_mm is not None and frame.orientation is not None for frame in header.frames)


def _may_leave_out(loose: Sequence[Header], placed: Sequence[Header], result: _Result) -> bool:
    """Files without position beside slices that have one: a screen save is left out, a slice refuses the series."""
    looks = {_look(header) for header in placed}
    kinds = {header.facts.get("image_type") for header in placed}
    lost = [
        header.path
        for header in loose
        if _look(header) in looks and (header.facts.get("image_type") in kinds or not _is_derived(header))
    ]
    if lost:
        paths = [header.path for header in (*loose, *placed)]
        result.refuse(
            paths,
            GeometryError(
                f"{files_in_words(paths)}: {len(lost)} slices, first {lost[0].name}, have no position or orientation; "
                "all slices need both. Export the series again.",
                code="E_NO_GEOMETRY",
            ),
        )
        return False
    for header in loose:
        note = f"W_SC: {header.path.name} has no position in the patient (a screen save); it is left out."
        result.notes.append((header.path, note))
    return True


def _look(header: Header) -> tuple[object, ...]:
    pixels = header.pixels
    shape = (pixels.rows, pixels.columns, pixels.samples) if pixels else ()
    return header.modality, shape


def _is_derived(header: Header) -> bool:
    return not {"DERIVED", "SECONDARY"}.isdisjoint(str(header.facts.get("image_type", "")).split("\\"))


def _flat(loose: Sequence[Header], result: _Result) -> None:
    """Files without position: 2D images or clips, each an item; slices of CT, MR or PET only when alone."""
    needs_place = [header for header in loose if header.modality in _VOLUMETRIC]
    if sum(len(header.frames) for header in needs_place) > 1:
        where = files_in_words([header.path for header in needs_place])
        result.refuse(
            (header.path for header in needs_place),
            GeometryError(
                f"{where}: {len(needs_place)} {needs_place[0].modality} files have no position or orientation; slices "
                "of a volume need both. Export the series again.",
                code="E_NO_GEOMETRY",
            ),
        )
        loose = [header for header in loose if header.modality not in _VOLUMETRIC]
    for header in loose:
        where = str(header.path)
        is_clip = len(header.frames) > 1
        try:
            stacks = tuple(
                single(frame, where=where, what=f"frame {frame.index + 1}" if is_clip else "")
                for frame in header.frames
            )
        except GeometryError as error:
            result.refuse([header.path], error)
            continue
        result.items.append(_item(stacks, [header]))


def _volume(
    group: Group, by_path: Mapping[Path, Header], result: _Result, *, same: SamePixels, regularise: bool
) -> None:
    where = files_in_words(group.paths)

    def same_frames(first: Frame, second: Frame) -> bool:
        one, other = by_path[first.path], by_path[second.path]
        return first.path != second.path and len(one.frames) == len(other.frames) == 1 and same(one, other)

    try:
        found = volumes(group.frames, where=where, same=same_frames, regularise=regularise)
    except GeometryError as error:
        result.refuse(group.paths, error)
        return
    for frames, reason in found.refused:
        result.refuse((frame.path for frame in frames), reason)
    result.duplicates.extend((frame.path, original.path) for frame, original in found.repeated)
    for stacks in _on_one_grid(found.stacks):
        headers = [by_path[path] for path in sorted({frame.path for stack in stacks for frame in stack.frames})]
        result.items.append(_item(stacks, headers))


def _say_split(items: list[Item], start: int) -> None:
    """Tell each image of a series that holds several on different grids."""
    count = len(items) - start
    if count > 1:
        warning = f"W_SPLIT: the series holds {count} images on different grids, by directions, matrix or place."
        items[start:] = [_warned(item, warning) for item in items[start:]]


def _say_broken(items: list[Item], broken: Sequence[Path]) -> None:
    counts = Counter(path.parent for path in broken)
    for index, item in enumerate(items):
        beside = sum(counts[folder] for folder in {path.parent for path in item.paths}) if counts else 0
        if beside and len(item.paths) > 1:
            warning = (
                f"W_BROKEN_NEIGHBOUR: {beside} files of the same folder could not be read; slices at the ends may be "
                "missing."
            )
            items[index] = _warned(item, warning)


def _warned(item: Item, warning: str) -> Item:
    return replace(item, stacks=tuple(stack.warned(warning) for stack in item.stacks))


def _on_one_grid(stacks: Sequence[Stack]) -> list[tuple[Stack, ...]]:
    grids: list[list[Stack]] = []
    for stack in stacks:
        for grid in grids:
            if grid[0].geometry.isclose(stack.geometry, atol_mm=_ONE_GRID_MM):
                grid.append(stack)
                break
        else:
            grids.append([stack])
    return [tuple(grid) for grid in grids]


def _item(stacks: Sequence[Stack], headers: Sequence[Header]) -> Item:
    """Item with the facts that all files share and the warnings of the files of each stack, one of each code."""
    first = headers[0]
    facts = {
        name: value
        for name, value in first.facts.items()
        if all(header.facts.get(name) == value for header in headers[1:])
    }
    said = {header.path: header.warnings for header in headers if header.warnings}
    complete = []
    for stack in stacks:
        warnings = list(stack.warnings)
        if stack.geometry.shape[2] == 1 and first.modality in _VOLUMETRIC:
            warnings.append(
                f"W_SINGLE_SLICE: one slice, {stack.geometry.spacing_mm[2]:.4g} mm thick; it is read as a 2D image."
            )
        codes = set(map(code_of, warnings))
        for path in dict.fromkeys(frame.path for frame in stack.frames):
            for warning in said.get(path, ()):
                code = code_of(warning)
                if code not in codes:
                    codes.add(code)
                    warnings.append(warning)
        complete.append(replace(stack, warnings=tuple(warnings)))
    return Item(
        series=first.series,
        patient=first.patient,
        stacks=tuple(complete),
        modality=first.modality,
        facts=facts,
        name=_name(first.series, complete),
    )


def _name(series: str, stacks: Sequence[Stack]) -> str:
    digest = hashlib.blake2b(series.encode(), digest_size=8)
    for part in sorted(f"{frame.instance} {frame.index} {frame.tile}" for stack in stacks for frame in stack.frames):
        digest.update(part.encode())
    return digest.hexdigest()


def _named(items: Sequence[Item]) -> list[Item]:
    """Items sorted by their first file; files without UIDs may share a name, which then gets a number."""
    seen: dict[str, int] = {}
    named = []
    for item in sorted(items, key=lambda item: (str(item.paths[0]), item.name)):
        count = seen[item.name] = seen.get(item.name, 0) + 1
        named.append(item if count == 1 else replace(item, name=f"{item.name}{count:02x}"))
    return named
