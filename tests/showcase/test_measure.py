"""What is counted of views: what lies outside, and what a window leaves of a crop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch

from medssl.augment.build import build_augment
from medssl.augment.images import Images
from medssl.data.store import StoredCase
from medssl.showcase.measure import shares, warnings
from medssl.views import RandomCrop

MR = Images(modality="MR", region="brain")
CT = Images(domain="HU", modality="CT", region="abdomen")


@dataclass
class Case:
    """A volume in memory, of one value a slice."""

    values: np.ndarray
    case_id: str = "case"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    is_metric: bool = True
    atlas_affine: None = None
    fill: float = 0.0
    channels: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def affine(self) -> np.ndarray:
        return np.array([[-1.0, 0, 0, 30], [0, 1, 0, -7], [0, 0, 1, 3], [0, 0, 0, 1]])

    @property
    def body_box(self) -> np.ndarray:
        return np.array([(0, 0, 0), self.shape], np.float64)

    def has(self, name: str) -> bool:
        return name == "image"

    def read(self, name: str, start: Any, shape: Any) -> np.ndarray:
        low = [max(0, -first) for first in start]
        high = [max(0, first + n - size) for first, n, size in zip(start, shape, self.shape, strict=True)]
        inside = tuple(slice(max(0, first), max(0, first + n)) for first, n in zip(start, shape, strict=True))
        padded = np.pad(self.values[inside], list(zip(low, high, strict=True)), constant_values=self.fill)
        return padded[None].astype(np.float32)

    def foreground_voxels(self, value: int) -> np.ndarray:
        return np.empty((0, 3), np.int32)


def counted(values: np.ndarray, augments: list[dict[str, Any]], crop: tuple[int, int, int], images: Images) -> Any:
    pipeline = build_augment(augments, images=images)
    case = cast("StoredCase", Case(values))
    sampler = RandomCrop(crop, margin=pipeline.margin(crop, (1.0, 1.0, 1.0)), inside_body=False)
    found = shares([case], sampler, pipeline, crop_voxels=crop, images=images, seed=0)
    return found, warnings(found, pipeline, images=images, cases=[case])


RAMP = np.random.default_rng(0).normal(size=(16, 16, 16))


def test_without_moves_what_lies_outside_is_what_the_sampler_says() -> None:
    found, told = counted(RAMP, [], (16, 16, 32), MR)
    assert found["padded"] == pytest.approx(0.5)
    assert found["outside"] == pytest.approx(0.5, abs=1e-6)
    assert told == ["50.0% of what the views show, on average, lies outside the volume, or beyond what is read for "
                    "them; 50.0% before anything moves (of 64 draws)."]  # fmt: skip


def test_what_moves_bring_in_from_outside_is_counted() -> None:
    shrink = [{"name": "affine", "rotation_deg": [0.0, 0.0, 0.0], "scale": [0.5, 0.5]}]
    found, told = counted(RAMP, shrink, (16, 16, 16), MR)
    assert found["padded"] == 0.0
    inside = (8 / 16) ** 3  # half as long along each axis
    assert found["outside"] == pytest.approx(1 - inside, abs=0.01)
    assert "0.0% before anything moves" in told[0]
    found, told = counted(RAMP, [{"name": "mirror", "axes": ["LR"]}], (16, 16, 16), MR)
    assert found["outside"] == pytest.approx(0.0, abs=1e-6)


def test_a_window_that_leaves_black_and_white_is_warned_of_by_its_bounds_and_air_does_not_count() -> None:
    values = np.full((16, 16, 16), -1000.0)
    values[:8] = 40.0
    values[:6, :, :8] = 900.0
    lost = 6 * 8 / (8 * 16)
    window = [{"name": "window", "low_hu": -175.0, "high_hu": 250.0}]
    found, told = counted(values, window, (16, 16, 16), CT)
    assert found["saturated"] == pytest.approx(lost)
    assert len(told) == 1
    assert "all black or all white behind window -175 to 250" in told[0]
    wide = [{"name": "window", "low_hu": -1000.0, "high_hu": 1000.0}]
    found, told = counted(values, wide, (16, 16, 16), CT)
    assert (found["saturated"], told) == (0.0, [])


def test_without_a_window_nothing_is_lost_behind_one() -> None:
    assert "saturated" not in counted(RAMP, [], (16, 16, 16), MR)[0]
    assert torch.is_grad_enabled()
