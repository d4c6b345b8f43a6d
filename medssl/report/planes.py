"""Planes of a volume as they are read: front and head up, true proportions, the side marked by a letter.

World axes are those of RAS+: x grows to the right and so the patient's left is on the left of the screen.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from medssl.geometry import Geometry

Kind = Literal["volume", "slice", "picture"]
Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0),
)  # fmt: skip
"""Of label values and of frames; told apart by the colour-blind (Okabe and Ito)."""

_PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # across, up and away
_LOW_ENDS, _HIGH_ENDS = "LPI", "RAS"
_GAP = 3
_SMALLEST = 2
_OPACITY = 0.55
_VEIL = 0.15
_LINE = 2
_MIDDLE_GREY = 128
_BETWEEN = 60


class Frame(NamedTuple):
    """A box to be drawn over a plane, as it is seen from the front of the plane.

    Args:
        low: Corner in voxels; voxel ``i`` reaches from ``i - 0.5`` to ``i + 0.5``.
        high: The opposite corner.
        colour: Of its outline.
        line: Breadth of the outline in pixels.
    """

    low: Sequence[float]
    high: Sequence[float]
    colour: Colour
    line: int = _LINE


class _Panel(NamedTuple):
    """The array axes that run to the right, upwards and away, and whether the first two run the other way."""

    across: int
    up: int
    normal: int
    is_mirrored: bool
    is_downwards: bool


@dataclass(frozen=True)
class Plates:
    """How arrays of one grid are drawn: a volume in three planes, a slice of one, or a picture as it is stored.

    Args:
        geometry: The grid.
        window: Values that become black and white.
        kind: ``volume`` is drawn in its axial, coronal and sagittal plane; ``slice`` is one voxel thick, and its first
            axis is drawn from left to right; ``picture`` has no anatomy that is known, and so no letter.
        size: Height of a plane in pixels, and its greatest width.
        places: Which voxel is cut along each array axis; the middle by default.
        is_colour: Whether three channels are red, green and blue; channels are drawn below each other otherwise.
        is_outlined: Whether labels are drawn as outlines, so that what lies below can be judged.
        planes: Which planes of a volume are drawn: 0 axial, 1 coronal, 2 sagittal.
    """

    geometry: Geometry
    window: tuple[float, float]
    kind: Kind = "volume"
    size: int = 128
    places: tuple[int, int, int] | None = None
    is_colour: bool = False
    is_outlined: bool = False
    planes: tuple[int, ...] = (0, 1, 2)

    def showing_most(self, change: Shaped[np.ndarray, "c x y z"]) -> Plates:
        """The same with one plane only, that in which most changes."""
        sizes = [float(np.abs(self._cut(change, panel)).mean()) for panel in self._panels()]
        return replace(self, planes=(self.planes[int(np.argmax(sizes))],)) if self.kind == "volume" else self

    def draw(
        self,
        voxels: Shaped[np.ndarray, "c x y z"] | Sequence[Shaped[np.ndarray, "c i j k"]],
        *,
        label: Shaped[np.ndarray, "x y z"] | None = None,
        frames: Sequence[Frame] = (),
        affine: Float64[np.ndarray, "4 4"] | None = None,
        border: Colour | None = None,
    ) -> bytes:
        """Draw an array.

        Args:
            voxels: The array, or for each of its axes the slice that is cut across it.
            label: Drawn over it in colour, nearest voxel.
            frames: Boxes.
            affine: Voxel index to world where the content was moved, so that letters follow it.
            border: Colour of a line around the whole.

        Returns:
            PNG without any text chunk.
        """
        low, high = self.window
        rows: list[list[Image.Image]] = []
        for panel in self._panels():
            cut = self._cut(voxels, panel)
            share = np.clip((cut.astype(np.float32) - low) / (high - low), 0.0, 1.0)
            levels = np.round(share * 255).astype(np.uint8)
            parts = [levels] if self.is_colour else [levels[[number]] for number in range(len(levels))]
            rows += [[] for _ in parts[len(rows) :]]
            for row, part in zip(rows, parts, strict=True):
                picture = self._picture(part, panel)
                if label is not None:
                    picture = self._overlaid(picture, self._cut(label[None], panel)[0], panel)
                if frames:
                    picture = self._with_frames(picture, frames, panel)
                row.append(self._framed(picture, self._letter(panel, affine)))
        return _png(rows, border)

    def draw_difference(self, change: Shaped[np.ndarray, "c x y z"], *, factor: float) -> bytes:
        """Draw a change, mean of its channels, as grey where there is none, brighter where it adds.

        Args:
            change: In units of the window's width.
            factor: By which it is enlarged.
        """
        pictures = []
        for panel in self._panels():
            cut = self._cut(change, panel).mean(axis=0, keepdims=True)
            levels = np.clip(_MIDDLE_GREY + factor * cut * _MIDDLE_GREY, 0, 255).round().astype(np.uint8)
            pictures.append(self._framed(self._picture(levels, panel), self._letter(panel, None)))
        return _png([pictures], None)

    def _panels(self) -> list[_Panel]:
        letters = self.geometry.orientation
        if self.kind == "picture":
            return [_Panel(0, 1, 2, False, letters[1] not in "AS")]
        if self.kind == "slice":
            return [_Panel(0, 1, 2, letters[0] in _LOW_ENDS, letters[1] in _LOW_ENDS)]
        axes = [next(i for i, letter in enumerate(letters) if letter in pair) for pair in ("RL", "AP", "SI")]
        is_turned = [letters[axis] in _LOW_ENDS for axis in axes]
        return [
            _Panel(axes[across], axes[up], axes[normal], is_turned[across], is_turned[up])
            for across, up, normal in (_PLANES[plane] for plane in self.planes)
        ]

    def _cut(
        self, voxels: Shaped[np.ndarray, "c x y z"] | Sequence[Shaped[np.ndarray, "c i j k"]], panel: _Panel
    ) -> Shaped[np.ndarray, "k a b"]:
        """What a panel shows, to the right and then upwards."""
        if isinstance(voxels, np.ndarray):
            places = self.places or tuple(n // 2 for n in self.geometry.shape)
            cut = np.take(voxels, places[panel.normal], axis=panel.normal + 1)
        else:
            cut = np.take(voxels[panel.normal], 0, axis=panel.normal + 1)
        cut = cut if panel.across < panel.up else cut.swapaxes(1, 2)
        cut = cut[:, ::-1] if panel.is_mirrored else cut
        turned: np.ndarray = cut[:, :, ::-1] if panel.is_downwards else cut
        return turned

    def _pixels(self, panel: _Panel) -> tuple[int, int]:
        """Columns and rows of a panel."""
        axes = (0, 1) if self.kind != "volume" else (0, 1, 2)
        shape, spacing = self.geometry.shape, self.geometry.spacing_mm
        scale = self.size / max(shape[axis] * spacing[axis] for axis in axes)
        columns, rows = (max(_SMALLEST, round(shape[a] * spacing[a] * scale)) for a in (panel.across, panel.up))
        return columns, rows

    def _picture(self, levels: UInt8[np.ndarray, "k a b"], panel: _Panel) -> Image.Image:
        rows = levels.transpose(2, 1, 0)[::-1]
        picture = Image.fromarray(np.ascontiguousarray(rows if rows.shape[2] == 3 else rows[..., 0]))
        return picture.resize(self._pixels(panel), Image.Resampling.BILINEAR)

    def _overlaid(self, picture: Image.Image, marks: Shaped[np.ndarray, "a b"], panel: _Panel) -> Image.Image:
        """The label's colours over the picture; neighbours keep their own colour, so nothing is interpolated."""
        numbers = (marks.astype(np.int64) - 1) % len(COLOURS) + 1
        kinds = np.where(marks > 0, numbers, 0).astype(np.uint8)
        enlarged = Image.fromarray(np.ascontiguousarray(kinds.T[::-1]))
        rows = np.asarray(enlarged.resize(self._pixels(panel), Image.Resampling.NEAREST))
        share = np.where(rows > 0, _VEIL if self.is_outlined else _OPACITY, 0.0)
        if self.is_outlined:
            share[(rows > 0) & _is_edge(rows)] = 1.0
        paint = Image.fromarray(np.array([(0, 0, 0), *COLOURS], dtype=np.uint8)[rows])
        result = picture.convert("RGB")
        result.paste(paint, mask=Image.fromarray(np.round(share * 255).astype(np.uint8)))
        return result

    def _with_frames(self, picture: Image.Image, frames: Sequence[Frame], panel: _Panel) -> Image.Image:
        result = picture.convert("RGB")
        draw = ImageDraw.Draw(result)
        for frame in frames:
            left, right = self._edges(frame, panel.across, panel.is_mirrored, result.width)
            low, high = self._edges(frame, panel.up, panel.is_downwards, result.height)
            top, bottom = result.height - 1 - high, result.height - 1 - low
            for inset in range(min(frame.line, (right - left + 2) // 2, (bottom - top + 2) // 2)):
                inner = (left + inset, top + inset, right - inset, bottom - inset)
                draw.rectangle(inner, outline=frame.colour)
        return result

    def _edges(self, frame: Frame, axis: int, is_turned: bool, pixels: int) -> tuple[int, int]:
        """First and last pixel of a frame along an axis; a line stays two pixels wide."""
        first, last = ((corner[axis] + 0.5) / self.geometry.shape[axis] for corner in (frame.low, frame.high))
        first, last = (1 - last, 1 - first) if is_turned else (first, last)
        start = min(max(0, round(first * pixels)), pixels - 2)
        return start, max(start + 1, min(round(last * pixels), pixels) - 1)

    def _letter(self, panel: _Panel, affine: Float64[np.ndarray, "4 4"] | None) -> str:
        """What lies at the left edge of a panel."""
        if self.kind == "picture":
            return ""
        matrix = self.geometry.affine if affine is None else affine
        direction = matrix[:3, panel.across] * (-1 if panel.is_mirrored else 1)
        world = int(np.argmax(np.abs(direction)))
        return (_LOW_ENDS if direction[world] > 0 else _HIGH_ENDS)[world]

    def _framed(self, picture: Image.Image, letter: str) -> Image.Image:
        """The picture in the middle of a black panel of full height, with a letter at its left edge."""
        panel = Image.new(picture.mode, (max(picture.width, self.size // 2), self.size))
        panel.paste(picture, ((panel.width - picture.width) // 2, (self.size - picture.height) // 2))
        if letter:
            font = ImageFont.load_default(size=max(9, self.size // 10))
            bright = 255 if panel.mode == "L" else (255, 255, 255)
            dark = 0 if panel.mode == "L" else (0, 0, 0)
            draw = ImageDraw.Draw(panel)
            place = (3, self.size // 2)
            draw.text(place, letter, fill=bright, font=font, anchor="lm", stroke_width=1, stroke_fill=dark)
        return panel


def most_of(label: Shaped[np.ndarray, "x y z"]) -> tuple[int, int, int] | None:
    """Along each axis the slice that shows most of a label; None without one."""
    if not label.any():
        return None
    is_set = label > 0
    x, y, z = (int(np.count_nonzero(is_set, axis=pair).argmax()) for pair in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def _is_edge(rows: UInt8[np.ndarray, "a b"]) -> Bool[np.ndarray, "a b"]:
    """Pixels with a neighbour of another value."""
    edge = np.zeros(rows.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(rows.astype(np.int16), axis=axis) != 0
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= differs
        edge[tuple(after)] |= differs
    return edge


def _png(rows: list[list[Image.Image]], border: Colour | None) -> bytes:
    mode = "RGB" if border is not None or any(panel.mode == "RGB" for row in rows for panel in row) else "L"
    width = sum(panel.width for panel in rows[0]) + _GAP * (len(rows[0]) - 1)
    height = rows[0][0].height
    size = (width, (height + _GAP) * len(rows) - _GAP)
    sheet = Image.new(mode, size, _BETWEEN if mode == "L" else (_BETWEEN,) * 3)
    for number, row in enumerate(rows):
        left = 0
        for panel in row:
            sheet.paste(panel, (left, number * (height + _GAP)))
            left += panel.width + _GAP
    if border is not None:
        ImageDraw.Draw(sheet).rectangle((0, 0, sheet.width - 1, sheet.height - 1), outline=border, width=3)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
