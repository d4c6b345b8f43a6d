"""How image and label of a case are read: one set of choices, kept with the case, and the only readers of a case."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from medssl import io
from medssl.config import Config
from medssl.errors import CaseError, EnvironmentFaultError, GeometryError, MedSSLError, ReadError
from medssl.geometry import Geometry
from medssl.io.dicom.series_list import SUFFIX, read_list
from medssl.volume import Unit, Volume, reorient, resample_to

_LABEL_TOLERANCE_MM = 0.1


class Reading(Config):
    """Choices that decide which voxels a file stands for; a scan makes them once, and every later reader follows.

    Args:
        volume: Which of several volumes, from 0, or ``channels`` for all of them as the channels of one.
        regularise: Fill missing slices and uneven slice distances of a DICOM series by interpolation.
        fix_signedness: Take DICOM values that are signed but labelled unsigned as what they are.
        pages: ``stack`` makes slices of the pages of a TIFF.
        label_grid: What becomes of a label whose grid is not that of its image: refused (``same``), resampled onto it
            (``resample``), or believed to lie on it where the voxels are as many (``trust``).
        xform: Which NIfTI transform to believe where the two disagree.
        assume_spacing_mm: Voxel size of files that state none.
    """

    volume: int | Literal["channels"] | None = Field(None, union_mode="left_to_right")
    regularise: bool = False
    fix_signedness: bool = False
    pages: Literal["refuse", "stack"] = "refuse"
    label_grid: Literal["same", "resample", "trust"] = "same"
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether no choice was made."""
        return self == Reading()

    def to_text(self) -> str:
        """JSON of the choices that were made, for a cell of a table; empty for none."""
        made = json.loads(self.model_dump_json(exclude_defaults=True))
        return json.dumps(made, sort_keys=True) if made else ""

    def completed(
        self, *, xform: Literal["sform", "qform"] | None, assume_spacing_mm: tuple[float, float, float] | None
    ) -> Reading:
        """The same, with what a preparation says where this says nothing."""
        return self.model_copy(
            update={
                "xform": self.xform or xform,
                "assume_spacing_mm": self.assume_spacing_mm or assume_spacing_mm,
            }
        )


def read_image(path: Path, reading: Reading, *, unit: Unit = "arbitrary") -> tuple[Volume, io.Source]:
    """Read an image as ``reading`` says; a DICOM image has the unit that it states.

    Raises:
        ReadError: if the file is missing, damaged or of another kind.
        GeometryError: if its grid is impossible or ambiguous.
        CaseError: if its values or dimensions break a rule.
    """
    return io.read_volume(
        path,
        unit=unit,
        xform=reading.xform,
        assume_spacing_mm=reading.assume_spacing_mm,
        volume=reading.volume,
        regularise=reading.regularise,
        fix_signedness=reading.fix_signedness,
        pages=reading.pages,
    )


def read_label(path: Path, reading: Reading, *, image: Volume, item: str) -> tuple[Volume, tuple[str, ...]]:
    """Read the label of an image and bring it onto the image's grid, as ``reading`` says.

    A label whose voxels are those of the image in another order of axes is turned; every voxel stays what it is.

    Args:
        path: Label map, DICOM-SEG or RTSTRUCT.
        reading: Choices of the case.
        image: What it was drawn on.
        item: What to call the case in a refusal.

    Returns:
        The label on the grid of ``image``: one channel of label values, or several of 0 and 1 where structures
        overlap; and ``W_CODE: sentence`` strings.

    Raises:
        ReadError: if the file is missing, damaged or of another kind.
        CaseError: E_SHAPE, E_GEOMETRY where grids differ, or a code of the label's values.
    """
    label, source = io.read_volume(
        path,
        unit="label",
        xform=reading.xform,
        assume_spacing_mm=reading.assume_spacing_mm,
        volume="channels" if reading.volume == "channels" else None,
        regularise=reading.regularise,
        pages=reading.pages,
        on=image.geometry,
    )
    warnings = source.warnings
    label = turned_onto(label, image.geometry)
    is_elsewhere = not _is_on(label.geometry, image.geometry)
    if reading.label_grid == "resample" and is_elsewhere:
        was_drawn = bool(label.array.any())
        label = resample_to(label, image.geometry)
        if was_drawn and not label.array.any():
            raise GeometryError(
                f"{item}: no labelled voxel of its label lies inside the image; the two are of different places. "
                "Find the label of this image."
            )
        warnings += ("W_LABEL_RESAMPLED: the label lay on another grid and was resampled to the image's.",)
    elif reading.label_grid == "trust" and label.geometry.shape == image.geometry.shape and is_elsewhere:
        label = Volume(label.array, image.geometry, "label")
        warnings += ("W_LABEL_TRUSTED: the label states another place than the image, which was not believed.",)
    return matched_label(image, label, item=item), warnings


def turned_onto(volume: Volume, geometry: Geometry) -> Volume:
    """The volume with its axes turned as those of a grid, if that alone brings it there; else as it is."""
    if _is_on(volume.geometry, geometry):
        return volume
    wanted = geometry.orientation
    return reorient(volume, wanted) if _is_on(volume.geometry.reoriented(wanted), geometry) else volume


def matched_label(image: Volume, label: Volume, *, item: str) -> Volume:
    """The label map on exactly the grid of its image.

    Raises:
        CaseError: E_SHAPE or E_GEOMETRY, if the grids differ by more than 0.1 mm at a corner.
    """
    if label.geometry.shape != image.geometry.shape:
        raise CaseError(
            f"{item}: label of shape {label.array.shape}, image of shape {image.array.shape} (channels first); "
            "a label has the voxels of its image. Find the label of this image, or scan with --label-grid resample.",
            code="E_SHAPE",
        )
    distance = image.geometry.max_corner_distance_mm(label.geometry)
    if distance > _LABEL_TOLERANCE_MM:
        raise GeometryError(
            f"{item}: label lies {distance:.2f} mm off its image at a corner; {_LABEL_TOLERANCE_MM} mm is allowed. "
            "Correct its header, or scan with --label-grid resample or trust."
        )
    return Volume(label.array, image.geometry, "label")


def one_channel(label: Volume, *, item: str) -> Volume:
    """The label, if it has one channel of label values; training and scoring know no other yet.

    Raises:
        CaseError: E_MULTI_LABEL for several channels.
    """
    if label.array.shape[0] != 1:
        raise CaseError(
            f"{item}: its label has {label.array.shape[0]} channels of structures that may overlap; one channel of "
            "label values is needed. Choose which structure wins, and write one label map.",
            code="E_MULTI_LABEL",
        )
    return label


def label_values_of(label: Volume) -> tuple[int, ...]:
    """Label values that occur, ascending; of a label of several channels, the numbers of those in use, from 1."""
    if label.array.shape[0] == 1:
        return tuple(int(value) for value in np.unique(label.array) if value != 0)
    return tuple(number for number, channel in enumerate(label.array, start=1) if channel.any())


@contextmanager
def nameless(path: str, name: str) -> Iterator[None]:
    """Name a file in a refusal by its case, for names of files and folders can be those of patients.

    Args:
        path: The file; others beside it, such as that of its voxels, lose their names too.
        name: What to write in its place.
    """
    try:
        yield
    except EnvironmentFaultError:
        raise
    except MedSSLError as error:
        text = error.message.replace(path, name)
        for file in _files_of(Path(path)):
            text = text.replace(str(file), f"{name}, one of its files").replace(file.name, "one of its files")
        beside = re.escape(str(Path(path).parent)) + r"/.*?(?=: )"
        text = re.sub(beside, f"{name}, second file", text)
        raise type(error)(text, code=error.code) from None


def _files_of(path: Path) -> list[Path]:
    """Files behind a folder or a series list, longest names first."""
    if path.is_dir():
        files = {file for file in path.rglob("*") if file.is_file()}
    elif path.name.endswith(SUFFIX):
        try:
            files = {file for volume in read_list(path) for file in volume.paths}
        except ReadError:
            files = set()
    else:
        files = set()
    return sorted(files, key=lambda file: -len(str(file)))


def _is_on(grid: Geometry, other: Geometry) -> bool:
    return grid.shape == other.shape and other.max_corner_distance_mm(grid) <= _LABEL_TOLERANCE_MM
