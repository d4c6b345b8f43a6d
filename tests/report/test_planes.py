"""Planes: what is at the left edge, where frames lie, and what is drawn over the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from phantoms import ORIENTATIONS, grid
from PIL import Image, ImageDraw, ImageFont

from medssl.geometry import Geometry
from medssl.report.planes import COLOURS, Frame, Plates, most_of

SIZE = 100


def picture(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.text == {}
        return np.asarray(image.convert("RGB")).astype(int)


def panels(image: np.ndarray) -> list[np.ndarray]:
    return [image[:, left : left + SIZE] for left in range(0, image.shape[1], SIZE + 3)]


def letter(text: str) -> np.ndarray:
    panel = Image.new("L", (SIZE, SIZE))
    font = ImageFont.load_default(size=10)
    ImageDraw.Draw(panel).text((3, SIZE // 2), text, 255, font=font, anchor="lm", stroke_width=1, stroke_fill=0)
    return np.asarray(panel)


def black(geometry: Geometry, **options: object) -> tuple[Plates, np.ndarray]:
    return Plates(geometry, (0.0, 1.0), size=SIZE, **options), np.zeros((1, *geometry.shape), np.float32)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_the_letter_is_what_lies_at_the_left_edge(orientation: str) -> None:
    plates, zeros = black(grid((20, 20, 20), orientation=orientation))
    found = panels(picture(plates.draw(zeros)))
    for panel, text in zip(found, "LLP", strict=True):
        assert np.array_equal(panel[..., 0], letter(text))


@pytest.mark.parametrize(("axis", "letters"), [(0, "RRP"), (1, "LLA"), (2, "LLP")])
def test_the_letter_follows_content_that_was_mirrored(axis: int, letters: str) -> None:
    geometry = grid((20, 20, 20))
    mirror = np.eye(4)
    mirror[axis, axis], mirror[axis, 3] = -1.0, 19.0
    plates, zeros = black(geometry)
    found = panels(picture(plates.draw(zeros, affine=geometry.affine @ mirror)))
    for panel, text in zip(found, letters, strict=True):
        assert np.array_equal(panel[..., 0], letter(text))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SRA", "PIL"])
def test_a_frame_lies_where_its_box_lies(orientation: str) -> None:
    geometry = grid((20, 20, 20), orientation=orientation)
    low_mm, high_mm = np.array([-6.0, -2.0, 1.0]), np.array([3.0, 8.0, 5.0])  # faces in world mm, the middle is 0
    ends = np.stack([geometry.to_index(low_mm), geometry.to_index(high_mm)])
    frame = Frame(ends.min(axis=0), ends.max(axis=0), COLOURS[0])
    plates, zeros = black(geometry)
    for panel, (across, up) in zip(
        panels(picture(plates.draw(zeros, frames=[frame]))), ((0, 1), (0, 2), (1, 2)), strict=True
    ):
        rows, columns = np.nonzero((panel == COLOURS[0]).all(axis=-1))
        assert (columns.min(), columns.max() + 1) == (50 + 5 * low_mm[across], 50 + 5 * high_mm[across])
        assert (rows.min(), rows.max() + 1) == (50 - 5 * high_mm[up], 50 - 5 * low_mm[up])


def test_a_flat_frame_is_a_line_and_one_beyond_the_volume_ends_at_its_edge() -> None:
    plates, zeros = black(grid((20, 20, 20)))
    frame = Frame((-9.0, 4.5, -3.0), (40.0, 4.6, 12.0), COLOURS[2])
    axial, _, sagittal = panels(picture(plates.draw(zeros, frames=[frame])))
    rows, columns = np.nonzero((axial == COLOURS[2]).all(axis=-1))
    assert (columns.min(), columns.max()) == (0, 99)
    assert rows.max() - rows.min() == 1
    rows, columns = np.nonzero((sagittal == COLOURS[2]).all(axis=-1))
    assert columns.max() - columns.min() == 1
    assert rows.max() == 99


@pytest.mark.parametrize(("orientation", "place"), [("RAS", (75, 25)), ("LAS", (25, 25)), ("RPS", (75, 75))])
def test_a_slice_has_its_first_axis_to_the_right_and_its_second_up(orientation: str, place: tuple[int, int]) -> None:
    geometry = grid((2, 2, 1), orientation=orientation)
    voxels = np.zeros((1, 2, 2, 1), np.float32)
    voxels[0, 1, 1, 0] = 1.0
    shown = picture(Plates(geometry, (0.0, 1.0), kind="slice", size=SIZE).draw(voxels))[..., 0]
    assert [shown[y, x] > 200 for x, y in ((25, 25), (75, 25), (25, 75), (75, 75))] == [
        place == corner for corner in ((25, 25), (75, 25), (25, 75), (75, 75))
    ]


def test_the_slices_of_each_axis_do_for_the_volume() -> None:
    geometry = grid((12, 10, 8), orientation="LSA", spacing_mm=(1.0, 2.0, 3.0))
    voxels = np.random.default_rng(0).random((1, 12, 10, 8), np.float32)
    plates = Plates(geometry, (0.0, 1.0), places=(3, 4, 5))
    slices = [voxels[:, 3:4], voxels[:, :, 4:5], voxels[..., 5:6]]
    assert plates.draw(slices) == plates.draw(voxels)


def test_channels_stand_below_each_other_and_colours_become_one_picture() -> None:
    geometry = grid((10, 10, 1), orientation="LPS")
    voxels = np.zeros((3, 10, 10, 1), np.float32)
    voxels[1] = 1.0
    grey = picture(Plates(geometry, (0.0, 1.0), kind="picture", size=SIZE).draw(voxels))
    assert grey.shape == (3 * SIZE + 2 * 3, SIZE, 3)
    assert [grey[row, 50, 0] for row in (50, 153, 256)] == [0, 255, 0]
    colour = picture(Plates(geometry, (0.0, 1.0), kind="picture", size=SIZE, is_colour=True).draw(voxels))
    assert colour.shape == (SIZE, SIZE, 3)
    assert (colour == (0, 255, 0)).all()


def test_outlines_leave_the_inside_of_a_label_to_be_seen() -> None:
    geometry = grid((20, 20, 20))
    label = np.zeros((20, 20, 20), np.uint8)
    label[4:16, 4:16, 4:16] = 2
    plates, _ = black(geometry, is_outlined=True)
    axial = panels(picture(plates.draw(np.ones((1, 20, 20, 20), np.float32), label=label)))[0]
    assert tuple(axial[20, 50]) == COLOURS[1]
    assert axial[50, 50].min() > 220
    filled = panels(picture(black(geometry)[0].draw(np.ones((1, 20, 20, 20), np.float32), label=label)))[0]
    assert filled[50, 50].min() < 200


def test_a_difference_is_grey_where_nothing_changed_and_brighter_where_something_was_added() -> None:
    change = np.zeros((2, 20, 20, 20), np.float32)
    change[:, 12:] = 0.1
    change[:, :6] = -0.3
    plates, _ = black(grid((20, 20, 20)))
    axial = panels(picture(plates.draw_difference(change, factor=2.0)))[0][80, :, 0]
    assert (axial[15], axial[45], axial[85]) == (128 - 77, 128, 128 + 26)


def test_a_border_has_its_colour() -> None:
    plates, zeros = black(grid((20, 20, 20)))
    image = picture(plates.draw(zeros, border=COLOURS[4]))
    assert all(tuple(image[place]) == COLOURS[4] for place in ((0, 0), (2, 50), (99, 305)))
    assert image[50, 50].max() == 0


def test_the_slice_with_most_of_a_label_is_chosen() -> None:
    label = np.zeros((6, 7, 8), np.uint8)
    assert most_of(label) is None
    label[2, 3, :] = 1
    label[2, :, 5] = 2
    assert most_of(label) == (2, 3, 5)


def test_one_plane_is_drawn_of_those_of_a_volume_and_it_is_the_one_with_most_change() -> None:
    plates, zeros = black(grid((20, 20, 20)))
    change = zeros.copy()
    change[0, :, 10, :] = 1.0
    coronal = plates.showing_most(-change)
    assert coronal.planes == (1,)
    drawn = picture(coronal.draw(change))
    assert np.array_equal(drawn, panels(picture(plates.draw(change)))[1])
    flat = Plates(grid((20, 20, 1)), (0.0, 1.0), kind="picture", size=SIZE)
    assert flat.showing_most(np.ones((1, 20, 20, 1), np.float32)) == flat


def test_a_frame_is_as_broad_as_it_says() -> None:
    plates, zeros = black(grid((20, 20, 20)))
    for line in (1, 2):
        frame = Frame((4.5, 4.5, 4.5), (14.5, 14.5, 14.5), COLOURS[0], line)
        axial = panels(picture(plates.draw(zeros, frames=[frame])))[0]
        assert (axial[50] == COLOURS[0]).all(axis=-1).sum() == 2 * line
