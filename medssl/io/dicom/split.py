"""Which frames of one series, orientation, matrix and spacing make one volume.

Frames at distinct places make one volume. Where several frames share a place, the smallest set of traits is looked for
(echo, b-value, time point, ...) that gives volumes with one frame at each of the same places. Instance numbers are the
last resort, and said; nothing is ever guessed from them within a volume.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from medssl.errors import GeometryError
from medssl.io.dicom.model import Frame, Stack
from medssl.io.dicom.proof import axes, heights, prove, same_place_mm

_CONTRAST = ("echo", "b_value")
_SETTINGS = ("echo_time_ms", "inversion_time_ms", "flip_angle_deg", "kvp")
_TELLING = ("stack", *_CONTRAST, "time_point", "phase", "image_type", *_SETTINGS)
_TRAITS = (*_TELLING, "trigger_ms", "acquisition", "direction")
_LAST_TRAITS = ("rescale", "file")
_MOST_TRAITS = 3
_FEWEST_SLICES = 3
_BESIDE_MM = 0.05
_MOST_BOXES = 16
_BY_NUMBER = "W_VOLUME_ORDER: only the instance numbers tell the volumes of this series apart."
_WORDS = {
    "echo": "echo {}",
    "b_value": "b-value {}",
    "time_point": "time point {}",
    "phase": "phase {}",
    "trigger_ms": "trigger {} ms",
    "acquisition": "acquisition {}",
    "image_type": "type {}",
    "echo_time_ms": "echo time {} ms",
    "inversion_time_ms": "inversion time {} ms",
    "flip_angle_deg": "flip angle {} degrees",
    "kvp": "{} kVp",
}

Value = str | float | None
SameFrames = Callable[[Frame, Frame], bool]


@dataclass(frozen=True)
class Volumes:
    """Volumes of one set of frames, and what could not be one.

    Args:
        stacks: In the order of their traits.
        refused: Frames with the reason.
        repeated: Frame left out because it repeats another, and that other.
    """

    stacks: tuple[Stack, ...] = ()
    refused: tuple[tuple[tuple[Frame, ...], GeometryError], ...] = ()
    repeated: tuple[tuple[Frame, Frame], ...] = ()


@dataclass(frozen=True)
class _Part:
    key: tuple[Value, ...]
    frames: list[Frame]
    what: str


def volumes(frames: Sequence[Frame], *, where: str, same: SameFrames, regularise: bool = False) -> Volumes:
    """Split frames into volumes and prove each.

    Args:
        frames: Of one orientation, matrix and pixel spacing, all with a position.
        where: Object named in a refusal.
        same: Whether two frames have equal pixels; asked only about frames at one place that nothing tells apart.
        regularise: As in :func:`medssl.io.dicom.proof.prove`.

    Raises:
        GeometryError: E_AMBIGUOUS_STACK, E_DUP_POSITION, E_NONUNIFORM or E_MISSING_SLICE, if no volume comes out.
    """
    if not _shared_places(frames, where=where):
        return _distinct(frames, where=where, regularise=regularise)
    parts = _by_traits(frames, where=where) or _side_by_side(frames, where=where)
    if parts:
        return _proven(parts, where=where, regularise=regularise)
    parts = _by_number(frames, where=where)
    if parts:
        return _proven(parts, where=where, regularise=regularise, warning=_BY_NUMBER)
    kept, repeated = _without_repeats(frames, same, where=where)
    if repeated:
        rest = volumes(kept, where=where, same=_never, regularise=regularise)
        return Volumes(rest.stacks, rest.refused, (*repeated, *rest.repeated))
    raise _ambiguous(frames, where=where)


def _never(_first: Frame, _second: Frame) -> bool:
    return False


def _distinct(frames: Sequence[Frame], *, where: str, regularise: bool) -> Volumes:
    """Frames at distinct places: one volume, unless contrasts that interleave prove to be several."""
    mixed = [name for name in _TELLING if len({frame.traits.get(name) for frame in frames}) > 1]
    try:
        whole = prove(frames, where=where)
    except GeometryError as error:
        parts = _separate(frames, where=where) if error.code == "E_NONUNIFORM" else []
        if parts:
            return _proven(parts, where=where, regularise=False)
        if not regularise:
            raise
        whole = prove(frames, where=where, regularise=True)
    if not mixed or len(frames) == 1:
        return Volumes((whole,))
    parts = _separate(frames, names=mixed, where=where)
    if parts and _interleave([part.frames for part in parts], where=where):
        return _proven(parts, where=where, regularise=False)
    if not _is_pure(frames):
        raise GeometryError(
            f"{where}: slices of one volume differ in {' and '.join(mixed)}; one value is needed. Leave out the odd "
            "slices.",
            code="E_AMBIGUOUS_STACK",
        )
    warning = f"W_MIXED_TRAITS: slices of this volume differ in {' and '.join(mixed)}."
    return Volumes((whole.warned(warning),))


def _separate(frames: Sequence[Frame], *, where: str, names: Sequence[str] | None = None) -> list[_Part]:
    """Parts by one trait, each of at least three slices that prove to be even; none if there are no such."""
    for name in _varying(frames) if names is None else names:
        parts = _parts(frames, (name,))
        if min(len(part.frames) for part in parts) >= _FEWEST_SLICES and all(
            _is_pure(part.frames) and _proves(part.frames, where=where) for part in parts
        ):
            return parts
    return []


def _interleave(groups: Sequence[Sequence[Frame]], *, where: str) -> bool:
    first = groups[0][0]
    along = [heights([first, *group], where=where)[1:] for group in groups]
    ranges = sorted((values.min(), values.max()) for values in along)
    return any(lower[1] > upper[0] for lower, upper in itertools.pairwise(ranges))


def _by_traits(frames: Sequence[Frame], *, where: str) -> list[_Part]:
    """Smallest set of traits whose groups have one frame at each of the same places.

    Groups of other places count when each proves alone; groups that lack a few places of the others count as volumes
    with slices missing, as long as they are not mere repeats.

    Raises:
        GeometryError: E_AMBIGUOUS_STACK, if telling traits give other whole volumes as well.
    """
    names = _varying(frames)
    settings = [name for name in names if name in _SETTINGS]
    places = _places(frames, where=where)
    place = dict(zip(map(id, frames), places, strict=True))
    columns = {name: [_value(frame, name) for frame in frames] for name in names}
    lacking: list[_Part] = []
    for size in range(1, _MOST_TRAITS + 1):
        for chosen in itertools.combinations(names, size):
            if not _one_a_place(list(zip(*(columns[name] for name in chosen), strict=True)), places):
                continue
            parts = _parts(frames, chosen)
            if not all(_is_pure(part.frames, also=settings) for part in parts):
                continue
            sets = [{place[id(frame)] for frame in part.frames} for part in parts]
            if all(found == sets[0] for found in sets):
                _check_rivals(frames, parts, [name for name in names if name in _TELLING], size, where=where)
                return parts
            counts = [len(part.frames) for part in parts]
            if min(counts) >= _FEWEST_SLICES and all(_proves(part.frames, where=where) for part in parts):
                whole = max(sets, key=len)
                if not any(found < whole for found in sets):
                    return parts
            complete = counts.count(max(counts))
            if not lacking and (complete >= 2 or 2 * min(counts) >= max(counts)) and max(counts) > 1:
                lacking = parts
    return lacking


def _check_rivals(
    frames: Sequence[Frame], parts: Sequence[_Part], telling: Sequence[str], size: int, *, where: str
) -> None:
    """Raise if as many telling traits sort the frames into as many whole volumes, but others."""
    places = _places(frames, where=where)
    own = {frozenset(map(id, part.frames)) for part in parts}
    for chosen in itertools.combinations(telling, size):
        if _one_a_place([tuple(_value(frame, name) for name in chosen) for frame in frames], places):
            rival = {frozenset(map(id, part.frames)) for part in _parts(frames, chosen)}
            if len(rival) == len(own) and rival != own:
                raise _ambiguous(frames, where=where)


def _one_a_place(keys: Sequence[tuple[Value, ...]], places: Sequence[int]) -> bool:
    """Whether no two frames of one key share a place, and keys are not mostly of single frames."""
    if 2 * len(set(keys)) > len(keys) and max(places) > 0:
        return False
    return len(set(zip(keys, places, strict=True))) == len(keys)


def _side_by_side(frames: Sequence[Frame], *, where: str) -> list[_Part]:
    """Boxes whose slices lie in the same planes, one beside another; each must prove to be even."""
    boxes: list[list[Frame]] = []
    normal = axes(frames[0], where=where)[2]
    for frame in frames:
        for box in boxes:
            offset = _offset_mm(box[0], frame)
            if np.linalg.norm(offset - (offset @ normal) * normal) <= _BESIDE_MM:
                box.append(frame)
                break
        else:
            boxes.append([frame])
        if len(boxes) > _MOST_BOXES:
            return []
    if len(boxes) == 1 or not all(_is_pure(box) and _proves(box, where=where) for box in boxes):
        return []
    return [_Part((k,), box, f"box {k + 1}") for k, box in enumerate(boxes)]


def _offset_mm(first: Frame, second: Frame) -> Float64[np.ndarray, " 3"]:
    return np.asarray(second.position_mm, dtype=np.float64) - np.asarray(first.position_mm, dtype=np.float64)


def _by_number(frames: Sequence[Frame], *, where: str) -> list[_Part]:
    """Volumes by rank of the instance number, where the numbers run volume by volume or place by place."""
    numbers = [frame.number for frame in frames if frame.number is not None]
    if len(set(numbers)) != len(frames):
        return []
    by_place: dict[int, list[Frame]] = {}
    for frame, place in zip(frames, _places(frames, where=where), strict=True):
        by_place.setdefault(place, []).append(frame)
    counts = {len(found) for found in by_place.values()}
    if len(counts) != 1 or len(by_place) < 2:
        return []
    ranked = [sorted(found, key=lambda frame: frame.number or 0) for found in by_place.values()]
    by_volume = [[found[rank] for found in ranked] for rank in range(counts.pop())]
    if not (_in_blocks(by_volume) or _in_blocks(ranked)) or not all(_is_pure(found) for found in by_volume):
        return []
    return [_Part((rank,), found, f"volume {rank + 1}") for rank, found in enumerate(by_volume)]


def _in_blocks(groups: Sequence[Sequence[Frame]]) -> bool:
    ranges = sorted((min(numbers), max(numbers)) for numbers in ([f.number or 0 for f in group] for group in groups))
    return all(first[1] < second[0] for first, second in itertools.pairwise(ranges))


def _proven(parts: Sequence[_Part], *, where: str, regularise: bool, warning: str | None = None) -> Volumes:
    """Prove each part; one that lacks places of the fullest has slices missing, whatever its own distances."""
    everything = [frame for part in parts for frame in part.frames]
    places = dict(zip(map(id, everything), _places(everything, where=where), strict=True))
    taken = [{places[id(frame)] for frame in part.frames} for part in parts]
    fullest = max(taken, key=len)
    stacks: list[Stack] = []
    refused: list[tuple[tuple[Frame, ...], GeometryError]] = []
    for part, own in zip(parts, taken, strict=True):
        name = f"{where}, {part.what}" if part.what else where
        try:
            if own < fullest and not regularise:
                raise GeometryError(
                    f"{name}: {len(fullest) - len(own)} of {len(fullest)} slices are missing that other volumes of the "
                    "series have. Export them again.",
                    code="E_MISSING_SLICE",
                )
            stack = prove(part.frames, where=name, what=part.what, regularise=regularise)
        except GeometryError as error:
            refused.append((tuple(part.frames), error))
            continue
        stacks.append(stack if warning is None else stack.warned(warning))
    if not stacks:
        raise refused[0][1]
    return Volumes(tuple(stacks), tuple(refused))


def _without_repeats(
    frames: Sequence[Frame], same: SameFrames, *, where: str
) -> tuple[list[Frame], list[tuple[Frame, Frame]]]:
    """Leave out frames that lie at one place, say the same of themselves and have equal pixels."""
    kept: list[Frame] = []
    repeated: list[tuple[Frame, Frame]] = []
    first: dict[tuple[object, ...], Frame] = {}
    for frame, place in zip(frames, _places(frames, where=where), strict=True):
        key = (place, frame.slope, frame.intercept, *sorted((k, str(v)) for k, v in frame.traits.items()))
        original = first.setdefault(key, frame)
        if (
            original is not frame
            and np.linalg.norm(_offset_mm(original, frame)) <= _BESIDE_MM
            and same(original, frame)
        ):
            repeated.append((frame, original))
        else:
            kept.append(frame)
    return kept, repeated


def _ambiguous(frames: Sequence[Frame], *, where: str) -> GeometryError:
    counts = Counter(_places(frames, where=where))
    taken = sum(count > 1 for count in counts.values())
    if 2 * taken < len(counts):
        return GeometryError(
            f"{where}: {taken} of {len(counts)} places hold more than one slice, with different pixels, and no tag "
            "tells them apart; one slice a place is needed. Keep one of them.",
            code="E_DUP_POSITION",
        )
    vary = ", ".join(_varying(frames))
    return GeometryError(
        f"{where}: {len(frames)} slices lie at {len(counts)} places, and no set of tags gives whole volumes; "
        f"{vary or 'no trait'} varies. Split the series by hand.",
        code="E_AMBIGUOUS_STACK",
    )


def _varying(frames: Sequence[Frame]) -> list[str]:
    """Traits that take several values, the telling ones first."""
    known = (*_TRAITS, *sorted({name for frame in frames for name in frame.traits} - set(_TRAITS)), *_LAST_TRAITS)
    return [name for name in known if len({_value(frame, name) for frame in frames}) > 1 and _may_tell(frames, name)]


def _may_tell(frames: Sequence[Frame], name: str) -> bool:
    """A file is a volume of its own only where files hold several frames."""
    return name != "file" or min(Counter(frame.path for frame in frames).values()) > 1


def _value(frame: Frame, name: str) -> Value:
    if name == "file":
        return str(frame.path)
    if name == "rescale":
        return f"{frame.slope!r} {frame.intercept!r}"
    return frame.traits.get(name)


def _parts(frames: Sequence[Frame], names: Sequence[str]) -> list[_Part]:
    """Frames grouped by the values of these traits, in the order of the values that have one."""
    groups: dict[tuple[Value, ...], list[Frame]] = {}
    for frame in frames:
        groups.setdefault(tuple(_value(frame, name) for name in names), []).append(frame)
    ordered = sorted(groups.items(), key=lambda pair: _rank(pair[0], pair[1], names))
    values = {name: list(dict.fromkeys(key[i] for key, _ in ordered)) for i, name in enumerate(names)}
    return [_Part(key, found, ", ".join(_words(key, names, values))) for key, found in ordered]


def _rank(key: tuple[Value, ...], frames: Sequence[Frame], names: Sequence[str]) -> tuple[object, ...]:
    values = [
        (value is not None, isinstance(value, str), value if value is not None else 0)
        for name, value in zip(names, key, strict=True)
        if name not in ("direction", *_LAST_TRAITS)
    ]
    return (*values, min(frame.number or 0 for frame in frames), str(frames[0].path), frames[0].index)


def _words(key: tuple[Value, ...], names: Sequence[str], values: Mapping[str, list[Value]]) -> Iterator[str]:
    for name, value in zip(names, key, strict=True):
        number = values[name].index(value) + 1
        if name in _LAST_TRAITS:
            yield f"volume {number}" if name == "file" else f"scale {number}"
        elif name not in _WORDS or (isinstance(value, str) and name != "image_type"):
            yield f"{name.replace('_', ' ')} {number}"
        elif value is None:
            yield f"no {name.replace('_', ' ')}"
        else:
            yield _WORDS[name].format(value if isinstance(value, str) else f"{value:g}")


def _places(frames: Sequence[Frame], *, where: str) -> list[int]:
    """Number of the place of each frame along the normal; frames closer than the tolerance share one."""
    height = heights(frames, where=where)
    order = np.argsort(height, kind="stable")
    steps = np.diff(height[order])
    numbers = np.concatenate([[0], np.cumsum(steps > same_place_mm(height[order]))])
    places = np.empty(len(frames), dtype=np.int64)
    places[order] = numbers
    return [int(place) for place in places]


def _shared_places(frames: Sequence[Frame], *, where: str) -> bool:
    return len(set(_places(frames, where=where))) < len(frames)


def _is_pure(frames: Sequence[Frame], *, also: Sequence[str] = ()) -> bool:
    """Whether all frames have one contrast, as those of a volume must, and one value of other traits."""
    return all(len({frame.traits.get(name) for frame in frames}) == 1 for name in (*_CONTRAST, *also))


def _proves(frames: Sequence[Frame], *, where: str) -> bool:
    try:
        prove(frames, where=where)
    except GeometryError:
        return False
    return True
