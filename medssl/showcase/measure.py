"""What goes wrong in views, counted over draws as training makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.augment.spatial import Mirror
from medssl.data.loader import fixed_batches
from medssl.data.store import StoredCase
from medssl.showcase.bench import group_size, takes_labels
from medssl.views import ViewSampler

DRAWS = 64

_BATCH = 8
_FLAT = 0.98
_LEFT = 0.4
_FEWEST_VOXELS = 8
_LIMITS = {"padded": 0.25, "cut": 0.1, "hu_clipped": 0.05}
_WITHOUT_SIDES = ("skin", "tissue")

WORDS: Mapping[str, str] = {
    "blank": "of the views have one value only",
    "flat": "of the views are pure black or white in 98 % of their voxels",
    "fallback": "of the views failed, and the plain crop took their place",
    "constant": "of the crops have one value only, also after four further draws",
    "anywhere": "of the crops had no body or structure to be centred on, and lie anywhere",
    "padded": "of the crops, on average, lies outside the volume",
    "cut": "of the structures lost more than 60 % of their voxels",
    "hu_clipped": "of the voxels left the range of HU by more than 100 and were clipped",
}
"""What each share is a share of."""


def shares(
    cases: Sequence[StoredCase],
    sampler: ViewSampler,
    pipeline: Pipeline,
    *,
    crop_voxels: Sequence[int],
    images: Images,
    seed: int,
) -> dict[str, float]:
    """Draw 64 views and give each share of :data:`WORDS` that can be known of them."""
    size = -(-_BATCH // group_size(pipeline)) * group_size(pipeline)
    found: dict[str, list[Tensor]] = {}
    batches = fixed_batches(
        cases, sampler, count=-(-DRAWS // size), batch_size=size, seed=seed, spatial_dims=images.spatial_dims
    )
    for batch in batches:
        frame = Frame.of(batch.tensors, "image", shape=crop_voxels)
        label = batch["label"] if "label" in batch and takes_labels(pipeline) else None
        view = pipeline(batch["image"], batch.seeds, label, frame=frame)
        new = {**batch.notes, **view.notes, **_emptiness(view.image, pipeline)}
        if label is not None and view.label is not None:
            new["cut"] = _cut(pipeline.plain(batch["image"], label, frame=frame).label, view.label)
        for name, values in new.items():
            found.setdefault(name, []).append(values.float().cpu())
    joined = {name: torch.cat(found[name]) for name in WORDS if name in found}
    return {name: float(values.mean()) for name, values in joined.items() if len(values)}


def warnings(
    found: Mapping[str, float], pipeline: Pipeline, *, images: Images, cases: Sequence[StoredCase]
) -> list[str]:
    """What a reader must know first, one sentence each."""
    limits = {name: _LIMITS.get(name, 0.0) for name in WORDS}
    told = [
        f"{found[name]:.1%} {WORDS[name]} (of {DRAWS} draws)."
        for name, most in limits.items()
        if found.get(name, 0.0) > most
    ]
    if images.region not in _WITHOUT_SIDES and any("LR" in axes for axes in _mirrored(pipeline)):
        told.append(
            "mirror is asked for along LR: left and right change places, and labels of paired structures must be "
            "named in swap_labels."
        )
    unknown = sum(not case.is_metric for case in cases)
    if unknown and _speaks_of_mm(pipeline):
        told.append(f"{unknown} of {len(cases)} cases state no voxel size: for them a mm in the options is a pixel.")
    return told


def _emptiness(image: Float32[Tensor, "b c *s"], pipeline: Pipeline) -> dict[str, Float32[Tensor, " b"]]:
    values = image.flatten(1)
    low, high = values.aminmax(dim=1)
    found = {"blank": (high - low < 1e-6).float()}
    if pipeline.fixed:
        found["flat"] = (((values <= 0) | (values >= 1)).float().mean(dim=1) > _FLAT).float()
    return found


def _cut(before: Shaped[Tensor, "b 1 *s"] | None, after: Shaped[Tensor, "b 1 *s"]) -> Float32[Tensor, " n"]:
    """For each structure of each crop, 1 where most of it was lost."""
    assert before is not None  # noqa: S101  a label was given
    lost = []
    for old, new in zip(before, after, strict=True):
        for value in old.unique().tolist():
            count = int((old == value).sum())
            if value != 0 and count >= _FEWEST_VOXELS:
                lost.append(float(int((new == value).sum()) < _LEFT * count))
    return torch.tensor(lost)


def _mirrored(pipeline: Pipeline) -> list[Sequence[str]]:
    return [augment.config.axes for augment in pipeline.spatial if isinstance(augment, Mirror)]


def _speaks_of_mm(pipeline: Pipeline) -> bool:
    augments = [*pipeline.spatial, *pipeline.intensity]
    return any(name.endswith("_mm") for augment in augments for name in augment.config.to_dict())
