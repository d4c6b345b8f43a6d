"""What is measured on held-out cases: right for an encoder that knows, and for one that knows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from medssl.checks import FrozenFeatures, HeldOut, _DescribedCrop
from medssl.methods.mae import MAE, Config
from medssl.nn.backbone import build_backbone
from medssl.trainable import Batch, Losses, Trainable

SHAPE = (24, 20, 16)


@dataclass(frozen=True)
class FakeCase:
    """Channels 0 to 2 hold the place of each voxel, 3 whether it belongs to structure 7, 4 to structure 9."""

    case_id: str
    is_labelled: bool = True
    spacing_mm: tuple[float, float, float] = (1.0, 2.0, 3.0)
    shape: tuple[int, int, int] = SHAPE
    channels: int = 5
    is_metric: bool = True
    atlas_affine: None = None
    fill: float = 0.0

    @property
    def affine(self) -> np.ndarray:
        return np.diag([*self.spacing_mm, 1.0])

    @property
    def body_box(self) -> np.ndarray:
        return np.array([(0, 0, 0), self.shape], dtype=np.float64)

    def has(self, name: str) -> bool:
        return name != "label" or self.is_labelled

    def foreground_voxels(self, value: int) -> np.ndarray:
        return np.argwhere(np.ones(SHAPE)).astype(np.int32)

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        place = np.indices(SHAPE)
        label = np.where(place[0] < 9, 7, np.where(place[1] > 12, 9, 0))
        if name == "label":
            array = label[None].astype(np.uint8)
        else:
            array = np.stack([*place, label == 7, label == 9]).astype(np.float32)
        low = np.maximum(start, 0)
        high = np.minimum(np.add(start, shape), SHAPE)
        assert (low == start).all()
        assert (high == np.add(start, shape)).all()
        return array[:, *(slice(a, b) for a, b in zip(low, high, strict=True))]


class Knows(MAE):
    """Its embedding is the mean of each channel: the place of the crop, and how much of each structure is in it."""

    def embed(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3, 4))


class KnowsNothing(MAE):
    """A collapsed encoder."""

    def embed(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 5)


def method(cls: type[MAE]) -> MAE:
    config = Config.parse({"crop_voxels": [8, 8, 8], "block_voxels": [4, 4, 4], "augment": {"preset": "none"}})
    return cls(config, encoder=build_backbone(tiny.BACKBONE, in_channels=5, spatial_dims=3), seed=0)


def frozen(*, labelled: Sequence[bool] = (True, True), label_values: Sequence[int] = (7, 9)) -> FrozenFeatures:
    sides: list[Any] = [
        [FakeCase(f"{side}{index}", is_labelled=labelled[side]) for index in range(count)]
        for side, count in ((0, 8), (1, 4))
    ]
    return FrozenFeatures(
        *sides, crop_voxels=(6, 6, 6), crops_per_case=16, label_values=label_values, seed=0, spatial_dims=3
    )


def test_an_encoder_that_knows_place_and_structure_gets_full_marks() -> None:
    found = frozen()(method(Knows), 0)
    assert found["position_r2"] > 0.7
    assert found["share_r2"] > 0.7
    assert found["octant_knn"] > 0.8
    assert found["structure_linear"] > 0.85
    assert found["structure_knn"] > 0.85
    assert found["rank_me"] > 2


def test_a_collapsed_encoder_is_found_out() -> None:
    found = frozen()(method(KnowsNothing), 0)
    assert found["position_r2"] < 0.05
    assert found["share_r2"] < 0.05
    assert found["octant_knn"] < 0.4
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("labelled", "label_values"), [((True, False), (7, 9)), ((False, True), (7, 9)), ((True, True), ())]
)
def test_structures_are_only_measured_where_both_sides_have_labels(
    labelled: Sequence[bool], label_values: Sequence[int]
) -> None:
    found = frozen(labelled=labelled, label_values=label_values)(method(Knows), 0)
    assert "position_r2" in found
    assert not [name for name in found if name.startswith(("share", "structure"))]


def test_every_call_sees_the_same_crops() -> None:
    check, network = frozen(), method(Knows)
    assert check(network, 1) == check(network, 2)


def test_a_trainable_without_embeddings_has_no_probes() -> None:
    assert frozen()(Counting(), 0) == {}


def test_the_share_of_a_structure_is_that_of_the_crop_itself() -> None:
    sampler = _DescribedCrop((5, 6, 7), (7, 9))
    for seed in range(50):
        view = sampler([FakeCase("a")], np.random.default_rng(seed))
        assert view["shares"] == pytest.approx(view["image"][3:].mean(axis=(1, 2, 3)))
    unlabelled = sampler([replace(FakeCase("a"), is_labelled=False)], np.random.default_rng(0))
    assert np.isnan(unlabelled["shares"]).all()


class Counting(Trainable):
    """Its loss is the mean of the batch, which it doubles beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        assert not training
        assert not torch.is_autocast_enabled("cpu")
        return batch.with_tensors({"image": 2 * batch["image"]})

    def forward(self, batch: Batch) -> Losses:
        total = batch["image"].mean() * self.weight.sum()
        return Losses(total, {"fit": total}, {"twice": 2 * total.detach()})


def test_the_held_out_loss_is_the_mean_over_its_batches() -> None:
    batches = [
        Batch({"image": torch.full((2, 1), value)}, torch.zeros(2, dtype=torch.int64), ("a", "b"))
        for value in (1.0, 4.0)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert HeldOut(batches)(Counting(), 0) == {"loss": 5.0, "fit": 5.0, "twice": 10.0}
