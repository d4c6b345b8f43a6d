"""Volumes of DICOM files: a file, a folder, or the list of a scan; sorted and proven, then decoded slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medssl.errors import CaseError, ReadError
from medssl.io import integrity
from medssl.io.dicom import series_list
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.decode import decode_stacks, file_digest, joined, paths_of
from medssl.io.dicom.header import read_header
from medssl.io.dicom.model import Assembly, Header, Item, Kind, Stack
from medssl.io.source import Decoded
from medssl.io.values import checked_grid

_MOST_NAMED = 8
_ENDINGS = (".dcm", ".dicom", ".ima")
_IGNORED = {"E_FORMAT", "E_NOT_IMAGE"}


def read(
    path: Path,
    *,
    volume: int | Literal["channels"] | None = None,
    regularise: bool = False,
    fix_signedness: bool = False,
) -> Decoded:
    """Read one volume.

    Args:
        path: DICOM file, folder with DICOM files at any depth, or series list.
        volume: Which one, from 0, where there are several; ``channels`` stacks them all as channels.
        regularise: Interpolate missing slices and uneven distances instead of refusing them.
        fix_signedness: Take values that are signed but labelled unsigned as what they are.

    Returns:
        Voxels (C, X, Y, Z) with memory in the order C, Z, Y, X; with unit, facts, digest and number of volumes.

    Raises:
        ReadError: for damaged files, E_NOT_IMAGE, E_FORMAT, E_CODEC, E_RESCALE, E_SIGNEDNESS, E_SERIES_CHANGED.
        GeometryError: for a series that is no regular stack. CaseError: E_SEVERAL without a choice of volume, E_VOLUME.
    """
    found = _find(path, volume=volume, regularise=regularise)
    chosen = found.chosen
    decoded = decode_stacks(found.item, chosen, found.headers, fix_signedness=fix_signedness, path=path)
    stack = chosen[0]
    _, far = checked_grid(stack.geometry.shape, stack.geometry.affine, path=path)
    headers = [found.headers[name] for name in paths_of(chosen)]
    warnings = (
        *found.warnings,
        *(said for header in headers for said in header.warnings),
        *(said for one in chosen for said in one.warnings),
        *decoded.warnings,
        *far,
    )
    return Decoded(
        decoded.array,
        stack.geometry,
        "dicom",
        tuple(dict.fromkeys(warnings)),
        unit=decoded.unit,
        facts=found.item.facts,
        volumes=found.volumes,
        digest=decoded.digest,
    )


def stacks(path: Path, *, regularise: bool = False) -> Assembly:
    """What the DICOM files of a path amount to, without decoding a pixel.

    Args:
        path: As in :func:`read`.
        regularise: As in :func:`read`.

    Raises:
        ReadError: for files that cannot be read.
    """
    headers, broken = _headers(_files(path), is_given=not path.is_dir())
    return assemble(list(headers.values()), regularise=regularise, broken=broken)


def named_alike(strangers: Iterable[Path], images: Iterable[Path]) -> list[Path]:
    """Files that are no DICOM and lie beside DICOM files, named like them: damaged slices, as far as one can tell.

    Args:
        strangers: Files that are no DICOM.
        images: Files that are.
    """
    known = {(path.parent, ending) for path in images for ending in (_ending(path), *_ENDINGS)}
    return [path for path in strangers if (path.parent, _ending(path)) in known]


def may_be_dicom(path: Path) -> bool:
    """Whether a file is named as DICOM files are, which often have no ending."""
    return path.suffix.lower() in {"", *_ENDINGS}


def kind(path: Path) -> Kind:
    """What a DICOM file can be used as; a series list is an image.

    Raises:
        ReadError: as :func:`medssl.io.dicom.header.read_header`.
    """
    return "image" if _is_list(path) else read_header(path).kind


def digest(path: Path, *, volume: int | Literal["channels"] | None = None, regularise: bool = False) -> str:
    """Digest in hex of the files of a volume in the order of its slices; what :func:`read` gives for it.

    Args:
        path: As in :func:`read`; a file that is no image counts as it is.
        volume: As in :func:`read`; without a choice all volumes count.
        regularise: As in :func:`read`.

    Raises:
        MedSSLError: as :func:`read`.
    """
    if path.is_file() and kind(path) != "image":
        files: Sequence[Path] = (path,)
    else:
        files = paths_of(_find(path, volume="channels" if volume is None else volume, regularise=regularise).chosen)
    return joined([file_digest(name) for name in files])


@dataclass(frozen=True)
class _Found:
    item: Item
    chosen: tuple[Stack, ...]
    volumes: int
    headers: Mapping[Path, Header]
    warnings: tuple[str, ...]


def _find(path: Path, *, volume: int | Literal["channels"] | None, regularise: bool) -> _Found:
    if path.is_file() and _is_list(path):
        return _listed(path, volume=volume, regularise=regularise)
    headers, broken = _headers(_files(path), is_given=not path.is_dir())
    assembly = assemble(list(headers.values()), regularise=regularise, broken=broken)
    pairs = [(item, stack) for item in assembly.items for stack in item.stacks]
    if assembly.refused:
        raise assembly.refused[0][1]
    if not headers:
        raise ReadError(
            f"{path}: is a folder without DICOM files; give the name of an image file.", code="E_NOT_REGULAR"
        )
    if not pairs:
        raise ReadError(
            f"{path}: holds no DICOM image. Give the files of a series, or read a segmentation as a label.",
            code="E_NOT_IMAGE",
        )
    picked = _picked([_words(item, stack, assembly) for item, stack in pairs], volume, path=path)
    items = {id(pairs[index][0]): pairs[index][0] for index in picked}
    if len(items) > 1:
        raise CaseError(f"{path}: volumes of several images cannot be channels of one. Choose one.", code="E_SEVERAL")
    return _Found(
        pairs[picked[0]][0],
        tuple(pairs[index][1] for index in picked),
        len(pairs),
        headers,
        _left_out(assembly),
    )


def _listed(path: Path, *, volume: int | Literal["channels"] | None, regularise: bool) -> _Found:
    """Volumes of a list; only the files of those that are wanted are opened, and proven anew."""
    volumes = series_list.read_list(path)
    wanted = [volumes[index] for index in _picked([one.what for one in volumes], volume, path=path)]
    files = dict.fromkeys(name for one in wanted for name in one.paths)
    headers, _ = _headers(files, is_given=True)
    assembly = assemble(list(headers.values()), regularise=regularise)
    if assembly.refused:
        raise assembly.refused[0][1]
    known = {
        frozenset((f.path, f.index, f.tile) for f in stack.frames): (item, stack)
        for item in assembly.items
        for stack in item.stacks
    }
    found = [known.get(frozenset(one.frames)) for one in wanted]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(wanted) or not pairs:
        raise ReadError(
            f"{path}: its files do not make the volumes that the scan has seen. Scan them again.",
            code="E_SERIES_CHANGED",
        )
    return _Found(pairs[0][0], tuple(stack for _, stack in pairs), len(volumes), headers, ())


def _is_list(path: Path) -> bool:
    return series_list.is_list(integrity.read_bytes(path, most=len(integrity.SERIES_LIST_START)))


def _picked(names: Sequence[str], volume: int | Literal["channels"] | None, *, path: Path) -> list[int]:
    if volume == "channels":
        return list(range(len(names)))
    if volume is None and len(names) > 1:
        listed = ", ".join(f"{number}: {name or 'volume'}" for number, name in enumerate(names[:_MOST_NAMED]))
        more = ", ..." if len(names) > _MOST_NAMED else ""
        raise CaseError(
            f"{path}: holds {len(names)} volumes ({listed}{more}). Choose one by its number with `volume`.",
            code="E_SEVERAL",
        )
    number = volume or 0
    if not 0 <= number < len(names):
        raise CaseError(f"{path}: volume {number} of {len(names)}; they count from 0. Choose another.", code="E_VOLUME")
    return [number]


def _words(item: Item, stack: Stack, assembly: Assembly) -> str:
    if len(assembly.items) == 1:
        return stack.what
    size = " x ".join(map(str, stack.geometry.shape))
    return " ".join(filter(None, (item.modality, size, stack.what)))


def _left_out(assembly: Assembly) -> tuple[str, ...]:
    """One warning for each reason that files were left out for."""
    reasons: dict[str, int] = {}
    for _, reason in assembly.notes:
        reasons[reason] = reasons.get(reason, 0) + 1
    said = [
        reason if reason.startswith("W_") else f"W_LEFT_OUT: {number} files are not part of the volume: {reason}"
        for reason, number in reasons.items()
    ]
    if assembly.duplicates:
        said.append(f"W_DUPLICATE: {len(assembly.duplicates)} files are copies of others and were left out.")
    return tuple(said)


def _files(path: Path) -> Iterable[Path]:
    """Regular files of a folder at any depth, hidden ones apart; the files of a list; or the file itself."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if not file.name.startswith("."))
        return sorted(file for file in found if file.is_file())
    if _is_list(path):
        return dict.fromkeys(name for one in series_list.read_list(path) for name in one.paths)
    return (path,)


def _headers(files: Iterable[Path], *, is_given: bool) -> tuple[dict[Path, Header], list[Path]]:
    """Headers by file, and what may be damaged slices; what else lies in a folder beside the images is passed over."""
    headers: dict[Path, Header] = {}
    strangers: list[Path] = []
    for file in files:
        try:
            headers[file] = read_header(file)
        except ReadError as error:
            if is_given or error.code not in _IGNORED:
                raise
            if error.code == "E_FORMAT":
                strangers.append(file)
    return headers, named_alike(strangers, headers)


def _ending(path: Path) -> str:
    """Suffix in lower case; numbers, which end UIDs, count as none."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdigit() else suffix
