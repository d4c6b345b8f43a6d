"""Pictures: what is drawn stands where the numbers say, looked up in matplotlib's own objects or in pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from medssl.report import figures
from medssl.report.figures import label_curve, overlay, training_curve


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert not image.text.get("Software")
        return np.asarray(image.convert("RGB")).astype(int)


def close_to(image: np.ndarray, colour: str, *, tolerance: int = 40) -> np.ndarray:
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return (np.abs(image - wanted) <= tolerance).all(axis=-1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the bytes."""
    seen: list[Figure] = []
    png = figures._png

    def keep(figure: Figure) -> bytes:
        seen.append(figure)
        return png(figure)

    monkeypatch.setattr(figures, "_png", keep)
    return seen


def test_a_label_curve_draws_every_arm_with_its_interval(drawn: list[Figure]) -> None:
    curves = {
        "scratch": [(4, 0.5, 0.4, 0.6), (16, 0.7, 0.65, 0.75)],
        "voco": [(4, 0.6, 0.5, 0.65), (16, 0.72, 0.7, 0.8)],
    }
    pixels(label_curve(curves, ylabel="score", title="A title"))
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("labelled subjects", "score", "A title")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["scratch", "voco"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "16"]
    for container, points in zip(axes.containers, curves.values(), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata(), [point[1] for point in points])
        np.testing.assert_allclose(line.get_xdata(), [point[0] for point in points], rtol=0.03)
        ends = [sorted(segment[:, 1]) for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [point[2:] for point in points])


def test_an_interval_that_is_unknown_still_gives_a_curve() -> None:
    pixels(label_curve({"scratch": [(4, 0.5, float("nan"), float("nan"))]}))


def test_a_training_curve_has_the_level_of_a_network_that_learned_nothing(drawn: list[Figure]) -> None:
    pixels(training_curve({"loss": [(1, 3.0), (2, 2.0)]}, ylabel="loss", chance=2.5))
    loss, chance = drawn[0].axes[0].get_lines()
    np.testing.assert_allclose(loss.get_xydata(), [[1, 3], [2, 2]])
    assert set(chance.get_ydata()) == {2.5}
    pixels(training_curve({"loss": [(1, 3.0)], "other": [(1, 2.0)]}, ylabel="loss"))
    assert len(drawn[1].axes[0].get_lines()) == 2


def test_an_overlay_has_a_row_a_map_and_shows_the_label_in_every_plane() -> None:
    image = np.random.default_rng(0).uniform(0, 1, (20, 24, 16)) * 0
    label = np.zeros((20, 24, 16), np.uint8)
    label[3:8, 10:20, 4:9] = 1
    one = pixels(overlay(image, {"reference": label}))
    two = pixels(overlay(image, {"reference": label, "prediction": label * 0}))
    assert two.shape[0] > 1.8 * one.shape[0]
    blue = close_to(two, "#00395a")  # half of the first colour on black
    third = two.shape[1] // 3
    for column in range(3):
        upper = blue[: two.shape[0] // 2, column * third : (column + 1) * third]
        lower = blue[two.shape[0] // 2 :, column * third : (column + 1) * third]
        assert upper.sum() > 100
        assert lower.sum() == 0


def test_an_overlay_looks_from_the_front_with_the_head_up_and_true_proportions(drawn: list[Figure]) -> None:
    image = np.zeros((10, 20, 30))
    image[5, 10, 29] = 9.0
    overlay(image, {"nothing": np.zeros((10, 20, 30), np.uint8)}, spacing_mm=(1.0, 2.0, 4.0))
    sagittal, coronal, axial = drawn[0].axes
    assert [ax.get_title() for ax in drawn[0].axes] == ["nothing, sagittal", "nothing, coronal", "nothing, axial"]
    # rows of an image are its vertical axis, origin below: z up in the first two, y up in the third
    for ax, shape, aspect in ((sagittal, (30, 20), 2.0), (coronal, (30, 10), 4.0), (axial, (20, 10), 2.0)):
        shown = ax.get_images()[0]
        assert shown.get_array().shape == shape
        assert shown.origin == "lower"
        assert ax.get_aspect() == pytest.approx(aspect)
    assert coronal.get_images()[0].get_array()[29, 5] == 9.0


def test_a_constant_image_and_values_above_the_colours_are_drawn() -> None:
    label = np.zeros((8, 8, 8), np.uint8)
    label[2:6, 2:6, 2:6] = 9
    pixels(overlay(np.full((8, 8, 8), 3.0), {"reference": label}))
