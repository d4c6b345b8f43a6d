"""Write an image as medssl sees it, on its own grid, to a file that every viewer opens."""

from __future__ import annotations

from pathlib import Path

from medssl import io
from medssl.data.archive import is_archive
from medssl.data.reading import Reading, matched_label, read_image, turned_onto
from medssl.errors import ConfigError, MedSSLError, ReadError
from medssl.volume import Volume

_NO_CHOICE = {"E_SEVERAL", "E_NDIM"}
_PLAIN = Reading()


def convert(
    item: Path,
    out: Path,
    *,
    label: bool = False,
    on: Path | None = None,
    reading: Reading = _PLAIN,
    dry_run: bool = False,
) -> list[Path]:
    """Write one volume to a file, or all volumes of an item to a folder.

    Nothing is resampled, scaled or turned. Nothing of the header but the geometry is written.

    Args:
        item: DICOM file, folder of one series or series list; NIfTI, MHA, NRRD or picture.
        out: ``.nii``, ``.nii.gz``, ``.mha`` or ``.nrrd`` for one volume; a name without such an ending is a folder for
            ``volume_000.nii.gz`` and those that follow; colours, which NIfTI is not written with, become ``.mha``.
        label: Whether it is a label map, a DICOM-SEG or an RTSTRUCT.
        on: Image that the label map must lie on; needed for contours.
        reading: Which volume, and how it is read.
        dry_run: Read everything, but write nothing.

    Returns:
        The files that were written, or would be.

    Raises:
        ReadError: if the item is missing, damaged or of another kind.
        GeometryError: if its grid is impossible or ambiguous.
        CaseError: E_SEVERAL or E_NDIM, if there are several volumes, none was chosen, and ``out`` is one file.
        ConfigError: E_OVERWRITE, if a file would take the place of what it is made from.
    """
    if is_archive(item):
        raise ReadError(
            f"{item}: is an archive, and one image is converted. Unpack it first, or scan it.", code="E_FORMAT"
        )
    is_file = io.is_image(out)
    written = []
    for place, choice in enumerate([reading] if is_file else _choices(item, label=label, on=on, reading=reading)):
        volume, source = _read_item(item, label=label, on=on, reading=choice)
        suffix = ".nii.gz" if volume.array.shape[0] == 1 else ".mha"
        target = out if is_file else out / f"volume_{place:03d}{suffix}"
        _check_target(target, item, on)
        if not dry_run:
            io.write_volume(volume, target, like=source if source.nifti_header is not None else None)
        written.append(target)
    return written


def _read_item(
    item: Path, *, label: bool = False, on: Path | None = None, reading: Reading = _PLAIN
) -> tuple[Volume, io.Source]:
    """Read an image, or a label map with the image that it lies on; arguments as in :func:`convert`.

    Raises:
        ReadError: if a file is missing, damaged or of another kind.
        GeometryError: if a grid is impossible or ambiguous.
        CaseError: if voxel values or dimensions break a rule, or the label map does not lie on the image.
    """
    if not label:
        return read_image(item, reading)
    image = read_image(on, _PLAIN)[0] if on is not None else None
    volume, source = io.read_volume(
        item,
        unit="label",
        xform=reading.xform,
        assume_spacing_mm=reading.assume_spacing_mm,
        volume=reading.volume,
        regularise=reading.regularise,
        pages=reading.pages,
        on=image.geometry if image is not None else None,
    )
    if image is not None:
        matched_label(image, turned_onto(volume, image.geometry), item=str(item))
    return volume, source


def read_first(
    item: Path, *, label: bool = False, on: Path | None = None, reading: Reading = _PLAIN
) -> tuple[Volume, io.Source]:
    """As :func:`_read_item`, but the first of several volumes where none was chosen."""
    try:
        return _read_item(item, label=label, on=on, reading=reading)
    except MedSSLError as error:
        if error.code not in _NO_CHOICE or reading.volume is not None:
            raise
        return _read_item(item, label=label, on=on, reading=reading.model_copy(update={"volume": 0}))


def _choices(item: Path, *, label: bool, on: Path | None, reading: Reading) -> list[Reading]:
    """One reading a volume."""
    if reading.volume is not None:
        return [reading]
    _, source = read_first(item, label=label, on=on, reading=reading)
    if source.volumes == 1:
        return [reading]
    return [reading.model_copy(update={"volume": place}) for place in range(source.volumes)]


def _check_target(target: Path, *inputs: Path | None) -> None:
    if any(path is not None and target.resolve() == path.resolve() for path in inputs):
        raise ConfigError(f"{target}: would be overwritten by its own copy. Choose another name.", code="E_OVERWRITE")
