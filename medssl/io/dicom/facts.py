"""The few fields of a header that are kept beside geometry, each checked so that no free text slips through."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.terms import BODY_PARTS, PATIENT_POSITIONS, VIEWS, codes, known

_AGE = re.compile(r"(\d{3})([DWMY])")
_AGE_UNITS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
_OLDEST_YEARS = 90.0
_FIRST_WORD = re.compile(r"[a-z]+")
_MAKERS = {
    "agfa": "agfa",
    "canon": "canon",
    "carestream": "carestream",
    "esaote": "esaote",
    "fuji": "fujifilm",
    "fujifilm": "fujifilm",
    "ge": "ge",
    "gems": "ge",
    "general": "ge",
    "hitachi": "hitachi",
    "hologic": "hologic",
    "hyperfine": "hyperfine",
    "konica": "konica minolta",
    "lorad": "hologic",
    "mindray": "mindray",
    "neusoft": "neusoft",
    "philips": "philips",
    "samsung": "samsung",
    "shimadzu": "shimadzu",
    "siemens": "siemens",
    "toshiba": "toshiba",
    "uih": "united imaging",
    "united": "united imaging",
    "varian": "varian",
}
_CODED = (
    ("BodyPartExamined", "body_part", BODY_PARTS),
    ("ViewPosition", "view_position", VIEWS),
    ("PatientPosition", "patient_position", PATIENT_POSITIONS),
)
_MEASURED = (
    ("MagneticFieldStrength", "field_strength_T"),
    ("KVP", "kvp"),
    ("EchoTime", "echo_time_ms"),
    ("RepetitionTime", "repetition_time_ms"),
    ("SliceThickness", "slice_thickness_mm"),
)
_LISTED = (("ScanningSequence", "scanning_sequence"), ("ImageType", "image_type"))
_PRESENT = (
    ("ContrastBolusAgent", "contrast"),
    ("ContrastBolusAgentSequence", "contrast"),
    ("OverlayRows", "overlay"),
)
_KEYWORDS = (
    "Manufacturer",
    *(keyword for keyword, _, _ in _CODED),
    *(keyword for keyword, _ in (*_LISTED, *_MEASURED)),
    "ImageLaterality",
    "Laterality",
    "PatientSex",
    "PatientAge",
    "BurnedInAnnotation",
    "LossyImageCompression",
)
_YES_NO = {"YES": "yes", "NO": "no"}
_SIDES = frozenset({"R", "L", "U", "B"})
_SEXES = frozenset({"M", "F", "O"})
_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 81))


def facts_of(elements: Elements, *, modality: str, spacing_from: str) -> dict[str, str | float]:
    """Those of :data:`medssl.io.dicom.model.FACTS` that a file gives.

    Args:
        elements: Of the file.
        modality: In upper case.
        spacing_from: Where the spacing was found; ``""`` where nowhere.
    """
    texts = tuple(map(elements.text, _KEYWORDS))
    present = tuple(name for keyword, name in _PRESENT if keyword in elements)
    return dict(_facts(texts, present, modality, spacing_from, elements.transfer_syntax))


@functools.lru_cache(maxsize=256)
def _facts(
    texts: tuple[str, ...], present: tuple[str, ...], modality: str, spacing_from: str, transfer_syntax: str
) -> Mapping[str, str | float]:
    """The files of a series say the same, so that one answer serves them all."""
    given = dict(zip(_KEYWORDS, texts, strict=True))
    facts: dict[str, str | float] = {"modality": modality, "spacing_from": spacing_from}
    maker = _FIRST_WORD.match(given["Manufacturer"].lower())
    if maker:
        facts["manufacturer"] = _MAKERS.get(maker[0], "other")
    for keyword, name, terms in _CODED:
        facts[name] = known(given[keyword], terms)
    for keyword, name in _LISTED:
        if given[keyword]:
            facts[name] = codes(given[keyword])
    for keyword, name in _MEASURED:
        number = _number(given[keyword])
        if number is not None:
            facts[name] = number
    side = given["ImageLaterality"] or given["Laterality"]
    facts["laterality"] = side if side in _SIDES else ""
    facts["patient_sex"] = given["PatientSex"] if given["PatientSex"] in _SEXES else ""
    age = _AGE.fullmatch(given["PatientAge"])
    if age:
        facts["patient_age_years"] = min(round(int(age[1]) / _AGE_UNITS[age[2]], 2), _OLDEST_YEARS)
    facts |= dict.fromkeys(present, "yes")
    facts["burned_in"] = _YES_NO.get(given["BurnedInAnnotation"].upper(), "")
    if given["LossyImageCompression"] == "01" or transfer_syntax in _LOSSY_SYNTAXES:
        facts["lossy"] = "yes"
    return {name: value for name, value in facts.items() if value != ""}


def _number(text: str) -> float | None:
    """A finite number; None for anything else, since nothing depends on it."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None
