"""Planted identifiers: headers full of them, and the search for them in everything that was written.

Words of headers begin with ``ZzCan``, dates and numbers are those of :data:`HEADER`, names of files and folders begin
with ``Pathcan``; none of them can come about by chance.
"""

from __future__ import annotations

import base64
import gzip
import io
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import blosc2
import dicoms
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

ROOT = "1.2.826.0.1.3680043.10.774411"
HEADER = (b"zzcan", b"19310203", b"1931-02-03", b"3680043.10.774411", b"1774411993", b"71.3377441", b"101533.774411")
PATH = b"pathcan"
_TEXTS = {
    "PN": ("PatientName", "ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName", "OtherPatientNames"),
    "LO": ("PatientID", "OtherPatientIDs", "InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName"),
    "SH": ("AccessionNumber", "StudyID", "StationName", "PerformedProcedureStepID", "RequestedProcedureID"),
    "LT": ("PatientComments", "AdditionalPatientHistory", "FrameComments"),
    "ST": ("InstitutionAddress", "DerivationDescription", "AcquisitionComments"),
    "UT": ("TextValue", "LabelText"),
    "UC": ("StrainDescription", "LongCodeValue"),
    "UR": ("RetrieveURL", "PixelDataProviderURL"),
    "AE": ("RetrieveAETitle", "StationAETitle"),
    "CS": ("BodyPartExamined", "PatientSex", "ViewPosition", "ScanningSequence", "SequenceVariant", "Laterality"),
    "SH ": ("SequenceName", "ConvolutionKernel"),
    "LO ": ("ContrastBolusAgent", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "Manufacturer"),
}
_FIXED = {
    "PatientBirthDate": "19310203",
    "StudyDate": "19310203",
    "SeriesDate": "19310203",
    "AcquisitionDate": "19310203",
    "ContentDate": "19310203",
    "AcquisitionDateTime": "19310203101533.774411",
    "StudyTime": "101533.774411",
    "AcquisitionTime": "101533.774411",
    "PatientWeight": "71.3377441",
    "PatientAge": "zz1",
    "SeriesNumber": "1774411993",
}


def plant(datasets: Iterable[Dataset], patient: int) -> None:
    """Put identifiers of a patient into every kind of element, known, nested, private and of unknown type."""
    for number, ds in enumerate(datasets):
        for keyword in (name for names in _TEXTS.values() for name in names):
            setattr(ds, keyword, f"ZZCAN_{keyword[:6]}{patient}".upper() if _is_code(keyword) else _word(patient))
        for keyword, value in _FIXED.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                setattr(ds, keyword, value)
        ds.PatientID = f"ZzCanId{patient}"
        ds.ImageType = ["ORIGINAL", "PRIMARY", f"ZZCAN{patient}"]
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.1.{patient}", f"{ROOT}.2.{patient}"
        ds.FrameOfReferenceUID, ds.SOPInstanceUID = f"{ROOT}.3.{patient}", f"{ROOT}.4.{patient}.{number}"
        nested = Dataset()
        nested.RequestedProcedureDescription, nested.ScheduledProcedureStepStartDate = _word(patient), "19310203"
        ds.RequestAttributesSequence = [nested]
        block = ds.private_block(0x0029, "ZzCan PRIVATE", create=True)
        for offset, (kind, value) in enumerate(
            (
                ("LO", _word(patient)),
                ("UN", _word(patient).encode() + b" " * (len(_word(patient)) % 2)),
                ("OB", b"ZzCan blob"),
                ("UT", _word(patient)),
                ("UI", f"{ROOT}.5"),
            )
        ):
            block.add_new(offset + 1, kind, value)
        ds.add_new(0xFFFCFFFC, "OB", b"ZzCan padding ")
        ds.preamble = b"ZzCan preamble".ljust(128, b"\0")


def write_contours(series: Sequence[Path], path: Path, *, patient: int) -> Path:
    """An RTSTRUCT with a square on two slices of a series, whose texts are all planted."""
    images = sorted((pydicom.dcmread(file) for file in series), key=lambda image: image.ImagePositionPatient[2])
    ds = Dataset()
    plant([ds], patient)
    ds.SOPClassUID, ds.Modality = uid.RTStructureSetStorage, "RTSTRUCT"
    ds.SOPInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.6.{patient}", f"{ROOT}.7.{patient}"
    ds.StructureSetLabel = ds.StructureSetName = ds.StructureSetDescription = "ZzCan set"
    named, study, frame, roi, listed = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
    named.SeriesInstanceUID = images[0].SeriesInstanceUID
    named.ContourImageSequence = [_reference(image) for image in images]
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = f"{ROOT}.8", images[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [named]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = images[0].FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    roi.ROINumber, roi.ROIName, roi.ROIDescription = 1, "ZzCan roi", "ZzCan roi"
    listed.ReferencedROINumber, listed.ContourSequence = 1, []
    rows, columns = (float(value) for value in images[0].PixelSpacing)
    for image in images[8:11]:
        x, y, z = (float(value) for value in image.ImagePositionPatient)
        corners = [(5.5, 6.5), (14.5, 6.5), (14.5, 16.5), (5.5, 16.5)]
        drawn = Dataset()
        drawn.ContourGeometricType, drawn.NumberOfContourPoints = "CLOSED_PLANAR", 4
        drawn.ContourData = [f"{v:.4f}" for i, j in corners for v in (x + i * columns, y + j * rows, z)]
        listed.ContourSequence.append(drawn)
    ds.StructureSetROISequence, ds.ROIContourSequence = [roi], [listed]
    return dicoms.write(ds, path)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, *, patient: int) -> Path:
    """A NIfTI file with identifiers in every text of its header and in an extension."""
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"], image.header["aux_file"] = f"ZzCan descrip {patient}".encode(), b"ZzCan aux"
    image.header["intent_name"], image.header["db_name"] = b"ZzCan intent", b"ZzCan db"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"ZzCan extension 19310203"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG with identifiers in its text chunks."""
    info = PngInfo()
    info.add_text("Patient", "ZzCan png")
    info.add_text("Comment", "ZzCan packed 19310203", zip=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, pnginfo=info)
    return path


def with_value(path: Path, keyword: str, value: bytes) -> Path:
    """Write other bytes into the first short-form element of a DICOM file, whatever its type allows."""
    tag = int(tag_for_keyword(keyword) or 0)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    data = path.read_bytes()
    start = data.index(head, 132) + 6
    length = int.from_bytes(data[start : start + 2], "little")
    value += b" " * (len(value) % 2)
    path.write_bytes(data[:start] + struct.pack("<H", len(value)) + value + data[start + 2 + length :])
    return path


def hits(folder: Path, words: Iterable[bytes], *, leave_out: Sequence[str] = ()) -> set[tuple[str, bytes]]:
    """Files below a folder that hold a word, in any layer, upper and lower case alike; and those whose path does.

    Args:
        folder: What was written.
        words: In lower case.
        leave_out: Folders, relative to it, that are copies of the input.
    """
    found = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(tuple(leave_out)) and path.name != "members.json":
            continue
        layers = [name.encode(), *(_layers(path.name, path.read_bytes()) if path.is_file() else ())]
        found |= {(name, word) for layer in layers for word in words if word in layer.lower()}
    return found


def _layers(name: str, content: bytes) -> Iterator[bytes]:
    """The bytes of a file, and what is packed in them."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield from _layers(name.removesuffix(".gz"), gzip.decompress(content))
    elif content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield member.encode()
                yield from _layers(member, archive.read(member))
    elif content[:4] == b"PAR1":
        yield pd.read_parquet(io.BytesIO(content)).to_csv().encode()
    elif content[:8] == b"\x89PNG\r\n\x1a\n":
        image = Image.open(io.BytesIO(content))
        image.load()
        yield repr(image.info).encode()
        yield image.tobytes()
    elif name.endswith(".b2nd"):
        packed = blosc2.ndarray_from_cframe(content)
        yield repr(dict(packed.schunk.meta)).encode() + repr(packed.schunk.vlmeta[:]).encode()
        yield packed[:].tobytes()
    elif name.endswith(".html"):
        for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content):
            yield from _layers("", base64.b64decode(packed))


def _reference(image: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return reference


def _word(patient: int) -> str:
    return f"ZzCan{patient}"


def _is_code(keyword: str) -> bool:
    return keyword in _TEXTS["CS"]
