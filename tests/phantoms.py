"""Volumes whose content is known in world mm, on grids of every awkward kind; no library is involved.

Everything is a closed-form function of world position, so that the same phantom can be put on any grid and compared
there: a ramp that linear interpolation must reproduce, and labels that tell left from right, front from back and head
from foot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from medssl.geometry import Geometry
from medssl.volume import Unit, Volume

REAL_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

ORIENTATIONS = tuple(
    "".join(letters) for order in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*order)
)
SPACINGS_MM = ((1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (0.4, 0.9, 2.0), (3.0, 0.5, 0.5))

BALLS_MM = {
    1: ((-22.0, 3.0, 5.0), 12.0),
    2: ((18.0, -9.0, -4.0), 9.0),
    3: ((4.0, 20.0, 16.0), 7.0),
}
"""Label: centre in world mm (RAS+) and radius; no two mirror images of each other."""


def rotation(axis: np.ndarray, angle_deg: float) -> np.ndarray:
    """Rotation matrix about ``axis`` by Rodrigues' formula."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(angle_deg)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def grid(
    shape: tuple[int, int, int] = (24, 20, 16),
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str = "RAS",
    axis: tuple[float, float, float] = (1.0, 2.0, 3.0),
    angle_deg: float = 0.0,
    shear: float = 0.0,
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Geometry:
    """Grid with its middle at ``centre_mm``; ``orientation`` holds for an angle below 45 degrees.

    Args:
        shape: Voxels along the array axes.
        spacing_mm: Along the array axes.
        orientation: Where the array axes point before the rotation, such as ``LPS``.
        axis: Of the rotation.
        angle_deg: Of the rotation.
        shear: How far the third array axis leans along the first, as a share of its length.
        centre_mm: World position of the middle of the field of view.
    """
    columns = np.zeros((3, 3))
    for index, letter in enumerate(orientation):
        world, positive = next((w, pair[1] == letter) for w, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        columns[world, index] = spacing_mm[index] * (1 if positive else -1)
    columns[:, 2] += shear * columns[:, 0] / spacing_mm[0] * spacing_mm[2]
    columns = rotation(np.array(axis), angle_deg) @ columns
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = np.array(centre_mm) - columns @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def voxel_positions_mm(geometry: Geometry) -> np.ndarray:
    """World position of every voxel centre, (X, Y, Z, 3), by the affine's definition."""
    ijk = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij"), axis=-1)
    return np.einsum("wa,xyza->xyzw", geometry.affine[:3, :3], ijk) + geometry.affine[:3, 3]


def ramp(geometry: Geometry, *, unit: Unit = "arbitrary") -> Volume:
    """Image 100 + 2 x - 3 y + 5 z (x, y, z in mm): all six directions can be told apart."""
    xyz = voxel_positions_mm(geometry)
    values = 100 + xyz @ np.array([2.0, -3.0, 5.0])
    return Volume(values[None].astype(np.float32), geometry, unit)


def balls(geometry: Geometry) -> Volume:
    """Label map of :data:`BALLS_MM`."""
    xyz = voxel_positions_mm(geometry)
    array = np.zeros(geometry.shape, dtype=np.uint8)
    for label, (centre, radius) in BALLS_MM.items():
        array[np.linalg.norm(xyz - np.array(centre), axis=-1) <= radius] = label
    return Volume(array[None], geometry, "label")


def noise(geometry: Geometry, *, seed: int = 0, channels: int = 1, unit: Unit = "arbitrary") -> Volume:
    """Volume in which every voxel differs from its neighbours, for checks of bits."""
    rng = np.random.default_rng(seed)
    if unit == "label":
        return Volume(rng.integers(0, 5, (channels, *geometry.shape)).astype(np.uint8), geometry, unit)
    return Volume(rng.normal(size=(channels, *geometry.shape)).astype(np.float32), geometry, unit)


def centroid_mm(volume: Volume, label: int) -> np.ndarray:
    """World centroid of a label, in mm."""
    return voxel_positions_mm(volume.geometry)[volume.array[0] == label].mean(axis=0)


@st.composite
def grids(
    draw: st.DrawFn, *, max_size: int = 9, max_angle_deg: float = 33.0, sheared: bool = False, far: bool = True
) -> Geometry:
    """Grids of all 48 axis orders and flips, oblique, anisotropic, one slice thick, far away, on demand sheared."""
    size = st.integers(1, max_size)
    axis = draw(st.tuples(*(st.floats(-1, 1).map(lambda v: round(v, 3)) for _ in range(3))))
    origin = st.sampled_from((0.0, -500.0, 123.456, *([1.9e6] if far else [])))
    return grid(
        draw(st.tuples(size, size, size)),
        spacing_mm=draw(st.sampled_from(SPACINGS_MM)),
        orientation=draw(st.sampled_from(ORIENTATIONS)),
        axis=axis if np.linalg.norm(axis) > 0.1 else (1.0, 2.0, 3.0),
        angle_deg=draw(st.sampled_from((0.0, 5.0, 20.0, 33.0, 45.0)).filter(lambda angle: angle <= max_angle_deg)),
        shear=draw(st.sampled_from((1e-5, 1e-3, 0.05, 0.3))) if sheared else 0.0,
        centre_mm=draw(st.tuples(origin, origin, origin)),
    )


def damaged(data: bytes, *, seed: int, count: int = 150) -> Iterator[bytes]:
    """Copies with four random bytes changed, three in ten of them cut short as well."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        raw = bytearray(data)
        for position in draw.integers(0, len(raw), 4):
            raw[position] = draw.integers(0, 256)
        yield bytes(raw[: draw.integers(100, len(raw))] if draw.random() < 0.3 else raw)
