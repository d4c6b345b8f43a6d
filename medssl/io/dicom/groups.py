"""Which frames of one series may be one stack: of one frame of reference, modality, direction, matrix and spacing.

Groups that only together make an even stack are slices of one stack of which some were changed; they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medssl.errors import GeometryError
from medssl.io.dicom.model import Frame, Header
from medssl.io.dicom.proof import prove

_ORIENTATION_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-4
_MAIN_SLICES = 4
_ODD = (
    (0, "E_AMBIGUOUS_STACK", "FrameOfReferenceUID"),
    (1, "E_AMBIGUOUS_STACK", "Modality"),
    (2, "E_IOP", "directions"),
    (3, "E_MIXED_SHAPE", "Rows and Columns"),
    (4, "E_MIXED_SPACING", "PixelSpacing"),
)


@dataclass(frozen=True)
class Group:
    """Frames of one series that may be one stack, and the key that keeps them from the others.

    Args:
        key: Frame of reference, modality, directions, matrix with samples, pixel spacing.
        frames: At least one.
    """

    key: tuple[Hashable, ...]
    frames: list[Frame]

    @property
    def paths(self) -> set[Path]:
        """Files of the frames."""
        return {frame.path for frame in self.frames}


def grouped(placed: Sequence[Header]) -> list[Group]:
    """Frames with a place by frame of reference, modality, directions, matrix and samples, and pixel spacing."""
    groups: dict[tuple[Hashable, ...], list[Frame]] = {}
    frames = [frame for header in placed for frame in header.frames]
    turns = _clusters((frame.orientation for frame in frames), absolute=_ORIENTATION_TOLERANCE)
    spacings = _clusters((frame.spacing_mm for frame in frames), relative=_SPACING_TOLERANCE)
    for header in placed:
        samples = header.pixels.samples if header.pixels else 1
        for frame in header.frames:
            key = (
                frame.frame_of_reference,
                header.modality,
                turns[frame.orientation],
                (frame.rows, frame.columns, samples),
                spacings[frame.spacing_mm],
            )
            groups.setdefault(key, []).append(frame)
    return [Group(key, frames) for key, frames in groups.items()]


def unmixed(groups: Sequence[Group]) -> tuple[list[Group], list[tuple[set[Path], GeometryError]]]:
    """Groups that are sound, and files of groups that only together make one even stack.

    Args:
        groups: Of one series.

    Returns:
        Sound groups, the largest first, and files with the reason: E_IOP, E_MIXED_SHAPE, E_MIXED_SPACING or
            E_AMBIGUOUS_STACK.
    """
    refused: list[tuple[set[Path], GeometryError]] = []
    left = sorted(groups, key=lambda group: -len(group.frames))
    sound: list[Group] = []
    while left:
        main = left.pop(0)
        odd = {id(other): fault for other in left if (fault := _fault(main, other))}
        if not odd:
            sound.append(main)
            continue
        others = [other for other in left if id(other) in odd]
        _, code, tags = odd[id(others[0])]
        paths = main.paths.union(*(other.paths for other in others))
        error = GeometryError(
            f"{files_in_words(paths)}: {tags} differ within one stack of slices, first in {min(others[0].paths).name}; "
            "all must agree. Leave out the odd slices or export the series again.",
            code=code,
        )
        refused.append((paths, error))
        left = [other for other in left if id(other) not in odd]
    return sound, refused


def without_lone(groups: Sequence[Group]) -> tuple[list[Group], list[tuple[Path, str]]]:
    """Groups without the lone slices of another orientation or matrix beside a stack (localizers), and a note on each.

    Args:
        groups: Of one series.
    """
    if max((len(group.frames) for group in groups), default=0) < _MAIN_SLICES:
        return list(groups), []
    lone = [group.frames[0].path for group in groups if len(group.frames) == 1]
    return [group for group in groups if len(group.frames) > 1], [
        (path, f"W_LOCALIZER: {path.name} is a lone slice of another orientation, matrix or place; it is left out.")
        for path in lone
    ]


def files_in_words(paths: Collection[Path]) -> str:
    """Name of files of one series in a message: the first, and how many more."""
    first = min(paths)
    return str(first) if len(paths) == 1 else f"{first} and {len(paths) - 1} more of its series"


def _clusters(
    values: Iterable[tuple[float, ...] | None], *, absolute: float = 0.0, relative: float = 0.0
) -> dict[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Each value with the first one that it is equal to within the tolerance."""
    found: dict[tuple[float, ...] | None, tuple[float, ...] | None] = {None: None}
    first: list[tuple[float, ...]] = []
    for value in values:
        if value is None or value in found:
            continue
        array = np.asarray(value)
        for other in first:
            if (np.abs(array - other) <= absolute + relative * np.abs(other)).all():
                found[value] = other
                break
        else:
            first.append(value)
            found[value] = value
    return found


def _fault(main: Group, other: Group) -> tuple[int, str, str] | None:
    """What sets two groups apart that belong together; None where they are images of their own."""
    differing = [k for k, (one, two) in enumerate(zip(main.key, other.key, strict=True)) if one != two]
    fault = next(odd for odd in _ODD if odd[0] == differing[0])
    is_lone = len(other.frames) == 1
    if fault[1] == "E_AMBIGUOUS_STACK" and not is_lone:
        return None
    is_lone_spacing = fault[1] == "E_MIXED_SPACING" and is_lone
    return fault if is_lone_spacing or _is_one_stack(main, other) else None


def _is_one_stack(main: Group, other: Group) -> bool:
    """Whether the places of both together make one even stack."""
    first = main.frames[0]
    alike = [
        replace(
            frame,
            orientation=first.orientation,
            spacing_mm=first.spacing_mm or (1.0, 1.0),
            rows=first.rows,
            columns=first.columns,
        )
        for frame in (*main.frames, *other.frames)
    ]
    try:
        prove(alike, where="")
    except GeometryError:
        return False
    return len(alike) > 2
