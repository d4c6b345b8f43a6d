"""Sliding windows against the whole-volume pass, MONAI, and a loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference

from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.evaluation.sliding_window import Settings, mirrored, score_slabs, sliding_window, window_starts


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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, 21),) * 3),
    window=st.tuples(*(st.integers(3, 9),) * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    batch=st.integers(1, 4),
)
def test_scores_equal_monai_with_its_own_windows(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, batch: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 1, 3, 3, 3, generator=generator)
    network = lambda x: torch.nn.functional.conv3d(x, kernel, padding=1)  # zeros around a window: seams show
    image = torch.randn(1, 1, *shape, generator=generator)
    options = {"window": window, "num_classes": 3, "overlap": overlap, "batch": batch, "layout": "monai"}
    ours = sliding_window(network, image[0].numpy(), **options)
    theirs = sliding_window_inference(
        image, window, batch, network, overlap=overlap, mode="gaussian", sigma_scale=0.125
    )
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-4)


def test_slabs_hold_little_more_than_a_window_and_begin_with_the_last_plane_of_the_former() -> None:
    image = np.random.default_rng(0).normal(size=(1, 9, 40, 7)).astype(np.float32)
    found = []
    whole = sliding_window(identity, image, window=(8, 8, 4), num_classes=1)
    for slab in score_slabs(identity, image, window=(8, 8, 4), num_classes=1, settings=Settings()):
        assert slab.axis == 1
        assert len(slab.scores) <= 9
        assert slab.scores.untyped_storage().nbytes() <= 4 * 9 * 9 * 7
        expected = np.moveaxis(whole, 2, 0)[slab.start : slab.start + len(slab.scores)]
        np.testing.assert_array_equal(slab.scores.numpy(), expected)
        found.append((slab.start, slab.start + len(slab.scores)))
    assert found[0][0] == 0
    assert found[-1][1] == 40
    assert all(after[0] == before[1] - 1 for before, after in itertools.pairwise(found))


def test_windows_outside_the_body_are_not_seen_and_are_background() -> None:
    image = np.ones((1, 32, 8, 8), dtype=np.float32)
    body = np.zeros((32, 8, 8), dtype=bool)
    body[20, 4, 4] = True
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.cat((x, x + 1, x), dim=1)

    slabs = score_slabs(
        network, image, window=(8, 8, 8), num_classes=3, settings=Settings(overlap=0.5), body=body, background=2
    )
    best = np.full((32, 8, 8), -1)
    for slab in slabs:
        best[slab.start : slab.start + len(slab.scores)] = slab.scores.argmax(dim=1).numpy()
    assert sum(seen) == 2  # windows begin at 0, 4, ..., 24; those at 16 and 20 hold voxel 20
    assert (best[16:28] == 1).all()
    assert (best[:16] == 2).all()
    assert (best[28:] == 2).all()


def test_classes_of_two_sides_change_places_in_a_mirror_of_left_and_right() -> None:
    x = torch.randn(1, 3, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    network = lambda x: x * torch.arange(4 * 5 * 3).reshape(3, 4, 5)
    found = mirrored(network, ("LR",), orientation="RAS", swaps=[(1, 2)])(x)
    flipped = network(x.flip(2)).flip(2)[:, [0, 2, 1]]
    torch.testing.assert_close(found, (network(x) + flipped) / 2)


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
