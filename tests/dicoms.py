"""DICOM files written with pydicom for the tests: sound series, and series with a named fault and its required outcome.

Pixel values count through the volume (:func:`series_values`), so that every wrong order, flip or repeat shows; the grid
is given in closed form (:func:`series_geometry`). The planted identifiers of :data:`CANARIES` must turn up nowhere.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import generate_uid

from medssl.geometry import Geometry

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CANARIES = {
    "PatientName": "Zzcanary^Quentin",
    "PatientID": "ZZID-774411",
    "PatientBirthDate": "19310203",
    "StudyDate": "20190807",
    "SeriesDate": "20190807",
    "AccessionNumber": "ZZACC-0099",
    "InstitutionName": "Zzcanary Hospital",
    "ReferringPhysicianName": "Zzcanary^Doctor",
    "StudyDescription": "Zzcanary study",
    "SeriesDescription": "Zzcanary series",
}
SOP_CLASSES = {
    "CT": uid.CTImageStorage,
    "MR": uid.MRImageStorage,
    "PT": uid.PositronEmissionTomographyImageStorage,
    "NM": uid.NuclearMedicineImageStorage,
    "US": uid.UltrasoundImageStorage,
    "XA": uid.XRayAngiographicImageStorage,
    "CR": uid.ComputedRadiographyImageStorage,
    "DX": uid.DigitalXRayImageStorageForPresentation,
    "MG": uid.DigitalMammographyXRayImageStorageForPresentation,
    "SC": uid.SecondaryCaptureImageStorage,
    "OT": uid.SecondaryCaptureImageStorage,
}
_ENHANCED = {"CT": uid.EnhancedCTImageStorage, "MR": uid.EnhancedMRImageStorage}

Shape = tuple[int, int, int]
Triple = tuple[float, float, float]
Mutate = Callable[[list[Dataset]], list[Dataset] | None]


def rotated(orientation: Sequence[float], axis: Sequence[float], angle_deg: float) -> tuple[float, ...]:
    """Orientation turned about ``axis``, by Rodrigues' formula."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(angle_deg)
    matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return tuple((np.reshape(orientation, (2, 3)) @ matrix.T).ravel().tolist())


def slice_step(spacing: Triple, orientation: Sequence[float], tilt_deg: float = 0.0) -> np.ndarray:
    """Vector (LPS, mm) from one slice to the next; a tilt leans it along the column direction."""
    row, column = np.reshape(np.asarray(orientation, dtype=float), (2, 3))
    step: np.ndarray = spacing[2] * (np.cross(row, column) + np.tan(np.radians(tilt_deg)) * column)
    return step


def series_geometry(
    shape: Shape = (8, 10, 6),
    *,
    spacing: Triple = (0.8, 0.5, 2.0),
    orientation: Sequence[float] = AXIAL,
    origin: Triple = (-12.0, 7.0, 30.0),
    tilt_deg: float = 0.0,
) -> Geometry:
    """Grid of :func:`write_series` with the same arguments: RAS+, array axes column, row, slice along the normal."""
    row, column = np.reshape(np.asarray(orientation, dtype=float), (2, 3))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacing[1], column * spacing[0]
    affine[:3, 2], affine[:3, 3] = slice_step(spacing, orientation, tilt_deg), origin
    affine[:2] *= -1
    return Geometry((shape[1], shape[0], shape[2]), affine)


def series_values(shape: Shape = (8, 10, 6)) -> np.ndarray:
    """Stored values (X, Y, Z) of :func:`write_series`: they count through slices, rows, columns, modulo 30,000."""
    rows, columns, slices = shape
    return (np.arange(rows * columns * slices) % 30_000).astype(np.uint16).reshape(slices, rows, columns).T


def build_series(
    shape: Shape = (8, 10, 6),
    *,
    spacing: Triple = (0.8, 0.5, 2.0),
    orientation: Sequence[float] = AXIAL,
    origin: Triple = (-12.0, 7.0, 30.0),
    tilt_deg: float = 0.0,
    modality: str = "CT",
    patient: str = CANARIES["PatientID"],
    series: str = "series",
    acquisition: int = 1,
    signed: bool = False,
    slope: float | None = 1.0,
    intercept: float = -1024.0,
) -> list[Dataset]:
    """Datasets of a sound classic series, one a slice, in the order of their place; instance numbers count from 1.

    Args:
        shape: Rows, columns, slices.
        spacing: Between rows, between columns, between slices, mm.
        orientation: Six direction cosines, LPS.
        origin: Position of the first slice, LPS mm.
        tilt_deg: Angle of the gantry.
        modality: CS.
        patient: ID.
        series: Seed of the series, study and frame-of-reference UIDs.
        acquisition: Acquisition number.
        signed: Store int16.
        slope: Rescale slope; None leaves slope and intercept out.
        intercept: Rescale intercept.
    """
    values = series_values(shape)
    step = slice_step(spacing, orientation, tilt_deg)
    datasets = []
    for k in range(shape[2]):
        ds = _base(modality, patient=patient, series=series, instance=f"{series}-{acquisition}-{k}")
        ds.AcquisitionNumber, ds.InstanceNumber = acquisition, k + 1
        ds.ImagePositionPatient = [_ds(v) for v in np.asarray(origin) + k * step]
        ds.ImageOrientationPatient = [_ds(v) for v in orientation]
        ds.PixelSpacing = [_ds(v) for v in spacing[:2]]
        ds.SliceThickness = _ds(spacing[2])
        if slope is not None:
            ds.RescaleSlope, ds.RescaleIntercept = _ds(slope), _ds(intercept)
            if modality == "CT":
                ds.RescaleType = "HU"
        set_pixels(ds, values[:, :, k].T.astype(np.int16 if signed else np.uint16))
        datasets.append(ds)
    return datasets


def write_series(
    folder: Path,
    *,
    shape: Shape = (8, 10, 6),
    mutate: Mutate | None = None,
    syntax: str = uid.ExplicitVRLittleEndian,
    names: Literal["shuffled", "sorted", "reversed"] = "shuffled",
    **options: object,
) -> list[Path]:
    """Write :func:`build_series` (``options`` are its arguments) to ``folder``; paths in the order of the datasets.

    Args:
        folder: Made where missing.
        shape: Rows, columns, slices.
        mutate: Changes the datasets in place, or gives others.
        syntax: Transfer syntax UID.
        names: How the order of the names relates to that of the slices.
    """
    datasets = build_series(shape, **options)  # type: ignore[arg-type]
    if mutate is not None:
        changed = mutate(datasets)
        datasets = datasets if changed is None else changed
    return save(datasets, folder, syntax=syntax, names=names)


def save(
    datasets: Sequence[Dataset],
    folder: Path,
    *,
    syntax: str = uid.ExplicitVRLittleEndian,
    names: Literal["shuffled", "sorted", "reversed"] = "shuffled",
) -> list[Path]:
    """Write datasets to files named by number, continuing after those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    start, count = len(list(folder.iterdir())), len(datasets)
    numbers = np.arange(count)
    if names == "shuffled":
        numbers = np.random.default_rng(7).permutation(count)
    elif names == "reversed":
        numbers = numbers[::-1]
    paths = [folder / f"im{start + int(number):04d}" for number in numbers]
    for ds, path in zip(datasets, paths, strict=True):
        write(ds, path, syntax=syntax)
    return paths


def write(ds: Dataset, path: Path, *, syntax: str = uid.ExplicitVRLittleEndian) -> Path:
    """Write one dataset with its meta information; pixel data is compressed where ``syntax`` says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.ImplementationClassUID = uid.PYDICOM_IMPLEMENTATION_UID
    ds.file_meta = meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if meta.TransferSyntaxUID.is_compressed and not meta.TransferSyntaxUID.is_deflated:
            _compress(ds, syntax)
        elif not meta.TransferSyntaxUID.is_little_endian and ds.get("BitsAllocated") == 16:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.save_as(path, enforce_file_format=True)
    return path


def write_enhanced(
    path: Path,
    *,
    shape: Shape = (8, 10, 6),
    spacing: Triple = (0.8, 0.5, 2.0),
    orientation: Sequence[float] = AXIAL,
    origin: Triple = (-12.0, 7.0, 30.0),
    tilt_deg: float = 0.0,
    modality: str = "MR",
    volumes: int = 1,
    order: Sequence[int] | None = None,
    series: str = "enhanced",
    frame: Callable[[Dataset, int, int], None] | None = None,
    mutate: Callable[[Dataset], None] | None = None,
    syntax: str = uid.ExplicitVRLittleEndian,
) -> Path:
    """Write an enhanced multi-frame file: ``volumes`` time points of one grid, slices fastest.

    Volume ``v`` holds :func:`series_values` plus ``v``; slope 1 + v, intercept 0.

    Args:
        path: File.
        shape: Rows, columns, slices.
        spacing: As in :func:`build_series`.
        orientation: Likewise.
        origin: Likewise.
        tilt_deg: Likewise.
        modality: CT or MR.
        volumes: Time points, told apart by TemporalPositionIndex.
        order: Of the frames in the file, as indices of volume * slices + slice; some may be left out or repeated.
        series: Seed of the UIDs.
        frame: Called with the functional group of each frame, its slice and its volume.
        mutate: Called with the dataset before it is written.
        syntax: Transfer syntax UID.
    """
    ds = _base(modality, series=series, instance=f"{series}-{path.name}")
    ds.SOPClassUID = _ENHANCED[modality]
    ds.AcquisitionNumber = 1
    values, step = series_values(shape), slice_step(spacing, orientation, tilt_deg)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[_ds(v) for v in orientation])]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[_ds(v) for v in spacing[:2]], SliceThickness=_ds(spacing[2]))]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups, pixels = [], []
    for index in range(volumes * shape[2]) if order is None else order:
        volume, k = divmod(index, shape[2])
        group = Dataset()
        group.PlanePositionSequence = [_item(ImagePositionPatient=[_ds(v) for v in np.asarray(origin) + k * step])]
        group.FrameContentSequence = [
            _item(
                StackID="1",
                InStackPositionNumber=k + 1,
                TemporalPositionIndex=volume + 1,
                DimensionIndexValues=[1, k + 1, volume + 1],
            )
        ]
        group.PixelValueTransformationSequence = [
            _item(RescaleSlope=_ds(1 + volume), RescaleIntercept="0", RescaleType="US")
        ]
        if frame is not None:
            frame(group, k, volume)
        groups.append(group)
        pixels.append(values[:, :, k].T + np.uint16(volume))
    ds.PerFrameFunctionalGroupsSequence = groups
    set_pixels(ds, np.stack(pixels))
    if mutate is not None:
        mutate(ds)
    return write(ds, path, syntax=syntax)


def write_clip(
    path: Path,
    *,
    shape: tuple[int, int] = (8, 10),
    frames: int = 5,
    modality: str = "US",
    spacing_cm: tuple[float, float] | None = (0.02, 0.03),
    mutate: Callable[[Dataset], None] | None = None,
    syntax: str = uid.ExplicitVRLittleEndian,
) -> Path:
    """Write a cine clip (no positions); spacing along x, then y, in cm, is that of one ultrasound region."""
    ds = _base(modality, series=f"clip-{path.name}", instance=f"clip-{path.name}")
    if modality == "US":
        ds.SOPClassUID = uid.UltrasoundMultiFrameImageStorage
    ds.InstanceNumber = 1
    if spacing_cm is not None:
        ds.SequenceOfUltrasoundRegions = [
            _item(
                RegionSpatialFormat=1,
                RegionDataType=1,
                PhysicalUnitsXDirection=3,
                PhysicalUnitsYDirection=3,
                PhysicalDeltaX=spacing_cm[0],
                PhysicalDeltaY=spacing_cm[1],
                RegionLocationMinX0=0,
                RegionLocationMinY0=0,
                RegionLocationMaxX1=shape[1] - 1,
                RegionLocationMaxY1=shape[0] - 1,
            )
        ]
    set_pixels(ds, (np.arange(frames * shape[0] * shape[1]) % 251).astype(np.uint8).reshape(frames, *shape))
    if mutate is not None:
        mutate(ds)
    return write(ds, path, syntax=syntax)


def write_2d(
    path: Path,
    *,
    shape: tuple[int, int] = (8, 10),
    modality: str = "DX",
    pixels: np.ndarray | None = None,
    photometric: str | None = None,
    series: str | None = None,
    mutate: Callable[[Dataset], None] | None = None,
    syntax: str = uid.ExplicitVRLittleEndian,
    **tags: object,
) -> Path:
    """Write one image without position, with the tags given by keyword, such as ``ImagerPixelSpacing=[0.2, 0.2]``."""
    ds = _base(modality, series=series or f"2d-{path.name}", instance=f"2d-{path.name}")
    ds.InstanceNumber = 1
    counted = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    set_pixels(ds, counted if pixels is None else pixels, photometric=photometric)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    if mutate is not None:
        mutate(ds)
    return write(ds, path, syntax=syntax)


def set_pixels(ds: Dataset, pixels: np.ndarray, *, photometric: str | None = None) -> None:
    """Store (rows, columns), (frames, rows, columns) or, uint8 with a last axis of 3, colour."""
    colour = pixels.ndim >= 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8
    plane = pixels.shape[:-1] if colour else pixels.shape
    ds.Rows, ds.Columns = plane[-2:]
    if len(plane) == 3:
        ds.NumberOfFrames = plane[0]
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = photometric or ("RGB" if colour else "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)


def _base(modality: str, *, series: str, instance: str, patient: str = CANARIES["PatientID"]) -> Dataset:
    ds = Dataset()
    for keyword, value in CANARIES.items():
        setattr(ds, keyword, value)
    ds.PatientID = patient
    ds.PatientSex, ds.PatientAge, ds.PatientPosition = "F", "063Y", "HFS"
    ds.Modality = modality
    ds.Manufacturer = "SIEMENS"
    ds.SOPClassUID = SOP_CLASSES.get(modality, uid.SecondaryCaptureImageStorage)
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["instance", instance])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", series])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study", series])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", series])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return ds


def _item(**tags: object) -> Dataset:
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def _ds(value: float) -> str:
    """Shortest decimal string of at most 16 characters that is nearest to the value."""
    texts = (f"{value:.{digits}g}" for digits in range(16, 0, -1))
    return next(text for text in itertools.chain(texts) if len(text) <= 16)


def _compress(ds: Dataset, syntax: str) -> None:
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    pixels = ds.pixel_array
    multiframe = int(ds.get("NumberOfFrames", 1)) > 1
    encode = {
        uid.RLELossless: None,
        uid.JPEGLossless: imagecodecs.ljpeg_encode,
        uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode,
        uid.JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
        uid.JPEGLSLossless: imagecodecs.jpegls_encode,
        uid.JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k"),
        uid.HTJ2KLossless: imagecodecs.htj2k_encode,
    }[uid.UID(syntax)]
    if encode is None:
        ds.compress(syntax, generate_instance_uid=False)
        return
    ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
    frames = [bytes(encode(np.ascontiguousarray(frame))) for frame in (pixels if multiframe else [pixels])]
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].is_undefined_length = True
