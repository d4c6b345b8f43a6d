"""A small picture of a volume in three planes, in true proportions, with the patient's left marked."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from medssl.report.planes import Kind, Plates, most_of
from medssl.volume import Volume

_BODY_HU = -400.0
_HU_WINDOW = (-1000.0, 500.0)


def render(volume: Volume, label: Volume | None = None, *, size: int = 128) -> bytes:
    """Draw the axial, coronal and sagittal plane side by side; of a 2D image the picture as it is stored.

    World axes are those of RAS+: x grows to the right and so the patient's left is on the left, marked with an L
    (P marks the back). All planes share one scale in mm. A 2D image has its columns from left to right as stored. With
    a label, each plane is the one that shows most of it.

    Args:
        volume: Image; one channel is grey, three are colours, of others the first is drawn.
        label: Label map on the same grid, or several binary channels; drawn over it in colour.
        size: Height of a plane in pixels, and its greatest width.

    Returns:
        PNG without any text chunk.
    """
    voxels = volume.array
    is_flat = voxels.shape[3] == 1
    is_colour = len(voxels) == 3 and voxels.dtype == np.uint8  # colours are 8 bits by the readers' rule
    voxels = voxels if is_colour else voxels[:1]
    marks = None if label is None else _numbers(label.array)
    places = (None if marks is None else most_of(marks)) or tuple(n // 2 for n in voxels.shape[1:])
    cuts = [np.take(voxels, [places[axis]], axis=axis + 1) for axis in range(3)]
    shown = cuts[2:] if is_flat else cuts
    window = _window(np.concatenate([cut.reshape(len(cut), -1) for cut in shown], axis=1), volume.unit)
    kind: Kind = "picture" if is_flat else "volume"
    x, y, z = places
    plates = Plates(volume.geometry, window, kind=kind, size=size, places=(x, y, z), is_colour=is_colour)
    return plates.draw(cuts, label=marks)


def _numbers(label: Shaped[np.ndarray, "c x y z"]) -> Shaped[np.ndarray, "x y z"]:
    """One number a voxel; of several binary channels the highest that is set."""
    if len(label) == 1:
        only: np.ndarray = label[0]
        return only
    numbers = np.zeros(label.shape[1:], dtype=np.uint16)
    for index, channel in enumerate(label):
        numbers[channel > 0] = index + 1
    return numbers


def _window(values: Shaped[np.ndarray, "k n"], unit: str) -> tuple[float, float]:
    """Values that become black and white."""
    if len(values) == 3:
        return 0.0, 255.0
    shown = values.astype(np.float32).ravel()
    if unit == "HU":
        shown = np.clip(shown, *_HU_WINDOW)
        body = shown[shown > _BODY_HU]
        shown = body if len(body) > len(shown) // 20 else shown
    low, high = (float(value) for value in np.percentile(shown, (1.0, 99.5)))
    return low, high if high > low else low + 1.0
