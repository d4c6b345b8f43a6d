"""How large a pixel is, from whichever element says so."""

from __future__ import annotations

from typing import NamedTuple

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements

_PROJECTIONS = frozenset({"CR", "DX", "MG", "XA", "RF", "IO", "PX", "RG"})
_TWO_DIMENSIONAL, _CM = 1, 3
_MM_PER_CM = 10.0


class Spacing(NamedTuple):
    """Distance between rows and between columns in mm, and where it was found.

    Args:
        mm: None where nothing says so.
        origin: As the fact ``spacing_from``; ``""`` where unknown.
        warnings: ``W_CODE: sentence`` strings.
    """

    mm: tuple[float, float] | None
    origin: str = ""
    warnings: tuple[str, ...] = ()


def pixel_spacing(elements: Elements) -> Spacing:
    """Pixel spacing of a file.

    Raises:
        ReadError: E_TAG for values that are no two positive numbers.
    """
    patient = positive(elements, "PixelSpacing")
    if patient is not None:
        if elements.text("Modality") in _PROJECTIONS and patient == positive(elements, "ImagerPixelSpacing"):
            return Spacing(patient, "imager", (_imager("without a magnification factor"),))
        return Spacing(patient, "patient")
    imager = positive(elements, "ImagerPixelSpacing")
    if imager is not None:
        factor = elements.number("EstimatedRadiographicMagnificationFactor")
        if factor is None or factor <= 0:
            return Spacing(imager, "imager", (_imager("without a magnification factor"),))
        spacing = (imager[0] / factor, imager[1] / factor)
        return Spacing(spacing, "magnification", (_imager("divided by the estimated magnification factor"),))
    regions = _regions(elements)
    if regions is not None:
        sentence = "W_US_SPACING: the spacing is that of the calibrated ultrasound region."
        return Spacing(regions, "ultrasound region", (sentence,))
    scanned = positive(elements, "NominalScannedPixelSpacing")
    return Spacing(None) if scanned is None else Spacing(scanned, "scanner")


def positive(elements: Elements, keyword: str) -> tuple[float, float] | None:
    """Two distances in mm, as written; None where absent or 0.

    Raises:
        ReadError: E_TAG.
    """
    if keyword not in elements.values:
        return None
    found = elements.numbers(keyword, 2)
    if found is None or not any(found):  # some write 0 for unknown
        return None
    if min(found) <= 0:
        raise ReadError(
            f"{elements.path}: {keyword} is {found[0]:g} and {found[1]:g} mm; both must be above 0. "
            "Correct it at the source.",
            code="E_TAG",
        )
    return float(found[0]), float(found[1])


def _imager(how: str) -> str:
    return f"W_IMAGER_SPACING: the spacing is that at the detector, {how}, not that in the patient."


def _regions(elements: Elements) -> tuple[float, float] | None:
    """Spacing on which all ultrasound regions agree."""
    found: set[tuple[float, float]] = set()
    for region in elements.sequence("SequenceOfUltrasoundRegions"):
        units = (region.integer("PhysicalUnitsXDirection"), region.integer("PhysicalUnitsYDirection"))
        across, down = region.number("PhysicalDeltaX"), region.number("PhysicalDeltaY")
        if region.integer("RegionSpatialFormat") != _TWO_DIMENSIONAL or units != (_CM, _CM) or not across or not down:
            return None
        found.add((abs(down) * _MM_PER_CM, abs(across) * _MM_PER_CM))
    return found.pop() if len(found) == 1 else None
