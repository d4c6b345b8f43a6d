"""Sliding windows against the whole-volume pass, MONAI, and a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference

from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.evaluation.sliding_window import Settings, mirrored, sliding_window, window_starts


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, 19),) * 3),
    window=st.tuples(*(st.integers(1, 12),) * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    batch=st.integers(1, 3),
)
def test_a_network_that_changes_nothing_gives_the_volume_back(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, batch: int
) -> None:
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    scores = sliding_window(identity, image, window=window, num_classes=2, overlap=overlap, batch=batch)
    assert scores.shape == image.shape
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, image, atol=1e-5)


def test_pointwise_scores_equal_the_whole_volume_pass() -> None:
    image = np.random.default_rng(1).normal(size=(1, 20, 17, 9)).astype(np.float32)
    network = lambda x: torch.cat((torch.sin(x), x**2, -x), dim=1)
    whole = network(torch.from_numpy(image)[None])[0].numpy()
    scores = sliding_window(network, image, window=(8, 8, 8), num_classes=3)
    np.testing.assert_allclose(scores, whole, atol=1e-5)


def test_scores_equal_monai_where_the_starts_are_the_same() -> None:
    """24 = 8 + 4 * 4 voxels with windows of 8 and overlap 0.5: both place windows at 0, 4, ..., 16."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv3d(4, 2, 3))
    padded = lambda x: torch.nn.functional.pad(network(x), (1,) * 6)  # zero rim: seams would show
    image = torch.randn(1, 1, 24, 24, 16)
    with torch.no_grad():
        ours = sliding_window(padded, image[0].numpy(), window=(8, 8, 8), num_classes=2, batch=3)
        theirs = sliding_window_inference(image, (8, 8, 8), 1, padded, overlap=0.5, mode="gaussian", sigma_scale=0.125)
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-4)


def test_a_small_volume_is_padded_on_both_sides_with_the_fill() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x

    image = np.ones((1, 3, 4, 1), dtype=np.float32)
    sliding_window(network, image, window=(6, 4, 4), num_classes=1, fill=-1024)
    found = seen[0][0, 0]
    assert len(seen) == 1
    assert found.shape == (6, 4, 4)
    # as views.LabelledCrop places a crop that is larger than its volume: start (3 - 6) // 2 = -2, (1 - 4) // 2 = -2
    assert found[2:5, :, 2].eq(1).all()
    assert int(found.eq(-1024).sum()) == 6 * 4 * 4 - 12


@pytest.mark.parametrize(
    ("size", "window", "overlap", "expected"),
    [
        (160, 96, 0.5, [0, 32, 64]),
        (96, 96, 0.5, [0]),
        (50, 96, 0.5, [0]),
        (97, 96, 0.0, [0, 1]),
        (200, 100, 0.0, [0, 100]),
        (5, 1, 0.9, [0, 1, 2, 3, 4]),
    ],
)
def test_windows_are_spread_evenly_and_few(size: int, window: int, overlap: float, expected: list[int]) -> None:
    assert window_starts(size, window, overlap=overlap) == expected


@settings(derandomize=True)
@given(size=st.integers(1, 300), window=st.integers(1, 100), overlap=st.floats(0, 0.9))
def test_windows_cover_every_voxel_and_overlap_enough(size: int, window: int, overlap: float) -> None:
    starts = window_starts(size, window, overlap=overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - window)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, np.floor(window * (1 - overlap)) + 1)).all()
    assert (steps <= window).all()


def test_mirroring_averages_over_all_flips_along_anatomical_axes() -> None:
    weight = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    network = lambda x: x * weight  # depends on the place in the window
    x = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    found = mirrored(network, ("SI", "LR"), orientation="RAS")(x)
    flips = [(), (2,), (4,), (2, 4)]
    expected = torch.stack([network(x.flip(dims)).flip(dims) if dims else network(x) for dims in flips]).mean(dim=0)
    torch.testing.assert_close(found, expected)
    along_y = mirrored(network, ("LR",), orientation="PLS")(x)
    torch.testing.assert_close(along_y, (network(x) + network(x.flip(3)).flip(3)) / 2)
    assert mirrored(network, (), orientation="RAS") is network


def test_scores_of_another_shape_or_not_finite_are_refused() -> None:
    image = np.zeros((1, 4, 4, 4), dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"scores of shape \(1, 1, 4, 4, 4\)") as error:
        sliding_window(identity, image, window=(4, 4, 4), num_classes=3)
    assert error.value.code == "E_CONTRACT"
    with pytest.raises(CaseError, match="not finite") as fault:
        sliding_window(lambda x: x / 0, image, window=(4, 4, 4), num_classes=1)
    assert fault.value.code == "E_NONFINITE"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap 1.0"),
        ({"batch": 0}, "batch 0"),
        ({"mirror_axes": ("UD",)}, "mirror_axes: UD"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**options)


def test_an_impossible_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="three sizes"):
        sliding_window(identity, np.zeros((1, 4, 4, 4), dtype=np.float32), window=(4, 4), num_classes=1)
