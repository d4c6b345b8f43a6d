"""What DICOM files say, reduced to what an image needs: files hold frames, frames make stacks, stacks make items.

No name, date, number or free text of a patient gets in here: identifiers are tokens, keyed hashes that are equal where
the originals are equal, and of the other header fields only those of :data:`FACTS` are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from medssl.errors import MedSSLError
from medssl.geometry import Geometry

Token = str
Kind = Literal["image", "seg", "rtstruct"]

FACTS = (
    "modality",  # CS of the file, such as CT, MR, PT, US, CR, DX, MG
    "manufacturer",  # one of a list of known makers, in lower case, else "other"; never the file's own text
    "body_part",  # a term of the standard's list, else "OTHER", as the next ones
    "view_position",
    "patient_position",
    "laterality",
    "patient_sex",
    "patient_age_years",  # 90 stands for 90 and above
    "field_strength_T",
    "kvp",
    "echo_time_ms",
    "repetition_time_ms",
    "scanning_sequence",
    "image_type",  # values joined by a backslash
    "slice_thickness_mm",
    "contrast",  # "yes" where an agent is named
    "burned_in",  # "yes" or "no", where the file says so
    "overlay",  # "yes" where drawings lie over the picture; they are not drawn into it
    "lossy",  # "yes" where the pixels were ever compressed with loss
    "spacing_from",  # "patient", "imager", "magnification", "ultrasound region" or "scanner"
)


@dataclass(frozen=True)
class Pixels:
    """How the pixels of one file are stored; sizes are checked against the file before anything is decoded.

    Args:
        transfer_syntax: UID.
        rows: Of the stored picture; that of the whole mosaic where the file is one.
        columns: Likewise.
        frames: At least 1.
        samples: Values a pixel: 1 or 3.
        bits_allocated: 1, 8, 16, 32 or 64.
        bits_stored: Meaningful bits.
        high_bit: Position of the highest one.
        is_signed: Two's complement of ``bits_stored`` bits.
        is_float: (Double) Float Pixel Data.
        photometric: As in the file, in upper case.
        planar: 0 for RGBRGB, 1 for planes.
        offset: Of the first byte of the value in the file (of the inflated data for the deflated syntax).
        length: Bytes of the value; None where it is encapsulated (compressed).
        padding: Lowest and highest stored value that stand for no data, both included.
    """

    transfer_syntax: str
    rows: int
    columns: int
    frames: int = 1
    samples: int = 1
    bits_allocated: int = 16
    bits_stored: int = 16
    high_bit: int = 15
    is_signed: bool = False
    is_float: bool = False
    photometric: str = "MONOCHROME2"
    planar: int = 0
    offset: int = 0
    length: int | None = None
    padding: tuple[float, float] | None = None


@dataclass(frozen=True)
class Frame:
    """One picture of a file, or one tile of a mosaic, and where it lies.

    Args:
        path: File.
        index: Number of the frame in the file, from 0.
        tile: Number of the tile where the file is a mosaic, else None.
        rows: Of this picture or tile.
        columns: Likewise.
        position_mm: Centre of the first pixel in LPS, or None.
        orientation: Direction along a row, then along a column, LPS, as in the file; or None.
        spacing_mm: Between rows, then between columns, as in the file; or None.
        slope: Rescale slope of this frame.
        intercept: Rescale intercept of this frame.
        rescale_type: HU, US, ... in upper case; ``""`` where absent.
        has_rescale: Whether the file has a slope and intercept.
        thickness_mm: Slice thickness, where known.
        between_mm: Spacing between slices as the header claims it, where it does.
        number: Instance number (or frame number); used for nothing but a last tie-break between volumes, never to sort
            slices.
        traits: What may tell one volume of a series from another, name to value, such as ``echo``, ``b_value``,
            ``time_point``, ``acquisition``, ``trigger_ms``, ``image_type``, ``direction``, ``phase``, ``stack``; only
            those that the file gives.
        instance: Token of the SOP instance UID.
        series: Token of the series UID.
        patient: Token of the patient's ID and its issuer, or of the study where there is no ID.
        frame_of_reference: Token, ``""`` where absent.
    """

    path: Path
    index: int
    rows: int
    columns: int
    position_mm: tuple[float, float, float] | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    spacing_mm: tuple[float, float] | None = None
    tile: int | None = None
    slope: float = 1.0
    intercept: float = 0.0
    rescale_type: str = ""
    has_rescale: bool = False
    thickness_mm: float | None = None
    between_mm: float | None = None
    number: int | None = None
    traits: Mapping[str, str | float] = field(default_factory=dict)
    instance: Token = ""
    series: Token = ""
    patient: Token = ""
    frame_of_reference: Token = ""


@dataclass(frozen=True)
class Header:
    """One DICOM file without its pixels.

    Args:
        path: File.
        size: Bytes of the file.
        kind: What it can be used as.
        modality: CS of the file in upper case, ``""`` where absent.
        series: Token of the series UID.
        patient: Token, as in :class:`Frame`.
        pixels: How they are stored; None for RTSTRUCT.
        frames: Of an image, at least one; of the others none.
        references: Tokens of the series (SEG, RTSTRUCT: also of the instances) that the file points to.
        facts: Of :data:`FACTS`, those that are known.
        warnings: ``W_CODE: sentence`` strings.
    """

    path: Path
    size: int
    kind: Kind
    modality: str
    series: Token
    patient: Token
    pixels: Pixels | None
    frames: tuple[Frame, ...] = ()
    references: frozenset[Token] = frozenset()
    facts: Mapping[str, str | float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Frames in the order of their place that make one volume, or one frame that makes a 2D image; proven.

    Args:
        frames: Sorted by position along the normal; the third array axis counts them.
        geometry: Grid in RAS+ mm; array axes are column, row, slice; sheared where the gantry was tilted.
        what: What tells it from the others of its item, in words, such as ``echo 2`` or ``b-value 1000``; may be empty.
        warnings: ``W_CODE: sentence`` strings.
        gaps: Slice indices of ``geometry`` that no frame lies at, to be interpolated; only with ``regularise``, and
            then ``places`` says where each frame lies.
        places: Slice coordinate of each frame on ``geometry``, where it is not simply 0, 1, 2, ...
    """

    frames: tuple[Frame, ...]
    geometry: Geometry
    what: str = ""
    warnings: tuple[str, ...] = ()
    gaps: tuple[int, ...] = ()
    places: tuple[float, ...] | None = None

    def warned(self, warning: str) -> Stack:
        """The same with one warning more."""
        return replace(self, warnings=(*self.warnings, warning))


@dataclass(frozen=True)
class Item:
    """Volumes of one series on one grid: several echoes, phases, b-values, time points, or the frames of a clip.

    Args:
        series: Token.
        patient: Token.
        stacks: At least one; in the order of their traits.
        modality: As in :class:`Header`.
        facts: Those that all files share.
        name: Short and unique among the items of the same files: hex, made of tokens only.
    """

    series: Token
    patient: Token
    stacks: tuple[Stack, ...]
    modality: str
    facts: Mapping[str, str | float]
    name: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of all stacks, each once, sorted."""
        return tuple(sorted({frame.path for stack in self.stacks for frame in stack.frames}))


@dataclass(frozen=True)
class Assembly:
    """What a set of DICOM files amounts to; every file is in at least one column, and no frame is in two stacks.

    Args:
        items: Images that can be read.
        refused: Files that belong together and cannot be read, with the reason.
        duplicates: File that is the equal copy of another (same SOP instance), and that other.
        labels: Headers of DICOM-SEG and RTSTRUCT files.
        notes: Files left out of an item that is otherwise fine (a localizer, a screen save), with the reason.
    """

    items: tuple[Item, ...] = ()
    refused: tuple[tuple[tuple[Path, ...], MedSSLError], ...] = ()
    duplicates: tuple[tuple[Path, Path], ...] = ()
    labels: tuple[Header, ...] = ()
    notes: tuple[tuple[Path, str], ...] = ()
