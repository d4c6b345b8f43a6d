"""DICOM files of a folder, found by their content and put together to volumes, with the labels drawn on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from medssl import pool
from medssl.data.cohort import Modality
from medssl.data.incremental import Cache, Looked
from medssl.data.walk import Entry
from medssl.errors import CaseError, MedSSLError, ReadError
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.header import read_header
from medssl.io.dicom.model import Assembly, Header, Item, Stack
from medssl.io.dicom.reader import may_be_dicom, named_alike
from medssl.io.source import is_image

Volumes = Literal["auto", "refuse", "first", "middle", "all", "channels"]

_MOST_VOLUMES = 8
_PARALLEL_FROM = 8000  # below it, starting processes takes longer than reading the headers
_CHUNK_FILES = 200
_RADIOGRAPHS = {"CR", "DX", "MG", "XA", "RF", "IO", "PX"}
_SEEN_BESIDE_OTHERS = ("W_BROKEN_NEIGHBOUR", "W_SPLIT", "W_VOLUME_ORDER")
_SAME_WORD: dict[str, Modality] = {"CT": "CT", "MR": "MR", "PT": "PT", "US": "US"}

Place = tuple[str, int]


@dataclass
class Series:
    """What the DICOM files among some files are.

    Args:
        items: Images.
        labels: DICOM-SEG or RTSTRUCT file of a volume, by the name of its item and the number of its stack.
        items_of: Name of each file, by its path.
        refused: Name of a file, or of the first of several, and why.
        ignored: Name of a file, and why it is no image.
        duplicates: Name of a file, and of the file that it equals.
        others: Files that are no DICOM.
    """

    items: tuple[Item, ...] = ()
    labels: dict[Place, Path] = field(default_factory=dict)
    items_of: dict[Path, str] = field(default_factory=dict)
    refused: list[tuple[str, MedSSLError]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    others: list[Entry] = field(default_factory=list)


def find_series(
    entries: Sequence[Entry], *, key: bytes, cache: Cache | None = None, regularise: bool = False, workers: int = 1
) -> Series:
    """Look at the start of each file, and put those that are DICOM together; no pixel is read.

    Args:
        entries: Files, of any kind.
        key: Of the tokens that stand for identifiers.
        cache: What is known of files that have not changed.
        regularise: Take series with missing slices or uneven slice distances.
        workers: Processes for thousands of files; 0 chooses by the machine.
    """
    result = Series(items_of={entry.path: str(entry.item) for entry in entries})
    headers: list[Header] = []
    broken: list[Path] = []
    for entry, looked in zip(entries, _looks(entries, key=key, cache=cache, workers=workers), strict=True):
        if looked.header is not None:
            headers.append(looked.header)
        elif looked.error is None:
            result.others.append(entry)
        elif looked.error.code == "E_NOT_IMAGE":
            result.ignored.append((str(entry.item), looked.error.message))
        else:
            result.refused.append((str(entry.item), looked.error))
            broken.append(entry.path)
    strangers = [entry.path for entry in result.others if not is_image(entry.path)]
    broken += named_alike(strangers, [header.path for header in headers])
    same = cache.same_pixels if cache is not None else None
    assembly = assemble(headers, regularise=regularise, same_pixels=same, broken=broken)
    _check_all_are_there(headers, assembly)
    result.items = assembly.items
    result.ignored += [(result.items_of[path], reason) for path, reason in assembly.notes]
    result.duplicates = [(result.items_of[path], result.items_of[other]) for path, other in assembly.duplicates]
    result.refused += [(_group([result.items_of[path] for path in paths]), error) for paths, error in assembly.refused]
    _give_labels(assembly, result)
    return result


def chosen_stacks(item: Item, volumes: Volumes) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers of the stacks of an item that become cases, and a warning where some are left out.

    Raises:
        CaseError: E_SEVERAL, if there are several and ``volumes`` is ``refuse``.
    """
    count = len(item.stacks)
    if count == 1:
        return (0,), ()
    if volumes == "refuse":
        kinds = ", ".join(f"{number}: {stack.what}" for number, stack in enumerate(item.stacks[:_MOST_VOLUMES]))
        raise CaseError(
            f"a DICOM item of {count} volumes ({kinds}); one is needed. Set volumes to first, middle or all.",
            code="E_SEVERAL",
        )
    if volumes == "all" or (volumes in {"auto", "channels"} and count <= _MOST_VOLUMES):
        return tuple(range(count)), ()
    number = 0 if volumes == "first" else count // 2
    note = f"W_VOLUMES: number {number} of {count} volumes is taken; volumes: all takes each."
    return (number,), (note,)


def doubts(stack: Stack) -> tuple[str, ...]:
    """What is said of a stack beside other files and does not show when its own files alone are read again."""
    return tuple(warning for warning in stack.warnings if warning.startswith(_SEEN_BESIDE_OTHERS))


def modality_of(code: str) -> Modality:
    """The word of a cohort for the modality in a DICOM header."""
    return "XR" if code in _RADIOGRAPHS else _SAME_WORD.get(code, "other")


def item_name(item: Item, items_of: Mapping[Path, str]) -> str:
    """Name of a DICOM item in a ledger: the folder of its files, and its own name."""
    folder = os.path.commonpath([os.path.dirname(items_of[path]) for path in item.paths])  # noqa: PTH120
    return os.path.join(folder, f"series-{item.name}")  # noqa: PTH118


def _looks(entries: Sequence[Entry], *, key: bytes, cache: Cache | None, workers: int) -> list[Looked]:
    known: dict[Path, Looked] = {}
    for entry in entries:
        looked = cache.looked(entry.path) if cache is not None else None
        if looked is not None:
            known[entry.path] = looked
    new = [entry.path for entry in entries if entry.path not in known]
    chunks = [tuple(new[start : start + _CHUNK_FILES]) for start in range(0, len(new), _CHUNK_FILES)]
    hands = workers if len(new) > _PARALLEL_FROM else 1
    for chunk, answer in pool.run(partial(_look_at, key=key), chunks, name=_name_chunk, workers=hands):
        looks = [Looked(error=answer)] * len(chunk) if isinstance(answer, MedSSLError) else answer
        pairs = list(zip(chunk, looks, strict=True))
        known.update(pairs)
        if cache is not None:
            cache.keep_looks(pairs)
    return [known[entry.path] for entry in entries]


def _look_at(paths: Sequence[Path], *, key: bytes) -> list[Looked]:
    """What a worker does with some files."""
    return [_look(path, key=key) for path in paths]


def _look(path: Path, *, key: bytes) -> Looked:
    try:
        return Looked(header=read_header(path, key=key))
    except ReadError as error:
        if error.code == "E_FORMAT":
            return Looked()
        is_none = is_image(path) or error.code in {"E_EMPTY", "E_NOT_REGULAR", "E_MISSING"}
        is_mine = may_be_dicom(path) or not is_none
        return Looked(error=error) if is_mine else Looked()


def _name_chunk(paths: Sequence[Path]) -> str:
    return _group([str(path) for path in paths])


def _group(items: Sequence[str]) -> str:
    """Name of files that are booked together."""
    first, *others = sorted(items)
    return f"{first} and {len(others)} more" if others else first


def _check_all_are_there(headers: Sequence[Header], assembly: Assembly) -> None:
    """Raise if a file got lost on the way, which is a defect of medssl."""
    booked = {path for item in assembly.items for path in item.paths}
    booked |= {path for paths, _ in assembly.refused for path in paths}
    booked |= {path for path, _ in assembly.duplicates} | {path for path, _ in assembly.notes}
    booked |= {header.path for header in assembly.labels}
    lost = {header.path for header in headers} - booked
    if lost:
        msg = f"conservation law broken: {len(lost)} DICOM files not booked; please report it."
        raise RuntimeError(msg)


def _give_labels(assembly: Assembly, result: Series) -> None:
    """Give each label to the volumes that it was drawn on; refuse those of none, and all that claim one volume."""
    claims: dict[Place, list[Header]] = {}
    for header in assembly.labels:
        places = _drawn_on(header, assembly.items)
        for place in places:
            claims.setdefault(place, []).append(header)
        if not places:
            text = f"{header.path}: a DICOM label whose image is not there, was refused, or is not one only. "
            text += "Put its image beside it, mend that, or list the pairs in a CSV."
            result.refused.append((result.items_of[header.path], CaseError(text, code="E_PAIR")))
    rivals = {header.path: several for several in claims.values() if len(several) > 1 for header in several}
    for path, several in rivals.items():
        others = ", ".join(result.items_of[other.path] for other in several if other.path != path)
        text = f"{path}: {others} would be a label of the same image too; one is needed, so the image has none. "
        text += "Keep one, or list the pairs in a CSV."
        result.refused.append((result.items_of[path], CaseError(text, code="E_PAIR")))
    result.labels = {
        place: headers[0].path
        for place, headers in claims.items()
        if len(headers) == 1 and headers[0].path not in rivals
    }


def _drawn_on(header: Header, items: Sequence[Item]) -> list[Place]:
    """Volumes whose instances a label names, or else whose series; none if these are of several items."""
    hits: Counter[Place] = Counter()
    for item in items:
        for number, stack in enumerate(item.stacks):
            hits[item.name, number] = len({frame.instance for frame in stack.frames} & header.references)
    places = [place for place, count in hits.items() if count]
    if not places:
        named = [item for item in items if item.series in header.references]
        places = [(item.name, number) for item in named for number in range(len(item.stacks))]
    return places if len({name for name, _ in places}) == 1 else []
