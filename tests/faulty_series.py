"""DICOM series with a fault each, and what must come of them: a named refusal, or images with the right geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dicoms
import numpy as np
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from medssl.geometry import Geometry

SHAPE = (8, 10, 6)


@dataclass(frozen=True)
class Outcome:
    """What must come of a folder.

    Args:
        refused: Codes of the refusals, with blanks between; also where other images of the folder are fine.
        stacks: Number of volumes of each image, sorted.
        geometry: Of every volume, if there is any.
        within_mm: How far a corner may be off.
        warning: Code that every volume carries.
        note: Code of the reason why a file is left out.
        duplicates: Number of equal copies.
    """

    refused: str = ""
    stacks: tuple[int, ...] = ()
    geometry: Geometry | None = None
    within_mm: float = 1e-9
    warning: str | None = None
    note: str | None = None
    duplicates: int = 0


@dataclass(frozen=True)
class Fault:
    """A way to write a folder, and its required outcome."""

    build: Callable[[Path], object]
    outcome: Outcome


def _refused(code: str, **more: object) -> Outcome:
    return Outcome(refused=code, **more)  # type: ignore[arg-type]


def _one(**more: object) -> Outcome:
    return Outcome(stacks=(1,), geometry=dicoms.series_geometry(), **more)  # type: ignore[arg-type]


def _series(mutate: dicoms.Mutate | None = None, **options: object) -> Callable[[Path], object]:
    return lambda folder: dicoms.write_series(folder, mutate=mutate, **options)  # type: ignore[arg-type]


def _each(change: Callable[[Dataset, int], None]) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> None:
        for k, ds in enumerate(datasets):
            change(ds, k)

    return mutate


def _set(**tags: object) -> dicoms.Mutate:
    """The same tags in every slice; None takes a tag out."""

    def change(ds: Dataset, _k: int) -> None:
        for keyword, value in tags.items():
            _put(ds, keyword, value)

    return _each(change)


def _set_at(k: int, **tags: object) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> None:
        for keyword, value in tags.items():
            _put(datasets[k], keyword, value)

    return mutate


def _put(ds: Dataset, keyword: str, value: object) -> None:
    if value is not None:
        setattr(ds, keyword, value)
    elif keyword in ds:
        delattr(ds, keyword)


def _without(*places: int) -> dicoms.Mutate:
    return lambda datasets: [ds for k, ds in enumerate(datasets) if k not in places]


def _heights(heights: Sequence[float]) -> dicoms.Mutate:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-12.0, 7.0, 30.0 + heights[k]]

    return _each(change)


def _moved(x: Sequence[float]) -> dicoms.Mutate:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [round(-12.0 + x[k], 6), *list(ds.ImagePositionPatient)[1:]]

    return _each(change)


def _repeated(*, same_instance: bool, same_pixels: bool) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> list[Dataset]:
        again = dicoms.build_series()[2]
        if not same_instance:
            again.SOPInstanceUID = generate_uid(entropy_srcs=["again"])
            again.InstanceNumber = 99
        if not same_pixels:
            again.PixelData = bytes(reversed(again.PixelData))
        return [*datasets, again]

    return mutate


def _volumes(count: int, change: Callable[[Dataset, int, int], None], *, drop: Sequence[int] = ()) -> dicoms.Mutate:
    """The series ``count`` times over, with other instances and pixels; ``change`` gets slice and volume."""

    def mutate(_datasets: list[Dataset]) -> list[Dataset]:
        found = []
        for volume in range(count):
            for k, ds in enumerate(dicoms.build_series(modality="MR")):
                ds.SOPInstanceUID = generate_uid(entropy_srcs=["volume", str(volume), str(k)])
                ds.PixelData = bytes((byte + volume) % 256 for byte in ds.PixelData)
                change(ds, k, volume)
                found.append(ds)
        return [ds for index, ds in enumerate(found) if index not in drop]

    return mutate


def _tagged(**tags: Callable[[int, int], object]) -> Callable[[Dataset, int, int], None]:
    def change(ds: Dataset, k: int, volume: int) -> None:
        for keyword, value in tags.items():
            _put(ds, keyword, value(k, volume))

    return change


def _diffusion(ds: Dataset, _k: int, volume: int) -> None:
    ds.DiffusionBValue = 0.0 if volume == 0 else 1000.0
    if volume:
        ds.DiffusionGradientOrientation = [float(axis == volume - 1) for axis in range(3)]


def _half_step_echoes(_datasets: list[Dataset]) -> list[Dataset]:
    first = dicoms.build_series(modality="MR")
    second = dicoms.build_series(modality="MR", origin=(-12.0, 7.0, 31.0), acquisition=2)
    for echo, datasets in ((1, first), (2, second)):
        for ds in datasets:
            ds.EchoNumbers, ds.AcquisitionNumber = echo, 1
    return [*first, *second]


def _other_orientation(count: int) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> list[Dataset]:
        extra = dicoms.build_series((8, 10, count), orientation=dicoms.SAGITTAL, acquisition=7)
        return [*datasets, *extra]

    return mutate


def _second_series(folder: Path) -> None:
    dicoms.write_series(folder)
    dicoms.write_series(folder, series="other", origin=(0.0, 0.0, 0.0), shape=(8, 10, 4))


def _two_patients(folder: Path) -> None:
    dicoms.write_series(folder)
    dicoms.write_series(folder, patient="ZZID-2", acquisition=2, origin=(-12.0, 7.0, 42.0))


def _screen_save(datasets: list[Dataset]) -> list[Dataset]:
    extra = dicoms.build_series((16, 20, 1), acquisition=9)[0]
    extra.SOPClassUID = uid.SecondaryCaptureImageStorage
    extra.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    del extra.ImagePositionPatient, extra.ImageOrientationPatient
    return [*datasets, extra]


def _smaller_at(k: int) -> dicoms.Mutate:
    def mutate(datasets: list[Dataset]) -> None:
        dicoms.set_pixels(datasets[k], np.zeros((6, 10), dtype=np.uint16))

    return mutate


def _text(keyword: str, text: str, *, at: int | None = None) -> dicoms.Mutate:
    """A decimal string as it stands in some files and pydicom would not take."""

    def change(ds: Dataset, k: int) -> None:
        if at is None or k == at:
            value = (text + " " * (len(text) % 2)).encode()
            tag = Tag(keyword)
            ds[tag] = RawDataElement(tag, "DS", len(value), value, 0, False, True)

    return _each(change)


def _long_texts(ds: Dataset, k: int) -> None:
    text = f"-12.000000000000000000\\7.0000000000000000000\\{30 + 2 * k}.00000000000000000"
    tag = Tag("ImagePositionPatient")
    ds[tag] = RawDataElement(
        tag, "DS", len(text) + len(text) % 2, (text + " " * (len(text) % 2)).encode(), 0, False, True
    )


def _images(modality: str, count: int) -> Callable[[Path], object]:
    """Files of one series without position."""
    return lambda folder: [
        dicoms.write_2d(folder / f"im{k}", modality=modality, series="flat", PixelSpacing=[0.8, 0.5], InstanceNumber=k)
        for k in range(count)
    ]


def _two_frames_of_reference(ds: Dataset, k: int) -> None:
    if k >= 3:
        ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["second frame"])


def _wave(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [-12.0, 7.0 + (1.0 if k % 2 else 0.0), 30.0 + 2 * k]


def _cut(folder: Path) -> None:
    path = dicoms.write_series(folder)[2]
    path.write_bytes(path.read_bytes()[:-40])


def _report(folder: Path) -> None:
    def mutate(ds: Dataset) -> None:
        ds.SOPClassUID, ds.Modality = uid.BasicTextSRStorage, "SR"
        del ds.PixelData, ds.Rows, ds.Columns

    dicoms.write_series(folder)
    dicoms.write_2d(folder / "report", modality="SC", mutate=mutate)


def _enhanced(**options: object) -> Callable[[Path], object]:
    return lambda folder: dicoms.write_enhanced(folder / "enhanced", **options)  # type: ignore[arg-type]


def _clip(folder: Path) -> None:
    dicoms.write_clip(folder / "clip", frames=5)


_OBLIQUE = dicoms.rotated(dicoms.AXIAL, (1, 2, 3), 33)

FAULTS: dict[str, Fault] = {
    "sound": Fault(_series(), _one()),
    "names in order": Fault(_series(names="sorted"), _one()),
    "names reversed": Fault(_series(names="reversed"), _one()),
    "instance numbers reversed": Fault(_series(_each(lambda ds, k: setattr(ds, "InstanceNumber", 6 - k))), _one()),
    "instance numbers equal": Fault(_series(_set(InstanceNumber=1)), _one()),
    "instance numbers missing": Fault(_series(_set(InstanceNumber=None)), _one()),
    "slices from head to feet": Fault(_series(lambda datasets: datasets[::-1], names="sorted"), _one()),
    "feet first prone": Fault(_series(_set(PatientPosition="FFP")), _one()),
    "sagittal": Fault(
        _series(orientation=dicoms.SAGITTAL),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(orientation=dicoms.SAGITTAL)),
    ),
    "coronal": Fault(
        _series(orientation=dicoms.CORONAL),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(orientation=dicoms.CORONAL)),
    ),
    "oblique": Fault(
        _series(orientation=_OBLIQUE),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(orientation=_OBLIQUE), within_mm=1e-3),
    ),
    "both directions reversed": Fault(
        _series(orientation=(-1, 0, 0, 0, -1, 0)),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(orientation=(-1, 0, 0, 0, -1, 0))),
    ),
    "mirrored rows": Fault(
        _series(orientation=(-1, 0, 0, 0, 1, 0)),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(orientation=(-1, 0, 0, 0, 1, 0))),
    ),
    "far from the origin": Fault(
        _series(origin=(1.9e6, -5e5, 30.0)),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(origin=(1.9e6, -5e5, 30.0)), within_mm=1e-3),
    ),
    "one slice missing": Fault(_series(_without(3)), _refused("E_MISSING_SLICE")),
    "three slices missing": Fault(_series(_without(2, 4, 5), shape=(8, 10, 9)), _refused("E_MISSING_SLICE")),
    "two neighbours missing": Fault(_series(_without(4, 5), shape=(8, 10, 9)), _refused("E_MISSING_SLICE")),
    "distances of 2 and 5 mm": Fault(_series(_heights([0, 2, 4, 6, 11, 16])), _refused("E_NONUNIFORM")),
    "distances of 2 and 3 mm": Fault(_series(_heights([0, 2, 5, 7, 10, 12])), _refused("E_NONUNIFORM")),
    "distances that grow": Fault(_series(_heights([0, 1, 3, 6, 10, 15])), _refused("E_NONUNIFORM")),
    "jitter of 0.2 mm": Fault(_series(_heights([0, 2.2, 4, 6, 8, 10])), _refused("E_NONUNIFORM")),
    "jitter of 0.01 mm": Fault(_series(_heights([0, 2.01, 3.99, 6, 8.01, 10])), _one(within_mm=0.02)),
    "drift of 0.6 mm in the sum": Fault(_series(_heights([0, 2.02, 4.06, 6.12, 8.2, 10.3])), _refused("E_NONUNIFORM")),
    "place taken twice": Fault(_series(_repeated(same_instance=False, same_pixels=False)), _refused("E_DUP_POSITION")),
    "slice copied": Fault(_series(_repeated(same_instance=False, same_pixels=True)), _one(duplicates=1)),
    "file copied": Fault(_series(_repeated(same_instance=True, same_pixels=True)), _one(duplicates=1)),
    "instance with two contents": Fault(
        _series(_repeated(same_instance=True, same_pixels=False)), _refused("E_DUP_SOP")
    ),
    "all slices at one place": Fault(_series(_heights([0] * 6)), _refused("E_AMBIGUOUS_STACK")),
    "tilted gantry": Fault(
        _series(tilt_deg=15),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(tilt_deg=15), within_mm=1e-3, warning="W_TILT"),
    ),
    "tilted the other way": Fault(
        _series(tilt_deg=-30),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(tilt_deg=-30), within_mm=1e-3, warning="W_TILT"),
    ),
    "tilted with a slice missing": Fault(_series(_without(2), tilt_deg=15), _refused("E_MISSING_SLICE")),
    "slices that wave": Fault(_series(_each(_wave)), _refused("E_NONUNIFORM")),
    "one slice shifted sideways": Fault(_series(_moved([0, 0, 0, 3, 0, 0])), _refused("E_NONUNIFORM")),
    "positions along the row": Fault(
        _series(_each(lambda ds, k: setattr(ds, "ImagePositionPatient", [-12.0 + 2 * k, 7.0, 30.0 + 0.01 * k]))),
        _refused("E_IOP"),
    ),
    "two series in one folder": Fault(_second_series, Outcome(stacks=(1, 1))),
    "two patients in one series": Fault(_two_patients, _refused("E_PATIENT_MIX")),
    "two acquisitions": Fault(
        _series(_volumes(2, _tagged(AcquisitionNumber=lambda _k, v: v + 1))),
        Outcome(stacks=(2,), geometry=dicoms.series_geometry()),
    ),
    "two echoes": Fault(
        _series(_volumes(2, _tagged(EchoNumbers=lambda _k, v: v + 1, EchoTime=lambda _k, v: 5.0 + v))),
        Outcome(stacks=(2,), geometry=dicoms.series_geometry()),
    ),
    "four diffusion directions": Fault(
        _series(_volumes(4, _diffusion)), Outcome(stacks=(4,), geometry=dicoms.series_geometry())
    ),
    "three time points": Fault(
        _series(_volumes(3, _tagged(TemporalPositionIdentifier=lambda _k, v: v + 1))),
        Outcome(stacks=(3,), geometry=dicoms.series_geometry()),
    ),
    "echoes at time points": Fault(
        _series(
            _volumes(4, _tagged(EchoNumbers=lambda _k, v: v % 2 + 1, TemporalPositionIdentifier=lambda _k, v: v // 2))
        ),
        Outcome(stacks=(4,), geometry=dicoms.series_geometry()),
    ),
    "volumes told apart by number only": Fault(
        _series(_volumes(2, _tagged(InstanceNumber=lambda k, v: 6 * v + k + 1))),
        Outcome(stacks=(2,), geometry=dicoms.series_geometry(), warning="W_VOLUME_ORDER"),
    ),
    "numbers place by place": Fault(
        _series(_volumes(2, _tagged(InstanceNumber=lambda k, v: 2 * k + v + 1))),
        Outcome(stacks=(2,), geometry=dicoms.series_geometry(), warning="W_VOLUME_ORDER"),
    ),
    "volumes that nothing tells apart": Fault(
        _series(_volumes(2, _tagged(InstanceNumber=lambda _k, _v: None))), _refused("E_AMBIGUOUS_STACK")
    ),
    "last time point cut short": Fault(
        _series(_volumes(3, _tagged(TemporalPositionIdentifier=lambda _k, v: v + 1), drop=(16, 17))),
        Outcome(refused="E_MISSING_SLICE", stacks=(2,), geometry=dicoms.series_geometry()),
    ),
    "one slice missing in both echoes": Fault(
        _series(_volumes(2, _tagged(EchoNumbers=lambda _k, v: v + 1), drop=(3, 9))), _refused("E_MISSING_SLICE")
    ),
    "echoes half a step apart": Fault(_series(_half_step_echoes), Outcome(stacks=(1, 1), warning="W_SPLIT")),
    "one slice of another echo": Fault(
        _series(_each(lambda ds, k: setattr(ds, "EchoNumbers", 1 + (k == 3))), modality="MR"),
        _refused("E_AMBIGUOUS_STACK"),
    ),
    "lone localizer": Fault(_series(_other_orientation(1)), _one(note="W_LOCALIZER")),
    "localizer of three slices": Fault(_series(_other_orientation(3)), Outcome(stacks=(1, 1), warning="W_SPLIT")),
    "one slice of other spacing": Fault(_series(_set_at(3, PixelSpacing=[0.9, 0.6])), _refused("E_MIXED_SPACING")),
    "last slice of other spacing": Fault(_series(_set_at(5, PixelSpacing=[0.9, 0.5])), _refused("E_MIXED_SPACING")),
    "spacing swapped in one slice": Fault(_series(_set_at(2, PixelSpacing=[0.5, 0.8])), _refused("E_MIXED_SPACING")),
    "one slice of other rows": Fault(_series(_smaller_at(3)), _refused("E_MIXED_SHAPE")),
    "one slice turned": Fault(
        _series(_set_at(3, ImageOrientationPatient=list(np.round(dicoms.rotated(dicoms.AXIAL, (0, 0, 1), 3), 6)))),
        _refused("E_IOP"),
    ),
    "one slice turned by little": Fault(
        _series(_set_at(3, ImageOrientationPatient=[1, 0.0009, 0, -0.0009, 1, 0]), shape=(80, 200, 6)),
        _refused("E_IOP"),
    ),
    "directions of length 2": Fault(_series(_set(ImageOrientationPatient=[2, 0, 0, 0, 2, 0])), _refused("E_IOP")),
    "directions of length 0": Fault(_series(_set(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])), _refused("E_IOP")),
    "directions parallel": Fault(_series(_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])), _refused("E_IOP")),
    "directions not at right angles": Fault(
        _series(_set(ImageOrientationPatient=[1, 0, 0, 0.0998, 0.995, 0])), _refused("E_IOP")
    ),
    "directions rounded": Fault(_series(_set(ImageOrientationPatient=[0.9999, 0, 0, 0, 1.0001, 0])), _one()),
    "no position anywhere": Fault(
        _series(_set(ImagePositionPatient=None, ImageOrientationPatient=None)), _refused("E_NO_GEOMETRY")
    ),
    "no position in one slice": Fault(_series(_set_at(3, ImagePositionPatient=None)), _refused("E_NO_GEOMETRY")),
    "no position in the last slice": Fault(_series(_set_at(5, ImagePositionPatient=None)), _refused("E_NO_GEOMETRY")),
    "no orientation": Fault(_series(_set(ImageOrientationPatient=None)), _refused("E_NO_GEOMETRY")),
    "no pixel spacing": Fault(_series(_set(PixelSpacing=None)), _refused("E_NO_GEOMETRY")),
    "pixel spacing 0": Fault(_series(_set(PixelSpacing=[0, 0.5])), _refused("E_TAG")),
    "pixel spacing negative": Fault(_series(_set(PixelSpacing=[-0.8, 0.5])), _refused("E_TAG")),
    "position not a number": Fault(_series(_text("ImagePositionPatient", "nan\\7\\30")), _refused("E_TAG")),
    "position that overflows": Fault(_series(_text("ImagePositionPatient", "1e999\\7\\30")), _refused("E_TAG")),
    "decimal comma": Fault(_series(_text("PixelSpacing", "0,8\\0,5")), _refused("E_TAG")),
    "numbers longer than 16 characters": Fault(_series(_each(_long_texts)), _one(warning="W_DS_LENGTH")),
    "slice distance of the tag is wrong": Fault(_series(_set(SpacingBetweenSlices=3)), _one(warning="W_SPACING_TAG")),
    "slice distance of the tag is negative": Fault(_series(_set(SpacingBetweenSlices=-2)), _one()),
    "slice thickness is wrong": Fault(_series(_set(SliceThickness=5)), _one(warning="W_SPACING_TAG")),
    "slice thickness is empty": Fault(_series(_text("SliceThickness", "")), _one()),
    "every second slice missing": Fault(
        _series(_without(1, 3, 5)),
        Outcome(
            stacks=(1,),
            geometry=dicoms.series_geometry((8, 10, 3), spacing=(0.8, 0.5, 4.0)),
            warning="W_SPACING_TAG",
        ),
    ),
    "two frames of reference": Fault(_series(_each(_two_frames_of_reference)), Outcome(stacks=(1, 1))),
    "screen save in the series": Fault(_series(_screen_save), _one(note="W_SC")),
    "report in the folder": Fault(_report, _one(refused="E_NOT_IMAGE")),
    "one slice": Fault(
        _series(shape=(8, 10, 1)),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry((8, 10, 1)), warning="W_SINGLE_SLICE"),
    ),
    "two slices": Fault(_series(shape=(8, 10, 2)), Outcome(stacks=(1,), geometry=dicoms.series_geometry((8, 10, 2)))),
    "no series UID": Fault(_series(_set(SeriesInstanceUID=None)), _one()),
    "rescale slope 0": Fault(_series(slope=0.0), _refused("E_RESCALE")),
    "pixels cut off": Fault(_cut, _refused("E_PIXEL_LENGTH E_MISSING_SLICE")),
    "radiographs of one series": Fault(_images("CR", 3), Outcome(stacks=(1, 1, 1))),
    "CT images without position": Fault(_images("CT", 3), _refused("E_NO_GEOMETRY")),
    "ultrasound clip": Fault(_clip, Outcome(stacks=(5,))),
    "enhanced": Fault(_enhanced(), _one()),
    "enhanced in odd order": Fault(_enhanced(order=[3, 0, 5, 1, 4, 2]), _one()),
    "enhanced with a frame missing": Fault(_enhanced(order=[0, 1, 3, 4, 5]), _refused("E_MISSING_SLICE")),
    "enhanced with a frame twice": Fault(_enhanced(order=[0, 1, 2, 2, 3, 4, 5]), _refused("E_DUP_POSITION")),
    "enhanced with two time points": Fault(
        _enhanced(volumes=2), Outcome(stacks=(2,), geometry=dicoms.series_geometry())
    ),
    "enhanced and tilted": Fault(
        _enhanced(tilt_deg=12, modality="CT"),
        Outcome(stacks=(1,), geometry=dicoms.series_geometry(tilt_deg=12), within_mm=1e-3, warning="W_TILT"),
    ),
}
