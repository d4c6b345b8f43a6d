"""The few fields of a header that are kept beside geometry, each checked so that no free text slips through."""

from __future__ import annotations

import re

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.frames import codes

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
_BODY_PARTS = frozenset(
    re.findall(
        "[A-Z]+",
        "ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BILEDUCT BLADDER BRAIN BREAST BRONCHUS BUTTOCK "
        "CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE "
        "COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE "
        "FEMUR FINGER FOOT GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY "
        "KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN "
        "NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PARATHYROID PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE "
        "RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM SHOULDER SIJOINT SKULL SPINE SPLEEN SSPINE STERNUM "
        "STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS THYROID TIBFIB TLSPINE TMJ TOE TRACHEA TSPINE "
        "UPRLIMB UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA ",
    )
)
_VIEWS = frozenset(
    re.findall("[A-Z]+", "AP PA LL RL RLD LLD RLO LLO RAO LAO CC MLO ML LM LMO XCCL XCCM FB SIO ISO LATERAL LAT OBL")
)
_PATIENT_POSITIONS = frozenset(
    re.findall("[A-Z]+", "HFS HFP HFDR HFDL FFS FFP FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL")
)
_CODED = (
    ("BodyPartExamined", "body_part", _BODY_PARTS),
    ("ViewPosition", "view_position", _VIEWS),
    ("PatientPosition", "patient_position", _PATIENT_POSITIONS),
)
_MEASURED = (
    ("MagneticFieldStrength", "field_strength_T"),
    ("KVP", "kvp"),
    ("EchoTime", "echo_time_ms"),
    ("RepetitionTime", "repetition_time_ms"),
    ("SliceThickness", "slice_thickness_mm"),
)
_LISTED = (("ScanningSequence", "scanning_sequence"), ("ImageType", "image_type"))
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
    values = elements.values
    facts: dict[str, str | float] = {"modality": modality, "spacing_from": spacing_from}
    maker = _FIRST_WORD.match(elements.text("Manufacturer").lower())
    if maker:
        facts["manufacturer"] = _MAKERS.get(maker[0], "other")
    for keyword, name, terms in _CODED:
        value = elements.text(keyword).upper().replace(" ", "").replace("_", "")
        facts[name] = value if value in terms else "OTHER" if value else ""
    for keyword, name in _LISTED:
        if keyword in values:
            facts[name] = codes(elements.text(keyword))
    for keyword, name in _MEASURED:
        if keyword in values:
            _measure(facts, elements, keyword, name)
    side = elements.text("ImageLaterality") or elements.text("Laterality")
    facts["laterality"] = side if side in _SIDES else ""
    facts["patient_sex"] = elements.text("PatientSex") if elements.text("PatientSex") in _SEXES else ""
    age = _AGE.fullmatch(elements.text("PatientAge"))
    if age:
        facts["patient_age_years"] = min(round(int(age[1]) / _AGE_UNITS[age[2]], 2), _OLDEST_YEARS)
    if "ContrastBolusAgent" in elements or "ContrastBolusAgentSequence" in elements:
        facts["contrast"] = "yes"
    facts["burned_in"] = _YES_NO.get(elements.text("BurnedInAnnotation").upper(), "")
    if elements.text("LossyImageCompression") == "01" or elements.transfer_syntax in _LOSSY_SYNTAXES:
        facts["lossy"] = "yes"
    return {name: value for name, value in facts.items() if value != ""}


def _measure(facts: dict[str, str | float], elements: Elements, keyword: str, name: str) -> None:
    """Add a number; one that cannot be read is left out, since nothing depends on it."""
    try:
        value = elements.number(keyword)
    except ReadError:
        return
    if value is not None:
        facts[name] = float(value)
