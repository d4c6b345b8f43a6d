"""What DICOM values measure: HU of CT, SUV of PET by body weight, and nothing where the header does not say enough."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Sequence

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.model import Frame, Item
from medssl.io.dicom.tags import Table
from medssl.volume import Unit

SUV_TAGS: Table = {0x00541006: ("SUVType", "CS")}
"""To be read beside those of an image."""

_HU_TYPES = {"", "HU"}
_BEQUEREL_RANGE = (1e5, 1e11)
_WEIGHT_KG = (0.1, 500.0)
_MOST_HALF_LIVES = 20.0
_DATE_TIME = re.compile(r"(\d{4})(\d\d)(\d\d)(\d\d)(?:(\d\d)(?:(\d\d)(?:\.(\d{1,6}))?)?)?(?:[+-]\d{4})?")


def unit_of(item: Item, frames: Sequence[Frame]) -> tuple[Unit, tuple[str, ...]]:
    """HU for CT that is rescaled to it, else arbitrary; and a warning for CT that is not in HU.

    Args:
        item: The image.
        frames: Of the volume.
    """
    if item.modality != "CT":
        return "arbitrary", ()
    if not all(frame.has_rescale for frame in frames):
        return "arbitrary", ("W_NO_RESCALE: a CT without rescale slope and intercept; its values are not HU.",)
    is_localizer = "LOCALIZER" in str(item.facts.get("image_type", "")).upper().split("\\")
    if is_localizer:
        return "arbitrary", ()
    if not {frame.rescale_type for frame in frames} <= _HU_TYPES:
        return "arbitrary", ("W_NOT_HU: the header gives the values of this CT another unit than HU.",)
    return "HU", ()


def check_rescales(frames: Sequence[Frame]) -> None:
    """Whether the values of all slices are of one kind after their rescale.

    Args:
        frames: Of one volume.

    Raises:
        ReadError: E_RESCALE, if some have a rescale or a type of it that others lack.
    """
    kinds = {(frame.has_rescale, frame.rescale_type or "HU"): frame for frame in frames}
    if len(kinds) > 1 and any((frame.slope, frame.intercept) != (1, 0) for frame in frames):
        odd = min(kinds.values(), key=lambda frame: (frame.has_rescale, str(frame.path)))
        raise ReadError(
            f"{odd.path}: other slices of its volume have another rescale, or a rescale type that it lacks; all need "
            "one kind. Export the series again.",
            code="E_RESCALE",
        )


def common_factor(slices: Iterable[Elements]) -> float | str:
    """As :func:`suv_factor`, for all files of a volume."""
    found = {suv_factor(elements) for elements in slices}
    return found.pop() if len(found) == 1 else "its slices do not agree on unit, dose, weight or times"


def suv_factor(elements: Elements) -> float | str:
    """What turns the rescaled values of a PET into SUV by body weight, or why nothing does.

    Activity in Bq/ml times weight in g over the injected dose in Bq, decayed to the start of the scan unless the image
    was corrected to the time of injection. Values in g/ml are SUV already.

    Args:
        elements: Of one file of the series, :data:`SUV_TAGS` among them.

    Returns:
        The factor, or the condition that fails, as words that hold no value of the header.

    Reference: QIBA FDG-PET/CT profile, appendix on SUV calculation from vendor-neutral DICOM attributes.
    Deviations: counts with Philips' private factor, and series made after the scan with GE's private time, are refused.
    """
    try:
        return _factor(elements)
    except _UnknownError as error:
        return str(error)


class _UnknownError(Exception):
    """A condition of the SUV fails; the message says which."""


def _factor(elements: Elements) -> float:
    units = elements.text("Units")
    if units == "GML":
        if elements.text("SUVType") not in {"", "BW"}:
            raise _UnknownError("it holds SUV of another kind than by body weight")
        return 1.0
    if units != "BQML":
        raise _UnknownError("its unit is not Bq/ml")
    if not {"ATTN", "DECY"} <= set(elements.text("CorrectedImage").split("\\")):
        raise _UnknownError("it is not corrected for attenuation and decay")
    weight = elements.number("PatientWeight")
    if weight is None or not _WEIGHT_KG[0] <= weight <= _WEIGHT_KG[1]:
        raise _UnknownError("the weight is missing or implausible")
    tracer = elements.first("RadiopharmaceuticalInformationSequence")
    dose = tracer.number("RadionuclideTotalDose") if tracer else None
    if tracer is None or dose is None or not _BEQUEREL_RANGE[0] <= dose <= _BEQUEREL_RANGE[1]:
        raise _UnknownError("the injected dose is missing or implausible")
    correction = elements.text("DecayCorrection")
    if correction == "ADMIN":
        return weight * 1000 / dose
    if correction != "START":
        raise _UnknownError("the time that decay was corrected to is not known")
    half_life = tracer.number("RadionuclideHalfLife")
    if half_life is None or half_life <= 0:
        raise _UnknownError("the half-life is missing")
    waited = _waited_s(elements, tracer)
    if not 0 <= waited <= _MOST_HALF_LIVES * half_life:
        raise _UnknownError("the injection is not shortly before the scan")
    return weight * 1000 / (dose * math.pow(2, -waited / half_life))


def _waited_s(elements: Elements, tracer: Elements) -> float:
    """Seconds from the injection to the start of the scan."""
    date = elements.text("SeriesDate")
    scan = _seconds(date + elements.text("SeriesTime"))
    acquired = _seconds((elements.text("AcquisitionDate") or date) + elements.text("AcquisitionTime"))
    if scan is None or acquired is None:
        raise _UnknownError("the time of the scan is missing")
    if scan > acquired:
        raise _UnknownError("the series was made after the scan, so that the start of the scan is not known")
    injected = _seconds(tracer.text("RadiopharmaceuticalStartDateTime"))
    if injected is None:
        injected = _seconds(date + tracer.text("RadiopharmaceuticalStartTime"))
    if injected is None:
        raise _UnknownError("the time of the injection is missing")
    return scan - injected


def _seconds(text: str) -> float | None:
    """Seconds since 1970 of a DICOM date and time, local time taken as it stands."""
    found = _DATE_TIME.fullmatch(text.strip())
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction = found.groups()
    try:
        moment = datetime.datetime(
            int(year), int(month), int(day), int(hour), int(minute or 0), int(second or 0), tzinfo=datetime.UTC
        )
    except ValueError:
        return None
    return moment.timestamp() + float(f"0.{fraction or 0}")
