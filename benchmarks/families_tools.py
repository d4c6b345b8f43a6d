"""How each tool reads a file or a folder when used in the plain way; every reader gives volumes in RAS+."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from families_truth import Image, itk_images

Reader = Callable[[Sequence[Path], str], list[Image]]


class RefusedError(Exception):
    """What medssl would not read, by its codes; ``images`` is what it read beside that."""

    def __init__(self, codes: str, images: list[Image]) -> None:
        super().__init__(codes)
        self.images = images


def medssl(paths: Sequence[Path], kind: str) -> list[Image]:
    """All volumes of all items; a folder is sorted as ``medssl scan`` does, a label file read as a label."""
    from medssl.errors import MedSSLError

    try:
        if kind == "series":
            return _medssl_series(paths)
        return _medssl_file(paths[0], label=kind in {"seg", "rtstruct"}, on=paths[1:])
    except MedSSLError as error:
        raise RefusedError(error.code, []) from error


def _medssl_series(paths: Sequence[Path]) -> list[Image]:
    from medssl.errors import MedSSLError
    from medssl.io import read_volume
    from medssl.io.dicom.reader import stacks
    from medssl.io.dicom.series_list import write_list

    images, codes = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = _copied(paths, Path(name))
        assembly = stacks(folder)
        codes += [error.code for _, error in assembly.refused]
        for item in assembly.items:
            listed = Path(name) / f"{item.name}.dicom.json"
            write_list(item, listed)
            for k in range(len(item.stacks)):
                try:
                    volume, _ = read_volume(listed, volume=k if len(item.stacks) > 1 else None)
                except MedSSLError as error:
                    codes.append(error.code)
                else:
                    images.append(Image(volume.array, volume.geometry.affine))
    if codes:
        raise RefusedError(", ".join(sorted(set(codes))), images)
    return images


def _medssl_file(path: Path, *, label: bool, on: Sequence[Path]) -> list[Image]:
    from medssl.errors import MedSSLError
    from medssl.io import read_volume

    options: dict[str, Any] = {"unit": "label"} if label else {}
    if on:
        with tempfile.TemporaryDirectory() as name:
            options["on"] = read_volume(_copied(on, Path(name)))[0].geometry
    try:
        volumes = [read_volume(path, **options)[0]]
    except MedSSLError as error:
        if error.code not in {"E_SEVERAL", "E_NDIM"} or label:
            raise
        first, source = read_volume(path, volume=0)
        volumes = [first, *(read_volume(path, volume=k)[0] for k in range(1, source.volumes))]
    return [Image(volume.array, volume.geometry.affine) for volume in volumes]


def simple_itk(paths: Sequence[Path], kind: str) -> list[Image]:
    """``ImageSeriesReader`` over every series that GDCM names; ``ReadImage`` for a file."""
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if kind != "series":
        return itk_images(sitk.ReadImage(str(paths[0])))
    with tempfile.TemporaryDirectory() as name:
        folder = str(_copied(paths, Path(name)))
        images = []
        for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder):
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder, series))
            images += itk_images(reader.Execute())
    if not images:
        raise ValueError("no series found")
    return images


def torchio(paths: Sequence[Path], kind: str) -> list[Image]:
    """``ScalarImage`` of a folder or a file."""
    import torchio as tio

    with tempfile.TemporaryDirectory() as name:
        image = tio.ScalarImage(_copied(paths, Path(name)) if kind == "series" else paths[0])
        return [Image(image.data.numpy(), image.affine)]


def monai_pydicom(paths: Sequence[Path], kind: str) -> list[Image]:
    """``LoadImage`` with ``PydicomReader``, the first that MONAI tries for DICOM."""
    from monai.data import PydicomReader

    return _monai(PydicomReader(), paths, kind)


def monai_other(paths: Sequence[Path], kind: str) -> list[Image]:
    """``LoadImage`` with the reader that MONAI has for the format beside that: ITK, or nibabel for NIfTI."""
    from monai.data import ITKReader, NibabelReader

    return _monai(NibabelReader() if kind == "nifti" else ITKReader(), paths, kind)


def monai_default(paths: Sequence[Path], kind: str) -> list[Image]:
    """``LoadImage()`` as it is: tries its readers in turn."""
    return _monai(None, paths, kind)


def _monai(reader: Any, paths: Sequence[Path], kind: str) -> list[Image]:
    from monai.transforms import LoadImage

    with tempfile.TemporaryDirectory() as name:
        path = _copied(paths, Path(name)) if kind == "series" else paths[0]
        image = LoadImage(reader=reader, image_only=True, ensure_channel_first=True)(path)
        array, affine = image.numpy(), image.affine.numpy()
    if affine.shape == (3, 3):
        affine, flat = np.eye(4), affine
        affine[:2, :2], affine[:2, 3] = flat[:2, :2], flat[:2, 2]
    while array.ndim < 4:
        array = array[..., None]
    return [Image(array, affine)]


def dicom2nifti(paths: Sequence[Path], _kind: str) -> list[Image]:
    """``dicom_series_to_nifti`` with its defaults."""
    import nibabel as nib
    from dicom2nifti import dicom_series_to_nifti

    with tempfile.TemporaryDirectory() as name:
        folder = _copied(paths, Path(name))
        result = dicom_series_to_nifti(str(folder), str(Path(name) / "out.nii.gz"))
        image = nib.load(result["NII_FILE"])
        array = np.asanyarray(image.dataobj)
    if array.dtype.names:
        array = np.stack([array[part] for part in array.dtype.names[:3]])
        return [Image(array.reshape(3, *image.shape[:3]), image.affine)]
    volumes = array.reshape(*array.shape[:3], -1)
    return [Image(volumes[..., k][None], image.affine) for k in range(volumes.shape[-1])]


def _copied(paths: Sequence[Path], temporary: Path) -> Path:
    """A folder that holds these files and nothing else."""
    folder = temporary / "series"
    folder.mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        shutil.copy(path, folder / f"{number:04d}_{path.name}")
    return folder


TOOLS: dict[str, Reader] = {
    "medssl": medssl,
    "SimpleITK": simple_itk,
    "TorchIO": torchio,
    "MONAI": monai_default,
    "MONAI PydicomReader": monai_pydicom,
    "MONAI ITKReader, NibabelReader": monai_other,
    "dicom2nifti": dicom2nifti,
}

PACKAGES = ("numpy", "pydicom", "SimpleITK", "itk", "nibabel", "monai", "torchio", "dicom2nifti", "pynrrd", "highdicom")

_KINDS = {
    "MONAI PydicomReader": {"series", "file", "seg", "rtstruct", "not an image"},
    "dicom2nifti": {"series", "file", "seg", "rtstruct", "not an image"},
}
_NEEDS_ITK = {"MONAI ITKReader, NibabelReader"}


def applies(tool: str, kind: str) -> bool:
    """Whether a tool claims to read this kind, and is installed."""
    if tool in _NEEDS_ITK and kind != "nifti" and importlib.util.find_spec("itk") is None:
        return False
    return kind in _KINDS.get(tool, {kind})


def read(tool: str, paths: Sequence[Path], kind: str) -> list[Image]:
    """Volumes as one tool reads them; its warnings are not counted as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TOOLS[tool](paths, kind)
