"""Cases in memory for the view samplers, and the check that a crop lies where its affine says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from phantoms import rotation
from scipy import ndimage

from medssl.views import BODY

FILL = -7


@dataclass(frozen=True)
class ArrayCase:
    """A case in memory; voxels outside it read as -7 (image, but for uint8) or 0."""

    arrays: dict[str, np.ndarray]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    case_id: str = "case_1"
    voxels: dict[int, np.ndarray] = field(default_factory=dict)
    oblique: np.ndarray | None = None
    is_metric: bool = True
    atlas_affine: np.ndarray | None = None
    reads: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.arrays["image"].shape[1:]

    @property
    def channels(self) -> int:
        return len(self.arrays["image"])

    @property
    def fill(self) -> float:
        return float(FILL)

    @property
    def affine(self) -> np.ndarray:
        return np.diag([*self.spacing_mm, 1.0]) if self.oblique is None else self.oblique

    @property
    def body_box(self) -> np.ndarray:
        found = np.argwhere(self.arrays["body"][0]) if "body" in self.arrays else np.empty((0, 3))
        if not len(found):
            return np.array([(0, 0, 0), self.shape], float)
        return np.stack([found.min(axis=0), np.ptp(found, axis=0) + 1]).astype(float)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        self.reads.append((name, tuple(start), tuple(shape)))
        source = self.arrays[name]
        fill = FILL if name == "image" and source.dtype != np.uint8 else 0
        out = np.full((len(source), *shape), fill, source.dtype)
        low = np.maximum(start, 0)
        high = np.minimum(np.add(start, shape), self.shape)
        if (low < high).all():
            inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            place = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            out[(slice(None), *place)] = source[(slice(None), *inside)]
        return out

    def foreground_voxels(self, value: int) -> np.ndarray:
        if value in self.voxels:
            return self.voxels[value]
        mask = self.arrays["body"][0] > 0 if value == BODY else self.arrays["label"][0] == value
        return np.argwhere(mask).astype(np.int32)


def indices(shape: Sequence[int]) -> np.ndarray:
    """Index of every voxel, (3, X, Y, Z)."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))


def coordinate_case(shape=(12, 10, 8), spacing_mm=(1.0, 1.0, 1.0), **arrays) -> ArrayCase:
    """An image whose value says which voxel it is: 10000 x + 100 y + z."""
    x, y, z = indices(shape)
    image = (10000 * x + 100 * y + z).astype(np.float32)[None]
    return ArrayCase({"image": image, **arrays}, spacing_mm)


def oblique_affine(spacing_mm: Sequence[float], axis: Sequence[float], angle_deg: float) -> np.ndarray:
    """Voxel index to world mm of a turned grid with its first voxel away from the origin."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(np.array(axis), angle_deg) @ np.diag(spacing_mm)
    affine[:3, 3] = (-31.0, 12.5, 70.0)
    return affine


def world_case(
    shape: Sequence[int] = (20, 17, 14), spacing_mm=(0.8, 1.1, 2.7), axis=(1.0, 2.0, 3.0), angle_deg: float = 25.0
) -> ArrayCase:
    """Every voxel is a landmark: its three channels are its world position in mm, on a turned anisotropic grid."""
    affine = oblique_affine(spacing_mm, axis, angle_deg)
    world = np.einsum("wa,axyz->wxyz", affine[:3, :3], indices(shape)) + affine[:3, 3, None, None, None]
    return ArrayCase({"image": world.astype(np.float32)}, tuple(spacing_mm), oblique=affine)


world_cases = st.builds(
    world_case,
    shape=st.tuples(*[st.integers(5, 18)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.4, 5.0)] * 3),
    axis=st.tuples(*[st.floats(0.1, 1.0)] * 3),
    angle_deg=st.floats(-40.0, 40.0),
)


def sampled(box: np.ndarray, to_box: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The crop that ``to_box`` reads out of ``box``, linearly, by scipy."""
    places = np.einsum("ba,axyz->bxyz", to_box[:3, :3], indices(shape)) + to_box[:3, 3, None, None, None]
    return np.stack(
        [ndimage.map_coordinates(channel.astype(float), places, order=1, mode="nearest") for channel in box]
    )


def landmark_error(
    case: ArrayCase, box: np.ndarray, to_box: np.ndarray, affine: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """How many voxels of the crop a landmark of a :func:`world_case` is off what ``affine`` says, away from filling."""
    found = sampled(box, to_box, shape)
    said = np.einsum("wa,axyz->wxyz", affine[:3, :3], indices(shape)) + affine[:3, 3, None, None, None]
    to_case = np.linalg.inv(case.affine) @ affine
    places = np.einsum("wa,axyz->wxyz", to_case[:3, :3], indices(shape)) + to_case[:3, 3, None, None, None]
    step = np.abs(to_case[:3, :3]).max(axis=1)[:, None, None, None]
    reach = np.where(step < 2, 1, 1.5 * step)  # an averaged voxel is half a step wide, and its neighbour counts too
    last = np.array(case.shape)[:, None, None, None] - 1
    is_inside = ((places >= reach) & (places <= last - reach)).all(axis=0)
    off = np.einsum("aw,wxyz->axyz", np.linalg.inv(affine[:3, :3]), found - said)
    return np.linalg.norm(off, axis=0)[is_inside]
