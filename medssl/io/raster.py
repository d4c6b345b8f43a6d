"""PNG, JPEG, TIFF and BMP as volumes of one slice; the pages of a TIFF as slices where the caller says so.

The array is (C, X, Y, 1) with X the column and Y the row of the picture, counted from its upper left; the affine is
diag(-1, -1, 1), so that columns run to the left and rows to the back of the patient, as in an axial slice on a screen
and as SimpleITK places 2D images. Grey of 8 and 16 bits stays as it is, colour becomes three channels of 8 bits.
"""

from __future__ import annotations

import io
import warnings as python_warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps, UnidentifiedImageError

from medssl.errors import CaseError, MedSSLError, ReadError
from medssl.io import integrity
from medssl.io.source import Decoded
from medssl.io.values import checked_grid
from medssl.volume import Unit

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_MOST_PIXELS = 64_000_000
_PNG_START = 8
_PNG_DEEP_COLOUR = {2, 4, 6}
_GREY_DTYPES = {"I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16, "I": np.int32, "F": np.float32}
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
_MOST_PAGES = 10_000


def read(
    data: bytes,
    *,
    path: Path,
    unit: Unit,
    assume_spacing_mm: tuple[float, float, float] | None,
    pages: Literal["refuse", "stack"] = "refuse",
) -> Decoded:
    """Pixels of a picture, on a grid of 1 mm unless a spacing is given.

    Alpha is laid on black. Of a palette picture a label map takes the numbers and an image the colours.

    Args:
        data: The whole file.
        path: For messages.
        unit: ``label`` keeps palette numbers.
        assume_spacing_mm: Size of a pixel along columns and rows, and slice thickness.
        pages: ``stack`` makes slices of the pages of a TIFF, in their order.

    Raises:
        ReadError: E_BOMB above 64 megapixels, E_TRUNCATED, E_CRC, E_HEADER, E_FORMAT, E_SIZE_LIE.
        CaseError: E_DTYPE, E_NDIM, E_LABEL_VALUE, E_MIXED_SHAPE.
    """
    warnings: tuple[str, ...] = ()
    if data.startswith(b"\x89PNG"):
        warnings = _check_png(data, path=path)
    with _faults(path):
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        name = str(picture.format).lower()
        if unit == "label" and name == "jpeg":
            raise CaseError(
                f"{path}: a JPEG has other values than were drawn; a label map without loss is needed. Take the PNG.",
                code="E_LABEL_VALUE",
            )
        count = _pages(picture, path=path, pages=pages)
        if count > 1:
            integrity.check_size(count * picture.width * picture.height // 8, len(data), path=path)
        array, said = _stacked(picture, count, path=path, is_label=unit == "label")
    warnings += said
    if count > 1:
        warnings += (f"W_PAGES: {count} pages were taken as slices, from the first to the last.",)
    spacing = assume_spacing_mm or (1.0, 1.0, 1.0)
    if assume_spacing_mm is None:
        warnings += ("W_NO_SPACING: a picture has no size in mm; 1 mm a pixel was assumed.",)
    else:
        warnings += (f"W_SPACING_ASSUMED: spacing {list(spacing)} mm was assumed.",)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    geometry, far = checked_grid(array.shape[1:], affine, path=path)
    return Decoded(array, geometry, name, warnings + far)


def _check_png(data: bytes, *, path: Path) -> tuple[str, ...]:
    """Walk the chunks: Pillow neither checks the CRC of pixel data nor keeps 16 bits of colour."""
    position, kind, headers = _PNG_START, b"", 0
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ReadError(f"{path}: the PNG ends before its last chunk. Copy the file again.", code="E_TRUNCATED")
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            raise ReadError(f"{path}: the PNG ends within a chunk. Copy the file again.", code="E_TRUNCATED")
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ReadError(f"{path}: a chunk of the PNG is damaged. Copy the file again.", code="E_CRC")
        headers += kind == b"IHDR"
        if headers != 1 or (kind == b"IHDR" and length != 13):
            raise ReadError(f"{path}: one IHDR chunk at the start is needed. Take the source.", code="E_HEADER")
        if kind == b"IHDR" and data[position + 16] == 16 and data[position + 17] in _PNG_DEEP_COLOUR:
            raise CaseError(
                f"{path}: 16 bits of colour or alpha would be cut to 8. Save it as 16-bit grey.", code="E_DTYPE"
            )
        position = end + 4
    return integrity.trailing(data[position:], path=path)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Whatever Pillow trips over refuses the file; its warnings concern sizes, looked at here, and unused metadata."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    except MedSSLError:
        raise
    except Image.DecompressionBombError as error:
        raise ReadError(
            f"{path}: more than {_MOST_PIXELS // 1_000_000} megapixels. Cut it into tiles first.", code="E_BOMB"
        ) from error
    except UnidentifiedImageError as error:
        raise ReadError(f"{path}: a kind of picture that is not read. Save it as PNG.", code="E_FORMAT") from error
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, zlib.error) as error:
        code = "E_TRUNCATED" if "truncated" in str(error).lower() else "E_CRC"
        raise ReadError(f"{path}: the picture does not decode. Copy the file again.", code=code) from error


def _pages(picture: Image.Image, *, path: Path, pages: Literal["refuse", "stack"]) -> int:
    """Number of pages, counted one by one up to a limit, since a damaged TIFF may chain them without an end."""
    count = 1
    if picture.format != "TIFF":
        count = int(getattr(picture, "n_frames", 1))
    else:
        try:
            while count <= (_MOST_PAGES if pages == "stack" else 1):
                picture.seek(count)
                count += 1
        except EOFError:
            pass
        picture.seek(0)
    if count > 1 and (picture.format != "TIFF" or pages == "refuse"):
        option = " or take its pages as slices with pages stack" if picture.format == "TIFF" else ""
        raise CaseError(f"{path}: several frames; one is read. Split it into files{option}.", code="E_NDIM")
    if count > _MOST_PAGES:
        raise ReadError(f"{path}: more than {_MOST_PAGES} pages. Split it into files.", code="E_BOMB")
    return count


def _stacked(
    picture: Image.Image, count: int, *, path: Path, is_label: bool
) -> tuple[Shaped[np.ndarray, "c columns rows z"], tuple[str, ...]]:
    """All pages in one array, and what was changed, each thing once."""
    first, said = _page(picture, 0, path=path, is_label=is_label)
    stack = np.empty((count, *first.shape), first.dtype)
    stack[0] = first
    for index in range(1, count):
        pixels, more = _page(picture, index, path=path, is_label=is_label)
        if (pixels.shape, pixels.dtype) != (first.shape, first.dtype):
            raise CaseError(
                f"{path}: pages of several sizes or kinds; slices of one are needed. Split it into files.",
                code="E_MIXED_SHAPE",
            )
        stack[index] = pixels
        said += more
    return stack.transpose(3, 2, 1, 0), tuple(dict.fromkeys(said))


def _page(
    picture: Image.Image, index: int, *, path: Path, is_label: bool
) -> tuple[Shaped[np.ndarray, "rows columns c"], tuple[str, ...]]:
    """Pixels of one page, turned as its EXIF orientation says."""
    if index:
        picture.seek(index)
    if picture.width * picture.height > _MOST_PIXELS:
        raise Image.DecompressionBombError
    is_turned = picture.getexif().get(_EXIF_ORIENTATION, 1) != 1  # Pillow turns a TIFF while loading
    picture.load()
    is_turned = is_turned or picture.getexif().get(_EXIF_ORIENTATION, 1) != 1
    warnings: tuple[str, ...] = ()
    if is_turned:
        warnings = ("W_EXIF: the picture was turned as its EXIF orientation says.",)
    tags = getattr(picture, "tag_v2", {})
    if picture.mode not in _GREY_DTYPES and max(tags.get(_TIFF_BITS, (8,))) > 8:
        raise CaseError(
            f"{path}: 16 bits of colour or alpha would be cut to 8. Save it as 16-bit grey.", code="E_DTYPE"
        )
    pixels, said = _pixels(ImageOps.exif_transpose(picture), path=path, is_label=is_label)
    return _as_tagged(pixels, picture.mode, tags), warnings + said


def _as_tagged(
    pixels: Shaped[np.ndarray, "rows columns c"], mode: str, tags: Any
) -> Shaped[np.ndarray, "rows columns c"]:
    """Two things that Pillow leaves to its caller: unsigned 32 bits, and 16 bits of which 0 is white."""
    if mode == "I" and tags.get(_TIFF_BITS) == (32,) and tags.get(_TIFF_SAMPLE_FORMAT, (1,)) == (1,):
        return pixels.view(np.uint32)
    if mode.startswith("I;16") and tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        return np.iinfo(np.uint16).max - pixels
    return pixels


def _pixels(
    picture: Image.Image, *, path: Path, is_label: bool
) -> tuple[Shaped[np.ndarray, "rows columns c"], tuple[str, ...]]:
    """Rows, columns, channels by the rule of each mode, and what was changed."""
    if is_label and picture.mode in {"P", "1"}:
        return np.asarray(picture).astype(np.uint8)[..., None], ()
    if picture.mode in _GREY_DTYPES:
        return np.array(picture, dtype=_GREY_DTYPES[picture.mode])[..., None], ()
    warnings: tuple[str, ...] = ()
    if picture.mode in {"LA", "PA", "RGBA", "La", "RGBa"} or "transparency" in picture.info:
        warnings += ("W_ALPHA: transparency was laid on black.",)
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    elif picture.mode in {"CMYK", "YCbCr", "LAB", "HSV"}:
        warnings += (f"W_COLOUR: {picture.mode} colours were converted to RGB.",)
    if picture.mode in {"1", "L"}:
        return np.asarray(picture.convert("L"))[..., None], warnings
    colours = np.asarray(picture.convert("RGB"))
    if (colours == colours[..., :1]).all():
        return colours[..., :1], warnings
    if is_label:
        raise CaseError(f"{path}: a coloured label; grey or palette numbers are needed. Convert it.", code="E_NDIM")
    return colours, warnings
