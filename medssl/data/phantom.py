"""Generated MR-like bodies, for the demo and for tests: small, oblique, left and right told apart, never a patient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from scipy import ndimage

from medssl.geometry import Geometry
from medssl.io import write_volume
from medssl.runfolder import atomic_write
from medssl.volume import Volume

# RAS millimetres relative to the body's half axes: centre, half axes, brightness, label value
_ORGANS: tuple[tuple[tuple[float, float, float], tuple[float, float, float], float, int], ...] = (
    ((0.0, -0.62, 0.0), (0.16, 0.16, 2.0), 1.5, 0),  # a column at the back, through all slices
    ((0.42, 0.18, 0.25), (0.36, 0.40, 0.36), 1.30, 1),  # a large organ at the right, high
    ((-0.45, 0.05, -0.20), (0.26, 0.30, 0.34), 0.72, 2),  # a smaller and darker one at the left, low
    ((0.05, 0.45, -0.50), (0.22, 0.20, 0.22), 1.65, 0),  # a bright one at the front, low
)
_REGIMES = ("uint8", "thousands", "millions")
_SUPPORT = (0.80, 0.72, 0.85)  # half axes of the body as a share of half the field of view; it leaves at both ends


def write_phantoms(
    folder: Path,
    *,
    num_subjects: int,
    num_labelled: int,
    seed: int = 0,
    shape: Sequence[int] = (40, 48, 40),
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.5),
) -> Path:
    """Write a folder in the layout of the decathlon: labelled subjects in imagesTr and labelsTr, the rest in imagesTs.

    Every subject is an ellipsoid body with two labelled organs (1 large, right; 2 small, left) and two unlabelled
    landmarks at places of its own, under a bias field and noise. Grids are oblique by up to 12 degrees, every second
    one is flipped, and voxel values come in three regimes: uint8, up to thousands, up to a million.

    Args:
        folder: Made if it is not there.
        num_subjects: One scan each.
        num_labelled: The first so many subjects have a label map.
        seed: The same seed writes the same files.
        shape: Voxels along each axis.
        spacing_mm: Voxel size along each axis.

    Returns:
        ``folder``.
    """
    pairs = []
    for index in range(num_subjects):
        rng = np.random.default_rng([seed, index])
        geometry = _geometry(rng, shape, spacing_mm, flipped=index % 2 == 1)
        image, label = _subject(rng, geometry, np.multiply(shape, spacing_mm) / 2)
        name = f"phantom_{index:03d}.nii.gz"
        labelled = index < num_labelled
        where = "imagesTr" if labelled else "imagesTs"
        regime = _REGIMES[index % len(_REGIMES)]
        write_volume(Volume(_stored(image, regime, rng)[None], geometry, "arbitrary"), folder / where / name)
        if labelled:
            write_volume(Volume(label[None], geometry, "label"), folder / "labelsTr" / name)
            pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    index_file = {
        "name": "Phantom",
        "description": "Generated bodies with two organs",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "right organ", "2": "left organ"},
        "numTraining": num_labelled,
        "numTest": num_subjects - num_labelled,
        "training": pairs,
        "test": [f"./imagesTs/phantom_{index:03d}.nii.gz" for index in range(num_labelled, num_subjects)],
    }
    atomic_write(folder / "dataset.json", json.dumps(index_file, indent=1))
    return folder


def _geometry(
    rng: np.random.Generator, shape: Sequence[int], spacing_mm: Sequence[float], *, flipped: bool
) -> Geometry:
    """A grid around the world's origin, turned by up to 12 degrees, in the frame LPS where it is flipped."""
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = np.radians(rng.uniform(-12, 12))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    columns = rotation * np.asarray(spacing_mm)
    if flipped:
        columns = columns * [-1, -1, 1]
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = -columns @ ((np.asarray(shape) - 1) / 2) + rng.uniform(-2, 2, size=3)
    return Geometry((shape[0], shape[1], shape[2]), affine)


def _subject(
    rng: np.random.Generator, geometry: Geometry, half_mm: Float64[np.ndarray, " 3"]
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """Brightness in about [0, 2], and the label map; drawn in world millimetres, so that any grid may look at it."""
    points = geometry.to_world(np.moveaxis(np.indices(geometry.shape), 0, -1))
    body = half_mm * _SUPPORT * rng.uniform(0.92, 1.08, size=3)
    inside = _inside(points, np.zeros(3), body * [1, 1, 1.6])
    image = np.where(inside, 1.0, 0.03)
    label = np.zeros(geometry.shape, np.uint8)
    for centre, size, brightness, value in _ORGANS:
        place = (np.asarray(centre) + rng.normal(0, 0.04, size=3)) * body
        organ = inside & _inside(points, place, np.asarray(size) * body * rng.uniform(0.88, 1.12, size=3))
        image[organ] = brightness * rng.uniform(0.95, 1.05)
        label[organ] = value
    texture = ndimage.gaussian_filter(rng.normal(size=geometry.shape), 2.0)
    image = image * (1 + 0.06 * texture / texture.std() * inside)
    slope = rng.normal(0, 0.12, size=3)
    bias = np.exp((points / half_mm) @ slope)
    noisy = ndimage.gaussian_filter(image * bias, 0.5) + rng.normal(0, 0.03, size=geometry.shape)
    return np.abs(noisy).astype(np.float32), label


def _inside(
    points: Float64[np.ndarray, "x y z 3"], centre: Float64[np.ndarray, " 3"], half: Float64[np.ndarray, " 3"]
) -> np.ndarray:
    scaled = (points - centre) / half
    within: np.ndarray = np.einsum("...i,...i->...", scaled, scaled) <= 1
    return within


def _stored(
    image: Float32[np.ndarray, "x y z"], regime: str, rng: np.random.Generator
) -> UInt8[np.ndarray, "x y z"] | Float32[np.ndarray, "x y z"]:
    if regime == "uint8":
        return np.clip(np.rint(image * rng.uniform(70, 110)), 0, 255).astype(np.uint8)
    gain = rng.uniform(400, 1500) if regime == "thousands" else rng.uniform(2e5, 8e5)
    return (image * gain).astype(np.float32)
