"""The geometry matrix of the hazard catalogue (D.2): one phantom in every format lies at the same place in mm.

Every voxel has a number of its own, so a file is right when each number lies where the closed formula puts it. Half of
the files are written by nibabel, SimpleITK and pydicom, half by medssl; the other library reads each one beside us.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import dicoms
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import ORIENTATIONS, SPACINGS_MM, grid

from medssl import Geometry, Volume, read_volume, write_volume

ANGLES_DEG = (0.0, 5.0, 20.0, 33.0, 45.0)
ORIGINS_MM = (0.0, -500.0, 1.9e6)
SIZES = {"odd": (5, 7, 3), "even": (4, 6, 8), "thin": (6, 5, 1), "prime": (7, 11, 5)}
ITK_NAMES = ("a.mha", "a.mhd", "a.nrrd", "a.nhdr")
LPS = np.diag([-1.0, -1.0, 1.0])
NEAR_MM, FAR_NIFTI_MM, ITK_MM = 1e-3, 0.125, 1e-6  # float32 steps by 0.125 mm at 1.9e6
QUATERNION_MM = 0.02  # a q-form alone has lost this near half a turn; nibabel reads the same


@dataclass(frozen=True)
class Phantom:
    """Numbered voxels (X, Y, Z) on a grid; ``is_far`` where float32 is coarser than the tolerance."""

    numbers: np.ndarray
    grid: Geometry
    is_far: bool


def places_of(numbers: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Positions (voxels, 3) in the order of the voxels' numbers."""
    ijk = np.indices(numbers.shape).reshape(3, -1).T
    return (ijk @ affine[:3, :3].T + affine[:3, 3])[np.argsort(numbers.ravel(), kind="stable")]


def apart_mm(phantom: Phantom, numbers: np.ndarray, affine: np.ndarray) -> float:
    """How far the worst voxel lies from its place; infinite where the numbers are not those of the phantom."""
    return between_mm((phantom.numbers, phantom.grid.affine), (numbers, affine))


def between_mm(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    if not np.array_equal(np.sort(one[0].ravel()), np.sort(other[0].ravel())):
        return np.inf
    return float(np.abs(places_of(*one) - places_of(*other)).max())


def by_simpleitk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (X, Y, Z) and RAS affine, from the positions that ITK itself gives."""
    first = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    steps = [np.array(image.TransformIndexToPhysicalPoint(tuple(int(v) for v in row))) - first for row in np.eye(3)]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = LPS @ np.array(steps).T, LPS @ first
    return sitk.GetArrayFromImage(image).T, affine


def by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


def made(orientation: str, angle: float, spacing: tuple[float, ...], origin: float, size: str, seed: int) -> Phantom:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.permutation(SIZES[size]))
    found = grid(
        shape,  # type: ignore[arg-type]
        spacing_mm=spacing,  # type: ignore[arg-type]
        orientation=orientation,
        axis=tuple(rng.normal(size=3)),
        angle_deg=angle,
        centre_mm=(origin, origin / 2, -origin),
    )
    is_right_handed = np.linalg.det(found.affine[:3, :3]) > 0
    numbers = dicoms.series_values((shape[1], shape[0], shape[2]))[:, :, :: 1 if is_right_handed else -1]
    return Phantom(numbers, found, abs(origin) > 1e5)


def check_nifti(phantom: Phantom, path: Path, *, by_medssl: bool, codes: tuple[int, int]) -> None:
    if by_medssl:
        write_volume(Volume(phantom.numbers[None], phantom.grid, "arbitrary"), path)
    else:
        image = nibabel.Nifti1Image(phantom.numbers, phantom.grid.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(phantom.grid.affine, codes[0])
        image.set_qform(phantom.grid.affine, codes[1])
        nibabel.save(image, path)
    volume, source = read_volume(path)
    most = FAR_NIFTI_MM if phantom.is_far else NEAR_MM
    rounding = QUATERNION_MM if codes == (0, 1) and not by_medssl else 0
    assert apart_mm(phantom, volume.array[0], volume.geometry.affine) <= most + rounding
    assert between_mm(by_nibabel(path), (volume.array[0], volume.geometry.affine)) <= most
    assert any(said.startswith("W_ORIGIN") for said in source.warnings) == phantom.is_far


def check_itk(phantom: Phantom, path: Path, *, by_medssl: bool, compressed: bool) -> None:
    if by_medssl and path.suffix in {".mha", ".nrrd"}:
        write_volume(Volume(phantom.numbers[None], phantom.grid, "arbitrary"), path)
    else:
        image = sitk.GetImageFromArray(phantom.numbers.T)
        image.SetSpacing(phantom.grid.spacing_mm)
        image.SetOrigin((LPS @ phantom.grid.origin_mm).tolist())
        image.SetDirection((LPS @ phantom.grid.affine[:3, :3] / phantom.grid.spacing_mm).ravel().tolist())
        sitk.WriteImage(image, str(path), compressed)
    volume, _ = read_volume(path)
    assert apart_mm(phantom, volume.array[0], volume.geometry.affine) <= ITK_MM
    assert apart_mm(phantom, *by_simpleitk(sitk.ReadImage(str(path)))) <= ITK_MM


def check_dicom(phantom: Phantom, folder: Path, *, names: str, enhanced: bool, by_itk: bool) -> None:
    """The first array axis runs along rows; slices of a left-handed grid lie in falling order along the normal."""
    affine, (columns, rows, slices) = phantom.grid.affine, phantom.grid.shape
    is_right_handed = np.linalg.det(affine[:3, :3]) > 0
    first = affine[:3, 3] + (0 if is_right_handed else slices - 1) * affine[:3, 2]
    spacing = phantom.grid.spacing_mm
    options = {
        "shape": (rows, columns, slices),
        "spacing": (spacing[1], spacing[0], spacing[2]),
        "orientation": np.concatenate([LPS @ affine[:3, axis] / spacing[axis] for axis in (0, 1)]).tolist(),
        "origin": tuple((LPS @ first).tolist()),
    }
    if enhanced and slices > 1:
        order = np.random.default_rng(rows).permutation(slices).tolist()
        path = dicoms.write_enhanced(folder / "enhanced", order=order, **options)
        volume, _ = read_volume(path)
    else:
        paths = dicoms.write_series(folder, modality="MR", slope=None, names=names, **options)  # type: ignore[arg-type]
        volume, _ = read_volume(folder)
        path = paths[0]
    assert apart_mm(phantom, volume.array[0], volume.geometry.affine) <= NEAR_MM
    if by_itk and path.name != "enhanced":
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        assert apart_mm(phantom, *by_simpleitk(reader.Execute())) <= NEAR_MM


def check(case: tuple[str, float, tuple[float, ...], float, str], seed: int, folder: Path) -> None:
    phantom = made(*case, seed)
    by_medssl = bool(seed % 2)
    check_nifti(phantom, folder / "a.nii.gz", by_medssl=by_medssl, codes=((1, 1), (2, 0), (0, 1))[seed % 3])
    for name in ITK_NAMES:
        check_itk(phantom, folder / name, by_medssl=by_medssl, compressed=bool(seed % 3))
    names = ("shuffled", "sorted", "reversed")[seed % 3]
    check_dicom(phantom, folder / "series", names=names, enhanced=seed % 4 == 3, by_itk=seed % 8 == 0)


MATRIX = [
    (*case, size)
    for number, case in enumerate(itertools.product(ORIENTATIONS, ANGLES_DEG, SPACINGS_MM, ORIGINS_MM))
    for size in (list(SIZES)[number % 4], list(SIZES)[(number + 1 + number // 4) % 4])
]
FAST = [int(n) for n in np.random.default_rng(0).permutation(len(MATRIX))[:300]]


def failures(numbers: list[int], folder: Path) -> list[tuple[int, object, str]]:
    """Every case outside its tolerance, with what was said."""
    found = []
    for number in numbers:
        try:
            check(MATRIX[number], number, folder / str(number))
        except Exception as error:  # one wrong case must not hide the others
            found.append((number, MATRIX[number], f"{type(error).__name__}: {error}"[:300]))
    return found


def test_the_matrix_has_every_axis_order_and_5000_cases() -> None:
    assert len(MATRIX) >= 5000
    assert len({case[0] for case in MATRIX}) == 48
    for column, values in enumerate((ORIENTATIONS, ANGLES_DEG, SPACINGS_MM, ORIGINS_MM, SIZES)):
        assert {MATRIX[number][column] for number in FAST} == set(values)


@pytest.mark.parametrize("part", range(6))
def test_the_same_phantom_in_all_formats_has_the_same_world(tmp_path: Path, part: int) -> None:
    for number in FAST[part::6]:
        (tmp_path / str(number)).mkdir()
    assert failures(FAST[part::6], tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_whole_matrix(tmp_path: Path, orientation: str) -> None:
    numbers = [number for number, case in enumerate(MATRIX) if case[0] == orientation]
    for number in numbers:
        (tmp_path / str(number)).mkdir()
    assert failures(numbers, tmp_path) == []


def _columns(order: tuple[int, int, int], signs: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for column, (source, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[source, column] = sign
    return matrix


def _shifted(*by: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix


SLIPS = {
    "first two axes swapped": lambda affine: affine @ _columns((1, 0, 2)),
    "last two axes swapped": lambda affine: affine @ _columns((0, 2, 1)),
    "outer axes swapped": lambda affine: affine @ _columns((2, 1, 0)),
    "axes rotated": lambda affine: affine @ _columns((1, 2, 0)),
    "x flipped about voxel 0": lambda affine: affine @ _columns((0, 1, 2), (-1, 1, 1)),
    "y flipped about voxel 0": lambda affine: affine @ _columns((0, 1, 2), (1, -1, 1)),
    "z flipped about voxel 0": lambda affine: affine @ _columns((0, 1, 2), (1, 1, -1)),
    "LPS taken for RAS": lambda affine: np.diag([-1, -1, 1, 1]) @ affine,
    "left and right of the world": lambda affine: np.diag([-1, 1, 1, 1]) @ affine,
    "half a voxel along x": lambda affine: affine @ _shifted(0.5, 0, 0),
    "half a voxel along all": lambda affine: affine @ _shifted(0.5, 0.5, 0.5),
    "counted from 1": lambda affine: affine @ _shifted(1, 1, 1),
    "directions transposed": lambda affine: np.block([[affine[:3, :3].T, affine[:3, 3:]], [affine[3:]]]),
    "spacing left out": lambda affine: affine / np.append(np.linalg.norm(affine[:3], axis=0)[:3], 1),
    "spacing of rows and columns swapped": lambda affine: affine @ np.diag([0.9 / 0.4, 0.4 / 0.9, 1, 1]),
    "origin left out": lambda affine: affine - np.pad(affine[:, 3:], ((0, 0), (3, 0))) * (np.arange(4) < 3)[:, None],
    "origin in micrometres": lambda affine: affine @ np.eye(4) + np.pad(affine[:3, 3:], ((0, 1), (3, 0))) * 999,
    "origin negated": lambda affine: affine - 2 * np.pad(affine[:3, 3:], ((0, 1), (3, 0))),
    "directions rounded to 3 digits": lambda affine: np.round(affine, 2),
    "a thousandth too long": lambda affine: affine * np.array([1.001, 1, 1, 1]),
}


@pytest.mark.parametrize("orientation", ["RAS", "SLP"])
@pytest.mark.parametrize("slip", SLIPS)
def test_each_of_40_planted_slips_is_seen(slip: str, orientation: str) -> None:
    phantom = made(orientation, 20.0, (0.4, 0.9, 2.0), -500.0, "prime", 1)
    affine = SLIPS[slip](phantom.grid.affine)
    assert apart_mm(phantom, phantom.numbers, phantom.grid.affine) == 0
    assert apart_mm(phantom, phantom.numbers, affine) > NEAR_MM
    image = sitk.GetImageFromArray(phantom.numbers.T)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetOrigin((LPS @ affine[:3, 3]).tolist())
    image.SetDirection((LPS @ affine[:3, :3] / lengths).ravel().tolist())
    assert apart_mm(phantom, *by_simpleitk(image)) > NEAR_MM
