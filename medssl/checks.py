"""What is measured on held-out cases while training goes on: the loss is never looked at alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from medssl.augment.frame import Frame
from medssl.augment.resample import resample
from medssl.data.loader import fixed_batches
from medssl.data.store import StoredCase
from medssl.engine.monitor import embedding_health
from medssl.engine.probe import knn_probe, linear_probe, regression_probe
from medssl.methods.base import Method
from medssl.trainable import Batch, Trainable
from medssl.views import CaseArrays, RandomCrop, ViewSampler

_BATCH = 16


class HeldOut:
    """Loss, terms and monitors of the trainable itself on fixed batches of held-out cases."""

    name = "held_out"
    every = 0

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __call__(self, trainable: Trainable, step: int) -> dict[str, float]:  # noqa: ARG002  the loop tells every check
        """Mean of every scalar over the batches."""
        found = [trainable(_prepared(trainable, batch)).scalars() for batch in self.batches]
        return {name: float(np.mean([scalars[name] for scalars in found])) for name in found[0]}


def _prepared(trainable: Trainable, batch: Batch) -> Batch:
    device = next(trainable.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return trainable.prepare(batch.to(device), training=False)


class FrozenFeatures:
    """Rank of the embeddings, and what simple readers find in them, fitted on training cases and scored on others.

    Targets that cost nothing: the place of a crop in its volume (R², linear), and which octant of the volume it is in
    (accuracy, k nearest neighbours). Where cases have labels: the share of the crop that each structure fills (R²,
    linear) and which structure, or none, fills most of it (accuracy, linear and k nearest neighbours), beside which
    ``structure_majority`` is the accuracy of always naming the most frequent one of the training crops.

    Args:
        fit_cases: Training cases.
        held_out: Cases that are never trained on.
        crop_voxels: Size of the crops that are embedded.
        crop_mm: Their edge lengths; None takes the voxels of the store as they are.
        crops_per_case: Number of crops of each case.
        label_values: Structures.
        seed: Of the crops, which are the same at every call.
        spatial_dims: 2 or 3.
    """

    name = "probe"
    every = 0

    def __init__(
        self,
        fit_cases: Sequence[StoredCase],
        held_out: Sequence[StoredCase],
        *,
        crop_voxels: tuple[int, int, int],
        crop_mm: Sequence[float] | None = None,
        crops_per_case: int,
        label_values: Sequence[int],
        seed: int,
        spatial_dims: int,
    ) -> None:
        sampler = _DescribedCrop(crop_voxels, label_values, crop_mm=crop_mm)
        self._crop_voxels = crop_voxels
        self._sides = [
            fixed_batches(
                cases,
                sampler,
                count=-(-len(cases) * crops_per_case // _BATCH),
                batch_size=_BATCH,
                seed=seed,
                spatial_dims=spatial_dims,
            )
            for cases in (fit_cases, held_out)
        ]

    def __call__(self, trainable: Trainable, step: int) -> dict[str, float]:  # noqa: ARG002  the loop tells every check
        """Named scores; empty for a trainable without embeddings."""
        if not isinstance(trainable, Method):
            return {}
        train, test = (_Described(trainable, batches, self._crop_voxels) for batches in self._sides)
        found = embedding_health(torch.from_numpy(test.features))
        found["position_r2"] = regression_probe(
            train.features, train.position, test_features=test.features, test_targets=test.position
        )
        octants = [(side.position > 0.5) @ np.array([1, 2, 4]) for side in (train, test)]
        found["octant_knn"] = knn_probe(train.features, octants[0], test_features=test.features, test_labels=octants[1])
        if train.labelled.any() and test.labelled.any():
            found |= _label_scores(train, test)
        return found


class _DescribedCrop:
    """A random crop with its place and, where there is a label, the share of each structure in it."""

    cases_per_sample = 1

    def __init__(
        self, crop_voxels: tuple[int, int, int], label_values: Sequence[int], *, crop_mm: Sequence[float] | None = None
    ) -> None:
        self._crop: ViewSampler = RandomCrop(crop_voxels, crop_mm=crop_mm)
        self._values = tuple(label_values)

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        case = cases[0]
        view = self._crop(cases, rng)
        shares = np.full(len(self._values), np.nan, np.float32)
        if case.has("label"):
            start, size = np.rint(view["crop_box_mm"] / np.asarray(case.spacing_mm)).astype(int).tolist()
            label = case.read("label", start, [max(1, n) for n in size])
            shares = np.array([(label == value).mean() for value in self._values], np.float32)
        box = {name: view[name] for name in ("image", "image_to_box", "image_spacing_mm")}
        return {**box, "position": view["position"], "shares": shares}


class _Described:
    """Features of the crops of one side, and what is known of each crop."""

    def __init__(self, method: Method, batches: Sequence[Batch], crop_voxels: Sequence[int]) -> None:
        device = next(method.parameters()).device
        embedded = [method.embed(_crops(batch.to(device), crop_voxels)).float().cpu() for batch in batches]
        self.features: Float32[np.ndarray, "n d"] = torch.cat(embedded).numpy()
        self.position: Float[np.ndarray, "n 3"] = torch.cat([batch["position"] for batch in batches]).numpy()
        self.shares: Float[np.ndarray, "n k"] = torch.cat([batch["shares"] for batch in batches]).numpy()
        self.labelled = ~np.isnan(self.shares).any(axis=1) if self.shares.shape[1] else np.zeros(len(self.shares), bool)

    def only_labelled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, shares, and the structure that fills most of each crop (0 where none fills any)."""
        features, shares = self.features[self.labelled], self.shares[self.labelled]
        most = np.where(shares.max(axis=1) > 0, shares.argmax(axis=1) + 1, 0)
        return features, shares, most


def _crops(batch: Batch, crop_voxels: Sequence[int]) -> Float32[Tensor, "b c *s"]:
    """The crops in their boxes, without augmentation."""
    frame = Frame.of(batch.tensors, "image", shape=crop_voxels)
    assert frame is not None  # noqa: S101  the sampler gives one
    return resample(batch["image"], frame.to_box, shape=frame.shape, extent=frame.extent)[0]


def _label_scores(train: _Described, test: _Described) -> dict[str, float]:
    features, shares, most = train.only_labelled()
    test_features, test_shares, test_most = test.only_labelled()
    return {
        "share_r2": regression_probe(features, shares, test_features=test_features, test_targets=test_shares),
        "structure_linear": linear_probe(features, most, test_features=test_features, test_labels=test_most),
        "structure_majority": float(np.mean(test_most == np.bincount(most).argmax())),
        "structure_knn": knn_probe(features, most, test_features=test_features, test_labels=test_most),
    }
