"""Stored values of DICOM pictures: out of their coding, with the bits that count, grey or RGB; before any rescale."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Shaped, UInt8

from medssl import codecs
from medssl.errors import ReadError
from medssl.io import integrity
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.elements import content, parse
from medssl.io.dicom.model import Pixels
from medssl.io.dicom.tags import BIG_ENDIAN
from medssl.io.dicom.terms import PHOTOMETRICS, known

Picture = Shaped[np.ndarray, "y x"] | Shaped[np.ndarray, "y x 3"]

_ITEM, _END = 0xFFFEE000, 0xFFFEE0DD
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")
_GREY = {"MONOCHROME1", "MONOCHROME2", "", "PALETTE COLOR"}
_RGB = {"RGB", "YBR_RCT", "YBR_ICT"}
_YBR = {"YBR_FULL", "YBR_FULL_422"}
_YBR_TO_RGB = np.array(
    [[1.0, 1.0, 1.0], [0.0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0.0]], dtype=np.float32
)
_COLOURS = ("Red", "Green", "Blue")


class Bytes(Protocol):
    """A file's bytes, in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> bytes | memoryview: ...


def read_frames(path: Path, pixels: Pixels, *, indices: Sequence[int] | None = None) -> list[Picture]:
    """Stored values of frames of one file.

    Args:
        path: File.
        pixels: As its header says.
        indices: Which frames; all by default.

    Returns:
        Arrays (rows, columns) of grey or (rows, columns, 3) of RGB in 8 bits.

    Raises:
        ReadError: E_PIXEL_LENGTH, E_PHOTOMETRIC, E_HEADER, E_CODEC, E_CODEC_DATA, E_READER_CRASH or E_READER_LIMIT.
    """
    wanted = list(range(pixels.frames) if indices is None else indices)
    data = content(integrity.read_bytes(path), path)
    palette = read_palette(data, pixels, path=path)
    if pixels.length is not None:
        return [native(data, pixels, index, path=path, palette=palette) for index in wanted]
    pieces = compressed(data, pixels, path=path)
    found = decoded([pieces[index] for index in wanted], pixels, names=[path] * len(wanted))
    return [
        finished(picture, pixels, path=path, palette=palette, piece=pieces[index])
        for index, picture in zip(wanted, found, strict=True)
    ]


def native(
    data: Bytes, pixels: Pixels, index: int, *, path: Path, palette: UInt8[np.ndarray, "n 3"] | None = None
) -> Picture:
    """Stored values of a frame that is not compressed.

    Args:
        data: Bytes that ``pixels.offset`` counts in.
        pixels: As the header says.
        index: Of the frame.
        path: For messages.
        palette: Of a PALETTE COLOR picture.

    Raises:
        ReadError: E_PIXEL_LENGTH or E_PHOTOMETRIC.
    """
    _check_photometric(pixels, path=path)
    values = pixels.rows * pixels.columns * pixels.samples
    if pixels.photometric == "YBR_FULL_422" and pixels.samples == 3:
        values = values // 3 * 2
    bits = values * pixels.bits_allocated
    begin, skip = divmod(index * bits, 8)
    end = begin + (skip + bits + 7) // 8
    if pixels.offset + end > len(data) or (pixels.length or 0) < end:
        raise ReadError(
            f"{path}: pixels end after {min(pixels.length or 0, len(data) - pixels.offset)} bytes, frame {index + 1} "
            f"needs {end}. Copy the file again from its source.",
            code="E_PIXEL_LENGTH",
        )
    raw = data[pixels.offset + begin : pixels.offset + end]
    if _is_in_words(data, pixels):
        raw = _out_of_words(data, pixels.offset, begin, end)
    if pixels.bits_allocated == 1:
        single = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[skip : skip + bits]
        return single.reshape(pixels.rows, pixels.columns)
    kind = "f" if pixels.is_float else "u"
    order = ">" if pixels.transfer_syntax == BIG_ENDIAN else "<"
    flat = np.frombuffer(raw, f"{order}{kind}{pixels.bits_allocated // 8}")
    if order == ">":
        flat = flat.astype(flat.dtype.newbyteorder("="))
    return finished(_shaped(flat, pixels), pixels, path=path, palette=palette)


def compressed(data: Bytes, pixels: Pixels, *, path: Path) -> list[bytes]:
    """Data of every frame of a compressed file, put together from its fragments.

    Frames are told apart by the offset table, or by how their data begin where there is none.

    Raises:
        ReadError: E_PIXEL_LENGTH where the file ends early, E_HEADER or E_CODEC_DATA.
    """
    _check_photometric(pixels, path=path)
    places, pieces = _fragments(data, pixels.offset, path=path)
    table, *pieces = pieces
    count = pixels.frames
    if count == 1:
        return [b"".join(pieces)]
    if len(pieces) == count:
        return pieces
    offsets = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    if not offsets:
        whole = parse(bytes(data[0 : len(data)]), path).raw("ExtendedOffsetTable")
        offsets = struct.unpack(f"<{len(whole) // 8}Q", whole[: len(whole) // 8 * 8])
    origin = places[1] if len(places) > 1 else 0
    starts = [i for i, place in enumerate(places[1:]) if place - origin in offsets]
    if len(starts) != count:
        starts = [i for i, piece in enumerate(pieces) if piece.startswith(_STARTS)]
    if len(starts) != count or starts[0] != 0:
        raise ReadError(
            f"{path}: {len(pieces)} pieces of compressed pixels cannot be told apart into {count} frames. "
            "Take the source.",
            code="E_CODEC_DATA",
        )
    return [b"".join(pieces[a:b]) for a, b in zip(starts, [*starts[1:], len(pieces)], strict=True)]


def decoded(pieces: Sequence[bytes], pixels: Pixels, *, names: Sequence[Path]) -> list[Picture]:
    """Pictures out of compressed data, still to be :func:`finished`.

    Raises:
        ReadError: as :func:`medssl.codecs.decode`.
    """
    spec = codecs.Spec(
        pixels.transfer_syntax, pixels.rows, pixels.columns, pixels.samples, pixels.bits_allocated, pixels.photometric
    )
    return codecs.decode(pieces, spec, names=names)


def finished(
    picture: Picture,
    pixels: Pixels,
    *,
    path: Path,
    palette: UInt8[np.ndarray, "n 3"] | None = None,
    piece: bytes = b"",
) -> Picture:
    """The bits that count, with their sign; colour as RGB of 8 bits.

    Args:
        picture: As it comes out of its coding.
        pixels: As the header says.
        path: For messages.
        palette: Of a PALETTE COLOR picture.
        piece: Compressed data; a JPEG 2000 codestream knows its own depth and sign.

    Raises:
        ReadError: E_PHOTOMETRIC.
    """
    if pixels.samples == 3:
        if pixels.photometric in _YBR and not codecs.gives_rgb(pixels.transfer_syntax):
            return _rgb(picture, path=path)
        return _eight_bits(picture, pixels)
    declared = codecs.precision(piece) if piece else None
    grey = _significant(picture, pixels, depth=declared[0] if declared else None)
    if pixels.padding is not None and not declared and picture.dtype.kind == "u":
        grey = _with_padding(grey, picture, pixels)
    if palette is None:
        return grey
    colour: Picture = palette[np.clip(grey, 0, len(palette) - 1)]
    return colour


def differs(piece: bytes, picture: Picture, pixels: Pixels) -> bool:
    """Whether a JPEG 2000 codestream has another sign than the header says, or values of more bits."""
    declared = codecs.precision(piece)
    if declared is None:
        return False
    depth, is_signed = declared
    return is_signed != pixels.is_signed or (
        depth > pixels.bits_stored and int(picture.max()) >> pixels.bits_stored > 0
    )


def read_palette(data: Bytes, pixels: Pixels, *, path: Path) -> UInt8[np.ndarray, "n 3"] | None:
    """RGB of every stored value from 0 on; None where the picture has no palette.

    Raises:
        ReadError: E_PHOTOMETRIC where the palette is missing, broken or segmented.
    """
    if pixels.photometric != "PALETTE COLOR":
        return None
    elements = parse(bytes(data[0 : len(data)]), path)
    columns = [_palette_column(elements, colour, path=path) for colour in _COLOURS]
    size = max(map(len, columns))
    return np.stack([np.pad(column, (0, size - len(column)), mode="edge") for column in columns], axis=1)


def _palette_column(elements: Elements, colour: str, *, path: Path) -> UInt8[np.ndarray, " n"]:
    descriptor = elements.numbers(f"{colour}PaletteColorLookupTableDescriptor")
    raw = elements.raw(f"{colour}PaletteColorLookupTableData")
    if descriptor is None or len(descriptor) != 3 or not raw:
        raise ReadError(
            f"{path}: a palette picture without a plain {colour.lower()} table. Export it in grey or RGB.",
            code="E_PHOTOMETRIC",
        )
    entries, first, bits = (int(value) for value in descriptor)
    entries = entries or 1 << 16
    if bits not in {8, 16} or first < 0 or len(raw) < entries * (1 if bits == 8 else 2):
        raise ReadError(
            f"{path}: the {colour.lower()} table has {len(raw)} bytes for {entries} entries of {bits} bits. "
            "Take the source.",
            code="E_PHOTOMETRIC",
        )
    is_wide = bits == 16 or len(raw) >= 2 * entries
    values = np.frombuffer(raw, "<u2" if is_wide else np.uint8, count=entries)
    if bits == 16:
        values = values >> 8
    column = values.astype(np.uint8)
    return np.concatenate([np.full(first, column[0]), column])


def _is_in_words(data: Bytes, pixels: Pixels) -> bool:
    """Whether values of 8 bits lie in big-endian words of 16, so that neighbours have changed places."""
    is_eight = pixels.transfer_syntax == BIG_ENDIAN and pixels.bits_allocated == 8
    return is_eight and bytes(data[pixels.offset - 8 : pixels.offset - 6]) == b"OW"  # in front of an explicit length


def _out_of_words(data: Bytes, offset: int, begin: int, end: int) -> bytes:
    first = begin - begin % 2
    words = bytearray(data[offset + first : offset + end + end % 2])
    words[0 : len(words) // 2 * 2 : 2], words[1::2] = words[1::2], words[0 : len(words) // 2 * 2 : 2]
    return bytes(words[begin - first : end - first])


def _check_photometric(pixels: Pixels, *, path: Path) -> None:
    readable = _GREY if pixels.samples == 1 else _RGB | _YBR
    if pixels.samples not in {1, 3} or pixels.photometric not in readable:
        raise ReadError(
            f"{path}: pixels of kind {known(pixels.photometric, PHOTOMETRICS)} with {pixels.samples} values each; "
            "grey, palette, RGB and full-range YBR are read. Export it in one of these.",
            code="E_PHOTOMETRIC",
        )
    if pixels.photometric == "YBR_FULL_422" and pixels.length is not None and pixels.columns % 2:
        raise ReadError(
            f"{path}: colour shared by pairs of pixels in rows of {pixels.columns}; an even number is needed. "
            "Export it as RGB.",
            code="E_PHOTOMETRIC",
        )
    if pixels.bits_allocated not in ({1, 8, 16, 32, 64} if pixels.samples == 1 else {8, 16}):
        raise ReadError(
            f"{path}: {pixels.bits_allocated} bits a value are not read. Export it with 8 or 16 bits.", code="E_TAG"
        )


def _with_padding(
    grey: Shaped[np.ndarray, "y x"], picture: Shaped[np.ndarray, "y x"], pixels: Pixels
) -> Shaped[np.ndarray, "y x"]:
    """Padding whose value needs more than the stored bits is kept whole, for masking would make tissue of it."""
    low, high = pixels.padding or (0, 0)
    bits = pixels.bits_stored - pixels.is_signed
    if -(pixels.is_signed << bits) <= low and high < 1 << bits:
        return grey
    whole = picture.view(grey.dtype)
    return np.where((whole >= low) & (whole <= high), whole, grey)


def _shaped(flat: Shaped[np.ndarray, " n"], pixels: Pixels) -> Picture:
    if pixels.samples == 1:
        return flat.reshape(pixels.rows, pixels.columns)
    if pixels.photometric == "YBR_FULL_422":
        return _upsampled(flat, pixels)
    if pixels.planar == 1:
        return flat.reshape(3, pixels.rows, pixels.columns).transpose(1, 2, 0)
    return flat.reshape(pixels.rows, pixels.columns, 3)


def _fragments(data: Bytes, offset: int, *, path: Path) -> tuple[list[int], list[bytes]]:
    """Place and content of every item, the offset table first."""
    places: list[int] = []
    pieces: list[bytes] = []
    while True:
        head = bytes(data[offset : offset + 8])
        if len(head) < 8:
            raise ReadError(
                f"{path}: compressed pixels have no end after {len(pieces)} pieces. "
                "Copy the file again from its source.",
                code="E_PIXEL_LENGTH",
            )
        group, element, length = struct.unpack("<HHI", head)
        tag = group << 16 | element
        if tag == _END:
            break
        if tag != _ITEM or offset + 8 + length > len(data):
            found = len(data) - offset - 8
            raise ReadError(
                f"{path}: a piece of compressed pixels should have {length} bytes, {found} are left. "
                "Copy the file again from its source.",
                code="E_PIXEL_LENGTH" if tag == _ITEM else "E_HEADER",
            )
        places.append(offset)
        pieces.append(bytes(data[offset + 8 : offset + 8 + length]))
        offset += 8 + length
    if len(pieces) < 2:
        raise ReadError(f"{path}: compressed pixels without data. Take the source.", code="E_PIXEL_LENGTH")
    return places, pieces


def _upsampled(flat: UInt8[np.ndarray, " n"], pixels: Pixels) -> UInt8[np.ndarray, "y x 3"]:
    """Y Y Cb Cr for two neighbours in a row."""
    groups = flat.reshape(-1, 4)
    picture = np.empty((pixels.rows * pixels.columns, 3), dtype=flat.dtype)
    picture[:, 0] = groups[:, :2].ravel()
    picture[:, 1:] = np.repeat(groups[:, 2:], 2, axis=0)
    return picture.reshape(pixels.rows, pixels.columns, 3)


def _rgb(picture: UInt8[np.ndarray, "y x 3"], *, path: Path) -> UInt8[np.ndarray, "y x 3"]:
    """Full-range YBR as RGB, by ITU-T T.871."""
    if picture.dtype != np.uint8:
        raise ReadError(f"{path}: YBR of more than 8 bits is not read. Export it as RGB.", code="E_PHOTOMETRIC")
    values = (picture.astype(np.float32) - np.array([0, 128, 128], dtype=np.float32)) @ _YBR_TO_RGB
    rgb: UInt8[np.ndarray, "y x 3"] = np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
    return rgb


def _eight_bits(picture: Shaped[np.ndarray, "y x 3"], pixels: Pixels) -> UInt8[np.ndarray, "y x 3"]:
    """Colour with more bits keeps the highest eight."""
    return (picture >> max(0, pixels.bits_stored - 8)).astype(np.uint8) if picture.itemsize > 1 else picture


def _significant(picture: Shaped[np.ndarray, "y x"], pixels: Pixels, *, depth: int | None) -> Shaped[np.ndarray, "y x"]:
    """Mask what lies above or below the stored bits (overlays, rubbish) and extend the sign.

    Args:
        picture: Values as stored.
        pixels: As the header says.
        depth: Bits of a JPEG 2000 codestream, which leaves nothing to mask.
    """
    if picture.dtype.kind != "u":
        return picture
    size = 8 * picture.itemsize
    bits = min(depth or pixels.bits_stored, size)
    below = 0 if depth else max(0, min(pixels.high_bit, size - 1) + 1 - bits)
    above = size - bits - below
    if not pixels.is_signed:
        if below:
            picture = picture >> below
        return picture if above == 0 else picture & picture.dtype.type((1 << bits) - 1)
    signed = picture.view(f"i{picture.itemsize}")
    return signed if above + below == 0 else (signed << above) >> (above + below)
