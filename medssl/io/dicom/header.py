"""The header of one DICOM file: what it is, how its pixels are stored, where its frames lie; no pixel is read."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.elements import read_elements
from medssl.io.dicom.facts import facts_of
from medssl.io.dicom.frames import several, single
from medssl.io.dicom.model import Frame, Header, Kind, Pixels, Token
from medssl.io.dicom.mosaic import is_mosaic, tiles
from medssl.io.dicom.spacing import pixel_spacing
from medssl.io.dicom.tags import CONTOURS, DEFLATED, NATIVE, REFERENCES, SEGMENTATIONS
from medssl.io.dicom.terms import CODE_STRING, MODALITIES, PHOTOMETRICS, known

_IMAGE_CLASSES = "1.2.840.10008.5.1.4.1.1."
_OTHER_CLASSES = (
    ("1.2.840.10008.1.3.10", "a DICOMDIR, the index of a disc"),
    ("1.2.840.10008.5.1.4.1.1.11.", "a presentation state"),
    ("1.2.840.10008.5.1.4.1.1.88.59", "a key object selection"),
    ("1.2.840.10008.5.1.4.1.1.88.", "a structured report"),
    ("1.2.840.10008.5.1.4.1.1.9.", "a waveform"),
    ("1.2.840.10008.5.1.4.1.1.104.1", "an encapsulated PDF"),
    ("1.2.840.10008.5.1.4.1.1.104.", "an encapsulated document"),
    ("1.2.840.10008.5.1.4.1.1.481.2", "a radiotherapy dose"),
    ("1.2.840.10008.5.1.4.1.1.481.5", "a radiotherapy plan"),
    ("1.2.840.10008.5.1.4.1.1.481.8", "a radiotherapy ion plan"),
    ("1.2.840.10008.5.1.4.1.1.481.4", "a radiotherapy record"),
    ("1.2.840.10008.5.1.4.1.1.481.6", "a radiotherapy record"),
    ("1.2.840.10008.5.1.4.1.1.481.7", "a radiotherapy record"),
    ("1.2.840.10008.5.1.4.1.1.481.9", "a radiotherapy record"),
    ("1.2.840.10008.5.1.4.1.1.66.1", "a spatial registration"),
    ("1.2.840.10008.5.1.4.1.1.66.2", "a set of fiducials"),
    ("1.2.840.10008.5.1.4.1.1.66.3", "a deformable registration"),
    ("1.2.840.10008.5.1.4.1.1.66.5", "a surface segmentation"),
    ("1.2.840.10008.5.1.4.1.1.66.6", "a set of nerve tracts"),
    ("1.2.840.10008.5.1.4.1.1.66", "raw data"),
    ("1.2.840.10008.5.1.4.1.1.67", "a mapping of values"),
    ("1.2.840.10008.5.1.4.1.1.4.2", "a spectroscopy"),
    ("1.2.840.10008.5.1.4.1.1.77.1.6", "a whole slide image, which is not read"),
    ("1.2.840.10008.5.1.4.38.", "a hanging protocol"),
    ("1.2.840.10008.5.1.4.34.", "a treatment worklist"),
)
_UID = re.compile(r"[0-9.]{1,64}")
_BITS = {"FloatPixelData": (32,), "DoubleFloatPixelData": (64,), "PixelData": (1, 8, 16, 32)}
_PACKED_LIMIT = 20_000
_PACKED_SLACK = 64 << 20
_LIE_FACTOR = 4
_LIE_SLACK = 1 << 20


def read_header(path: Path, *, key: bytes = b"") -> Header:
    """Read what a DICOM file says about its image; its pixels are left alone.

    Args:
        path: Regular file.
        key: Of the hashes that stand for identifiers; the same for all files that are to be compared.

    Raises:
        ReadError: E_FORMAT (no DICOM), E_NOT_IMAGE, E_HEADER, E_TAG, E_RESCALE, E_NO_GEOMETRY (mosaic), E_SIZE_LIE,
            E_PIXEL_LENGTH, E_BOMB, or one of those for unreadable files.
    """
    elements = read_elements(path)
    kind = _kind(elements)
    modality = known(elements.text("Modality"), MODALITIES)
    warnings = elements.warnings + _identity_warnings(elements)
    if kind == "image":
        return _image(elements, key, modality=modality, warnings=warnings)
    template = _template(elements, key)
    elements = read_elements(path, also=REFERENCES)
    return Header(
        path=path,
        size=elements.file_size,
        kind=kind,
        modality=modality,
        series=template.series,
        patient=template.patient,
        pixels=_pixels(elements) if kind == "seg" else None,
        references=frozenset(token(uid, key=key) for uid in _references(elements)),
        facts=facts_of(elements, modality=modality, spacing_from=""),
        warnings=warnings,
    )


def token(text: str, *, key: bytes) -> Token:
    """Keyed hash of an identifier in 16 hex digits; ``""`` for ``""``. A key has at most 64 bytes."""
    return hashlib.blake2b(text.encode(errors="replace"), key=key, digest_size=8).hexdigest() if text else ""


def to_dict(header: Header) -> dict[str, Any]:
    """The header as JSON can hold it."""
    plain = {**vars(header), "path": str(header.path), "facts": dict(header.facts)}
    plain["references"] = sorted(header.references)
    plain["pixels"] = None if header.pixels is None else vars(header.pixels)
    plain["frames"] = [
        {**vars(frame), "path": str(frame.path), "traits": dict(frame.traits)} for frame in header.frames
    ]
    return plain


def from_dict(plain: dict[str, Any]) -> Header:
    """The header that :func:`to_dict` wrote.

    Raises:
        KeyError, TypeError, ValueError: if something else wrote it.
    """
    pixels = plain["pixels"]
    if pixels is not None:
        padding = pixels["padding"]
        pixels = Pixels(**{**pixels, "padding": None if padding is None else tuple(padding)})
    return Header(
        **{
            **plain,
            "path": Path(plain["path"]),
            "pixels": pixels,
            "frames": tuple(_frame(frame) for frame in plain["frames"]),
            "references": frozenset(plain["references"]),
            "warnings": tuple(plain["warnings"]),
        }
    )


def _frame(plain: dict[str, Any]) -> Frame:
    vectors = ("position_mm", "orientation", "spacing_mm")
    changed = {name: None if plain[name] is None else tuple(plain[name]) for name in vectors}
    return Frame(**{**plain, **changed, "path": Path(plain["path"])})


def _image(elements: Elements, key: bytes, *, modality: str, warnings: tuple[str, ...]) -> Header:
    pixels = _pixels(elements)
    if elements.pixels is not None and elements.pixels.length != pixels.length:
        warnings += ("W_TRAILING: zeros after the pixels were ignored.",)
    if elements.sequence("ModalityLUTSequence"):
        warnings += ("W_MODALITY_LUT: the file has a table that maps its values; the values are kept as stored.",)
    spacing = pixel_spacing(elements)
    template = _template(elements, key, spacing_mm=spacing.mm)
    frames: tuple[Frame, ...]
    if pixels.frames > 1 or elements.sequence("PerFrameFunctionalGroupsSequence"):
        frames, assumed = several(elements, template, pixels)
        warnings += assumed
    else:
        frames = (single(elements, template),)
        if is_mosaic(elements):
            frames = tiles(elements, frames[0])
    origin = spacing.origin or ("patient" if frames[0].spacing_mm is not None else "")
    return Header(
        path=elements.path,
        size=elements.file_size,
        kind="image",
        modality=modality,
        series=template.series,
        patient=template.patient,
        pixels=pixels,
        frames=frames,
        facts=facts_of(elements, modality=modality, spacing_from=origin),
        warnings=warnings + spacing.warnings,
    )


def _kind(elements: Elements) -> Kind:
    """Image, segmentation or contours.

    Raises:
        ReadError: E_NOT_IMAGE for everything else.
    """
    sop_class = elements.text("SOPClassUID") or elements.text("MediaStorageSOPClassUID")
    if sop_class in SEGMENTATIONS:
        return "seg"
    if sop_class == CONTOURS:
        return "rtstruct"
    known = _other_class(sop_class)
    if known is None and (elements.pixels is not None or "Rows" in elements or sop_class.startswith(_IMAGE_CLASSES)):
        return "image"
    if not sop_class:
        raise ReadError(
            f"{elements.path}: does not say what it is and holds no picture. Copy the file again from its source.",
            code="E_HEADER",
        )
    raise ReadError(
        f"{elements.path}: is {known or 'a DICOM file without a picture'}, no image. Leave it out.",
        code="E_NOT_IMAGE",
    )


@functools.lru_cache(maxsize=64)
def _other_class(sop_class: str) -> str | None:
    """What a SOP class without an image is called."""
    for uid, name in _OTHER_CLASSES:
        if sop_class == uid or (uid.endswith(".") and sop_class.startswith(uid)):
            return name
    return None


def _template(elements: Elements, key: bytes, *, spacing_mm: tuple[float, float] | None = None) -> Frame:
    patient = elements.text("PatientID")
    patient = f"{patient}\0{elements.text('IssuerOfPatientID')}" if patient else elements.text("StudyInstanceUID")
    return Frame(
        path=elements.path,
        index=0,
        rows=_whole(elements, "Rows"),
        columns=_whole(elements, "Columns"),
        spacing_mm=spacing_mm,
        number=_instance_number(elements),
        instance=token(elements.text("SOPInstanceUID"), key=key),
        series=token(elements.text("SeriesInstanceUID"), key=key),
        patient=token(patient, key=key),
        frame_of_reference=token(elements.text("FrameOfReferenceUID"), key=key),
    )


def _whole(elements: Elements, keyword: str) -> int:
    return elements.integer(keyword) or 0


def _instance_number(elements: Elements) -> int | None:
    try:
        return elements.integer("InstanceNumber")
    except ReadError:
        return None


def _identity_warnings(elements: Elements) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    uids = [elements.text(keyword) for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")]
    if not all(_UID.fullmatch(uid) for uid in uids if uid):
        found += ("W_UID: an identifier of the file is not made as it should be; it only serves to compare.",)
    if any(map(elements.is_long, ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))):
        found += ("W_DS_LENGTH: a position, direction or spacing has more than 16 characters; it was read in full.",)
    return found


def _pixels(elements: Elements) -> Pixels:
    """How pixels are stored, in agreement with the size of the file.

    Raises:
        ReadError: E_HEADER, E_TAG, E_PIXEL_LENGTH or E_SIZE_LIE.
    """
    path = elements.path
    rows, columns = _whole(elements, "Rows"), _whole(elements, "Columns")
    if rows < 1 or columns < 1:
        raise ReadError(f"{path}: has no rows or columns. Copy the file again from its source.", code="E_HEADER")
    found = elements.pixels
    keyword = "PixelData" if found is None else found.keyword
    frames = 1 if "NumberOfFrames" not in elements else _whole(elements, "NumberOfFrames")
    samples = elements.integer("SamplesPerPixel") or 1
    allocated = _whole(elements, "BitsAllocated")
    stored = elements.integer("BitsStored") or allocated
    high = elements.integer("HighBit")
    high = stored - 1 if high is None else high
    photometric = elements.text("PhotometricInterpretation").upper() or "MONOCHROME2"
    if known(photometric, PHOTOMETRICS) == "OTHER" and CODE_STRING.fullmatch(photometric):
        photometric = "OTHER"
    if (
        frames < 1
        or samples not in {1, 3}
        or allocated not in _BITS[keyword]
        or not 0 < stored <= high + 1 <= allocated
        or not CODE_STRING.fullmatch(photometric)
    ):
        raise ReadError(
            f"{path}: {frames} frames of {samples} samples with {stored} bits up to bit {high} in {allocated} bits "
            "make no picture. Copy the file again, or convert it at the source.",
            code="E_TAG",
        )
    signed = elements.integer("PixelRepresentation") == 1
    pixels = Pixels(
        transfer_syntax=elements.transfer_syntax,
        rows=rows,
        columns=columns,
        frames=frames,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high,
        is_signed=signed,
        is_float=keyword != "PixelData",
        photometric=photometric,
        planar=_whole(elements, "PlanarConfiguration"),
        offset=0 if found is None else found.offset,
        length=0 if found is None else found.length,
        padding=_padding(elements, signed=signed, bits=allocated, kind=keyword.removesuffix("PixelData")),
    )
    return _checked(pixels, elements)


def _checked(pixels: Pixels, elements: Elements) -> Pixels:
    """The same, if the file has as many bytes of pixels as the header asks for."""
    path, size = elements.path, elements.size
    per_pixel = 16 if pixels.photometric == "YBR_FULL_422" else pixels.samples * pixels.bits_allocated
    expected = -(-pixels.rows * pixels.columns * pixels.frames * per_pixel // 8)
    if pixels.length is None:
        if pixels.transfer_syntax in NATIVE:
            raise ReadError(
                f"{path}: the pixels are in pieces, as only compressed ones may be. Take the file from its source.",
                code="E_HEADER",
            )
        _refuse_lie(8 * pixels.frames, size, size, path)
        _refuse_lie(expected, _PACKED_LIMIT * size + _PACKED_SLACK, size, path)
        return pixels
    found = min(pixels.length, size - pixels.offset)
    if pixels.length in {expected, expected + 1} and found >= expected:
        return pixels
    if pixels.length == found and _is_padded(pixels, expected, path):
        return replace(pixels, length=expected)
    if pixels.length != expected:
        _refuse_lie(expected, _LIE_FACTOR * size + _LIE_SLACK, size, path)
    raise ReadError(
        f"{path}: the pixels have {found} bytes, and the header asks for {expected}. "
        "Copy the file again from its source.",
        code="E_PIXEL_LENGTH",
    )


def _is_padded(pixels: Pixels, expected: int, path: Path) -> bool:
    """Whether less than a frame of nothing but zeros follows the pixels."""
    extra = (pixels.length or 0) - expected
    if pixels.transfer_syntax == DEFLATED or not 0 < extra < expected // pixels.frames:
        return False
    try:
        with path.open("rb") as file:
            file.seek(pixels.offset + expected)
            return not file.read(extra).strip(b"\0")
    except OSError:
        return False


def _refuse_lie(expected: int, limit: int, size: int, path: Path) -> None:
    if expected > limit:
        raise ReadError(
            f"{path}: the header promises {expected} bytes of pixels, the file has {size}. "
            "The header is damaged; take the source.",
            code="E_SIZE_LIE",
        )


def _padding(elements: Elements, *, signed: bool, bits: int, kind: str) -> tuple[float, float] | None:
    """Range of stored values that stand for no data; the sign is that of the pixels, whatever the element says."""
    ends: list[float] = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = elements.values.get(kind + keyword)
        if isinstance(value, float):
            ends.append(value)
        elif isinstance(value, int):
            value %= 1 << bits
            ends.append(value - (1 << bits) if signed and value >> (bits - 1) else value)
    if not ends or f"{kind}PixelPaddingValue" not in elements.values:
        return None
    return min(ends), max(ends)


def _references(elements: Elements) -> set[str]:
    """UIDs of the series and instances that a segmentation or a set of contours belongs to."""
    found: set[str] = set()
    pending = [elements]
    while pending:
        item = pending.pop()
        for keyword, value in item.values.items():
            if isinstance(value, list):
                pending.extend(value)
            elif keyword == "ReferencedSOPInstanceUID" or (keyword == "SeriesInstanceUID" and item is not elements):
                found.add(cast(str, value))
    return found
