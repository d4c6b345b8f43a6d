"""DICOM objects that are no images, through pydicom, with none of its exceptions and warnings let out."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from isal import isal_zlib
from jaxtyping import Float64
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import ExplicitVRLittleEndian

from medssl.errors import MedSSLError, ReadError
from medssl.io import integrity
from medssl.io.dicom.tags import DEFLATED

_SMALLEST_LIMIT_BYTES = 64 << 20
_MOST_GROWTH = 200
_META_START = 132  # behind the preamble and DICM stands (0002,0000), whose value is the length of the rest of its group
_META_LENGTH = slice(_META_START + 8, _META_START + 12)
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])

_is_quiet: ContextVar[bool] = ContextVar("_is_quiet", default=False)
logging.getLogger("pydicom").addFilter(lambda _: not _is_quiet.get())  # what it logs quotes the values of elements


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Whatever a damaged object makes pydicom raise comes out as a refusal of the file, without a word of its content.

    Raises:
        ReadError: E_HEADER.
    """
    token = _is_quiet.set(True)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except MedSSLError:
        raise
    except Exception as error:
        raise ReadError(
            f"{path}: the header holds impossible values ({type(error).__name__}). Take the source.", code="E_HEADER"
        ) from None
    finally:
        _is_quiet.reset(token)


def read_object(path: Path, classes: Sequence[str], *, name: str) -> Any:
    """Give the pydicom data set of a file of one of some SOP classes; to be called within :func:`parsing`.

    Args:
        path: File.
        classes: UIDs of the SOP classes that will do.
        name: What these are, for the message.

    Raises:
        ReadError: E_FORMAT for other SOP classes, E_BOMB, E_TRUNCATED, and those of
            :func:`medssl.io.integrity.read_bytes`.
    """
    data = integrity.read_bytes(path)
    dataset = _inflated(data, path=path) if _is_deflated(data) else pydicom.dcmread(io.BytesIO(data), force=True)
    if dataset.get("SOPClassUID") not in classes:
        raise ReadError(f"{path}: is no {name}. Give the file of one.", code="E_FORMAT")
    return dataset


def items(parent: Any, keyword: str) -> Sequence[Any]:
    """Items of a sequence; none where it is absent or empty."""
    return parent.get(keyword) or ()


def whole(parent: Any, keyword: str, *, path: Path) -> int:
    """A whole number that has to be there.

    Raises:
        ReadError: E_TAG.
    """
    try:
        return int(parent.get(keyword))
    except (TypeError, ValueError):
        raise ReadError(f"{path}: {keyword} is no whole number. Export the object again.", code="E_TAG") from None


def numbers(parent: Any, keyword: str, count: int, *, path: Path) -> Float64[np.ndarray, " count"] | None:
    """Finite numbers of a tag, None where it is absent or empty.

    Raises:
        ReadError: E_TAG where there are more, fewer, or something else.
    """
    value = parent.get(keyword)
    if value is None or value in ("", []):
        return None
    try:
        result = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        result = np.empty(0)
    if result.shape != (count,) or not np.isfinite(result).all():
        raise ReadError(
            f"{path}: {keyword} holds something else than {count} numbers. Export the object again.", code="E_TAG"
        )
    return result


def ras(points_lps: Float64[np.ndarray, "*batch 3"]) -> Float64[np.ndarray, "*batch 3"]:
    """Points or directions in the frame of DICOM taken to that of medssl, and back."""
    turned: np.ndarray = points_lps * _LPS_TO_RAS
    return turned


def _is_deflated(data: bytes) -> bool:
    return data[128:_META_START] == b"DICM" and DEFLATED.encode() in data[_META_START : _meta_end(data)]


def _meta_end(data: bytes) -> int:
    return _META_LENGTH.stop + int.from_bytes(data[_META_LENGTH], "little")


def _inflated(data: bytes, *, path: Path) -> Any:
    limit = max(_SMALLEST_LIMIT_BYTES, _MOST_GROWTH * len(data))
    engine = isal_zlib.decompressobj(-isal_zlib.MAX_WBITS)
    plain = engine.decompress(data[_meta_end(data) :], limit)
    if not engine.eof:
        raise ReadError(
            f"{path}: the deflated data do not end within {limit} bytes. Copy the file again from its source.",
            code="E_BOMB" if len(plain) >= limit else "E_TRUNCATED",
        )
    dataset = read_dataset(io.BytesIO(plain), is_implicit_VR=False, is_little_endian=True)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset
