"""Grids in words, checked on grids whose angles are known by construction."""

from __future__ import annotations

import numpy as np
import pytest
from phantoms import grid

from medssl.report.words import grid_in_words, oblique_deg, slice_axis, slices_in_words, tilt_deg


@pytest.mark.parametrize(
    ("orientation", "words"),
    [
        ("RAS", "axial slices from feet to head"),
        ("LPI", "axial slices from head to feet"),
        ("RSA", "coronal slices from back to front"),
        ("LIP", "coronal slices from front to back"),
        ("PIR", "sagittal slices from left to right"),
        ("ASL", "sagittal slices from right to left"),
    ],
)
def test_plane_and_order_of_slices(orientation: str, words: str) -> None:
    assert slices_in_words(orientation) == words
    assert grid_in_words(grid(orientation=orientation)).startswith(words)


def test_slices_are_counted_along_the_widest_step() -> None:
    assert slice_axis((1.0, 1.0, 1.0)) == 2
    assert slice_axis((1.0, 1.0, 0.98)) == 2
    assert slice_axis((5.0, 0.5, 0.5)) == 0
    assert grid_in_words(grid(spacing_mm=(5.0, 0.5, 0.5))).startswith("sagittal slices from left to right")


@pytest.mark.parametrize("angle", [1.0, 18.0, 40.0])
def test_the_angle_of_an_oblique_stack(angle: float) -> None:
    oblique = grid(axis=(1.0, 0.0, 0.0), angle_deg=angle)
    assert oblique_deg(oblique) == pytest.approx(angle)
    assert tilt_deg(oblique) == pytest.approx(0.0, abs=1e-5)
    assert f"oblique by {angle:.1f} degrees" in grid_in_words(oblique)
    assert "tilted" not in grid_in_words(oblique)


@pytest.mark.parametrize("angle", [5.0, 15.5, 30.0])
def test_the_angle_of_a_tilted_gantry(angle: float) -> None:
    tilted = grid(shear=float(np.tan(np.radians(angle))))
    assert tilt_deg(tilted) == pytest.approx(angle)
    assert oblique_deg(tilted) == pytest.approx(0.0, abs=1e-5)
    assert f"tilted by {angle:.1f} degrees" in grid_in_words(tilted)


def test_numbers_and_flat_images() -> None:
    assert grid_in_words(grid((512, 512, 150), spacing_mm=(0.8, 0.8, 2.0))) == (
        "axial slices from feet to head, 512 x 512 x 150 voxels of 0.8 x 0.8 x 2 mm"
    )
    assert grid_in_words(grid((640, 480, 1), spacing_mm=(0.14, 0.15, 1.0))) == (
        "one 2D image of 640 columns and 480 rows, pixels of 0.14 x 0.15 mm, 1 mm thick"
    )
