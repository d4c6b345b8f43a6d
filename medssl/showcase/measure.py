"""What goes wrong in views, counted over draws as training makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float32, Float64, Shaped
from torch import Tensor

from medssl.augment.base import Params, compose
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.augment.resample import resample
from medssl.augment.spatial import Mirror
from medssl.data.loader import fixed_batches
from medssl.data.store import StoredCase
from medssl.showcase.bench import group_size, takes_labels
from medssl.showcase.words import fixed_in_words
from medssl.trainable import Batch
from medssl.views import ViewSampler

DRAWS = 64

_BATCH = 8
_FLAT = 0.98
_LEFT = 0.4
_FEWEST_VOXELS = 8
_LIMITS = {"padded": 1.0, "outside": 0.2, "saturated": 0.3, "cut": 0.1, "hu_clipped": 0.05}
_AIR_HU = -900.0
_LEAST_ABOVE_AIR = 0.01
_TOLERANCE = 1e-6  # voxels
_WITHOUT_SIDES = ("skin", "tissue")

WORDS: Mapping[str, str] = {
    "blank": "of the views have one value only",
    "flat": "of the views are pure black or white in 98 % of their voxels",
    "fallback": "of the views failed, and the plain crop took their place",
    "constant": "of the crops have one value only, also after four further draws",
    "anywhere": "of the crops had no body or structure to be centred on, and lie anywhere",
    "padded": "of the crops, on average, lies outside the volume before anything moves",
    "outside": "of what the views show, on average, lies outside the volume, or beyond what is read for them",
    "saturated": "of the voxels above air, in crops without augmentation, are all black or all white",
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
        assert frame is not None  # noqa: S101  every crop sampler gives one
        label = batch["label"] if "label" in batch and takes_labels(pipeline) else None
        drawn = pipeline.draw(batch.seeds)
        with torch.no_grad():
            view = pipeline.apply_to(batch["image"], drawn, label=label, frame=frame)
        plain = Pipeline([]).plain(batch["image"], label, frame=frame)
        new = {**batch.notes, **view.notes, **_emptiness(view.image, pipeline)}
        new["outside"] = _outside(batch, {case.case_id: case for case in cases}, pipeline, drawn, frame)
        if pipeline.fixed:
            new["saturated"] = _saturated(plain.image, pipeline.normalise(plain.image), images)
        if plain.label is not None and view.label is not None:
            new["cut"] = _cut(plain.label, view.label)
        for name, values in new.items():
            found.setdefault(name, []).append(values.float().cpu())
    joined = {name: torch.cat(found[name]) for name in WORDS if name in found}
    return {name: float(values.mean()) for name, values in joined.items() if len(values)}


def warnings(
    found: Mapping[str, float], pipeline: Pipeline, *, images: Images, cases: Sequence[StoredCase]
) -> list[str]:
    """What a reader must know first, one sentence each."""
    limits = {name: _LIMITS.get(name, 0.0) for name in WORDS}
    more = {
        "outside": f"; {found.get('padded', 0.0):.1%} before anything moves",
        "saturated": f" behind {fixed_in_words(pipeline.fixed)}, and nothing can be learned from them; another window, "
        "or bounds, may suit the images better",
    }
    told = [
        f"{found[name]:.1%} {WORDS[name]}{more.get(name, '')} (of {DRAWS} draws)."
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


def _outside(
    batch: Batch, cases: Mapping[str, StoredCase], pipeline: Pipeline, drawn: Sequence[Params], frame: Frame
) -> Float32[Tensor, " b"]:
    """Share of each view that was read from outside the volume, or from beyond the box: moves applied to ones."""
    boxes = batch["image"].shape[2:]
    inside = [_inside(cases[name], batch, row, boxes) for row, name in enumerate(batch.case_ids)]
    to_box, moved = compose(list(zip(pipeline.spatial, drawn, strict=False)), frame)  # type: ignore[arg-type]
    ones = torch.stack(inside).float()[:, None]
    seen = resample(ones, to_box, shape=frame.shape, displacement=moved, extent=frame.extent, fill=0.0)[0]
    return 1 - seen.flatten(1).mean(dim=1)


def _inside(case: StoredCase, batch: Batch, row: int, box: Sequence[int]) -> Bool[Tensor, "*s"]:
    """Which voxels of a box lie in the volume; the axes of the box run along those of the case."""
    crop = batch["image_affine"][row].double() @ torch.linalg.inv(batch["image_to_box"][row].double())
    to_case: Float64[Tensor, "4 4"] = torch.linalg.solve(torch.tensor(case.affine, dtype=torch.float64), crop)
    inside = torch.ones(tuple(box), dtype=torch.bool)
    for axis, length in enumerate(box):
        along = int(to_case[:3, axis].abs().argmax())
        place = to_case[along, axis] * torch.arange(length, dtype=torch.float64) + to_case[along, 3]
        is_in = (place > -0.5 - _TOLERANCE) & (place < case.shape[along] - 0.5 + _TOLERANCE)
        inside &= is_in.reshape(-1, *[1] * (len(box) - axis - 1))
    return inside


def _saturated(
    stored: Float32[Tensor, "b c *s"], shown: Float32[Tensor, "b k *s"], images: Images
) -> Float32[Tensor, " n"]:
    """Of each crop with something in it, the share of what is above air that is 0 or 1 in all channels."""
    brightest = stored.amax(dim=1).flatten(1)
    air = brightest.new_tensor(_AIR_HU) if images.domain == "HU" else brightest.amin(dim=1, keepdim=True)
    is_above = brightest > air
    is_lost = ((shown <= 0) | (shown >= 1)).all(dim=1).flatten(1)
    share = (is_above & is_lost).sum(dim=1) / is_above.sum(dim=1).clamp(min=1)
    return share[is_above.float().mean(dim=1) > _LEAST_ABOVE_AIR]


def _cut(before: Shaped[Tensor, "b 1 *s"], after: Shaped[Tensor, "b 1 *s"]) -> Float32[Tensor, " n"]:
    """For each structure of each crop, 1 where most of it was lost."""
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
