"""The frames of a DICOM image file: where each lies, how its values scale, and what tells it from its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medssl.errors import ReadError
from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.model import Frame, Pixels
from medssl.io.dicom.spacing import positive
from medssl.io.dicom.terms import CODE_STRING, codes

Traits = dict[str, str | float]
Vector = tuple[float, ...]

_NUMBER_TRAITS = (
    ("EchoNumbers", "echo"),
    ("EchoTime", "echo_time_ms"),
    ("InversionTime", "inversion_time_ms"),
    ("FlipAngle", "flip_angle_deg"),
    ("TemporalPositionIdentifier", "time_point"),
    ("TriggerTime", "trigger_ms"),
    ("NominalPercentageOfCardiacPhase", "phase"),
    ("AcquisitionNumber", "acquisition"),
    ("FrameReferenceTime", "frame_time_ms"),
    ("DiffusionBValue", "b_value"),
    ("KVP", "kvp"),
)
_GROUP_TRAITS = (
    ("FrameContentSequence", "TemporalPositionIndex", "time_point"),
    ("FrameContentSequence", "FrameAcquisitionNumber", "acquisition"),
    ("MREchoSequence", "EffectiveEchoTime", "echo_time_ms"),
    ("MRTimingAndRelatedParametersSequence", "FlipAngle", "flip_angle_deg"),
    ("MRDiffusionSequence", "DiffusionBValue", "b_value"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "trigger_ms"),
    ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", "phase"),
    ("TemporalPositionSequence", "TemporalPositionTimeOffset", "time_offset_s"),
)
_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence")
_PLACE_POINTERS = frozenset({0x00209056, 0x00209057, 0x00200032, 0x00209113, 0x00209111})
_VECTORS = {
    0x00540010: ("EnergyWindowVector", "energy_window"),
    0x00540020: ("DetectorVector", "detector"),
    0x00540030: ("PhaseVector", "phase"),
    0x00540050: ("RotationVector", "rotation"),
    0x00540060: ("RRIntervalVector", "rr_interval"),
    0x00540070: ("TimeSlotVector", "time_slot"),
    0x00540100: ("TimeSliceVector", "time_point"),
}
_SLICE_VECTOR = 0x00540080
_FRAME_OFFSETS = 0x3004000C
_PRIVATE_DIFFUSION = (
    ("SIEMENS", "SiemensBValue", "SiemensDiffusionDirection"),
    ("PHILIPS", "PhilipsBValue", "PhilipsDiffusionX"),
    ("GE", "GEBValues", "GEDiffusionX"),
)
_GE_B_OFFSET = 1_000_000_000
_PER_FILE_POSITION = (
    "W_FRAME_POSITIONS: the file gives one position for all its frames; the others were taken to follow along the "
    "normal, in steps of SpacingBetweenSlices."
)


def single(elements: Elements, template: Frame) -> Frame:
    """The frame of a file that holds one picture.

    Args:
        elements: Of the file.
        template: Frame with path, size, pixel spacing and tokens.

    Raises:
        ReadError: E_TAG or E_RESCALE.
    """
    slope, intercept, rescale_type, has_rescale = rescale(elements)
    return replace(
        template,
        position_mm=_triple(elements.numbers("ImagePositionPatient", 3)),
        orientation=_sextet(elements.numbers("ImageOrientationPatient", 6)),
        slope=slope,
        intercept=intercept,
        rescale_type=rescale_type,
        has_rescale=has_rescale,
        thickness_mm=elements.number("SliceThickness"),
        between_mm=elements.number("SpacingBetweenSlices"),
        traits=traits(elements),
    )


def several(elements: Elements, template: Frame, pixels: Pixels) -> tuple[tuple[Frame, ...], tuple[str, ...]]:
    """Frames of a multi-frame file and what was assumed of them.

    Args:
        elements: Of the file.
        template: Frame with path, size, pixel spacing and tokens.
        pixels: Of the file.

    Raises:
        ReadError: E_TAG, E_RESCALE or E_HEADER.
    """
    if elements.sequence("PerFrameFunctionalGroupsSequence"):
        return _grouped(elements, template, pixels), ()
    return _legacy(elements, template, pixels)


def rescale(elements: Elements) -> tuple[float, float, str, bool]:
    """Slope, intercept, type, and whether the file has them.

    Raises:
        ReadError: E_RESCALE.
    """
    has_slope, has_intercept = "RescaleSlope" in elements, "RescaleIntercept" in elements
    if not has_slope and not has_intercept:
        return 1.0, 0.0, "", False
    try:
        slope, intercept = elements.number("RescaleSlope"), elements.number("RescaleIntercept")
    except ReadError:
        slope = intercept = None
    if not slope or intercept is None:
        raise ReadError(
            f"{elements.path}: rescale slope and intercept must both be finite numbers, and the slope not 0. "
            "Correct them at the source.",
            code="E_RESCALE",
        )
    kind = elements.text("RescaleType").upper()
    return slope, intercept, kind if CODE_STRING.fullmatch(kind) else "OTHER", True


def traits(elements: Elements) -> Traits:
    """What may tell the volume of a single-frame file from others of its series.

    Raises:
        ReadError: E_TAG.
    """
    found: Traits = {}
    values = elements.values
    for keyword, name in _NUMBER_TRAITS:
        if keyword in values:
            _add(found, elements, keyword, name)
    kind = codes(elements.text("ImageType"))
    if kind:
        found["image_type"] = kind
    _private_diffusion(found, elements)
    gradient = elements.numbers("DiffusionGradientOrientation")
    if gradient:
        found["direction"] = _rounded(gradient)
    return found


def along(position: Sequence[float], orientation: Sequence[float], distance: float) -> tuple[float, float, float]:
    """Position moved along the normal of the slice, in mm."""
    x, y, z = normal(orientation)
    return position[0] + distance * x, position[1] + distance * y, position[2] + distance * z


def normal(orientation: Sequence[float]) -> tuple[float, float, float]:
    """Cross product of row and column direction."""
    a, b, c, d, e, f = orientation
    return b * f - c * e, c * d - a * f, a * e - b * d


def _grouped(elements: Elements, template: Frame, pixels: Pixels) -> tuple[Frame, ...]:
    groups = elements.sequence("PerFrameFunctionalGroupsSequence")
    if len(groups) != pixels.frames:
        raise ReadError(
            f"{elements.path}: describes {len(groups)} frames and has {pixels.frames}. Take the file from its source.",
            code="E_HEADER",
        )
    shared = elements.first("SharedFunctionalGroupsSequence") or Elements(elements.path, {})
    dimensions = [
        elements_.values.get("DimensionIndexPointer") for elements_ in elements.sequence("DimensionIndexSequence")
    ]
    common = traits(elements)
    return tuple(
        _functional(
            _Groups(group, shared, elements), replace(template, index=index, number=index + 1), common, dimensions
        )
        for index, group in enumerate(groups)
    )


class _Groups:
    """Functional groups of one frame: its own first, then those of all frames, then the plain data set."""

    __slots__ = ("own", "plain", "shared")

    def __init__(self, own: Elements, shared: Elements, plain: Elements) -> None:
        self.own = own
        self.shared = shared
        self.plain = plain

    def find(self, sequence: str) -> Elements | None:
        return self.own.first(sequence) or self.shared.first(sequence)

    def get(self, sequence: str) -> Elements:
        """The group, or the plain data set where there is none."""
        return self.find(sequence) or self.plain


def _functional(groups: _Groups, template: Frame, common: Traits, dimensions: Sequence[object]) -> Frame:
    measures = groups.get("PixelMeasuresSequence")
    slope, intercept, rescale_type, has_rescale = rescale(groups.get("PixelValueTransformationSequence"))
    return replace(
        template,
        position_mm=_triple(groups.get("PlanePositionSequence").numbers("ImagePositionPatient", 3)),
        orientation=_sextet(groups.get("PlaneOrientationSequence").numbers("ImageOrientationPatient", 6)),
        spacing_mm=_spacing(groups, template),
        slope=slope,
        intercept=intercept,
        rescale_type=rescale_type,
        has_rescale=has_rescale,
        thickness_mm=measures.number("SliceThickness"),
        between_mm=measures.number("SpacingBetweenSlices"),
        traits=common | _group_traits(groups, dimensions),
    )


def _group_traits(groups: _Groups, dimensions: Sequence[object]) -> Traits:
    found: Traits = {}
    for sequence, keyword, name in _GROUP_TRAITS:
        group = groups.find(sequence)
        if group is not None and keyword in group.values:
            _add(found, group, keyword, name)
    for sequence in _FRAME_TYPES:
        group = groups.find(sequence)
        if group is not None and group.text("FrameType"):
            found["image_type"] = codes(group.text("FrameType"))
    diffusion = groups.find("MRDiffusionSequence")
    gradient = diffusion.first("DiffusionGradientDirectionSequence") if diffusion is not None else None
    direction = gradient.numbers("DiffusionGradientOrientation") if gradient is not None else None
    if direction:
        found["direction"] = _rounded(direction)
    content = groups.find("FrameContentSequence")
    if content is not None:
        stack = content.text("StackID").upper()
        if stack:
            found["stack"] = stack if CODE_STRING.fullmatch(stack) else "OTHER"
        indices = content.numbers("DimensionIndexValues") or ()
        for place, (pointer, value) in enumerate(zip(dimensions, indices, strict=False)):
            if not (isinstance(pointer, tuple) and pointer and pointer[0] in _PLACE_POINTERS):
                found[f"dimension_{place + 1}"] = value
    return found


def _legacy(elements: Elements, template: Frame, pixels: Pixels) -> tuple[tuple[Frame, ...], tuple[str, ...]]:
    """Multi-frame without functional groups: nuclear medicine stacks, frames with offsets, and clips."""
    detector = elements.first("DetectorInformationSequence") or elements
    first = single(elements, template)
    first = replace(
        first,
        position_mm=first.position_mm or _triple(detector.numbers("ImagePositionPatient", 3)),
        orientation=first.orientation or _sextet(detector.numbers("ImageOrientationPatient", 6)),
    )
    frames = [replace(first, index=index, number=index + 1) for index in range(pixels.frames)]
    pointers = elements.values.get("FrameIncrementPointer", ())
    pointers = pointers if isinstance(pointers, tuple) else ()
    for pointer in pointers:
        if pointer in _VECTORS:
            keyword, name = _VECTORS[int(pointer)]
            vector = _vector(elements, keyword, pixels.frames)
            if vector is not None:
                frames = [
                    replace(frame, traits={**frame.traits, name: value})
                    for frame, value in zip(frames, vector, strict=True)
                ]
    offsets, warnings = _offsets(elements, first, pointers, pixels.frames)
    if offsets is None or first.position_mm is None or first.orientation is None:
        return tuple(
            replace(frame, position_mm=None, traits={**frame.traits, "frame": frame.index + 1}) for frame in frames
        ), ()
    position, orientation = first.position_mm, first.orientation
    return tuple(
        replace(frame, position_mm=along(position, orientation, offset))
        for frame, offset in zip(frames, offsets, strict=True)
    ), warnings


def _offsets(
    elements: Elements, first: Frame, pointers: Sequence[float], frames: int
) -> tuple[Vector | None, tuple[str, ...]]:
    """Distance of each frame along the normal from the first in mm; None for the frames of a clip."""
    step = first.between_mm
    if _FRAME_OFFSETS in pointers or ("GridFrameOffsetVector" in elements and not pointers):
        return elements.numbers("GridFrameOffsetVector", frames), ()
    if _SLICE_VECTOR in pointers and step:
        vector = _vector(elements, "SliceVector", frames)
        return (None if vector is None else tuple(step * (number - 1) for number in vector)), ()
    if not pointers and step and first.position_mm is not None:
        return tuple(step * index for index in range(frames)), (_PER_FILE_POSITION,)
    return None, ()


def _vector(elements: Elements, keyword: str, frames: int) -> Vector | None:
    if keyword not in elements:
        return None
    return elements.numbers(keyword, frames)


def _private_diffusion(found: Traits, elements: Elements) -> None:
    """B-value and direction where the makers keep them; standard elements go first."""
    maker = elements.text("Manufacturer").upper()
    for known, b_value, direction in _PRIVATE_DIFFUSION:
        if maker.startswith(known) and (b_value in elements.values or direction in elements.values):
            numbers = _unsure(elements, b_value)
            if numbers:
                found.setdefault("b_value", float(numbers[0] % _GE_B_OFFSET))
            numbers = _unsure(elements, direction)
            if len(numbers) == 1:
                numbers += _unsure(elements, direction[:-1] + "Y") + _unsure(elements, direction[:-1] + "Z")
            if len(numbers) == len("XYZ"):
                found.setdefault("direction", _rounded(numbers))


def _unsure(elements: Elements, keyword: str) -> Vector:
    """Numbers of an element; none where it holds something else."""
    if keyword not in elements.values:
        return ()
    try:
        return elements.numbers(keyword) or ()
    except ReadError:
        return ()


def _add(found: Traits, elements: Elements, keyword: str, name: str) -> None:
    """Add a trait; one that cannot be read tells nothing apart, and no grid depends on it."""
    numbers = _unsure(elements, keyword)
    if numbers:
        found[name] = float(numbers[0]) if len(numbers) == 1 else _rounded(numbers)


def _rounded(numbers: Sequence[float]) -> str:
    return ",".join(f"{number + 0.0:.3f}" for number in numbers)


def _spacing(groups: _Groups, template: Frame) -> tuple[float, float] | None:
    measures = groups.find("PixelMeasuresSequence")
    return (None if measures is None else positive(measures, "PixelSpacing")) or template.spacing_mm


def _triple(numbers: Vector | None) -> tuple[float, float, float] | None:
    return None if numbers is None else (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _sextet(numbers: Vector | None) -> tuple[float, float, float, float, float, float] | None:
    if numbers is None:
        return None
    a, b, c, d, e, f = numbers
    return float(a), float(b), float(c), float(d), float(e), float(f)
