"""Proven stacks to voxels: every file is read once, hashed in order, and decoded straight into its place."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Shaped, UInt8

from medssl.errors import GeometryError, ReadError
from medssl.io import integrity
from medssl.io.dicom import pixels
from medssl.io.dicom.elements import content, read_elements
from medssl.io.dicom.model import Frame, Header, Item, Pixels, Stack
from medssl.io.dicom.rescale import Scale, checked_scale, rescaled, signed_if_wrapped
from medssl.io.dicom.tags import DEFLATED
from medssl.io.dicom.units import SUV_TAGS, check_rescales, common_factor, unit_of
from medssl.volume import Unit

T = TypeVar("T")
R = TypeVar("R")

_QUANTITATIVE = {"CT", "MR", "PT", "NM"}
_IN_MEMORY_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_BATCH_FILES = 8
_BATCH_FRAMES = 64
_BATCH_BYTES = 64 << 20
_SAME_PLACE = 0.01


@dataclass(frozen=True)
class Voxels:
    """What decoding gives.

    Args:
        array: (C, X, Y, Z); memory runs in the order C, Z, Y, X.
        unit: What the values are.
        digest: As :func:`joined` of the files, in the order of their first frame.
        warnings: ``W_CODE: sentence`` strings.
    """

    array: Shaped[np.ndarray, "c x y z"]
    unit: Unit
    digest: str
    warnings: tuple[str, ...]


def decode_stacks(
    item: Item, stacks: Sequence[Stack], headers: Mapping[Path, Header], *, fix_signedness: bool, path: Path
) -> Voxels:
    """Voxels of a stack, or of several on one grid as channels.

    Args:
        item: That they belong to.
        stacks: At least one.
        headers: Of all their files.
        fix_signedness: As in :func:`medssl.io.dicom.reader.read`.
        path: As given by the user, for messages.

    Raises:
        ReadError: as :func:`medssl.io.dicom.reader.read`. GeometryError: E_GEOMETRY for stacks on several grids.
    """
    if any(not stack.geometry.isclose(stacks[0].geometry) for stack in stacks[1:]):
        raise GeometryError(f"{path}: its volumes lie on several grids. Choose one by its number.", code="E_GEOMETRY")
    reading = _Reading(headers)
    volumes = []
    units: list[Unit] = []
    warnings: list[str] = []
    for stack in stacks:
        array, unit, said = _volume(item, stack, reading, fix_signedness=fix_signedness, path=path)
        volumes.append(array)
        units.append(unit)
        warnings.extend(said)
    array = volumes[0] if len(volumes) == 1 else np.concatenate(volumes)
    unit = units[0] if len(set(units)) == 1 else "arbitrary"
    return Voxels(
        array.transpose(0, 3, 2, 1),
        unit,
        joined([reading.digests[name] for name in paths_of(stacks)]),
        tuple(dict.fromkeys(warnings)),
    )


def joined(digests: Sequence[bytes]) -> str:
    """Digest in hex of several files: that of their sha256 digests one after the other; of a single file its own.

    So the files can be hashed side by side.
    """
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def file_digest(path: Path) -> bytes:
    """Sha256 of a file.

    Raises:
        ReadError: if it cannot be read.
    """
    integrity.read_bytes(path, most=1)
    return _sha256(_OnDisk(path))


def paths_of(stacks: Iterable[Stack]) -> list[Path]:
    """Files of volumes in the order of their slices, each once."""
    return list(dict.fromkeys(frame.path for stack in stacks for frame in stack.frames))


def _volume(
    item: Item, stack: Stack, reading: _Reading, *, fix_signedness: bool, path: Path
) -> tuple[Shaped[np.ndarray, "c z y x"], Unit, tuple[str, ...]]:
    array, said = reading.stored(stack)
    warnings = list(said)
    if any(_is_colour(_pixels(reading.headers[frame.path])) for frame in stack.frames):
        return array if stack.places is None else _on_grid(array, stack), "arbitrary", tuple(warnings)
    check_rescales(stack.frames)
    unit, said = unit_of(item, stack.frames)
    warnings.extend(said)
    scales = [_scale(frame, reading.headers[frame.path]) for frame in stack.frames]
    if item.modality == "CT":
        array, said = signed_if_wrapped(array, scales, fix=fix_signedness, path=path)
        warnings.extend(said)
        if said:
            scales = [_signed_padding(scale) for scale in scales]
    if item.modality == "PT":
        factor = common_factor(read_elements(name, also=SUV_TAGS) for name in paths_of([stack]))
        if isinstance(factor, str):
            warnings.append(f"W_NO_SUV: the values are no SUV, since {factor}.")
        else:
            unit = "SUV"
            scales = [Scale(scale.slope * factor, scale.intercept * factor, scale.padding) for scale in scales]
    array, said = rescaled(array, scales, is_hu=unit == "HU")
    warnings.extend(said)
    if stack.places is not None:
        array = _on_grid(array, stack)
    return array, unit, tuple(warnings)


class _Reading:
    """The files of one decoding: each is hashed once, however many stacks it has frames of."""

    def __init__(self, headers: Mapping[Path, Header]) -> None:
        self.headers = headers
        self.digests: dict[Path, bytes] = {}
        self._own = threading.local()

    def stored(self, stack: Stack) -> tuple[Shaped[np.ndarray, "c z y x"], tuple[str, ...]]:
        """Stored values of the frames of a stack: grey, with white as the highest value, or RGB."""
        jobs: dict[Path, list[tuple[int, Frame]]] = {}
        for z, frame in enumerate(stack.frames):
            jobs.setdefault(frame.path, []).append((z, frame))
        canvas = _Canvas(stack, [_pixels(self.headers[path]) for path in jobs])
        waiting: list[_Piece] = []

        def load(paths: Sequence[Path]) -> Sequence[_Piece]:
            pieces: list[_Piece] = []
            for path in paths:
                raw = self._content(self.headers[path])
                if path not in self.digests:
                    self.digests[path] = _sha256(raw)
                pieces.extend(_load(raw, self.headers[path], jobs[path], canvas))
            return pieces

        paths = list(jobs)
        for pieces in _ahead(load, [paths[i : i + _BATCH_FILES] for i in range(0, len(paths), _BATCH_FILES)]):
            waiting.extend(pieces)
            if len(waiting) >= _BATCH_FRAMES:
                canvas.decode(waiting)
                waiting = []
        canvas.decode(waiting)
        return canvas.finished()

    def _content(self, header: Header) -> pixels.Bytes:
        """Bytes of a file: in a buffer that the thread fills again with its next file, or on disk where it is large."""
        kind = _pixels(header)
        if header.size > _IN_MEMORY_BYTES and kind.length is not None and kind.transfer_syntax != DEFLATED:
            raw: pixels.Bytes = _OnDisk(header.path)
        else:
            if len(getattr(self._own, "buffer", b"")) <= header.size:
                self._own.buffer = bytearray(header.size + 1)
            raw = memoryview(self._own.buffer)[: integrity.read_into(self._own.buffer, header.path)]
        if len(raw) != header.size:
            raise ReadError(
                f"{header.path}: has {len(raw)} bytes, {header.size} a moment ago. Wait until it is copied.",
                code="E_CHANGED",
            )
        return raw


@dataclass(frozen=True)
class _Piece:
    """Compressed data of a frame, and the places of what it shows."""

    data: bytes
    header: Header
    targets: Sequence[tuple[int, Frame]]
    palette: UInt8[np.ndarray, "n 3"] | None


class _OnDisk:
    """Bytes of a large file that are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> bytes:
        begin, end, _ = span.indices(self._size)
        with self._path.open("rb", buffering=0) as file:
            file.seek(begin)
            return file.read(max(0, end - begin))


class _Canvas:
    """The array that pictures are put into, (C, Z, Y, X)."""

    def __init__(self, stack: Stack, kinds: Sequence[Pixels]) -> None:
        is_colour = any(map(_is_colour, kinds))
        dtype = np.dtype(np.uint8) if is_colour else np.result_type(*{_dtype(kind) for kind in kinds})
        first = stack.frames[0]
        self._array = np.empty((3 if is_colour else 1, len(stack.frames), first.rows, first.columns), dtype)
        self._lock = threading.Lock()  # files are loaded side by side
        self._warnings: list[str] = []

    def put(self, z: int, frame: Frame, picture: pixels.Picture, header: Header) -> None:
        """Place one picture, or the tile of it that a frame is."""
        if frame.tile is not None:
            row, column = divmod(frame.tile, picture.shape[1] // frame.columns)
            picture = picture[row * frame.rows :, column * frame.columns :][: frame.rows, : frame.columns]
        if picture.shape[:2] != self._array.shape[2:]:
            raise ReadError(
                f"{frame.path}: a picture of {picture.shape[:2]} pixels; {self._array.shape[2:]} are needed. "
                "Take the source.",
                code="E_MIXED_SHAPE",
            )
        if _is_inverted(header):
            picture = ~picture if picture.dtype.kind == "i" else picture ^ picture.dtype.type(_white(header))
        with self._lock:
            if not np.can_cast(picture.dtype, self._array.dtype):
                self._array = self._array.astype(np.result_type(picture.dtype, self._array.dtype))
            self._array[:, z] = picture if picture.ndim == 2 else np.moveaxis(picture, -1, 0)
        if _pixels(header).photometric == "MONOCHROME1":
            self._say(
                "W_MONOCHROME1: a picture stored with white as the lowest value was turned to the usual way."
                if _is_inverted(header)
                else "W_MONOCHROME1: the header wants low values shown white; the stored values were kept."
            )

    def decode(self, pieces: Sequence[_Piece]) -> None:
        """Decode and place compressed frames; neighbours of one kind go together."""
        for kind, run in itertools.groupby(pieces, key=lambda piece: _coding(_pixels(piece.header))):
            batch = list(run)
            step = max(1, _BATCH_BYTES // (kind.rows * kind.columns * kind.samples * 2))
            for begin in range(0, len(batch), step):
                self._decode(batch[begin : begin + step], kind)

    def finished(self) -> tuple[Shaped[np.ndarray, "c z y x"], tuple[str, ...]]:
        """The array, with one channel where all colours are grey, and what there is to say."""
        array = self._array
        if array.shape[0] == 3 and np.array_equal(array[0], array[1]) and np.array_equal(array[0], array[2]):
            array = array[:1].copy()
            self._say("W_GREY: a colour picture whose colours are all grey was read as grey.")
        return array, tuple(self._warnings)

    def _decode(self, batch: Sequence[_Piece], kind: Pixels) -> None:
        found = pixels.decoded([piece.data for piece in batch], kind, names=[piece.header.path for piece in batch])
        for piece, picture in zip(batch, found, strict=True):
            said = _pixels(piece.header)
            done = pixels.finished(picture, said, path=piece.header.path, palette=piece.palette, piece=piece.data)
            if pixels.differs(piece.data, picture, said):
                self._say(
                    "W_CODESTREAM: sign or depth of the compressed pixels differ from the header; theirs are used."
                )
            for z, frame in piece.targets:
                self.put(z, frame, done, piece.header)

    def _say(self, warning: str) -> None:
        if warning not in self._warnings:
            self._warnings.append(warning)


def _sha256(raw: pixels.Bytes) -> bytes:
    total = hashlib.sha256()
    for begin in range(0, len(raw), _CHUNK_BYTES):
        total.update(raw[begin : begin + _CHUNK_BYTES])
    return total.digest()


def _load(raw: pixels.Bytes, header: Header, jobs: Sequence[tuple[int, Frame]], canvas: _Canvas) -> Sequence[_Piece]:
    """Place the frames of a file if they are not compressed, else cut out their data."""
    path, kind = header.path, _pixels(header)
    data = content(bytes(raw[0 : len(raw)]), path) if kind.transfer_syntax == DEFLATED else raw
    palette = pixels.read_palette(data, kind, path=path)
    targets: dict[int, list[tuple[int, Frame]]] = {}
    for z, frame in jobs:
        targets.setdefault(frame.index, []).append((z, frame))
    if kind.length is None:
        pieces = pixels.compressed(data, kind, path=path)
        return [_Piece(pieces[index], header, places, palette) for index, places in targets.items()]
    for index, places in targets.items():
        picture = pixels.native(data, kind, index, path=path, palette=palette)
        for z, frame in places:
            canvas.put(z, frame, picture, header)
    return ()


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order, worked out on all cores a few items ahead, so that not all are in memory at once."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _on_grid(array: Shaped[np.ndarray, "c n y x"], stack: Stack) -> Shaped[np.ndarray, "c z y x"]:
    """Slices at 0, 1, 2, ... by linear interpolation between the frames on either side."""
    places = np.asarray(stack.places)
    slices = np.arange(stack.geometry.shape[2])
    grid = np.empty((array.shape[0], len(slices), *array.shape[2:]), array.dtype)
    for z in slices:
        nearest = int(np.abs(places - z).argmin())
        if abs(places[nearest] - z) <= _SAME_PLACE:
            grid[:, z] = array[:, nearest]
            continue
        after = int(np.clip(np.searchsorted(places, z), 1, len(places) - 1))
        share = (z - places[after - 1]) / (places[after] - places[after - 1])
        mixed = array[:, after - 1] * (1 - share) + array[:, after] * share
        grid[:, z] = np.rint(mixed) if array.dtype.kind in "ui" else mixed
    return grid


def _pixels(header: Header) -> Pixels:
    assert header.pixels is not None  # noqa: S101  an image has pixels
    return header.pixels


def _is_colour(kind: Pixels) -> bool:
    """Whether the values are shades, which no rescale turns into a quantity."""
    return kind.samples == 3 or kind.photometric == "PALETTE COLOR"


def _dtype(kind: Pixels) -> np.dtype[Any]:
    if kind.is_float:
        return np.dtype(f"f{kind.bits_allocated // 8}")
    return np.dtype(f"{'i' if kind.is_signed else 'u'}{max(1, kind.bits_allocated // 8)}")


def _coding(kind: Pixels) -> Pixels:
    """What one call of a decoder needs to be equal."""
    return replace(kind, offset=0, frames=1, padding=None)


def _is_inverted(header: Header) -> bool:
    return _pixels(header).photometric == "MONOCHROME1" and header.modality not in _QUANTITATIVE


def _white(header: Header) -> int:
    return (1 << _pixels(header).bits_stored) - 1


def _scale(frame: Frame, header: Header) -> Scale:
    padding = _pixels(header).padding
    if padding is not None and _is_inverted(header):
        highest = -1 if _pixels(header).is_signed else _white(header)
        padding = highest - padding[1], highest - padding[0]
    return checked_scale(frame.slope, frame.intercept, padding, path=frame.path)


def _signed_padding(scale: Scale) -> Scale:
    if scale.padding is None:
        return scale
    low, high = sorted(value - 65536 if value >= 32768 else value for value in scale.padding)
    return Scale(scale.slope, scale.intercept, (low, high))
