"""Thumbnails: every landmark is where its world position says, whatever the order of the array's axes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from phantoms import ORIENTATIONS, grid, voxel_positions_mm
from PIL import Image

from medssl.geometry import Geometry
from medssl.report.thumbnails import render
from medssl.volume import Volume


def picture(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert image.text == {}
        return np.asarray(image.convert("RGB")).astype(int)


def balls(geometry: Geometry, *places_mm: tuple[float, float, float], radius_mm: float = 4.0) -> np.ndarray:
    position = voxel_positions_mm(geometry)
    inside = [np.linalg.norm(position - place, axis=-1) <= radius_mm for place in places_mm]
    return np.any(inside, axis=0)


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Row and column of the middle of what is set."""
    row, column = np.argwhere(mask).mean(axis=0)
    return float(row), float(column)


def panels(image: np.ndarray) -> list[np.ndarray]:
    """The pictures between the grey lines."""
    grey = (image == 60).all(axis=(0, 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[1], grey.astype(int), [1]])))
    return [image[:, low:high] for low, high in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_right_is_right_front_is_up_and_the_head_is_up(orientation: str) -> None:
    geometry = grid((40, 40, 40), orientation=orientation)
    label = balls(geometry, (12.0, 10.0, 14.0))
    volume = Volume(np.zeros((1, 40, 40, 40), np.float32), geometry, "arbitrary")
    image = picture(render(volume, Volume(label[None].astype(np.uint8), geometry, "label"), size=120))
    three = panels(image)
    assert [panel.shape for panel in three] == [(120, 120, 3)] * 3
    expected = ((10.0, 12.0), (14.0, 12.0), (14.0, 10.0))  # (up, across) in mm: axial, coronal, sagittal
    for panel, (up, across) in zip(three, expected, strict=True):
        orange = (panel[..., 0] > 80) & (panel[..., 2] < 60)
        row, column = centre(orange)
        assert row == pytest.approx(59.5 - up * 3, abs=2)
        assert column == pytest.approx(59.5 + across * 3, abs=2)


def test_planes_have_their_true_proportions() -> None:
    geometry = grid((40, 20, 10), spacing_mm=(1.0, 1.0, 4.0))
    volume = Volume(np.full((1, 40, 20, 10), 7, np.int16), geometry, "arbitrary")
    volume.array[:, 20:] = 9
    three = panels(picture(render(volume, size=80)))
    for panel, (across, up) in zip(three, ((80, 40), (80, 80), (40, 80)), strict=True):
        bright = (panel > 100).all(axis=2)
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        assert rows[-1] - rows[0] + 1 == pytest.approx(up, abs=1)
        assert columns[-1] - columns[0] + 1 <= across
        assert panel.shape[0] == 80


def test_the_plane_with_most_of_the_label_is_shown() -> None:
    geometry = grid((30, 30, 30))
    image = np.zeros((1, 30, 30, 30), np.float32)
    label = balls(geometry, (0.0, 0.0, 10.0), radius_mm=3.0)
    image[0, 5, 5, 24] = 1.0
    shown = picture(render(Volume(image, geometry, "arbitrary"), Volume(label[None], geometry, "label"), size=60))
    assert (shown[..., 0] - shown[..., 2] > 60).sum() > 100
    empty = Volume(np.zeros_like(label[None]), geometry, "label")
    assert (np.ptp(picture(render(Volume(image, geometry, "arbitrary"), empty, size=60)), axis=2) == 0).all()


def test_overlapping_structures_get_colours_of_their_own() -> None:
    geometry = grid((20, 20, 20))
    channels = np.zeros((2, 20, 20, 20), np.uint8)
    channels[0, 2:9] = 1
    channels[1, 11:18] = 1
    image = Volume(np.zeros((1, 20, 20, 20), np.int16), geometry, "arbitrary")
    axial = panels(picture(render(image, Volume(channels, geometry, "label"), size=60)))[0]
    left, right = axial[30, 15], axial[30, 45]
    assert left[0] > left[2] + 50
    assert right[2] > right[0] + 50


def test_a_flat_picture_stays_as_it_is_stored() -> None:
    array = np.zeros((1, 30, 20, 1), np.uint8)
    array[0, 24:, 15:] = 200  # right and below
    png = render(Volume(array, Geometry((30, 20, 1), np.diag([-1.0, -1.0, 1.0, 1.0])), "arbitrary"), size=90)
    row, column = centre((picture(png) > 150).all(axis=2))
    assert row > 60
    assert column > 60
    upright = render(Volume(array, Geometry((30, 20, 1), np.eye(4)), "arbitrary"), size=90)
    assert centre((picture(upright) > 150).all(axis=2))[0] < 30


def test_colours_are_kept_and_further_channels_are_not_drawn() -> None:
    flat = Geometry((16, 16, 1), np.diag([-1.0, -1.0, 1.0, 1.0]))
    red = np.zeros((3, 16, 16, 1), np.uint8)
    red[0] = 200
    assert picture(render(Volume(red, flat, "arbitrary"), size=32))[16, 16].tolist() == [200, 0, 0]
    floats = red.astype(np.float32)
    assert np.ptp(picture(render(Volume(floats, flat, "arbitrary"), size=32)), axis=2).max() == 0


def test_metal_and_bone_do_not_darken_soft_tissue_in_ct() -> None:
    geometry = grid((32, 32, 32))
    hu = np.full((1, 32, 32, 32), -1000, np.int16)
    hu[:, 8:24, 8:24, 8:24] = 40
    hu[:, 8:14, 8:24, 8:24] = 500
    bone = render(Volume(hu, geometry, "HU"), size=96)
    hu[:, 8:14, 8:24, 8:24] = 3000
    assert render(Volume(hu, geometry, "HU"), size=96) == bone
    air_only = Volume(np.full((1, 8, 8, 8), -1000, np.int16), grid((8, 8, 8)), "HU")
    assert picture(render(air_only)).max() > 0  # the letters


def test_a_constant_image_and_one_thin_slab_are_drawn() -> None:
    assert picture(render(Volume(np.full((1, 9, 9, 9), 3.0, np.float32), grid((9, 9, 9)), "arbitrary"))).shape[0] == 128
    slab = grid((200, 200, 2), spacing_mm=(1.0, 1.0, 0.1))
    assert picture(render(Volume(np.ones((1, 200, 200, 2), np.int16), slab, "arbitrary"))).shape[0] == 128
