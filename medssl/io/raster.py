"""PNG, JPEG, TIFF and BMP as volumes of one slice.

The array is (C, X, Y, 1) with X the column and Y the row of the picture, counted from its upper left; the affine is
diag(-1, -1, 1), so that columns run to the left and rows to the back of the patient, as in an axial slice on a screen
and as SimpleITK places 2D images. Grey of 8 and 16 bits stays as it is, colour becomes three channels of 8 bits.
"""

from __future__ import annotations

import io
import warnings as python_warnings
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps, UnidentifiedImageError

from medssl.errors import CaseError, ReadError
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


def read(data: bytes, *, path: Path, unit: Unit, assume_spacing_mm: tuple[float, float, float] | None) -> Decoded:
    """Pixels of a picture, on a grid of 1 mm unless a spacing is given.

    Alpha is laid on black. Of a palette picture a label map takes the numbers and an image the colours.

    Args:
        data: The whole file.
        path: For messages.
        unit: ``label`` keeps palette numbers.
        assume_spacing_mm: Size of a pixel along columns and rows, and slice thickness.

    Raises:
        ReadError: E_BOMB above 64 megapixels, E_TRUNCATED, E_CRC, E_HEADER, E_FORMAT. CaseError: E_DTYPE, E_NDIM.
    """
    warnings: tuple[str, ...] = ()
    if data.startswith(b"\x89PNG"):
        warnings = _check_png(data, path=path)
    picture, name, is_turned = _open(data, path=path)
    if is_turned:
        warnings += ("W_EXIF: the picture was turned as its EXIF orientation says.",)
    if unit == "label" and name == "jpeg":
        raise CaseError(
            f"{path}: a JPEG has other values than were drawn; a label map without loss is needed. Take the PNG.",
            code="E_LABEL_VALUE",
        )
    pixels, said = _pixels(picture, path=path, is_label=unit == "label")
    spacing = assume_spacing_mm or (1.0, 1.0, 1.0)
    if assume_spacing_mm is None:
        warnings += ("W_NO_SPACING: a picture has no size in mm; 1 mm a pixel was assumed.",)
    else:
        warnings += (f"W_SPACING_ASSUMED: spacing {list(spacing)} mm was assumed.",)
    array = np.ascontiguousarray(pixels.transpose(2, 1, 0)[..., None])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    geometry, far = checked_grid(array.shape[1:], affine, path=path)
    return Decoded(array, geometry, name, warnings + said + far)


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


def _open(data: bytes, *, path: Path) -> tuple[Image.Image, str, bool]:
    """Decoded picture of one frame, its format, and whether EXIF turned it."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # the size is checked below, odd metadata is not used
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > _MOST_PIXELS:
                raise Image.DecompressionBombError
            if getattr(picture, "n_frames", 1) > 1:
                raise CaseError(f"{path}: several frames; one is read. Split it into files.", code="E_NDIM")
            name = str(picture.format).lower()
            is_turned = picture.getexif().get(_EXIF_ORIENTATION, 1) != 1  # Pillow turns a TIFF while loading
            picture.load()
            is_turned = is_turned or picture.getexif().get(_EXIF_ORIENTATION, 1) != 1
            turned = ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise ReadError(
            f"{path}: more than {_MOST_PIXELS // 1_000_000} megapixels. Cut it into tiles first.", code="E_BOMB"
        ) from error
    except UnidentifiedImageError as error:
        raise ReadError(f"{path}: a kind of picture that is not read. Save it as PNG.", code="E_FORMAT") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, zlib.error) as error:
        if isinstance(error, CaseError):
            raise
        code = "E_TRUNCATED" if "truncated" in str(error).lower() else "E_CRC"
        raise ReadError(f"{path}: the picture does not decode. Copy the file again.", code=code) from error
    return turned, name, is_turned


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
