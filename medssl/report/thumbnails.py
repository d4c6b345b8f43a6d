"""A small picture of a volume in three planes, in true proportions, with the patient's left marked."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from medssl.volume import Volume, reoriented_view

_PLANES = (2, 1, 0)  # axial, coronal, sagittal: the world axis that each cuts across
_LEFT_EDGE = {2: "L", 1: "L", 0: "P"}
_UPWARDS = "AS"
_GAP = 3
_SMALLEST = 2
_BODY_HU = -400.0
_HU_WINDOW = (-1000.0, 500.0)
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0))
_OPACITY = 0.55


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
    is_flat = volume.array.shape[3] == 1
    shown = volume if is_flat else reoriented_view(volume)
    voxels, spacing = shown.array, shown.geometry.spacing_mm
    marks = None if label is None else _numbers((label if is_flat else reoriented_view(label)).array)
    where = _places(marks, voxels.shape[1:])
    cuts = {plane: _cut(voxels, plane, where[plane]) for plane in ((2,) if is_flat else _PLANES)}
    low, high = _window(np.concatenate([cut.reshape(len(cut), -1) for cut in cuts.values()], axis=1), volume.unit)
    scale = size / max(n * mm for n, mm in zip(voxels.shape[1:], spacing, strict=True) if n > 1 or not is_flat)
    panels = []
    for plane, cut in cuts.items():
        across, up = (axis for axis in range(3) if axis != plane)
        pixels = [max(_SMALLEST, round(voxels.shape[1 + axis] * spacing[axis] * scale)) for axis in (across, up)]
        picture = _grey_or_colour(cut, low, high).resize((pixels[0], pixels[1]), Image.Resampling.BILINEAR)
        if marks is not None:
            picture = _overlaid(picture, np.take(marks, where[plane], axis=plane))
        if not is_flat or volume.geometry.orientation[1] in _UPWARDS:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        panels.append(_framed(picture, size, "" if is_flat else _LEFT_EDGE[plane]))
    return _png(panels)


def _numbers(label: Shaped[np.ndarray, "c x y z"]) -> Shaped[np.ndarray, "x y z"]:
    """One number a voxel; of several binary channels the highest that is set."""
    if len(label) == 1:
        only: np.ndarray = label[0]
        return only
    numbers = np.zeros(label.shape[1:], dtype=np.uint16)
    for index, channel in enumerate(label):
        numbers[channel > 0] = index + 1
    return numbers


def _places(marks: Shaped[np.ndarray, "x y z"] | None, shape: tuple[int, ...]) -> list[int]:
    """Which slice to draw along each axis: the one with most of the label, else the middle."""
    middle = [n // 2 for n in shape]
    if marks is None or not marks.any():
        return middle
    is_set = marks > 0
    others = ((1, 2), (0, 2), (0, 1))
    return [int(np.count_nonzero(is_set, axis=pair).argmax()) for pair in others]


def _cut(voxels: Shaped[np.ndarray, "c x y z"], plane: int, place: int) -> Shaped[np.ndarray, "k a b"]:
    """One plane of three channels, or of the first; colours are 8 bits by the readers' rule."""
    is_colour = len(voxels) == 3 and voxels.dtype == np.uint8
    cut: np.ndarray = np.take(voxels if is_colour else voxels[:1], place, axis=plane + 1)
    return cut


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


def _grey_or_colour(cut: Shaped[np.ndarray, "k a b"], low: float, high: float) -> Image.Image:
    share = np.clip((cut.astype(np.float32) - low) / (high - low), 0.0, 1.0)
    levels: UInt8[np.ndarray, "k a b"] = np.round(share * 255).astype(np.uint8)
    if len(levels) == 1:
        return Image.fromarray(np.ascontiguousarray(levels[0].T))
    return Image.fromarray(np.ascontiguousarray(levels.transpose(2, 1, 0)))


def _overlaid(picture: Image.Image, marks: Shaped[np.ndarray, "a b"]) -> Image.Image:
    """The label's colours over the picture; neighbours keep their own colour, so nothing is interpolated."""
    rows = np.ascontiguousarray(marks.T)
    colours = np.zeros((*rows.shape, 3), dtype=np.uint8)
    for value in np.unique(rows[rows > 0]).tolist():
        colours[rows == value] = _COLOURS[(int(value) - 1) % len(_COLOURS)]
    alpha = Image.fromarray(np.where(rows > 0, round(255 * _OPACITY), 0).astype(np.uint8))
    paint = Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST)
    result = picture.convert("RGB")
    result.paste(paint, mask=alpha.resize(picture.size, Image.Resampling.NEAREST))
    return result


def _framed(picture: Image.Image, size: int, left: str) -> Image.Image:
    """The picture in the middle of a black panel of full height, with a letter at its left edge."""
    panel = Image.new(picture.mode, (max(picture.width, size // 2), size))
    panel.paste(picture, ((panel.width - picture.width) // 2, (size - picture.height) // 2))
    if left:
        font = ImageFont.load_default(size=max(9, size // 10))
        bright = 255 if panel.mode == "L" else (255, 255, 255)
        dark = 0 if panel.mode == "L" else (0, 0, 0)
        draw = ImageDraw.Draw(panel)
        draw.text((3, size // 2), left, fill=bright, font=font, anchor="lm", stroke_width=1, stroke_fill=dark)
    return panel


def _png(panels: list[Image.Image]) -> bytes:
    mode = "RGB" if any(panel.mode == "RGB" for panel in panels) else "L"
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    sheet = Image.new(mode, (width, panels[0].height), 60 if mode == "L" else (60, 60, 60))
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
