"""Small valid files of every format that medssl reads, as seeds for mutation.

Everything is generated; with the shared folder of real data its small files come on top, and so do the test files that
pydicom ships. Patient fields hold :data:`PLANTED`, which no message may repeat.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian

PLANTED = "ZZPLANTED"
LARGEST_BYTES = 150_000
SHAPE = (9, 8, 6)

_JPEG_BASELINE, _JPEG_LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
_JPEG_LS, _JPEG_2000, _HTJ2K = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201"
_RLE = "1.2.840.10008.1.2.5"
_MR, _CT, _SC, _US_CLIP = (
    f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "2", "7", "3.1")
)  # fmt: skip
_ENHANCED_MR, _SEG, _RTSTRUCT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4.1", "66.4", "481.3"))


@dataclass(frozen=True)
class Seed:
    """Files by name; ``entry`` is the one to read, ``""`` for the folder of all."""

    kind: str
    name: str
    files: dict[str, bytes]
    entry: str


def corpus(data: Path | None = None) -> list[Seed]:
    """All seeds, always in the same order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds = [*_nifti(), *_itk(), *_raster(), *_npy(), *_dicom(), *_series()]
        shipped = Path(pydicom.__file__).parent / "data" / "test_files"
        seeds += [_found("pydicom", path) for path in _small(shipped, "*.dcm")]
        for folder in ("dicom_files", "dicom_series", "nifti_geometry", "nrrd_mha") if data else ():
            seeds += [_found("real", path) for path in _small(data / folder, "**/*")]
    return seeds


def _found(kind: str, path: Path) -> Seed:
    return Seed(kind, path.name, {path.name: path.read_bytes()}, path.name)


def _small(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.is_file() and path.suffix not in {".md", ".csv", ".raw"} and path.stat().st_size <= LARGEST_BYTES
    )


def _one(kind: str, name: str, data: bytes) -> Seed:
    return Seed(kind, name, {name: data}, name)


def _voxels(dtype: type = np.int16) -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 251).astype(dtype)


def _nifti() -> Iterator[Seed]:
    affine = np.array([[-0.7, 0, 0, 20], [0, 0.72, 1.5, -30], [0, -0.54, 2, 11], [0, 0, 0, 1.0]])  # oblique
    images = {
        "int16": nib.Nifti1Image(_voxels(), affine),
        "float64": nib.Nifti1Image(_voxels(np.float64) / 3, affine),
        "four": nib.Nifti1Image(np.stack([_voxels(), _voxels() + 1], axis=-1), affine),
        "big": nib.Nifti1Image(_voxels(), affine, nib.Nifti1Header(endianness=">")),
        "two": nib.Nifti2Image(_voxels(np.uint8), affine),
        "rgb": nib.Nifti1Image(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), affine),
        "vector": nib.Nifti1Image(np.zeros((*SHAPE, 1, 3), np.float32), affine),
    }
    for name, image in images.items():
        image.set_qform(affine, code=1)
        data = image.to_bytes()
        yield _one("nifti", f"{name}.nii", data)
        yield _one("nifti", f"{name}.nii.gz", gzip.compress(data, 1, mtime=0))
    header = bytearray(images["int16"].to_bytes()[:352])
    header[344:348], header[108:112] = b"ni1\0", struct.pack("<f", 0)
    yield Seed("nifti", "pair", {"pair.hdr": bytes(header), "pair.img": _voxels().tobytes(order="F")}, "pair.hdr")


def _itk() -> Iterator[Seed]:
    image = sitk.GetImageFromArray(_voxels().transpose(2, 1, 0).copy())
    image.SetSpacing((0.5, 0.6, 2.0))
    vector = sitk.GetImageFromArray(np.zeros((6, 8, 9, 3), np.float32), isVector=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in (
            "raw.mha",
            "zlib.mha",
            "vector.mha",
            "pair.mhd",
            "raw.nrrd",
            "gzip.nrrd",
            "vector.nrrd",
            "pair.nhdr",
        ):
            path = Path(folder) / name.partition(".")[0] / name
            path.parent.mkdir(exist_ok=True)
            what = vector if name.startswith("vector") else image
            sitk.WriteImage(what, str(path), useCompression=name.startswith(("zlib", "gzip")))
            files = {part.name: part.read_bytes() for part in path.parent.iterdir() if part.stem == path.stem}
            kind = "nrrd" if path.suffix in {".nrrd", ".nhdr"} else "metaimage"
            wanted = {name} if "pair" not in name else {name, *(f for f in files if f.endswith((".raw", ".raw.gz")))}
            yield Seed(kind, name, {key: files[key] for key in sorted(wanted)}, name)
    text = " ".join(map(str, _voxels().ravel(order="F").tolist()))
    sizes = " ".join(map(str, SHAPE))
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nencoding: ascii\nspacings: 1 1 2\n\n"
    yield _one("nrrd", "ascii.nrrd", (head + text).encode())


def _raster() -> Iterator[Seed]:
    grey = Image.fromarray(_voxels(np.uint8)[:, :, 0])
    colour = Image.merge("RGB", [grey, grey.rotate(180), grey])
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.png": (grey, {}),
        "colour.png": (colour, {}),
        "sixteen.png": (Image.fromarray(_voxels(np.uint16)[:, :, 0]), {}),
        "palette.png": (colour.quantize(8), {}),
        "alpha.png": (colour.convert("RGBA"), {}),
        "colour.jpg": (colour, {}),
        "grey.tif": (grey, {"dpi": (100, 100)}),
        "pages.tif": (grey, {"save_all": True, "append_images": [grey, grey]}),
        "lzw.tif": (colour, {"compression": "tiff_lzw"}),
        "grey.bmp": (grey, {}),
    }
    for name, (picture, options) in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name[-3:].upper()), **options)
        yield _one("raster", name, buffer.getvalue())


def _npy() -> Iterator[Seed]:
    for name, array in {
        "three": _voxels(np.float32),
        "two": _voxels()[..., 0],
        "fortran": np.asfortranarray(_voxels()),
    }.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        yield _one("npy", f"{name}.npy", buffer.getvalue())


def _dicom() -> Iterator[Seed]:
    picture = _picture(0)
    shapes: dict[str, Dataset] = {
        "mr": _slice(0),
        "ct": _slice(1, modality="CT", sop=_CT),
        "colour": _colour(),
        "palette": _palette(),
        "clip": _clip(),
        "enhanced": _enhanced(),
        "seg": _segmentation(),
        "rtstruct": _structures(),
    }
    for name, dataset in shapes.items():
        yield _one("dicom", f"{name}.dcm", _bytes(dataset))
    for name, syntax in {
        "implicit": "1.2.840.10008.1.2",
        "big": "1.2.840.10008.1.2.2",
        "deflated": "1.2.840.10008.1.2.1.99",
    }.items():
        yield _one("dicom", f"{name}.dcm", _bytes(_slice(0), syntax=syntax))
    codecs: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
        "lossless": (_JPEG_LOSSLESS, imagecodecs.ljpeg_encode),
        "jpegls": (_JPEG_LS, imagecodecs.jpegls_encode),
        "j2k": (_JPEG_2000, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k", reversible=True)),
        "htj2k": (_HTJ2K, imagecodecs.htj2k_encode),
        "rle": (_RLE, _rle),
    }
    for name, (syntax, encode) in codecs.items():
        dataset = _slice(0)
        dataset.PixelData = encapsulate([encode(picture)])
        yield _one("dicom", f"{name}.dcm", _bytes(dataset, syntax=syntax))
    dataset = _colour()
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.PixelData = encapsulate([imagecodecs.jpeg8_encode(np.zeros((16, 20, 3), np.uint8))])
    yield _one("dicom", "baseline.dcm", _bytes(dataset, syntax=_JPEG_BASELINE))
    yield _one("dicom", "no_meta.dcm", _bytes(_slice(0))[132:])


def _series() -> Iterator[Seed]:
    plain = {f"{k:02d}.dcm": _bytes(_slice(k)) for k in range(5)}
    yield Seed("series", "plain", plain, "")
    echoes = {
        f"{e}{k}": _bytes(_slice(k, EchoNumbers=e, EchoTime=20.0 * e, number=9 * e + k))
        for e in (1, 2)
        for k in range(4)
    }
    yield Seed("series", "echoes", echoes, "")
    yield Seed("series", "ct", {f"{k}": _bytes(_slice(k, modality="CT", sop=_CT)) for k in range(4)}, "")
    gap = {f"{k}.dcm": _bytes(_slice(k)) for k in (0, 1, 2, 4)}
    yield Seed("series", "gap", gap, "")
    volumes = [{"what": "", "frames": [[number, 0, None] for number in range(len(plain))]}]
    listed = json.dumps({"medssl_series_list": 1, "files": list(plain), "volumes": volumes}, separators=(",", ":"))
    yield Seed("series", "list", {**plain, "case.dicom.json": listed.encode()}, "case.dicom.json")


def _picture(k: int) -> np.ndarray:
    return ((np.arange(16 * 20).reshape(16, 20) * 7 + 100 * k) % 4000).astype(np.uint16)


def _rle(picture: np.ndarray) -> bytes:
    planes = [imagecodecs.packbits_encode(np.ascontiguousarray(picture >> shift).astype(np.uint8)) for shift in (8, 0)]
    planes = [plane + b"\0" * (len(plane) % 2) for plane in planes]
    return struct.pack("<16I", 2, 64, 64 + len(planes[0]), *([0] * 13)) + b"".join(planes)


def _base(sop: str, modality: str, *, rows: int = 16, columns: int = 20) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop, "1.2.826.0.1.3680043.9.1.1"
    dataset.Modality, dataset.PatientName, dataset.PatientID = modality, f"{PLANTED}^NAME", f"{PLANTED}-ID"
    dataset.PatientBirthDate, dataset.StudyDate, dataset.StudyDescription = "19010203", "20010203", PLANTED
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.3680043.9.2", "1.2.826.0.1.3680043.9.3"
    dataset.FrameOfReferenceUID, dataset.InstanceNumber, dataset.SeriesNumber = "1.2.826.0.1.3680043.9.4", 1, 1
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    return dataset


def _slice(k: int, *, modality: str = "MR", sop: str = _MR, number: int | None = None, **extra: float) -> Dataset:
    dataset = _base(sop, modality)
    number = k if number is None else number
    dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.2.826.0.1.3680043.9.1.{number + 1}", number + 1
    dataset.ImagePositionPatient, dataset.PixelSpacing = [-10, 5, 2.5 * k], [0.8, 0.7]
    dataset.ImageOrientationPatient, dataset.SliceThickness = [1, 0, 0, 0, 0.8, 0.6], 2.5
    dataset.ImagePositionPatient[1] -= 0.6 * 2.5 * k
    dataset.ImagePositionPatient[2] = 0.8 * 2.5 * k
    if modality == "CT":
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        dataset.PixelPaddingValue = 0
        dataset["PixelPaddingValue"].VR = "US"
    for keyword, value in extra.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = _picture(k).tobytes()
    return dataset


def _eight_bits(dataset: Dataset) -> Dataset:
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    return dataset


def _colour() -> Dataset:
    dataset = _eight_bits(_base(_SC, "XC"))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = (np.arange(16 * 20 * 3) % 256).astype(np.uint8).tobytes()
    return dataset


def _palette() -> Dataset:
    dataset = _eight_bits(_base(_SC, "US"))
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for name in ("Red", "Green", "Blue"):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(dataset, f"{name}PaletteColorLookupTableData", (np.arange(256) * 256).astype(np.uint16).tobytes())
    dataset.PixelData = (np.arange(16 * 20) % 256).astype(np.uint8).tobytes()
    return dataset


def _clip() -> Dataset:
    dataset = _eight_bits(_base(_US_CLIP, "US"))
    dataset.NumberOfFrames = 3
    region = Dataset()
    region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 3, 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.05, 0.05
    dataset.SequenceOfUltrasoundRegions = [region]
    dataset.PixelData = (np.arange(3 * 16 * 20) % 256).astype(np.uint8).tobytes()
    return dataset


def _groups(dataset: Dataset, count: int) -> None:
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.7], 2.5
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(count):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, 2.5 * k]
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.NumberOfFrames = count


def _enhanced() -> Dataset:
    dataset = _base(_ENHANCED_MR, "MR")
    _groups(dataset, 4)
    dataset.PixelData = b"".join(_picture(k).tobytes() for k in range(4))
    return dataset


def _segmentation() -> Dataset:
    dataset = _base(_SEG, "SEG", columns=16)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 1, 0
    dataset.SegmentationType = "BINARY"
    _groups(dataset, 3)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        which = Dataset()
        which.ReferencedSegmentNumber = 1
        frame.SegmentIdentificationSequence = [which]
    segment = Dataset()
    segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType = 1, PLANTED, "MANUAL"
    dataset.SegmentSequence = [segment]
    dataset.PixelData = bytes(range(96))
    return dataset


def _structures() -> Dataset:
    dataset = _base(_RTSTRUCT, "RTSTRUCT")
    for keyword in (
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PixelRepresentation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
    ):
        del dataset[keyword]
    roi, contours, contour = Dataset(), Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 1, PLANTED
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
    contour.ContourData = [0, 0, 0, 5, 0, 0, 5, 5, 0, 0, 5, 0]
    contours.ReferencedROINumber, contours.ContourSequence = 1, [contour]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [contours]
    return dataset


def _bytes(dataset: Dataset, *, syntax: str = ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if dataset.BitsAllocated <= 8 else "OW"
        dataset["PixelData"].is_undefined_length = syntax.startswith(("1.2.840.10008.1.2.4", "1.2.840.10008.1.2.5"))
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()
