"""How quick is reading? Headers against pydicom, series against SimpleITK, .nii.gz against nibabel; one run, in turns.

Run:  python benchmarks/read_speed.py -o benchmarks/results
A CT-like volume of 150 slices of 512 x 512 is written as DICOM in five ways and as .nii.gz; the readers take turns, the
page cache is warm, medians of all rounds are given, and the voxels are checked to be equal. Reading a series begins at
the folder for both sides: which files belong together, in what order, then pixels, rescale and, for medssl, the digest
of every file. Compressed pixels are decoded in medssl's child process; its start is not counted (one round warms up).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import provenance
import pydicom
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import generate_uid
from scipy import ndimage

from medssl.io import read_volume
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.header import read_header

SPACING_MM = (0.8, 0.8, 2.0)
SYNTAXES: dict[str, tuple[str, Callable[[np.ndarray], bytes] | None]] = {
    "uncompressed": ("1.2.840.10008.1.2.1", None),
    "RLE": ("1.2.840.10008.1.2.5", None),
    "JPEG lossless": ("1.2.840.10008.1.2.4.70", imagecodecs.ljpeg_encode),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
    "JPEG 2000": (
        "1.2.840.10008.1.2.4.90",
        lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k", reversible=True),
    ),
}
GROUPING = [
    "Modality",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "ImageType",
    "AcquisitionNumber",
    "InstanceNumber",
    "Rows",
    "Columns",
    "BitsStored",
    "PixelRepresentation",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
]
GOALS = {"headers": 3.0, "headers and the values that make a series": 3.0, "uncompressed": 3.0, ".nii.gz": 1.5}


def ct_like(shape: tuple[int, int, int]) -> np.ndarray:
    """Body, texture and noise in HU, (X, Y, Z)."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    body = (x**2 / 0.6 + y**2 / 0.4 < 1)[..., None]
    texture = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), 4) * 1500
    noise = rng.normal(0, 15, shape)
    return np.clip(np.where(body, 40 + texture + noise, -1000 + noise / 3), -1024, 3071).astype(np.int16)


def write_series(folder: Path, hu: np.ndarray, *, kind: str) -> None:
    """One CT series with the header of a usual export (about 90 elements), file names in no order."""
    folder.mkdir()
    syntax, encode = SYNTAXES[kind]
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    names = np.random.default_rng(1).permutation(hu.shape[2])
    for k in range(hu.shape[2]):
        dataset = _header(k, series=series, study=study, frame=frame)
        stored = np.ascontiguousarray((hu[..., k].T + 1024).astype(np.uint16))
        dataset.Rows, dataset.Columns = stored.shape
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1" if kind == "RLE" else syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.PixelData = encapsulate([encode(stored)]) if encode else stored.tobytes()
        dataset["PixelData"].VR = "OB" if encode else "OW"
        dataset["PixelData"].is_undefined_length = encode is not None
        if kind == "RLE":
            dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(folder / f"IM{names[k]:05d}", enforce_file_format=True)


def _header(k: int, *, series: str, study: str, frame: str) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = series, study, frame
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    texts = (
        "Manufacturer ManufacturerModelName InstitutionName InstitutionAddress StationName StudyDescription "
        "SeriesDescription ProtocolName ReferringPhysicianName OperatorsName PatientName PatientID AccessionNumber "
        "StudyID SoftwareVersions DeviceSerialNumber ConvolutionKernel FilterType ContrastBolusAgent "
        "ContrastBolusRoute "
        "ImageComments PatientComments PerformedProcedureStepID PerformedProcedureStepDescription RequestedProcedureID "
        "NameOfPhysiciansReadingStudy PhysiciansOfRecord AdditionalPatientHistory MedicalAlerts Allergies"
    )
    for keyword in texts.split():
        setattr(dataset, keyword, "NONE")
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "PatientBirthDate"):
        setattr(dataset, keyword, "20000101")
    for keyword in ("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"):
        setattr(dataset, keyword, "120000.000")
    numbers = (
        "KVP DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient "
        "GantryDetectorTilt TableHeight ExposureTime XRayTubeCurrent Exposure GeneratorPower FocalSpots PatientWeight "
        "SpiralPitchFactor TableSpeed SingleCollimationWidth TotalCollimationWidth CTDIvol WindowCenter WindowWidth"
    )
    for keyword in numbers.split():
        setattr(dataset, keyword, 100)
    dataset.BodyPartExamined, dataset.PatientPosition, dataset.PatientSex = "CHEST", "HFS", "O"
    dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = 2, 1, k + 1
    for keyword in ("ReferencedStudySequence", "RequestAttributesSequence", "ProcedureCodeSequence"):
        item = Dataset()
        item.CodeValue, item.CodeMeaning, item.CodingSchemeDesignator = "1", "NONE", "99X"
        setattr(dataset, keyword, [item])
    dataset.ImagePositionPatient = [-204.4, -204.4, round(SPACING_MM[2] * k - 150, 4)]
    dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING_MM[:2])
    dataset.SliceThickness, dataset.SliceLocation = SPACING_MM[2], SPACING_MM[2] * k - 150
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    return dataset


def _headers_pydicom(folder: Path) -> Any:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.iterdir())]
    return sorted(float(header.ImagePositionPatient[2]) for header in headers)


def _values_pydicom(folder: Path) -> Any:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.iterdir())]
    values = [[header.get(keyword) for keyword in GROUPING] for header in headers]
    return sorted(float(row[GROUPING.index("ImagePositionPatient")][2]) for row in values)


def _headers_medssl(folder: Path) -> Any:
    assembly = assemble([read_header(path) for path in sorted(folder.iterdir())])
    return [frame.position_mm[2] for frame in assembly.items[0].stacks[0].frames if frame.position_mm]


def _series_itk(folder: Path) -> np.ndarray:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0)


def _medssl(path: Path) -> np.ndarray:
    return read_volume(path)[0].array[0]


def _nibabel(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def in_turns(readers: dict[str, Callable[[Path], Any]], path: Path, *, rounds: int) -> dict[str, float]:
    """Median seconds of each reader; their results must be equal."""
    results = {name: read(path) for name, read in readers.items()}
    first, *rest = results.values()
    if not all(np.array_equal(first, other) for other in rest):
        raise RuntimeError(f"{path}: the readers differ")
    del results, first, rest
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        for name in sorted(readers, reverse=bool(number % 2)):
            began = time.perf_counter()
            result = readers[name](path)
            times[name].append(time.perf_counter() - began)
            del result
    return {name: statistics.median(values) for name, values in times.items()}


def measure(*, shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of file: medians in seconds and medssl's ratio to the peer."""
    rows = []
    hu = ct_like(shape)
    with tempfile.TemporaryDirectory() as name:
        for kind in SYNTAXES:
            folder = Path(name) / kind
            write_series(folder, hu, kind=kind)
            if kind == "uncompressed":
                found = in_turns({"medssl": _headers_medssl, "pydicom": _headers_pydicom}, folder, rounds=rounds)
                rows.append(_row("headers", "pydicom", found))
                found = in_turns({"medssl": _headers_medssl, "pydicom": _values_pydicom}, folder, rounds=rounds)
                rows.append(_row("headers and the values that make a series", "pydicom", found))
            found = in_turns({"medssl": _medssl, "SimpleITK": _series_itk}, folder, rounds=rounds)
            rows.append(_row(kind, "SimpleITK", found))
            for path in folder.iterdir():
                path.unlink()
        path = Path(name) / "ct.nii.gz"
        nib.save(nib.Nifti1Image(hu, np.diag([*SPACING_MM, 1])), path)
        rows.append(_row(".nii.gz", "nibabel", in_turns({"medssl": _medssl, "nibabel": _nibabel}, path, rounds=rounds)))
    return rows


def _row(kind: str, peer: str, seconds: dict[str, float]) -> dict[str, Any]:
    ratio = seconds[peer] / seconds["medssl"]
    print(f"{kind}: {ratio:.2f} x {peer}", file=sys.stderr)
    goal = GOALS.get(kind, 1.0)
    return {
        "what": kind,
        "peer": peer,
        "peer_s": seconds[peer],
        "medssl_s": seconds["medssl"],
        "ratio": ratio,
        "goal": goal,
    }


def _page(rows: list[dict[str, Any]], *, shape: tuple[int, int, int], rounds: int) -> Iterator[str]:
    yield from provenance.head(
        "Reading, against the usual readers", "numpy", "pydicom", "SimpleITK", "nibabel", "imagecodecs", "isal"
    )
    yield f"{shape[2]} slices of {shape[0]} x {shape[1]}, medians of {rounds} rounds in turns, page cache warm,"
    yield "voxels equal. A series is read from its folder on: sorted, rescaled and, by medssl, digested. Headers are"
    yield "read one after the other in one process on both sides, and assembled by medssl. The first row is a loop of"
    yield "pydicom that opens each header and takes the position; in the second the loop takes the 18 values that"
    yield "are needed to tell series apart, as medssl does in both."
    yield ""
    yield "| what | peer | peer ms | medssl ms | times quicker | goal |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['what']} | {row['peer']} | {1e3 * row['peer_s']:.0f} | {1e3 * row['medssl_s']:.0f} "
            f"| **{row['ratio']:.2f}** | {row['goal']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=150)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path, help="folder for read_speed.md; JSON is printed in any case")
    options = parser.parse_args()
    shape = (options.size, options.size, options.slices)
    rows = measure(shape=shape, rounds=options.rounds)
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        page = _page(rows, shape=shape, rounds=options.rounds)
        (options.out / "read_speed.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
